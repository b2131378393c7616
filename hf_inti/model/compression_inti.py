"""InTI: inter-frame token interpolation.

Zhang et al., "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (arXiv 2408.06840), Sec. 3.2,
3.3 and appendix B. Between two blocks each pair of neighbouring frames becomes one frame: token by token a weighted
sum, with weights alpha and beta predicted from four contexts. The paper's C is the width, j counts pairs, k tokens.
"""

import torch
from torch import nn

from .fast_paths import Optimizable, check_linear, has_hooks, is_plain
from .layers import at_frames, depthwise_conv3d
from .methods import (
    Compression,
    FrameInterpolation,
    NewConv1d,
    NewConv3d,
    NewLinear,
    ResettableModule,
    TokenState,
    Tower,
    ZeroLinear,
)


CONTEXTS = ("cube", "frame", "global")
CHOICES = {
    "fusion": ("separate", "add", "concat"),
    "head": ("softmax", "sigmoid", "attention"),
    "cube": ("local_mhra", "dwconv"),
}


def max_pool_pairs(g: torch.Tensor) -> torch.Tensor:
    """Max-pooling over time with kernel and stride 2, g (B, C, T) -> (B, C, ceil(T / 2)).

    A last single frame is kept, so that any T >= 1 passes. torch's max_pool1d does the same with `ceil_mode`, but
    `torch.export` cannot keep T dynamic through it.
    """
    g = nn.functional.pad(g, (0, g.shape[-1] % 2), value=float("-inf"))
    return g.unflatten(-1, (-1, 2)).amax(dim=-1)


class Projection(nn.Sequential):
    """T_{C->h} of Eq. 9 and 11: LayerNorm, linear, GELU."""

    def __init__(self, width_in: int, width_out: int, eps: float):
        super().__init__(nn.LayerNorm(width_in, eps=eps), NewLinear(width_in, width_out), nn.GELU())


