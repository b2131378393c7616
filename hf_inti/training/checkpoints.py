"""Loading a trained video classifier with its processor, as it is or under another compression, without training."""

from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .hosts import KINDS, host_processor, is_published, load_host, load_host_config, quiet
from .weights import load_weights


@dataclass
class CompressionOverride:
    """Another compression for a trained model; None keeps the checkpoint's."""

    compression: str | None = None
    compression_layers: list[int] | None = None
    compression_options: dict | None = None

    def __post_init__(self):
        if self.compression is None and (self.compression_layers or self.compression_options):
            raise ValueError("compression must be given with compression_layers or compression_options, got none.")


def load_classifier(
    checkpoint: str,
    override: CompressionOverride | None = None,
    num_frames: int | None = None,
    host_weights: str | None = None,
) -> tuple[PreTrainedModel, InTIClipVideoProcessor]:
    """A model in evaluation mode, on CPU, and the processor for its videos.

    Args:
        checkpoint: a video classifier, InTI-CLIP or a host: a folder, a name on the Hub, or `torchvision/` and a name.
        override: the compression to evaluate it with. An InTI-CLIP model takes those that need no training (`"tome"`,
            `"sta"`, `"linear_pooling"` as the plain average of each pair, `"none"`), a host those of `hosts.compress`.
        num_frames: frames of a clip; default: as in training.
        host_weights: which of torchvision's published weights, for `torchvision/` and a name; default: its own choice.

    Raises ValueError for another kind of checkpoint, for bad options, and for a compression whose weights the
    checkpoint does not hold.
    """
    override = override or CompressionOverride()
    if _is_host(checkpoint):
        if override.compression_layers:
            raise ValueError(
                f"compression_layers must be left out on another library's model, got {override.compression_layers}."
            )
        model = load_host(checkpoint, override.compression, override.compression_options, num_frames, host_weights)
        return model, host_processor(checkpoint, model.config)
    if host_weights is not None:
        raise ValueError(f"host_weights must be left out with an InTI-CLIP, got {host_weights!r}.")
    options = {} if num_frames is None else {"num_frames": num_frames}
    processor = InTIClipVideoProcessor.from_pretrained(checkpoint, **options)
    if override.compression is None:
        model = load_weights(InTIClipForVideoClassification, checkpoint)
    else:
        model = _load_under(checkpoint, override)
    with suppress(ValueError):  # quantised layers have no faster way
        model.optimize_for_inference()
    return model.eval(), processor


def load_processor(checkpoint: str) -> InTIClipVideoProcessor:
    """The processor alone, as `load_classifier` gives it: videos can be decoded while the model loads."""
    if _is_host(checkpoint):
        return host_processor(checkpoint, load_host_config(checkpoint))
    return InTIClipVideoProcessor.from_pretrained(checkpoint)


def _is_host(checkpoint: str) -> bool:
    """Whether it is another library's model. Raises ValueError where it is neither that nor an InTI-CLIP."""
    if is_published(checkpoint):
        return True
    kind = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
    if kind not in (InTIClipVisionConfig.model_type, *KINDS):
        valid = ", ".join([InTIClipVisionConfig.model_type, *KINDS])
        raise ValueError(f"the model_type of {checkpoint} must be one of {valid}, got {kind!r}.")
    return kind in KINDS


def _load_under(checkpoint: str, override: CompressionOverride) -> InTIClipForVideoClassification:
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    same = values.get("compression") == override.compression
    changes = {
        "compression": override.compression,
        "compression_layers": override.compression_layers or (values.get("compression_layers") if same else None),
        "compression_options": override.compression_options or {},
    }
    config = InTIClipVisionConfig.from_dict({**values, **changes})
    with quiet():
        model, report = load_weights(
            InTIClipForVideoClassification, checkpoint, config=config, output_loading_info=True
        )
    if report["missing_keys"] and override.compression != "linear_pooling":  # which starts as the plain average
        raise ValueError(
            f"compression must be one that {checkpoint} was trained with or that needs no training, got "
            f"{override.compression!r}, whose weights it does not hold; choose tome, sta, linear_pooling or none."
        )
    return model
