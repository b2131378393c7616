"""The authors' published weights under this package's names: UniFormerV2, ZeroI2V, AIM and ST-Adapter on CLIP.

All four are built on OpenAI's CLIP and keep its names, behind some prefix; what they add is told by its names.
"""

import re

import torch


BLOCK = r"transformer\.resblocks\.(\d+)\."
# (released name, ours in InTIClipVisionModel), of everything whose values stay as they are
CLIP = [
    (r"class_embedding$", "embeddings.class_embedding"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"ln_post\.", "post_layernorm."),
    (BLOCK + r"ln_1\.", r"encoder.layers.\1.layer_norm1."),
    (BLOCK + r"ln_2\.", r"encoder.layers.\1.layer_norm2."),
    (BLOCK + r"attn\.", r"encoder.layers.\1.self_attn."),
    (BLOCK + r"mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (BLOCK + r"mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
]
DECODER = r"transformer\.dec\.(\d+)\."
METHODS = {
    "uniformerv2": [
        (BLOCK + r"lmhra([12])\.pos_embed\.0\.", r"adaptation.local\2.\1.norm."),
        (BLOCK + r"lmhra([12])\.pos_embed\.1\.", r"adaptation.local\2.\1.reduce."),
        (BLOCK + r"lmhra([12])\.pos_embed\.2\.", r"adaptation.local\2.\1.conv."),
        (BLOCK + r"lmhra([12])\.pos_embed\.3\.", r"adaptation.local\2.\1.expand."),
        (r"transformer\.dpe\.(\d+)\.", r"adaptation.global_blocks.\1.dpe."),
        (DECODER + r"ln_1\.", r"adaptation.global_blocks.\1.norm_query."),
        (DECODER + r"ln_2\.", r"adaptation.global_blocks.\1.norm_mlp."),
        (DECODER + r"ln_3\.", r"adaptation.global_blocks.\1.norm_tokens."),
        (DECODER + r"attn\.", r"adaptation.global_blocks.\1."),
        (DECODER + r"mlp\.c_fc\.", r"adaptation.global_blocks.\1.fc1."),
        (DECODER + r"mlp\.c_proj\.", r"adaptation.global_blocks.\1.fc2."),
        (r"transformer\.temporal_cls_token$", "adaptation.query.value"),
        (r"transformer\.balance$", "adaptation.balance.value"),
        (r"transformer\.proj\.0\.", "adaptation.norm."),
        (r"transformer\.proj\.2\.", "classifier."),
    ],
    "zeroi2v": [
        (r"temporal_embedding$", "adaptation.temporal_embedding.P"),
        (BLOCK + r"T_Adapter_in\.D_fc", r"adaptation.attention_in.\1.D_fc"),
        (BLOCK + r"S_Adapter\.D_fc", r"adaptation.attention_out.\1.D_fc"),
        (BLOCK + r"MLP_Adapter\.D_fc", r"adaptation.mlp_in.\1.D_fc"),
        (BLOCK + r"MLP_Adapter_out\.D_fc", r"adaptation.mlp_out.\1.D_fc"),
    ],
    "aim": [
        (r"temporal_embedding$", "adaptation.temporal_embedding.P"),
        (BLOCK + r"T_Adapter_in\.D_fc", r"adaptation.temporal_in.\1.D_fc"),
        (BLOCK + r"T_Adapter\.D_fc", r"adaptation.temporal_out.\1.D_fc"),
        (BLOCK + r"S_Adapter\.D_fc", r"adaptation.spatial.\1.D_fc"),
        (BLOCK + r"MLP_Adapter\.D_fc", r"adaptation.parallel.\1.D_fc"),
    ],
    "st_adapter": [
        (BLOCK + r"adapter_pre_attn\.fc1\.", r"adaptation.pre_attention.\1.down."),
        (BLOCK + r"adapter_pre_attn\.conv\.", r"adaptation.pre_attention.\1.conv."),
        (BLOCK + r"adapter_pre_attn\.fc2\.", r"adaptation.pre_attention.\1.up."),
        (BLOCK + r"adapter_pre_mlp\.fc1\.", r"adaptation.pre_mlp.\1.down."),
        (BLOCK + r"adapter_pre_mlp\.conv\.", r"adaptation.pre_mlp.\1.conv."),
        (BLOCK + r"adapter_pre_mlp\.fc2\.", r"adaptation.pre_mlp.\1.up."),
        (r"fc\.", "classifier."),
    ],
}


def detect_adaptation(names) -> str:
    """Which of `METHODS` released parameters of these names belong to; a ValueError where none is recognised."""
    signs = {  # the first that is found; a merged ZeroI2V has nothing of its own but its temporal embedding
        "uniformerv2": "transformer.dec.",
        "st_adapter": ".adapter_pre_",
        "aim": ".T_Adapter.",
        "zeroi2v": "temporal_embedding",
    }
    for method, sign in signs.items():
        if any(sign in name for name in names):
            return method
    raise ValueError(
        "these are not the weights of UniFormerV2, ZeroI2V, AIM or ST-Adapter on CLIP: none of their modules is among "
        f"{len(list(names))} parameters; a plain CLIP checkpoint is loaded with InTIClipVisionConfig.from_clip."
    )


def strip_prefix(state_dict: dict) -> dict:
    """Without what stands before CLIP's names (such as "backbone."); a head outside is kept as "classifier."."""
    anchors = [name for name in state_dict if name.endswith("class_embedding")]
    if len(anchors) != 1:
        raise ValueError(f"a CLIP checkpoint has one class_embedding, this one has {len(anchors)}.")
    prefix = anchors[0].removesuffix("class_embedding")
    head = re.compile(r"^(module\.)?cls_head\.fc_cls\.")
    stripped = {}
    for name, value in state_dict.items():
        if head.match(name):
            stripped[head.sub("classifier.", name)] = value
        elif name.startswith(prefix):
            stripped[name.removeprefix(prefix)] = value
        else:
            raise ValueError(f"{name} is neither under {prefix!r}, where CLIP's parameters are, nor a known head.")
    return stripped


def rename(name: str, method: str) -> str:
    """Our name of a released parameter; a ValueError for an unknown one."""
    for pattern, ours in [*METHODS[method], *CLIP]:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1).replace(".D_fc1.", ".down.").replace(".D_fc2.", ".up.")
    if name.startswith("classifier."):
        return name
    raise ValueError(f"{name} is no parameter of {method} on CLIP as it was released.")


