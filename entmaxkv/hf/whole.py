"""Causal attention of whole sequences, differentiable: PyTorch's where alpha is 1, AdaSplash where it is 1.5."""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

ADASPLASH_HEAD_DIMS = (16, 32, 64, 128, 256)
ADASPLASH_MIN_TOKENS = 64
# Refinements of the threshold after AdaSplash's histogram.
ADASPLASH_ITERATIONS = 2


def lacks(query: Tensor, alpha: float) -> str | None:
    """Why `whole` cannot take this query, worded as the end of a message; None if it can."""
    if alpha == 1:
        return None
    if not query.is_cuda:
        return f"AdaSplash, which needs a CUDA device, got {query.device}"
    if alpha != 1.5:
        return f"AdaSplash, which needs alpha 1.5, got {alpha}"
    if query.shape[-1] not in ADASPLASH_HEAD_DIMS:
        return f"AdaSplash, which needs head_dim in {ADASPLASH_HEAD_DIMS}, got {query.shape[-1]}"
    if find_spec("adasplash") is None:
        return "AdaSplash (pip install adasplash), got no such package"
    return None


def whole(
    query: Tensor, key: Tensor, value: Tensor, *, alpha: float, scale: float, pattern: Tensor | None = None
) -> Tensor:
    """Attention of whole sequences [batch, heads, tokens, head_dim].

    Args:
        query: [batch, q_heads, tokens, head_dim].
        key, value: [batch, kv_heads, keys, head_dim].
        alpha: 1, or a value for which `lacks` returns None.
        scale: Factor of the scores.
        pattern: [batch, 1, tokens, keys] bool, which keys each query sees; only where alpha is 1. None is causal.
    """
    if alpha != 1:
        return _adasplash(query, key, value, scale)
    if query.is_cuda and query.dtype == torch.float32:  # no fused kernel takes groups of fp32 heads
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    out: Tensor = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=pattern, is_causal=pattern is None, scale=scale, enable_gqa=True
    )
    return out


def _compute_adasplash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal entmax-1.5 attention of whole sequences [batch, heads, tokens, head_dim], differentiable.

    The sequences are padded at their end, which no earlier token sees, to a power of two: AdaSplash asks for
    one, and compiles its kernels anew for every length.
    """
    from adasplash import adasplash_v2

    tokens, head_dim = query.shape[2:]
    padding = max(ADASPLASH_MIN_TOKENS, 1 << (tokens - 1).bit_length()) - tokens
    query = query * (scale * math.sqrt(head_dim))
    query, key, value = (nn.functional.pad(x, (0, 0, 0, padding)).contiguous() for x in (query, key, value))
    out: Tensor = adasplash_v2(query, key, value, niter=ADASPLASH_ITERATIONS)
    return out[:, :, :tokens]


_adasplash: Callable[[Tensor, Tensor, Tensor, float], Tensor] = torch.compiler.disable(_compute_adasplash)
