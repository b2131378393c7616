"""Checkpoints load with the code saved beside them where this package is not installed."""

import os
import subprocess
import sys

import pytest
import torch

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionModel


STRANGER = """
import sys
sys.modules["hf_inti"] = None  # as if it were not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification, AutoProcessor
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).compression_layers == [1, 2]
model = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True).eval()
tower = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
if len(sys.argv) > 2:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pixel_values = processor(torch.full((9, 40, 50, 3), 90, dtype=torch.uint8))["pixel_values"]
    with torch.no_grad():
        torch.save(model(pixel_values).logits, sys.argv[2])
"""


def load_as_stranger(folder, *arguments, cache) -> None:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("cls", [InTIClipForVideoClassification, InTIClipVisionModel])
def test_loads_without_the_package(cls, tiny_config, tmp_path):
    model = cls(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    if cls is InTIClipVisionModel:
        load_as_stranger(tmp_path / "model", cache=tmp_path)
        return
    side = {"height": 32, "width": 32}
    processor = InTIClipVideoProcessor(num_frames=8, size={"shortest_edge": 32}, crop_size=side)
    processor.save_pretrained(tmp_path / "model")
    load_as_stranger(tmp_path / "model", tmp_path / "logits.pt", cache=tmp_path)
    pixel_values = processor(torch.full((9, 40, 50, 3), 90, dtype=torch.uint8))["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