def convert_state_dict(state_dict: dict, method: str) -> dict:
    """Released parameters (without a prefix) -> those of InTIClipForVideoClassification, in float32 at least.

    What has no place in our model is left out: UniFormerV2's counters of BatchNorm stay, CLIP's unused last LayerNorm
    and projection go. Raises ValueError for an unknown parameter.
    """
    converted = {}
    first = min((int(i) for name in state_dict for i in re.findall(BLOCK + "adapter_pre_", name)), default=0)
    for name, value in state_dict.items():
        if value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, torch.float32))
        if name in ("proj", "logit_scale"):
            continue
        if name == "conv1.weight":
            if value.dim() == 5 and value.shape[2] == 3:  # three taps in time
                converted["adaptation.before.weight"] = value[:, :, 0].contiguous()
                converted["adaptation.after.weight"] = value[:, :, 2].contiguous()
            value = value[:, :, value.shape[2] // 2].contiguous() if value.dim() == 5 else value
            converted["embeddings.patch_embedding.weight"] = value
            continue
        ours = rename(name, method)
        if ours.endswith((".in_proj_weight", ".in_proj_bias")):
            path, kind = ours.rsplit("in_proj_", 1)
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"{path}{projection}_proj.{kind}"] = part.contiguous()
            continue
        if ours.endswith(".P"):  # (1, T, C)
            value = value.transpose(0, 1).contiguous()
        elif ours.endswith(".query.value"):
            value = value.flatten()
        elif value.dim() == 5 and value.shape[2:] == (1, 1, 1):  # a linear layer written as a convolution
            value = value.flatten(1)
        if method == "st_adapter":  # ours count the adapters, the released ones the blocks
            ours = re.sub(r"(adaptation\.pre_\w+)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) - first}", ours)
        converted[ours] = value
    return {name if name.startswith("classifier.") else f"vision_model.{name}": v for name, v in converted.items()}


