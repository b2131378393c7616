"""The slow references of the adaptations are themselves checked: against numbers of the authors' released code,
against torch, and against what must hold by construction."""

import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from reference import aim, naive, st_adapter, zeroi2v
from reference import uniformerv2 as uni


C, HEADS, T, GRID = 12, 3, 4, (2, 3)
N = GRID[0] * GRID[1]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got, wanted, atol=1e-12):
    assert_close(got, wanted, rtol=0, atol=atol)


def tower(depth=2):
    """Random weights of a tower on 8 x 12 pixels with patches of 4: the grid above."""
    config = CLIPVisionConfig(
        hidden_size=C,
        intermediate_size=20,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=4,
    )
    shapes = {name: value.shape for name, value in CLIPVisionModel(config).state_dict().items()}
    shapes["embeddings.position_embedding.weight"] = (1 + N, C)
    return {name: value for name, value in filled(shapes).items() if not name.endswith("position_ids")}


def filled(shapes, seed=3):
    """Random tensors of these shapes, none zero; scales of norms are near one, variances above zero."""
    out = {}
    for i, (name, shape) in enumerate(shapes.items()):
        value = normal(*shape, seed=seed * 1000 + i) * (0.4 if len(shape) > 1 else 0.3)
        is_scale = "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight") if "." in name else False
        out[name] = value.abs() + 0.5 if name.endswith("running_var") else value + is_scale
    return out


def linears(name, sizes):
    """{"fc1": (out, in)} -> names and shapes of the weights and biases under `name`."""
    shapes = {}
    for linear, (rows, columns) in sizes.items():
        shapes |= {f"{name}.{linear}.weight": (rows, columns), f"{name}.{linear}.bias": (rows,)}
    return shapes


def local_shapes(name, r=8):
    shapes = {f"{name}.norm.{kind}": (C,) for kind in ("weight", "bias", "running_mean", "running_var")}
    shapes |= linears(name, {"reduce": (r, C), "expand": (C, r)})
    return shapes | {f"{name}.conv.weight": (r, 1, 3, 1, 1), f"{name}.conv.bias": (r,)}


def global_shapes(name):
    shapes = {
        f"{name}.norm_{which}.{kind}": (C,) for which in ("query", "tokens", "mlp") for kind in ("weight", "bias")
    }
    shapes |= linears(name, {f"{kind}_proj": (C, C) for kind in ("q", "k", "v", "out")})
    shapes |= linears(name, {"fc1": (4 * C, C), "fc2": (C, 4 * C)})
    return shapes | {f"{name}.dpe.weight": (C, 1, 3, 3, 3), f"{name}.dpe.bias": (C,)}


def uniformerv2_params(depth=2, readers=2):
    shapes = {"adaptation.query": (C,), "adaptation.balance": (C,)}
    shapes |= {"adaptation.norm.weight": (C,), "adaptation.norm.bias": (C,)}
    shapes |= {f"adaptation.{which}.weight": (C, 3, 4, 4) for which in ("before", "after")}
    for i in range(depth):
        shapes |= local_shapes(f"adaptation.local1.{i}") | local_shapes(f"adaptation.local2.{i}")
    for j in range(readers):
        shapes |= global_shapes(f"adaptation.global_blocks.{j}")
    return tower(depth) | filled(shapes)


def adapter_params(places, depth=2, r=5):
    """ZeroI2V's and AIM's."""
    shapes = {"adaptation.temporal_embedding.P": (T, 1, C)}
    for place, i in product(places, range(depth)):
        shapes |= linears(f"adaptation.{place}.{i}", {"down": (r, C), "up": (C, r)})
    return tower(depth) | filled(shapes)


ZEROI2V = ("attention_in", "attention_out", "mlp_in", "mlp_out")
AIM = ("temporal_in", "temporal_out", "spatial", "parallel")


def st_adapter_params(depth=2, adapters=2, r=5):
    shapes = {}
    for place, n in product(("pre_attention", "pre_mlp"), range(adapters)):
        name = f"adaptation.{place}.{n}"
        shapes |= linears(name, {"down": (r, C), "up": (C, r)})
        shapes |= {f"{name}.conv.weight": (r, 1, 3, 1, 1), f"{name}.conv.bias": (r,)}
    return tower(depth) | filled(shapes)


def silenced(params, *endings):
    """`params` with every tensor whose name ends in one of `endings` at zero."""
    found = [name for name in params if name.startswith("adaptation") and name.endswith(endings)]
    assert found
    return params | {name: torch.zeros_like(params[name]) for name in found}


def naive_feature(pixels, params):
    """Mean over frames of CLIP's class token behind post_layernorm, from the reference of Naive."""
    head = {"head.weight": torch.zeros(1, C, dtype=torch.float64), "head.bias": torch.zeros(1, dtype=torch.float64)}
    _, feature, tokens = naive.naive(pixels, params | head, heads=HEADS)
    return feature, tokens


def clips(B=1, frames=T):
    return normal(B, frames, 3, 8, 12, seed=7)


# Numbers of the authors' code, and our names for their parameters.


@pytest.fixture
def vector(test_data):
    """A function: name of a file -> tensors in float64 by name, options."""

    def read(name):
        with safe_open(test_data / "vectors" / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key).double() for key in file.keys()}
            return tensors, json.loads(file.metadata()["options"])

    return read


