"""The contract between the model and its methods: the token state and the two base classes.

Letters used in the whole package: B clips, T frames, L tokens per frame (the class token first, then N patches in
row-major order), D (the papers' C) width, H heads. Blocks are counted from 1, as the papers do; 0 is the place before
the first block.

Every hook is the identity by default. A method overrides the hooks it needs, keeps no state between calls, and does not
see the configuration: it gets the tower's numbers as a `Tower` and its own options as keyword arguments.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class Tower(NamedTuple):
    """The numbers of the CLIP tower that a method is built for."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_frames: int  # in training, and after the patch embedding
    num_patches: int  # of a frame
    patch_size: int
    num_channels: int
    hidden_act: str
    layer_norm_eps: float
    drop_path_rate: float


class TokenState(NamedTuple):
    """What is known about tokens (B, T, L, D) besides their values.

    `positions` (B, T, L - num_class_tokens): each patch token's place on the grid, in row-major order. `sizes`
    (B, T, L): the number of patches merged into each token. `source` (B, T, 1 + N): the current index of each of the
    frame's original tokens, -1 if dropped. None means that every patch is at its own place, with size 1.
    """

    num_class_tokens: int
    grid: tuple[int, int]
    positions: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    source: torch.Tensor | None = None


def check_frames(num_frames: int, multiple: int) -> None:
    """Raise a ValueError with the nearest numbers of frames unless `num_frames` is a multiple of `multiple`."""
    if num_frames % multiple or num_frames == 0:
        below = num_frames // multiple * multiple
        near = [n for n in (below, below + multiple) if n > 0]
        raise ValueError(
            f"the number of frames must be a multiple of {multiple} for this compression and adaptation, got "
            f"{num_frames}; the nearest that work: {' and '.join(map(str, near))}."
        )


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth: drop the whole branch `x` (B, ...) of a clip with probability `rate` (Huang et al., 2016)."""
    if not training or rate == 0.0:
        return x
    return x * nn.functional.dropout(x.new_ones(x.shape[0], *[1] * (x.dim() - 1)), p=rate)


def block_rate(tower: Tower, i: int) -> float:
    """The drop path rate of block i, counted from 1; it grows linearly from 0 at the first block."""
    return tower.drop_path_rate * (i - 1) / max(tower.num_hidden_layers - 1, 1)


def is_count(value, min: int = 1, max: int | None = None) -> bool:
    """Whether an option is an integer in a range; booleans are not."""
    return type(value) is int and value >= min and (max is None or value <= max)


def is_number(value) -> bool:
    """Whether an option is a finite number; booleans are not."""
    return type(value) in (int, float) and math.isfinite(value)


class ResettableModule:
    """A leaf module that CLIP does not have and that initialises itself by `reset_parameters`.

    transformers initialises parameters leaf by leaf and skips modules without parameters of their own, so the leaf that
    owns a new parameter must set its initial value: the model calls `reset_parameters` of every leaf of this kind.
    transformers keeps torch's initialisers from touching loaded values.
    """


class NewLinear(ResettableModule, nn.Linear):
    """With torch's initial values, which keep the output's scale at any width."""


class NewConv1d(ResettableModule, nn.Conv1d):
    """With torch's own initial values."""


class NewConv3d(ResettableModule, nn.Conv3d):
    """With torch's own initial values."""


