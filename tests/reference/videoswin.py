"""VideoSwin as slow loops in float64, with STA and STTS.

Sources: "Video Swin Transformer" and torchvision's parameters; STA, section 4: dropped places get the nearest kept
token in window attention, tokens leave after the merging at the end of stages 1 to 3 (`sta_windows.py` says why there);
STTS, section 4.2, which selects in front of a stage.

Letters: T frames, H rows and W columns of a stage's grid, C width. A clip's tokens are a dict from (t, row, column) to
a vector (C,), which holds the kept places alone. `params` is the float64 state_dict of torchvision's SwinTransformer3d;
`config` has patch, depths, heads, window (three numbers).
"""

import math
from itertools import product

import torch

from .hosts import norm, project
from .inti import gelu, softmax
from .mvit import select
from .sta import prune


EPS = 1e-5


def embed(clip, params, patch):
    """Clip (3, frames, height, width), padded with zeros to whole patches -> tokens, and their grid."""
    kernel, bias = params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]
    grid = tuple(math.ceil(n / p) for n, p in zip(clip.shape[1:], patch, strict=True))
    padded = clip.new_zeros(3, *(n * p for n, p in zip(grid, patch, strict=True)))
    padded[:, : clip.shape[1], : clip.shape[2], : clip.shape[3]] = clip
    tokens = {}
    for place in product(*map(range, grid)):
        t, row, column = (i * p for i, p in zip(place, patch, strict=True))
        cube = padded[:, t : t + patch[0], row : row + patch[1], column : column + patch[2]]
        tokens[place] = norm((kernel * cube).sum(dim=(1, 2, 3, 4)) + bias, params, "patch_embed.norm", EPS)
    return tokens, grid


def filled(tokens, grid):
    """A token at every place: of the kept ones of its frame the nearest, of equally near ones the first."""
    out = {}
    for t, row, column in product(*map(range, grid)):
        kept = [place for place in tokens if place[0] == t]
        nearest = min(kept, key=lambda p, r=row, c=column: ((p[1] - r) ** 2 + (p[2] - c) ** 2, p))
        out[t, row, column] = tokens[nearest]
    return out