def part(tensors, prefix):
    """The tensors under `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def packed_attention(theirs, into="self_attn."):
    """in_proj_* (3C, C) in the order q, k, v, and out_proj -> four Linears."""
    ours = {f"{into}out_proj.{kind}": theirs[f"out_proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        for letter, piece in zip("qkv", theirs[f"in_proj_{kind}"].chunk(3), strict=True):
            ours[f"{into}{letter}_proj.{kind}"] = piece
    return ours


def clip_block(theirs, i):
    ours = packed_attention(part(theirs, "attn."))
    for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
        ours |= {f"{b}.{kind}": theirs[f"{a}.{kind}"] for kind in ("weight", "bias")}
    return {f"encoder.layers.{i}.{name}": value for name, value in ours.items()}


def clip_tower(theirs):
    ours = {
        "embeddings.class_embedding": theirs["class_embedding"],
        "embeddings.position_embedding.weight": theirs["positional_embedding"],
    }
    kernel = theirs["conv1.weight"]  # (C, 3, p, p), or (C, 3, frames, p, p)
    if kernel.ndim == 5:
        if kernel.shape[2] == 3:
            ours["adaptation.before.weight"], ours["adaptation.after.weight"] = kernel[:, :, 0], kernel[:, :, 2]
        kernel = kernel[:, :, kernel.shape[2] // 2]
    ours["embeddings.patch_embedding.weight"] = kernel
    for a, b in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        ours |= {f"{b}.{name}": value for name, value in part(theirs, f"{a}.").items()}
    return ours


def adapters(theirs, i, names):
    """{their name: ours} of adapters with two Linears."""
    ours = {}
    for a, b in names.items():
        for kind in ("weight", "bias"):
            if f"{a}.D_fc1.{kind}" in theirs:
                ours[f"adaptation.{b}.{i}.down.{kind}"] = theirs[f"{a}.D_fc1.{kind}"]
                ours[f"adaptation.{b}.{i}.up.{kind}"] = theirs[f"{a}.D_fc2.{kind}"]
    return ours


def local_units(theirs, i):
    ours = {}
    for which in (1, 2):
        for a, b in enumerate(("norm", "reduce", "conv", "expand")):
            for kind, value in part(theirs, f"lmhra{which}.pos_embed.{a}.").items():
                # The 1 x 1 x 1 convolutions are Linears.
                value = value.flatten(1) if b in ("reduce", "expand") and kind == "weight" else value
                ours[f"adaptation.local{which}.{i}.{b}.{kind}"] = value
    return ours


def global_reader(theirs, dpe, j):
    ours = packed_attention(part(theirs, "attn."), into="")
    renamed = {"ln_1": "norm_query", "ln_3": "norm_tokens", "ln_2": "norm_mlp", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
    for a, b in renamed.items():
        ours |= {f"{b}.{kind}": theirs[f"{a}.{kind}"] for kind in ("weight", "bias")}
    ours |= {f"dpe.{kind}": dpe[kind] for kind in ("weight", "bias")}
    return {f"adaptation.global_blocks.{j}.{name}": value for name, value in ours.items()}


ZEROI2V_NAMES = {
    "T_Adapter_in": "attention_in",
    "S_Adapter": "attention_out",
    "MLP_Adapter": "mlp_in",
    "MLP_Adapter_out": "mlp_out",
}
AIM_NAMES = {
    "T_Adapter_in": "temporal_in",
    "T_Adapter": "temporal_out",
    "S_Adapter": "spatial",
    "MLP_Adapter": "parallel",
}


def with_adapters(theirs, names, layers):
    ours = clip_tower(theirs)
    ours["adaptation.temporal_embedding.P"] = theirs["temporal_embedding"].transpose(0, 1)
    for i in range(layers):
        block = part(theirs, f"transformer.resblocks.{i}.")
        ours |= clip_block(block, i) | adapters(block, i, names)
    return ours


def per_clip(x, frames):
    """(L, B * T, C), column b * T + t -> (B, T, L, C)."""
    return x.transpose(0, 1).unflatten(0, (-1, frames))


def pixels_of(tensors):
    return tensors["in.pixels"].transpose(1, 2)  # to (B, T, 3, height, width)


# The operations against torch's.


@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3), (1, 3, 5)])
def test_convolution_matches_torch(kernel):
    x, weight, bias = normal(T, *GRID, C), normal(C, 1, *kernel, seed=1), normal(C, seed=2)
    volume = {place: x[place] for place in product(range(T), range(GRID[0]), range(GRID[1]))}
    out = uni.depthwise_conv(volume, weight, bias)
    got = torch.stack([out[place] for place in volume]).reshape(x.shape)
    padding = [size // 2 for size in kernel]
    wanted = F.conv3d(x.permute(3, 0, 1, 2), weight, bias, padding=padding, groups=C)
    same(got, wanted.permute(1, 2, 3, 0))


def test_attend_and_mlp_match_torch():
    query, keys, values = normal(C), normal(5, C, seed=1), normal(5, C, seed=2)
    q, k, v = (z.reshape(-1, HEADS, C // HEADS).transpose(0, 1) for z in (query, keys, values))
    wanted = F.scaled_dot_product_attention(q, k, v).reshape(C)
    same(uni.attend(query, list(keys), list(values), HEADS), wanted)
    params = filled(linears("m", {"fc1": (7, C), "fc2": (C, 7)}))
    h = F.linear(query, params["m.fc1.weight"], params["m.fc1.bias"])
    wanted = F.linear(h * torch.sigmoid(1.702 * h), params["m.fc2.weight"], params["m.fc2.bias"])
    same(uni.mlp(query, params, "m"), wanted)


def test_places_by_hand():
    wanted = [[(0, 0, 0), (0, 1, 2)], [(1, 0, 2), (1, 1, 0)]]
    assert uni.places(torch.tensor([[0, 5], [2, 3]]), GRID) == wanted
    for bad in ([[1, 1]], [[0, 6]], [[-1, 0]]):
        with pytest.raises(ValueError, match="want different places"):
            uni.places(torch.tensor(bad), GRID)


# UniFormerV2.


def torch_unit(p, params, name, training=False, holes=None):
    """The local unit with torch on clips (B, T, rows, columns, C); `holes` are zeroed before the convolution."""
    h = p.permute(0, 4, 1, 2, 3)
    mean, variance = params[f"{name}.norm.running_mean"].clone(), params[f"{name}.norm.running_var"].clone()
    h = F.batch_norm(h, mean, variance, params[f"{name}.norm.weight"], params[f"{name}.norm.bias"], training)
    h = F.linear(h.permute(0, 2, 3, 4, 1), params[f"{name}.reduce.weight"], params[f"{name}.reduce.bias"])
    if holes is not None:
        h = h.masked_fill(holes[..., None], 0)
    h = h.permute(0, 4, 1, 2, 3)
    h = F.conv3d(h, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"], padding=(1, 0, 0), groups=h.shape[1])
    return F.linear(h.permute(0, 2, 3, 4, 1), params[f"{name}.expand.weight"], params[f"{name}.expand.bias"])


def test_local_unit_matches_torch():
    p, params = normal(2, T, *GRID, C), filled(local_shapes("u"))
    for clip, wanted in zip(p, torch_unit(p, params, "u"), strict=True):
        same(uni.local_mhra(clip, params, "u"), wanted)
    statistics = uni.batch_statistics(p.flatten(2, 3))
    same(statistics[0], p.mean(dim=(0, 1, 2, 3)))
    for clip, wanted in zip(p, torch_unit(p, params, "u", training=True), strict=True):
        same(uni.local_mhra(clip, params, "u", statistics=statistics), wanted)


POSITIONS = torch.tensor([[4, 0, 1, 3], [0, 5, 3, 2], [1, 2, 3, 4], [5, 4, 2, 0]])  # in any order, 2 of 6 left out


def scattered(tokens):
    """(T, 4, C) at POSITIONS -> the grid (T, rows, columns, C) with zeros elsewhere, where it is empty."""
    grid = torch.zeros(T, N, C, dtype=torch.float64).scatter(1, POSITIONS[..., None].expand(-1, -1, C), tokens)
    empty = torch.ones(T, N, dtype=torch.bool).scatter(1, POSITIONS, False)
    return grid.reshape(T, *GRID, C), empty.reshape(T, *GRID)


def gathered(grid):
    return grid.reshape(T, N, C).gather(1, POSITIONS[..., None].expand(-1, -1, C))


def test_irregular_local_unit_matches_torch_on_a_grid_with_holes():
    tokens, params = normal(T, 4, C), filled(local_shapes("u"))
    grid, holes = scattered(tokens)
    wanted = gathered(torch_unit(grid[None], params, "u", holes=holes[None])[0])
    same(uni.local_mhra_irregular(tokens, POSITIONS, GRID, params, "u"), wanted)
    # The holes are zeros after the reduction, not before it.
    assert (gathered(torch_unit(grid[None], params, "u")[0]) - wanted).abs().max() > 1e-3


def test_irregular_position_encoding_matches_torch_on_a_grid_with_holes():
    tokens, params = normal(T, 4, C), filled({"dpe.weight": (C, 1, 3, 3, 3), "dpe.bias": (C,)})
    grid, _ = scattered(tokens)
    wanted = F.conv3d(grid.permute(3, 0, 1, 2), params["dpe.weight"], params["dpe.bias"], padding=1, groups=C)
    same(uni.add_position(tokens, POSITIONS, GRID, params, "dpe"), tokens + gathered(wanted.permute(1, 2, 3, 0)))


def torch_global(query, read, params, name):
    """The reader behind its DPE with torch: query (C,), n tokens (n, C) -> (C,)."""

    def norm(v, which):
        return F.layer_norm(v, (C,), params[f"{name}.norm_{which}.weight"], params[f"{name}.norm_{which}.bias"])

    weights = torch.cat([params[f"{name}.{kind}_proj.weight"] for kind in "qkv"])
    biases = torch.cat([params[f"{name}.{kind}_proj.bias"] for kind in "qkv"])
    out_proj = params[f"{name}.out_proj.weight"], params[f"{name}.out_proj.bias"]
    y = norm(read, "tokens")[:, None]
    attended, _ = F.multi_head_attention_forward(
        norm(query, "query")[None, None], y, y, C, HEADS, weights, biases, None, None, False, 0.0, *out_proj
    )
    query = query + attended[0, 0]
    h = F.linear(norm(query, "mlp"), params[f"{name}.fc1.weight"], params[f"{name}.fc1.bias"])
    return query + F.linear(h * torch.sigmoid(1.702 * h), params[f"{name}.fc2.weight"], params[f"{name}.fc2.bias"])


@pytest.mark.parametrize("irregular", [False, True])
def test_global_block_matches_torch(irregular):
    params, name = filled(global_shapes("adaptation.global_blocks.0")), "adaptation.global_blocks.0"
    tokens, query = normal(T, 1 + (4 if irregular else N), C, seed=4), normal(C, seed=5)
    patches = tokens[:, 1:]
    grid = scattered(patches)[0] if irregular else patches.reshape(T, *GRID, C)
    weight, bias = params[f"{name}.dpe.weight"], params[f"{name}.dpe.bias"]
    grid = F.conv3d(grid.permute(3, 0, 1, 2), weight, bias, padding=1, groups=C).permute(1, 2, 3, 0)
    patches = patches + (gathered(grid) if irregular else grid.reshape(T, N, C))
    wanted = torch_global(query, torch.cat([tokens[:, 0], patches.flatten(0, 1)]), params, name)
    positions = POSITIONS if irregular else None
    same(uni.global_block(query, tokens, GRID, params, 0, heads=HEADS, positions=positions), wanted)


def test_local_unit_against_the_authors_numbers(vector):
    tensors, _ = vector("uniformerv2_local_mhra")
    params = local_units({f"lmhra1.{name}": value for name, value in part(tensors, "param.").items()}, 0)
    x = tensors["in.x"].permute(0, 2, 3, 4, 1)  # (B, T, rows, columns, C)
    statistics = uni.batch_statistics(x.flatten(2, 3))
    for b in range(len(x)):
        evaluated = uni.local_mhra(x[b], params, "adaptation.local1.0")
        trained = uni.local_mhra(x[b], params, "adaptation.local1.0", statistics=statistics)
        same(evaluated.permute(3, 0, 1, 2), tensors["out64.y_eval"][b], atol=1e-9)
        same(trained.permute(3, 0, 1, 2), tensors["out.y_train"][b], atol=1e-5)


@pytest.mark.parametrize("local", ["single", "double"])
def test_block_against_the_authors_numbers(vector, local):
    tensors, options = vector(f"uniformerv2_block_{local}")
    params = clip_block(part(tensors, "param."), 0) | local_units(part(tensors, "param."), 0)
    x, wanted = (per_clip(tensors[name], options["T"]) for name in ("in.x", "out64.y"))
    grid = (options["H"], options["H"])
    for clip, out in zip(x, wanted, strict=True):
        same(uni.block(clip, params, 0, heads=options["heads"], grid=grid, local=local), out, atol=1e-9)


def test_global_block_against_the_authors_numbers(vector):
    tensors, options = vector("uniformerv2_global_attn")
    # Their numbers are without DPE: a zero one adds nothing.
    dpe = {"weight": torch.zeros(options["C"], 1, 3, 3, 3), "bias": torch.zeros(options["C"])}
    params = global_reader(part(tensors, "param."), {name: value.double() for name, value in dpe.items()}, 0)
    only = silenced(params, "fc2.weight", "fc2.bias")
    for n in range(options["N"]):
        query, tokens = tensors["in.query"][0, n], tensors["in.tokens"][:, n].reshape(4, 10, -1)
        got = uni.global_block(query, tokens, (3, 3), params, 0, heads=options["heads"])
        same(got, tensors["out64.y"][0, n], atol=1e-9)
        got = uni.global_block(query, tokens, (3, 3), only, 0, heads=options["heads"])
        same(got - query, tensors["out64.attn_only"][0, n], atol=1e-9)


@pytest.mark.parametrize("name", ["uniformerv2_model_k400", "uniformerv2_model_ssv2_td"])
def test_uniformerv2_against_the_authors_numbers(vector, name):
    tensors, options = vector(name)
    theirs = part(tensors, "param.")
    params = clip_tower(theirs)
    for i in range(options["layers"]):
        block = part(theirs, f"transformer.resblocks.{i}.")
        params |= clip_block(block, i) | local_units(block, i)
    for j in range(len(options["return_list"])):
        params |= global_reader(part(theirs, f"transformer.dec.{j}."), part(theirs, f"transformer.dpe.{j}."), j)
    params["adaptation.query"] = theirs["transformer.temporal_cls_token"].flatten()
    params["adaptation.balance"] = theirs["transformer.balance"]
    params |= {f"adaptation.norm.{kind}": theirs[f"transformer.proj.0.{kind}"] for kind in ("weight", "bias")}
    feature, tokens = uni.model(
        pixels_of(tensors),
        params,
        heads=options["heads"],
        global_layers=[i + 1 for i in options["return_list"]],
        local="none" if options["no_lmhra"] else "double",
        temporal_downsample=options["temporal_downsample"],
    )
    logits = F.linear(feature, theirs["transformer.proj.2.weight"], theirs["transformer.proj.2.bias"])
    same(logits, tensors["out64.logits"], atol=1e-9)
    wanted = F.layer_norm(
        tensors["out64.fused_feature"],
        (options["C"],),
        params["adaptation.norm.weight"],
        params["adaptation.norm.bias"],
    )
    same(feature, wanted, atol=1e-9)
    last = per_clip(tensors[f"out.block_out.{options['layers'] - 1}"], tokens.shape[1])
    same(tokens, last, atol=1e-4)  # theirs in float32


def test_patches_in_time_match_torch():
    params = uniformerv2_params()
    taps = ("adaptation.before", "embeddings.patch_embedding", "adaptation.after")
    kernel = torch.stack([params[f"{name}.weight"] for name in taps], dim=2)
    for frames in (4, 5):
        clip = clips(frames=frames)[0]
        got = uni.stack_tokens(uni.patches_in_time(clip, params))
        wanted = F.conv3d(clip.transpose(0, 1), kernel, stride=(2, 4, 4), padding=(1, 0, 0)).flatten(2)
        positions = params["embeddings.position_embedding.weight"]
        same(got[:, 1:], wanted.permute(1, 2, 0) + positions[1:])
        same(got[:, 0], (params["embeddings.class_embedding"] + positions[0]).expand(len(got), C))


def test_silent_uniformerv2_leaves_the_tower_as_it_is():
    params, pixels = uniformerv2_params(), clips(2)
    params = silenced(params, "expand.weight", "expand.bias")
    _, wanted = naive_feature(pixels, params)
    _, tokens = uni.model(pixels, params, heads=HEADS, global_layers=[2], local="double")
    same(tokens, wanted)


def test_fusion_of_query_and_class_tokens():
    params, pixels = uniformerv2_params(), clips()
    options = {"heads": HEADS, "global_layers": [1, 2], "local": "single"}
    _, tokens = uni.model(pixels, params, **options)
    norm = params["adaptation.norm.weight"], params["adaptation.norm.bias"]
    # Far above zero the balance is all class tokens, far below all query, which is what frozen means.
    params["adaptation.balance"] = torch.full((C,), 50.0, dtype=torch.float64)
    feature, _ = uni.model(pixels, params, **options)
    same(feature, F.layer_norm(tokens[:, :, 0].mean(dim=1), (C,), *norm), atol=1e-10)
    query = params["adaptation.query"]
    # A single reader after the last block of a tower without local units, by its parts.
    x = torch.stack([naive.clip_frame(image, params, heads=HEADS)[0] for image in pixels[0]])
    params["adaptation.balance"] = torch.full((C,), -50.0, dtype=torch.float64)
    query = uni.global_block(query, x, GRID, params, 0, heads=HEADS)
    wanted = F.layer_norm(query, (C,), *norm)[None]
    feature, _ = uni.model(pixels, params, heads=HEADS, global_layers=[2])
    same(feature, wanted, atol=1e-10)
    del params["adaptation.balance"]
    feature, _ = uni.model(pixels, params, heads=HEADS, global_layers=[2], frozen=True)
    same(feature, wanted)


def test_halving_averages_pairs_before_the_global_block_reads():
    params, pixels = uniformerv2_params(), clips()
    once = {"heads": HEADS, "global_layers": [1, 2], "local": "double"}
    _, whole = uni.model(pixels, params, **once)
    feature, tokens = uni.model(pixels, params, **once, halve_after=[2])
    same(tokens, (whole[:, 0::2] + whole[:, 1::2]) / 2)
    # Every frame twice, halved after block 1, without local units: the readers must see the short clip, and not
    # the long one, whose frames have other neighbours in the DPE.
    once["local"] = "none"
    wanted, tokens = uni.model(pixels, params, **once)
    twice = pixels.repeat_interleave(2, dim=1)
    got, halved = uni.model(twice, params, **once, halve_after=[1])
    same(halved, tokens)
    same(got, wanted)
    late, _ = uni.model(twice, params, **once, halve_after=[2])
    assert (late - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="want an even number"):
        uni.model(pixels[:, :3], params, **once, halve_after=[1])
    with pytest.raises(ValueError, match="want one of"):
        uni.model(pixels, params, heads=HEADS, global_layers=[1], local="triple")


def test_irregular_block_in_another_order():
    # A full grid in another order is the same block in that order.
    params, x = uniformerv2_params(), normal(T, 1 + N, C)
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(t)) for t in range(T)])
    index = torch.cat([torch.zeros(T, 1, dtype=torch.long), 1 + order], dim=1)[..., None].expand(-1, -1, C)
    options = {"heads": HEADS, "grid": GRID, "local": "double"}
    wanted = uni.block(x, params, 0, **options).gather(1, index)
    same(uni.block(x.gather(1, index), params, 0, **options, positions=order), wanted)
    assert (uni.block(x.gather(1, index), params, 0, **options) - wanted).abs().max() > 1e-3


# ZeroI2V.


def test_channel_groups_by_hand():
    assert zeroi2v.channel_groups({1: 1, -1: 1}, 3, 12) == [(0, 4, -1), (4, 8, 1)]
    assert zeroi2v.channel_groups({2: 0.5, 1: 0.5, -2: 1, -1: 0.5}, 3, 12) == [
        (0, 2, -1),
        (2, 4, 1),
        (4, 8, -2),
        (8, 10, 2),
    ]
    assert zeroi2v.channel_groups({}, 3, 12) == []
    for bad in ({-1: 0.3}, {-1: 2, 1: 2}):
        with pytest.raises(ValueError, match="want whole channels"):
            zeroi2v.channel_groups(bad, 3, 12)


def test_shift_by_hand():
    k = torch.arange(4.0, dtype=torch.float64).reshape(4, 1, 1).expand(4, 2, 5)  # every channel is its frame
    got = zeroi2v.shift(k, [(0, 1, -1), (1, 2, 1), (2, 3, -2), (3, 4, 2)])
    wanted = torch.tensor([[0, 1, 0, 2, 0], [0, 2, 1, 3, 1], [1, 3, 0, 2, 2], [2, 3, 1, 3, 3]], dtype=torch.float64)
    same(got, wanted[:, None].expand(4, 2, 5))


@pytest.mark.parametrize("name", ["zeroi2v_stdha_1head_each", "zeroi2v_stdha_long"])
def test_stdha_against_the_authors_numbers(vector, name):
    tensors, options = vector(name)
    shifts = {offset: (to - start) / options["head_dim"] for start, to, offset in _ranges(options)}
    groups = zeroi2v.channel_groups(shifts, options["heads"], options["C"])
    assert groups == [tuple(group) for group in _ranges(options)]
    params = packed_attention(part(tensors, "param."), into="a.")
    x, shifted, y = (per_clip(tensors[key], options["T"]) for key in ("in.x", "out.shifted", "out64.y"))
    for b in range(options["B"]):
        same(zeroi2v.shift(x[b], groups), shifted[b], atol=0)
        same(zeroi2v.attention(x[b], params, "a", options["heads"], groups), y[b], atol=1e-9)


def _ranges(options):
    return options["channel_ranges_from_to_frame_offset"]


def _shifts(options):
    """{"shift_div": d}: C / d channels read a frame back, as many a frame ahead."""
    share = options["heads"] / options["stdha_cfg"]["shift_div"]
    return {-1: share, 1: share}


@pytest.mark.parametrize("name", ["zeroi2v_block_merge", "zeroi2v_block_merge_nt1"])
def test_zeroi2v_block_and_merge_against_the_authors_numbers(vector, name):
    tensors, options = vector(name)
    theirs = part(tensors, "param.")
    params = clip_block(theirs, 0) | adapters(theirs, 0, ZEROI2V_NAMES)
    given = {"scale": options["adapter_scale"], "num_tadapter": options["num_tadapter"]}
    groups = zeroi2v.channel_groups(_shifts(options), options["heads"], options["C"])
    merged = zeroi2v.merge_block(params, 0, **given)
    wanted_weights = clip_block(part(tensors, "merged."), 0)
    assert set(merged) <= set(wanted_weights)
    for key, value in wanted_weights.items():
        same(merged.get(key, params[key]), value, atol=1e-6)  # theirs in float32
    x = per_clip(tensors["in.x"], options["T"])
    wanted, after_merge = (per_clip(tensors[key], options["T"]) for key in ("out64.y", "out64.y_after_merge"))
    call = {"heads": options["heads"], "groups": groups}
    for b in range(options["B"]):
        same(zeroi2v.block(x[b], params, 0, **call, **given), wanted[b], atol=1e-9)
        got = zeroi2v.block(x[b], params | merged, 0, **call, **{**given, "scale": 0.0})
        same(got, after_merge[b], atol=1e-9)


def test_zeroi2v_against_the_authors_numbers(vector):
    tensors, options = vector("zeroi2v_model")
    params = with_adapters(part(tensors, "param."), ZEROI2V_NAMES, options["layers"])
    given = {"scale": options["adapter_scale"], "num_tadapter": options["num_tadapter"]}
    got = zeroi2v.model(pixels_of(tensors), params, heads=options["heads"], shifts=_shifts(options), **given)
    same(got, tensors["out64.video_feature"], atol=1e-9)


def torch_linear(v, params, name):
    return F.linear(v, params[f"{name}.weight"], params[f"{name}.bias"])


def test_stdha_matches_torch():
    params, x = tower(), normal(T, 1 + N, C)
    name = "encoder.layers.0.self_attn"
    q, k, v = (torch_linear(x, params, f"{name}.{kind}_proj") for kind in "qkv")
    # Head 0 reads one frame back and head 1 two frames ahead, in keys and values alike; head 2 stays.
    for z in (k, v):
        before = z.clone()
        z[1:, :, :4] = before[:-1, :, :4]
        z[:-2, :, 4:8] = before[2:, :, 4:8]
    q, k, v = (z.reshape(T, 1 + N, HEADS, 4).transpose(1, 2) for z in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    got = zeroi2v.attention(x, params, name, HEADS, [(0, 4, -1), (4, 8, 2)])
    same(got, torch_linear(h, params, f"{name}.out_proj"))


def test_temporal_embedding_comes_before_the_first_norm():
    params, pixels = adapter_params(ZEROI2V), clips()
    tokens = torch.stack([torch.stack(naive.embed(image, params)) for image in pixels[0]])
    moved = tokens + params["adaptation.temporal_embedding.P"]
    norm = params["pre_layrnorm.weight"], params["pre_layrnorm.bias"]
    same(zeroi2v.embed_clip(pixels[0], params), F.layer_norm(moved, (C,), *norm))


@pytest.mark.parametrize("num_tadapter", [1, 2])
def test_zeroi2v_merges(num_tadapter):
    params, x = adapter_params(ZEROI2V), normal(T, 1 + N, C)
    if num_tadapter == 1:  # not even read
        params = {name: value for name, value in params.items() if "mlp_out" not in name}
    call = {"heads": HEADS, "groups": [(0, 4, -1), (4, 6, 1)], "num_tadapter": num_tadapter}
    wanted = zeroi2v.block(x, params, 0, **call, scale=0.7)
    merged = params | zeroi2v.merge_block(params, 0, scale=0.7, num_tadapter=num_tadapter)
    same(zeroi2v.block(x, merged, 0, **call, scale=0.0), wanted, atol=1e-11)
    assert (zeroi2v.block(x, params, 0, **call, scale=0.0) - wanted).abs().max() > 1e-2


def test_silent_zeroi2v_is_naive():
    params, pixels = adapter_params(ZEROI2V), clips(2)
    params = silenced(params, "up.weight", "up.bias", ".P")
    wanted, _ = naive_feature(pixels, params)
    given = {"heads": HEADS, "scale": 0.5, "num_tadapter": 2}
    same(zeroi2v.model(pixels, params, shifts={}, **given), wanted)
    assert (zeroi2v.model(pixels, params, shifts={-1: 1}, **given) - wanted).abs().max() > 1e-3
    # Equal frames have equal neighbours: the shift changes nothing.
    still = pixels[:, :1].expand(-1, T, -1, -1, -1)
    same(zeroi2v.model(still, params, shifts={-1: 1, 2: 1.5}, **given), naive_feature(still, params)[0])


# AIM.


def test_aim_block_against_the_authors_numbers(vector):
    tensors, options = vector("aim_block_1t")
    theirs = part(tensors, "param.")
    params = clip_block(theirs, 0) | adapters(theirs, 0, AIM_NAMES)
    x, wanted = (per_clip(tensors[key], options["T"]) for key in ("in.x", "out64.y"))
    given = {name: options[name] for name in ("heads", "scale", "num_tadapter")}
    for b in range(options["B"]):
        same(aim.block(x[b], params, 0, **given), wanted[b], atol=1e-9)


def test_aim_against_the_authors_numbers(vector):
    tensors, options = vector("aim_model_2t")
    params = with_adapters(part(tensors, "param."), AIM_NAMES, options["layers"])
    given = {"heads": options["heads"], "scale": options["adapter_scale"], "num_tadapter": options["num_tadapter"]}
    same(aim.model(pixels_of(tensors), params, **given), tensors["out64.video_feature"], atol=1e-9)


def test_aim_adapter_matches_torch():
    params, v = filled(linears("a", {"down": (5, C), "up": (C, 5)})), normal(C)
    h = F.gelu(F.linear(v, params["a.down.weight"], params["a.down.bias"]))
    same(aim.adapter(v, params, "a"), F.linear(h, params["a.up.weight"], params["a.up.bias"]))


@pytest.mark.parametrize("num_tadapter", [1, 2])
def test_aim_block_matches_torch(num_tadapter):
    params, x = adapter_params(AIM), normal(T, 1 + N, C)
    name = "encoder.layers.0"

    def norm(v, which):
        return F.layer_norm(v, (C,), params[f"{name}.{which}.weight"], params[f"{name}.{which}.bias"])

    def adapt(v, place):
        place = f"adaptation.{place}.0"
        return torch_linear(F.gelu(torch_linear(v, params, f"{place}.down")), params, f"{place}.up")

    def attend(v):
        projected = (torch_linear(v, params, f"{name}.self_attn.{kind}_proj") for kind in "qkv")
        heads = (z.unflatten(2, (HEADS, -1)).transpose(1, 2) for z in projected)
        read = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return torch_linear(read, params, f"{name}.self_attn.out_proj")

    h = norm(x, "layer_norm1").transpose(0, 1)  # (L, T, C)
    if num_tadapter == 2:
        h = h + adapt(h, "temporal_in")
    v = x + adapt(attend(h), "temporal_out").transpose(0, 1)
    h = attend(norm(v, "layer_norm1"))
    v = v + h + adapt(h, "spatial")
    h = norm(v, "layer_norm2")
    hidden = torch_linear(h, params, f"{name}.mlp.fc1")
    mlp = torch_linear(hidden * torch.sigmoid(1.702 * hidden), params, f"{name}.mlp.fc2")
    wanted = v + mlp + 0.3 * adapt(h, "parallel")
    same(aim.block(x, params, 0, heads=HEADS, scale=0.3, num_tadapter=num_tadapter), wanted)


def test_silent_aim_is_naive():
    params, pixels = adapter_params(AIM), clips(2)
    silent = silenced(params, "up.weight", "up.bias", ".P")
    for num_tadapter in (1, 2):
        got = aim.model(pixels, silent, heads=HEADS, scale=0.5, num_tadapter=num_tadapter)
        same(got, naive_feature(pixels, silent)[0])


def test_order_of_frames_in_aim():
    # Attention over time has no order of its own: only the temporal embedding tells a clip from its reverse.
    params, pixels = adapter_params(AIM), clips()
    given = {"heads": HEADS, "scale": 0.5, "num_tadapter": 2}
    assert (aim.model(pixels, params, **given) - aim.model(pixels.flip(1), params, **given)).abs().max() > 1e-3
    params = silenced(params, ".P")
    same(aim.model(pixels.flip(1), params, **given), aim.model(pixels, params, **given), atol=1e-11)


@pytest.mark.parametrize("model", ["zeroi2v", "aim"])
def test_temporal_embedding_is_stretched(model):
    params, pixels = adapter_params(ZEROI2V if model == "zeroi2v" else AIM), clips(frames=2)
    given = {"heads": HEADS, "scale": 0.5, "num_tadapter": 2} | ({"shifts": {-1: 1}} if model == "zeroi2v" else {})
    run = zeroi2v.model if model == "zeroi2v" else aim.model
    P = params["adaptation.temporal_embedding.P"]
    shrunk = F.interpolate(P[:, 0].T[None], size=2, mode="linear", align_corners=False)[0].T[:, None]
    same(run(pixels, params, **given), run(pixels, params | {"adaptation.temporal_embedding.P": shrunk}, **given))


# ST-Adapter.


def test_st_adapter_against_the_authors_numbers(vector):
    tensors, options = vector("stadapter_adapter")
    renamed = {"fc1": "down", "conv": "conv", "fc2": "up"}
    params = {f"a.{renamed[n]}.{kind}": tensors[f"param.{n}.{kind}"] for n in renamed for kind in ("weight", "bias")}
    x, wanted = (tensors[key].unflatten(0, (options["B"], options["T"])) for key in ("in.x", "out64.y"))
    for b in range(options["B"]):
        got = st_adapter.adapter(x[b], params, "a", grid=(options["H"], options["H"]))
        same(got, wanted[b], atol=1e-9)


def test_st_adapter_model_against_the_authors_numbers(vector):
    tensors, options = vector("stadapter_model_pre_mlp")
    theirs = part(tensors, "param.")
    params = clip_tower(theirs)
    for i in range(options["layers"]):
        block = part(theirs, f"transformer.resblocks.{i}.")
        params |= clip_block(block, i)
        for a, b in {"fc1": "down", "conv": "conv", "fc2": "up"}.items():
            for kind, value in part(block, f"adapter_pre_mlp.{a}.").items():
                params[f"adaptation.pre_mlp.{i}.{b}.{kind}"] = value
    given = {"heads": options["heads"], "num_layers": options["adapter_layers"]}
    feature = st_adapter.model(pixels_of(tensors), params, **given, pre_attention=False, pre_mlp=True)
    same(F.linear(feature, theirs["fc.weight"], theirs["fc.bias"]), tensors["out64.logits"], atol=1e-9)


@pytest.mark.parametrize("irregular", [False, True])
def test_st_adapter_matches_torch(irregular):
    shapes = linears("a", {"down": (5, C), "up": (C, 5)}) | {"a.conv.weight": (5, 1, 3, 3, 3), "a.conv.bias": (5,)}
    params, x = filled(shapes), normal(T, 1 + (4 if irregular else N), C)
    positions = POSITIONS if irregular else torch.arange(N).expand(T, N)
    h = F.linear(x[:, 1:], params["a.down.weight"], params["a.down.bias"])
    index = positions[..., None].expand(-1, -1, 5)
    h = torch.zeros(T, N, 5, dtype=torch.float64).scatter(1, index, h).reshape(T, *GRID, 5).permute(3, 0, 1, 2)
    h = F.conv3d(h, params["a.conv.weight"], params["a.conv.bias"], padding=1, groups=5)
    h = h.permute(1, 2, 3, 0).reshape(T, N, 5).gather(1, index)
    wanted = torch.cat([x[:, :1], x[:, 1:] + F.linear(h, params["a.up.weight"], params["a.up.bias"])], dim=1)
    same(st_adapter.adapter(x, params, "a", grid=GRID, positions=positions if irregular else None), wanted)


def test_silent_st_adapter_is_the_tower_with_the_mean_before_the_norm():
    params, pixels = st_adapter_params(), clips(2)
    params = silenced(params, "up.weight", "up.bias")
    feature, tokens = naive_feature(pixels, params)
    norm = params["post_layernorm.weight"], params["post_layernorm.bias"]
    wanted = F.layer_norm(tokens[:, :, 0].mean(dim=1), (C,), *norm)
    got = st_adapter.model(pixels, params, heads=HEADS, pre_attention=True, pre_mlp=True, num_layers=2)
    same(got, wanted)
    assert (got - feature).abs().max() > 1e-3


def test_st_adapter_counts_from_the_first_block_that_has_one():
    params, pixels = st_adapter_params(), clips()
    given = {"heads": HEADS, "pre_attention": True, "pre_mlp": True}
    last = st_adapter.model(pixels, params, **given, num_layers=1)
    # The same with two adapters of which the first, that of block 0, is silent.
    moved = {}
    for name, value in params.items():
        if name.startswith("adaptation") and ".0." in name:
            moved[name.replace(".0.", ".1.")] = value
            moved[name] = torch.zeros_like(value)
    assert moved
    same(st_adapter.model(pixels, params | moved, **given, num_layers=2), last)
    assert (st_adapter.model(pixels, params, **given, num_layers=2) - last).abs().max() > 1e-3
    # Before attention and before the MLP are two places.
    other = st_adapter.model(pixels, params, **{**given, "pre_attention": False}, num_layers=1)
    assert (other - last).abs().max() > 1e-3


# All of them.


def run_uniformerv2(pixels, params):
    return uni.model(pixels, params, heads=HEADS, global_layers=[1, 2], local="double", halve_after=[1])[0]


def run_zeroi2v(pixels, params):
    return zeroi2v.model(pixels, params, heads=HEADS, shifts={-1: 1}, scale=1.0, num_tadapter=2)


def run_aim(pixels, params):
    return aim.model(pixels, params, heads=HEADS, scale=1.0, num_tadapter=2)


def run_st_adapter(pixels, params):
    return st_adapter.model(pixels, params, heads=HEADS, pre_attention=True, pre_mlp=True, num_layers=2)


@pytest.mark.parametrize(
    "run, make, unused",
    [
        # The halves of the patch embedding that are for temporal downsampling, and a norm that is not called.
        (run_uniformerv2, uniformerv2_params, ("before.weight", "after.weight", "post_layernorm")),
        (run_zeroi2v, lambda: adapter_params(ZEROI2V), ()),
        (run_aim, lambda: adapter_params(AIM), ()),
        # After the last attention patch tokens no longer reach the class token, the only one that is pooled.
        (run_st_adapter, st_adapter_params, ("pre_mlp.1",)),
    ],
)
def test_clips_are_independent_and_gradients_flow(run, make, unused):
    pixels, params = clips(2, frames=2), make()
    for value in params.values():
        value.requires_grad_()
    out = run(pixels, params)
    assert out.shape == (2, C) and (out[0] - out[1]).abs().max() > 1e-3
    same(run(pixels[1:], params)[0], out[1])
    out.square().sum().backward()
    # A constant in all keys changes no softmax: the gradient of their bias is rounding at most.
    still = [name for name, value in params.items() if value.grad is None or not value.grad.any()]
    assert [name for name in still if not name.endswith("k_proj.bias") and not any(n in name for n in unused)] == []
    assert all(any(n in name for name in still) for n in unused)
