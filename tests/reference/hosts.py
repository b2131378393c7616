"""STA and ToMe on trained video models as slow loops in float64, one token at a time.

Sources: the papers of the methods as in `sta.py` and `tome.py`, and of the hosts: VideoMAE ("VideoMAE: Masked
Autoencoders are Data-Efficient Learners"), ViViT ("ViViT: A Video Vision Transformer", model 1), V-JEPA 2 ("V-JEPA 2:
Self-Supervised Video Models Enable Understanding, Prediction and Planning", and its released rotary embedding) and
TimeSformer ("Is Space-Time Attention All You Need for Video Understanding?", divided attention).

Letters: B clips, T frames after the tubelet embedding, N patches of a clip, D width, d width of a head, L blocks.
`params`: the float64 state_dict of transformers' ...ForVideoClassification, `config` its configuration. Every host is a
function (clips, params, config, method, **options) -> logits (B, classes). `method` None is the host itself; of "sta"
the options are those of `sta.sta_videomae` and groups (by default T), of "tome" r and prop_attn as in
`tome.tome_blocks`.
"""

import math

import torch

from .inti import gelu, layer_norm, linear
from .sta import pick, prune, sinusoid, stages
from .tome import attend, head_mean, matching, merge, r_schedule


def project(v, params, name):
    return linear(v, params[f"{name}.weight"], params.get(f"{name}.bias", 0))


def norm(v, params, name, eps):
    return layer_norm(v, params[f"{name}.weight"], params[f"{name}.bias"], eps)


def gelu_tanh(v):
    """The approximation of GELU by tanh."""
    return 0.5 * v * (1 + torch.tanh(0.7978845608 * v * (1 + 0.044715 * v * v)))


ACTIVATIONS = {"gelu": gelu, "gelu_fast": gelu_tanh}


def tubelets(clip, kernel, bias):
    """Clip (frames, 3, height, width), kernel (D, 3, t, S, S) -> tokens in order of frame, row and column."""
    t, S = kernel.shape[2], kernel.shape[4]
    tokens = []
    for frame in range(0, len(clip) - t + 1, t):
        for row in range(0, clip.shape[2], S):
            for column in range(0, clip.shape[3], S):
                cube = clip[frame : frame + t, :, row : row + S, column : column + S].transpose(0, 1)
                tokens.append((kernel * cube).sum(dim=(1, 2, 3, 4)) + bias)
    return tokens


