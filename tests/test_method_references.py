"""Every method in a whole tower against its slow reference, in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from hf_inti import InTIClipVisionModel
from hf_inti.hosts import compress
from hf_inti.model.layers import depthwise_conv3d
from hf_inti.model.methods import TokenState
from reference import aim, pooling, st_adapter, sta, stts, tome, uniformerv2, zeroi2v


HEADS = 4


@pytest.fixture
def tower(tiny_config):
    """A function that builds a tower with random weights, and gives its parameters as the references want them."""

    def build(**options):
        config = tiny_config(hidden_size=24, intermediate_size=36, **options)
        model = InTIClipVisionModel._from_config(config, attn_implementation="sdpa").double().eval()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    noise = torch.randn_like(value) * 0.3
                    value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else value + noise)
        params = {name: value.clone() for name, value in model.state_dict().items()}
        for name in ("query", "balance"):
            if f"adaptation.{name}.value" in params:
                params[f"adaptation.{name}"] = params.pop(f"adaptation.{name}.value")
        return model, params

    return build


def clips(T: int = 4) -> torch.Tensor:
    """One, which takes a reference long enough."""
    return torch.randn(1, T, 3, 32, 32, dtype=torch.float64)


def compare(model, pixel_values, feature, tokens=None):
    """The model gets two clips, of which each must come out as it does alone."""
    other = torch.randn_like(pixel_values)
    with torch.no_grad():
        out, alone = model(torch.cat([pixel_values, other])), model(other)
    assert_close(out.pooler_output[:1], feature, rtol=0, atol=1e-9)
    assert_close(out.pooler_output[1:], alone.pooler_output, rtol=0, atol=1e-9)
    if tokens is not None:
        assert_close(out.last_hidden_state[:1], tokens, rtol=0, atol=1e-9)
        assert_close(out.last_hidden_state[1:], alone.last_hidden_state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear_pooling", "conv_pooling"])
@pytest.mark.parametrize("layers", [[1, 3], [0], [4], [0, 4]])
def test_pooling(kind, layers, tower):
    model, params = tower(compression=kind, compression_layers=layers)
    x = clips()
    compare(model, x, *pooling.pooling_model(x, params, heads=HEADS, kind=kind, layers=layers))


@pytest.mark.parametrize("kernel_size", [[2, 1, 1], [3, 3, 1], [2, 3, 5]], ids=str)
def test_conv_pooling_kernels(kernel_size, tower):
    model, params = tower(
        compression="conv_pooling", compression_layers=[1, 3], compression_options={"kernel_size": kernel_size}
    )
    assert params["compression.stages.0.conv.weight"].shape[2:] == tuple(kernel_size)
    x = clips()
    compare(model, x, *pooling.pooling_model(x, params, heads=HEADS, kind="conv_pooling", layers=[1, 3]))


@pytest.mark.parametrize("kernel_size", [[3, 1, 1], [2, 1, 1], [3, 3, 3]], ids=str)
def test_conv_pooling_starts_as_the_mean(kernel_size, tiny_config):
    options = {"compression": "conv_pooling", "compression_options": {"kernel_size": kernel_size}}
    model = InTIClipVisionModel(tiny_config(**options))
    x = torch.randn(2, 4, 17, 48)
    out, _ = model.compression.stages[0](x, TokenState(num_class_tokens=1, grid=(4, 4)))
    assert_close(out, (x[:, 0::2] + x[:, 1::2]) / 2)


@pytest.mark.parametrize(
    "given, r", [(3, 3), ([0, 5, 1], [0, 5, 1]), ([2, -1], (2, -1)), ([3, 0.5], (3, 0.5)), (99, 99), (0, 0)]
)
@pytest.mark.parametrize("prop_attn", [True, False])
def test_tome(given, r, prop_attn, tower):
    model, params = tower(compression="tome", compression_options={"r": given, "prop_attn": prop_attn})
    x = clips(2)
    feature, tokens, sizes, groups = tome.tome_model(x, params, heads=HEADS, r=r, prop_attn=prop_attn)
    compare(model, x, feature, tokens)
    source = model(x, output_token_source=True).token_source
    for b, clip in enumerate(groups):
        for t, frame in enumerate(clip):
            for token, group in enumerate(frame):
                assert sorted(group) == (source[b, t] == token).nonzero().flatten().tolist()
                assert len(group) == sizes[b, t, token]


@pytest.mark.parametrize("order", ["F-B-F", "B-F-B", "F", "B"])
@pytest.mark.parametrize("r, T", [(5, 4), (8, 3), (4, 1)])
def test_sta(order, r, T, tower):
    model, params = tower(compression="sta", compression_options={"r": r, "order": order}, num_frames=T)
    x = clips(T)
    feature, tokens, positions = sta.sta_clip(x, params, heads=HEADS, r=r, order=order)
    compare(model, x, feature, tokens)
    source = model(x, output_token_source=True).token_source
    for t in (0, T - 1):
        kept = [(source[0, t] == token).nonzero().item() - 1 for token in range(1, tokens.shape[2])]
        assert kept == positions[0, t].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "query"},
        {"similarity": "value"},
        {"similarity": "ffn"},
        {"r": 3, "schedule": "constant"},
        {"r": 2, "schedule": "increasing"},
        {"scores": "semantic"},
        {"scores": "temporal"},
    ],
    ids=str,
)
def test_sta_ablations(options, tower):
    options = {"r": 6, **options}
    model, params = tower(compression="sta", compression_options=options)
    x = clips()
    feature, tokens, _ = sta.sta_clip(x, params, heads=HEADS, **options)
    compare(model, x, feature, tokens)


@pytest.mark.parametrize("scorer", ["paper", "released"])
@pytest.mark.parametrize(
    "temporal, spatial",
    [([[0, 0.5]], [[1, 0.6]]), ([[2, 0.75]], []), ([], [[0, 0.6], [3, 0.5]]), ([[1, 0.5]], [[1, 0.3]])],
)
def test_stts(scorer, temporal, spatial, tower):
    options = {"temporal": temporal, "spatial": spatial, "scorer": scorer}
    model, params = tower(compression="stts", compression_options=options)
    x = clips()
    feature, tokens, *_ = stts.stts_model(x, params, heads=HEADS, temporal=temporal, spatial=spatial, scorer=scorer)
    compare(model, x, feature, tokens)


@pytest.mark.parametrize("local", ["none", "single", "double"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("global_layers, downsample", [([2, 4], False), ([1, 3, 4], True)])
def test_uniformerv2(local, frozen, global_layers, downsample, tower):
    options = {"local": local, "frozen": frozen, "global_layers": global_layers, "temporal_downsample": downsample}
    model, params = tower(compression="none", adaptation="uniformerv2", adaptation_options=options)
    x = clips()
    wanted = uniformerv2.model(
        x,
        params,
        heads=HEADS,
        global_layers=global_layers,
        local=local,
        temporal_downsample=downsample,
        frozen=frozen,
    )
    compare(model, x, *wanted)


@pytest.mark.parametrize("local", ["none", "single", "double"])
def test_uniformerv2_without_a_video_token(local, tower):
    options = {"local": local, "global_layers": 0}
    model, params = tower(compression="none", adaptation="uniformerv2", adaptation_options=options)
    x = clips()
    compare(model, x, *uniformerv2.model(x, params, heads=HEADS, global_layers=[], local=local))


@pytest.mark.parametrize(
    "preset, local, global_layers", [("k400", "none", [1, 2, 3, 4]), ("ssv2", "double", [2, 3, 4])]
)
def test_uniformerv2_presets_on_halved_frames(preset, local, global_layers, tower):
    model, params = tower(
        compression="linear_pooling",
        compression_layers=[2, 4],
        adaptation="uniformerv2",
        adaptation_options={"preset": preset},
    )
    with torch.no_grad():
        for stage in model.compression.stages:  # the plain mean of each pair, as the reference halves
            stage.logits.zero_()
    x = clips()
    wanted = uniformerv2.model(x, params, heads=HEADS, global_layers=global_layers, local=local, halve_after=(2, 4))
    compare(model, x, *wanted)


def test_uniformerv2_on_tokens_without_a_grid(tower):
    model, params = tower(compression="sta", adaptation="uniformerv2", adaptation_options={"preset": "ssv2"})
    positions = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    x = torch.randn(1, 3, 8, 24, dtype=torch.float64)
    state = TokenState(num_class_tokens=1, grid=(4, 4), positions=positions[None])
    with torch.no_grad():
        got = model.adaptation.local1[2](x[:, :, 1:], state)[0]
        wanted = uniformerv2.local_mhra_irregular(x[0, :, 1:], positions, (4, 4), params, "adaptation.local1.2")
        assert_close(got, wanted, rtol=0, atol=1e-9)
        query = torch.randn(1, 24, dtype=torch.float64)
        got = model.adaptation.global_blocks[1](query, x, state)[0]
    wanted = uniformerv2.global_block(query[0], x[0], (4, 4), params, 1, heads=HEADS, positions=positions)
    assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "heads", [{"-1": 1, "1": 1}, {-1: 1, 1: 1, -2: 1, 2: 1}, {"2": 1.5, "-3": 0.5}, {"1": 4}], ids=str
)
@pytest.mark.parametrize("num_tadapter", [1, 2])
def test_zeroi2v(heads, num_tadapter, tower):
    options = {"heads": heads, "num_tadapter": num_tadapter, "scale": 0.7}
    model, params = tower(compression="none", adaptation="zeroi2v", adaptation_options=options)
    x = clips(3)
    shifts = {int(offset): number for offset, number in heads.items()}
    wanted = zeroi2v.model(x, params, heads=HEADS, shifts=shifts, scale=0.7, num_tadapter=num_tadapter)
    compare(model, x, wanted)
    model.merge_adapters()
    compare(model, x, wanted)


@pytest.mark.parametrize("num_tadapter", [1, 2])
@pytest.mark.parametrize("T", [1, 4])
def test_aim(num_tadapter, T, tower):
    options = {"num_tadapter": num_tadapter, "scale": 0.3}
    model, params = tower(compression="none", adaptation="aim", adaptation_options=options, num_frames=T)
    x = clips(T)
    compare(model, x, aim.model(x, params, heads=HEADS, scale=0.3, num_tadapter=num_tadapter))


@pytest.mark.parametrize("pre_attention, pre_mlp", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("num_layers, kernel_size", [(4, [3, 1, 1]), (2, [5, 3, 1])])
def test_st_adapter(pre_attention, pre_mlp, num_layers, kernel_size, tower):
    options = {"pre_attention": pre_attention, "pre_mlp": pre_mlp, "num_layers": num_layers, "kernel_size": kernel_size}
    model, params = tower(compression="none", adaptation="st_adapter", adaptation_options={**options, "width": 10})
    x = clips(3)
    wanted = st_adapter.model(
        x, params, heads=HEADS, pre_attention=pre_attention, pre_mlp=pre_mlp, num_layers=num_layers
    )
    compare(model, x, wanted)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (3, 3, 3), (7, 3, 1), (1, 3, 3)])
def test_depthwise_convolution_is_torchs(T, kernel):
    conv = torch.nn.Conv3d(6, 6, kernel, padding=[k // 2 for k in kernel], groups=6).double()
    x = torch.randn(2, T, 3, 4, 6, dtype=torch.float64)
    wanted = conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    assert_close(depthwise_conv3d(x, conv), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [2, 4, 6])
def test_depthwise_convolution_with_stride_is_torchs(T):
    conv = torch.nn.Conv3d(6, 6, 3, stride=(2, 1, 1), padding=1, groups=6).double()
    x = torch.randn(2, T, 3, 4, 6, dtype=torch.float64)
    wanted = conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    assert_close(depthwise_conv3d(x, conv), wanted, rtol=0, atol=1e-12)


# STA on VideoMAE


@pytest.fixture(scope="module")
def videomae(tmp_path_factory):
    """A VideoMAE with random weights as transformers saves and loads it."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=16,
        patch_size=4,
        num_frames=8,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=36,
        num_labels=5,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("videomae")
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    return lambda: VideoMAEForVideoClassification.from_pretrained(folder).double().eval()


