"""The Inference Endpoint handler, as it lies in a model's repository."""

import base64
import contextlib
import importlib.util
import io
import json
import shutil
import signal
import socket
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from conftest import TINY, pickle_weights, write_video
from forks import run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig
from hf_inti.hub import handler as source
from hf_inti.model import video_decoding


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
    handler = module.EndpointHandler(str(repository))
    yield handler
    handler.decode.close()


def test_a_pickle_of_weights_is_refused(module, repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path, dirs_exist_ok=True)
    pickle_weights(tmp_path)
    monkeypatch.setattr(module.Decoder, "start", lambda self: None)  # nobody would end its process
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        module.EndpointHandler(str(tmp_path))


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
            elif self.path == "/inside":
                self.send_response(302)
                self.send_header("Location", "http://10.0.0.1/clip.mp4")
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
    real = module.is_public
    monkeypatch.setattr(module, "is_public", lambda place: place == "127.0.0.1" or real(place))


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
        ({}, 'must have "inputs", got none'),
        ({"inputs": ["a", "b"]}, "one video, as a URL, base64 text or bytes, got list"),
        ({"inputs": b""}, "must hold a video, got nothing"),
        ({"inputs": ""}, "must hold a video, got nothing"),
        ({"inputs": "no base64!"}, "must be a URL or base64"),
        ({"inputs": b"no video at all" * 100}, "must be a readable video"),
        ({"inputs": "file:///etc/passwd"}, "must be a URL or base64"),
        ({"inputs": "http://127.0.0.1/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "http://[::1]/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "http://localhost:8080/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "http://169.254.169.254/latest/meta-data"}, "must be on the public internet"),
        ({"inputs": "http:///clip.mp4"}, "name a host"),
        ({"inputs": "http://1.1.1.1:abc/clip.mp4"}, "name a host"),
        ({"inputs": "http://[::1/clip.mp4"}, "must be a URL or base64|name a host"),
        ({"inputs": "http://[64:ff9b::7f00:1]/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "http://[2002:7f00:1::]/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "http://224.0.0.1/clip.mp4"}, "must be on the public internet"),
        ({"inputs": "data:video/mp4,abcd"}, "must hold base64"),
        ({"inputs": b"ffconcat version 1.0\nfile clip.mp4\n"}, "must be a readable video"),
        ({"inputs": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"}, "must be a readable video"),
        (
            {"inputs": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n"},
            "must be a readable video",
        ),
        ({"inputs": b"x", "parameters": {"function_to_apply": []}}, "one of softmax, sigmoid, none"),
        ({"inputs": b"x", "parameters": {"top_k": 0}}, "top_k must be a whole number of at least 1, got 0"),
        ({"inputs": b"x", "parameters": {"topk": 1}}, "must be a mapping of top_k and function_to_apply, got"),
        ({"inputs": b"x", "parameters": [1]}, "must be a mapping of top_k and function_to_apply, got"),
        ({"inputs": b"x", "parameters": {"function_to_apply": "exp"}}, "one of softmax, sigmoid, none"),
    ],
)
def test_client_errors(data, message, handler):
    with pytest.raises(ValueError, match=message) as caught:
        handler(data)
    assert "\n" not in str(caught.value)


def test_downloads_that_fail(handler, server, open_network):
    with pytest.raises(ValueError, match="must be downloadable, got 404"):
        handler({"inputs": f"{server}/none.mp4"})
    with pytest.raises(ValueError, match="http:// or https://|must be downloadable"):
        handler({"inputs": f"{server}/away"})  # redirected to a file
    with pytest.raises(ValueError, match="must be downloadable"):
        handler({"inputs": "http://127.0.0.1:1/clip.mp4"})


def resolver(monkeypatch, module, *answers: str) -> list[str]:
    """Names lead to one of these addresses after the other; returns the names that were asked for."""
    asked = []

    def getaddrinfo(host, port, *args, **kwargs):
        place = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [(module.socket.AF_INET, module.socket.SOCK_STREAM, 6, "", (place, port))]

    monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_the_address_that_was_checked_is_the_one_that_is_reached(handler, module, server, monkeypatch):
    """A name that leads to a public address when asked first and to this machine when asked again."""
    port = server.rpartition(":")[2]
    reached = []

    def refuse(address, *args, **kwargs):
        reached.append(address[0])
        raise ConnectionRefusedError

    asked = resolver(monkeypatch, module, "1.1.1.1", "127.0.0.1")
    monkeypatch.setattr(module.socket, "create_connection", refuse)
    with pytest.raises(ValueError, match="must be downloadable"):
        handler({"inputs": f"http://rebinding.example:{port}/clip.mp4"})
    assert asked == ["rebinding.example"] and reached == ["1.1.1.1"]
    with pytest.raises(ValueError, match="must be on the public internet"):  # asked anew, it is checked anew
        handler({"inputs": f"http://rebinding.example:{port}/clip.mp4"})
    assert reached == ["1.1.1.1"]


def test_a_name_with_one_private_address_is_refused(handler, module, monkeypatch):
    answers = [(2, 1, 6, "", ("1.1.1.1", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *args, **kwargs: answers)
    with pytest.raises(ValueError, match="must be on the public internet"):
        handler({"inputs": "http://mixed.example/clip.mp4"})


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:1.1.1.1", True),
        ("2002:101:101::1", True),  # 6to4 of 1.1.1.1
        ("64:ff9b::101:101", True),  # NAT64 of 1.1.1.1
        ("0.0.0.0", False),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.0.192", False),  # Oracle's metadata
        ("168.63.129.16", False),  # Azure's platform
        ("224.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),  # IPv4-compatible
        ("::ffff:10.0.0.1", False),
        ("::ffff:0:7f00:1", False),  # SIIT
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2002:a00:1::1", False),
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_public_addresses(module, address, public):
    assert module.is_public(address) is public


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::]", "[::ffff:10.0.0.1]"])
def test_other_ways_to_write_an_address(module, host):
    with pytest.raises(ValueError, match="must be on the public internet|must exist"):
        module.download(f"http://{host}/clip.mp4")


@pytest.mark.parametrize("part", ["status", "header", "body"])
def test_a_server_that_drips_is_cut_off(module, open_network, monkeypatch, part):
    """A byte at a time never exceeds the time limit of a socket."""
    monkeypatch.setattr(module, "TIMEOUT", 1)
    head = {"status": b"", "header": b"HTTP/1.1 200 OK\r\n", "body": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"}
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(head[part])
            for _ in range(100):
                connection.sendall(b"a")
                time.sleep(0.1)

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match="must be downloadable, got more than 1 s"):
        module.download(f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mp4")
    assert time.monotonic() - start < 8
    thread.join()
    listening.close()


def test_redirects_are_checked_when_they_connect(handler, module, server, open_network, monkeypatch):
    """From this machine, which the fixture allows, to another private address."""
    with pytest.raises(ValueError, match="must be on the public internet"):
        handler({"inputs": f"{server}/inside"})


def test_a_proxy_is_not_asked(handler, server, open_network, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert handler({"inputs": f"{server}/clip.mp4"})


def test_certificates_are_checked_by_name(module, monkeypatch):
    """TLS goes to the pinned address and asks for the name that the URL holds."""
    wrapped = []

    class Context:
        def wrap_socket(self, sock, server_hostname, **options):
            wrapped.append((sock, server_hostname))
            raise module.ssl.SSLCertVerificationError("wrong name")

    monkeypatch.setattr(module.ssl, "create_default_context", Context)
    monkeypatch.setattr(module.socket, "create_connection", lambda address, *args, **kwargs: address)
    resolver(monkeypatch, module, "1.1.1.1")
    with pytest.raises(ValueError, match="must be downloadable"):
        module.download("https://video.example/clip.mp4")
    assert wrapped == [(("1.1.1.1", 443), "video.example")]


def test_the_model_is_optimised(handler):
    assert handler.model.vision_model.encoder.layers[0].mlp.optimized


def test_limits(handler, module, repository, server, open_network, monkeypatch):
    body = (repository / "clip.mp4").read_bytes()
    monkeypatch.setattr(module, "MAX_SECONDS", 1.0)
    with pytest.raises(ValueError, match="must last at most 1 s"):
        handler({"inputs": body})
    monkeypatch.setattr(module, "MAX_SECONDS", 100.0)
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="at most 100 pixels, got 48 x 48"):
        handler({"inputs": body})
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    for inputs in (body, base64.b64encode(body).decode(), f"{server}/clip.mp4"):
        with pytest.raises(ValueError, match="at most 0 MiB, got more"):
            handler({"inputs": inputs})


def test_a_recording_may_start_at_any_time(module):
    body = io.BytesIO()
    with av.open(body, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(50):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = 3600 * 25 + i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    module.check_size(body.getvalue(), max_seconds=2.1, max_pixels=64 * 64)
    with pytest.raises(ValueError, match="must last at most 2 s"):
        module.check_size(body.getvalue(), max_seconds=1.5, max_pixels=64 * 64)


def test_only_containers_of_videos_are_opened(module):
    assert module.CONTAINERS == video_decoding.CONTAINERS
    with pytest.raises(ValueError, match="must be a readable video"):
        module.check_size(b"hello, this is no video\n" * 50, max_seconds=600, max_pixels=10**6)  # FFmpeg would show it


def test_connections_share_the_time_of_a_download(module, monkeypatch):
    """A redirection late in it does not start the time anew."""
    now, given = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "connect", lambda host, port, timeout: given.append(timeout))
    deadline = module.Deadline(30)
    for now[0] in (100.0, 129.0):
        module._Connection("example.org", deadline=deadline, timeout=30).connect()
    assert given == [30.0, 1.0]


def test_limits_hold_for_every_stream(module):
    """The one that is decoded may be another than the first: a cover or one without a decoder comes before it."""
    body = io.BytesIO()
    with av.open(body, "w", format="matroska") as container:
        streams = [container.add_stream("mpeg4", rate=8) for _ in range(2)]
        for stream, size in zip(streams, (16, 64), strict=True):
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
        for stream, frames in zip(streams, (1, 16), strict=True):
            for _ in range(frames):
                picture = np.zeros((stream.height, stream.width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    module.check_size(body.getvalue(), max_seconds=3, max_pixels=64 * 64)
    with pytest.raises(ValueError, match="got 64 x 64"):
        module.check_size(body.getvalue(), max_seconds=3, max_pixels=32 * 32)
    with pytest.raises(ValueError, match="must last at most 1 s"):
        module.check_size(body.getvalue(), max_seconds=1, max_pixels=64 * 64)


def test_streams_that_begin_in_the_middle(module, repository, monkeypatch):
    """PyAV counts streams when it opens a file, and fails after the last packet if there are more: fuzzing found it."""
    body, real = (repository / "clip.mp4").read_bytes(), av.open

    class Container:
        def __init__(self, *arguments, **options):
            self.real = real(*arguments, **options)

        def __enter__(self):
            self.streams = self.real.streams
            return self

        def __exit__(self, *error):
            self.real.close()

        def demux(self, streams):
            yield from self.real.demux(streams)
            [][0]

    monkeypatch.setattr(av, "open", Container)
    module.check_size(body, 600, 10**6)
    with pytest.raises(ValueError, match="must last at most 1 s"):
        module.check_size(body, 1, 10**6)


def test_what_says_that_it_is_too_large_is_not_downloaded(module, server, open_network, monkeypatch):
    read = []
    monkeypatch.setattr(module.HTTPResponse, "read1", lambda self, n=-1: read.append(n) or b"")
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 0 MiB, got more"):
        module.download(f"{server}/clip.mp4")
    assert not read


def test_decoding_has_limits_and_goes_on_after_a_crash(handler, module, repository, tmp_path, monkeypatch):
    body = (repository / "clip.mp4").read_bytes()
    answer = handler({"inputs": body})
    write_video(tmp_path / "large.mp4", frames=4, size=512)
    large = (tmp_path / "large.mp4").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "DECODING_MEMORY", 0)
        with pytest.raises(ValueError, match="^[^\n]+$"):  # which allocation fails first decides the words
            handler({"inputs": large})
    assert handler({"inputs": body}) == answer and handler({"inputs": large})

    before = handler.decode.process
    before.send_signal(signal.SIGSTOP)  # a codec that hangs, so early that not even the video is read
    with monkeypatch.context() as patch:
        patch.setattr(module, "DECODING_TIMEOUT", 0.1)
        with pytest.raises(ValueError, match="must be decodable, got more than 0.1 s; send another"):
            handler({"inputs": body + bytes(2**20)})
    assert handler({"inputs": body}) == answer and before.poll() is not None

    ask = handler.decode._ask

    def die(*request):
        handler.decode.process.kill()
        return ask(*request)

    with monkeypatch.context() as patch:
        patch.setattr(handler.decode, "_ask", die)
        with pytest.raises(ValueError, match="must be decodable, got a crash; send another"):
            handler({"inputs": body})
    assert handler({"inputs": body}) == answer


def test_the_decoder_gets_no_token(module, repository, monkeypatch):
    given = []

    class Process:
        def __init__(self, command, env, **options):
            given.append(env)
            raise OSError("enough")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PGPASSWORD", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setattr(module.subprocess, "Popen", Process)
    with pytest.raises(OSError, match="enough"):
        module.Decoder("handler.py", str(repository)).start()
    assert "hf_secret" not in given[0].values()


READ_ONLY = """
import contextlib, importlib.util, io, json, resource, sys
from pathlib import Path

folder, expected = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for auto in (module.AutoProcessor, module.AutoModelForVideoClassification):
    auto.from_pretrained(folder, trust_remote_code=True)  # transformers keeps the model's code in its cache
before = sorted(Path.cwd().rglob("*"))
body = Path(folder, "clip.mp4").read_bytes()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
with contextlib.redirect_stderr(io.StringIO()):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))  # what tempfile writes, to find a temporary folder
    try:
        handler = module.EndpointHandler(folder)
        answer = handler({"inputs": body})
        handler.decode.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
assert [row["label"] for row in answer] == json.loads(expected), answer
assert sorted(Path.cwd().rglob("*")) == before
"""


@pytest.mark.slow
def test_writes_nothing_once_the_code_is_there(handler, repository, tmp_path):
    labels = [row["label"] for row in handler({"inputs": (repository / "clip.mp4").read_bytes()})]
    places = {"HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    status, _, error = run_in_a_fork(READ_ONLY, repository, json.dumps(labels), cwd=tmp_path, **places)
    assert status == 0, error


def test_damaged_videos(handler, test_data):
    with pytest.raises(ValueError):
        handler({"inputs": (test_data / "videos" / "corrupted.mp4").read_bytes()})


def test_requirements_name_what_the_code_imports():
    assert {line.split(">=")[0] for line in source.REQUIREMENTS.split()} == {"transformers", "torch", "av"}
    assert Path(source.__file__).read_text().count("from .") == 0  # it stands alone in a repository
