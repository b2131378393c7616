"""What earlier versions wrote still loads, and gives the logits it gave then."""

from pathlib import Path

import pytest
import torch
from old_checkpoints.write import MODELS, clip
from safetensors.torch import load_file

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor


FOLDER = Path(__file__).parent / "old_checkpoints"
CHECKPOINTS = sorted(path.parent for path in FOLDER.glob("*/*/model.safetensors"))


def test_every_method_is_there():
    assert {path.name for path in CHECKPOINTS if path.parent.name == "0.1.0"} == set(MODELS)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_old_checkpoint(path):
    model, report = InTIClipForVideoClassification.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model.eval()(clip()).logits
    torch.testing.assert_close(logits, load_file(path / "logits.safetensors")["logits"], rtol=0, atol=1e-5)
    assert InTIClipVideoProcessor.from_pretrained(path).num_frames == 4
