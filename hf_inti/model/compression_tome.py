"""ToMe: token merging, Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023).

Between attention and MLP of every block the patches of a frame, split into those at even and at odd places, are matched
by the keys of that block; the r most similar pairs become one token each. The functions work on (B, N, C), whatever
B is; in the model it is clips times frames. The paper's letters: r tokens removed in a block, `metric` the features
compared, `size` the number of patches in a token, `src` merged into `dst`, `unm` left unmerged.
"""

from typing import NamedTuple

import torch
from torch import nn

from .layers import tokens_at
from .methods import Compression, TokenState, Tower


class Matching(NamedTuple):
    """Which tokens become one.

    `target` (B, N): the output index, below `num_tokens`, of each token. In the paper's terms: `unm_idx` (B, U) and
    `src_idx` (B, r), the most similar first, index the even places, `dst_idx` (B, r) the odd ones. With `every` = k
    every k-th token is one of the latter instead.
    """

    target: torch.Tensor
    num_tokens: int
    unm_idx: torch.Tensor
    src_idx: torch.Tensor
    dst_idx: torch.Tensor
    every: int = 2

    def places(self, idx: torch.Tensor) -> torch.Tensor:
        """Indices of those that are no destinations -> their places among all tokens."""
        return idx + idx // max(self.every - 1, 1)

    def survivors(self) -> torch.Tensor:
        """The place of the token that each output token was, a merged one its destination (B, num_tokens)."""
        B, N = self.target.shape
        dst = torch.arange(self.every - 1, N, self.every, device=self.target.device).expand(B, -1)
        survivors = torch.cat([self.places(self.unm_idx), dst], dim=1)
        return torch.empty_like(survivors).scatter(1, self.target.gather(1, survivors), survivors)


