"""STTS and its baselines on torchvision's MViT."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hf_inti.hosts import compress, parameter_groups, set_training_progress
from hf_inti.hosts.mvit import attend
from hf_inti.hosts.stts import SelectBefore
from hf_inti.measure.costs import count_flops
from host_models import Operations, disturb, hooks_of, logits
from reference.mvit import mvit
from torchvision_models import load


Q, KV, ONE = [1, 2, 2], [1, 2, 2], [1, 1, 1]
# Heads, width in and out, strides of the queries' pooling and of the keys'; MViTv2 pools queries in every block.
BLOCKS = {
    "v1": [(1, 8, 16, None, KV), (2, 16, 16, Q, ONE), (2, 16, 24, None, ONE), (3, 24, 24, None, ONE)],
    "v2": [(1, 8, 8, ONE, KV), (2, 8, 16, Q, ONE), (2, 16, 16, ONE, ONE), (2, 16, 16, ONE, ONE)],
}
FRAMES = (3, 8, 32, 32)  # a grid of 4 x 8 x 8, then 4 x 4 x 4
TEMPORAL, SPATIAL = [[0, 0.75]], [[2, 0.6]]
OPTIONS = [
    {"temporal": TEMPORAL},
    {"spatial": [[0, 0.6], [3, 0.9]]},
    {"temporal": TEMPORAL, "spatial": SPATIAL},
    {"temporal": [[1, 0.8], [3, 0.5]], "spatial": [[1, 0.7]], "scorer": "paper"},
    {"temporal": TEMPORAL, "spatial": SPATIAL, "unit": "token"},
    {"spatial": SPATIAL, "score": "anchor"},
    {"temporal": [[2, 0.6]], "spatial": [[1, 0.7], [2, 0.6]], "choice": "attention"},
    {"spatial": [[3, 0.6]], "choice": "attention", "unit": "token"},
]
BOTH = OPTIONS[2]
BASELINES = [
    BOTH | {"choice": "random"},
    BOTH | {"choice": "random", "unit": "token"},
    {"temporal": TEMPORAL, "choice": "gumbel"},
    {"temporal": [[2, 0.5]], "spatial": SPATIAL, "choice": "attention"},
]


def build(kind: str = "v1", dtype=torch.float64):
    """A small model with random weights, none of them zero."""
    module = load()
    torch.manual_seed(0)
    blocks = []
    for heads, width, out, q, kv in BLOCKS[kind]:
        kernel_q, stride_q = ([], []) if q is None else ([3, 3, 3], q)
        blocks.append(module.mvit.MSBlockConfig(heads, width, out, kernel_q, [3, 3, 3], stride_q, kv))
    v2 = kind == "v2"
    model = module.MViT(
        (32, 32), 8, blocks, residual_pool=v2, residual_with_cls_embed=False, rel_pos_embed=v2, proj_after_attn=v2,
        num_classes=5, dropout=0.0,
    )  # fmt: skip
    disturb(model)
    return model.to(dtype).eval()


def config(kind: str) -> dict:
    return {
        "heads": [block[0] for block in BLOCKS[kind]],
        "strides": [block[3:] for block in BLOCKS[kind]],
        "v2": kind == "v2",
        "patch": (2, 4, 4),
        "kernel": (3, 7, 7),
    }


def compressed(kind: str = "v1", dtype=torch.float64, **options):
    """With scorers as random as the rest."""
    model = compress(build(kind, dtype), "stts", **options)
    disturb(model.compression)
    return model


def clips(B: int = 2, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(B, *FRAMES, dtype=dtype)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_host_is_its_reference(kind):
    model, x = build(kind), clips(1)
    assert_close(logits(model, x), mvit(x, model.state_dict(), config(kind)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind, options", [*(("v1", options) for options in OPTIONS), ("v2", BOTH)], ids=str)
def test_stts_is_its_reference(kind, options):
    model, x = compressed(kind, **options), clips()
    got = logits(model, x)
    assert_close(got[:1], mvit(x[:1], model.state_dict(), config(kind), **options), rtol=0, atol=1e-10)
    assert_close(logits(model, x[1:]), got[1:], rtol=0, atol=1e-12)  # clips do not see each other
    assert (got - logits(compress(model, None), x)).abs().max() > 1e-3


def grids_of(model, x: torch.Tensor) -> list[tuple[int, ...]]:
    """After each block."""
    found = []
    handles = [b.register_forward_hook(lambda b, args, output: found.append(tuple(output[1]))) for b in model.blocks]
    logits(model, x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("options", [BOTH, *BASELINES[:2]], ids=str)
def test_grids(options):
    assert grids_of(compressed(**options), clips()) == [(3, 8, 8), (3, 4, 4), (3, 3, 3), (3, 3, 3)]


def test_default_is_the_papers():
    model = compress(load().mvit_v1_b(), "stts")
    selects = [hook for hook in hooks_of(model) if isinstance(hook, SelectBefore)]
    plan = {hook.i: (hook.temporal and hook.temporal[1], hook.spatial and hook.spatial[1]) for hook in selects}
    assert plan == {0: (0.6, None), 4: (None, 0.9)}


@pytest.mark.parametrize("options", [BOTH, *BASELINES], ids=str)
def test_a_model_comes_back_and_its_selectors_are_saved(options):
    model, x = build(), clips()
    plain, keys = logits(model, x), list(model.state_dict())
    model = compressed(**options)
    got, number = logits(model, x), len(hooks_of(model))
    own = [key for key in model.state_dict() if key not in keys]
    learned = options.get("choice", "stts") in ("stts", "gumbel")
    assert bool(own) == learned and all(key.startswith("compression.") for key in own)
    loaded = compress(build(), "stts", **options)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded, x), got)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, x), got)
        if learned:
            disturb(other.compression)
            hooks = [hook for hook in hooks_of(other) if getattr(hook, "temporal", None)]
            assert hooks[0].temporal[0] is other.compression.temporal[0]  # its own weights
        compress(other, None)
        assert torch.equal(logits(other, x), plain) and not hooks_of(other)
        assert torch.equal(logits(model, x), got) and len(hooks_of(model)) == number
    for back in ({"temporal": [[0, 1.0]], "spatial": [[1, 1]]}, {"temporal": []}):  # all is kept
        compress(model, "stts", **back)
        assert torch.equal(logits(model, x), plain) and list(model.state_dict()) == keys and not hooks_of(model)


def loss(model, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))


def test_selectors_are_trained_with_their_own_learning_rate():
    model, x = compressed(**BOTH, num_samples=50).train(), clips()
    groups = parameter_groups(model, lr=1e-2, backbone_factor=0.01)
    assert [group["lr"] for group in groups] == [1e-2, 1e-4]
    own = dict(model.compression.named_parameters())
    assert [len(group["params"]) for group in groups] == [len(own), len(list(model.parameters())) - len(own)]
    loss(model, x).backward()
    assert all(p.grad.abs().max() > 0 for name, p in own.items() if not name.endswith("score.bias"))
    before = [[p.clone() for p in group["params"]] for group in groups]
    torch.optim.SGD(groups).step()
    for group, old in zip(groups, before, strict=True):
        for p, q in zip(group["params"], old, strict=True):
            assert_close(p, q - group["lr"] * p.grad)


def test_noise_fades():
    """In training the selection is soft and random, until it is that of evaluation."""
    model, x = compressed(**BOTH, sigma=0.5, num_samples=20).train(), clips()
    assert not torch.equal(logits(model, x), logits(model, x))
    topk = model.compression.temporal[0].topk
    for progress in (0.25, 1.0):
        set_training_progress(model, progress)
        assert topk.sigma.item() == pytest.approx(0.5 * (1 - progress))
    assert_close(logits(model, x), logits(model.eval(), x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", BASELINES, ids=str)
def test_baselines_train(options):
    """Random and attended ones choose hard; Gumbel's choice is random, with a gradient for its scorer."""
    model, x = compressed(**options).train(), clips()
    loss(model, x).backward()
    own = [p for name, p in model.compression.named_parameters() if not name.endswith("score.bias")]
    assert all(p.grad.abs().max() > 0 for p in own)
    choice = options["choice"]
    with torch.no_grad():
        if choice == "attention":
            assert_close(logits(model, x), logits(model.eval(), x), rtol=0, atol=1e-9)
        else:
            assert len({model(x).sum().item() for _ in range(20)}) > 1
    if choice == "random":  # in evaluation it repeats, whatever the batch
        model.eval()
        assert_close(logits(model, x)[1:], logits(model, x[1:]), rtol=0, atol=1e-9)


