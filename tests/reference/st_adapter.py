"""ST-Adapter as slow loops in float64, in evaluation mode; the yardstick for the fast module.

Source: "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning", and where the paper leaves a choice
open the behaviour of the authors' released code (no activation inside, class tokens pass by). Everything works
on single tokens, vectors of length C.

Letters: B clips, T frames, L = 1 + N tokens per frame (class token first, patches in row-major order), C width,
r width inside an adapter.

`params`, float64: the state_dict of a transformers CLIPVisionModel and, with n an adapter counted from 0 in
the first block that has one,
    adaptation.{pre_attention,pre_mlp}.{n}: down (r, C), conv (r, 1, kt, kh, kw), up (C, r), each .weight, .bias
"""

import torch

from .naive import _linear, _norm, attention, embed
from .uniformerv2 import depth, depthwise_conv, everywhere, mlp, places, stack_tokens


def adapter(x, params, name, *, grid, positions=None):
    """Tokens (T, 1 + N, C) -> the same shape: patches plus the adapter called `name`, class tokens as they are.

    `grid` is (rows, columns). `positions` (T, N), row * columns + column of every patch token, is for tokens
    that do not fill the grid in order: the convolution sees zeros at the empty places.
    """
    at = places(everywhere(len(x), grid) if positions is None else positions, grid)
    narrow = {}
    for frame, spots in zip(x, at, strict=True):
        for v, spot in zip(frame[1:], spots, strict=True):
            narrow[spot] = _linear(v, params, f"{name}.down")
    mixed = depthwise_conv(narrow, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"])
    out = []
    for frame, spots in zip(x, at, strict=True):
        patches = [v + _linear(mixed[spot], params, f"{name}.up") for v, spot in zip(frame[1:], spots, strict=True)]
        out.append([frame[0], *patches])
    return stack_tokens(out)


def block(x, params, i, *, heads, grid, pre_attention=None, pre_mlp=None, eps=1e-5):
    """Tokens (T, L, C) of one clip -> (T, L, C): block i, counted from 0.

    `pre_attention` and `pre_mlp` are the names in `params` of its adapters, None where it has none.
    """
    name = f"encoder.layers.{i}"
    if pre_attention is not None:
        x = adapter(x, params, pre_attention, grid=grid)
    frames = []
    for frame in x:
        normed = [_norm(v, params, f"{name}.layer_norm1", eps) for v in frame]
        attended = attention(normed, params, f"{name}.self_attn", heads)
        frames.append([v + a for v, a in zip(frame, attended, strict=True)])
    x = stack_tokens(frames)
    if pre_mlp is not None:
        x = adapter(x, params, pre_mlp, grid=grid)
    return stack_tokens(
        [[v + mlp(_norm(v, params, f"{name}.layer_norm2", eps), params, f"{name}.mlp") for v in frame] for frame in x]
    )


def model(pixel_values, params, *, heads, pre_attention, pre_mlp, num_layers, eps=1e-5):
    """Clips (B, T, 3, height, width), float64 -> feature of each (B, C).

    `pre_attention` and `pre_mlp` are booleans: where the adapters stand, in each of the last `num_layers`
    blocks. The feature is post_layernorm of the mean over frames of the class tokens, in this order.
    """
    S = params["embeddings.patch_embedding.weight"].shape[-1]
    grid = pixel_values.shape[3] // S, pixel_values.shape[4] // S
    features = []
    for clip in pixel_values:
        x = stack_tokens([[_norm(v, params, "pre_layrnorm", eps) for v in embed(image, params)] for image in clip])
        for i in range(depth(params)):
            n = i - (depth(params) - num_layers)
            names = {
                "pre_attention": f"adaptation.pre_attention.{n}" if pre_attention and n >= 0 else None,
                "pre_mlp": f"adaptation.pre_mlp.{n}" if pre_mlp and n >= 0 else None,
            }
            x = block(x, params, i, heads=heads, grid=grid, **names, eps=eps)
        features.append(_norm(sum(x[:, 0]) / len(x), params, "post_layernorm", eps))
    return torch.stack(features)
