"""The oracle against facts that it does not use."""

import math

import pytest
import torch
from conftest import draw
from hypothesis import given
from hypothesis import strategies as st

from entmaxkv import reference

ALPHAS = [1.0, 1.01, 1.25, 4 / 3, 1.5, 1.75, 2.0]


@given(st.sampled_from(ALPHAS), st.integers(1, 300), st.floats(0, 50), st.integers(0, 99))
def test_weights_are_a_distribution(alpha, tokens, strength, seed):
    p, _ = reference.entmax(draw(3, tokens, seed=seed).double() * strength, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)


@given(st.sampled_from(ALPHAS[1:]), st.integers(1, 300), st.floats(0, 50), st.integers(0, 99))
def test_tau_lies_in_its_bracket(alpha, tokens, strength, seed):
    s = draw(3, tokens, seed=seed).double() * strength
    _, tau = reference.entmax(s, alpha)
    top = (alpha - 1) * s.amax(-1)
    assert (tau >= top - 1 - 1e-12).all()
    assert (tau <= top - tokens ** (1 - alpha) + 1e-12).all()


@given(st.sampled_from(ALPHAS), st.integers(2, 300), st.integers(0, 99))
def test_a_subset_has_a_lower_tau(alpha, tokens, seed):
    s = draw(3, tokens, seed=seed).double() * 3
    assert (reference.entmax(s[:, ::2], alpha)[1] <= reference.entmax(s, alpha)[1] + 1e-12).all()


def test_sparsemax_closed_form():
    s = draw(5, 200).double() * 2
    p, tau = reference.entmax(s, 2.0)
    z = s.sort(-1, descending=True).values
    total = z.cumsum(-1) - 1
    size = (z * torch.arange(1, 201) > total).sum(-1, keepdim=True)
    want = (total.gather(-1, size - 1) / size).squeeze(-1)
    torch.testing.assert_close(tau, want, atol=1e-13, rtol=0)
    torch.testing.assert_close(p, (s - want[:, None]).clamp(min=0), atol=1e-13, rtol=0)


def test_entmax15_closed_form():
    s = draw(5, 200).double() * 4
    _, tau = reference.entmax(s, 1.5)
    z = (s / 2).sort(-1, descending=True).values
    size = torch.arange(1, 201)
    mean, square = z.cumsum(-1) / size, z.square().cumsum(-1) / size
    candidate = mean - ((1 - size * (square - mean**2)) / size).clamp(min=0).sqrt()
    largest = (candidate <= z).sum(-1, keepdim=True)
    torch.testing.assert_close(tau, candidate.gather(-1, largest - 1).squeeze(-1), atol=1e-12, rtol=0)


def test_alpha_near_one_approaches_softmax():
    s = draw(5, 200).double()
    torch.testing.assert_close(reference.entmax(s, 1 + 1e-7)[0], s.softmax(-1), atol=1e-6, rtol=0)


def test_alpha_one_is_softmax_attention():
    q, k, v = draw(4, 64, seed=1), draw(50, 4, 64, seed=2), draw(50, 4, 64, seed=3)
    out, p, tau = reference.attention(q, k, v, alpha=1.0)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[:, None].double(), k.transpose(0, 1).double(), v.transpose(0, 1).double()
    )
    torch.testing.assert_close(out, want[:, 0], atol=1e-12, rtol=0)
    s = torch.einsum("hd,nhd->hn", q.double(), k.double()) / 8
    torch.testing.assert_close(tau, s.exp().sum(-1).log(), atol=1e-12, rtol=0)
    torch.testing.assert_close(p, s.softmax(-1), atol=1e-12, rtol=0)


