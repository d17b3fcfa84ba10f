"""What a decode step proves about the tokens that it did not read.

Let C be the tokens that were read and tau_C the threshold on them, with z = (alpha - 1) s and beta = 1 / (alpha - 1).

1. The sum over C of [z_i - t]_+^beta falls as t rises. Leaving tokens out can only lower the sum. So tau_C <= tau, the
   threshold on all tokens.
2. Take a token i outside of C whose score is at most U_i. Its weight is p_i = [z_i - tau]_+^beta, which is at most
   [(alpha - 1) U_i - tau_C]_+^beta. The dropped mass delta is the sum of p_i outside of C, so the sum of these bounds
   is a bound of delta.
3. Where that sum is 0, the support lies in C. Then tau_C = tau, and what was decoded is the dense result.

Where nothing was read there is no tau_C. Where a key or a query is NaN, scores have no order. Both prove nothing.

For pages, U is the upper bound of `score_pages`, scale sum_d max(q_d k_min_d, q_d k_max_d). It counts once for every
token of the page. Where alpha = 1, tau_C is the logsumexp of s over C. Then B = sum of exp(U_i - tau_C) bounds the mass
outside of C relative to the mass in C, and delta <= B / (1 + B).

tau_C and U are computed in fp32. Let M be the sum of the sizes of the head_dim products, at its largest in the row. The
sum of the products is off by at most head_dim 2^-24 M where every step rounds, and by twice that where a tensor core
truncates instead. Bias and scale add a few such units. So with e = (2 head_dim + 16) 2^-24 M, the proof raises U by e
and lowers tau_C by (alpha - 1) e, and tau_C also by what the search for it leaves open. Everything after that is
float64, and the result is rounded up.
"""

import torch
from torch import Tensor

from entmaxkv import ops
from entmaxkv.cache import PagedKVCache
from entmaxkv.scoring import Scoring
from entmaxkv.select import Selection

UNIT = 2.0**-24  # half the spacing of fp32 numbers at 1
OPEN = 2.0**-15  # mass by which the sum of the weights may miss 1
LEAST = -80.0  # exp of it is still a normal fp32 number: no weight of softmax is 0
ROOM = 1 + 2.0**-10  # for what float64 rounds


def delta_bound(chosen: Selection | None, q: Tensor, cache: PagedKVCache, tau: Tensor, scoring: Scoring) -> Tensor:
    """Upper bound of the dropped mass of each head, 0 where the result is proved to be the dense one.

    The bound is 1 where nothing is known of tokens that were left out: without page bounds in the cache, and for a
    selection of tokens that states no bound itself.

    Args:
        chosen: what was read; None for everything.
        q: [batch, q_heads, head_dim].
        cache: what it was read from.
        tau: [batch, q_heads] float32, the threshold that `sparse_decode` found.
        scoring: how the step scored tokens.

    Returns:
        [batch, q_heads] float32, in [0, 1].
    """
    if chosen is None:
        return torch.zeros_like(tau)
    if chosen.delta_bound is not None:
        return chosen.delta_bound.nan_to_num(nan=1.0).clamp(min=0, max=1)
    group = q.shape[1] // cache.kv_heads
    if chosen.by_token:
        all_read = chosen.counts >= cache.seq_lens.clamp(max=cache.max_tokens)[:, None]
        return all_read.logical_not().to(tau.dtype).repeat_interleave(group, dim=1)
    left_out = tokens_left_out(chosen, cache).repeat_interleave(group, dim=1)
    if cache.k_min is None or cache.k_max is None:
        return (left_out > 0).any(dim=2).to(tau.dtype)

    def scores(q: Tensor, k_min: Tensor, k_max: Tensor, scale: float, alibi_slopes: Tensor | None) -> Tensor:
        """[batch, q_heads, max_pages] float64, -inf behind the last token."""
        table = cache.page_table, cache.seq_lens, cache.page_size
        return ops.score_pages(q, k_min, k_max, *table, scale, alibi_slopes).double()

    scale = cache.head_dim**-0.5 if scoring.scale is None else scoring.scale
    largest = torch.maximum(cache.k_min.abs(), cache.k_max.abs())
    size = scores(q.abs(), -largest, largest, abs(scale), None).amax(dim=2, keepdim=True)
    if scoring.alibi_slopes is not None:
        size = size + scoring.alibi_slopes.double().abs()[:, None] * cache.seq_lens.double()[:, None, None]
    error = (2 * cache.head_dim + 16) * UNIT * size
    upper = scores(q, cache.k_min, cache.k_max, scale, scoring.alibi_slopes) + error

    if scoring.per_head is None:
        gap = torch.full((q.shape[1], 1), scoring.number - 1, dtype=torch.float64, device=q.device)
    else:
        gap = scoring.per_head.double()[:, None] - 1  # [q_heads, 1]
    softmax = gap <= ops.CONSTANTS.softmax_gap
    unit = torch.where(softmax, 1.0, gap)  # of tau, for one of s
    threshold = tau.double()[..., None]
    # A mass that is off by m moves tau by at most (alpha - 1) m. Rounding alpha by UNIT moves z by UNIT s, and tau by
    # another UNIT log(tokens) through the exponent.
    threshold = threshold - unit * (error + OPEN) - UNIT * (4 * threshold.abs() + 2 * size + 32)
    above = unit * upper - threshold
    weight = torch.where(softmax, above.clamp(min=LEAST).exp(), above.clamp(min=0).pow(1 / unit))
    dropped = torch.where(left_out > 0, weight * left_out, 0.0).sum(dim=2) * ROOM
    softmax = softmax[:, 0]
    dropped = torch.where(softmax, dropped / (1 + dropped), dropped).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1)
    read_nothing = (chosen.counts == 0).repeat_interleave(group, dim=1)
    dropped = torch.where(read_nothing & (left_out > 0).any(dim=2), 1.0, dropped)
    rounded = (dropped * ROOM).clamp(min=torch.finfo(torch.float32).tiny, max=1).float()
    return rounded.masked_fill(dropped <= 0, 0)


def tokens_left_out(chosen: Selection, cache: PagedKVCache) -> Tensor:
    """Tokens of each page that a selection of pages leaves out, [batch, kv_heads, max_pages] int32."""
    max_pages = cache.page_table.shape[1]
    first = torch.arange(0, max_pages * cache.page_size, cache.page_size, device=cache.seq_lens.device)
    tokens = (cache.seq_lens[:, None] - first).clamp(min=0, max=cache.page_size)
    return tokens[:, None].masked_fill(chosen.chosen(max_pages), 0)
