import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forks import ForkedJob
from hf_inti import InTIClipVisionConfig
from hf_inti.measure import jobs


if "PYTEST_XDIST_WORKER" in os.environ:  # the processes that run the tests share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

TINY = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def write_video(path: Path, frames: int = 10, size: int = 48, seed: int = 0) -> None:
    """A small mp4 of noise that drifts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * t, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def pickle_weights(folder: Path) -> None:
    """Put a pickle in the place of a model's safetensors, as old checkpoints have it."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: the last to end would keep one process busy and the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def tiny_config():
    """A function that makes the configuration of a tower of 4 blocks, 48 wide, on 32 x 32 pixels."""

    def make(**options) -> InTIClipVisionConfig:
        return InTIClipVisionConfig(**{**TINY, "num_frames": 8, "num_labels": 5, **options})

    return make


@pytest.fixture
def test_data() -> Path:
    """The folder of real videos, datasets and vectors."""
    folder = os.environ.get("HF_INTI_TEST_DATA")
    if not folder:
        pytest.skip("HF_INTI_TEST_DATA is not set: it names a folder with vectors/, videos/ and datasets/")
    return Path(folder)


@pytest.fixture
def forked_jobs(monkeypatch):
    """Jobs are forks. That jobs end with their parent is tested with real ones, in test_comparison.py."""
    monkeypatch.setattr(jobs, "start", ForkedJob)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """torch compiles a function eight times in a process at most, and all models share transformers' functions."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
