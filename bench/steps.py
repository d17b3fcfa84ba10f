"""Decode steps, the ops that each step consists of, and the bytes that each op has to move."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import entmaxkv
from bench.inputs import Inputs
from entmaxkv import Gaussian, KeySketch, PagedKVCache, TopPages, ops
from entmaxkv.metrics import Metrics

MOST_HALVINGS = 30
Select = KeySketch | TopPages | Gaussian


def kept(part: Tensor | None) -> Tensor:
    """A part of a cache that the selector needs, and which the cache therefore keeps."""
    assert part is not None
    return part


def stages(q: Tensor, cache: PagedKVCache, select: Select | None, alpha: float) -> dict[str, Callable[[], object]]:
    """The ops of a step by name; each is called on the results of the ops before it."""
    lengths, sizes = (cache.page_table, cache.seq_lens), (cache.seq_lens, cache.kv_heads, cache.page_size)
    if select is None:
        return {"dense_decode": partial(ops.dense_decode, q, cache.k_pages, cache.v_pages, *lengths, alpha)}
    if isinstance(select, KeySketch):
        options: dict[str, Any] = {"bits": select.bits, "certainty": select.certainty, "max_tokens": select.max_tokens}
        sketch = kept(cache.codes), kept(cache.norms)
        choose = partial(ops.select_sketch, q, cache.k_pages, *sketch, *lengths, alpha, **options)
        read = partial(
            ops.sparse_decode, q, cache.k_pages, cache.v_pages, *lengths, *choose()[:2], alpha, by_token=True
        )
        return {"select_sketch": choose, "sparse_decode": read}
    score: Callable[[], Any]
    pick: Callable[[], Any]
    if isinstance(select, TopPages):
        score = partial(
            ops.score_pages, q, kept(cache.k_min), kept(cache.k_max), *lengths, cache.page_size, lower=select.LOWER
        )
        pick = partial(ops.select_pages, score(), *sizes, select.budget)
    else:
        score = partial(ops.score_gaussian, q, kept(cache.k_mean), kept(cache.k_std), *lengths, cache.page_size)
        mean, std = score()
        pick = partial(ops.select_gaussian, mean, std, *sizes, alpha, select.quantile, select.margin)
    decode = partial(ops.sparse_decode, q, cache.k_pages, cache.v_pages, *lengths, *pick(), alpha)
    kind = "pages" if isinstance(select, TopPages) else "gaussian"
    return {f"score_{kind}": score, f"select_{kind}": pick, "sparse_decode": decode}


def stage_bytes(q: Tensor, cache: PagedKVCache, select: Select, found: Metrics) -> list[int]:
    """Bytes that each op of `stages` has to read and write, in their order.

    One op writes scores or a selection, and the next one reads them. Statistics and sketches are only read.
    """
    if isinstance(select, KeySketch):
        chosen = 4 * (found.tokens.numel() + int(found.tokens.sum()))
        return [q.nbytes + found.index_bytes + chosen, chosen + found.bytes_read - found.index_bytes + 2 * q.nbytes]
    pages = sum(-(-tokens // cache.page_size) for tokens in cache.seq_lens.tolist())
    scores = pages * q.shape[1] * 4 * (1 if isinstance(select, TopPages) else 2)
    selected = sum(x.nbytes for x in select.select(q, cache, entmaxkv.Scoring())[:2])
    statistics = found.index_bytes
    return [statistics + scores, scores + selected, selected + found.bytes_read - statistics + 2 * q.nbytes]


def append_bytes(cache: PagedKVCache, inputs: Inputs) -> int:
    """Bytes that appending one token moves: key and value are read and written, statistics and sketch written."""
    token = inputs.k[:, 0].nbytes
    statistics = sum(x is not None for x in (cache.k_min, cache.k_max, cache.k_mean, cache.k_std)) * token
    sketch = 0
    if cache.codes is not None and cache.norms is not None:
        sketch = cache.batch * (cache.codes[0].nbytes + cache.norms[0].nbytes) // cache.page_size
    return 4 * token + statistics + sketch


def gaussian_reading(tokens: int, q: Tensor, cache: PagedKVCache, alpha: float) -> Gaussian:
    """The `Gaussian` whose margin makes it read about `tokens` tokens per KV head, in the mean over rows and heads.

    If there are no more tokens than that, its margin is infinite and it selects every page.
    """
    table = cache.page_table, cache.seq_lens, cache.page_size
    mean, std = ops.score_gaussian(q, kept(cache.k_mean), kept(cache.k_std), *table)

    def read(margin: float) -> float:
        sizes = cache.kv_heads, cache.page_size
        _, counts = ops.select_gaussian(mean, std, cache.seq_lens, *sizes, alpha, margin=margin)
        return cache.page_size * counts.double().mean().item()

    if read(math.inf) <= tokens:
        return Gaussian(margin=math.inf, dense_below=0)
    low = high = 0.0
    step = 1.0
    while read(low) > tokens and step < 1e6:
        low, step = low - step, 2 * step
    step = 1.0
    while read(high) < tokens and step < 1e6:
        high, step = high + step, 2 * step
    for _ in range(MOST_HALVINGS):
        margin = (low + high) / 2
        now = read(margin)
        if abs(now - tokens) <= 0.005 * tokens:
            break
        low, high = (low, margin) if now > tokens else (margin, high)
    return Gaussian(margin=margin, dense_below=0)


def step(q: Tensor, cache: PagedKVCache, select: Select | None, alpha: float) -> Callable[[], Tensor]:
    """The whole step, from the query to the output."""
    return partial(entmaxkv.decode, q, cache, alpha=alpha, select=select)
