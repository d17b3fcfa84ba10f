"""How to pass a cache to a transformers model, under the argument name of the installed version."""

import functools
import inspect
from typing import Any

from torch import nn


@functools.cache  # inspecting a signature takes as long as a few ops
def cache_argument(model: type[nn.Module]) -> str:
    """The name of the cache argument of a model's forward: `past_key_values`, or `cache` from transformers 5.40 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes `cache` to a model's forward."""
    kind: Any = type(model)  # mypy takes a class of modules for one without a hash
    return {cache_argument(kind): cache}
