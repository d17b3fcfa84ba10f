"""PagedKVCache: what it allocates, how it grows, what it keeps."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, draw, make_query, tensors_in

import entmaxkv
from entmaxkv import PagedKVCache, reference

PAGE = (Path(__file__).parents[1] / "docs" / "ops.md").read_text()
STATISTICS = "k_min", "k_max", "k_mean", "k_std"
KEPT = *STATISTICS, "codes", "norms"
KINDS = "minmax", "moments", "sketch"


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("max_tokens", [1, 127, 128, 129])
def test_shapes(device, page_size, max_tokens):
    cache = PagedKVCache(3, max_tokens, 2, 96, page_size=page_size, dtype=torch.bfloat16, device=device)
    max_pages = -(-max_tokens // page_size)
    assert cache.page_table.shape == (3, max_pages) and cache.page_table.dtype == torch.int32
    assert cache.seq_lens.tolist() == [0, 0, 0] and cache.seq_lens.dtype == torch.int32
    pages = len(cache.k_pages)
    assert pages >= 3 * max_pages
    assert (
        cache.page_table.unique().numel() == 3 * max_pages
        and cache.page_table.min() >= 0
        and cache.page_table.max() < pages
    )
    for x in (cache.k_pages, cache.v_pages):
        assert x.shape == (pages, 2, page_size, 96) and x.dtype == torch.bfloat16 and x.device.type == device
    for name in STATISTICS:
        x = getattr(cache, name)
        assert x.shape == (pages, 2, 96) and x.dtype == torch.bfloat16 and x.device.type == device
    assert cache.codes.shape == (pages, 2, 2, page_size, 32) and cache.norms.shape == (pages, 2, 3, page_size)
    for x in (cache.codes, cache.norms):
        assert x.dtype == torch.uint8 and x.device.type == device
    assert (cache.batch, cache.max_tokens, cache.kv_heads, cache.head_dim, cache.page_size) == (
        3,
        max_pages * page_size,
        2,
        96,
        page_size,
    )


def test_defaults():
    cache = PagedKVCache(1, 100, 2, 64)
    assert cache.page_size == 16 and cache.k_pages.dtype == torch.float32 and cache.k_pages.device.type == "cpu"
    assert all(getattr(cache, name) is not None for name in KEPT)


@pytest.mark.parametrize("minmax", [False, True])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("sketch", [False, True])
def test_keeps_the_statistics_asked_for(device, minmax, moments, sketch):
    kept = {"minmax": minmax, "moments": moments, "sketch": sketch}
    cache = PagedKVCache(1, 100, 2, 64, **kept, device=device)
    assert [getattr(cache, name) is not None for name in KEPT] == [x for x in kept.values() for _ in range(2)]
    assert all((f"{name}=False" in repr(cache)) != x for name, x in kept.items())
    tensors = [cache.k_pages, cache.v_pages, *(getattr(cache, name) for name in KEPT)]
    assert cache.nbytes == sum(x.nbytes for x in tensors if x is not None)
    cache.append(draw(1, 5, 2, 64, device=device), draw(1, 5, 2, 64, device=device))
    assert cache.seq_lens.tolist() == [5]
    assert entmaxkv.decode(make_query(1, 4, 64, device=device), cache).isfinite().all()


def test_append_is_in_place_and_ragged(device):
    cache = PagedKVCache(2, 64, 2, 64, device=device)
    places = [x.data_ptr() for x in (cache.k_pages, cache.v_pages, cache.k_min, cache.k_mean, cache.seq_lens)]
    k, v = draw(2, 40, 2, 64, device=device), draw(2, 40, 2, 64, device=device, seed=1)
    cache.append(k, v, lengths=torch.tensor([40, 3], dtype=torch.int32, device=device))
    cache.append(k[:, :1], v[:, :1])
    assert cache.seq_lens.tolist() == [41, 4]
    assert places == [x.data_ptr() for x in (cache.k_pages, cache.v_pages, cache.k_min, cache.k_mean, cache.seq_lens)]
    for row, n in enumerate([40, 3]):
        tokens = torch.cat([k[row, :n], k[row, :1]])
        assert torch.equal(reference.gather(cache.k_pages, cache.page_table[row], n + 1), tokens)


@pytest.mark.parametrize(("head_dim", "bytes_per_key"), [(33, 35), (64, 35), (128, 67), (256, 131)])
def test_sketch_takes_so_many_bytes(head_dim, bytes_per_key):
    cache, plain = (PagedKVCache(2, 64, 3, head_dim, sketch=sketch) for sketch in (True, False))
    assert cache.nbytes - plain.nbytes == bytes_per_key * 2 * 64 * 3


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_the_page_tells_what_is_kept_costs(kind):
    """Bytes per token and KV head, and their share of keys and values."""
    costs = []
    for head_dim in (64, 128):
        kept = {other: kind in (other, None) for other in KINDS}
        cache = PagedKVCache(1, 16, 1, head_dim, dtype=torch.bfloat16, **kept)
        keys_and_values = cache.k_pages.nbytes + cache.v_pages.nbytes
        more = cache.nbytes - keys_and_values
        costs.append(f"{more // 16} ({100 * more / keys_and_values:.1f} %)")
    (row,) = re.findall(rf"^\| {f'`{kind}`' if kind else 'all three, the default'} \|.*", PAGE, re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[3:5]] == costs


def test_keeps_more_later(device):
    """What a cache starts to keep is what it would hold had it always kept it, and goes on."""
    always, late = (PagedKVCache(2, 64, 2, 64, device=device, **kept) for kept in ({}, dict.fromkeys(KINDS, False)))
    k, v = draw(2, 40, 2, 64, device=device), draw(2, 40, 2, 64, device=device, seed=1)
    lengths = torch.tensor([40, 3], dtype=torch.int32, device=device)
    for cache in (always, late):
        cache.append(k, v, lengths)
    late.keep()
    assert all(getattr(late, name) is None for name in KEPT)
    for kind in KINDS:
        late.keep(**{kind: True})
    q = make_query(2, 4, 64, device=device)
    for _ in range(2):
        used = [(row, slice(0, n)) for row, n in enumerate(always.seq_lens.tolist())]
        for name in ("codes", "norms"):
            a, b = (getattr(cache, name).view(2, -1, 2, *getattr(cache, name).shape[2:]) for cache in (always, late))
            for row, tokens in used:  # [pages, kv_heads, planes, page_size, ...] to tokens
                first, second = (x[row].movedim(3, 1).flatten(0, 1)[tokens] for x in (a, b))
                assert torch.equal(first, second), name
        for select in (entmaxkv.KeySketch(), entmaxkv.TopPages(16, dense_below=0), entmaxkv.Gaussian(dense_below=0)):
            assert_same_bits(*([entmaxkv.decode(q, cache, select=select)] for cache in (always, late)))
        for cache in (always, late):
            cache.append(k[:, :5], v[:, :5])


def test_clear_starts_over(device):
    cache, fresh = (PagedKVCache(2, 64, 2, 64, device=device) for _ in range(2))
    cache.append(draw(2, 60, 2, 64, device=device) * 100, draw(2, 60, 2, 64, device=device))
    cache.clear()
    assert cache.seq_lens.tolist() == [0, 0]
    q, k, v = (
        make_query(2, 4, 64, device=device),
        draw(2, 9, 2, 64, device=device),
        draw(2, 9, 2, 64, device=device, seed=1),
    )
    assert (entmaxkv.decode(q, cache) == 0).all()
    for x in (cache, fresh):
        x.append(k, v)
    for select in (None, entmaxkv.TopPages(budget=16), entmaxkv.Gaussian(), entmaxkv.KeySketch(dense_below=0)):
        assert_same_bits([entmaxkv.decode(q, cache, select=select)], [entmaxkv.decode(q, fresh, select=select)])


def test_a_full_cache_refuses_and_stays_as_it_was():
    cache = PagedKVCache(2, 32, 2, 64)
    cache.append(draw(2, 32, 2, 64), draw(2, 32, 2, 64))
    before = cache.k_pages.clone(), cache.seq_lens.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"seq_lens.*expected.*got"):
        cache.append(draw(2, 1, 2, 64), draw(2, 1, 2, 64))
    assert_same_bits((cache.k_pages, cache.seq_lens), before)


def test_caches_are_independent(device):
    caches = [PagedKVCache(1, 32, 1, 64, device=device) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.append(
            torch.full((1, 4, 1, 64), float(i), device=device),
            torch.full((1, 4, 1, 64), float(i), device=device),
        )
    for i, cache in enumerate(caches):
        assert (entmaxkv.decode(make_query(1, 1, 64, device=device), cache) == i).all()


def prompt(lengths, dtype=torch.float32, device="cpu", seed=0):
    """Keys and values of as many tokens as the longest row has, and the rows' lengths."""
    k, v = (draw(len(lengths), max(lengths), 2, 64, dtype=dtype, device=device, seed=seed + i) for i in range(2))
    return k, v, torch.tensor(lengths, dtype=torch.int32, device=device)


