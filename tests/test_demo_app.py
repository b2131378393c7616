"""The demo page: what it makes of clips, in Chromium at two widths, and as a Space."""

import base64
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import SpaceCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from conftest import TINY, pickle_weights, write_video
from hf_inti import (
    InTIClipForVideoClassification,
    InTIClipVideoProcessor,
    InTIClipVisionConfig,
    InTIClipVisionModel,
    VideoDecodingError,
)
from hf_inti.measure.costs import count_costs


# It is not imported here, which takes seconds in every process that collects tests.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is missing: pip install -e '.[demo]'")

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
PATIENCE = 300  # seconds, beside other tests; what is waited for takes a few
# More than the page shows, with the probabilities that the tiny model gives to whatever it sees.
LABELS = {"tying a knot": 0.04, "<b>juggling</b>": 0.5, "yoga": 0.2, "surfing": 0.15, "chess": 0.08, "archery": 0.03}
BARS = ["<b>juggling</b> 50.0%", "yoga 20.0%", "surfing 15.0%", "chess 8.0%", "tying a knot 4.0%"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def save_model(folder: Path, cls=InTIClipForVideoClassification, side=32, **options) -> Path:
    names = dict(enumerate(LABELS))
    options = {"num_frames": 8, "id2label": names, "label2id": {n: i for i, n in names.items()}, **options}
    model = cls(InTIClipVisionConfig(**TINY, **options))
    if cls is InTIClipForVideoClassification:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(list(LABELS.values())).log())
    model.save_pretrained(folder)
    size = {"height": side, "width": side}
    frames = options["num_frames"]
    InTIClipVideoProcessor(num_frames=frames, size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return runpy.run_path(str(SCRIPTS / "demo_app.py"))


@pytest.fixture(scope="module")
def clips():
    return runpy.run_path(str(SCRIPTS / "demo_clips.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("private_place") / "model")


@pytest.fixture
def clip(tmp_path) -> Path:
    write_video(tmp_path / "clip.mp4", frames=16)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "inti"}, "8 frames, the weights of their patches, and 2 frames summed"),
        ({"compression": "linear_pooling"}, "8 frames, the weights of their patches, and 2 frames summed"),
        (
            {"adaptation": "uniformerv2", "adaptation_options": {"temporal_downsample": True, "global_layers": [4]}},
            "4 frames, the weights of their patches, and 1 frames summed",
        ),
        ({"compression": "tome", "compression_options": {"r": 2}}, "white where it was dropped"),
        ({"compression": "sta", "compression_options": {"r": 2}}, "white where it was dropped"),
        ({"compression": "conv_pooling"}, "The 8 frames seen; compression conv_pooling"),
        ({"compression": "none", "num_frames": 10}, "The 10 frames seen; compression none"),
    ],
)
def test_any_model_gives_a_picture(demo, options, words, clip, tmp_path):
    classifier = demo["load_classifier"](str(save_model(tmp_path / "model", **options)))
    views = {"num_clips": 1, "num_crops": 1, "do_rescale": False, "do_normalize": False}
    frames = classifier.processor(str(clip), **views)["pixel_values"]
    frames, out = frames[0] / 255, demo["classify"](classifier.model, classifier.processor, frames)
    picture, sentence = demo["draw"](classifier, frames, out)
    assert words in sentence
    assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    if "num_frames" in options:  # two rows of five
        assert picture.size == (5 * 32, 2 * 32)
        seen = np.asarray(picture.crop((32, 32, 64, 64)))
        np.testing.assert_allclose(seen, 255 * frames[6].permute(1, 2, 0).numpy(), atol=1)


