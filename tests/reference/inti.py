"""InTI as slow loops in float64, written from the paper alone; the yardstick for the fast module.

Source: "Dynamic and Compressive Adaptation of Transformers From Images to Videos" (InTI),
Eq. 6-13, appendix B and Table 5. Everything works on single tokens, vectors of length C; only the
channels are vectorised, so that gradients still flow to `x` and `params`.

Letters: B clips, T frames, N patches on a grid of H x W, C width, r width inside the cube units,
T0 frames that the position embedding was made for, j a pair of frames, k a token (0 = class token).

`params`, float64 tensors. Linear weights are (out, in), convolutions are depth-wise (groups = channels).
T_{a->b} (LayerNorm, Linear, GELU) named "n" stands for
    n.norm.weight (a,)   n.norm.bias (a,)   n.linear.weight (b, a)   n.linear.bias (b,)

    sigma ()  P (T0, 1, C)                          Eq. 8
    token.first, token.second                       Eq. 9, T_{C->C/2} of E_{2j} and of E_{2j+1}
    cube = "local_mhra": for u in u1, u2            U = LayerNorm, Linear C->r, convolution, Linear r->C
        cube.u.norm.weight (C,)  cube.u.norm.bias (C,)
        cube.u.down.weight (r, C)  cube.u.down.bias (r,)
        cube.u.conv.weight (r, 1, 3, 3, 3)  cube.u.conv.bias (r,)
        cube.u.up.weight (C, r)  cube.u.up.bias (C,)
    cube = "dwconv"                                 Eq. 10 to the letter
        cube.conv.weight (C, 1, 3, 3, 3)  cube.conv.bias (C,)
    frame.first, frame.second                       Eq. 11, T_{C->C/2} of CLS_{2j} and of CLS_{2j+1}
    frame.pair                                      Eq. 11, T_{C->C} of the two
    global.conv1, global.conv2, global.conv3        Eq. 12: .weight (C, 1, 3), .bias (C,)
    ffn.hidden.weight (C, F)  ffn.hidden.bias (C,)  Eq. 13; F = 2C "separate", C "add", 4C "concat"
    ffn.logits.weight (2, C)  ffn.logits.bias (2,)  heads "softmax" and "sigmoid"
    ffn.v (C/2,)                                    head "attention"
"""

import math

import torch


CONTEXT = ("cube", "frame", "global")
FUSED_WIDTHS = {"separate": 2, "add": 1, "concat": 4}  # in units of C
HEADS = ("softmax", "sigmoid", "attention")
CUBES = ("local_mhra", "dwconv")


# The operations, on vectors.


def linear(v, weight, bias):
    """(in,) -> (out,): the dot product of `v` with every row of `weight` (out, in), plus `bias` (out,)."""
    return (weight * v).sum(dim=1) + bias


def layer_norm(v, weight, bias, eps):
    """(C,) -> (C,): zero mean and unit (biased) variance over the channels, then scale and shift."""
    centred = v - v.sum() / len(v)
    variance = (centred * centred).sum() / len(v)
    return centred / torch.sqrt(variance + eps) * weight + bias


def gelu(v):
    """Elementwise v Phi(v) with the exact normal distribution function Phi, not its tanh approximation."""
    return v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))


def softmax(v):
    """(n,) -> (n,): positive numbers that sum to one."""
    powers = torch.exp(v - v.max())
    return powers / powers.sum()


def sigmoid(v):
    """Elementwise 1 / (1 + exp(-v))."""
    return 1 / (1 + torch.exp(-v))


def depthwise_conv1d(sequence, weight, bias):
    """List of T vectors (C,) -> list of T: kernel 3, stride 1, zero padding 1; `weight` (C, 1, 3)."""
    out = []
    for t in range(len(sequence)):
        total = bias
        for tap in range(3):
            if 0 <= t + tap - 1 < len(sequence):
                total = total + weight[:, 0, tap] * sequence[t + tap - 1]
        out.append(total)
    return out


def max_pool(sequence):
    """List of T vectors -> list of ceil(T/2): maximum over pairs; a last one without partner stays."""
    out = []
    for t in range(0, len(sequence), 2):
        if t + 1 < len(sequence):
            out.append(torch.maximum(sequence[t], sequence[t + 1]))
        else:
            out.append(sequence[t])
    return out


def depthwise_conv3d(volume, weight, bias, stride):
    """volume[t][row][column], vectors (C,) -> the same nesting: kernel 3, zero padding 1.

    `weight` (C, 1, 3, 3, 3), `bias` (C,). `stride` is in frames: output frame j is centred on input frame
    `stride * j`; the rows and columns stay.
    """
    frames, rows, columns = len(volume), len(volume[0]), len(volume[0][0])
    out = []
    for t in range(0, frames, stride):
        plane = [[bias for _ in range(columns)] for _ in range(rows)]
        for row in range(rows):
            for column in range(columns):
                for a in range(3):
                    for b in range(3):
                        for c in range(3):
                            tt, rr, cc = t + a - 1, row + b - 1, column + c - 1
                            if 0 <= tt < frames and 0 <= rr < rows and 0 <= cc < columns:
                                tap = weight[:, 0, a, b, c] * volume[tt][rr][cc]
                                plane[row][column] = plane[row][column] + tap
        out.append(plane)
    return out


