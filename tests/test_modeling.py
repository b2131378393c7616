"""The model: parity with CLIP, initial values, outputs, numerics under every way of running it."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForVideoClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from conftest import TINY
from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig, InTIClipVisionModel
from hf_inti.measure.costs import count_costs
from hf_inti.model.compression_inti import InTI
from reference import naive


TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


def clip_model(kind: str):
    if kind == "CLIPModel":
        config = CLIPConfig(vision_config={**TINY, "projection_dim": 8}, text_config=TEXT, projection_dim=8)
        return CLIPModel(config)
    return {"CLIPVisionModel": CLIPVisionModel, "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection}[kind](
        CLIPVisionConfig(**TINY)
    )


def tower_of(clip) -> CLIPVisionModel:
    return getattr(clip, "vision_model", clip)


def randomise_new_parameters(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compression" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


KINDS = ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["none", "inti"])
def test_loads_plain_clip(kind, compression, tmp_path):
    clip = clip_model(kind)
    clip.save_pretrained(tmp_path)
    config = InTIClipVisionConfig.from_clip(tmp_path, num_frames=8, compression=compression, num_labels=5)
    for cls, prefix in ((InTIClipVisionModel, ""), (InTIClipForVideoClassification, "vision_model.")):
        model, info = cls.from_pretrained(tmp_path, config=config, output_loading_info=True)
        loaded = dict(model.base_model.named_parameters())
        for name, value in tower_of(clip).named_parameters():
            assert torch.equal(loaded.pop(name), value), name
        missing = {prefix + name for name in loaded}
        assert all(name.startswith("compression.") for name in loaded)
        if prefix:
            missing |= {"classifier.weight", "classifier.bias"}
        assert info["missing_keys"] == missing
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        check_initial_values(model)


def check_initial_values(model) -> None:
    """What the design says of the new parameters, for every one of them."""
    checked = set()

    def mark(module, test):
        for name, parameter in module.named_parameters(recurse=False):
            assert test(name, parameter), (type(module).__name__, name)
            checked.add(parameter)

    for module in model.base_model.compression.modules():
        kind = type(module).__name__
        if kind == "TemporalPosition":
            mark(module, lambda name, p: p.eq(0).all() if name == "sigma" else 0.015 < p.std() < 0.025)
        elif kind == "ZeroLinear":
            mark(module, lambda name, p: p.eq(0).all())
        elif isinstance(module, torch.nn.LayerNorm):
            mark(module, lambda name, p: p.eq(1).all() if name == "weight" else p.eq(0).all())
        elif hasattr(module, "weight"):  # uniform within 1 / sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            mark(module, lambda name, p, b=bound: 0.7 * b < p.abs().max() <= b and p.unique().numel() > p.numel() * 0.9)
    assert checked == set(model.base_model.compression.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"cube": "dwconv", "head": "attention"}, {"fusion": "concat", "head": "sigmoid"}]
)
def test_initial_values_after_direct_construction(tiny_config, options):
    config = tiny_config(compression_options=options)
    for cls in (InTIClipVisionModel, InTIClipForVideoClassification):
        check_initial_values(cls(config))


@pytest.mark.parametrize("T", [1, 3, 8])
def test_naive_is_clip_per_frame(T, tmp_path):
    clip = clip_model("CLIPVisionModel").eval()
    clip.save_pretrained(tmp_path)
    config = InTIClipVisionConfig.from_clip(tmp_path, compression="none", num_labels=5)
    model = InTIClipForVideoClassification.from_pretrained(tmp_path, config=config).eval()
    pixel_values = torch.randn(2, T, 3, 32, 32)
    with torch.no_grad():
        feature = clip(pixel_values.flatten(0, 1)).pooler_output.unflatten(0, (2, T)).mean(1)
        torch.testing.assert_close(model(pixel_values).logits, model.classifier(feature), rtol=0, atol=1e-5)


def test_naive_equals_the_slow_reference(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(compression="none")).double().eval()
    # Eager attention takes its softmax in float32 whatever the inputs.
    pixel_values = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    params = {
        **model.vision_model.state_dict(),
        "head.weight": model.classifier.weight,
        "head.bias": model.classifier.bias,
    }
    expected, _, _ = naive.naive(pixel_values, params, heads=TINY["num_attention_heads"])
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=1e-10)


def test_outputs(tiny_config):
    model = InTIClipVisionModel(tiny_config(compression_layers=[0, 2, 4])).eval()
    model.set_attn_implementation("eager")
    out = model(
        torch.randn(2, 8, 3, 32, 32),
        output_hidden_states=True,
        output_attentions=True,
        output_interpolation_weights=True,
    )
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, T, 17, 48) for T in (8, 4, 4, 2, 2)]
    assert [tuple(a.shape) for a in out.attentions] == [(2 * T, 4, 17, 17) for T in (4, 4, 2, 2)]
    assert [tuple(w.shape) for w in out.interpolation_weights] == [(2, T, 17, 2) for T in (4, 2, 1)]
    assert out.last_hidden_state.shape == (2, 1, 17, 48) and out.pooler_output.shape == (2, 48)
    # From equal weights and no position, compression is the plain average of neighbouring frames.
    torch.testing.assert_close(out.last_hidden_state[:, 0], out.hidden_states[4].mean(1))
    assert model(torch.randn(1, 8, 3, 32, 32)).hidden_states is None


@pytest.mark.parametrize("T", [4, 8, 12, 16])
def test_any_number_of_frames_that_can_be_halved(tiny_config, T):
    model = InTIClipForVideoClassification(tiny_config())
    assert model(torch.randn(1, T, 3, 32, 32)).logits.shape == (1, 5)


@pytest.mark.parametrize(("T", "near"), [(1, "4"), (7, "4 and 8"), (18, "16 and 20")])
def test_other_numbers_of_frames_are_refused(tiny_config, T, near):
    with pytest.raises(ValueError, match=f"must be a multiple of 4 .*got {T}; .* work: {near}\\."):
        InTIClipVisionModel(tiny_config())(torch.randn(1, T, 3, 32, 32))


def test_costs_of_no_frames_are_refused_too(tiny_config):
    with pytest.raises(ValueError, match="multiple of 4 .*got 0"):
        count_costs(tiny_config(), num_frames=0)


def test_wrong_inputs_read_well(tiny_config):
    model = InTIClipForVideoClassification(tiny_config())
    with pytest.raises(ValueError, match="pixel_values must be given, got None"):
        model()
    with pytest.raises(ValueError, match=r"shape \(B, T, 3, height, width\), got \(8, 3, 32, 32\)"):
        model(torch.randn(8, 3, 32, 32))
    with pytest.raises(ValueError, match="must be 32 x 32 pixels, got 48 x 32"):
        model(torch.randn(1, 8, 3, 48, 32))
    for label in (5, -1):
        with pytest.raises(ValueError, match=f"from 0 to 4, the model's classes, got {label}; .*larger num_labels"):
            model(torch.randn(2, 8, 3, 32, 32), labels=torch.tensor([0, label]))


def test_a_checkpoint_of_another_shape_reads_well(tiny_config, tmp_path):
    InTIClipForVideoClassification(tiny_config()).save_pretrained(tmp_path)
    for options in ({"num_labels": 7}, {"config": tiny_config(patch_size=16)}):
        with pytest.raises(ValueError, match="holds weights of other shapes .* ignore_mismatched_sizes=True") as error:
            InTIClipForVideoClassification.from_pretrained(tmp_path, **options)
        assert "\n" not in str(error.value)


def test_other_frame_sizes_on_request(tiny_config):
    model = InTIClipVisionModel(tiny_config())
    out = model(torch.randn(1, 8, 3, 48, 32), interpolate_pos_encoding=True)
    assert out.last_hidden_state.shape == (1, 2, 1 + 6 * 4, 48)


@pytest.mark.parametrize("options", [{}, {"cube": "dwconv", "head": "attention", "fusion": "concat"}])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tiny_config, options, reentrant):
    model = InTIClipForVideoClassification(tiny_config(compression_options=options)).train()
    randomise_new_parameters(model)
    pixel_values = torch.randn(2, 8, 3, 32, 32, requires_grad=True)
    labels = torch.tensor([1, 4])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(pixel_values, labels=labels, output_interpolation_weights=True)
        out.loss.backward()
        assert len(out.interpolation_weights) == 2
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    assert all(gradient.abs().max() > 0 for gradient in plain)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert any(isinstance(m, InTI) and m.gradient_checkpointing for m in model.modules())
    for expected, got in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


def test_attention_implementations_and_precisions_agree(tiny_config):
    model = InTIClipForVideoClassification(tiny_config()).eval()
    randomise_new_parameters(model)
    pixel_values = torch.randn(2, 8, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=1e-6)
        model.set_attn_implementation("sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(pixel_values).logits.float(), expected, rtol=0, atol=0.05)
        torch.testing.assert_close(model.bfloat16()(pixel_values).logits.float(), expected, rtol=0, atol=0.05)


def test_drop_path_drops_whole_clips_in_training_only(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(compression="none", drop_path_rate=0.9))
    pixel_values = torch.randn(1, 8, 3, 32, 32).expand(16, -1, -1, -1, -1)
    model.train()
    assert model(pixel_values).logits.unique(dim=0).shape[0] > 1
    model.eval()
    torch.testing.assert_close(model(pixel_values).logits, model(pixel_values[:1]).logits.expand(16, -1))


def test_save_and_load(tiny_config, tmp_path):
    model = InTIClipForVideoClassification(tiny_config(id2label={i: f"class {i}" for i in range(5)})).eval()
    randomise_new_parameters(model)
    pixel_values = torch.randn(1, 8, 3, 32, 32)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    with torch.no_grad():
        expected = model(pixel_values)
        for folder in ("whole", "sharded"):
            loaded = AutoModelForVideoClassification.from_pretrained(tmp_path / folder)
            assert loaded.config.id2label[3] == "class 3"
            torch.testing.assert_close(loaded(pixel_values).logits, expected.logits, rtol=0, atol=1e-6)
            tower = AutoModel.from_pretrained(tmp_path / folder)
            feature = model.vision_model(pixel_values).pooler_output
            torch.testing.assert_close(tower(pixel_values).pooler_output, feature, rtol=0, atol=1e-6)
    # A tower alone makes a classifier, and other classes make a new head.
    tower.save_pretrained(tmp_path / "tower")
    headed, info = InTIClipForVideoClassification.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    other, info = InTIClipForVideoClassification.from_pretrained(
        tmp_path / "whole", num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert other.classifier.out_features == 7
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


def test_loss_follows_gradient_accumulation(tiny_config):
    """Trainer passes how many labels the whole accumulated batch has; the loss then is a sum over that many."""
    model = InTIClipForVideoClassification(tiny_config()).eval()
    pixel_values, labels = torch.randn(4, 8, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    whole = model(pixel_values, labels=labels).loss
    halves = sum(model(pixel_values[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=4).loss for i in (0, 2))
    torch.testing.assert_close(halves, whole)


def test_weights_that_are_cut_off_are_said(tiny_config, tmp_path):
    InTIClipForVideoClassification(tiny_config()).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for part in (b"", whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match="are damaged or cut off .*fetch or write them again"):
            InTIClipForVideoClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("compression", ["inti", "conv_pooling", "linear_pooling"])
def test_stages_stay_on_one_device(compression, tiny_config):
    """device_map goes by the names of classes, not of their bases."""
    model = InTIClipVisionModel(tiny_config(compression=compression))
    names = {type(module).__name__ for module in (*model.compression.stages, *model.encoder.layers, model.embeddings)}
    assert len(names) == 3 and names <= set(model._no_split_modules)
