"""Selectors: what of the cache a query reads, by page or by token."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from entmaxkv import check, ops
from entmaxkv.cache import PagedKVCache
from entmaxkv.check import is_count, is_number


class PageSelector(Protocol):
    """Anything that can choose pages for a query."""

    def pages(
        self,
        q: Tensor,
        cache: PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Chooses pages for every KV head.

        Args:
            q: [batch, q_heads, head_dim].
            cache: what to choose from.
            alpha: in [1, 2], or [q_heads] float32.
            scale: default 1 / sqrt(head_dim).
            alibi_slopes: [q_heads] float32 or None.

        Returns:
            selected: [batch, kv_heads, max_selected] int32, logical pages in ascending order, padded with -1.
            counts: [batch, kv_heads] int32, pages selected.
        """
        ...


class TokenSelector(Protocol):
    """Anything that can choose single tokens for a query, and say what it left out."""

    def tokens(
        self,
        q: Tensor,
        cache: PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses tokens for every KV head.

        Args:
            As those of `PageSelector.pages`.

        Returns:
            selected: [batch, kv_heads, max_selected] int32, positions in ascending order; behind counts anything.
            counts: [batch, kv_heads] int32, tokens selected.
            delta_bound: [batch, q_heads] float32, a proved upper bound of the dense weight of all other tokens: 0 where
                none of them has any, 1 where nothing is known.
        """
        ...


Selector = PageSelector | TokenSelector


class Selection(NamedTuple):
    """What a selector chose for a query.

    Attributes:
        selected: [batch, kv_heads, max_selected] int32, pages or token positions in ascending order.
        counts: [batch, kv_heads] int32, how many of them count.
        by_token: whether they are tokens.
        delta_bound: [batch, q_heads] float32, see `TokenSelector.tokens`; None from a selector of pages.
    """

    selected: Tensor
    counts: Tensor
    by_token: bool
    delta_bound: Tensor | None

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


def check_step(name: str, q: Tensor, cache: PagedKVCache, *, scale: float | None, alibi_slopes: Tensor | None) -> None:
    """Refuses arguments of a decode step, or of a selector, that are not of the kind that the ops take."""
    if not isinstance(cache, PagedKVCache):
        raise ValueError(f"{name}: cache: expected a PagedKVCache, got {check.described(cache)}")
    check.tensor(f"{name}: q", q, "[batch, q_heads, head_dim]")
    if scale is not None and not is_number(scale):
        raise ValueError(f"{name}: scale: expected a number or None, got {check.described(scale)}")
    if alibi_slopes is not None:
        check.tensor(f"{name}: alibi_slopes", alibi_slopes, "[q_heads]")


def _chooses(select: object, what: str) -> bool:
    return callable(getattr(select, what, None))


def check_select(name: str, select: Selector | None) -> None:
    """Refuses what can choose neither pages nor tokens, such as the class of a selector."""
    able = _chooses(select, "tokens") or _chooses(select, "pages")
    if select is not None and (isinstance(select, type) or not able):
        expected = "a selector such as KeySketch(), or None"
        raise ValueError(f"{name}: select: expected {expected}, got {check.described(select)}")


def split_alpha(name: str, alpha: float | Tensor, q: Tensor) -> tuple[float, Tensor | None]:
    """alpha and head_alpha of the ops, from the one argument of the Python API."""
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        return 1.5, alpha
    if isinstance(alpha, Tensor) or not is_number(alpha):
        raise ValueError(f"{name}: alpha: expected a number or a tensor [q_heads], got {check.described(alpha)}")
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import

        # An op is compiled anew for every value of a number. A number that has changed between calls therefore goes
        # in as a tensor; of arithmetic on tensors the compiler keeps such numbers as variables.
        if not has_static_value(alpha):
            return 1.5, (torch.ones(q.shape[1], dtype=torch.float64, device=q.device) * alpha).float()
    return float(alpha), None


def selection(
    select: Selector | None,
    q: Tensor,
    cache: PagedKVCache,
    *,
    alpha: float | Tensor,
    scale: float | None,
    alibi_slopes: Tensor | None,
) -> Selection | None:
    """What a selector chooses; None where the whole cache is to be read, as selecting does not pay."""
    if select is None or cache.max_tokens <= dense_below(select, cache.k_pages.device.type):
        return None
    by_token = _chooses(select, "tokens")
    choose = select.tokens if by_token else select.pages  # type: ignore[union-attr]
    chosen = choose(q, cache, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes)
    expected = ("selected", "counts", "delta_bound") if by_token else ("selected", "counts")
    if not isinstance(chosen, tuple) or list(map(type, chosen)) != [Tensor] * len(expected):
        raise ValueError(
            f"{type(select).__name__}.{choose.__name__}: expected tensors {', '.join(expected)}, got "
            f"{check.described(chosen)}"
        )
    return Selection(chosen[0], chosen[1], by_token, chosen[2] if by_token else None)


def dense_below(select: Selector, device: str) -> int:
    """The `dense_below` of a selector, by its class and the device where it says None."""
    own: int | None = getattr(select, "dense_below", 0)
    return getattr(select, "DENSE_BELOW", {}).get(device, 0) if own is None else own


def check_dense_below(name: str, value: int | None) -> None:
    if value is not None and not is_count(value):
        raise ValueError(f"{name}: dense_below: expected a number of tokens, at least 0, or None, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class KeySketch:
    """The tokens whose weight the sketch of their keys cannot rule out: the result is that of dense decoding.

    Without `max_tokens` every token of the dense support is among them, which `DecodeInfo.certified` states for each
    head. How many there are depends on the query: a head with a wide support reads more.

    Attributes:
        certainty: 1 proves. Less, such as 1 - 1e-9, takes the error of a score for the sum of random signs that the
            rotation makes it: fewer tokens, each bound holds with that probability, and nothing is proved.
        bits: 4 reads the second plane of the codes where the first leaves doubt; 2 reads the first alone.
        max_tokens: most tokens per KV head whose keys are read, those to which their bounds leave most weight; the rest
            goes into `DecodeInfo.delta_bound`. None: as many as it takes, which are all where alpha is 1.
        dense_below: a cache with room for no more tokens than that is decoded densely, to the bit as with
            `select=None`. None: 65536 on a GPU, 0, so never, on the CPU.
    """

    certainty: float = 1.0
    bits: int = 4
    max_tokens: int | None = None
    dense_below: int | None = None

    DENSE_BELOW: ClassVar[dict[str, int]] = {"cuda": 65536}  # by device; bench/NOTES.md

    def __post_init__(self) -> None:
        if not (is_number(self.certainty) and 0 < self.certainty <= 1):
            raise ValueError(f"KeySketch: certainty: expected a number above 0, at most 1, got {self.certainty!r}")
        if not (is_count(self.bits) and self.bits in (2, 4)):
            raise ValueError(f"KeySketch: bits: expected 2 or 4, got {self.bits!r}")
        most = self.max_tokens
        if most is not None and not (is_count(most) and most > 0):
            raise ValueError(f"KeySketch: max_tokens: expected a whole number of at least 1, or None, got {most!r}")
        check_dense_below("KeySketch", self.dense_below)

    def tokens(
        self,
        q: Tensor,
        cache: PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `TokenSelector.tokens`."""
        check_step("KeySketch", q, cache, scale=scale, alibi_slopes=alibi_slopes)
        if cache.codes is None or cache.norms is None:
            raise ValueError(
                "KeySketch: cache: expected a key sketch, got a cache made with sketch=False; use sketch=True"
            )
        alpha, head_alpha = split_alpha("KeySketch", alpha, q)
        selected, counts, delta_bound = ops.select_sketch(
            q,
            cache.k_pages,
            cache.codes,
            cache.norms,
            cache.page_table,
            cache.seq_lens,
            alpha,
            scale,
            alibi_slopes,
            head_alpha,
            bits=self.bits,
            certainty=self.certainty,
            max_tokens=self.max_tokens,
        )
        if self.certainty < 1:  # what the op bounds holds almost certainly, which is no proof
            all_read = counts >= cache.seq_lens.clamp(max=cache.max_tokens)[:, None]
            group = q.shape[1] // cache.kv_heads
            delta_bound = all_read.logical_not().to(torch.float32).repeat_interleave(group, dim=1)
        return selected, counts, delta_bound


@dataclass(frozen=True)
class TopPages:
    """The pages whose boxes promise most, under a budget: after arXiv 2605.21649, top-budget, with another rank.

    A page's score is its upper bound with a fifth of the way to its lower bound taken off; its rank is its largest
    share, over the heads of the group, in the softmax of a head's page scores. docs/accuracy.md compares others.

    Attributes:
        budget: tokens per KV head whose keys are read, unless the cache is so small that it is decoded densely.
        dense_below: a cache with room for no more tokens than that is decoded densely, to the bit as with
            `select=None`. None: 4096 on a GPU, 0, so never, on the CPU.
    """

    budget: int = 2048
    dense_below: int | None = field(default=None, kw_only=True)

    DENSE_BELOW: ClassVar[dict[str, int]] = {"cuda": 4096}  # by device; bench/NOTES.md
    LOWER: ClassVar[float] = 0.25  # of `score_pages`

    def __post_init__(self) -> None:
        if not (is_count(self.budget) and self.budget > 0):
            raise ValueError(f"TopPages: budget: expected a whole number of at least 1 token, got {self.budget!r}")
        check_dense_below("TopPages", self.dense_below)

    def pages(
        self,
        q: Tensor,
        cache: PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `PageSelector.pages`."""
        check_step("TopPages", q, cache, scale=scale, alibi_slopes=alibi_slopes)
        if cache.k_min is None or cache.k_max is None:
            raise ValueError(
                "TopPages: cache: expected page bounds, got a cache made with minmax=False; use minmax=True"
            )
        scores = ops.score_pages(
            q,
            cache.k_min,
            cache.k_max,
            cache.page_table,
            cache.seq_lens,
            cache.page_size,
            scale,
            alibi_slopes,
            self.LOWER,
        )
        return ops.select_pages(scores, cache.seq_lens, cache.kv_heads, cache.page_size, self.budget)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The pages that a Gaussian model of their scores expects to reach the threshold; the budget follows the query.

    arXiv 2605.21649, Gaussian-aware selection, with the threshold of the page mixture.

    Attributes:
        quantile: between 0 and 1; a page counts as reaching the threshold when its best token does so at this
            quantile of its distribution. Higher keeps more. The paper's is 0.95, which loses more of what stands in
            single lines (docs/accuracy.md).
        margin: how far below the threshold, in units of z = (alpha - 1) s, a page is still kept. inf keeps all.
        dense_below: a cache with room for no more tokens than that is decoded densely, to the bit as with
            `select=None`. None: 16384 on a GPU, 0, so never, on the CPU.
    """

    quantile: float = 0.99
    margin: float = 0.0
    dense_below: int | None = None

    DENSE_BELOW: ClassVar[dict[str, int]] = {"cuda": 16384}  # by device; bench/NOTES.md

    def __post_init__(self) -> None:
        if not (is_number(self.quantile) and 0 < self.quantile < 1):
            raise ValueError(f"Gaussian: quantile: expected a number between 0 and 1, got {self.quantile!r}")
        if not is_number(self.margin) or math.isnan(self.margin):
            raise ValueError(f"Gaussian: margin: expected a number, got {self.margin!r}")
        check_dense_below("Gaussian", self.dense_below)

    def pages(
        self,
        q: Tensor,
        cache: PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `PageSelector.pages`."""
        check_step("Gaussian", q, cache, scale=scale, alibi_slopes=alibi_slopes)
        if cache.k_mean is None or cache.k_std is None:
            raise ValueError(
                "Gaussian: cache: expected page moments, got a cache made with moments=False; use moments=True"
            )
        mean, std = ops.score_gaussian(
            q,
            cache.k_mean,
            cache.k_std,
            cache.page_table,
            cache.seq_lens,
            cache.page_size,
            scale,
            alibi_slopes,
        )
        alpha, head_alpha = split_alpha("Gaussian", alpha, q)
        return ops.select_gaussian(
            mean,
            std,
            cache.seq_lens,
            cache.kv_heads,
            cache.page_size,
            alpha,
            self.quantile,
            self.margin,
            head_alpha,
        )
