"""UniFormerV2's modules: Li et al., "UniFormerV2: Spatiotemporal Learning by Arming Image ViTs with Video UniFormer"
(ICCV 2023), the "temp" of the InTI paper.

Local MHRA convolves patches over time before the attention of each block and, if doubled, before its MLP. Global blocks
read the outputs of some blocks, after any compression, into one video token, which is fused with the mean class token.
Where tokens do not fill the grid, convolutions see zeros at the empty places.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .layers import depthwise_conv3d, from_grid, to_grid
from .methods import (
    Adaptation,
    NewConv3d,
    NewLinear,
    ResettableModule,
    TokenState,
    Tower,
    ZeroLinear,
    block_rate,
    drop_path,
    is_count,
    is_number,
)


# preset: (share of the blocks, or number, whose outputs are read; local MHRA)
PRESETS = {"k400": (4, "none"), "ssv2": (2 / 3, "double")}
LOCAL = ("none", "single", "double")


class XavierLinear(ResettableModule, nn.Linear):
    """Xavier-uniform weights, zero biases."""

    gain = 1.0

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, self.gain)
        nn.init.zeros_(self.bias)


class PackedXavierLinear(XavierLinear):
    """A third of the released packed projection of queries, keys and values (C -> 3C), initialised as that whole."""

    gain = 2**-0.5  # bound sqrt(6 / (C + 3C)) and not sqrt(6 / (C + C))


class VideoQuery(ResettableModule, nn.Module):
    """The video token's initial value, or the balance of the fusion; both start at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.value = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.value)


class ZeroBiasConv3d(ResettableModule, nn.Conv3d):
    """torch's initial weights; the bias starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class ZeroConv2d(ResettableModule, nn.Conv2d):
    """Starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of tokens (tokens, C) whose running statistics count each batch once, also under checkpointing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Inside a backward pass (a graph task is running) this is activation checkpointing recomputing a batch.
        recomputing = self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not recomputing:
            return super().forward(x)
        mean, var = self.running_mean.clone(), self.running_var.clone()  # copies, updated and discarded
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, training=True, eps=self.eps)


class LocalMHRA(nn.Module):
    """Local multi-head relation aggregator, without its residual, on patch tokens (B, T, N, C)."""

    def __init__(self, width: int, reduction: float = 1.5):
        super().__init__()
        reduced = int(width // reduction)
        self.norm = TokenBatchNorm(width)
        self.reduce = NewLinear(width, reduced)
        self.conv = NewConv3d(reduced, reduced, kernel_size=(3, 1, 1), padding=(1, 0, 0), groups=reduced)
        self.expand = ZeroLinear(reduced, width)

    def forward(self, patches: torch.Tensor, state: TokenState) -> torch.Tensor:
        h = self.norm(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])
        h = from_grid(depthwise_conv3d(to_grid(self.reduce(h), state), self.conv), state)
        return self.expand(h)