def windows(grid, window, shifted):
    """Lists of (place or None for padding, part) window by window, and the window, which small grids make smaller."""
    shift = [w // 2 if shifted and n > w else 0 for n, w in zip(grid, window, strict=True)]
    window = [min(n, w) for n, w in zip(grid, window, strict=True)]
    size = [math.ceil(n / w) * w for n, w in zip(grid, window, strict=True)]
    out = []
    for corner in product(*(range(0, n, w) for n, w in zip(size, window, strict=True))):
        members = []
        for offset in product(*map(range, window)):
            rolled = [c + o for c, o in zip(corner, offset, strict=True)]
            place = tuple((i + s) % n for i, s, n in zip(rolled, shift, size, strict=True))
            part = tuple(  # what was rolled in from the other end is apart from what was there
                s > 0 and i >= n - s for i, s, n in zip(rolled, shift, size, strict=True)
            )
            members.append((place if all(i < n for i, n in zip(place, grid, strict=True)) else None, part))
        out.append(members)
    return out, window


def bias_between(i, j, table, window):
    """The bias (heads,) of query position i on key position j, numbered in the whole window as torchvision does."""
    numbers = []
    for n in (i, j):
        numbers.append((n // (window[1] * window[2]), n // window[2] % window[1], n % window[2]))
    (a, b, c), (d, e, f) = numbers
    row = (a - d + window[0] - 1) * (2 * window[1] - 1) + b - e + window[1] - 1
    return table[row * (2 * window[2] - 1) + c - f + window[2] - 1]


def attention(tokens, grid, params, name, heads, window, shifted):
    """Normed tokens at their places -> what attention adds to them, and the queries, keys and values at every place."""
    C = len(next(iter(tokens.values())))
    d = C // heads
    qkv = {place: project(v, params, f"{name}.qkv") for place, v in filled(tokens, grid).items()}
    padding = params[f"{name}.qkv.bias"]
    out = {}
    members_of_windows, used = windows(grid, window, shifted)
    assert math.prod(used) == len(members_of_windows[0])
    for members in members_of_windows:
        vectors = [padding if place is None else qkv[place] for place, _ in members]
        for i, (place, part) in enumerate(members):
            if place not in tokens:
                continue
            heads_out = []
            for h in range(heads):
                own = slice(h * d, (h + 1) * d)
                logits = []
                for j, other in enumerate(vectors):
                    logit = (vectors[i][:C][own] * other[C : 2 * C][own]).sum() / math.sqrt(d)
                    logit = logit + bias_between(i, j, params[f"{name}.relative_position_bias_table"], window)[h]
                    logits.append(logit - 100 * (members[j][1] != part))
                shares = softmax(torch.stack(logits))
                heads_out.append(sum(s * v[2 * C :][own] for s, v in zip(shares, vectors, strict=True)))
            out[place] = project(torch.cat(heads_out), params, f"{name}.proj")
    return out, qkv


def block(tokens, grid, params, name, heads, window, shifted):
    """One block: tokens -> tokens, {"query" and so on: the feature of each token, before the mean over heads}."""
    normed = {place: norm(v, params, f"{name}.norm1", EPS) for place, v in tokens.items()}
    added, qkv = attention(normed, grid, params, f"{name}.attn", heads, window, shifted)
    tokens = {place: v + added[place] for place, v in tokens.items()}
    ffn = {}
    for place, v in tokens.items():
        h = gelu(project(norm(v, params, f"{name}.norm2", EPS), params, f"{name}.mlp.0"))
        ffn[place] = project(h, params, f"{name}.mlp.3")
    features = {"ffn": filled(ffn, grid)}
    C = len(next(iter(tokens.values())))
    for part, kind in enumerate(("query", "key", "value")):
        features[kind] = {p: v[part * C : (part + 1) * C].reshape(heads, -1).mean(dim=0) for p, v in qkv.items()}
    return {place: v + ffn[place] for place, v in tokens.items()}, features


def merged(tokens, grid, params, name):
    """Each two by two tokens of a frame side by side, zeros beyond the edge, halved in width by a projection."""
    zero = torch.zeros_like(tokens[0, 0, 0])
    out, half = {}, (grid[0], math.ceil(grid[1] / 2), math.ceil(grid[2] / 2))
    for t, row, column in product(*map(range, half)):
        corners = [(2 * row + r, 2 * column + c) for c in (0, 1) for r in (0, 1)]
        four = torch.cat([tokens.get((t, *corner), zero) for corner in corners])
        out[t, row, column] = project(norm(four, params, f"{name}.norm", EPS), params, f"{name}.reduction")
    return out, half


def mean_features(features, grid, half):
    """The mean over each two by two places, fewer at the edge."""
    out = {}
    for t, row, column in product(*map(range, half)):
        corners = [(t, 2 * row + r, 2 * column + c) for r in (0, 1) for c in (0, 1)]
        four = [features[corner] for corner in corners if corner in features]
        out[t, row, column] = sum(four) / len(four)
    return out


def sta(tokens, features, grid, r, direction, scores):
    """Drop r tokens of each frame of a whole grid."""
    frames = [[(t, row, column) for row in range(grid[1]) for column in range(grid[2])] for t in range(grid[0])]
    x = torch.stack([torch.stack([tokens[place] for place in frame]) for frame in frames])
    metric = torch.stack([torch.stack([features[place] for place in frame]) for frame in frames])
    kept = prune(x, metric, r, direction, scores)
    return {
        frame[n]: tokens[frame[n]]
        for frame, numbers in zip(frames, kept, strict=True)
        for n in sorted(int(n) for n in numbers)
    }


def videoswin(
    pixel_values, params, config, r=(0, 0, 0), order="F-B-F", similarity="key", scores="both",
    temporal=(), spatial=(), scorer="released", **options,
):  # fmt: skip
    """Clips (B, 3, frames, height, width) -> logits (B, classes).

    STA's `r`: tokens of a frame that stages 1 to 3 drop. STTS's `temporal` and `spatial`: pairs [stage from 0, share].
    """
    order = order.split("-") if "-" in order else [order] * 3
    plans = [{i: (j, share) for j, (i, share) in enumerate(plan)} for plan in (temporal, spatial)]
    logits = []
    for clip in pixel_values:
        tokens, grid = embed(clip, params, config["patch"])
        for s, (depth, heads) in enumerate(zip(config["depths"], config["heads"], strict=True)):
            if s in plans[0] or s in plans[1]:
                two = [plan.get(s) for plan in plans]
                tokens, grid = select(tokens, grid, None, params, *two, scorer, **options)
            for i in range(depth):
                name = f"features.{2 * s}.{i}"
                tokens, features = block(tokens, grid, params, name, heads, config["window"], i % 2 == 1)
            if s + 1 == len(config["depths"]):
                break
            features = features[similarity]
            tokens, half = merged(filled(tokens, grid), grid, params, f"features.{2 * s + 1}")
            features, grid = mean_features(features, grid, half), half
            if r[s]:
                tokens = sta(tokens, features, grid, r[s], order[s], scores)
        last = [norm(v, params, "norm", EPS) for v in tokens.values()]
        logits.append(project(sum(last) / len(last), params, "head"))
    return torch.stack(logits)
