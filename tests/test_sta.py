"""STA's first frame: random places that are random, cells of a grid that are spatial; Eq. 6 and 7."""

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from hf_inti import InTIClipForVideoClassification
from hf_inti.hosts import compress
from hf_inti.hosts.sta import Prune
from hf_inti.measure.redundancy import gradient_norm, trajectory_sum
from hf_inti.model.compression_sta import PRIME, STA, cells_for, draw_for, dropped_tokens, prune, scramble
from hf_inti.model.methods import TokenState
from reference import sta as slow


def order_of_draws(x: torch.Tensor, N: int) -> torch.Tensor:
    return draw_for(x, torch.arange(N).expand(len(x), N), training=False).argsort(dim=-1)


def test_scramble_is_one_to_one():
    assert scramble(torch.arange(100_000)).unique().numel() == 100_000
    edge = scramble(torch.tensor([0, 1, PRIME - 1, PRIME - 2]))
    assert edge.min() >= 0 and edge.max() < PRIME and edge.unique().numel() == 4


def test_draws_of_a_clip_have_no_lattice():
    # A multiplicative hash leaves three gaps between the places that it ranks first; random places leave many.
    for order in order_of_draws(torch.randn(20, 196, 32), 196):
        gaps = order[:48].sort().values.diff()
        assert gaps.unique().numel() >= 6


def test_draws_are_uniform_and_of_each_clip_its_own():
    x = torch.randn(400, 49, 32)
    order = order_of_draws(x, 49)
    first = torch.bincount(order[:, :12].flatten(), minlength=49) / 400  # how often each place is among the first 12
    assert (first - 12 / 49).abs().max() < 5 * (12 / 49 * 37 / 49 / 400) ** 0.5
    common = torch.stack([torch.isin(a[:12], b[:12]).sum() for a, b in zip(order[::2], order[1::2], strict=True)])
    assert abs(common.float().mean() - 12 * 12 / 49) < 0.5  # as many as two random choices share


def test_draws_repeat_in_evaluation_whatever_the_batch():
    x = torch.randn(3, 49, 32)
    places = torch.arange(49).expand(3, 49)
    draws = draw_for(x, places, training=False)
    assert torch.equal(draw_for(x[1:2], places[:1], training=False)[0], draws[1])
    assert torch.equal(draw_for(x * (1 + 1e-7), places, training=False), draws)  # another batch rounds otherwise
    assert draws.min() >= 0 and draws.max() < 1
    torch.manual_seed(0)
    train = draw_for(x, places, training=True)
    assert not torch.equal(train, draws) and not torch.equal(train, draw_for(x, places, training=True))


def test_random_first_frame_drops_the_highest_draws():
    x, draw = torch.randn(2, 3, 16, 8), torch.rand(2, 16)
    for direction, t in (("F", 0), ("B", 2)):
        kept = prune(x, x, 5, direction, "random", draw)
        assert torch.equal(kept[:, t], draw.argsort(dim=-1)[:, :11])


def test_grid_drops_a_random_token_of_every_cell():
    draw = torch.rand(2, 36)
    cells = cells_for(torch.arange(36).expand(2, 36), (6, 6), 4)  # 2 x 2 cells of 3 x 3 places
    assert cells[0].tolist() == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + (
        [2] * 3 + [3] * 3 + [2] * 3 + [3] * 3 + [2] * 3 + [3] * 3
    )
    x = torch.randn(2, 2, 36, 8)
    kept = prune(x, x, 4, "F", "grid", draw, cells)[:, 0]
    for b in range(2):
        dropped = [n for n in range(36) if n not in kept[b].tolist()]
        assert sorted(cells[b, dropped].tolist()) == [0, 1, 2, 3]
        for n in dropped:
            assert draw[b, n] == draw[b, cells[b] == cells[b, n]].max()


