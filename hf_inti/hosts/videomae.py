"""VideoMAE: attention over the tokens of all frames together, no class token, fixed positions added at the start."""

from torch import nn

from .contract import BaseHost, Block, Current, Hook, PreHook


class KeepOutput(Hook):
    """On the encoder: keeps the last block's tokens for `Pool`."""

    def __call__(self, module, args, kwargs, output) -> None:
        self.current.get().output = output.last_hidden_state


class Pool(PreHook):
    """On the classifier's norm, which reads the mean token: makes it the mean of the tokens weighted by their sizes."""

    def __call__(self, module, args, kwargs):
        trace = self.current.pop()
        if trace is not None:
            sizes = trace.before(self.host.depth + 1).sizes
            weights = (sizes / sizes.sum(dim=1, keepdim=True))[..., None]
            args = ((trace.output * weights.to(trace.output.dtype)).sum(dim=1), *args[1:])
        return args, kwargs


class Host(BaseHost):
    name = "VideoMAE"

    def __init__(self, model: nn.Module):
        config = model.config
        if not config.use_mean_pooling:
            raise ValueError(
                "the VideoMAE must use mean pooling, got one that reads its first token, which a compression may "
                "remove; set use_mean_pooling."
            )
        embeddings = self._backbone(model).embeddings.patch_embeddings
        rows, columns = (
            size // patch for size, patch in zip(embeddings.image_size, embeddings.patch_size, strict=True)
        )
        self.grid = (embeddings.num_patches // (rows * columns), rows, columns)
        self.depth, self.heads = config.num_hidden_layers, config.num_attention_heads

    @staticmethod
    def _backbone(model: nn.Module) -> nn.Module:
        return getattr(model, "videomae", model)

    def encoder(self, model: nn.Module) -> nn.Module:
        return self._backbone(model).encoder

    def blocks(self, model: nn.Module) -> list[Block]:
        return [
            Block(
                layer,
                layer.attention,
                {name: getattr(layer.attention.attention, name) for name in ("query", "key", "value")},
                layer.layernorm_after,
                layer.output.dropout,
            )
            for layer in self.encoder(model).layer
        ]

    def hooks(self, model: nn.Module, method: str, current: Current, **receive) -> list[tuple[nn.Module, Hook]]:
        found = super().hooks(model, method, current, **receive)
        if method == "tome" and hasattr(model, "fc_norm"):  # `Pool` ends the pass
            found[1] = (self.encoder(model), KeepOutput(self, current))
            found.append((model.fc_norm, Pool(self, current)))
        return found
