"""Multiply-adds of the models that `hf_inti.hosts` compresses, counted on the meta device."""

import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from ..hosts import compress
from ..measure.costs import count_flops


def build_host(kind: str, sizes: dict, frames: int) -> tuple[nn.Module, torch.Tensor]:
    """A model and a clip of `frames` x 224 x 224 on the meta device; see `papers.published_hosts.HostModel`.

    Raises ImportError where it is torchvision's, and that is missing.
    """
    with torch.device("meta"):
        if kind == "VideoMAE":
            config = VideoMAEConfig(**sizes, num_frames=frames)
            model = VideoMAEForVideoClassification._from_config(config, attn_implementation="eager")
            clip = torch.empty(1, frames, 3, 224, 224)
        elif kind == "MViT":
            from torchvision.models.video import mvit_v1_b

            model, clip = mvit_v1_b(**sizes), torch.empty(1, 3, frames, 224, 224)
        else:
            from torchvision.models.video.swin_transformer import SwinTransformer3d

            model = SwinTransformer3d(patch_size=[2, 4, 4], stochastic_depth_prob=0.0, **sizes)
            clip = torch.empty(1, 3, frames, 224, 224)
    return model.eval().requires_grad_(False), clip


def count_host(host: tuple[str, dict, int], settings: list[tuple[str | None, dict]]) -> list[float]:
    """GFLOPs of a clip with each method and its options, as the papers count.

    They use fvcore, which counts multiply-adds, and takes a LayerNorm for 5 operations an element.
    """
    model, clip = build_host(*host)
    norms, counts = [], []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: norms.append(5 * output.numel()))
    for method, options in settings:
        norms.clear()
        counter = count_flops(compress(model, method, **options), clip)
        counts.append((counter.get_total_flops() / 2 + sum(norms)) / 1e9)
    return counts