def interpolate_time(P, T):
    """(T0, 1, C) -> list of T vectors (C,): linear along time, frames seen as cells [t, t+1), ends held."""
    T0 = len(P)
    out = []
    for t in range(T):
        # The centre of new cell t, measured in old cells, then from the centre of old cell 0.
        place = max((t + 0.5) * T0 / T - 0.5, 0.0)
        left = min(math.floor(place), T0 - 1)
        right = min(left + 1, T0 - 1)
        share = place - left
        out.append((1 - share) * P[left, 0] + share * P[right, 0])
    return out


def T_(v, params, name, eps):
    """The paper's T_{a->b}: LayerNorm, Linear, GELU, with the weights called `name`."""
    v = layer_norm(v, params[f"{name}.norm.weight"], params[f"{name}.norm.bias"], eps)
    return gelu(linear(v, params[f"{name}.linear.weight"], params[f"{name}.linear.bias"]))


# The four features.


def token_feature(first, second, params, eps):
    """Eq. 9: the two tokens (C,) of a pair at one place -> F_token (C,)."""
    return torch.cat([T_(first, params, "token.first", eps), T_(second, params, "token.second", eps)])


def frame_feature(first, second, params, eps):
    """Eq. 11: the two class tokens (C,) of a pair -> F_frame (C,)."""
    halves = torch.cat([T_(first, params, "frame.first", eps), T_(second, params, "frame.second", eps)])
    return T_(halves, params, "frame.pair", eps)


def global_feature(class_tokens, params):
    """Eq. 12 and appendix B: T class tokens (C,) -> F_global (C,)."""
    v = class_tokens
    for name in ("global.conv1", "global.conv2"):
        v = depthwise_conv1d(v, params[f"{name}.weight"], params[f"{name}.bias"])
        v = [gelu(frame) for frame in max_pool(v)]
    v = depthwise_conv1d(v, params["global.conv3.weight"], params["global.conv3.bias"])
    return gelu(sum(v) / len(v))


