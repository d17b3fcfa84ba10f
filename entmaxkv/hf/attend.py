"""The attention function of the attention implementation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import entmaxkv
from entmaxkv.cache import DTYPES, MAX_HEAD_DIM
from entmaxkv.hf.layer import announced
from entmaxkv.hf.masking import PADDING
from entmaxkv.hf.models import alpha_of, refuse_keywords
from entmaxkv.hf.whole import lacks, whole

# Query rows per call of the dense kernel in prefill: enough to keep every thread busy, few enough that the
# page table, repeated for each row, stays small.
PREFILL_ROWS = 1024
# Query heads times tokens of a row's page table, for all rows of a call. A GPU kernel's workspace takes about 9 bytes
# for each, so this keeps it below a gigabyte.
PREFILL_SLOTS = 100_000_000


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Causal entmax attention as a transformers attention function.

    Args:
        module: The attention layer; `module.config.entmax_alpha` is alpha, unless `EntmaxCache` states it.
        query: [batch, q_heads, tokens, head_dim], the last `tokens` positions.
        key: [batch, kv_heads, tokens, head_dim], announced by `EntmaxCache`; or the keys of all positions.
        value: Like key; its head_dim may be another.
        attention_mask: What `mask` returned: None, the padding mask [batch, 1, 1, keys] int8 or, where alpha is 1,
            any pattern [batch, 1, 1 or tokens, keys] bool.
        scaling: Factor of the scores; 1/sqrt(head_dim) where None.
        dropout: Must be 0.
        is_causal: Must not be False, nor `module.is_causal`.
        sliding_window: Tokens that a query sees. There may be no older tokens, unless attention_mask is a pattern.
        keywords: Must be None or False, unless it is known that they change no score.

    Returns:
        The output [batch, tokens, q_heads, head_dim of value], and None in place of the weights.

    Raises:
        ValueError: an argument asks for something that entmaxkv does not do; the message names it.
        RuntimeError: gradients are recorded where nothing computes them, or the model changed keys of `EntmaxCache`.
    """
    step = announced(key, value)
    layer = None if step is None else step.layer
    if step is not None:
        key, value = step.key, step.value
    alpha = alpha_of(module.config, None if layer is None else layer.alpha)
    refuse_keywords(dropout=dropout or None, **keywords)
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(
            "entmaxkv attention: expected causal attention, got is_causal=False, as in encoders and cross attention"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens, width = query.shape[2], value.shape[3]
    keys = key.shape[2] if step is None else step.keys
    query, key = query.to(value.dtype), key.to(value.dtype)
    padding, pattern = _told_apart(attention_mask, len(query), tokens, keys)
    if pattern is not None and layer is None and alpha == 1:
        return whole(query, key, value, alpha=alpha, scale=scale, pattern=pattern).transpose(1, 2).contiguous(), None
    window = keys if sliding_window is None else sliding_window
    if pattern is not None or (keys > window and (padding is None or padding.sum(dim=1).max() > window)):
        where = f"where alpha is {alpha:g}" if layer is None else "where the keys are in EntmaxCache"
        raise ValueError(
            f"entmaxkv attention: expected queries that see every key up to their own {where}, got "
            f"{_described(module, sliding_window)}"
        )

    if width != key.shape[3]:  # pages hold keys and values of one head_dim: zeros fill up the shorter ones
        query, key, value = (pad(x, (0, max(width, key.shape[3]) - x.shape[3])) for x in (query, key, value))
    order = lengths = key_lengths = None
    if padding is not None:
        order, lengths = _real_first(padding[:, -tokens:])
        key_order, key_lengths = _real_first(padding[:, -key.shape[2] :])
        query, key, value = _gather(query, order), _gather(key, key_order), _gather(value, key_order)

    lacking = lacks(query, alpha)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        if layer is not None or keys != tokens:
            raise ValueError(
                "entmaxkv attention: expected no cache where gradients are recorded, got one; to decode, wrap the call "
                "in torch.no_grad(), to train, pass use_cache=False"
            )
        if lacking:
            raise RuntimeError(f"entmaxkv attention: to train, expected {lacking}")
        out = whole(query, key, value, alpha=alpha, scale=scale)
    else:
        if step is not None:
            step.layer.append(step, key, value, padding)
        if keys == tokens > 1 and not lacking:
            out = whole(query, key, value, alpha=alpha, scale=scale)
        else:
            cache = _paged(key, value, key_lengths) if layer is None else layer.paged
            if tokens > 1:
                out = _dense(query, cache, lengths, alpha=alpha, scale=scale)
            else:
                row = query[:, :, 0].to(cache.k_pages.dtype)
                select = None if layer is None else layer.select
                out = entmaxkv.decode(row, cache, alpha=alpha, scale=scale, select=select)[:, :, None]
    out = out.to(value.dtype)[..., :width]
    if order is not None and lengths is not None:
        out = _scatter(out, order, lengths)
    return out.transpose(1, 2).contiguous(), None  # some models view it


def _told_apart(mask: Tensor | None, batch: int, tokens: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """Tells a padding mask from a pattern.

    Returns:
        The padding mask [batch, keys] bool, or None; and the pattern [batch, 1, 1 or tokens, keys] bool, or None.
    """
    if mask is None:
        return None, None
    if mask.dtype == PADDING and mask.shape == (batch, 1, 1, keys):
        return mask[:, 0, 0].bool(), None
    if mask.dtype == torch.bool and mask.shape in {(batch, 1, 1, keys), (batch, 1, tokens, keys)}:
        return None, mask
    raise ValueError(
        f"entmaxkv attention: expected a bool attention_mask [{batch}, 1, 1 or {tokens}, {keys}] for the {keys} tokens "
        f"of EntmaxCache or a dynamic cache, got {mask.dtype} of shape {tuple(mask.shape)}"
        f"{', which adds to scores' * mask.is_floating_point()}"
    )


def _described(module: nn.Module, sliding_window: int | None) -> str:
    """Says why a layer has a mask of its own."""
    chunk = getattr(module.config, "attention_chunk_size", None)
    if sliding_window is not None:
        return f"a sliding window of {sliding_window} tokens and older keys"
    if chunk is not None:
        return f"attention in chunks of {chunk} tokens"
    return "a mask of its own, as packed position_ids without an attention_mask and 4D masks make one"


def _real_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Orders the positions of a mask [batch, tokens]: real tokens first.

    Returns:
        The positions [batch, tokens], and how many tokens of each row are real [batch] int32.
    """
    return mask.logical_not().byte().argsort(dim=1, stable=True), mask.sum(dim=1, dtype=torch.int32)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x [batch, heads, tokens, head_dim] in the given order [batch, tokens]."""
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _scatter(x: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """Undoes `_gather`; tokens from `lengths` [batch] on become zero."""
    padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    x = x.masked_fill(padding[:, None, :, None], 0)
    return torch.zeros_like(x).scatter(2, order[:, None, :, None].expand_as(x), x)


def _paged(key: Tensor, value: Tensor, lengths: Tensor | None) -> entmaxkv.PagedKVCache:
    """A cache that holds just these keys and values [batch, kv_heads, tokens, head_dim]."""
    batch, kv_heads, tokens, head_dim = key.shape
    if key.dtype not in DTYPES or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"entmaxkv attention: expected keys of float32, float16 or bfloat16 and at most {MAX_HEAD_DIM} dimensions, "
            f"got {key.dtype} and {head_dim}"
        )
    cache = entmaxkv.PagedKVCache(
        batch,
        tokens,
        kv_heads,
        head_dim,
        dtype=key.dtype,
        device=key.device,
        minmax=False,
        moments=False,
        sketch=False,
    )
    cache.append(key.transpose(1, 2), value.transpose(1, 2), lengths)
    return cache


def _dense(
    query: Tensor, cache: entmaxkv.PagedKVCache, lengths: Tensor | None, *, alpha: float, scale: float
) -> Tensor:
    """Attention of the cache's newest positions: each query becomes a row that sees the cache up to itself.

    Args:
        query: [batch, q_heads, tokens, head_dim], real tokens first.
        cache: Holds the keys and values of these tokens already.
        lengths: [batch] int32, the real tokens of each row; None where all are real.
        alpha: The entmax parameter.
        scale: Factor of the scores.

    Returns:
        [batch, q_heads, tokens, head_dim]; zeros for padding.
    """
    batch, q_heads, tokens, head_dim = query.shape
    positions = torch.arange(tokens, device=query.device, dtype=torch.int32).expand(batch, tokens)
    lengths = cache.seq_lens.new_full((batch,), tokens) if lengths is None else lengths
    visible = (cache.seq_lens - lengths)[:, None] + positions + 1
    visible = visible.masked_fill(positions >= lengths[:, None], 0).flatten()
    rows = query.transpose(1, 2).reshape(batch * tokens, q_heads, head_dim).to(cache.k_pages.dtype)
    owners = torch.arange(batch, device=query.device).repeat_interleave(tokens)
    size = max(1, min(PREFILL_ROWS, PREFILL_SLOTS // (q_heads * cache.max_tokens)))
    outs = [
        entmaxkv.ops.dense_decode(
            row, cache.k_pages, cache.v_pages, cache.page_table[owner], seq_lens, alpha=alpha, scale=scale
        )[0]
        for row, owner, seq_lens in zip(rows.split(size), owners.split(size), visible.split(size), strict=True)
    ]
    return torch.cat(outs).view(batch, tokens, q_heads, head_dim).transpose(1, 2)