def filled(k, v, lengths, max_tokens=150, page_size=16):
    cache = PagedKVCache(len(k), max_tokens, 2, 64, page_size=page_size, dtype=k.dtype, device=k.device)
    cache.append(k, v, lengths)
    return cache


def assert_same_content(got, want):
    """Lengths, keys, values, statistics and sketch to the bit."""
    assert got.seq_lens.tolist() == want.seq_lens.tolist()
    assert (got.batch, got.max_tokens, got.nbytes) == (want.batch, want.max_tokens, want.nbytes)
    assert got.page_table.unique().numel() == got.page_table.numel() and int(got.page_table.max()) < len(got.k_pages)
    for row, n in enumerate(want.seq_lens.tolist()):
        a, b = (cache.page_table[row, : -(-n // cache.page_size)].long() for cache in (got, want))
        for name in ("k_pages", "v_pages", *KEPT):
            x, y = getattr(got, name)[a], getattr(want, name)[b]
            if name in STATISTICS:
                assert_same_bits([x], [y])
            else:  # [pages, kv_heads, (planes,) page_size, ...] to tokens
                axis = 3 if name in ("codes", "norms") else 2
                assert_same_bits(*([t.movedim(axis, 1).flatten(0, 1)[:n]] for t in (x, y)))


SELECTORS = (
    None,
    entmaxkv.KeySketch(dense_below=0),
    entmaxkv.TopPages(32, dense_below=0),
    entmaxkv.Gaussian(dense_below=0),
)


def assert_same_cache(got, want):
    """The content, and what every selector makes of it."""
    assert_same_content(got, want)
    q = make_query(want.batch, 4, 64, want.k_pages.dtype, want.k_pages.device.type)
    for select in SELECTORS:
        results = []
        for cache in (got, want):
            out, info = entmaxkv.decode(q, cache, select=select, return_info=True)
            results.append(tensors_in((out, info)))
        assert_same_bits(*results)


LENGTHS = [0, 1, 37, 100]
in_every_form = pytest.mark.parametrize(
    ("dtype", "page_size"),
    [(torch.float32, 8), (torch.float32, 16), (torch.bfloat16, 32), (torch.float16, 64), (torch.bfloat16, 128)],
    ids=str,
)


@in_every_form
@pytest.mark.parametrize("kept", [0, 1, 8, 9, 64, 1000, [0, 0, 36, 99], [3, 0, 0, 65]], ids=str)
def test_truncate_is_as_if_the_tokens_had_never_come(device, dtype, page_size, kept):
    k, v, lengths = prompt(LENGTHS, dtype, device)
    cache = filled(k, v, lengths, page_size=page_size)
    places = [x.data_ptr() for x in vars(cache).values() if isinstance(x, torch.Tensor)]
    cache.truncate(kept)
    left = torch.minimum(lengths, torch.tensor(kept, dtype=torch.int32, device=device))
    fresh = filled(k, v, left, page_size=page_size)
    assert_same_content(cache, fresh)
    for x in (cache, fresh):
        x.append(*prompt([5, 0, 1, 20], dtype, device, seed=2))
    assert_same_cache(cache, fresh)
    assert places == [x.data_ptr() for x in vars(cache).values() if isinstance(x, torch.Tensor)]


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, list, tuple, np.array], ids=str)
def test_numbers_of_rows_come_in_any_form(device, dtype):
    """Also a large one, where it is a number of tokens to keep."""

    def form(*numbers):
        return torch.tensor(numbers, dtype=dtype, device=device) if isinstance(dtype, torch.dtype) else dtype(numbers)

    k, v, lengths = prompt([40, 3], device=device)
    want = filled(k, v, lengths)
    cache = filled(k, v, form(40, 3))
    assert_same_cache(cache, want)
    cache.truncate(form(17, min(2**40, torch.iinfo(dtype).max if isinstance(dtype, torch.dtype) else 2**70)))
    assert cache.seq_lens.tolist() == [17, 3]
    cache.reorder(form(1, 0))
    assert_same_cache(cache, filled(k.flip(0), v.flip(0), torch.tensor([3, 17], dtype=torch.int32, device=device)))


@pytest.mark.parametrize("sketch", [False, True])
@pytest.mark.parametrize("minmax", [False, True])
def test_truncate_and_reorder_without_some_statistics(device, minmax, sketch):
    cache = PagedKVCache(2, 64, 2, 64, minmax=minmax, moments=False, sketch=sketch, device=device)
    k, v, lengths = prompt([40, 3], device=device)
    cache.append(k, v, lengths)
    cache.truncate([20, 20])
    for rows in ([1, 0], [0, 1, 1]):
        cache.reorder(rows)
    assert cache.seq_lens.tolist() == [3, 20, 20] and cache.k_mean is None
    assert (cache.k_min is not None, cache.codes is not None) == (minmax, sketch)
    used = cache.page_table[2, :2]
    assert not minmax or torch.equal(cache.k_min[used], reference.page_bounds(k[0, :20], 16)[0])


@in_every_form
@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([3, 2, 1, 0], None),
        ([0, 1, 2, 3], None),
        ([0, 0, 2, 3], 100),
        ([0], None),
        ([1, 3], 10**6),
        ([2, 0, 3, 3, 1, 2], None),
    ],
    ids=str,
)
def test_reorder_copies_rows(device, dtype, page_size, rows, tokens):
    k, v, lengths = prompt(LENGTHS, dtype, device)
    cache = filled(k, v, lengths, page_size=page_size)
    cache.reorder(torch.tensor(rows, device=device), tokens=tokens)
    fresh = filled(k[rows], v[rows], lengths[rows], page_size=page_size)
    assert_same_content(cache, fresh)
    more = prompt([20, 1, 0, 7, 8, 33][: len(rows)], dtype, device, seed=2)
    for x in (cache, fresh):
        x.append(*more)
    assert_same_cache(cache, fresh)


