"""STA on a host of windows in stages (VideoSwin): tokens leave at the end of each stage but the last.

STA, Sec. 4.1: "{r, 1.5 r / 4, 2 r / 16}" tokens of a frame. Those are shares of 1 : 1.5 : 2 of the grids after the
merging of patches, and only there do the counts give the multiply-adds of Table 3: so each merging works on the whole
grid, with dropped places filled, and what it returns is pruned. Which keys belong to merged tokens the paper does not
say: here the mean of those of the two by two tokens, in the stage's last block.
"""

import torch
from torch import nn

from ..model.compression_sta import cells_for, check_choices, directions, draw_for, prune
from ..model.layers import tokens_at
from ..model.methods import is_count
from .contract import BaseHost, Current, Hook, PreHook
from .sta import RANDOM, random_tokens
from .videoswin import WindowTokens, fill, nearest_kept


FACTORS = (1, 1.5 / 4, 2 / 16)  # of r, at the end of the three stages
PARTS = {"query": 0, "key": 1, "value": 2}


class Feature(Hook):
    """On the projection to queries, keys and values, or on the MLP, of a stage's last block: keeps the features."""

    def __init__(self, *where, similarity: str, heads: int):
        super().__init__(*where)
        self.similarity, self.heads = similarity, heads

    def __call__(self, module, args, kwargs, output) -> None:
        feature = output.detach()
        if self.similarity != "ffn":
            part = feature.chunk(3, dim=-1)[PARTS[self.similarity]]
            feature = part.unflatten(-1, (self.heads, -1)).mean(dim=-2)
        self.current.set(self.current.get()._replace(feature=feature))


class Merge(PreHook):
    """On the merging of patches: fills the grid; the features of the tokens to be are means of two by two."""

    def __call__(self, module, args, kwargs):
        x, _, nearest, feature = args[0] if isinstance(args[0], WindowTokens) else WindowTokens(args[0])
        if nearest is not None:
            x = fill(x, nearest)
        if feature is not None:
            feature = feature if nearest is None else fill(feature, nearest)
            planes = feature.flatten(0, 1).movedim(-1, 1)  # (B * T, d, H, W)
            means = nn.functional.avg_pool2d(planes, 2, ceil_mode=True)
            feature = means.movedim(1, -1).unflatten(0, feature.shape[:2])
        self.current.set(WindowTokens(x, feature=feature))
        return (x, *args[1:]), kwargs


class Prune(Hook):
    """On the merging of patches: drops r tokens of each frame; without r it only ends what `Merge` began."""

    def __init__(self, *where, r: int, **options):
        super().__init__(*where)
        self.r, self.options = r, options

    def __call__(self, module, args, kwargs, output):
        feature = self.current.pop().feature
        if not self.r:
            return output
        grid = output.shape[2:4]
        x = output.flatten(2, 3)  # (B, T, N, C)
        if x.shape[2] <= self.r:
            raise ValueError(
                f"STA's r must leave a token of each frame, got one that drops {self.r} of {grid[0]} x {grid[1]} "
                f"after stage {self.i}; lower r, or give larger frames."
            )
        if self.options["scores"] == RANDOM:
            places = torch.arange(x.shape[2], device=x.device).expand(x.shape[:3])
            kept = random_tokens(x, places, self.r, module.training).sort(dim=-1).values
        else:
            draw = self._draw(x, grid, module.training)
            kept = prune(x, feature.flatten(2, 3), self.r, **draw, **self.options).sort(dim=-1).values
        x = tokens_at(x.flatten(0, 1), kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
        return WindowTokens(x, kept, nearest_kept(kept, grid))

    def _draw(self, x: torch.Tensor, grid: tuple[int, int], training: bool) -> dict:
        """What `prune` needs where the first frame's tokens are chosen by their places."""
        if self.options["first_frame"] == "tome":
            return {}
        places = torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1)
        first = x[:, 0 if self.options["direction"] == "F" else -1]
        return {"draw": draw_for(first, places, training), "cells": cells_for(places, grid, self.r)}


def hooks(
    host: BaseHost,
    model: nn.Module,
    r: int | list[int] = 256,
    order: str = "F-B-F",
    first_frame: str = "tome",
    similarity: str = "key",
    scores: str = "both",
) -> list[tuple[nn.Module, Hook]]:
    """STA's hooks.

    Args:
        r: tokens of each frame that are dropped after the first stage; after the second 1.5 r / 4, after the third
            2 r / 16. The paper has 192, 256 and 320 for frames of 224 x 224, of 784, 196 and 49 tokens after the three
            stages. Or a list of the three.
        order, first_frame, similarity, scores: see `STA`; scores "random" drops tokens at random, as a baseline.

    Raises ValueError for bad options; the model's call does where r leaves no token.
    """
    check_choices(order, first_frame, similarity, "both" if scores == RANDOM else scores)
    dropped = dropped_tokens(r)
    if not any(dropped):
        return []
    current = Current()
    stages, merges = host.stages(model), host.merges(model)
    pruned = [False, *map(bool, dropped), False]
    found = []
    for s, blocks in enumerate(stages):
        if not (pruned[s] or pruned[s + 1]):
            continue
        ends = s + 1 == len(stages)
        found += host.pruned_stage(blocks, current, last=ends)  # before a pruning for its features and for speed
        if ends:
            break
        last = blocks[-1]
        if pruned[s + 1]:
            feature = last.mlp if similarity == "ffn" else last.attn.qkv
            found.append((feature, Feature(host, current, similarity=similarity, heads=last.attn.num_heads)))
        options = {"direction": directions(order)[s], "first_frame": first_frame, "scores": scores}
        found.append((merges[s], Merge(host, current)))
        found.append((merges[s], Prune(host, current, s + 1, r=dropped[s], **options)))
    return found


def dropped_tokens(r: int | list[int]) -> list[int]:
    """How many tokens of each frame are dropped after the three stages. Raises ValueError for a bad r."""
    if is_count(r, min=0):
        return [int(r * factor) for factor in FACTORS]
    if not isinstance(r, (list, tuple)) or len(r) != 3 or not all(is_count(n, min=0) for n in r):
        raise ValueError(
            f"STA's r must be a whole number of tokens from 0, or a list of three on VideoSwin, got {r!r}."
        )
    return list(r)
