"""The slow references of ToMe, STA, STTS and the poolings are themselves checked: against numbers worked out by hand,
torch, transformers, and outputs of the authors' code (HF_INTI_TEST_DATA)."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.testing import assert_close
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from reference import naive, pooling, sta, stts, tome
from reference.inti import gelu, layer_norm, linear


D, HEADS, DEPTH, PATCHES = 12, 3, 3, 9  # of the tower; its pictures are 6 x 6, its patches 2 x 2


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def unit(*degrees):
    """Directions in the plane, (n, 2)."""
    return torch.stack([vector(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in degrees])


def same(got, wanted, atol=1e-12):
    assert_close(got, wanted, rtol=0, atol=atol)


def fill(shapes):
    """{name: shape} -> {name: random tensor}: matrices keep sizes, scales of LayerNorm are near 1."""
    params = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        params[name] = normal(*shape, seed=seed) * 0.4 + ("norm" in name and name.endswith("weight"))
    return params


def tower(patches=PATCHES):
    """A random CLIP tower, with the names of transformers."""
    shapes = {
        "embeddings.class_embedding": (D,),
        "embeddings.patch_embedding.weight": (D, 3, 2, 2),
        "embeddings.position_embedding.weight": (1 + patches, D),
    }
    widths = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D), "self_attn.v_proj": (D, D)}
    widths |= {"self_attn.out_proj": (D, D), "mlp.fc1": (20, D), "mlp.fc2": (D, 20)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(DEPTH):
        norms += [f"encoder.layers.{i}.layer_norm1", f"encoder.layers.{i}.layer_norm2"]
        for name, shape in widths.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return fill(shapes)


def plain_clip(clip, params):
    """Naive: the clip's feature and the tokens, from the reference that transformers has checked."""
    frames = [naive.clip_frame(image, params, heads=HEADS) for image in clip]
    return sum(feature for _, feature in frames) / len(frames), torch.stack([tokens for tokens, _ in frames])


@pytest.fixture
def load(test_data):
    """A function: name of a vector file -> its tensors, floats in float64, and its options."""

    def read(name):
        with safe_open(test_data / "vectors" / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            options = json.loads(file.metadata()["options"])
        return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}, options

    return read


def weights_of(tensors):
    return {name.removeprefix("param."): v for name, v in tensors.items() if name.startswith("param.")}


# The poolings.


def test_linear_pooling_by_hand():
    x = vector(1, 5, 3, 9, -2, 0, 6, 8).reshape(4, 1, 2)
    got = pooling.linear_pooling(x, vector(0, math.log(3)))  # a quarter and three quarters
    same(got, vector(2.5, 8, 4, 6).reshape(2, 1, 2))


