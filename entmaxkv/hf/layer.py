"""One layer of `EntmaxCache`, and what carries its new tokens through a model to the attention function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

import entmaxkv
from entmaxkv.cache import DTYPES, MAX_HEAD_DIM
from entmaxkv.select import Selector, kept_for


class Step:
    """The new tokens of one `EntmaxLayer.update`. The attention function appends them later.

    Attributes:
        layer: the cache layer.
        number: the updates of the layer up to this one.
        key, value: [batch, kv_heads, tokens, head_dim].
        appended: whether the tokens are in the pages.
    """

    def __init__(self, layer: "EntmaxLayer", number: int, key: Tensor, value: Tensor):
        self.layer, self.number, self.key, self.value = layer, number, key, value
        self.appended = False

    @property
    def keys(self) -> int:
        """Tokens that the cache holds once these are appended."""
        return self.layer.seen + (0 if self.appended else self.key.shape[2])


class Announced(Tensor):
    """The keys or the values of a `Step`, for entmaxkv's attention function alone.

    They are the new tokens alone, not those of the whole cache. Anything else that computes with them, such as another
    attention implementation, would miss the earlier tokens. So it raises.
    """

    step: Step

    @staticmethod
    def of(step: Step) -> tuple["Announced", "Announced"]:
        key, value = step.key.as_subclass(Announced), step.value.as_subclass(Announced)
        key.step = value.step = step
        return key, value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers questions about shape, dtype, device and the like, and refuses functions that make a new tensor."""
        cause = None
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor | tuple | list) or any(result is each for each in args):
                return result
            if isinstance(result, tuple | list) and not any(isinstance(each, Tensor) for each in result):
                return result
        except Exception as error:
            cause = error
        raise RuntimeError(
            "EntmaxCache: expected its keys and values to go straight to a model with "
            "attn_implementation='entmaxkv', got another attention implementation, or a model that changes them after "
            f"cache.update, as those with latent keys do (here by {getattr(func, '__name__', func)}); such a model "
            "needs a DynamicCache"
        ) from cause


def announced(key: Tensor, value: Tensor) -> Step | None:
    """The step whose keys and values an attention function was given; None where they come from another cache.

    Raises:
        RuntimeError: the keys are a step's and the values are not, or the reverse, or the layer has had another update.
    """
    steps = [x.step if isinstance(x, Announced) else None for x in (key, value)]
    if steps[0] is not steps[1]:
        changed = "values" if steps[1] is None else "keys"
        raise RuntimeError(
            f"EntmaxCache: expected the keys and values of one cache.update, got other {changed}: this model changes "
            "them, or reads its keys more than once with different values; it needs a DynamicCache"
        )
    step = steps[0]
    if step is not None and step.number != step.layer.updates:
        raise RuntimeError(
            "EntmaxCache: expected the keys of the layer's last cache.update, got those of an earlier one"
        )
    return step


