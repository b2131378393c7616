"""Every compression with every adaptation: what all of them must stand, and what each keeps to."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig, InTIClipVisionModel
from hf_inti.model import compression_stts as stts
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS
from hf_inti.model.methods import TokenState
from hf_inti.training.callbacks import TrainingProgressCallback
from hf_inti.visualization import left_of_frames


COMPRESSION_OPTIONS = {
    "none": {},
    "inti": {},
    "linear_pooling": {},
    "conv_pooling": {},
    "tome": {"r": 3},
    "sta": {"r": 4},
    "stts": {"temporal": [[0, 0.5]], "spatial": [[1, 0.6]], "scorer": "released"},
}
# Without dropout, which a compiled model draws in another way.
ADAPTATION_OPTIONS = {
    "none": {},
    "uniformerv2": {"preset": "ssv2", "mlp_dropout": 0.0},
    "zeroi2v": {"heads": {"-1": 1, "1": 1, "-2": 1}, "dropout": 0.0},
    "aim": {"num_tadapter": 2},
    "st_adapter": {"pre_attention": True},
}
PAIRS = list(itertools.product(COMPRESSIONS, ADAPTATIONS))
REFUSED = list(itertools.product(["tome", "sta"], ["zeroi2v", "aim"]))
ALLOWED = [pair for pair in PAIRS if pair not in REFUSED]
# What has no effect on the outcome by its authors' design: the patches that the last adapter before an MLP changes are
# not read any more, and a shift of all scores is taken out by their normalisation.
WITHOUT_EFFECT = ("adaptation.pre_mlp.3.", "scorer.score.bias")
# The frames and patches of each frame that are left of 8 and 16.
LEFT = {"tome": (8, 4), "sta": (8, 9), "stts": (4, 9), "none": (8, 16)}


def randomise(model) -> None:
    """Random values for all that trains, much of which starts at zero and would stop gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def build(tiny_config):
    def build(compression: str, adaptation: str, **options) -> InTIClipForVideoClassification:
        config = tiny_config(
            **{
                "compression": compression,
                "compression_layers": [1, 3],
                "compression_options": COMPRESSION_OPTIONS[compression],
                "adaptation": adaptation,
                "adaptation_options": ADAPTATION_OPTIONS[adaptation],
                **options,
            }
        )
        model = InTIClipForVideoClassification(config)
        randomise(model)
        return model

    return build


def clips(B: int = 2, T: int = 8) -> torch.Tensor:
    return torch.randn(B, T, 3, 32, 32)


