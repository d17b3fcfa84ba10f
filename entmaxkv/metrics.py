"""What a selector costs and what it loses, against the dense result in float64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entmaxkv import reference
from entmaxkv.attention import decode
from entmaxkv.cache import PagedKVCache
from entmaxkv.select import Selector, selection


@dataclass(frozen=True)
class Metrics:
    """One decode step beside the dense one.

    Attributes:
        dropped_mass: [batch, q_heads] float64, delta: dense weight of the tokens that were not read.
        support_recall: [batch, q_heads] float64, share of the dense support that was read.
        output_error: [batch, q_heads] float64, ||out - dense|| / ||dense||.
        support: [batch, q_heads] int32, tokens to which `decode` gave weight.
        tokens: [batch, kv_heads] int32, tokens whose keys were read.
        bytes_read: keys of these tokens, values that any head of their group gives weight, and the page
            statistics that the selector looks at.
        kv_bytes: all keys and values of the tokens in the cache.
    """

    dropped_mass: Tensor
    support_recall: Tensor
    output_error: Tensor
    support: Tensor
    tokens: Tensor
    bytes_read: int
    kv_bytes: int


def measure(
    q: Tensor,
    cache: PagedKVCache,
    *,
    select: Selector | None,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Metrics:
    """Decodes q [batch, q_heads, head_dim] with a selector and compares with dense attention in float64.

    Rows without tokens drop nothing and have no error. The arguments are those of `decode`.

    Example:
        >>> cache = PagedKVCache(batch=1, max_tokens=64, kv_heads=1, head_dim=64)
        >>> cache.append(torch.randn(1, 64, 1, 64), torch.randn(1, 64, 1, 64))
        >>> measure(torch.randn(1, 4, 64), cache, select=None).dropped_mass.tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """
    out, info = decode(q, cache, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes, select=select, return_info=True)
    chosen = selection(select, q, cache, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes)
    options: dict[str, Any] = {"alpha": alpha, "scale": scale, "alibi_slopes": alibi_slopes}
    dropped_mass = torch.zeros(out.shape[:2], dtype=torch.float64)
    support_recall = torch.ones_like(dropped_mass)
    output_error = torch.zeros_like(dropped_mass)
    row_bytes = cache.head_dim * cache.k_pages.element_size()
    seq_lens = cache.seq_lens.tolist()
    rows_read = int(info.tokens.sum())
    for b, seq_len in enumerate(seq_lens):
        if seq_len == 0:
            continue
        k = reference.gather(cache.k_pages, cache.page_table[b], seq_len)
        v = reference.gather(cache.v_pages, cache.page_table[b], seq_len)
        keep = torch.ones(cache.kv_heads, seq_len, dtype=torch.bool, device=q.device)
        if chosen is not None:
            keep = _tokens(chosen[0][b], chosen[1][b], seq_len, cache.page_size)
        heads = keep.repeat_interleave(q.shape[1] // cache.kv_heads, dim=0)
        dense, p, _ = reference.attention(q[b], k, v, **options)
        weight = p if chosen is None else reference.attention(q[b], k, v, keep=keep, **options)[1]
        dropped_mass[b] = p.masked_fill(heads, 0).sum(dim=1)
        support_recall[b] = ((p > 0) & heads).sum(dim=1) / (p > 0).sum(dim=1)
        output_error[b] = (out[b].double() - dense).norm(dim=1) / dense.norm(dim=1)
        rows_read += int((weight > 0).view(cache.kv_heads, -1, seq_len).any(dim=1).sum())
    pages = sum(-(-seq_len // cache.page_size) for seq_len in seq_lens)
    statistics = 2 * pages * cache.kv_heads if chosen else 0
    return Metrics(
        dropped_mass=dropped_mass,
        support_recall=support_recall,
        output_error=output_error,
        support=info.support,
        tokens=info.tokens,
        bytes_read=(rows_read + statistics) * row_bytes,
        kv_bytes=2 * sum(seq_lens) * cache.kv_heads * row_bytes,
    )


def _tokens(selected: Tensor, counts: Tensor, seq_len: int, page_size: int) -> Tensor:
    """keep [kv_heads, seq_len], bool, of the pages selected [kv_heads, max_selected], counts [kv_heads]."""
    pages = torch.zeros(selected.shape[0], -(-seq_len // page_size), dtype=torch.bool, device=selected.device)
    for head, count in enumerate(counts.tolist()):
        pages[head, selected[head, :count].long()] = True
    return pages.repeat_interleave(page_size, dim=1)[:, :seq_len]
