"""STTS: spatial-temporal token selection, Wang et al., "Efficient Video Transformers with Spatial-Temporal Token
Selection" (ECCV 2022).

A small network scores the frames of a clip, and the patches of a frame; the best k frames are kept, and of every frame
the best square of patches (anchor). In training the choice is softened by noise, so that the scores learn through it
(perturbed maximum); in evaluation it is hard. Letters: B sequences, L tokens scored, k of them kept, C width, n draws.
"""

import torch
from torch import nn

from .methods import Compression, NewLinear, ResettableModule, TokenState, Tower, is_count, is_number


SCORERS = ("paper", "released")
GRADIENTS = ("paper", "released")
CHUNK = 50  # draws of noise held in memory at a time


def min_max(scores: torch.Tensor) -> torch.Tensor:
    """Scores (..., L) to the range from 0 to 1 (Eq. 3), as released: nothing is divided by zero."""
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    return (scores - low) / (high - low + 1e-5)


def perturbed_topk(
    scores: torch.Tensor,
    k: int,
    sigma: torch.Tensor | float,
    num_samples: int = 500,
    noise: torch.Tensor | None = None,
    gradient: str = "released",
) -> torch.Tensor:
    """Soft indicators (B, k, L) of the k largest of scores (B, L), in the order of the sequence (Eq. 7).

    The mean over `num_samples` draws of the hard indicators of scores + sigma * noise; `noise` (B, n, L) may be given.
    `gradient` "paper" is Eq. 8, E[indicator noise^T] / sigma: how each indicator depends on every score. "released" is
    what the authors' code computes, its diagonal: how an indicator's position depends on the score at that position.
    With sigma at zero the choice is hard and has no gradient.
    """
    n = num_samples if noise is None else noise.shape[1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # counts and noise are too coarse in bf16
    sigma = torch.as_tensor(sigma, dtype=scores.dtype, device=scores.device)
    pairs = "bnkl,bnm->bklm" if gradient == "paper" else "bnkl,bnl->bkl"
    with torch.no_grad():
        indicators = slopes = 0
        for start in range(0, n, CHUNK):
            size = min(CHUNK, n - start)
            if noise is None:
                z = torch.randn(scores.shape[0], size, scores.shape[1], dtype=scores.dtype, device=scores.device)
            else:
                z = noise[:, start : start + size]
            best = (scores[:, None] + sigma * z).topk(k, dim=-1).indices.sort(dim=-1).values  # (B, size, k)
            hard = nn.functional.one_hot(best, scores.shape[1]).to(scores.dtype)  # (B, size, k, L)
            indicators = indicators + hard.sum(dim=1) / n
            slopes = slopes + torch.einsum(pairs, hard, z) / n
        slopes = torch.where(sigma > 1e-20, slopes / sigma.clamp_min(1e-20), 0)
    # Adds zero, whose gradient is the slopes: the same as an autograd.Function, without one.
    zero = (scores - scores.detach())[:, None]
    return indicators + (slopes @ zero[..., None]).squeeze(-1) if gradient == "paper" else indicators + slopes * zero


def hard_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The places (B, k) of the k largest of scores (B, L), ascending (Eq. 4)."""
    return scores.topk(k, dim=-1).indices.sort(dim=-1).values


class PerturbedTopK(ResettableModule, nn.Module):
    """Holds sigma, which decays to zero over training; see `perturbed_topk`."""

    def __init__(self, sigma: float, num_samples: int, gradient: str = "released"):
        super().__init__()
        self.start, self.num_samples, self.gradient = sigma, num_samples, gradient
        self.register_buffer("sigma", torch.tensor(float(sigma)), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.sigma, self.start)

    def set_progress(self, progress: float) -> None:
        self.sigma.fill_(self.start * (1 - progress))

    def forward(self, scores: torch.Tensor, k: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        return perturbed_topk(scores, k, self.sigma, self.num_samples, noise, self.gradient)


class PaperScorer(nn.Module):
    """Two linear layers; between them each token gets the sequence's mean (Eq. 2, 3): (B, L, C) -> (B, L)."""

    def __init__(self, width: int):
        super().__init__()
        self.local = NewLinear(width, width // 2)
        self.score = NewLinear(width // 2 * 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = self.local(x)
        return self.score(torch.cat([local, local.mean(dim=1, keepdim=True).expand_as(local)], dim=-1)).squeeze(-1)


class ReleasedScorer(nn.Module):
    """The released code's deeper network: half of the channels are the token's own, half the sequence's mean."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.local = NewLinear(width, width)
        self.hidden1 = NewLinear(width, width // 2)
        self.hidden2 = NewLinear(width // 2, width // 4)
        self.score = NewLinear(width // 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local, shared = nn.functional.gelu(self.local(self.norm(x))).split(
            [x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], dim=-1
        )
        x = torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1)
        return self.score(nn.functional.gelu(self.hidden2(nn.functional.gelu(self.hidden1(x))))).squeeze(-1)


def _scorer(kind: str, width: int) -> nn.Module:
    return PaperScorer(width) if kind == "paper" else ReleasedScorer(width)


class TemporalSelection(nn.Module):
    """Keeps k frames of x (B, T, L, C); the first `num_class_tokens` tokens do not count in the scores."""

    def __init__(self, width: int, scorer: str, topk: PerturbedTopK):
        super().__init__()
        self.kind = scorer
        self.scorer = _scorer(scorer, width if scorer == "paper" else 2 * width)
        self.topk = topk

    def scores(self, x: torch.Tensor, num_class_tokens: int = 0) -> torch.Tensor:
        """(B, T), from each frame's mean patch and, as released, its maximum."""
        patches = x[:, :, num_class_tokens:]
        frames = patches.mean(dim=2)
        if self.kind == "released":
            frames = torch.cat([frames, patches.amax(dim=2)], dim=-1)
        return min_max(self.scorer(frames))

    def forward(self, x: torch.Tensor, k: int, num_class_tokens: int = 0, noise: torch.Tensor | None = None):
        scores = self.scores(x, num_class_tokens)
        if self.training:  # Eq. 9
            return torch.einsum("bkt,btlc->bklc", self.topk(scores, k, noise).to(x.dtype), x)
        index = hard_topk(scores, k)
        return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


class SpatialSelection(nn.Module):
    """Keeps the best-scoring square of `side` x `side` patches of each frame of x (B, T, N, C), patches only."""

    def __init__(self, width: int, scorer: str, topk: PerturbedTopK, stride: int | None = None):
        super().__init__()
        self.stride = stride
        self.scorer = _scorer(scorer, width)
        self.topk = topk

    def token_scores(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, N)."""
        return self.scorer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def anchor_scores(self, token_scores: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
        """Token scores (B, T, N) -> (B, T, G): means over the squares, row by row, min-max normalised."""
        maps = token_scores.unflatten(2, grid).flatten(0, 1)[:, None]
        means = nn.functional.avg_pool2d(maps, side, stride=self._stride(grid, side))
        return min_max(means.flatten(1).unflatten(0, token_scores.shape[:2]))

    def _stride(self, grid: tuple[int, int], side: int) -> int:
        return self.stride or max((grid[0] - side) // 2, 1)

    def forward(self, x: torch.Tensor, grid: tuple[int, int], side: int, noise: torch.Tensor | None = None):
        B, T, N, C = x.shape
        scores = self.anchor_scores(self.token_scores(x), grid, side).flatten(0, 1)  # (B * T, G)
        # The places of every square's patches (G, side * side), by unfolding the grid of place numbers.
        places = torch.arange(N, device=x.device).unflatten(0, grid)
        stride = self._stride(grid, side)
        places = places.unfold(0, side, stride).unfold(1, side, stride).flatten(2).flatten(0, 1)
        if self.training:
            squares = x.flatten(0, 1)[:, places]  # (B * T, G, side * side, C)
            out = torch.einsum("bg,bgnc->bnc", self.topk(scores, 1, noise)[:, 0].to(x.dtype), squares)
        else:
            index = places[hard_topk(scores, 1)[:, 0]]  # (B * T, side * side)
            out = x.flatten(0, 1).gather(1, index[..., None].expand(-1, -1, C))
        return out.unflatten(0, (B, T))


def is_plan(plan, last: int) -> bool:
    """Whether `plan` is a list of [block from 0 to `last`, share above 0 and at most 1], each block once."""
    return (
        isinstance(plan, (list, tuple))
        and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in plan)
        and all(is_count(i, 0, last) and is_number(share) and 0 < share <= 1 for i, share in plan)
        and len({i for i, _ in plan}) == len(plan)
    )


class STTS(Compression):
    """STTS after the blocks that its options name; tokens stay on a dense, smaller grid.

    Args:
        temporal: pairs [block, share of the frames kept]; block 0 is before the first.
        spatial: pairs [block, share of the patches kept]; kept is the largest square of at most so many. Without
            `temporal` and `spatial`: half of the frames before the first block, and of those 0.6 of the patches after
            a third of the blocks.
        scorer: "released", the authors' deeper network, or "paper", the two linear layers of Eq. 2 and 3. The paper
            names no nonlinearity between them: the sequence's mean then shifts all scores equally, which the
            normalisation cancels.
        gradient: "paper", all of Eq. 8's Jacobian, or "released", its diagonal; see `perturbed_topk`.
        sigma: standard deviation of the noise at the start of training; see the model's `set_training_progress`.
        num_samples: n, draws of noise.
        stride: patches between neighbouring squares; default, as released: half of the patches that a side loses.

    On CLIP a kept frame keeps its class token, which is not scored.
    """

    uses_layers = False

    def __init__(
        self,
        tower: Tower,
        layers: list[int],
        *,
        temporal: list[list] | None = None,
        spatial: list[list] | None = None,
        scorer: str = "released",
        gradient: str = "released",
        sigma: float = 0.1,
        num_samples: int = 500,
        stride: int | None = None,
    ):
        super().__init__(tower, layers)
        self.plan = self._plan(tower, temporal, spatial)
        C = tower.hidden_size

        def topk() -> PerturbedTopK:
            return PerturbedTopK(sigma, num_samples, gradient)

        self.temporal = nn.ModuleList(TemporalSelection(C, scorer, topk()) for _ in self.plan[0])
        self.spatial = nn.ModuleList(SpatialSelection(C, scorer, topk(), stride) for _ in self.plan[1])

    @staticmethod
    def _plan(tower: Tower, temporal, spatial) -> tuple[list, list]:
        if temporal is None and spatial is None:
            return [[0, 0.5]], [[tower.num_hidden_layers // 3, 0.6]]
        return temporal or [], spatial or []

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        depth = tower.num_hidden_layers
        for name in ("temporal", "spatial"):
            plan = options.get(name)
            if plan is not None and not is_plan(plan, depth):
                raise ValueError(
                    f"STTS option {name} must be a list of pairs [block from 0 to {depth}, share above 0 and at most "
                    f"1], each block once, such as [[0, 0.5]]; got {plan!r}."
                )
        for name, valid in (("scorer", SCORERS), ("gradient", GRADIENTS)):
            if options.get(name, "released") not in valid:
                raise ValueError(f"STTS option {name} must be one of {', '.join(valid)}, got {options[name]!r}.")
        if not is_number(options.get("sigma", 0.1)) or options.get("sigma", 0.1) < 0:
            raise ValueError(f"STTS option sigma must be a number from 0, got {options['sigma']!r}.")
        for name in ("num_samples", "stride"):
            if not is_count(options.get(name, 1)) and not (name == "stride" and options[name] is None):
                raise ValueError(f"STTS option {name} must be a whole number from 1, got {options[name]!r}.")
        frames, patches = tower.num_frames, tower.num_patches
        temporal, spatial = cls._plan(tower, options.get("temporal"), options.get("spatial"))
        for _, share in sorted(temporal):
            frames = cls._kept(frames, share, "frames")
        for _, share in sorted(spatial):
            patches = int(cls._kept(patches, share, "patches") ** 0.5) ** 2

    @staticmethod
    def _kept(count: int, share: float, what: str) -> int:
        k = int(count * share)
        if k < 1:
            least = -int(-1 // share)
            raise ValueError(
                f"STTS's share must keep at least one of {count} {what}, got {share}; raise it, or give at least "
                f"{least} {what}."
            )
        return k

    def set_progress(self, progress: float) -> None:
        for selection in (*self.temporal, *self.spatial):
            selection.topk.set_progress(progress)

    def after_block(self, i: int, x, keys, state: TokenState):
        c = state.num_class_tokens
        for (block, share), selection in zip(self.plan[0], self.temporal, strict=True):
            if block == i:
                k = self._kept(x.shape[1], share, "frames")
                if k < x.shape[1]:
                    x = selection(x, k, c)
        for (block, share), selection in zip(self.plan[1], self.spatial, strict=True):
            if block == i:
                rows, columns = state.grid
                side = min(int(self._kept(rows * columns, share, "patches") ** 0.5), rows, columns)
                if (side, side) != state.grid:
                    patches = selection(x[:, :, c:], state.grid, side)
                    x = torch.cat([x[:, :, :c], patches], dim=2)
                    state = state._replace(grid=(side, side))
        return x, state
