"""Small video models of transformers and torchvision with weights that have the names of STA's and STTS's authors."""

import re

import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from torchvision_models import load


# Their names -> the library's, all that fit, in this order.
VIDEOMAE = {
    r"^patch_embed\.proj": "videomae.embeddings.patch_embeddings.projection",
    r"^blocks": "videomae.encoder.layer",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.(query|key|value)\.": r".attention.attention.\1.",
    r"\.attn\.q_bias": ".attention.attention.query.bias",
    r"\.attn\.v_bias": ".attention.attention.value.bias",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    r"^head\.": "classifier.",
}
STTS = {
    r"^time_score_predictor\.(\d+)\.score_network": r"compression.temporal.\1.scorer",
    r"^space_score_predictor\.(\d+)\.score_network": r"compression.spatial.\1.scorer",
    r"\.in_conv\.0\.": ".norm.",
    r"\.in_conv\.1\.": ".local.",
    r"\.out_conv\.0\.": ".hidden1.",
    r"\.out_conv\.2\.": ".hidden2.",
    r"\.out_conv\.4\.": ".score.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}
MVIT = STTS | {
    r"^patch_embed\.proj": "conv_proj",
    r"^cls_token": "pos_encoding.class_token",
    r"^pos_embed_(\w+)": r"pos_encoding.\1_pos",
    r"\.attn\.proj\.": ".attn.project.0.",
    r"\.attn\.pool_(.)\.": r".attn.pool_\1.pool.",
    r"\.attn\.norm_(.)\.": r".attn.pool_\1.norm_act.0.",
    r"^(blocks\.\d+)\.proj\.": r"\1.project.",
    r"^head\.projection": "head.1",
}
VIDEOSWIN = STTS | {
    r"^layers\.(\d+)\.blocks\.": lambda found: f"features.{2 * int(found[1])}.",
    r"^layers\.(\d+)\.downsample\.": lambda found: f"features.{2 * int(found[1]) + 1}.",
}


def renamed(weights: dict[str, torch.Tensor], names: dict) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def videomae(
    params: dict[str, torch.Tensor], *, image, patch: int, frames: int, width: int, heads: int, depth: int
) -> VideoMAEForVideoClassification:
    """With these weights, in float64."""
    weights = {}
    for name, value in params.items():
        if name.endswith(".qkv.weight"):
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            weights |= {name.replace("qkv", part): chunk for part, chunk in parts}
        elif name != "pos_embed_sincos":
            weights[name] = value
    config = VideoMAEConfig(
        image_size=image,
        patch_size=patch,
        num_frames=frames,
        tubelet_size=params["patch_embed.proj.weight"].shape[2],
        hidden_size=width,
        intermediate_size=params["blocks.0.mlp.fc1.bias"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=heads,
        qkv_bias="blocks.0.attn.q_bias" in params,
        layer_norm_eps=1e-6,
        num_labels=params["head.bias"].shape[0],
    )
    model = VideoMAEForVideoClassification(config).double().eval()
    model.fc_norm.eps = 1e-6
    model.load_state_dict(renamed(weights, VIDEOMAE))
    return model


def mvit(width: int, classes: int) -> nn.Module:
    """Four blocks on 8 frames of 32 x 32 pixels; the second doubles the width and halves the grid."""
    module, pool = load(), [1, 2, 2]
    block = module.mvit.MSBlockConfig
    blocks = [
        block(1, width, 2 * width, [], [3, 3, 3], [], pool),
        block(2, 2 * width, 2 * width, [3, 3, 3], [3, 3, 3], pool, [1, 1, 1]),
        *(block(2, 2 * width, 2 * width, [], [3, 3, 3], [], [1, 1, 1]) for _ in range(2)),
    ]
    model = module.MViT(
        (32, 32), 8, blocks, residual_pool=False, residual_with_cls_embed=False, rel_pos_embed=False,
        proj_after_attn=False, dropout=0.0, num_classes=classes,
    )  # fmt: skip
    for name, part in model.named_modules():
        if ".norm_act." in name:  # the norms after their pooling have torch's own eps
            part.eps = 1e-5
    return model


def mvit_weights(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = renamed(params, MVIT)
    for name in weights:
        if name.startswith("pos_encoding."):  # theirs begin with a batch of one
            weights[name] = weights[name][0, 0] if "class" in name else weights[name][0]
    return weights


def videoswin(width: int, depths: list[int], heads: list[int], window: list[int]) -> nn.Module:
    """Without a head: the average of the grid."""
    model = load().SwinTransformer3d([2, 4, 4], width, depths, heads, window, num_classes=1, stochastic_depth_prob=0.0)
    model.head = nn.Identity()
    return model
