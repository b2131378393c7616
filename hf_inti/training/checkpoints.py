"""Loading a trained video classifier with its processor, as it is or under another compression, without training."""

from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, VideoMAEConfig, VideoMAEForVideoClassification
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file
from transformers.utils.generic import safe_load_json_file
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..hosts.videomae import apply_sta
from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification
from ..model.video_processing_inti_clip import InTIClipVideoProcessor


PREPROCESSING = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


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
    checkpoint: str, override: CompressionOverride | None = None
) -> tuple[PreTrainedModel, InTIClipVideoProcessor]:
    """A model in evaluation mode, on CPU, and the processor for its videos.

    Args:
        checkpoint: an InTI-CLIP or VideoMAE video classifier: a folder or a name on the Hub.
        override: the compression to evaluate it with. An InTI-CLIP model takes those that need no training (`"tome"`,
            `"sta"`, `"linear_pooling"` as the plain average of each pair, `"none"`), a VideoMAE `"sta"`.

    Raises ValueError for another kind of checkpoint, for bad options, and for a compression whose weights the
    checkpoint does not hold.
    """
    override = override or CompressionOverride()
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    kind = values.get("model_type")
    if kind == VideoMAEConfig.model_type:
        return _load_videomae(checkpoint, override), _videomae_processor(checkpoint, values)
    if kind != InTIClipVisionConfig.model_type:
        raise ValueError(f"{checkpoint} must be an InTI-CLIP or VideoMAE checkpoint, got model_type {kind!r}.")
    processor = InTIClipVideoProcessor.from_pretrained(checkpoint)
    if override.compression is None:
        model = InTIClipForVideoClassification.from_pretrained(checkpoint)
    else:
        model = _load_under(checkpoint, values, override)
    with suppress(ValueError):  # quantised layers have no faster way
        model.optimize_for_inference()
    return model.eval(), processor


def _load_under(checkpoint: str, values: dict, override: CompressionOverride) -> InTIClipForVideoClassification:
    same = values.get("compression") == override.compression
    changes = {
        "compression": override.compression,
        "compression_layers": override.compression_layers or (values.get("compression_layers") if same else None),
        "compression_options": override.compression_options or {},
    }
    config = InTIClipVisionConfig.from_dict({**values, **changes})
    verbosity = get_verbosity()
    set_verbosity_error()  # what is missing is said below
    try:
        model, report = InTIClipForVideoClassification.from_pretrained(
            checkpoint, config=config, output_loading_info=True
        )
    finally:
        set_verbosity(verbosity)
    if report["missing_keys"] and override.compression != "linear_pooling":  # which starts as the plain average
        raise ValueError(
            f"compression must be one that {checkpoint} was trained with or that needs no training, got "
            f"{override.compression!r}, whose weights it does not hold; choose tome, sta, linear_pooling or none."
        )
    return model


def _load_videomae(checkpoint: str, override: CompressionOverride) -> VideoMAEForVideoClassification:
    if override.compression not in (None, "none", "sta") or override.compression_layers:
        raise ValueError(
            f"compression must be sta or none on a VideoMAE, without compression_layers, got {override.compression!r}."
        )
    model = VideoMAEForVideoClassification.from_pretrained(checkpoint).eval()
    if override.compression == "sta":
        try:
            apply_sta(model, **(override.compression_options or {}))
        except TypeError as error:
            raise ValueError(f"compression_options must be those of hosts.videomae.apply_sta: {error}.") from None
    return model


def _videomae_processor(checkpoint: str, values: dict) -> InTIClipVideoProcessor:
    """Ours with the preprocessing of the checkpoint's own processor, where it has one; it samples frames uniformly."""
    side = values.get("image_size", VideoMAEConfig().image_size)
    settings = {
        "size": side,
        "crop_size": side,
        "resample": 2,
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
    }
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        file = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = safe_load_json_file(file)
            settings |= {name: found[name] for name in PREPROCESSING if found.get(name) is not None}
            break
    return InTIClipVideoProcessor(num_frames=values.get("num_frames", VideoMAEConfig().num_frames), **settings)
