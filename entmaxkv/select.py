"""Selectors choose what a decode step reads of the cache: pages, or single tokens."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from entmaxkv import check, ops
from entmaxkv.cache import NEEDS, Need, PagedKVCache
from entmaxkv.check import is_count, is_number
from entmaxkv.scoring import Scoring


class Selection(NamedTuple):
    """What a selector chose for a query. The other tokens are not read.

    Attributes:
        selected: [batch, kv_heads, max_selected] int32, logical pages or token positions, each once, in ascending
            order. What stands behind the first `counts` of them does not matter.
        counts: [batch, kv_heads] int32, how many of them are chosen.
        by_token: whether `selected` holds token positions.
        delta_bound: [batch, q_heads] float32, a proved upper bound of the dense weight of all other tokens: 0 where
            none of them has weight, 1 where nothing is known. None where the selector proves nothing itself. Then
            `entmaxkv.certify` bounds the weight of pages by their statistics; of tokens it knows nothing.
    """

    selected: Tensor
    counts: Tensor
    by_token: bool = False
    delta_bound: Tensor | None = None

    def chosen(self, count: int) -> Tensor:
        """Which of the first `count` pages, or tokens, of a row were chosen: [batch, kv_heads, count] bool."""
        places = torch.arange(self.selected.shape[2], device=self.selected.device)
        among = (places < self.counts[..., None]) & (self.selected < count)
        chosen = torch.where(among, self.selected, count).long()  # the others into a place of their own
        mask = torch.zeros((*self.counts.shape, count + 1), dtype=torch.bool, device=self.selected.device)
        return mask.scatter(2, chosen, torch.ones_like(among))[..., :count]

    def reads(self, tokens: int, page_size: int) -> Tensor:
        """Which of the first `tokens` tokens were chosen, or lie in chosen pages: [batch, kv_heads, tokens] bool."""
        if self.by_token:
            return self.chosen(tokens)
        return self.chosen(-(-tokens // page_size)).repeat_interleave(page_size, dim=2)[..., :tokens]


class Selector(Protocol):
    """An object that chooses the pages or tokens that a decode step reads.

    `KeySketch`, `TopPages` and `Gaussian` are selectors. So is any object with these three members.

    Example:
        >>> class Newest:
        ...     '''Reads the newest tokens of each row, and knows nothing of the others.'''
        ...
        ...     needs = frozenset()
        ...
        ...     def __init__(self, tokens):
        ...         self.tokens = tokens
        ...
        ...     def dense_up_to(self, device_type):
        ...         return 0
        ...
        ...     def select(self, q, cache, scoring):
        ...         counts = cache.seq_lens.clamp(max=self.tokens)
        ...         places = torch.arange(self.tokens, dtype=torch.int32, device=q.device)
        ...         newest = (cache.seq_lens - counts)[:, None] + places
        ...         selected = newest[:, None].repeat(1, cache.kv_heads, 1)
        ...         return Selection(selected, counts[:, None].repeat(1, cache.kv_heads), by_token=True)
        >>> from entmaxkv import decode
        >>> cache = PagedKVCache(batch=1, max_tokens=64, kv_heads=2, head_dim=64)
        >>> cache.append(torch.randn(1, 64, 2, 64), torch.randn(1, 64, 2, 64))
        >>> out, info = decode(torch.randn(1, 4, 64), cache, select=Newest(10), return_info=True)
        >>> info.tokens.tolist(), info.delta_bound.tolist()
        ([[10, 10]], [[1.0, 1.0, 1.0, 1.0]])
    """

    @property
    def needs(self) -> Set[str]:
        """What a cache has to keep for this selector: any of "minmax", "moments" and "sketch"."""
        ...

    def dense_up_to(self, device_type: str) -> int:
        """The room, in tokens, up to which a cache is read whole, because selecting from it takes longer.

        Args:
            device_type: where the cache is, such as "cpu" or "cuda".
        """
        ...

    def select(self, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> Selection:
        """Chooses for every KV head.

        Args:
            q: [batch, q_heads, head_dim].
            cache: what to choose from.
            scoring: how the step scores tokens.
        """
        ...


def check_step(name: str, q: Tensor, cache: PagedKVCache, scoring: Scoring | None = None) -> None:
    """Refuses a query, a cache or a scoring that is none."""
    if scoring is not None and not isinstance(scoring, Scoring):
        raise ValueError(f"{name}: scoring: expected a Scoring, got {check.described(scoring)}")
    if not isinstance(cache, PagedKVCache):
        raise ValueError(f"{name}: cache: expected a PagedKVCache, got {check.described(cache)}")
    check.tensor(f"{name}: q", q, "[batch, q_heads, head_dim]")


def check_select(name: str, select: Selector | None) -> None:
    """Refuses what is no selector, such as the class of one."""
    if select is None:
        return
    lacks = [method for method in ("dense_up_to", "select") if not callable(getattr(select, method, None))]
    if isinstance(select, type) or lacks or not hasattr(select, "needs"):
        why = "a class" if isinstance(select, type) else f"without {lacks[0]}()" if lacks else "without needs"
        expected = "expected a selector such as KeySketch(), or None"
        raise ValueError(f"{name}: select: {expected}, got {check.described(select)}, {why}")


def kept_for(name: str, select: Selector | None) -> dict[str, bool]:
    """What a cache has to keep for a selector, as keywords of `PagedKVCache`."""
    needs: Set[str] = frozenset() if select is None else select.needs
    if not (isinstance(needs, Set) and needs <= NEEDS.keys()):
        expected = f"expected a set of any of {', '.join(NEEDS)}"
        raise ValueError(f"{name}: select: {type(select).__name__}.needs: {expected}, got {check.described(needs)}")
    return {need: need in needs for need in NEEDS}


def selection(select: Selector | None, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> Selection | None:
    """What a selector chooses; None where the whole cache is to be read."""
    if select is None:
        return None
    dense_up_to = select.dense_up_to(cache.k_pages.device.type)
    if not is_count(dense_up_to):
        expected = "expected a number of tokens, at least 0"
        raise ValueError(f"{type(select).__name__}.dense_up_to: {expected}, got {check.described(dense_up_to)}")
    if cache.max_tokens <= dense_up_to:
        return None
    who = type(select).__name__
    for need in NEEDS:
        if need in select.needs:
            cache.kept(need, by=who)
    found = select.select(q, cache, scoring)
    if not isinstance(found, Selection):
        raise ValueError(f"{who}.select: expected a Selection, got {check.described(found)}")
    for name, value in (("selected", found.selected), ("counts", found.counts)):  # sparse_decode looks at them closely
        if not isinstance(value, Tensor):
            raise ValueError(f"{who}.select: expected a tensor {name}, got {check.described(value)}")
    if not isinstance(found.by_token, bool):
        raise ValueError(f"{who}.select: expected a bool by_token, got {check.described(found.by_token)}")
    bound = found.delta_bound
    if bound is not None:
        right = isinstance(bound, Tensor) and bound.shape == q.shape[:2] and bound.dtype == torch.float32
        if not right:
            expected = f"expected a tensor delta_bound {list(q.shape[:2])} float32"
            raise ValueError(f"{who}.select: {expected}, got {check.described(bound)}")
    return found


class DenseBelow:
    """The part of a selector that its field `dense_below` controls."""

    dense_below: int | None
    DENSE_BELOW: ClassVar[Mapping[str, int]]  # by device, where the field is None; bench/NOTES.md

    def _check_dense_below(self) -> None:
        value = self.dense_below
        if value is not None and not is_count(value):
            expected = "expected a number of tokens, at least 0, or None"
            raise ValueError(f"{type(self).__name__}: dense_below: {expected}, got {value!r}")

    def dense_up_to(self, device_type: str) -> int:
        """See `Selector.dense_up_to`."""
        return self.DENSE_BELOW.get(device_type, 0) if self.dense_below is None else self.dense_below


@dataclass(frozen=True, kw_only=True)
class KeySketch(DenseBelow):
    """Selects the tokens whose weight the sketch of their keys cannot rule out: the result is that of dense decoding.

    Without `max_tokens` every token of the dense support is selected, which `DecodeInfo.certified` states for each
    head. How many tokens that takes depends on the query: a head with a wide support reads more.

    Attributes:
        certainty: 1 proves. A value below 1, such as 1 - 1e-9, assumes that the errors of a score add up like random
            signs, which is what the rotation of the keys makes of them. Fewer tokens are selected then, each bound
            holds with that probability, and nothing is proved.
        bits: 4 reads plane 1 of the codes where plane 0 does not decide; 2 reads plane 0 alone.
        max_tokens: most tokens per KV head whose keys are read. Of more candidates those are selected to which their
            bounds leave most weight; `DecodeInfo.delta_bound` bounds the weight of the rest. None selects every
            candidate: where alpha is 1 these are all tokens.
        dense_below: a cache with room for at most so many tokens is decoded densely, to the bit as with `select=None`.
            None stands for 65536 on a GPU and for 0, so never, on the CPU.
    """

    certainty: float = 1.0
    bits: int = 4
    max_tokens: int | None = None
    dense_below: int | None = None

    needs: ClassVar[Set[Need]] = frozenset({"sketch"})
    DENSE_BELOW: ClassVar[Mapping[str, int]] = {"cuda": 65536}

    def __post_init__(self) -> None:
        if not (is_number(self.certainty) and 0 < self.certainty <= 1):
            raise ValueError(f"KeySketch: certainty: expected a number above 0, at most 1, got {self.certainty!r}")
        if not (is_count(self.bits) and self.bits in (2, 4)):
            raise ValueError(f"KeySketch: bits: expected 2 or 4, got {self.bits!r}")
        most = self.max_tokens
        if most is not None and not (is_count(most) and most > 0):
            raise ValueError(f"KeySketch: max_tokens: expected a whole number of at least 1, or None, got {most!r}")
        self._check_dense_below()

    def select(self, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> Selection:
        """See `Selector.select`."""
        check_step("KeySketch", q, cache, scoring)
        codes, norms = cache.kept("sketch", by="KeySketch")
        scoring = scoring.for_ops(q)
        selected, counts, delta_bound = ops.select_sketch(
            q,
            cache.k_pages,
            codes,
            norms,
            cache.page_table,
            cache.seq_lens,
            scoring.number,
            scoring.scale,
            scoring.alibi_slopes,
            scoring.per_head,
            bits=self.bits,
            certainty=self.certainty,
            max_tokens=self.max_tokens,
        )
        # With less certainty the op's bounds are likely to hold, which proves nothing.
        return Selection(selected, counts, by_token=True, delta_bound=delta_bound if self.certainty == 1 else None)


@dataclass(frozen=True)
class TopPages(DenseBelow):
    """Selects the pages of highest merit under a budget, after arXiv 2605.21649 (top-budget) with another merit.

    A page's score lies a fifth of the way from its upper to its lower bound. Its merit is its largest weight, over the
    heads of the group, in the softmax of a head's page scores. docs/accuracy.md compares other merits.

    Attributes:
        budget: tokens per KV head whose keys are read, unless the cache is so small that it is decoded densely.
        dense_below: a cache with room for at most so many tokens is decoded densely, to the bit as with `select=None`.
            None stands for 4096 on a GPU and for 0, so never, on the CPU.
    """

    budget: int = 2048
    dense_below: int | None = field(default=None, kw_only=True)

    needs: ClassVar[Set[Need]] = frozenset({"minmax"})
    DENSE_BELOW: ClassVar[Mapping[str, int]] = {"cuda": 4096}
    LOWER: ClassVar[float] = ops.CONSTANTS.rank_lower  # the `lower` of `score_pages`

    def __post_init__(self) -> None:
        if not (is_count(self.budget) and self.budget > 0):
            raise ValueError(f"TopPages: budget: expected a whole number of at least 1 token, got {self.budget!r}")
        self._check_dense_below()

    def select(self, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> Selection:
        """See `Selector.select`."""
        check_step("TopPages", q, cache, scoring)
        k_min, k_max = cache.kept("minmax", by="TopPages")
        scores = ops.score_pages(
            q,
            k_min,
            k_max,
            cache.page_table,
            cache.seq_lens,
            cache.page_size,
            scoring.scale,
            scoring.alibi_slopes,
            self.LOWER,
        )
        return Selection(*ops.select_pages(scores, cache.seq_lens, cache.kv_heads, cache.page_size, self.budget))


@dataclass(frozen=True, kw_only=True)
class Gaussian(DenseBelow):
    """Selects the pages that a Gaussian model of their scores expects to reach the threshold.

    How many these are depends on the query. This is the Gaussian-aware selection of arXiv 2605.21649, with the
    threshold of the page mixture.

    Attributes:
        quantile: between 0 and 1. A page counts as reaching the threshold when its best token does so at this quantile
            of the token's distribution. Higher selects more. The paper's 0.95 loses more of the answers that stand in
            a single line (docs/accuracy.md).
        margin: how far below the threshold, in units of z = (alpha - 1) s, a page is still selected. inf selects all.
        dense_below: a cache with room for at most so many tokens is decoded densely, to the bit as with `select=None`.
            None stands for 16384 on a GPU and for 0, so never, on the CPU.
    """

    quantile: float = 0.99
    margin: float = 0.0
    dense_below: int | None = None

    needs: ClassVar[Set[Need]] = frozenset({"moments"})
    DENSE_BELOW: ClassVar[Mapping[str, int]] = {"cuda": 16384}

    def __post_init__(self) -> None:
        if not (is_number(self.quantile) and 0 < self.quantile < 1):
            raise ValueError(f"Gaussian: quantile: expected a number between 0 and 1, got {self.quantile!r}")
        if not is_number(self.margin) or math.isnan(self.margin):
            raise ValueError(f"Gaussian: margin: expected a number, got {self.margin!r}")
        self._check_dense_below()

    def select(self, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> Selection:
        """See `Selector.select`."""
        check_step("Gaussian", q, cache, scoring)
        k_mean, k_std = cache.kept("moments", by="Gaussian")
        scoring = scoring.for_ops(q)
        mean, std = ops.score_gaussian(
            q,
            k_mean,
            k_std,
            cache.page_table,
            cache.seq_lens,
            cache.page_size,
            scoring.scale,
            scoring.alibi_slopes,
        )
        selected, counts = ops.select_gaussian(
            mean,
            std,
            cache.seq_lens,
            cache.kv_heads,
            cache.page_size,
            scoring.number,
            self.quantile,
            self.margin,
            scoring.per_head,
        )
        return Selection(selected, counts)
