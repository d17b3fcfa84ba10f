"""select_gaussian: the threshold of the page mixture, and the pages that clear it."""

import math

import pytest
import torch
from conftest import UNIT, assert_same_bits, draw, make_cache, make_query
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entmaxkv import reference

select_gaussian = torch.ops.entmaxkv.select_gaussian

ALPHAS = [1.05, 1.25, 4 / 3, 1.5, 1.75, 2.0]
MASS = 1e-3  # the mass at the kernel's threshold is 1 to within this


def threshold_range(mean: Tensor, std: Tensor, seq_len: int, page_size: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Thresholds with mass 1 - MASS and 1 + MASS, widened by the rounding of z to fp32. [q_heads] each."""
    n = torch.tensor(reference.page_lengths(seq_len, page_size), dtype=torch.float64, device=mean.device)
    size = (alpha - 1) * (mean.abs() + 8 * std).double().amax(-1)
    off = torch.tensor([[[1 - MASS]], [[1 + MASS]]], dtype=torch.float64, device=mean.device)
    low, high = reference.gaussian_threshold(mean, std, n * off, alpha)
    return low - 8 * UNIT * size, high + 8 * UNIT * size


def make_moments(
    seq_lens: list[int], q_heads: int, page_size: int, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Page moments as score_gaussian writes them: heads of rising strength, -inf and 0 behind the end."""
    used = torch.tensor([-(-n // page_size) for n in seq_lens])
    max_pages = int(used.max()) + 2
    shape = len(seq_lens), q_heads, max_pages
    strength = torch.logspace(-1, 1, q_heads)[:, None]
    behind = torch.arange(max_pages) >= used[:, None, None]
    mean = (draw(*shape, seed=seed) * strength).masked_fill(behind, -torch.inf)
    std = (draw(*shape, seed=seed + 1).abs() * strength).masked_fill(behind, 0)
    return mean.to(device), std.to(device)


def check(
    mean: Tensor,
    std: Tensor,
    seq_lens: list[int],
    kv_heads: int,
    page_size: int,
    alpha: float = 1.5,
    quantile: float = 0.5,
    margin: float = 0.0,
    head_alpha: Tensor | None = None,
) -> None:
    """Keeps what the oracle keeps at the high end of the threshold's range, and no more than at the low end."""
    batch, q_heads, max_pages = mean.shape
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=mean.device)
    selected, counts = select_gaussian(mean, std, lens, kv_heads, page_size, alpha, quantile, margin, head_alpha)
    assert selected.shape == (batch, kv_heads, max_pages) and counts.shape == (batch, kv_heads)
    assert selected.dtype == counts.dtype == torch.int32
    alphas = [alpha] * q_heads if head_alpha is None else head_alpha.tolist()
    for row, n in enumerate(seq_lens):
        used = -(-n // page_size)
        must = torch.zeros(kv_heads, used, dtype=torch.bool, device=mean.device)
        may = must.clone()
        if n:
            must[:, -1] = may[:, -1] = True
            size = torch.tensor(reference.page_lengths(n, page_size), dtype=torch.float64, device=mean.device)
            for a in set(alphas):
                heads = torch.tensor([h for h in range(q_heads) if alphas[h] == a], device=mean.device)
                of = heads // (q_heads // kv_heads)
                if a == 1:
                    must[of] = may[of] = True
                    continue
                m, t = mean[row, heads, :used], std[row, heads, :used]
                low, high = (x[:, None] for x in threshold_range(m, t, n, page_size, a))
                best = m.double() + t.double() * torch.special.ndtri(quantile ** (1 / size))
                best = (a - 1) * best + margin
                slack = 8 * UNIT * ((a - 1) * (m.abs() + 4 * t).double() + abs(margin))
                for wanted, mask in ((best - slack > high, must), (best + slack > low, may)):
                    for head, pages in zip(of, wanted, strict=True):
                        mask[head] |= pages
        for head in range(kv_heads):
            count = counts[row, head].item()
            pages = selected[row, head, :count].long()
            assert (selected[row, head, count:] == -1).all()
            assert (pages.diff() > 0).all() and (pages < used).all() and (pages >= 0).all()
            got = torch.zeros_like(must[head]).index_fill_(0, pages, True)
            assert not (must[head] & ~got).any(), (
                f"row {row} head {head} lacks pages {(must[head] & ~got).nonzero().tolist()}"
            )
            assert not (got & ~may[head]).any(), (
                f"row {row} head {head} has pages {(got & ~may[head]).nonzero().tolist()}"
            )


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
@pytest.mark.parametrize(
    ("page_size", "kv_heads", "group"), [(8, 1, 1), (16, 2, 4), (64, 2, 3)], ids=["page8", "page16", "page64"]
)
def test_agrees_with_the_oracle(device, alpha, page_size, kv_heads, group):
    seq_lens = [0, 1, page_size - 1, page_size, page_size + 1, 20 * page_size + 3]
    check(*make_moments(seq_lens, kv_heads * group, page_size, device), seq_lens, kv_heads, page_size, alpha)


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.25, 3.0])
def test_quantiles_and_margins(device, quantile, margin):
    seq_lens = [1000, 5]
    check(*make_moments(seq_lens, 8, 16, device), seq_lens, 2, 16, 1.5, quantile, margin)


def test_alpha_per_head(device):
    seq_lens = [1000, 5]
    head_alpha = torch.tensor([1.5, 2.0, 4 / 3, 1.25, 1.0, 1.75, 1.5, 1.1], device=device)
    check(*make_moments(seq_lens, 8, 16, device), seq_lens, 4, 16, head_alpha=head_alpha)
    check(*make_moments(seq_lens, 8, 16, device), seq_lens, 8, 16, head_alpha=head_alpha)


def test_agrees_with_the_oracle_on_scored_pages(device):
    cache = make_cache([900, 0, 333, 16], page_size=16, device=device)
    q = make_query(4, 8, 64, device=device)
    table = cache.page_table, cache.seq_lens, 16
    moments = torch.ops.entmaxkv.score_gaussian(q, cache.k_mean, cache.k_std, *table)
    for alpha in (1.5, 1.75):
        check(*moments, cache.lengths, 2, 16, alpha)


def kernel_threshold(mean: Tensor, std: Tensor, seq_len: int, page_size: int, alpha: float) -> float:
    """The kernel's threshold for one head, found as the margin from which on page 0 is kept."""
    lens = torch.tensor([seq_len], dtype=torch.int32, device=mean.device)
    best = (alpha - 1) * (mean[0] + std[0] * torch.special.ndtri(torch.tensor(0.5).double() ** (1 / page_size))).item()
    low, high = -1e3, 1e3
    for _ in range(45):
        middle = (low + high) / 2
        selected, _ = select_gaussian(mean[None, None], std[None, None], lens, 1, page_size, alpha, 0.5, middle)
        low, high = (low, middle) if selected[0, 0, 0] == 0 else (middle, high)
    return best + high


@pytest.mark.parametrize("alpha", ALPHAS)
@settings(max_examples=5)
@given(st.integers(2, 60), st.floats(0.01, 10), st.sampled_from([0.0, 0.05, 1.0, 5.0]), st.integers(0, 99))
def test_threshold_of_the_mixture(device, alpha, pages, strength, spread, seed):
    mean = (draw(pages, seed=seed) * strength).to(device)
    std = (draw(pages, seed=seed + 1).abs() * strength * spread).to(device)
    low, high = threshold_range(mean[None], std[None], pages * 16, 16, alpha)
    got = kernel_threshold(mean, std, pages * 16, 16, alpha)
    slack = 16 * UNIT * (alpha - 1) * (mean[0].abs() + 4 * std[0]).item() + 1e-6
    assert low.item() - slack <= got <= high.item() + slack, f"{got} is outside {low.item()}..{high.item()}"


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"margin": math.inf}], ids=["softmax", "margin"])
def test_keeps_every_page(device, options):
    seq_lens = [0, 1, 100, 333]
    mean, std = make_moments(seq_lens, 8, 16, device)
    selected, counts = select_gaussian(
        mean, std, torch.tensor(seq_lens, dtype=torch.int32, device=device), 2, 16, **options
    )
    for row, n in enumerate(seq_lens):
        used = -(-n // 16)
        assert (counts[row] == used).all()
        assert (selected[row, :, :used] == torch.arange(used, device=device)).all() and (
            selected[row, :, used:] == -1
        ).all()


@pytest.mark.parametrize("kind", ["equal", "no spread", "one certain page", "huge", "far below", "tiny spread"])
def test_hard_moments(device, kind):
    pages = 60
    mean, std = {
        "equal": (torch.full((pages,), 2.0), torch.full((pages,), 0.5)),
        "no spread": (draw(pages), torch.zeros(pages)),
        "one certain page": ((torch.arange(pages) == 3) * 50.0, torch.full((pages,), 0.1)),
        "huge": (draw(pages) * 1e4, draw(pages).abs() * 1e3),
        "far below": (draw(pages) - 1e4, draw(pages).abs()),
        "tiny spread": (draw(pages), torch.full((pages,), 1e-20)),
    }[kind]
    moments = [x.expand(1, 2, pages).contiguous().to(device) for x in (mean, std)]
    for alpha in ALPHAS:
        check(*moments, [pages * 16 - 5], 1, 16, alpha)


@pytest.mark.parametrize("kind", ["drawn", "in runs", "best first", "best second", "second is wide"])
@pytest.mark.parametrize(("pages", "alpha"), [(1025, 1.75), (3000, 1.05), (3000, 2.0), (50_000, 1.5), (50_000, 4 / 3)])
def test_long_lists(device, pages, alpha, kind):
    """The CUDA kernel begins with a sample of the pages, which has the first and lacks the second."""
    mean, std = draw(2, pages) / 4, 1 + draw(2, pages, seed=1) / 8
    if kind == "in runs":
        mean = mean * 2 + (torch.arange(pages) // 100 % 30 == 7) * 3
    elif kind == "second is wide":
        std[:, 1] = 30
    elif kind != "drawn":
        mean[:, ["best first", "best second"].index(kind)] = 50
    check(mean[None].to(device), std[None].to(device), [pages * 16 - 5], 1, 16, alpha)


def test_nan_moments_give_a_valid_selection(device):
    mean, std = make_moments([200], 4, 16, device)
    mean[0, 1] = std[0, 1] = torch.nan
    selected, counts = select_gaussian(mean, std, torch.tensor([200], dtype=torch.int32, device=device), 2, 16)
    for head in range(2):
        pages = selected[0, head, : counts[0, head]]
        assert pages[-1] == 12 and pages[0] >= 0 and (pages.diff() > 0).all()
    counts = select_gaussian(mean, std, torch.tensor([200], dtype=torch.int32, device=device), 2, 16, margin=torch.inf)[
        1
    ]
    assert (counts == 13).all()


def test_rows_repeats_and_threads_change_no_bit(device, threads):
    seq_lens = [5000, 0, 77, 3000]
    moments, lens = (
        make_moments(seq_lens, 8, 16, device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
    )
    want = select_gaussian(*moments, lens, 2, 16)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(select_gaussian(*moments, lens, 2, 16), want)
    for row in range(4):
        got = select_gaussian(*(x[row : row + 1] for x in moments), lens[row : row + 1], 2, 16)
        assert_same_bits(got, [x[row : row + 1] for x in want])
