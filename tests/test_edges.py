"""Edges that a mutation of the code moved without any other test noticing: bounds, defaults, the first and the last."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from conftest import TINY
from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor, InTIClipVisionConfig, InTIClipVisionModel
from hf_inti.model.adaptation_aim import AIM
from hf_inti.model.adaptation_st_adapter import STAdapter
from hf_inti.model.adaptation_uniformerv2 import UniFormerV2
from hf_inti.model.adaptation_zeroi2v import ZeroI2V, head_groups
from hf_inti.model.compression_inti import InTI, InTICompression, LocalMHRA
from hf_inti.model.compression_sta import (
    PRIME,
    STA,
    cells_for,
    draw_for,
    first_frame_order,
    prune,
    scramble,
    semantic_importance,
)
from hf_inti.model.compression_stts import CHUNK, STTS, perturbed_topk
from hf_inti.model.compression_tome import ToMe, bipartite_soft_matching, kth_bipartite_soft_matching, merge, r_schedule
from hf_inti.model.fast_paths import Optimizable, fused_linear, has_hooks, pack_parameters, packed_view
from hf_inti.model.layers import depthwise_conv3d, from_grid, to_grid
from hf_inti.model.methods import TokenState, block_rate, check_frames, is_count, is_number
from hf_inti.model.video_processing_inti_clip import crop, sample_indices


@pytest.fixture
def tower(tiny_config):
    return tiny_config().tower


# Options and defaults.


def test_whole_numbers_in_a_range():
    assert is_count(1) and is_count(3, 3) and is_count(0, 0) and is_count(5, 1, 5)
    assert not any((is_count(0), is_count(2, 3), is_count(6, 1, 5), is_count(True), is_count(2.0), is_count("2")))
    assert is_number(2) and is_number(-0.5)
    assert not any((is_number(True), is_number(float("inf")), is_number(float("nan")), is_number("1")))


@pytest.mark.parametrize(
    "number, multiple, near", [(0, 2, "2"), (3, 2, "2 and 4"), (7, 4, "4 and 8"), (1, 2, "2"), (0, 1, "1")]
)
def test_nearest_numbers_of_frames(number, multiple, near):
    with pytest.raises(ValueError, match=f"work: {near}\\."):
        check_frames(number, multiple)
    check_frames(multiple, multiple)


def test_sta_defaults(tower):
    for patches, r in ((196, 48), (49, 12), (16, 4), (15, 1), (2, 1), (1, 0)):
        assert STA._default_r(tower._replace(num_patches=patches)) == r
    sta = STA(tower._replace(num_patches=196, num_hidden_layers=12), [])
    assert sta.stages == [(1, 48, "F"), (5, 24, "B"), (9, 12, "F")]
    assert (sta.first_frame, sta.scores, sta.features, sta.heads) == ("tome", "both", "key", 4)
    assert STA(tower, [], similarity="ffn").heads == 1


def test_sta_may_leave_one_patch(tower):
    STA.check_options(tower, r=5, schedule="constant")  # 15 of 16
    with pytest.raises(ValueError, match=r"drops 6 \+ 6 \+ 6 of 16"):
        STA.check_options(tower, r=6, schedule="constant")
    STA.check_options(tower._replace(num_patches=8), r=4)
    with pytest.raises(ValueError, match=r"drops 4 \+ 2 \+ 1 of 7"):
        STA.check_options(tower._replace(num_patches=7), r=4)


def test_stts_defaults(tower):
    stts = STTS(tower._replace(num_hidden_layers=12), [])
    assert stts.plan == ([[0, 0.5]], [[4, 0.6]])
    topk = stts.temporal[0].topk
    assert (topk.sigma.item(), topk.num_samples, topk.gradient) == (pytest.approx(0.1), 500, "released")
    assert stts.spatial[0].stride is None
    assert STTS(tower, [], spatial=[[1, 0.5]]).plan == ([], [[1, 0.5]])


def test_stts_counts_the_squares_that_it_keeps(tower):
    STTS.check_options(tower, spatial=[[1, 0.3], [2, 0.25]])  # 16 -> 4 -> 1
    with pytest.raises(ValueError, match="at least one of 4 patches"):
        STTS.check_options(tower, spatial=[[1, 0.3], [2, 0.2]])
    with pytest.raises(ValueError, match="at least one of 4 frames, got 0.2; .* at least 5 frames"):
        STTS.check_options(tower, temporal=[[1, 0.5], [3, 0.2]])
    for plan in ([[5, 0.5]], [[1, 0]], [[1, 1.1]], [[1, 0.5], [1, 0.4]], [[1]], "1", [[-1, 0.5]]):
        with pytest.raises(ValueError, match="list of pairs"):
            STTS.check_options(tower, temporal=plan)
    STTS.check_options(tower, temporal=[[0, 1], [4, 0.5]], sigma=0, num_samples=1, stride=1)


@pytest.mark.parametrize(
    "size", ["3", [3, 1], [4, 1, 1], [1, 1, 1], [3, 2, 1], [3, 1, 2], [3, 1, 0], [True, 1, 1], ["3", 1, 1], [3, 1, "1"]]
)
def test_conv_pooling_kernels_that_are_refused(size, tiny_config):
    with pytest.raises(ValueError, match="kernel_size must be"):
        tiny_config(compression="conv_pooling", compression_options={"kernel_size": size})


def test_parts_of_heads():
    assert head_groups({"1": 1 / 12, "-2": 4 / 3}, 4, 48) == [(1, 1), (-2, 16)]
    assert head_groups([[2, 1], [-1, 3]], 4, 48) == [(2, 12), (-1, 36)]
    for number in (1 / 24, float("nan"), True):
        with pytest.raises(ValueError, match="must map offsets"):
            head_groups({"1": number}, 4, 48)


@pytest.mark.parametrize("adaptation", ["aim", "zeroi2v"])
def test_adapters_of_one_channel(adaptation, tiny_config):
    options = {"ratio": 1 / 48}
    model = InTIClipVisionModel(tiny_config(compression="none", adaptation=adaptation, adaptation_options=options))
    assert min(p.shape[0] for name, p in model.adaptation.named_parameters() if "down.weight" in name) == 1


def test_each_stage_of_inti_has_positions_of_its_own_frames(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression_layers=[0, 2, 4]))
    assert [stage.position.P.shape[0] for stage in model.compression.stages] == [8, 4, 2]
    assert model.compression.stages[0].position.P.std().item() == pytest.approx(0.02, rel=0.2)


# STA's random numbers, computed again.


def test_scramble_is_a_fifth_power():
    for n in (0, 1, 195, 10**6, PRIME - 1):
        wanted = n
        for constant in (1013904223, 374761393, 668265263):
            wanted = pow(wanted + constant, 5, 2**31 - 1)
        assert scramble(torch.tensor([n])).item() == wanted


def test_draws_follow_four_mean_features():
    places = torch.tensor([[0, 3, 5, 1, 2, 4], [5, 4, 3, 2, 1, 0]])
    # Of 17 channels those a quarter apart, and not the fifth.
    for width, channels in ((17, (0, 4, 8, 12)), (5, (0, 1, 2, 3)), (3, (0, 1, 2))):
        x = torch.randn(2, 6, width)
        draws = draw_for(x, places, training=False)
        for b in range(2):
            scale, seed = x[b].abs().mean(), torch.tensor([0])
            for channel in channels:
                level = torch.round(x[b, :, channel].mean() / scale * 64).long()
                seed = scramble(seed + level)
            for k in range(6):
                wanted = scramble(seed + scramble(places[b, k : k + 1])) / PRIME
                torch.testing.assert_close(draws[b, k : k + 1], wanted)
    assert draw_for(torch.zeros(1, 6, 8), places[:1], False).isfinite().all()


def test_equal_tokens_are_equally_important():
    assert not semantic_importance(torch.ones(1, 2, 3, 4)).any()


# ToMe's matching.


def test_tome_without_merging():
    metric = torch.randn(2, 7, 5)
    for r in (0, -1):
        matching = bipartite_soft_matching(metric, r)
        assert matching.num_tokens == 7 and matching.target.tolist() == [list(range(7))] * 2
        assert matching.unm_idx.tolist() == [[0, 1, 2, 3]] * 2
        assert matching.src_idx.shape == matching.dst_idx.shape == (2, 0)


def test_tome_protects_both_tokens_in_front():
    metric = torch.randn(3, 9, 5)
    matching = bipartite_soft_matching(metric, 99, class_token=True, distill_token=True)
    assert matching.num_tokens == 9 - 3 and matching.src_idx.shape[1] == 3  # half of the seven others
    x = torch.randn(3, 9, 4)
    out = merge(x, matching, "sum")
    assert torch.equal(out[:, :2], x[:, :2])
    for b in range(3):
        alone = [k for k in range(2, 9) if (matching.target[b] == matching.target[b, k]).sum() == 1]
        order = [matching.target[b, k].item() for k in alone if k % 2 == 0]
        assert order == sorted(order) and all(t >= 2 for t in order)
        assert sorted(set(matching.target[b].tolist())) == list(range(6))
    torch.testing.assert_close(out.sum(dim=1), x.sum(dim=1))


def test_tome_protects_no_token_unless_told():
    matching = bipartite_soft_matching(torch.randn(2, 6, 5), 3)
    assert matching.num_tokens == 3 and matching.src_idx.sort().values.tolist() == [[0, 1, 2]] * 2


def test_of_equal_tokens_tome_merges_the_first():
    matching = bipartite_soft_matching(torch.ones(1, 80, 4), 10)
    assert matching.src_idx.tolist() == [[*range(10)]] and matching.unm_idx.tolist() == [[*range(10, 40)]]


@pytest.mark.parametrize("class_tokens, left", [(0, 4), (1, 5), (2, 5)])
def test_tome_protects_the_class_tokens_of_its_state(class_tokens, left, tower):
    x = torch.randn(1, 2, 8, 48)
    state = TokenState(num_class_tokens=class_tokens, grid=(1, 8 - class_tokens))
    out, state = ToMe(tower, [], r=8).inside_block(1, x, x, state)
    assert out.shape == (1, 2, left, 48) and state.positions.shape == (1, 2, left - class_tokens)
    assert torch.equal(out[:, :, :class_tokens], x[:, :, :class_tokens])


def test_every_kth_token():
    metric = torch.randn(1, 6, 5)
    assert kth_bipartite_soft_matching(metric, 1).target.tolist() == [list(range(6))]
    assert kth_bipartite_soft_matching(metric, 6).target.tolist() == [[0] * 6]
    assert kth_bipartite_soft_matching(metric, 4).target.shape == (1, 4)
    for k in (0, 7):
        with pytest.raises(ValueError, match="k must be from 1 to 6"):
            kth_bipartite_soft_matching(metric, k)


def test_tome_schedules_of_shallow_towers():
    assert r_schedule(2, (4, -1.0)) == [8, 0] and r_schedule(2, (4, 1.0)) == [0, 8]
    assert r_schedule(1, (4, -1.0)) == [4] and r_schedule(1, 3) == [3]
    assert r_schedule(3, []) == [0, 0, 0] and r_schedule(2, [1, 2]) == [1, 2]
    for r in (-1, True, 2.0, (3, 1.5), (3, -1.5), [1, 2, 3], [1, -1], [True]):
        with pytest.raises(ValueError, match="ToMe's r"):
            r_schedule(2, r)


# The model.


def test_pictures_of_another_size_are_clips(tiny_config):
    """With interpolated positions a frame of another size gives what transformers' CLIP gives."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()
    model = InTIClipVisionModel(tiny_config(compression="none")).eval()
    model.load_state_dict(clip.state_dict(), strict=False)
    pixel_values = torch.randn(2, 3, 3, 48, 40)
    with torch.no_grad():
        wanted = clip(pixel_values.flatten(0, 1), interpolate_pos_encoding=True).last_hidden_state
        got = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(got.flatten(0, 1), wanted)


