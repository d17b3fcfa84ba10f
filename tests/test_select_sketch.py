"""select_sketch: no token with weight is missed, what does not fit is bounded, decoding gives the dense result."""

import math

import pytest
import torch
from conftest import (
    CUDA,
    Cache,
    assert_same_bits,
    cases,
    draw,
    make_alphas,
    make_cache,
    make_query,
    make_slopes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entmaxkv
from entmaxkv import reference


def choose(
    cache: Cache, q: Tensor, sketch: tuple[Tensor, Tensor] | None = None, **options: object
) -> tuple[Tensor, ...]:
    table = cache.page_table, cache.seq_lens
    return torch.ops.entmaxkv.select_sketch(q, cache.k_pages, *(sketch or cache.sketch()), *table, **options)


def masks(cache: Cache, selected: Tensor, counts: Tensor) -> list[Tensor]:
    """Token masks [kv_heads, tokens] per row, of a selection in due form."""
    result = []
    for row, k in enumerate(cache.k):
        mask = torch.zeros(k.shape[1], len(k), dtype=torch.bool, device=k.device)
        for head, count in enumerate(counts[row].tolist()):
            tokens = selected[row, head, :count].long()
            assert (selected[row, head, count:] == -1).all()
            assert (tokens.diff() > 0).all()
            mask[head, tokens] = True
        result.append(mask)
    return result


def check(
    cache: Cache,
    q: Tensor,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
    **options: object,
) -> list[Tensor]:
    """The weight of what was left out, in float64, is at most the bound; if that is 0, decoding is dense decoding."""
    heads = {"alibi_slopes": alibi_slopes, "head_alpha": head_alpha}
    selected, counts, delta_bound = choose(cache, q, alpha=alpha, scale=scale, **heads, **options)
    keep = masks(cache, selected, counts)
    group = q.shape[1] // cache.k_pages.shape[1]
    for row, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        a = alpha if head_alpha is None else head_alpha
        _, p, _ = reference.attention(q[row], k, v, alpha=a, scale=scale, alibi_slopes=alibi_slopes)
        lost = p.masked_fill(keep[row].repeat_interleave(group, 0), 0)
        certified = delta_bound[row] == 0
        assert (lost[certified] == 0).all(), f"row {row} lacks tokens of weight {lost[certified].amax(-1)}"
        assert (lost.sum(-1) <= delta_bound[row].double() * (1 + 1e-10)).all()
        assert (delta_bound[row] <= 1).all()
        assert (keep[row].any(-1) == (len(k) > 0)).all()
    if "max_tokens" not in options:
        assert (delta_bound == 0).all()
        got = cache.sparse(q, selected, counts, alpha, scale, **heads, by_token=True)
        assert torch.equal(got.tokens, counts)
        # Both compute the same scores, whose rounding can be much larger than what they differ by.
        want = cache.dense(q, alpha, scale, **heads)
        torch.testing.assert_close(got.tau, want.tau, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got.out, want.out, rtol=torch.finfo(q.dtype).eps, atol=1e-5)
        assert ((got.support - want.support).abs() <= want.support // 10_000).all()  # of many, one may be at tau
    return keep


def hard_keys(kind: str, q: Tensor, tokens: int = 3000) -> Tensor:
    """[tokens, 2, head_dim] for q [1, 8, head_dim]."""
    head_dim = q.shape[-1]
    k, lead = draw(tokens, 2, head_dim, seed=9), q[0, ::4].cpu().float()
    lead = lead / lead.norm(dim=-1, keepdim=True)
    if kind == "clustered":
        k = k / 8 + draw(8, 2, head_dim, seed=3)[torch.arange(tokens) // 100 % 8]
    elif kind == "outlier channel":
        k[..., 3] += 300
    elif kind == "outlier tokens":
        k[::500] *= 100
    elif kind == "equal":
        k = k[:1].expand(tokens, -1, -1)
    elif kind == "zero":
        k = 0 * k
    elif kind == "rising":
        k = k / 8 + torch.linspace(-5, 5, tokens)[:, None, None] * lead
    elif kind == "opposed":
        k = k / 8 - torch.linspace(2, 5, tokens)[:, None, None] * lead
    elif kind == "needle":
        k[1234] = 20 * lead
    elif kind == "small":
        k = k * 1e-6
    elif kind == "no sketch":
        k[::7] *= 1e7
    return k


KINDS = ["normal", "clustered", "outlier channel", "outlier tokens", "equal", "zero", "rising", "opposed", "needle"]
KINDS += ["small", "no sketch"]


@cases
def test_certified_is_dense(case, device):
    heads = {"alibi_slopes": case.slopes(device), "head_alpha": case.head_alpha(device)}
    check(case.cache(device), case.query(device), alpha=case.alpha or 1.5, scale=case.scale, **heads)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_keys(device, kind, alpha):
    q = make_query(1, 8, 64, device=device)
    check(make_cache([3000], k=[hard_keys(kind, q)], device=device), q, alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [33, 128, 192])
@pytest.mark.parametrize("kind", ["normal", "outlier channel", "rising"])
def test_hard_keys_of_other_types(device, kind, head_dim, dtype):
    q = make_query(1, 8, head_dim, dtype, device)
    k = hard_keys(kind, q, 1000)
    check(make_cache([1000], k=[k], head_dim=head_dim, dtype=dtype, page_size=32, device=device), q)


@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 129, 2047, 2049, 16384, 16385, 40000])
def test_lengths_about_chunks(device, tokens):
    cache = make_cache([tokens, 5], kv_heads=1, page_size=64, device=device)
    check(cache, make_query(2, 4, 64, device=device, seed=5), alibi_slopes=make_slopes(4, device))


@given(
    seed=st.integers(0, 10**6),
    head_dim=st.sampled_from([8, 64, 96, 128, 192, 256]),
    alpha=st.sampled_from([1.01, 4 / 3, 1.5, 2.0]),
    bits=st.sampled_from([2, 4]),
    strength=st.integers(-6, 12),
    level=st.integers(-10, 10),
    margin=st.floats(-0.01, 0.5),
    slope=st.sampled_from([0.0, 0.01, -3.0]),
)
@settings(max_examples=100)
def test_a_query_along_what_a_code_lost(device, seed, head_dim, alpha, bits, strength, level, margin, slope):
    """Cauchy and Schwarz's worst case: the bound of token 40 is then as tight as bounds get."""
    k = draw(100, 1, head_dim, seed=seed) * 2.0**level
    cache = make_cache([100], kv_heads=1, head_dim=head_dim, k=[k], device=device)
    codes, norms = (x[cache.page_table[0, 2].long(), 0, :, 8] for x in cache.sketch())
    r = reference.rotate(cache.k[0][40, 0])
    lost = r - reference.sketch_values(codes, norms)[0 if bits == 2 else 1]
    back = reference.rotate(torch.eye(head_dim, device=device))  # [head_dim, dims]
    q = (back @ lost).float()
    q = q / q.norm()
    # The others' scores come close to that token's, which its code does not show.
    k = cache.k[0][:, 0]
    along = k[40] @ q - margin * lost.norm().float() * torch.rand(100, device=device)
    others = k + (along - k @ q)[:, None] * q
    others[40] = k[40]
    cache = make_cache([100], kv_heads=1, head_dim=head_dim, k=[others[:, None]], device=device)
    slopes = torch.tensor([slope], device=device)
    check(cache, q[None, None] * 2.0 ** (strength - level), alpha=alpha, bits=bits, alibi_slopes=slopes)


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 400),
    head_dim=st.integers(1, 256),
    group=st.integers(1, 5),
    strength=st.floats(-20, 20),
    size=st.floats(-20, 18),
    spread=st.floats(0, 8),
    alpha=st.one_of(st.just(1.0), st.floats(1.001, 2)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    max_tokens=st.sampled_from([None, 1, 30]),
)
def test_any_sizes(device, seed, tokens, head_dim, group, strength, size, spread, alpha, dtype, max_tokens):
    k = draw(tokens, 1, head_dim, seed=seed) * 2.0**size * torch.exp(spread * draw(tokens, 1, 1, seed=seed + 1))
    cache = make_cache([tokens], kv_heads=1, head_dim=head_dim, k=[k], dtype=dtype, device=device)
    q = (draw(1, group, head_dim, seed=seed + 2) * 2.0**strength).to(dtype).to(device)
    check(cache, q, alpha=alpha, **({"max_tokens": max_tokens} if max_tokens else {}))