def test_reorder_in_place_leaves_every_tensor_where_it_is(device):
    """A captured graph that reads the cache stays valid."""
    cache = filled(*prompt(LENGTHS, device=device))
    places = [x.data_ptr() for x in vars(cache).values() if isinstance(x, torch.Tensor)]
    cache.reorder([1, 1, 3, 2])
    assert places == [x.data_ptr() for x in vars(cache).values() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 1, 1, 0], [3, 3]], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_reorder_goes_through_the_page_table(device, rows, shared):
    """Rows whose pages lie anywhere, or that read the same pages, own theirs afterwards."""
    k, v, lengths = prompt([100, 100, 100, 100], device=device)
    if shared:
        k[1], v[1] = k[0], v[0]
    cache = filled(k, v, lengths)
    if shared:
        cache.page_table[1] = cache.page_table[0]
    else:
        order = torch.randperm(len(cache.k_pages), generator=torch.Generator().manual_seed(0)).to(device)
        for name in ("k_pages", "v_pages", *KEPT):
            getattr(cache, name).copy_(getattr(cache, name)[order])
        cache.page_table.copy_(order.argsort().int()[cache.page_table.long()])
    cache.reorder(rows)
    assert_same_cache(cache, filled(k[rows], v[rows], lengths[rows]))


