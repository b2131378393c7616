"""The contract between the model and its methods, with two methods made up to use all of it."""

import pytest
import torch
from torch import nn

from hf_inti import InTIClipForVideoClassification
from hf_inti.model.adaptation import ADAPTATIONS
from hf_inti.model.compression import COMPRESSIONS
from hf_inti.model.methods import Adaptation, Compression, NewLinear, ZeroLinear


class KeepLargestKeys(Compression):
    """Inside each named block, keeps the `keep` patches with the largest keys; the dropped count as the class token's.

    Sizes bias the attention, as ToMe's do.
    """

    keeps_grid = False
    features = "key"

    def __init__(self, tower, layers, *, keep: int = 5):
        super().__init__(tower, layers)
        self.layers, self.keep = layers, keep

    def key_bias(self, state):
        return None if state.sizes is None else state.sizes.log()

    def inside_block(self, i, x, keys, state):
        if i not in self.layers:
            return x, state
        assert keys.shape == x.shape
        B, T, L, D = x.shape
        if state.positions is None:
            places = torch.arange(L - 1, device=x.device).expand(B, T, -1)
            state = state._replace(positions=places, sizes=x.new_ones(B, T, L))
        chosen = keys[:, :, 1:].square().sum(-1).topk(self.keep, dim=-1).indices.sort(dim=-1).values
        patches = x[:, :, 1:].gather(2, chosen[..., None].expand(-1, -1, -1, D))
        sizes = torch.cat([state.sizes[:, :, :1] + L - 1 - self.keep, state.sizes[:, :, 1:].gather(2, chosen)], dim=2)
        state = state._replace(positions=state.positions.gather(2, chosen), sizes=sizes)
        return torch.cat([x[:, :, :1], patches], dim=2), state


class UseEverything(Adaptation):
    """Does something at every hook."""

    needs_grid = True

    def __init__(self, tower, *, scale: float = 0.5, merged: bool = False):
        super().__init__(tower)
        D = tower.hidden_size
        self.scale = scale
        self.embedding = NewLinear(1, D)
        self.query = NewLinear(D, D)
        self.adapters = None if merged else nn.ModuleList(NewLinear(D, D) for _ in range(tower.num_hidden_layers))
        self.parallel = NewLinear(D, D)
        self.last = ZeroLinear(D, D)

    @classmethod
    def frame_multiple(cls, **options):
        return 2

    def embed_patches(self, pixel_values, patch_embedding):
        return super().embed_patches(pixel_values[:, 0::2], patch_embedding)

    def on_embeddings(self, x):
        times = torch.linspace(0, 1, x.shape[1], device=x.device, dtype=x.dtype)
        return x + self.embedding(times[:, None, None])

    def start(self, x):
        return x.new_zeros(x.shape[0], x.shape[-1])

    def before_attention(self, i, x, state, attend):
        return x + self.scale * attend(x.transpose(1, 2)).transpose(1, 2)  # over time, place by place

    def branch_in(self, i, h):
        return h if self.adapters is None else h + self.adapters[i - 1](h)

    def key_value(self, i, k, v, state):
        return k.roll(1, dims=1), v

    def branch_out(self, i, h):
        return h * self.scale

    def before_mlp(self, i, x, state):
        return x + state.grid[0]

    def mlp(self, i, h, mlp):
        return mlp(h) + self.parallel(h)

    def after_block(self, i, x, state, side):
        return side + self.query(x).mean(dim=(1, 2))

    def pool(self, x, side, post_layernorm):
        return super().pool(x, side, post_layernorm) + side + self.last(side)

    def trained_parameters(self):
        return ["post_layernorm"]

    def merge(self, layers):
        for layer, adapter in zip(layers, self.adapters, strict=True):
            fold = torch.eye(adapter.in_features) + adapter.weight
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.data += projection.weight.data @ adapter.bias.data
                projection.weight.data = projection.weight.data @ fold.data
        return {"scale": self.scale, "merged": True}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(COMPRESSIONS, "keep", KeepLargestKeys)
    monkeypatch.setitem(ADAPTATIONS, "everything", UseEverything)


CASES = {
    "keep": {"compression": "keep", "compression_layers": [2, 3], "compression_options": {"keep": 7}},
    "everything": {"compression": "none", "adaptation": "everything"},
    "both": {"compression": "inti", "compression_layers": [1], "adaptation": "everything"},
}


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_and_compiling_change_nothing(name, tiny_config):
    model = InTIClipForVideoClassification(tiny_config(**CASES[name])).train()
    pixel_values, labels = torch.randn(2, 8, 3, 32, 32), torch.tensor([1, 2])

    def gradients(run):
        model.zero_grad()
        run(pixel_values, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(model)
    ways = [gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))]
    model.activation_checkpointing_enable()
    ways.append(gradients(model))
    for other in ways:
        assert other.keys() == plain.keys()
        for n, gradient in plain.items():
            torch.testing.assert_close(other[n], gradient, rtol=1e-4, atol=1e-6, msg=n)


def test_pruning_inside_blocks(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(**CASES["keep"])).eval()
    model.set_attn_implementation("eager")
    out = model(torch.randn(2, 8, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    assert [h.shape[2] for h in out.hidden_states] == [17, 17, 8, 8, 8]
    assert [a.shape[-1] for a in out.attentions] == [17, 17, 8, 8]


def test_every_hook_of_an_adaptation_is_used(tiny_config):
    model = InTIClipForVideoClassification(tiny_config(**CASES["everything"]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.vision_model.adaptation.last.weight.normal_()
    out = model(torch.randn(2, 8, 3, 32, 32), output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in out.hidden_states] == [4] * 5  # halved by the patch embedding
    assert [a.shape[0] for a in out.attentions] == [2 * 4] * 4  # the spatial ones only
    out.logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = ("vision_model.adaptation.", "vision_model.post_layernorm.", "classifier.")
    assert all(name.startswith(expected) for name in trained)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name


def test_merged_adapters_are_saved_as_such(tiny_config, tmp_path):
    model = InTIClipForVideoClassification(tiny_config(**CASES["everything"])).double().eval()
    pixel_values = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        # `attend` does not pass through the adapters, so that this one can be folded exactly only without it.
        model.vision_model.adaptation.scale = 0.0
        before = model(pixel_values).logits
        count = sum(p.numel() for p in model.parameters())
        model.merge_adapters()
        torch.testing.assert_close(model(pixel_values).logits, before, rtol=0, atol=1e-10)
    assert sum(p.numel() for p in model.parameters()) < count
    assert model.config.adaptation_options == {"scale": 0.0, "merged": True}
    model.save_pretrained(tmp_path)
    loaded = InTIClipForVideoClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(pixel_values).logits, before, rtol=0, atol=1e-10)


def test_nothing_to_merge_is_said(tiny_config):
    with pytest.raises(ValueError, match="NoAdaptation has no adapters"):
        InTIClipForVideoClassification(tiny_config()).merge_adapters()


def test_combinations_and_frames_are_checked(tiny_config):
    with pytest.raises(ValueError, match="for adaptation 'everything', got 'keep', which does not"):
        tiny_config(compression="keep", adaptation="everything")
    with pytest.raises(ValueError, match="multiple of 8 .*got 12; .* 8 and 16"):
        tiny_config(compression="inti", adaptation="everything", num_frames=12)
    with pytest.raises(ValueError, match="KeepLargestKeys has no option 'kept'; its options are keep"):
        tiny_config(compression="keep", compression_options={"kept": 3})
