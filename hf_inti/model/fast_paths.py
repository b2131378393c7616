"""What `model.optimize_for_inference()` switches on: other ways to compute the same numbers, for inference alone.

Nothing here holds weights of its own: what is computed follows the parameters, whoever writes to them. Letters as
in `token_state.py`.
"""

import torch
from torch import nn


# Frames at a time on a CPU: what a block makes of so few stays in its caches, and in memory that the C library keeps
# for the next ones instead of returning it to the system.
FRAMES_AT_ONCE = {"attention": 2, "mlp": 4}


class Optimizable(nn.Module):
    """A module with a second way to compute its output, which is taken where `fast` says so."""

    optimized = False

    @property
    def fast(self) -> bool:
        """Only in evaluation and without gradients: training, and whatever differentiates, takes the plain way."""
        return self.optimized and not self.training and not torch.is_grad_enabled()

    def check_optimizable(self) -> None:
        """Raise a ValueError where the second way does not fit."""

    def optimize(self) -> None:
        self.optimized = True


def check_linear(name: str, linear: nn.Module) -> None:
    """Raise a ValueError unless this is a plain layer whose weights are at hand."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, torch.Tensor) and (weight.is_meta or hasattr(linear, "_hf_hook")):
        raise ValueError(f"the weights of {name} are offloaded; load the whole model on one device to optimise it.")
    if not is_plain(linear):
        raise ValueError(
            f"optimize_for_inference needs the model's own linear layers, but {name} is a foreign "
            f"{type(linear).__name__}, has hooks or has no bias; merge adapters into the weights first, and leave it "
            "out for quantised models."
        )


def is_plain(*linears: nn.Module) -> bool:
    """Whether these layers do nothing but multiply by their weights, so that one may do it in their place."""
    return all(
        type(linear).forward is nn.Linear.forward
        and type(linear.weight) is nn.Parameter
        and linear.bias is not None
        and not has_hooks(linear)
        for linear in linears
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to hear of the module's calls, or has taken them over."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def in_eager_cpu(x: torch.Tensor) -> bool:
    """Whether to work in pieces: compilers and accelerators have better ways."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pack_parameters(linears: list[nn.Linear]) -> None:
    """Put the weights of several layers, and their biases, one behind the other in memory. The parameters stay."""
    for name in ("weight", "bias"):
        parameters = [getattr(linear, name) for linear in linears]
        together = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, together.split([len(p) for p in parameters]), strict=True):
            parameter.data = part


def packed_view(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """Tensors that lie one behind the other in memory as one, along their first dimension; None if they do not.

    Nothing is copied: whoever writes to one of them writes to what this returns.
    """
    first = tensors[0]
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for t in tensors:
        behind = t.storage_offset() == end and t.untyped_storage().data_ptr() == storage
        if not behind or not t.is_contiguous() or t.dtype != first.dtype or t.shape[1:] != first.shape[1:]:
            return None
        end += t.numel()
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def fused_linear(x: torch.Tensor, linears: list[nn.Linear]) -> tuple[torch.Tensor, ...] | None:
    """The outputs of several layers of one input x (..., C) by one matrix product; None where they lie apart."""
    if torch.compiler.is_compiling() or not is_plain(*linears):
        return None
    weight, bias = (packed_view([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    return nn.functional.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


def chunked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float):
    """Attention of a few frames at a time: q, k, v (frames, H, L, d), bias (frames, 1, 1, L) -> (frames, L, H, d).

    On CPUs faster than torch's fused kernel, which multiplies in smaller pieces.
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
    """fc2(activation(scale fc1(x)) / scale), x (..., D), the scales taken into the products.

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