def test_answers_with_the_uploaded_clip(demo, clip, tmp_path, monkeypatch):
    """A model that sees brightness: the answer is what the model says without the page, also after decoders died."""
    folder = save_model(tmp_path / "model", compression="none")
    model = InTIClipForVideoClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    expected = model.eval()(**InTIClipVideoProcessor.from_pretrained(folder)(str(clip))).logits
    classifier = demo["load_classifier"](str(folder))
    args = demo["DemoArguments"](str(folder))
    _, out, seconds = demo["run"](classifier, str(clip), args)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    assert all(part > 0 for part in seconds)

    classifier.decode.process.kill()  # as a crash of the codec would
    classifier.decode.process.wait()
    assert torch.equal(demo["run"](classifier, str(clip), args)[1].logits, out.logits)
    before = classifier.decode.process
    before.send_signal(signal.SIGSTOP)  # one that hangs
    monkeypatch.setitem(demo["Decoder"].__call__.__globals__, "DECODING_TIMEOUT", 0.1)
    with pytest.raises(VideoDecodingError, match="must be decodable, got more than 0.1 s; send another"):
        demo["run"](classifier, str(clip), args)
    assert before.poll() is not None


def test_bars_escape_labels_and_stop_at_five(demo, classifier):
    bars = demo["answer_bars"](classifier, torch.tensor(list(LABELS.values())).log())
    assert bars.count("<li>") == 5 and "archery" not in bars
    assert bars.index("&lt;b&gt;juggling") < bars.index("yoga") < bars.index("surfing")
    assert "width: 50.00%" in bars and "<b>" not in bars


def test_cost_stands_beside_naive(demo, model):
    classifier = demo["load_classifier"](str(model))
    options = {"num_frames": 8, "num_labels": len(LABELS)}
    inti = count_costs(InTIClipVisionConfig(**TINY, **options))["total"]
    naive = count_costs(InTIClipVisionConfig(**TINY, **options, compression="none"))["total"]
    assert (classifier.cost, classifier.naive) == (inti, naive) and inti.macs < naive.macs
    shown = demo["cost_bars"](classifier)
    assert f"{inti.macs / 1e9:.4g} GMACs, {inti.parameters / 1e6:.4g} M" in shown and "of 8 frames" in shown
    assert f"width: {inti.macs / naive.macs:.2%}" in shown and "width: 100.00%" in shown


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_seconds": 1.5}, "2 s long, at most 1.5 s are taken"),
        ({"max_pixels": 48 * 48 - 1}, "frames of 2304 pixels, at most 2303"),
    ],
)
def test_limits(clips, clip, limits, reason):
    taken = {"name": "clip.mp4", "max_seconds": 2.0, "max_pixels": 48 * 48}
    clips["open_clip"](clip.read_bytes(), **taken)
    with pytest.raises(VideoDecodingError, match=reason) as caught:
        clips["open_clip"](clip.read_bytes(), **{**taken, **limits})
    assert str(caught.value).startswith("clip.mp4: ")


def test_limit_of_bytes(demo, clip):
    """The file is not even read, let alone handed on."""
    with pytest.raises(VideoDecodingError, match="^clip.mp4: larger than 0 MiB"):
        demo["read_clip"](None, str(clip), demo["DemoArguments"]("model", max_megabytes=0))


def test_a_duration_that_the_header_hides(clips, clip, tmp_path):
    """A raw stream has no duration to read: its frames are counted."""
    raw = tmp_path / "clip.h264"
    with av.open(str(clip)) as source, av.open(str(raw), "w", format="h264") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(VideoDecodingError, match=r"clip.h264: \d s long"):
        clips["open_clip"](raw.read_bytes(), name="clip.h264", max_seconds=0.2, max_pixels=48 * 48)


