"""The mask function of the attention implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask

from entmaxkv.hf.models import refuse_config

PADDING = torch.int8  # dtype of padding masks, which tells them from a pattern of one query


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention` takes, as a transformers mask function.

    Models ask for masks of every kind that a layer may have, even for kinds that none of their layers has. So a kind
    that `attention` cannot compute is not refused here.

    Returns:
        None where every query sees every key up to its own. The padding mask [batch, 1, 1, keys] int8, 1 for keys that
        are no padding, where every query sees every such key up to its own. [batch, 1, queries, keys] bool for any
        other pattern, such as a window that some key has left. (Masks that a user passes in four dimensions are bool or
        floats.)

    Raises:
        ValueError: a model that computes attention by itself or chooses keys, a static cache, or a mask of fewer tokens
            than there are.
    """
    if config is not None and not torch.compiler.is_compiling():
        refuse_config(config)
    tokens = int(q_offset) + q_length
    if mask_function is not causal_mask_function:
        kwargs["allow_is_bidirectional_skip"] = False  # None is causal here, and of as many keys as there are tokens
        kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and kv_offset + kv_length == tokens
        pattern = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # a static cache has a tensor
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        if pattern is None:
            return None
        newest = pattern[:, :, -1:]  # the keys that the newest query sees
        seen = torch.arange(kv_length, device=pattern.device) + kv_offset
        causal = seen <= torch.arange(q_length, device=pattern.device)[:, None] + q_offset
        if not torch.equal(pattern, newest & causal):
            return pattern
        return None if newest.all() else newest.to(PADDING)

    if attention_mask is not None and attention_mask.shape[1] < tokens:
        raise ValueError(
            f"entmaxkv attention: expected an attention_mask of all {tokens} tokens, got {attention_mask.shape[1]}"
        )
    # Without a cache the keys are taken to be as many as the mask has columns, which may be more than there are.
    if kv_offset + kv_length != tokens and (attention_mask is None or attention_mask.shape[1] != kv_length):
        raise ValueError(
            f"entmaxkv attention: expected EntmaxCache or a dynamic cache, whose keys are the {tokens} tokens seen so "
            f"far, got a static one of {kv_length} slots"
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset:tokens].bool()
    # With a mask of more columns than tokens, `attention` finds out whether a static cache has as many keys.
    return None if padding.all() and kv_offset + kv_length == tokens else padding[:, None, None].to(PADDING)