class GlobalBlock(GradientCheckpointingLayer):
    """Global UniBlock: the video token g (B, C) attends to all tokens y (B, T, L, C), class tokens included."""

    def __init__(
        self,
        width: int,
        heads: int,
        eps: float = 1e-5,
        mlp_dropout: float = 0.5,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.heads, self.drop_path_rate = heads, drop_path_rate
        self.dpe = ZeroBiasConv3d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm_query = nn.LayerNorm(width, eps=eps)
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        self.q_proj = PackedXavierLinear(width, width)
        self.k_proj = PackedXavierLinear(width, width)
        self.v_proj = PackedXavierLinear(width, width)
        self.out_proj = ZeroLinear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.fc1 = XavierLinear(width, 4 * width)
        self.activation = ACT2FN["quick_gelu"]
        self.dropout = nn.Dropout(mlp_dropout)
        self.fc2 = ZeroLinear(4 * width, width)

    def attention(self, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """g (B, C) and tokens (B, n, C), not yet normalised -> (B, C), without the residual."""
        y = self.norm_tokens(y)
        q = self.q_proj(self.norm_query(g))[:, None]  # one token

        def split(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, tokens, C / H)

        out = nn.functional.scaled_dot_product_attention(split(q), split(self.k_proj(y)), split(self.v_proj(y)))
        return self.out_proj(out.flatten(1))

    def read(self, g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The block without its position embedding, on tokens (B, n, C)."""
        g = g + drop_path(self.attention(g, y), self.drop_path_rate, self.training)
        h = self.fc2(self.dropout(self.activation(self.fc1(self.norm_mlp(g)))))
        return g + drop_path(h, self.drop_path_rate, self.training)

    def forward(self, g: torch.Tensor, y: torch.Tensor, state: TokenState) -> torch.Tensor:
        cls, patches = y[:, :, : state.num_class_tokens], y[:, :, state.num_class_tokens :]
        patches = patches + from_grid(depthwise_conv3d(to_grid(patches, state), self.dpe), state)
        return self.read(g, torch.cat([cls, patches], dim=2).flatten(1, 2))


class UniFormerV2(Adaptation):
    """UniFormerV2 on CLIP.

    Args:
        preset: "k400", 4 global blocks and no local MHRA, or "ssv2", global blocks after the last two thirds of the
            blocks and double local MHRA; what follows replaces parts of it.
        global_layers: how many of the last blocks are read, or which ones, counted from 1. With 0 there is no video
            token: the mean class token is classified, as without this adaptation.
        local: "none", "single" (before attention) or "double" (before the MLP too).
        reduction: of the width inside local MHRA.
        temporal_downsample: the released halving of frames in the patch embedding, a convolution over three.
        frozen: CLIP does not train, and the video token, if there is one, is classified alone.
        mlp_dropout: in the global blocks.
        global_drop_path_rate: stochastic depth of the last global block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        preset: str = "k400",
        global_layers: int | list[int] | None = None,
        local: str | None = None,
        reduction: float = 1.5,
        temporal_downsample: bool = False,
        frozen: bool = False,
        mlp_dropout: float = 0.5,
        global_drop_path_rate: float = 0.0,
    ):
        super().__init__(tower)
        C, depth = tower.hidden_size, tower.num_hidden_layers
        self.rates = [block_rate(tower, i) for i in range(1, depth + 1)]
        self.layers = self._global_layers(tower, preset, global_layers)
        local = PRESETS[preset][1] if local is None else local
        self.local1 = self.local2 = None
        if local != "none":
            self.local1 = nn.ModuleList(LocalMHRA(C, reduction) for _ in range(depth))
        if local == "double":
            self.local2 = nn.ModuleList(LocalMHRA(C, reduction) for _ in range(depth))
        self.before = self.after = None
        if temporal_downsample:
            taps = {"kernel_size": tower.patch_size, "stride": tower.patch_size, "bias": False}
            self.before = ZeroConv2d(tower.num_channels, C, **taps)
            self.after = ZeroConv2d(tower.num_channels, C, **taps)
        last = max(len(self.layers) - 1, 1)
        self.global_blocks = nn.ModuleList(
            GlobalBlock(
                C, tower.num_attention_heads, tower.layer_norm_eps, mlp_dropout, global_drop_path_rate * j / last
            )
            for j in range(len(self.layers))
        )
        self.frozen = frozen
        self.query = self.balance = self.norm = None
        if self.layers:
            self.query = VideoQuery(C)
            self.balance = None if frozen else VideoQuery(C)
            self.norm = nn.LayerNorm(C, eps=tower.layer_norm_eps)

    @staticmethod
    def _global_layers(tower: Tower, preset: str, layers: int | list[int] | None) -> list[int]:
        depth = tower.num_hidden_layers
        if layers is None:
            number = PRESETS[preset][0]
            layers = min(number, depth) if isinstance(number, int) else max(round(number * depth), 1)
        return list(range(depth - layers + 1, depth + 1)) if isinstance(layers, int) else list(layers)

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        depth = tower.num_hidden_layers
        for name, valid in (("preset", tuple(PRESETS)), ("local", (None, *LOCAL))):
            if name in options and options[name] not in valid:
                raise ValueError(
                    f"UniFormerV2 option {name} must be one of {', '.join(map(str, valid))}, got {options[name]!r}."
                )
        layers = options.get("global_layers")
        numbers = [layers] if isinstance(layers, int) else layers
        if layers is not None and (
            isinstance(layers, bool)
            or not isinstance(numbers, (list, tuple))
            or not numbers
            or not all(is_count(i, 0 if isinstance(layers, int) else 1, depth) for i in numbers)
            or sorted(set(numbers)) != list(numbers)
        ):
            raise ValueError(
                f"UniFormerV2 option global_layers must be a number of blocks from 0 to {depth}, or an ascending list "
                f"of blocks counted from 1, got {layers!r}."
            )
        for name in ("temporal_downsample", "frozen"):
            if not isinstance(options.get(name, False), bool):
                raise ValueError(f"UniFormerV2 option {name} must be true or false, got {options[name]!r}.")
        reduction = options.get("reduction", 1.5)
        if not is_number(reduction) or not 0 < reduction <= tower.hidden_size:
            raise ValueError(f"UniFormerV2 option reduction must be above 0 and at most the width, got {reduction!r}.")
        for name in ("mlp_dropout", "global_drop_path_rate"):
            rate = options.get(name, 0.0)
            if not is_number(rate) or not 0 <= rate < 1:
                raise ValueError(f"UniFormerV2 option {name} must be at least 0 and below 1, got {rate!r}.")

    @classmethod
    def frame_multiple(cls, **options) -> int:
        return 2 if options.get("temporal_downsample") else 1

    def embed_patches(self, pixel_values: torch.Tensor, patch_embedding: nn.Conv2d) -> torch.Tensor:
        if self.before is None:
            return super().embed_patches(pixel_values, patch_embedding)
        # A convolution of kernel 3, stride 2 and padding 1 over time, whose middle tap is CLIP's.
        even, odd = pixel_values[:, 0::2], pixel_values[:, 1::2]
        middle = super().embed_patches(even, patch_embedding)
        before = super().embed_patches(odd, self.before)
        before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=1)
        return middle + before + super().embed_patches(odd, self.after)

    def start(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.query is None else self.query.value.expand(x.shape[0], -1)

    def _local(self, units: nn.ModuleList | None, i: int, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        if units is None:
            return x
        cls, patches = x[:, :, : state.num_class_tokens], x[:, :, state.num_class_tokens :]
        patches = patches + drop_path(units[i - 1](patches, state), self.rates[i - 1], self.training)
        return torch.cat([cls, patches], dim=2)

    def before_attention(self, i: int, x, state: TokenState, attend) -> torch.Tensor:
        return self._local(self.local1, i, x, state)

    def before_mlp(self, i: int, x: torch.Tensor, state: TokenState) -> torch.Tensor:
        return self._local(self.local2, i, x, state)

    def after_block(self, i: int, x, state: TokenState, side: torch.Tensor) -> torch.Tensor:
        return self.global_blocks[self.layers.index(i)](side, x, state) if i in self.layers else side

    def fuse(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, L, C) and the video token (B, C) -> (B, C), before the last LayerNorm."""
        if self.balance is None:
            return g
        w = self.balance.value.sigmoid()
        return (1 - w) * g + w * x[:, :, 0].mean(dim=1)

    def pool(self, x: torch.Tensor, side: torch.Tensor | None, post_layernorm: nn.LayerNorm) -> torch.Tensor:
        return self.norm(self.fuse(x, side)) if self.layers else super().pool(x, side, post_layernorm)

    def trained_parameters(self) -> list[str] | None:
        if self.frozen:
            return []
        # CLIP's last LayerNorm has no part in a model with a video token.
        return ["embeddings.", "pre_layrnorm.", "encoder."] if self.layers else super().trained_parameters()