def long_cache(kind: str, tokens: int, head_dim: int, device: str) -> Cache:
    """One row in bf16, drawn on the device, in shuffled pages."""
    generator = torch.Generator(device).manual_seed(0)
    k, v = (torch.randn(tokens, 4, head_dim, device=device, generator=generator) for _ in range(2))
    if kind == "clustered":  # a correlation of 0.97 from one key to the next
        weights = (1 - 0.97**2) ** 0.5 * 0.97 ** torch.arange(255.0, -1, -1, device=device)
        series = torch.nn.functional.pad(k.permute(1, 2, 0).reshape(-1, 1, tokens), (255, 0))
        k = torch.nn.functional.conv1d(series, weights[None, None]).view(4, head_dim, tokens).permute(2, 0, 1)
    elif kind == "outlier channel":
        k[..., head_dim // 3] += 30
    k, v = k.bfloat16().contiguous(), v.bfloat16()
    cache = entmaxkv.PagedKVCache(1, tokens, 4, head_dim, dtype=k.dtype, device=device)
    order = torch.randperm(len(cache.k_pages), generator=torch.Generator().manual_seed(0)).int()
    cache.page_table.copy_(order[None])
    cache.append(k[None], v[None])
    statistics = cache.k_min, cache.k_max, cache.k_mean, cache.k_std
    pool = cache.k_pages, cache.v_pages, *statistics, cache.page_table, cache.seq_lens
    return Cache([k], [v], *pool, cache.page_size)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["normal", "clustered", "outlier channel"])
