"""A paged KV cache for one attention layer."""

import torch
from torch import Tensor

from entmaxkv import ops


class PagedKVCache:
    """Keys and values of a batch of sequences in pages, with the page statistics that selectors read.

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

    Attributes:
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim].
        k_min, k_max, k_mean, k_std: [pages, kv_heads, head_dim], or None if not kept.
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

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.k_pages = empty(pages, kv_heads, page_size, head_dim)
        self.v_pages = torch.empty_like(self.k_pages)
        self.k_min = empty(pages, kv_heads, head_dim) if minmax else None
        self.k_max = empty(pages, kv_heads, head_dim) if minmax else None
        self.k_mean = empty(pages, kv_heads, head_dim) if moments else None
        self.k_std = empty(pages, kv_heads, head_dim) if moments else None
        self.page_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, max_pages)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)

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
        )

    def clear(self) -> None:
        """Empties every row; the pool stays."""
        self.seq_lens.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and of the page statistics."""
        tensors = (self.k_pages, self.v_pages, self.k_min, self.k_max, self.k_mean, self.k_std)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(batch={self.batch}, max_tokens={self.max_tokens}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, page_size={self.page_size}, dtype={self.k_pages.dtype}, "
            f"device={self.k_pages.device}, {self.nbytes / 2**20:.1f} MiB)"
        )
