"""decode: the fused op against its stages, and the Python API against both."""

import math

import pytest
import torch
from conftest import (
    Cache,
    Decoded,
    assert_same_bits,
    cases,
    check_decode,
    make_alphas,
    make_cache,
    make_query,
    make_slopes,
    tensors_in,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import entmaxkv

ops = torch.ops.entmaxkv


def stages(
    cache: Cache,
    q: Tensor,
    budget: int,
    alpha: float,
    scale: float | None,
    slopes: Tensor | None,
    alphas: Tensor | None,
):
    table = cache.page_table, cache.seq_lens
    scores = ops.score_pages(
        q, cache.k_min, cache.k_max, *table, cache.page_size, scale, slopes, entmaxkv.TopPages.LOWER
    )
    chosen = ops.select_pages(scores, cache.seq_lens, cache.k_pages.shape[1], cache.page_size, budget)
    return chosen, cache.sparse(q, *chosen, alpha, scale, alibi_slopes=slopes, head_alpha=alphas)


def masks(cache: Cache, selected: Tensor, counts: Tensor) -> list[Tensor]:
    """Page masks of a selection, per row [kv_heads, pages in use]."""
    result = []
    for row in range(len(cache.k)):
        mask = torch.zeros(selected.shape[1], len(cache.used(row)), dtype=torch.bool, device=selected.device)
        for head, count in enumerate(counts[row].tolist()):
            mask[head, selected[row, head, :count].long()] = True
        result.append(mask)
    return result


def paged(like: Cache, **options: bool) -> entmaxkv.PagedKVCache:
    """A PagedKVCache with the tokens of another cache."""
    _, kv_heads, page_size, head_dim = like.k_pages.shape
    cache = entmaxkv.PagedKVCache(
        len(like.k),
        max(like.lengths) + 1,
        kv_heads,
        head_dim,
        page_size=page_size,
        dtype=like.k_pages.dtype,
        device=like.k_pages.device,
        **options,
    )
    pad = torch.nn.utils.rnn.pad_sequence
    cache.append(pad(like.k, batch_first=True), pad(like.v, batch_first=True), like.seq_lens)
    return cache


@cases
def test_op_equals_its_stages(case, device):
    cache, q, slopes, alphas = (
        case.cache(device),
        case.query(device),
        case.slopes(device),
        case.head_alpha(device),
    )
    options = case.alpha or 1.5, case.scale, slopes, alphas
    inputs = q, cache.k_pages, cache.v_pages, cache.k_min, cache.k_max, cache.page_table, cache.seq_lens
    for budget in (1, 10**9, 2 * case.page_size + 1):
        chosen, want = stages(cache, q, budget, *options)
        assert_same_bits([ops.decode(*inputs, budget, *options)], [want.out])
    heads = {"alibi_slopes": slopes, "head_alpha": alphas}
    check_decode(cache, q, want, alpha=options[0], scale=case.scale, **heads, keep=masks(cache, *chosen))


SELECTORS = {
    "dense": None,
    "top pages": entmaxkv.TopPages(budget=64, dense_below=0),
    "all top pages": entmaxkv.TopPages(budget=10**6, dense_below=0),
    "gaussian": entmaxkv.Gaussian(quantile=0.9, dense_below=0),
    "everything gaussian": entmaxkv.Gaussian(margin=math.inf, dense_below=0),
    "key sketch": entmaxkv.KeySketch(dense_below=0),
    "key sketch, 2 bits": entmaxkv.KeySketch(bits=2, dense_below=0),
    "key sketch, almost certain": entmaxkv.KeySketch(certainty=1 - 1e-9, dense_below=0),
    "key sketch, 24 tokens": entmaxkv.KeySketch(max_tokens=24, dense_below=0),
}


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 1.5, None], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_python_api(device, select, alpha, bias, dtype):
    like = make_cache([0, 1, 15, 16, 17, 400], dtype=dtype, device=device)
    q = make_query(6, 8, 64, dtype, device)
    alphas = make_alphas(8, device) if alpha is None else None
    slopes = make_slopes(8, device) if bias else None
    options = {"alpha": alphas if alpha is None else alpha, "scale": 0.2, "alibi_slopes": slopes}
    cache = paged(like)
    out, info = entmaxkv.decode(q, cache, select=select, return_info=True, **options)
    assert_same_bits([entmaxkv.decode(q, cache, select=select, **options)], [out])
    got = Decoded(out, info.tau, info.support, info.tokens)
    heads = {"alpha": alpha or 1.5, "scale": 0.2, "alibi_slopes": slopes, "head_alpha": alphas}
    if isinstance(select, entmaxkv.KeySketch):
        chosen = select.select(q, cache, entmaxkv.Scoring(**options))
        assert torch.equal(info.tokens, chosen.counts)
        assert_same_bits(tensors_in(info.selection), tensors_in(chosen))
        if select.certainty == 1:
            assert torch.equal(info.delta_bound, chosen.delta_bound)
        else:  # it proves nothing of heads that leave tokens out
            read_all = chosen.counts == cache.seq_lens[:, None]
            assert torch.equal(info.delta_bound, 1 - read_all.float().repeat_interleave(4, dim=1))
        assert (info.tokens <= (select.max_tokens or 400)).all()
        if select.max_tokens is None and select.certainty == 1:
            assert info.certified.all()
            want = entmaxkv.decode(q, cache, return_info=True, **options)[1].tokens
            check_decode(like, q, got._replace(tokens=want), **heads)
        return
    keep = None
    if select is not None:
        chosen = select.select(q, cache, entmaxkv.Scoring(**options))
        assert_same_bits(info.selection[:2], chosen[:2])
        keep = masks(like, *chosen[:2])
    check_decode(like, q, got, **heads, keep=keep)


