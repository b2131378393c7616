"""LinearPooling and ConvPooling as slow loops in float64, and the CLIP tower cut where a compression goes.

Source: "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (InTI), section 4.2: LinearPooling
"learns fixed linearly weighted coefficients for adjacent frames (all tokens shares)", ConvPooling is "a set of stride
3D convolutions" in InTI's place; the kernel's size is ours to choose.

Letters as in naive.py: B clips, T frames, L tokens per frame (class token first), C (or D) width, i a block, s a stage.

`params`: float64, the state_dict of a transformers CLIPVisionModel, and for stage s
    compression.stages.s.logits (2,)                                          LinearPooling
    compression.stages.s.conv.weight (C, C, K, rows, columns), .conv.bias (C,)         ConvPooling
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


def conv_pooling(x, weight, bias, grid):
    """(T, L, C), T even -> (T/2, L, C): a convolution of stride 2 in time, 1 in space; outside is zero.

    `weight` (C out, C in, K, rows, columns), `bias` (C,). K frames that end with the pair: 2 the frames 2j and 2j+1, 3
    also 2j-1. Patches stand on `grid` (h, w), in row-major order; the class token, first, has no neighbours.
    """
    h, w = grid
    K, rows, columns = weight.shape[2:]
    out = []
    for j in range(len(x) // 2):
        frame = []
        for k in range(x.shape[1]):
            total = bias
            for tap in range(K):
                t = 2 * j + 2 - K + tap
                for a in range(rows):
                    for b in range(columns):
                        row, column = (k - 1) // w + a - rows // 2, (k - 1) % w + b - columns // 2
                        if k == 0:
                            there, token = (a, b) == (rows // 2, columns // 2), 0
                        else:
                            there, token = 0 <= row < h and 0 <= column < w, 1 + row * w + column
                        if t >= 0 and there:  # never past the end: T is even
                            total = total + linear(x[t, token], weight[:, :, tap, a, b], 0)
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
                    side = round((x.shape[1] - 1) ** 0.5)
                    x = conv_pooling(x, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"], (side, side))
        features.append(leave(x, params, eps))
        tokens.append(x)
    return torch.stack(features), torch.stack(tokens)
