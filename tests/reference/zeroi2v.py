"""ZeroI2V as slow loops in float64, in evaluation mode; the yardstick for the fast module.

Source: "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video" (STDHA and linear
adapters that merge into the tower), and where the paper leaves a choice open the behaviour of the authors'
released code. Everything works on single tokens, vectors of length C.

Letters: B clips, T frames, L tokens per frame (class token first), C width, r width inside an adapter,
T0 frames that the temporal embedding was made for.

`params`, float64: the state_dict of a transformers CLIPVisionModel and, with i a block counted from 0,
    adaptation.temporal_embedding.P (T0, 1, C)
    adaptation.{attention_in,attention_out,mlp_in,mlp_out}.{i}: down (r, C), up (C, r), each .weight and .bias;
        mlp_out only where num_tadapter is 2
"""

import torch

from .inti import interpolate_time
from .naive import _linear, _norm, embed
from .uniformerv2 import attend, depth, mlp, stack_tokens


def channel_groups(shifts, heads, C):
    """{offset in frames: number of heads} -> [(first channel, last channel + 1, offset)].

    Channels are given out from 0 on to the offsets -1, 1, -2, 2, ... ; numbers of heads may be fractions that
    make whole channels. ValueError where they do not, or where there are not enough channels.
    """
    groups, start = [], 0
    for offset in sorted(shifts, key=lambda offset: (abs(offset), offset > 0)):
        width = shifts[offset] * C / heads
        if abs(width - round(width)) > 1e-9 or start + round(width) > C:
            raise ValueError(f"got shifts {shifts} for {heads} heads in {C} channels, want whole channels that fit")
        groups.append((start, start + round(width), offset))
        start += round(width)
    return groups


def shift(k, groups):
    """(T, L, C) -> (T, L, C): channels from..to of frame t come from frame t + offset, if there is one."""
    T, L, _ = k.shape
    out = []
    for t in range(T):
        frame = []
        for n in range(L):
            parts, done = [], 0
            for start, stop, offset in groups:
                source = t + offset if 0 <= t + offset < T else t
                parts.append(k[source, n, start:stop])
                done = stop
            frame.append(torch.cat([*parts, k[t, n, done:]]))
        out.append(frame)
    return stack_tokens(out)


def attention(x, params, name, heads, groups):
    """(T, L, C) -> (T, L, C): attention within every frame, its keys and values shifted along time first."""
    queries, keys, values = (
        stack_tokens([[_linear(v, params, f"{name}.{kind}_proj") for v in frame] for frame in x]) for kind in "qkv"
    )
    keys, values = shift(keys, groups), shift(values, groups)
    out = []
    for t in range(len(x)):
        read = [attend(query, list(keys[t]), list(values[t]), heads) for query in queries[t]]
        out.append([_linear(v, params, f"{name}.out_proj") for v in read])
    return stack_tokens(out)


def adapter(v, params, name, scale):
    """(C,) -> (C,): v + scale (up(down v)), nothing in between, so that it is one affine map."""
    return v + scale * _linear(_linear(v, params, f"{name}.down"), params, f"{name}.up")


def block(x, params, i, *, heads, groups, scale, num_tadapter, eps=1e-5):
    """Tokens (T, L, C) of one clip -> (T, L, C): block i, counted from 0, with its linear adapters."""
    name = f"encoder.layers.{i}"

    def adapt(v, place):
        return adapter(v, params, f"adaptation.{place}.{i}", scale)

    h = [[adapt(_norm(v, params, f"{name}.layer_norm1", eps), "attention_in") for v in frame] for frame in x]
    attended = attention(stack_tokens(h), params, f"{name}.self_attn", heads, groups)
    x = stack_tokens(
        [[v + adapt(a, "attention_out") for v, a in zip(*both, strict=True)] for both in zip(x, attended, strict=True)]
    )
    out = []
    for frame in x:
        tokens = []
        for v in frame:
            h = mlp(adapt(_norm(v, params, f"{name}.layer_norm2", eps), "mlp_in"), params, f"{name}.mlp")
            tokens.append(v + (adapt(h, "mlp_out") if num_tadapter == 2 else h))
        out.append(tokens)
    return stack_tokens(out)


