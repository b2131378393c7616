"""VideoSwin (torchvision's swin3d_t, swin3d_s and swin3d_b): attention within windows, in stages of halving grids.

Letters: K tokens left of the H * W of a frame, V tokens in a window, C width of a stage.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from ..model.layers import tokens_at
from .contract import BaseHost, Current, Forward, Hook, PreHook


OUTSIDE = -100.0  # what torchvision adds to the logits between parts of a window that are no neighbours


class WindowTokens(NamedTuple):
    """What blocks hand on where a stage was pruned; without `kept`, x is the whole grid (B, T, H, W, C).

    It travels as the blocks' argument, so a block that activation checkpointing runs again finds the same.
    """

    x: torch.Tensor | None = None  # (B, T, K, C)
    kept: torch.Tensor | None = None  # (B, T, K): places in the frame, ascending
    nearest: torch.Tensor | None = None  # (B, T, H, W): which of the K stands at each place
    feature: torch.Tensor | None = None  # (B, T, K, d), or (B, T, H, W, d): by which the tokens are compared


def nearest_kept(kept: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which kept token (B, T, K), of ascending places, is nearest to each place of the frame: (B, T, H, W).

    A kept token stands at its own place; of equally near ones the first in row-major order is taken.
    """
    H, W = grid
    places = torch.arange(H * W, device=kept.device)
    rows, columns = places // W, places % W
    distances = (rows[:, None] - rows).square() + (columns[:, None] - columns).square()  # (H * W, H * W)
    nearest = distances.to(torch.int32)[:, kept].argmin(dim=-1)  # of (H * W, B, T, K)
    return nearest.permute(1, 2, 0).unflatten(2, grid)


def fill(x: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T, K, C) -> the whole grid (B, T, H, W, C), dropped places with the nearest kept token."""
    return tokens_at(x.flatten(0, 1), nearest.flatten(0, 1).flatten(1)).view(*nearest.shape, -1)


def partition(x: torch.Tensor, window: list[int]) -> torch.Tensor:
    """(T, H, W), multiples of the window, -> (windows, V)."""
    T, H, W = x.shape
    t, h, w = window
    return x.view(T // t, t, H // h, h, W // w, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, t * h * w)


def window_order(size: list[int], window: list[int], shift: list[int], device) -> tuple[torch.Tensor, torch.Tensor]:
    """The place in a padded grid of `size` at each position of each shifted window, and the part that it belongs to.

    Both (windows, V). Shifted windows at the grid's end join parts from both ends, which must not see each other.
    """
    places = torch.arange(math.prod(size), device=device).view(size).roll([-s for s in shift], (0, 1, 2))
    part = torch.zeros(size, dtype=torch.long, device=device)
    for dim, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        if s:
            i = torch.arange(n, device=device)
            number = (i >= n - w).long() + (i >= n - s).long()
            part = part * 3 + number.view([-1 if d == dim else 1 for d in range(3)])
    return partition(places, window), partition(part, window)


def window_attention(attention: nn.Module, x: torch.Tensor, tokens: WindowTokens) -> torch.Tensor:
    """What torchvision's attention gives at the places kept; x like `tokens.x`, normed.

    Queries, keys and values, and the last projection, are computed of kept tokens alone; in between, each dropped place
    has the nearest kept token (STA, Sec. 4.1 and 4.2).
    """
    whole = tokens.kept is None
    B, T, H, W = x.shape[:4] if whole else tokens.nearest.shape
    qkv = attention.qkv(x).reshape(B, T, -1, 3 * x.shape[-1])
    K = qkv.shape[2]
    grid = [T, H, W]
    window = [min(n, w) for n, w in zip(grid, attention.window_size, strict=True)]
    shift = [0 if n <= w else s for n, w, s in zip(grid, attention.window_size, attention.shift_size, strict=True)]
    size = [-(-n // w) * w for n, w in zip(grid, window, strict=True)]
    order, part = window_order(size, window, shift, x.device)

    # Where each place of the padded grid finds its token among the T * K of the clip; padding finds the last one.
    inside = torch.arange(H * W, device=x.device).view(1, 1, H, W).expand(B, T, -1, -1) if whole else tokens.nearest
    source = inside + K * torch.arange(T, device=x.device)[:, None, None]
    padding = [number for n, s in zip(reversed(grid), reversed(size), strict=True) for number in (0, s - n)]
    source = nn.functional.pad(source, padding, value=T * K).flatten(1)[:, order.flatten()]  # (B, windows * V)
    qkv = qkv.flatten(1, 2)
    if size != grid:  # torchvision pads in front of the projection
        empty = qkv.new_zeros(3 * x.shape[-1]) if attention.qkv.bias is None else attention.qkv.bias
        qkv = torch.cat([qkv, empty.to(qkv.dtype).expand(B, 1, -1)], dim=1)
    qkv = tokens_at(qkv, source)
    out = attend(attention, qkv.unflatten(1, order.shape), part if any(shift) else None, window)

    places = torch.arange(H * W, device=x.device).expand(B, T, -1) if whole else tokens.kept
    frames = torch.arange(T, device=x.device)[:, None]
    padded = (frames * size[1] + places // W) * size[2] + places % W  # (B, T, K): places in the padded grid
    back = order.flatten().argsort()[padded].flatten(1)
    out = tokens_at(out.flatten(1, 2), back).reshape(x.shape)
    return nn.functional.dropout(attention.proj(out), attention.dropout, attention.training)


def attend(attention: nn.Module, qkv: torch.Tensor, part: torch.Tensor | None, window: list[int]) -> torch.Tensor:
    """Queries, keys and values side by side (B, windows, V, 3 C) -> (B, windows, V, C), before the projection."""
    B, windows = qkv.shape[:2]
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, V, d)
    mask = attention.get_relative_position_bias(window)  # (1, heads, V, V)
    if part is None:
        joined = (0, 1)  # windows with clips, which all have this mask
    else:
        apart = part[:, None, :, None] != part[:, None, None, :]
        mask = torch.where(apart, mask + OUTSIDE, mask).flatten(0, 1)[None]
        joined = (1, 2)  # windows with heads
    q, k, v = (x.flatten(*joined) for x in (q, k, v))
    dropout = attention.attention_dropout if attention.training else 0.0
    out = nn.functional.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout)
    out = out.unflatten(joined[0], (B, windows) if part is None else (windows, -1))
    return out.transpose(2, 3).flatten(3)


class Enter(PreHook):
    """On a block: takes what it knows about its tokens out of the argument."""

    def __call__(self, module, args, kwargs):
        tokens = args[0] if isinstance(args[0], WindowTokens) else WindowTokens(args[0])
        if not isinstance(tokens.x, torch.Tensor) or (tokens.x.requires_grad and not torch.is_grad_enabled()):
            raise ValueError(
                "activation checkpointing must be called with use_reentrant=False under STA on VideoSwin, whose blocks "
                "hand on more than a tensor, got a block without gradients between blocks with them; pass "
                "use_reentrant=False."
            )
        self.current.set(tokens._replace(x=None))  # where a recomputation ends early, nothing large stays
        return (tokens.x, *args[1:]), kwargs


class Leave(Hook):
    """On a block: puts it back beside the output, the last block's excepted, which the classifier reads."""

    def __init__(self, *where, last: bool = False):
        super().__init__(*where)
        self.last = last

    def __call__(self, module, args, kwargs, output):
        tokens = self.current.pop()
        if self.last:
            return output if tokens.kept is None else output[:, :, :, None]
        if tokens.kept is None and tokens.feature is None:
            return output
        return tokens._replace(x=output)