@torch.no_grad()
def bipartite_soft_matching(
    metric: torch.Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Match the tokens at even places with those at odd places by the cosine of metric (B, N, d).

    Up to `r` tokens are merged away, at most half of the unprotected ones; the class token (place 0) and the
    distillation token (place 1) are never merged. Unmerged tokens come first, then destinations; with a class token the
    unmerged keep their order, so that it stays first, and a distillation token follows it.
    """
    B, N = metric.shape[:2]
    protected = int(class_token) + int(distill_token)
    r = min(r, (N - protected) // 2)
    if r <= 0:  # as released, nothing moves
        stay = torch.arange(N, device=metric.device).expand(B, N)
        return Matching(stay, N, stay[:, 0::2] // 2, stay[:, :0], stay[:, :0])
    metric = nn.functional.normalize(metric, dim=-1)
    scores = metric[:, 0::2] @ metric[:, 1::2].transpose(1, 2)  # (B, even, odd)
    if class_token:
        scores[:, 0] = float("-inf")
    if distill_token:
        scores[:, :, 0] = float("-inf")
    even, odd = scores.shape[1:]
    best, best_dst = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    src_idx, unm_idx = order[:, :r], order[:, r:]
    if class_token:
        unm_idx = unm_idx.sort(dim=-1).values
    dst_idx = best_dst.gather(1, src_idx)
    U = unm_idx.shape[1]
    ranks = torch.arange(N, device=metric.device)
    place_unm, place_dst = ranks[:U], ranks[U : U + odd]
    if distill_token:  # class token, distillation token, the other unmerged, the other destinations
        place_unm = torch.cat([ranks[:1], ranks[2 : U + 1]])
        place_dst = torch.cat([ranks[1:2], ranks[U + 1 : U + odd]])
    target = ranks.new_empty(B, N)
    target[:, 1::2] = place_dst
    target_even = ranks.new_zeros(B, even).scatter(1, unm_idx, place_unm.expand(B, U))
    target[:, 0::2] = target_even.scatter(1, src_idx, place_dst[dst_idx])
    return Matching(target, U + odd, unm_idx, src_idx, dst_idx)


@torch.no_grad()
def kth_bipartite_soft_matching(metric: torch.Tensor, k: int) -> Matching:
    """Merge every token of metric (B, N, d) into the most similar k-th one; k = 1 merges none.

    Tokens after the last k-th one are dropped: `target` (B, N // k * k).
    """
    B, N = metric.shape[:2]
    if not 1 <= k <= N:
        raise ValueError(f"k must be from 1 to {N}, the number of tokens, got {k}.")
    groups = N // k
    metric = nn.functional.normalize(metric, dim=-1)
    metric = metric[:, : groups * k].unflatten(1, (groups, k))
    src = metric[:, :, :-1].flatten(1, 2)
    dst_idx = (src @ metric[:, :, -1].transpose(1, 2)).argmax(dim=-1)  # (B, groups * (k - 1))
    own = torch.arange(groups, device=metric.device).expand(B, groups)
    target = torch.cat([dst_idx.unflatten(1, (groups, k - 1)), own[..., None]], dim=-1).flatten(1)
    src_idx = torch.arange(src.shape[1], device=metric.device).expand(B, -1)
    return Matching(target, groups, src_idx[:, :0], src_idx, dst_idx, every=k)


def merge(x: torch.Tensor, matching: Matching, mode: str = "mean") -> torch.Tensor:
    """Tokens (B, N, C) -> (B, num_tokens, C): the "sum" or plain "mean" of those that become one."""
    if mode not in ("sum", "mean"):
        raise ValueError(f'mode must be "sum" or "mean", got {mode!r}.')
    target = matching.target
    index = target[..., None].expand(-1, -1, x.shape[-1])
    out = x.new_zeros(x.shape[0], matching.num_tokens, x.shape[-1]).scatter_add(1, index, x[:, : target.shape[1]])
    if mode == "sum":
        return out
    ones = x.new_ones(*target.shape, 1)
    return out / merge(ones, matching, "sum")


def merge_weighted(x: torch.Tensor, size: torch.Tensor, matching: Matching) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of tokens (B, N, C) weighted by their sizes (B, N, 1) -> tokens, sizes, which are summed.

    Only the tokens merged away are computed with; whole rows of the others are moved.
    """
    src = matching.places(matching.src_idx)
    dst = matching.target.gather(1, src)
    total = merge(size, matching, "sum")
    share = (size.gather(1, src[..., None]) / total.gather(1, dst[..., None])).to(x.dtype)
    out = tokens_at(x, matching.survivors())
    step = share * (tokens_at(x, src) - tokens_at(out, dst))  # from the destination towards the mean
    return out.scatter_add(1, dst[..., None].expand(-1, -1, x.shape[-1]), step), total


def merge_places(places: torch.Tensor, matching: Matching) -> torch.Tensor:
    """Places of tokens (B, N) -> (B, num_tokens): a merged token takes its destination's, so that none is shared."""
    return places.gather(1, matching.survivors())


def unmerge(x: torch.Tensor, matching: Matching) -> torch.Tensor:
    """Merged tokens (B, num_tokens, C) -> (B, N, C): each copied to all the places merged into it.

    N is that of `target`: tokens dropped by `kth_bipartite_soft_matching` do not come back.
    """
    return tokens_at(x, matching.target)


def merge_source(matching: Matching, source: torch.Tensor | None = None) -> torch.Tensor:
    """The index after this merging of each original token (B, N0), given its index before (None: nothing merged yet).

    `torch.nn.functional.one_hot` of it is the matrix of groups; `x.gather(1, source)` puts tokens back on their places.
    """
    return matching.target if source is None else matching.target.gather(1, source)


def r_schedule(num_layers: int, r: int | list[int] | tuple[int, float]) -> list[int]:
    """Tokens merged in each block: r in every block, a list of numbers (the rest 0), or (r, inflection).

    An inflection from -1 (falling from 2r to 0) to 1 (rising from 0 to 2r) makes the number change linearly around r;
    numbers are truncated. Raises ValueError for anything else.
    """
    inflection = 0.0
    if isinstance(r, list):
        if len(r) > num_layers or not all(_is_count(n) for n in r):
            raise ValueError(f"ToMe's r as a list must hold at most {num_layers} (the depth) counts, got {r}.")
        return r + [0] * (num_layers - len(r))
    if isinstance(r, tuple):
        r, inflection = r
    if not _is_count(r) or not -1 <= inflection <= 1:
        raise ValueError(
            f"ToMe's r must be a whole number from 0, with an inflection from -1 to 1, got {r, inflection}."
        )
    low = int(r * (1 - inflection))
    step = (2 * r - 2 * low) / max(num_layers - 1, 1)
    return [int(low + step * i) for i in range(num_layers)] if num_layers > 1 else [r]


def parse_r(num_layers: int, r: int | list[int] | list[float]) -> list[int]:
    """`r_schedule` of an option, where a pair is a list too: [r, inflection], if its second is negative or a float."""
    if isinstance(r, (list, tuple)):
        pair = len(r) == 2 and (isinstance(r[1], float) or (isinstance(r[1], int) and r[1] < 0))
        r = tuple(r) if pair else list(r)
    return r_schedule(num_layers, r)


def _is_count(r) -> bool:
    return isinstance(r, int) and not isinstance(r, bool) and r >= 0


class ToMe(Compression):
    """ToMe inside every block, frame by frame.

    Args:
        r: tokens of each frame merged in a block, see `r_schedule`; default: a twentieth of the patches (10 of 196). A
            pair is taken for [r, inflection] if its second number is negative or has a decimal point.
        prop_attn: whether a token of `size` patches counts as that many in the softmax of attention.
    """

    uses_layers = False
    keeps_grid = False
    features = "key"

    def __init__(
        self,
        tower: Tower,
        layers: list[int],
        *,
        r: int | list[int] | list[float] | None = None,
        prop_attn: bool = True,
    ):
        super().__init__(tower, layers)
        self.r = self._schedule(tower, r)
        self.prop_attn = prop_attn
        self.heads = tower.num_attention_heads

    @staticmethod
    def _schedule(tower: Tower, r) -> list[int]:
        return parse_r(tower.num_hidden_layers, round(tower.num_patches / 20) if r is None else r)

    @classmethod
    def check_options(cls, tower: Tower, **options) -> None:
        cls._schedule(tower, options.get("r"))
        if not isinstance(options.get("prop_attn", True), bool):
            raise ValueError(f"ToMe option prop_attn must be true or false, got {options['prop_attn']!r}.")

    def key_bias(self, state: TokenState) -> torch.Tensor | None:
        return state.sizes.log() if self.prop_attn and state.sizes is not None else None

    def inside_block(self, i: int, x, keys, state: TokenState):
        r = self.r[i - 1]
        if r == 0:
            return x, state
        B, T, L, D = x.shape
        c = state.num_class_tokens
        metric = keys.unflatten(-1, (self.heads, -1)).mean(dim=-2).flatten(0, 1)
        matching = bipartite_soft_matching(metric, r, class_token=c > 0, distill_token=c > 1)
        sizes = state.sizes
        if sizes is None:  # counts above 256 are not whole in bf16
            sizes = x.new_ones(B, T, L, dtype=torch.promote_types(x.dtype, torch.float32))
        x, total = merge_weighted(x.flatten(0, 1), sizes.flatten(0, 1)[..., None], matching)
        positions = state.positions
        if positions is None:
            positions = torch.arange(L - c, device=x.device).expand(B, T, -1)
        places = merge_places(nn.functional.pad(positions, (c, 0)).flatten(0, 1), matching)[:, c:]
        source = merge_source(matching, None if state.source is None else state.source.flatten(0, 1))
        state = state._replace(
            positions=places.unflatten(0, (B, T)),
            sizes=total[..., 0].unflatten(0, (B, T)),
            source=source.unflatten(0, (B, T)),
        )
        return x.unflatten(0, (B, T)), state
