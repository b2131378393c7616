"""Loading weights from safetensors alone, so that a model that is only data runs no pickle."""

from pathlib import Path

from transformers import PreTrainedModel


def load_weights(cls: type, checkpoint: str | Path, **options) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """`cls.from_pretrained(checkpoint, **options)`. Raises ValueError if there is no safetensors file."""
    try:
        return cls.from_pretrained(checkpoint, use_safetensors=True, **options)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} must hold its weights as safetensors, got none; if you trust its pytorch_model.bin, load it "
            "with transformers' from_pretrained and write it to a folder with save_pretrained."
        ) from error
