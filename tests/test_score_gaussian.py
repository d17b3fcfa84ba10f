"""score_gaussian: mean and spread of the scores of every page."""

import pytest
import torch
from conftest import Cache, Rule, assert_same_bits, cases, make_cache, make_query, make_slopes, orders

from entmaxkv import reference


def score(
    cache: Cache, q: torch.Tensor, scale: float | None = None, slopes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    table = cache.page_table, cache.seq_lens, cache.page_size
    return torch.ops.entmaxkv.score_gaussian(q, cache.k_mean, cache.k_std, *table, scale, slopes)


@cases
def test_agrees_with_the_oracle(case, device):
    cache, q, slopes = case.cache(device), case.query(device), case.slopes(device)
    got = score(cache, q, case.scale, slopes)
    rules = [Rule(torch.float32) for _ in got]
    for x in got:
        assert x.shape == (len(cache.k), case.q_heads, cache.page_table.shape[1]) and x.dtype == torch.float32
    for row, n in enumerate(cache.lengths):
        used = cache.used(row)
        assert (got[0][row, :, len(used) :] == -torch.inf).all() and (got[1][row, :, len(used) :] == 0).all()
        if n:
            inputs = q[row], cache.k_mean[used], cache.k_std[used]
            options = {"seq_len": n, "page_size": case.page_size, "scale": case.scale, "alibi_slopes": slopes}
            truth = reference.score_gaussian(*inputs, **options)
            plain = [
                reference.score_gaussian(*(x[..., order] for x in inputs), **options, dtype=torch.float32)
                for order in orders(case.head_dim)
            ]
            for rule, x, p, t in zip(rules, got, zip(*plain, strict=True), truth, strict=True):
                rule.add(x[row, :, : len(used)], p, t)
    for rule in rules:
        rule.check()


def test_describes_the_scores_of_the_page(device):
    cache, q, slopes = (
        make_cache([64 * 40], page_size=64, device=device),
        make_query(1, 4, 64, device=device),
        make_slopes(4, device),
    )
    mean, std = score(cache, q, None, slopes)
    s = reference.scores(q[0], cache.k[0], alibi_slopes=slopes).view(4, -1, 64)
    used = s.shape[1]
    torch.testing.assert_close(mean[0, :, :used].double(), s.mean(-1), atol=1e-4, rtol=1e-5)
    # Keys have independent coordinates here, so that the spread is right on average.
    ratio = (std[0, :, :used].double().square() / s.var(-1, unbiased=False)).mean(-1)
    assert ((ratio - 1).abs() < 0.1).all()


def test_rows_order_repeats_and_threads_change_no_bit(device, threads):
    cache, q = make_cache([1000, 0, 3], page_size=16, device=device), make_query(3, 8, 64, device=device)
    want = score(cache, q)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(score(cache, q), want)
        assert_same_bits(score(cache.permuted(), q), want)
    for row in range(3):
        assert_same_bits(score(cache.row(row), q[row : row + 1]), [x[row : row + 1] for x in want])


def test_query_of_any_strides(device):
    cache = make_cache([100, 20], page_size=16, device=device)
    q = make_query(2, 8, 128, device=device)[..., 64:]
    assert_same_bits(score(cache, q), score(cache, q.contiguous()))


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_keys_of_any_size(device, size):
    """Squares of bf16 are taken apart on a GPU: neither part may leave its range."""
    cache = make_cache([300], page_size=16, dtype=torch.bfloat16, device=device)
    q = make_query(1, 8, 64, torch.bfloat16, device)
    want = score(cache, q)
    for x in (cache.k_mean, cache.k_std):
        x.mul_(size)
    for x, y in zip(score(cache, q), want, strict=True):
        torch.testing.assert_close(x, size * y, rtol=1e-6, atol=0)
