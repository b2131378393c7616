"""InTI-CLIP: CLIP's vision tower on video, with a compression and an adaptation of the user's choice.

B clips, T frames, L tokens per frame (the class token first), D width, H heads. The tower is transformers' own CLIP;
what differs: tokens are carried as (B, T, L, D), attention also returns the keys that some methods read, and the
methods of `compression.py` and `adaptation.py` are called at the hooks of `methods.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
    CLIPVisionModel,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adaptation import ADAPTATIONS
from .compression import COMPRESSIONS
from .configuration_inti_clip import InTIClipVisionConfig
from .fast_paths import (
    Optimizable,
    check_linear,
    chunked_attention,
    fused_linear,
    in_eager_cpu,
    is_plain,
    pack_parameters,
    scaled_mlp,
)
from .methods import (
    Adaptation,
    Compression,
    FrameInterpolation,
    ResettableModule,
    TokenState,
    block_rate,
    check_frames,
    drop_path,
)
from .trained_only import TrainedOnly


@dataclass
class InTIClipVisionOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T', L', D)`): the last block's tokens.
        pooler_output (`torch.FloatTensor` of shape `(B, D)`): the video feature that a classifier sees.
        hidden_states (*optional*): the embeddings, then each block's output before the compression that follows, each
            `(B, T_i, L_i, D)`.
        attentions (*optional*): the spatial attention of each block, `(B * T_i, H, L_i, L_i)`.
        interpolation_weights (*optional*, with `output_interpolation_weights=True`): of each interpolation of frames,
            alpha and beta as `(B, T_out, L, 2)`.
        token_source (*optional*, with `output_token_source=True`, `torch.LongTensor` of shape `(B, T', L)`): in which
            of the last tokens of its frame each of the frame's first ones is, -1 where it was dropped.
    """

    interpolation_weights: tuple[torch.FloatTensor, ...] | None = None
    token_source: torch.LongTensor | None = None


@dataclass
class InTIClipVideoClassifierOutput(ImageClassifierOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, with `labels`): cross-entropy.
        logits (`torch.FloatTensor` of shape `(B, num_labels)`): before SoftMax.
        hidden_states, attentions, interpolation_weights, token_source: as of [`InTIClipVisionOutput`].
    """

    interpolation_weights: tuple[torch.FloatTensor, ...] | None = None
    token_source: torch.LongTensor | None = None


class InTIClipVisionEmbeddings(CLIPVisionEmbeddings, Optimizable):
    """CLIP's embeddings of each frame: pixels (B, T, C, height, width) -> tokens (B, T, 1+N, D) and the patch grid."""

    def forward(self, pixel_values, adaptation: Adaptation, interpolate_pos_encoding: bool = False):
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values must be {self.image_size} x {self.image_size} pixels, got {height} x {width}; resize "
                "them or pass interpolate_pos_encoding=True."
            )
        patches = adaptation.embed_patches(pixel_values.to(self.patch_embedding.weight.dtype), self.patch_embedding)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(3).transpose(2, 3)  # (B, T, N, D)
        cls = self.class_embedding.expand(*patches.shape[:2], 1, -1)
        if self.fast:
            dtype = torch.promote_types(patches.dtype, cls.dtype)
            x = patches.new_empty(*patches.shape[:2], 1 + patches.shape[2], patches.shape[3], dtype=dtype)
            x[:, :, :1], x[:, :, 1:] = cls, patches
        else:
            x = torch.cat([cls, patches], dim=2)
        if interpolate_pos_encoding:
            return x + self.interpolate_pos_encoding(x[:, 0], height, width), grid
        return x + self.position_embedding(self.position_ids), grid


