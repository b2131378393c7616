"""torchvision's video models as models of transformers: a configuration, safetensors, clips first, `logits`.

torchvision is imported when a model is built, and not before.
"""

from collections import OrderedDict
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from . import TORCHVISION_HOSTS, compress, set_training_progress


# With the frames of a clip that their weights were trained on.
BUILDERS = {"mvit_v1_b": 16, "mvit_v2_s": 16, "swin3d_t": 32, "swin3d_s": 32, "swin3d_b": 32}
ARCHITECTURES = (*BUILDERS, *TORCHVISION_HOSTS)


@strict
class TorchvisionVideoConfig(PreTrainedConfig):
    """What a torchvision video model is built and compressed from.

    Args:
        architecture: one of `BUILDERS`, or a class, "MViT" or "SwinTransformer3d", for other sizes.
        options: its arguments; MViT's block_setting as lists of MSBlockConfig's fields.
        num_frames, image_size: of the clips; default: those of torchvision's weights.
        compression, compression_options: as in `hosts.compress`, or "none".

    Raises ValueError for another architecture.
    """

    model_type = "torchvision_video"

    architecture: str = "mvit_v1_b"
    options: dict | None = None
    num_frames: int | None = None
    image_size: int = 224
    compression: str = "none"
    compression_options: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}.")
        if self.num_frames is None:
            self.num_frames = BUILDERS.get(self.architecture, 16)


def build(config: TorchvisionVideoConfig) -> nn.Module:
    """torchvision's model, with random weights.

    Raises ImportError without torchvision, and ValueError for other clips than `mvit_v1_b` and `mvit_v2_s` are for.
    """
    from torchvision.models import get_model
    from torchvision.models.video import mvit, swin_transformer

    options: dict[str, Any] = {"num_classes": config.num_labels, **(config.options or {})}
    if config.architecture in BUILDERS:
        sizes = (config.num_frames, config.image_size)
        if "mvit" in config.architecture and sizes != (16, 224):
            raise ValueError(
                f"num_frames and image_size must be 16 and 224 for {config.architecture}, got {sizes[0]} and "
                f'{sizes[1]}; other sizes have architecture "MViT" and its options.'
            )
        return get_model(config.architecture, **options)
    if config.architecture == "SwinTransformer3d":
        return swin_transformer.SwinTransformer3d(**options)
    options |= {"spatial_size": (config.image_size,) * 2, "temporal_size": config.num_frames}
    options["block_setting"] = [mvit.MSBlockConfig(*block) for block in options["block_setting"]]
    return mvit.MViT(**options)


class TorchvisionForVideoClassification(PreTrainedModel):
    """`host` is torchvision's model, compressed as the configuration says."""

    config_class = TorchvisionVideoConfig

    def __init__(self, config: TorchvisionVideoConfig):
        super().__init__(config)
        self.host = build(config)
        if config.compression != "none":
            compress(self.host, config.compression, **(config.compression_options or {}))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torchvision's classes have done it."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """`pixel_values` (B, T, 3, H, W)."""
        logits = self.host(pixel_values.transpose(1, 2))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def set_training_progress(self, progress: float) -> None:
        """As `hosts.set_training_progress`; without STTS nothing is scheduled."""
        if hasattr(self.host, "compression"):
            set_training_progress(self.host, progress)

    def load_host_weights(self, weights: dict[str, torch.Tensor], source: str) -> None:
        """Load weights of `host`; a head of other classes, and a compression's where there are none, stay new.

        Raises ValueError where weights of the model itself are missing.
        """
        own = self.host.state_dict()
        fitting = OrderedDict((n, v) for n, v in weights.items() if n in own and own[n].shape == v.shape)
        lacking = [n for n in own if n not in fitting and not n.startswith(("head.", "compression."))]
        if lacking:
            raise ValueError(
                f"{source} must hold {lacking[0]} in the shape of {self.config.architecture} for "
                f"{self.config.num_frames} frames of {self.config.image_size} pixels, got none; give other weights."
            )
        self.host.load_state_dict(fitting, strict=False)


def pretrained_weights(architecture: str, name: str):
    """torchvision's entry for published weights, "DEFAULT" or such as "KINETICS400_V1".

    Its `get_state_dict` downloads them, `meta["categories"]` are their classes, `transforms()` their preprocessing.
    Raises ValueError for an unknown name.
    """
    from torchvision.models import get_model_weights

    known = get_model_weights(architecture)
    if name not in known.__members__:
        raise ValueError(f"host_weights of {architecture} must be {', '.join(known.__members__)}, got {name!r}.")
    return known[name]
