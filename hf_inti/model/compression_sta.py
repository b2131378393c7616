"""STA: semantic-aware temporal accumulation, Ding et al., "Prune Spatio-temporal Tokens by Semantic-aware Temporal
Accumulation" (ICCV 2023).

Walking through the frames, STA drops tokens that repeat what was kept of the previous frame and are weakly activated.
Nothing is learned. Letters: B clips, G groups of tokens (frames), N tokens in a group, r of them dropped; A the
accumulative temporal score (Eq. 3), F the semantic importance (Eq. 4).

Where the paper is silent or differs from the released code, this follows the code: features are normalised (cosines),
A starts from ones over the whole first frame, dropped tokens included, and kept tokens come out in order of score.
"""

import re

import torch
from torch import nn

from .methods import Compression, TokenState, Tower, is_count


FIRST_FRAMES = ("tome", "random", "grid")  # Table 6a
SIMILARITIES = ("key", "query", "value", "ffn")  # Table 6c
# Table 6d: what the three stages drop, as multiples of r.
SCHEDULES = {"decreasing": (1, 1 / 2, 1 / 4), "constant": (1, 1, 1), "increasing": (1, 2, 4)}
SCORES = ("both", "semantic", "temporal")  # Table 6e: (1 - F) A, 1 - F, A
PRIME = 2**31 - 1


def check_choices(
    order: str = "F-B-F", first_frame: str = "tome", similarity: str = "key", scores: str = "both"
) -> None:
    """Raise a ValueError that names the valid choices for a bad one."""
    if not isinstance(order, str) or not re.fullmatch("[FB]|[FB]-[FB]-[FB]", order):
        raise ValueError(f'STA\'s order must be "F", "B" or three of them such as "F-B-F", got {order!r}.')
    for name, value, valid in (
        ("first_frame", first_frame, FIRST_FRAMES),
        ("similarity", similarity, SIMILARITIES),
        ("scores", scores, SCORES),
    ):
        if value not in valid:
            raise ValueError(f"STA's {name} must be one of {', '.join(valid)}, got {value!r}.")


def directions(order: str) -> list[str]:
    """The direction of the walk at each of the three stages: "F" from the first frame on, "B" from the last."""
    return order.split("-") if "-" in order else [order] * 3


