"""LinearPooling and ConvPooling as slow loops in float64, and the CLIP tower cut where a compression goes.

Source: "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (InTI), section 4.2: LinearPooling
"learns fixed linearly weighted coefficients for adjacent frames (all tokens shares)", ConvPooling is "a set of stride
3D convolutions" in InTI's place; the kernel (3, 1, 1) over time is our reading of it.

Letters as in naive.py: B clips, T frames, L tokens per frame (class token first), C (or D) width, i a block, s a stage.

`params`: float64, the state_dict of a transformers CLIPVisionModel, and for stage s
    compression.stages.s.logits (2,)                                          LinearPooling
    compression.stages.s.conv.weight (C, C, 3, 1, 1), .conv.bias (C,)         ConvPooling
"""

import torch

from .inti import linear, softmax
from .naive import _norm, block, embed


# The tower in pieces, for all the compressions.


def depth(params):
    """The number of blocks that `params` has."""
    i = 0
    while f"encoder.layers.{i}.layer_norm1.weight" in params:
        i += 1
    return i


def enter(clip, params, eps):
    """A clip (T, 3, height, width) -> what the first block gets (T, L, D)."""
    return torch.stack([torch.stack([_norm(v, params, "pre_layrnorm", eps) for v in embed(f, params)]) for f in clip])


def spatial_block(x, params, i, heads, eps):
    """Block i, counted from 0, on every frame by itself: (T, L, D) -> (T, L, D)."""
    return torch.stack([torch.stack(block(list(frame), params, i, heads, eps)) for frame in x])


def leave(x, params, eps):
    """Tokens after the last block (T, L, D) -> the clip's feature (D,): mean of the normed class tokens."""
    return sum(_norm(frame[0], params, "post_layernorm", eps) for frame in x) / len(x)


# The two poolings.


def linear_pooling(x, logits):
    """(T, L, C), T even -> (T/2, L, C): every token of a pair of frames with the two weights softmax(`logits` (2,))."""
    weights = softmax(logits)
    out = []
    for j in range(len(x) // 2):
        out.append(torch.stack([weights[0] * x[2 * j, k] + weights[1] * x[2 * j + 1, k] for k in range(x.shape[1])]))
    return torch.stack(out)


def conv_pooling(x, weight, bias):
    """(T, L, C), T even -> (T/2, L, C): output frame j sees the frames 2j-1, 2j, 2j+1 of its token; outside is zero.

    `weight` (C out, C in, 3, 1, 1), `bias` (C,).
    """
    out = []
    for j in range(len(x) // 2):
        frame = []
        for k in range(x.shape[1]):
            total = bias
            for tap in range(3):
                if 2 * j + tap - 1 >= 0:  # never past the end: T is even
                    total = total + linear(x[2 * j + tap - 1, k], weight[:, :, tap, 0, 0], 0)
            frame.append(total)
        out.append(torch.stack(frame))
    return torch.stack(out)


def pooling_model(pixel_values, params, *, heads, kind, layers, eps=1e-5):
    """The whole tower on clips (B, T, 3, height, width), frames halved after each block of `layers`.

    `kind` is "linear_pooling" or "conv_pooling"; `layers` ascending, counted from 1, 0 = before the first block.
    Returns features of the clips (B, D) and the tokens after the last block and its pooling, if any (B, T', L, D).
    """
    features, tokens = [], []
    for clip in pixel_values:
        x = enter(clip, params, eps)
        for i in range(depth(params) + 1):
            if i > 0:
                x = spatial_block(x, params, i - 1, heads, eps)
            for s, layer in enumerate(layers):
                name = f"compression.stages.{s}"
                if layer == i and kind == "linear_pooling":
                    x = linear_pooling(x, params[f"{name}.logits"])
                elif layer == i and kind == "conv_pooling":
                    x = conv_pooling(x, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"])
        features.append(leave(x, params, eps))
        tokens.append(x)
    return torch.stack(features), torch.stack(tokens)
