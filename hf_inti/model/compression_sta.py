"""STA: semantic-aware temporal accumulation, Ding et al., "Prune Spatio-temporal Tokens by Semantic-aware Temporal
Accumulation" (ICCV 2023).

Frame after frame, tokens that repeat what was kept of the frame before and are weakly activated are dropped. There is
nothing to learn. Letters: B clips, G groups of tokens (frames), N tokens of a group, r of them dropped; A the
accumulated temporal score (Eq. 3).

Where paper and released code differ, or the paper is silent, this follows the code: features are normalised (cosines),
A starts from ones over the WHOLE first frame, and kept tokens come out in the order of their scores.
"""

import re

import torch
from torch import nn

from .methods import Compression, TokenState, Tower, is_count


FIRST_FRAMES = ("tome", "random", "grid")
SIMILARITIES = ("query", "key", "value")


def check_choices(order: str = "F-B-F", first_frame: str = "tome", similarity: str = "key") -> None:
    """Raise a ValueError that names the valid choices for a bad one."""
    if not isinstance(order, str) or not re.fullmatch("[FB]|[FB]-[FB]-[FB]", order):
        raise ValueError(f'STA\'s order must be "F", "B" or three of them such as "F-B-F", got {order!r}.')
    for name, value, valid in (
        ("first_frame", first_frame, FIRST_FRAMES),
        ("similarity", similarity, SIMILARITIES),
    ):
        if value not in valid:
            raise ValueError(f"STA's {name} must be one of {', '.join(valid)}, got {value!r}.")


def directions(order: str) -> list[str]:
    """The walk through the frames at each of the three stages, "F" from the first on or "B" from the last."""
    return order.split("-") if "-" in order else [order] * 3