def test_hints_on_pixel_values(tiny_config):
    model = InTIClipVisionModel(tiny_config())
    with pytest.raises(ValueError, match="add the batch dimension"):
        model(torch.zeros(8, 3, 32, 32))
    for shape in ((1, 8, 4, 32, 32), (8, 3, 32), (1, 1, 8, 3, 32, 32)):
        with pytest.raises(ValueError) as error:
            model(torch.zeros(shape))
        assert "batch dimension" not in str(error.value)


def test_adapters_of_another_model_are_refused(tiny_config, tmp_path):
    options = {"compression": "none", "adaptation": "aim"}
    InTIClipForVideoClassification(tiny_config(**options)).save_trained_only(tmp_path)
    with pytest.raises(ValueError):  # the same names, other shapes
        InTIClipForVideoClassification(tiny_config(**options, num_labels=7)).load_trained_only(tmp_path)
    with pytest.raises(ValueError):  # other names
        InTIClipForVideoClassification(tiny_config(compression="none", adaptation="st_adapter")).load_trained_only(
            tmp_path
        )


def test_fused_layers_need_both_weights_and_biases_packed():
    linears = [nn.Linear(4, 3), nn.Linear(4, 5)]
    x = torch.randn(2, 4)
    assert fused_linear(x, linears) is None
    pack_parameters(linears)
    with torch.no_grad():
        for got, linear in zip(fused_linear(x, linears), linears, strict=True):
            torch.testing.assert_close(got, linear(x))
    linears[1].bias = nn.Parameter(linears[1].bias.detach().clone())
    assert fused_linear(x, linears) is None
    pack_parameters(linears)
    linears[0].weight = nn.Parameter(linears[0].weight.detach().clone())
    assert fused_linear(x, linears) is None


