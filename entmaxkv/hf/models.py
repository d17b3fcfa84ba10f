"""Says which models and keywords the attention implementation takes, and what alpha a model has."""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

NAME = "entmaxkv"
# The implementations by which transformers computes softmax.
SOFTMAX = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"})

# Keywords that reach attention functions and change no score. Any other keyword may: it is refused where it is set.
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
MEANINGS = {
    "cu_seq_lens_q": "cu_seq_lens_q (packed sequences)",
    "indices": "indices (keys that the model has chosen)",
    "output_attentions": "output_attentions (the weights are not kept)",
    "s_aux": "s_aux (attention sinks)",
    "sinks": "sinks (attention sinks)",
    "softcap": "softcap (a soft cap of the scores)",
}

# Patterns in the source of a model. It defines a module of attention:
OWN_ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\)", re.MULTILINE)
# Its attention goes through the AttentionInterface:
INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS(\.get_interface\(|\[)")
# It looks up a class of its own for each implementation that it knows:
OWN_CLASSES = re.compile(r"_CLASSES\[[\w.]*config\._attn_implementation\]")


def alpha_of(config: Any, stated: float | None = None) -> float:
    """The stated alpha, or else that of a config.

    Raises:
        ValueError: neither states one, or it is not in [1, 2].
    """
    where = "config.entmax_alpha" if stated is None else "alpha"
    alpha = getattr(config, "entmax_alpha", None) if stated is None else stated
    if alpha is None:
        raise ValueError(
            f"entmaxkv: expected a stated alpha, got a {type(config).__name__} without entmax_alpha; set it there "
            "(model.config, or its text_config) or pass EntmaxCache(..., alpha=...): 1 is softmax, 1.5 usual entmax"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 <= alpha <= 2:
        raise ValueError(f"entmaxkv: expected {where} in [1, 2], got {alpha!r}")
    return float(alpha)


def refuse_keywords(**keywords: Any) -> None:
    """Raises a ValueError that names the first keyword that may change scores and is set."""
    for name, value in keywords.items():
        if name in HARMLESS or value is None or value is False:
            continue
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"entmaxkv attention: expected no {MEANINGS.get(name, name)}, got {got}")


def refuse_foreign(model: type[PreTrainedModel]) -> None:
    """Raises a ValueError for a model class that computes attention by itself, whatever the implementation is."""
    if not _uses_interface(model):  # type: ignore[arg-type]  # classes are hashable, whatever mypy says
        raise ValueError(
            f"entmaxkv: expected a model whose attention goes through transformers' AttentionInterface, got "
            f"{model.__name__}, which computes its own softmax"
        )


def check_when_built(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Checks a transformers model while it is built. This is a hook of torch, which calls it for every module.

    A model with this implementation has to compute attention through the AttentionInterface, see `refuse_foreign`. Of a
    model that is composed of others, only these others are checked. The config of an entmax model is made to name the
    implementation wherever it is saved. Where such a model is built with softmax, a warning says so.
    """
    config: Any = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
    if config is None:
        return
    implementation = config._attn_implementation
    if implementation == NAME and config.get_text_config(decoder=True) is config:
        refuse_foreign(type(module))  # type: ignore[arg-type]
    alpha = getattr(config, "entmax_alpha", 1)
    if alpha != 1:
        config.attn_implementation = NAME
        if implementation in SOFTMAX:
            warnings.warn(
                f"entmaxkv: {type(module).__name__} has entmax attention (entmax_alpha {alpha}), but is built with "
                f"attn_implementation={implementation!r}, which is softmax",
                stacklevel=2,
            )


def refuse_config(config: PreTrainedConfig) -> None:
    """Refuses the configs of models that never call `attention`, or call it too late.

    Models that never call `attention` have attention of their own, and got the implementation after they were built.
    Models that call it too late choose keys, and compute with the mask before.
    """
    if "indexed_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"entmaxkv attention: expected layers that look at every key, got the indexed_attention of a "
            f"{type(config).__name__}, which chooses them"
        )
    models = _models_of(type(config))  # type: ignore[arg-type]  # classes are hashable, whatever mypy says
    if models and not any(_uses_interface(model) for model in models):  # type: ignore[arg-type]
        refuse_foreign(models[0])


@functools.cache
def _models_of(config: Any) -> tuple[type[PreTrainedModel], ...]:
    def below(model: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
        for each in model.__subclasses__():
            yield each
            yield from below(each)

    package = config.__module__.rpartition(".")[0]
    owners = [model for model in below(PreTrainedModel) if model.config_class is config]
    return tuple(model for model in owners if model.__module__.rpartition(".")[0] == package)


@functools.cache
def _uses_interface(model: Any) -> bool:
    """Whether the source of a model says that its attention goes through the AttentionInterface.

    Where there is no source, as in a notebook, that of the base class counts.
    """
    for base in model.__mro__:
        if base is PreTrainedModel:
            break
        if not issubclass(base, PreTrainedModel):
            continue
        try:
            source = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):
            continue
        return not OWN_ATTENTION.search(source) or bool(INTERFACE.search(source) and not OWN_CLASSES.search(source))
    return False
