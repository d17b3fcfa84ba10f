"""A paged KV cache for one attention layer."""

import copy
from collections.abc import Mapping, Sequence, Set
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from entmaxkv import check, ops

MOST_INT32 = 2**31 - 1
INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
DTYPES = torch.float32, torch.float16, torch.bfloat16  # dtypes of keys and values
MAX_HEAD_DIM = ops.CONSTANTS.max_head_dim
PAGE_SIZES = tuple(2**n for n in range(16) if ops.CONSTANTS.min_page_size <= 2**n <= ops.CONSTANTS.max_page_size)

# What selectors look at beside keys and values: the keyword of `PagedKVCache` that keeps it, and its two tensors.
Need = Literal["minmax", "moments", "sketch"]
NEEDS: dict[Need, tuple[str, str]] = {
    "minmax": ("k_min", "k_max"),
    "moments": ("k_mean", "k_std"),
    "sketch": ("codes", "norms"),
}
IN_WORDS: dict[Need, str] = {"minmax": "page bounds", "moments": "page moments", "sketch": "a key sketch"}
POOL = "k_pages", "v_pages", *NEEDS["minmax"], *NEEDS["moments"], *NEEDS["sketch"]  # tensors with one entry per page


class PagedKVCache:
    """Keys and values of a batch of sequences in pages, with the page statistics and the sketch that selectors read.

    The pool of pages is allocated once. Rows grow in place, each at its own pace, and shrink by `truncate`. Row b owns
    the physical pages b * max_pages ... (b + 1) * max_pages - 1. `reorder` copies rows, for beams and repeated prompts.

    A cache may be made inside or outside of `torch.no_grad()` and `torch.inference_mode()`, and used in either.

    Args:
        batch: rows.
        max_tokens: tokens that each row can hold; rounded up to whole pages.
        kv_heads: KV heads.
        head_dim: elements per key and value, at most 256.
        page_size: tokens per page, a power of two in 8 ... 128.
        dtype: float32, float16 or bfloat16.
        device: where its tensors are; None for torch's default device.
        minmax: keep k_min and k_max, for `TopPages`.
        moments: keep k_mean and k_std, for `Gaussian`.
        sketch: keep codes and norms, for `KeySketch`. They take 35 bytes for a key of 64 dimensions, and 67 bytes for
            one of 128.

    Attributes:
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim].
        k_min, k_max, k_mean, k_std: [pages, kv_heads, head_dim], or None if not kept.
        codes: [pages, kv_heads, 2, page_size, ceil(head_dim / 64) * 16] uint8, or None if not kept.
        norms: [pages, kv_heads, 3, page_size] uint8, or None if not kept.
        page_table: [batch, max_pages] int32.
        seq_lens: [batch] int32, tokens in each row.

    Raises:
        ValueError: a size that no kernel takes.

    Example:
        >>> cache = PagedKVCache(batch=1, max_tokens=4096, kv_heads=2, head_dim=64)
        >>> cache.append(torch.randn(1, 100, 2, 64), torch.randn(1, 100, 2, 64))
        >>> cache.seq_lens.tolist()
        [100]
    """

    def __init__(
        self,
        batch: int,
        max_tokens: int,
        kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        minmax: bool = True,
        moments: bool = True,
        sketch: bool = True,
    ) -> None:
        for name, value in (("batch", batch), ("max_tokens", max_tokens), ("kv_heads", kv_heads)):
            if not (check.is_count(value) and value > 0):
                raise ValueError(f"PagedKVCache: {name}: expected a whole number of at least 1, got {value!r}")
        if not (check.is_count(head_dim) and 1 <= head_dim <= MAX_HEAD_DIM):
            expected = f"expected a whole number in 1 ... {MAX_HEAD_DIM}"
            raise ValueError(f"PagedKVCache: head_dim: {expected}, got {head_dim!r}")
        check_page_size("PagedKVCache", page_size)
        if dtype not in DTYPES:
            raise ValueError(f"PagedKVCache: dtype: expected float32, float16 or bfloat16, got {dtype!r}")
        _check_kinds("PagedKVCache", minmax=minmax, moments=moments, sketch=sketch)
        self.batch = batch
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.page_size = page_size
        max_pages = -(-max_tokens // page_size)
        self.max_tokens = max_pages * page_size
        pages = batch * max_pages

        # Tensors that are made under inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.k_pages = torch.empty((pages, kv_heads, page_size, head_dim), dtype=dtype, device=device)
            self.v_pages = torch.empty_like(self.k_pages)
            self.page_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, max_pages)
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.k_min: Tensor | None = None
        self.k_max: Tensor | None = None
        self.k_mean: Tensor | None = None
        self.k_std: Tensor | None = None
        self.codes: Tensor | None = None
        self.norms: Tensor | None = None
        self._allocate(minmax=minmax, moments=moments, sketch=sketch)

    def _allocate(self, *, minmax: bool, moments: bool, sketch: bool) -> None:
        """Makes the tensors that are asked for and not there yet."""
        pages, kv_heads, page_size, head_dim = self.k_pages.shape

        def statistic() -> Tensor:
            return self.k_pages.new_empty((pages, kv_heads, head_dim))

        with torch.inference_mode(False):
            if minmax and self.k_min is None:
                self.k_min, self.k_max = statistic(), statistic()
            if moments and self.k_mean is None:
                self.k_mean, self.k_std = statistic(), statistic()
            if sketch and self.codes is None:
                row_bytes = -(-head_dim // ops.CONSTANTS.sketch_block) * ops.CONSTANTS.sketch_block_bytes
                self.codes = self.k_pages.new_empty((pages, kv_heads, 2, page_size, row_bytes), dtype=torch.uint8)
                self.norms = self.k_pages.new_empty((pages, kv_heads, 3, page_size), dtype=torch.uint8)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Clones tensors that were copied or loaded under inference mode, so that they can be written in any mode."""
        with torch.inference_mode(False):
            for name, value in state.items():
                setattr(self, name, value.clone() if isinstance(value, Tensor) and value.is_inference() else value)

    def keep(self, *, minmax: bool = False, moments: bool = False, sketch: bool = False) -> None:
        """Starts to keep more, and computes it from the keys that are there. What is kept already stays.

        Args:
            minmax, moments, sketch: as at construction.
        """
        _check_kinds("PagedKVCache.keep", minmax=minmax, moments=moments, sketch=sketch)
        new_statistics = (minmax and self.k_min is None) or (moments and self.k_mean is None)
        new_sketch = sketch and self.codes is None
        self._allocate(minmax=minmax, moments=moments, sketch=sketch)
        table = self.page_table, self.seq_lens
        if new_statistics:
            ops.page_stats(self.k_pages, *table, self.k_min, self.k_max, self.k_mean, self.k_std)
        if new_sketch and self.codes is not None and self.norms is not None:
            ops.build_sketch(self.k_pages, *table, self.codes, self.norms)

    def kept(self, need: Need, *, by: str) -> tuple[Tensor, Tensor]:
        """The two tensors of what a selector needs: k_min and k_max, k_mean and k_std, or codes and norms.

        Args:
            need: "minmax", "moments" or "sketch".
            by: who asks, to be named where the cache does not keep them.

        Raises:
            ValueError: the cache does not keep them.
        """
        first, second = (getattr(self, name) for name in NEEDS[need])
        if first is None or second is None:
            raise ValueError(
                f"{by}: cache: expected {IN_WORDS[need]}, got a cache made with {need}=False; use {need}=True"
            )
        return first, second

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None) -> None:
        """Appends new tokens, a whole prompt or a single one, to every row in place.

        Args:
            k, v: [batch, tokens, kv_heads, head_dim], the cache's dtype.
            lengths: [batch] integers of any width on any device. Row b appends its first lengths[b] tokens; None
                appends all.

        Raises:
            ValueError, RuntimeError: an argument does not fit, or a row has no room for its tokens. The cache stays as
                it was. On a CUDA device a full row cannot be seen without waiting: there the tokens that do not fit
                are dropped.
        """
        for name, value in (("k", k), ("v", v)):
            check.tensor(f"PagedKVCache.append: {name}", value, "[batch, tokens, kv_heads, head_dim]")
        # The op checks int32 lengths on the cache's device itself, also in compiled steps.
        own = torch.int32, self.seq_lens.device
        if lengths is not None and not (isinstance(lengths, Tensor) and (lengths.dtype, lengths.device) == own):
            lengths = self._row_numbers("append: lengths", lengths, most=k.shape[1], count=self.batch)
        ops.append_kv(
            k,
            v,
            lengths,
            self.k_pages,
            self.v_pages,
            self.k_min,
            self.k_max,
            self.k_mean,
            self.k_std,
            self.page_table,
            self.seq_lens,
            self.codes,
            self.norms,
        )

    def truncate(self, lengths: int | Tensor | Sequence[int]) -> None:
        """Drops the newest tokens of every row in place, as if they had never been appended.

        This reads only the page table and the last page of every row, and does not wait for the device.

        Args:
            lengths: one number for all rows, or [batch] integers of any width on any device. Row b keeps its first
                min(lengths[b], seq_lens[b]) tokens.

        Raises:
            ValueError: an argument does not fit, for example because a number is negative. The cache stays as it was.
                Negative numbers in a tensor on a CUDA device or in a compiled function cannot be seen: there they count
                as 0.
        """
        if isinstance(lengths, Integral) and not isinstance(lengths, bool):
            if lengths < 0:
                raise ValueError(f"PagedKVCache.truncate: lengths: expected at least 0, got {lengths}")
            kept = torch.full_like(self.seq_lens, min(int(lengths), self.max_tokens))
        else:
            kept = self._row_numbers("truncate: lengths", lengths, most=None, count=self.batch)
        kept = torch.minimum(self.seq_lens, kept.clamp(min=0))
        if self.k_min is None and self.k_mean is None:
            self.seq_lens.copy_(kept)
            return
        uses = self._uses()
        # seq_lens moves first: statistics that count too many keys are still bounds, but with too few they are not.
        self.seq_lens.copy_(kept)
        last = ((self.seq_lens - 1) // self.page_size).clamp(0, self.page_table.shape[1] - 1)
        last_pages = self.page_table.gather(1, last[:, None].long())  # [batch, 1]
        # A page that another row uses, too, keeps its statistics: they are bounds for both rows.
        alone = uses[last_pages[:, 0].long().clamp(0, len(uses) - 1)] <= 1
        tokens = torch.where(alone, self.seq_lens - last * self.page_size, 0)
        ops.page_stats(self.k_pages, last_pages, tokens, self.k_min, self.k_max, self.k_mean, self.k_std)

    def _uses(self) -> Tensor:
        """Counts how often each physical page is in use: [pages] int32."""
        first = torch.arange(0, self.max_tokens, self.page_size, device=self.seq_lens.device)
        used = (first < self.seq_lens[:, None]).flatten().int()
        pages = self.page_table.flatten().long().clamp(0, len(self.k_pages) - 1)
        return used.new_zeros(len(self.k_pages)).scatter_add_(0, pages, used)

    def snapshot(self) -> "PagedKVCache":
        """A view of the cache with a copy of the lengths: a step of several ops sees one state while others append."""
        view = copy.copy(self)
        view.seq_lens = self.seq_lens.clone()
        return view

    def reorder(self, rows: Tensor | Sequence[int], *, tokens: int | None = None) -> None:
        """Row i becomes a copy of what row rows[i] was, with all that is kept of it.

        Rows may repeat, and there may be fewer or more of them than before. With as many as before, everything is
        copied in place. Otherwise `batch` and all tensors are new. Nothing waits for a CUDA device. An interrupted call
        either changes nothing or empties the rows that it was to change.

        Args:
            rows: [new batch] integers of any width on any device, ids of rows.
            tokens: the most tokens that any row holds, if known: no page behind them is copied. On the CPU the cache
                looks for itself.

        Raises:
            ValueError: an argument does not fit, for example because an id is not in 0 ... batch - 1. The cache stays
                as it was. Ids in a tensor on a CUDA device or in a compiled function are trusted.

        Example:
            >>> cache = PagedKVCache(batch=1, max_tokens=64, kv_heads=1, head_dim=64)
            >>> cache.append(torch.randn(1, 9, 1, 64), torch.randn(1, 9, 1, 64))
            >>> cache.reorder([0, 0, 0])  # three continuations of one prompt
            >>> cache.seq_lens.tolist()
            [9, 9, 9]
        """
        rows = self._row_numbers("reorder: rows", rows, most=self.batch - 1, count=None)
        if tokens is not None and not check.is_count(tokens):
            raise ValueError(f"PagedKVCache.reorder: tokens: expected at least 0 tokens, or None, got {tokens!r}")
        batch, max_pages = len(rows), self.page_table.shape[1]
        visible = self.seq_lens.device.type == "cpu" and not torch.compiler.is_compiling()
        if visible:
            tokens = int(self.seq_lens.max())
        held = self.max_tokens if tokens is None else min(tokens, self.max_tokens)
        in_place = batch * max_pages == len(self.k_pages)
        into = self if in_place else self._empty(batch)
        own = torch.arange(batch * max_pages, dtype=torch.int32, device=self.page_table.device).view(batch, max_pages)

        changed: slice | Tensor = slice(None)  # which of the new rows are written
        if in_place and visible:
            stays = (rows == torch.arange(batch, device=rows.device)) & (self.page_table == own).all(dim=1)
            changed = stays.logical_not().nonzero().flatten()
        pages = slice(-(-held // self.page_size))
        sources, targets = self.page_table[rows[changed], pages], own[changed, pages]
        lengths = self.seq_lens[rows[changed]].clamp(max=held)
        into.seq_lens[changed] = 0
        for name in POOL:
            source, target = getattr(self, name), getattr(into, name)
            if source is not None:
                target[targets] = source[sources]
        into.page_table.copy_(own)
        into.seq_lens[changed] = lengths
        vars(self).update(vars(into))

    def _empty(self, batch: int) -> "PagedKVCache":
        """An empty cache like this one, with another number of rows."""
        return PagedKVCache(
            batch,
            self.max_tokens,
            self.kv_heads,
            self.head_dim,
            page_size=self.page_size,
            dtype=self.k_pages.dtype,
            device=self.k_pages.device,
            minmax=self.k_min is not None,
            moments=self.k_mean is not None,
            sketch=self.codes is not None,
        )

    def _row_numbers(self, name: str, value: Any, *, most: int | None, count: int | None) -> Tensor:
        """Turns whole numbers into a tensor [count] int32 on the cache's device.

        Numbers that can be looked at without waiting are checked to be in 0 ... most.
        """
        wanted = f"PagedKVCache.{name}: expected whole numbers [{'batch' if count is None else f'batch = {count}'}]"
        visible = True
        if isinstance(value, Tensor):
            if value.dtype not in INTEGERS or value.dim() != 1:
                raise ValueError(f"{wanted}, got {check.described(value)}")
            visible = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(value, Tensor) and not visible:
            numbers = value.long().clamp(-1, MOST_INT32).int()
        else:
            try:
                if isinstance(value, Mapping | Set):
                    raise TypeError("no order")
                listed = value.tolist() if isinstance(value, Tensor) else [check.whole(number) for number in value]
            except TypeError:
                raise ValueError(f"{wanted}, got {check.described(value)}") from None
            for number in listed:
                if number < 0 or (most is not None and number > most):
                    range_ = "at least 0" if most is None else f"0 ... {most}"
                    raise ValueError(f"PagedKVCache.{name}: expected {range_}, got {number}")
            numbers = torch.tensor([min(number, MOST_INT32) for number in listed], dtype=torch.int32, device="cpu")
        if len(numbers) == 0 or len(numbers) != (count or len(numbers)):
            raise ValueError(f"{wanted}, got {len(numbers)}")
        return numbers.to(self.seq_lens.device, non_blocking=True)

    def clear(self) -> None:
        """Empties every row and keeps the memory."""
        self.seq_lens.zero_()

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values, page statistics and sketch."""
        return sum(tensor.nbytes for name in POOL if (tensor := getattr(self, name)) is not None)

    def __repr__(self) -> str:
        lacks = "".join(f"{need}=False, " for need, (name, _) in NEEDS.items() if getattr(self, name) is None)

        def mib(*names: str) -> str:
            tensors = (getattr(self, name) for name in names)
            return f"{sum(tensor.nbytes for tensor in tensors if tensor is not None) / 2**20:.1f} MiB"

        return (
            f"PagedKVCache(batch={self.batch}, max_tokens={self.max_tokens}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, page_size={self.page_size}, dtype={self.k_pages.dtype}, "
            f"{lacks}device={self.k_pages.device})\n"
            f"  {self._fill()}; keys and values {mib(*POOL[:2])}, statistics {mib(*POOL[2:6])}, sketch {mib(*POOL[6:])}"
        )

    def _fill(self) -> str:
        """Says how many tokens the cache holds. This waits for the device, if it may."""
        room = f"{self.batch * self.max_tokens} tokens"
        capturing = self.seq_lens.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(self.seq_lens) is not Tensor or self.seq_lens.is_meta or capturing or torch.compiler.is_compiling():
            return f"room for {room}"
        return f"{int(self.seq_lens.sum())} of {room}"


def check_page_size(name: str, page_size: int) -> None:
    if not (check.is_count(page_size) and page_size in PAGE_SIZES):
        expected = f"{', '.join(map(str, PAGE_SIZES[:-1]))} or {PAGE_SIZES[-1]}"
        raise ValueError(f"{name}: page_size: expected {expected}, got {page_size!r}")


def _check_kinds(name: str, **kinds: bool) -> None:
    for kind, value in kinds.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {kind}: expected True or False, got {check.described(value)}")
