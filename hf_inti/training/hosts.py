"""Models of others in training and evaluation: transformers' and torchvision's, compressed by `hf_inti.hosts`.

A checkpoint of a host is one of its library's, or of `TorchvisionForVideoClassification`. Its configuration also holds
`compression` and `compression_options`, which `load_host` applies again.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForVideoClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file
from transformers.utils.generic import safe_load_json_file
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from ..hosts import LIBRARIES, TRANSFORMERS_HOSTS, compress
from ..hosts.torchvision_classifier import (
    BUILDERS,
    TorchvisionForVideoClassification,
    TorchvisionVideoConfig,
    pretrained_weights,
)
from ..model.video_processing_inti_clip import InTIClipVideoProcessor
from .arguments import ModelArguments
from .weights import load_weights


logger = logging.getLogger(__name__)

KINDS = (*dict.fromkeys(TRANSFORMERS_HOSTS.values()), TorchvisionVideoConfig.model_type)  # of configurations
PREPROCESSING = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
OF_CLIP = ("compression_layers", "adaptation", "adaptation_options", "drop_path_rate", "classifier_dropout")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing: what is missing in a checkpoint is said by whoever loads it."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)


# Training -----------------------------------------------------------------------------------------


def build_host(arguments: ModelArguments, label_names: list[str]) -> PreTrainedModel:
    """The host that `arguments` name, compressed, with a head for `label_names`, new where it has none of that shape.

    Raises ValueError for an unknown host, and for settings that only InTI-CLIP has.
    """
    library, name = split_host(arguments.host)
    for setting in OF_CLIP:
        if getattr(arguments, setting) not in (None, "none"):
            raise ValueError(f"{setting} must be left out with a host, got {getattr(arguments, setting)!r}.")
    if arguments.host_weights is not None and name not in BUILDERS:
        raise ValueError(
            f"host_weights must be left out unless host is torchvision/ and {', '.join(BUILDERS)}, got "
            f"{arguments.host_weights!r} with {arguments.host}."
        )
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    start = _start_torchvision if library == "torchvision" else _start_transformers
    model = start(name, labels, arguments)
    if arguments.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def split_host(host: str) -> tuple[str, str]:
    """The library and the name. Raises ValueError for anything but `transformers/...` and `torchvision/...`."""
    library, _, name = host.partition("/")
    if library not in LIBRARIES or not name:
        raise ValueError(
            "host must be transformers/ and a checkpoint (a folder or a name on the Hub), or torchvision/ and one of "
            f"{', '.join(BUILDERS)} or a folder, got {host!r}."
        )
    if library == "torchvision" and name not in BUILDERS and not Path(name).is_dir():
        raise ValueError(f"host must be torchvision/ and one of {', '.join(BUILDERS)} or a folder, got {host!r}.")
    return library, name


def _start_transformers(checkpoint: str, labels: dict, arguments: ModelArguments) -> PreTrainedModel:
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    if values.get("model_type") not in TRANSFORMERS_HOSTS.values():
        valid = ", ".join(dict.fromkeys(TRANSFORMERS_HOSTS.values()))
        raise ValueError(f"the model_type of {checkpoint} must be one of {valid}, got {values.get('model_type')!r}.")
    folder = Path(checkpoint)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        logger.warning("%s holds no weights: the host starts from random ones.", checkpoint)
        model = AutoModelForVideoClassification.from_config(AutoConfig.from_pretrained(checkpoint, **labels))
    else:
        with quiet():
            model, report = load_weights(
                AutoModelForVideoClassification,
                checkpoint,
                **labels,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        absent = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
        lacking = sorted(name for name in absent if name.startswith(f"{model.base_model_prefix}."))
        if lacking:
            raise ValueError(
                f"{checkpoint} must hold {lacking[0]} in the shape that its config.json says, got none; give another "
                "host."
            )
    return compress_host(with_frames(model, arguments.num_frames), *_compression(arguments, values))


def _start_torchvision(name: str, labels: dict, arguments: ModelArguments) -> PreTrainedModel:
    values, weights, source = {"architecture": name}, None, arguments.host_weights or name
    if name not in BUILDERS:
        values, _ = TorchvisionVideoConfig.get_config_dict(name)
        file = Path(name) / "model.safetensors"
        weights = {n.removeprefix("host."): v for n, v in load_file(file).items()} if file.exists() else None
    elif arguments.host_weights is not None:
        weights = _download(pretrained_weights(name, arguments.host_weights))
    method, options = _compression(arguments, values)
    compression = {"compression": method or "none", "compression_options": options}
    model = TorchvisionForVideoClassification(TorchvisionVideoConfig.from_dict({**values, **labels, **compression}))
    if weights is None:
        logger.warning("%s starts from random weights; published ones are named by host_weights.", source)
    else:
        model.load_host_weights(weights, source)
    return with_frames(model, arguments.num_frames)


def _compression(arguments: ModelArguments, values: dict) -> tuple[str | None, dict | None]:
    """The compression and its options: those given, else those of the checkpoint's configuration."""
    if arguments.compression is None:
        return values.get("compression"), arguments.compression_options or values.get("compression_options")
    return arguments.compression, arguments.compression_options


