"""Converts the authors' weights of UniFormerV2, ZeroI2V, AIM and ST-Adapter on CLIP to this package's names.

All four extend OpenAI's CLIP and keep its parameter names, under a prefix; each method is recognised by the parameters
it adds.
"""

import re
from collections.abc import Collection

import torch


BLOCK = r"transformer\.resblocks\.(\d+)\."
# (released name, name in InTIClipVisionModel) of parameters whose values are unchanged
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


def detect_adaptation(names: Collection[str]) -> str:
    """The key of `METHODS` that these released parameter names belong to. Raises ValueError if there is none."""
    signs = {  # the first found counts; a merged ZeroI2V only adds a temporal embedding
        "uniformerv2": "transformer.dec.",
        "st_adapter": ".adapter_pre_",
        "aim": ".T_Adapter.",
        "zeroi2v": "temporal_embedding",
    }
    for method, sign in signs.items():
        if any(sign in name for name in names):
            return method
    raise ValueError(
        f"weights must be of UniFormerV2, ZeroI2V, AIM or ST-Adapter on CLIP, got {len(names)} parameters without any "
        "of their modules; load a plain CLIP checkpoint with InTIClipVisionConfig.from_clip."
    )


def strip_prefix(state_dict: dict) -> dict:
    """Remove the prefix of CLIP's names (such as "backbone."); a head outside it is renamed to "classifier."."""
    anchors = [name for name in state_dict if name.endswith("class_embedding")]
    if len(anchors) != 1:
        raise ValueError(f"weights must have one class_embedding, as CLIP has, got {len(anchors)}.")
    prefix = anchors[0].removesuffix("class_embedding")
    head = re.compile(r"^(module\.)?cls_head\.fc_cls\.")
    stripped = {}
    for name, value in state_dict.items():
        if head.match(name):
            stripped[head.sub("classifier.", name)] = value
        elif name.startswith(prefix):
            stripped[name.removeprefix(prefix)] = value
        else:
            raise ValueError(f"parameters must be CLIP's, under {prefix!r}, or a known head's, got {name}.")
    return stripped


def rename(name: str, method: str) -> str:
    """Our name of a released parameter. Raises ValueError for an unknown one."""
    for pattern, ours in [*METHODS[method], *CLIP]:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name, count=1).replace(".D_fc1.", ".down.").replace(".D_fc2.", ".up.")
    if name.startswith("classifier."):
        return name
    raise ValueError(f"parameters must be those of {method} on CLIP as released, got {name}.")