def test_defaults(device):
    like, q = make_cache([100, 3000], device=device), make_query(2, 8, 64, device=device)
    cache = paged(like)
    want = like.dense(q)
    out, info = entmaxkv.decode(q, cache, return_info=True)
    assert_same_bits([out, info.tau, info.support, info.tokens], want)
    assert entmaxkv.TopPages().budget == 2048
    _, info = entmaxkv.decode(q, cache, select=entmaxkv.TopPages(dense_below=0), return_info=True)
    assert info.tokens.tolist() == [[100, 100], [2048 - 8, 2048 - 8]]
    _, info = entmaxkv.decode(q, cache, select=entmaxkv.Gaussian(dense_below=0), return_info=True)
    assert (info.tokens[1] < 3000).any()


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_selected_is_dense_to_the_bit(device, alpha, dtype):
    like, q = (
        make_cache([0, 1, 16, 17, 1500], dtype=dtype, device=device),
        make_query(5, 8, 64, dtype, device),
    )
    cache = paged(like)
    want = entmaxkv.decode(q, cache, alpha=alpha, return_info=True)
    for select in (entmaxkv.TopPages(budget=1504, dense_below=0), entmaxkv.Gaussian(margin=math.inf, dense_below=0)):
        got = entmaxkv.decode(q, cache, alpha=alpha, select=select, return_info=True)
        assert got[1].certified.all()
        assert_same_bits([got[0], *got[1][:5]], [want[0], *want[1][:5]])


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=4),
    st.integers(1, 600),
    st.sampled_from([8, 16, 64]),
    st.integers(0, 999),
)
def test_top_pages_read_no_more_than_the_budget(device, seq_lens, budget, page_size, seed):
    like = make_cache(seq_lens, page_size=page_size, device=device, seed=seed)
    q = make_query(len(seq_lens), 4, 64, device=device, seed=seed)
    _, info = entmaxkv.decode(q, paged(like), select=entmaxkv.TopPages(budget, dense_below=0), return_info=True)
    for row, n in enumerate(seq_lens):
        last = n - (n - 1) // page_size * page_size if n else 0
        assert (info.tokens[row] <= max(budget, last)).all()
        # What is left unused is less than a page, or the row is read whole.
        assert ((info.tokens[row] > budget - page_size) | (info.tokens[row] == n)).all()


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
def test_a_short_row_changes_no_other(device, select):
    like, q = make_cache([300, 0, 5, 700], device=device), make_query(4, 8, 64, device=device)
    whole = entmaxkv.decode(q, paged(like), select=select)
    for row in range(4):
        alone = paged(like.row(row))
        assert_same_bits([entmaxkv.decode(q[row : row + 1], alone, select=select)], [whole[row : row + 1]])


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
def test_decoding_leaves_the_cache_alone(device, select):
    cache, q = paged(make_cache([300, 17], device=device)), make_query(2, 8, 64, device=device)
    tensors = [
        cache.k_pages,
        cache.v_pages,
        cache.k_min,
        cache.k_max,
        cache.k_mean,
        cache.k_std,
        cache.codes,
        cache.norms,
        cache.page_table,
        cache.seq_lens,
    ]
    before = [x.clone() for x in tensors]
    entmaxkv.decode(q, cache, select=select)
    assert_same_bits(tensors, before)


