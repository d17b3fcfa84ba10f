"""Measures what a selector reads, and what it loses against the dense result in float64."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from entmaxkv import ops, reference
from entmaxkv.attention import decode
from entmaxkv.cache import PagedKVCache
from entmaxkv.scoring import Scoring
from entmaxkv.select import KeySketch, Selector


@dataclass(frozen=True)
class Metrics:
    """A decode step compared with the dense one.

    Attributes:
        dropped_mass: [batch, q_heads] float64, delta, the dense weight of the tokens that were not read.
        support_recall: [batch, q_heads] float64, tokens of the dense support that were read, over all of it.
        output_error: [batch, q_heads] float64, ||out - dense|| / ||dense||.
        support: [batch, q_heads] int32, tokens to which `decode` gave weight.
        tokens: [batch, kv_heads] int32, tokens whose keys were read.
        certified: [batch, q_heads] bool, whether `decode` proved that dropped_mass is 0.
        delta_bound: [batch, q_heads] float32, the bound of dropped_mass that `decode` proved.
        refined: [batch, kv_heads] int32, tokens whose plane 1 of codes was read, too; 0 without a sketch.
        index_bytes: bytes that the selector reads. A selector of pages reads two statistics of every page. `KeySketch`
            reads plane 0, scale and coarse norm of every token, plane 1 and fine norm of the refined tokens, and the
            keys whose exact scores give the floor. These keys count as if no two heads took the same one.
        bytes_read: index_bytes, the keys of `tokens`, and the values that any head of their group gives weight.
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
    """Decodes q [batch, q_heads, head_dim] with a selector, and compares the result with dense attention in float64.

    The arguments are those of `decode`. A row without tokens drops nothing and has no error.

    Example:
        >>> cache = PagedKVCache(batch=1, max_tokens=64, kv_heads=1, head_dim=64)
        >>> cache.append(torch.randn(1, 64, 1, 64), torch.randn(1, 64, 1, 64))
        >>> measure(torch.randn(1, 4, 64), cache, select=None).dropped_mass.tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """
    scoring = Scoring(alpha=alpha, scale=scale, alibi_slopes=alibi_slopes, caller="decode")
    out, info = decode(q, cache, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes, select=select, return_info=True)
    attention = partial(reference.attention, alpha=alpha, scale=scale, alibi_slopes=alibi_slopes)
    chosen = info.selection
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
        dense, p, _ = attention(q[b], k, v)
        weight = p if chosen is None else attention(q[b], k, v, keep=keep)[1]
        dropped_mass[b] = p.masked_fill(heads, 0).sum(dim=1)
        support_recall[b] = ((p > 0) & heads).sum(dim=1).double() / (p > 0).sum(dim=1)
        output_error[b] = (out[b].double() - dense).norm(dim=1) / dense.norm(dim=1)
        rows_read += int((weight > 0).view(cache.kv_heads, -1, seq_len).any(dim=1).sum())
    refined, index_bytes = index(select if chosen else None, q, cache, scoring)
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


def index(select: Selector | None, q: Tensor, cache: PagedKVCache, scoring: Scoring) -> tuple[Tensor, int]:
    """`refined` and `index_bytes` of a step that selects, see `Metrics`; zeros where `select` is None."""
    refined = torch.zeros((q.shape[0], cache.kv_heads), dtype=torch.int32, device=q.device)
    row_bytes = cache.head_dim * cache.k_pages.element_size()
    seq_lens = cache.seq_lens.tolist()
    if select is None:
        return refined, 0
    if not isinstance(select, KeySketch) or cache.codes is None:
        pages = sum(-(-seq_len // cache.page_size) for seq_len in seq_lens)
        statistics = 2 * len(select.needs & {"minmax", "moments"})
        return refined, statistics * pages * cache.kv_heads * row_bytes
    group, plane_bytes = q.shape[1] // cache.kv_heads, cache.codes.shape[-1]
    if select.bits == 4:  # plane 1 is read of the tokens that plane 0 alone would select
        refined = KeySketch(certainty=select.certainty, bits=2).select(q, cache, scoring).counts
    exact = sum(min(seq_len, ops.CONSTANTS.exact_scores * group) for seq_len in seq_lens)
    of_all = ((plane_bytes + 2) * sum(seq_lens) + row_bytes * exact) * cache.kv_heads
    return refined, of_all + (plane_bytes + 1) * int(refined.sum())
