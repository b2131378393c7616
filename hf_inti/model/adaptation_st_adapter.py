"""ST-Adapter: Pan et al., "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning" (NeurIPS 2022).

Bottlenecks with a depth-wise convolution over time on the residual stream, before attention, MLP or both; nothing else
trains but the head and CLIP's last LayerNorm.
"""

import torch
from torch import nn

from .layers import depthwise_conv3d, from_grid, to_grid
from .methods import Adaptation, NewLinear, ResettableModule, TokenState, Tower, is_count


class ZeroBiasLinear(NewLinear):
    """The bias starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class ZeroConv3d(ResettableModule, nn.Conv3d):
    """Weight and bias start at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SpatioTemporalAdapter(nn.Module):
    """Linear, depth-wise 3-d convolution, linear, without the residual, on patch tokens (B, T, N, C)."""

    def __init__(self, width: int, hidden: int, kernel_size: list[int]):
        super().__init__()
        padding = [size // 2 for size in kernel_size]
        self.down = ZeroBiasLinear(width, hidden)
        self.conv = ZeroConv3d(hidden, hidden, kernel_size=tuple(kernel_size), padding=padding, groups=hidden)
        self.up = ZeroBiasLinear(hidden, width)

    def forward(self, patches: torch.Tensor, state: TokenState) -> torch.Tensor:
        return self.up(from_grid(depthwise_conv3d(to_grid(self.down(patches), state), self.conv), state))


class STAdapter(Adaptation):
    """ST-Adapter on CLIP.

    Args:
        width: inside the adapters; default: half of the tower's, 384 for ViT-B.
        pre_attention, pre_mlp: where they are; before the MLP alone for Kinetics, both for Something-Something.
        num_layers: how many of the last blocks have them; default: all.
        kernel_size: of the convolution in frames, rows and columns, odd numbers.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        width: int | None = None,
        pre_attention: bool = False,
        pre_mlp: bool = True,
        num_layers: int | None = None,
        kernel_size: list[int] = (3, 1, 1),
    ):
        super().__init__(tower)
        depth = tower.num_hidden_layers
        number = depth if num_layers is None else num_layers
        self.first = depth - number + 1  # counted from 1

        def adapters() -> nn.ModuleList:
            hidden = tower.hidden_size // 2 if width is None else width
            return nn.ModuleList(SpatioTemporalAdapter(tower.hidden_size, hidden, kernel_size) for _ in range(number))

        self.pre_attention = adapters() if pre_attention else None
        self.pre_mlp = adapters() if pre_mlp else None

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        for name in ("pre_attention", "pre_mlp"):
            if not isinstance(options.get(name, True), bool):
                raise ValueError(f"ST-Adapter option {name} must be true or false, got {options[name]!r}.")
        if not (options.get("pre_attention", False) or options.get("pre_mlp", True)):
            raise ValueError("ST-Adapter needs pre_attention or pre_mlp; with neither use adaptation none.")
        for name, most in (("width", None), ("num_layers", tower.num_hidden_layers)):
            value = options.get(name)
            if value is not None and not is_count(value, 1, most):
                limit = "" if most is None else f" to {most}, the depth"
                raise ValueError(f"ST-Adapter option {name} must be a whole number from 1{limit}, got {value!r}.")
        kernel = options.get("kernel_size", (3, 1, 1))
        if (
            not isinstance(kernel, (list, tuple))
            or len(kernel) != 3
            or not all(is_count(size) and size % 2 for size in kernel)
        ):
            raise ValueError(
                f"ST-Adapter option kernel_size must be three odd numbers such as [3, 1, 1], got {kernel!r}."
            )

    def _adapt(self, adapters: nn.ModuleList | None, i: int, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if adapters is None or i < self.first:
            return x
        cls, patches = x[:, :, : state.num_class_tokens], x[:, :, state.num_class_tokens :]
        return torch.cat([cls, patches + adapters[i - self.first](patches, state)], dim=2)

    def before_attention(self, i: int, x, state: TokenState, attend) -> torch.Tensor:
        return self._adapt(self.pre_attention, i, x, state)

    def before_mlp(self, i: int, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        return self._adapt(self.pre_mlp, i, x, state)

    def pool(self, x: torch.Tensor, side, post_layernorm: nn.LayerNorm) -> torch.Tensor:
        return post_layernorm(x[:, :, 0].mean(dim=1))

    def trained_parameters(self) -> list[str]:
        return []
