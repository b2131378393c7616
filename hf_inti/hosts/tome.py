"""ToMe on a host: between attention and MLP of every block, similar tokens of the whole clip become one."""

import torch
from torch import nn

from ..model.compression_tome import bipartite_soft_matching, merge_places, merge_weighted, parse_r, unmerge
from .contract import BaseHost, Current, Feature, Hook, PreHook, Tokens, first, with_first


# A hook cannot replace the tokens that a block adds its MLP's output to. So the MLP works on the merged tokens, its
# output is copied to all that were merged into each, and the sum is merged at the block's end: a weighted mean of
# tokens plus what they share is the mean of the tokens plus that.


class Merge(PreHook):
    """On the norm before the MLP: matches tokens by their keys, and lets the MLP read the merged ones."""

    def __init__(self, *where, r: int):
        super().__init__(*where)
        self.r = r

    def __call__(self, module, args, kwargs):
        trace = self.current.get()
        x = self.host.fold(args[0])
        trace.matching = bipartite_soft_matching(trace.feature, self.r, class_token=self.host.class_tokens > 0)
        x, _ = merge_weighted(x, sizes_of(x, trace.before(self.i)), trace.matching)
        return (self.host.unfold(x), *args[1:]), kwargs


class Unmerge(Hook):
    """On the MLP: copies its output to all the tokens merged into each."""

    def __call__(self, module, args, kwargs, output):
        return self.host.unfold(unmerge(self.host.fold(output), self.current.get().matching))


class MergeOutput(Hook):
    """On the block: merges its output as `Merge` did, and writes the trace."""

    def __call__(self, module, args, kwargs, output):
        trace = self.host.trace(args, kwargs)
        before, c = trace.before(self.i), self.host.class_tokens
        x = self.host.fold(first(output))
        x, sizes = merge_weighted(x, sizes_of(x, before), trace.matching)
        places = before.places
        if places is None:
            places = torch.arange(trace.matching.target.shape[1] - c, device=x.device).expand(len(x), -1)
        places = merge_places(nn.functional.pad(places, (c, 0)), trace.matching)[:, c:]
        trace.tokens[self.i] = before._replace(places=places, sizes=sizes[..., 0])
        return with_first(output, self.host.unfold(x))


def sizes_of(x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """(B, L, 1), at least in float32: counts above 256 are not whole in bf16."""
    if tokens.sizes is None:
        return x.new_ones(*x.shape[:2], 1, dtype=torch.promote_types(x.dtype, torch.float32))
    return tokens.sizes[..., None]


def hooks(
    host: BaseHost,
    model: nn.Module,
    r: int | list[int] | list[float] | None = None,
    prop_attn: bool | None = None,
) -> list[tuple[nn.Module, Hook]]:
    """ToMe's hooks.

    Args:
        r: tokens of a clip merged in each block, as in `ToMe`: a number, one for each block, or [r, inflection]. Where
            fewer than 2 r are left, half of them are merged. Default: six tenths of the tokens, shared by the blocks.
        prop_attn: whether a token of some size counts as that many in the softmax of attention; default: where the
            host's attention takes a bias.

    Raises ValueError for bad options.
    """
    if prop_attn is not None and not isinstance(prop_attn, bool):
        raise ValueError(f"ToMe's prop_attn must be true or false, got {prop_attn!r}.")
    prop_attn = host.takes_bias if prop_attn is None else prop_attn
    if prop_attn:
        host.check_bias(model.config._attn_implementation)
    counts = parse_r(host.depth, round(0.6 * host.num_merging / host.depth) if r is None else r)
    if not any(counts):
        return []
    current = Current()
    found = host.hooks(model, "tome", current, prop_attn=prop_attn)
    for i, (block, r_i) in enumerate(zip(host.blocks(model), counts, strict=True), start=1):
        if r_i:
            found += [
                (block.projections["key"], Feature(host, current, i, similarity="key")),
                (block.norm, Merge(host, current, i, r=r_i)),
                (block.mlp, Unmerge(host, current, i)),
                (block.block, MergeOutput(host, current, i)),
            ]
    return found
