"""STA on an off-the-shelf VideoMAE of transformers, as its paper applies it: no training, no change of weights.

    model = apply_sta(VideoMAEForVideoClassification.from_pretrained("MCG-NJU/videomae-base-finetuned-kinetics"), r=64)

VideoMAE attends over the tokens of all frames together and has no class token. Forward hooks on three of its blocks
shorten their outputs.
"""

import threading

import torch
from transformers import VideoMAEForVideoClassification, VideoMAEModel

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
from ..model.methods import is_count


RELEASED = "released"  # the authors' code's schedule, which the paper does not have


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _Features:
    """Hook on a projection of a block: keeps its output (B, tokens, heads * d), averaged over heads, for the block."""

    def __init__(self, heads: int):
        self.heads = heads
        self.means = {}  # (B, tokens, d) by thread: several threads may use the model at once

    def __call__(self, module, args, output) -> None:
        self.means[_thread()] = output.unflatten(-1, (self.heads, -1)).mean(dim=-2)

    def take(self) -> torch.Tensor:
        return self.means.pop(_thread())


class _Prune:
    """Hook on a block: drops r tokens from each of `groups` groups of its output (B, tokens, C).

    Tokens come out in order of score, so each stage keeps their spatial places (B, tokens) for the one after it,
    `previous` of which it is. They stay until the next forward pass: activation checkpointing runs a block again.
    """

    def __init__(self, features: _Features, previous: "_Prune | None", tokens: int, groups: int, grid, **options):
        self.features, self.previous = features, previous
        self.tokens, self.groups, self.grid, self.options = tokens, groups, grid, options
        self.places, self.latest = {}, None  # by thread, and whatever the thread: checkpointing may use another

    def __call__(self, module, args, output):
        metric = self.features.take()
        if output.shape[1] != self.tokens:
            raise ValueError(
                f"STA was set up for {self.tokens} tokens in this block, got {output.shape[1]}; give whole clips of "
                "the model's size, without masked positions."
            )
        x = output.unflatten(1, (self.groups, -1))  # (B, G, N, C)
        places = self._places_before(output).unflatten(1, (self.groups, -1))
        draw = cells = None
        if self.options["first_frame"] != "tome":
            g = 0 if self.options["direction"] == "F" else -1
            draw = draw_for(x[:, g], places[:, g], module.training)
            cells = cells_for(places[:, g], self.grid, self.options["r"])
        kept = prune(x, metric.unflatten(1, (self.groups, -1)), draw=draw, cells=cells, **self.options)
        self.latest = self.places[_thread()] = places.gather(2, kept).flatten(1, 2)
        return x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])).flatten(1, 2)

    def _places_before(self, output: torch.Tensor) -> torch.Tensor:
        if self.previous is not None:
            return self.previous.places.get(_thread(), self.previous.latest)
        each = torch.arange(self.tokens, device=output.device) % (self.grid[0] * self.grid[1])
        return each.expand(output.shape[0], -1)


def _blocks(model):
    if isinstance(model, VideoMAEForVideoClassification):
        model = model.videomae
    if not isinstance(model, VideoMAEModel):
        raise ValueError(
            "the model must be a VideoMAEForVideoClassification or VideoMAEModel of transformers, got "
            f"{type(model).__name__}."
        )
    if not model.config.use_mean_pooling:
        raise ValueError(
            "the VideoMAE must use mean pooling, got one that reads its first token, which STA may drop; set "
            "use_mean_pooling."
        )
    return model.encoder.layer


def remove(model: VideoMAEForVideoClassification | VideoMAEModel) -> None:
    """Undo `apply_sta`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (_Features, _Prune)):
                del module._forward_hooks[key]


def apply_sta(
    model: VideoMAEForVideoClassification | VideoMAEModel,
    r: int = 64,
    schedule: str = "decreasing",
    order: str = "F-B-F",
    first_frame: str = "tome",
    similarity: str = "key",
    scores: str = "both",
    groups: int | None = None,
) -> VideoMAEForVideoClassification | VideoMAEModel:
    """Prune the tokens of a VideoMAE after blocks 1, 1 + L/3 and 1 + 2L/3 from now on; returns the same model.

    Args:
        r: tokens that the first stage drops from each group. 0 undoes it; another call replaces the one before.
        schedule: "decreasing", "constant" or "increasing" as in the paper, see `STA`, or "released": the authors' code
            keeps r and halves the number of groups at each stage by joining neighbours, dropping as many tokens in
            total as "decreasing".
        order, first_frame, similarity, scores: see `STA`.
        groups: into how many groups the tokens are divided; default: one for each frame after the tubelet embedding, 8
            for 16 frames (the released code has 8 whatever the number of frames).

    Raises ValueError for another model or bad options, and where r leaves a group without tokens.
    """
    blocks = _blocks(model)
    check_choices(order, first_frame, similarity, scores)
    if schedule not in (*SCHEDULES, RELEASED):
        raise ValueError(f"STA's schedule must be one of {', '.join((*SCHEDULES, RELEASED))}, got {schedule!r}.")
    embeddings = getattr(model, "videomae", model).embeddings.patch_embeddings
    grid = tuple(size // patch for size, patch in zip(embeddings.image_size, embeddings.patch_size, strict=True))
    tokens = embeddings.num_patches
    groups = tokens // (grid[0] * grid[1]) if groups is None else groups
    if not is_count(groups) or tokens % groups:
        raise ValueError(
            f"STA's groups must be a whole number that divides the model's {tokens} tokens, got {groups!r}."
        )
    previous, hooks = None, []
    stages = zip(stage_blocks(len(blocks)), _stages(r, schedule, groups), directions(order), strict=True)
    for number, (in_groups, dropped), direction in stages:
        if tokens // in_groups <= dropped:
            raise ValueError(
                f"STA's r must leave a token in each group, got {r}, which drops {dropped} of a group's "
                f"{tokens // in_groups}; lower r."
            )
        block = blocks[number - 1]
        features = _Features(1 if similarity == "ffn" else model.config.num_attention_heads)
        options = {"r": dropped, "direction": direction, "first_frame": first_frame, "scores": scores}
        hooks.append((_projection(block, similarity), features))
        previous = _Prune(features, previous, tokens, in_groups, grid, **options)
        hooks.append((block, previous))
        tokens -= in_groups * dropped
    remove(model)
    if r:
        for module, hook in hooks:
            module.register_forward_hook(hook)
    return model


def _stages(r: int, schedule: str, groups: int) -> list[tuple[int, int]]:
    """Number of groups and tokens dropped from each, at the three stages."""
    if schedule != RELEASED:
        return [(groups, dropped) for dropped in dropped_tokens(r, schedule)]
    if groups % 4:
        raise ValueError(
            f"STA's groups must be a multiple of 4 with schedule {RELEASED!r}, which halves them twice, got {groups}; "
            "choose 'decreasing'."
        )
    return [(groups // 2**stage, dropped) for stage, dropped in enumerate(dropped_tokens(r, "constant"))]


def _projection(block, similarity: str) -> torch.nn.Module:
    return block.output.dense if similarity == "ffn" else getattr(block.attention.attention, similarity)