def test_labels_at_both_ends(tiny_config):
    model = InTIClipForVideoClassification(tiny_config())
    x = torch.randn(1, 8, 3, 32, 32)
    for label in (0, 4, -100):
        model(x, labels=torch.tensor([label]))
    for label in (5, -1):
        with pytest.raises(ValueError, match="from 0 to 4"):
            model(x, labels=torch.tensor([label]))
    model._check_labels(torch.tensor([5], device="meta"))  # off the CPU they are not read


def test_targets_of_a_regression_may_be_any_numbers(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(problem_type="regression"))
    targets = torch.tensor([[7.5, -3.0, 0.0, 1.0, 5.0]])
    out = model(torch.randn(1, 8, 3, 32, 32), labels=targets)
    torch.testing.assert_close(out.loss, nn.functional.mse_loss(out.logits, targets))


def test_a_configuration_takes_the_smallest_values():
    config = InTIClipVisionConfig(
        **{**TINY, "image_size": 8}, num_frames=1, num_labels=1, compression="none", drop_path_rate=0.99
    )
    assert config.tower.num_patches == 1
    for field in ({"drop_path_rate": 1}, {"classifier_dropout": 1.0}, {"drop_path_rate": -0.1}, {"num_frames": 0}):
        with pytest.raises(ValueError):
            InTIClipVisionConfig(**{**TINY, "compression": "none", **field})
    for field in ({"patch_size": 33}, {"patch_size": 0}, {"num_hidden_layers": 0}, {"num_labels": 0}):
        with pytest.raises(ValueError):
            InTIClipVisionConfig(**{**TINY, "compression": "none", **field})
    assert InTIClipVisionConfig(**{**TINY, "patch_size": 32}, compression="none").tower.num_patches == 1


