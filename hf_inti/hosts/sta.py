"""STA on a host that attends over all frames together: tokens leave after blocks 1, 1 + L/3 and 1 + 2L/3."""

import torch
from torch import nn

from ..model.compression_sta import (
    SCHEDULES,
    cells_for,
    check_choices,
    directions,
    draw_for,
    dropped_tokens,
    prune,
    stage_blocks,
)
from ..model.layers import tokens_at
from ..model.methods import is_count
from .contract import BaseHost, Current, Feature, Hook, first, with_first


RELEASED = "released"  # the authors' code's schedule, which the paper does not have
RANDOM = "random"  # instead of scores: what STA has to beat


def random_tokens(x: torch.Tensor, places: torch.Tensor, r: int, training: bool) -> torch.Tensor:
    """All but r tokens of each group, drawn at random, whatever they show: indices (B, G, N - r).

    Of tokens x (B, G, N, C) at `places` (B, G, N). In evaluation a clip is drawn for in the same way each time.
    """
    draw = draw_for(x.flatten(0, 1), places.flatten(0, 1), training).unflatten(0, x.shape[:2])
    return draw.argsort(dim=-1, stable=True)[..., : x.shape[2] - r]


class Prune(Hook):
    """On a block: drops r tokens from each group of its output (B, L, D); class tokens take no part.

    Tokens come out in order of score, so the trace carries their places. `tokens` patches are expected, in `groups`
    groups, of which a stage joins `joined` at a time.
    """

    def __init__(self, *where, tokens: int, groups: int, multiple: int = 1, joined: int = 1, **options):
        super().__init__(*where)
        self.tokens, self.groups, self.multiple, self.joined, self.options = tokens, groups, multiple, joined, options

    def __call__(self, module, args, kwargs, output):
        trace = self.host.trace(args, kwargs)
        before = trace.before(self.i)
        classes, x = first(output).tensor_split([self.host.class_tokens], dim=1)
        base = before.groups or self._count_groups(x.shape[1])
        groups = base // self.joined
        x = x.unflatten(1, (groups, -1))  # (B, G, N, D)
        places = self._places(before.places, x)
        if self.options["scores"] == RANDOM:
            kept = random_tokens(x, places, self.options["r"], module.training)
        else:
            metric = trace.feature[:, self.host.class_tokens :].unflatten(1, (groups, -1))
            kept = prune(x, metric, **self._draw(x, places, module.training), **self.options)
        trace.tokens[self.i] = before._replace(groups=base, places=places.gather(2, kept).flatten(1, 2))
        x = tokens_at(x.flatten(0, 1), kept.flatten(0, 1)).view(len(x), -1, x.shape[-1])
        return with_first(output, torch.cat([classes, x], dim=1))

    def _count_groups(self, tokens: int) -> int:
        groups, rest = divmod(tokens, self.tokens // self.groups)
        if rest or groups % self.multiple or not (tokens == self.tokens or self.host.any_length):
            raise ValueError(
                f"STA was set up for {self.tokens} tokens in this block, got {tokens}; give whole clips of the model's "
                "size, without masked positions."
            )
        return groups

    @staticmethod
    def _places(places: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """(B, G, N)."""
        if places is None:
            places = torch.arange(x.shape[1] * x.shape[2], device=x.device).expand(x.shape[0], -1)
        return places.unflatten(1, x.shape[1:3])

    def _draw(self, x: torch.Tensor, places: torch.Tensor, training: bool) -> dict:
        """What `prune` needs where the first group's tokens are chosen by their places in the frame."""
        if self.options["first_frame"] == "tome":
            return {}
        g = 0 if self.options["direction"] == "F" else -1
        _, rows, columns = self.host.grid
        where = places[:, g] % (rows * columns)
        return {
            "draw": draw_for(x[:, g], where, training),
            "cells": cells_for(where, (rows, columns), self.options["r"]),
        }


def hooks(
    host: BaseHost,
    model: nn.Module,
    r: int = 64,
    schedule: str = "decreasing",
    order: str = "F-B-F",
    first_frame: str = "tome",
    similarity: str = "key",
    scores: str = "both",
    groups: int | None = None,
) -> list[tuple[nn.Module, Hook]]:
    """STA's hooks.

    Args:
        r: tokens that the first stage drops from each group.
        schedule: "decreasing", "constant" or "increasing" as in the paper, see `STA`, or "released": the authors' code
            keeps r and halves the number of groups at each stage by joining neighbours, dropping as many tokens in
            total as "decreasing".
        order, first_frame, similarity, scores: see `STA`; scores "random" drops tokens at random, as a baseline.
        groups: into how many groups the patches are divided; default: one for each frame after the tubelet embedding,
            8 for 16 frames of VideoMAE (the released code has 8 whatever the number of frames).

    Raises ValueError for bad options, and where r leaves a group without tokens.
    """
    check_choices(order, first_frame, similarity, "both" if scores == RANDOM else scores)
    if schedule not in (*SCHEDULES, RELEASED):
        raise ValueError(f"STA's schedule must be one of {', '.join((*SCHEDULES, RELEASED))}, got {schedule!r}.")
    released = schedule == RELEASED
    dropped = dropped_tokens(r, "constant" if released else schedule)
    groups = host.grid[0] if groups is None else groups
    _check(host, r, dropped, groups, released)
    if r == 0:
        return []
    current = Current()
    found = host.hooks(model, "sta", current)
    blocks = host.blocks(model)
    tokens = host.num_merging
    for stage, (i, r_i, direction) in enumerate(zip(stage_blocks(host.depth), dropped, directions(order), strict=True)):
        if r_i == 0:
            continue
        block = blocks[i - 1]
        options = {"r": r_i, "direction": direction, "first_frame": first_frame, "scores": scores}
        counts = {"tokens": tokens, "groups": groups, "multiple": 4 if released else 1}
        feature = block.mlp if similarity == "ffn" else block.projections[similarity]
        found.append((feature, Feature(host, current, i, similarity=similarity)))
        joined = 2**stage if released else 1
        found.append((block.block, Prune(host, current, i, joined=joined, **counts, **options)))
    return found


def _check(host: BaseHost, r: int, dropped: list[int], groups: int, released: bool) -> None:
    """Raise a ValueError unless the groups divide the tokens and r leaves one of them in each group."""
    tokens = host.num_merging
    if not is_count(groups) or tokens % groups:
        raise ValueError(
            f"STA's groups must be a whole number that divides the model's {tokens} tokens, got {groups!r}; leave it "
            "out for one group a frame."
        )
    if released and groups % 4:
        raise ValueError(
            f"STA's groups must be a multiple of 4 with schedule {RELEASED!r}, which halves them twice, got {groups}; "
            "choose 'decreasing'."
        )
    left = tokens // groups
    for r_i in dropped:
        if left <= r_i:
            raise ValueError(
                f"STA's r must leave a token in each group, got {r}, which drops {r_i} of a group's {left}; lower r."
            )
        left = (left - r_i) * (2 if released else 1)
