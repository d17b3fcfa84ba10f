"""How a transformers model is called."""

import functools
import inspect
from typing import Any


@functools.cache  # a look at a signature takes as long as a few ops
def cache_argument(model: type) -> str:
    """What a model's forward pass calls its cache: `cache` in later versions 5, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a forward pass takes a cache."""
    return {cache_argument(type(model)): cache}