@pytest.mark.parametrize("pair", ALLOWED, ids="+".join)
def test_optimised_inference_equals_the_plain_one(build, pair):
    model = build(*pair).eval()
    pixel_values = clips()
    asked = {"output_hidden_states": True, "output_interpolation_weights": True, "output_token_source": True}
    with torch.no_grad():
        plain = model(pixel_values, **asked)
        assert model.optimize_for_inference() is model
        fast = model(pixel_values, **asked)
    assert fast.keys() == plain.keys()
    assert len(plain.hidden_states) == 5
    for name in plain:
        assert_close(fast[name], plain[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(model(pixel_values).logits, plain.logits, atol=1e-6, rtol=1e-6)  # with gradients: the plain way


def gradients(model, run, pixel_values) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # STTS draws noise
    run(pixel_values, labels=torch.arange(len(pixel_values)) % 5).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_pairs_are_all():
    assert len(ALLOWED) == 7 * 5 - 4
    assert set(COMPRESSIONS) == set(COMPRESSION_OPTIONS) and set(ADAPTATIONS) == set(ADAPTATION_OPTIONS)


@pytest.mark.parametrize("compression, adaptation", REFUSED)
def test_meaningless_pairs_are_refused(compression, adaptation, tiny_config):
    with pytest.raises(ValueError, match=f"at its place for adaptation '{adaptation}', got '{compression}'"):
        tiny_config(compression=compression, adaptation=adaptation)


@pytest.mark.parametrize("compression, adaptation", ALLOWED)
def test_gradients_reach_all_that_trains(compression, adaptation, build):
    model = build(compression, adaptation).train()
    got = gradients(model, model, clips())
    assert got.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    silent = [name for name, gradient in got.items() if not gradient.abs().sum() > 0]
    assert [name for name in silent if not any(part in name for part in WITHOUT_EFFECT)] == []


@pytest.mark.parametrize("compression, adaptation", ALLOWED)
def test_saving_and_loading_keeps_the_outputs(compression, adaptation, build, tmp_path):
    model = build(compression, adaptation)
    pixel_values = clips()
    model.train()(pixel_values)  # BatchNorm's statistics move too
    model.eval().save_pretrained(tmp_path)
    loaded = InTIClipForVideoClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trained


@pytest.mark.parametrize("compression, adaptation", ALLOWED)
def test_checkpointing_changes_no_gradient_and_no_statistics(compression, adaptation, build):
    model = build(compression, adaptation).train()
    pixel_values = clips()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = gradients(model, model, pixel_values)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for use_reentrant in (False, True):
        model.load_state_dict(start)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        inputs = pixel_values.clone().requires_grad_(use_reentrant)  # the old way sees no gradient without
        other = gradients(model, model, inputs)
        assert other.keys() == plain.keys()
        for name, gradient in plain.items():
            assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        for name, value in model.state_dict().items():
            assert_close(value, after[name], rtol=1e-6, atol=1e-6, msg=name)


def few_blocks(compression: str) -> dict:
    """The fewest that hold all parts: compiling takes long."""
    return {"num_hidden_layers": 3 if compression == "sta" else 2, "compression_layers": [1]}


# A backend takes each method once, with its backward pass. Others are traced alone, which takes half as long: the pairs
# with the adaptation that asks most of a compression.
PREPARED = [(name, "none") for name in COMPRESSIONS if name != "none"]
PREPARED += [("none", "uniformerv2"), ("inti", "aim"), ("inti", "st_adapter"), ("inti", "zeroi2v")]
COMPILED = [pair for pair in ALLOWED if pair in PREPARED or pair[1] == "uniformerv2"]


def test_every_method_is_compiled():
    assert set(PREPARED) <= set(COMPILED)
    assert {c for c, _ in PREPARED} == set(COMPRESSIONS) and {a for _, a in PREPARED} == set(ADAPTATIONS)


@pytest.mark.parametrize("compression, adaptation", COMPILED)
def test_compiles_without_graph_breaks(compression, adaptation, build):
    backend = "aot_eager" if (compression, adaptation) in PREPARED else "eager"
    model = build(compression, adaptation, **few_blocks(compression)).train()
    pixel_values = clips()
    plain = gradients(model, model, pixel_values)
    torch.compiler.reset()
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend=backend), pixel_values)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("compression, adaptation", ALLOWED)
def test_clips_of_a_batch_are_independent(compression, adaptation, build):
    model = build(compression, adaptation).double().eval()
    pixel_values = clips(3).double()
    with torch.no_grad():
        together = model(pixel_values).logits
        for b in range(3):
            assert_close(model(pixel_values[b : b + 1]).logits[0], together[b], rtol=0, atol=1e-10)