class TemporalPosition(ResettableModule, nn.Module):
    """X + sigma P (Eq. 8), with sigma from 0; P (T, 1, C) is interpolated along time for other numbers of frames."""

    def __init__(self, num_frames: int, width: int):
        super().__init__()
        self.sigma = nn.Parameter(torch.empty(1))  # one element and not a scalar: FSDP2 shards no scalars
        self.P = nn.Parameter(torch.empty(num_frames, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.sigma)
        nn.init.normal_(self.P, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sigma * at_frames(self.P, x.shape[1])


class LocalUnit(nn.Module):
    """UniFormerV2's local unit on patches (B, T, h, w, C), with a LayerNorm for its BatchNorm."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        reduced = int(width / 1.5)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.reduce = NewLinear(width, reduced)
        self.conv = NewConv3d(reduced, reduced, kernel_size=3, padding=1, groups=reduced)
        self.expand = NewLinear(reduced, width)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return self.expand(depthwise_conv3d(self.reduce(self.norm(p)), self.conv))


class LocalMHRA(Optimizable):
    """F_cube as two of UniFormerV2's local units at the full frame rate, averaged over each pair of frames."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.unit1 = LocalUnit(width, eps)
        self.unit2 = LocalUnit(width, eps)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        u1 = self.unit1(p)
        if self.fast and not has_hooks(
            self.unit2
        ):  # its last layer is linear: it may as well come behind the mean, on half of the frames
            unit2 = self.unit2
            conv = depthwise_conv3d(unit2.reduce(unit2.norm(p + u1)), unit2.conv)
            return u1[:, 0::2].lerp(u1[:, 1::2], 0.5) + unit2.expand(conv[:, 0::2].lerp(conv[:, 1::2], 0.5))
        u = u1 + self.unit2(p + u1)  # p2 - p
        return (u[:, 0::2] + u[:, 1::2]) / 2


class DepthwiseConv(NewConv3d):
    """F_cube as Eq. 10 has it: one depth-wise 3x3x3 convolution, with stride 2 in time."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=3, stride=(2, 1, 1), padding=1, groups=width)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return depthwise_conv3d(p, self)


class FrameContext(nn.Module):
    """F_frame of each pair (Eq. 11): class tokens (B, T, C) -> (B, T/2, C)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.first = Projection(width, width // 2, eps)
        self.second = Projection(width, width // 2, eps)
        self.both = Projection(width, width, eps)

    def forward(self, cls: torch.Tensor) -> torch.Tensor:
        return self.both(torch.cat([self.first(cls[:, 0::2]), self.second(cls[:, 1::2])], dim=-1))


class GlobalContext(nn.Module):
    """F_global (Eq. 12, appendix B): class tokens (B, T, C) -> (B, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = NewConv1d(width, width, kernel_size=3, padding=1, groups=width)
        self.conv2 = NewConv1d(width, width, kernel_size=3, padding=1, groups=width)
        self.conv3 = NewConv1d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, cls: torch.Tensor) -> torch.Tensor:
        # Contiguous: torch.compile would lay out all tokens as this convolution wants its input, frames innermost.
        g = cls.transpose(1, 2).contiguous()  # (B, C, T)
        for conv in (self.conv1, self.conv2):
            g = nn.functional.gelu(max_pool_pairs(conv(g)))
        return nn.functional.gelu(self.conv3(g).mean(dim=-1))


class InTI(FrameInterpolation, Optimizable):
    """One inter-frame token interpolation phi (Eq. 4 to 13).

    Args:
        width: C.
        num_frames: T for which the temporal position is learned; any other even T works by interpolation.
        context: which of "cube", "frame" and "global" join the token level; one left out is zeros.
        fusion: "separate" [F_token, sum of the contexts] (Eq. 13), "add" the sum of all, "concat" all side by side.
        head: "softmax" over the two logits (Eq. 13), "sigmoid" of each, so that alpha + beta is not 1, or "attention",
            a learned vector times each frame's half of the hidden features, then softmax.
        cube: "local_mhra" or "dwconv" (Eq. 10 to the letter).
    """

    def __init__(
        self,
        width: int,
        num_frames: int,
        *,
        context: list[str] | tuple[str, ...] = CONTEXTS,
        fusion: str = "separate",
        head: str = "softmax",
        cube: str = "local_mhra",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.fusion, self.head = fusion, head
        self.position = TemporalPosition(num_frames, width)
        self.first = Projection(width, width // 2, eps)
        self.second = Projection(width, width // 2, eps)
        self.cube_context = self.frame_context = self.global_context = None
        if "cube" in context:
            self.cube_context = LocalMHRA(width, eps) if cube == "local_mhra" else DepthwiseConv(width)
        if "frame" in context:
            self.frame_context = FrameContext(width, eps)
        if "global" in context:
            self.global_context = GlobalContext(width)
        self.hidden = NewLinear({"separate": 2, "add": 1, "concat": 4}[fusion] * width, width)
        # From zero: training starts from the plain average of the pair.
        self.logits = ZeroLinear(width // 2, 1, bias=False) if head == "attention" else ZeroLinear(width, 2)

    def check_optimizable(self) -> None:
        check_linear("hidden", self.hidden)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens x (B, T, 1+N, C), T even, N = rows * columns of `grid` -> z (B, T/2, 1+N, C), (B, T/2, 1+N, 2)."""
        x = self.position(x)
        first, second = x[:, 0::2], x[:, 1::2]
        if self.fast and is_plain(self.hidden):
            weights = self._head(self._hidden_by_parts(x, grid))
            if self.head != "softmax":
                return weights[..., :1] * first + weights[..., 1:] * second, weights
            return torch.lerp(first, second, weights[..., 1:].to(x.dtype)), weights  # alpha + beta = 1
        f_token = torch.cat([self.first(first), self.second(second)], dim=-1)  # (B, T/2, 1+N, C)
        f_cube = f_frame = f_global = f_token.new_zeros(1).expand_as(f_token)
        cls = x[:, :, 0]
        if self.cube_context is not None:
            patches = self.cube_context(x[:, :, 1:].unflatten(2, grid)).flatten(2, 3)
            f_cube = nn.functional.pad(patches, (0, 0, 1, 0))  # the class token has no place on the grid
        if self.frame_context is not None:
            f_frame = self.frame_context(cls)[:, :, None].expand_as(f_token)
        if self.global_context is not None:
            f_global = self.global_context(cls)[:, None, None].expand_as(f_token)
        weights = self._weights(f_token, f_cube, f_frame, f_global)
        alpha, beta = weights[..., :1], weights[..., 1:]
        return alpha * first + beta * second, weights  # Eq. 7

    def _weights(self, f_token, f_cube, f_frame, f_global) -> torch.Tensor:
        """Eq. 13 and Table 5b."""
        if self.fusion == "concat":
            features = torch.cat([f_token, f_cube, f_frame, f_global], dim=-1)
        else:
            f_context = f_cube + f_frame + f_global
            features = f_token + f_context if self.fusion == "add" else torch.cat([f_token, f_context], dim=-1)
        return self._head(self.hidden(features))

    def _hidden_by_parts(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What `hidden` makes of F_token and the contexts: of a concatenation it is a sum, each with its own weights.

        Contexts that are the same for all tokens of a frame are multiplied once.
        """
        linear = nn.functional.linear
        C = x.shape[-1]
        at = {"separate": (C, C, C), "add": (0, 0, 0), "concat": (C, 2 * C, 3 * C)}[self.fusion]
        for_cube, for_frame, for_global = (self.hidden.weight[:, start : start + C] for start in at)
        for_first, for_second = self.hidden.weight[:, : C // 2], self.hidden.weight[:, C // 2 : C]
        hidden = linear(self.first(x[:, 0::2]), for_first, self.hidden.bias)  # (B, T/2, 1+N, C)
        hidden += linear(self.second(x[:, 1::2]), for_second)
        cls = x[:, :, 0]
        if self.cube_context is not None:
            f_cube = self.cube_context(x[:, :, 1:].unflatten(2, grid)).flatten(2, 3)
            hidden[:, :, 1:] += linear(f_cube, for_cube)
        if self.frame_context is not None:
            hidden += linear(self.frame_context(cls), for_frame)[:, :, None]
        if self.global_context is not None:
            hidden += linear(self.global_context(cls), for_global)[:, None, None]
        return hidden

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Weights (B, T/2, 1+N, 2) from the hidden features (B, T/2, 1+N, C), before their GELU."""
        hidden = nn.functional.gelu(hidden)
        if self.head == "attention":  # the first half speaks for the first frame, the second for the second
            logits = self.logits(hidden.unflatten(-1, (2, -1))).squeeze(-1)
        else:
            logits = self.logits(hidden)
        return logits.sigmoid() if self.head == "sigmoid" else logits.softmax(dim=-1)


class InTICompression(Compression):
    """InTI after each of `layers`: every one halves the number of frames.

    Options as of `InTI`; a bad one is a ValueError.
    """

    def __init__(
        self,
        tower: Tower,
        layers: list[int],
        *,
        context: list[str] = CONTEXTS,
        fusion: str = "separate",
        head: str = "softmax",
        cube: str = "local_mhra",
    ):
        super().__init__(tower, layers)
        self.layers = list(layers)
        self.stages = nn.ModuleList(
            InTI(
                tower.hidden_size,
                tower.num_frames // 2**stage,
                context=context,
                fusion=fusion,
                head=head,
                cube=cube,
                eps=tower.layer_norm_eps,
            )
            for stage in range(len(layers))
        )

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        for name, valid in CHOICES.items():
            if name in options and options[name] not in valid:
                raise ValueError(f"InTI option {name} must be one of {', '.join(valid)}, got {options[name]!r}.")
        context = options.get("context", [])
        if not isinstance(context, (list, tuple)) or len(context) != sum(name in context for name in CONTEXTS):
            raise ValueError(
                f"InTI option context must be a list of distinct names out of {', '.join(CONTEXTS)} "
                f"(an empty list for the tokens alone), got {context!r}."
            )
        if tower.hidden_size % 2:
            raise ValueError(f"InTI needs an even hidden_size, got {tower.hidden_size}.")

    @classmethod
    def frame_multiple(cls, layers: list[int]) -> int:
        return 2 ** len(layers)

    def after_block(self, i: int, x, keys, state: TokenState):
        if i in self.layers:
            x, _ = self.stages[self.layers.index(i)](x, state.grid)
        return x, state
