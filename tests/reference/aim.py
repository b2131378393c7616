"""AIM as slow loops in float64, in evaluation mode; the yardstick for the fast module.

Source: "AIM: Adapting Image Models for Efficient Video Action Recognition", and where the paper leaves a choice
open the behaviour of the authors' released code. Everything works on single tokens, vectors of length C.

Letters: B clips, T frames, L tokens per frame (class token first), C width, r width inside an adapter,
T0 frames that the temporal embedding was made for.

`params`, float64: the state_dict of a transformers CLIPVisionModel and, with i a block counted from 0,
    adaptation.temporal_embedding.P (T0, 1, C)
    adaptation.{temporal_in,temporal_out,spatial,parallel}.{i}: down (r, C), up (C, r), each .weight and .bias;
        temporal_in only where num_tadapter is 2
"""

import torch

from .inti import gelu
from .naive import _linear, _norm, attention
from .uniformerv2 import depth, mlp, stack_tokens
from .zeroi2v import embed_clip, mean_class_token


def adapter(v, params, name):
    """(C,) -> (C,): Linear, exact GELU, Linear; where the input is added as well, the caller does it."""
    return _linear(gelu(_linear(v, params, f"{name}.down")), params, f"{name}.up")


def block(x, params, i, *, heads, scale, num_tadapter, eps=1e-5):
    """Tokens (T, L, C) of one clip -> (T, L, C): block i, counted from 0.

    Attention over time at every place (the class token's too), attention over the frame, MLP: the two
    attentions are the same module behind the same LayerNorm. `scale` is that of the adapter beside the MLP.
    """
    T, L, _ = x.shape
    name = f"encoder.layers.{i}"

    def adapt(v, place):
        return adapter(v, params, f"adaptation.{place}.{i}")

    moved = [[None] * L for _ in range(T)]
    for n in range(L):
        h = [_norm(x[t, n], params, f"{name}.layer_norm1", eps) for t in range(T)]
        if num_tadapter == 2:
            h = [v + adapt(v, "temporal_in") for v in h]
        attended = attention(h, params, f"{name}.self_attn", heads)
        for t in range(T):
            moved[t][n] = x[t, n] + adapt(attended[t], "temporal_out")

    out = []
    for frame in moved:
        h = [_norm(v, params, f"{name}.layer_norm1", eps) for v in frame]
        attended = attention(h, params, f"{name}.self_attn", heads)
        tokens = []
        for v, a in zip(frame, attended, strict=True):
            v = v + a + adapt(a, "spatial")
            h = _norm(v, params, f"{name}.layer_norm2", eps)
            tokens.append(v + mlp(h, params, f"{name}.mlp") + scale * adapt(h, "parallel"))
        out.append(tokens)
    return stack_tokens(out)


def model(pixel_values, params, *, heads, scale, num_tadapter, eps=1e-5):
    """Clips (B, T, 3, height, width), float64 -> feature of each (B, C)."""
    features = []
    for clip in pixel_values:
        x = embed_clip(clip, params, eps)
        for i in range(depth(params)):
            x = block(x, params, i, heads=heads, scale=scale, num_tadapter=num_tadapter, eps=eps)
        features.append(mean_class_token(x, params, eps))
    return torch.stack(features)