@pytest.mark.parametrize("T", [2, 6])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (2, 1, 1), (2, 3, 3), (3, 1, 5)])
def test_conv_pooling_matches_torch(T, kernel):
    x, weight, bias = normal(T, 1 + 6, 4), normal(4, 4, *kernel, seed=1), normal(4, seed=2)
    got = pooling.conv_pooling(x, weight, bias, (2, 3))
    padding = (kernel[0] - 2, kernel[1] // 2, kernel[2] // 2)
    grid = x[:, 1:].reshape(T, 2, 3, 4).permute(3, 0, 1, 2)[None]
    wanted = F.conv3d(grid, weight, bias, stride=(2, 1, 1), padding=padding)
    same(got[:, 1:], wanted[0].permute(1, 2, 3, 0).flatten(1, 2))
    cls = F.conv3d(x[:, 0].T[None, :, :, None, None], weight, bias, stride=(2, 1, 1), padding=padding)
    same(got[:, 0], cls[0, ..., 0, 0].T)


def test_pooling_tower():
    # Halves of the taps 1 and 2 are the mean of the pair, and so are equal logits.
    params = tower()
    taps = torch.zeros(D, D, 3, 1, 1, dtype=torch.float64)
    taps[:, :, 1:, 0, 0] = 0.5 * torch.eye(D, dtype=torch.float64)[..., None]
    for s in (0, 1):
        params[f"compression.stages.{s}.logits"] = vector(1, 1)
        params |= {f"compression.stages.{s}.conv.weight": taps, f"compression.stages.{s}.conv.bias": vector(*[0] * D)}
    pixels = normal(2, 4, 3, 6, 6)
    feature, tokens = pooling.pooling_model(pixels, params, heads=HEADS, kind="linear_pooling", layers=[0, 2])
    assert tokens.shape == (2, 1, 1 + PATCHES, D)
    by_conv = pooling.pooling_model(pixels, params, heads=HEADS, kind="conv_pooling", layers=[0, 2])
    same(by_conv[0], feature)
    same(by_conv[1], tokens)

    # Step by step, with the blocks that naive.py has.
    x = pooling.enter(pixels[0], params, 1e-5)
    x = (x[0::2] + x[1::2]) / 2
    for i in (0, 1):
        x = torch.stack([torch.stack(naive.block(list(frame), params, i, HEADS, 1e-5)) for frame in x])
    x = torch.stack(naive.block(list((x[0] + x[1]) / 2), params, 2, HEADS, 1e-5))
    same(tokens[0, 0], x)

    # The second stage has its own weights and sees the later frame alone.
    params["compression.stages.1.logits"] = vector(-50, 50)
    _, moved = pooling.pooling_model(pixels, params, heads=HEADS, kind="linear_pooling", layers=[0, 2])
    assert (moved - tokens).abs().max() > 0.01


def test_pooling_tower_without_layers_is_naive():
    params, pixels = tower(), normal(1, 3, 3, 6, 6)
    feature, tokens = pooling.pooling_model(pixels, params, heads=HEADS, kind="linear_pooling", layers=[])
    wanted_feature, wanted_tokens = plain_clip(pixels[0], params)
    same(feature[0], wanted_feature)
    same(tokens[0], wanted_tokens)


# ToMe.


def test_tome_matching_by_hand():
    # Places 2, 4, 6 look at 1 (0 degrees), 3 (90), 5 (200): their best are 10, 30 and 5 degrees away.
    metric = unit(0, 0, 10, 90, 60, 200, 195)
    assert tome.matching(metric, 0, True) == [[n] for n in range(7)]
    assert tome.matching(metric, 1, True) == [[0], [2], [4], [1], [3], [5, 6]]
    assert tome.matching(metric, 2, True) == [[0], [4], [1, 2], [3], [5, 6]]
    for r in (3, 99):
        assert tome.matching(metric, r, True) == [[0], [1, 2], [3, 4], [5, 6]]
    # Without a class token place 0 merges first, and what is left stands from similar to not.
    assert tome.matching(metric, 1, False) == [[6], [2], [4], [0, 1], [3], [5]]
    # The distill token in place 1 is nobody's partner: 2 finds 3, 80 degrees away, and comes last.
    assert tome.matching(metric, 2, True, distill_token=True) == [[0], [1], [2], [3, 4], [5, 6]]


def test_tome_matching_does_not_see_lengths():
    metric = normal(9, 5)
    assert tome.matching(metric * normal(9, 1, seed=1).abs(), 3, True) == tome.matching(metric, 3, True)
    assert tome.matching(metric, 3, True) != tome.matching(metric.flip(1) * vector(1, 2, 3, 4, 9), 3, True)


def test_tome_merge_by_hand():
    tokens, sizes = vector(1, 5, 9, -1).reshape(4, 1), vector(1, 2, 3, 1)
    merged, new_sizes = tome.merge(tokens, sizes, [[0], [1, 2], [3]])
    same(merged, vector(1, 7.4, -1).reshape(3, 1))  # (10 + 27) / 5
    same(new_sizes, vector(1, 5, 1))


def test_tome_schedules():
    assert tome.r_schedule(3, 5) == [5, 5, 5]
    assert tome.r_schedule(3, [4]) == [4, 0, 0]
    assert tome.r_schedule(3, (2, -1)) == [4, 2, 0]
    assert tome.r_schedule(5, (8, 1)) == [0, 4, 8, 12, 16]
    assert sum(tome.r_schedule(12, (8, -1))) == 91  # not 96: each number is cut
    assert tome.r_schedule(1, (4, -1)) == [4]
    with pytest.raises(ValueError, match="want at most one"):
        tome.r_schedule(1, [1, 2])


@pytest.mark.parametrize("name", ["tome_match_cls", "tome_match_cls_max_r", "tome_match_nocls"])
def test_tome_matching_vectors(load, name):
    tensors, options = load(name)
    for b, metric in enumerate(tensors["in.metric"]):
        groups = tome.matching(metric, options["r"], options["class_token"], options["distill_token"])
        source = torch.zeros_like(tensors["out.source"][b])
        for row, group in enumerate(groups):
            source[row, group] = 1
        same(source, tensors["out.source"][b])
        sizes = tensors["in.size"][b, :, 0] if "in.size" in tensors else metric.new_ones(len(metric))
        x, sizes = tome.merge(tensors["in.x"][b], sizes, groups)
        same(x, tensors["out64.x_merged"][b], 1e-9)
        same(sizes, tensors["out64.size_merged"][b, :, 0], 1e-9)


def test_tome_kth_vector(load):
    tensors, options = load("tome_kth2")
    for b, metric in enumerate(tensors["in.metric"]):
        groups = tome.kth_matching(metric, options["k"])
        x, sizes = tome.merge(tensors["in.x"][b], metric.new_ones(len(metric)), groups)
        same(x, tensors["out64.x_merged"][b], 1e-9)
        same(sizes, tensors["out.size_merged"][b, :, 0])


def test_tome_kth_by_hand():
    metric = unit(80, 5, 0, 10, 70, 90)
    assert tome.kth_matching(metric, 3) == [[1, 2, 3], [0, 4, 5]]
    assert tome.kth_matching(metric, 1) == [[n] for n in range(6)]
    with pytest.raises(ValueError, match="multiple of k"):
        tome.kth_matching(metric, 4)


@pytest.mark.parametrize("name", ["tome_vit_const_r", "tome_vit_noprop_decr"])
def test_tome_vit_vectors(load, name):
    tensors, options = load(name)
    weights = weights_of(tensors)
    # A ViT of timm is a CLIP tower without the first LayerNorm; its patch bias can stand in the positions.
    positions = weights["pos_embed"][0].clone()
    positions[1:] += weights["patch_embed.proj.bias"]
    params = {
        "embeddings.class_embedding": weights["cls_token"][0, 0],
        "embeddings.patch_embedding.weight": weights["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": positions,
    }
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(options["depth"]):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                params[f"encoder.layers.{i}.{ours}.{kind}"] = weights[f"blocks.{i}.{theirs}.{kind}"]
            for part, value in zip("qkv", weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                params[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] = value
    r = tuple(options["r"]) if options["r_kind"] == "tuple" else options["r"]
    assert tome.r_schedule(options["depth"], r) == options["r_per_layer"]
    how = {"heads": options["heads"], "prop_attn": options["prop_attn"], "eps": 1e-6, "activation": gelu}
    last = options["depth"] - 1
    for b, image in enumerate(tensors["in.pixels"]):
        tokens_in = torch.stack(naive.embed(image, params))
        same(tokens_in, tensors["out.tokens_in"][b], 1e-5)
        tokens, sizes, groups = tome.tome_blocks(tokens_in, params, r=r, **how)
        same(tokens, tensors[f"out64.block_out.{last}"][b], 1e-9)
        same(sizes, tensors[f"out.size_after_block.{last}"][b, :, 0])
        source = torch.zeros_like(tensors["out.source"][b])
        for row, group in enumerate(groups):
            source[row, group] = 1
        same(source, tensors["out.source"][b])
        feature = layer_norm(tokens[0], weights["norm.weight"], weights["norm.bias"], 1e-6)
        same(linear(feature, weights["head.weight"], weights["head.bias"]), tensors["out64.logits"][b], 1e-9)


def test_tome_model_without_merging_is_naive():
    params, pixels = tower(), normal(1, 2, 3, 6, 6)
    feature, tokens, sizes, groups = tome.tome_model(pixels, params, heads=HEADS, r=0, prop_attn=True)
    wanted_feature, wanted_tokens = plain_clip(pixels[0], params)
    same(feature[0], wanted_feature)
    same(tokens[0], wanted_tokens)
    assert sizes.unique().tolist() == [1] and groups[0][1] == [[n] for n in range(1 + PATCHES)]


def test_tome_model_counts_tokens():
    feature, tokens, sizes, groups = tome.tome_model(normal(2, 2, 3, 6, 6), tower(), heads=HEADS, r=2, prop_attn=True)
    assert feature.shape == (2, D) and tokens.shape == (2, 2, 4, D)
    assert sizes.sum(dim=2).flatten().tolist() == [1 + PATCHES] * 4
    for b in range(2):
        for t in range(2):
            assert [len(group) for group in groups[b][t]] == sizes[b, t].tolist() and groups[b][t][0] == [0]
            assert sorted(sum(groups[b][t], [])) == list(range(1 + PATCHES))


def test_tome_merges_equal_tokens_without_a_trace():
    # Patches 1 and 2, 3 and 4, ... are equal, positions too. Merging each pair loses nothing if sizes count.
    params = tower(patches=8)
    position = params["embeddings.position_embedding.weight"]
    position[2::2] = position[1::2]
    image = normal(1, 1, 3, 2, 16)
    image[..., 2::4], image[..., 3::4] = image[..., 0::4], image[..., 1::4]
    wanted, _ = plain_clip(image[0], params)
    feature, _, sizes, groups = tome.tome_model(image, params, heads=HEADS, r=[4], prop_attn=True)
    assert groups[0][0] == [[0], [1, 2], [3, 4], [5, 6], [7, 8]] and sizes[0, 0].tolist() == [1, 2, 2, 2, 2]
    same(feature[0], wanted)
    feature, _, _, _ = tome.tome_model(image, params, heads=HEADS, r=[4], prop_attn=False)
    assert (feature[0] - wanted).abs().max() > 1e-3


# STA.


def test_sta_first_group_by_hand():
    # Odd places are at 0 and 90 degrees; the even ones 10, 40 and 20 degrees away from them.
    metric = unit(10, 0, 50, 90, 70)
    assert [sta.kept_of_first(metric, r) for r in (0, 1, 2)] == [[1, 3, 2, 4, 0], [1, 3, 2, 4], [1, 3, 2]]


def test_sta_scores_by_hand():
    # The first group is at 0 degrees, all of it. Then A is larger for tokens near 0: here 0, 60, 90 degrees.
    metric = torch.stack([unit(0, 0, 0), unit(0, 60, 90)]) * 3  # lengths do not count
    logits = [1, 0.5, 0]
    share = [3 * math.exp(v) / sum(map(math.exp, logits)) for v in logits]
    x = normal(2, 3, 2)
    for sums in ((1, 2, 5), (5, 2, 1), (3, 1, 4), (1, 4, 3.2)):
        x[1] = torch.stack([vector(-s / 4, 3 * s / 4) for s in sums])
        low, high = min(sums), max(sums)
        scores = [a * (1 - (s - low) / (high - low)) for a, s in zip(share, sums, strict=True)]
        order = sorted(range(3), key=scores.__getitem__)
        assert sta.prune(x, metric, 1, "F")[1] == order[:2]
        assert sta.prune(x, metric, 2, "F")[1] == order[:1]


def test_sta_passes_on_only_what_is_kept():
    # All tokens of a group have equal sums, so that A alone decides. Group 1 drops its token at 0 degrees, which is
    # where group 0 was: what it passes on is at 90 degrees alone, and group 2 drops what is there.
    x = torch.ones(3, 2, 4, dtype=torch.float64)
    metric = torch.stack([unit(0, 0), unit(90, 0), unit(0, 90)])
    assert sta.prune(x, metric, 1, "F") == [[1], [0], [0]]


def test_sta_second_group_sees_all_of_the_first():
    # The first group drops its token at 0 degrees. With it the token at 20 degrees is the more redundant one,
    # 0.664 + 0.349 of 2; without it, 0.349 of 1, the less redundant one.
    x = torch.ones(2, 2, 4, dtype=torch.float64)
    assert sta.prune(x, torch.stack([unit(0, 90), unit(20, 75)]), 1, "F") == [[1], [1]]


def test_sta_refuses_to_drop_all():
    with pytest.raises(ValueError, match="want 0 to 2"):
        sta.prune(normal(2, 3, 4), normal(2, 3, 4), 3, "F")


def test_sta_backward_is_forward_on_the_reversed_clip():
    x, metric = normal(4, 6, 5), normal(4, 6, 3, seed=1)
    back = sta.prune(x, metric, 2, "B")
    assert back == sta.prune(x.flip(0), metric.flip(0), 2, "F")[::-1]
    assert back != sta.prune(x, metric, 2, "F")


@pytest.mark.parametrize("name", ["sta_prune_F_T8_r4", "sta_prune_B_T4_r6", "sta_prune_F_T2_r10"])
def test_sta_prune_vectors(load, name):
    tensors, options = load(name)
    G, N = options["T_groups"], options["N_per_group"]
    for b in range(options["B"]):
        x = tensors["in.x"][b].reshape(G, N, -1)
        metric = tensors["in.metric"][b].reshape(G, N, -1)
        kept = sta.prune(x, metric, options["r"], options["direction"][0].upper())
        assert [g * N + n for g in range(G) for n in kept[g]] == tensors["out.kept_index"][b].tolist()
        same(sta.pick(x, kept).flatten(0, 1), tensors["out64.x"][b])


def test_sta_stages():
    assert sta.stages(12, 48) == [(1, 48, "F"), (5, 24, "B"), (9, 12, "F")]
    assert sta.stages(24, 10, "B-F-B") == [(1, 10, "B"), (9, 5, "F"), (17, 2, "B")]
    assert [direction for _, _, direction in sta.stages(4, 1, "B")] == ["B"] * 3
    assert [block for block, _, _ in sta.stages(5, 1)] == [1, 2, 4]
    with pytest.raises(ValueError, match="want 3"):
        sta.stages(2, 1)


def videomae(depth=3, num_frames=16):
    config = VideoMAEConfig(
        hidden_size=D,
        intermediate_size=20,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=4,
        num_frames=num_frames,
        tubelet_size=2,
        num_labels=5,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    model = VideoMAEForVideoClassification(config).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * 0.3 + (parameter.ndim == 1) * 0.1)
    return model


@pytest.mark.parametrize("schedule", ["decreasing", "released"])
@torch.no_grad()
def test_sta_videomae_without_pruning_matches_transformers(schedule):
    model, pixels = videomae(), normal(2, 16, 3, 8, 8)
    logits = sta.sta_videomae(pixels, model.state_dict(), model.config, 0, schedule=schedule)
    same(logits, model(pixels).logits, 1e-10)
    assert logits.std() > 0.1


@torch.no_grad()
def test_sta_videomae_schedules_drop_as_many():
    # 8 groups of 4 tokens. "decreasing" drops 8 x (2 + 1 + 0), "released" (8 + 4 + 2) x 2.
    model, clip = videomae(), normal(16, 3, 8, 8)
    params = model.state_dict()
    assert len(sta.videomae_tokens(clip, params, model.config, 2, "decreasing")) == 8
    assert len(sta.videomae_tokens(clip, params, model.config, 2, "released")) == 4


def test_sta_vit_vector(load):
    tensors, options = load("sta_vit_r3")
    weights, C = weights_of(tensors), options["C"]
    prefix = "videomae.embeddings.patch_embeddings.projection"
    params = {f"{prefix}.{kind}": weights[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for i in range(options["depth"]):
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                params[f"videomae.encoder.layer.{i}.{ours}.{kind}"] = weights[f"blocks.{i}.{theirs}.{kind}"]
        for part, value in zip(("query", "key", "value"), weights[f"blocks.{i}.attn.qkv.weight"].chunk(3), strict=True):
            params[f"videomae.encoder.layer.{i}.attention.attention.{part}.weight"] = value
        for part in ("query", "value"):
            bias = weights[f"blocks.{i}.attn.{part[0]}_bias"]
            params[f"videomae.encoder.layer.{i}.attention.attention.{part}.bias"] = bias
    config = VideoMAEConfig(
        hidden_size=C,
        num_attention_heads=options["heads"],
        num_hidden_layers=options["depth"],
        layer_norm_eps=1e-6,
    )
    positions = torch.stack([sta.sinusoid(n, C) for n in range(128)])
    same(positions, weights["pos_embed_sincos"][0], 1e-7)
    clip = tensors["in.pixels"][0].transpose(0, 1)
    tokens = sta.videomae_tokens(clip, params, config, options["r"], "released")
    same(tokens, tensors["out.merge_out.2"][0], 2e-5)
    # The authors' last LayerNorm has 1e-6 too, transformers' has not.
    feature = layer_norm(tokens.mean(dim=0), weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
    same(linear(feature, weights["head.weight"], weights["head.bias"]), tensors["out64.logits"][0], 1e-9)


def test_sta_clip_without_pruning_is_naive():
    params, pixels = tower(), normal(1, 2, 3, 6, 6)
    feature, tokens, positions = sta.sta_clip(pixels, params, heads=HEADS, r=0)
    wanted_feature, wanted_tokens = plain_clip(pixels[0], params)
    same(feature[0], wanted_feature)
    same(tokens[0], wanted_tokens)
    assert positions.tolist() == [[list(range(PATCHES))] * 2]


def test_sta_clip_step_by_step():
    # Blocks 1, 2, 3 drop 4, 2, 1 of 9 patches. The metric once more by hand, the blocks from naive.py.
    params, pixels = tower(), normal(1, 3, 3, 6, 6)
    feature, tokens, positions = sta.sta_clip(pixels, params, heads=HEADS, r=4, order="B-F-B", similarity="value")
    assert tokens.shape == (1, 3, 3, D) and positions.shape == (1, 3, 2)
    x = pooling.enter(pixels[0], params, 1e-5)
    where = torch.arange(PATCHES).repeat(3, 1)
    for i, (r, direction) in enumerate(((4, "B"), (2, "F"), (1, "B"))):
        name = f"encoder.layers.{i}"
        h = F.layer_norm(x, (D,), params[f"{name}.layer_norm1.weight"], params[f"{name}.layer_norm1.bias"], 1e-5)
        h = F.linear(h, params[f"{name}.self_attn.v_proj.weight"], params[f"{name}.self_attn.v_proj.bias"])
        metric = h[:, 1:].unflatten(2, (HEADS, D // HEADS)).mean(dim=2)
        x = pooling.spatial_block(x, params, i, HEADS, 1e-5)
        kept = torch.tensor(sta.prune(x[:, 1:], metric, r, direction))
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, D))], dim=1)
        where = where.gather(1, kept)
    same(tokens[0], x)
    assert positions[0].tolist() == where.tolist()
    post = F.layer_norm(x[:, 0], (D,), params["post_layernorm.weight"], params["post_layernorm.bias"], 1e-5)
    same(feature[0], post.mean(dim=0))
    for changed in ({"order": "F-B-F"}, {"similarity": "key"}, {"r": 3}):
        other = sta.sta_clip(
            pixels, params, **({"heads": HEADS, "r": 4, "order": "B-F-B", "similarity": "value"} | changed)
        )
        assert (other[0] - feature).abs().max() > 1e-4


# STTS.

RELEASED = {"in_conv.0": "norm", "in_conv.1": "local", "out_conv.0": "hidden1"}
RELEASED |= {"out_conv.2": "hidden2", "out_conv.4": "score"}


def scorer_of(tensors):
    """The authors' names of a scorer -> ours, under "s"."""
    params = {}
    for name, value in weights_of(tensors).items():
        layer, kind = name.removeprefix("score_network.").rsplit(".", 1)
        params[f"s.{RELEASED[layer]}.{kind}"] = value
    return params


def scorer_params(prefix, E, form):
    if form == "paper":
        shapes = {"local": (E // 2, E), "score": (1, 2 * (E // 2))}
    else:
        shapes = {"norm": (E,), "local": (E, E), "hidden1": (E // 2, E), "hidden2": (E // 4, E // 2)}
        shapes["score"] = (1, E // 4)
    all_shapes = {}
    for name, shape in shapes.items():
        all_shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return fill(all_shapes)


def test_stts_scorer_vector(load):
    tensors, _ = load("stts_scorer")
    params = scorer_of(tensors)
    for b, x in enumerate(tensors["in.x"]):
        raw = stts.raw_scores(x, params, "s", "released")
        same(raw, tensors["out64.scores_raw"][b, :, 0], 1e-9)
        same(stts.min_max(raw), tensors["out64.scores_minmax"][b], 1e-9)


def test_stts_paper_scorer_by_hand():
    params = {"s.local.weight": vector(1, 2).reshape(1, 2), "s.local.bias": vector(1)}
    params |= {"s.score.weight": vector(3, -1).reshape(1, 2), "s.score.bias": vector(0.5)}
    x = vector(1, 0, 0, 1, 2, 3).reshape(3, 2)  # local 2, 3, 9: mean 14/3
    raw = stts.raw_scores(x, params, "s", "paper")
    same(raw, vector(6, 9, 27) - 14 / 3 + 0.5)
    same(stts.min_max(raw), vector(0, 3, 21) / (21 + 1e-5))
    # Nothing bends between the mean and the score, so that all scores move together: after min-max it is gone.
    params["s.score.weight"] = vector(3, 100).reshape(1, 2)
    same(stts.min_max(stts.raw_scores(x, params, "s", "paper")), stts.min_max(raw))


def test_stts_min_max_of_equal_scores():
    same(stts.min_max(vector(2, 2, 2)), vector(0, 0, 0))


def test_stts_top_k_by_hand():
    scores = vector(0.3, 0.9, 0.1, 0.8)
    assert [stts.top_k(scores, k) for k in (1, 2, 3, 4)] == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["stts_perturbed_topk", "stts_perturbed_top1"])
def test_stts_perturbed_vectors(load, name):
    tensors, options = load(name)
    k, sigma = options["k"], options["sigma"]
    for b, (scores, noise) in enumerate(zip(tensors["in.scores"], tensors["in.noise"], strict=True)):
        # The authors take the mean in float32 always.
        same(stts.perturbed_top_k(scores, k, noise, sigma), tensors["out64.indicators"][b], 1e-7)
        gradient = stts.perturbed_top_k_gradient(tensors["in.grad_output"][b], scores, k, noise, sigma)
        same(gradient, tensors["out.grad_scores"][b], 2e-5)
        assert stts.top_k(scores, k) == tensors["out.hard_topk_indices"][b].tolist()


def test_stts_perturbed_by_hand():
    scores, noise = vector(0, 0.2, 1), vector(0, 0, 0, 5, 1, -20).reshape(2, 3)
    # With sigma 0.1 the draws give 0, 0.2, 1 and 0.5, 0.3, -1: the best two are 1 and 2, then 0 and 1.
    indicators = stts.perturbed_top_k(scores, 2, noise, 0.1)
    same(indicators, vector(0.5, 0.5, 0, 0, 0.5, 0.5).reshape(2, 3))
    gradient = stts.perturbed_top_k_gradient(vector(1, 2, 3, 4, 5, 6).reshape(2, 3), scores, 2, noise, 0.1)
    same(gradient, vector(1 * 5, 5 * 1, 6 * 0) / 0.1 / 2)
    gradient = stts.perturbed_top_k_gradient(
        vector(1, 2, 3, 4, 5, 6).reshape(2, 3), scores, 2, noise, 0.1, form="paper"
    )
    # The first draw sets indicators 0, 1 and 1, 2 (noise 0), the second 0, 0 and 1, 1 (noise 5, 1, -20).
    same(gradient, (1 + 5) * vector(5, 1, -20) / 0.1 / 2)


def test_stts_temporal_vector(load):
    tensors, options = load("stts_temporal")
    T, N, k = options["T"], options["N"], options["k"]
    params = scorer_of(tensors)
    for b in range(options["B"]):
        x = tensors["in.x"][b].reshape(T, N, -1)
        scores = stts.frame_scores(x, params, "s", "released", class_tokens=0)
        same(scores, tensors["out64.scores"][b], 1e-9)
        selected, kept = stts.keep_frames(x, scores, k)
        assert kept == tensors["out.frame_index"][b].tolist()
        same(selected.flatten(0, 1), tensors["out64.eval_selected"][b], 1e-9)
        mixed = stts.mix_frames(x, scores, k, tensors["in.noise"][b], options["sigma"])
        same(mixed.flatten(0, 1), tensors["out.train_selected"][b], 1e-5)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_stts_frames_are_scored_by_their_patches(form):
    params = scorer_params("s", D if form == "paper" else 2 * D, form)
    x = normal(4, 5, D)
    with_class = torch.cat([normal(4, 1, D, seed=1) * 9, x], dim=1)
    same(stts.frame_scores(with_class, params, "s", form), stts.frame_scores(x, params, "s", form, class_tokens=0))


@pytest.mark.parametrize("name", ["stts_spatial_stride1", "stts_spatial_default_stride"])
def test_stts_spatial_vectors(load, name):
    tensors, options = load(name)
    T, N = options["T"], options["H"] ** 2
    params = scorer_of(tensors)
    squares = stts.anchors(N, options["k_patches"])
    assert len(squares) == options["n_anchors"] and len(squares[0]) == options["anchor_size"] ** 2
    for b in range(options["B"]):
        x = tensors["in.x"][b].reshape(T, N, -1)
        hard, soft = [], []
        for t in range(T):
            raw = stts.raw_scores(x[t], params, "s", "released")
            same(raw, tensors["out64.token_scores"][b, t].flatten(), 1e-9)
            scores = stts.anchor_scores(x[t], squares, params, "s", "released")
            same(scores, tensors["out64.anchor_scores"][b, t], 1e-9)
            selected, best = stts.keep_anchor(x[t], scores, squares)
            assert best == tensors["out.anchor_index"][b, t]
            hard.append(selected)
            soft.append(stts.mix_anchors(x[t], scores, squares, tensors["in.noise"][b * T + t], options["sigma"]))
        same(torch.cat(hard), tensors["out64.eval_selected"][b], 1e-9)
        same(torch.cat(soft), tensors["out.train_selected"][b], 1e-5)


def test_stts_anchors_by_hand():
    assert stts.anchors(9, 7) == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    assert stts.anchors(9, 9) == [list(range(9))]
    # 14 x 14, half of it: side 9, stride (14 - 9) // 2 = 2, so 0, 2, 4.
    assert [square[0] for square in stts.anchors(196, 98)] == [
        row * 14 + column for row in (0, 2, 4) for column in (0, 2, 4)
    ]
    with pytest.raises(ValueError, match="square number"):
        stts.anchors(8, 4)


def test_stts_counts():
    assert [stts.keep_count(total, ratio) for total, ratio in ((8, 0.6), (196, 0.7367), (9, 1.0))] == [4, 144, 9]
    with pytest.raises(ValueError, match="keeps 1 or more"):
        stts.keep_count(8, 0.1)


def test_stts_soft_selection_without_noise_is_hard():
    x, noise = normal(6, 4, 3), normal(5, 6, seed=1)
    scores = stts.min_max(normal(6, seed=2))
    same(stts.mix_frames(x, scores, 2, noise, 0.0), stts.keep_frames(x, scores, 2)[0])
    squares = stts.anchors(9, 4)
    patches, scores = normal(9, 3), stts.min_max(normal(4, seed=3))
    soft = stts.mix_anchors(patches, scores, squares, normal(5, 4), 0.0)
    same(soft, stts.keep_anchor(patches, scores, squares)[0])


@pytest.mark.parametrize("form", ["paper", "released"])
def test_stts_model_keeping_all_is_naive(form):
    E = D if form == "paper" else 2 * D
    params = tower() | scorer_params("compression.temporal.0.scorer", E, form)
    params |= scorer_params("compression.spatial.0.scorer", D, form)
    pixels = normal(1, 2, 3, 6, 6)
    how = {"temporal": [[1, 1.0]], "spatial": [[2, 1.0]], "scorer": form}
    feature, tokens, frames, places = stts.stts_model(pixels, params, heads=HEADS, **how)
    wanted_feature, wanted_tokens = plain_clip(pixels[0], params)
    same(feature[0], wanted_feature)
    same(tokens[0], wanted_tokens)
    assert frames.tolist() == [[0, 1]] and places.tolist() == [[list(range(PATCHES))] * 2]


@pytest.mark.parametrize("form", ["paper", "released"])
def test_stts_model_in_steps(form):
    # Frames before the first block, then both, frames first, after the second.
    E = D if form == "paper" else 2 * D
    params = tower()
    for j in (0, 1):
        params |= scorer_params(f"compression.temporal.{j}.scorer", E, form)
    params["compression.temporal.1.scorer.score.weight"] *= -1
    params |= scorer_params("compression.spatial.0.scorer", D, form)
    pixels = normal(1, 6, 3, 6, 6)
    how = {"temporal": [[0, 0.7], [2, 0.5]], "spatial": [[2, 0.5]], "scorer": form}
    feature, tokens, frames, places = stts.stts_model(pixels, params, heads=HEADS, **how)
    assert tokens.shape == (1, 2, 5, D) and frames.shape == (1, 2) and places.shape == (1, 2, 4)

    def keep(x, j, k):
        scores = stts.frame_scores(x, params, f"compression.temporal.{j}.scorer", form)
        return scores.topk(k).indices.sort().values

    # Nothing in the tower sees several frames, so that what is left of a frame is what it would be alone.
    first = keep(pooling.enter(pixels[0], params, 1e-5), 0, 4)
    x = pooling.enter(pixels[0][first], params, 1e-5)
    for i in (0, 1):
        x = pooling.spatial_block(x, params, i, HEADS, 1e-5)
    second = keep(x, 1, 2)
    assert frames[0].tolist() == first[second].tolist()
    x = x[second]
    corners = [0, 1, 3, 4]
    rows = []
    for frame, place in zip(x, places[0].tolist(), strict=True):
        raw = stts.raw_scores(frame[1:], params, "compression.spatial.0.scorer", form)
        best = F.avg_pool2d(raw.reshape(1, 3, 3), 2, 1).flatten().argmax().item()
        wanted = [corner + corners[best] for corner in corners]
        assert place == wanted
        rows.append(frame[[0] + [1 + n for n in wanted]])
    same(tokens[0], pooling.spatial_block(torch.stack(rows), params, 2, HEADS, 1e-5))
    same(feature[0], pooling.leave(tokens[0], params, 1e-5))


def test_stts_model_space_before_time():
    params = tower() | scorer_params("compression.spatial.0.scorer", D, "paper")
    params |= scorer_params("compression.temporal.0.scorer", D, "paper")
    pixels = normal(1, 6, 3, 6, 6)
    how = {"heads": HEADS, "spatial": [[0, 0.5]], "scorer": "paper"}
    _, all_tokens, _, all_places = stts.stts_model(pixels, params, **how)
    assert len(set(map(tuple, all_places[0].tolist()))) > 1
    _, tokens, frames, places = stts.stts_model(pixels, params, temporal=[[1, 0.5]], **how)
    assert frames.shape == (1, 3) and frames[0].tolist() != [0, 1, 2]
    assert places[0].tolist() == all_places[0, frames[0]].tolist()
    same(tokens[0], all_tokens[0, frames[0]])