@pytest.mark.parametrize("compression, adaptation", ALLOWED)
def test_bfloat16(compression, adaptation, build):
    model = build(compression, adaptation).to(torch.bfloat16).train()
    loss = model(clips().bfloat16(), labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert loss.isfinite()


# Tokens


@pytest.mark.parametrize("compression", LEFT)
def test_frames_and_tokens_that_are_left(compression, build):
    out = build(compression, "none").eval()(clips(), output_hidden_states=True)
    assert out.hidden_states[-1].shape == (2, LEFT[compression][0], 1 + LEFT[compression][1], 48)


def test_tome_accounts_for_every_token(build):
    model = build("tome", "none").eval()
    out = model(clips(), output_token_source=True)
    source = out.token_source
    assert source.shape == (2, 8, 17) and source.min() == 0 and source.max() == 4
    assert (source[..., 0] == 0).all() and ((source == 0).sum(dim=-1) == 1).all()  # the class token stays alone
    for token in range(5):
        assert (source == token).any(dim=-1).all()


def test_sta_keeps_distinct_patches_of_every_frame(build):
    model = build("sta", "none").eval()
    source = model(clips(), output_token_source=True).token_source
    assert (source[..., 0] == 0).all()
    assert ((source >= 0).sum(dim=-1) == 1 + 16 - 4 - 2 - 1).all()
    for kept in source.flatten(0, 1):
        assert sorted(kept[kept >= 0].tolist()) == list(range(10))


def test_what_is_left_of_frames_is_drawn():
    frames = torch.rand(1, 3, 4, 6)  # patches of 2 x 3 pixels
    a, b, c, d = frames[0, :, :2, :3], frames[0, :, :2, 3:], frames[0, :, 2:, :3], frames[0, :, 2:, 3:]
    left = left_of_frames(frames, torch.tensor([[0, 2, 1, 2, -1]]))[0]
    assert_close(left[:, :2, :3], (a + c) / 2)
    assert_close(left[:, :2, 3:], b)
    assert_close(left[:, 2:, :3], (a + c) / 2)
    assert (left[:, 2:, 3:] == 1).all() and not (d == 1).all()


@pytest.mark.parametrize(
    "compression, options",
    [
        ("tome", {"r": 0}),
        ("tome", {"r": []}),
        ("sta", {"r": 0}),
        ("stts", {"temporal": [[0, 1.0]], "spatial": [[1, 1.0]]}),
        ("inti", {}),
        ("linear_pooling", {}),
    ],
)
def test_a_zero_budget_is_the_identity(compression, options, build):
    idle = build(compression, "none", compression_options=options, compression_layers=[]).eval()
    naive = build("none", "none").eval()
    naive.load_state_dict(idle.state_dict(), strict=False)
    pixel_values = clips()
    with torch.no_grad():
        assert torch.equal(idle(pixel_values).logits, naive(pixel_values).logits)
        sources = idle(pixel_values, output_token_source=True).token_source
    assert torch.equal(sources, torch.arange(17).expand(2, 8, 17))


@pytest.mark.parametrize("compression", ["linear_pooling", "conv_pooling", "inti"])
def test_equal_frames_are_merged_into_the_same(compression, tiny_config):
    config = tiny_config(compression=compression, compression_layers=[1, 3])
    model = InTIClipForVideoClassification(config).eval()
    naive = InTIClipForVideoClassification(tiny_config(compression="none")).eval()
    naive.load_state_dict(model.state_dict(), strict=False)
    pixel_values = clips(2, 1).expand(-1, 8, -1, -1, -1)
    with torch.no_grad():
        assert_close(model(pixel_values).logits, naive(pixel_values).logits, rtol=1e-5, atol=1e-5)


def test_pooling_starts_as_the_mean_of_each_pair(tiny_config):
    x = torch.randn(2, 8, 5, 48)
    for compression in ("linear_pooling", "conv_pooling"):
        model = InTIClipVisionModel(tiny_config(compression=compression, compression_layers=[0]))
        z, _ = model.compression.after_block(0, x, None, None)
        assert_close(z, (x[:, 0::2] + x[:, 1::2]) / 2)


def test_linear_pooling_reports_its_weights(build):
    out = build("linear_pooling", "none").eval()(clips(), output_interpolation_weights=True)
    assert [w.shape for w in out.interpolation_weights] == [(2, 4, 17, 2), (2, 2, 17, 2)]
    for weights in out.interpolation_weights:
        assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_merging_duplicates_with_proportional_attention_changes_nothing(build):
    # Patches in equal twos, at even and odd places, merge exactly; counted twice they weigh what they weighed.
    options = {"r": [8], "prop_attn": True}
    model = build("tome", "none", compression_options=options).double().eval()
    naive = build("none", "none").double().eval()
    naive.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one in (model, naive):
            positions = one.vision_model.embeddings.position_embedding.weight
            positions[2::2] = positions[1::2]
        half = torch.randn(2, 8, 3, 32, 4, dtype=torch.float64).repeat_interleave(4, dim=-1)
        pixel_values = half.unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2).flatten(-2)
        out = model.vision_model(pixel_values)
        assert out.last_hidden_state.shape[2] == 9
        assert_close(out.pooler_output, naive.vision_model(pixel_values).pooler_output, rtol=0, atol=1e-9)


def test_stts_keeps_whole_frames_in_order(build):
    model = build("stts", "none", compression_options={"temporal": [[2, 0.5]]}).eval()
    out = model(clips(), output_hidden_states=True)
    before = out.hidden_states[2]
    state = TokenState(num_class_tokens=1, grid=(4, 4))
    kept = model.vision_model.compression.after_block(2, before, None, state)[0]
    for b in range(2):
        places = [next(t for t in range(8) if torch.equal(frame, before[b, t])) for frame in kept[b]]
        assert len(places) == 4 and places == sorted(set(places))


