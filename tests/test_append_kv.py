"""append_kv: tokens go where the page table says, statistics follow, nothing else moves."""

import pytest
import torch
from conftest import Cache, assert_same_bits, bits, cases, draw, make_cache
from hypothesis import given
from hypothesis import strategies as st

from entmaxkv import reference

append_kv = torch.ops.entmaxkv.append_kv


def empty(like: Cache) -> Cache:
    """The same page table over a pool of NaN, no tokens yet."""
    blank = like.clone()
    for x in (blank.k_pages, blank.v_pages, *blank.statistics):
        x.fill_(torch.nan)
    blank.seq_lens.zero_()
    return blank


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """Ragged rows as one [batch, tokens, kv_heads, head_dim], NaN behind each end."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def lengths(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int32, device=rows[0].device)


@cases
def test_ragged_prompt(case, device):
    want = case.cache(device)
    got = empty(want)
    got.append(padded(want.k), padded(want.v), lengths(want.k))
    assert got.lengths == case.seq_lens
    for row, n in enumerate(case.seq_lens):
        assert torch.equal(reference.gather(got.k_pages, got.page_table[row], n), want.k[row])
        assert torch.equal(reference.gather(got.v_pages, got.page_table[row], n), want.v[row])
    # The pool beyond these tokens is NaN in both. The moments themselves are test_page_stats.py's business.
    assert_same_bits(
        (got.k_pages, got.v_pages, got.k_min, got.k_max, got.page_table),
        (want.k_pages, want.v_pages, want.k_min, want.k_max, want.page_table),
    )
    torch.ops.entmaxkv.page_stats(want.k_pages, want.page_table, want.seq_lens, *want.statistics)
    assert_same_bits(got.statistics, want.statistics)


@cases
def test_one_more_token(case, device):
    cache = case.cache(device)
    k, v = (
        draw(len(cache.k), 1, case.kv_heads, case.head_dim, dtype=case.dtype, device=device, seed=seed)
        for seed in (5, 6)
    )
    grown = make_cache(
        [n + 1 for n in case.seq_lens],
        k=[torch.cat([a, b]) for a, b in zip(cache.k, k, strict=True)],
        v=[torch.cat([a, b]) for a, b in zip(cache.v, v, strict=True)],
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=case.dtype,
        device=device,
        transposed=case.transposed,
        max_pages=cache.page_table.shape[1],
    )
    cache.append(k, v)
    torch.ops.entmaxkv.page_stats(grown.k_pages, grown.page_table, grown.seq_lens, *grown.statistics)
    torch.ops.entmaxkv.page_stats(cache.k_pages, cache.page_table, cache.seq_lens, *cache.statistics)
    assert_same_bits(cache.tensors, grown.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prompt_equals_token_by_token(device, dtype):
    like = make_cache([37, 0, 16, 50], page_size=16, head_dim=80, dtype=dtype, device=device)
    whole, single = empty(like), empty(like)
    k, v, n = padded(like.k), padded(like.v), lengths(like.k)
    whole.append(k, v, n)
    for token in range(k.shape[1]):
        single.append(k[:, token : token + 1], v[:, token : token + 1], (n > token).int())
    assert_same_bits(single.tensors, whole.tensors)


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from([8, 32]),
)
def test_any_chunks_equal_one_prompt(device, chunks, page_size):
    totals = [sum(column) for column in zip(*chunks, strict=True)]
    like = make_cache(totals, page_size=page_size, head_dim=64, device=device)
    whole, parts = empty(like), empty(like)
    whole.append(padded(like.k), padded(like.v), lengths(like.k))
    done = [0, 0, 0]
    for chunk in chunks:
        k, v = ([x[at : at + n] for x, at, n in zip(rows, done, chunk, strict=True)] for rows in (like.k, like.v))
        parts.append(padded(k), padded(v), lengths(k))
        done = [at + n for at, n in zip(done, chunk, strict=True)]
    assert_same_bits(parts.tensors, whole.tensors)


def test_touches_only_the_pages_it_fills(device):
    cache = make_cache([40, 16, 0], page_size=16, device=device)
    for x in cache.statistics:
        x.fill_(7)
    k, v = draw(3, 1, 2, 64, device=device), draw(3, 1, 2, 64, device=device)
    new = torch.stack([cache.page_table[row, page] for row, page in ((0, 2), (1, 1))]).long()
    before = cache.clone()
    cache.append(k, v, torch.tensor([1, 1, 0], dtype=torch.int32, device=device))
    others = torch.ones(len(cache.k_pages), dtype=torch.bool, device=device)
    others[new] = False
    for got, was in zip((cache.k_pages, cache.v_pages, *cache.statistics), before.tensors[:6], strict=True):
        assert torch.equal(bits(got[others]), bits(was[others]))
        assert not torch.equal(bits(got[new]), bits(was[new]))
    assert cache.lengths == [41, 17, 0]


@pytest.mark.parametrize("kept", [(0, 1), (2, 3), ()], ids=["bounds", "moments", "none"])
def test_statistics_are_optional(device, kept):
    want, got = (make_cache([5, 20], page_size=8, device=device) for _ in range(2))
    k, v = draw(2, 9, 2, 64, device=device), draw(2, 9, 2, 64, device=device, seed=1)
    want.append(k, v)
    statistics = [x if index in kept else None for index, x in enumerate(got.statistics)]
    append_kv(k, v, None, got.k_pages, got.v_pages, *statistics, got.page_table, got.seq_lens)
    assert_same_bits((got.k_pages, got.v_pages, got.seq_lens), (want.k_pages, want.v_pages, want.seq_lens))
    assert_same_bits([got.statistics[i] for i in kept], [want.statistics[i] for i in kept])


def test_inputs_of_any_strides(device):
    like = make_cache([30, 30], page_size=8, device=device)
    k, v = padded(like.k), padded(like.v)
    want, got = empty(like), empty(like)
    want.append(k, v)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat([k, v], -1)[..., 64:]
    assert not heads_first.is_contiguous() and not fused.is_contiguous()
    got.append(heads_first, fused)
    assert_same_bits(got.tensors, want.tensors)


def test_rows_may_share_full_pages(device):
    """A shared prefix, and what lies behind the end of a row or belongs to rows that append nothing."""
    like = make_cache([40, 40, 40], page_size=8, device=device)
    shared = like.clone()
    shared.page_table[1, :3] = shared.page_table[0, :3]
    shared.page_table[2] = shared.page_table[1]
    shared.page_table[0, 6:] = shared.page_table[1, 6:]
    shared.seq_lens[2] = 24
    lengths = torch.tensor([5, 8, 0], dtype=torch.int32, device=device)
    k, v = (draw(3, 8, 2, 64, device=device, seed=seed) for seed in (1, 2))
    for cache in (like, shared):
        cache.append(k, v, lengths)
    assert shared.lengths == [45, 48, 24]
    for row in (0, 1):
        own = like.used(row)[5:]
        assert_same_bits([shared.k_pages[shared.used(row)[5:]]], [like.k_pages[own]])


def test_refuses_a_page_that_another_row_uses():
    cache = make_cache([40, 12], page_size=8, max_pages=6)
    cache.page_table[1, 1] = cache.page_table[0, 3]
    page = int(cache.page_table[0, 3])
    expected = (
        "entmaxkv::append_kv: page_table: expected pages that are in use once where tokens are written, got page "
        f"{page} in row 0 and again in row 1"
    )
    token = draw(2, 1, 2, 64)
    before = cache.clone()
    with pytest.raises(RuntimeError, match=expected):
        cache.append(token, token)
    assert_same_bits(cache.tensors, before.tensors)
    cache.append(token, token, torch.tensor([1, 0], dtype=torch.int32))  # nobody writes it
    assert cache.lengths == [41, 12]


def test_nothing_to_append(device):
    cache = make_cache([30, 0], page_size=8, device=device)
    before = cache.clone()
    cache.append(draw(2, 3, 2, 64, device=device), draw(2, 3, 2, 64, device=device), torch.zeros_like(cache.seq_lens))
    assert_same_bits(cache.tensors, before.tensors)


def test_fills_to_the_last_slot(device):
    like = make_cache([32, 31], page_size=8, max_pages=4, device=device)
    got = empty(like)
    got.append(padded(like.k), padded(like.v), lengths(like.k))
    assert_same_bits(got.tensors[:4], like.tensors[:4])
    assert got.lengths == [32, 31]


def test_threads_change_no_bit(threads):
    like = make_cache([300, 0, 77, 512], page_size=16, kv_heads=4, dtype=torch.bfloat16)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(empty(like))
        results[-1].append(padded(like.k), padded(like.v), lengths(like.k))
    assert_same_bits(results[0].tensors, results[1].tensors)
