"""STTS as slow loops in float64: a scorer keeps the best frames, and in every frame the best square of patches.

Source: "Efficient Video Transformers with Spatial-Temporal Token Selection", section 3, and what its authors' code does
(scorer "released", mean and max of a frame, diagonal gradient).

Letters: B clips, T frames, L tokens per frame (class token first), N patches on a grid of H x H, C (or D) width,
E input width of a scorer, k how many are kept, n draws of noise, a side of an anchor in patches, A number of anchors.

`params`: float64, the state_dict of a transformers CLIPVisionModel; for every scorer the .weight (out, in) and .bias of
    scorer "paper"       local (E//2, E), score (1, 2 (E//2))
    scorer "released"    norm (E,), local (E, E), hidden1 (E//2, E), hidden2 (E//4, E//2), score (1, E//4)
under compression.temporal.j.scorer and compression.spatial.j.scorer, j-th entry of the list of that name.
"""

import math

import torch

from .inti import gelu
from .naive import _linear, _norm
from .pooling import depth, enter, leave, spatial_block


def raw_scores(tokens, params, prefix, scorer, eps=1e-5):
    """Eq. 2 and the FC of Eq. 3: a sequence (n, E) -> raw scores (n,); half of what the last layers see is its mean."""
    if scorer == "paper":
        local = [_linear(v, params, f"{prefix}.local") for v in tokens]
        mean = sum(local) / len(local)
        features = [torch.cat([v, mean]) for v in local]
    else:
        local = [gelu(_linear(_norm(v, params, f"{prefix}.norm", eps), params, f"{prefix}.local")) for v in tokens]
        half = len(local[0]) // 2
        mean = sum(v[half:] for v in local) / len(local)
        features = [torch.cat([v[:half], mean]) for v in local]
        features = [gelu(_linear(v, params, f"{prefix}.hidden1")) for v in features]
        features = [gelu(_linear(v, params, f"{prefix}.hidden2")) for v in features]
    return torch.cat([_linear(v, params, f"{prefix}.score") for v in features])


def min_max(scores):
    """(n,) -> (n,): from 0 to (almost) 1; the 1e-5 below the line is for equal scores."""
    return (scores - scores.min()) / (scores.max() - scores.min() + 1e-5)


def top_k(scores, k):
    """(n,) -> the numbers of the k highest, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:k])


def perturbed_top_k(scores, k, noise, sigma):
    """Eq. 7: indicators (k, D) of `scores` (D,): the mean over the draws of `noise` (n, D) of the one-hot top k."""
    out = scores.new_zeros(k, len(scores))
    for draw in noise:
        for rank, place in enumerate(top_k(scores + sigma * draw, k)):
            out[rank, place] += 1 / len(noise)
    return out


def perturbed_top_k_gradient(grad_output, scores, k, noise, sigma, form="released"):
    """Gradient (D,) of `perturbed_top_k` for `grad_output` (k, D), sigma > 0.

    "paper": Eq. 8, an indicator that a draw sets moves with every score by the noise there. "released": the authors'
    code, which counts only the noise at the indicator's own place.
    """
    out = torch.zeros_like(scores)
    for draw in noise:
        for rank, place in enumerate(top_k(scores + sigma * draw, k)):
            for other in range(len(scores)) if form == "paper" else [place]:
                out[other] += grad_output[rank, place] * draw[other] / sigma / len(noise)
    return out


def frame_scores(x, params, prefix, scorer, class_tokens=1):
    """Frames (T, L, C) -> (T,) in [0, 1]; seen is the mean of a frame's patches, "released" also their maximum."""
    descriptors = []
    for frame in x:
        patches = frame[class_tokens:]
        descriptor = sum(patches) / len(patches)
        if scorer == "released":
            descriptor = torch.cat([descriptor, patches.amax(dim=0)])
        descriptors.append(descriptor)
    return min_max(raw_scores(descriptors, params, prefix, scorer))


def keep_frames(x, scores, k):
    """Evaluation: the k best frames of x (T, L, C) by `scores` (T,) -> (k, L, C) in order of time, their numbers."""
    kept = top_k(scores, k)
    return torch.stack([x[t] for t in kept]), kept


