"""The slow references are themselves checked: against numbers worked out by hand, torch and transformers."""

import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from reference import inti as ref
from reference import naive as ref_naive


C, GRID = 12, (2, 3)
L = 1 + GRID[0] * GRID[1]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_params(T=8, fusion="separate", head="softmax", cube="local_mhra", seed=1):
    generator = torch.Generator().manual_seed(seed)
    return ref.random_params(C, T, fusion=fusion, head=head, cube=cube, r=8, generator=generator)


def same(got, wanted):
    assert_close(got, wanted, rtol=0, atol=1e-12)


def phi_gelu(v):
    """GELU from the standard library's normal distribution."""
    return v * NormalDist().cdf(v)


# The operations against torch's.


def test_linear_norm_and_activations_match_torch():
    v, weight, bias = normal(C) * 3, normal(5, C, seed=1), normal(5, seed=2)
    same(ref.linear(v, weight, bias), F.linear(v, weight, bias))
    same(ref.layer_norm(v, v + 1, v - 2, 1e-3), F.layer_norm(v, (C,), v + 1, v - 2, 1e-3))
    same(ref.gelu(v), F.gelu(v))
    same(ref.softmax(v), F.softmax(v, dim=0))
    same(ref.sigmoid(v), torch.sigmoid(v))
    assert (ref.gelu(v) - F.gelu(v, approximate="tanh")).abs().max() > 1e-6  # so `same` can fail


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8])
def test_conv1d_and_max_pool_match_torch(T):
    x, weight, bias = normal(C, T), normal(C, 1, 3, seed=1), normal(C, seed=2)
    frames = list(x.T)
    got = torch.stack(ref.depthwise_conv1d(frames, weight, bias), dim=1)
    same(got, F.conv1d(x, weight, bias, padding=1, groups=C))
    same(torch.stack(ref.max_pool(frames), dim=1), F.max_pool1d(x[None], 2, 2, ceil_mode=True)[0])


@pytest.mark.parametrize("T", [1, 2, 3, 6])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3d_matches_torch(T, stride):
    x, weight, bias = normal(T, 2, 3, C), normal(C, 1, 3, 3, 3, seed=1), normal(C, seed=2)
    volume = [[[x[t, i, j] for j in range(3)] for i in range(2)] for t in range(T)]
    out = ref.depthwise_conv3d(volume, weight, bias, stride)
    got = torch.stack([torch.stack([torch.stack(row) for row in plane]) for plane in out])
    wanted = F.conv3d(x.permute(3, 0, 1, 2), weight, bias, stride=(stride, 1, 1), padding=1, groups=C)
    same(got, wanted.permute(1, 2, 3, 0))


@pytest.mark.parametrize("T0, T", [(4, 4), (4, 8), (8, 4), (4, 6), (6, 16), (1, 4), (5, 2)])
def test_interpolation_along_time_matches_torch(T0, T):
    P = normal(T0, 1, C)
    wanted = F.interpolate(P[:, 0].T[None], size=T, mode="linear", align_corners=False)[0].T
    same(torch.stack(ref.interpolate_time(P, T)), wanted)


def test_interpolation_by_hand():
    P = torch.tensor([0.0, 4.0], dtype=torch.float64).reshape(2, 1, 1)
    assert [v.item() for v in ref.interpolate_time(P, 4)] == [0.0, 1.0, 3.0, 4.0]


# The features by hand and against torch's operations.


