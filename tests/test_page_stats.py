"""page_stats: bounds exact, moments by the tolerance rule, only pages in use."""

import pytest
import torch
from conftest import Cache, Rule, assert_same_bits, bits, cases, draw, make_cache

from entmaxkv import reference

page_stats = torch.ops.entmaxkv.page_stats


def renew(cache: Cache) -> Cache:
    for x in cache.statistics:
        x.fill_(7)
    page_stats(cache.k_pages, cache.page_table, cache.seq_lens, *cache.statistics)
    return cache


def check(cache: Cache) -> None:
    rules = [Rule(cache.k_pages.dtype) for _ in range(2)]
    for row, k in enumerate(cache.k):
        if len(k):
            used = cache.used(row)
            for x, bound in zip(cache.statistics[:2], reference.page_bounds(k, cache.page_size), strict=True):
                assert torch.equal(x[used], bound)
            truth = reference.page_moments(k, cache.page_size)
            plain = reference.page_moments(k, cache.page_size, dtype=torch.float32)
            for rule, x, p, t in zip(rules, cache.statistics[2:], plain, truth, strict=True):
                rule.add(x[used], [p], t)
    for rule in rules:
        rule.check()


@cases
def test_agrees_with_the_oracle(case, device):
    check(renew(case.cache(device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["outlier channel", "constant", "large", "tiny", "one spike"])
def test_hard_keys(device, dtype, kind):
    k = draw(100, 2, 64)
    if kind == "outlier channel":
        k[..., 3] += 1000
    elif kind == "constant":
        k = torch.full_like(k, 0.1)
    elif kind == "large":
        k = k.sign() * 60000
    elif kind == "tiny":
        k = k * 1e-6
    else:
        k[50] = 30000
    check(renew(make_cache([100], k=[k], page_size=16, dtype=dtype, device=device)))


def test_equal_keys_have_no_spread(device):
    k = torch.ones(40, 2, 64) * torch.arange(2.0)[:, None]
    cache = renew(make_cache([40], k=[k], page_size=16, device=device))
    assert (cache.k_std[cache.used(0)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slot", [0, 3, 18])
def test_statistics_do_not_hide_nan(device, dtype, slot):
    """Wherever in the page it stands, before and behind infinite keys; append_kv and page_stats agree."""
    k = draw(20, 2, 33)
    k[::2, 0, 7], k[1::2, 0, 32] = torch.inf, -torch.inf
    k[1::2, 1, 5] = torch.inf
    k[slot, 1, [5, 32]] = torch.nan
    cache = renew(make_cache([20], k=[k], head_dim=33, page_size=8, dtype=dtype, device=device))
    used = cache.used(0)
    bounds = reference.page_bounds(cache.k[0], 8)
    for x, bound in zip(cache.statistics[:2], bounds, strict=True):
        torch.testing.assert_close(x[used], bound, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cache.k_mean[used].isnan() & bounds[0].isnan(), bounds[0].isnan())
    assert bounds[0].isnan().sum() == 2
    filled = cache.clone()
    filled.seq_lens.zero_()
    filled.append(cache.k[0][None], cache.v[0][None])
    for x, y in zip(filled.statistics, cache.statistics, strict=True):
        torch.testing.assert_close(x[used], y[used], rtol=0, atol=0, equal_nan=True)


def test_leaves_other_pages_alone(device):
    cache = renew(make_cache([0, 20, 5], page_size=8, device=device))
    others = torch.ones(len(cache.k_pages), dtype=torch.bool, device=device)
    others[cache.used_pages()] = False
    for x in cache.statistics:
        assert (x[others] == 7).all() and not (x[~others] == 7).any()


@pytest.mark.parametrize("kept", [(0, 1), (2, 3)], ids=["bounds", "moments"])
def test_statistics_are_optional(device, kept):
    cache = make_cache([20, 9], page_size=8, device=device)
    want = renew(cache.clone()).statistics
    statistics = [x.fill_(7) if index in kept else None for index, x in enumerate(cache.statistics)]
    page_stats(cache.k_pages, cache.page_table, cache.seq_lens, *statistics)
    assert_same_bits([statistics[i] for i in kept], [want[i] for i in kept])


def test_physical_order_changes_no_bit(device):
    cache = renew(make_cache([100, 7], page_size=8, dtype=torch.float16, device=device))
    other = renew(cache.permuted())
    for x, y in zip(cache.statistics, other.statistics, strict=True):
        assert torch.equal(bits(x[cache.used_pages()]), bits(y[other.used_pages()]))


def test_threads_change_no_bit(threads):
    cache, results = make_cache([300, 0, 77], page_size=16, dtype=torch.bfloat16), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(renew(cache.clone()).statistics)
    assert_same_bits(*results)
