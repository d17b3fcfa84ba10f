"""dense_decode: exact entmax attention over the whole cache."""

import pytest
import torch
from conftest import Cache, assert_same_bits, cases, check_decode, draw, make_cache, make_query, make_slopes
from hypothesis import given
from hypothesis import strategies as st

from entmaxkv import reference

ALPHAS = [1.0, 1.25, 4 / 3, 1.5, 1.75, 2.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@cases
def test_agrees_with_the_oracle(case, device):
    cache, q = case.cache(device), case.query(device)
    heads = {"alibi_slopes": case.slopes(device), "head_alpha": case.head_alpha(device)}
    got = cache.dense(q, case.alpha or 1.5, case.scale, **heads)
    check_decode(cache, q, got, alpha=case.alpha or 1.5, scale=case.scale, **heads)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "tokens", [63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097]
)
def test_lengths_around_split_edges(device, alpha, tokens):
    cache, q = make_cache([tokens], page_size=16, device=device), make_query(1, 4, 64, device=device)
    check_decode(cache, q, cache.dense(q, alpha), alpha=alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_sum_to_one(device, alpha, dtype):
    seq_lens = [1, 16, 17, 1000, 5000]
    ones = [torch.ones(n, 2, 64) for n in seq_lens]
    cache = make_cache(seq_lens, v=ones, dtype=dtype, device=device)
    for scale in (0.001, None, 10.0):
        out = cache.dense(make_query(5, 8, 64, dtype, device), alpha, scale).out
        assert ((out.double() - 1).abs() <= 1e-6).all()


@given(st.sampled_from(ALPHAS), st.integers(1, 600), st.floats(0.01, 30), st.integers(0, 999))
def test_weights_are_a_distribution(device, alpha, tokens, scale, seed):
    """Each value row is one axis, so that out is p itself."""
    head_dim = 128
    tokens = min(tokens, head_dim)
    v = torch.eye(head_dim)[:tokens, None].expand(-1, 2, -1)
    cache = make_cache([tokens], head_dim=head_dim, v=[v], seed=seed, device=device)
    got = cache.dense(make_query(1, 4, head_dim, device=device, seed=seed), alpha, scale)
    assert (got.out >= 0).all()
    assert ((got.out.double().sum(-1) - 1).abs() <= 1e-6).all()
    if alpha > 1:
        assert torch.equal((got.out > 0).sum(-1), got.support)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "kind",
    ["equal scores", "dominating key", "scores of 1e4", "rising", "falling", "outlier channel", "two groups"],
)
def test_hard_scores(device, alpha, kind):
    # Several rows, so that the largest error is that of many roundings, in the kernel and in PyTorch.
    rows, n = 8, 500
    q, k = make_query(rows, 4, 64, device=device), list(draw(rows, n, 2, 64))
    ramp = torch.arange(n)[:, None, None] / n
    for row in range(rows):
        leader = q[row, 1::2].cpu()
        if kind == "equal scores":
            k[row] = k[row][:1].expand(n, -1, -1)
        elif kind == "dominating key":
            k[row][300] = 40 * leader
        elif kind == "rising":
            k[row] = ramp * 30 * leader
        elif kind == "falling":
            k[row] = (1 - ramp) * 30 * leader
        elif kind == "outlier channel":
            k[row][..., 7] += 500
        elif kind == "two groups":
            k[row][::2] = k[row][0]
    cache = make_cache([n] * rows, k=k, device=device)
    if kind == "scores of 1e4":
        q = q * 3e3
    check_decode(cache, q, cache.dense(q, alpha), alpha=alpha)


@pytest.mark.parametrize("tokens", [255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 6143, 6144, 6145])
@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 2.0])
def test_all_tokens_in_the_support(device, alpha, tokens):
    """Wherever a kernel holds no more of them at once."""
    cache = make_cache([tokens], k=[draw(1, 2, 64).expand(tokens, -1, -1)], device=device)
    q = make_query(1, 4, 64, device=device)
    got = cache.dense(q, alpha)
    check_decode(cache, q, got, alpha=alpha)
    assert (got.support == tokens).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [4, 8, 16, 32])