def _cube_unit(p, params, name, eps):
    """U: volume p[t][row][column] of vectors (C,) -> the same nesting."""

    def narrow(v):
        v = layer_norm(v, params[f"{name}.norm.weight"], params[f"{name}.norm.bias"], eps)
        return linear(v, params[f"{name}.down.weight"], params[f"{name}.down.bias"])

    def widen(v):
        return linear(v, params[f"{name}.up.weight"], params[f"{name}.up.bias"])

    # Narrowing comes before the convolution, so that its zero padding is of the r channels.
    h = [[[narrow(v) for v in row] for row in plane] for plane in p]
    h = depthwise_conv3d(h, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"], stride=1)
    return [[[widen(v) for v in row] for row in plane] for plane in h]


def _add(p, q):
    """Sum of two volumes."""
    return [
        [[v + w for v, w in zip(rp, rq, strict=True)] for rp, rq in zip(pp, pq, strict=True)]
        for pp, pq in zip(p, q, strict=True)
    ]


def cube_feature(p, params, cube, eps):
    """Eq. 10: patches p[t][row][column], vectors (C,) -> F_cube[j][row][column], one per pair of frames."""
    if cube == "dwconv":
        return depthwise_conv3d(p, params["cube.conv.weight"], params["cube.conv.bias"], stride=2)
    p1 = _add(p, _cube_unit(p, params, "cube.u1", eps))
    p2 = _add(p1, _cube_unit(p1, params, "cube.u2", eps))
    out = []
    for j in range(len(p) // 2):
        plane = []
        for row in range(len(p[0])):
            line = []
            for column in range(len(p[0][0])):
                even = p2[2 * j][row][column] - p[2 * j][row][column]
                odd = p2[2 * j + 1][row][column] - p[2 * j + 1][row][column]
                line.append((even + odd) / 2)
            plane.append(line)
        out.append(plane)
    return out


# Eq. 6-8 and 13.


def _fuse(f_token, f_cube, f_frame, f_global, fusion):
    """What the first Linear of the FFN sees (Table 5b)."""
    f_context = f_cube + f_frame + f_global
    if fusion == "add":
        return f_token + f_context
    if fusion == "concat":
        return torch.cat([f_token, f_cube, f_frame, f_global])
    return torch.cat([f_token, f_context])


def _predict(feature, params, head):
    """Fused feature -> (2,): alpha, beta."""
    h = gelu(linear(feature, params["ffn.hidden.weight"], params["ffn.hidden.bias"]))
    if head == "attention":
        half = len(h) // 2
        v = params["ffn.v"]
        return softmax(torch.stack([(v * h[:half]).sum(), (v * h[half:]).sum()]))
    logits = linear(h, params["ffn.logits.weight"], params["ffn.logits.bias"])
    return sigmoid(logits) if head == "sigmoid" else softmax(logits)


def _inti_clip(x, params, grid, context, fusion, head, cube, eps):
    """One clip (T, 1+N, C) -> z (T/2, 1+N, C), weights (T/2, 1+N, 2)."""
    T, L, C = x.shape
    rows, columns = grid
    zero = x.new_zeros(C)

    P = interpolate_time(params["P"], T)
    X = [[x[t, k] + params["sigma"] * P[t] for k in range(L)] for t in range(T)]  # Eq. 8

    f_cube = None
    if "cube" in context:
        patches = [[frame[1 + i * columns : 1 + (i + 1) * columns] for i in range(rows)] for frame in X]
        f_cube = cube_feature(patches, params, cube, eps)
    f_global = global_feature([X[t][0] for t in range(T)], params) if "global" in context else zero

    z, weights = [], []
    for j in range(T // 2):
        first, second = X[2 * j], X[2 * j + 1]
        f_frame = frame_feature(first[0], second[0], params, eps) if "frame" in context else zero
        for k in range(L):
            f_token = token_feature(first[k], second[k], params, eps)
            # The class token has no place on the grid.
            at_k = zero if f_cube is None or k == 0 else f_cube[j][(k - 1) // columns][(k - 1) % columns]
            alpha_beta = _predict(_fuse(f_token, at_k, f_frame, f_global, fusion), params, head)  # Eq. 13
            z.append(alpha_beta[0] * first[k] + alpha_beta[1] * second[k])  # Eq. 7
            weights.append(alpha_beta)
    return torch.stack(z).reshape(T // 2, L, C), torch.stack(weights).reshape(T // 2, L, 2)


def inti(x, params, *, grid, context=CONTEXT, fusion="separate", head="softmax", cube="local_mhra", eps=1e-5):
    """Halve the frames of `x`, float64 (B, T, 1+N, C), class token first, patches in row-major order.

    `grid` is (rows, columns) with rows * columns = N, `params` as at the top of this file. Returns
    z (B, T/2, 1+N, C) and the weights alpha, beta (B, T/2, 1+N, 2). ValueError for an odd T, a grid that
    does not fit and unknown words. A context left out is zeros and its parameters are not read.
    """
    B, T, L, C = x.shape
    if T % 2 or L != 1 + grid[0] * grid[1]:
        raise ValueError(f"got {T} frames of {L} tokens, want an even number of 1 + {grid[0]} x {grid[1]}")
    for name, words, valid in (
        ("context", context, CONTEXT),
        ("fusion", (fusion,), tuple(FUSED_WIDTHS)),
        ("head", (head,), HEADS),
        ("cube", (cube,), CUBES),
    ):
        if not set(words) <= set(valid):
            raise ValueError(f"got {name} {words}, want words of {valid}")
    clips = [_inti_clip(x[b], params, grid, context, fusion, head, cube, eps) for b in range(B)]
    return torch.stack([z for z, _ in clips]), torch.stack([weights for _, weights in clips])


def random_params(C, T, *, fusion, head, cube, r, generator):
    """Random `params` for all branches, none of them zero, of a size that keeps features near one.

    `T` is T0, the number of frames of P. `r` is unused for cube="dwconv", which has no narrow layer.
    """

    def normal(*shape, scale=1.0, mean=0.0):
        return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    params = {"sigma": normal(scale=0.2, mean=0.7), "P": normal(T, 1, C)}

    def add_norm(name, width):
        params[f"{name}.norm.weight"] = normal(width, scale=0.3, mean=1.0)
        params[f"{name}.norm.bias"] = normal(width, scale=0.3)

    def add_weight(name, *shape):
        params[f"{name}.weight"] = normal(*shape, scale=math.prod(shape[1:]) ** -0.5)
        params[f"{name}.bias"] = normal(shape[0], scale=0.3)

    for name, inside, outside in (
        ("token.first", C, C // 2),
        ("token.second", C, C // 2),
        ("frame.first", C, C // 2),
        ("frame.second", C, C // 2),
        ("frame.pair", C, C),
    ):
        add_norm(name, inside)
        add_weight(f"{name}.linear", outside, inside)
    for name in ("global.conv1", "global.conv2", "global.conv3"):
        add_weight(name, C, 1, 3)
    if cube == "dwconv":
        add_weight("cube.conv", C, 1, 3, 3, 3)
    else:
        for name in ("cube.u1", "cube.u2"):
            add_norm(name, C)
            add_weight(f"{name}.down", r, C)
            add_weight(f"{name}.conv", r, 1, 3, 3, 3)
            add_weight(f"{name}.up", C, r)
    add_weight("ffn.hidden", C, FUSED_WIDTHS[fusion] * C)
    if head == "attention":
        params["ffn.v"] = normal(C // 2)
    else:
        add_weight("ffn.logits", 2, C)
        # A spread of a few units between the two logits, so that a wrong one shows in the weights.
        params["ffn.logits.weight"] *= 3
    return params
