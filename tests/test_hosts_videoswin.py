"""STA and STTS on torchvision's VideoSwin."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hf_inti.hosts import compress, parameter_groups
from hf_inti.measure.costs import count_flops
from host_models import disturb, hooks_of, logits
from reference.videoswin import videoswin
from torchvision_models import load


CONFIG = {"patch": [2, 4, 4], "depths": [2, 2, 2, 1], "heads": [1, 2, 2, 2], "window": [2, 3, 3]}
FRAMES = (3, 6, 52, 40)  # grids 3 x 13 x 10, 7 x 5, 4 x 3, 2 x 2
STA = [
    {"r": 13},  # 13, 4 and 1
    {"r": [20, 7, 2], "order": "B"},
    {"r": [0, 9, 0], "similarity": "query"},
    {"r": [30, 0, 3], "similarity": "value", "scores": "temporal"},
    {"r": [9, 5, 1], "similarity": "ffn", "scores": "semantic", "order": "B-F-B"},
]
RANDOM = {"r": 13, "first_frame": "random"}
STTS = [
    {"temporal": [[0, 0.7]]},
    {"temporal": [[1, 0.7]], "spatial": [[2, 0.4]]},
    {"spatial": [[0, 0.9], [1, 0.6]], "scorer": "paper"},
    {"spatial": [[1, 0.6]], "unit": "token"},
    {"spatial": [[1, 0.6]], "score": "anchor"},
]
SQUARES = (3, 6, 48, 48)  # for grids of STTS's reference, which are square: 12 x 12, 6 x 6, 3 x 3, 2 x 2


def build(dtype=torch.float64):
    """A small model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = load().SwinTransformer3d(
        CONFIG["patch"],
        8,
        CONFIG["depths"],
        CONFIG["heads"],
        CONFIG["window"],
        num_classes=5,
        stochastic_depth_prob=0.0,
    )
    return disturb(model).to(dtype).eval()