def test_stts_noise_fades_with_training(build):
    model = build("stts", "none").train()
    topk = model.vision_model.compression.temporal[0].topk
    assert topk.sigma == 0.1
    model.set_training_progress(0.75)
    assert topk.sigma.item() == pytest.approx(0.025)
    model.set_training_progress(1.0)
    pixel_values = clips()
    with torch.no_grad():  # hard, as in evaluation
        assert_close(model(pixel_values).logits, model.eval()(pixel_values).logits, rtol=1e-4, atol=1e-5)
    gradient = gradients(model.train(), model, pixel_values)
    assert all((g == 0).all() for name, g in gradient.items() if "compression" in name)
    with pytest.raises(ValueError, match="progress must be from 0 to 1, got 1.5"):
        model.set_training_progress(1.5)


def test_trainer_lets_the_noise_fade(build, tmp_path):
    model = build("stts", "none")
    clips_ = [{"pixel_values": clips(1)[0], "labels": i} for i in range(4)]
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, save_strategy="no", **options)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.vision_model.compression.temporal[0].topk.sigma.item())

    Trainer(model, arguments, train_dataset=clips_, callbacks=[TrainingProgressCallback(), Watch()]).train()
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_stts_noise_is_not_saved_and_starts_anew(build, tmp_path):
    model = build("stts", "none")
    model.set_training_progress(1.0)
    model.save_pretrained(tmp_path)
    assert (
        InTIClipForVideoClassification.from_pretrained(tmp_path).vision_model.compression.spatial[0].topk.sigma == 0.1
    )


# Adapters


@pytest.mark.parametrize(
    "adaptation, also",
    [("zeroi2v", ["vision_model.post_layernorm."]), ("aim", ["vision_model.post_layernorm."]), ("st_adapter", [])],
)
def test_only_adapters_train(adaptation, also, build):
    model = build("inti", adaptation)
    prefixes = ("vision_model.adaptation.", "vision_model.compression.", "classifier.", *also)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(prefixes), name


@pytest.mark.parametrize("adaptation", ["uniformerv2", "zeroi2v", "aim", "st_adapter"])
def test_adaptations_start_from_clip(adaptation, tiny_config):
    """Zero-initialised as published: before training the tokens are those of CLIP on every frame."""
    model = InTIClipVisionModel(tiny_config(compression="none", adaptation=adaptation)).eval()
    if adaptation == "zeroi2v":  # other keys and values from the start: no neighbour for a lone frame
        pixel_values = clips(2, 1)
    else:
        pixel_values = clips()
    naive = InTIClipVisionModel(tiny_config(compression="none")).eval()
    naive.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert_close(model(pixel_values).last_hidden_state, naive(pixel_values).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compression", ["none", "inti", "stts"])
def test_merged_adapters_cost_nothing_and_change_nothing(compression, build, tmp_path):
    model = build(compression, "zeroi2v").eval()
    pixel_values = clips()
    with torch.no_grad():
        before = model(pixel_values).logits
        model.merge_adapters()
        assert_close(model(pixel_values).logits, before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = InTIClipForVideoClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.adaptation_options["merged"] is True
    with torch.no_grad():
        assert_close(loaded(pixel_values).logits, before, rtol=0, atol=1e-5)
    own = sum(parameter.numel() for parameter in loaded.vision_model.adaptation.parameters())
    assert own == 8 * 48  # the temporal embedding
    with pytest.raises(ValueError, match="must not be merged yet"):
        loaded.merge_adapters()


@pytest.mark.parametrize("adaptation", ["zeroi2v", "aim", "st_adapter"])
def test_trained_weights_alone(adaptation, build, tmp_path):
    clip = build("none", "none")
    clip.save_pretrained(tmp_path / "clip")
    options = {"compression": "inti", "adaptation": adaptation, "compression_layers": [1, 3], "num_labels": 5}
    config = InTIClipVisionConfig.from_pretrained(tmp_path / "clip", **options)
    model = InTIClipForVideoClassification.from_pretrained(tmp_path / "clip", config=config).eval()
    randomise(model)
    model.save_trained_only(tmp_path / "trained")
    size = (tmp_path / "trained" / "trained.safetensors").stat().st_size
    assert size < sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 + 50_000
    config = InTIClipVisionConfig.from_pretrained(tmp_path / "trained")
    again = InTIClipForVideoClassification.from_pretrained(tmp_path / "clip", config=config).eval()
    again.load_trained_only(tmp_path / "trained")
    pixel_values = clips()
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)
    with pytest.raises(ValueError, match="all of this model trains .*use save_pretrained"):
        clip.save_trained_only(tmp_path / "all")
    with pytest.raises(ValueError, match="trained with compression 'inti', this model has 'none'"):
        clip.load_trained_only(tmp_path / "trained")
    with pytest.raises(ValueError, match="holds no trained.safetensors"):
        again.load_trained_only(tmp_path / "clip")
    (tmp_path / "trained" / "trained.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        again.load_trained_only(tmp_path / "trained")


def test_merged_weights_are_not_saved_without_the_tower(build, tmp_path):
    model = build("none", "zeroi2v")
    model.merge_adapters()
    with pytest.raises(ValueError, match="merged into CLIP's weights.*use save_pretrained"):
        model.save_trained_only(tmp_path)


def test_merging_leaves_other_models_of_the_same_configuration_alone(tiny_config, tmp_path):
    config = tiny_config(compression="none", adaptation="zeroi2v")
    merged, other = (InTIClipForVideoClassification(config).eval() for _ in range(2))
    randomise(other)
    merged.vision_model.adaptation.temporal_embedding.P.requires_grad_(False)
    merged.merge_adapters()
    assert not merged.vision_model.adaptation.temporal_embedding.P.requires_grad
    assert merged.vision_model.config is merged.config and merged.config is not config
    other.save_pretrained(tmp_path)
    pixel_values = clips()
    with torch.no_grad():
        loaded = InTIClipForVideoClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(pixel_values).logits, other(pixel_values).logits)


def test_stochastic_depth_of_aim_spares_clip(tiny_config):
    """With its own branches at zero nothing is left that a dropped path could change."""
    model = InTIClipForVideoClassification(
        tiny_config(compression="none", adaptation="aim", drop_path_rate=0.9)
    ).train()
    pixel_values = clips()
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, model.eval()(pixel_values).logits)
        randomise(model)
        assert not torch.allclose(model.train()(pixel_values).logits, model.eval()(pixel_values).logits)