def test_heads_alpha_bias_and_keep():
    q, k, v = draw(6, 32, seed=1), draw(40, 2, 32, seed=2), draw(40, 2, 32, seed=3)
    alpha, slopes = torch.tensor([1.0, 1.5, 2.0, 1.25, 1.5, 1.75]), 2.0 ** -torch.arange(1.0, 7.0)
    keep = draw(2, 40, seed=4) > 0
    out, p, tau = reference.attention(q, k, v, alpha=alpha, scale=0.4, alibi_slopes=slopes, keep=keep)
    for head in range(6):
        tokens = keep[head // 3].nonzero().flatten()
        bias = slopes[head].double() * (tokens - 39)
        s = 0.4 * k[tokens, head // 3].double() @ q[head].double() + bias
        want, want_tau = reference.entmax(s, alpha[head].item())
        torch.testing.assert_close(p[head, tokens], want, atol=1e-12, rtol=0)
        torch.testing.assert_close(tau[head], want_tau, atol=1e-12, rtol=0)
        torch.testing.assert_close(out[head], want @ v[tokens, head // 3].double(), atol=1e-12, rtol=0)
    assert (p.view(2, 3, 40).masked_select(~keep[:, None]) == 0).all()


def test_no_tokens_give_zeros():
    q, none = draw(4, 32), draw(0, 2, 32)
    for x in reference.attention(q, none, none):
        assert (x == 0).all()


def test_gather_inverts_the_page_table():
    tokens = draw(11, 2, 8)
    pages = torch.full((6, 2, 4, 8), torch.nan)
    for page, part in zip([5, 0, 3], tokens.split(4), strict=True):
        pages[page, :, : len(part)] = part.transpose(0, 1)
    assert torch.equal(reference.gather(pages, torch.tensor([5, 0, 3, 1]), 11), tokens)


def test_page_statistics_by_hand():
    k = torch.tensor([1.0, 3.0, -2.0, 5.0, 7.0]).view(5, 1, 1)
    low, high = reference.page_bounds(k, 2)
    mean, std = reference.page_moments(k, 2)
    assert low.flatten().tolist() == [1, -2, 7] and high.flatten().tolist() == [3, 5, 7]
    assert mean.flatten().tolist() == [2, 1.5, 7] and std.flatten().tolist() == [1, 3.5, 0]


@given(
    st.integers(1, 90),
    st.sampled_from([8, 16]),
    st.booleans(),
    st.sampled_from([None, -0.3]),
    st.integers(0, 99),
)
def test_page_scores_bound_and_describe_their_tokens(tokens, page_size, alibi, scale, seed):
    q, k = draw(4, 16, seed=seed), draw(tokens, 2, 16, seed=seed + 1)
    options = {"scale": scale, "alibi_slopes": torch.tensor([0.5, 0.0, -0.25, 0.1]) if alibi else None}
    pages = reference.scores(q, k, **options).split(page_size, -1)
    best, worst = (torch.stack([end(page, -1) for page in pages], -1) for end in (torch.amax, torch.amin))
    bounds = *reference.page_bounds(k, page_size), tokens, page_size
    upper, middle = (reference.score_pages(q, *bounds, **options, lower=lower) for lower in (0, 1))
    assert (upper >= best - 1e-12).all() and (2 * middle - upper <= worst + 1e-12).all()
    mean, _ = reference.score_gaussian(q, *reference.page_moments(k, page_size), tokens, page_size, **options)
    torch.testing.assert_close(mean, torch.stack([page.mean(-1) for page in pages], -1), atol=1e-6, rtol=0)


def test_gaussian_moments_of_the_bias():
    zeros, slope = torch.zeros(2, 1, 4), torch.tensor([0.5])
    mean, std = reference.score_gaussian(zeros[0], zeros, zeros, 11, 8, alibi_slopes=slope)
    bias = [0.5 * torch.arange(-10.0, -2.0), 0.5 * torch.arange(-2.0, 1.0)]
    torch.testing.assert_close(mean[0], torch.stack([b.mean() for b in bias]).double())
    torch.testing.assert_close(std[0], torch.stack([b.std(unbiased=False) for b in bias]).double())


@pytest.mark.parametrize("beta", [1.0, 4 / 3, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("r", [-6.0, -1.0, 0.0, 0.3, 4.0, 40.0])
def test_mean_power_is_the_gaussian_integral(beta, r):
    t = 0.7
    got = reference.mean_power(torch.tensor(r * t).double(), torch.tensor(t).double(), beta)
    x = torch.linspace(max(-r, -20), max(-r, -20) + 40, 2_000_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    want = torch.trapezoid((t * (x + r)).clamp(min=0) ** beta * density, x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("alpha", [1.25, 4 / 3, 1.5, 1.75, 2.0])
def test_gaussian_threshold_of_certain_scores_is_tau(alpha):
    s = draw(3, 20).double() * 2
    counts = torch.tensor([4.0] * 19 + [1.0])
    want = reference.entmax(torch.cat([s[:, :-1].repeat_interleave(4, -1), s[:, -1:]], -1), alpha)[1]
    got = reference.gaussian_threshold(s, torch.zeros_like(s), counts, alpha)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_gaussian_threshold_of_many_normal_scores_is_near_tau():
    s = draw(1, 200_000).double() / 4
    want = reference.entmax(s, 1.5)[1]
    counts = torch.tensor([200_000.0])
    got = reference.gaussian_threshold(s.mean(-1, keepdim=True), s.std(-1, keepdim=True), counts, 1.5)
    assert (got - want).abs() < 0.02


def test_select_pages_by_hand():
    scores = torch.tensor([[9.0, 1.0, 8.0, 0.0, -5.0], [0.0, 4.0, 0.0, 3.5, -5.0]])
    for budget, want in {
        1: [4],
        10: [4],
        11: [0, 4],
        18: [0, 4],
        19: [0, 1, 4],
        27: [0, 1, 3, 4],
        35: [0, 1, 2, 3, 4],
    }.items():
        keep = reference.select_pages(scores, 35, 1, 8, budget)
        assert keep[0].nonzero().flatten().tolist() == want, budget
    keep = reference.select_pages(scores, 35, 2, 8, 12)
    assert [row.nonzero().flatten().tolist() for row in keep] == [[0, 4], [1, 4]]


def test_select_pages_goes_by_shares():
    """Not by the distance to a head's best: then 1 and 2 were as good as 0."""
    scores = torch.tensor([[3.0, 9.0, 8.9, 8.9, 8.9], [9.0, 1.0, 0.0, 8.0, -5.0]])
    for budget, want in {10: [4], 11: [0, 4], 19: [0, 3, 4], 27: [0, 1, 3, 4]}.items():
        keep = reference.select_pages(scores, 35, 1, 8, budget)
        assert keep[0].nonzero().flatten().tolist() == want, budget


def test_page_log_softmax_is_about_the_logarithm_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 700, generator=generator) * torch.logspace(-1, 1.5, 12).view(3, 4, 1)
    off = reference.page_log_softmax(scores) - scores.double().log_softmax(-1)
    assert ((off.amax((1, 2)) - off.amin((1, 2))) < 0.12).all()
    assert (reference.page_log_softmax(scores).amax((1, 2)) == 0).all()


def test_select_pages_gives_ties_to_the_lower_page():
    keep = reference.select_pages(torch.zeros(2, 6), 48, 2, 8, 24)
    assert keep.tolist() == [[True, True, False, False, False, True]] * 2


def test_select_gaussian_by_hand():
    mean, std = torch.tensor([[6.0, 1.0, 5.0, -9.0]]), torch.zeros(1, 4)
    keep, excess = reference.select_gaussian(mean, std, 32, 1, 8, alpha=2.0)
    torch.testing.assert_close(excess, mean.double() - (6 - 1 / 8))
    assert keep.tolist() == [[True, False, False, True]]
    for options in ({"alpha": 1.0}, {"margin": math.inf}):
        assert reference.select_gaussian(mean, std, 32, 1, 8, **options)[0].all()
