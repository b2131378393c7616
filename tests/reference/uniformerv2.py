"""UniFormerV2 on CLIP as slow loops in float64, in evaluation mode; the yardstick for the fast module.

Source: "UniFormerV2: Spatiotemporal Learning by Arming Image ViTs with Video UniFormer", and where the paper
leaves a choice open the behaviour of the authors' released code. Everything works on single tokens, vectors
of length C. Dropout and stochastic depth do nothing in evaluation, so they are not here.

Letters: B clips, T frames, L = 1 + N tokens per frame (class token first, patches in row-major order), N
patches on a grid (rows, columns), C width, r width inside the local unit, S patch size in pixels.
`positions` (T, N) are integers, row * columns + column of every patch token: needed once tokens were dropped
or merged, so that they no longer fill the grid. Left out, the tokens fill it in order.

`params`, float64: the state_dict of a transformers CLIPVisionModel and, with i a block counted from 0,
    adaptation.local1.{i}, adaptation.local2.{i}    the local units: norm.{weight,bias,running_mean,running_var},
        reduce (r, C), conv (r, 1, 3, 1, 1), expand (C, r), each with .weight and .bias
    adaptation.global_blocks.{j}                    the j-th reader: dpe (C, 1, 3, 3, 3), norm_query,
        norm_tokens, q_proj, k_proj, v_proj, out_proj, norm_mlp, fc1, fc2, each with .weight and .bias
    adaptation.query (C,)  adaptation.balance (C,)  adaptation.norm.{weight,bias}
    adaptation.before.weight, adaptation.after.weight (C, 3, S, S)   with temporal downsampling
"""

from itertools import product

import torch

from .inti import sigmoid, softmax
from .naive import _linear, _norm, attention, embed, quick_gelu


LOCAL = ("none", "single", "double")


# The operations, on vectors.


def stack_tokens(tokens):
    """T lists of L vectors (C,) -> (T, L, C)."""
    return torch.stack([torch.stack(frame) for frame in tokens])


def mlp(v, params, name):
    """(C,) -> (C,): Linear, quick GELU, Linear, called `name`.fc1 and `name`.fc2."""
    return _linear(quick_gelu(_linear(v, params, f"{name}.fc1")), params, f"{name}.fc2")


def attend(query, keys, values, heads):
    """One query (C,) looks at n keys and n values (C,) -> (C,), head by head."""
    width = len(query) // heads
    parts = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        products = [(query[own] * key[own]).sum() * width**-0.5 for key in keys]
        shares = softmax(torch.stack(products))
        parts.append(sum(share * value[own] for share, value in zip(shares, values, strict=True)))
    return torch.cat(parts)


def everywhere(T, grid):
    """Positions (T, rows * columns) of tokens that fill the grid in order."""
    return torch.arange(grid[0] * grid[1]).expand(T, -1)