STA_OPTIONS = [
    {"r": 7},
    {"r": 4, "schedule": "released"},
    {"r": 3, "schedule": "constant"},
    {"r": 2, "schedule": "increasing"},
    {"r": 4, "order": "B-F-B"},
    {"r": 4, "order": "B"},
    {"r": 4, "similarity": "query"},
    {"r": 4, "similarity": "value"},
    {"r": 4, "similarity": "ffn"},
    {"r": 4, "scores": "semantic"},
    {"r": 4, "scores": "temporal"},
]


@pytest.mark.parametrize("options", [{"r": 4}, *STA_OPTIONS], ids=str)
def test_sta_on_videomae(options, videomae):
    model = compress(videomae(), "sta", **options)
    x = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        got = model(x).logits
        alone = model(x[1:]).logits
    wanted = sta.sta_videomae(x, model.state_dict(), model.config, **options)
    assert_close(got, wanted, rtol=0, atol=1e-9)
    assert_close(alone, got[1:], rtol=0, atol=1e-12)


def test_sta_on_videomae_comes_off_and_leaves_no_trace(videomae):
    model = videomae()
    x = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x).logits
        assert not torch.equal(compress(model, "sta", r=4)(x).logits, plain)
        once = compress(model, "sta", r=6)(x).logits
        assert torch.equal(compress(model, "sta", r=6)(x).logits, once)  # not twice on top of each other
        assert torch.equal(compress(model, "sta", r=0)(x).logits, plain)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"first_frame": "random"}, {"first_frame": "grid"}, {"similarity": "value"}], ids=str
)
def test_sta_on_videomae_has_stas_options(options, videomae):
    model = compress(videomae(), "sta", r=4, **options)
    shapes = []
    for layer in model.videomae.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    x = torch.randn(1, 8, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x).logits, model(x).logits)
    assert shapes == [4 * 12, 4 * 10, 4 * 9, 4 * 9] * 2


