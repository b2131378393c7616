"""MViT (torchvision's mvit_v1_b and mvit_v2_s): attention over all frames, with keys and values pooled on the grid.

A block is (x, (T, H, W)) -> (x, (T, H, W)); x (B, 1 + T * H * W, C) begins with the class token, which is classified.
"""

import torch
from torch import nn

from .contract import BaseHost, Current, Forward, Hook


GRID = "its attention pools keys and values on a whole grid"


class Keep(Hook):
    """On a part of a block's attention: keeps its output for `Host.class_attention`."""

    def __init__(self, *where, part: str):
        super().__init__(*where)
        self.part = part

    def __call__(self, module, args, kwargs, output) -> None:
        kept = {} if self.part == "qkv" else self.current.get()  # which comes first
        self.current.set({**kept, self.part: output})


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention in one fused kernel, unless in bfloat16 on a CPU, where that is as slow as in float32."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (scale * q @ k.transpose(2, 3)).softmax(dim=-1) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


class Attend(Forward):
    """In a block's attention without relative positions or a residual, as in mvit_v1_b: torchvision's, faster."""

    def __call__(self, x: torch.Tensor, thw: tuple[int, int, int]):
        attention = self.module
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).transpose(1, 3).unbind(2)
        if attention.pool_k is not None:
            k = attention.pool_k(k, thw)[0]
        if attention.pool_v is not None:
            v = attention.pool_v(v, thw)[0]
        if attention.pool_q is not None:
            q, thw = attention.pool_q(q, thw)
        out = attend(q, k, v, attention.scaler)  # (B, heads, L, d)
        return attention.project(out.transpose(1, 2).flatten(2)), thw


class Host(BaseHost):
    name = "MViT"
    unit = "block"
    class_tokens = 1
    refuses = {"sta": GRID, "tome": GRID}
    stts_default = [[0, 0.6]], [[4, 0.9]]

    def __init__(self, model: nn.Module):
        self.depth = len(model.blocks)

    def blocks_to_select(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def hooks_after_selection(self, model: nn.Module, i: int, current: Current) -> list[tuple[nn.Module, Hook]]:
        """Hooks on the attention of block i, counted from 0, and of all that follow."""
        attentions = [block.attn for block in model.blocks[i:]]
        plain = [attn for attn in attentions if attn.rel_pos_h is None and not attn.residual_pool]
        return [(attn, Attend(self, current)) for attn in plain]

    @staticmethod
    def open(args):
        """What a block gets or returns -> its class token (B, 1, C), its grid (B, T, N, C), and (H, W)."""
        x, (T, H, W) = args
        classes, x = x.tensor_split([1], dim=1)
        return classes, x.unflatten(1, (T, H * W)), (H, W)

    @staticmethod
    def close(args, classes: torch.Tensor, x: torch.Tensor, grid: tuple[int, int]):
        """The reverse of `open`, with another grid."""
        return torch.cat([classes, x.flatten(1, 2)], dim=1), (x.shape[1], *grid)

    def hooks_for_attention(self, block: nn.Module, current: Current) -> list[tuple[nn.Module, Hook]]:
        parts = ("qkv", "pool_q", "pool_k")
        return [
            (getattr(block.attn, part), Keep(self, current, part=part))
            for part in parts
            if getattr(block.attn, part) is not None
        ]

    @staticmethod
    def class_attention(block: nn.Module, args, kept: dict, grid: tuple[int, int, int]) -> torch.Tensor:
        """The attention that the class token paid in this block, as a mean over heads, spread over the grid (B, T, N).

        Keys lie on a coarser grid than tokens, where they were pooled: each token has the attention to its key.
        """
        attention = block.attn
        q, k, _ = kept["qkv"].unflatten(-1, (3, attention.num_heads, -1)).transpose(1, 3).unbind(2)
        thw = args[1]
        if "pool_q" in kept:
            q = kept["pool_q"][0]
        if "pool_k" in kept:
            k, thw = kept["pool_k"]
        shares = (attention.scaler * q[:, :, :1] @ k.transpose(2, 3)).softmax(dim=-1)  # (B, heads, 1, 1 + keys)
        shares = shares[:, :, 0, 1:].mean(dim=1, keepdim=True).unflatten(2, tuple(thw))
        return nn.functional.adaptive_avg_pool3d(shares, grid).squeeze(1).flatten(2)
