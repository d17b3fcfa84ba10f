"""Entmax attention and its paged cache for Hugging Face transformers (v5), without patching it.

Importing this module registers the attention implementation `entmaxkv` and its mask:

    import entmaxkv.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="entmaxkv")
    cache = entmaxkv.hf.EntmaxCache(model.config, max_tokens=16384, select=entmaxkv.KeySketch())
    model.generate(**inputs, past_key_values=cache)

Decode steps (one query) use `select`; prefill is exact. alpha is `config.entmax_alpha`, 1.5 if it is missing. To train,
or to read a whole prompt at once, AdaSplash takes alpha = 1.5 on a GPU, and PyTorch alpha = 1.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import entmaxkv
from entmaxkv.select import Selector

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
    from transformers.cache_utils import CacheLayerMixin
    from transformers.masking_utils import causal_mask_function
except ImportError as error:
    raise ImportError("entmaxkv.hf: expected transformers >= 5 (pip install 'transformers>=5')") from error

NAME = "entmaxkv"
# Query rows per call of the dense kernel in prefill: enough to keep every thread busy, few enough that the
# page table, repeated for each row, stays small.
PREFILL_ROWS = 1024
# And few enough that the kernel's workspace stays below a gigabyte: on a GPU about 9 bytes for each query head and slot
# of a row's page table.
PREFILL_SLOTS = 100_000_000
ADASPLASH_HEAD_DIMS = (16, 32, 64, 128, 256)
ADASPLASH_MIN_TOKENS = 64
# Refinements of the threshold after AdaSplash's histogram.
ADASPLASH_ITERATIONS = 2


def needs(select: Selector | None) -> dict[str, bool]:
    """What a `PagedKVCache` has to keep for a selector; everything for one that is not the library's."""
    known = {"minmax": entmaxkv.TopPages, "moments": entmaxkv.Gaussian, "sketch": entmaxkv.KeySketch}
    theirs = not (select is None or isinstance(select, tuple(known.values())))
    return {name: theirs or isinstance(select, kind) for name, kind in known.items()}


