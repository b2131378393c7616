"""LinearPooling and ConvPooling: the InTI paper's two baselines that halve the frames (Sec. 4.2, Tables 2, 3 and 7).

Both stand where InTI stands and take (B, T, L, C) with T even to (B, T/2, L, C), class tokens as all others.

The paper describes them in a sentence each. ConvPooling's "set of stride 3D convolutions" is read here as one dense
convolution of kernel 3 and stride 2 in time, 1 x 1 in space: that costs 3 C^2 multiply-adds a token, 4.2 GMACs on B/16
at 5,7, near the 5 that the published 184 GFLOPs lie above LinearPooling's 179, whereas kernels of 3 x 3 in space would
cost 38. Its parameters, 3.5 M, do not make the published 127 M out of the 115 M without it; no layer that the paper
names does.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .methods import Compression, FrameInterpolation, ResettableModule, TokenState, Tower


class LinearPool(ResettableModule, FrameInterpolation):
    """One learned pair of weights for all tokens, which sum to one; it starts at a half each."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logits)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, T, L, C) -> z (B, T/2, L, C), weights (B, T/2, L, 2)."""
        weights = self.logits.softmax(dim=0)
        z = weights[0] * x[:, 0::2] + weights[1] * x[:, 1::2]
        return z, weights.expand(*z.shape[:3], 2)


class MeanConv3d(ResettableModule, nn.Conv3d):
    """A convolution of kernel 3 and stride 2 in time that starts as the mean of each pair of frames."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=(3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for tap in (1, 2):  # tap 0 belongs to the pair before
            nn.init.eye_(self.weight[:, :, tap, 0, 0])
        with torch.no_grad():
            self.weight /= 2


class ConvPool(GradientCheckpointingLayer):
    """x (B, T, L, C) -> z (B, T/2, L, C), and None: it has no weights to tell."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = MeanConv3d(width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        # As three linear layers, which on CPUs train many times faster than torch's 3-d convolution.
        before, first, second = self.conv.weight[..., 0, 0].unbind(dim=2)  # (C, C) each
        even, odd = x[:, 0::2], x[:, 1::2]
        z = nn.functional.linear(even, first, self.conv.bias) + nn.functional.linear(odd, second)
        earlier = nn.functional.linear(odd, before)  # of the pair before; the first pair has none
        return z + nn.functional.pad(earlier, (0, 0, 0, 0, 1, -1)), None


class _Pooling(Compression):
    def __init__(self, tower: Tower, layers: list[int]):
        super().__init__(tower, layers)
        self.layers = list(layers)
        self.stages = nn.ModuleList(self.stage(tower) for _ in layers)

    @classmethod
    def frame_multiple(cls, layers: list[int]) -> int:
        return 2 ** len(layers)

    def after_block(self, i: int, x, keys, state: TokenState):
        if i in self.layers:
            x, _ = self.stages[self.layers.index(i)](x)
        return x, state


class LinearPooling(_Pooling):
    """LinearPooling after each of `layers`."""

    @staticmethod
    def stage(tower: Tower) -> nn.Module:
        return LinearPool()


class ConvPooling(_Pooling):
    """ConvPooling after each of `layers`."""

    @staticmethod
    def stage(tower: Tower) -> nn.Module:
        return ConvPool(tower.hidden_size)
