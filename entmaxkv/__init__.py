"""Decodes entmax attention over a paged KV cache, and reads only the tokens that may have weight."""

from entmaxkv import metrics, ops, reference
from entmaxkv.attention import DecodeInfo, decode
from entmaxkv.cache import PagedKVCache
from entmaxkv.scoring import Scoring
from entmaxkv.select import Gaussian, KeySketch, Selection, Selector, TopPages

__all__ = [
    "DecodeInfo",
    "Gaussian",
    "KeySketch",
    "PagedKVCache",
    "Scoring",
    "Selection",
    "Selector",
    "TopPages",
    "decode",
    "metrics",
    "ops",
    "reference",
]
__version__ = "0.1.0"
