"""A transformers cache that keeps the keys and values of full-attention layers in pages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import entmaxkv
from entmaxkv.check import is_count
from entmaxkv.hf.models import alpha_of
from entmaxkv.select import Selector, check_select

DTYPES = torch.float32, torch.float16, torch.bfloat16


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

    @property
    def keys(self) -> int:
        """Tokens in the cache once these are in it."""
        return self.layer.seen + (0 if self.appended else self.key.shape[2])


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
        checks_masks: whether it looks at masks, which the first layer of a cache does for all of them.
        appends: steps that it has appended.
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
        super().__init__()
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
        if head_dim > 256 or dtype not in DTYPES:
            raise ValueError(
                "EntmaxCache: expected keys and values of float32, float16 or bfloat16 and at most 256 dimensions, got "
                f"{dtype} and {head_dim}"
            )
        self.paged = entmaxkv.PagedKVCache(
            key_states.shape[0],
            self.max_tokens,
            key_states.shape[1],
            head_dim,
            page_size=self.page_size,
            dtype=dtype,
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
        if not self.is_initialized or (self.seen == 0 and not self._suits(key_states)):
            self.lazy_initialization(key_states, value_states)
        self.updates += 1
        return Announced.of(Step(self, self.updates, key_states, value_states))

    def _suits(self, key_states: Tensor) -> bool:
        """Whether the empty pool is for keys like these."""
        pages = self.paged.k_pages
        wanted = key_states.shape[0], key_states.shape[1], self.dtype or key_states.dtype
        device = torch.device(self.device) if self.device else key_states.device
        return (self.paged.batch, self.paged.kv_heads, pages.dtype) == wanted and pages.device.type == device.type

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
        self.keep(_tokens_to_keep(self.seen, tokens_to_remove))

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
        if not hasattr(config, "get_text_config"):
            raise ValueError(f"EntmaxCache: config: expected a model's config, got a {type(config).__name__}")
        for name, value, least in (("max_tokens", max_tokens, 1), ("batch", 1 if batch is None else batch, 1)):
            if not is_count(value) or value < least:
                raise ValueError(f"EntmaxCache: {name}: expected a whole number of at least {least}, got {value!r}")
        if page_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"EntmaxCache: page_size: expected 8, 16, 32, 64 or 128, got {page_size!r}")
        if dtype not in (None, *DTYPES):
            raise ValueError(f"EntmaxCache: dtype: expected float32, float16, bfloat16 or None, got {dtype!r}")
        check_select("EntmaxCache", select)
        self._config = config = config.get_text_config(decoder=True)
        self.max_tokens, self.alpha = max_tokens, alpha_of(config, alpha)
        layers = _transformers_layers(config)
        across = getattr(config, "cross_attention_layers", None) or ()

        def fits(index: int) -> bool:
            """Whether a layer looks at all of at most max_tokens tokens, and at no others."""
            kind = type(layers[index])
            window = layers[index].sliding_window if kind is DynamicSlidingWindowLayer else max_tokens
            return kind in (DynamicLayer, DynamicSlidingWindowLayer) and window >= max_tokens and index not in across

        fitting = list(filter(fits, range(len(layers))))
        windows = [window for layer in layers if (window := getattr(layer, "sliding_window", max_tokens)) < max_tokens]
        if windows and (self.alpha != 1 or not fitting):
            raise ValueError(
                f"EntmaxCache: expected full attention in {'some' if self.alpha == 1 else 'every'} layer where alpha "
                f"is {self.alpha:g}, got windows of {min(windows)} tokens; max_tokens={min(windows)} would never leave "
                "them"
            )
        if not fitting:
            raise ValueError(
                "EntmaxCache: expected full attention in some layer, got "
                f"{', '.join(sorted({type(layer).__name__ for layer in layers})) or 'no layers'}; use a DynamicCache"
            )
        if len(fitting) < len(layers) and alpha_of(config) != self.alpha:
            raise ValueError(
                f"EntmaxCache: expected alpha = {alpha_of(config):g}, by which the config has the layers in "
                f"transformers' own cache run, got {self.alpha:g}"
            )
        self.paged_layers: list[EntmaxLayer] = []
        for index in fitting:
            layers[index] = EntmaxLayer(
                max_tokens, alpha=alpha, batch=batch, page_size=page_size, select=select, dtype=dtype, device=device
            )
            self.paged_layers.append(layers[index])
        self.paged_layers[0].checks_masks = True
        # The states of linear layers that took part in the last step, and all linear layers that ever did; the layer
        # that was called last; the appends before the last step.
        self._touched: set[tuple] = set()
        self._linear: set[int] = set()
        self._at, self._appends = -1, 0
        super().__init__(layers=layers)
        self._attention_layers = self._layers_of_attention()

    def _layers_of_attention(self) -> list[Any]:
        """The layers whose tokens every step extends, in order."""
        across = getattr(self._config, "cross_attention_layers", None) or ()
        layers = enumerate(self.layers)
        return [layer for index, layer in layers if isinstance(layer, CacheLayerMixin) and index not in across]

    def __repr__(self) -> str:
        first = self.paged_layers[0]
        rows = f"{first.paged.batch} rows" if first.is_initialized else f"{first.batch or 'any number of'} rows"
        size = sum(layer.paged.nbytes for layer in self.paged_layers if layer.is_initialized)
        return (
            f"EntmaxCache({len(self.paged_layers)} of {len(self.layers)} layers in pages, {self.get_seq_length()} of "
            f"{self.max_tokens} tokens, {rows}, alpha={self.alpha:g}, select={self.select}, {size / 2**20:.1f} MiB)"
        )

    @property
    def select(self) -> Selector | None:
        """The selector of the decode steps."""
        return self.paged_layers[0].select

    @select.setter
    def select(self, select: Selector | None) -> None:
        check_select("EntmaxCache", select)
        for layer in self.paged_layers:
            layer.read_by(select)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announces a layer's new tokens; see `EntmaxLayer.update`.

        Raises:
            RuntimeError: the last step was interrupted, so that some layers have done it and others have not.
            ValueError: the model has more layers than the cache.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(f"EntmaxCache: expected a model of {len(self.layers)} layers, got one of more")
        if self.layers[layer_idx] is self._attention_layers[0]:
            self._check_last_step(linear=False)
        self._at = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_conv_state`; raises like `update`."""
        self._touch(layer_idx, "conv", *args, *kwargs.values())
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_recurrent_state`; raises like `update`."""
        self._touch(layer_idx, "recurrent", *args, *kwargs.values())
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _touch(self, layer_idx: int, *state: Any) -> None:
        """Notes that a state of linear attention, which has no length, takes part in a step.

        An earlier layer than the last one that was called, or the same state again, starts a new step.
        """
        if layer_idx < self._at or (layer_idx, *state) in self._touched:
            self._check_last_step(linear=True)
            self._touched, self._appends = set(), self.paged_layers[0].appends
        self._at = layer_idx
        self._touched.add((layer_idx, *state))
        self._linear.add(layer_idx)

    def _check_last_step(self, *, linear: bool) -> None:
        """Raises if some layers have done the last step and others have not."""
        lengths = [layer.get_seq_length() for layer in self._attention_layers]
        whole = len({*lengths}) == 1 and not any(layer.torn for layer in self.paged_layers)
        if linear and self._touched:
            appended = self.paged_layers[0].appends > self._appends
            whole &= appended and {layer for layer, *_ in self._touched} == self._linear
        if not whole:
            all_paged = len(self.paged_layers) == len(self.layers) and min(lengths) > 0
            raise RuntimeError(
                f"EntmaxCache: expected all layers to have done the last step, got layers of {min(lengths)} to "
                f"{max(lengths)} tokens: it was interrupted; {f'crop({min(lengths)}) or ' * all_paged}reset() mends it"
            )

    def _forget_steps(self) -> None:
        self._touched, self._linear, self._at, self._appends = set(), set(), -1, self.paged_layers[0].appends

    def reset(self) -> None:
        """Empties every layer."""
        fresh = _transformers_layers(self._config)  # some versions zero the keys of their own and keep their number
        for index, layer in enumerate(self.layers):
            if isinstance(layer, EntmaxLayer):
                layer.reset()
            elif index < len(fresh):
                self.layers[index] = fresh[index]
        self._attention_layers = self._layers_of_attention()
        self._forget_steps()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens of every row.

        Args:
            tokens_to_remove: minus their number. A positive number is the number of tokens to keep, padding included;
                it also makes layers equal that an interrupted step has left at different lengths.

        Raises:
            RuntimeError: a window has let go of what would have to come back. Calling `activate_past_recording()`
                before the tokens come that are to be removed prevents that.
        """
        keep = _tokens_to_keep(self.get_seq_length(), int(tokens_to_remove))  # some versions pass a tensor
        others: list[tuple[Any, int]] = [
            (layer, layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else self.get_seq_length())
            for layer in self.layers
            if not isinstance(layer, EntmaxLayer)
        ]
        for layer, held in others:
            window = getattr(layer, "sliding_window", held + 1)
            if held > keep and window <= held and not getattr(layer, "record_past", False):
                raise RuntimeError(
                    f"EntmaxCache: expected to crop no window that is full, got {held} tokens to be cropped to {keep} "
                    f"and a window of {window}; call activate_past_recording() before the tokens come"
                )
        for layer, held in others:
            if held > keep:
                layer.crop(keep - held)
            elif hasattr(layer, "record_past"):
                layer.crop(0)  # lets go of the past that it has recorded to be cropped
        for layer in self.paged_layers:
            layer.keep(keep)
        self._forget_steps()


def _tokens_to_keep(held: int, tokens_to_remove: int) -> int:
    return max(0, tokens_to_remove if tokens_to_remove > 0 else held + tokens_to_remove)


def _transformers_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of transformers' own cache for a model."""
    try:
        return list(DynamicCache(config=config).layers)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"EntmaxCache: expected a model that DynamicCache has layers for, got {type(config).__name__} ({error!r})"
        ) from error
