"""Multiply-adds and parameters of a configuration, counted on the meta device: nothing is computed or stored."""

import json
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..model.configuration_inti_clip import InTIClipVisionConfig
from ..model.modeling_inti_clip import InTIClipForVideoClassification


aten = torch.ops.aten
# Whose output has the inputs' shape, broadcast.
SAME_SHAPE = {aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.gelu.default}
SAME_SHAPE |= {aten.sigmoid.default, aten._softmax.default, aten._safe_softmax.default}
# Where a module's operations belong, by the module's path in InTIClipForVideoClassification.
PARTS = {
    "patch embedding": "vision_model.embeddings",
    "blocks": "vision_model.encoder.layers",
    "compression": "vision_model.compression",
    "adaptation": "vision_model.adaptation",
    "head": "classifier",
}


class Cost(NamedTuple):
    """Multiply-adds of one clip (attention's two products counted, norms and activations not) and parameters."""

    macs: int
    parameters: int

    @property
    def gmacs(self) -> float:
        return self.macs / 1e9

    @property
    def mparams(self) -> float:
        return self.parameters / 1e6


class _ShapesAlone(TorchDispatchMode):
    """Answers the most frequent operators with the output's shape alone: torch's own answers double a count's time."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float32)}:
            if func in SAME_SHAPE:
                shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
                # Of the same strides, too, by which a view may fail.
                return torch.empty_like(tensors[0]) if tensors[0].shape == shape else tensors[0].new_empty(shape)
            if func is aten.addmm.default:
                return args[0].new_empty(args[1].shape[0], args[2].shape[1])
            if func is aten.bmm.default:
                return args[0].new_empty(*args[0].shape[:2], args[1].shape[2])
            if func is aten.native_layer_norm.default:
                return tuple(args[0].new_empty(shape) for shape in (args[0].shape, (0,), (0,)))  # nobody reads the rest
        return func(*args, **(kwargs or {}))


def count_flops(model: torch.nn.Module, *inputs: torch.Tensor) -> FlopCounterMode:
    """A counter that has seen one forward pass; a multiply-add is two operations."""
    counter = FlopCounterMode(display=False)
    shapes = _ShapesAlone() if all(tensor.is_meta for tensor in inputs) else nullcontext()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), shapes, counter:  # it does not see inside every fused kernel
        model(*inputs)
    return counter


def count_costs(config: InTIClipVisionConfig, num_frames: int | None = None) -> dict[str, Cost]:
    """Count one clip of `num_frames` (default: the configuration's) at the configuration's image size.

    Returns a Cost for each part of `PARTS` and for "total", which also holds what belongs to no part (norms).
    Raises ValueError as the model does, for example for a number of frames that cannot be halved.
    """
    frames = config.num_frames if num_frames is None else num_frames
    return dict(_count_costs(config.to_json_string(use_diff=False), frames))


@cache
def _count_costs(config_json: str, num_frames: int) -> dict[str, Cost]:
    config = InTIClipVisionConfig.from_dict(json.loads(config_json))
    with torch.device("meta"):
        model = InTIClipForVideoClassification._from_config(config, attn_implementation="eager").eval()
        model.requires_grad_(False)
        size = config.image_size
        pixel_values = torch.empty(1, num_frames, config.num_channels, size, size)
    counter = count_flops(model, pixel_values)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    costs = {}
    for part, path in PARTS.items():
        # A container is never called itself: its operations are those of the outermost modules inside that are.
        inside = sorted(name for name in flops if (name + ".").startswith(f"{root}.{path}."))
        outermost = [name for name in inside if not any(name.startswith(other + ".") for other in inside)]
        parameters = sum(p.numel() for name, p in model.named_parameters() if name.startswith(path + "."))
        costs[part] = Cost(sum(flops[name] for name in outermost) // 2, parameters)
    costs["total"] = Cost(counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))
    return costs
