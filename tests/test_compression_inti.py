"""InTI against the slow reference, and what must hold for any weights."""

import pytest
import torch

from hf_inti.model.compression_inti import InTI
from reference import inti as reference


WIDTH, GRID = 12, (2, 3)
ALL = ("cube", "frame", "global")
CASES = [
    {},
    {"cube": "dwconv"},
    {"fusion": "add"},
    {"fusion": "concat"},
    {"head": "sigmoid"},
    {"head": "attention"},
    {"head": "attention", "fusion": "concat", "cube": "dwconv"},
    *({"context": (name,)} for name in ("cube", "frame", "global")),
    {"context": ()},
    {"context": ("cube", "frame")},
    {"context": ("frame", "global")},
    {"context": ("frame",), "fusion": "concat"},
    {"share_projection": True},
    {"share_projection": True, "context": ("cube",), "head": "sigmoid"},
]


def name_of(parameter: str) -> str:
    """Our parameter's name in the reference, which follows the paper's letters."""
    for ours, theirs in (
        ("position.", ""),
        ("cube_context.unit", "cube.u"),
        ("cube_context.", "cube.conv."),
        ("frame_context.both", "frame.pair"),
        ("frame_context", "frame"),
        ("global_context", "global"),
        (".reduce.", ".down."),
        (".expand.", ".up."),
        ("hidden.", "ffn.hidden."),
        ("logits.", "ffn.logits."),
    ):
        parameter = parameter.replace(ours, theirs)
    if parameter.startswith(("first", "second")):
        parameter = f"token.{parameter}"
    return parameter.replace(".0.", ".norm.").replace(".1.", ".linear.")


def build(num_frames: int, options: dict, seed: int = 0) -> tuple[InTI, dict]:
    """The module in float64 with random values everywhere, and the reference's parameters."""
    module = InTI(WIDTH, num_frames, **options).double()
    params = reference.random_params(
        WIDTH,
        num_frames,
        fusion=options.get("fusion", "separate"),
        head=options.get("head", "softmax"),
        cube=options.get("cube", "local_mhra"),
        r=int(WIDTH / 1.5),
        generator=torch.Generator().manual_seed(seed),
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            attention_vector = options.get("head") == "attention" and name == "logits.weight"
            value = params["ffn.v" if attention_vector else name_of(name)]
            parameter.copy_(value.reshape(parameter.shape))
    if options.get("share_projection"):  # one T, of the first frame, for both
        for name in [name for name in params if ".second." in name]:
            params[name] = params[name.replace(".second.", ".first.")]
    return module, params


def tokens(batch: int, frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 1 + GRID[0] * GRID[1], WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("frames", [2, 4, 8])
def test_equals_the_slow_reference(options, frames):
    module, params = build(frames, options)
    x = tokens(2, frames)
    z, weights = module(x, GRID)
    options = {name: value for name, value in options.items() if name != "share_projection"}
    expected_z, expected_weights = reference.inti(x, params, grid=GRID, **options)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(z, expected_z, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("trained", "frames"), [(16, 16), (8, 4), (4, 16), (2, 6)])
def test_other_numbers_of_frames_interpolate_the_position(trained, frames):
    module, params = build(trained, {})
    x = tokens(1, frames)
    torch.testing.assert_close(module(x, GRID)[0], reference.inti(x, params, grid=GRID)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_tokens_are_the_returned_weights_times_the_pair(options):
    module, _ = build(4, options)
    x = tokens(2, 4)
    z, weights = module(x, GRID)
    positioned = x + module.position.sigma * module.position.P
    alpha, beta = weights.split(1, dim=-1)
    torch.testing.assert_close(z, alpha * positioned[:, 0::2] + beta * positioned[:, 1::2], rtol=0, atol=0)
    if options.get("head") != "sigmoid":
        torch.testing.assert_close(alpha + beta, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert weights.std() > 0.01  # the weights do depend on the content here


@pytest.mark.parametrize("options", CASES, ids=str)
def test_starts_as_the_plain_average(options):
    module = InTI(WIDTH, 4, **options).double()
    x = tokens(1, 4)
    z, weights = module(x, GRID)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5), rtol=0, atol=0)
    torch.testing.assert_close(z, (x[:, 0::2] + x[:, 1::2]) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_gradients_reach_every_parameter(options):
    module, _ = build(4, options)
    module(tokens(2, 4), GRID)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_shared_projection_is_half_of_the_parameters():
    def count(**options) -> int:
        return sum(p.numel() for p in InTI(WIDTH, 4, **options).parameters())

    projection = 2 * WIDTH + WIDTH * WIDTH // 2 + WIDTH // 2
    assert count() - count(share_projection=True) == 2 * projection  # F_token's and F_frame's
    only_tokens = {"context": ()}
    assert count(**only_tokens) - count(**only_tokens, share_projection=True) == projection


def test_clips_do_not_see_each_other():
    module, _ = build(8, {})
    x = tokens(3, 8)
    torch.testing.assert_close(module(x, GRID)[0][1:2], module(x[1:2], GRID)[0], rtol=0, atol=1e-14)


def test_equal_frames_stay_as_they_are_without_position():
    module, _ = build(4, {})
    module.position.sigma.data.zero_()
    x = tokens(1, 1).expand(1, 4, -1, -1)
    torch.testing.assert_close(module(x, GRID)[0], x[:, :2], rtol=0, atol=1e-14)


def test_position_std_is_that_of_the_position_before_training():
    torch.manual_seed(0)
    position = InTI(64, 16, position_std=0.5).position
    assert position.P.std().item() == pytest.approx(0.5, rel=0.1) and position.sigma.item() == 0
    position.P.data.zero_()
    position.reset_parameters()  # as transformers does after loading a plain CLIP
    assert position.P.std().item() == pytest.approx(0.5, rel=0.1)
