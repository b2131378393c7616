"""Outputs of the authors' own code on random weights and inputs, reproduced in float64.

The vectors are files in $HF_INTI_TEST_DATA/vectors: `in.*`, `param.*`, `out.*` in float32 and, of some, `out64.*` from
the same code in float64. Each says in its metadata of which method and case it is, and with which options.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import released_models
from hf_inti import InTIClipForVideoClassification, InTIClipVisionConfig, InTIClipVisionModel
from hf_inti.hosts import compress
from hf_inti.model import compression_stts as stts
from hf_inti.model import compression_tome as tome
from hf_inti.model.adaptation_st_adapter import SpatioTemporalAdapter
from hf_inti.model.adaptation_uniformerv2 import GlobalBlock, LocalMHRA
from hf_inti.model.adaptation_zeroi2v import shift_frames
from hf_inti.model.compression_sta import prune
from hf_inti.model.methods import TokenState
from hf_inti.model.modeling_inti_clip import InTIClipAttention
from hf_inti.papers.conversion import convert_state_dict, infer_config


FOLDER = Path(os.environ.get("HF_INTI_TEST_DATA") or "not-set") / "vectors"
FILES = sorted(FOLDER.glob("*.safetensors"))


class Vector:
    """One file. Inputs, weights and expectations as float64; `check` compares an output by name."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.method, self.case = metadata["method"], metadata["case"]
        self.options = json.loads(metadata["options"])
        self.checked: set[str] = set()

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        tensors = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.group("in.")

    @property
    def params(self) -> dict[str, torch.Tensor]:
        return self.group("param.")

    def check(self, name: str, got: torch.Tensor) -> None:
        """Compare with out64.* where it exists, else with out.*; what the file does not hold is not looked at."""
        if f"out.{name}" not in self.tensors:
            return
        self.checked.add(name)
        exact = self.tensors.get(f"out64.{name}")
        wanted = self.tensors[f"out.{name}"] if exact is None else exact
        if not wanted.is_floating_point():
            assert torch.equal(got.long(), wanted.long()), f"{name}: {got} instead of {wanted}"
        elif exact is not None:
            assert_close(got, exact.double(), rtol=0, atol=1e-9, msg=lambda m: f"{name}: {m}")
        else:  # only computed in float32 by the authors' code
            assert_close(got, wanted.double(), rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


def frames_first(x: torch.Tensor, T: int) -> torch.Tensor:
    """(tokens, B * T, C), column b * T + t, -> (B, T, tokens, C)."""
    return x.transpose(0, 1).unflatten(0, (-1, T))


def frames_last(x: torch.Tensor) -> torch.Tensor:
    """(B, T, tokens, C) -> (tokens, B * T, C)."""
    return x.flatten(0, 1).transpose(0, 1)


def square(tokens: int) -> tuple[int, int]:
    """The grid of so many patches; of methods that do not look at it, one row will do."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else (1, tokens)


def clip_block(v: Vector, method: str, options: dict, T: int, tokens: int) -> InTIClipVisionModel:
    """A tower of one block, which has a released block's weights."""
    o = v.options
    config = InTIClipVisionConfig(
        hidden_size=o["C"],
        intermediate_size=v.params["mlp.c_fc.bias"].shape[0],
        num_hidden_layers=1,
        num_attention_heads=o["heads"],
        image_size=4,
        patch_size=4,
        num_frames=T,
        compression="none",
        adaptation=method,
        adaptation_options=options,
    )
    model = InTIClipVisionModel(config).double().eval()
    released = {f"transformer.resblocks.0.{name}": value for name, value in v.params.items()}
    load(model, {n.removeprefix("vision_model."): t for n, t in convert_state_dict(released, method).items()})
    return model


def load(model: nn.Module, state_dict: dict) -> None:
    """Every one of the given weights has a place; those without one given are not used by the test."""
    assert not model.load_state_dict(state_dict, strict=False).unexpected_keys


def run_block(model: InTIClipVisionModel, x: torch.Tensor) -> torch.Tensor:
    state = TokenState(num_class_tokens=1, grid=square(x.shape[2] - 1))
    return model.encoder.layers[0](x, state, model.compression, model.adaptation)[0]


def clip_model(v: Vector, method: str, num_attention_heads: int, **options) -> InTIClipForVideoClassification:
    """The model that a released state dict tells of, with what it does not tell given."""
    fields = infer_config(v.params, method, num_frames=v.inputs["pixels"].shape[2])
    for name, value in options.items():  # what the weights do tell agrees with the vector's options
        assert fields["adaptation_options"].get(name, value) == value
    fields["adaptation_options"].update(options)
    model = InTIClipForVideoClassification(
        InTIClipVisionConfig(**{**fields, "num_attention_heads": num_attention_heads})
    )
    model = model.double().eval()
    load(model, convert_state_dict(v.params, method))
    return model


def run_model(v: Vector, model: InTIClipForVideoClassification):
    return model(v.inputs["pixels"].transpose(1, 2), output_hidden_states=True)


# AIM


def aim_block(v: Vector) -> None:
    o = v.options
    x = frames_first(v.inputs["x"], o["T"])
    ratio = (v.params["S_Adapter.D_fc1.bias"].shape[0] + 0.5) / o["C"]
    options = {"num_tadapter": o["num_tadapter"], "scale": o["scale"], "ratio": ratio}
    model = clip_block(v, "aim", options, o["T"], o["tokens"])
    v.check("y", frames_last(run_block(model, x)))


def aim_model(v: Vector) -> None:
    o = v.options
    model = clip_model(v, "aim", o["heads"], num_tadapter=o["num_tadapter"], scale=o["adapter_scale"])
    out = model.vision_model(v.inputs["pixels"].transpose(1, 2), output_hidden_states=True)
    for i in range(o["layers"]):
        v.check(f"block_out.{i}", frames_last(out.hidden_states[i + 1]))
    v.check("cls_per_frame", model.vision_model.post_layernorm(out.last_hidden_state[:, :, 0]))
    v.check("video_feature", out.pooler_output)


# STA


def sta_prune(v: Vector) -> None:
    o = v.options
    x, metric = (v.inputs[name].unflatten(1, (o["T_groups"], o["N_per_group"])) for name in ("x", "metric"))
    kept = prune(x, metric, o["r"], {"forward": "F", "backward": "B"}[o["direction"]])
    starts = torch.arange(o["T_groups"])[:, None] * o["N_per_group"]
    v.check("kept_index", (kept + starts).flatten(1))
    v.check("x", x.gather(2, kept[..., None].expand(-1, -1, -1, o["C"])).flatten(1, 2))


def sta_vit(v: Vector) -> None:
    o = v.options
    sizes = {"image": o["img"], "patch": o["patch"], "width": o["C"], "heads": o["heads"], "depth": o["depth"]}
    model = released_models.videomae(v.params, frames=v.inputs["pixels"].shape[2], **sizes)
    assert torch.equal(model.videomae.embeddings.position_embeddings.double(), v.params["pos_embed_sincos"])
    assert [i + 1 for i in o["prune_after_block"]] == [1 + s * o["depth"] // 3 for s in range(3)]
    groups = o["groups"][0]
    assert o["groups"] == [groups, groups // 2, groups // 4]  # the released schedule
    before, after = {}, {}  # pruning
    for i, layer in enumerate(model.videomae.encoder.layer):
        for module, outputs in ((layer.output, before), (layer, after)):
            module.register_forward_hook(lambda module, args, output, outputs=outputs, i=i: outputs.update({i: output}))
    order = "-".join(letter for letter in o["order"] if letter in "FB")
    compress(model, "sta", r=o["r"], schedule="released", order=order, groups=groups)
    v.check("logits", model(v.inputs["pixels"].transpose(1, 2)).logits)
    for i in range(o["depth"]):
        v.check(f"merge_in.{i}", before[i])
        v.check(f"block_out.{i}", before[i])
        v.check(f"merge_out.{i}", after[i])


# ST-Adapter


def st_adapter_alone(v: Vector) -> None:
    o = v.options
    adapter = SpatioTemporalAdapter(o["C"], o["Ca"], o["kernel"]).double()
    adapter.load_state_dict({n.replace("fc1.", "down.").replace("fc2.", "up."): value for n, value in v.params.items()})
    x = v.inputs["x"].unflatten(0, (o["B"], o["T"]))
    state = TokenState(num_class_tokens=1, grid=square(x.shape[2] - 1))
    y = torch.cat([x[:, :, :1], x[:, :, 1:] + adapter(x[:, :, 1:], state)], dim=2)
    v.check("y", y.flatten(0, 1))


def st_adapter_model(v: Vector) -> None:
    o = v.options
    told = {"width": o["adapter_width"], "num_layers": o["adapter_layers"], "kernel_size": o["kernel"]}
    told.update(pre_attention=o["pre_attn"], pre_mlp=o["pre_mlp"])
    out = run_model(v, clip_model(v, "st_adapter", o["heads"], **told))
    for i in range(o["layers"]):
        v.check(f"block_out.{i}", frames_last(out.hidden_states[i + 1]))
    v.check("logits", out.logits)


# STTS


def scorer_weights(params: dict) -> dict:
    names = {
        "in_conv.0.": "norm.",
        "in_conv.1.": "local.",
        "out_conv.0.": "hidden1.",
        "out_conv.2.": "hidden2.",
        "out_conv.4.": "score.",
    }
    return {
        new + name.removeprefix(old): value
        for name, value in ((n.removeprefix("score_network."), value) for n, value in params.items())
        for old, new in names.items()
        if name.startswith(old)
    }


def stts_scorer(v: Vector) -> None:
    scorer = stts.ReleasedScorer(v.options["C"]).double()
    scorer.load_state_dict(scorer_weights(v.params))
    scores = scorer(v.inputs["x"])
    v.check("scores_raw", scores[..., None])
    v.check("scores_minmax", stts.min_max(scores))


def stts_perturbed(v: Vector) -> None:
    scores = v.inputs["scores"].requires_grad_()
    k = v.options["k"]
    indicators = stts.perturbed_topk(scores, k, v.options["sigma"], noise=v.inputs["noise"])
    (indicators * v.inputs["grad_output"]).sum().backward()
    # The authors' code takes this mean over n draws in float32, in its float64 run too: compare the counts, exactly.
    wanted = v.tensors.get("out64.indicators", v.tensors["out.indicators"])
    counts = wanted.double() * v.options["n"]
    assert_close(counts.round(), counts, rtol=0, atol=1e-2)
    assert_close(indicators.detach() * v.options["n"], counts.round(), rtol=0, atol=1e-9)
    v.checked.add("indicators")
    v.check("grad_scores", scores.grad)
    v.check("hard_topk_indices", stts.hard_topk(scores.detach(), k))


def stts_temporal(v: Vector) -> None:
    o = v.options
    selection = stts.TemporalSelection(o["C"], "released", stts.PerturbedTopK(o["sigma"], o["n"])).double().eval()
    selection.scorer.load_state_dict(scorer_weights(v.params))
    x = v.inputs["x"].unflatten(1, (o["T"], o["N"]))
    v.check("scores", selection.scores(x))
    v.check("frame_index", stts.hard_topk(selection.scores(x), o["k"]))
    v.check("eval_selected", selection(x, o["k"]).flatten(1, 2))
    v.check("train_selected", selection.train()(x, o["k"], noise=v.inputs["noise"]).flatten(1, 2))


def stts_spatial(v: Vector) -> None:
    o = v.options
    grid, side = (o["H"], o["H"]), int(o["k_patches"] ** 0.5)
    assert side == o["anchor_size"]
    default = max((o["H"] - side) // 2, 1)
    stride = None if o["stride"] == default else o["stride"]
    selection = (
        stts.SpatialSelection(o["C"], "released", stts.PerturbedTopK(o["sigma"], o["n"]), stride).double().eval()
    )
    selection.scorer.load_state_dict(scorer_weights(v.params))
    x = v.inputs["x"].unflatten(1, (o["T"], -1))
    token_scores = selection.token_scores(x)
    anchor_scores = selection.anchor_scores(token_scores, grid, side)
    v.check("token_scores", token_scores.unflatten(2, grid))
    v.check("anchor_scores", anchor_scores)
    v.check("anchor_index", anchor_scores.argmax(dim=-1))
    v.check("eval_selected", selection(x, grid, side).flatten(1, 2))
    v.check("train_selected", selection.train()(x, grid, side, noise=v.inputs["noise"]).flatten(1, 2))


# ToMe


def groups_of(source: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, N) -> the matrix (B, num_tokens, N) of who is in which group."""
    return nn.functional.one_hot(source, num_tokens).transpose(1, 2)


def tome_match(v: Vector) -> None:
    o = v.options
    x, metric = v.inputs["x"], v.inputs["metric"]
    size = v.inputs.get("size", torch.ones_like(x[..., :1]))
    matching = tome.bipartite_soft_matching(
        metric, o["r"], class_token=o["class_token"], distill_token=o["distill_token"]
    )
    merged, sizes = tome.merge_weighted(x, size, matching)
    v.check("x_merged", merged)
    v.check("size_merged", sizes)
    v.check("x_mean_mode", tome.merge(x, matching, "mean"))
    v.check("x_sum_mode", tome.merge(x, matching, "sum"))
    v.check("unm_idx", matching.unm_idx)
    v.check("src_idx", matching.src_idx)
    v.check("dst_idx", matching.dst_idx)
    if o["distill_token"]:
        # The authors' unmerging looks for tokens where they are without a distillation token, and so puts some back at
        # others' places; ours knows where they are.
        own = torch.stack([tome.unmerge(merged, matching)[b, :, 0] for b in range(len(merged))])
        assert_close(own, merged[..., 0].gather(1, matching.target), rtol=0, atol=0)
        U = matching.unm_idx.shape[1]
        there = torch.tensor([0, *range(2, U + 1), 1, *range(U + 1, matching.num_tokens)])  # with it -> without it
        misplaced = matching._replace(target=there.argsort()[matching.target])
        v.check("unmerged", tome.unmerge(merged, misplaced))
    else:
        v.check("unmerged", tome.unmerge(merged, matching))
    v.check("source", groups_of(tome.merge_source(matching), matching.num_tokens).double())


def tome_kth(v: Vector) -> None:
    x = v.inputs["x"]
    matching = tome.kth_bipartite_soft_matching(v.inputs["metric"], v.options["k"])
    merged, sizes = tome.merge_weighted(x, torch.ones_like(x[..., :1]), matching)
    v.check("x_merged", merged)
    v.check("size_merged", sizes)


def tome_vit(v: Vector) -> None:
    """timm's ViT: its embedding and head here, its blocks as those of a tower with the exact GELU."""
    o, p = v.options, v.params
    r = {"int": lambda: o["r"], "tuple": lambda: tuple(o["r"]), "list": lambda: list(o["r"])}[o["r_kind"]]()
    schedule = tome.r_schedule(o["depth"], r)
    if "r_per_layer" in o:
        assert schedule == o["r_per_layer"]
    config = InTIClipVisionConfig(
        hidden_size=o["C"],
        intermediate_size=p["blocks.0.mlp.fc1.bias"].shape[0],
        num_hidden_layers=o["depth"],
        num_attention_heads=o["heads"],
        image_size=o["img"],
        patch_size=o["patch"],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_frames=1,
        compression="tome",
        compression_options={"r": schedule, "prop_attn": o["prop_attn"]},
    )
    model = InTIClipVisionModel(config).double().eval()
    names = {"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.proj.": "self_attn.out_proj.", "mlp.": "mlp."}
    weights = {}
    for name, value in p.items():
        if not name.startswith("blocks."):
            continue
        _, i, rest = name.split(".", 2)
        if rest.startswith("attn.qkv."):
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                weights[f"encoder.layers.{i}.self_attn.{part}_proj.{rest.rsplit('.', 1)[1]}"] = chunk
        for old, new in names.items():
            if rest.startswith(old):
                weights[f"encoder.layers.{i}.{new}{rest.removeprefix(old)}"] = value
    load(model, weights)
    x = nn.functional.conv2d(
        v.inputs["pixels"], p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=o["patch"]
    )
    leading = [p[name].expand(x.shape[0], -1, -1) for name in ("cls_token", "dist_token") if name in p]
    x = torch.cat([*leading, x.flatten(2).transpose(1, 2)], dim=1) + p["pos_embed"]
    v.check("tokens_in", x)
    x, state = x[:, None], TokenState(num_class_tokens=len(leading), grid=square(x.shape[1] - len(leading)))
    for i, layer in enumerate(model.encoder.layers):
        x, _, state = layer(x, state, model.compression, model.adaptation)
        v.check(f"block_out.{i}", x[:, 0])
        sizes = x.new_ones(1) if state.sizes is None else state.sizes[:, 0, :, None]
        v.check(f"size_after_block.{i}", sizes)
    if state.source is not None:  # something was merged
        v.check("source", groups_of(state.source[:, 0], x.shape[2]).double())
    x = nn.functional.layer_norm(x[:, 0], x.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-6)
    logits = nn.functional.linear(x[:, 0], p["head.weight"], p["head.bias"])
    if "head_dist.weight" in p:
        logits = (logits + nn.functional.linear(x[:, 1], p["head_dist.weight"], p["head_dist.bias"])) / 2
    v.check("logits", logits)


# UniFormerV2


def local_kind(o: dict) -> str:
    return "none" if o["no_lmhra"] else "double" if o["double_lmhra"] else "single"


def uniformerv2_local(v: Vector) -> None:
    o = v.options
    unit = LocalMHRA(o["C"], o["dw_reduction"]).double()
    start = "vision_model.adaptation.local1.0."
    released = {f"transformer.resblocks.0.lmhra1.{name}": value for name, value in v.params.items()}
    unit.load_state_dict(
        {name.removeprefix(start): value for name, value in convert_state_dict(released, "uniformerv2").items()}
    )
    x = v.inputs["x"].permute(0, 2, 3, 4, 1).flatten(2, 3)  # (N, C, T, H, W) -> (N, T, H * W, C)
    state = TokenState(num_class_tokens=0, grid=(o["H"], o["H"]))

    def volume(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(2, state.grid).permute(0, 4, 1, 2, 3)

    v.check("y_eval", volume(unit.eval()(x, state)))
    v.check("y_train", volume(unit.train()(x, state)))
    v.check("running_mean_after", unit.norm.running_mean)
    v.check("running_var_after", unit.norm.running_var)


def uniformerv2_block(v: Vector) -> None:
    o = v.options
    x = frames_first(v.inputs["x"], o["T"])
    options = {"local": local_kind(o), "reduction": o["dw_reduction"], "global_layers": 1}
    v.check("y", frames_last(run_block(clip_block(v, "uniformerv2", options, o["T"], x.shape[2]), x)))


def uniformerv2_global(v: Vector) -> None:
    o = v.options
    if o.get("mlp_factor", 4.0) != 4.0:
        pytest.skip("out of scope: the MLP of every released global block is four times as wide as the model")
    block = GlobalBlock(o["C"], o["heads"]).double().eval()
    start = "vision_model.adaptation.global_blocks.0."
    released = {f"transformer.dec.0.{name}": value for name, value in v.params.items()}
    load(
        block,
        {name.removeprefix(start): value for name, value in convert_state_dict(released, "uniformerv2").items()},
    )
    tokens = v.inputs["tokens"].transpose(0, 1)
    queries = v.inputs["query"]  # (Q, N, C): each looks at the tokens by itself
    v.check("attn_only", torch.stack([block.attention(query, tokens) for query in queries]))
    v.check("y", torch.stack([block.read(query, tokens) for query in queries]))


def uniformerv2_model(v: Vector) -> None:
    o = v.options
    told = {"local": local_kind(o), "temporal_downsample": o["temporal_downsample"], "frozen": o["frozen"]}
    told["reduction"] = o["dw_reduction"]
    fields = infer_config(v.params, "uniformerv2", num_frames=o["T"])["adaptation_options"]
    assert fields.pop("global_layers") == len(o["return_list"])
    if "reduction" in fields:  # told by the width inside, so not to the last digit
        assert o["C"] // fields.pop("reduction") == o["C"] // o["dw_reduction"]
    assert all(told[name] == value for name, value in fields.items())
    config = InTIClipVisionConfig(
        **{
            **infer_config(v.params, "uniformerv2", num_frames=o["T"]),
            "num_attention_heads": o["heads"],
            "adaptation_options": {**told, "global_layers": [i + 1 for i in o["return_list"]]},
        }
    )
    model = InTIClipForVideoClassification(config).double().eval()
    load(model, convert_state_dict(v.params, "uniformerv2"))
    adaptation, seen = model.vision_model.adaptation, {}
    for j, block in enumerate(adaptation.global_blocks):
        block.register_forward_hook(lambda module, args, output, j=j: seen.update({j: output}))
    adaptation.norm.register_forward_pre_hook(lambda module, args: seen.update(fused=args[0]))
    out = run_model(v, model)
    v.check("logits", out.logits)
    v.check("fused_feature", seen["fused"])
    v.check("tokens_in", frames_last(out.hidden_states[0]))
    for i in range(o["layers"]):
        v.check(f"block_out.{i}", frames_last(out.hidden_states[i + 1]))
    for j in range(len(o["return_list"])):
        v.check(f"global_query_after.{j}", seen[j][None])


# ZeroI2V


def zeroi2v_heads(cfg: dict, width: int, heads: int) -> list:
    """The released options of the shift as pairs [offset, number of heads], which may be parts of heads.

    Groups of channels that would go past the last one are cut, as slices are there.
    """
    short, long = cfg.get("shift_div", 12), cfg.get("long_shift_div", -1)
    groups = []
    if short > 0:
        stride = cfg.get("shift_stride", 1)
        groups += [(-stride, width // short), (stride, width // short)]
    if long > 0:
        groups += [(-2, width // long)]
        if cfg.get("long_shift_right"):
            groups += [(2, width // long)]
    pairs, left = [], width
    for offset, channels in groups:
        channels = min(channels, left)
        left -= channels
        if channels:
            pairs.append([offset, channels * heads / width])
    return pairs


def zeroi2v_stdha(v: Vector) -> None:
    o = v.options
    groups = [(offset, end - start) for start, end, offset in o["channel_ranges_from_to_frame_offset"]]
    x = frames_first(v.inputs["x"], o["T"])
    v.check("shifted", frames_last(shift_frames(x, groups)))
    config = InTIClipVisionConfig(
        hidden_size=o["C"], num_attention_heads=o["heads"], num_hidden_layers=1, attn_implementation="sdpa"
    )
    attention = InTIClipAttention(config).double().eval()
    released = {f"transformer.resblocks.0.attn.{name}": value for name, value in v.params.items()}
    start = "vision_model.encoder.layers.0.self_attn."
    attention.load_state_dict(
        {name.removeprefix(start): value for name, value in convert_state_dict(released, "zeroi2v").items()}
    )
    y, *_ = attention(x, key_value=lambda k, value: (shift_frames(k, groups), shift_frames(value, groups)))
    v.check("y", frames_last(y))


def zeroi2v_block(v: Vector) -> None:
    o = v.options
    options = {
        "heads": zeroi2v_heads(o["stdha_cfg"], o["C"], o["heads"]),
        "scale": o["adapter_scale"],
        "num_tadapter": o["num_tadapter"],
        "ratio": o["mlp_ratio"],
    }
    x = frames_first(v.inputs["x"], o["T"])
    model = clip_block(v, "zeroi2v", options, o["T"], o["tokens"])
    v.check("y", frames_last(run_block(model, x)))
    model.merge_adapters()
    v.check("y_after_merge", frames_last(run_block(model, x)))
    merged = {f"transformer.resblocks.0.{name}": value for name, value in v.group("merged.").items()}
    state = model.state_dict()
    for name, value in convert_state_dict(merged, "zeroi2v").items():
        assert_close(state[name.removeprefix("vision_model.")], value, rtol=0, atol=1e-6)


def zeroi2v_model(v: Vector) -> None:
    o = v.options
    heads = zeroi2v_heads(o["stdha_cfg"], o["C"], o["heads"])
    model = clip_model(v, "zeroi2v", o["heads"], heads=heads, scale=o["adapter_scale"], num_tadapter=o["num_tadapter"])
    pixel_values = v.inputs["pixels"].transpose(1, 2)
    out = model.vision_model(pixel_values, output_hidden_states=True)
    for i in range(o["layers"]):
        v.check(f"block_out.{i}", frames_last(out.hidden_states[i + 1]))
    v.check("cls_per_frame", model.vision_model.post_layernorm(out.last_hidden_state[:, :, 0]))
    v.check("video_feature", out.pooler_output)
    model.merge_adapters()
    assert_close(model.vision_model(pixel_values).pooler_output, out.pooler_output, rtol=0, atol=1e-9)


CASES = {
    ("AIM", "block"): aim_block,
    ("AIM", "model"): aim_model,
    ("STA", "prune"): sta_prune,
    ("STA", "vit"): sta_vit,
    ("STAdapter", "adapter"): st_adapter_alone,
    ("STAdapter", "model"): st_adapter_model,
    ("STTS", "scorer"): stts_scorer,
    ("STTS", "perturbed"): stts_perturbed,
    ("STTS", "temporal"): stts_temporal,
    ("STTS", "spatial"): stts_spatial,
    ("ToMe", "match"): tome_match,
    ("ToMe", "kth"): tome_kth,
    ("ToMe", "vit"): tome_vit,
    ("UniFormerV2", "local"): uniformerv2_local,
    ("UniFormerV2", "block"): uniformerv2_block,
    ("UniFormerV2", "global"): uniformerv2_global,
    ("UniFormerV2", "model"): uniformerv2_model,
    ("ZeroI2V", "stdha"): zeroi2v_stdha,
    ("ZeroI2V", "block"): zeroi2v_block,
    ("ZeroI2V", "model"): zeroi2v_model,
}


def of_vector(v: Vector):
    for (method, case), function in CASES.items():
        if v.method == method and v.case.startswith(case):
            return function
    pytest.fail(f"no test knows the vectors of {v.method}, {v.case}")


UNSET = pytest.param(None, marks=pytest.mark.skip("HF_INTI_TEST_DATA is not set: it names a folder with vectors/"))


@pytest.mark.parametrize("path", FILES or [UNSET], ids=lambda path: path.stem if path else "unset")
@torch.no_grad()
def test_vector(path):
    v = Vector(path)
    with torch.enable_grad() if v.case.startswith("perturbed") else torch.no_grad():
        of_vector(v)(v)
    outputs = {name.removeprefix("out.") for name in v.tensors if name.startswith("out.")}
    inner = {name for name in outputs if name.startswith("merge_metric.") or name == "tokens_in"}
    assert outputs - v.checked <= inner, f"not looked at: {sorted(outputs - v.checked - inner)}"


def test_there_are_vectors(test_data):
    assert FILES


def test_a_wrong_output_is_noticed(tmp_path):
    exact = torch.randn(3, dtype=torch.float64)
    metadata = {"method": "STTS", "case": "scorer", "options": "{}"}
    save_file({"out.y": exact.float(), "out64.y": exact, "out.i": torch.tensor([1])}, tmp_path / "v", metadata)
    v = Vector(tmp_path / "v")
    v.check("y", exact)
    v.check("i", torch.tensor([1]))
    with pytest.raises(AssertionError, match="y: "):
        v.check("y", exact + 1e-8)
    with pytest.raises(AssertionError, match="i: "):
        v.check("i", torch.tensor([2]))
    assert v.checked == {"y", "i"}
