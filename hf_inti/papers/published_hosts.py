"""The tables of costs that the papers of STA and STTS print of their own models, as data.

STA: Ding et al., "Prune Spatio-temporal Tokens by Semantic-aware Temporal Accumulation" (ICCV 2023), Tables 2 and 3.
Figures are the papers' own: GFLOPs (multiply-adds, norms included) of one clip of 224 x 224.
"""

from typing import NamedTuple


class HostModel(NamedTuple):
    """A model by the class that builds it, its arguments beside the defaults of its paper, and the frames of a clip."""

    kind: str  # VideoMAE (transformers) or VideoSwin (torchvision)
    sizes: dict
    frames: int


class HostRow(NamedTuple):
    """A printed figure; `options` are those of `hf_inti.hosts.compress`, without a method the model itself.

    `reason` is a key of `HOST_REASONS`: why the count is more than 1% off.
    """

    model: str  # a key of `HOST_MODELS`
    setting: str  # as the paper names it
    gflops: float
    method: str | None = None
    options: dict = {}
    reason: str = ""


class HostTable(NamedTuple):
    title: str
    rows: tuple[HostRow, ...]


def _vit(width: int, depth: int, heads: int) -> HostModel:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return HostModel("VideoMAE", sizes | {"intermediate_size": 4 * width, "num_labels": 400}, 16)


def _swin(width: int, depth: int, frames_of_window: int = 8, classes: int = 400) -> HostModel:
    """Three heads for each 96 channels (T and S), four for 128 (B); `depth` blocks in the third stage."""
    heads = width // 32
    sizes = {"embed_dim": width, "depths": [2, 2, depth, 2], "num_heads": [heads * 2**stage for stage in range(4)]}
    return HostModel("VideoSwin", sizes | {"window_size": [frames_of_window, 7, 7], "num_classes": classes}, 32)


HOST_MODELS = {
    "ViT-S": _vit(384, 12, 6),
    "ViT-B": _vit(768, 12, 12),
    "ViT-L": _vit(1024, 24, 16),
    "ViT-H": _vit(1280, 32, 16),
    "VideoSwin-T": _swin(96, 6),
    "VideoSwin-S": _swin(96, 18),
    "VideoSwin-B": _swin(128, 18),
    "VideoSwin-B, SSv2": _swin(128, 18, frames_of_window=16, classes=174),
}


def _sta(model: str, gflops: dict[int, float]) -> tuple[HostRow, ...]:
    """Rows of a model for each r; 0 is the model itself."""
    return tuple(
        HostRow(model, f"r {r}", value, "sta" if r else None, {"r": r} if r else {}) for r, value in gflops.items()
    )


HOST_TABLES = (
    HostTable(
        "Table 2 of the STA paper: VideoMAE",
        (
            *_sta("ViT-S", {0: 57, 32: 42, 48: 35, 64: 29}),
            *_sta("ViT-B", {0: 180, 32: 136, 48: 116, 64: 96}),
            *_sta("ViT-L", {0: 597, 32: 446, 48: 376, 64: 308}),
            *_sta("ViT-H", {0: 1192, 32: 890, 48: 748, 64: 611}),
        ),
    ),
    HostTable(
        "Table 3 of the STA paper: VideoSwin",
        (
            *_sta("VideoSwin-T", {0: 88, 192: 68, 256: 61, 320: 54}),
            *_sta("VideoSwin-S", {0: 166, 192: 121, 256: 106, 320: 91}),
            *_sta("VideoSwin-B", {0: 282, 192: 202, 256: 176, 320: 149}),
            *_sta("VideoSwin-B, SSv2", {0: 321, 192: 241, 256: 215, 320: 188}),
        ),
    ),
)

# Why a count is more than 1% off.
HOST_REASONS = {
    "torchvision": "not counted: torchvision is not installed (hf_inti's extra `hosts`).",
}
