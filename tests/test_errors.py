"""Wrong calls: each names its argument, says expected and got, and leaves the cache as it was."""

import functools
import math
import types
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_bits, draw, make_cache, make_query, selection

import entmaxkv

OPS = torch.ops.entmaxkv
MAX_PAGES = 4  # of 16 tokens


def good(device: str) -> SimpleNamespace:
    """Arguments that fit together: batch 2, 4 query and 2 KV heads of 64, 40 and 17 tokens."""
    cache = make_cache([40, 17], max_pages=MAX_PAGES, device=device)
    for x in cache.tensors[:6]:
        x.nan_to_num_()
    keep = [torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)]
    selected, counts = selection(keep, MAX_PAGES, device)
    sketch = cache.sketch()
    fields = "k_pages", "v_pages", "k_min", "k_max", "k_mean", "k_std", "page_table", "seq_lens"
    return SimpleNamespace(
        **dict(zip(fields, cache.tensors, strict=True)),
        q=make_query(2, 4, 64, device=device),
        k=draw(2, 3, 2, 64, device=device),
        v=draw(2, 3, 2, 64, device=device, seed=1),
        lengths=torch.tensor([3, 1], dtype=torch.int32, device=device),
        codes=sketch[0],
        norms=sketch[1],
        scores=draw(2, 4, MAX_PAGES, device=device),
        mean=draw(2, 4, MAX_PAGES, device=device),
        std=draw(2, 4, MAX_PAGES, device=device).abs(),
        selected=selected,
        counts=counts,
        page_size=16,
        kv_heads=2,
        budget=32,
        alpha=1.5,
        quantile=0.5,
        margin=0.0,
        scale=None,
        alibi_slopes=None,
        head_alpha=None,
        lower=0.0,
        bits=4,
        certainty=1.0,
        max_tokens=None,
        by_token=False,
    )


