"""How a transformers model is called."""

import inspect
from typing import Any


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a forward pass takes a cache: `cache` in later versions 5, `past_key_values` before."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}