def test_random_squares_are_all_chosen():
    selection = compress(build(), "stts", spatial=[[0, 0.6]], choice="random").compression.spatial[0].train()
    x = torch.arange(64.0).view(1, 1, 64, 1).expand(500, -1, -1, -1)
    corners = selection(x, (8, 8), 6)[:, 0, 0, 0].long()
    assert set(corners.tolist()) == {row * 8 + column for row in range(3) for column in range(3)}
    assert torch.bincount(corners)[corners.unique()].min() > 20


def checkpointed(model, monkeypatch, **how):
    """Every block, hooks included, as a wrapper around blocks does."""

    def call(self, *args):
        return checkpoint(partial(nn.Module.__call__, self), *args, **how)

    monkeypatch.setattr(type(model.blocks[0]), "__call__", call)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    """Of two passes over different clips, before either of which nothing is computed backwards."""
    torch.manual_seed(1)
    (loss(model, clips()) + loss(model, clips())).backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [BOTH, BASELINES[3]], ids=str)
def test_activation_checkpointing_changes_no_gradient(options, use_reentrant, monkeypatch):
    wanted = gradients(compressed(**options).train())
    model = compressed(**options).train()
    got = gradients(checkpointed(model, monkeypatch, use_reentrant=use_reentrant))
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for key, value in got.items():
        assert_close(value, wanted[key], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("options", [BOTH, BASELINES[0], BASELINES[3]], ids=str)
def test_compiled(options):
    model, x = compressed(**options), clips()
    wanted = logits(model, x)
    model.compile(fullgraph=True, backend="eager")
    assert_close(logits(model, x), wanted)


def test_fewer_operations():
    x = clips(B=1, dtype=torch.float32)
    plans = [{"temporal": [[0, share]], "spatial": [[2, share]]} for share in (1.0, 0.75, 0.5)]
    counts = [count_flops(compress(build(dtype=torch.float32), "stts", **plan), x).get_total_flops() for plan in plans]
    assert counts[0] > counts[1] > counts[2]


def test_bfloat16():
    got = logits(compressed(dtype=torch.bfloat16, **BOTH), clips(dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()


@pytest.mark.parametrize("dtype, fused, tolerance", [(torch.float32, True, 1e-5), (torch.bfloat16, False, 0.02)])
def test_attention_takes_the_faster_way(dtype, fused, tolerance):
    """In every block after the selection."""
    x = clips(dtype=dtype)
    model = compressed(dtype=dtype, temporal=TEMPORAL)
    with Operations() as operations:
        logits(model, x)
    assert sum("scaled_dot_product" in name for name in operations.names) == (len(BLOCKS["v1"]) if fused else 0)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7))
    wanted = (0.5 * q @ k.transpose(2, 3)).softmax(-1) @ v
    got = attend(q.to(dtype), k.to(dtype), v.to(dtype), 0.5)
    assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("sta", {}, "method must be stts on MViT, got 'sta'; its attention pools keys and values on a whole grid"),
        ("tome", {}, "method must be stts on MViT, got 'tome'"),
        ("stts", {"ratio": 3}, "options of stts on MViT must be among temporal, spatial, .* got 'ratio'"),
        ("stts", {"temporal": [[4, 0.5]]}, r"temporal must be a list of pairs \[block from 0 to 3, .* got \[\[4, 0.5"),
        ("stts", {"spatial": [[0, 0]]}, "spatial must be a list of pairs"),
        ("stts", {"spatial": [[0, 0.5], [0, 0.6]]}, "each block once"),
        ("stts", {"scorer": "deep"}, "scorer must be one of paper, released, got 'deep'"),
        ("stts", {"gradient": 1}, "gradient must be one of"),
        ("stts", {"sigma": -1}, "sigma must be a number from 0, got -1"),
        ("stts", {"num_samples": 0}, "num_samples must be a whole number from 1, got 0"),
        ("stts", {"stride": 0}, "stride must be a whole number from 1, or None, got 0"),
        ("stts", {"choice": "best"}, "choice must be one of stts, random, attention, gumbel, got 'best'"),
        ("stts", {"unit": "frame"}, "unit must be one of anchor, token, got 'frame'"),
        ("stts", {"score": "frame"}, "score must be one of token, anchor, got 'frame'"),
        ("stts", {"spatial": SPATIAL, "choice": "gumbel"}, "spatial must be left out with choice 'gumbel'"),
        ("stts", {"temporal": TEMPORAL, "choice": "attention"}, "got a selection before block 0, where there is no"),
        ("stts", {"spatial": SPATIAL, "score": "anchor", "unit": "token"}, "score must be 'token' unless anchors are"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(method, options, words):
    model, x = compressed(**BOTH), clips()
    before = logits(model, x)
    with pytest.raises(ValueError, match=words) as refused:
        compress(model, method, **options)
    assert "\n" not in str(refused.value)
    assert torch.equal(logits(model, x), before)


def test_shares_that_keep_nothing():
    model = compressed(temporal=[[0, 0.2]])
    with pytest.raises(ValueError, match="keep at least one of 4 frames, got 0.2; raise it to 0.25 or more"):
        logits(model, clips())


def test_models_without_selectors_are_told():
    for function in (parameter_groups, partial(set_training_progress, progress=0.5)):
        with pytest.raises(ValueError, match='must be compressed by "stts", got MViT without'):
            function(build())
    with pytest.raises(ValueError, match="progress must be from 0 to 1, got 2"):
        set_training_progress(compressed(**BOTH), 2)
