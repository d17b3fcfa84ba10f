"""A look at the queries of a model that decodes through the cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import entmaxkv


class Watch:
    """A selector that keeps every page, and shows a function each query, cache and what else `pages` is told."""

    def __init__(self, see: Callable[[Tensor, entmaxkv.PagedKVCache, dict[str, Any]], None]):
        self.see = see

    def pages(
        self,
        q: Tensor,
        cache: entmaxkv.PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `entmaxkv.select.PageSelector.pages`."""
        options: dict[str, Any] = {"alpha": alpha, "scale": scale, "alibi_slopes": alibi_slopes}
        self.see(q, cache, options)
        return entmaxkv.TopPages(cache.max_tokens).pages(q, cache, **options)
