"""The cases that are measured, and the queries, keys and values of each.

Kinds of keys:

- normal: independent normal numbers.
- clustered: normal numbers, each key correlated with the one before it.
- outlier: as normal, but one channel is far from 0 in all keys.
- equal: zeros, so that all tokens have the same weight.
- wide: as normal, but the scores of the first query head hardly differ: of 131072 tokens about 40000 have weight for
  it, and about fifty for each other head.
- model: the keys of the shipped model on real text, with its queries and values (model_text.py).

Other queries and values are independent normal numbers.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import entmaxkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CORRELATION = 0.97  # of clustered keys, between a key and the next
OUTLIER = 30.0  # mean of the channel that is far from 0
WIDE, OTHERS = 0.012, 0.8  # standard deviations of the queries: of the first query head, and of the others
PAGE_SIZES = [8, 16, 32, 64, 128]
KEYS = ["normal", "clustered", "outlier", "equal", "wide", "model"]


@dataclass(frozen=True)
class Case:
    """One cache and its query: `batch` rows of `context` tokens."""

    keys: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    batch: int
    context: int

    def __str__(self) -> str:
        rows = f"{self.batch} x " if self.batch > 1 else ""
        return (
            f"{rows}{self.context} tokens, {self.keys} keys, {self.dtype}, {self.heads} query and {self.kv_heads} KV "
            f"heads of {self.head_dim}, pages of {self.page_size}"
        )


class Inputs(NamedTuple):
    """q [batch, heads, head_dim], k and v [batch, context, kv_heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Rows(NamedTuple):
    """Rows of a cache; where `batch` is None, --batch gives their number."""

    batch: int | None
    context: int


class Heads(NamedTuple):
    query: int
    kv: int

    def __repr__(self) -> str:
        return f"{self.query}/{self.kv}"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def head_dim(text: str) -> int:
    if (found := positive(text)) > 256:
        raise argparse.ArgumentTypeError(f"expected a head_dim of at most 256, got {text}")
    return found


def rows(text: str) -> Rows:
    """Parses TOKENS or BATCHxTOKENS."""
    *batch, context = text.split("x")
    if len(batch) > 1 or not all(part.isdecimal() and int(part) for part in (*batch, context)):
        raise argparse.ArgumentTypeError(
            f"expected tokens such as 32768, or rows of them such as 16x32768, got {text!r}"
        )
    return Rows(int(batch[0]) if batch else None, int(context))


def heads(text: str) -> Heads:
    """Parses QUERY/KV."""
    query, _, kv = text.partition("/")
    if not (query.isdecimal() and kv.isdecimal() and int(kv)) or int(query) % int(kv) or not int(query):
        raise argparse.ArgumentTypeError(
            f"expected query and KV heads such as 32/8, the first a multiple of the second, got {text!r}"
        )
    return Heads(int(query), int(kv))


def add_case_arguments(parser: argparse.ArgumentParser, contexts: str, dtypes: str) -> None:
    """Adds the options that `cases` reads; `contexts` and `dtypes` name the defaults in the help."""
    where = "tokens, or rows of tokens such as 16x32768"
    later = argparse.SUPPRESS  # the default may depend on the device
    parser.add_argument("--context", type=rows, nargs="+", default=later, help=f"{where} (default: {contexts})")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="rows of a --context without its own")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=later, help=f"of the cache (default: {dtypes})")
    parser.add_argument(
        "--keys",
        nargs="+",
        choices=KEYS,
        default=["normal"],
        help="model: of the shipped model",
    )
    parser.add_argument("--heads", type=heads, nargs="+", default=[Heads(32, 8)], help="query heads/KV heads")
    parser.add_argument("--head-dim", type=head_dim, nargs="+", default=[128], help="size of a head")
    parser.add_argument("--page-size", type=int, nargs="+", choices=PAGE_SIZES, default=[16], help="tokens per page")


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination of the options' values."""
    sizes = [(batch, row.context) for row in args.context for batch in ([row.batch] if row.batch else args.batch)]
    return [
        Case(keys, dtype, pair.query, pair.kv, head_dim, page_size, batch, context)
        for keys, dtype, pair, head_dim, page_size, (batch, context) in product(
            args.keys, args.dtype, args.heads, args.head_dim, args.page_size, sizes
        )
    ]


def drawn(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random inputs, the same at every call with the same arguments."""
    torch.manual_seed(seed)
    batch, context, kv_heads, head_dim = case.batch, case.context, case.kv_heads, case.head_dim
    k = torch.randn(batch, context, kv_heads, head_dim, device=device)
    if case.keys == "clustered":
        decay = CORRELATION ** torch.arange(256.0, device=device)  # the weights of older keys are negligible
        kernel = decay.flip(0) * (1 - CORRELATION**2) ** 0.5
        series = k.permute(0, 2, 3, 1).reshape(-1, 1, context)
        series = torch.nn.functional.conv1d(torch.nn.functional.pad(series, (255, 0)), kernel.view(1, 1, -1))
        k = series.view(batch, kv_heads, head_dim, context).permute(0, 3, 1, 2)
    if case.keys == "outlier":
        k[..., head_dim // 3] += OUTLIER
    if case.keys == "equal":
        k.zero_()
    k = k.to(DTYPES[case.dtype]).contiguous()
    v = torch.randn_like(k)
    q = torch.randn(batch, case.heads, head_dim, dtype=k.dtype, device=device)
    if case.keys == "wide":
        q *= OTHERS
        q[:, 0] *= WIDE / OTHERS
    return Inputs(q, k, v)


def filled(case: Case, inputs: Inputs, *, room: int = 0) -> entmaxkv.PagedKVCache:
    """A cache that holds the keys and values, and has room for `room` more tokens in each row."""
    cache = entmaxkv.PagedKVCache(
        case.batch,
        case.context + room,
        case.kv_heads,
        case.head_dim,
        page_size=case.page_size,
        dtype=inputs.k.dtype,
        device=inputs.k.device,
    )
    cache.append(inputs.k, inputs.v)
    return cache
