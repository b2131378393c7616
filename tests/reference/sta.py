"""STA as slow loops in float64: tokens that repeat what earlier frames show, and mean little, are dropped.

Source: "Prune Spatio-temporal Tokens by Semantic-aware Temporal Accumulation", section 3.2, Algorithm 1, and, where
the paper leaves it open (first group, start of the accumulation, order of what is kept), what its authors' code does.

Letters: B clips, T frames, G groups of N tokens that are walked through in time (a group is a frame, or more where the
schedule glues them), C (or D) width, d width of the metric, L blocks. STA has no parameters.
"""

import math

import torch

from .inti import gelu, layer_norm, linear, softmax
from .naive import _linear, _norm, block_branches
from .pooling import depth, enter, leave, spatial_block
from .tome import attend, cosine, head_mean


def semantic(group):
    """Eq. 4: tokens (N, C) -> (N,) in [0, 1]: sum of |x| over the channels, min-max over the tokens; 0 if all equal."""
    sums = [float(v.abs().sum()) for v in group]
    if min(sums) == max(sums):
        return [0.0] * len(sums)
    return [(s - min(sums)) / (max(sums) - min(sums)) for s in sums]


def kept_of_first(metric, r):
    """Metric (N, d) of the first group -> the numbers of the N - r tokens kept.

    Tokens at odd places in order, then those at even places, the least similar to any odd one first; the last r go.
    """
    odd = list(range(1, len(metric), 2))
    even = range(0, len(metric), 2)
    similarity = {a: max(cosine(metric[a], metric[b]) for b in odd) for a in even}
    return (odd + sorted(even, key=similarity.get))[: len(metric) - r]


def prune(x, metric, r, direction, scores="both"):
    """Drop `r` of the N tokens of each group; x (G, N, C), metric (G, N, d).

    `direction` "F" walks from the first group to the last, "B" back. Returns kept[g], the numbers (N - r) in output
    order: from the lowest score up; for the group walked first as in `kept_of_first`. r = 0 leaves tokens where they
    are. `scores` is a row of Table 6e: "semantic" 1 - F, "temporal" A, "both" their product. ValueError for r outside
    0 ... N - 1.
    """
    G, N, _ = x.shape
    if not 0 <= r < N:
        raise ValueError(f"got r = {r} for groups of {N} tokens, want 0 to {N - 1}")
    if r == 0:
        return [list(range(N)) for _ in range(G)]
    unit = [[v / v.square().sum().sqrt() for v in group] for group in metric]
    walk = range(G) if direction == "F" else range(G - 1, -1, -1)
    kept = [None] * G
    kept[walk[0]] = kept_of_first(metric[walk[0]], r)
    # All tokens of the first group, dropped ones too, weigh one for the second group.
    earlier, weights = unit[walk[0]], [1.0] * N
    for g in walk[1:]:
        # Eq. 3: each earlier token spreads its weight over the tokens of this group.
        accumulated = [0.0] * N
        for old, weight in zip(earlier, weights, strict=True):
            shares = softmax(torch.stack([(v * old).sum() for v in unit[g]]))
            accumulated = [total + weight * float(share) for total, share in zip(accumulated, shares, strict=True)]
        score = [1.0] * N
        if scores != "temporal":
            score = [p * (1 - s) for p, s in zip(score, semantic(x[g]), strict=True)]
        if scores != "semantic":
            score = [p * a for p, a in zip(score, accumulated, strict=True)]
        kept[g] = sorted(range(N), key=score.__getitem__)[: N - r]
        total = sum(accumulated[n] for n in kept[g])
        earlier, weights = [unit[g][n] for n in kept[g]], [accumulated[n] / total for n in kept[g]]
    return kept


def pick(x, kept):
    """x (G, N, ...) -> (G, N - r, ...), the tokens `kept` of each group."""
    return torch.stack([torch.stack([group[n] for n in numbers]) for group, numbers in zip(x, kept, strict=True)])