def embed_clip(clip, params, eps=1e-5):
    """Clip (T, 3, height, width) -> (T, L, C): CLIP's tokens plus their frame's embedding, then pre_layrnorm."""
    moments = interpolate_time(params["adaptation.temporal_embedding.P"], len(clip))
    return stack_tokens(
        [
            [_norm(v + moment, params, "pre_layrnorm", eps) for v in embed(image, params)]
            for image, moment in zip(clip, moments, strict=True)
        ]
    )


def mean_class_token(x, params, eps=1e-5):
    """Tokens (T, L, C) -> (C,): the mean over frames of post_layernorm of the class tokens."""
    return sum(_norm(frame[0], params, "post_layernorm", eps) for frame in x) / len(x)


def model(pixel_values, params, *, heads, shifts, scale, num_tadapter, eps=1e-5):
    """Clips (B, T, 3, height, width), float64 -> feature of each (B, C).

    `shifts` as in `channel_groups`; the groups are the same in all blocks. `scale` is the adapters'.
    """
    groups = channel_groups(shifts, heads, len(params["pre_layrnorm.weight"]))
    features = []
    for clip in pixel_values:
        x = embed_clip(clip, params, eps)
        for i in range(depth(params)):
            x = block(x, params, i, heads=heads, groups=groups, scale=scale, num_tadapter=num_tadapter, eps=eps)
        features.append(mean_class_token(x, params, eps))
    return torch.stack(features)


# Merging: the same block without adapters.


def _affine(params, name, scale):
    """The adapter called `name` as v -> M v + c: M as C rows (C,), c (C,)."""
    down, up = params[f"{name}.down.weight"], params[f"{name}.up.weight"]  # (r, C), (C, r)
    M = []
    for a in range(len(up)):
        row = scale * sum(up[a, h] * down[h] for h in range(len(down)))
        own = torch.zeros_like(row)
        own[a] = 1
        M.append(row + own)
    return M, scale * _linear(params[f"{name}.down.bias"], params, f"{name}.up")


def _after(params, linear, M, c):
    """M (W v + b) + c as one Linear: weight, bias."""
    weight, bias = params[f"{linear}.weight"], params[f"{linear}.bias"]
    rows = [sum(row[k] * weight[k] for k in range(len(row))) for row in M]
    return torch.stack(rows), torch.stack([(row * bias).sum() for row in M]) + c


def _before(params, linear, M, c):
    """W (M v + c) + b as one Linear: weight, bias."""
    rows = [sum(row[k] * M[k] for k in range(len(M))) for row in params[f"{linear}.weight"]]
    moved = torch.stack([(row * c).sum() for row in params[f"{linear}.weight"]])
    return torch.stack(rows), moved + params[f"{linear}.bias"]


def merge_block(params, i, *, scale, num_tadapter):
    """The Linears of block i, counted from 0, with the adapters inside: {CLIP's name: tensor}, shapes as before.

    A block with these weights and without adapters, but with the same shift, gives the same output.
    """
    name = f"encoder.layers.{i}"
    merges = [(_before, f"self_attn.{kind}_proj", "attention_in") for kind in "qkv"]
    merges += [(_after, "self_attn.out_proj", "attention_out"), (_before, "mlp.fc1", "mlp_in")]
    if num_tadapter == 2:
        merges.append((_after, "mlp.fc2", "mlp_out"))
    merged = {}
    for merge, linear, place in merges:
        weight, bias = merge(params, f"{name}.{linear}", *_affine(params, f"adaptation.{place}.{i}", scale))
        merged |= {f"{name}.{linear}.weight": weight, f"{name}.{linear}.bias": bias}
    return merged