def compress_host(model: PreTrainedModel, method: str | None, options: dict | None) -> PreTrainedModel:
    """The model, compressed as its configuration then says; "none" or None takes a compression off."""
    name = method or "none"
    compress(getattr(model, "host", model), None if name == "none" else name, **(options or {}))
    model.config.compression, model.config.compression_options = name, options
    return model


def set_progress(model: PreTrainedModel, progress: float) -> None:
    """Tell a model how far training is, from 0 to 1, where something in it is scheduled."""
    if hasattr(model, "set_training_progress"):
        model.set_training_progress(progress)


# Numbers of frames --------------------------------------------------------------------------------


def frames_field(config: PreTrainedConfig) -> str:
    return "frames_per_clip" if config.model_type == "vjepa2" else "num_frames"


def frames_of(config: PreTrainedConfig) -> int:
    """The number of frames of a clip."""
    return getattr(config, frames_field(config))


def tubelet_of(config: PreTrainedConfig) -> int:
    """The number of frames that its tokens join."""
    if config.model_type == TorchvisionVideoConfig.model_type:
        return (config.options or {}).get("patch_size", [2])[0]
    tubelet = getattr(config, "tubelet_size", 1)
    return tubelet if isinstance(tubelet, int) else tubelet[0]


def with_frames(model: PreTrainedModel, frames: int | None) -> PreTrainedModel:
    """The model for clips of another number of frames, learned positions interpolated along time.

    Raises ValueError unless its tokens can divide them.
    """
    if frames is None or frames == frames_of(model.config):
        return model
    tubelet = tubelet_of(model.config)
    if frames < 1 or frames % tubelet:
        raise ValueError(
            f"num_frames must be a multiple of {tubelet} for {model.config.model_type}, whose tokens join so many "
            f"frames, got {frames}."
        )
    config = copy.deepcopy(model.config)
    setattr(config, frames_field(config), frames)
    other = type(model)(config).train(model.training)
    own, weights = other.state_dict(), model.state_dict()
    for name, value in weights.items():
        if value.shape != own[name].shape:
            spatial = value.shape[1] // (frames_of(model.config) // tubelet) if config.model_type == "vivit" else None
            weights[name] = _resample(value, own[name].shape, spatial)
    other.load_state_dict(weights)
    return other


