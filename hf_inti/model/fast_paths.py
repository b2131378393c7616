"""What `model.optimize_for_inference()` turns on: faster ways to compute the same outputs, for inference only.

Nothing here keeps a copy of any weight, so changes to the parameters always take effect. Letters as in `methods.py`.
"""

import torch
from torch import nn


# Frames per chunk on CPU: small enough that activations stay in cache, and that the C library keeps their memory for
# the next chunk instead of returning it to the system.
FRAMES_AT_ONCE = {"attention": 2, "mlp": 4}


class Optimizable(nn.Module):
    """A module with a second, faster way to compute its output, used while `fast` is true."""

    optimized = False

    @property
    def fast(self) -> bool:
        """Only in evaluation mode and without gradients."""
        return self.optimized and not self.training and not torch.is_grad_enabled()

    def check_optimizable(self) -> None:
        """Raise a ValueError if the faster way cannot be used."""

    def optimize(self) -> None:
        self.optimized = True


def check_linear(name: str, linear: nn.Module) -> None:
    """Raise a ValueError unless this is a plain linear layer with its weights in memory."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, torch.Tensor) and (weight.is_meta or hasattr(linear, "_hf_hook")):
        raise ValueError(f"{name} must be in memory, got offloaded weights; load the whole model on one device.")
    if not is_plain(linear):
        raise ValueError(
            f"{name} must be the model's own linear layer to be optimised, got a {type(linear).__name__} that is "
            "another, has hooks or no bias; merge adapters into the weights, and do not optimise quantised models."
        )


def is_plain(*linears: nn.Module) -> bool:
    """Whether all are plain nn.Linear layers (bias, no hooks), safe to fuse."""
    return all(
        type(linear).forward is nn.Linear.forward
        and type(linear.weight) is nn.Parameter
        and linear.bias is not None
        and not has_hooks(linear)
        for linear in linears
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward hooks or a patched `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def in_eager_cpu(x: torch.Tensor) -> bool:
    """Whether to work in chunks: compilers and accelerators do better without."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pack_parameters(linears: list[nn.Linear]) -> None:
    """Make the weights of several layers, and their biases, adjacent in memory; the parameters stay the same."""
    for name in ("weight", "bias"):
        parameters = [getattr(linear, name) for linear in linears]
        together = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, together.split([len(p) for p in parameters]), strict=True):
            parameter.data = part


def packed_view(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that are adjacent in memory as one, along their first dimension; None if they are not.

    It is a view: writes to any of them show in it.
    """
    first = tensors[0]
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for t in tensors:
        adjacent = t.storage_offset() == end and t.untyped_storage().data_ptr() == storage
        if not adjacent or not t.is_contiguous() or t.dtype != first.dtype or t.shape[1:] != first.shape[1:]:
            return None
        end += t.numel()
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def fused_linear(x: torch.Tensor, linears: list[nn.Linear]) -> tuple[torch.Tensor, ...] | None:
    """The outputs of several layers for one input x (..., C), by one matrix product; None unless they are packed."""
    if torch.compiler.is_compiling() or not is_plain(*linears):
        return None
    weight, bias = (packed_view([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    return nn.functional.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


def chunked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float):
    """Attention in chunks of frames: q, k, v (frames, H, L, d), bias (frames, 1, 1, L) -> (frames, L, H, d).

    On CPU this is faster than torch's fused kernel, whose matrix products are smaller.
    """
    n = FRAMES_AT_ONCE["attention"]
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    biases = [None] * len(out.split(n)) if bias is None else bias.split(n)
    for q_, k_, v_, bias_, out_ in zip(q.split(n), k.split(n), v.split(n), biases, out.split(n), strict=True):
        logits = torch.matmul(q_ * scale, k_.transpose(2, 3))
        if bias_ is not None:
            logits += bias_
        out_.copy_((logits.softmax(dim=-1) @ v_).transpose(1, 2))
    return out


def scaled_mlp(x: torch.Tensor, fc1: nn.Linear, fc2: nn.Linear, activation, scale: float) -> torch.Tensor:
    """fc2(activation(scale fc1(x)) / scale), x (..., D), with the scales inside the matrix products.

    With the in-place SiLU and scale 1.702 it is CLIP's MLP: quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702.
    """

    def mlp(rows: torch.Tensor) -> torch.Tensor:
        h = activation(torch.addmm(fc1.bias, rows, fc1.weight.t(), beta=scale, alpha=scale))
        return torch.addmm(fc2.bias, h, fc2.weight.t(), alpha=1 / scale)

    rows = x.flatten(0, -2)
    if not in_eager_cpu(x):
        return mlp(rows).view(x.shape)
    out, at_once = torch.empty_like(rows), FRAMES_AT_ONCE["mlp"] * x.shape[-2]
    for rows_, out_ in zip(rows.split(at_once), out.split(at_once), strict=True):
        out_.copy_(mlp(rows_))
    return out.view(x.shape)
