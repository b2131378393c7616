"""Loading a trained video classifier with its processor, as it is or under another compression, without training."""

from contextlib import suppress
from dataclasses import dataclass

from transformers import AutoModelForVideoClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file
from transformers.utils.generic import safe_load_json_file
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..hosts import TRANSFORMERS_HOSTS, compress
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
        checkpoint: a video classifier, InTI-CLIP or one of `hosts.TRANSFORMERS_HOSTS`: a folder or a name on the Hub.
        override: the compression to evaluate it with. An InTI-CLIP model takes those that need no training (`"tome"`,
            `"sta"`, `"linear_pooling"` as the plain average of each pair, `"none"`), a host those of `hosts.compress`.

    Raises ValueError for another kind of checkpoint, for bad options, and for a compression whose weights the
    checkpoint does not hold.
    """
    override = override or CompressionOverride()
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    kind = values.get("model_type")
    if kind in TRANSFORMERS_HOSTS.values():
        model = _load_host(checkpoint, override)
        return model, _host_processor(checkpoint, model.config)
    if kind != InTIClipVisionConfig.model_type:
        valid = ", ".join([InTIClipVisionConfig.model_type, *dict.fromkeys(TRANSFORMERS_HOSTS.values())])
        raise ValueError(f"the model_type of {checkpoint} must be one of {valid}, got {kind!r}.")
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


def _load_host(checkpoint: str, override: CompressionOverride) -> PreTrainedModel:
    if override.compression_layers:
        raise ValueError(
            f"compression_layers must be left out on a video model of transformers, got {override.compression_layers}."
        )
    model = AutoModelForVideoClassification.from_pretrained(checkpoint).eval()
    if override.compression not in (None, "none"):
        compress(model, override.compression, **(override.compression_options or {}))
    return model


def _host_processor(checkpoint: str, config: PreTrainedConfig) -> InTIClipVideoProcessor:
    """Ours with the preprocessing of the checkpoint's own processor, where it has one; it samples frames uniformly."""
    vjepa2 = config.model_type == "vjepa2"
    side = config.crop_size if vjepa2 else config.image_size
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
            if config.model_type == "vivit" and found.get("offset", True):
                settings |= _without_offset(settings)
            break
    return InTIClipVideoProcessor(num_frames=config.frames_per_clip if vjepa2 else config.num_frames, **settings)


def _without_offset(settings: dict) -> dict:
    """ViViT's processors subtract 1 after rescaling, before they normalise: the same as a mean that is larger by 1."""
    if not settings.get("do_normalize", True):
        return {"do_normalize": True, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    return {"image_mean": [mean + 1 for mean in settings["image_mean"]]}