def test_adapter_defaults(tower):
    aim = AIM(tower)
    assert aim.scale == 0.5 and aim.temporal_in is None and aim.spatial[0].down.out_features == tower.hidden_size // 4
    st_adapter = STAdapter(tower._replace(hidden_size=36))
    assert st_adapter.pre_mlp[0].down.out_features == 18 and len(st_adapter.pre_mlp) == tower.num_hidden_layers
    assert UniFormerV2(tower._replace(hidden_size=36), local="single").local1[0].reduce.out_features == 24


def test_adapter_defaults_fit_all_but_the_narrowest_towers(tower):
    UniFormerV2.check_options(tower._replace(hidden_size=2))
    with pytest.raises(ValueError, match="reduction must be"):
        UniFormerV2.check_options(tower._replace(hidden_size=1))
    AIM.check_options(tower._replace(hidden_size=4))
    with pytest.raises(ValueError, match="at least one channel of 3"):
        AIM.check_options(tower._replace(hidden_size=3))


def test_merged_weights_stay_frozen(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression="none", adaptation="zeroi2v"))
    model.merge_adapters()
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # but asked for by peft
def test_models_checkpoint_nothing_at_first(tiny_config):
    assert not InTIClipVisionModel(tiny_config()).is_gradient_checkpointing


def test_optimised_mlp_takes_tokens_of_any_shape(tiny_config):
    mlp = InTIClipVisionModel(tiny_config()).eval().encoder.layers[0].mlp
    x = torch.randn(2, 3, 5, 48)
    with torch.no_grad():
        wanted = mlp(x)
        mlp.optimize()
        torch.testing.assert_close(mlp(x), wanted)
        torch.testing.assert_close(mlp(x[1]), wanted[1])
        torch.testing.assert_close(mlp(x[1, 2]), wanted[1, 2])