class InTIClipAttention(CLIPAttention, Optimizable):
    """CLIP's attention within each frame; methods may change keys and values and read projections."""

    def check_optimizable(self) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            check_linear(name, getattr(self, name))

    def optimize(self) -> None:
        pack_parameters([self.q_proj, self.k_proj, self.v_proj])
        super().optimize()

    def project(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries, keys and values (B, T, L, D), heads side by side."""
        linears = [self.q_proj, self.k_proj, self.v_proj]
        outputs = fused_linear(x, linears) if self.fast else None
        if outputs is None:
            outputs = [linear(x) for linear in linears]
        return dict(zip(("query", "key", "value"), outputs, strict=True))

    def attend(
        self,
        x: torch.Tensor,
        key_bias: torch.Tensor | None = None,
        key_value: Callable | None = None,
        feature: str | None = None,
        **kwargs,
    ):
        """x (B, T, L, D) -> output (B, T, L, D), weights (B*T, H, L, L) or None, feature (B, T, L, D) or None."""
        projected = self.project(x)
        if key_value is not None:
            projected["key"], projected["value"] = key_value(projected["key"], projected["value"])
        heads = [t.flatten(0, 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected.values()]
        implementation = self.config._attn_implementation
        mask = None
        if key_bias is not None:
            if "flash" in implementation:
                raise ValueError(
                    f"attn_implementation must take an attention bias for this compression, got {implementation}; "
                    'load the model with attn_implementation="sdpa".'
                )
            mask = key_bias.flatten(0, 1)[:, None, None].to(x.dtype)  # (B*T, 1, 1, L)
        if self.fast and implementation == "sdpa" and in_eager_cpu(x):
            out, weights = chunked_attention(*heads, mask, self.scale), None
        else:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            dropout = self.dropout if self.training else 0.0
            out, weights = interface(self, *heads, mask, scaling=self.scale, dropout=dropout, **kwargs)
        out = self.out_proj(out.reshape(x.shape))
        return out, weights, projected[feature] if feature is not None else None

    def forward(self, x: torch.Tensor, key_bias=None, key_value=None, feature=None, **kwargs):
        return self.attend(x, key_bias, key_value, feature, **kwargs)


class InTIClipMLP(CLIPMLP, Optimizable):
    """CLIP's MLP on tokens (..., D)."""

    # activation: one in place, and the scale of its argument that makes it CLIP's (`scaled_mlp`)
    IN_PLACE = {"quick_gelu": (partial(nn.functional.silu, inplace=True), 1.702), "gelu": (torch.ops.aten.gelu_, 1.0)}

    def check_optimizable(self) -> None:
        for name in ("fc1", "fc2"):
            check_linear(name, getattr(self, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        in_place = self.IN_PLACE.get(self.config.hidden_act)
        if not self.fast or in_place is None or not is_plain(self.fc1, self.fc2):
            return super().forward(x)
        return scaled_mlp(x, self.fc1, self.fc2, *in_place)


class InTIClipEncoderLayer(CLIPEncoderLayer):
    """CLIP's block on tokens (B, T, L, D), with the hooks of both methods."""

    def __init__(self, config: InTIClipVisionConfig, i: int):
        super().__init__(config)
        self.self_attn = InTIClipAttention(config)
        self.mlp = InTIClipMLP(config)
        self.layer_idx = i  # counted from 1
        self.drop_path_rate = block_rate(config.tower, i)

    def forward(self, x, state: TokenState, compression: Compression, adaptation: Adaptation, **kwargs):
        """-> x (B, T, L', D), the feature that the compression reads (B, T, L, D) or None, state."""
        i = self.layer_idx
        rate = self.drop_path_rate if adaptation.drops_blocks else 0.0
        x = adaptation.before_attention(i, x, state, self._normed_attention)
        h = adaptation.branch_in(i, self.layer_norm1(x))
        h, _, feature = self.self_attn(
            h,
            key_bias=compression.key_bias(state),
            key_value=partial(adaptation.key_value, i, state=state),
            feature=None if compression.features == "ffn" else compression.features,
            **kwargs,
        )
        x = x + drop_path(adaptation.branch_out(i, h), rate, self.training)
        x, state = compression.inside_block(i, x, feature, state)
        x = adaptation.before_mlp(i, x, state)
        h = adaptation.mlp(i, self.layer_norm2(x), self.mlp)
        if compression.features == "ffn":
            feature = h
        return x + drop_path(h, rate, self.training), feature, state

    def _normed_attention(self, h: torch.Tensor, inner: Callable | None = None) -> torch.Tensor:
        h = self.layer_norm1(h)
        # Not through __call__, which would record a second attention for this block.
        return self.self_attn.attend(h if inner is None else inner(h))[0]


class InTIClipEncoder(CLIPEncoder):
    """The blocks, with the compression and the adaptation between and around them."""

    def __init__(self, config: InTIClipVisionConfig):
        nn.Module.__init__(self)  # CLIP's would build blocks that are then replaced
        self.config = config
        self.layers = nn.ModuleList(InTIClipEncoderLayer(config, i + 1) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x, state: TokenState, compression: Compression, adaptation: Adaptation, **kwargs):
        """Tokens (B, T, L, D) -> tokens (B, T', L', D), their state and the adaptation's side stream."""
        x, state = compression.after_block(0, x, None, state)
        side = adaptation.start(x)
        for layer in self.layers:
            x, feature, state = layer(x, state, compression, adaptation, **kwargs)
            x, state = compression.after_block(layer.layer_idx, x, feature, state)
            side = adaptation.after_block(layer.layer_idx, x, state, side)
        return x, state, side


class InTIClipPreTrainedModel(TrainedOnly, CLIPPreTrainedModel):
    config: InTIClipVisionConfig
    config_class = InTIClipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    _no_split_modules = ["InTIClipVisionEmbeddings", "InTIClipEncoderLayer", "InTI", "ConvPool", "LinearPool"]
    _supports_flex_attn = False
    _can_record_outputs = {
        # The embeddings are the first LayerNorm's output, not the first block's input, which a compression may have
        # changed.
        "hidden_states": [
            OutputRecorder(None, class_name="pre_layrnorm", capture_initial_hidden_state=False),
            OutputRecorder(InTIClipEncoderLayer, capture_initial_hidden_state=False),
        ],
        "attentions": InTIClipAttention,
        "interpolation_weights": OutputRecorder(FrameInterpolation, index=1),
    }
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.",
        r"^(visual|text)_projection\.",
        r"^logit_scale$",
        r"position_ids$",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ResettableModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} are damaged or cut off ({error}); fetch or write them "
                "again."
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} holds weights of other shapes than this configuration asks for (see "
                "the report above); make the configuration from that checkpoint, or pass ignore_mismatched_sizes=True "
                "to reinitialise those weights."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.freeze()  # again: loaded parameters are new ones
        return loaded

    def set_training_progress(self, progress: float) -> None:
        """Tell the methods how far training is, from 0 to 1; STTS's noise decays with it."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be from 0 to 1, got {progress}.")
        self.base_model.compression.set_progress(progress)
        self.base_model.adaptation.set_progress(progress)

    def optimize_for_inference(self) -> Self:
        """Make evaluation without gradients faster, with the same outputs (within rounding, 1e-5 in float32).

        Queries, keys and values become one matrix product, the scales of CLIP's activation move into the products
        around it, and InTI concatenates no tokens. Saving, training and gradients are not affected, no weight is
        copied, and changed weights take effect. Returns the model. Raises ValueError unless linear layers are the
        model's own, for example under LoRA, with hooks, quantised or offloaded.
        """
        modules = [module for module in self.modules() if isinstance(module, Optimizable)]
        for module in modules:
            module.check_optimizable()
        for module in modules:
            module.optimize()
        return self

    def compile(self, *args, **kwargs) -> None:
        """torch's compile, without inductor's layout optimisation, which takes (B, T, L, D) for images."""
        if not args and not kwargs.keys() & {"backend", "mode", "options"}:
            kwargs["options"] = {"layout_optimization": False}
        super().compile(*args, **kwargs)

    def merge_adapters(self) -> None:
        """Fold the adaptation's adapters into the blocks, so that inference costs what the plain tower costs.

        The configuration records it, so that the merged model is saved and loaded as such. Raises ValueError where the
        adaptation has nothing to fold.
        """
        model = self.base_model
        adapted = model.adaptation
        options = adapted.merge(model.encoder.layers)
        shared = self.config
        own = copy.deepcopy(shared)  # another model may have been made from the same
        own.adaptation_options = options
        for module in self.modules():
            if getattr(module, "config", None) is shared:
                module.config = own
        merged = ADAPTATIONS[own.adaptation](own.tower, **options).to(self.device, self.dtype)
        merged.load_state_dict(adapted.state_dict(), strict=False)  # what was not folded, such as an embedding
        for name, parameter in merged.named_parameters():
            parameter.requires_grad_(adapted.get_parameter(name).requires_grad)
        model.adaptation = merged.train(self.training)


class InTIClipVisionModel(InTIClipPreTrainedModel, CLIPVisionModel):
    """CLIP's vision tower on video.

    `from_pretrained` takes its own checkpoints and, with `config=InTIClipVisionConfig.from_clip(...)`, any of CLIP's.
    """

    _keys_to_ignore_on_load_unexpected = [*InTIClipPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^classifier\."]

    def __init__(self, config: InTIClipVisionConfig):
        CLIPPreTrainedModel.__init__(self, config)  # CLIPVisionModel's would build a whole tower to be replaced
        config.check()
        self.embeddings = InTIClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = InTIClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.compression = COMPRESSIONS[config.compression](
            config.tower, config.compression_layers, **config.compression_options
        )
        self.adaptation = ADAPTATIONS[config.adaptation](config.tower, **config.adaptation_options)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Let only those parameters train that the adaptation names, and its own and the compression's."""
        trained = self.adaptation.trained_parameters()
        if trained is not None:
            prefixes = ("compression.", "adaptation.", *trained)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith(prefixes))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        output_token_source: bool = False,
        **kwargs,
    ) -> InTIClipVisionOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, T, num_channels, height, width)`):
                Normalised frames. T may differ from `config.num_frames`, if the compression can halve it.
            interpolate_pos_encoding (`bool`):
                Accept frames of another size than the tower was made for.
            output_hidden_states, output_attentions, output_interpolation_weights (`bool`):
                What else to return; attentions need `attn_implementation="eager"`.
            output_token_source (`bool`):
                Also return where the tokens of a frame went, for drawing ToMe's and STA's; None with STTS's squares.

        Raises ValueError for another shape or number of frames, saying which would do.
        """
        self._check_input(pixel_values)
        x, grid = self.embeddings(pixel_values, self.adaptation, interpolate_pos_encoding)
        x = self.pre_layrnorm(self.adaptation.on_embeddings(x))
        state = TokenState(num_class_tokens=1, grid=grid)
        L = x.shape[2]
        x, state, side = self.encoder(x, state, self.compression, self.adaptation, **kwargs)
        pooled = self.adaptation.pool(x, side, self.post_layernorm)
        source = None
        if output_token_source:
            source = state.source
            if source is None and x.shape[2] == L:  # nothing was merged or dropped
                source = torch.arange(x.shape[2], device=x.device).expand(*x.shape[:3])
        return InTIClipVisionOutput(last_hidden_state=x, pooler_output=pooled, token_source=source)

    def _check_input(self, pixel_values: torch.Tensor | None) -> None:
        if pixel_values is None:
            raise ValueError(
                "pixel_values must be given, got None; pass frames of shape (B, T, channels, height, width)."
            )
        channels = self.config.num_channels
        if pixel_values.dim() != 5 or pixel_values.shape[2] != channels:
            raise ValueError(
                f"pixel_values must have the shape (B, T, {channels}, height, width), got {tuple(pixel_values.shape)}"
                + ("; add the batch dimension with [None]." if pixel_values.dim() == 4 else ".")
            )
        check_frames(pixel_values.shape[1], self.config.frame_multiple)


class InTIClipForVideoClassification(InTIClipPreTrainedModel):
    """The tower with dropout and a linear classifier on the video feature."""

    def __init__(self, config: InTIClipVisionConfig):
        super().__init__(config)
        self.loss_type = "ForVideoClassification"  # otherwise looked up by class name, which fails for subclasses
        self.num_labels = config.num_labels
        self.vision_model = InTIClipVisionModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        **kwargs,
    ) -> InTIClipVideoClassifierOutput:
        r"""
        Args:
            pixel_values, interpolate_pos_encoding, output_*: as of [`InTIClipVisionModel`].
            labels (`torch.LongTensor` of shape `(B,)`): classes from 0 to `config.num_labels - 1`, for the loss.
        """
        outputs: InTIClipVisionOutput = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            self._check_labels(labels)
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return InTIClipVideoClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            interpolation_weights=outputs.interpolation_weights,
            token_source=outputs.token_source,
        )

    def _check_labels(self, labels: torch.Tensor) -> None:
        # Reading labels on an accelerator would make every step wait for it.
        if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        outside = labels[(labels >= self.num_labels) | ((labels < 0) & (labels != -100))]
        if self.num_labels > 1 and outside.numel():
            raise ValueError(
                f"labels must be from 0 to {self.num_labels - 1}, the model's classes, got {outside[0].item()}; "
                "correct them, or load the model with a larger num_labels."
            )


# Saved checkpoints carry the code that loads them where this package is not installed.
InTIClipVisionModel.register_for_auto_class("AutoModel")
InTIClipForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
