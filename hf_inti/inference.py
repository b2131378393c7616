"""What `model.optimize_for_inference()` switches on: other ways to compute the same numbers, for inference alone.

Nothing here holds weights of its own but `FusedLinear`, whose copy is never saved and is left aside as soon as the
weights that it was made from change. Letters as in `token_state.py`.
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

    def optimize(self) -> None:
        """Raises ValueError where the second way does not fit."""
        self.optimized = True


def check_linear(name: str, linear: nn.Module) -> None:
    """Raise a ValueError unless this is a plain layer whose weights are at hand."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        raise ValueError(
            f"optimize_for_inference needs CLIP's own linear layers, but {name} is a {type(linear).__name__} with "
            f"weights of type {type(linear.weight).__name__ if hasattr(linear, 'weight') else 'none'}; merge adapters "
            "into the weights first, and leave it out for quantised models."
        )
    if linear.weight.is_meta or hasattr(linear, "_hf_hook"):
        raise ValueError(f"the weights of {name} are offloaded; load the whole model on one device to optimise it.")


def is_plain(*linears: nn.Module) -> bool:
    """Whether the layers are still those that `check_linear` passed."""
    return all(type(linear) is nn.Linear for linear in linears)


def in_eager_cpu(x: torch.Tensor) -> bool:
    """Whether to work in pieces: compilers and accelerators have better ways."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class FusedLinear(nn.Module):
    """Linear layers of one input as one matrix product, x (..., C) -> the output of each, views of one tensor."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]), persistent=False)
        self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]), persistent=False)
        self.made_of = [(t, _version(t)) for linear in linears for t in (linear.weight, linear.bias)]

    def is_made_of(self, linears: list[nn.Linear]) -> bool:
        """Whether these hold the very weights that were copied, and nobody has written to them since."""
        if torch.compiler.is_compiling():  # a compiled program is one of fixed weights
            return True
        now = [t for linear in linears for t in (linear.weight, linear.bias)]
        return all(
            t is copied and _version(t) == version for t, (copied, version) in zip(now, self.made_of, strict=True)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.linear(x, self.weight, self.bias).chunk(len(self.made_of) // 2, dim=-1)


def _version(t: torch.Tensor) -> int | None:
    """A count of what was written to it."""
    return None if t.is_inference() else t._version


def attend_by_frames(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float):
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
    rows = x.flatten(0, -2)
    out = torch.empty_like(rows)
    at_once = FRAMES_AT_ONCE["mlp"] * x.shape[-2] if in_eager_cpu(x) else len(rows)
    for rows_, out_ in zip(rows.split(at_once), out.split(at_once), strict=True):
        h = activation(torch.addmm(fc1.bias, rows_, fc1.weight.t(), beta=scale, alpha=scale))
        torch.addmm(fc2.bias, h, fc2.weight.t(), alpha=1 / scale, out=out_)
    return out.view(x.shape)
