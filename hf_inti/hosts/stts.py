"""STTS on the hosts of its paper: before a block, frames of the grid are selected, and of each frame a square.

Its weights live on the model as `model.compression`, so they are saved, loaded, moved and trained with it. What is left
is a smaller grid, on which the host's blocks go on: they pool and make windows as on any other.
"""

import math

import torch
from torch import nn

from ..model.compression_stts import GRADIENTS, SCORERS, PerturbedTopK, is_plan
from ..model.methods import is_count, is_number
from .contract import BaseHost, Current, Hook, MethodWeights, PreHook
from .stts_selections import CHOICES, SCORES, UNITS, check_combination, spatial_selection, temporal_selection


class Selections(MethodWeights):
    """The selections of a model, in the order of its blocks."""

    def __init__(self):
        super().__init__()
        self.temporal, self.spatial = nn.ModuleList(), nn.ModuleList()

    def set_progress(self, progress: float) -> None:
        for module in self.modules():
            if isinstance(module, PerturbedTopK):
                module.set_progress(progress)


class Attach(Hook):
    """On the model: makes the selections a part of it."""

    def __init__(self, *where, selections: Selections):
        super().__init__(*where)
        self.selections = selections

    def register(self, module: nn.Module) -> None:
        module.compression = self.selections


def keep_count(count: int, share: float, what: str) -> int:
    """The whole part of a share of `count`. Raises ValueError where that is nothing."""
    k = int(count * share)
    if k < 1:
        raise ValueError(
            f"STTS's share must keep at least one of {count} {what}, got {share}; raise it to {1 / count:.2g} or more."
        )
    return k


def select(x: torch.Tensor, grid: tuple[int, int], temporal: tuple | None, spatial: tuple | None):
    """Select from x (B, T, N, C), of which a frame is a grid of patches; returns what is left, and its grid.

    `temporal` and `spatial` are a selection and the share that it keeps.
    """
    if temporal is not None:
        selection, share = temporal
        x = selection(x, keep_count(x.shape[1], share, "frames"))
    if spatial is not None:
        selection, share = spatial
        side = min(math.isqrt(keep_count(x.shape[2], share, "patches")), *grid)
        x, grid = selection(x, grid, side), (side, side)
    return x, grid


class SelectBefore(PreHook):
    """On a block: it gets what the selections leave of its argument."""

    def __init__(self, *where, temporal: tuple | None, spatial: tuple | None):
        super().__init__(*where)
        self.temporal, self.spatial = temporal, spatial

    def __call__(self, module, args, kwargs):
        rest, x, grid = self.host.open(args)
        x, grid = select(x, grid, self.temporal, self.spatial)
        return self.host.close(args, rest, x, grid), kwargs


class SelectAfter(Hook):
    """On a block: the same of its output, beside the attention that the class token paid in it."""

    def __init__(self, *where, temporal: tuple | None, spatial: tuple | None):
        super().__init__(*where)
        self.temporal, self.spatial = temporal, spatial

    def __call__(self, module, args, kwargs, output):
        rest, x, grid = self.host.open(output)
        attention = self.host.class_attention(module, args, self.current.pop(), (x.shape[1], *grid))
        x = torch.cat([x, attention[..., None].to(x.dtype)], dim=-1)
        x, grid = select(x, grid, self.temporal, self.spatial)
        return self.host.close(output, rest, x[..., :-1], grid)