def test_reorder_copies_no_more_tokens_than_it_was_told_of(device):
    """Where the lengths cannot be seen, a row never claims tokens that were not copied."""
    cache = filled(*prompt([40, 40], device=device))
    cache.reorder([1, 0], tokens=32)
    assert cache.seq_lens.tolist() == ([40, 40] if device == "cpu" else [32, 32])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1]], ids=str)
def test_truncate_and_reorder_do_not_wait_for_the_device(rows):
    cache = filled(*prompt([40, 3], device="cuda"))
    ids, lengths = torch.tensor(rows, device="cuda"), torch.tensor([20, 20], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kept in (30, lengths, [20, 2]):
            cache.truncate(kept)
        cache.reorder(ids, tokens=20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.seq_lens.tolist() == [[20, 2][row] for row in rows]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda c: c.truncate(-1), "truncate: lengths: expected at least 0, got -1"),
        (lambda c: c.truncate([3, -1]), "truncate: lengths: expected at least 0, got -1"),
        (
            lambda c: c.truncate(torch.tensor([3, -(2**40)])),
            "truncate: lengths: expected at least 0, got -1099511627776",
        ),
        (lambda c: c.truncate([3]), r"truncate: lengths: expected whole numbers \[batch = 2\], got 1"),
        (lambda c: c.truncate(torch.tensor(3)), r"truncate: lengths: expected .*, got a tensor \[\] int64"),
        (lambda c: c.truncate(torch.tensor([3.0, 4.0])), r"truncate: lengths: expected .*, got a tensor \[2\] float32"),
        (lambda c: c.truncate(torch.tensor([True, False])), r"truncate: lengths: expected .*, got a tensor \[2\] bool"),
        (lambda c: c.truncate([True, False]), r"truncate: lengths: expected .*, got \[True, False\]"),
        (lambda c: c.truncate(2.0), "truncate: lengths: expected .*, got 2.0"),
        (lambda c: c.truncate(True), "truncate: lengths: expected .*, got True"),
        (lambda c: c.truncate("12"), "truncate: lengths: expected .*, got '12'"),
        (lambda c: c.truncate(None), "truncate: lengths: expected .*, got None"),
        (lambda c: c.reorder([0, 2]), r"reorder: rows: expected 0 \.\.\. 1, got 2"),
        (lambda c: c.reorder([-1, 0]), r"reorder: rows: expected 0 \.\.\. 1, got -1"),
        (lambda c: c.reorder(torch.tensor([0, 2**40])), r"reorder: rows: expected 0 \.\.\. 1, got 1099511627776"),
        (lambda c: c.reorder([]), r"reorder: rows: expected whole numbers \[batch\], got 0"),
        (lambda c: c.reorder(torch.tensor([[0, 1]])), r"reorder: rows: expected .*, got a tensor \[1, 2\] int64"),
        (lambda c: c.reorder(torch.tensor([True, False])), r"reorder: rows: expected .*, got a tensor \[2\] bool"),
        (lambda c: c.reorder(0), "reorder: rows: expected .*, got 0"),
        (lambda c: c.reorder([1, 0], tokens=-1), "reorder: tokens: expected .*, got -1"),
        (lambda c: c.reorder([1, 0], tokens="a"), "reorder: tokens: expected .*, got 'a'"),
    ],
)
def test_truncate_and_reorder_refuse_and_leave_the_cache_as_it_was(wrong, text):
    k, v, lengths = prompt([40, 3])
    cache = filled(k, v, lengths)
    with pytest.raises(ValueError, match=text):
        wrong(cache)
    assert_same_cache(cache, filled(k, v, lengths))