def test_uniformerv2_reads_a_share_of_the_blocks_and_at_least_one(tower):
    for depth, number in ((12, 8), (4, 3), (2, 1), (1, 1)):
        of_depth = UniFormerV2(tower._replace(num_hidden_layers=depth), preset="ssv2")
        assert len(of_depth.layers) == number
    for wrong in ("4", {"4": 1}, [], [0], [0, 1], -1, False):
        with pytest.raises(ValueError, match="global_layers"):
            UniFormerV2.check_options(tower, global_layers=wrong)


def test_tome_schedules(tower):
    assert ToMe(tower._replace(num_patches=196), []).r == [10] * tower.num_hidden_layers
    assert ToMe(tower, [], r=[2, 0]).r[:2] == [2, 0]  # of blocks, and no inflection
    assert ToMe(tower, [], r=[2, -1]).r[-1] == 0


def test_drop_path_reaches_its_rate_in_the_last_block(tower):
    for depth in (2, 3, 12):
        of_depth = tower._replace(num_hidden_layers=depth, drop_path_rate=0.5)
        assert [block_rate(of_depth, i) for i in (1, depth)] == [0, 0.5]


def test_methods_see_the_frames_that_reach_the_blocks(tiny_config):
    options = {"adaptation": "uniformerv2", "adaptation_options": {"temporal_downsample": True}}
    assert tiny_config(num_frames=8, **options).tower.num_frames == 4


@pytest.mark.parametrize("height, width", [(7, 13), (13, 7), (10, 10), (20, 14), (14, 20)])
def test_the_middle_crop_is_in_the_middle_both_ways(height, width):
    frame = torch.arange(height * width).view(1, height, width)
    top, left = (height - 4) // 2, (width - 4) // 2
    assert torch.equal(crop(frame, 4, 4), frame[:, top : top + 4, left : left + 4])


def test_one_frame_is_normalised_as_many():
    processor = InTIClipVideoProcessor()
    frames = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    assert torch.equal(processor.rescale_and_normalize(frames[0]), processor.rescale_and_normalize(frames)[0])


def test_three_clips_of_three_crops_are_nine_views():
    clip = torch.randint(0, 256, (6, 3, 8, 12), dtype=torch.uint8)
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = InTIClipVideoProcessor(num_frames=2, num_clips=3, num_crops=3, **sizes)
    assert processor(clip).pixel_values.shape == (1, 9, 2, 3, 8, 8)


# Defaults, and what only a less usual option reaches.


def test_defaults_of_modules_built_from_a_configuration(tiny_config, tower):
    stages = InTIClipVisionModel(tiny_config()).compression.stages
    assert all(stage.second is not None and stage.frame_context.second is not None for stage in stages)
    assert STAdapter(tower).pre_attention is None
    with pytest.raises(ValueError, match="global_layers must be a number of blocks"):
        UniFormerV2.check_options(tower, global_layers=2.5)
    assert InTIClipVisionConfig(**{**TINY, "patch_size": 1}, compression="none").tower.num_patches == 1024
    assert InTIClipVisionModel(tiny_config())(torch.randn(1, 8, 3, 32, 32)).token_source is None


def test_optimised_interpolation_with_sigmoids():
    torch.manual_seed(0)
    module = InTI(12, 4, head="sigmoid").eval()
    nn.init.normal_(module.logits.weight)
    x = torch.randn(2, 4, 7, 12)
    with torch.no_grad():
        wanted, weights = module(x, (2, 3))
        for part in module.modules():
            if isinstance(part, Optimizable):
                part.optimize()
        got, fast_weights = module(x, (2, 3))
    assert (weights.sum(dim=-1) - 1).abs().max() > 0.1
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(fast_weights, weights)


def test_hooks_and_patched_forwards_are_noticed():
    for change in (
        lambda module: module.register_forward_hook(lambda *args: None),
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: setattr(module, "forward", module.forward),
    ):
        module = nn.Linear(2, 2)
        assert not has_hooks(module)
        change(module)
        assert has_hooks(module)


def test_hooks_inside_an_optimised_cube_are_called():
    cube, seen = LocalMHRA(12, 1e-5).eval(), []
    cube.optimize()
    cube.unit2.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        cube(torch.randn(1, 2, 2, 3, 12))
    assert seen


@pytest.mark.parametrize("kernel_size", [[3, 5, 1], [2, 1, 5], [3, 3, 5]])
def test_wide_kernels_of_conv_pooling_keep_the_grid(tiny_config, kernel_size):
    options = {"compression": "conv_pooling", "compression_options": {"kernel_size": kernel_size}}
    model = InTIClipVisionModel(tiny_config(compression_layers=[1], **options)).eval()
    x = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        pooled = model(x).last_hidden_state
        mean = InTIClipVisionModel(tiny_config(compression="linear_pooling", compression_layers=[1])).eval()
        mean.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(pooled, mean(x).last_hidden_state)  # both start as the mean of each pair


