"""MViT as slow loops in float64, with STTS.

Sources: "Multiscale Vision Transformers" and "MViTv2", torchvision's parameters, and STTS, sections 3 and 4.2.

Letters: T frames, H rows and W columns of a block's grid, C width, d width of a head. Tokens are a class token (C,) and
a dict from (t, row, column) to a vector. `params` is the float64 state_dict of torchvision's MViT, with STTS's scorers
under "compression."; `config` has heads and strides (a list for each block: of the query's pooling, or None, and of the
keys'), v2 (a flag for all that MViTv2 has), patch (stride of the embedding), and its kernel.
"""

import math
from itertools import product

import torch

from .hosts import norm, project
from .inti import gelu, softmax
from .stts import anchor_scores, anchors, frame_scores, keep_count, min_max, raw_scores, top_k


EPS = 1e-6


def places(grid):
    return list(product(*map(range, grid)))


def embed(clip, params, patch, kernel_size):
    """Clip (3, frames, height, width) -> class token, tokens, grid: a convolution, padded by half of its kernel."""
    kernel, bias = params["conv_proj.weight"], params["conv_proj.bias"]
    pad = [k // 2 for k in kernel_size]
    padded = clip.new_zeros(3, *(n + 2 * p for n, p in zip(clip.shape[1:], pad, strict=True)))
    inner = [slice(p, p + n) for n, p in zip(clip.shape[1:], pad, strict=True)]
    padded[(slice(None), *inner)] = clip
    grid = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(clip.shape[1:], pad, kernel_size, patch, strict=True))
    tokens = {}
    for place in places(grid):
        cut = [slice(i * s, i * s + k) for i, s, k in zip(place, patch, kernel_size, strict=True)]
        v = (kernel * padded[(slice(None), *cut)]).sum(dim=(1, 2, 3, 4)) + bias
        if "pos_encoding.spatial_pos" in params:
            v = v + params["pos_encoding.spatial_pos"][place[1] * grid[2] + place[2]]
            v = v + params["pos_encoding.temporal_pos"][place[0]]
        tokens[place] = v
    token = params["pos_encoding.class_token"]
    if "pos_encoding.class_pos" in params:
        token = token + params["pos_encoding.class_pos"]
    return token, tokens, grid


