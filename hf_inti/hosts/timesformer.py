"""TimeSformer: in every block attention over time at each place, then attention within each frame, with a class token.

Attention over time needs the same places in all frames. So ToMe merges places, not single tokens: the tokens of a place
in all frames are one token to it, compared by their keys side by side, and are merged alike in every frame. STA drops
other places in each frame and does not fit.
"""

import copy

import torch
from torch import nn

from .contract import BaseHost, Block, Trace


class Flag:
    """The argument `output_attentions` and the trace: the only argument of a block that reaches its attention."""

    def __init__(self, value: bool | None, trace: Trace):
        self.value, self.trace = bool(value), trace

    def __bool__(self) -> bool:
        return self.value


class Host(BaseHost):
    name = "TimeSformer"
    class_tokens = 1
    refuses = BaseHost.refuses | {
        "sta": "STA drops other places in each frame, and attention over time needs the same in all"
    }

    def __init__(self, model: nn.Module):
        config = model.config
        if config.attention_type != "divided_space_time":
            raise ValueError(
                "the TimeSformer's attention_type must be divided_space_time, that of the published models, got "
                f"{config.attention_type}."
            )
        side = config.image_size // config.patch_size
        self.grid = (config.num_frames, side, side)
        self.depth, self.heads = config.num_hidden_layers, config.num_attention_heads

    @property
    def num_merging(self) -> int:
        return self.grid[1] * self.grid[2]

    def encoder(self, model: nn.Module) -> nn.Module:
        return getattr(model, "timesformer", model).encoder

    def blocks(self, model: nn.Module) -> list[Block]:
        return [
            Block(
                layer,
                layer.attention,
                {"key": layer.attention.attention.qkv},
                layer.layernorm_after,
                layer.output,
            )
            for layer in self.encoder(model).layer
        ]

    def begin(self, args, kwargs, trace):
        return args, {**kwargs, "output_attentions": Flag(kwargs.get("output_attentions"), trace)}

    def trace(self, args, kwargs) -> Trace:
        return args[1].trace

    def receive(self, args, kwargs):
        flag = kwargs["output_attentions"]
        return args, {**kwargs, "output_attentions": flag.value}, flag.trace

    def feature(self, output: torch.Tensor, similarity: str) -> torch.Tensor:
        """Queries, keys and values (B * T, L, 3 D) -> keys of all frames side by side (B, L, T * d)."""
        keys = super().feature(output.chunk(3, dim=-1)[1], similarity)
        return keys.unflatten(0, (-1, self.grid[0])).transpose(1, 2).flatten(2)

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, 1 + N * T, D), place by place -> (B, 1 + N, T * D), with the class token T times."""
        T = self.grid[0]
        return torch.cat([x[:, :1].repeat(1, 1, T), x[:, 1:].unflatten(1, (-1, T)).flatten(2)], dim=1)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(2, (self.grid[0], -1))  # (B, 1 + N, T, D)
        return torch.cat([x[:, :1, 0], x[:, 1:].flatten(1, 2)], dim=1)

    def put_on(self, model: nn.Module, hooks) -> None:
        super().put_on(model, hooks)
        # A block lays its tokens out on the configuration's grid and back. One column is a grid for any number of them.
        config = copy.copy(model.config)
        config.patch_size = config.image_size
        for block in self.blocks(model):
            block.block.config = config

    def take_off(self, model: nn.Module) -> None:
        super().take_off(model)
        for block in self.blocks(model):
            block.block.config = model.config
