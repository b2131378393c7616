"""What the adaptations do in training alone: stochastic depth, dropout, initial values, what is frozen."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_inti import InTIClipForVideoClassification, InTIClipVisionModel
from hf_inti.model import adaptation_aim, adaptation_uniformerv2
from hf_inti.model.adaptation_uniformerv2 import GlobalBlock
from hf_inti.model.adaptation_zeroi2v import LinearAdapter
from hf_inti.model.methods import TokenState, block_rate, drop_path


STATE = TokenState(num_class_tokens=1, grid=(4, 4))


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def uniformerv2(tiny_config, **options):
    """The adaptation alone, with weights that are not zero."""
    fields = {name: options.pop(name) for name in ("drop_path_rate",) if name in options}
    config = tiny_config(adaptation="uniformerv2", adaptation_options=options, **fields)
    adaptation = InTIClipVisionModel(config).adaptation
    randomise(adaptation)
    return adaptation


def test_rates_grow_linearly_to_the_last_block(tiny_config):
    tower = tiny_config(drop_path_rate=0.3).tower
    assert [block_rate(tower, i) for i in (1, 2, 3, 4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert block_rate(tower._replace(num_hidden_layers=1), 1) == 0


def test_dropped_clips_are_dropped_whole_and_the_others_scaled():
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 2, 3), 0.25, training=True)
    assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (out == out[:, :1, :1]).all()
    assert (out[:, 0, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    x = torch.randn(2, 3)
    assert drop_path(x, 0.25, training=False) is x and drop_path(x, 0.0, training=True) is x


@pytest.fixture
def rates(monkeypatch):
    """Every drop path rate that is asked for in training, in order; nothing is dropped."""
    asked = []

    def note(x, rate, training):
        if training:
            asked.append(rate)
        return x

    for module in (adaptation_uniformerv2, adaptation_aim):
        monkeypatch.setattr(module, "drop_path", note)
    return asked


def test_uniformerv2_drops_local_units_by_the_blocks_rates(tiny_config, rates):
    adaptation = uniformerv2(tiny_config, local="double", drop_path_rate=0.3).train()
    x = torch.randn(2, 4, 17, 48)
    for i in (1, 2, 3, 4):
        adaptation.before_attention(i, x, STATE, None)
        adaptation.before_mlp(i, x, STATE)
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    rates.clear()
    adaptation.eval().before_mlp(4, x, STATE)
    assert rates == []


def test_uniformerv2_drops_global_blocks_by_rates_of_their_own(tiny_config, rates):
    adaptation = uniformerv2(tiny_config, global_layers=[2, 3, 4], global_drop_path_rate=0.4).train()
    side = torch.randn(2, 48)
    for i in (1, 2, 3, 4):
        side = adaptation.after_block(i, torch.randn(2, 4, 17, 48), STATE, side)
    assert rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])  # attention and MLP of each


def test_uniformerv2_drops_what_its_rates_say(tiny_config):
    adaptation = uniformerv2(tiny_config, local="single", drop_path_rate=0.5).train()
    x = torch.randn(300, 2, 17, 48)
    same = (adaptation.before_attention(4, x, STATE, None) == x).flatten(1).all(dim=1).float().mean()
    assert same == pytest.approx(0.5, abs=0.1)
    adaptation = uniformerv2(tiny_config, global_layers=[3, 4], global_drop_path_rate=0.5, mlp_dropout=0.0).train()
    side = torch.randn(300, 48)
    unmoved = (adaptation.after_block(4, x, STATE, side) == side).all(dim=1).float().mean()
    assert unmoved == pytest.approx(0.25, abs=0.1)  # both branches dropped


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_uniformerv2_mlp_dropout(rate, tiny_config):
    adaptation = uniformerv2(tiny_config, mlp_dropout=rate).train()
    block = adaptation.global_blocks[0]
    seen = []
    block.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.read(torch.randn(64, 48), torch.randn(64, 5, 48))
    assert (seen[0] == 0).float().mean() == pytest.approx(rate, abs=0.03)
    adaptation.eval()
    block.read(torch.randn(64, 48), torch.randn(64, 5, 48))
    assert (seen[1] != 0).all()


def test_uniformerv2_defaults_to_half_of_the_mlp_dropped(tiny_config):
    assert uniformerv2(tiny_config).global_blocks[0].dropout.p == 0.5
    assert GlobalBlock(8, 2).dropout.p == 0.5 and GlobalBlock(8, 2).drop_path_rate == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_uniformerv2_without_a_video_token_trains_what_it_uses(frozen, tiny_config):
    options = {"frozen": frozen, "local": "double", "global_layers": 0}
    model = InTIClipForVideoClassification(tiny_config(adaptation="uniformerv2", adaptation_options=options))
    model(torch.randn(1, 8, 3, 32, 32), labels=torch.tensor([0])).loss.backward()
    for name, parameter in model.named_parameters():
        of_clip = not name.startswith(("vision_model.adaptation.", "vision_model.compression.", "classifier."))
        assert parameter.requires_grad is not (of_clip and frozen), name
        assert (parameter.grad is not None) is parameter.requires_grad, name


@pytest.mark.parametrize("frozen", [False, True])
def test_uniformerv2_frozen_trains_no_clip_and_reads_the_video_token_alone(frozen, tiny_config):
    options = {"frozen": frozen, "local": "double"}
    model = InTIClipForVideoClassification(tiny_config(adaptation="uniformerv2", adaptation_options=options))
    model(torch.randn(1, 8, 3, 32, 32), labels=torch.tensor([0])).loss.backward()
    for name, parameter in model.named_parameters():
        of_clip = not name.startswith(("vision_model.adaptation.", "vision_model.compression.", "classifier."))
        if name.startswith("vision_model.post_layernorm."):
            assert not parameter.requires_grad  # has no part in this model
        elif of_clip:
            assert parameter.requires_grad is not frozen and (parameter.grad is None) is frozen, name
        else:
            assert parameter.requires_grad, name
    adaptation = model.vision_model.adaptation
    randomise(adaptation)
    g, norm = torch.randn(2, 48), torch.nn.Identity()
    one, other = torch.randn(2, 4, 17, 48), torch.randn(2, 4, 17, 48)
    assert torch.equal(adaptation.pool(one, g, norm), adaptation.pool(other, g, norm)) is frozen


def test_uniformerv2_starts_as_released(tiny_config):
    """Uniform after Glorot within its bounds, packed for queries, keys and values, and zeros where a branch ends."""
    config = tiny_config(adaptation="uniformerv2", adaptation_options={"local": "double"})
    adaptation = InTIClipVisionModel(config).adaptation
    bounds = {"q_proj": 4 * 48, "k_proj": 4 * 48, "v_proj": 4 * 48, "fc1": 5 * 48}  # fan in and fan out
    for block in adaptation.global_blocks:
        for name, fans in bounds.items():
            layer, bound = getattr(block, name), math.sqrt(6 / fans)
            assert bound * 0.95 < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert not layer.bias.any()
        for layer in (block.out_proj, block.fc2):
            assert not layer.weight.any() and not layer.bias.any()
        assert block.dpe.weight.any() and not block.dpe.bias.any()
    for unit in (*adaptation.local1, *adaptation.local2):
        assert not unit.expand.weight.any() and not unit.expand.bias.any()
    assert not adaptation.query.value.any() and not adaptation.balance.value.any()


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_zeroi2v_dropout(rate, tiny_config):
    options = {"adaptation": "zeroi2v", "adaptation_options": {"dropout": rate, "ratio": 1.0}}
    adaptation = InTIClipVisionModel(tiny_config(compression="none", **options)).adaptation
    z = torch.randn(200, 48)
    for adapters in (adaptation.attention_in, adaptation.attention_out, adaptation.mlp_in, adaptation.mlp_out):
        for adapter in adapters:
            seen = []
            adapter.up.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            adapter.train()(z)
            assert (seen[0] == 0).float().mean() == pytest.approx(rate, abs=0.03)
            adapter.eval()(z)
            assert (seen[1] != 0).all()


def test_zeroi2v_defaults(tiny_config):
    adaptation = InTIClipVisionModel(tiny_config(compression="none", adaptation="zeroi2v")).adaptation
    adapter = adaptation.mlp_out[0]
    assert isinstance(adapter, LinearAdapter)
    assert (adapter.dropout.p, adapter.scale, adapter.down.out_features) == (0.1, 0.5, 12)
    assert adaptation.groups == [(-1, 12), (1, 12)]


def test_aim_drops_the_adapters_and_not_clips_branches(tiny_config, rates):
    options = {"compression": "none", "adaptation": "aim", "drop_path_rate": 0.3}
    model = InTIClipVisionModel(tiny_config(**options)).train()
    torch.manual_seed(0)
    model(torch.randn(1, 4, 3, 32, 32))
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    first = model(torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))).pooler_output
    again = model(torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))).pooler_output
    assert_close(first, again)  # CLIP's branches would be dropped at random


@pytest.mark.parametrize("compression", ["tome", "sta"])
def test_uniformerv2_finds_the_tokens_places(compression, tiny_config):
    """What ToMe and STA say of places is where the tokens come from: convolutions find the right neighbours."""
    options = {"r": 3} if compression == "tome" else {"r": 6}
    config = tiny_config(compression=compression, compression_options=options)
    model = InTIClipVisionModel(config).eval()
    seen = []
    after = model.compression.after_block

    def watch(i, x, keys, state):
        x, state = after(i, x, keys, state)
        seen.append((x.shape[2], state))
        return x, state

    model.compression.after_block = watch
    with torch.no_grad():
        source = model(torch.randn(2, 4, 3, 32, 32), output_token_source=True).token_source
    length, state = seen[-1]
    assert state.positions.shape == (2, 4, length - 1) and length < 17
    for b in range(2):
        for t in range(4):
            places = state.positions[b, t].tolist()
            assert len(set(places)) == len(places)  # no two tokens on one place
            for k, place in enumerate(places):
                assert source[b, t, 1 + place] == 1 + k  # the patch of that place is in that token