def neighbours(place, grid, stride, kernel):
    """The places under the kernel of an output place, with their place in the kernel; the padding is half a kernel."""
    for offset in places(kernel):
        other = tuple(p * s - k // 2 + o for p, s, k, o in zip(place, stride, kernel, offset, strict=True))
        if all(0 <= i < n for i, n in zip(other, grid, strict=True)):
            yield other, offset


def pooled_grid(grid, stride, kernel):
    return tuple((n + 2 * (k // 2) - k) // s + 1 for n, s, k in zip(grid, stride, kernel, strict=True))


def conv_pool(token, tokens, grid, params, name, stride, heads):
    """A depth-wise 3 x 3 x 3 convolution of every head alike, then a norm of every head; the class token is normed."""
    kernel = params[f"{name}.pool.weight"][:, 0]  # (d, 3, 3, 3)
    d = len(kernel)

    def normed(v):
        parts = [norm(v[h * d : (h + 1) * d], params, f"{name}.norm_act.0", EPS) for h in range(heads)]
        return torch.cat(parts)

    out, new = {}, pooled_grid(grid, stride, (3, 3, 3))
    for place in places(new):
        total = 0
        for other, (a, b, c) in neighbours(place, grid, stride, (3, 3, 3)):
            total = total + kernel[:, a, b, c].repeat(heads) * tokens[other]
        out[place] = normed(total)
    return normed(token), out, new


def max_pool(token, tokens, grid, stride):
    kernel = tuple(s + 1 if s > 1 else s for s in stride)
    new = pooled_grid(grid, stride, kernel)
    out = {}
    for place in places(new):
        out[place] = torch.stack([tokens[other] for other, _ in neighbours(place, grid, stride, kernel)]).amax(dim=0)
    return token, out


def resized(table, n):
    """Linear interpolation of a table (L, d) to (n, d), ends aligned by half a step."""
    if len(table) == n:
        return table
    out = []
    for i in range(n):
        at = max((i + 0.5) * len(table) / n - 0.5, 0.0)
        low = min(int(at), len(table) - 1)
        high = min(low + 1, len(table) - 1)
        out.append(table[low] * (1 - (at - low)) + table[high] * (at - low))
    return torch.stack(out)


def tables_of(grid, key_grid, params, name):
    """MViTv2's relative positions along time, rows and columns, a vector (d,) for each distance."""
    lengths = [2 * max(n, k) - 1 for n, k in zip(grid, key_grid, strict=True)]
    return [resized(params[f"{name}.rel_pos_{letter}"], n) for letter, n in zip("thw", lengths, strict=True)]


def relative(query, place, key_place, grid, key_grid, tables):
    """What is added to the logit of a query (d,) at its place on a key at its place."""
    total = 0
    for axis, table in enumerate(tables):
        n, k = grid[axis], key_grid[axis]
        distance = place[axis] * max(k / n, 1.0) - (key_place[axis] + 1.0 - k) * max(n / k, 1.0)
        total = total + (query * table[int(distance)]).sum()
    return total


def attention(token, tokens, grid, params, name, heads, strides, v2):
    """Normed tokens -> what attention adds: (of the class token, of tokens, grid, its attention to keys, key grid)."""
    stride_q, stride_kv = strides
    together = {place: project(v, params, f"{name}.qkv") for place, v in tokens.items()}
    of_class = project(token, params, f"{name}.qkv")
    C = len(of_class) // 3
    d = C // heads
    parts = []
    for part, stride in enumerate((stride_q, stride_kv, stride_kv)):
        own = slice(part * C, (part + 1) * C)
        cls, vectors, new = of_class[own], {place: v[own] for place, v in together.items()}, grid
        if stride is not None:
            cls, vectors, new = conv_pool(cls, vectors, grid, params, f"{name}.pool_{'qkv'[part]}", stride, heads)
        parts.append((cls, vectors, new))
    (class_q, queries, new), (class_k, keys, key_grid), (class_v, values, _) = parts
    tables = tables_of(new, key_grid, params, name) if v2 else []
    out, seen = {}, {}
    for place in [None, *places(new)]:
        query = class_q if place is None else queries[place]
        heads_out = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            logits = []
            for key_place in [None, *places(key_grid)]:
                key = class_k if key_place is None else keys[key_place]
                logit = (query[own] * key[own]).sum() / math.sqrt(d)
                if v2 and place is not None and key_place is not None:
                    logit = logit + relative(query[own], place, key_place, new, key_grid, tables)
                logits.append(logit)
            shares = softmax(torch.stack(logits))
            everywhere = [class_v[own], *(values[p][own] for p in places(key_grid))]
            heads_out.append(sum(s * v for s, v in zip(shares, everywhere, strict=True)))
            if place is None:
                for p, share in zip(places(key_grid), shares[1:], strict=True):
                    seen[p] = seen.get(p, 0) + share / heads
        attended = torch.cat(heads_out)
        if v2 and place is not None:
            attended = attended + query
        out[place] = project(attended, params, f"{name}.project.0")
    return out.pop(None), out, new, seen, key_grid


def block(token, tokens, grid, params, name, heads, strides, v2):
    """One block: class token, tokens, grid -> the same, and the class token's attention spread over the new grid."""

    def each(function):
        return function(token), {place: function(v) for place, v in tokens.items()}

    cls, normed = each(lambda v: norm(v, params, f"{name}.norm1", EPS))
    added_cls, added, new, seen, key_grid = attention(cls, normed, grid, params, f"{name}.attn", heads, strides, v2)
    widens = f"{name}.project.weight" in params
    if widens and v2:
        token, tokens = project(cls, params, f"{name}.project"), {}
        tokens = {place: project(v, params, f"{name}.project") for place, v in normed.items()}
    if strides[0] is not None and math.prod(strides[0]) > 1:
        token, tokens = max_pool(token, tokens, grid, strides[0])
    token, tokens = token + added_cls, {place: v + added[place] for place, v in tokens.items()}

    def mlp(v):
        v_normed = norm(v, params, f"{name}.norm2", EPS)
        h = project(gelu(project(v_normed, params, f"{name}.mlp.0")), params, f"{name}.mlp.3")
        return (project(v_normed, params, f"{name}.project") if widens and not v2 else v) + h

    token, tokens = each(mlp)
    return token, tokens, new, spread(seen, key_grid, new)


def spread(seen, key_grid, grid):
    """The mean attention to the keys that a token's place covers on the keys' grid."""
    out = {}
    for place in places(grid):
        ranges = [range(i * k // n, -(-(i + 1) * k // n)) for i, k, n in zip(place, key_grid, grid, strict=True)]
        covered = [seen[p] for p in product(*ranges)]
        out[place] = sum(covered) / len(covered)
    return out


def select(tokens, grid, seen, params, temporal, spatial, scorer, choice="stts", unit="anchor", score="token"):
    """`temporal` and `spatial`: None, or (number of the selection, share): tokens, grid -> tokens, grid."""
    T, H, W = grid
    frames = [[(t, row, column) for row in range(H) for column in range(W)] for t in range(T)]
    x = torch.stack([torch.stack([tokens[place] for place in frame]) for frame in frames])  # (T, N, C)
    attention = torch.tensor([[float(seen[place]) for place in frame] for frame in frames]) if seen else None
    if temporal is not None:
        j, share = temporal
        if choice == "attention":
            scores = attention.sum(dim=1)
        else:
            scores = frame_scores(x, params, f"compression.temporal.{j}.scorer", scorer, class_tokens=0)
        kept = top_k(scores, keep_count(T, share))
        x, attention = x[kept], attention[kept] if seen else None
    if spatial is not None:
        j, share = spatial
        prefix = f"compression.spatial.{j}.scorer"
        k = keep_count(H * W, share)
        H = W = math.isqrt(k)
        out = []
        for t, frame in enumerate(x):
            if unit == "token":
                scores = attention[t] if choice == "attention" else raw_scores(frame, params, prefix, scorer)
                out.append(frame[top_k(scores, H * W)])
                continue
            squares = anchors(len(frame), k)
            if choice == "attention":
                scores = torch.stack([attention[t][square].mean() for square in squares])
            elif score == "anchor":
                means = [sum(frame[n] for n in square) / len(square) for square in squares]
                scores = min_max(raw_scores(means, params, prefix, scorer))
            else:
                scores = anchor_scores(frame, squares, params, prefix, scorer)
            out.append(frame[squares[top_k(scores, 1)[0]]])
        x = torch.stack(out)
    new = (len(x), H, W)
    return {place: v for place, v in zip(places(new), x.flatten(0, 1), strict=True)}, new


def mvit(pixel_values, params, config, temporal=(), spatial=(), scorer="released", **options):
    """Clips (B, 3, frames, height, width) -> logits (B, classes); `temporal`, `spatial`: pairs [block, share]."""
    plans = [{i: (j, share) for j, (i, share) in enumerate(plan)} for plan in (temporal, spatial)]
    logits = []
    for clip in pixel_values:
        token, tokens, grid = embed(clip, params, config["patch"], config["kernel"])
        seen = None
        for i, (heads, strides) in enumerate(zip(config["heads"], config["strides"], strict=True)):
            if i in plans[0] or i in plans[1]:
                two = [plan.get(i) for plan in plans]
                tokens, grid = select(tokens, grid, seen, params, *two, scorer, **options)
            token, tokens, grid, seen = block(token, tokens, grid, params, f"blocks.{i}", heads, strides, config["v2"])
        logits.append(project(norm(token, params, "norm", EPS), params, "head.1"))
    return torch.stack(logits)
