"""What a selector costs and what it loses, against the dense result in float64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entmaxkv import reference
from entmaxkv.attention import decode
from entmaxkv.cache import PagedKVCache
from entmaxkv.select import KeySketch, Selector, selection


@dataclass(frozen=True)
class Metrics:
    """One decode step beside the dense one.

    Attributes:
        dropped_mass: [batch, q_heads] float64, delta: dense weight of the tokens that were not read.
        support_recall: [batch, q_heads] float64, share of the dense support that was read.
        output_error: [batch, q_heads] float64, ||out - dense|| / ||dense||.
        support: [batch, q_heads] int32, tokens to which `decode` gave weight.
        tokens: [batch, kv_heads] int32, tokens whose keys were read.
        certified: [batch, q_heads] bool, what `decode` proved.
        delta_bound: [batch, q_heads] float32, likewise.
        refined: [batch, kv_heads] int32, tokens whose plane 1 was read; 0 without a sketch.
        index_bytes: what the selector looks at. Two statistics of every page; or of the sketch plane 0, scale and norm
            of every token, plane 1 and norm of the refined tokens, and the keys whose exact scores give the lower
            bound of tau, as if no two heads took the same one.
        bytes_read: these, the keys of `tokens`, and the values that any head of their group gives weight.
        kv_bytes: all keys and values of the tokens in the cache.
    """

    dropped_mass: Tensor
    support_recall: Tensor
    output_error: Tensor
    support: Tensor
    tokens: Tensor
    certified: Tensor
    delta_bound: Tensor
    refined: Tensor
    index_bytes: int
    bytes_read: int
    kv_bytes: int

    @property
    def share(self) -> float:
        """bytes_read over kv_bytes."""
        return self.bytes_read / self.kv_bytes if self.kv_bytes else 0.0


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
    dropped_mass = torch.zeros(out.shape[:2], dtype=torch.float64, device="cpu")
    support_recall = torch.ones_like(dropped_mass)
    output_error = torch.zeros_like(dropped_mass)
    row_bytes = cache.head_dim * cache.k_pages.element_size()
    seq_lens = cache.seq_lens.tolist()
    rows_read = int(info.tokens.sum())
    read = None if chosen is None else chosen.reads(max(seq_lens, default=0), cache.page_size)
    for b, seq_len in enumerate(seq_lens):
        if seq_len == 0:
            continue
        k = reference.gather(cache.k_pages, cache.page_table[b], seq_len)
        v = reference.gather(cache.v_pages, cache.page_table[b], seq_len)
        keep = torch.ones(cache.kv_heads, seq_len, dtype=torch.bool, device=q.device)
        if read is not None:
            keep = read[b, :, :seq_len]
        heads = keep.repeat_interleave(q.shape[1] // cache.kv_heads, dim=0)
        dense, p, _ = reference.attention(q[b], k, v, **options)
        weight = p if chosen is None else reference.attention(q[b], k, v, keep=keep, **options)[1]
        dropped_mass[b] = p.masked_fill(heads, 0).sum(dim=1)
        support_recall[b] = ((p > 0) & heads).sum(dim=1).double() / (p > 0).sum(dim=1)
        output_error[b] = (out[b].double() - dense).norm(dim=1) / dense.norm(dim=1)
        rows_read += int((weight > 0).view(cache.kv_heads, -1, seq_len).any(dim=1).sum())
    refined, index_bytes = index(select if chosen else None, q, cache, **options)
    return Metrics(
        dropped_mass=dropped_mass,
        support_recall=support_recall,
        output_error=output_error,
        support=info.support,
        tokens=info.tokens,
        certified=info.certified,
        delta_bound=info.delta_bound,
        refined=refined,
        index_bytes=index_bytes,
        bytes_read=rows_read * row_bytes + index_bytes,
        kv_bytes=2 * sum(seq_lens) * cache.kv_heads * row_bytes,
    )


def index(
    select: Selector | None,
    q: Tensor,
    cache: PagedKVCache,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, int]:
    """`refined` and `index_bytes` of a step, see `Metrics`."""
    none = torch.zeros((q.shape[0], cache.kv_heads), dtype=torch.int32, device=q.device)
    row_bytes = cache.head_dim * cache.k_pages.element_size()
    seq_lens = cache.seq_lens.tolist()
    if select is None:
        return none, 0
    if not isinstance(select, KeySketch) or cache.codes is None:
        pages = sum(-(-seq_len // cache.page_size) for seq_len in seq_lens)
        return none, 2 * pages * cache.kv_heads * row_bytes
    refined, group, plane = none, q.shape[1] // cache.kv_heads, cache.codes.shape[-1]
    if select.bits == 4:  # what the first plane does not rule out is what it alone would select
        coarse = KeySketch(certainty=select.certainty, bits=2)
        refined = coarse.tokens(q, cache, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes)[1]
    sampled = sum(min(seq_len, 64 * group) for seq_len in seq_lens)  # at most 64 of each head are scored exactly
    of_all = ((plane + 2) * sum(seq_lens) + row_bytes * sampled) * cache.kv_heads
    return refined, of_all + (plane + 1) * int(refined.sum())