class EntmaxLayer(CacheLayerMixin):
    """One layer's keys and values in a `PagedKVCache`.

    `update` only hands the new tokens on. Only the attention function knows which of them are padding, so it appends
    them.

    Attributes:
        paged: the `PagedKVCache`, from the first update on.
        seen: tokens of each row, padding included.
        mask: [batch, seen] bool, True for tokens that are no padding; None where there is no padding.
        checks_masks: whether this layer checks masks. The first layer of a cache does so for all of them.
        updates: calls of `update`.
        appends: steps that were appended.
        torn: whether an append may have been interrupted, so that the pages hold more tokens than `seen` says.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        max_tokens: int,
        *,
        alpha: float | None = None,
        batch: int | None = None,
        page_size: int = 16,
        select: Selector | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        CacheLayerMixin.__init__(self)
        self.max_tokens, self.batch, self.page_size = max_tokens, batch, page_size
        self.alpha, self.select, self.dtype, self.device = alpha, select, dtype, device
        self.paged: entmaxkv.PagedKVCache
        self.seen = self.updates = self.appends = 0
        self.mask: Tensor | None = None
        self.checks_masks = self.torn = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the page pool for keys and values like these [batch, kv_heads, tokens, head_dim]."""
        head_dim = max(key_states.shape[3], value_states.shape[3])
        dtype = self.dtype or key_states.dtype
        if head_dim > MAX_HEAD_DIM or dtype not in DTYPES:
            raise ValueError(
                "EntmaxCache: expected keys and values of float32, float16 or bfloat16 and at most "
                f"{MAX_HEAD_DIM} dimensions, got {dtype} and {head_dim}"
            )
        self.paged = entmaxkv.PagedKVCache(
            key_states.shape[0],
            self.max_tokens,
            key_states.shape[1],
            head_dim,
            page_size=self.page_size,
            dtype=dtype,
            device=self.device or key_states.device,
            **kept_for("EntmaxCache", self.select),
        )
        # Some models look at `keys` to find out whether there are any. The keys themselves are in pages.
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def read_by(self, select: Selector | None) -> None:
        """Decodes by another selector from now on. What it needs is computed from the tokens that are there."""
        self.select = select
        if self.is_initialized:
            self.paged.keep(**kept_for("EntmaxCache", select))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announces new tokens [batch, kv_heads, tokens, head_dim] to the attention function."""
        batch, _, tokens, _ = key_states.shape
        held = self.paged.batch if self.seen else self.batch
        if held is not None and batch != held:
            raise ValueError(f"EntmaxCache: expected batch {held}, got {batch}")
        if self.seen + tokens > self.max_tokens:
            raise ValueError(
                f"EntmaxCache is full: expected at most max_tokens = {self.max_tokens}, "
                f"got {self.seen} and {tokens} more"
            )
        if not self.is_initialized or (self.seen == 0 and not self._suits(key_states)):
            self.lazy_initialization(key_states, value_states)
        self.updates += 1
        return Announced.of(Step(self, self.updates, key_states, value_states))

    def _suits(self, key_states: Tensor) -> bool:
        """Whether the empty pool can take keys like these."""
        pages = self.paged.k_pages
        wanted = key_states.shape[0], key_states.shape[1], self.dtype or key_states.dtype
        device = torch.device(self.device) if self.device else key_states.device
        return (self.paged.batch, self.paged.kv_heads, pages.dtype) == wanted and pages.device.type == device.type

    def append(self, step: Step, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Appends a step's tokens, unless that has been done.

        Args:
            step: what `update` announced.
            key, value: its tokens [batch, kv_heads, tokens, head_dim], those of each row that are no padding first.
            mask: [batch, seen and new tokens] bool, or None where none is padding.
        """
        if step.appended:
            return
        if mask is None and self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(len(key), key.shape[2])], dim=1)
        if self.checks_masks and mask is not None and self.seen:
            before = mask[:, : self.seen]
            if not (before.all() if self.mask is None else torch.equal(before, self.mask)):
                raise ValueError(
                    f"EntmaxCache: expected the attention_mask of the {self.seen} tokens in the cache as it was when "
                    "they were appended, got another"
                )
        lengths = None if mask is None else mask[:, self.seen :].sum(dim=1, dtype=torch.int32)
        dtype = self.paged.k_pages.dtype
        self.torn = True
        self.paged.append(key.transpose(1, 2).to(dtype), value.transpose(1, 2).to(dtype), lengths)
        step.appended, self.mask = True, mask
        self.seen += key.shape[2]
        self.appends += 1
        self.torn = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.max_tokens

    get_max_cache_shape = get_max_length  # its name in earlier versions 5

    def reset(self) -> None:
        if self.is_initialized:
            self.paged.clear()
        self.seen, self.mask, self.torn = 0, None, False

    def keep(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of every row, padding included."""
        if tokens > self.seen or (tokens == self.seen and not self.torn):
            return
        mask = None if self.mask is None or tokens == 0 else self.mask[:, :tokens]
        self.paged.truncate(tokens if mask is None else mask.sum(dim=1, dtype=torch.int32))
        self.seen, self.mask, self.torn = tokens, mask, False

    def crop(self, tokens_to_remove: int) -> None:
        """See `EntmaxCache.crop`."""
        self.keep(tokens_to_keep(self.seen, tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was."""
        beam_idx = torch.as_tensor(beam_idx)
        if self.batch is not None:
            self.batch = len(beam_idx)
        if self.seen == 0:
            return
        rows = beam_idx.to(self.paged.k_pages.device)
        self.paged.reorder(rows, tokens=self.seen)
        if self.mask is not None:
            self.mask = self.mask[rows.to(self.mask.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(lambda rows: rows[indices.to(rows.device) if isinstance(indices, Tensor) else indices])

    def _take_rows(self, chosen: Callable[[Tensor], Tensor]) -> None:
        batch = self.paged.batch if self.is_initialized else self.batch
        if batch is not None:
            device = self.paged.k_pages.device if self.is_initialized else None
            self.reorder_cache(chosen(torch.arange(batch, device=device)))


def tokens_to_keep(held: int, tokens_to_remove: int) -> int:
    """How many tokens `crop` keeps: a negative argument removes so many, a positive one is the number to keep."""
    return max(0, tokens_to_remove if tokens_to_remove > 0 else held + tokens_to_remove)
