"""Shared by several methods: convolutions over time and space, the patch grid, temporal positions, option checks."""

import torch
from torch import nn

from .methods import ResettableModule, TokenState, Tower, is_count, is_number


def depthwise_conv3d(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A depth-wise `conv` with odd kernel sizes and "same" padding, on channels-last x (B, T, h, w, C).

    Its stride is 1 in space; in time it must divide T. Computed as one 2-d convolution per tap in time, shifted and
    summed: on CPU several times faster than torch's 3-d convolution. Returns (B, T / stride, h, w, C).
    """
    taps, height, width = conv.kernel_size
    stride = conv.stride[0]
    C = conv.weight.shape[0]
    if height == width == 1 and stride == 1:  # over time alone: one 2-d convolution of (T, h * w) planes
        planes = x.flatten(2, 3).permute(0, 3, 1, 2)  # (B, C, T, h * w), a view
        y = nn.functional.conv2d(planes, conv.weight[..., 0], conv.bias, padding=(taps // 2, 0), groups=C)
        return y.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])
    planes = x.flatten(0, 1).permute(0, 3, 1, 2).unflatten(0, x.shape[:2])  # (B, T, C, h, w), a view
    total = None
    for dt in sorted(range(taps), key=lambda dt: dt != taps // 2):  # the middle first: it is never shifted
        # y[j] has w[dt] x[stride j + offset], which is frame j + shift of every stride-th frame from `first`.
        offset = dt - taps // 2
        first, shift = offset % stride, offset // stride
        frames = planes[:, first::stride]
        if abs(shift) > 1 and abs(shift) >= frames.shape[1]:
            continue  # the clip is too short for this tap
        weight = conv.weight[:, :, dt]  # (C, 1, height, width)
        bias = conv.bias if total is None else None
        y = nn.functional.conv2d(frames.flatten(0, 1), weight, bias, padding=(height // 2, width // 2), groups=C)
        y = y.unflatten(0, frames.shape[:2])
        if total is None:
            total = y
        elif torch.is_grad_enabled():  # pad with zeros: in-place addition has no gradient
            total = total + nn.functional.pad(y, (0, 0, 0, 0, 0, 0, -shift, shift))
        else:
            start, stop = max(-shift, 0), y.shape[1] - max(shift, 0)
            total[:, start:stop] += y[:, start + shift : stop + shift]
    return total.permute(0, 1, 3, 4, 2)


def tokens_at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (B, N, C) at `index` (B, M) of its tokens: (B, M, C). It moves whole rows, and is faster than `gather`."""
    B, N, C = x.shape
    first = N * torch.arange(B, device=x.device)[:, None]
    rows = x.flatten(0, 1).index_select(0, (first + index).flatten())
    return rows.view(B, index.shape[1], C)  # x's own B: with the index's, exported files hold one number of frames


def to_grid(patches: torch.Tensor, state: TokenState) -> torch.Tensor:
    """Patch tokens (B, T, N', C) -> (B, T, h, w, C), each at its place and zeros at places without a token."""
    if state.positions is not None:
        places = state.positions[..., None].expand_as(patches)
        grid = patches.new_zeros(*patches.shape[:2], state.grid[0] * state.grid[1], patches.shape[-1])
        patches = grid.scatter(2, places, patches)
    return patches.unflatten(2, state.grid)


def from_grid(grid: torch.Tensor, state: TokenState) -> torch.Tensor:
    """(B, T, h, w, C) -> (B, T, N', C): the values at the tokens' places."""
    patches = grid.flatten(2, 3)
    if state.positions is None:
        return patches
    return patches.gather(2, state.positions[..., None].expand(-1, -1, -1, patches.shape[-1]))


def at_frames(P: torch.Tensor, num_frames: int) -> torch.Tensor:
    """A temporal position P (T, 1, C) interpolated linearly along time to (num_frames, 1, C)."""
    # An exported program cannot branch: it always interpolates, which changes nothing where T is P's own.
    if torch.compiler.is_exporting() or num_frames != P.shape[0]:
        P = nn.functional.interpolate(P.permute(1, 2, 0), size=num_frames, mode="linear").permute(2, 0, 1)
    return P


class TemporalEmbedding(ResettableModule, nn.Module):
    """A learned embedding of each frame, from zero, added to all its tokens (ZeroI2V, AIM): x (B, T, L, C)."""

    def __init__(self, num_frames: int, width: int):
        super().__init__()
        self.P = nn.Parameter(torch.empty(num_frames, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.P)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + at_frames(self.P, x.shape[1])


def check_adapter_options(name: str, tower: Tower, options: dict) -> None:
    """Raise a ValueError for a bad scale, ratio or num_tadapter, which AIM and ZeroI2V share."""
    scale, ratio = options.get("scale", 0.5), options.get("ratio", 0.25)
    if not is_number(scale):
        raise ValueError(f"{name} option scale must be a number, got {scale!r}.")
    if not is_number(ratio) or int(tower.hidden_size * ratio) < 1:
        raise ValueError(f"{name} option ratio must leave at least one channel of {tower.hidden_size}, got {ratio!r}.")
    if not is_count(options.get("num_tadapter", 1), 1, 2):
        raise ValueError(f"{name} option num_tadapter must be 1 or 2, got {options['num_tadapter']!r}.")
