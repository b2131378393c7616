"""ToMe as slow loops in float64: similar tokens of one frame are merged inside every block.

Source: "Token Merging: Your ViT But Faster" and what its authors' code does. Everything works on single tokens.

Letters: B clips, T frames, N tokens (class token first if there is one), C (or D) width, d width of the metric.
A group is a list of the original token numbers that one output token stands for.

`params`: the float64 state_dict of a transformers CLIPVisionModel; ToMe has no parameters.
"""

import math

import torch

from .inti import linear, softmax
from .naive import _linear, _norm, quick_gelu
from .pooling import depth, enter, leave


def cosine(v, w):
    """Cosine similarity of two vectors, a number."""
    return float((v * w).sum() / (v.square().sum().sqrt() * w.square().sum().sqrt()))


def matching(metric, r, class_token, distill_token=False):
    """Bipartite soft matching of N tokens by their `metric` (N, d): up to `r` of them are merged into others.

    Tokens at even places look for the most similar token at an odd place; the r best of these pairs merge. The class
    token (place 0) and the distill token (place 1, only beside a class token) take no part. At most half of the other
    tokens go. Returns groups in output order: even places left alone (by place if there is a class token, otherwise
    from the most to the least similar), then all odd places; a distill token comes right after the class token.
    r <= 0 changes nothing, the order neither.
    """
    N = len(metric)
    r = min(r, (N - class_token - distill_token) // 2)
    if r <= 0:
        return [[n] for n in range(N)]
    similarity, partner = {}, {}
    for a in range(0, N, 2):
        similarity[a], partner[a] = -math.inf, None
        if a == 0 and class_token:
            continue
        for b in range(3 if distill_token else 1, N, 2):
            if cosine(metric[a], metric[b]) > similarity[a]:
                similarity[a], partner[a] = cosine(metric[a], metric[b]), b
    ranked = sorted(similarity, key=lambda a: -similarity[a])
    merged, alone = ranked[:r], ranked[r:]
    if class_token:
        alone = sorted(alone)
    evens = [[a] for a in alone]
    odds = [sorted([b] + [a for a in merged if partner[a] == b]) for b in range(1, N, 2)]
    if distill_token:
        return evens[:1] + odds[:1] + evens[1:] + odds[1:]
    return evens + odds


def kth_matching(metric, k):
    """Every k-th of N tokens (places k-1, 2k-1, ...) is kept; each other is merged into the most similar of those.

    `metric` (N, d), N a multiple of k: the authors' code drops a rest, this refuses it. Returns N/k groups in order.
    """
    N = len(metric)
    if k <= 1:
        return [[n] for n in range(N)]
    if N % k:
        raise ValueError(f"got {N} tokens, want a multiple of k = {k}")
    groups = {b: [b] for b in range(k - 1, N, k)}
    for a in range(N):
        if a not in groups:
            best = max(groups, key=lambda b: cosine(metric[a], metric[b]))
            groups[best] = sorted(groups[best] + [a])
    return list(groups.values())


def merge(tokens, sizes, groups):
    """Mean of each group, weighted by `sizes` (N,): tokens (N, C) -> tokens (N', C), sizes (N',)."""
    out_tokens, out_sizes = [], []
    for group in groups:
        size = sum(sizes[n] for n in group)
        out_tokens.append(sum(tokens[n] * sizes[n] for n in group) / size)
        out_sizes.append(size)
    return torch.stack(out_tokens), torch.stack(out_sizes)


def r_schedule(num_layers, r):
    """Tokens to merge in each of `num_layers` blocks, a list of int.

    `r` int: that many everywhere. List: one per block, zeros for those that are missing. Tuple (r, inflection): a line
    whose mean is r and whose start is int(r (1 - inflection)), cut to whole numbers: inflection -1 goes from 2r to 0.
    """
    if isinstance(r, list):
        if len(r) > num_layers:
            raise ValueError(f"got {len(r)} numbers of tokens, want at most one for each of {num_layers} blocks")
        return r + [0] * (num_layers - len(r))
    r, inflection = r if isinstance(r, tuple) else (r, 0)
    if num_layers == 1:
        return [r]
    start = int(r * (1 - inflection))
    end = 2 * r - start
    # Whole numbers throughout: in floating point, as the authors have it, a 30 may come out as 29.999 and be cut to 29.
    return [(start * (num_layers - 1) + i * (end - start)) // (num_layers - 1) for i in range(num_layers)]


def head_mean(v, heads):
    """(D,) -> (D / heads,): mean over the heads."""
    width = len(v) // heads
    return sum(v[h * width : (h + 1) * width] for h in range(heads)) / heads


def attend(queries, keys, values, heads, key_bias=0):
    """Attention head by head, `key_bias` (N,) added to the logits of every query: N vectors (D,) each -> (N, D)."""
    keys, values = torch.stack(list(keys)), torch.stack(list(values))
    width = keys.shape[1] // heads
    out = []
    for query in queries:
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            shares = softmax(linear(query[own], keys[:, own], 0) * width**-0.5 + key_bias)
            parts.append((shares[:, None] * values[:, own]).sum(dim=0))
        out.append(torch.cat(parts))
    return torch.stack(out)


def tome_blocks(tokens, params, *, heads, r, prop_attn, eps=1e-5, activation=quick_gelu):
    """All blocks on one frame: tokens (N, D) -> tokens (N', D), sizes (N',), groups, [r] merged after each attention.

    `r` as in `r_schedule`. With `prop_attn` the log of a key's size is added to its attention logits.
    """
    sizes = tokens.new_ones(len(tokens))
    groups = [[n] for n in range(len(tokens))]
    for i, r_i in enumerate(r_schedule(depth(params), r)):
        name = f"encoder.layers.{i}"
        normed = [_norm(v, params, f"{name}.layer_norm1", eps) for v in tokens]
        queries, keys, values = ([_linear(v, params, f"{name}.self_attn.{p}_proj") for v in normed] for p in "qkv")
        attended = attend(queries, keys, values, heads, torch.log(sizes) if prop_attn else 0)
        tokens = torch.stack(
            [v + _linear(a, params, f"{name}.self_attn.out_proj") for v, a in zip(tokens, attended, strict=True)]
        )
        new_groups = matching([head_mean(key, heads) for key in keys], r_i, class_token=True)
        tokens, sizes = merge(tokens, sizes, new_groups)
        groups = [sorted(n for member in group for n in groups[member]) for group in new_groups]
        out = []
        for v in tokens:
            h = activation(_linear(_norm(v, params, f"{name}.layer_norm2", eps), params, f"{name}.mlp.fc1"))
            out.append(v + _linear(h, params, f"{name}.mlp.fc2"))
        tokens = torch.stack(out)
    return tokens, sizes, groups


def tome_model(pixel_values, params, *, heads, r, prop_attn, eps=1e-5):
    """The whole tower on clips (B, T, 3, height, width), every frame by itself.

    Returns features of the clips (B, D), tokens after the last block (B, T, N', D), their sizes (B, T, N') and
    groups[b][t], the original tokens behind each.
    """
    features, tokens, sizes, groups = [], [], [], []
    for clip in pixel_values:
        frames = [
            tome_blocks(frame, params, heads=heads, r=r, prop_attn=prop_attn, eps=eps)
            for frame in enter(clip, params, eps)
        ]
        tokens.append(torch.stack([frame[0] for frame in frames]))
        sizes.append(torch.stack([frame[1] for frame in frames]))
        groups.append([frame[2] for frame in frames])
        features.append(leave(tokens[-1], params, eps))
    return torch.stack(features), torch.stack(tokens), torch.stack(sizes), groups