def sta_plan(L, G, r, schedule="decreasing", order="F-B-F"):
    """{block from 1: (tokens to drop of each group, direction, number of groups)}."""
    if schedule != "released":
        return {block: (drop, direction, G) for block, drop, direction in stages(L, r, order, schedule)}
    return {block: (r, direction, G // 2**s) for s, (block, _, direction) in enumerate(stages(L, r, order))}


def joint_blocks(tokens, params, names, *, config, T, eps, method, classes=0, rotate=None, **options):
    """Blocks in which all tokens of a clip attend to each other: tokens (N, D) -> tokens (N', D), sizes (N',).

    `names(i)` gives the names of block i's weights (from 0) under "norm1", "query", "key", "value", "out", "norm2",
    "fc1" and "fc2"; the first `classes` tokens are class tokens; `rotate(v, place)` turns a query or key.
    """
    heads, L = config.num_attention_heads, config.num_hidden_layers
    activation = ACTIVATIONS[config.hidden_act]
    similarity, scores = options.pop("similarity", "key"), options.pop("scores", "both")
    prop_attn = options.pop("prop_attn", False)
    plan = sta_plan(L, options.pop("groups", T), **options) if method == "sta" else {}
    counts = r_schedule(L, options["r"]) if method == "tome" else [0] * L
    places = torch.arange(len(tokens)) - classes
    sizes = tokens.new_ones(len(tokens))
    for i in range(L):
        name = names(i)
        normed = [norm(v, params, name["norm1"], eps) for v in tokens]
        features = {kind: [project(v, params, name[kind]) for v in normed] for kind in ("query", "key", "value")}
        queries, keys = features["query"], features["key"]
        if rotate is not None:
            queries = [rotate(v, int(place)) for v, place in zip(queries, places, strict=True)]
            keys = [rotate(v, int(place)) for v, place in zip(keys, places, strict=True)]
        attended = attend(queries, keys, features["value"], heads, torch.log(sizes) if prop_attn else 0)
        tokens = torch.stack([v + project(a, params, name["out"]) for v, a in zip(tokens, attended, strict=True)])
        metric = torch.stack([head_mean(v, heads) for v in features.get(similarity, keys)])
        if counts[i]:
            groups = matching([head_mean(v, heads) for v in features["key"]], counts[i], class_token=classes > 0)
            tokens, sizes = merge(tokens, sizes, groups)
            places = torch.stack([places[destination(group)] for group in groups])
        added = []
        for v in tokens:
            h = activation(project(norm(v, params, name["norm2"], eps), params, name["fc1"]))
            added.append(project(h, params, name["fc2"]))
        added = torch.stack(added)
        tokens = tokens + added
        if i + 1 in plan:
            drop, direction, G = plan[i + 1]
            metric = added if similarity == "ffn" else metric
            patches = tokens[classes:].reshape(G, -1, tokens.shape[1])
            kept = prune(patches, metric[classes:].reshape(G, len(patches[0]), -1), drop, direction, scores)
            tokens = torch.cat([tokens[:classes], pick(patches, kept).reshape(-1, tokens.shape[1])])
            stay = pick(places[classes:].reshape(G, -1), kept).reshape(-1)
            places, sizes = torch.cat([places[:classes], stay]), sizes[: len(tokens)]
    return tokens, sizes


def destination(group):
    """The token of a group into which the others were merged: the one at an odd place, if there are several."""
    return group[0] if len(group) == 1 else next(n for n in group if n % 2)


def videomae(pixel_values, params, config, method, **options):
    """Tokens with fixed positions; the mean of the last tokens, each with the weight of its size, is classified."""

    def names(i):
        layer = f"videomae.encoder.layer.{i}"
        attention = {kind: f"{layer}.attention.attention.{kind}" for kind in ("query", "key", "value")}
        return attention | {
            "norm1": f"{layer}.layernorm_before", "out": f"{layer}.attention.output.dense",
            "norm2": f"{layer}.layernorm_after", "fc1": f"{layer}.intermediate.dense", "fc2": f"{layer}.output.dense",
        }  # fmt: skip

    logits = []
    embedding = "videomae.embeddings.patch_embeddings.projection"
    for clip in pixel_values:
        tokens = tubelets(clip, params[f"{embedding}.weight"], params[f"{embedding}.bias"])
        tokens = torch.stack([v + sinusoid(n, config.hidden_size) for n, v in enumerate(tokens)])
        T = len(clip) // config.tubelet_size
        tokens, sizes = joint_blocks(
            tokens, params, names, config=config, T=T, eps=config.layer_norm_eps, method=method, **options
        )
        mean = sum(v * size for v, size in zip(tokens, sizes, strict=True)) / sizes.sum()
        logits.append(project(norm(mean, params, "fc_norm", 1e-5), params, "classifier"))
    return torch.stack(logits)


def vivit(pixel_values, params, config, method, **options):
    """A class token and tokens with learned positions; the class token is classified."""

    def names(i):
        layer = f"vivit.layers.{i}"
        attention = {kind: f"{layer}.attention.{kind[0]}_proj" for kind in ("query", "key", "value")}
        return attention | {
            "norm1": f"{layer}.layernorm_before", "out": f"{layer}.attention.o_proj",
            "norm2": f"{layer}.layernorm_after", "fc1": f"{layer}.mlp.fc1", "fc2": f"{layer}.mlp.fc2",
        }  # fmt: skip

    logits = []
    embedding = "vivit.embeddings.patch_embeddings.projection"
    for clip in pixel_values:
        tokens = tubelets(clip, params[f"{embedding}.weight"], params[f"{embedding}.bias"])
        tokens = [params["vivit.embeddings.cls_token"][0, 0], *tokens]
        positions = params["vivit.embeddings.position_embeddings"][0]
        tokens = torch.stack([v + position for v, position in zip(tokens, positions, strict=True)])
        T = len(clip) // config.tubelet_size[0]
        tokens, _ = joint_blocks(
            tokens, params, names, config=config, T=T, eps=config.layer_norm_eps, method=method, classes=1, **options
        )
        token = norm(tokens[0], params, "vivit.layernorm", config.layer_norm_eps)
        logits.append(project(token, params, "classifier"))
    return torch.stack(logits)


def rotated(v, place, heads, side):
    """V-JEPA 2's rotary embedding of one query or key (D,) at a place of the clip, numbered row by row and frame by
    frame: of each head, a third is turned by the frame, a third by the row, a third by the column; a rest stays.

    Channels are turned in neighbouring pairs, but channel c of a third of width w has the angle of c modulo w / 2.
    """
    d = len(v) // heads
    width = 2 * (d // 3 // 2)
    position = (place // side**2, place % side**2 // side, place % side)
    out = v.clone()
    for head in range(heads):
        for part in range(3):
            start = head * d + part * width
            for c in range(width):
                angle = position[part] / 10000 ** ((c % (width // 2)) / (width / 2))
                other = -v[start + c + 1] if c % 2 == 0 else v[start + c - 1]
                out[start + c] = v[start + c] * math.cos(angle) + other * math.sin(angle)
    return out


def vjepa2(pixel_values, params, config, method, **options):
    """Tokens without positions but in attention; attentive pooling of the last tokens."""
    eps, heads, side = config.layer_norm_eps, config.num_attention_heads, config.crop_size // config.patch_size

    def names(i):
        layer = f"vjepa2.encoder.layer.{i}"
        attention = {kind: f"{layer}.attention.{kind}" for kind in ("query", "key", "value")}
        return attention | {
            "norm1": f"{layer}.norm1", "out": f"{layer}.attention.proj",
            "norm2": f"{layer}.norm2", "fc1": f"{layer}.mlp.fc1", "fc2": f"{layer}.mlp.fc2",
        }  # fmt: skip

    def mlp(v, name):
        h = ACTIVATIONS[config.hidden_act](
            project(norm(v, params, f"{name}.layer_norm2", eps), params, f"{name}.mlp.fc1")
        )
        return v + project(h, params, f"{name}.mlp.fc2")

    def pool(tokens):
        for i in range(config.num_pooler_layers):
            name = f"pooler.self_attention_layers.{i}"
            normed = [norm(v, params, f"{name}.layer_norm1", eps) for v in tokens]
            parts = ([project(v, params, f"{name}.self_attn.{kind}_proj") for v in normed] for kind in "qkv")
            attended = [project(a, params, f"{name}.self_attn.out_proj") for a in attend(*parts, heads)]
            tokens = [mlp(v + a, name) for v, a in zip(tokens, attended, strict=True)]
        name = "pooler.cross_attention_layer"
        normed = [norm(v, params, f"{name}.layer_norm1", eps) for v in tokens]
        query = params["pooler.query_tokens"][0, 0]
        keys, values = ([project(v, params, f"{name}.cross_attn.{kind}_proj") for v in normed] for kind in "kv")
        attended = attend([project(query, params, f"{name}.cross_attn.q_proj")], keys, values, heads)
        return mlp(query + attended[0], name)

    logits = []
    embedding = "vjepa2.encoder.embeddings.patch_embeddings.proj"
    for clip in pixel_values:
        tokens = torch.stack(tubelets(clip, params[f"{embedding}.weight"], params[f"{embedding}.bias"]))
        T = len(clip) // config.tubelet_size
        tokens, _ = joint_blocks(
            tokens, params, names, config=config, T=T, eps=eps, method=method,
            rotate=lambda v, place: rotated(v, place, heads, side), **options,
        )  # fmt: skip
        pooled = pool([norm(v, params, "vjepa2.encoder.layernorm", eps) for v in tokens])
        logits.append(project(pooled, params, "classifier"))
    return torch.stack(logits)


def timesformer(pixel_values, params, config, method, **options):
    """Attention over time at each place, then within each frame beside the class token, which is classified.

    ToMe merges places: those whose keys, of all frames side by side, are similar, in every frame alike.
    """
    eps, heads, T = config.layer_norm_eps, config.num_attention_heads, config.num_frames
    activation = ACTIVATIONS[config.hidden_act]
    counts = r_schedule(config.num_hidden_layers, options["r"] if method == "tome" else 0)
    logits = []
    for clip in pixel_values:
        cls, x = timesformer_embeddings(clip, params)  # (D,), x[p][t]
        sizes = x.new_ones(len(x))
        for i in range(config.num_hidden_layers):
            name = f"timesformer.encoder.layer.{i}"
            for p in range(len(x)):
                normed = [norm(v, params, f"{name}.temporal_layernorm", eps) for v in x[p]]
                attended, _ = timesformer_attention(normed, params, f"{name}.temporal_attention", heads)
                x[p] = x[p] + torch.stack([project(a, params, f"{name}.temporal_dense") for a in attended])
            out, of_class, keys = x.clone(), [], []
            for t in range(T):
                normed = [norm(v, params, f"{name}.layernorm_before", eps) for v in [cls, *x[:, t]]]
                attended, keys_t = timesformer_attention(normed, params, f"{name}.attention", heads)
                of_class.append(attended[0])
                out[:, t] = x[:, t] + torch.stack(attended[1:])
                keys.append([head_mean(v, heads) for v in keys_t])
            cls, x = cls + sum(of_class) / T, out
            if counts[i]:
                side_by_side = [torch.cat([keys[t][n] for t in range(T)]) for n in range(1 + len(x))]
                groups = [[n - 1 for n in group] for group in matching(side_by_side, counts[i], class_token=True)[1:]]
                merged = [merge(x[:, t], sizes, groups) for t in range(T)]
                x, sizes = torch.stack([tokens for tokens, _ in merged], dim=1), merged[0][1]

            def mlp(v, name=name):
                h = activation(
                    project(norm(v, params, f"{name}.layernorm_after", eps), params, f"{name}.intermediate.dense")
                )
                return v + project(h, params, f"{name}.output.dense")

            cls = mlp(cls)
            x = torch.stack([torch.stack([mlp(v) for v in frames]) for frames in x])
        logits.append(project(norm(cls, params, "timesformer.layernorm", eps), params, "classifier"))
    return torch.stack(logits)


def timesformer_embeddings(clip, params):
    """Clip (T, 3, height, width) -> class token (D,), tokens (places, T, D)."""
    name = "timesformer.embeddings"
    kernel = params[f"{name}.patch_embeddings.projection.weight"][:, :, None]
    positions = params[f"{name}.position_embeddings"][0]
    frames = []
    for frame, time in zip(clip, params[f"{name}.time_embeddings"][0], strict=True):
        tokens = tubelets(frame[None], kernel, params[f"{name}.patch_embeddings.projection.bias"])
        frames.append(torch.stack([v + positions[1 + p] + time for p, v in enumerate(tokens)]))
    return params[f"{name}.cls_token"][0, 0] + positions[0], torch.stack(frames, dim=1)


def timesformer_attention(normed, params, name, heads):
    """List of tokens (D,) -> what attention adds to each, and their keys."""
    D = len(normed[0])
    together = [project(v, params, f"{name}.attention.qkv") for v in normed]
    queries, keys, values = ([v[part * D : (part + 1) * D] for v in together] for part in range(3))
    attended = attend(queries, keys, values, heads)
    return [project(a, params, f"{name}.output.dense") for a in attended], keys