def test_soft_selection_is_counted_finely_in_bfloat16():
    scores = torch.rand(4, 16).bfloat16()
    torch.manual_seed(0)
    coarse = stts.perturbed_topk(scores, 3, 0.1)
    torch.manual_seed(0)
    assert torch.equal(coarse, stts.perturbed_topk(scores.float(), 3, 0.1))
    assert_close(coarse.sum(dim=-1), torch.ones(4, 3))


# Options


@pytest.mark.parametrize(
    "word, method, options, message",
    [
        ("compression", "tome", {"r": -1}, "whole number from 0"),
        ("compression", "tome", {"r": "4"}, "whole number from 0"),
        ("compression", "tome", {"r": [1, 2, 3, 4, 5]}, "at most 4"),
        ("compression", "tome", {"r": [4, -2]}, "inflection from -1 to 1"),
        ("compression", "tome", {"prop_attn": 1}, "prop_attn must be true or false"),
        ("compression", "tome", {"radius": 1}, "no option 'radius'; its options are r, prop_attn"),
        ("compression", "sta", {"r": 10}, r"drops 10 \+ 5 \+ 2 of 16"),
        ("compression", "sta", {"r": 2.5}, "whole number of tokens"),
        ("compression", "sta", {"order": "F-B"}, "order must be"),
        ("compression", "sta", {"first_frame": "none"}, "first_frame must be one of tome, random, grid"),
        ("compression", "sta", {"similarity": "cosine"}, "similarity must be one of key, query, value, ffn"),
        (
            "compression",
            "stts",
            {"temporal": [[0, 0.1]]},
            "keep at least one of 8 frames, got 0.1; raise it, or give at least 10 frames",
        ),
        ("compression", "stts", {"spatial": [[5, 0.5]]}, "block from 0 to 4"),
        ("compression", "stts", {"spatial": [[1, 0.5], [1, 0.5]]}, "each block once"),
        ("compression", "stts", {"temporal": 0.5}, "list of pairs"),
        ("compression", "stts", {"scorer": "deep"}, "scorer must be one of paper, released"),
        ("compression", "inti", {"position_std": -1}, "position_std must be a number from 0"),
        ("compression", "stts", {"sigma": -1}, "sigma must be a number from 0"),
        ("compression", "stts", {"sigma": float("nan")}, "sigma must be a number from 0"),
        ("compression", "stts", {"num_samples": 0}, "num_samples must be a whole number from 1"),
        ("compression", "stts", {"num_samples": None}, "num_samples must be a whole number from 1"),
        ("adaptation", "uniformerv2", {"preset": "k600"}, "preset must be one of k400, ssv2"),
        ("adaptation", "uniformerv2", {"local": "both"}, "local must be one of None, none, single, double"),
        ("adaptation", "uniformerv2", {"global_layers": 5}, "from 0 to 4"),
        ("adaptation", "uniformerv2", {"global_layers": [4, 2]}, "ascending list"),
        ("adaptation", "uniformerv2", {"frozen": "yes"}, "frozen must be true or false"),
        ("adaptation", "uniformerv2", {"reduction": 0}, "reduction must be above 0"),
        ("adaptation", "uniformerv2", {"mlp_dropout": 1.0}, "mlp_dropout must be at least 0 and below 1"),
        ("adaptation", "zeroi2v", {"heads": {"0": 1}}, "offsets in frames, not 0"),
        ("adaptation", "zeroi2v", {"heads": {"-1": 3, "1": 2}}, "at most 4 together"),
        ("adaptation", "zeroi2v", {"heads": {"-1": 0.3}}, "numbers of heads"),
        ("adaptation", "zeroi2v", {"heads": 2}, "must map offsets"),
        ("adaptation", "zeroi2v", {"heads": {"1": float("inf")}}, "must map offsets"),
        ("adaptation", "zeroi2v", {"heads": [[1.9, 1]]}, "must map offsets"),
        ("adaptation", "zeroi2v", {"heads": {"1": 1, "+1": 1}}, "must map offsets"),
        ("adaptation", "zeroi2v", {"ratio": float("inf")}, "at least one channel of 48"),
        ("adaptation", "zeroi2v", {"dropout": 1}, "dropout must be at least 0 and below 1"),
        ("adaptation", "aim", {"num_tadapter": 3}, "num_tadapter must be 1 or 2"),
        ("adaptation", "aim", {"num_tadapter": True}, "num_tadapter must be 1 or 2"),
        ("adaptation", "aim", {"ratio": 0.001}, "at least one channel of 48"),
        ("adaptation", "aim", {"scale": "half"}, "scale must be a number"),
        ("adaptation", "st_adapter", {"pre_mlp": False}, "needs pre_attention or pre_mlp"),
        ("adaptation", "st_adapter", {"kernel_size": [2, 1, 1]}, "three odd numbers"),
        ("adaptation", "st_adapter", {"num_layers": 9}, "from 1 to 4, the depth"),
        ("adaptation", "st_adapter", {"width": 0}, "width must be a whole number from 1"),
    ],
)
def test_bad_options_are_refused(word, method, options, message, tiny_config):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_config(**{word: method, f"{word}_options": options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, message",
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_attention_heads": 5}, "must be a multiple of the 5 heads, got 48"),
        ({"hidden_act": "nope"}, "hidden_act must be an activation"),
    ],
)
def test_bad_towers_are_refused(field, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config(**field)


def test_sta_needs_three_blocks(tiny_config):
    with pytest.raises(ValueError, match="three different blocks.*only 2"):
        tiny_config(compression="sta", num_hidden_layers=2)


def test_time_offsets_survive_json(tiny_config, tmp_path):
    config = tiny_config(compression="none", adaptation="zeroi2v", adaptation_options={"heads": {1: 1, -2: 1, -1: 2}})
    config.save_pretrained(tmp_path)
    loaded = InTIClipVisionConfig.from_pretrained(tmp_path)
    assert loaded.adaptation_options == {"heads": {"1": 1, "-2": 1, "-1": 2}}
    groups = [InTIClipVisionModel(one).adaptation.groups for one in (config, loaded)]
    assert groups[0] == groups[1] == [(-1, 24), (1, 12), (-2, 12)]


def test_flash_attention_is_refused_where_sizes_weigh(build):
    attention = build("tome", "none").vision_model.encoder.layers[0].self_attn
    attention.config._attn_implementation_internal = "flash_attention_2"  # setting it aloud asks for its kernels
    with pytest.raises(ValueError, match='take an attention bias .*got flash_attention_2; .*"sdpa"'):
        attention(torch.randn(1, 2, 5, 48), key_bias=torch.zeros(1, 2, 5))