def clips(B: int = 2, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(B, *FRAMES, dtype=dtype)


def test_the_host_is_its_reference():
    model, x = build(), clips(1)
    assert_close(logits(model, x), videoswin(x, model.state_dict(), CONFIG), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", STA, ids=str)
def test_sta_is_its_reference(options):
    model, x = build(), clips()
    plain = logits(model, x)
    got = logits(compress(model, "sta", **options), x)
    r = [13, 4, 1] if options["r"] == 13 else options["r"]
    wanted = videoswin(x[:1], model.state_dict(), CONFIG, **{**options, "r": r})
    assert_close(got[:1], wanted, rtol=0, atol=1e-10)
    assert (got - plain).abs().max() > 1e-3
    assert_close(logits(model, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other


def test_random_tokens_instead_of_scores():
    model, x = build(), clips()
    scored = logits(compress(model, "sta", r=13), x)
    got = logits(compress(model, "sta", r=13, scores="random"), x)
    assert (got - scored).abs().max() > 1e-3
    assert torch.equal(logits(model, x), got)  # the same each time
    assert_close(logits(model, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other


def selected(dtype=torch.float64, **options):
    """STTS with scorers as random as the rest."""
    model = compress(build(dtype), "stts", **options)
    disturb(model.compression)
    return model


@pytest.mark.parametrize("options", STTS, ids=str)
def test_stts_is_its_reference(options):
    model, x = selected(**options), torch.randn(2, *SQUARES, dtype=torch.float64)
    got = logits(model, x)
    assert_close(got[:1], videoswin(x[:1], model.state_dict(), CONFIG, **options), rtol=0, atol=1e-10)
    assert_close(logits(model, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other
    assert (got - logits(compress(model, None), x)).abs().max() > 1e-3


def test_stts_on_any_grid():
    """The square of at most so many patches that fits."""
    model, shapes = selected(temporal=[[0, 0.7]], spatial=[[0, 0.9], [2, 0.5]]), []
    for stage in model.features[0::2]:
        stage.register_forward_hook(lambda stage, args, output: shapes.append(tuple(output.shape[1:4])))
    logits(model, clips())
    assert shapes == [(2, 10, 10), (2, 5, 5), (2, 2, 2), (2, 1, 1)]


def test_stts_trains_and_comes_back():
    model, x = build(), clips()
    plain, keys = logits(model, x), list(model.state_dict())
    model = selected(**STTS[1], num_samples=20).train()
    groups = parameter_groups(model, lr=3e-4)
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 3e-6])
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    own = [p for name, p in model.compression.named_parameters() if not name.endswith("score.bias")]
    assert len(own) > 10 and all(p.grad.abs().max() > 0 for p in own)
    got = logits(model.eval(), x)
    loaded = compress(build(), "stts", **STTS[1])
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded, x), got)
    for back in ({"method": "stts", "temporal": [[0, 1]]}, {"method": "sta", "r": 0}, {"method": None}):
        assert torch.equal(logits(compress(copy.deepcopy(loaded), **back), x), plain)
    assert list(compress(loaded, None).state_dict()) == keys and not hooks_of(loaded)


@pytest.mark.parametrize("first_frame", ["random", "grid"])
def test_first_frames_drawn(first_frame):
    model, x = compress(build(), "sta", r=13, first_frame=first_frame), clips()
    got = logits(model, x)
    assert_close(logits(model, x[1:]), got[1:])  # whatever the batch
    assert not torch.equal(got, logits(compress(model, "sta", r=13), x))


@pytest.mark.parametrize("options", [STA[0], RANDOM], ids=str)
def test_a_model_comes_back_and_keeps_its_weights(options):
    model, x = build(), clips()
    plain = logits(model, x)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    assert compress(model, "sta", **options) is model
    got, number = logits(model, x), len(hooks_of(model))
    assert list(weights) == list(model.state_dict()) and classes == [type(m) for m in model.modules()]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    loaded = build()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(compress(loaded, "sta", **options), x), got)
    assert not torch.equal(logits(compress(model, "sta", r=[2, 2, 2]), x), got)
    assert torch.equal(logits(compress(model, "sta", **options), x), got)  # in the place of the one before
    assert len(hooks_of(model)) == number
    for back in ({"method": "sta", "r": 0}, {"method": "sta", "r": [0, 0, 0]}, {"method": None}):
        compress(model, "sta", **options)
        assert torch.equal(logits(compress(model, **back), x), plain) and not hooks_of(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_copies():
    model, x = build(), clips()
    plain = logits(model, x)
    got = logits(compress(model, "sta", r=13), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.head.bias.add_(1)
            other.features[2][0].attn.proj.bias.add_(1)  # its own weights
        assert (logits(other, x) - got - 1).abs().max() > 1e-3
        compress(other, None)
        with torch.no_grad():
            other.features[2][0].attn.proj.bias.sub_(1)
        assert_close(logits(other, x), plain + 1) and not hooks_of(other)
        assert torch.equal(logits(model, x), got)


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the sum of two passes over different clips, before either of which nothing is computed backwards."""
    torch.manual_seed(1)
    passes = [model(clips()) for _ in range(2)]
    nn.functional.cross_entropy(sum(passes), torch.tensor([0, 1])).backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def checkpointed(model, monkeypatch, **how):
    """Every block, hooks included, as a wrapper around blocks does."""

    def call(self, *args):
        return checkpoint(partial(nn.Module.__call__, self), *args, **how)

    monkeypatch.setattr(type(model.features[0][0]), "__call__", call)
    return model


@pytest.mark.parametrize("options", [STA[0], RANDOM], ids=str)
def test_activation_checkpointing_changes_no_gradient(options, monkeypatch):
    wanted = gradients(compress(build().train(), "sta", **options))
    model = compress(build().train(), "sta", **options)
    got = gradients(checkpointed(model, monkeypatch, use_reentrant=False))
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for key, value in got.items():
        assert_close(value, wanted[key], rtol=1e-9, atol=1e-11)
    # A recomputation ends before the block does, but leaves no activations behind.
    assert all(trace.x is None for hook in hooks_of(model) for trace in hook.current.traces.values())


def test_reentrant_checkpointing_is_refused(monkeypatch):
    model = checkpointed(compress(build().train(), "sta", r=13), monkeypatch, use_reentrant=True)
    with pytest.raises(ValueError, match="must be called with use_reentrant=False under STA on VideoSwin"):
        gradients(model)


def test_threads_share_a_model():
    model = compress(build(), "sta", r=13)
    inputs = [clips(B=1) for _ in range(4)]
    wanted = [logits(model, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, one in zip(pool.map(partial(logits, model), inputs * 3), wanted * 3, strict=True):
            assert torch.equal(got, one)
    assert not any(hook.current.traces for hook in hooks_of(model))  # nothing stays behind


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("sta", {"r": 13}), ("stts", STTS[1])])
def test_compiled(method, options):
    model, x = compress(build(), method, **options), clips()
    wanted = logits(model, x)
    model.compile(fullgraph=True, backend="eager")
    assert_close(logits(model, x), wanted)


def test_fewer_operations_by_hand():
    """What a dropped token saves: its share of the projections and the MLP; attention stays that of the whole grid."""
    model, x = build(torch.float32), torch.randn(1, 3, 8, 48, 48)  # of whole windows
    plain = count_flops(model, x).get_total_flops() // 2
    compressed = count_flops(compress(model, "sta", r=[10, 4, 1]), x).get_total_flops() // 2
    T, saved, affinity = 4, 0, 0
    for dropped, depth, C in ((10, 2, 16), (4, 2, 32), (1, 1, 64)):
        saved += T * dropped * depth * 12 * C * C
    for N, r, d in ((36, 10, 8), (9, 4, 8), (4, 1, 16)):
        first, second = (N // 2) * (N - N // 2) * d, N * N * d
        affinity += first + second + (T - 2) * N * (N - r) * (d + 1)
    assert plain - compressed == saved - affinity


def test_bfloat16():
    model, x = build(torch.bfloat16), clips(dtype=torch.bfloat16)
    got = logits(compress(model, "sta", r=13), x)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("sta", {"R": 3}, "options of sta on VideoSwin must be among r, order, .*, scores, got 'R'"),
        ("sta", {"r": 2.0}, "r must be a whole number of tokens from 0, or a list of three on VideoSwin, got 2.0"),
        ("sta", {"r": [1, 2]}, r"list of three on VideoSwin, got \[1, 2\]"),
        ("sta", {"r": [1, 2, -1]}, "list of three on VideoSwin"),
        ("sta", {"order": "forward"}, "order must be"),
        ("stts", {"temporal": [[4, 0.5]]}, r"list of pairs \[stage from 0 to 3, .* on VideoSwin, each stage once"),
        ("stts", {"spatial": [[1, 0.5]], "choice": "attention"}, "got VideoSwin, without one; choose 'stts'"),
        ("tome", {}, "method must be sta, stts on VideoSwin, got 'tome'; windows need a token at every place"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(method, options, words):
    model, x = compress(build(), "sta", r=13), clips()
    before = logits(model, x)
    with pytest.raises(ValueError, match=words) as refused:
        compress(model, method, **options)
    assert "\n" not in str(refused.value)
    assert torch.equal(logits(model, x), before)


def test_too_many_tokens_dropped():
    model = compress(build(), "sta", r=[10, 12, 0])
    with pytest.raises(ValueError, match="leave a token of each frame, got one that drops 12 of 4 x 3 after stage 2"):
        logits(model, clips())