class ZeroLinear(ResettableModule, nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Method(nn.Module):
    """Base of compressions and adaptations: their options are the keyword-only arguments of `__init__`."""

    def __init__(self, tower: Tower, **options):
        super().__init__()

    @classmethod
    def check_option_names(cls, options: dict) -> None:
        """Raise a ValueError for an unknown option."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        valid = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in options:
            if name not in valid:
                raise ValueError(
                    f"{cls.__name__} has no option {name!r}; "
                    + (f"its options are {', '.join(valid)}." if valid else "it takes no options.")
                )

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        """Raise a ValueError for an option with a bad value."""

    def set_progress(self, progress: float) -> None:
        """Update anything scheduled over training; `progress` runs from 0 to 1."""


class Compression(_Method):
    """Fewer tokens: frames merged, or tokens of a frame merged or dropped. Its parameters always train."""

    uses_layers = True  # whether it is placed by `compression_layers`
    keeps_grid = True  # whether tokens keep their places, the same in every frame
    features: str | None = None  # what it reads of a block: "query", "key", "value" or, after the block, "ffn"

    def __init__(self, tower: Tower, layers: list[int], **options):
        super().__init__(tower, **options)

    @classmethod
    def check_layers(cls, tower: Tower, layers: list[int]) -> None:
        """Raise a ValueError unless `layers` are distinct ascending positions from 0 to the depth."""
        depth = tower.num_hidden_layers
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= depth for i in layers):
            raise ValueError(
                f"compression_layers must name blocks from 0 (before the first) to {depth} (the depth of this tower), "
                f"got {layers}."
            )
        if sorted(set(layers)) != list(layers):
            raise ValueError(
                f"compression_layers must be in ascending order without repeats, got {layers}; "
                f"use {sorted(set(layers))}."
            )

    @classmethod
    def frame_multiple(cls, layers: list[int]) -> int:
        """The number of frames must be a multiple of this."""
        return 1

    def key_bias(self, state: TokenState) -> torch.Tensor | None:
        """A bias (B, T, L) on the attention logits of each key, such as ToMe's log size."""
        return None

    def inside_block(self, i: int, x, keys, state: TokenState):
        """Between attention and MLP of block i: x (B, T, L, D), keys (B, T, L, D) or None -> x, state."""
        return x, state

    def after_block(self, i: int, x, keys, state: TokenState):
        """After block i; i = 0, without keys, is before the first: x (B, T, L, D) -> x, state."""
        return x, state


class NoCompression(Compression):
    """Every frame passes through the whole tower unchanged."""

    uses_layers = False


class FrameInterpolation(GradientCheckpointingLayer):
    """Base of the modules that merge pairs of frames as weighted sums.

    `forward` takes x (B, T, L, D) and more, and returns the merged tokens (B, T/2, L, D) with the weights alpha and
    beta (B, T/2, L, 2); the model records the latter for `output_interpolation_weights`.
    """


class Adaptation(_Method):
    """Modules that let the image tower see time."""

    needs_grid = False  # whether it needs the same token at the same place in every frame
    drops_blocks = True  # whether `drop_path_rate` applies to CLIP's branches, or only to the method's own

    @classmethod
    def frame_multiple(cls, **options) -> int:
        """The factor by which `embed_patches` reduces the number of frames."""
        return 1

    def embed_patches(self, pixel_values: torch.Tensor, patch_embedding: nn.Conv2d) -> torch.Tensor:
        """Pixels (B, T, C, height, width) -> patches (B, T', D, rows, columns); may reduce the number of frames."""
        return patch_embedding(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])

    def on_embeddings(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, L, D) with their spatial positions, before CLIP's first LayerNorm."""
        return x

    def start(self, x: torch.Tensor) -> torch.Tensor | None:
        """The initial value of `side`, a second stream that reads the blocks' outputs."""
        return None

    def before_attention(self, i: int, x, state: TokenState, attend: Callable) -> torch.Tensor:
        """On the residual stream x (B, T, L, D).

        `attend(h)` is block i's LayerNorm and attention on any h (b, t, l, D), `attend(h, inner)` with a function
        between the two.
        """
        return x

    def branch_in(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """The normalised input (B, T, L, D) of block i's attention."""
        return h

    def key_value(self, i: int, k: torch.Tensor, v: torch.Tensor, state: TokenState):
        """Keys and values (B, T, L, D) of block i, heads side by side."""
        return k, v

    def branch_out(self, i: int, h: torch.Tensor) -> torch.Tensor:
        """The output (B, T, L, D) of block i's attention before it is added."""
        return h

    def before_mlp(self, i: int, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        """On the residual stream x (B, T, L, D) between attention and MLP."""
        return x

    def mlp(self, i: int, h: torch.Tensor, mlp: Callable) -> torch.Tensor:
        """Block i's MLP on the normalised h (B, T, L, D)."""
        return mlp(h)

    def after_block(self, i: int, x, state: TokenState, side: torch.Tensor | None) -> torch.Tensor | None:
        """Update `side` from block i's output x (B, T, L, D), after the compression that follows the block."""
        return side

    def pool(self, x: torch.Tensor, side: torch.Tensor | None, post_layernorm: nn.LayerNorm) -> torch.Tensor:
        """Tokens (B, T, L, D) -> video feature (B, D); by default the mean of the frames' normalised class tokens."""
        return post_layernorm(x[:, :, 0]).mean(dim=1)

    def trained_parameters(self) -> list[str] | None:
        """Names of the tower's parameters that train besides the method's own (a prefix is enough); None: all."""
        return None

    def merge(self, layers: nn.ModuleList) -> dict:
        """Fold the adapters into the blocks; returns the options under which the merged model is built again."""
        raise ValueError(f"{type(self).__name__} has no adapters that could be merged into the tower.")


class NoAdaptation(Adaptation):
    """CLIP's blocks as they are."""
