"""A look at the queries of a model that decodes through the cache."""

from collections.abc import Callable

from torch import Tensor

import entmaxkv


class Watch:
    """A selector of every page that shows a function what it is asked. Its caches keep what any selector needs."""

    needs = frozenset({"minmax", "moments", "sketch"})

    def __init__(self, see: Callable[[Tensor, entmaxkv.PagedKVCache, entmaxkv.Scoring], object]):
        self.see = see

    def dense_up_to(self, device_type: str) -> int:
        """See `entmaxkv.Selector.dense_up_to`."""
        return 0

    def select(self, q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> entmaxkv.Selection:
        """See `entmaxkv.Selector.select`."""
        self.see(q, cache, scoring)
        return entmaxkv.TopPages(cache.max_tokens).select(q, cache, scoring)