class EntmaxLayer(CacheLayerMixin):
    """One layer's keys and values in a `PagedKVCache`.

    `update` only hands the new tokens on, marked with this layer: which of them are padding is known to the
    attention function alone, so that is where they are appended.
    """

    is_sliding = False

    def __init__(
        self,
        max_tokens: int,
        *,
        batch: int,
        page_size: int,
        select: Selector | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        super().__init__()
        self.max_tokens, self.batch, self.page_size = max_tokens, batch, page_size
        self.select, self.dtype, self.device = select, dtype, device
        self.paged: entmaxkv.PagedKVCache
        self.seen = 0
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the page pool for keys and values like these [batch, kv_heads, tokens, head_dim]."""
        if value_states.shape[-1] != key_states.shape[-1]:
            raise ValueError(
                f"EntmaxCache: expected values of the keys' head_dim {key_states.shape[-1]}, "
                f"got {value_states.shape[-1]}"
            )
        self.paged = entmaxkv.PagedKVCache(
            self.batch,
            self.max_tokens,
            key_states.shape[1],
            key_states.shape[3],
            page_size=self.page_size,
            dtype=self.dtype or key_states.dtype,
            device=self.device or key_states.device,
            **needs(self.select),
        )
        self.is_initialized = True

    def read_by(self, select: Selector | None) -> None:
        """Decodes by another selector from now on, which may need statistics of the tokens that are there."""
        self.select = select
        if self.is_initialized:
            self.paged.keep(**needs(select))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys, marked with this layer, and values [batch, kv_heads, tokens, head_dim]."""
        batch, _, tokens, _ = key_states.shape
        if batch != self.batch:
            raise ValueError(f"EntmaxCache: expected batch {self.batch}, got {batch}")
        if self.pending:
            raise RuntimeError("EntmaxCache: expected a model with attn_implementation='entmaxkv', got another one")
        if self.seen + tokens > self.max_tokens:
            raise ValueError(
                f"EntmaxCache is full: expected at most max_tokens = {self.max_tokens}, "
                f"got {self.seen} and {tokens} more"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        key_states = key_states.view_as(key_states)
        key_states.entmaxkv_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def append(self, key: Tensor, value: Tensor, lengths: Tensor | None) -> entmaxkv.PagedKVCache:
        """Appends the first `lengths` [batch] of the tokens that `update` announced; returns the pages."""
        dtype = self.paged.k_pages.dtype
        self.paged.append(key.transpose(1, 2).to(dtype), value.transpose(1, 2).to(dtype), lengths)
        self.seen += key.shape[2]
        return self.paged

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys; early versions 5 pass the positions instead of their number."""
        tokens = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.seen + tokens, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.max_tokens

    get_max_cache_shape = get_max_length  # its name in early versions 5

    def reset(self) -> None:
        if self.is_initialized:
            self.paged.clear()
        self.seen = 0
        self.pending = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("EntmaxCache: expected greedy decoding or sampling, got beam search")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("EntmaxCache: expected a cache that only grows (reset() empties it), got crop")


class EntmaxCache(Cache):
    """A transformers cache that keeps every layer's keys and values in pages.

    Rows of a padded batch hold their real tokens only. Memory is allocated at the first forward pass.

    Args:
        config: The model's configuration.
        max_tokens: Tokens that each row can hold, padding included.
        batch: Rows.
        page_size: Tokens of a page.
        select: Selector of the decode steps; None reads the whole cache. May be changed at any time: the cache keeps
            what its selectors so far look at, and makes it anew for another one.
        dtype: dtype of the cache; that of the keys where None.
        device: Device of the cache; that of the keys where None.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int,
        *,
        batch: int = 1,
        page_size: int = 16,
        select: Selector | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        config = config.get_text_config(decoder=True)
        _alpha(config)
        layer_types = getattr(config, "layer_types", None) or []
        unfit = sorted(set(layer_types) - {"full_attention"})
        if unfit:
            raise ValueError(f"EntmaxCache: expected full_attention in every layer, got {', '.join(unfit)}")
        self._layers = [
            EntmaxLayer(max_tokens, batch=batch, page_size=page_size, select=select, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=list(self._layers))

    @property
    def select(self) -> Selector | None:
        """The selector of the decode steps."""
        return self._layers[0].select

    @select.setter
    def select(self, select: Selector | None) -> None:
        for layer in self._layers:
            layer.read_by(select)


def padding_mask(
    *,
    kv_length: int,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention` takes: None, or [batch, kv_length] bool where some token is padding.

    Early versions 5 pass the queries' positions in place of their number and offset.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "entmaxkv attention: expected the plain causal mask, got another one "
            "(packed position_ids without an attention_mask make one)"
        )
    tokens = int(q_offset + q_length if cache_position is None else cache_position[-1] + 1)
    if kv_length != tokens:
        raise ValueError(
            f"entmaxkv attention: expected EntmaxCache or a dynamic cache, whose keys are the {tokens} tokens seen "
            f"so far, got a static one of {kv_length} slots"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"entmaxkv attention: expected an attention_mask of all {kv_length} tokens, got {attention_mask.shape[1]}"
        )
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal entmax attention as a transformers attention function.

    Args:
        module: The attention layer; `module.config.entmax_alpha` is alpha.
        query: [batch, q_heads, tokens, head_dim], the last `tokens` positions.
        key: [batch, kv_heads, tokens, head_dim], marked by `EntmaxCache`; or the keys of all positions.
        value: Like key.
        attention_mask: None or the padding mask [batch, tokens of all positions], bool.
        scaling: Factor of the scores; 1/sqrt(head_dim) where None.
        dropout: Must be 0.
        sliding_window: Must be None.
        softcap: Must be None.
        s_aux: Attention sinks; must be None.
        is_causal: Must not be False, nor `module.is_causal`.

    Returns:
        The output [batch, tokens, q_heads, head_dim], and None in place of the weights.
    """
    layer: EntmaxLayer | None = getattr(key, "entmaxkv_layer", None)
    if layer:
        layer.pending = False
    for name, got in (
        ("dropout", dropout or None),
        ("sliding_window", sliding_window),
        ("softcap", softcap),
        ("s_aux (attention sinks)", None if s_aux is None else f"a tensor of shape {tuple(s_aux.shape)}"),
    ):
        if got is not None:
            raise ValueError(f"entmaxkv attention: expected no {name}, got {got}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError("entmaxkv attention: expected causal attention, got is_causal=False")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "entmaxkv attention: expected the 2D padding mask [batch, tokens], "
            f"got attention_mask of shape {tuple(attention_mask.shape)}"
        )
    alpha = _alpha(module.config)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query.shape[2]
    query, key = query.to(value.dtype), key.to(value.dtype)

    order = lengths = key_lengths = None
    if attention_mask is not None:
        order, lengths = _real_first(attention_mask[:, -tokens:])
        key_order, key_lengths = _real_first(attention_mask[:, -key.shape[2] :])
        query, key, value = _gather(query, order), _gather(key, key_order), _gather(value, key_order)

    lacks = None if alpha == 1 else _adasplash_lacks(query, alpha)
    if torch.is_grad_enabled() and query.requires_grad:
        if layer is not None or key.shape[2] != tokens:
            raise ValueError(
                "entmaxkv attention: expected no cache where gradients are recorded, got one; to decode, wrap the call "
                "in torch.no_grad(), to train, pass use_cache=False"
            )
        if lacks:
            raise RuntimeError(f"entmaxkv attention: to train, expected {lacks}")
        out = _whole(query, key, value, alpha=alpha, scale=scale)
    else:
        cache = layer.append(key, value, key_lengths) if layer else None
        whole = (layer.seen if layer else key.shape[2]) == tokens
        if whole and not lacks and tokens > 1:
            out = _whole(query, key, value, alpha=alpha, scale=scale)
        elif tokens > 1:
            out = _dense(query, cache or _paged(key, value, key_lengths), lengths, alpha=alpha, scale=scale)
        else:
            select = layer.select if layer else None
            cache = cache or _paged(key, value, key_lengths)
            row = query[:, :, 0].to(cache.k_pages.dtype)
            out = entmaxkv.decode(row, cache, alpha=alpha, scale=scale, select=select)[:, :, None]
    out = out.to(value.dtype)
    if order is not None and lengths is not None:
        out = _scatter(out, order, lengths)
    return out.transpose(1, 2), None


def _alpha(config: Any) -> float:
    alpha = float(getattr(config, "entmax_alpha", 1.5))
    if not 1 <= alpha <= 2:
        raise ValueError(f"entmaxkv: expected config.entmax_alpha in [1, 2], got {alpha}")
    return alpha


def _real_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of a mask [batch, tokens], those of real tokens first, and the count of these [batch]."""
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
    cache = entmaxkv.PagedKVCache(batch, tokens, kv_heads, head_dim, dtype=key.dtype, device=key.device, **needs(None))
    cache.append(key.transpose(1, 2), value.transpose(1, 2), lengths)
    return cache


def _dense(
    query: Tensor, cache: entmaxkv.PagedKVCache, lengths: Tensor | None, *, alpha: float, scale: float
) -> Tensor:
    """Attention of the cache's newest positions: each query becomes a row that sees the cache up to itself.

    Args:
        query: [batch, q_heads, tokens, head_dim], real tokens first.
        cache: Holds the keys and values of these tokens already.
        lengths: Real tokens of each row [batch] int32; all where None.
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


def _whole(query: Tensor, key: Tensor, value: Tensor, *, alpha: float, scale: float) -> Tensor:
    """Causal attention of whole sequences [batch, heads, tokens, head_dim], differentiable."""
    if alpha == 1:
        if query.is_cuda and query.dtype == torch.float32:  # no fused kernel takes groups of fp32 heads
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    return _adasplash(query, key, value, scale)


def _adasplash_lacks(query: Tensor, alpha: float) -> str | None:
    """What AdaSplash would need to take this query, or None if it fits."""
    if not query.is_cuda:
        return f"AdaSplash, which needs a CUDA device, got {query.device}"
    if alpha != 1.5:
        return f"AdaSplash, which needs alpha 1.5, got {alpha}"
    if query.shape[-1] not in ADASPLASH_HEAD_DIMS:
        return f"AdaSplash, which needs head_dim in {ADASPLASH_HEAD_DIMS}, got {query.shape[-1]}"
    if find_spec("adasplash") is None:
        return "AdaSplash (pip install adasplash), got no such package"
    return None


@torch.compiler.disable
def _adasplash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal entmax-1.5 attention of whole sequences [batch, heads, tokens, head_dim], differentiable.

    The sequences are padded at their end, which no earlier token sees, to a power of two: AdaSplash asks for
    one, and compiles its kernels anew for every length.
    """
    from adasplash import adasplash_v2

    tokens, head_dim = query.shape[2:]
    padding = max(ADASPLASH_MIN_TOKENS, 1 << (tokens - 1).bit_length()) - tokens
    query = query * (scale * math.sqrt(head_dim))
    query, key, value = (nn.functional.pad(x, (0, 0, 0, padding)).contiguous() for x in (query, key, value))
    return adasplash_v2(query, key, value, niter=ADASPLASH_ITERATIONS)[:, :, :tokens]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