def _resample(positions: torch.Tensor, shape: torch.Size, spatial: int | None) -> torch.Tensor:
    """Positions interpolated along the one axis in which `shape` differs.

    Of `spatial` places a frame (ViViT) they are (1, 1 + T * places, D), a class token first.
    """
    if spatial is not None:
        first, patches = positions.tensor_split([1], dim=1)
        patches = patches.unflatten(1, (-1, spatial))[0]  # (T, places, D)
        patches = _resample(patches, torch.Size([(shape[1] - 1) // spatial, *patches.shape[1:]]), None)
        return torch.cat([first, patches.flatten(0, 1)[None]], dim=1)
    (axis,) = [d for d, (a, b) in enumerate(zip(positions.shape, shape, strict=True)) if a != b]
    line = positions.movedim(axis, -1)
    line = interpolate(line.reshape(1, -1, line.shape[-1]), size=shape[axis], mode="linear").view(*line.shape[:-1], -1)
    return line.movedim(-1, axis)


# Evaluation ---------------------------------------------------------------------------------------


def load_host(
    checkpoint: str,
    compression: str | None = None,
    options: dict | None = None,
    num_frames: int | None = None,
    weights: str | None = None,
) -> PreTrainedModel:
    """A trained host in evaluation mode; `compression` in the place of the checkpoint's own, "none" for none.

    `checkpoint`: a folder, a name on the Hub, or `torchvision/` and one of `BUILDERS`, with published `weights`,
    torchvision's default if None. Raises ValueError for bad options, and for a compression whose weights the checkpoint
    does not hold.
    """
    if is_published(checkpoint):
        model = _load_published(checkpoint, weights or "DEFAULT")
        return with_frames(compress_host(model, compression, options), num_frames).eval()
    if weights is not None:
        raise ValueError(
            f"host_weights must be left out unless host is torchvision/ and {', '.join(BUILDERS)}, got {weights!r} "
            f"with {checkpoint}."
        )
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    if compression is None:
        compression, options = values.get("compression"), values.get("compression_options")
    if values["model_type"] != TorchvisionVideoConfig.model_type:
        with quiet():
            model = load_weights(AutoModelForVideoClassification, checkpoint)
        return compress_host(with_frames(model, num_frames).eval(), compression, options)
    config = TorchvisionVideoConfig.from_dict(
        {**values, "compression": compression or "none", "compression_options": options}
    )
    with quiet():
        model, report = load_weights(
            TorchvisionForVideoClassification, checkpoint, config=config, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(
            f"compression must be one whose weights {checkpoint} holds, or that has none, got {compression!r} with "
            f"{options}; choose another."
        )
    return with_frames(model, num_frames).eval()


def is_published(checkpoint: str) -> bool:
    """Whether it names weights that torchvision publishes."""
    library, _, name = str(checkpoint).partition("/")  # it may be a path
    return library == "torchvision" and name in BUILDERS


def load_host_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of what `load_host` loads."""
    if is_published(checkpoint):
        return TorchvisionVideoConfig(architecture=checkpoint.partition("/")[2])
    values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    ours = values["model_type"] == TorchvisionVideoConfig.model_type
    return TorchvisionVideoConfig.from_dict(values) if ours else AutoConfig.from_pretrained(checkpoint)


def _load_published(checkpoint: str, weights_name: str) -> PreTrainedModel:
    name = checkpoint.partition("/")[2]
    weights = pretrained_weights(name, weights_name)
    names = weights.meta["categories"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = TorchvisionForVideoClassification(TorchvisionVideoConfig(architecture=name, **labels))
    model.load_host_weights(_download(weights), checkpoint)
    return model


def _download(weights: Enum) -> dict[str, torch.Tensor]:
    """torchvision's own default would unpickle whatever is in the file."""
    return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)


# Preprocessing ------------------------------------------------------------------------------------


def host_processor(checkpoint: str, config: PreTrainedConfig, **options) -> InTIClipVideoProcessor:
    """Ours with the preprocessing of the host's own, where it has one, changed by `options`.

    Of a checkpoint that we trained it is the one saved there. Otherwise frames are sampled uniformly.
    """
    options = {"num_frames": frames_of(config), **options}
    if config.model_type == TorchvisionVideoConfig.model_type and config.architecture in BUILDERS:
        own = pretrained_weights(config.architecture, "DEFAULT").transforms()
        settings = {"size": own.resize_size[0], "crop_size": own.crop_size[0], "resample": 2}
        settings |= {"image_mean": own.mean, "image_std": own.std}
    else:
        side = config.crop_size if config.model_type == "vjepa2" else config.image_size
        settings = {"size": side, "crop_size": side, "resample": 2}
        settings |= {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if is_published(checkpoint) or checkpoint in BUILDERS:
        return InTIClipVideoProcessor(**{**settings, **options})
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        file = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = safe_load_json_file(file)
            if found.get("video_processor_type") == InTIClipVideoProcessor.__name__:
                return InTIClipVideoProcessor.from_pretrained(checkpoint, **options)
            settings |= {name: found[name] for name in PREPROCESSING if found.get(name) is not None}
            if config.model_type == "vivit" and found.get("offset", True):
                settings |= _without_offset(settings)
            break
    return InTIClipVideoProcessor(**{**settings, **options})


def _without_offset(settings: dict) -> dict:
    """ViViT's processors subtract 1 after rescaling, before they normalise: the same as a mean that is larger by 1."""
    if not settings.get("do_normalize", True):
        return {"do_normalize": True, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    return {"image_mean": [mean + 1 for mean in settings["image_mean"]]}