def test_what_sta_cannot_do_on_videomae_is_said(videomae, tiny_config):
    model = videomae()
    with pytest.raises(ValueError, match="got 16, which drops 16 of a group's 16"):
        compress(model, "sta", r=16)
    with pytest.raises(ValueError, match="schedule must be one of decreasing, constant, increasing, released"):
        compress(model, "sta", schedule="half")
    for groups in (5, "4", 2.0, True, 0):
        with pytest.raises(ValueError, match="divides the model's 64 tokens"):
            compress(model, "sta", groups=groups)
    with pytest.raises(ValueError, match="multiple of 4 with schedule 'released'.*got 2"):
        compress(model, "sta", r=2, schedule="released", groups=2)
    with pytest.raises(ValueError, match="order must be"):
        compress(model, "sta", order="forward")
    with pytest.raises(ValueError, match="got InTIClipVisionModel"):
        compress(InTIClipVisionModel(tiny_config()), "sta")
    model.config.use_mean_pooling = False
    with pytest.raises(ValueError, match="set use_mean_pooling"):
        compress(model, "sta")


def test_threads_can_share_a_model_with_sta(videomae):
    model = compress(videomae(), "sta", r=4)
    inputs = [torch.randn(1, 8, 3, 16, 16, dtype=torch.float64) for _ in range(8)]

    def run(x):
        with torch.no_grad():
            return model(x).logits

    wanted = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, logits in zip(pool.map(run, inputs * 6), wanted * 6, strict=True):
            assert torch.equal(got, logits)


def test_masked_positions_are_refused_with_sta(videomae):
    model = compress(videomae(), "sta", r=4).videomae
    masked = torch.zeros(1, 64, dtype=torch.bool)
    masked[:, :20] = True
    with pytest.raises(ValueError, match="set up for 64 tokens in this block, got 44"):
        model(torch.randn(1, 8, 3, 16, 16, dtype=torch.float64), bool_masked_pos=masked)