@pytest.mark.parametrize("tokens", [200, 300, 1100, 5000])
def test_many_small_values(device, dtype, head_dim, tokens):
    """A block of the CUDA kernel copies the values of near tokens at once, if they have room."""
    k = [torch.zeros(tokens, 2, head_dim)]
    for max_pages in (tokens // 16 + 2, 400):
        cache = make_cache([tokens], head_dim=head_dim, k=k, dtype=dtype, device=device, max_pages=max_pages)
        q = make_query(1, 4, head_dim, dtype, device)
        got = cache.dense(q, 1.5)
        assert (got.support == tokens).all()
        check_decode(cache, q, got, alpha=1.5)


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 2.0])
def test_tiles_just_below_the_reach_of_weights(device, alpha):
    """The CUDA kernel writes no scores of a tile that is further below the best score than weights reach."""
    tokens = 200_000 if device == "cuda" else 10_000  # so many that each warp has several tiles
    k = torch.full((tokens, 2, 64), -1.001 / (alpha - 1))
    k[:: tokens // 100] = 0
    cache = make_cache([tokens], k=[k], device=device)
    q = torch.zeros(1, 4, 64, device=device)
    q[..., 0] = 1
    for left_behind in (1e3, -1e3):  # in memory that the op may get for its scratch
        torch.full((4 * tokens * 32,), left_behind, device=device)
        got = cache.dense(q, alpha, 1.0)
        assert (got.support == 100).all()
        check_decode(cache, q, got, alpha=alpha, scale=1.0)


@pytest.mark.parametrize("best", [2.0**24, 1e15, 1e30])
@pytest.mark.parametrize("alpha", [1 + 1e-8, 1.001, 1.05, 1.5, 2.0])
@pytest.mark.parametrize("tokens", [100, 4500])
def test_scores_too_large_to_differ_by_less_than_weights_reach(device, alpha, tokens, best):
    k = torch.zeros(tokens, 2, 64)
    k[::3, :, 0] = 1
    cache = make_cache([tokens], k=[k], device=device)
    q = torch.zeros(1, 4, 64, device=device)
    q[..., 0] = best
    got = cache.dense(q, alpha, 1.0)
    assert (got.support == len(k[::3])).all()
    check_decode(cache, q, got, alpha=alpha, scale=1.0)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("tokens", [300, 2048, 2049, 3000, 4096])
def test_the_capacity_changes_no_bit(device, alpha, tokens):
    """On CUDA it decides whether one launch decodes the list."""
    q = make_query(1, 4, 64, device=device) * 1e-4
    caches = [make_cache([tokens], page_size=16, max_pages=pages, device=device) for pages in (256, 300)]
    small, large = (cache.dense(q, alpha) for cache in caches)
    assert small.support.max() == tokens
    assert_same_bits(large, small)


@pytest.mark.parametrize("tile", [0, 255, 256, 319, 320, 351, 352, 400])
def test_many_tiles_with_one_that_has_weight(device, tile):
    """The best scores rule no tile out, so a block of the CUDA kernel looks at 401, at most 352 at a time."""
    rows = 14 if device == "cuda" else 1  # so many that a block does not share a head with others
    k = torch.zeros(401 * 32, 2, 64)
    k[tile * 32 : tile * 32 + 32, :, 0] = 1
    cache = make_cache([len(k)] * rows, k=[k] * rows, device=device)
    q = torch.zeros(rows, 10, 64, device=device)
    q[..., 0] = 8
    got = cache.dense(q, 1.5)
    assert (got.support == 32).all()
    check_decode(cache, q, got, alpha=1.5)


@pytest.mark.parametrize("tokens", [100, 1500, 4500])
@pytest.mark.parametrize("alpha", [1 + 1e-8, 1.05, 1.5, 2.0])
def test_ties_far_from_zero(device, alpha, tokens):
    """Scores of 2^26, which fp32 has no neighbours of within 4, and as many tokens without weight."""
    k = torch.zeros(2 * tokens, 2, 64)
    k[::2, :, 0], k[1::2, :, 0] = 2.0**13, -(2.0**16)
    cache = make_cache([2 * tokens], k=[k], device=device)
    q = torch.zeros(1, 4, 64, device=device)
    q[..., 0] = 2.0**13
    got = cache.dense(q, alpha, 1.0)
    assert (got.support == tokens).all()
    check_decode(cache, q, got, alpha=alpha, scale=1.0)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("tokens", [3585, 4095, 4096])
def test_room_in_the_page_table_changes_no_bit(device, alpha, tokens):
    """Wherever a kernel draws the line between short rows and long ones."""
    q, heads = make_query(1, 4, 64, device=device), {"alibi_slopes": make_slopes(4, device)}
    tight, roomy = (make_cache([tokens], page_size=16, device=device, max_pages=pages) for pages in (256, 257))
    got = tight.dense(q, alpha, **heads)
    check_decode(tight, q, got, alpha=alpha, **heads)
    assert_same_bits(got, roomy.dense(q, alpha, **heads))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alibi_window(device, alpha):
    """A steep bias rises to the last token, and what lies far back is outside every support."""
    cache, q = make_cache([3000, 5], device=device), make_query(2, 4, 64, device=device)
    slopes = torch.tensor([0.0, 0.01, 1.0, 8.0], device=device)
    got = cache.dense(q, alpha, None, alibi_slopes=slopes)
    check_decode(cache, q, got, alpha=alpha, alibi_slopes=slopes)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_fp16_extremes(device, alpha):
    signs, values = draw(50, 2, 64).sign() * 65504, draw(50, 2, 64, seed=1).sign() * 65504
    cache = make_cache([50, 1], k=[signs, signs[:1]], v=[values, values[:1]], dtype=torch.float16, device=device)
    q = (draw(2, 4, 64, seed=2).sign() * 65504).half().to(device)
    check_decode(cache, q, cache.dense(q, alpha), alpha=alpha)
    tiny = make_cache([50, 1], k=[signs * 1e-12, signs[:1] * 1e-12], dtype=torch.float16, device=device)
    check_decode(tiny, q, tiny.dense(q, alpha), alpha=alpha)


@pytest.mark.parametrize("tokens", [500, 2000])
@pytest.mark.parametrize("head_alpha", [1.0001, 1.01, 1.05, 1.999])
def test_alpha_close_to_the_ends(device, head_alpha, tokens):
    cache, q = make_cache([tokens], device=device), make_query(1, 4, 64, device=device)
    check_decode(cache, q, cache.dense(q, head_alpha), alpha=head_alpha)


@pytest.mark.parametrize("tokens", [500, 7000])
def test_alpha_per_head_replaces_alpha(device, tokens):
    cache, q = make_cache([tokens, 20], device=device), make_query(2, 8, 64, device=device)
    alphas = torch.tensor([1.0, 1.25, 1.5, 2.0, 1.75, 1.5, 1.0, 1.125], device=device)
    got = cache.dense(q, 1.5, None, head_alpha=alphas)
    check_decode(cache, q, got, head_alpha=alphas)
    assert_same_bits(cache.dense(q, 1.0, None, head_alpha=alphas), got)
    for head, alpha in enumerate(alphas.tolist()):
        tau, support = (x[:, head] for x in cache.dense(q, alpha)[1:3])
        if alpha == 1:  # where it is the alpha of all heads, the mass may be added up in another order
            torch.testing.assert_close(got.tau[:, head], tau, atol=2e-6, rtol=0)
        else:
            assert_same_bits([got.tau[:, head]], [tau])
        assert_same_bits([got.support[:, head]], [support])


@pytest.mark.parametrize("alpha", [4 / 3, 1.5, 2.0])
def test_values_outside_the_support_are_not_read(device, alpha):
    cache, q = make_cache([1000], kv_heads=1, device=device), make_query(1, 4, 64, device=device) * 4
    want = cache.dense(q, alpha)
    z = (alpha - 1) * reference.scores(q[0], cache.k[0])
    _, tau = reference.entmax(z / (alpha - 1), alpha)
    dead = (z < tau[:, None] - 1e-3).all(0)
    assert dead.sum() > 500
    for token in dead.nonzero().flatten().tolist():
        cache.v_pages[cache.page_table[0, token // 16], :, token % 16] = torch.nan
    assert_same_bits(cache.dense(q, alpha), want)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_nan_in_a_head_stays_in_it(device, alpha):
    cache, q = make_cache([100, 40], device=device), make_query(2, 8, 64, device=device)
    want = cache.dense(q, alpha)
    q[0, 2, 5] = torch.nan
    got = cache.dense(q, alpha)
    assert got.out[0, 2].isnan().all() and got.tau[0, 2].isnan() and got.support[0, 2] == 0
    others = torch.ones(2, 8, dtype=torch.bool, device=device)
    others[0, 2] = False
    assert_same_bits([x[others] for x in got[1:3]], [x[others] for x in want[1:3]])
    torch.testing.assert_close(got.out[others], want.out[others], atol=1e-6, rtol=0)
    others[0, :4] = False  # another group shares nothing with it
    assert_same_bits([got.out[others], got.tokens], [want.out[others], want.tokens])


def test_empty_rows_give_zeros(device):
    cache, q = make_cache([0, 0, 3], device=device), make_query(3, 4, 64, device=device)
    for x in cache.dense(q):
        assert (x[:2] == 0).all()


@pytest.mark.parametrize("group", [15, 16, 17, 33])
def test_large_groups(device, group):
    cache, q = make_cache([700, 3], kv_heads=1, device=device), make_query(2, group, 64, device=device)
    check_decode(cache, q, cache.dense(q))
    one = make_query(2, 1, 64, device=device)
    many = cache.dense(one.expand(-1, group, -1))
    assert_same_bits([x[:, -1:] for x in many[1:3]], cache.dense(one)[1:3])


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_nan_key_is_not_passed_over(device, alpha):
    cache, q = make_cache([3000, 3000], page_size=16, device=device), make_query(2, 4, 64, device=device)
    cache.k_pages[cache.page_table[0, 5], 1, 3, 7] = torch.nan
    got = cache.dense(q, alpha)
    assert got.out[0, 2:].isnan().all() and got.tau[0, 2:].isnan().all() and (got.support[0, 2:] == 0).all()
    assert got.out[0, :2].isfinite().all() and got.out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_of_any_strides(device, dtype):
    cache = make_cache([100, 20], dtype=dtype, device=device)
    q = make_query(2, 8, 128, dtype, device)[..., 64:]
    assert_same_bits(cache.dense(q), cache.dense(q.contiguous()))
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(cache.dense(swapped), cache.dense(q.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_pools_change_no_bit(device, dtype):
    packed, transposed = (make_cache([1000, 20], dtype=dtype, device=device, transposed=t) for t in (False, True))
    q = make_query(2, 8, 64, dtype, device)
    assert_same_bits(packed.dense(q), transposed.dense(q))


def test_padded_pools_change_no_bit(device):
    """A pool whose rows are wider than head_dim, as when K and V share one buffer."""
    cache, q = make_cache([1000, 20], device=device), make_query(2, 8, 64, device=device)
    want = cache.dense(q)
    both = torch.cat([cache.k_pages, cache.v_pages], -1)
    cache.k_pages, cache.v_pages = both[..., :64], both[..., 64:]
    assert_same_bits(cache.dense(q), want)


def test_unused_page_table_entries_are_not_read(device):
    cache, q = make_cache([100, 20, 0], device=device), make_query(3, 8, 64, device=device)
    want = cache.dense(q)
    for row in range(3):
        cache.page_table[row, len(cache.used(row)) :] = -1
    assert_same_bits(cache.dense(q), want)


def test_rows_may_share_pages(device):
    """Two rows with a common prefix in the same physical pages."""
    cache, q = make_cache([100, 100], device=device), make_query(2, 8, 64, device=device)
    cache.page_table[1] = cache.page_table[0]
    got = cache.dense(q)
    assert_same_bits([x[0] for x in cache.dense(q[[0, 0]])], [x[0] for x in got])
    assert_same_bits([x[1] for x in cache.dense(q[[1, 1]])], [x[1] for x in got])


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=5),
    st.sampled_from(ALPHAS),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_a_row_alone_equals_the_row_in_a_batch(device, seq_lens, alpha, dtype, seed):
    cache = make_cache(seq_lens, dtype=dtype, device=device, seed=seed)
    q = make_query(len(seq_lens), 4, 64, dtype, device, seed)
    whole = cache.dense(q, alpha)
    for row in range(len(seq_lens)):
        assert_same_bits(cache.row(row).dense(q[row : row + 1], alpha), [x[row : row + 1] for x in whole])


@pytest.mark.parametrize("alpha", [1.25, 1.5])
def test_wide_heads_have_the_same_bits_in_any_batch(device, alpha):
    """The CUDA kernel gives a head of a long list up to eight blocks, and fewer if there are more heads."""
    k = [draw(66_000, 1, 8, seed=row) for row in range(3)]
    cache = make_cache([66_000] * 3, kv_heads=1, head_dim=8, k=k, device=device)
    q = make_query(3, 1, 8, torch.float32, device) / 16
    whole = cache.dense(q, alpha)
    assert (whole.support > 5000).all()
    check_decode(cache, q, whole, alpha=alpha)
    for rows in [1, 2]:
        few = make_cache([66_000] * rows, kv_heads=1, head_dim=8, k=k[:rows], device=device)
        assert_same_bits(few.dense(q[:rows], alpha), [x[:rows] for x in whole])


@given(st.integers(1, 2000), st.sampled_from(ALPHAS), st.sampled_from(DTYPES), st.integers(0, 999))
def test_physical_order_and_repeats_change_no_bit(device, tokens, alpha, dtype, seed):
    cache = make_cache([tokens], dtype=dtype, device=device, seed=seed)
    q = make_query(1, 4, 64, dtype, device, seed)
    want = cache.dense(q, alpha)
    assert_same_bits(cache.dense(q, alpha), want)
    assert_same_bits(cache.permuted(seed).dense(q, alpha), want)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_threads_change_no_bit(threads, alpha):
    cache: Cache = make_cache([6000, 0, 77, 3000])
    q, results = make_query(4, 8, 64), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cache.dense(q, alpha))
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharp_and_flat_heads_in_one_group(device, dtype):
    cache = make_cache([2000], kv_heads=1, dtype=dtype, device=device)
    q = (draw(1, 8, 64) * torch.logspace(-4, 2, 8)[:, None]).to(dtype).to(device)
    for alpha in ALPHAS:
        check_decode(cache, q, cache.dense(q, alpha), alpha=alpha)


def test_bias_alone_decides_when_keys_are_zero(device):
    cache = make_cache([90], k=[torch.zeros(90, 2, 64)], device=device)
    q, slopes = make_query(1, 4, 64, device=device), make_slopes(4, device)
    check_decode(cache, q, cache.dense(q, 2.0, None, alibi_slopes=slopes), alpha=2.0, alibi_slopes=slopes)