def dropped_tokens(r: int, schedule: str = "decreasing") -> list[int]:
    """How many tokens of each group the three stages drop; r is the first stage's (Table 6d).

    Raises ValueError for a bad r or schedule.
    """
    if not is_count(r, min=0):
        raise ValueError(f"STA's r must be a whole number of tokens from 0, got {r!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"STA's schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    return [int(r * factor) for factor in SCHEDULES[schedule]]


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
    """The tokens of the first frame, metric (B, N, d), from those to keep to those to drop first: indices (B, N).

    "tome": the even tokens most similar to an odd one are dropped first. "random": sorted by `draw` (B, N). "grid": one
    token of each cell of `cells` (B, N), the one with the highest draw, is dropped before all others.
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
    scores: str = "both",
) -> torch.Tensor:
    """Which N - r tokens of each group to keep: indices (B, G, N - r) into the group.

    They are sorted by ascending score; the first group of the walk has the order of `first_frame_order`. With r = 0
    every token stays where it is.

    Args:
        x: tokens (B, G, N, C), for their semantic importance.
        metric: features (B, G, N, d) to compare tokens by; normalised here.
        r: tokens to drop from each group, below N.
        direction: "F" walks from the first group to the last, "B" from the last to the first.
        first_frame, draw (B, N), cells (B, N): see `first_frame_order`.
        scores: "both" (Eq. 5), "semantic" (1 - F alone) or "temporal" (A alone).

    Raises ValueError where r leaves nothing.
    """
    G, N = x.shape[1:3]
    if not 0 <= r < N:
        raise ValueError(f"STA's r must be at least 0 and leave a token, got {r} for {N} tokens in a frame; lower r.")
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
        A = P.sum(dim=-1) if A is None else (P @ A[..., None])[..., 0]  # Eq. 3
        score = {"both": A * unimportant[:, t], "semantic": unimportant[:, t], "temporal": A}[scores]
        kept[t] = score.argsort(dim=-1, stable=True)[:, : N - r]
        A = A.gather(1, kept[t])
        A = A / A.sum(dim=-1, keepdim=True)
        earlier = metric[:, t].gather(1, kept[t][..., None].expand(-1, -1, metric.shape[-1]))
    return torch.stack(kept, dim=1)


def scramble(n: torch.Tensor) -> torch.Tensor:
    """Whole numbers to pseudo-random ones below PRIME, one to one modulo PRIME.

    n -> n^5 permutes the numbers modulo 2^31 - 1. Products stay below 2^63, so every device computes the same.
    """
    for constant in (1013904223, 374761393, 668265263):
        n = (n + constant) % PRIME
        square = n * n % PRIME
        n = square * square % PRIME * n % PRIME
    return n


def draw_for(x: torch.Tensor, places: torch.Tensor, training: bool) -> torch.Tensor:
    """A random number in [0, 1) for each token of the first frame x (B, N, C), which stand at `places` (B, N): (B, N).

    In training from torch's generator. In evaluation, which has to repeat whatever the batch, the clip itself is the
    seed: a few of its mean features, rounded so coarsely that the rounding of another batch size does not show.
    """
    if training:
        return torch.rand(places.shape, device=places.device)
    means = x.float().mean(dim=1)
    means = means[:, :: max(means.shape[1] // 4, 1)][:, :4]
    levels = (means / x.float().abs().mean(dim=(1, 2))[:, None].clamp_min(1e-6) * 64).round().long()
    seed = places.new_zeros(len(x))
    for level in levels.unbind(dim=1):
        seed = scramble(seed + level)
    return scramble(seed[:, None] + scramble(places)) / PRIME


def cells_for(places: torch.Tensor, grid: tuple[int, int], r: int) -> torch.Tensor:
    """The cell in which each place (B, N) lies, in a raster of floor(sqrt(r)) x floor(sqrt(r)) cells over the grid."""
    side = int(r**0.5)
    rows, columns = grid
    cell_row = places // columns * side // rows
    cell_column = places % columns * side // columns
    return cell_row * side + cell_column


class STA(Compression):
    """STA on CLIP: three stages, after blocks 1, 1 + L/3 and 1 + 2L/3, drop patches of every frame.

    Class tokens are neither scored nor dropped.

    Args:
        r: tokens of each frame that the first stage drops; default: a quarter of the patches, as a multiple of 4 (48
            of 196).
        schedule: the paper's "decreasing" r, r/2, r/4, "constant" r, r, r or "increasing" r, 2r, 4r.
        order: the direction of the walk at each stage.
        first_frame: how to prune the first frame of a walk: "tome", "random", or "grid", which drops a random token of
            every cell.
        similarity: the features compared: the attention's "key", "query" or "value" or the output of the MLP, "ffn".
        scores: "both" (Eq. 5), "semantic" (1 - F) or "temporal" (A).
    """

    uses_layers = False
    keeps_grid = False

    def __init__(
        self,
        tower: Tower,
        layers: list[int],
        *,
        r: int | None = None,
        schedule: str = "decreasing",
        order: str = "F-B-F",
        first_frame: str = "tome",
        similarity: str = "key",
        scores: str = "both",
    ):
        super().__init__(tower, layers)
        dropped = dropped_tokens(self._default_r(tower) if r is None else r, schedule)
        self.stages = list(zip(stage_blocks(tower.num_hidden_layers), dropped, directions(order), strict=True))
        self.first_frame, self.scores = first_frame, scores
        self.features = similarity
        self.heads = 1 if similarity == "ffn" else tower.num_attention_heads

    @staticmethod
    def _default_r(tower: Tower) -> int:
        return min(max(tower.num_patches // 16 * 4, 1), tower.num_patches - 1)

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        r, schedule = options.pop("r", None), options.pop("schedule", "decreasing")
        check_choices(**options)
        stage_blocks(tower.num_hidden_layers)
        dropped = dropped_tokens(cls._default_r(tower) if r is None else r, schedule)
        if sum(dropped) >= tower.num_patches:
            raise ValueError(
                f"STA's r must leave a patch of each frame, got {r} with schedule {schedule!r}, which drops "
                f"{' + '.join(map(str, dropped))} of {tower.num_patches}; lower r."
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
            t = 0 if direction == "F" else -1
            draw = draw_for(patches[:, t], positions[:, t], self.training)
            cells = cells_for(positions[:, t], state.grid, r)
        kept = prune(patches, metric, r, direction, self.first_frame, draw, cells, self.scores)  # (B, T, N - r)
        x = torch.cat([x[:, :, :c], patches.gather(2, kept[..., None].expand(-1, -1, -1, D))], dim=2)
        # The index of each token from now on, -1 where it was dropped; class tokens stay.
        now = torch.arange(L - r, device=x.device).expand(B, T, -1)
        moved = torch.full((B, T, L), -1, device=x.device).scatter(2, kept + c, now[:, :, c:])
        moved[:, :, :c] = now[:, :, :c]
        if state.source is not None:
            moved = torch.where(state.source < 0, -1, moved.gather(2, state.source.clamp_min(0)))
        return x, state._replace(positions=positions.gather(2, kept), source=moved)
