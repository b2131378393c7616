"""Writes one tiny checkpoint of every method with its logits, to be loaded by all later versions.

    python tests/old_checkpoints/write.py

Run once for each released version and commit the folder named after it; never change one that is there.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import hf_inti
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig


TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_frames": 4,
    "num_labels": 3,
    "compression_layers": [1, 2],
}
MODELS = {
    "naive": {"compression": "none"},
    "inti": {"compression": "inti"},
    "inti_dwconv": {"compression_options": {"cube": "dwconv", "fusion": "concat", "head": "attention"}},
    "linear_pooling": {"compression": "linear_pooling"},
    "conv_pooling": {"compression": "conv_pooling"},
    "tome": {"compression": "tome", "compression_options": {"r": 3}},
    "sta": {"compression": "sta", "compression_options": {"r": 4}},
    "stts": {"compression": "stts"},
    "uniformerv2": {
        "compression": "none",
        "adaptation": "uniformerv2",
        "adaptation_options": {"preset": "ssv2", "temporal_downsample": True},
    },
    "zeroi2v": {"adaptation": "zeroi2v"},
    "aim": {"adaptation": "aim", "adaptation_options": {"num_tadapter": 2}},
    "st_adapter": {"adaptation": "st_adapter", "adaptation_options": {"pre_attention": True}},
}


def clip() -> torch.Tensor:
    """Pixel values (1, 4, 3, 16, 16) that do not hang on a random generator."""
    return torch.sin(torch.arange(4 * 3 * 16 * 16, dtype=torch.float32)).view(1, 4, 3, 16, 16)


def main() -> None:
    folder = Path(__file__).parent / hf_inti.__version__
    if folder.exists():
        sys.exit(f"{folder} is there: what a version wrote stays as it is.")
    torch.manual_seed(0)
    for name, options in MODELS.items():
        model = InTIClipForVideoClassification(InTIClipVisionConfig(**{**TOWER, **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # much of it starts at zero
                parameter.add_(0.2 * torch.randn_like(parameter))
            logits = model(clip()).logits
        place = folder / name
        place.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            InTIClipVideoProcessor(num_frames=4).save_pretrained(saved)
            for file in ("config.json", "model.safetensors", "video_preprocessor_config.json"):
                shutil.copy(Path(saved) / file, place / file)  # and not the code
        save_file({"logits": logits}, place / "logits.safetensors")


if __name__ == "__main__":
    main()