def call(op: str, x: SimpleNamespace) -> object:
    function = getattr(OPS, op)
    return function(*(getattr(x, argument.name) for argument in function.default._schema.arguments))


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with a last dimension that is not contiguous."""
    return torch.stack([x, x], -1)[..., 0]


def ints(*values: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.tensor(values, dtype=torch.int32, device=x.device)


def poke(value: float, *index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def same_page(*places: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A page table with one page in two places."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[places[0]] = x[places[1]]
        return x

    return change


def floats(*values: float) -> Callable[[object], torch.Tensor]:
    return lambda _: torch.tensor(values)


# op, argument, what is done to it, name in the message if another
SHAPES = [
    ("append_kv", "k", lambda x: x[0]),
    ("append_kv", "k", lambda x: x[:1], "v"),
    ("append_kv", "k", lambda x: x[..., :32], "v"),
    ("append_kv", "v", lambda x: x[:, :2]),
    ("append_kv", "v", lambda x: x[:, :, :1]),
    ("append_kv", "k", lambda x: x.half()),
    ("append_kv", "v", lambda x: x.double()),
    ("append_kv", "k", spread),
    ("append_kv", "v", spread),
    ("append_kv", "k_pages", lambda x: x[0]),
    ("append_kv", "k_pages", lambda x: x.int()),
    ("append_kv", "v_pages", lambda x: x[:-1]),
    ("append_kv", "v_pages", spread),
    ("append_kv", "k_pages", lambda x: x.repeat(1, 1, 16, 1), "v_pages"),
    ("append_kv", "k_pages", lambda x: x[:1].expand_as(x)),
    ("append_kv", "k_min", lambda x: x[:1].expand_as(x)),
    ("append_kv", "lengths", lambda x: x[:1]),
    ("append_kv", "lengths", lambda x: x.long()),
    ("append_kv", "k_min", lambda x: x[:-1]),
    ("append_kv", "k_max", lambda x: x[..., :32]),
    ("append_kv", "k_mean", lambda x: x.bfloat16()),
    ("append_kv", "k_std", lambda _: None),
    ("append_kv", "k_min", lambda _: None),
    ("append_kv", "page_table", lambda x: x[:1]),
    ("append_kv", "page_table", lambda x: x.long()),
    ("append_kv", "seq_lens", lambda x: x[:, None]),
    ("append_kv", "seq_lens", lambda x: x.float()),
    ("append_kv", "codes", lambda _: None),
    ("append_kv", "codes", lambda x: x[..., 1:]),
    ("append_kv", "norms", lambda _: None),
    ("append_kv", "norms", lambda x: x[:, :, :2]),
    ("build_sketch", "k_pages", lambda x: x.double()),
    ("build_sketch", "codes", lambda x: x.char()),
    ("build_sketch", "codes", lambda x: x[:, :, :1]),
    ("build_sketch", "codes", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    ("build_sketch", "norms", lambda x: x[:-1]),
    ("build_sketch", "norms", lambda x: x.int()),
    ("build_sketch", "page_table", lambda x: x[:1], "seq_lens"),
    ("page_stats", "k_pages", lambda x: x[:, 0]),
    ("page_stats", "k_pages", lambda x: x[:, :, :12], "page_size"),
    ("page_stats", "k_max", lambda x: x[:, :1]),
    ("page_stats", "k_mean", lambda _: None),
    ("page_stats", "seq_lens", lambda x: x.repeat(2)),
    ("score_pages", "q", lambda x: x[0]),
    ("score_pages", "q", lambda x: x[:, :3], "q_heads"),
    ("score_pages", "q", lambda x: x[..., :63], "k_min"),
    ("score_pages", "q", lambda x: x.double()),
    ("score_pages", "q", spread),
    ("score_pages", "k_min", lambda x: x.half(), "k_max"),
    ("score_pages", "k_max", lambda x: x[:-1]),
    ("score_pages", "page_size", lambda _: 24),
    ("score_pages", "page_size", lambda _: 4),
    ("score_pages", "page_size", lambda _: 256),
    ("score_pages", "page_size", lambda _: -16),
    ("score_pages", "alibi_slopes", floats(1, 2)),
    ("score_pages", "scale", lambda _: math.nan),
    ("score_pages", "lower", lambda _: -0.1),
    ("score_pages", "lower", lambda _: 1.5),
    ("score_pages", "lower", lambda _: math.nan),
    ("score_gaussian", "scale", lambda _: 1e300),
    ("score_pages", "alibi_slopes", lambda _: torch.zeros(4, dtype=torch.float64)),
    ("score_gaussian", "k_std", lambda x: x[..., :32]),
    ("score_gaussian", "k_mean", spread),
    ("score_gaussian", "page_size", lambda _: 0),
    ("select_pages", "scores", lambda x: x[0]),
    ("select_pages", "scores", lambda x: x.double()),
    ("select_pages", "budget", lambda _: 0),
    ("select_pages", "budget", lambda _: -5),
    ("select_pages", "kv_heads", lambda _: 0),
    ("select_pages", "kv_heads", lambda _: 3, "q_heads"),
    ("select_pages", "page_size", lambda _: 17),
    ("select_pages", "page_size", lambda _: 2**32 + 16),
    ("select_pages", "kv_heads", lambda _: 2**32 + 2),
    ("select_pages", "seq_lens", lambda x: x[:1]),
    ("select_gaussian", "std", lambda x: x[..., 1:]),
    ("select_gaussian", "alpha", lambda _: 0.9),
    ("select_gaussian", "alpha", lambda _: 2.5),
    ("select_gaussian", "quantile", lambda _: 0.0),
    ("select_gaussian", "quantile", lambda _: 1.5),
    ("select_gaussian", "margin", lambda _: math.nan),
    ("select_gaussian", "head_alpha", floats(1.5)),
    ("select_sketch", "q", lambda x: x.half()),
    ("select_sketch", "q", lambda x: x[:, :3], "q_heads"),
    ("select_sketch", "codes", lambda x: x[:, :1]),
    ("select_sketch", "norms", lambda x: x[..., :8]),
    ("select_sketch", "alpha", lambda _: 2.5),
    ("select_sketch", "scale", lambda _: math.inf),
    ("select_sketch", "alibi_slopes", floats(1, 2)),
    ("select_sketch", "head_alpha", floats(1.5)),
    ("select_sketch", "bits", lambda _: 3),
    ("select_sketch", "certainty", lambda _: 0.0),
    ("select_sketch", "certainty", lambda _: 1.5),
    ("select_sketch", "certainty", lambda _: math.nan),
    ("select_sketch", "max_tokens", lambda _: 0),
    ("sparse_decode", "q", lambda x: x.bfloat16()),
    ("sparse_decode", "q", spread),
    ("sparse_decode", "selected", lambda x: x[:, :1]),
    ("sparse_decode", "selected", lambda x: x.long()),
    ("sparse_decode", "counts", lambda x: x[0]),
    ("sparse_decode", "alpha", lambda _: math.nan),
    ("sparse_decode", "head_alpha", floats(1.5, 1.5)),
    ("dense_decode", "q", lambda x: x[:1], "page_table"),
    ("dense_decode", "q", lambda x: x.repeat(1, 1, 5), "k_pages"),
    ("dense_decode", "v_pages", lambda x: x.half()),
    ("dense_decode", "v_pages", lambda x: x.transpose(2, 3)),
    ("dense_decode", "k_pages", spread),
    ("dense_decode", "page_table", lambda x: x[0]),
    ("dense_decode", "page_table", spread),
    ("dense_decode", "alpha", lambda _: 0.0),
    ("dense_decode", "alpha", lambda _: 2.0001),
    ("dense_decode", "alibi_slopes", floats(1, 2, 3)),
    ("decode", "k_min", lambda x: x[:, :1]),
    ("decode", "k_max", lambda x: x.half()),
    ("decode", "budget", lambda _: 0),
    ("decode", "alpha", lambda _: 3.0),
    ("decode", "k_pages", lambda x: x[0]),
]

# Values in memory, which only a host can look at without waiting for the device.
VALUES = [
    ("append_kv", "lengths", ints(4, 1)),
    ("append_kv", "lengths", ints(-1, 1)),
    ("append_kv", "seq_lens", ints(62, 17)),
    ("append_kv", "seq_lens", ints(64, 17)),
    ("append_kv", "seq_lens", ints(-1, 17)),
    ("append_kv", "page_table", poke(-1, 0, 2)),
    ("append_kv", "page_table", poke(10**6, 1, 1)),
    ("append_kv", "page_table", same_page((0, 2), (1, 1))),  # both are written
    ("append_kv", "page_table", same_page((0, 2), (1, 0))),  # row 0 writes it, row 1 has it in use
    ("append_kv", "page_table", same_page((1, 1), (0, 0))),
    ("append_kv", "page_table", same_page((0, 2), (0, 1))),
    ("build_sketch", "page_table", poke(11, 1, 0)),
    ("build_sketch", "seq_lens", ints(65, 17)),
    ("page_stats", "page_table", poke(11, 1, 0)),
    ("page_stats", "seq_lens", ints(65, 17)),
    ("score_pages", "page_table", poke(-7, 0, 0)),
    ("score_pages", "seq_lens", ints(40, -1)),
    ("score_gaussian", "page_table", poke(11, 0, 1)),
    ("select_pages", "seq_lens", ints(65, 17)),
    ("select_gaussian", "seq_lens", ints(-3, 17)),
    ("select_gaussian", "head_alpha", floats(1.5, 0.5, 1.5, 1.5)),
    ("select_sketch", "page_table", poke(11, 1, 0)),
    ("select_sketch", "seq_lens", ints(40, -1)),
    ("select_sketch", "head_alpha", floats(1.5, 0.5, 1.5, 1.5)),
    ("sparse_decode", "selected", poke(3, 0, 0, 2)),
    ("sparse_decode", "selected", poke(-1, 0, 0, 0)),
    ("sparse_decode", "selected", poke(10**6, 1, 0, 1)),
    ("sparse_decode", "counts", poke(5, 0, 0)),
    ("sparse_decode", "counts", poke(-1, 1, 1)),
    ("sparse_decode", "page_table", poke(11, 0, 2)),
    ("dense_decode", "page_table", poke(11, 1, 1)),
    ("dense_decode", "seq_lens", ints(40, 65)),
    ("dense_decode", "head_alpha", floats(1.5, math.nan, 1.5, 1.5)),
    ("dense_decode", "alibi_slopes", floats(0.5, math.inf, 0.5, 0.5)),
    ("decode", "page_table", poke(-1, 0, 0)),
]

DEVICES = [
    (op, argument, lambda x: x.to("meta"))
    for op, argument in [
        ("append_kv", "k"),
        ("append_kv", "v_pages"),
        ("append_kv", "seq_lens"),
        ("page_stats", "page_table"),
        ("score_pages", "q"),
        ("select_pages", "seq_lens"),
        ("append_kv", "codes"),
        ("build_sketch", "norms"),
        ("select_sketch", "codes"),
        ("sparse_decode", "selected"),
        ("dense_decode", "q"),
        ("dense_decode", "v_pages"),
        ("decode", "k_max"),
    ]
]


def check_error(error: pytest.ExceptionInfo, name: str) -> None:
    text = str(error.value)
    for part in (name, "expected", "got"):
        assert part in text, text


def check_op(device: str, op: str, argument: str, change: Callable, name: str | None = None) -> None:
    x = good(device)
    call(op, x)
    x = good(device)
    before = {key: value for key, value in vars(x).items() if isinstance(value, torch.Tensor)}
    copies = {key: value.clone() for key, value in before.items()}
    setattr(x, argument, change(getattr(x, argument)))
    with pytest.raises(RuntimeError) as error:
        call(op, x)
    check_error(error, name or argument)
    assert f"entmaxkv::{op}" in str(error.value) or op == "decode"
    assert_same_bits(before.values(), copies.values())


def ids(case: object) -> str | None:
    return case if isinstance(case, str) else None


def table(rows: list[tuple]) -> list:
    return [pytest.param(*row, *([None] * (4 - len(row))), id=f"{i}-{row[0]}-{row[1]}") for i, row in enumerate(rows)]


@pytest.mark.parametrize(("op", "argument", "change", "name"), table(SHAPES))
def test_shapes_dtypes_and_numbers(device, op, argument, change, name):
    check_op(device, op, argument, change, name)


@pytest.mark.parametrize(("op", "argument", "change", "name"), table(VALUES))
def test_values(op, argument, change, name):
    check_op("cpu", op, argument, change, name)


@pytest.mark.parametrize(("op", "argument", "change", "name"), table(DEVICES))
def test_devices(device, op, argument, change, name):
    x = good(device)
    before = {key: value for key, value in vars(x).items() if isinstance(value, torch.Tensor)}
    copies = {key: value.clone() for key, value in before.items()}
    setattr(x, argument, change(getattr(x, argument)))
    with pytest.raises(RuntimeError) as error:
        call(op, x)
    for part in ("expected", "got"):
        assert part in str(error.value), str(error.value)
    assert_same_bits(before.values(), copies.values())


def cache_of(**options: object) -> entmaxkv.PagedKVCache:
    cache = entmaxkv.PagedKVCache(2, 64, 2, 64, **options)
    cache.append(draw(2, 62, 2, 64), draw(2, 62, 2, 64))
    return cache


TOKEN = draw(2, 1, 2, 64)
QUERY = make_query(2, 4, 64)
TOP, GAUSSIAN = entmaxkv.TopPages(budget=32), entmaxkv.Gaussian()

SIZES = {"batch": 1, "max_tokens": 16, "kv_heads": 1, "head_dim": 64}
HALF = types.SimpleNamespace(select=3)


def step(function: Callable, own: entmaxkv.PagedKVCache, **wrong: object) -> object:
    return function(wrong.pop("q", QUERY), wrong.pop("cache", own), **wrong)


def select(selector: entmaxkv.Selector, own: entmaxkv.PagedKVCache, **wrong: object) -> object:
    tensors = wrong.pop("q", QUERY), wrong.pop("cache", own)
    return selector.select(*tensors, entmaxkv.Scoring(**wrong))


STEPS = {
    "decode": functools.partial(step, entmaxkv.decode),
    "KeySketch": functools.partial(select, entmaxkv.KeySketch()),
    "TopPages": functools.partial(select, TOP),
    "Gaussian": functools.partial(select, GAUSSIAN),
}
# Arguments of every step of decoding, and what is no value of theirs.
WRONG = {
    "q": ("x", None, 1.5, QUERY.tolist(), QUERY[0], QUERY[None]),
    "cache": (None, "x", TOKEN, 3, entmaxkv.PagedKVCache),
    "alpha": ("1.5", None, [1.5, 2.0], True, 1.5j, torch.tensor(1.5), torch.ones(1, 4)),
    "scale": ("x", [1.0], True, torch.tensor(0.1)),
    "alibi_slopes": ([1.0] * 4, "x", 1.0, torch.tensor(1.0)),
}

# id, argument in the message, options of the cache, call
PYTHON = [
    ("full cache", "seq_lens", {}, lambda c: c.append(draw(2, 3, 2, 64), draw(2, 3, 2, 64))),
    ("key of another head_dim", "k", {}, lambda c: c.append(TOKEN[..., :32], TOKEN)),
    ("value of another batch", "v", {}, lambda c: c.append(TOKEN, TOKEN[:1])),
    ("keys of another dtype", "k", {}, lambda c: c.append(TOKEN.half(), TOKEN.half())),
    (
        "lengths beyond the tokens",
        "lengths",
        {},
        lambda c: c.append(TOKEN, TOKEN, torch.tensor([2, 1]).int()),
    ),
    ("lengths beyond int32", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, torch.tensor([1, 2**32 + 1]))),
    ("lengths below int32", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, torch.tensor([1, -(2**32) + 1]))),
    ("lengths below 0", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, [1, -1])),
    ("lengths of floats", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, torch.tensor([1.0, 1.0]))),
    ("lengths of a list of floats", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, [1.0, 1.0])),
    ("lengths of bools", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, torch.tensor([True, True]))),
    ("lengths of a list of bools", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, [True, True])),
    ("lengths for too few rows", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, [1])),
    ("one length", "lengths", {}, lambda c: c.append(TOKEN, TOKEN, 1)),
    ("no key", "append: k", {}, lambda c: c.append(None, TOKEN)),
    ("no value", "append: v", {}, lambda c: c.append(TOKEN, None)),
    ("keys of a list", "append: k", {}, lambda c: c.append(TOKEN.tolist(), TOKEN)),
    ("keys of another rank", "append: k", {}, lambda c: c.append(TOKEN[0], TOKEN)),
    ("keep what is no bool", "keep: minmax", {}, lambda c: c.keep(minmax="yes")),
    ("a cache with a flag that is no bool", "sketch", {}, lambda _: cache_of(sketch=1)),
    *(
        (f"size {name} {value!r}", name, {}, lambda _, n=name, v=value: entmaxkv.PagedKVCache(**SIZES | {n: v}))
        for name in ("batch", "max_tokens", "kv_heads", "head_dim", "page_size")
        for value in (True, 16.0, "16", None)
    ),
    *(
        (
            f"{who}: {name} {value!r}"[:40],
            f"{who if who == 'decode' or name in ('q', 'cache') else 'Scoring'}: {name}",
            {},
            lambda c, f=call, n=name, v=value: f(c, **{n: v}),
        )
        for who, call in STEPS.items()
        for name, values in WRONG.items()
        for value in values
    ),
    *(
        (
            f"select {value!r}"[:40].partition(" at 0x")[0],  # addresses differ between processes
            "decode: select",
            {},
            lambda c, v=value: entmaxkv.decode(QUERY, c, select=v),
        )
        for value in (entmaxkv.KeySketch, "KeySketch", 2048, 0, True, object(), [entmaxkv.KeySketch()], HALF)
    ),
    ("query of another rank", "q", {}, lambda c: entmaxkv.decode(QUERY[0], c)),
    ("query heads not a multiple", "q_heads", {}, lambda c: entmaxkv.decode(QUERY[:, :3], c)),
    ("query of another dtype", "float16", {}, lambda c: entmaxkv.decode(QUERY.half(), c)),
    ("query on another device", "q", {}, lambda c: entmaxkv.decode(QUERY.to("meta"), c)),
    ("alpha below 1", "alpha", {}, lambda c: entmaxkv.decode(QUERY, c, alpha=0.5)),
    ("alpha above 2", "alpha", {}, lambda c: entmaxkv.decode(QUERY, c, alpha=2.5, select=TOP)),
    (
        "alpha of a head above 2",
        "alpha",
        {},
        lambda c: entmaxkv.decode(QUERY, c, alpha=torch.tensor([1.5, 1.5, 3.0, 1])),
    ),
    (
        "alpha for too few heads",
        "alpha",
        {},
        lambda c: entmaxkv.decode(QUERY, c, alpha=torch.tensor([1.5, 1.5])),
    ),
    (
        "slopes for too few heads",
        "alibi_slopes",
        {},
        lambda c: entmaxkv.decode(QUERY, c, alibi_slopes=torch.ones(3)),
    ),
    (
        "top pages without bounds",
        "minmax",
        {"minmax": False},
        lambda c: entmaxkv.decode(QUERY, c, select=TOP),
    ),
    (
        "gaussian without moments",
        "moments",
        {"moments": False},
        lambda c: entmaxkv.decode(QUERY, c, select=GAUSSIAN),
    ),
    ("budget 0", "budget", {}, lambda c: entmaxkv.decode(QUERY, c, select=entmaxkv.TopPages(budget=0))),
    (
        "quantile 1",
        "quantile",
        {},
        lambda c: entmaxkv.decode(QUERY, c, select=entmaxkv.Gaussian(quantile=1.0)),
    ),
    (
        "quantile below 0",
        "quantile",
        {},
        lambda c: entmaxkv.decode(QUERY, c, select=entmaxkv.Gaussian(quantile=-0.1)),
    ),
    *(
        (f"{select.__name__}: {argument} {value!r}", argument, {}, lambda _, s=select, a=argument, v=value: s(**{a: v}))
        for select, argument, values in (
            (entmaxkv.TopPages, "budget", (True, 2.0, "2", None, 2**63)),
            (entmaxkv.Gaussian, "quantile", (True, "a", None)),
            (entmaxkv.Gaussian, "margin", (True, "a", None, math.nan)),
            (entmaxkv.KeySketch, "certainty", (True, "a", None)),
            (entmaxkv.KeySketch, "bits", (4.0, "4", None)),
            (entmaxkv.KeySketch, "max_tokens", (True, 2.0, "2", 0)),
        )
        for value in values
    ),
    ("page_size not a power of two", "page_size", {}, lambda _: cache_of(page_size=24)),
    ("page_size too small", "page_size", {}, lambda _: cache_of(page_size=4)),
    ("dtype of integers", "dtype", {}, lambda _: cache_of(dtype=torch.int8)),
    ("head_dim too large", "head_dim", {}, lambda _: entmaxkv.PagedKVCache(1, 16, 1, 257)),
    ("no heads", "kv_heads", {}, lambda _: entmaxkv.PagedKVCache(1, 16, 0, 64)),
    ("no rows", "batch", {}, lambda _: entmaxkv.PagedKVCache(0, 16, 1, 64)),
    ("no tokens", "max_tokens", {}, lambda _: entmaxkv.PagedKVCache(1, 0, 1, 64)),
]


@pytest.mark.parametrize(("name", "options", "wrong"), [pytest.param(*row[1:], id=row[0]) for row in PYTHON])
def test_python(name, options, wrong):
    cache = cache_of(**options)
    names = "k_pages", "v_pages", "k_min", "k_max", "k_mean", "k_std", "page_table", "seq_lens"
    tensors = [x for x in (getattr(cache, name) for name in names) if x is not None]
    before = [x.clone() for x in tensors]
    with pytest.raises((ValueError, RuntimeError)) as error:
        wrong(cache)
    check_error(error, name)
    assert_same_bits(tensors, before)
    cache.append(TOKEN, TOKEN)
    assert cache.seq_lens.tolist() == [63, 63]


def test_a_page_table_with_room_for_too_many_tokens():
    q = k_min = torch.zeros(1, 1, 8)
    page_table, seq_lens = torch.zeros(1, 2**24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    expected = r"max_pages: expected room for at most 2\^31 - 4097 tokens, got 16777216"
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.entmaxkv.score_pages(q, k_min, k_min, page_table, seq_lens, 128)


@pytest.mark.parametrize(
    "make",
    [
        lambda: entmaxkv.KeySketch(1),
        lambda: entmaxkv.KeySketch(0.9, 2),
        lambda: entmaxkv.Gaussian(0.95),
        lambda: entmaxkv.TopPages(2048, 0),
    ],
    ids=["key sketch", "key sketch of two", "gaussian", "top pages of two"],
)
def test_numbers_that_could_mean_two_things_are_named(make):
    with pytest.raises(TypeError, match=r"(KeySketch|Gaussian|TopPages)\.__init__\(\) takes .* positional argument"):
        make()
    assert entmaxkv.TopPages(2048) == entmaxkv.TopPages(budget=2048)