class Attend(Forward):
    """In a block's attention, some of whose tokens are missing."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return window_attention(self.module, x, self.current.get())


class AttendToAll(Forward):
    """In a block's attention on a whole grid: torchvision's in one fused kernel, and without work on padding."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return window_attention(self.module, x, WindowTokens())


class Host(BaseHost):
    name = "VideoSwin"
    refuses = {"tome": "windows need a token at every place, and merged ones have none"}
    files = {"sta": "sta_windows"}
    unit = "stage"
    stts_default = [[0, 0.6]], []

    def __init__(self, model: nn.Module):
        self.depth = len(self.stages(model))

    @staticmethod
    def stages(model: nn.Module) -> list[nn.Sequential]:
        """The blocks of each stage, which have norm1, attn, norm2 and mlp."""
        return list(model.features[0::2])

    @staticmethod
    def merges(model: nn.Module) -> list[nn.Module]:
        """What follows each stage but the last: joins each two by two tokens of a frame into one."""
        return list(model.features[1::2])

    def blocks_to_select(self, model: nn.Module) -> list[nn.Module]:
        """The first block of each stage, before which STTS may stand."""
        return [stage[0] for stage in self.stages(model)]

    def hooks_after_selection(self, model: nn.Module, i: int, current: Current) -> list[tuple[nn.Module, Hook]]:
        """Hooks on the attention of stage i, counted from 0, and of all that follow."""
        return [(block.attn, AttendToAll(self, current)) for stage in self.stages(model)[i:] for block in stage]

    @staticmethod
    def open(args):
        """What a block gets -> nothing, its grid (B, T, N, C), and (H, W)."""
        return None, args[0].flatten(2, 3), args[0].shape[2:4]

    @staticmethod
    def close(args, rest: None, x: torch.Tensor, grid: tuple[int, int]):
        """The reverse of `open`, with another grid."""
        return (x.unflatten(2, grid), *args[1:])

    def pruned_stage(self, blocks: nn.Sequential, current: Current, last: bool) -> list[tuple[nn.Module, Hook]]:
        """Hooks on the blocks of a stage in which tokens are missing; of the `last` stage the last block ends it."""
        found = []
        for block in blocks:
            ends = last and block is blocks[-1]
            found += [(block, Enter(self, current)), (block, Leave(self, current, last=ends))]
            found.append((block.attn, Attend(self, current)))
        return found
