"""STTS: both gradients, the number of draws, and the squares' stride."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_inti.model import compression_stts
from hf_inti.model.compression_stts import STTS, perturbed_topk
from hf_inti.model.methods import TokenState
from reference import stts as slow


@pytest.mark.parametrize("gradient", ["paper", "released"])
@pytest.mark.parametrize("k", [1, 3])
def test_gradients(gradient, k):
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 120, 6, dtype=torch.float64)
    upstream = torch.randn(2, k, 6, dtype=torch.float64)
    indicators = perturbed_topk(scores, k, 0.3, noise=noise, gradient=gradient)
    (indicators * upstream).sum().backward()
    for b in range(2):
        assert_close(indicators[b], slow.perturbed_top_k(scores[b].detach(), k, noise[b], 0.3))
        wanted = slow.perturbed_top_k_gradient(upstream[b], scores[b].detach(), k, noise[b], 0.3, form=gradient)
        assert_close(scores.grad[b], wanted, rtol=0, atol=1e-10)


def test_the_papers_gradient_is_that_of_the_smoothed_choice(monkeypatch):
    """Against differences of the mean over many draws, which the released diagonal does not match."""
    monkeypatch.setattr(compression_stts, "CHUNK", 50_000)
    torch.manual_seed(0)
    scores, sigma, n = torch.tensor([[0.0, 0.3, 0.1, -0.2]], dtype=torch.float64), 0.5, 400_000
    noise = torch.randn(1, n, 4, dtype=torch.float64)
    upstream = torch.tensor([[[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, -1.0, 2.0]]], dtype=torch.float64)

    def value(shift: torch.Tensor) -> float:
        return (perturbed_topk(scores + shift, 2, sigma, noise=noise) * upstream).sum().item()

    wanted = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 0.05
        wanted[i] = (value(step) - value(-step)) / 0.1
    found = {}
    for gradient in ("paper", "released"):
        leaf = scores.clone().requires_grad_()
        (perturbed_topk(leaf, 2, sigma, noise=noise, gradient=gradient) * upstream).sum().backward()
        found[gradient] = leaf.grad[0]
    assert_close(found["paper"], wanted, rtol=0, atol=0.03)
    assert (found["released"] - wanted).abs().max() > 0.3


class FirstChannel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., 0]


def of_squares(tiny_config, **options) -> STTS:
    """STTS that keeps the best 4 x 4 of 8 x 8 patches after block 1, scored by their first channel."""
    stts = STTS(tiny_config(image_size=64).tower, [], spatial=[[1, 0.25]], **options)
    stts.spatial[0].scorer = FirstChannel()
    return stts


@pytest.mark.parametrize("options, corner", [({}, (2, 2)), ({"stride": 1}, (1, 3)), ({"stride": 4}, (0, 4))])
def test_stride_is_that_of_the_squares(options, corner, tiny_config):
    x = torch.zeros(1, 1, 65, 48)
    grid = x[0, 0, 1:].unflatten(0, (8, 8))
    grid[1:5, 3:7, 0] = 1.0  # the best square, with its corner at row 1, column 3
    grid[5, 3, 0] = 0.1  # of the default's squares that at (2, 2) has most of both, of stride 4's that at (0, 4)
    grid[..., 1] = torch.arange(64.0).view(8, 8)
    x[0, 0, 1:] = grid.flatten(0, 1)
    stts = of_squares(tiny_config, **options).eval()
    out, state = stts.after_block(1, x, None, TokenState(num_class_tokens=1, grid=(8, 8)))
    assert state.grid == (4, 4)
    assert out[0, 0, 1, 1] == 8 * corner[0] + corner[1]


def test_stride_goes_by_the_rows(tiny_config):
    """The best 2 x 2 of 4 x 8 patches, one patch apart: half of the two rows that are lost."""
    x = torch.zeros(1, 1, 33, 48)
    grid = x[0, 0, 1:].unflatten(0, (4, 8))
    grid[1:3, 4:6, 0] = 1.0
    grid[..., 1] = torch.arange(32.0).view(4, 8)
    x[0, 0, 1:] = grid.flatten(0, 1)
    out, _ = of_squares(tiny_config).eval().after_block(1, x, None, TokenState(num_class_tokens=1, grid=(4, 8)))
    assert out[0, 0, 1:, 1].tolist() == [12, 13, 20, 21]


def test_frames_that_are_all_kept_are_left_alone(tiny_config):
    """In training too, where choosing them would cost noise and give their scorer a gradient."""
    stts = STTS(tiny_config().tower, [], temporal=[[1, 1]]).train()
    x = torch.randn(2, 4, 5, 48)
    out, _ = stts.after_block(1, x, None, TokenState(num_class_tokens=1, grid=(2, 2)))
    assert torch.equal(out, x) and not out.requires_grad


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_frames_are_dropped_whatever_the_number_of_their_tokens(tokens, tiny_config):
    stts = STTS(tiny_config().tower, [], temporal=[[1, 0.5]]).eval()
    x = torch.randn(2, 8, tokens, 48)
    out, _ = stts.after_block(1, x, None, TokenState(num_class_tokens=1, grid=(1, tokens - 1)))
    assert out.shape == (2, 4, tokens, 48)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_num_samples_is_the_number_of_draws(n, tiny_config):
    stts = STTS(tiny_config().tower, [], temporal=[[1, 0.5]], num_samples=n, sigma=2.0).train()
    x = torch.zeros(4, 8, 17, 48)
    x[:, :, :, :8] = torch.eye(8)[:, None]  # each frame marks its own channel: what comes out are the indicators
    shares = []
    for _ in range(20):
        out, _ = stts.after_block(1, x, None, TokenState(num_class_tokens=1, grid=(4, 4)))
        shares.append(out[..., :8] * n)
    shares = torch.stack(shares)
    assert_close(shares, shares.round(), rtol=0, atol=1e-4)  # whole numbers of n draws
    assert n == 1 or not torch.all((shares.round() == 0) | (shares.round() == n))


def test_sigma_is_the_scale_of_the_noise_and_fades(tiny_config):
    stts = STTS(tiny_config().tower, [], temporal=[[1, 0.5]], spatial=[[2, 0.3]], sigma=0.4)
    for selection in (*stts.temporal, *stts.spatial):
        assert selection.topk.sigma.item() == pytest.approx(0.4)
    stts.set_progress(0.25)
    for selection in (*stts.temporal, *stts.spatial):
        assert selection.topk.sigma.item() == pytest.approx(0.3)


@pytest.mark.parametrize("gradient", ["paper", "released"])
def test_gradient_is_an_option_of_the_model(gradient, tiny_config):
    stts = STTS(tiny_config().tower, [], temporal=[[1, 0.5]], spatial=[[2, 0.3]], gradient=gradient)
    for selection in (*stts.temporal, *stts.spatial):
        scores = torch.zeros(1, 9, requires_grad=True)
        noise = torch.randn(1, 30, 9)
        selection.topk(scores, 2, noise)[0, 0, 4].backward()
        others = scores.grad[0, [0, 1, 2, 3, 5, 6, 7, 8]]
        assert (others.abs().max() > 0) == (gradient == "paper")