def stage_blocks(num_layers: int) -> list[int]:
    """After which blocks, counted from 1, the three stages stand: 1, 1 + L/3, 1 + 2L/3; needs three blocks."""
    if num_layers < 3:
        raise ValueError(f"STA prunes after three different blocks, and this tower has only {num_layers}.")
    return [1 + stage * num_layers // 3 for stage in range(3)]


def semantic_importance(x: torch.Tensor) -> torch.Tensor:
    """Sums of absolute activations (Eq. 4) of tokens (B, G, N, C), min-max normalised in each group: (B, G, N)."""
    scores = x.abs().sum(dim=-1)
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def first_frame_order(metric: torch.Tensor, first_frame: str, draw: torch.Tensor | None, cells=None) -> torch.Tensor:
    """The tokens of the first frame, metric (B, N, d), from those to keep to those to drop first: numbers (B, N).

    "tome": of those at even places the most similar to one at an odd place goes first. "random": by `draw` (B, N).
    "grid": one drawn token of each cell of `cells` (B, N) goes before all others.
    """
    if first_frame == "tome":
        N = metric.shape[1]
        if N == 1:
            return torch.zeros_like(metric[..., 0], dtype=torch.long)
        best = (metric[:, 0::2] @ metric[:, 1::2].transpose(1, 2)).amax(dim=-1)
        odd = torch.arange(1, N, 2, device=metric.device).expand(metric.shape[0], -1)
        return torch.cat([odd, 2 * best.argsort(dim=-1, stable=True)], dim=1)
    if first_frame == "grid":
        same = cells[:, :, None] == cells[:, None, :]
        ahead = draw[:, None, :] > draw[:, :, None]
        draw = draw + ~(same & ahead).any(dim=-1)
    return draw.argsort(dim=-1, stable=True)


@torch.no_grad()
def prune(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: int,
    direction: str = "F",
    first_frame: str = "tome",
    draw: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which N - r tokens of each group to keep: numbers (B, G, N - r) inside the group.

    They come in ascending order of score, in the first group of the walk in that of `first_frame_order`, and with r = 0
    in their own.

    Args:
        x: tokens (B, G, N, C), for their semantic importance.
        metric: features (B, G, N, d) to compare tokens by; normalised here.
        r: tokens to drop of each group, below N.
        direction: "F" walks from the first group to the last, "B" from the last to the first.
        first_frame, draw (B, N), cells (B, N): see `first_frame_order`.

    Raises ValueError where r leaves nothing.
    """
    G, N = x.shape[1:3]
    if not 0 <= r < N:
        raise ValueError(f"STA cannot drop {r} of {N} tokens of a frame; at least one has to be kept: lower r.")
    if r == 0:
        return torch.arange(N, device=x.device).expand(x.shape[0], G, N)
    metric = nn.functional.normalize(metric, dim=-1)
    unimportant = 1 - semantic_importance(x)
    kept: list = [None] * G
    walk = list(range(G)) if direction == "F" else list(reversed(range(G)))
    kept[walk[0]] = first_frame_order(metric[:, walk[0]], first_frame, draw, cells)[:, : N - r]
    earlier, A = metric[:, walk[0]], None
    for t in walk[1:]:
        P = (metric[:, t] @ earlier.transpose(1, 2)).softmax(dim=1)  # (B, N, earlier), each column sums to one
        A = P.sum(dim=-1) if A is None else (P @ A[..., None])[..., 0]
        kept[t] = (A * unimportant[:, t]).argsort(dim=-1, stable=True)[:, : N - r]
        A = A.gather(1, kept[t])
        A = A / A.sum(dim=-1, keepdim=True)
        earlier = metric[:, t].gather(1, kept[t][..., None].expand(-1, -1, metric.shape[-1]))
    return torch.stack(kept, dim=1)


def draw_for(places: torch.Tensor, training: bool) -> torch.Tensor:
    """A number in [0, 1) for each token: drawn in training, and in evaluation, which shall repeat, of its place."""
    if training:
        return torch.rand(places.shape, device=places.device)
    return (places * 2654435761 % 2**32) / 2**32  # in whole numbers: the same on every device


def cells_for(places: torch.Tensor, grid: tuple[int, int], r: int) -> torch.Tensor:
    """Of a raster of floor(sqrt(r)) cells a side over the grid, the cell in which each token's place lies."""
    side = int(r**0.5)
    rows, columns = grid
    cell_row = places // columns * side // rows
    cell_column = places % columns * side // columns
    return cell_row * side + cell_column


class STA(Compression):
    """STA on CLIP, as the paper has it: r, r/2 and r/4 patches of each frame go after blocks 1, 1 + L/3 and 1 + 2L/3.

    Class tokens are neither scored nor dropped.

    Args:
        r: how many at the first stage; default: a quarter of the patches, as a multiple of 4 (48 of 196).
        order: the walks through the frames at the three stages.
        first_frame: how the first frame of a walk, which has no earlier one, is pruned.
        similarity: what of the attention is compared.
    """

    uses_layers = False
    keeps_grid = False

    def __init__(
        self,
        tower: Tower,
        layers: list[int],
        *,
        r: int | None = None,
        order: str = "F-B-F",
        first_frame: str = "tome",
        similarity: str = "key",
    ):
        super().__init__(tower, layers)
        r = self._default_r(tower) if r is None else r
        self.stages = list(
            zip(stage_blocks(tower.num_hidden_layers), (r, r // 2, r // 4), directions(order), strict=True)
        )
        self.first_frame = first_frame
        self.features = similarity
        self.heads = tower.num_attention_heads

    @staticmethod
    def _default_r(tower: Tower) -> int:
        return min(max(tower.num_patches // 16 * 4, 1), tower.num_patches - 1)

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        r = options.pop("r", None)
        check_choices(**options)
        stage_blocks(tower.num_hidden_layers)
        if r is None:
            return
        if not is_count(r, min=0):
            raise ValueError(f"STA's r must be a whole number of tokens from 0, got {r!r}.")
        if r + r // 2 + r // 4 >= tower.num_patches:
            raise ValueError(
                f"STA with r {r} drops {r} + {r // 2} + {r // 4} patches of a frame, which has only "
                f"{tower.num_patches}; lower r."
            )

    def after_block(self, i: int, x, keys, state: TokenState):
        for block, r, direction in self.stages:
            if block == i and r:
                x, state = self._prune(x, keys, state, r, direction)
        return x, state

    def _prune(self, x, keys, state: TokenState, r: int, direction: str):
        B, T, L, D = x.shape
        c = state.num_class_tokens
        patches = x[:, :, c:]
        metric = keys[:, :, c:].unflatten(-1, (self.heads, -1)).mean(dim=-2)
        positions = state.positions
        if positions is None:
            positions = torch.arange(L - c, device=x.device).expand(B, T, -1)
        draw = cells = None
        if self.first_frame != "tome":
            first = positions[:, 0 if direction == "F" else -1]
            draw, cells = draw_for(first, self.training), cells_for(first, state.grid, r)
        kept = prune(patches, metric, r, direction, self.first_frame, draw, cells)  # (B, T, N - r)
        x = torch.cat([x[:, :, :c], patches.gather(2, kept[..., None].expand(-1, -1, -1, D))], dim=2)
        # Where each token of this frame is now, -1 where it was dropped; the class token, and what was, stay.
        now = torch.arange(L - r, device=x.device).expand(B, T, -1)
        moved = torch.full((B, T, L), -1, device=x.device).scatter(2, kept + c, now[:, :, c:])
        moved[:, :, :c] = now[:, :, :c]
        if state.source is not None:
            moved = torch.where(state.source < 0, -1, moved.gather(2, state.source.clamp_min(0)))
        return x, state._replace(positions=positions.gather(2, kept), source=moved)
