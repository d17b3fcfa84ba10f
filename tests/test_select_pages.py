"""select_pages: the oracle's choice to the page, given the same scores."""

import pytest
import torch
from conftest import assert_same_bits, draw, make_cache, make_query, selection
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entmaxkv import reference

select_pages = torch.ops.entmaxkv.select_pages


def page_count(seq_len: int, page_size: int) -> int:
    return -(-seq_len // page_size)


def check(scores: Tensor, seq_lens: list[int], kv_heads: int, page_size: int, budget: int) -> None:
    max_pages = scores.shape[2]
    got = select_pages(
        scores, torch.tensor(seq_lens, dtype=torch.int32, device=scores.device), kv_heads, page_size, budget
    )
    keep = []
    for row, n in enumerate(seq_lens):
        used = page_count(n, page_size)
        if n:
            keep.append(reference.select_pages(scores[row, :, :used], n, kv_heads, page_size, budget))
        else:
            keep.append(torch.zeros(kv_heads, 0, dtype=torch.bool))
    width = min(max_pages, page_count(budget, page_size))
    assert_same_bits(got, selection(keep, width, scores.device.type))
    for row, n in enumerate(seq_lens):
        last = reference.page_lengths(n, page_size)[-1:] or [0]
        tokens = (got[1][row].long() * page_size - page_size + last[0]).clamp(min=0)
        assert (tokens <= max(budget, last[0])).all()


def make_scores(seq_lens: list[int], q_heads: int, page_size: int, device: str, seed: int = 0) -> Tensor:
    """Normal scores as score_pages writes them: -inf behind the last page."""
    used = torch.tensor([page_count(n, page_size) for n in seq_lens])
    max_pages = int(used.max()) + 2
    scores = draw(len(seq_lens), q_heads, max_pages, seed=seed) * torch.logspace(-1, 1, q_heads)[:, None]
    return scores.masked_fill(torch.arange(max_pages) >= used[:, None, None], -torch.inf).to(device)


PAGE = 16
BUDGETS = [
    1,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    2 * PAGE,
    5 * PAGE - 1,
    5 * PAGE,
    5 * PAGE + 1,
    40 * PAGE,
    10**9,
    2**40,
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 8), (2, 3), (1, 17)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
def test_budgets_and_groups(device, budget, heads):
    kv_heads, group = heads
    seq_lens = [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, 5 * PAGE + 1, 39 * PAGE + 3]
    check(make_scores(seq_lens, kv_heads * group, PAGE, device), seq_lens, kv_heads, PAGE, budget)


@pytest.mark.parametrize("page_size", [8, 32, 64, 128])
def test_page_sizes(device, page_size):
    seq_lens = [page_size - 1, page_size, 50 * page_size + 5]
    check(make_scores(seq_lens, 8, page_size, device), seq_lens, 2, page_size, 9 * page_size + 6)


@pytest.mark.parametrize("pages", [63, 64, 65, 255, 256, 257, 1023, 1025, 4096, 8191])
def test_many_pages(device, pages):
    seq_lens = [pages * PAGE, pages * PAGE - 7]
    for budget in (PAGE, 100 * PAGE, (pages - 1) * PAGE):
        check(make_scores(seq_lens, 8, PAGE, device), seq_lens, 2, PAGE, budget)


@pytest.mark.parametrize(
    "kind", ["equal", "two values", "rising", "falling", "one best", "zeros of both signs", "huge"]
)
def test_hard_scores(device, kind):
    pages = 300
    scores = {
        "equal": torch.full((pages,), 3.25),
        "two values": draw(pages).sign(),
        "rising": torch.arange(pages) * 1.0,
        "falling": -torch.arange(pages) * 1.0,
        "one best": (torch.arange(pages) == 77) * 1e4,
        "zeros of both signs": draw(pages).sign() * 0.0,
        "huge": draw(pages) * 1e30,
    }[kind].expand(1, 4, pages)
    for budget in (40, 50 * PAGE, 299 * PAGE):
        check(scores.contiguous().to(device), [pages * PAGE - 2], 2, PAGE, budget)


def test_pages_rank_by_their_share_in_the_softmax_of_a_head(device):
    """As far as exp and log are linear between powers of two, against float64."""
    pages, allowed = 500, 0.12
    scores = make_scores([pages * PAGE], 6, PAGE, device)[..., :pages].contiguous()
    lens = torch.tensor([pages * PAGE], dtype=torch.int32, device=device)
    share = scores[0].double().log_softmax(-1).view(2, 3, pages).amax(1)
    for kept in (2, 11, 101, 401):
        selected = select_pages(scores, lens, 2, PAGE, kept * PAGE)[0][0, :, :-1].long()
        worst = share.gather(1, selected).amin(1)
        rest = share[:, :-1].scatter(1, selected, -torch.inf).amax(1)
        assert (worst > rest - allowed).all()


def test_a_head_that_cannot_tell_its_pages_apart_does_not_crowd_out_one_that_can(device):
    pages = 300
    alike, certain = draw(pages) * 0.1, draw(pages, seed=1)
    certain[[7, 150]] = torch.tensor([9.0, 8.0])
    scores = torch.stack([alike, certain])[None].to(device)
    selected, _ = select_pages(scores, torch.tensor([pages * PAGE], dtype=torch.int32, device=device), 1, PAGE, 48)
    assert selected[0, 0].tolist() == [7, 150, pages - 1]


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (2, 2), (1, 5)]),
    st.sampled_from([8, 16]),
    st.integers(1, 800),
    st.sampled_from([1.0, 0.01]),
    st.integers(0, 999),
)
def test_agrees_with_the_oracle_ties_included(device, seq_lens, heads, page_size, budget, step, seed):
    kv_heads, group = heads
    scores = make_scores(seq_lens, kv_heads * group, page_size, device, seed)
    check((scores / step).round() * step, seq_lens, kv_heads, page_size, budget)


