"""A transformers cache that keeps the keys and values of full-attention layers in pages."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from entmaxkv.cache import DTYPES, check_page_size
from entmaxkv.check import is_count
from entmaxkv.hf.layer import EntmaxLayer, tokens_to_keep
from entmaxkv.hf.models import alpha_of
from entmaxkv.select import Selector, check_select, kept_for


class EntmaxCache(Cache):
    """A transformers cache that keeps the keys and values of full-attention layers in pages.

    Rows of a padded batch hold only their real tokens. Memory is allocated at the first forward pass. Layers with
    windows, in chunks or with linear attention keep transformers' own cache. A layer whose window is at least
    max_tokens counts as full attention.

    Args:
        config: The model's configuration.
        max_tokens: Tokens that each row can hold, padding included.
        alpha: alpha of the attention in [1, 2]; `config.entmax_alpha` where None.
        batch: Rows; those of the first forward pass where None.
        page_size: Tokens of a page.
        select: Selector of the decode steps; None reads the whole cache. It may be changed at any time. The cache keeps
            what its selectors so far need, and computes what a new one needs from the tokens that are there.
        dtype: dtype of the cache; that of the keys where None.
        device: Device of the cache; that of the keys where None.

    Raises:
        ValueError: no alpha is stated, no layer has full attention, or, with alpha above 1, some have windows.

    Example:
        >>> cache = entmaxkv.hf.EntmaxCache(model.config, max_tokens=4096, select=entmaxkv.KeySketch())
        >>> tokens = model.generate(**inputs, past_key_values=cache, num_beams=4)
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
        check_page_size("EntmaxCache", page_size)
        if dtype not in (None, *DTYPES):
            raise ValueError(f"EntmaxCache: dtype: expected float32, float16, bfloat16 or None, got {dtype!r}")
        check_select("EntmaxCache", select)
        kept_for("EntmaxCache", select)  # raises where it cannot be kept
        self._config = config = config.get_text_config(decoder=True)
        self.max_tokens, self.alpha = max_tokens, alpha_of(config, alpha)
        layers = _transformers_layers(config)
        across = getattr(config, "cross_attention_layers", None) or ()

        def fits(index: int) -> bool:
            """Whether a layer reads all tokens, up to max_tokens of them, and reads nothing else."""
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
        self._touched: set[tuple[Any, ...]] = set()  # states of linear layers that took part in the last step
        self._linear: set[int] = set()  # linear layers that took part in any step
        self._at = -1  # the layer that was called last
        self._appends = 0  # appends of the first paged layer before the last step
        super().__init__(layers=layers)
        self._attention_layers = self._layers_of_attention()

    def _layers_of_attention(self) -> list[Any]:
        """The layers that get new tokens in every step, in order."""
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
        kept_for("EntmaxCache", select)  # raises where it cannot be kept
        for layer in self.paged_layers:
            layer.read_by(select)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Announces a layer's new tokens; see `EntmaxLayer.update`.

        Raises:
            RuntimeError: the last step was interrupted: some layers have done it and others have not.
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
        """Notes that a state of linear attention takes part in a step. Such a state has no length to look at.

        A new step starts where an earlier layer is called than the one before, or the same state a second time.
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
            tokens_to_remove: a negative number removes so many tokens. A positive number is the number of tokens to
                keep, padding included. After an interrupted step it gives all layers the same length.

        Raises:
            RuntimeError: a full window has dropped tokens that would have to come back. Call
                `activate_past_recording()` before the tokens are read that are to be removed.
        """
        keep = tokens_to_keep(self.get_seq_length(), int(tokens_to_remove))  # some versions pass a tensor
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
                layer.crop(0)  # drops the past that it has recorded
        for layer in self.paged_layers:
            layer.keep(keep)
        self._forget_steps()


def _transformers_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers that transformers' own cache has for a model."""
    try:
        return list(DynamicCache(config=config).layers)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"EntmaxCache: expected a model that DynamicCache has layers for, got {type(config).__name__} ({error!r})"
        ) from error
