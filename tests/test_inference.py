"""optimize_for_inference: when it holds, what it leaves alone, what it refuses."""

import copy

import pytest
import torch
from torch.nn.utils import prune
from torch.testing import assert_close
from transformers import pipeline

from hf_inti import InTIClipForVideoClassification, InTIClipVideoProcessor
from host_models import Operations


@pytest.fixture
def model(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(compression_layers=[1, 3])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def pixel_values():
    return torch.randn(2, 8, 3, 32, 32)


def logits(model, pixel_values) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).logits


def test_it_concatenates_no_tokens(model, pixel_values):
    with Operations() as plain:
        logits(model, pixel_values)
    model.optimize_for_inference()
    with Operations() as fast:
        logits(model, pixel_values)
    assert plain.names.count("cat") == 7
    assert fast.names.count("cat") == 2  # of pairs of class tokens, under one LayerNorm
    assert "sigmoid" in plain.names  # of quick_gelu
    assert "sigmoid" not in fast.names
    assert "silu_" in fast.names
    assert fast.names.count("lerp") >= 2


def test_what_is_saved_does_not_change(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    names = list(model.state_dict())
    model.optimize_for_inference().save_pretrained(tmp_path / "fast")
    assert list(model.state_dict()) == names
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_training_takes_the_plain_way(model, pixel_values):
    plain = copy.deepcopy(model)
    model.optimize_for_inference()
    labels = torch.tensor([1, 2])
    for one in (plain, model):
        one.train()
        one(pixel_values, labels=labels).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_gradients_of_pixels_are_the_plain_ones(model, pixel_values):
    pixel_values.requires_grad_()
    expected = torch.autograd.grad(model(pixel_values).logits.sum(), pixel_values)[0]
    model.optimize_for_inference()
    found = torch.autograd.grad(model(pixel_values).logits.sum(), pixel_values)[0]
    assert torch.equal(found, expected)


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def loaded(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(torch.ones(1, 8, 3, 32, 32), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    model.eval()


def fused_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()
    model(torch.ones(1, 8, 3, 32, 32), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    model.eval()


def through_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(1.1 * parameter.data)


def other_data(model):
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def pruned(model):
    for layer in model.vision_model.encoder.layers:
        prune.l1_unstructured(layer.mlp.fc1, "weight", amount=0.5)
        with torch.no_grad():
            layer.mlp.fc1.weight_orig.mul_(2)


def hooked(model):
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: 2 * output)
        layer.mlp.fc1.register_forward_hook(lambda module, args, output: 2 * output)
    model.vision_model.compression.stages[0].hidden.register_forward_hook(lambda module, args, output: 2 * output)


def replaced(model):
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.k_proj.weight = torch.nn.Parameter(2 * layer.self_attn.k_proj.weight.detach())
        layer.self_attn.v_proj = torch.nn.Linear(48, 48)


def converted(model):
    model.double().float()


CHANGES = [
    in_place,
    loaded,
    trained,
    fused_optimizer,
    through_data,
    other_data,
    pruned,
    hooked,
    replaced,
    converted,
]


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_weights_that_change(model, pixel_values, change):
    before = logits(model, pixel_values)
    model.optimize_for_inference()
    change(model)
    after = logits(model, pixel_values)
    model.set_attn_implementation("eager")
    expected = model(pixel_values).logits  # with gradients: the plain way
    assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert change is converted or (after - before).abs().max() > 1e-3


def test_copies_are_independent(model, pixel_values):
    twin = copy.deepcopy(model.optimize_for_inference())
    expected = logits(model, pixel_values)
    loaded(model)
    assert_close(logits(twin, pixel_values), expected, atol=1e-5, rtol=1e-5)
    assert_close(logits(copy.deepcopy(model), pixel_values), logits(model, pixel_values), atol=1e-5, rtol=1e-5)
    assert (logits(model, pixel_values) - expected).abs().max() > 1e-3


def test_no_weight_is_held_twice(model):
    before = model.get_memory_footprint()
    assert model.optimize_for_inference().get_memory_footprint() == before


def test_queries_keys_and_values_are_one_product(model):
    attention, x = model.vision_model.encoder.layers[0].self_attn, torch.randn(1, 2, 17, 48)
    model.optimize_for_inference()
    counts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), Operations() as operations:
            attention(x)
        counts.append(operations.names.count("addmm"))
    assert counts == [4, 2]


def test_compiled_models_follow_weights_too(model, pixel_values):
    model.optimize_for_inference()
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled, pixel_values)
    in_place(model)
    after = logits(compiled, pixel_values)
    assert_close(after, model(pixel_values).logits, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_exported_programs(model, pixel_values):
    expected = logits(model, pixel_values)
    model.optimize_for_inference()
    with torch.no_grad():
        program = torch.export.export(model, (pixel_values,), strict=False).module()
        assert_close(program(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_derivatives_forward_and_batching_work_without_gradients(model, pixel_values):
    model.set_attn_implementation("eager")
    expected = logits(model, pixel_values)
    model.optimize_for_inference()

    def run(x):
        return model(x).logits

    with torch.no_grad():
        assert_close(torch.vmap(run)(pixel_values[None])[0], expected, atol=1e-5, rtol=1e-5)
        tangent = torch.randn_like(pixel_values)
        _, found = torch.func.jvp(run, (pixel_values,), (tangent,))
        step = 1e-2
        numeric = (run(pixel_values + step * tangent) - run(pixel_values - step * tangent)) / (2 * step)
    assert_close(found, numeric, atol=1e-2, rtol=1e-1)


def test_merged_adapters(tiny_config, pixel_values):
    model = InTIClipForVideoClassification(tiny_config(adaptation="zeroi2v")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits(model.optimize_for_inference(), pixel_values)
    model.merge_adapters()
    assert_close(logits(model, pixel_values), expected, atol=1e-4, rtol=1e-4)
    assert_close(logits(model.optimize_for_inference(), pixel_values), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "relu"])
def test_activations(tiny_config, pixel_values, act):
    model = InTIClipForVideoClassification(tiny_config(hidden_act=act)).eval()
    expected = logits(model, pixel_values)
    assert_close(logits(model.optimize_for_inference(), pixel_values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"context": []}, {"fusion": "add"}, {"fusion": "concat", "head": "attention"}])
@pytest.mark.parametrize("cube", ["local_mhra", "dwconv"])
def test_every_form_of_inti(tiny_config, options, cube):
    config = tiny_config(compression_layers=[0, 2], compression_options={**options, "cube": cube})
    model = InTIClipForVideoClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for frames in (4, 8, 12):
        pixel_values = torch.randn(3, frames, 3, 32, 32)
        expected = logits(model, pixel_values)
        found = logits(copy.deepcopy(model).optimize_for_inference(), pixel_values)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attentions_are_returned(model, pixel_values):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(pixel_values, output_attentions=True).attentions
        fast = model.optimize_for_inference()(pixel_values, output_attentions=True).attentions
    assert len(fast) == len(plain) == 4
    for ours, theirs in zip(fast, plain, strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_half_precision(model, pixel_values):
    expected = logits(model, pixel_values)
    model.optimize_for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(logits(model, pixel_values).float(), expected, atol=0.1, rtol=0.1)
    model.bfloat16()
    assert_close(logits(model, pixel_values.bfloat16()).float(), expected, atol=0.2, rtol=0.2)


def test_inference_mode(model, pixel_values):
    expected = logits(model, pixel_values)
    with torch.inference_mode():
        made_inside = copy.deepcopy(model).optimize_for_inference()
        assert_close(made_inside(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_of_peft_are_refused_before_and_heard_after(model, pixel_values):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    with_lora = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    with pytest.raises(ValueError, match="q_proj must be .*got a Linear.*merge adapters"):
        with_lora.base_model.model.optimize_for_inference()
    lora_of_inti = peft.LoraConfig(r=2, target_modules=["hidden"], init_lora_weights=False)
    with pytest.raises(ValueError, match="hidden must be .*got a Linear"):
        peft.get_peft_model(copy.deepcopy(model), lora_of_inti).base_model.model.optimize_for_inference()
    later = peft.get_peft_model(model.optimize_for_inference(), lora).eval()
    later.load_state_dict(with_lora.state_dict(), strict=False)
    expected = logits(with_lora, pixel_values)
    assert_close(logits(later, pixel_values), expected, atol=1e-5, rtol=1e-5)
    assert_close(logits(later.merge_and_unload(), pixel_values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao says that it will move
def test_quantised_models_are_refused(model):
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="do not optimise quantised models"):
        quantised.optimize_for_inference()


def test_models_without_weights_are_refused_as_a_whole(model, pixel_values):
    model.vision_model.encoder.layers[3].mlp.fc2.to("meta")
    with pytest.raises(ValueError, match="fc2 must be in memory, got offloaded"):
        model.optimize_for_inference()
    assert not any(getattr(module, "optimized", False) for module in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_compiled(tiny_config, pixel_values):
    model = InTIClipForVideoClassification(tiny_config(num_hidden_layers=2, compression_layers=[1])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = logits(model, pixel_values)
    model.optimize_for_inference().compile(fullgraph=True)
    assert_close(logits(model, pixel_values), expected, atol=1e-5, rtol=1e-5)


def test_in_a_pipeline(model, tmp_path):
    """The pipeline of transformers hides from the model that it only infers: one line says so."""
    model.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    InTIClipVideoProcessor(num_frames=8, **sizes).save_pretrained(tmp_path)
    classify = pipeline("video-classification", model=str(tmp_path))
    clip = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    plain = classify.model(**classify.video_processor(clip)).logits
    classify.model.optimize_for_inference()
    with Operations() as operations, torch.no_grad():
        fast = classify.model(**classify.video_processor(clip)).logits
    assert "lerp" in operations.names
    assert_close(fast, plain, atol=1e-5, rtol=0)