def stages(num_layers, r, order="F-B-F", schedule="decreasing"):
    """The paper's three stages [(block counted from 1, tokens to drop per frame, direction), ...]; "F" is "F-F-F".

    `schedule`, of Section 4.3: for r = 64 decreasing 64, 32, 16, for 48 constant 48, 48, 48, for 27 increasing 27, 54,
    108.
    """
    if num_layers < 3:
        raise ValueError(f"got {num_layers} blocks, want 3 or more")
    directions = order.split("-") if "-" in order else [order] * 3
    places = (1, 1 + num_layers // 3, 1 + 2 * num_layers // 3)
    drops = {"decreasing": (r, r // 2, r // 4), "constant": (r, r, r), "increasing": (r, 2 * r, 4 * r)}[schedule]
    return list(zip(places, drops, directions, strict=True))


def sta_clip(
    pixel_values, params, *, heads, r, order="F-B-F", similarity="key", schedule="decreasing", scores="both", eps=1e-5
):
    """STA on CLIP's tower: clips (B, T, 3, height, width); every frame is a group and drops as many patches.

    `params`: float64 state_dict of a transformers CLIPVisionModel. `similarity`, "query", "key" or "value", is the
    projection of the block whose mean over heads is the metric, "ffn" what its MLP adds to a token. The class token
    stays and does not take part.
    Returns features of the clips (B, D), tokens after the last block and its pruning, if any (B, T, 1 + N', D), class
    token first, patches in the order of `prune`, and the grid positions of these patches (B, T, N'), from 0.
    """
    features, tokens, positions = [], [], []
    for clip in pixel_values:
        x = enter(clip, params, eps)
        place = torch.arange(x.shape[1] - 1).expand(len(x), -1)
        for i in range(depth(params)):
            before = x
            x = spatial_block(x, params, i, heads, eps)
            for block, drop, direction in stages(depth(params), r, order, schedule):
                if block != i + 1:
                    continue
                name = f"encoder.layers.{i}"
                metric = []
                for frame in before:
                    if similarity == "ffn":
                        _, added = block_branches(list(frame), params, i, heads, eps)
                        metric.append(torch.stack(added[1:]))
                        continue
                    normed = [_norm(v, params, f"{name}.layer_norm1", eps) for v in frame[1:]]
                    projected = [_linear(v, params, f"{name}.self_attn.{similarity[0]}_proj") for v in normed]
                    metric.append(torch.stack([head_mean(v, heads) for v in projected]))
                kept = prune(x[:, 1:], torch.stack(metric), drop, direction, scores)
                x = torch.cat([x[:, :1], pick(x[:, 1:], kept)], dim=1)
                place = pick(place, kept)
        features.append(leave(x, params, eps))
        tokens.append(x)
        positions.append(place)
    return torch.stack(features), torch.stack(tokens), torch.stack(positions)


# VideoMAE: tubelets, all frames attend to each other, no class token.


def sinusoid(position, width):
    """VideoMAE's fixed embedding of one position (width,), rounded to float32 as transformers has it."""
    out = []
    for channel in range(width):
        angle = position / 10000 ** (2 * (channel // 2) / width)
        out.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return torch.tensor(out, dtype=torch.float32).double()


def videomae_tokens(clip, params, config, r, schedule="decreasing", order="F-B-F", similarity="key", scores="both"):
    """One clip (frames, 3, height, width) -> tokens after the last block and its pruning, if any, (n, D)."""

    def project(v, name):
        return linear(v, params[f"{name}.weight"], params.get(f"{name}.bias", 0))

    def norm(v, name):
        return layer_norm(v, params[f"{name}.weight"], params[f"{name}.bias"], config.layer_norm_eps)

    kernel = params["videomae.embeddings.patch_embeddings.projection.weight"]  # (D, 3, tubelet, S, S)
    bias = params["videomae.embeddings.patch_embeddings.projection.bias"]
    tubelet, S = kernel.shape[2], kernel.shape[4]
    tokens = []
    for t in range(0, len(clip), tubelet):
        for row in range(0, clip.shape[2], S):
            for column in range(0, clip.shape[3], S):
                cube = clip[t : t + tubelet, :, row : row + S, column : column + S].transpose(0, 1)
                token = (kernel * cube).sum(dim=(1, 2, 3, 4)) + bias
                tokens.append(token + sinusoid(len(tokens), config.hidden_size))

    G, L, heads = len(clip) // tubelet, config.num_hidden_layers, config.num_attention_heads
    if schedule != "released":
        plan = [(block, drop, direction, G) for block, drop, direction in stages(L, r, order, schedule)]
    else:  # as many per group, but the groups of a stage are two of the one before
        plan = [(block, r, direction, G // 2**s) for s, (block, _, direction) in enumerate(stages(L, r, order))]

    for i in range(L):
        name = f"videomae.encoder.layer.{i}"
        normed = [norm(v, f"{name}.layernorm_before") for v in tokens]
        queries, keys, values = (
            [project(v, f"{name}.attention.attention.{part}") for v in normed] for part in ("query", "key", "value")
        )
        attended = attend(queries, keys, values, heads)
        out, added = [], []
        for v, a in zip(tokens, attended, strict=True):
            v = v + project(a, f"{name}.attention.output.dense")
            h = gelu(project(norm(v, f"{name}.layernorm_after"), f"{name}.intermediate.dense"))
            added.append(project(h, f"{name}.output.dense"))
            out.append(v + added[-1])
        tokens = torch.stack(out)
        for block, drop, direction, groups in plan:
            if block == i + 1:
                if similarity == "ffn":
                    metric = torch.stack(added)
                else:
                    features = {"query": queries, "key": keys, "value": values}[similarity]
                    metric = torch.stack([head_mean(v, heads) for v in features])
                metric = metric.reshape(groups, -1, metric.shape[1])
                x = tokens.reshape(groups, -1, tokens.shape[1])
                tokens = pick(x, prune(x, metric, drop, direction, scores)).reshape(-1, tokens.shape[1])
    return tokens


def sta_videomae(pixel_values, params, config, r, **options):
    """STA on VideoMAE with mean pooling: clips (B, frames, 3, height, width) -> logits (B, classes).

    `params`: float64 state_dict of transformers' VideoMAEForVideoClassification, `config` its configuration.
    `options`: `schedule` as in `stages`, per tubelet of frames, or "released" (the authors' code): r per group at every
    stage, of G, G/2, G/4 groups, G the number of tubelets in time; `order`, `similarity` and `scores` as in `sta_clip`.
    """
    logits = []
    for clip in pixel_values:
        tokens = videomae_tokens(clip, params, config, r, **options)
        # transformers makes this one norm with torch's own eps, not the configuration's.
        feature = layer_norm(sum(tokens) / len(tokens), params["fc_norm.weight"], params["fc_norm.bias"], 1e-5)
        logits.append(linear(feature, params["classifier.weight"], params["classifier.bias"]))
    return torch.stack(logits)
