"""AIM: Yang et al., "AIM: Adapting Image Models for Efficient Video Action Recognition" (ICLR 2023).

Each block first attends over time, place by place, with the same weights as over space. Adapters after both attentions
and parallel to the MLP train; CLIP is frozen.
"""

import torch
from torch import nn

from .layers import TemporalEmbedding, check_adapter_options
from .methods import Adaptation, NewLinear, TokenState, Tower, ZeroLinear, block_rate, drop_path


class Adapter(nn.Module):
    """Linear, GELU, linear that starts at zero; without a residual."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = int(width * ratio)
        self.down = NewLinear(width, hidden)
        self.up = ZeroLinear(hidden, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.up(nn.functional.gelu(self.down(h)))


class AIM(Adaptation):
    """AIM on CLIP; only its own parameters, CLIP's last LayerNorm and the head train.

    Args:
        num_tadapter: 1, an adapter after the temporal attention (Kinetics), or 2, another before it
            (Something-Something).
        scale: of the adapter parallel to the MLP.
        ratio: share of the width inside the adapters.
    """

    needs_grid = True
    drops_blocks = False  # stochastic depth applies to the temporal and the parallel adapters

    def __init__(self, tower: Tower, *, num_tadapter: int = 1, scale: float = 0.5, ratio: float = 0.25):
        super().__init__(tower)
        self.scale = scale
        self.rates = [block_rate(tower, i) for i in range(1, tower.num_hidden_layers + 1)]
        self.temporal_embedding = TemporalEmbedding(tower.num_frames, tower.hidden_size)

        def adapters() -> nn.ModuleList:
            return nn.ModuleList(Adapter(tower.hidden_size, ratio) for _ in range(tower.num_hidden_layers))

        self.temporal_in = adapters() if num_tadapter == 2 else None
        self.temporal_out, self.spatial, self.parallel = adapters(), adapters(), adapters()

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        check_adapter_options("AIM", tower, options)

    def on_embeddings(self, x: torch.Tensor) -> torch.Tensor:
        return self.temporal_embedding(x)

    def before_attention(self, i: int, x, state: TokenState, attend) -> torch.Tensor:
        inner = None
        if self.temporal_in is not None:
            adapter = self.temporal_in[i - 1]

            def inner(h: torch.Tensor) -> torch.Tensor:
                return h + adapter(h)

        over_time = attend(x.transpose(1, 2), inner).transpose(1, 2)  # the frames of each place as one sequence
        return x + drop_path(self.temporal_out[i - 1](over_time), self.rates[i - 1], self.training)

    def branch_out(self, i: int, h: torch.Tensor) -> torch.Tensor:
        return h + self.spatial[i - 1](h)

    def mlp(self, i: int, h: torch.Tensor, mlp) -> torch.Tensor:
        adapted = self.scale * self.parallel[i - 1](h)
        return mlp(h) + drop_path(adapted, self.rates[i - 1], self.training)

    def trained_parameters(self) -> list[str]:
        return ["post_layernorm."]