MODES = {
    "recording": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
}
METHODS = {
    "append": lambda c: c.append(*prompt([7, 2], seed=4)),
    "truncate": lambda c: c.truncate([17, 2]),
    "reorder": lambda c: c.reorder([1, 0]),
    "reorder to more rows": lambda c: (c.reorder([1, 0, 0]), c.reorder([0, 1])),
    "keep": lambda c: c.keep(minmax=True, moments=True, sketch=True),
    "clear": lambda c: c.clear(),
    "decode": lambda c: entmaxkv.decode(make_query(2, 4, 64), c, select=entmaxkv.KeySketch(), return_info=True),
    "print": lambda c: print(c),
}


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("copied", [None, copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_works_in_every_mode_wherever_it_was_made(made, used, copied):
    """Also what is added under inference mode later, and copies that are made there."""
    caches = []
    for first, then in ((made, used), ("no_grad", "no_grad")):
        with MODES[first]():
            cache = PagedKVCache(2, 64, 2, 64, minmax=False, moments=False, sketch=False)
            cache.append(*prompt([40, 3]))
            cache.keep(minmax=True, sketch=True)
            cache = copied(cache) if copied else cache
        with MODES[then]():
            cache.keep(moments=True)
        for modes in ((then, first), (first, then)):
            for method in METHODS.values():
                for mode in modes:
                    with MODES[mode]():
                        method(cache)
            cache.append(*prompt([20, 9], seed=6))
        caches.append(cache)
    assert not any(x.is_inference() for x in vars(caches[0]).values() if isinstance(x, torch.Tensor))
    assert_same_cache(*caches)


def test_print_shows_size_and_fill(device):
    cache = PagedKVCache(2, 4096, 8, 128, dtype=torch.bfloat16, moments=False, device=device)
    cache.append(*(draw(2, 3, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(2)))
    parts = ["6 of 8192 tokens", "keys and values 32.0 MiB", "statistics 2.0 MiB", "sketch 4.2 MiB", "moments=False"]
    assert all(part in str(cache) for part in parts), str(cache)
    assert str(cache).count("\n") == 1


def test_print_does_not_look_where_it_cannot():
    cache = PagedKVCache(2, 64, 2, 64, device="meta")
    assert "room for 128 tokens" in str(cache)
    torch._dynamo.reset()
    text, _ = torch.compile(lambda x: (str(cache), x + 1), backend="eager")(torch.ones(1))
    assert "room for 128 tokens" in text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_print_under_graph_capture():
    cache = filled(*prompt([40, 3], device="cuda"))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        text = str(cache)
        cache.seq_lens.add_(0)
    assert "room for 320 tokens" in text and "43 of 320 tokens" in str(cache)


def test_truncate_keeps_the_statistics_of_pages_that_other_rows_use(device):
    """They would not bound the other rows' keys: a certificate would be false."""
    k, direction = 0.05 * draw(2, 40, 1, 64), torch.zeros(64)
    direction[0] = 1
    k[1] = k[0]
    k[:, 26, 0], k[:, 36, 0] = 8 * direction, 4 * direction
    v = draw(2, 40, 1, 64, seed=1)
    v[1] = v[0]
    cache = entmaxkv.PagedKVCache(2, 64, 1, 64, device=device)
    cache.append(k.to(device), v.to(device))
    cache.page_table[1, :2] = cache.page_table[0, :2]
    q = (8 * direction).expand(2, 1, 64).to(device).contiguous()
    select = entmaxkv.TopPages(16, dense_below=0)
    before = entmaxkv.decode(q, cache, select=select, return_info=True)[1]
    cache.truncate([40, 20])
    after = entmaxkv.decode(q, cache, select=select, return_info=True)[1]
    assert not before.certified[0] and not after.certified[0]
    assert after.delta_bound[0] == before.delta_bound[0]
    cache.page_table[1] = cache.page_table[0]
    cache.truncate([30, 5])
    bounds = cache.k_min[cache.page_table[0, 0]], cache.k_max[cache.page_table[0, 0]]
    assert torch.equal(bounds[0][0], k[0, :16, 0].amin(0).to(device))
    assert torch.equal(bounds[1][0], k[0, :16, 0].amax(0).to(device))