@pytest.fixture(scope="module")
def classifier(demo, model):
    classifier = demo["load_classifier"](str(model))
    yield classifier
    classifier.decode.close()


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_messages_name_the_file_and_no_folder(demo, classifier, clip, damage):
    whole = clip.read_bytes()
    clip.write_bytes({"garbage": b"no video" * 50, "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(VideoDecodingError) as caught:
        demo["run"](classifier, str(clip), demo["DemoArguments"]("model"))
    assert str(caught.value).startswith("clip.mp4: ") and "/" not in str(caught.value)


def test_what_cannot_answer_is_refused_at_the_start(demo, tmp_path):
    with pytest.raises(ValueError, match="no trained InTI-CLIP video classifier: classifier.bias is missing"):
        demo["load_classifier"](str(save_model(tmp_path / "tower", cls=InTIClipVisionModel)))
    with pytest.raises(ValueError, match="must be 32 x 32 pixels, got 24 x 24"):
        demo["load_classifier"](str(save_model(tmp_path / "other", side=24)))
    with pytest.raises(ValueError, match="holds no videos"):
        demo["find_examples"](str(tmp_path))
    pickle_weights(tmp_path / "other")
    with pytest.raises(ValueError, match="must hold its weights as safetensors, got none"):
        demo["load_classifier"](str(tmp_path / "other"))


@contextmanager
def serving(command: list, folder: Path, **environment):
    """Start a process that serves a page; gives its address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GRADIO_SERVER_PORT": str(port), **offline, **environment}
    command = [sys.executable, *(str(port) if word == "PORT" else str(word) for word in command)]
    with open(log, "w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            wait_for(lambda: "Running on local URL" in log.read_text() or process.poll() is not None, PATIENCE)
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.kill()


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.1)
    return value


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


class Page:
    """The page in a browser that cannot reach anything but this machine."""

    def __init__(self, driver, url: str, width: int, height: int):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)
        wait_for(lambda: self.all("#costs .bars li") and self.all(".gallery-item video"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def upload(self, path: Path) -> None:
        self.all("#clip input[type=file]")[0].send_keys(str(path))

    def pick_example(self, number: int) -> None:
        self.all(".gallery-item")[number].click()

    def answer(self) -> list[str]:
        wait_for(lambda: self.all("#answer .bars li") and self.text("#sentence"))
        return [" ".join(bar.text.split()) for bar in self.all("#answer .bars li")]

    def picture(self, other_than: str = "") -> str:
        """The address of the picture, once it is there."""
        loaded = "const i = document.querySelector('#picture img'); return i?.complete && i.naturalWidth ? i.src : ''"
        return wait_for(lambda: (src := self.driver.execute_script(loaded)) != other_than and src)

    def places(self, *selectors: str) -> list[dict]:
        find = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        return [self.driver.execute_script(find, selector) for selector in selectors]

    def overflow(self) -> int:
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("HF_INTI_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            time.sleep(0.5)  # for what moves to come to rest
            picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(picture["data"]))

    def asked_hosts(self) -> set[str]:
        """All that the page asked for over the network, since this was last called."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in sent if url.startswith(("http", "ws"))}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving([SCRIPTS / "demo_app.py", model, "--port", "PORT"], tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("the browser test needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.parametrize("device", SIZES)
def test_page_in_chromium(device, server, browser, clip):
    url, log = server
    width, height = SIZES[device]
    page = Page(browser, url, width, height)
    for place in page.places("#clip", ".gallery-item:last-child"):  # the controls, before any scrolling
        assert 0 <= place["left"] < place["right"] <= width and 0 <= place["top"] < place["bottom"] <= height
    assert "GMACs" in page.text("#costs") and "Naive" in page.text("#costs")
    page.shoot(f"{device}_start")

    page.upload(clip)
    assert page.answer() == BARS
    first = page.picture()
    assert "8 frames, the weights of their patches" in page.text("#sentence")
    assert re.search(r"Read in \d+\.\d\d s, classified in \d+\.\d\d s", page.text("#answer"))
    assert not any(button.is_displayed() for button in page.all("#clip button[aria-label^=Trim]"))  # needs a CDN
    with urllib.request.urlopen(first, timeout=10) as answer:
        colours = np.unique(np.asarray(Image.open(answer).convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 500
    assert page.overflow() <= 0
    page.shoot(f"{device}_upload")

    page.pick_example(1)
    page.picture(other_than=first)
    assert page.answer() == BARS
    assert page.overflow() <= 0
    page.shoot(f"{device}_example")

    broken = clip.with_name("a_very_long_name_of_a_file_" * 3 + ".mp4")
    broken.write_bytes(b"this is no video" * 100)
    page.all("#clip button[aria-label=Clear]")[0].click()
    wait_for(lambda: "The answer will be here" in page.text("#answer") and not page.all("#picture img"))
    page.upload(broken)
    wait_for(lambda: page.all("#answer [role=alert]"))
    message = page.text("#answer [role=alert]")
    assert message.startswith(f"{broken.name}: not a video that can be opened") and "/" not in message
    assert not page.all("#answer .bars") and not page.all("#picture img")
    assert page.overflow() <= 0
    page.shoot(f"{device}_broken")

    assert page.asked_hosts() == {url.removeprefix("http://")}
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_server_keeps_its_files_to_itself(server, model):
    url, _ = server
    assert status(url) == 200
    assert status(f"{url}/gradio_api/file={model / 'config.json'}") in (403, 404)
    assert status(f"{url}/gradio_api/file={SCRIPTS / 'demo_app.py'}") in (403, 404)
    with urllib.request.urlopen(f"{url}/config", timeout=10) as answer:
        config = answer.read().decode()
    assert "Upload a clip" in config and "private_place" not in config


@pytest.mark.slow
def test_only_uploads_are_read(server):
    """Not what a client names by its place: gradio would download URLs itself, of whatever size."""
    url, _ = server
    for function, place in product(range(2), ("http://127.0.0.1:9/clip.mp4", "/etc/hostname")):
        clip = {"path": place, "meta": {"_type": "gradio.FileData"}}
        data = {"data": [clip], "fn_index": function, "trigger_id": None, "session_hash": "a"}
        request = urllib.request.Request(
            f"{url}/gradio_api/queue/join", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).close()
        with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=a", timeout=30) as events:
            lines = [json.loads(line[6:]) for line in events.read().decode().splitlines() if line.startswith("data: ")]
        (end,) = [line for line in lines if line["msg"] == "process_completed"]
        assert not end["success"]
        assert place[0] == "/" or "must be uploaded, got a URL" in end["output"]["error"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/gradio_api/file=http://127.0.0.1:9/clip.mp4", timeout=10)
    assert caught.value.code == 403 and "must be uploaded" in caught.value.read().decode()


def pins(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)


def test_space_is_described_and_pinned():
    card = SpaceCard.load(SCRIPTS / "space" / "README.md")
    tested = pins(ROOT / "constraints.txt")
    assert card.data.sdk == "gradio" and card.data.sdk_version == tested["gradio"]
    assert card.data.app_file == "app.py" and len(card.data.short_description) <= 60
    assert yaml.safe_load(f"version: {card.data.python_version!r}")["version"] == "3.11"
    assert [validate_repo_id(name) for name in card.data.models] == [None]
    needed = pins(SCRIPTS / "space" / "requirements.txt")
    assert {"torch", "transformers", "av", "matplotlib"} <= needed.keys()
    assert needed == {name: tested[name] for name in needed}


@pytest.mark.slow
def test_space_starts(model, tmp_path, monkeypatch):
    """What README.md says to copy is enough, without this repository in the search path."""
    (commands,) = re.findall(r"```sh\n(.*?)```", (SCRIPTS / "space" / "README.md").read_text(), re.S)
    copies = [line.replace("my-space", str(tmp_path / "my-space")) for line in commands.splitlines()[:3]]
    assert [line.split()[0] for line in copies] == ["mkdir", "cp", "cp"]
    subprocess.run(["sh", "-ec", "\n".join(copies)], cwd=ROOT, check=True)
    app = tmp_path / "my-space" / "app.py"
    with serving([app], tmp_path, MODEL_ID=str(model), PYTHONPATH="") as (url, _):
        assert status(url) == 200
    monkeypatch.delenv("MODEL_ID", raising=False)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with pytest.raises(SystemExit, match="MODEL_ID is not set"):
        runpy.run_path(str(app))
