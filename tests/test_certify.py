"""What a step says that it proved is true, by the float64 oracle: bound >= dropped mass, certified => same support."""

import math

import pytest
import torch
from conftest import draw, make_alphas, make_query, make_slopes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import entmaxkv
from entmaxkv import certify, reference
from entmaxkv.select import Selection

PAGE = 16
LENGTHS = [0, 1, 16, 17, 700]


class Everything:
    """A user's own selector of pages: it takes all."""

    needs = frozenset({"minmax"})

    def dense_up_to(self, device_type):
        return 0

    def select(self, q, cache, scoring):
        return entmaxkv.TopPages(cache.max_tokens).select(q, cache, scoring)


class Newest:
    """A user's own selector of tokens, the newest of each row, that knows nothing of the others."""

    needs = frozenset()

    def __init__(self, *, says_so=True):
        self.says_so = says_so

    def dense_up_to(self, device_type):
        return 0

    def select(self, q, cache, scoring):
        newest = (cache.seq_lens - 1)[:, None, None].repeat(1, cache.kv_heads, 1)
        bound = (cache.seq_lens > 1).float()[:, None].repeat(1, q.shape[1])
        return Selection(newest, (newest[..., 0] >= 0).int(), True, bound if self.says_so else None)


SELECTORS = {
    "dense": None,
    "1 page": entmaxkv.TopPages(PAGE, dense_below=0),
    "4 pages": entmaxkv.TopPages(4 * PAGE, dense_below=0),
    "half": entmaxkv.TopPages(352, dense_below=0),
    "gaussian": entmaxkv.Gaussian(dense_below=0),
    "everything": Everything(),
    "newest": Newest(),
    "newest, without a bound": Newest(says_so=False),
    "sketch": entmaxkv.KeySketch(dense_below=0),
    "2 bits": entmaxkv.KeySketch(bits=2, dense_below=0),
    "20 tokens": entmaxkv.KeySketch(max_tokens=20, dense_below=0),
    "almost certain": entmaxkv.KeySketch(certainty=1 - 1e-9, dense_below=0),
}


def normal(seed: int) -> Tensor:
    return draw(len(LENGTHS), max(LENGTHS), 2, 64, seed=seed)


