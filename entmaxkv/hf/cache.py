"""A transformers cache that keeps the keys and values of full-attention layers in pages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import entmaxkv
from entmaxkv.hf.models import alpha_of
from entmaxkv.select import Selector


def needs(select: Selector | None) -> dict[str, bool]:
    """What a `PagedKVCache` has to keep for a selector; everything for one that is not the library's."""
    known = {"minmax": entmaxkv.TopPages, "moments": entmaxkv.Gaussian, "sketch": entmaxkv.KeySketch}
    theirs = not (select is None or isinstance(select, tuple(known.values())))
    return {name: theirs or isinstance(select, kind) for name, kind in known.items()}


class Step:
    """The new tokens of one `EntmaxLayer.update`, which wait for the attention function to append them.

    Attributes:
        layer: the cache layer.
        number: which of the layer's updates it is.
        key, value: [batch, kv_heads, tokens, head_dim].
        appended: whether the tokens are in the pages.
    """

    def __init__(self, layer: "EntmaxLayer", number: int, key: Tensor, value: Tensor):
        self.layer, self.number, self.key, self.value = layer, number, key, value
        self.appended = False


class Announced(Tensor):
    """The keys or the values of a `Step`, for entmaxkv's attention function alone.

    They are the new tokens and not those of the whole cache. So anything else that computes with them, such as another
    attention implementation, would forget the past: it raises instead.
    """

    step: Step

    @staticmethod
    def of(step: Step) -> tuple["Announced", "Announced"]:
        key, value = step.key.as_subclass(Announced), step.value.as_subclass(Announced)
        key.step = value.step = step
        return key, value

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers what is asked about shape, dtype, device and the like, and refuses whatever makes a new tensor."""
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
        RuntimeError: only one of them is a step's, or the cache has moved on.
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

    `update` only hands the new tokens on: which of them are padding is known to the attention function alone, so that
    is where they are appended.

    Attributes:
        paged: the `PagedKVCache`, from the first update on.
        seen: tokens of each row, padding included.
        mask: [batch, seen] bool, which of them are no padding; None where all are.
        first: whether it is the first layer of its cache, which looks at masks for all of them.
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
        super().__init__()
        self.max_tokens, self.batch, self.page_size = max_tokens, batch, page_size
        self.alpha, self.select, self.dtype, self.device = alpha, select, dtype, device
        self.paged: entmaxkv.PagedKVCache
        self.seen = self.updates = 0
        self.mask: Tensor | None = None
        self.first = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the page pool for keys and values like these [batch, kv_heads, tokens, head_dim]."""
        head_dim = max(key_states.shape[3], value_states.shape[3])
        if head_dim > 256:
            raise ValueError(f"EntmaxCache: expected keys and values of at most 256 dimensions, got {head_dim}")
        self.paged = entmaxkv.PagedKVCache(
            key_states.shape[0],
            self.max_tokens,
            key_states.shape[1],
            head_dim,
            page_size=self.page_size,
            dtype=self.dtype or key_states.dtype,
            device=self.device or key_states.device,
            **needs(self.select),
        )
        # Some models ask these whether anything is there; what is there is in pages.
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def read_by(self, select: Selector | None) -> None:
        """Decodes by another selector from now on, which may need statistics of the tokens that are there."""
        self.select = select
        if self.is_initialized:
            self.paged.keep(**needs(select))

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
        if not self.is_initialized or self.paged.batch != batch:
            self.lazy_initialization(key_states, value_states)
        self.updates += 1
        return Announced.of(Step(self, self.updates, key_states, value_states))

    def append(self, step: Step, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Appends a step's tokens, once, however often they are read.

        Args:
            step: what `update` announced.
            key, value: its tokens [batch, kv_heads, tokens, head_dim], those of each row that are no padding first.
            mask: [batch, seen and new tokens] bool, or None where none is padding.
        """
        if step.appended:
            return
        if mask is None and self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(len(key), key.shape[2])], dim=1)
        if self.first and mask is not None and self.seen:
            before = mask[:, : self.seen]
            if not (before.all() if self.mask is None else torch.equal(before, self.mask)):
                raise ValueError(
                    f"EntmaxCache: expected the attention_mask of the {self.seen} tokens in the cache as it was when "
                    "they were appended, got another"
                )
        lengths = None if mask is None else mask[:, self.seen :].sum(dim=1, dtype=torch.int32)
        dtype = self.paged.k_pages.dtype
        self.paged.append(key.transpose(1, 2).to(dtype), value.transpose(1, 2).to(dtype), lengths)
        step.appended, self.mask = True, mask
        self.seen += key.shape[2]

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
        self.seen, self.mask = 0, None

    def keep(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of every row, padding included."""
        if tokens >= self.seen:
            return
        mask = None if self.mask is None else self.mask[:, :tokens]
        self.paged.truncate(tokens if mask is None else mask.sum(dim=1, dtype=torch.int32))
        self.seen, self.mask = tokens, mask

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens of every row, a negative number of them; a positive one is the number to keep."""
        self.keep(max(0, tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was."""
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


class EntmaxCache(Cache):
    """A transformers cache that keeps the keys and values of full-attention layers in pages.

    Rows of a padded batch hold their real tokens only. Memory is allocated at the first forward pass. Layers with
    windows, in chunks or of linear attention keep transformers' own cache; a window that is never left counts as full.

    Args:
        config: The model's configuration.
        max_tokens: Tokens that each row can hold, padding included.
        alpha: alpha of the attention in [1, 2]; `config.entmax_alpha` where None.
        batch: Rows; those of the first forward pass where None.
        page_size: Tokens of a page.
        select: Selector of the decode steps; None reads the whole cache. May be changed at any time: the cache keeps
            what its selectors so far look at, and makes it anew for another one.
        dtype: dtype of the cache; that of the keys where None.
        device: Device of the cache; that of the keys where None.

    Raises:
        ValueError: no alpha is stated, no layer has full attention, or, with alpha above 1, some have windows.

    Example:
        >>> cache = entmaxkv.hf.EntmaxCache(model.config, max_tokens=4096, select=entmaxkv.KeySketch())
        >>> model.generate(**inputs, past_key_values=cache, num_beams=4)
        >>> cache.crop(-8)  # without the newest 8 tokens
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_tokens: int,
        *,
        alpha: float | None = None,
        batch: int | None = None,
        page_size: int = 16,
        select: Selector | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        config = config.get_text_config(decoder=True)
        number = alpha_of(config, alpha)

        self.paged_layers: list[EntmaxLayer] = []
        layers = _transformers_layers(config)
        across = getattr(config, "cross_attention_layers", None) or ()

        def fits(index: int) -> bool:
            """Whether a layer looks at all of at most max_tokens tokens, and at no others."""
            kind = type(layers[index])
            window = layers[index].sliding_window if kind is DynamicSlidingWindowLayer else max_tokens
            return kind in (DynamicLayer, DynamicSlidingWindowLayer) and window >= max_tokens and index not in across

        fitting = list(filter(fits, range(len(layers))))
        windows = [
            layer.sliding_window for layer in layers if getattr(layer, "sliding_window", max_tokens) < max_tokens
        ]
        if windows and (number != 1 or not fitting):
            raise ValueError(
                f"EntmaxCache: expected full attention in {'some' if number == 1 else 'every'} layer where alpha is "
                f"{number:g}, got windows of {min(windows)} tokens; max_tokens={min(windows)} would never leave them"
            )
        if not fitting:
            raise ValueError(
                "EntmaxCache: expected full attention in some layer, got "
                f"{', '.join(sorted({type(layer).__name__ for layer in layers})) or 'no layers'}; use a DynamicCache"
            )
        for index in fitting:
            layers[index] = EntmaxLayer(
                max_tokens, alpha=alpha, batch=batch, page_size=page_size, select=select, dtype=dtype, device=device
            )
            self.paged_layers.append(layers[index])
        self.paged_layers[0].first = True
        super().__init__(layers=layers)

    @property
    def select(self) -> Selector | None:
        """The selector of the decode steps."""
        return self.paged_layers[0].select

    @select.setter
    def select(self, select: Selector | None) -> None:
        for layer in self.paged_layers:
            layer.read_by(select)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announces a layer's new tokens; see `EntmaxLayer.update`.

        Raises:
            RuntimeError: an earlier step was interrupted, so that the layers hold different numbers of tokens.
        """
        if self.layers[layer_idx] is self.paged_layers[0]:
            lengths = {layer.seen for layer in self.paged_layers}
            if len(lengths) > 1:
                raise RuntimeError(
                    f"EntmaxCache: expected as many tokens in every layer, got {min(lengths)} to {max(lengths)}: a "
                    f"step was interrupted; crop({min(lengths)}) or reset() makes the layers equal"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens of every row.

        Args:
            tokens_to_remove: minus their number. A positive number is the number of tokens to keep, padding included;
                it also makes layers equal that an interrupted step has left at different lengths.
        """
        length, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)  # some versions pass a tensor
        keep = max(0, tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove)
        layer: Any
        for layer in self.layers:
            if isinstance(layer, EntmaxLayer):
                layer.keep(keep)
                continue
            held = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else length
            if held > keep:
                layer.crop(keep - held)
            elif hasattr(layer, "record_past"):
                layer.crop(0)  # lets go of the past that it has recorded to be cropped


def _transformers_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of transformers' own cache for a model."""
    try:
        return list(DynamicCache(config=config).layers)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"EntmaxCache: expected a model that DynamicCache has layers for, got {type(config).__name__} ({error!r})"
        ) from error
