"""STA on an off-the-shelf VideoMAE of transformers, as its paper applies it: no training, and no weight is touched.

    model = apply_sta(VideoMAEForVideoClassification.from_pretrained("MCG-NJU/videomae-base-finetuned-kinetics"), r=64)

VideoMAE attends over the tokens of all frames together and has no class token. Forward hooks on three of its blocks
shorten what they return.
"""

import threading

import torch
from transformers import VideoMAEForVideoClassification, VideoMAEModel

from ..model.compression_sta import cells_for, check_choices, directions, draw_for, prune, stage_blocks
from ..model.methods import is_count


SCHEDULES = ("paper", "released")


class _Features:
    """Hook on a projection of a block's attention: keeps the mean over its heads until the block is done."""

    def __init__(self, heads: int):
        self.heads = heads
        self.means = {}  # (B, tokens, head width), by thread: several may use the model at once

    def __call__(self, module, args, output) -> None:
        self.means[_thread()] = output.unflatten(-1, (self.heads, -1)).mean(dim=-2)

    def take(self):
        return self.means.pop(_thread())


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _Prune:
    """Hook on a block: drops r tokens of each of `groups` groups from its output."""

    def __init__(self, features: _Features, tokens: int, groups: int, r: int, direction: str, first_frame: str, grid):
        self.features, self.tokens, self.groups, self.r = features, tokens, groups, r
        self.direction, self.first_frame, self.grid = direction, first_frame, grid

    def __call__(self, module, args, output):
        metric = self.features.take()
        if output.shape[1] != self.tokens:
            raise ValueError(
                f"STA was set up for {self.tokens} tokens in this block, got {output.shape[1]}; give whole clips of "
                "the model's size, without masked positions."
            )
        x = output.unflatten(1, (self.groups, -1))  # (B, G, N, C)
        metric = metric.unflatten(1, (self.groups, -1))
        draw = cells = None
        if self.first_frame != "tome":
            # Of tokens in the order of their scores only the rank is known, which stands for the place.
            places = torch.arange(x.shape[2], device=x.device).expand(x.shape[0], -1)
            draw = draw_for(places, module.training)
            cells = cells_for(places % (self.grid[0] * self.grid[1]), self.grid, self.r)
        kept = prune(x, metric, self.r, self.direction, self.first_frame, draw, cells)
        return x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])).flatten(1, 2)


def _blocks(model):
    if isinstance(model, VideoMAEForVideoClassification):
        model = model.videomae
    if not isinstance(model, VideoMAEModel):
        raise ValueError(
            "token reduction goes with VideoMAEForVideoClassification and VideoMAEModel of transformers, got "
            f"{type(model).__name__}."
        )
    if not model.config.use_mean_pooling:
        raise ValueError("this VideoMAE reads its first token, which would be reduced too; it needs use_mean_pooling.")
    return model.encoder.layer


def remove(model) -> None:
    """Take off what `apply_sta` put on a model."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (_Features, _Prune)):
                del module._forward_hooks[key]


def apply_sta(
    model: VideoMAEForVideoClassification | VideoMAEModel,
    r: int = 64,
    schedule: str = "paper",
    order: str = "F-B-F",
    first_frame: str = "tome",
    similarity: str = "key",
    groups: int | None = None,
):
    """Prune the tokens of a VideoMAE after blocks 1, 1 + L/3 and 1 + 2L/3 from now on; returns the same model.

    Args:
        r: tokens dropped of each group of tokens at the first stage. 0 takes STA off again; another call replaces the
            one before.
        schedule: "paper" halves r from stage to stage, "released", the authors' code, keeps r and halves the number of
            groups by gluing neighbours together: in all as many tokens go.
        order, first_frame, similarity: as of `STA`; "random" and "grid" go by the rank of a token in its group.
        groups: into how many groups the tokens fall; default: the frames after the tubelet embedding, 8 for 16 frames
            (the released code takes 8 whatever the number of frames).

    Raises ValueError for another model or bad options, and where r leaves a group without tokens.
    """
    blocks = _blocks(model)
    check_choices(order, first_frame, similarity)
    if schedule not in SCHEDULES:
        raise ValueError(f"STA's schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    if not is_count(r, min=0):
        raise ValueError(f"STA's r must be a whole number of tokens from 0, got {r!r}.")
    if r == 0:
        remove(model)
        return model
    embeddings = getattr(model, "videomae", model).embeddings.patch_embeddings
    grid = tuple(size // patch for size, patch in zip(embeddings.image_size, embeddings.patch_size, strict=True))
    tokens = embeddings.num_patches
    groups = tokens // (grid[0] * grid[1]) if groups is None else groups
    if not is_count(groups) or tokens % groups:
        raise ValueError(
            f"STA's groups must be a whole number that divides the model's {tokens} tokens, got {groups!r}."
        )
    if schedule == "paper":
        stages = [(groups, r), (groups, r // 2), (groups, r // 4)]
    elif groups % 4:
        raise ValueError(
            f"STA's released schedule halves the groups twice, and {groups} is not a multiple of 4; use 'paper'."
        )
    else:
        stages = [(groups, r), (groups // 2, r), (groups // 4, r)]
    hooks = []
    for block, (number, dropped), direction in zip(stage_blocks(len(blocks)), stages, directions(order), strict=True):
        if tokens // number <= dropped:
            raise ValueError(
                f"STA with r {r} drops {dropped} of a group's {tokens // number} tokens; at least one has to be kept: "
                "lower r."
            )
        if dropped:
            features = _Features(model.config.num_attention_heads)
            hooks.append((getattr(blocks[block - 1].attention.attention, similarity), features))
            hooks.append((blocks[block - 1], _Prune(features, tokens, number, dropped, direction, first_frame, grid)))
        tokens -= number * dropped
    remove(model)
    for module, hook in hooks:
        module.register_forward_hook(hook)
    return model