def test_long_rows(device, kind, head_dim):
    cache = long_cache(kind, 300_000, head_dim, device)
    q = draw(1, 16, head_dim, seed=1) * torch.logspace(-1, 1, 16)[:, None]
    q = q.bfloat16().to(device)
    check(cache, q)
    counts = choose(cache, q)[1]
    if kind != "outlier channel":  # which is most of what a sketch can lose
        assert counts.min() < 300_000 / 8
    for alpha, max_tokens in ((1.5, 10), (1.5, 1000), (1.0, 1000)):
        capped = check(cache, q, alpha=alpha, max_tokens=max_tokens)
        assert capped[0].sum(-1).max() <= max_tokens


@pytest.mark.parametrize("certainty", [0.5, 1 - 1e-9])
@pytest.mark.parametrize("bits", [2, 4])
def test_more_bits_and_less_certainty_select_less(device, bits, certainty):
    cache, q = make_cache([3000, 40], head_dim=128, device=device), make_query(2, 8, 128, device=device)
    proved = check(cache, q, bits=bits)
    likely = masks(cache, *choose(cache, q, bits=bits, certainty=certainty)[:2])
    coarse = masks(cache, *choose(cache, q, bits=2, certainty=certainty)[:2])
    for a, b, c in zip(likely, proved, coarse, strict=True):
        assert (a <= b).all() and (a <= c).all() and a.sum() < b.sum()
    if certainty > 0.9:
        check(cache, q, bits=bits, certainty=certainty)


def test_softmax_selects_all(device):
    cache, q = make_cache([300, 7], device=device), make_query(2, 8, 64, device=device)
    for mask in check(cache, q, head_alpha=make_alphas(8, device)):  # each group has a head of softmax
        assert mask.sum() >= 0.5 * mask.numel()
    assert all(mask.all() for mask in check(cache, q, alpha=1.0))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("kind", [*KINDS, "channel"])