def test_cells_of_a_grid_that_is_not_square():
    places = torch.arange(24).expand(1, 24)
    assert cells_for(places, (4, 6), 5).unflatten(1, (4, 6))[0].tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [2, 2, 2, 3, 3, 3],
        [2, 2, 2, 3, 3, 3],
    ]


@pytest.mark.parametrize("direction", ["F", "B"])
@pytest.mark.parametrize("first_frame", ["random", "grid"])
def test_first_frame_on_clip_goes_by_places(direction, first_frame, tiny_config):
    """After a first pruning the tokens are out of order: cells and draws are those of their places."""
    tower = tiny_config(hidden_size=24).tower
    sta = STA(tower, [], r=5, order=direction, first_frame=first_frame).eval()
    x = torch.randn(2, 3, 17, 24)
    positions = torch.stack([torch.randperm(16) for _ in range(6)]).view(2, 3, 16)
    state = TokenState(num_class_tokens=1, grid=(4, 4), positions=positions)
    out, new = sta.after_block(1, x, x, state)
    t = 0 if direction == "F" else 2
    for b in range(2):
        lost = sorted(set(range(16)) - set(new.positions[b, t].tolist()))
        draws = draw_for(x[b : b + 1, t, 1:], positions[b : b + 1, t], training=False)[0]
        by_place = dict(zip(positions[b, t].tolist(), draws.tolist(), strict=True))
        if first_frame == "random":
            assert lost == sorted(sorted(by_place, key=by_place.get)[-5:])
        else:  # 2 x 2 cells: four of the five are the highest of their cell
            best = {(p // 4 // 2, p % 4 // 2): p for p in sorted(by_place, key=by_place.get)}
            assert set(best.values()) <= set(lost)
        for k, place in enumerate(new.positions[b, t].tolist()):  # the token at each place is the one that was there
            assert torch.equal(out[b, t, 1 + k], x[b, t, 1 + positions[b, t].tolist().index(place)])


@pytest.mark.parametrize("first_frame", ["random", "grid"])
def test_tokens_that_were_not_pruned_before_are_at_their_places(first_frame, tiny_config):
    sta = STA(tiny_config().tower, [], r=5, first_frame=first_frame).eval()
    x = torch.randn(2, 3, 17, 48)
    state = TokenState(num_class_tokens=1, grid=(4, 4))
    wanted, _ = sta.after_block(1, x, x, state._replace(positions=torch.arange(16).expand(2, 3, -1)))
    assert torch.equal(sta.after_block(1, x, x, state)[0], wanted)


@pytest.mark.parametrize("scores", ["both", "temporal"])
def test_scores_of_a_long_clip_stay_finite(scores):
    """What is accumulated keeps its sum, frame after frame."""
    x, metric = torch.randn(1, 16, 12, 4), torch.randn(1, 16, 12, 6)
    assert prune(x, metric, 3, scores=scores)[0].tolist() == slow.prune(x[0], metric[0], 3, "F", scores)


def test_of_equal_tokens_the_first_are_kept():
    same, draw = torch.ones(1, 2, 80, 4), torch.zeros(1, 80)
    kept = prune(same, same, 30, scores="semantic")[0].tolist()
    assert kept == slow.prune(same[0], same[0], 30, "F", "semantic")
    assert kept == [[*range(1, 80, 2), *range(0, 20, 2)], [*range(50)]]
    assert prune(same, same, 30, first_frame="random", draw=draw)[0, 0].tolist() == [*range(50)]


def videomae(**options):
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=24, patch_size=4, num_frames=8, hidden_size=24, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=36, num_labels=5, initializer_range=0.3, **options,
    )  # fmt: skip
    return VideoMAEForVideoClassification(config).eval()


@pytest.mark.parametrize("schedule", ["decreasing", "released"])
@pytest.mark.parametrize("first_frame", ["random", "grid"])
def test_videomae_carries_the_places(schedule, first_frame, monkeypatch):
    """At every stage the tokens that a hook takes for those of a place are those that stood there."""
    seen = []
    drawn = Prune._draw

    def watch(self, x, places, training):
        seen.append((places, x[..., 0].round()))
        chosen = drawn(self, x, places, training)
        assert chosen["cells"].max() < int(self.options["r"] ** 0.5) ** 2  # of the frame, in joined frames too
        return chosen

    monkeypatch.setattr(Prune, "_draw", watch)
    model = compress(videomae(), "sta", r=8, schedule=schedule, first_frame=first_frame)
    layers = model.videomae.encoder.layer
    for layer in layers:  # blocks that leave channel 0 as it is, in which each token carries its place
        with torch.no_grad():
            layer.output.dense.weight[0] = layer.attention.output.dense.weight[0] = 0
            layer.output.dense.bias[0] = layer.attention.output.dense.bias[0] = 0

    def mark(module, args, output):
        return torch.cat([torch.arange(144.0).expand(2, 144)[..., None], output[..., 1:]], dim=-1)

    model.videomae.embeddings.register_forward_hook(mark)
    with torch.no_grad():
        model(torch.randn(2, 8, 3, 24, 24))
    assert len(seen) == 3
    for places, marks in seen:
        assert torch.equal(places.float(), marks)


def test_videomae_first_frame_under_checkpointing():
    x, labels, grads = torch.randn(2, 8, 3, 24, 24), torch.tensor([0, 1]), []
    for checkpointing in (False, True):
        model = compress(videomae(), "sta", r=8, first_frame="grid").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(x, labels=labels).loss.backward()
        grads.append(model.videomae.encoder.layer[0].output.dense.weight.grad)
    torch.testing.assert_close(*grads)


def test_schedules_are_table_6d():
    assert dropped_tokens(64) == [64, 32, 16]
    assert dropped_tokens(48, "constant") == [48, 48, 48]
    assert dropped_tokens(27, "increasing") == [27, 54, 108]
    assert dropped_tokens(5) == [5, 2, 1]


def test_trajectory_sum():
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    got = trajectory_sum(x)
    for b in range(2):
        total = 0.0
        for i in range(5):
            for t in range(3):
                last = x[b, 3, i]
                total += max(float(last @ v / last.norm() / v.norm()) for v in x[b, t])
        assert got[b].item() == pytest.approx(total / 5)
    same = torch.randn(1, 1, 5, 8).expand(1, 4, 5, 8)
    assert trajectory_sum(same).item() == pytest.approx(3)


def test_gradient_norm(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(compression="none", num_frames=2)).double().eval()
    x, labels = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 4])
    got = gradient_norm(model, x, labels)
    assert got.shape == (2, 2, 17) and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(got[:1], gradient_norm(model, x[:1], labels[:1]))  # clips do not share a loss
    added = torch.zeros(2, 17, 48, dtype=torch.float64)

    def loss(i: int) -> float:
        """With a little added to the first clip's output of block i + 1."""
        layer = model.vision_model.encoder.layers[i]
        hook = layer.register_forward_hook(lambda module, args, out: (out[0] + added, *out[1:]))
        with torch.no_grad():
            value = model(x[:1], labels=labels[:1]).loss.item()
        hook.remove()
        return value

    for t, k in ((0, 0), (1, 7)):  # against differences, channel by channel
        total = 0.0
        for i in range(4):
            for c in range(48):
                added[t, k, c] = 1e-6
                up = loss(i)
                added[t, k, c] = -1e-6
                total += abs(up - loss(i)) / 2e-6
                added[t, k, c] = 0.0
        assert got[0, t, k].item() == pytest.approx(total, rel=1e-3)


def test_gradient_norm_needs_all_tokens_everywhere(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(compression="sta"))
    with pytest.raises(ValueError, match="every block must give as many tokens"):
        gradient_norm(model, torch.randn(1, 8, 3, 32, 32), torch.tensor([0]))