def infer_config(state_dict: dict, method: str, num_frames: int | None = None) -> dict:
    """Fields of InTIClipVisionConfig that released parameters (without a prefix) tell.

    What they do not tell keeps its default: which blocks UniFormerV2 reads (the last), ZeroI2V's heads and scale, AIM's
    scale. Heads are 64 wide, as in every CLIP. `num_frames` is needed unless a temporal embedding tells.
    """
    signs = {"uniformerv2": "transformer.dec.", "st_adapter": ".adapter_pre_"}
    for wanted in ("conv1.weight", "positional_embedding", "transformer.resblocks.", signs.get(method, "")):
        if not any(wanted in name for name in state_dict):
            raise ValueError(f"these are not the weights of {method} on CLIP: there is no {wanted} among them.")
    width, channels = state_dict["conv1.weight"].shape[:2]
    patch = state_dict["conv1.weight"].shape[-1]
    taps = state_dict["conv1.weight"].shape[2]  # in time, where it is a 3-d convolution
    places = state_dict["positional_embedding"].shape[0] - 1
    depth = 1 + max(int(i) for name in state_dict for i in re.findall(BLOCK, name))
    if "temporal_embedding" in state_dict:
        told = state_dict["temporal_embedding"].shape[1]
        if num_frames not in (None, told):
            raise ValueError(f"these weights are of {told} frames, got num_frames {num_frames}; leave it out.")
        num_frames = told
    if num_frames is None:
        raise ValueError("these weights do not tell the number of frames they were trained on; give num_frames.")

    def has(part: str) -> bool:
        return any(part in name for name in state_dict)

    def shape(suffix: str):
        for name, value in state_dict.items():
            if name.endswith(suffix):
                return value.shape
        raise ValueError(f"these are not the weights of {method} on CLIP: there is no {suffix} among them.")

    options: dict = {}
    if method == "uniformerv2":
        options["global_layers"] = 1 + max(int(i) for name in state_dict for i in re.findall(DECODER, name))
        options["local"] = "double" if has(".lmhra2.") else "single" if has(".lmhra1.") else "none"
        if has(".lmhra1."):
            reduced = shape("lmhra1.pos_embed.1.bias")[0]
            if reduced != int(width // 1.5):
                options["reduction"] = width / (reduced + 0.5)  # which // takes down to it, whatever the rounding
        options["temporal_downsample"] = state_dict["conv1.weight"].dim() == 5 and taps == 3
        options["frozen"] = "transformer.balance" not in state_dict
    elif method == "zeroi2v" and not has("S_Adapter"):
        options["merged"] = True
    elif method in ("zeroi2v", "aim"):
        hidden = shape("S_Adapter.D_fc1.bias")[0]
        options["ratio"] = 0.25 if hidden == int(0.25 * width) else (hidden + 0.5) / width
        second = "MLP_Adapter_out." if method == "zeroi2v" else "T_Adapter_in."
        options["num_tadapter"] = 2 if has(second) else 1
    elif method == "st_adapter":
        blocks = {int(i) for name in state_dict for i in re.findall(BLOCK + "adapter_pre_", name)}
        one = "adapter_pre_mlp" if has("adapter_pre_mlp") else "adapter_pre_attn"
        options = {
            "width": shape(f"{one}.fc1.bias")[0],
            "pre_attention": has("adapter_pre_attn"),
            "pre_mlp": has("adapter_pre_mlp"),
            "num_layers": depth - min(blocks),
            "kernel_size": list(shape(f"{one}.conv.weight")[2:]),
        }
    heads = [
        state_dict[name] for name in ("transformer.proj.2.bias", "fc.bias", "classifier.bias") if name in state_dict
    ]
    return {
        "hidden_size": width,
        "intermediate_size": shape("mlp.c_fc.bias")[0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(width // 64, 1),
        "image_size": round(places**0.5) * patch,
        "patch_size": patch,
        "num_channels": channels,
        "num_frames": num_frames,
        "compression": "none",
        "adaptation": method,
        "adaptation_options": options,
        **({"num_labels": heads[0].shape[0]} if heads else {}),
    }