def convert_state_dict(state_dict: dict, method: str) -> dict:
    """Released parameters (without a prefix) as those of InTIClipForVideoClassification, in at least float32.

    CLIP's projection and logit scale, which our model does not use, are dropped. Raises ValueError for an unknown
    parameter.
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
        if method == "st_adapter":  # we number the adapters, they number the blocks
            ours = re.sub(r"(adaptation\.pre_\w+)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) - first}", ours)
        converted[ours] = value
    return {name if name.startswith("classifier.") else f"vision_model.{name}": v for name, v in converted.items()}


def infer_config(state_dict: dict, method: str, num_frames: int | None = None) -> dict:
    """The fields of InTIClipVisionConfig that released parameters (without a prefix) determine.

    Others keep their defaults: which blocks UniFormerV2 reads (the last), ZeroI2V's heads and scale, AIM's scale. Heads
    are 64 wide, as in every CLIP. `num_frames` is required unless there is a temporal embedding.
    """
    signs = {"uniformerv2": "transformer.dec.", "st_adapter": ".adapter_pre_"}
    for part in ("conv1.weight", "positional_embedding", "transformer.resblocks.", signs.get(method, "")):
        if not _has(state_dict, part):
            raise _not_of(method, part)
    patches = state_dict["conv1.weight"]  # (width, channels, [taps in time,] patch, patch)
    width, patch = patches.shape[0], patches.shape[-1]
    places = state_dict["positional_embedding"].shape[0] - 1
    depth = _count(state_dict, BLOCK)
    heads = [
        state_dict[name] for name in ("transformer.proj.2.bias", "fc.bias", "classifier.bias") if name in state_dict
    ]
    return {
        "hidden_size": width,
        "intermediate_size": _shape(state_dict, "mlp.c_fc.bias", method)[0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(width // 64, 1),
        "image_size": round(places**0.5) * patch,
        "patch_size": patch,
        "num_channels": patches.shape[1],
        "num_frames": _infer_num_frames(state_dict, num_frames),
        "compression": "none",
        "adaptation": method,
        "adaptation_options": _infer_options(state_dict, method, width, depth),
        **({"num_labels": heads[0].shape[0]} if heads else {}),
    }


def _infer_num_frames(state_dict: dict, num_frames: int | None) -> int:
    if "temporal_embedding" in state_dict:
        trained = state_dict["temporal_embedding"].shape[1]
        if num_frames not in (None, trained):
            raise ValueError(f"num_frames must be {trained} for these weights, got {num_frames}; leave it out.")
        return trained
    if num_frames is None:
        raise ValueError("num_frames must be given for weights without a temporal embedding, got none.")
    return num_frames


def _infer_options(state_dict: dict, method: str, width: int, depth: int) -> dict:
    """The adaptation's options that the shapes and names of its parameters determine."""
    if method == "uniformerv2":
        return _uniformerv2_options(state_dict, method, width)
    if method == "zeroi2v" and not _has(state_dict, "S_Adapter"):
        return {"merged": True}
    if method in ("zeroi2v", "aim"):
        hidden = _shape(state_dict, "S_Adapter.D_fc1.bias", method)[0]
        second = "MLP_Adapter_out." if method == "zeroi2v" else "T_Adapter_in."
        return {
            "ratio": 0.25 if hidden == int(0.25 * width) else (hidden + 0.5) / width,
            "num_tadapter": 2 if _has(state_dict, second) else 1,
        }
    one = "adapter_pre_mlp" if _has(state_dict, "adapter_pre_mlp") else "adapter_pre_attn"
    first = min(int(i) for name in state_dict for i in re.findall(BLOCK + "adapter_pre_", name))
    return {
        "width": _shape(state_dict, f"{one}.fc1.bias", method)[0],
        "pre_attention": _has(state_dict, "adapter_pre_attn"),
        "pre_mlp": _has(state_dict, "adapter_pre_mlp"),
        "num_layers": depth - first,
        "kernel_size": list(_shape(state_dict, f"{one}.conv.weight", method)[2:]),
    }


def _uniformerv2_options(state_dict: dict, method: str, width: int) -> dict:
    options: dict = {"global_layers": _count(state_dict, DECODER)}
    options["local"] = "none"
    if _has(state_dict, ".lmhra1."):
        options["local"] = "double" if _has(state_dict, ".lmhra2.") else "single"
        reduced = _shape(state_dict, "lmhra1.pos_embed.1.bias", method)[0]
        if reduced != int(width // 1.5):
            options["reduction"] = width / (reduced + 0.5)  # int(width // reduction) is `reduced` despite rounding
    patches = state_dict["conv1.weight"]
    options["temporal_downsample"] = patches.dim() == 5 and patches.shape[2] == 3
    options["frozen"] = "transformer.balance" not in state_dict
    return options


def _has(state_dict: dict, part: str) -> bool:
    return any(part in name for name in state_dict)


def _count(state_dict: dict, pattern: str) -> int:
    """The number of blocks whose names match, which are numbered from 0."""
    return 1 + max(int(i) for name in state_dict for i in re.findall(pattern, name))


def _shape(state_dict: dict, suffix: str, method: str) -> torch.Size:
    for name, value in state_dict.items():
        if name.endswith(suffix):
            return value.shape
    raise _not_of(method, suffix)


def _not_of(method: str, part: str) -> ValueError:
    return ValueError(f"weights must be of {method} on CLIP, got none with {part} in its name.")
