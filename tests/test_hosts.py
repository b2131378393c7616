"""The compressions on transformers' trained video models."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    pipeline,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import write_video
from hf_inti import InTIClipVideoProcessor, InTIClipVisionModel
from hf_inti.hosts import HOSTS, compress
from hf_inti.hosts.sta import random_tokens
from hf_inti.measure.costs import count_flops
from host_models import hooks_of, logits
from reference import hosts as reference


SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 5}
MODELS = {
    "videomae": (
        VideoMAEForVideoClassification,
        VideoMAEConfig(image_size=16, patch_size=4, num_frames=8, intermediate_size=36, **SIZES),
    ),
    "vivit": (
        VivitForVideoClassification,
        VivitConfig(image_size=12, num_frames=8, tubelet_size=[2, 4, 4], intermediate_size=36, **SIZES),
    ),
    "vjepa2": (
        VJEPA2ForVideoClassification,
        VJEPA2Config(
            crop_size=12, patch_size=4, frames_per_clip=8, mlp_ratio=1.5, num_pooler_layers=1, pred_hidden_size=12,
            pred_num_attention_heads=2, pred_num_hidden_layers=1,
            **{**SIZES, "hidden_size": 28, "num_attention_heads": 2},
        ),
    ),
    "timesformer": (
        TimesformerForVideoClassification,
        TimesformerConfig(image_size=12, patch_size=4, num_frames=4, intermediate_size=36, **SIZES),
    ),
}  # fmt: skip
PAIRS = [
    ("videomae", "sta", {"r": 4}),
    ("videomae", "tome", {"r": 6}),
    ("vivit", "sta", {"r": 3}),
    ("vivit", "tome", {"r": 5}),
    ("vjepa2", "sta", {"r": 3}),
    ("vjepa2", "tome", {"r": 5}),
    ("timesformer", "tome", {"r": 2}),
]
RANDOM = ("vjepa2", "sta", {"r": 3, "first_frame": "random"})
OPTIONS = [
    *PAIRS,
    ("videomae", "tome", {"r": [7, 0, 60, 3]}),  # a block without, and more than can be merged
    ("videomae", "tome", {"r": [4, -1.0]}),
    ("vivit", "sta", {"r": 4, "schedule": "released", "order": "B"}),
    ("vivit", "sta", {"r": 2, "schedule": "constant", "similarity": "query"}),
    ("vivit", "sta", {"r": 1, "schedule": "increasing", "similarity": "value"}),
    ("vivit", "sta", {"r": 1, "order": "B-F-B"}),  # 1, 0 and 0 tokens
    ("vivit", "sta", {"r": 4, "similarity": "ffn", "scores": "semantic"}),
    ("vivit", "sta", {"r": 4, "groups": 2}),
    ("vivit", "tome", {"r": 5, "prop_attn": False}),
    ("vivit", "tome", {"r": [7, 0, 40, 1]}),
    ("vjepa2", "sta", {"r": 4, "schedule": "released"}),
    ("vjepa2", "sta", {"r": 4, "similarity": "query", "scores": "temporal"}),
    ("vjepa2", "sta", {"r": 4, "similarity": "value", "order": "B"}),
    ("vjepa2", "sta", {"r": 4, "similarity": "ffn"}),
    ("vjepa2", "tome", {"r": [0, 9, 0, 5]}),
    ("timesformer", "tome", {"r": [1, 0, 3, 9]}),
]


def build(name: str, dtype=torch.float64):
    """A small model with random weights, none of them zero."""
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value) * 0.3)
    return model.to(dtype).eval()


def clips(name: str, B: int = 2, frames: int | None = None, dtype=torch.float64) -> torch.Tensor:
    config = MODELS[name][1]
    side = config.crop_size if name == "vjepa2" else config.image_size
    if frames is None:
        frames = config.frames_per_clip if name == "vjepa2" else config.num_frames
    return torch.randn(B, frames, 3, side, side, dtype=dtype)


def tokens_of(model, x: torch.Tensor) -> list[int]:
    """The number of tokens after each block."""
    with torch.no_grad():
        states = model(x, output_hidden_states=True).hidden_states
    return [state.shape[1] for state in states[1:]]


@pytest.mark.parametrize("name", MODELS)
def test_hosts_are_their_references(name):
    model, x = build(name), clips(name)
    wanted = getattr(reference, name)(x, model.state_dict(), model.config, None)
    assert_close(logits(model, x), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, method, options", OPTIONS, ids=str)
def test_methods_are_their_references(name, method, options):
    model, x = build(name), clips(name)
    plain = logits(model, x)
    got = logits(compress(model, method, **options), x)
    given = {"prop_attn": True} if (name, method) == ("vivit", "tome") else {}  # the default where it is possible
    given |= options
    if options["r"] == [4, -1.0]:
        given["r"] = (4, -1.0)
    wanted = getattr(reference, name)(x, model.state_dict(), model.config, method, **given)
    assert_close(got, wanted, rtol=0, atol=1e-10)
    assert (got - plain).abs().max() > 1e-3
    assert_close(logits(model, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other


@pytest.mark.parametrize(
    "name, method, options, tokens",
    [
        ("videomae", "sta", {"r": 4}, [48, 40, 36, 36]),
        ("videomae", "tome", {"r": 20}, [44, 24, 12, 6]),
        ("vivit", "sta", {"r": 3}, [25, 21, 21, 21]),
        ("vivit", "tome", {"r": 5}, [32, 27, 22, 17]),
        ("vjepa2", "tome", {"r": [0, 9]}, [36, 27, 27, 27]),
        ("timesformer", "tome", {"r": 2}, [29, 21, 13, 9]),
    ],
)
def test_tokens_that_are_left(name, method, options, tokens):
    model, x = build(name), clips(name)
    assert len(set(tokens_of(model, x))) == 1
    assert tokens_of(compress(model, method, **options), x) == tokens


@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2"])
def test_random_tokens_instead_of_scores(name):
    x = clips(name)
    scored, random = (compress(build(name), "sta", r=3, **options) for options in ({}, {"scores": "random"}))
    assert tokens_of(random, x) == tokens_of(scored, x)
    got = logits(random, x)
    assert torch.equal(logits(random, x), got)  # the same each time
    assert_close(logits(random, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other
    assert (got - logits(scored, x)).abs().max() > 1e-3


def test_random_tokens_are_random():
    x, places = torch.randn(50, 4, 8, 6), torch.arange(32).view(4, 8).expand(50, -1, -1)
    kept = random_tokens(x, places, 3, training=False)
    assert kept.shape == (50, 4, 5) and (kept.sort(dim=-1).values.diff(dim=-1) > 0).all()
    counts = kept.flatten().bincount(minlength=8)  # 125 of each are expected, with a deviation of 7
    assert counts.min() > 90 and counts.max() < 160
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])
    drawn = [random_tokens(x, places, 3, training=True) for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("name", MODELS)
def test_default_of_tome(name):
    """About four tenths are left; a small number of places is rounded."""
    x = clips(name)
    before, after = tokens_of(build(name), x)[-1], tokens_of(compress(build(name), "tome"), x)[-1]
    assert 0.35 < after / before < 0.6


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_a_model_comes_back_and_keeps_its_weights(name, method, options, tmp_path):
    model, x = build(name), clips(name)
    plain = logits(model, x)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    compressed = compress(model, method, **options)
    assert compressed is model
    got, number = logits(model, x), len(hooks_of(model))
    model.save_pretrained(tmp_path / "compressed")
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "compressed").iterdir())
    for file in names:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "compressed" / file).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "compressed").double().eval()
    assert torch.equal(logits(loaded, x), plain)
    assert torch.equal(logits(compress(loaded, method, **options), x), got)
    other = {"r": options["r"] + 1}
    assert not torch.equal(logits(compress(model, method, **other), x), got)
    assert torch.equal(logits(compress(model, method, **options), x), got)  # in the place of the one before
    assert len(hooks_of(model)) == number
    assert torch.equal(logits(compress(model, method, r=0), x), plain) and not hooks_of(model)
    compress(model, method, **options)
    assert torch.equal(logits(compress(model, None), x), plain) and not hooks_of(model)
    assert not any(m._forward_hooks_with_kwargs or m._forward_pre_hooks_with_kwargs for m in model.modules())


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_copies(name, method, options):
    model, x = build(name), clips(name)
    plain = logits(model, x)
    got = logits(compress(model, method, **options), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, x), got)
        assert torch.equal(logits(compress(other, None), x), plain) and not hooks_of(other)
        assert torch.equal(logits(model, x), got)


def test_a_pickled_model_is_hooked_in_another_process(monkeypatch):
    """Where hooks are numbered from 0 again: those to come must not replace ours."""
    model, x = compress(build("vivit"), "tome", r=5), clips("vivit")
    got, data = logits(model, x), pickle.dumps(model)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    other = pickle.loads(data)
    for module in other.modules():
        for _ in range(3):
            module.register_forward_hook(lambda module, args, output: None)
            module.register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(logits(other, x), got)


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    """Of the sum of two passes over different clips, before either of which nothing is computed backwards."""
    torch.manual_seed(1)
    passes = [model(clips(name), labels=torch.tensor([0, 1])).loss for _ in range(2)]
    sum(passes).backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name, method, options", [*PAIRS, RANDOM])
def test_activation_checkpointing_changes_no_gradient(name, method, options, use_reentrant):
    wanted = gradients(compress(build(name).train(), method, **options), name)
    model = compress(build(name).train(), method, **options)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = gradients(model, name)
    assert got.keys() == wanted.keys() and len(wanted) > 40
    for key, value in got.items():
        assert_close(value, wanted[key], rtol=1e-9, atol=1e-11)
    assert not any(hook.current.traces for hook in hooks_of(copy.deepcopy(model)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name, method, options", [*PAIRS, RANDOM])
def test_checkpointing_around_the_hooks_changes_no_gradient(name, method, options, use_reentrant, monkeypatch):
    """As transformers did until 5.17: a block's own hooks run again too."""
    wanted = gradients(compress(build(name).train(), method, **options), name)
    model = compress(build(name).train(), method, **options)

    def call(self, *args, **kwargs):
        function = partial(nn.Module.__call__, self, **kwargs)
        return checkpoint(function, *args, use_reentrant=use_reentrant)

    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    monkeypatch.setattr(type(blocks[0]), "__call__", call)
    got = gradients(model, name)
    for key, value in got.items():
        assert_close(value, wanted[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_threads_share_a_model(name, method, options):
    model = compress(build(name), method, **options)
    inputs = [clips(name, B=1) for _ in range(4)]
    wanted = [logits(model, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(partial(logits, model), inputs * 6), wanted * 6, strict=True):
            assert torch.equal(got, one)
    assert not any(hook.current.traces for hook in hooks_of(model))  # nothing stays behind


@pytest.mark.slow
@pytest.mark.parametrize("name, method, options", PAIRS)
def test_compiled(name, method, options):
    model, x = compress(build(name), method, **options), clips(name)
    wanted = logits(model, x)
    model.compile(fullgraph=True, backend="eager")
    assert_close(logits(model, x), wanted)


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_fewer_operations(name, method, options):
    model = build(name, torch.float32)
    if name != "timesformer":
        model.set_attn_implementation("eager")
    x = clips(name, B=1, dtype=torch.float32)
    counts = [
        count_flops(compress(model, method, r=r), x).get_total_flops() for r in (0, options["r"], options["r"] + 1)
    ]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_bfloat16(name, method, options):
    model, x = build(name, torch.bfloat16), clips(name, dtype=torch.bfloat16)
    got = logits(compress(model, method, **options), x)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()


class VJEPA2Processor(InTIClipVideoProcessor):
    """transformers' own needs torchvision."""

    def preprocess(self, videos, **options):
        batch = super().preprocess(videos, **options)
        batch["pixel_values_videos"] = batch.pop("pixel_values")
        return batch


@pytest.mark.parametrize("name, method, options", PAIRS)
def test_in_a_pipeline(name, method, options, tmp_path):
    config = MODELS[name][1]
    side = config.crop_size if name == "vjepa2" else config.image_size
    frames = config.frames_per_clip if name == "vjepa2" else config.num_frames
    write_video(tmp_path / "clip.mp4", frames=12)
    kind = VJEPA2Processor if name == "vjepa2" else InTIClipVideoProcessor
    processor = kind(num_frames=frames, size=side, crop_size=side)
    model = compress(build(name, torch.float32), method, **options)
    classify = pipeline("video-classification", model, video_processor=processor)
    answers = classify(str(tmp_path / "clip.mp4"), num_frames=frames)
    assert len(answers) == 5


@pytest.mark.parametrize("name, method", [pair[:2] for pair in PAIRS if pair[0] != "vjepa2"])
def test_the_backbone_alone(name, method):
    model, x = build(name), clips(name)
    with torch.no_grad():
        wanted = getattr(compress(model, method, r=4), name)(x).last_hidden_state
        got = compress(getattr(build(name), name), method, r=4)(x).last_hidden_state
    assert torch.equal(got, wanted) and got.shape[1] < 50


# V-JEPA 2


@pytest.mark.parametrize("method, options", [("sta", {"r": 3}), ("tome", {"r": 5})])
@pytest.mark.parametrize("frames", [4, 12])
def test_vjepa2_takes_any_number_of_frames(method, options, frames):
    model, x = compress(build("vjepa2"), method, **options), clips("vjepa2", frames=frames)
    wanted = reference.vjepa2(x, model.state_dict(), model.config, method, **options)
    assert_close(logits(model, x), wanted, rtol=0, atol=1e-10)


def test_vjepa2_cannot_join_frames_that_are_no_multiple_of_four():
    model = compress(build("vjepa2"), "sta", r=3, schedule="released")
    with pytest.raises(ValueError, match="set up for 36 tokens in this block, got 54"):
        logits(model, clips("vjepa2", frames=12))


def test_vjepa2_predictor_is_refused():
    model, x = compress(build("vjepa2").vjepa2, "tome", r=5), clips("vjepa2")
    with torch.no_grad():
        assert model(x, skip_predictor=True).last_hidden_state.shape[1] == 36 - 4 * 5
        assert model.get_vision_features(x).shape[1] == 36 - 4 * 5
        mask = [torch.arange(10).expand(2, 10)]
        for arguments, words in (
            ({}, "got skip_predictor=False"),
            ({"skip_predictor": True, "context_mask": mask}, "got context_mask"),
            ({"context_mask": mask, "target_mask": mask}, "got context_mask and target_mask"),
        ):
            with pytest.raises(ValueError, match=words):
                model(x, **arguments)
        assert compress(model, None)(x).predictor_output is not None


# What does not fit


def test_other_models_are_refused(tiny_config):
    for model, name in (
        (InTIClipVisionModel(tiny_config()), "InTIClipVisionModel"),
        (nn.Linear(1, 1), "Linear"),
        (nn.Sequential(build("vivit")), "Sequential"),
    ):
        with pytest.raises(ValueError, match=f"model must be one of VideoMAEForVideoClassification, .* got {name};"):
            compress(model, "sta")
    with pytest.raises(ValueError, match="model must be one of"):
        compress(nn.Linear(1, 1), None)


def test_subclasses_of_hosts_are_hosts():
    class Mine(VivitForVideoClassification):
        pass

    assert hooks_of(compress(Mine(copy.deepcopy(MODELS["vivit"][1])), "tome", r=1))


@pytest.mark.parametrize("name", MODELS)
def test_other_methods_are_refused(name):
    for method in ("inti", "none", 3):
        words = f"method must be one of sta, tome, stts or None, got {method!r}; the other"
        with pytest.raises(ValueError, match=words):
            compress(build(name), method)
    with pytest.raises(ValueError, match="got 'stts'; here it is on the hosts of its paper, VideoSwin and MViT"):
        compress(build(name), "stts")


def test_sta_is_refused_on_timesformer():
    words = "method must be tome on TimeSformer, got 'sta'; STA drops other places in each frame"
    with pytest.raises(ValueError, match=words):
        compress(build("timesformer"), "sta", r=2)


@pytest.mark.parametrize("kind", ["joint_space_time", "space_only"])
def test_other_attention_of_timesformer_is_refused(kind):
    config = copy.deepcopy(MODELS["timesformer"][1])
    config.attention_type = kind
    with pytest.raises(ValueError, match=f"attention_type must be divided_space_time.* got {kind}"):
        compress(TimesformerForVideoClassification(config), "tome")


@pytest.mark.parametrize(
    "name, method, options, words",
    [
        ("vivit", "sta", {"R": 3}, "options of sta on ViViT must be among r, schedule, .*, groups, got 'R'"),
        ("vivit", "tome", {"groups": 3}, "options of tome on ViViT must be among r, prop_attn, got 'groups'"),
        ("vivit", "sta", {"r": 9}, "got 9, which drops 9 of a group's 9"),
        ("vivit", "sta", {"r": 6}, "got 6, which drops 3 of a group's 3"),
        ("vivit", "sta", {"r": 2.0}, "r must be a whole number"),
        ("vivit", "sta", {"r": 2, "groups": 5}, "divides the model's 36 tokens, got 5"),
        ("vivit", "sta", {"r": 2, "order": "forward"}, "order must be"),
        ("vivit", "sta", {"r": 2, "schedule": "half"}, "schedule must be one of"),
        ("vivit", "sta", {"r": 2, "schedule": "released", "groups": 6}, "multiple of 4 .* got 6"),
        ("vjepa2", "tome", {"r": 2, "prop_attn": True}, "prop_attn must be false on V-JEPA 2, whose attention"),
        ("videomae", "tome", {"r": 2, "prop_attn": True}, "prop_attn must be false on VideoMAE, whose attention"),
        ("timesformer", "tome", {"r": 2, "prop_attn": True}, "prop_attn must be false on TimeSformer, whose"),
        ("vivit", "tome", {"r": 2, "prop_attn": 1}, "prop_attn must be true or false, got 1"),
        ("vivit", "tome", {"r": -1}, "r must be a whole number"),
        ("vivit", "tome", {"r": [1, 2, 3, 4, 5]}, "r as a list must hold at most 4"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(name, method, options, words):
    model, x = compress(build(name), "tome", r=1), clips(name)
    before = logits(model, x)
    with pytest.raises(ValueError, match=words) as refused:
        compress(model, method, **options)
    assert "\n" not in str(refused.value)
    assert torch.equal(logits(model, x), before)


def test_attention_masks_are_refused():
    model, x = compress(build("vivit"), "sta", r=2), clips("vivit")
    for arguments in ([x, False, torch.ones(2, 37)], [x]):
        given = {} if len(arguments) == 3 else {"attention_mask": torch.ones(2, 37)}
        with pytest.raises(ValueError, match="attention_mask must be None under a compression"):
            model.vivit(*arguments, **given)


def test_flash_attention_is_refused_with_proportional_attention(monkeypatch):
    """When the model is compressed, and when the attention is changed later."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_like", sdpa_attention_forward)
    model, x = compress(build("vivit"), "tome", r=2), clips("vivit")
    model.config._attn_implementation_internal = "flash_like"
    words = "attn_implementation must be sdpa or eager for ToMe's prop_attn, got 'flash_like'"
    with pytest.raises(ValueError, match=words):
        logits(model, x)
    with pytest.raises(ValueError, match=words):
        compress(model, "tome", r=2)
    logits(compress(model, "tome", r=2, prop_attn=False), x)


def test_eager_attention_is_the_same():
    for name in ("videomae", "vivit", "vjepa2"):
        model, x = compress(build(name), "tome", r=3), clips(name)
        wanted = logits(model, x)
        model.set_attn_implementation("eager")
        assert_close(logits(model, x), wanted, rtol=0, atol=1e-4)  # its softmax is in float32


def test_timesformer_keeps_its_configuration():
    model = build("timesformer")
    before = model.config.to_dict()
    layers = compress(model, "tome", r=2).timesformer.encoder.layer
    assert model.config.to_dict() == before and all(layer.config is not model.config for layer in layers)
    compress(model, None)
    assert all(layer.config is model.config for layer in layers)


def test_every_host_is_named():
    named = {re.sub("(ForVideoClassification|Model)$", "", name) for name in HOSTS} - {"SwinTransformer3d", "MViT"}
    assert named == {re.sub("ForVideoClassification$", "", c.__name__) for c, _ in MODELS.values()}