def clustered(seed: int) -> Tensor:
    """Pages of keys that are nearly alike: boxes are tight."""
    centres = draw(len(LENGTHS), -(-max(LENGTHS) // PAGE), 2, 64, seed=seed).repeat_interleave(PAGE, dim=1)
    return centres[:, : max(LENGTHS)] + 0.01 * normal(seed + 1)


def equal(seed: int) -> Tensor:
    """Every page is one key, many times over, and so exactly its own box."""
    centres = draw(len(LENGTHS), -(-max(LENGTHS) // PAGE), 2, 64, seed=seed).repeat_interleave(PAGE, dim=1)
    return centres[:, : max(LENGTHS)].contiguous()


def outlier(seed: int) -> Tensor:
    """One channel is far from 0 in every key."""
    k = normal(seed)
    k[..., 5] += 30
    return k


def dominated(seed: int) -> Tensor:
    """One key far above all."""
    k = normal(seed)
    k[:, 3] *= 20
    return k


def huge(seed: int) -> Tensor:
    return 100 * normal(seed)


KEYS = {make.__name__: make for make in (normal, clustered, equal, outlier, dominated, huge)}


def filled(k: Tensor, dtype: torch.dtype, device: str, **options: bool) -> entmaxkv.PagedKVCache:
    cache = entmaxkv.PagedKVCache(len(LENGTHS), max(LENGTHS), 2, 64, dtype=dtype, device=device, **options)
    k = k.to(dtype).to(device)
    cache.append(k, torch.zeros_like(k), torch.tensor(LENGTHS, dtype=torch.int32, device=device))
    return cache


def check(q: Tensor, cache: entmaxkv.PagedKVCache, select: object, **options) -> entmaxkv.DecodeInfo:
    """The claims of a step against float64; returns them."""
    _, info = entmaxkv.decode(q, cache, select=select, return_info=True, **options)
    assert info.certified.dtype == torch.bool and info.delta_bound.dtype == torch.float32
    assert info.certified.shape == info.delta_bound.shape == q.shape[:2]
    assert torch.equal(info.certified, info.delta_bound == 0)
    assert ((info.delta_bound >= 0) & (info.delta_bound <= 1)).all()
    chosen = info.selection
    for row, seq_len in enumerate(cache.seq_lens.tolist()):
        if seq_len == 0:
            assert info.certified[row].all()
            continue
        k = reference.gather(cache.k_pages, cache.page_table[row], seq_len)
        _, p, _ = reference.attention(q[row], k, k, **options)
        read = torch.ones(2, seq_len, dtype=torch.bool, device=q.device)
        if chosen is not None:
            read = chosen.reads(seq_len, PAGE)[row]
        read = read.repeat_interleave(q.shape[1] // 2, 0)
        dropped = p.masked_fill(read, 0).sum(-1)
        assert (dropped <= info.delta_bound[row].double() + 1e-12).all(), (dropped, info.delta_bound[row])
        assert not ((p > 0) & ~read)[info.certified[row]].any()
        assert info.certified[row][read.all(-1)].all()
    return info


@pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("alpha", [1.0, 1.5, None], ids=str)
def test_claims_hold(device, select, keys, alpha):
    cache = filled(keys(0), torch.float32, device)
    heads = make_alphas(8, device) if alpha is None else alpha
    for slopes in (None, make_slopes(8, device)):
        for strength in (0.1, 3.0):
            check(
                strength * make_query(len(LENGTHS), 8, 64, device=device),
                cache,
                select,
                alpha=heads,
                alibi_slopes=slopes,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_claims_hold_in_other_dtypes(device, dtype):
    cache, q = filled(clustered(0), dtype, device), make_query(len(LENGTHS), 8, 64, dtype, device)
    for select in SELECTORS.values():
        check(q, cache, select, scale=-0.2)


@given(
    st.sampled_from(list(KEYS)),
    st.integers(0, 99),
    st.sampled_from([1.0, 1.05, 4 / 3, 1.5, 2.0]),
    st.floats(-2, 2),
    st.sampled_from(list(SELECTORS)),
)
def test_no_draw_breaks_a_claim(device, keys, seed, alpha, magnitude, select):
    cache = filled(KEYS[keys](seed), torch.float32, device)
    q = 10**magnitude * draw(len(LENGTHS), 4, 64, device=device, seed=seed)
    q[:, 1] = cache.k_pages[cache.page_table[:, 0].long(), 0, 0]  # some key itself
    q[0, 1] = 1
    check(q, cache, SELECTORS[select], alpha=alpha)


def test_tight_boxes_certify(device):
    """Where every page is one key, its box is exact: pages that are far below tau are proved to be."""
    cache, q = filled(equal(0), torch.float32, device), 4 * draw(len(LENGTHS), 4, 64, device=device, seed=1)
    info = check(q, cache, entmaxkv.TopPages(352, dense_below=0))
    assert info.certified[4].any() and (info.tokens[4] < 700).all()
    few = check(q, cache, entmaxkv.TopPages(PAGE, dense_below=0))
    assert (few.delta_bound[4] > 0).any()


def test_bounds_are_no_looser_than_they_are(device):
    """Boxes of single keys give the exact terms of the sum, and so a bound near the formula's."""
    cache, q = filled(equal(0), torch.float32, device), draw(len(LENGTHS), 4, 64, device=device, seed=1)
    select = entmaxkv.TopPages(352, dense_below=0)
    _, info = entmaxkv.decode(q, cache, select=select, return_info=True)
    k = reference.gather(cache.k_pages, cache.page_table[4], 700)
    read = info.selection.reads(700, PAGE)[4].repeat_interleave(2, 0)
    z = reference.scores(q[4], k) / 2
    want = (z - info.tau[4].double()[:, None]).clamp(min=0).square().masked_fill(read, 0).sum(-1).clamp(max=1)
    torch.testing.assert_close(info.delta_bound[4].double(), want, rtol=0.01, atol=1e-4)


def test_without_bounds_nothing_is_known(device):
    q = make_query(len(LENGTHS), 8, 64, device=device)
    cache = filled(normal(0), torch.float32, device, minmax=False)
    info = check(q, cache, entmaxkv.Gaussian(margin=-0.7, dense_below=0))
    assert info.delta_bound[4].tolist() == [1] * 8 and not info.certified[4].any()
    assert check(q, cache, entmaxkv.Gaussian(margin=math.inf, dense_below=0)).certified.all()
    assert not check(q, cache, Newest()).certified[2:].any()


def test_less_than_certain_proves_nothing_unless_all_was_read(device):
    cache, q = filled(dominated(0), torch.float32, device), make_query(len(LENGTHS), 8, 64, device=device)
    info = check(q, cache, entmaxkv.KeySketch(certainty=1 - 1e-9, dense_below=0))
    for row, n in enumerate(LENGTHS):
        read_all = (info.tokens[row] == n).repeat_interleave(4)
        assert torch.equal(info.certified[row], read_all)
        assert torch.equal(info.delta_bound[row], 1 - read_all.float())


def test_a_cap_is_never_silent(device):
    cache, q = filled(normal(0), torch.float32, device), 0.1 * make_query(len(LENGTHS), 8, 64, device=device)
    info = check(q, cache, entmaxkv.KeySketch(max_tokens=8, dense_below=0))
    assert not info.certified[4].any() and (info.tokens[4] <= 8).all()


def test_nan_is_no_proof(device):
    cache, q = filled(equal(0), torch.float32, device), make_query(len(LENGTHS), 8, 64, device=device)
    q[4, 3] = math.nan
    _, info = entmaxkv.decode(q, cache, select=entmaxkv.TopPages(PAGE, dense_below=0), return_info=True)
    assert info.delta_bound[4, 3] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_unread_key_that_is_no_number_is_no_proof(device, dtype, value):
    k = equal(0)
    k[4, 37, 1, 5] = value
    cache, q = filled(k, dtype, device), 4 * draw(len(LENGTHS), 4, 64, dtype=dtype, device=device, seed=1)
    _, info = entmaxkv.decode(q, cache, select=entmaxkv.TopPages(352, dense_below=0), return_info=True)
    finite = filled(equal(0), dtype, device)
    _, before = entmaxkv.decode(q, finite, select=entmaxkv.TopPages(352, dense_below=0), return_info=True)
    assert torch.equal(info.certified[4, :2], before.certified[4, :2]) and before.certified[4].any()
    assert (info.delta_bound[4, 2:] == 1).all()
    cache.append(
        *(torch.zeros(len(LENGTHS), 1, 2, 64, dtype=dtype, device=device) for _ in range(2))
    )  # into other pages
    _, info = entmaxkv.decode(q, cache, select=Newest(), return_info=True)
    assert not info.certified[4].any()


@pytest.mark.parametrize("select", ["1 page", "half", "gaussian", "sketch", "20 tokens"])
@pytest.mark.parametrize("less_one", [1e-10, 0.9e-9, 1.1e-9, 1e-8])
def test_claims_hold_next_to_softmax(device, select, less_one):
    """Where the kernels take alpha for 1, and just beyond."""
    cache = filled(clustered(0), torch.float32, device)
    for strength in (0.1, 3.0):
        q = strength * make_query(len(LENGTHS), 8, 64, device=device)
        kind = 1.0 if less_one <= 1e-9 else 1 + less_one
        info = check(q, cache, SELECTORS[select], alpha=1 + less_one)
        _, want = entmaxkv.decode(q, cache, select=SELECTORS[select], alpha=kind, return_info=True)
        assert torch.equal(info.delta_bound, want.delta_bound)


@pytest.mark.parametrize("most", [1, 20, 300])
@pytest.mark.parametrize(("alpha", "depth"), [(1.01, 60.0), (1.05, 19.5), (1.0, 24.5), (2.0, 24.5)])
@pytest.mark.parametrize("below", [20.0, 24.5, 25.0, 30.0])
def test_a_cap_counts_what_each_head_loses(device, most, alpha, depth, below):
    """A dropped token has next to no weight in the head that it owes its merit to, and more in one whose alpha is 1."""
    k = torch.zeros(1, 400, 1, 64)
    k[0, 0, 0, :2] = 8  # the others' scores are so far below it: depth, below
    cache = entmaxkv.PagedKVCache(1, 400, 1, 64, device=device)
    cache.append(k.to(device), torch.zeros_like(k).to(device))
    q, heads = torch.zeros(1, 2, 64), torch.tensor([alpha, 1.0])
    q[0, 0, 0], q[0, 1, 1] = depth, below
    for order in ([0, 1], [1, 0]):
        its_q, its_heads = q[:, order].to(device), heads[order].to(device)
        select = entmaxkv.KeySketch(max_tokens=most, dense_below=0)
        chosen = select.select(its_q, cache, entmaxkv.Scoring(alpha=its_heads))
        keys = k[0].to(device)
        _, p, _ = reference.attention(its_q[0], keys, keys, alpha=its_heads)
        read = chosen.reads(400, PAGE)[0]
        assert (p.masked_fill(read, 0).sum(-1) <= chosen.delta_bound[0].double()).all()


class Nothing:
    """A user's own selector that reads nothing."""

    needs = frozenset()

    def dense_up_to(self, device_type):
        return 0

    def select(self, q, cache, scoring):
        counts = torch.zeros(len(q), cache.kv_heads, dtype=torch.int32, device=q.device)
        return Selection(torch.full((*counts.shape, 1), -1, dtype=torch.int32, device=q.device), counts)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_reading_nothing_proves_nothing(device, alpha):
    cache = filled(equal(0).abs(), torch.float32, device)
    q = -make_query(len(LENGTHS), 8, 64, device=device).abs()  # all scores are negative
    _, info = entmaxkv.decode(q, cache, alpha=alpha, select=Nothing(), return_info=True)
    assert info.certified.tolist() == [[n == 0] * 8 for n in LENGTHS]


def test_bounds_are_float32_whatever_the_default(device):
    cache, q = filled(equal(0), torch.float32, device), make_query(len(LENGTHS), 8, 64, device=device)
    try:
        for default in (torch.float64, torch.float16):
            torch.set_default_dtype(default)
            for select in SELECTORS.values():
                check(q, cache, select)
    finally:
        torch.set_default_dtype(torch.float32)


def test_left_out_tokens_are_counted_by_page(device):
    cache = filled(normal(0), torch.float32, device)
    selected = torch.tensor([0, 43, -1], dtype=torch.int32, device=device).expand(len(LENGTHS), 2, 3)
    counts = torch.tensor([[0, 0], [1, 1], [1, 0], [1, 1], [2, 1]], dtype=torch.int32, device=device)
    chosen = Selection(selected, counts)
    left_out = certify.tokens_left_out(chosen, cache)
    assert left_out.sum(-1).tolist() == [[0, 0], [0, 0], [0, 16], [1, 1], [700 - 16 - 12, 700 - 16]]
    assert left_out[4, 0, [0, 1, 42, 43]].tolist() == [0, 16, 16, 0]