def test_generation_step_by_step(device):
    """Prompt, then one token at a time: each step is the dense result over what is there so far."""
    like, q = make_cache([40, 40], page_size=8, device=device), make_query(2, 4, 64, device=device)
    cache = entmaxkv.PagedKVCache(2, 40, 2, 64, page_size=8, device=device)
    k, v = torch.stack(like.k), torch.stack(like.v)
    cache.append(k[:, :30], v[:, :30])
    for n in range(31, 41):
        cache.append(k[:, n - 1 : n], v[:, n - 1 : n])
        part = make_cache([n, n], page_size=8, device=device, k=[x[:n] for x in like.k], v=[x[:n] for x in like.v])
        assert_same_bits([entmaxkv.decode(q, cache)], [part.dense(q).out])


def test_has_no_gradient_and_says_so(device):
    cache = paged(make_cache([40], device=device))
    q = make_query(1, 4, 64, device=device).requires_grad_()
    for select in (None, entmaxkv.TopPages(16), entmaxkv.Gaussian(), entmaxkv.KeySketch()):
        with pytest.raises(NotImplementedError, match="no gradient"):
            entmaxkv.decode(q, cache, select=select).sum().backward()


@pytest.mark.parametrize("select", [entmaxkv.TopPages, entmaxkv.KeySketch, 64, "top"], ids=str)
def test_refuses_what_is_no_selector(device, select):
    cache = paged(make_cache([40], device=device))
    with pytest.raises(ValueError, match=r"select: expected a selector .* got"):
        entmaxkv.decode(make_query(1, 4, 64, device=device), cache, select=select)


@pytest.mark.parametrize("selector", [entmaxkv.TopPages, entmaxkv.Gaussian, entmaxkv.KeySketch])
def test_a_small_cache_is_decoded_densely(device, selector):
    """Up to dense_below tokens of room, with the bits of select=None; by default where a GPU is faster so."""
    cache, q = paged(make_cache([400], device=device)), make_query(1, 8, 64, device=device)
    want = entmaxkv.decode(q, cache, return_info=True)
    less = {
        entmaxkv.TopPages: {"budget": 64},
        entmaxkv.Gaussian: {"margin": -0.7},
        entmaxkv.KeySketch: {"max_tokens": 64},
    }
    room, options = cache.max_tokens, less[selector]
    for below, dense in [(room, True), (room - 1, False), (None, device == "cuda"), (0, False)]:
        got = entmaxkv.decode(q, cache, select=selector(**options, dense_below=below), return_info=True)
        if dense:
            assert_same_bits([got[0], *got[1][:5]], [want[0], *want[1][:5]])
            assert got[1].selection is None
        else:
            assert (got[1].tokens < 400).all()


@pytest.mark.parametrize("below", [-1, 1.5, "4096", True], ids=str)
@pytest.mark.parametrize("selector", [entmaxkv.TopPages, entmaxkv.Gaussian, entmaxkv.KeySketch])
def test_dense_below_is_a_number_of_tokens(selector, below):
    with pytest.raises(ValueError, match=r"dense_below: expected a number of tokens, at least 0, or None, got"):
        selector(dense_below=below)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"certainty": 0}, "certainty: expected a number above 0, at most 1, got 0"),
        ({"certainty": 1.5}, "certainty: expected a number above 0, at most 1, got 1.5"),
        ({"certainty": math.nan}, "certainty: expected a number above 0, at most 1, got nan"),
        ({"bits": 3}, "bits: expected 2 or 4, got 3"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number of at least 1, or None, got 0"),
        ({"max_tokens": 8.0}, "max_tokens: expected a whole number of at least 1, or None, got 8.0"),
        ({"max_tokens": True}, "max_tokens: expected a whole number of at least 1, or None, got True"),
    ],
    ids=str,
)
def test_key_sketch_says_what_it_expected(options, expected):
    with pytest.raises(ValueError, match=f"^KeySketch: {expected}$"):
        entmaxkv.KeySketch(**options)


def test_key_sketch_needs_a_sketch():
    cache = paged(make_cache([40]), sketch=False)
    with pytest.raises(
        ValueError, match=r"KeySketch: cache: expected a key sketch, got a cache made with sketch=False"
    ):
        entmaxkv.decode(make_query(1, 4, 64), cache, select=entmaxkv.KeySketch(dense_below=0))
