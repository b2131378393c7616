"""The papers' Naive as slow loops in float64: CLIP on every frame, mean over frames, linear head.

Sources: CLIP's vision transformer ("Learning Transferable Visual Models From Natural Language
Supervision": ViT with a LayerNorm after the embedding, pre-LN blocks, quick GELU) and InTI's Eq. 2.
Everything works on single tokens, vectors of length D.

Letters: B clips, T frames, L tokens per frame (class token first, patches in row-major order), D width,
S patch size in pixels, M width of the MLP, Y classes.

`params`: the float64 state_dict of a transformers CLIPVisionModel, and head.weight (Y, D), head.bias (Y,).
"""

import torch

from .inti import layer_norm, linear, sigmoid, softmax


def quick_gelu(v):
    """CLIP's v sigmoid(1.702 v), elementwise."""
    return v * sigmoid(1.702 * v)


def _norm(v, params, name, eps):
    return layer_norm(v, params[f"{name}.weight"], params[f"{name}.bias"], eps)


def _linear(v, params, name):
    return linear(v, params[f"{name}.weight"], params[f"{name}.bias"])


def embed(image, params):
    """One frame (3, height, width) -> list of L tokens (D,), before any LayerNorm."""
    kernel = params["embeddings.patch_embedding.weight"]  # (D, 3, S, S)
    positions = params["embeddings.position_embedding.weight"]  # (L, D)
    S = kernel.shape[-1]
    tokens = [params["embeddings.class_embedding"]]
    for row in range(image.shape[1] // S):
        for column in range(image.shape[2] // S):
            patch = image[:, row * S : (row + 1) * S, column * S : (column + 1) * S]
            tokens.append((kernel * patch).sum(dim=(1, 2, 3)))
    return [token + position for token, position in zip(tokens, positions, strict=True)]


def attention(tokens, params, name, heads):
    """List of L tokens (D,) -> list of L (D,): every token looks at all of them, head by head."""
    queries = [_linear(v, params, f"{name}.q_proj") for v in tokens]
    keys = [_linear(v, params, f"{name}.k_proj") for v in tokens]
    values = [_linear(v, params, f"{name}.v_proj") for v in tokens]
    width = len(tokens[0]) // heads
    out = []
    for query in queries:
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            products = [(query[own] * key[own]).sum() * width**-0.5 for key in keys]
            shares = softmax(torch.stack(products))
            parts.append(sum(share * value[own] for share, value in zip(shares, values, strict=True)))
        out.append(_linear(torch.cat(parts), params, f"{name}.out_proj"))
    return out


def block_branches(tokens, params, i, heads, eps):
    """Block i, counted from 0, on a list of L tokens (D,): the tokens after its attention, and what its MLP adds."""
    name = f"encoder.layers.{i}"
    normed = [_norm(v, params, f"{name}.layer_norm1", eps) for v in tokens]
    attended = attention(normed, params, f"{name}.self_attn", heads)
    tokens = [v + a for v, a in zip(tokens, attended, strict=True)]
    added = []
    for v in tokens:
        h = quick_gelu(_linear(_norm(v, params, f"{name}.layer_norm2", eps), params, f"{name}.mlp.fc1"))
        added.append(_linear(h, params, f"{name}.mlp.fc2"))
    return tokens, added


def block(tokens, params, i, heads, eps):
    """Transformer block i, counted from 0: list of L tokens (D,) -> list of L."""
    return [v + a for v, a in zip(*block_branches(tokens, params, i, heads, eps), strict=True)]


def clip_frame(image, params, *, heads, eps=1e-5):
    """One frame (3, height, width) -> tokens after the last block (L, D), feature of the frame (D,)."""
    tokens = [_norm(v, params, "pre_layrnorm", eps) for v in embed(image, params)]
    i = 0
    while f"encoder.layers.{i}.layer_norm1.weight" in params:
        tokens = block(tokens, params, i, heads, eps)
        i += 1
    return torch.stack(tokens), _norm(tokens[0], params, "post_layernorm", eps)


def naive(pixel_values, params, *, heads, eps=1e-5):
    """Naive on clips (B, T, 3, height, width), float64, of the size the positions were made for.

    Returns logits (B, Y), feature of the clip (B, D), tokens after the last block (B, T, L, D).
    """
    logits, features, tokens = [], [], []
    for clip in pixel_values:
        frames = [clip_frame(image, params, heads=heads, eps=eps) for image in clip]
        feature = sum(frame_feature for _, frame_feature in frames) / len(frames)
        logits.append(_linear(feature, params, "head"))
        features.append(feature)
        tokens.append(torch.stack([frame_tokens for frame_tokens, _ in frames]))
    return torch.stack(logits), torch.stack(features), torch.stack(tokens)