def test_a_cap_keeps_the_tokens_of_most_weight(device, kind, alpha, bits):
    """Or almost as much weight in fewer, as whole steps of merit are read; however far bounds are above the scores."""
    room = 300
    q = make_query(1, 8, 64, device=device)
    k = hard_keys("normal" if kind == "channel" else kind, q)
    if kind == "channel":
        k[..., 3] += 30
    q = 3 * q[:, ::4]  # one query head for each KV head
    cache = make_cache([3000], k=[k], device=device)
    keep = check(cache, q, alpha=alpha, bits=bits, max_tokens=room)[0]
    assert (keep.sum(-1) <= room).all() and keep.any(-1).all()
    _, p, _ = reference.attention(q[0], cache.k[0], cache.v[0], alpha=alpha)
    read, most = (p * keep).sum(-1), p.topk(room).values.sum(-1)
    if alpha == 1:
        assert (choose(cache, q, alpha=alpha, bits=bits, max_tokens=room)[2] > 0).all()
    told_apart = {"normal": 0.9, "rising": 0.9, "needle": 0.9, "channel": 0.9 if bits == 4 else 0.6}
    if bits == 4:
        told_apart |= {"clustered": 0.75, "opposed": 0.75}
    if kind in told_apart:
        few = most > (0.99 if alpha > 1 else 0.5)  # not so of a flat head
        assert few.any() and (read > told_apart[kind] * most)[few].all()


@pytest.mark.parametrize("alphas", [[1.0, 1.0], [1.0, 1.5], [1.5, 1.5], [1.1, 2.0]])
def test_heads_of_a_group_share_a_cap(device, alphas):
    """Whatever their alphas, no head takes all of it from the other."""
    cache = make_cache([3000], kv_heads=1, device=device)
    q = make_query(1, 2, 64, device=device)
    q = 24 * q / q.norm(dim=-1, keepdim=True)
    alphas = torch.tensor(alphas, device=device)
    keep = check(cache, q, head_alpha=alphas, max_tokens=300)[0]
    _, p, _ = reference.attention(q[0], cache.k[0], cache.v[0], alpha=alphas)
    assert ((p * keep).sum(-1) > 0.9 * p.topk(150).values.sum(-1)).all()


@pytest.mark.parametrize("max_tokens", [1, 2, 50, 299, 2999, 3000, 5000])
@pytest.mark.parametrize("alpha", [None, 1.0, 1.5, 2.0])
def test_what_does_not_fit_is_bounded(device, alpha, max_tokens):
    cache, q = make_cache([3000, 0, 10], device=device), make_query(3, 8, 64, device=device) * 3
    head_alpha = make_alphas(8, device) if alpha is None else None
    options = {"alpha": alpha or 1.5, "head_alpha": head_alpha}
    capped = check(cache, q, **options, max_tokens=max_tokens)
    capped_bound = choose(cache, q, **options, max_tokens=max_tokens)[2]
    whole = choose(cache, q, **options)
    for row, (few, every) in enumerate(zip(capped, masks(cache, *whole[:2]), strict=True)):
        assert (few <= every).all()
        assert (few.sum(-1) <= max_tokens).all()
        fits = every.sum(-1) <= max_tokens
        assert torch.equal(few[fits], every[fits]), row
        assert torch.equal(capped_bound[row] > 0, ~fits.repeat_interleave(4))


@pytest.mark.parametrize("alpha", [1.001, 1.01])
def test_weights_that_underflow_are_not_certified(device, alpha):
    """Scores reach down to where weights are so small that fp32 cannot tell them from 0."""
    q = make_query(1, 2, 64, device=device)
    lead = (q[0] / q[0].norm(dim=-1, keepdim=True)).cpu()
    depth = torch.linspace(0, 1, 3000)[:, None, None] * 8 / (q[0].norm(dim=-1).cpu() * (alpha - 1))[:, None]
    cache = make_cache([3000], k=[-depth * lead], device=device)
    counts = choose(cache, q, alpha=alpha)[1]
    room = int(counts.min()) - 1
    delta_bound = choose(cache, q, alpha=alpha, max_tokens=room)[2]
    assert (delta_bound > 0).all() and delta_bound.max() < 1e-30
    check(cache, q, alpha=alpha, max_tokens=room)


