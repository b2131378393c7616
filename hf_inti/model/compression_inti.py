"""InTI: inter-frame token interpolation.

Zhang et al., "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (arXiv 2408.06840), Sec. 3.2,
3.3 and appendix B. Between two blocks, each pair of neighbouring frames is merged into one frame: every token is a
weighted sum of the two at its place, with weights alpha and beta predicted from features at four scales. Letters as in
the paper: C is the width, j counts pairs of frames, k tokens.
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
    is_number,
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

    def __init__(self, num_frames: int, width: int, std: float):
        super().__init__()
        self.std = std
        self.sigma = nn.Parameter(torch.empty(1))  # one element and not a scalar: FSDP2 shards no scalars
        self.P = nn.Parameter(torch.empty(num_frames, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.sigma)
        nn.init.normal_(self.P, std=self.std)

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
        if self.fast and not has_hooks(self.unit2):
            return self._fast_forward(p)
        u1 = self.unit1(p)
        u2 = self.unit2(p + u1)
        u = u1 + u2  # the patches after both residual units, less p
        return (u[:, 0::2] + u[:, 1::2]) / 2

    def _fast_forward(self, p: torch.Tensor) -> torch.Tensor:
        """The last layer is linear and may as well follow the mean: it then sees half of the frames."""
        u1, unit2 = self.unit1(p), self.unit2
        conv = depthwise_conv3d(unit2.reduce(unit2.norm(p + u1)), unit2.conv)
        return u1[:, 0::2].lerp(u1[:, 1::2], 0.5) + unit2.expand(conv[:, 0::2].lerp(conv[:, 1::2], 0.5))


class DepthwiseConv(NewConv3d):
    """F_cube as Eq. 10 has it: one depth-wise 3x3x3 convolution, with stride 2 in time."""

    def __init__(self, width: int):
        super().__init__(width, width, kernel_size=3, stride=(2, 1, 1), padding=1, groups=width)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return depthwise_conv3d(p, self)


class FrameContext(nn.Module):
    """F_frame of each pair (Eq. 11): class tokens (B, T, C) -> (B, T/2, C)."""

    def __init__(self, width: int, eps: float, share_projection: bool):
        super().__init__()
        self.first = Projection(width, width // 2, eps)
        self.second = None if share_projection else Projection(width, width // 2, eps)
        self.both = Projection(width, width, eps)

    def forward(self, cls: torch.Tensor) -> torch.Tensor:
        second = self.first if self.second is None else self.second
        return self.both(torch.cat([self.first(cls[:, 0::2]), second(cls[:, 1::2])], dim=-1))


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
            the dot product of a learned vector with each frame's half of the hidden features, then softmax.
        cube: "local_mhra" or "dwconv" (Eq. 10 to the letter).
        share_projection: one T for both frames of a pair, as Eq. 9 and 11 print it; by default each has its own, which
            the published parameter counts fit.
        position_std: of P (Eq. 8) before training. Since sigma starts at zero it changes no output at first, but how
            fast the position grows.
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
        share_projection: bool = False,
        position_std: float = 0.02,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.fusion, self.head = fusion, head
        self.position = TemporalPosition(num_frames, width, position_std)
        self.first = Projection(width, width // 2, eps)
        self.second = None if share_projection else Projection(width, width // 2, eps)
        self.cube_context = self.frame_context = self.global_context = None
        if "cube" in context:
            self.cube_context = LocalMHRA(width, eps) if cube == "local_mhra" else DepthwiseConv(width)
        if "frame" in context:
            self.frame_context = FrameContext(width, eps, share_projection)
        if "global" in context:
            self.global_context = GlobalContext(width)
        self.hidden = NewLinear({"separate": 2, "add": 1, "concat": 4}[fusion] * width, width)
        # From zero: training starts from the plain average of the pair.
        self.logits = ZeroLinear(width // 2, 1, bias=False) if head == "attention" else ZeroLinear(width, 2)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens x (B, T, 1+N, C), T even, N = rows * columns of `grid` -> z (B, T/2, 1+N, C), (B, T/2, 1+N, 2)."""
        x = self.position(x)  # Eq. 8
        if self.fast and is_plain(self.hidden):
            return self._fast_forward(x, grid)
        first, second = x[:, 0::2], x[:, 1::2]  # the frames 2j and 2j+1
        f_token = torch.cat([self.first(first), self._project_second(second)], dim=-1)  # Eq. 9
        f_cube = self._cube(x, grid)  # Eq. 10
        f_frame = self._frame(x)  # Eq. 11
        f_global = self._global(x)  # Eq. 12
        weights = self._weights(f_token, f_cube, f_frame, f_global)  # Eq. 13
        alpha, beta = weights[..., :1], weights[..., 1:]
        return alpha * first + beta * second, weights  # Eq. 7

    def _project_second(self, second: torch.Tensor) -> torch.Tensor:
        return self.first(second) if self.second is None else self.second(second)

    def _cube(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """F_cube (B, T/2, 1+N, C); the class token has no place on the grid, so its F_cube is zero."""
        if self.cube_context is None:
            return x.new_zeros(1)
        patches = self.cube_context(x[:, :, 1:].unflatten(2, grid)).flatten(2, 3)
        return nn.functional.pad(patches, (0, 0, 1, 0))

    def _frame(self, x: torch.Tensor) -> torch.Tensor:
        """F_frame (B, T/2, 1, C), the same for all tokens of a frame."""
        return x.new_zeros(1) if self.frame_context is None else self.frame_context(x[:, :, 0])[:, :, None]

    def _global(self, x: torch.Tensor) -> torch.Tensor:
        """F_global (B, 1, 1, C), the same for all tokens of a clip."""
        return x.new_zeros(1) if self.global_context is None else self.global_context(x[:, :, 0])[:, None, None]

    def _weights(self, f_token, f_cube, f_frame, f_global) -> torch.Tensor:
        """alpha and beta (B, T/2, 1+N, 2) from the four features (Eq. 13; fusions and heads of Table 5b)."""
        f_context = f_cube + f_frame + f_global
        if self.fusion == "separate":
            features = [f_token, f_context]
        elif self.fusion == "add":
            features = [f_token + f_context]
        else:
            features = [f_token, f_cube, f_frame, f_global]
        return self._head(self.hidden(torch.cat([f.expand_as(f_token) for f in features], dim=-1)))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """alpha and beta from the hidden features (B, T/2, 1+N, C), before their GELU."""
        hidden = nn.functional.gelu(hidden)
        if self.head == "attention":  # one half of the features for each frame
            logits = self.logits(hidden.unflatten(-1, (2, -1))).squeeze(-1)
        else:
            logits = self.logits(hidden)
        return logits.sigmoid() if self.head == "sigmoid" else logits.softmax(dim=-1)

    # The same numbers, faster, for inference.

    def check_optimizable(self) -> None:
        check_linear("hidden", self.hidden)

    def _fast_forward(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x[:, 0::2], x[:, 1::2]
        weights = self._head(self._hidden_by_parts(x, grid))
        if self.head == "sigmoid":
            return weights[..., :1] * first + weights[..., 1:] * second, weights
        return torch.lerp(first, second, weights[..., 1:].to(x.dtype)), weights  # alpha + beta = 1

    def _hidden_by_parts(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`hidden` of the concatenated features, as the sum of what each feature's columns of its weight give.

        Features that are the same for all tokens of a frame are multiplied once.
        """
        linear = nn.functional.linear
        C = x.shape[-1]
        start = {"separate": (C, C, C), "add": (0, 0, 0), "concat": (C, 2 * C, 3 * C)}[self.fusion]
        for_cube, for_frame, for_global = (self.hidden.weight[:, i : i + C] for i in start)
        for_first, for_second = self.hidden.weight[:, : C // 2], self.hidden.weight[:, C // 2 : C]
        hidden = linear(self.first(x[:, 0::2]), for_first, self.hidden.bias)  # (B, T/2, 1+N, C)
        hidden += linear(self._project_second(x[:, 1::2]), for_second)
        if self.cube_context is not None:
            f_cube = self.cube_context(x[:, :, 1:].unflatten(2, grid)).flatten(2, 3)
            hidden[:, :, 1:] += linear(f_cube, for_cube)
        if self.frame_context is not None:
            hidden += linear(self._frame(x), for_frame)
        if self.global_context is not None:
            hidden += linear(self._global(x), for_global)
        return hidden


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
        share_projection: bool = False,
        position_std: float = 0.02,
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
                share_projection=share_projection,
                position_std=position_std,
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
        if not isinstance(options.get("share_projection", False), bool):
            raise ValueError(
                f"InTI option share_projection must be true or false, got {options['share_projection']!r}."
            )
        std = options.get("position_std", 0.02)
        if not is_number(std) or std < 0:
            raise ValueError(f"InTI option position_std must be a number from 0, got {std!r}.")
        if tower.hidden_size % 2:
            raise ValueError(f"InTI needs an even hidden_size, got {tower.hidden_size}.")

    @classmethod
    def frame_multiple(cls, layers: list[int]) -> int:
        return 2 ** len(layers)

    def after_block(self, i: int, x, keys, state: TokenState):
        if i in self.layers:
            x, _ = self.stages[self.layers.index(i)](x, state.grid)
        return x, state
