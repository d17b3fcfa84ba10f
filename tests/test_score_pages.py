"""score_pages: the box bound of every page, and that it is one."""

import pytest
import torch
from conftest import (
    Cache,
    Rule,
    assert_same_bits,
    cases,
    draw,
    make_cache,
    make_query,
    make_slopes,
    orders,
    score_error,
)
from hypothesis import given
from hypothesis import strategies as st

from entmaxkv import reference


def score(
    cache: Cache,
    q: torch.Tensor,
    scale: float | None = None,
    slopes: torch.Tensor | None = None,
    lower: float = 0.0,
) -> torch.Tensor:
    table = cache.page_table, cache.seq_lens, cache.page_size
    return torch.ops.entmaxkv.score_pages(q, cache.k_min, cache.k_max, *table, scale, slopes, lower)


@pytest.mark.parametrize("lower", [0.0, 0.25, 1.0])
@cases
def test_agrees_with_the_oracle(case, device, lower):
    cache, q, slopes = case.cache(device), case.query(device), case.slopes(device)
    got = score(cache, q, case.scale, slopes, lower)
    assert got.shape == (len(cache.k), case.q_heads, cache.page_table.shape[1]) and got.dtype == torch.float32
    rule = Rule(torch.float32)
    for row, n in enumerate(cache.lengths):
        used = cache.used(row)
        assert (got[row, :, len(used) :] == -torch.inf).all()
        inputs = q[row], cache.k_min[used], cache.k_max[used]
        options = {"seq_len": n, "page_size": case.page_size, "scale": case.scale, "alibi_slopes": slopes}
        options["lower"] = lower
        plain = [
            reference.score_pages(*(x[..., order] for x in inputs), **options, dtype=torch.float32)
            for order in orders(case.head_dim)
        ]
        rule.add(got[row, :, : len(used)], plain, reference.score_pages(*inputs, **options))
    rule.check()


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 200),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([None, 0.5, -0.5]),
    st.booleans(),
    st.integers(0, 999),
)
def test_bound_is_at_least_the_truth(device, dtype, tokens, page_size, scale, alibi, seed):
    cache = make_cache([tokens], page_size=page_size, dtype=dtype, device=device, seed=seed)
    q = make_query(1, 4, 64, dtype, device, seed)
    slopes = make_slopes(4, device) if alibi else None
    got = score(cache, q, scale, slopes)[0].double()
    s = reference.scores(q[0], cache.k[0], scale=scale, alibi_slopes=slopes)
    # The bound sums larger terms than the score, so its own rounding is what it may fall short by.
    used = cache.used(0)
    size = torch.maximum(cache.k_min[used].abs(), cache.k_max[used].abs())
    error = score_error(q[0], size, scale, None)
    if slopes is not None:
        error = error + score_error(q[0] * 0, cache.k[0], scale, slopes).amax(-1, keepdim=True)
    for page, part in enumerate(s.split(page_size, -1)):
        assert (got[:, page] + error[:, page] >= part.amax(-1)).all()


def test_lower_bounds_and_slopes_of_either_sign(device):
    cache, q = make_cache([100], page_size=16, device=device), make_query(1, 4, 64, device=device)
    slopes = torch.tensor([0.3, -0.2, 0.0, -1.5], device=device)
    for scale in (0.2, -0.2):
        for lower in (0.0, 0.5, 1.0):
            used = cache.used(0)
            options = {"scale": scale, "alibi_slopes": slopes, "lower": lower}
            want = reference.score_pages(q[0], cache.k_min[used], cache.k_max[used], 100, 16, **options)
            got = score(cache, q, scale, slopes, lower)[0, :, : len(used)]
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_one_token_pages_are_exact(device):
    cache, q = make_cache([17], page_size=16, device=device), make_query(1, 4, 64, device=device)
    got = score(cache, q)[0, :, 1]
    want = reference.scores(q[0], cache.k[0])[:, 16]
    assert ((got - want).abs() <= score_error(q[0], cache.k[0], None, None)[:, 16]).all()


def test_fp16_extremes_stay_finite(device):
    k = draw(40, 2, 64).sign() * 65504
    cache = make_cache([40], k=[k], dtype=torch.float16, device=device)
    got = score(cache, torch.full((1, 4, 64), 65504.0, dtype=torch.float16, device=device))
    assert got[..., :3].isfinite().all()


def test_rows_do_not_depend_on_the_batch(device):
    cache, q = make_cache([100, 0, 33, 16], page_size=16, device=device), make_query(4, 8, 64, device=device)
    whole = score(cache, q)
    for row in range(4):
        assert_same_bits([score(cache.row(row), q[row : row + 1])], [whole[row : row + 1]])


def test_physical_order_repeats_and_threads_change_no_bit(device, threads):
    cache, q = make_cache([1000, 3], page_size=16, device=device), make_query(2, 8, 64, device=device)
    want = score(cache, q)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits([score(cache, q), score(cache.permuted(), q)], [want, want])


def test_query_of_any_strides(device):
    cache = make_cache([100, 20], page_size=16, device=device)
    q = make_query(2, 8, 128, device=device)[..., 64:]
    assert_same_bits([score(cache, q)], [score(cache, q.contiguous())])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_head_spoils_no_other(device, value):
    cache, q = make_cache([100], page_size=16, device=device), make_query(1, 8, 64, device=device)
    want = score(cache, q)
    q[0, 2, 5] = value
    got = score(cache, q)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert_same_bits([got[:, others]], [want[:, others]])