def mix_frames(x, scores, k, noise, sigma):
    """Training: every kept frame is a mixture of x (T, L, C), class tokens too -> (k, L, C); `noise` (n, T)."""
    indicators = perturbed_top_k(scores, k, noise, sigma)
    return torch.stack([sum(share * frame for share, frame in zip(row, x, strict=True)) for row in indicators])


def anchors(N, k):
    """Squares of at most `k` of N patches, N a square: a list of lists of patch numbers, row-major both.

    The side a is floor(sqrt(k)), the stride (H - a) // 2 but at least one patch. ValueError for N that is no square.
    """
    H, a = math.isqrt(N), math.isqrt(k)
    if H * H != N:
        raise ValueError(f"got {N} patches, want a square number")
    starts = range(0, H - a + 1, max((H - a) // 2, 1))
    return [
        [row * H + column for row in range(top, top + a) for column in range(left, left + a)]
        for top in starts
        for left in starts
    ]


def anchor_scores(patches, squares, params, prefix, scorer):
    """Patches (N, C) of one frame, `squares` from `anchors` -> (A,) in [0, 1]: the mean raw score of an anchor."""
    scores = raw_scores(patches, params, prefix, scorer)
    return min_max(torch.stack([sum(scores[n] for n in square) / len(square) for square in squares]))


def keep_anchor(patches, scores, squares):
    """Evaluation: the anchor of `patches` (N, C) with the best of `scores` (A,) -> (a a, C), its number."""
    best = top_k(scores, 1)[0]
    return torch.stack([patches[n] for n in squares[best]]), best


def mix_anchors(patches, scores, squares, noise, sigma):
    """Training: the mixture (a a, C) of all anchors of `patches` (N, C); `noise` (n, A)."""
    shares = perturbed_top_k(scores, 1, noise, sigma)[0]
    out = 0
    for share, square in zip(shares, squares, strict=True):
        out = out + share * torch.stack([patches[n] for n in square])
    return out


def keep_count(total, ratio):
    """How many of `total` are kept: the whole part. ValueError if that is none."""
    if int(total * ratio) < 1:
        raise ValueError(f"got ratio {ratio} of {total}, want one that keeps 1 or more")
    return int(total * ratio)


def stts_model(pixel_values, params, *, heads, temporal=(), spatial=(), scorer="released", eps=1e-5):
    """The whole tower in evaluation on clips (B, T, 3, height, width).

    `temporal` and `spatial`: [[block, ratio], ...], after which block (from 1; 0 = before the first) what share is
    kept; temporal first where both stand after one block. Class tokens are no patches: they stay with their frame.
    Returns features of the clips (B, D), tokens after the last block and its selection, if any (B, T', L', D), the
    original numbers of the frames (B, T') and of their patches (B, T', L' - 1), both from 0.
    """
    outputs = []
    for clip in pixel_values:
        x = enter(clip, params, eps)
        frames, places = torch.arange(len(x)), torch.arange(x.shape[1] - 1).expand(len(x), -1)
        for i in range(depth(params) + 1):
            if i > 0:
                x = spatial_block(x, params, i - 1, heads, eps)
            for j, (block, ratio) in enumerate(temporal):
                if block == i:
                    scores = frame_scores(x, params, f"compression.temporal.{j}.scorer", scorer)
                    x, kept = keep_frames(x, scores, keep_count(len(x), ratio))
                    frames, places = frames[kept], places[kept]
            for j, (block, ratio) in enumerate(spatial):
                if block == i:
                    squares = anchors(x.shape[1] - 1, keep_count(x.shape[1] - 1, ratio))
                    new_x, new_places = [], []
                    for frame, place in zip(x, places, strict=True):
                        scores = anchor_scores(frame[1:], squares, params, f"compression.spatial.{j}.scorer", scorer)
                        patches, best = keep_anchor(frame[1:], scores, squares)
                        new_x.append(torch.cat([frame[:1], patches]))
                        new_places.append(place[squares[best]])
                    x, places = torch.stack(new_x), torch.stack(new_places)
        outputs.append((leave(x, params, eps), x, frames, places))
    return tuple(torch.stack(part) for part in zip(*outputs, strict=True))
