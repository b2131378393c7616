"""Checkpoints load with the code saved beside them where this package is not installed."""

import pytest
import torch

from forks import run_in_a_fork
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionModel
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS


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


ALL_METHODS = """
import sys
sys.modules["hf_inti"] = None
import torch
from pathlib import Path
from transformers import AutoModelForVideoClassification
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.ones(1, 8, 3, 32, 32)).logits, folder / "logits.pt")
"""


def load_as_stranger(folder, *arguments, cache, code: str = STRANGER) -> None:
    status, _, error = run_in_a_fork(code, folder, *arguments, cwd=cache, HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert status == 0, error


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


@pytest.mark.slow
def test_every_method_loads_without_the_package(tiny_config, tmp_path):
    expected = {}
    methods = [(compression, "none") for compression in COMPRESSIONS] + [("inti", other) for other in ADAPTATIONS]
    for compression, adaptation in methods:
        model = InTIClipForVideoClassification(tiny_config(compression=compression, adaptation=adaptation)).eval()
        name = f"{compression}-{adaptation}"
        model.save_pretrained(tmp_path / "models" / name)
        with torch.no_grad():
            expected[name] = model(torch.ones(1, 8, 3, 32, 32)).logits
    load_as_stranger(tmp_path / "models", cache=tmp_path, code=ALL_METHODS)
    for name, logits in expected.items():
        loaded = torch.load(tmp_path / "models" / name / "logits.pt")
        torch.testing.assert_close(loaded, logits, rtol=0, atol=1e-6, msg=name)