def test_sta_on_its_own_bounds():
    x, metric = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)
    assert prune(x, metric, 0).shape == (2, 3, 4)
    assert prune(x, metric, 3).shape == (2, 3, 1)
    for r in (-1, 4):
        with pytest.raises(ValueError, match="leave a token"):
            prune(x, metric, r)


def test_source_of_tokens_that_were_dropped_is_minus_one(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression="sta", compression_options={"r": 4})).eval()
    source = model(torch.randn(1, 4, 3, 32, 32), output_token_source=True).token_source
    for frame in source[0].tolist():
        assert sorted(frame) == [-1] * 7 + list(range(10))


def test_stts_counts_what_squares_leave(tower):
    STTS.check_options(tower._replace(num_patches=196), temporal=[], spatial=[[1, 0.5], [2, 0.2], [3, 0.1]])
    with pytest.raises(ValueError, match="at least one of 9 patches"):  # 16 * 0.6 = 9.6 are 3 x 3
        STTS.check_options(tower, temporal=[], spatial=[[1, 0.6], [2, 0.1]])


def test_every_kth_token_leaves_none_unmerged():
    matching = kth_bipartite_soft_matching(torch.randn(2, 6, 5), 3)
    assert matching.unm_idx.shape == (2, 0)
    assert matching.src_idx.tolist() == [[0, 1, 2, 3]] * 2


def test_messages_name_what_they_are_about(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="from InTIClipVisionConfig;"):
        InTIClipVisionConfig.from_clip(tiny_config())
    model = InTIClipForVideoClassification(tiny_config(compression="none", adaptation="aim"))
    model.save_trained_only(tmp_path)
    weights = load_file(tmp_path / "trained.safetensors")
    name = next(iter(weights))
    weights[name] = torch.zeros(1, 2, 3, 4, 5)
    save_file(weights, tmp_path / "trained.safetensors")
    with pytest.raises(ValueError, match=f"as at {name}"):
        model.load_trained_only(tmp_path)


def test_flex_attention_is_not_offered(tiny_config):
    with pytest.raises((ValueError, ImportError)):
        InTIClipVisionModel._from_config(tiny_config(), attn_implementation="flex_attention")


def test_layout_optimisation_of_inductor_is_off(tiny_config, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: seen.append(kwargs))
    InTIClipVisionModel(tiny_config()).compile()
    assert seen == [{"options": {"layout_optimization": False}}]


def test_two_classes_have_labels_zero_and_one(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(num_labels=2))
    with pytest.raises(ValueError, match="from 0 to 1"):
        model(torch.randn(1, 8, 3, 32, 32), labels=torch.tensor([2]))


def test_dense_clips_of_short_videos_start_at_the_first_frame():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        assert sample_indices(4, num_frames=2, sampling="dense", frame_stride=2, generator=generator) == [0, 2]


def test_the_last_point_of_a_video_is_in_its_last_frame(monkeypatch):
    """The largest number below 1 that can be drawn, which is lost when segments are added to it."""
    monkeypatch.setattr(torch, "rand", lambda n, dtype, **kwargs: torch.full((n,), 1 - 2**-53, dtype=dtype))
    assert sample_indices(8, num_frames=4, generator=torch.Generator())[-1] == 7


def test_one_number_is_the_short_side():
    frames = torch.zeros(2, 3, 8, 16, dtype=torch.uint8)
    processor = InTIClipVideoProcessor(num_frames=2)
    assert processor(frames, size=4, do_center_crop=False).pixel_values.shape[-2:] == (4, 8)
    processor = InTIClipVideoProcessor(num_frames=2, size=4)
    assert processor(frames, do_center_crop=False).pixel_values.shape[-2:] == (4, 8)