def test_ties_beyond_the_room_go_to_the_lowest_positions(device):
    k = torch.ones(100, 2, 64)
    cache, q = make_cache([100], k=[k], device=device), make_query(1, 4, 64, device=device)
    for mask in check(cache, q, max_tokens=30)[0]:
        assert mask.nonzero().flatten().tolist() == list(range(30))
    assert (choose(cache, q, max_tokens=30)[2] == 1).all()


def test_few_heads_of_few_tokens(device):
    """What makes the op worth its while: of normal keys and strong queries, few tokens are candidates."""
    cache, q = make_cache([4096], head_dim=128, device=device), draw(1, 8, 128, seed=5, device=device) * 8
    assert choose(cache, q)[1].max() < 4096 / 8


def test_a_huge_key_without_weight_costs_nothing(device):
    """It has no sketch, so that it is scored, but its rounding is not that of the threshold."""
    q = draw(1, 2, 128, seed=5, device=device) * 8
    k = draw(4096, 2, 128)
    k[77] = -1e7 * q[0].cpu()
    cache = make_cache([4096], head_dim=128, k=[k], device=device)
    check(cache, q)
    assert choose(cache, q)[1].max() < 4096 / 8


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e35])
def test_special_queries_are_those_of_dense_decoding(device, value):
    cache, q = make_cache([100, 3, 0], device=device), make_query(3, 4, 64, device=device)
    q[0, 1, 7] = value
    selected, counts, delta_bound = choose(cache, q)
    assert counts[0].tolist()[0] == 100 and (delta_bound == 0).all()
    for x, y in zip(cache.sparse(q, selected, counts, by_token=True)[:3], cache.dense(q), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_special_keys_are_those_of_dense_decoding(device, value):
    k = draw(300, 2, 64)
    k[77, 1, 7] = value
    cache, q = make_cache([300], k=[k], device=device), make_query(1, 4, 64, device=device) * 20
    selected, counts, _ = choose(cache, q)
    got, want = cache.sparse(q, selected, counts, by_token=True), cache.dense(q)
    for x, y in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert counts[0, 0] < 300


def test_zero_queries(device):
    cache, q = make_cache([100], device=device), torch.zeros(1, 4, 64, device=device)
    assert all(mask.all() for mask in check(cache, q))


def test_reads_only_what_is_in_use(device):
    """Slots behind the last token may hold anything."""
    cache, q = make_cache([37], device=device), make_query(1, 4, 64, device=device)
    codes, norms = cache.sketch()
    want = choose(cache, q, (codes, norms))
    last = cache.page_table[0, 2].long()
    codes[last, :, :, 5:], norms[last, :, :, 5:] = 255, 255
    got = choose(cache, q, (codes, norms))
    assert_same_bits(got, want)


def test_physical_order_rows_and_threads_change_no_bit(device, threads):
    cache, q = make_cache([2500, 0, 40, 700], device=device), make_query(4, 8, 64, device=device)
    want = choose(cache, q, max_tokens=100)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(choose(cache, q, max_tokens=100), want)
        assert_same_bits(choose(cache.permuted(), q, max_tokens=100), want)
    for row in range(4):
        one = slice(row, row + 1)
        got = choose(cache.row(row), q[one], max_tokens=100)
        assert_same_bits(got, [x[one] for x in want])


def test_room_for_no_token(device):
    q, none = torch.zeros(2, 4, 64, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    cache = make_cache([0, 0], device=device)
    table = torch.zeros(2, 0, dtype=torch.int32, device=device)
    selected, counts, delta_bound = torch.ops.entmaxkv.select_sketch(q, cache.k_pages, *cache.sketch(), table, none)
    assert selected.shape == (2, 2, 0) and not counts.any() and not delta_bound.any()


def test_certainty_counts_the_rotation(device):
    """Where the proved bound makes most tokens candidates, the likely one is much smaller: sqrt(dims) in the limit."""
    cache, q = make_cache([3000], head_dim=128, device=device), draw(1, 2, 128, seed=5, device=device) * 3
    proved, likely = (choose(cache, q, bits=2, certainty=c)[1].sum().item() for c in (1.0, 1 - math.exp(-5)))
    assert likely < proved / 2
