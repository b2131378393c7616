"""STTS's selections, and those that its paper compares them with (Tables 1 and 6).

All are modules like `TemporalSelection` (x (B, T, N, C), k) -> (B, k, N, C) and `SpatialSelection` (x, grid, side) ->
(B, T, side * side, C). The baselines differ in where scores come from, or in what is selected by them. Those without
weights choose hard in training too: noise of size zero.
"""

import torch
from torch import nn

from ..model.compression_sta import draw_for
from ..model.compression_stts import PerturbedTopK, SpatialSelection, TemporalSelection, hard_topk, min_max


CHOICES = ("stts", "random", "attention", "gumbel")
UNITS = ("anchor", "token")
SCORES = ("token", "anchor")


def hard() -> PerturbedTopK:
    return PerturbedTopK(0.0, num_samples=1)


def draws(x: torch.Tensor, count: int, training: bool) -> torch.Tensor:
    """A random number for each of `count` candidates of each x (B, N, C): (B, count); in evaluation the same again."""
    return draw_for(x, torch.arange(count, device=x.device).expand(len(x), -1), training)


class RandomFrames(TemporalSelection):
    """Frames at random, whatever they show."""

    def __init__(self):
        nn.Module.__init__(self)
        self.topk = hard()

    def scores(self, x: torch.Tensor, num_class_tokens: int = 0) -> torch.Tensor:
        return draws(x.mean(dim=2), x.shape[1], self.training)


class AttendedFrames(RandomFrames):
    """Those that the class token attends to most; the attention to each token is the last channel of x."""

    def scores(self, x: torch.Tensor, num_class_tokens: int = 0) -> torch.Tensor:
        return x[..., -1].sum(dim=2)


class GumbelFrames(TemporalSelection):
    """Frames drawn by Gumbel noise on the scorer's output, without replacement, with straight-through gradients.

    The paper names the trick and shares the scorer; its supplement, which would say more, is not at hand. A kept frame
    is multiplied by one, whose gradient is that of its probability in the softmax of the noisy scores.
    """

    def forward(self, x: torch.Tensor, k: int, num_class_tokens: int = 0, noise: torch.Tensor | None = None):
        if not self.training:
            return super().forward(x, k, num_class_tokens)
        patches = x[:, :, num_class_tokens:]
        frames = patches.mean(dim=2)
        if self.kind == "released":
            frames = torch.cat([frames, patches.amax(dim=2)], dim=-1)
        logits = self.scorer(frames).float()
        noise = torch.rand_like(logits) if noise is None else noise
        logits = logits - noise.clamp(1e-10, 1 - 1e-7).log().neg().log()
        index = hard_topk(logits, k)
        shares = logits.softmax(dim=-1).gather(1, index)
        gate = (1 + shares - shares.detach()).to(x.dtype)[..., None, None]
        return gate * x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


class RandomSquares(SpatialSelection):
    """A square at random in each frame."""

    def __init__(self, stride: int | None = None):
        nn.Module.__init__(self)
        self.stride, self.topk = stride, hard()

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def anchor_scores(self, x: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
        stride = self._stride(grid, side)
        count = ((grid[0] - side) // stride + 1) * ((grid[1] - side) // stride + 1)
        return draws(x.flatten(0, 1), count, self.training).unflatten(0, x.shape[:2])


class AttendedSquares(SpatialSelection):
    """That to whose tokens the class token attends most; see `AttendedFrames`."""

    def __init__(self, stride: int | None = None):
        nn.Module.__init__(self)
        self.stride, self.topk = stride, hard()

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., -1]


class ScoredSquares(SpatialSelection):
    """Squares scored by their mean features, instead of by their tokens' mean scores (Table 6, "A")."""

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def anchor_scores(self, x: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
        planes = x.flatten(0, 1).transpose(1, 2).unflatten(2, grid)  # (B * T, C, rows, columns)
        means = nn.functional.avg_pool2d(planes, side, stride=self._stride(grid, side))
        return min_max(self.scorer(means.flatten(2).transpose(1, 2))).unflatten(0, x.shape[:2])


class TokenSelection(SpatialSelection):
    """The best side * side patches of each frame, wherever they are, in row-major order as a smaller square.

    Later pooling joins what were no neighbours: the paper's Table 6 shows that this does not work.
    """

    def forward(self, x: torch.Tensor, grid: tuple[int, int], side: int, noise: torch.Tensor | None = None):
        k = side * side
        scores = self.token_scores(x).flatten(0, 1)  # (B * T, N)
        frames = x.flatten(0, 1)
        if self.training:
            out = self.topk(min_max(scores), k, noise).to(x.dtype) @ frames
        else:
            out = frames.gather(1, hard_topk(scores, k)[..., None].expand(-1, -1, x.shape[-1]))
        return out.unflatten(0, x.shape[:2])


class RandomTokens(TokenSelection):
    """Patches at random."""

    def __init__(self):
        nn.Module.__init__(self)
        self.topk = hard()

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        return draws(x.flatten(0, 1), x.shape[2], self.training).unflatten(0, x.shape[:2])


class AttendedTokens(RandomTokens):
    """Those that the class token attends to most; see `AttendedFrames`."""

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., -1]


def temporal_selection(choice: str, width: int, scorer: str, topk: PerturbedTopK) -> nn.Module:
    if choice in ("random", "attention"):
        return {"random": RandomFrames, "attention": AttendedFrames}[choice]()
    return {"stts": TemporalSelection, "gumbel": GumbelFrames}[choice](width, scorer, topk)


def spatial_selection(
    choice: str, unit: str, score: str, width: int, scorer: str, topk: PerturbedTopK, stride: int | None
) -> nn.Module:
    if choice in ("random", "attention"):
        if unit == "token":
            return {"random": RandomTokens, "attention": AttendedTokens}[choice]()
        return {"random": RandomSquares, "attention": AttendedSquares}[choice](stride)
    kind = TokenSelection if unit == "token" else {"token": SpatialSelection, "anchor": ScoredSquares}[score]
    return kind(width, scorer, topk, stride)


def check_combination(
    host: str, choice: str, unit: str, score: str, temporal: dict, spatial: dict, class_token: bool
) -> None:
    """Raise a ValueError where the paper's tables have "N/A", and where nothing is there to be scored."""
    if choice == "gumbel" and spatial:
        raise ValueError(
            "STTS's spatial must be left out with choice 'gumbel', which only selects frames (Table 1), got a spatial "
            "selection; give temporal alone."
        )
    if choice == "attention" and (not class_token or 0 in temporal or 0 in spatial):
        where = "a selection before block 0, where there is no attention yet" if class_token else f"{host}, without one"
        raise ValueError(
            f"STTS's choice must not be 'attention' but after a block with a class token, got {where}; choose 'stts'."
        )
    if score == "anchor" and (unit == "token" or choice != "stts"):
        raise ValueError(
            "STTS's score must be 'token' unless anchors are selected by STTS itself, got 'anchor' with choice "
            f"{choice!r} and unit {unit!r}."
        )