def test_frames_without_a_clear_channel_axis():
    processor = InTIClipVideoProcessor(num_frames=1)
    for shape in ((1, 3, 8, 3), (1, 1, 8, 4), (1, 5, 8, 6)):
        with pytest.raises(ValueError, match="must be either"):
            processor(list(np.zeros(shape, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"float frames must lie in \[0, 1\], got \[0, 1.5\]"):
        processor([np.linspace(0, 1.5, 192, dtype=np.float32).reshape(8, 8, 3)])


def test_published_preset_reads_the_last_four_blocks(tower):
    assert list(UniFormerV2(tower._replace(num_hidden_layers=12)).layers) == [9, 10, 11, 12]
    UniFormerV2.check_options(tower, reduction=1)
    UniFormerV2.check_options(tower, reduction=0.5)
    for reduction in (0, -1, True, tower.hidden_size + 1):
        with pytest.raises(ValueError, match="reduction"):
            UniFormerV2.check_options(tower, reduction=reduction)


def test_positions_of_a_compression_are_whole_numbers(tiny_config):
    tower = tiny_config().tower
    InTICompression.check_options(tower, position_std=0)
    InTICompression.check_layers(tower, [0, 4])
    for layers in ([True], [1.0], [-1], [5], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="compression_layers must"):
            InTICompression.check_layers(tower, layers)
    for compression in ("tome", "sta", "stts", "none"):  # have positions of their own
        assert tiny_config(compression=compression, compression_layers=[99], num_frames=7).frame_multiple == 1


def test_only_packed_tensors_of_one_type_have_a_view():
    storage = torch.arange(24.0)
    first, second = storage[:6].view(2, 3), storage[6:12].view(2, 3)
    assert torch.equal(packed_view([first, second]), torch.cat([first, second]))
    assert packed_view([first, storage.view(torch.int32)[6:12].view(2, 3)]) is None
    assert packed_view([first, storage.as_strided((2, 3), (1, 4), 6)]) is None  # columns first
    assert packed_view([first, storage[7:13].view(2, 3)]) is None


def test_labels_of_a_regression_are_not_classes(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(num_labels=1))
    model._check_labels(torch.tensor([5]))


def test_source_is_unknown_where_squares_are_kept(tiny_config):
    options = {"compression": "stts", "compression_options": {"temporal": [], "spatial": [[1, 0.6]]}}
    model = InTIClipVisionModel(tiny_config(**options)).eval()
    assert model(torch.randn(1, 4, 3, 32, 32), output_token_source=True).token_source is None


def test_options_of_the_processor_at_their_edges():
    frames = [np.linspace(0, 1, 192, dtype=np.float32).reshape(8, 8, 3)]  # from 0 to 1
    processor = InTIClipVideoProcessor(num_frames=1, size=8, crop_size=8)
    plain = processor(frames).pixel_values
    assert torch.equal(processor(frames, _private=1).pixel_values, plain)
    for name in ("do_pad", "default_to_square"):
        assert torch.equal(processor(frames, **{name: False}).pixel_values, plain)
        with pytest.raises(ValueError, match=f"{name} must be False, got True"):
            processor(frames, **{name: True})
    with pytest.raises(TypeError):
        sample_indices(4, 2)


def test_options_of_adapters_that_are_of_no_use(tower):
    for options in ({"pre_attention": 1}, {"pre_mlp": "yes"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            STAdapter.check_options(tower, **options)
    with pytest.raises(ValueError, match="heads"):
        ZeroI2V.check_options(tower, heads={"1": "x"})


def test_options_of_interpolation_are_keywords():
    with pytest.raises(TypeError):
        InTI(12, 4, ("cube",))
    assert InTI(64, 16).position.P.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [(1, 5, 5), (3, 5, 3), (5, 1, 1), (5, 3, 5)])
def test_depthwise_convolution_pads_by_its_kernel(kernel_size, stride):
    torch.manual_seed(0)
    padding = [size // 2 for size in kernel_size]
    conv = nn.Conv3d(4, 4, kernel_size, stride=(stride, 1, 1), padding=padding, groups=4).double()
    x = torch.randn(2, 3 * stride, 6, 7, 4, dtype=torch.float64)
    wanted = conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(depthwise_conv3d(x, conv), wanted)


def test_tokens_on_a_grid_that_is_not_square():
    patches = torch.randn(1, 2, 3, 5)
    positions = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    state = TokenState(num_class_tokens=1, grid=(2, 3), positions=positions)
    grid = to_grid(patches, state)
    assert grid.shape == (1, 2, 2, 3, 5) and grid.abs().sum(dim=-1).count_nonzero() == 6
    assert torch.equal(grid[0, 0, 1, 2], patches[0, 0, 2]) and torch.equal(from_grid(grid, state), patches)


def test_perturbed_top_k_draws_in_parts():
    """More draws than are made at once: the indicators of the soft selection still sum to one for each rank."""
    indicators = perturbed_topk(torch.rand(1, 5), 2, 0.1, num_samples=2 * CHUNK + 3)
    torch.testing.assert_close(indicators.sum(dim=-1), torch.ones(1, 2))
    counts = 500 * perturbed_topk(torch.rand(1, 5), 2, 0.5)  # by default so many draws
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)


def test_kernels_of_adapters_have_three_odd_sizes(tower):
    STAdapter.check_options(tower, kernel_size=[3, 1, 5])
    for kernel_size in ([3, 1], [3, 1, 1, 1], 3, "311", [3, 2, 1], [3, 1, 0]):
        with pytest.raises(ValueError, match="kernel_size"):
            STAdapter.check_options(tower, kernel_size=kernel_size)


def test_first_frame_of_two_tokens_loses_the_even_one():
    x, metric = torch.randn(1, 1, 2, 5), torch.randn(1, 1, 2, 6)
    assert prune(x, metric, 1).tolist() == [[[1]]]
    assert prune(x[:, :, :1], metric[:, :, :1], 0).tolist() == [[[0]]]
    assert first_frame_order(torch.randn(2, 1, 1), "tome", None).tolist() == [[0], [0]]


def test_stride_of_squares_may_be_left_to_stts(tower):
    STTS.check_options(tower, stride=None)
    for options in ({"stride": 0}, {"num_samples": 0}, {"num_samples": None}):
        with pytest.raises(ValueError, match=next(iter(options))):
            STTS.check_options(tower, **options)


def test_options_of_compiling_are_kept(tiny_config, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: seen.append((args, kwargs)))
    model = InTIClipVisionModel(tiny_config())
    model.compile(mode="reduce-overhead")
    model.compile("eager")
    model.compile(fullgraph=True)
    off = {"options": {"layout_optimization": False}}
    assert seen == [((), {"mode": "reduce-overhead"}), (("eager",), {}), ((), {"fullgraph": True, **off})]


def test_outputs_may_be_tuples(tiny_config):
    model = InTIClipForVideoClassification(tiny_config()).eval()
    (logits,) = model(torch.randn(1, 8, 3, 32, 32), return_dict=False)
    assert logits.shape == (1, 5)


def test_all_options_of_the_processor_are_checked():
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no option 'nonsense'"):
        InTIClipVideoProcessor(num_frames=1)(frames, size=4, nonsense=1)


def test_nine_cells_are_three_by_three():
    cells = cells_for(torch.arange(36)[None], (6, 6), 9)[0]
    assert cells.unique().tolist() == list(range(9)) and cells.bincount().tolist() == [4] * 9


def test_smallest_and_largest_options_of_adapters(tower):
    STAdapter.check_options(tower, width=1, num_layers=1)
    UniFormerV2.check_options(tower, reduction=tower.hidden_size)
    assert ToMe(tower, []).prop_attn is True
    first, second = torch.arange(12.0).split(6)
    assert packed_view([first.view(2, 3), second.view(3, 2)]) is None


def test_attention_dropout_is_for_training(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression="none", attention_dropout=0.5))
    x = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x).pooler_output, model(x).pooler_output)
        assert not torch.equal(model.train()(x).pooler_output, model(x).pooler_output)


def test_frames_of_another_size_are_refused_unless_asked_for(tiny_config):
    with pytest.raises(ValueError, match="must be 32 x 32 pixels"):
        InTIClipVisionModel(tiny_config())(torch.randn(1, 8, 3, 48, 48))


def test_configurations_name_all_classes_for_remote_code(tiny_config):
    names = ("AutoConfig", "AutoModel", "AutoModelForVideoClassification")
    assert all(name in tiny_config().auto_map for name in names)


def test_types_of_fields_are_checked():
    for field in ({"drop_path_rate": "a"}, {"classifier_dropout": "x"}):
        with pytest.raises(StrictDataclassError):
            InTIClipVisionConfig(**TINY, compression="none", **field)


def test_crops_of_a_square_move_from_left_to_right():
    frame = torch.arange(64).view(1, 8, 8)
    for place, left in ((0, 0), (1, 2), (2, 4)):
        assert torch.equal(crop(frame, 4, 4, place), frame[:, 2:6, left : left + 4])


def test_a_clip_of_one_frame_may_have_another_size(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression="none"))
    assert model(torch.randn(1, 1, 3, 48, 40), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 1, 31, 48)
