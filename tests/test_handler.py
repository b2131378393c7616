"""The Inference Endpoint handler, as it lies in a model's repository."""

import base64
import importlib.util
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from conftest import TINY, write_video
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.hub import handler as source


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A model's folder with handler.py, and a video in it."""
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    names = dict(enumerate(["red", "green", "blue"]))
    config = InTIClipVisionConfig(**TINY, num_frames=8, id2label=names, label2id={n: i for i, n in names.items()})
    InTIClipForVideoClassification(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    shutil.copy(source.__file__, folder / "handler.py")
    write_video(folder / "clip.mp4")
    return folder


@pytest.fixture(scope="module")
def module(repository):
    """handler.py loaded from the repository, as an endpoint does."""
    spec = importlib.util.spec_from_file_location("handler", repository / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def handler(module, repository):
    return module.EndpointHandler(str(repository))


@pytest.fixture
def server(repository):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
            else:
                super().do_GET()

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(repository)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def open_network(module, monkeypatch):
    """Lets the handler reach this machine, which it otherwise refuses."""
    real = module.check_address
    monkeypatch.setattr(module, "check_address", lambda url: None if "127.0.0.1" in url else real(url))


def test_url_bytes_and_base64_give_the_models_answer(handler, repository, server, open_network):
    body = (repository / "clip.mp4").read_bytes()
    text = base64.b64encode(body).decode()
    model = InTIClipForVideoClassification.from_pretrained(repository).eval()
    with torch.no_grad():
        logits = model(**InTIClipVideoProcessor.from_pretrained(repository)(body, return_tensors="pt")).logits[0]
    scores = logits.softmax(-1)
    wanted = [
        {"label": model.config.id2label[i], "score": scores[i].item()} for i in scores.argsort(descending=True).tolist()
    ]
    for inputs in (body, text, f"data:video/mp4;base64,{text}", f"{server}/clip.mp4"):
        answer = handler({"inputs": inputs})
        assert [a["label"] for a in answer] == [w["label"] for w in wanted]
        assert [a["score"] for a in answer] == pytest.approx([w["score"] for w in wanted], abs=1e-6)
    (best,) = handler({"inputs": body, "parameters": {"top_k": 1, "function_to_apply": "none"}})
    assert best["score"] == pytest.approx(logits.max().item(), abs=1e-5)
    sigmoid = handler({"inputs": body, "parameters": {"function_to_apply": "sigmoid"}})
    assert sum(a["score"] for a in sigmoid) == pytest.approx(logits.sigmoid().sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, 'needs "inputs"'),
        ({"inputs": ["a", "b"]}, "one video, as a URL, base64 text or bytes; got list"),
        ({"inputs": b""}, "empty"),
        ({"inputs": ""}, "empty"),
        ({"inputs": "no base64!"}, "neither a URL nor base64"),
        ({"inputs": b"no video at all" * 100}, "no video that can be read"),
        ({"inputs": "file:///etc/passwd"}, "neither a URL nor base64"),
        ({"inputs": "http://127.0.0.1/clip.mp4"}, "not on the public internet"),
        ({"inputs": "http://[::1]/clip.mp4"}, "not on the public internet"),
        ({"inputs": "http://localhost:8080/clip.mp4"}, "not on the public internet"),
        ({"inputs": "http://169.254.169.254/latest/meta-data"}, "not on the public internet"),
        ({"inputs": "http:///clip.mp4"}, "name a host"),
        ({"inputs": "http://1.1.1.1:abc/clip.mp4"}, "name a host"),
        ({"inputs": "http://[::1/clip.mp4"}, "neither a URL nor base64|name a host"),
        ({"inputs": "http://[64:ff9b::7f00:1]/clip.mp4"}, "not on the public internet"),
        ({"inputs": "http://[2002:7f00:1::]/clip.mp4"}, "not on the public internet"),
        ({"inputs": "http://224.0.0.1/clip.mp4"}, "not on the public internet"),
        ({"inputs": "data:video/mp4,abcd"}, "must hold base64"),
        ({"inputs": b"ffconcat version 1.0\nfile clip.mp4\n"}, "no video that can be read"),
        ({"inputs": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"}, "no video that can be read"),
        (
            {"inputs": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n"},
            "no video that can",
        ),
        ({"inputs": b"x", "parameters": {"function_to_apply": []}}, "one of softmax, sigmoid, none"),
        ({"inputs": b"x", "parameters": {"top_k": 0}}, "top_k must be a whole number from 1, got 0"),
        ({"inputs": b"x", "parameters": {"topk": 1}}, "may hold top_k and function_to_apply"),
        ({"inputs": b"x", "parameters": [1]}, "may hold top_k and function_to_apply"),
        ({"inputs": b"x", "parameters": {"function_to_apply": "exp"}}, "one of softmax, sigmoid, none"),
    ],
)
def test_what_a_client_can_mend_is_said(data, message, handler):
    with pytest.raises(ValueError, match=message) as caught:
        handler(data)
    assert "\n" not in str(caught.value)


def test_downloads_that_fail(handler, server, open_network):
    with pytest.raises(ValueError, match=r"could not be downloaded \(404\)"):
        handler({"inputs": f"{server}/none.mp4"})
    with pytest.raises(ValueError, match="http:// or https://|could not be downloaded"):
        handler({"inputs": f"{server}/away"})  # redirected to a file
    with pytest.raises(ValueError, match="could not be downloaded"):
        handler({"inputs": "http://127.0.0.1:1/clip.mp4"})


def test_limits(handler, module, repository, server, open_network, monkeypatch):
    body = (repository / "clip.mp4").read_bytes()
    monkeypatch.setattr(module, "MAX_SECONDS", 1.0)
    with pytest.raises(ValueError, match="longer than the 1 s that are taken"):
        handler({"inputs": body})
    monkeypatch.setattr(module, "MAX_SECONDS", 100.0)
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="frames of 48 x 48 are too large"):
        handler({"inputs": body})
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    for inputs in (body, base64.b64encode(body).decode(), f"{server}/clip.mp4"):
        with pytest.raises(ValueError, match="larger than 0 MiB"):
            handler({"inputs": inputs})


def test_damaged_videos(handler, test_data):
    with pytest.raises(ValueError):
        handler({"inputs": (test_data / "videos" / "corrupted.mp4").read_bytes()})


def test_requirements_name_what_the_code_imports():
    assert {line.split(">=")[0] for line in source.REQUIREMENTS.split()} == {"transformers", "torch", "av"}
    assert Path(source.__file__).read_text().count("from .") == 0  # it stands alone in a repository
