"""A paged KV cache for one attention layer."""

import torch
from torch import Tensor

from entmaxkv import ops


class PagedKVCache:
    """Keys and values of a batch of sequences in pages, with the page statistics and the sketch that selectors read.

    The pool is allocated once; rows grow in place, each at its own pace. Row b owns the physical pages
    b * max_pages ... (b + 1) * max_pages - 1.

    Args:
        batch: rows.
        max_tokens: tokens that each row can hold; rounded up to whole pages.
        kv_heads: KV heads.
        head_dim: elements per key and value, at most 256.
        page_size: tokens per page, a power of two in 8 ... 128.
        dtype: float32, float16 or bfloat16.
        device: where it lives; default torch's default device.
        minmax: keep k_min and k_max, for `TopPages`.
        moments: keep k_mean and k_std, for `Gaussian`.
        sketch: keep codes and norms, for `KeySketch`: 35 bytes for a key of 64 dimensions, 67 for one of 128.

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
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PagedKVCache: {name}: expected a whole number of at least 1, got {value}")
        if not isinstance(head_dim, int) or not 1 <= head_dim <= 256:
            raise ValueError(f"PagedKVCache: head_dim: expected a whole number in 1 ... 256, got {head_dim}")
        if page_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"PagedKVCache: page_size: expected 8, 16, 32, 64 or 128, got {page_size}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"PagedKVCache: dtype: expected float32, float16 or bfloat16, got {dtype}")
        self.batch = batch
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.page_size = page_size
        max_pages = -(-max_tokens // page_size)
        self.max_tokens = max_pages * page_size
        pages = batch * max_pages

        self.k_pages = torch.empty((pages, kv_heads, page_size, head_dim), dtype=dtype, device=device)
        self.v_pages = torch.empty_like(self.k_pages)
        self.k_min: Tensor | None = None
        self.k_max: Tensor | None = None
        self.k_mean: Tensor | None = None
        self.k_std: Tensor | None = None
        self.codes: Tensor | None = None
        self.norms: Tensor | None = None
        self._allocate(minmax=minmax, moments=moments, sketch=sketch)
        self.page_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, max_pages)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)

    def _allocate(self, *, minmax: bool, moments: bool, sketch: bool) -> None:
        """Adds what is asked for and not there yet."""
        pages, kv_heads, page_size, head_dim = self.k_pages.shape

        def statistic() -> Tensor:
            return self.k_pages.new_empty((pages, kv_heads, head_dim))

        if minmax and self.k_min is None:
            self.k_min, self.k_max = statistic(), statistic()
        if moments and self.k_mean is None:
            self.k_mean, self.k_std = statistic(), statistic()
        if sketch and self.codes is None:
            row_bytes = -(-head_dim // 64) * 16
            self.codes = self.k_pages.new_empty((pages, kv_heads, 2, page_size, row_bytes), dtype=torch.uint8)
            self.norms = self.k_pages.new_empty((pages, kv_heads, 3, page_size), dtype=torch.uint8)

    def keep(self, *, minmax: bool = False, moments: bool = False, sketch: bool = False) -> None:
        """Keeps more than before from now on, and makes it of the keys that are there; what is kept stays.

        Args:
            minmax, moments, sketch: as at construction.
        """
        new_statistics = (minmax and self.k_min is None) or (moments and self.k_mean is None)
        new_sketch = sketch and self.codes is None
        self._allocate(minmax=minmax, moments=moments, sketch=sketch)
        table = self.page_table, self.seq_lens
        if new_statistics:
            ops.page_stats(self.k_pages, *table, self.k_min, self.k_max, self.k_mean, self.k_std)
        if new_sketch and self.codes is not None and self.norms is not None:
            ops.key_sketch(self.k_pages, *table, self.codes, self.norms)

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """Appends new tokens, a whole prompt or a single one, to every row in place.

        Args:
            k, v: [batch, tokens, kv_heads, head_dim], the cache's dtype.
            lengths: [batch] int32. Row b appends its first lengths[b] tokens; None appends all.

        Raises:
            RuntimeError: the tokens do not fit, among others; the cache stays as it was. On a CUDA device a full
                row cannot be seen without waiting: there the tokens that do not fit are dropped.
        """
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

    def clear(self) -> None:
        """Empties every row; the pool stays."""
        self.seq_lens.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, of the page statistics and of the sketch."""
        statistics = (self.k_min, self.k_max, self.k_mean, self.k_std, self.codes, self.norms)
        return sum(tensor.nbytes for tensor in (self.k_pages, self.v_pages, *statistics) if tensor is not None)

    def __repr__(self) -> str:
        kept = {"minmax": self.k_min, "moments": self.k_mean, "sketch": self.codes}
        lacks = "".join(f"{name}=False, " for name, tensor in kept.items() if tensor is None)
        return (
            f"PagedKVCache(batch={self.batch}, max_tokens={self.max_tokens}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, page_size={self.page_size}, dtype={self.k_pages.dtype}, "
            f"{lacks}device={self.k_pages.device}, {self.nbytes / 2**20:.1f} MiB)"
        )
