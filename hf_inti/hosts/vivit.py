"""ViViT (its joint form, the one in transformers): attention over the class token and the tokens of all frames."""

import torch
from torch import nn

from .contract import BaseHost, Block, Tokens


IMPLEMENTATIONS = ("sdpa", "eager")  # of attention, that add a bias


class Host(BaseHost):
    name = "ViViT"
    class_tokens = 1
    takes_bias = True

    def __init__(self, model: nn.Module):
        config = model.config
        embeddings = self.encoder(model).embeddings.patch_embeddings
        sizes = (config.num_frames, *embeddings.image_size)
        self.grid = tuple(size // tubelet for size, tubelet in zip(sizes, config.tubelet_size, strict=True))
        self.depth, self.heads = config.num_hidden_layers, config.num_attention_heads

    def check_bias(self, implementation: str) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation must be {' or '.join(IMPLEMENTATIONS)} for ToMe's prop_attn, got "
                f"{implementation!r}; call set_attn_implementation, or pass prop_attn=False."
            )

    def encoder(self, model: nn.Module) -> nn.Module:
        return getattr(model, "vivit", model)

    def blocks(self, model: nn.Module) -> list[Block]:
        return [
            Block(
                layer,
                layer.attention,
                {name: getattr(layer.attention, f"{name[0]}_proj") for name in ("query", "key", "value")},
                layer.layernorm_after,
                layer.mlp,
            )
            for layer in self.encoder(model).layers
        ]

    def begin(self, args, kwargs, trace):
        if kwargs.get("attention_mask") is not None or args[2:3] not in ((), (None,)):
            raise ValueError(
                "attention_mask must be None under a compression, which removes tokens that it names, got one; leave "
                "it out."
            )
        return super().begin(args, kwargs, trace)

    def attend(self, attention: nn.Module, args, kwargs, tokens: Tokens, bias: torch.Tensor | None):
        if bias is not None:
            self.check_bias(attention.config._attn_implementation)  # again: it may have been changed
            bias = bias[:, None, None].to(args[0].dtype)  # (B, 1, 1, L)
        return (args[0], bias), kwargs