def places(positions, grid):
    """Positions (T, N) -> T lists of N places (t, row, column). ValueError for one off the grid or taken twice."""
    out = []
    for t, frame in enumerate(positions.tolist()):
        if len(set(frame)) < len(frame) or not set(frame) <= set(range(grid[0] * grid[1])):
            raise ValueError(f"got positions {frame} in frame {t}, want different places on a grid of {grid}")
        out.append([(t, position // grid[1], position % grid[1]) for position in frame])
    return out


def depthwise_conv(volume, weight, bias):
    """{(t, row, column): (C,)} -> {same places: (C,)}; `weight` (C, 1, kt, kh, kw), odd sizes, `bias` (C,).

    Each output is centred on its own place. A place that is not in `volume` counts as zero, be it outside the
    grid (zero padding) or a hole in it.
    """
    kt, kh, kw = weight.shape[2:]
    out = {}
    for t, row, column in volume:
        total = bias
        for a, b, c in product(range(kt), range(kh), range(kw)):
            place = (t + a - kt // 2, row + b - kh // 2, column + c - kw // 2)
            if place in volume:
                total = total + weight[:, 0, a, b, c] * volume[place]
        out[t, row, column] = total
    return out


# Local MHRA.


def batch_statistics(clips):
    """(B, T, N, C) -> mean (C,) and biased variance (C,) over clips, frames and places, as in training."""
    tokens = [clips[index] for index in product(*map(range, clips.shape[:3]))]
    mean = sum(tokens) / len(tokens)
    return mean, sum((v - mean) * (v - mean) for v in tokens) / len(tokens)


def local_mhra_irregular(tokens, positions, grid, params, name, *, statistics=None, eps=1e-5):
    """Patch tokens (T, N, C) at `positions` (T, N) -> what the unit called `name` adds to them (T, N, C).

    BatchNorm and the reduction see the tokens, the convolution over time sees the grid with zeros at the
    empty places, the expansion sees the tokens again. `statistics` is (mean, variance), each (C,), in place of
    the running ones.
    """
    if statistics is None:
        statistics = params[f"{name}.norm.running_mean"], params[f"{name}.norm.running_var"]
    mean, variance = statistics
    at = places(positions, grid)
    narrow = {}
    for frame, spots in zip(tokens, at, strict=True):
        for v, spot in zip(frame, spots, strict=True):
            normed = (v - mean) / torch.sqrt(variance + eps)
            normed = normed * params[f"{name}.norm.weight"] + params[f"{name}.norm.bias"]
            narrow[spot] = _linear(normed, params, f"{name}.reduce")
    mixed = depthwise_conv(narrow, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"])
    return stack_tokens([[_linear(mixed[spot], params, f"{name}.expand") for spot in spots] for spots in at])


def local_mhra(patches, params, name, *, statistics=None, eps=1e-5):
    """Patches (T, rows, columns, C) -> what the unit called `name` adds to them, the same shape."""
    T, *grid, _ = patches.shape
    gain = local_mhra_irregular(
        patches.flatten(1, 2), everywhere(T, grid), grid, params, name, statistics=statistics, eps=eps
    )
    return gain.reshape(patches.shape)


# The block of the tower, and the block that reads it.


def _add_local(x, params, name, grid, positions):
    gain = local_mhra_irregular(x[:, 1:], positions, grid, params, name)
    return torch.cat([x[:, :1], x[:, 1:] + gain], dim=1)


def block(x, params, i, *, heads, grid, local="none", positions=None, eps=1e-5):
    """Tokens (T, L, C) of one clip -> (T, L, C): block i of the tower, counted from 0.

    `local` "single" puts a local unit on the patches before attention, "double" a second one before the MLP;
    class tokens pass both by.
    """
    if local not in LOCAL:
        raise ValueError(f"got local {local!r}, want one of {LOCAL}")
    if positions is None:
        positions = everywhere(len(x), grid)
    name = f"encoder.layers.{i}"
    if local != "none":
        x = _add_local(x, params, f"adaptation.local1.{i}", grid, positions)
    frames = []
    for frame in x:
        normed = [_norm(v, params, f"{name}.layer_norm1", eps) for v in frame]
        attended = attention(normed, params, f"{name}.self_attn", heads)
        frames.append([v + a for v, a in zip(frame, attended, strict=True)])
    x = stack_tokens(frames)
    if local == "double":
        x = _add_local(x, params, f"adaptation.local2.{i}", grid, positions)
    return stack_tokens(
        [[v + mlp(_norm(v, params, f"{name}.layer_norm2", eps), params, f"{name}.mlp") for v in frame] for frame in x]
    )


def add_position(tokens, positions, grid, params, name):
    """DPE: patch tokens (T, N, C) -> (T, N, C), each plus the 3 x 3 x 3 convolution around its place."""
    at = places(positions, grid)
    volume = {}
    for frame, spots in zip(tokens, at, strict=True):
        for v, spot in zip(frame, spots, strict=True):
            volume[spot] = v
    gain = depthwise_conv(volume, params[f"{name}.weight"], params[f"{name}.bias"])
    return stack_tokens([[volume[spot] + gain[spot] for spot in spots] for spots in at])


def global_block(query, tokens, grid, params, j, *, heads, positions=None, eps=1e-5):
    """The video's token `query` (C,) reads all tokens (T, L, C) of a block -> the new query (C,)."""
    name = f"adaptation.global_blocks.{j}"
    if positions is None:
        positions = everywhere(len(tokens), grid)
    patches = add_position(tokens[:, 1:], positions, grid, params, f"{name}.dpe")
    read = [*tokens[:, 0], *patches.flatten(0, 1)]  # their order does not matter to attention
    normed = [_norm(v, params, f"{name}.norm_tokens", eps) for v in read]
    keys = [_linear(v, params, f"{name}.k_proj") for v in normed]
    values = [_linear(v, params, f"{name}.v_proj") for v in normed]
    asked = _linear(_norm(query, params, f"{name}.norm_query", eps), params, f"{name}.q_proj")
    query = query + _linear(attend(asked, keys, values, heads), params, f"{name}.out_proj")
    return query + mlp(_norm(query, params, f"{name}.norm_mlp", eps), params, name)


# The whole model.


def patches_in_time(clip, params):
    """Clip (T, 3, height, width) -> ceil(T / 2) lists of L tokens (C,), before any LayerNorm.

    The patch embedding reaches over three frames: output frame j is CLIP's embedding of frame 2j, plus frame
    2j - 1 through `before` and frame 2j + 1 through `after`. Frames that do not exist are zeros.
    """
    S = params["embeddings.patch_embedding.weight"].shape[-1]
    out = []
    for t in range(0, len(clip), 2):
        tokens = embed(clip[t], params)
        for name, other in (("before", t - 1), ("after", t + 1)):
            if not 0 <= other < len(clip):
                continue
            kernel = params[f"adaptation.{name}.weight"]
            corners = product(range(clip.shape[2] // S), range(clip.shape[3] // S))
            for k, (row, column) in enumerate(corners, start=1):
                patch = clip[other, :, row * S : (row + 1) * S, column * S : (column + 1) * S]
                tokens[k] = tokens[k] + (kernel * patch).sum(dim=(1, 2, 3))
        out.append(tokens)
    return out


def halve(x):
    """(T, L, C) -> (T/2, L, C): the mean of each pair of neighbouring frames."""
    if len(x) % 2:
        raise ValueError(f"got {len(x)} frames to halve, want an even number")
    return torch.stack([(x[t] + x[t + 1]) / 2 for t in range(0, len(x), 2)])


def depth(params):
    """Number of blocks of the tower."""
    i = 0
    while f"encoder.layers.{i}.layer_norm1.weight" in params:
        i += 1
    return i


def _clip(clip, params, heads, global_layers, local, temporal_downsample, frozen, halve_after, eps):
    """One clip (T, 3, height, width) -> feature (C,), tokens (T', L, C)."""
    S = params["embeddings.patch_embedding.weight"].shape[-1]
    grid = clip.shape[2] // S, clip.shape[3] // S
    x = patches_in_time(clip, params) if temporal_downsample else [embed(image, params) for image in clip]
    x = stack_tokens([[_norm(v, params, "pre_layrnorm", eps) for v in frame] for frame in x])
    query = params["adaptation.query"] if global_layers else None
    for i in range(depth(params)):
        x = block(x, params, i, heads=heads, grid=grid, local=local, eps=eps)
        if i + 1 in halve_after:
            x = halve(x)
        if i + 1 in global_layers:
            query = global_block(query, x, grid, params, global_layers.index(i + 1), heads=heads, eps=eps)
    if not global_layers:
        return sum(_norm(v, params, "post_layernorm", eps) for v in x[:, 0]) / len(x), x
    if not frozen:
        share = sigmoid(params["adaptation.balance"])
        query = (1 - share) * query + share * sum(x[:, 0]) / len(x)
    return _norm(query, params, "adaptation.norm", eps), x


def model(
    pixel_values,
    params,
    *,
    heads,
    global_layers,
    local="none",
    temporal_downsample=False,
    frozen=False,
    halve_after=(),
    eps=1e-5,
):
    """Clips (B, T, 3, height, width), float64 -> feature (B, C) that the classifier sees, tokens (B, T', L, C).

    `global_layers`, ascending, and `halve_after` are blocks counted from 1. After a block in `halve_after`
    neighbouring frames are averaged, and only then a global block reads. The tokens are those after the last
    block (and after its halving); `frozen` leaves their class tokens out of the feature. Without `global_layers` there
    is no video token: the feature is the mean of the frames' class tokens after CLIP's last LayerNorm.
    """
    clips = [
        _clip(clip, params, heads, list(global_layers), local, temporal_downsample, frozen, halve_after, eps)
        for clip in pixel_values
    ]
    return torch.stack([feature for feature, _ in clips]), torch.stack([tokens for _, tokens in clips])
