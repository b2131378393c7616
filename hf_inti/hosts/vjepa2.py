"""V-JEPA 2: attention over the tokens of all frames together, no class token, rotary positions in every block.

Each token is rotated by its place in the clip, so those that stay keep theirs, and a merged token has that of the one
it was merged into. The attentive pooler, which has no positions, reads what is left.
"""

import torch
from torch import nn

from .contract import TRACE, BaseHost, Block, Current, Hook, PreHook, Tokens


class Enter(PreHook):
    """On a block: passes the trace in the argument that reaches the attention."""

    def __call__(self, module, args, kwargs):
        return (args[0], kwargs[TRACE]), kwargs


class RefusePredictor(PreHook):
    """On the backbone: the predictor and the masks name tokens by places that may be gone."""

    def __call__(self, module, args, kwargs) -> None:
        given = dict(zip(("context_mask", "target_mask", "skip_predictor"), args[1:], strict=False)) | kwargs
        masks = [name for name in ("context_mask", "target_mask") if given.get(name) is not None]
        if masks or not given.get("skip_predictor", False):
            raise ValueError(
                "skip_predictor must be True and no mask given under a compression, which removes tokens that the "
                f"predictor reads, got {' and '.join(masks) or 'skip_predictor=False'}; pass skip_predictor=True."
            )


class Host(BaseHost):
    name = "V-JEPA 2"
    any_length = True

    def __init__(self, model: nn.Module):
        config = model.config
        side = config.crop_size // config.patch_size
        self.grid = (config.frames_per_clip // config.tubelet_size, side, side)
        self.depth, self.heads = config.num_hidden_layers, config.num_attention_heads

    @staticmethod
    def _backbone(model: nn.Module) -> nn.Module:
        return getattr(model, "vjepa2", model)

    def encoder(self, model: nn.Module) -> nn.Module:
        return self._backbone(model).encoder

    def blocks(self, model: nn.Module) -> list[Block]:
        return [
            Block(
                layer,
                layer.attention,
                {name: getattr(layer.attention, name) for name in ("query", "key", "value")},
                layer.norm2,
                layer.mlp,
            )
            for layer in self.encoder(model).layer
        ]

    def hooks(self, model: nn.Module, method: str, current: Current, **receive) -> list[tuple[nn.Module, Hook]]:
        found = super().hooks(model, method, current, **receive)
        found.append((self._backbone(model), RefusePredictor(self, current)))
        found += [(block.block, Enter(self, current, i)) for i, block in enumerate(self.blocks(model), start=1)]
        return found

    def receive(self, args, kwargs):
        return args, kwargs, kwargs["position_mask"]

    def attend(self, attention: nn.Module, args, kwargs, tokens: Tokens, bias: torch.Tensor | None):
        return args, {**kwargs, "position_mask": tokens.places}