def test_agrees_with_the_oracle_on_scored_pages(device):
    cache = make_cache([2000, 0, 333, 16], page_size=PAGE, device=device)
    q = make_query(4, 8, 64, device=device)
    scores = torch.ops.entmaxkv.score_pages(q, cache.k_min, cache.k_max, cache.page_table, cache.seq_lens, PAGE)
    check(scores, cache.lengths, 2, PAGE, 256)


def test_scores_behind_the_last_page_do_not_count(device):
    seq_lens = [100, 16]
    scores = make_scores(seq_lens, 4, PAGE, device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    want = select_pages(scores, lens, 2, PAGE, 48)
    for value in (torch.nan, torch.inf):
        assert_same_bits(select_pages(scores.masked_fill(scores == -torch.inf, value), lens, 2, PAGE, 48), want)


def test_nan_scores_give_a_valid_selection(device):
    seq_lens = [200, 200]
    scores = make_scores(seq_lens, 8, PAGE, device)
    scores[0, 1] = torch.nan
    selected, counts = select_pages(scores, torch.tensor(seq_lens, dtype=torch.int32, device=device), 2, PAGE, 64)
    assert (counts == 4).all()
    assert (selected >= 0).all() and (selected[..., -1] == 12).all() and (selected.diff(dim=-1) > 0).all()
    assert (selected < 13).all()


def test_rows_repeats_and_threads_change_no_bit(device, threads):
    seq_lens = [5000, 0, 77, 3000]
    scores, lens = (
        make_scores(seq_lens, 8, PAGE, device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
    )
    want = select_pages(scores, lens, 2, PAGE, 512)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same_bits(select_pages(scores, lens, 2, PAGE, 512), want)
    for row in range(4):
        got = select_pages(scores[row : row + 1], lens[row : row + 1], 2, PAGE, 512)
        assert_same_bits(got, [x[row : row + 1] for x in want])
