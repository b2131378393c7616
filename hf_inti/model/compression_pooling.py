"""LinearPooling and ConvPooling: the InTI paper's two baselines that halve the frames (Sec. 4.2, Tables 2, 3 and 7).

Both are placed where InTI is and take (B, T, L, C) with T even to (B, T/2, L, C), class tokens included.

The paper describes ConvPooling in a sentence, "a set of stride 3D convolutions", and elsewhere speaks of
non-overlapping ones (Sec. 3.2). By default it is one dense convolution of kernel 3 and stride 2 in time and 1 x 1 in
space: 3 C^2 multiply-adds a token, 4.2 GMACs on B/16 at 5,7, close to the 5 by which the published 184 GFLOPs exceed
LinearPooling's 179; kernels of 3 x 3 in space would cost 38. Its 3.5 M parameters do not
explain the published increase from 115 M to 127 M; no layer that the paper names does.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .methods import Compression, FrameInterpolation, ResettableModule, TokenState, Tower, is_count


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
    """A convolution of stride 2 in time that starts as the mean of each pair of frames."""

    def __init__(self, width: int, kernel_size: list[int]):
        time, rows, columns = kernel_size
        padding = (time - 2, rows // 2, columns // 2)  # a kernel of 3 also sees the frame before the pair
        super().__init__(width, width, kernel_size=tuple(kernel_size), stride=(2, 1, 1), padding=padding)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        for tap in (-2, -1):  # the pair
            nn.init.eye_(self.centre[:, :, tap])
        with torch.no_grad():
            self.weight /= 2

    @property
    def centre(self) -> torch.Tensor:
        """The weights (C, C, time) at the centre of the kernel's rows and columns."""
        rows, columns = self.kernel_size[1:]
        return self.weight[:, :, :, rows // 2, columns // 2]


class ConvPool(GradientCheckpointingLayer):
    """x (B, T, L, C) -> z (B, T/2, L, C), and None: it has no weights of frames to report.

    Class tokens have no neighbours in space and see the kernel's centre alone.
    """

    def __init__(self, width: int, kernel_size: list[int]):
        super().__init__()
        self.conv = MeanConv3d(width, kernel_size)

    def forward(self, x: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, None]:
        if self.conv.kernel_size[1:] == (1, 1):
            return self._over_time(x), None
        cls, patches = x[:, :, : state.num_class_tokens], x[:, :, state.num_class_tokens :]
        z = self.conv(patches.unflatten(2, state.grid).permute(0, 4, 1, 2, 3))  # (B, C, T/2, h, w)
        return torch.cat([self._over_time(cls), z.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2), None

    def _over_time(self, x: torch.Tensor) -> torch.Tensor:
        # As linear layers, which on CPUs train many times faster than torch's 3-d convolution.
        *before, first, second = self.conv.centre.unbind(dim=2)  # (C, C) each
        even, odd = x[:, 0::2], x[:, 1::2]
        z = nn.functional.linear(even, first, self.conv.bias) + nn.functional.linear(odd, second)
        if before:
            earlier = nn.functional.linear(odd, before[0])  # of the pair before; the first pair has none
            z = z + nn.functional.pad(earlier, (0, 0, 0, 0, 1, -1))
        return z


class _Pooling(Compression):
    """A pooling after each of `layers`."""

    def __init__(self, tower: Tower, layers: list[int]):
        super().__init__(tower, layers)
        self.layers = list(layers)

    @classmethod
    def frame_multiple(cls, layers: list[int]) -> int:
        return 2 ** len(layers)


class LinearPooling(_Pooling):
    """LinearPooling after each of `layers`."""

    def __init__(self, tower: Tower, layers: list[int]):
        super().__init__(tower, layers)
        self.stages = nn.ModuleList(LinearPool() for _ in layers)

    def after_block(self, i: int, x, keys, state: TokenState):
        if i in self.layers:
            x, _ = self.stages[self.layers.index(i)](x)
        return x, state


class ConvPooling(_Pooling):
    """ConvPooling after each of `layers`.

    Args:
        kernel_size: in frames, 3 or, for convolutions that do not overlap, 2; in rows and columns of patches, odd.
    """

    def __init__(self, tower: Tower, layers: list[int], *, kernel_size: list[int] = (3, 1, 1)):
        super().__init__(tower, layers)
        self.stages = nn.ModuleList(ConvPool(tower.hidden_size, kernel_size) for _ in layers)

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        size = options.get("kernel_size", (3, 1, 1))
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 3
            or not all(is_count(n) for n in size)
            or size[0] not in (2, 3)
            or size[1] % 2 == 0
            or size[2] % 2 == 0
        ):
            raise ValueError(
                "ConvPooling option kernel_size must be [2 or 3 frames, odd number of rows, odd number of columns], "
                f"got {size!r}."
            )

    def after_block(self, i: int, x, keys, state: TokenState):
        if i in self.layers:
            x, _ = self.stages[self.layers.index(i)](x, state)
        return x, state
