"""Decodes one step of attention over a cache."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from entmaxkv import certify, ops
from entmaxkv.cache import PagedKVCache
from entmaxkv.scoring import Scoring
from entmaxkv.select import Selection, Selector, check_select, check_step, selection


class DecodeInfo(NamedTuple):
    """What a decode step found, and what `entmaxkv.certify` proved of it.

    Attributes:
        tau: [batch, q_heads] float32, threshold in units of z = (alpha - 1) s; logsumexp(s) where alpha = 1.
        support: [batch, q_heads] int32, tokens with p > 0.
        tokens: [batch, kv_heads] int32, tokens whose keys were read.
        certified: [batch, q_heads] bool, whether every token with weight was read, so that this is the dense result.
        delta_bound: [batch, q_heads] float32, proved upper bound of the dense weight of the tokens that were not read:
            0 where certified, at most 1. A `certainty` below 1 proves nothing of a head that left tokens out: there
            certified is False and delta_bound is 1.
        selection: what the selector chose to be read; None where the whole cache was read.
    """

    tau: Tensor
    support: Tensor
    tokens: Tensor
    certified: Tensor
    delta_bound: Tensor
    selection: Selection | None


@overload
def decode(
    q: Tensor,
    cache: PagedKVCache,
    *,
    alpha: float | Tensor = ...,
    scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    select: Selector | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def decode(
    q: Tensor,
    cache: PagedKVCache,
    *,
    alpha: float | Tensor = ...,
    scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    select: Selector | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, DecodeInfo]: ...


def decode(
    q: Tensor,
    cache: PagedKVCache,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    select: Selector | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, DecodeInfo]:
    """alpha-entmax attention of the newest token over the cache.

    s_i = scale q.k_i + slope (i - position), z = (alpha - 1) s, p_i = [z_i - tau]_+^(1 / (alpha - 1)) with
    sum p = 1, out = sum p_i v_i.

    Args:
        q: [batch, q_heads, head_dim], the cache's dtype; q_heads a multiple of the cache's kv_heads.
        cache: holds the keys and values, the query's own included.
        alpha: 1 is softmax, 1.5 the usual entmax, 2 sparsemax; a number in [1, 2] or one per head, [q_heads] float32.
            In a compiled function a number that changes between calls is rounded to float32.
        scale: default 1 / sqrt(head_dim).
        alibi_slopes: [q_heads] float32, added as slope * (i - position); None for none.
        select: `KeySketch`, `TopPages`, `Gaussian` or another `Selector`; None reads the whole cache and is exact.
        return_info: also return a `DecodeInfo`.

    Returns:
        out [batch, q_heads, head_dim] in q's dtype, zeros for an empty row; with return_info, (out, DecodeInfo).

    Raises:
        ValueError, RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Example:
        >>> cache = PagedKVCache(batch=1, max_tokens=64, kv_heads=1, head_dim=64)
        >>> cache.append(torch.randn(1, 64, 1, 64), torch.randn(1, 64, 1, 64))
        >>> decode(torch.randn(1, 4, 64), cache).shape
        torch.Size([1, 4, 64])
    """
    check_step("decode", q, cache)
    check_select("decode", select)
    scoring = Scoring(alpha=alpha, scale=scale, alibi_slopes=alibi_slopes, caller="decode").for_ops(q)
    if select is not None and q.device.type == "cpu" and not torch.compiler.is_compiling():
        cache = cache.snapshot()  # other threads may append between the ops
    pool = (cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens)
    chosen = selection(select, q, cache, scoring)
    if chosen is None:
        out, tau, support, tokens = ops.dense_decode(
            q, *pool, scoring.number, scoring.scale, scoring.alibi_slopes, scoring.per_head
        )
    else:
        out, tau, support, tokens = ops.sparse_decode(
            q,
            *pool,
            chosen.selected,
            chosen.counts,
            scoring.number,
            scoring.scale,
            scoring.alibi_slopes,
            scoring.per_head,
            chosen.by_token,
        )
    if not return_info:
        return out
    bound = certify.delta_bound(chosen, q, cache, tau, scoring)
    return out, DecodeInfo(tau, support, tokens, bound == 0, bound, chosen)
