"""PagedKVCache: what it allocates, how it grows, what it keeps."""

import pytest
import torch
from conftest import assert_same_bits, draw, make_query

import entmaxkv
from entmaxkv import PagedKVCache, reference

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