def hooks(
    host: BaseHost,
    model: nn.Module,
    temporal: list[list] | None = None,
    spatial: list[list] | None = None,
    scorer: str = "released",
    gradient: str = "released",
    sigma: float = 0.1,
    num_samples: int = 500,
    stride: int | None = None,
    choice: str = "stts",
    unit: str = "anchor",
    score: str = "token",
) -> list[tuple[nn.Module, Hook]]:
    """STTS's hooks, and its weights, initialised at random.

    Args:
        temporal: pairs [i, share of the frames kept]: before block i of MViT, stage i of VideoSwin, counted from 0.
        spatial: pairs [i, share of the patches kept], after the temporal selection of the same i; kept is the largest
            square of at most so many. Without `temporal` and `spatial` the host's setting of the paper's tables: on
            MViT T 0.6 before block 0 and S 0.9 before block 4, on VideoSwin T 0.6 before stage 0.
        scorer, gradient, sigma, num_samples, stride: see `STTS`.
        choice: what is compared in Table 1: "stts", "random", "attention" (most attended by the class token) or
            "gumbel" (Gumbel-softmax, frames only).
        unit, score: what is compared in Table 6: selecting an "anchor", a square, or each "token"; scoring every
            "token", or an "anchor" by its mean feature.

    Raises ValueError for bad options; the model's call does where a share keeps nothing.
    """
    check_options(scorer, gradient, sigma, num_samples, stride)
    check_choices(choice, unit, score)
    if temporal is None and spatial is None:
        temporal, spatial = host.stts_default
    plans = [check_plan(host, name, plan) for name, plan in (("temporal", temporal), ("spatial", spatial))]
    check_combination(host.name, choice, unit, score, *plans, class_token=host.class_tokens > 0)
    if not any(plans):
        return []
    selections, current = Selections(), Current()
    found = [(model, Attach(host, current, selections=selections))]
    blocks = host.blocks_to_select(model)

    def topk() -> PerturbedTopK:
        return PerturbedTopK(sigma, num_samples, gradient)

    like = next(model.parameters())
    with torch.device(like.device):
        for i in sorted(plans[0].keys() | plans[1].keys()):
            width = blocks[i].norm1.weight.shape[0]
            of_block = {"temporal": None, "spatial": None}
            if i in plans[0]:
                selections.temporal.append(temporal_selection(choice, width, scorer, topk()))
                of_block["temporal"] = selections.temporal[-1], plans[0][i]
            if i in plans[1]:
                selections.spatial.append(spatial_selection(choice, unit, score, width, scorer, topk(), stride))
                of_block["spatial"] = selections.spatial[-1], plans[1][i]
            if choice == "attention":
                found += host.hooks_for_attention(blocks[i - 1], current)
                found.append((blocks[i - 1], SelectAfter(host, current, i, **of_block)))
            else:
                found.append((blocks[i], SelectBefore(host, current, i, **of_block)))
    selections.to(like.dtype).train(model.training)
    return found + host.hooks_after_selection(model, min(plans[0].keys() | plans[1].keys()), current)


def check_plan(host: BaseHost, name: str, plan) -> dict[int, float]:
    """{block: share}, without shares that keep all; an empty one for None. Raises ValueError for what is no plan."""
    plan = [] if plan is None else plan
    last = host.depth - 1
    if not is_plan(plan, last):
        raise ValueError(
            f"STTS's {name} must be a list of pairs [{host.unit} from 0 to {last}, share above 0 and at most 1] on "
            f"{host.name}, each {host.unit} once, such as [[0, 0.5]], got {plan!r}."
        )
    return {i: share for i, share in sorted(plan) if share < 1}


def check_options(scorer: str, gradient: str, sigma: float, num_samples: int, stride: int | None) -> None:
    """Raise a ValueError for a bad one."""
    for name, value, valid in (("scorer", scorer, SCORERS), ("gradient", gradient, GRADIENTS)):
        if value not in valid:
            raise ValueError(f"STTS's {name} must be one of {', '.join(valid)}, got {value!r}.")
    if not is_number(sigma) or sigma < 0:
        raise ValueError(f"STTS's sigma must be a number from 0, got {sigma!r}.")
    if not is_count(num_samples):
        raise ValueError(f"STTS's num_samples must be a whole number from 1, got {num_samples!r}.")
    if stride is not None and not is_count(stride):
        raise ValueError(f"STTS's stride must be a whole number from 1, or None, got {stride!r}.")


def check_choices(choice: str, unit: str, score: str) -> None:
    """Raise a ValueError that names the valid ones."""
    for name, value, valid in (("choice", choice, CHOICES), ("unit", unit, UNITS), ("score", score, SCORES)):
        if value not in valid:
            raise ValueError(f"STTS's {name} must be one of {', '.join(valid)}, got {value!r}.")
