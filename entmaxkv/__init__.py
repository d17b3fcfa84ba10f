"""Decoding of entmax attention over a paged KV cache: only what exact zeros cannot rule out is read."""

from entmaxkv import ops
from entmaxkv.attention import DecodeInfo, decode
from entmaxkv.cache import PagedKVCache
from entmaxkv.select import Gaussian, KeySketch, TopPages

__all__ = ["DecodeInfo", "Gaussian", "KeySketch", "PagedKVCache", "TopPages", "decode", "ops"]
__version__ = "0.1.0"