def test_frame_feature_by_hand():
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    params = {f"frame.{n}.norm.weight": one for n in ("first", "second", "pair")}
    params |= {f"frame.{n}.norm.bias": zero for n in ("first", "second", "pair")}
    params |= {f"frame.{n}.linear.bias": zero[:1] for n in ("first", "second")}
    params |= {
        "frame.first.linear.weight": torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        "frame.second.linear.weight": torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        "frame.pair.linear.weight": torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64),
        "frame.pair.linear.bias": torch.tensor([0.0, 1.0], dtype=torch.float64),
    }
    # LayerNorm of two numbers is +1 for the larger and -1 for the smaller. So T gives gelu(1) = 0.841 and
    # gelu(-1) = -0.159, the pair is normalised to (1, -1), and the last Linear gives 2 and 1 - 3.
    first, second = torch.tensor([[5.0, 3.0], [-7.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([phi_gelu(2), phi_gelu(-2)], dtype=torch.float64)
    same(ref.frame_feature(first, second, params, eps=0.0), wanted)
    wanted = torch.tensor([phi_gelu(-2), phi_gelu(4)], dtype=torch.float64)
    same(ref.frame_feature(second, first, params, eps=0.0), wanted)


def test_global_feature_by_hand():
    # With the middle tap alone each convolution is the identity: what is left is two rounds of maximum and
    # GELU, the mean and a last GELU. Positive numbers, where GELU is increasing.
    weight = torch.zeros(1, 1, 3, dtype=torch.float64)
    weight[0, 0, 1] = 1
    params = {f"global.conv{i}.weight": weight for i in (1, 2, 3)}
    params |= {f"global.conv{i}.bias": torch.zeros(1, dtype=torch.float64) for i in (1, 2, 3)}
    frames = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 3.0, 2.0, 0.5, 4.0, 1.0)]
    mean = (phi_gelu(phi_gelu(3.0)) + phi_gelu(phi_gelu(4.0))) / 2  # 6 frames -> 3 -> 2, the last one alone
    assert ref.global_feature(frames, params).item() == pytest.approx(phi_gelu(mean), abs=1e-12)


@pytest.mark.parametrize("T", [2, 4, 6, 10])
def test_global_feature_against_torch(T):
    x, params = normal(T, C), make_params()
    h = x.T[None]
    for i in (1, 2):
        h = F.conv1d(h, params[f"global.conv{i}.weight"], params[f"global.conv{i}.bias"], padding=1, groups=C)
        h = F.gelu(F.max_pool1d(h, 2, 2, ceil_mode=True))
    h = F.conv1d(h, params["global.conv3.weight"], params["global.conv3.bias"], padding=1, groups=C)
    same(ref.global_feature(list(x), params), F.gelu(h.mean(dim=2))[0])


def cube_feature(x, cube, params):
    """x (T, rows, columns, C) -> (T/2, rows, columns, C)."""
    patches = [[[x[t, i, j] for j in range(GRID[1])] for i in range(GRID[0])] for t in range(len(x))]
    out = ref.cube_feature(patches, params, cube, 1e-5)
    return torch.stack([torch.stack([torch.stack(row) for row in plane]) for plane in out])


def test_cube_dwconv_by_hand():
    # One tap: the frame before, the row below, the same column. Pair j reads frame 2j - 1; outside is zero.
    weight = torch.zeros(C, 1, 3, 3, 3, dtype=torch.float64)
    weight[:, 0, 0, 2, 1] = 2
    x = normal(4, *GRID, C)
    bias = torch.full((C,), 0.5, dtype=torch.float64)
    got = cube_feature(x, "dwconv", {"cube.conv.weight": weight, "cube.conv.bias": bias})
    same(got[0], torch.full_like(got[0], 0.5))
    same(got[1, 0], 2 * x[1, 1] + 0.5)
    same(got[1, 1], torch.full_like(got[1, 1], 0.5))


def test_cube_local_mhra_against_torch():
    x, params = normal(6, *GRID, C), make_params()

    def unit(p, name):
        h = F.layer_norm(p, (C,), params[f"{name}.norm.weight"], params[f"{name}.norm.bias"], 1e-5)
        h = F.linear(h, params[f"{name}.down.weight"], params[f"{name}.down.bias"]).permute(3, 0, 1, 2)
        h = F.conv3d(h, params[f"{name}.conv.weight"], params[f"{name}.conv.bias"], padding=1, groups=len(h))
        return F.linear(h.permute(1, 2, 3, 0), params[f"{name}.up.weight"], params[f"{name}.up.bias"])

    p1 = x + unit(x, "cube.u1")
    gain = unit(x, "cube.u1") + unit(p1, "cube.u2")
    same(cube_feature(x, "local_mhra", params), (gain[0::2] + gain[1::2]) / 2)


# The whole of InTI.


def test_tiny_example_by_hand():
    # C = 2, one patch, two frames, no context, P = 0. LayerNorm of (larger, smaller) is (1, -1).
    f64 = {"dtype": torch.float64}
    params = {"sigma": torch.tensor(1.0, **f64), "P": torch.zeros(2, 1, 2, **f64)}
    for name in ("token.first", "token.second"):
        params |= {f"{name}.norm.weight": torch.ones(2, **f64), f"{name}.norm.bias": torch.zeros(2, **f64)}
        params |= {f"{name}.linear.weight": torch.tensor([[1.0, 0.0]], **f64)}
        params |= {f"{name}.linear.bias": torch.zeros(1, **f64)}
    # First hidden channel: sum of the two token features; second: constant.
    params["ffn.hidden.weight"] = torch.tensor([[1.0, 1.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]], **f64)
    params["ffn.hidden.bias"] = torch.tensor([0.0, 1.0], **f64)
    params["ffn.logits.weight"] = torch.tensor([[1.0, 0.0], [0.0, 2.0]], **f64)
    params["ffn.logits.bias"] = torch.tensor([0.0, 0.25], **f64)
    x = torch.tensor([[[5.0, 3.0], [9.0, 1.0]], [[2.0, 6.0], [4.0, 3.0]]], **f64)[None]

    z, weights = ref.inti(x, params, grid=(1, 1), context=(), eps=0.0)

    up, down = phi_gelu(1.0), phi_gelu(-1.0)
    # The class token has its larger channel first, then second; the patch has it first in both frames.
    for k, token_sum in ((0, up + down), (1, up + up)):
        gap = phi_gelu(token_sum) - (2 * phi_gelu(1.0) + 0.25)
        alpha = 1 / (1 + math.exp(-gap))
        same(weights[0, 0, k], torch.tensor([alpha, 1 - alpha], **f64))
        same(z[0, 0, k], alpha * x[0, 0, k] + (1 - alpha) * x[0, 1, k])


@pytest.mark.parametrize("cube", ref.CUBES)
@pytest.mark.parametrize("head", ref.HEADS)
@pytest.mark.parametrize("fusion", ref.FUSED_WIDTHS)
def test_weights_and_sum(fusion, head, cube):
    x, params = normal(2, 4, L, C), make_params(4, fusion, head, cube)
    z, weights = ref.inti(x, params, grid=GRID, fusion=fusion, head=head, cube=cube)
    assert z.shape == (2, 2, L, C) and weights.shape == (2, 2, L, 2)
    assert weights.min() > 0 and weights.max() < 1 and weights.std() > 0.02
    total = weights.sum(dim=3)
    if head == "sigmoid":
        assert (total - 1).abs().max() > 0.01
    else:
        same(total, torch.ones_like(total))
    moved = x + params["sigma"] * params["P"]
    same(z, weights[..., :1] * moved[:, 0::2] + weights[..., 1:] * moved[:, 1::2])
    alone, _ = ref.inti(x[1:], params, grid=GRID, fusion=fusion, head=head, cube=cube)
    same(alone, z[1:])


@pytest.mark.parametrize("head", ref.HEADS)
def test_zero_last_weights_give_the_plain_average(head):
    params = make_params(4, head=head)
    for name in ("ffn.v", "ffn.logits.weight", "ffn.logits.bias", "sigma"):
        if name in params:
            params[name] = torch.zeros_like(params[name])
    x = normal(1, 4, L, C)
    z, _ = ref.inti(x, params, grid=GRID, head=head)
    same(z, (x[:, 0::2] + x[:, 1::2]) / 2)


@pytest.mark.parametrize("head", ref.HEADS)
def test_heads_by_hand(head):
    # The FFN sees only its bias: the first half of h is gelu(2), the second gelu(1), everywhere.
    params = make_params(2, head=head)
    params["ffn.hidden.weight"] = torch.zeros(C, 2 * C, dtype=torch.float64)
    params["ffn.hidden.bias"] = torch.tensor([2.0] * (C // 2) + [1.0] * (C // 2), dtype=torch.float64)
    params["ffn.v"] = torch.full((C // 2,), 0.25, dtype=torch.float64)
    rows = torch.zeros(2, C, dtype=torch.float64)
    rows[0, 0], rows[1, -1] = 1.5, 1.5
    params["ffn.logits.weight"], params["ffn.logits.bias"] = rows, torch.zeros(2, dtype=torch.float64)
    a, b = 1.5 * phi_gelu(2.0), 1.5 * phi_gelu(1.0)  # 1.5 = 0.25 * C / 2
    if head == "sigmoid":
        wanted = [1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))]
    else:
        wanted = [1 / (1 + math.exp(b - a)), 1 / (1 + math.exp(a - b))]
    _, weights = ref.inti(normal(1, 2, L, C), params, grid=GRID, head=head)
    same(weights, torch.tensor(wanted, dtype=torch.float64).expand(1, 1, L, 2))


@pytest.mark.parametrize("context", [(), ("cube",), ("frame",), ("global",)])
def test_everything_sees_the_position(context):
    # Eq. 8 comes first: adding sigma P beforehand and leaving it out inside is the same.
    x, params = normal(1, 4, L, C), make_params(4)
    moved = x + params["sigma"] * params["P"]
    z, weights = ref.inti(x, params, grid=GRID, context=context)
    params["sigma"] = torch.zeros_like(params["sigma"])
    wanted_z, wanted_weights = ref.inti(moved, params, grid=GRID, context=context)
    same(z, wanted_z)
    same(weights, wanted_weights)


def test_constant_video_stays_constant():
    params = make_params(4)
    params["sigma"] = torch.zeros_like(params["sigma"])
    frame = normal(1, 1, L, C)
    z, weights = ref.inti(frame.expand(1, 4, L, C), params, grid=GRID)
    same(z, frame.expand(1, 2, L, C))
    assert (weights - 0.5).abs().max() > 0.02  # the weights differ, and it does not matter


# Which weights (pair j, token k) move when one token of 8 frames of a 2 x 3 grid moves.
ALL = {(j, k) for j in range(4) for k in range(L)}
TOP_LEFT, BOTTOM_RIGHT = 1, 6
NEAR_TOP_LEFT = (1, 2, 4, 5)  # itself, right, below, diagonal


@pytest.mark.parametrize(
    "context, cube, t, k, wanted",
    [
        ((), "dwconv", 5, TOP_LEFT, {(2, TOP_LEFT)}),
        ((), "dwconv", 5, 0, {(2, 0)}),
        (("frame",), "dwconv", 5, TOP_LEFT, {(2, TOP_LEFT)}),
        (("frame",), "dwconv", 5, 0, {(2, k) for k in range(L)}),
        (("global",), "dwconv", 5, TOP_LEFT, {(2, TOP_LEFT)}),
        (("global",), "dwconv", 5, 0, ALL),
        (("cube",), "dwconv", 5, 0, {(2, 0)}),
        (("cube",), "dwconv", 5, TOP_LEFT, {(j, k) for j in (2, 3) for k in NEAR_TOP_LEFT}),
        (("cube",), "dwconv", 4, TOP_LEFT, {(2, k) for k in NEAR_TOP_LEFT}),
        # Two 3 x 3 x 3 convolutions at full rate: two frames and two places in every direction.
        (("cube",), "local_mhra", 4, TOP_LEFT, {(j, k) for j in (1, 2, 3) for k in range(1, L)}),
        (("cube",), "local_mhra", 0, BOTTOM_RIGHT, {(j, k) for j in (0, 1) for k in range(1, L)}),
        (("cube",), "local_mhra", 4, 0, {(2, 0)}),
    ],
)
def test_reach_of_each_context(context, cube, t, k, wanted):
    params = make_params(8, cube=cube)
    for i in (1, 2):  # a maximum may hide a change of one frame: here it shows through
        params[f"global.conv{i}.weight"] = params[f"global.conv{i}.weight"].abs()
    x = normal(1, 8, L, C)
    changed = x.clone()
    changed[0, t, k] += 3 * normal(C, seed=5).abs()
    _, before = ref.inti(x, params, grid=GRID, context=context, cube=cube)
    _, after = ref.inti(changed, params, grid=GRID, context=context, cube=cube)
    moved = (before - after)[0].abs().amax(dim=2) > 1e-12
    assert {(j, k) for j, k in moved.nonzero().tolist()} == wanted


def test_left_out_context_is_zeros():
    # concat keeps a slot per feature: with the slots' weights at zero the context cannot matter.
    params = make_params(4, fusion="concat")
    x = normal(1, 4, L, C)
    without, _ = ref.inti(x, params, grid=GRID, fusion="concat", context=("frame",))
    for slot in (1, 3):  # cube and global, after the token
        params["ffn.hidden.weight"][:, slot * C : (slot + 1) * C] = 0
    with_all, _ = ref.inti(x, params, grid=GRID, fusion="concat")
    same(without, with_all)


def test_fusions_are_one_linear_map_of_each_other():
    # "separate" and "concat" with repeated columns compute "add".
    params = make_params(4, fusion="add")
    x = normal(1, 4, L, C)
    wanted, _ = ref.inti(x, params, grid=GRID, fusion="add")
    for fusion, copies in (("separate", 2), ("concat", 4)):
        wide = params | {"ffn.hidden.weight": params["ffn.hidden.weight"].repeat(1, copies)}
        same(ref.inti(x, wide, grid=GRID, fusion=fusion)[0], wanted)


def test_other_number_of_frames_and_gradients():
    params = make_params(4)
    for value in params.values():
        value.requires_grad_()
    z, _ = ref.inti(normal(1, 16, L, C), params, grid=GRID)
    z.square().sum().backward()
    assert z.shape == (1, 8, L, C)
    assert [name for name, value in params.items() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize(
    "shape, options", [((1, 3, L, C), {}), ((1, 4, L - 1, C), {}), ((1, 4, L, C), {"context": ("cubes",)})]
)
def test_refusals(shape, options):
    with pytest.raises(ValueError, match="want"):
        ref.inti(normal(*shape), make_params(4), grid=GRID, **options)


# Naive.


def tower():
    config = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=12,
        patch_size=4,
        attn_implementation="sdpa",  # eager attention rounds its softmax to float32
    )
    model = CLIPVisionModel(config).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i) * 0.4 + (parameter.ndim == 1) * 0.1)
    return model


@torch.no_grad()
def test_naive_matches_transformers():
    model = tower()
    pixels, head, bias = normal(2, 3, 3, 12, 12), normal(5, 12, seed=1), normal(5, seed=2)
    params = dict(model.state_dict()) | {"head.weight": head, "head.bias": bias}
    logits, feature, tokens = ref_naive.naive(pixels, params, heads=3)
    out = model(pixels.flatten(0, 1))
    wanted = out.pooler_output.unflatten(0, (2, 3)).mean(dim=1)
    assert_close(tokens, out.last_hidden_state.unflatten(0, (2, 3)), rtol=0, atol=1e-10)
    assert_close(feature, wanted, rtol=0, atol=1e-10)
    assert_close(logits, F.linear(wanted, head, bias), rtol=0, atol=1e-10)
    assert logits.std() > 0.1


@torch.no_grad()
def test_naive_does_not_see_the_order_of_frames():
    params = dict(tower().state_dict()) | {"head.weight": normal(5, 12), "head.bias": normal(5)}
    pixels = normal(1, 3, 3, 12, 12)
    logits, _, _ = ref_naive.naive(pixels, params, heads=3)
    reversed_logits, _, _ = ref_naive.naive(pixels.flip(1), params, heads=3)
    same(reversed_logits, logits)
