"""ZeroI2V: Li et al., "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video" (ECCV 2024).

Spatial-temporal dual-headed attention (STDHA): some heads take their keys and values from the frames before or after.
Linear adapters around attention and MLP train and are then folded into CLIP's weights, so that the model costs what
CLIP costs.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import TemporalEmbedding, check_adapter_options
from .methods import Adaptation, NewLinear, TokenState, Tower, ZeroLinear, is_number


K400_HEADS = {"-1": 1, "1": 1}  # for Something-Something: {"-1": 1, "1": 1, "-2": 1, "2": 1}


def shift_frames(x: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Take the channels of each group of x (B, T, L, C) from the frame `offset` later; groups: (offset, channels).

    Groups count from channel 0 on; the remaining channels stay. A frame without such a neighbour keeps its own.
    """
    frames = torch.arange(x.shape[1], device=x.device)
    parts, start = [], 0
    for offset, channels in groups:
        there = (frames + offset >= 0) & (frames + offset < x.shape[1])
        parts.append(x[..., start : start + channels].index_select(1, torch.where(there, frames + offset, frames)))
        start += channels
    return torch.cat([*parts, x[..., start:]], dim=-1)


def head_groups(heads: dict | list, num_heads: int, width: int) -> list[tuple[int, int]]:
    """{offset: number of heads} -> [(offset, channels)], by distance and the past first, whatever the mapping's order.

    A list of pairs [offset, number] keeps its own order. Parts of heads are allowed where they are whole channels.
    Raises ValueError for what does not fit.
    """
    groups, head = [], width // num_heads
    try:
        pairs = list(heads.items() if isinstance(heads, dict) else heads)
        if not all(isinstance(offset, (int, str)) and not isinstance(offset, bool) for offset, _ in pairs):
            raise ValueError
        pairs = [(int(offset), number) for offset, number in pairs]
        if isinstance(heads, dict):
            pairs.sort(key=lambda pair: (abs(pair[0]), pair[0]))
            if len(dict(pairs)) < len(pairs):
                raise ValueError
        for offset, number in pairs:
            channels = round(number * head) if is_number(number) else 0
            if offset == 0 or channels < 1 or abs(number * head - channels) > 1e-6:
                raise ValueError
            groups.append((offset, channels))
        if sum(channels for _, channels in groups) > width:
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(
            f"ZeroI2V option heads must map offsets in frames, not 0, to numbers of heads, at most {num_heads} "
            f'together, such as {{"-1": 1, "1": 1}}; got {heads!r}.'
        ) from None
    return groups


class LinearAdapter(nn.Module):
    """z + scale (W2 (W1 z + b1) + b2), without a nonlinearity; starts as the identity."""

    def __init__(self, width: int, ratio: float, scale: float, dropout: float):
        super().__init__()
        hidden = int(width * ratio)
        self.scale = scale
        self.down = NewLinear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.up = ZeroLinear(hidden, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.scale * self.up(self.dropout(self.down(z)))

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """M (C, C) and c (C,) in float64, with A(z) = M z + c."""
        W1, b1, W2, b2 = (p.double() for p in (self.down.weight, self.down.bias, self.up.weight, self.up.bias))
        return torch.eye(W1.shape[1], dtype=W1.dtype, device=W1.device) + self.scale * W2 @ W1, self.scale * (
            W2 @ b1 + b2
        )


@torch.no_grad()
def fold_before(adapter: LinearAdapter, linear: nn.Linear) -> None:
    """linear(A(z)) as one linear layer: W' = W M, b' = W c + b."""
    M, c = adapter.matrix()
    W = linear.weight.double()
    linear.bias.copy_(W @ c + linear.bias.double())
    linear.weight.copy_(W @ M)


@torch.no_grad()
def fold_behind(adapter: LinearAdapter, linear: nn.Linear) -> None:
    """A(linear(z)) as one linear layer: W' = M W, b' = M b + c."""
    M, c = adapter.matrix()
    linear.bias.copy_(M @ linear.bias.double() + c)
    linear.weight.copy_(M @ linear.weight.double())


class ZeroI2V(Adaptation):
    """ZeroI2V on CLIP; only its own parameters, CLIP's last LayerNorm and the head train.

    Args:
        heads: how many heads look at which frame, {offset: number}, as `head_groups` has it; keys may be strings, as
            JSON's are.
        scale, dropout, ratio: of the adapters, `ratio` of the width inside them.
        num_tadapter: 2 as released, or 1, without the adapter after the MLP.
        merged: the adapters are folded into the blocks (`merge_adapters()` sets this).
    """

    needs_grid = True

    def __init__(
        self,
        tower: Tower,
        *,
        heads: dict | list = K400_HEADS,
        scale: float = 0.5,
        dropout: float = 0.1,
        ratio: float = 0.25,
        num_tadapter: int = 2,
        merged: bool = False,
    ):
        super().__init__(tower)
        C = tower.hidden_size
        self.options = {
            "heads": heads,
            "scale": scale,
            "dropout": dropout,
            "ratio": ratio,
            "num_tadapter": num_tadapter,
        }
        self.groups = head_groups(heads, tower.num_attention_heads, C)
        self.temporal_embedding = TemporalEmbedding(tower.num_frames, C)

        def adapters() -> nn.ModuleList:
            return nn.ModuleList(LinearAdapter(C, ratio, scale, dropout) for _ in range(tower.num_hidden_layers))

        self.attention_in = self.attention_out = self.mlp_in = self.mlp_out = None
        if not merged:
            self.attention_in, self.attention_out, self.mlp_in = adapters(), adapters(), adapters()
            self.mlp_out = adapters() if num_tadapter == 2 else None

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        head_groups(options.get("heads", K400_HEADS), tower.num_attention_heads, tower.hidden_size)
        check_adapter_options("ZeroI2V", tower, options)
        if not isinstance(options.get("merged", False), bool):
            raise ValueError(f"ZeroI2V option merged must be true or false, got {options['merged']!r}.")
        rate = options.get("dropout", 0.1)
        if not is_number(rate) or not 0 <= rate < 1:
            raise ValueError(f"ZeroI2V option dropout must be at least 0 and below 1, got {rate!r}.")

    def on_embeddings(self, x: torch.Tensor) -> torch.Tensor:
        return self.temporal_embedding(x)

    def branch_in(self, i: int, h: torch.Tensor) -> torch.Tensor:
        return h if self.attention_in is None else self.attention_in[i - 1](h)

    def key_value(self, i: int, k: torch.Tensor, v: torch.Tensor, state: TokenState):
        return shift_frames(k, self.groups), shift_frames(v, self.groups)

    def branch_out(self, i: int, h: torch.Tensor) -> torch.Tensor:
        return h if self.attention_out is None else self.attention_out[i - 1](h)

    def mlp(self, i: int, h: torch.Tensor, mlp) -> torch.Tensor:
        h = mlp(h if self.mlp_in is None else self.mlp_in[i - 1](h))
        return h if self.mlp_out is None else self.mlp_out[i - 1](h)

    def trained_parameters(self) -> list[str]:
        return ["post_layernorm."]

    def merge(self, layers: nn.ModuleList) -> dict:
        if self.attention_in is None:
            raise ValueError("the adapters must not be merged yet, got a ZeroI2V model with merged adapters.")
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                fold_before(self.attention_in[i], projection)
            fold_behind(self.attention_out[i], attention.out_proj)
            fold_before(self.mlp_in[i], layer.mlp.fc1)
            if self.mlp_out is not None:
                fold_behind(self.mlp_out[i], layer.mlp.fc2)
        return {**self.options, "merged": True}
