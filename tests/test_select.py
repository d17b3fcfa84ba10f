"""Selectors of a user's own, and what is said to one that is none."""

import types

import pytest
import torch
from conftest import assert_same_bits, draw, make_alphas, make_query, make_slopes, tensors_in

import entmaxkv
from entmaxkv import Scoring, Selection


class Pages:
    """Reads the pages that it is told, in every row and head."""

    needs = frozenset()

    def __init__(self, *pages, dense_up_to=0):
        self.pages, self.room = pages, dense_up_to

    def dense_up_to(self, device_type):
        return self.room

    def select(self, q, cache, scoring):
        selected = torch.tensor(self.pages, dtype=torch.int32, device=q.device).repeat(len(q), cache.kv_heads, 1)
        return Selection(selected, torch.full(selected.shape[:2], len(self.pages), dtype=torch.int32, device=q.device))


@pytest.fixture
def cache(device):
    cache = entmaxkv.PagedKVCache(2, 96, 2, 64, device=device)
    cache.append(draw(2, 96, 2, 64, device=device), draw(2, 96, 2, 64, device=device, seed=1))
    return cache


def test_a_selector_of_ones_own(device, cache):
    q = make_query(2, 8, 64, device=device)
    out, info = entmaxkv.decode(q, cache, select=Pages(1, 4), return_info=True)
    assert info.tokens.tolist() == [[32, 32], [32, 32]] and info.selection.selected.tolist() == [[[1, 4]] * 2] * 2
    pool = cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens
    want = torch.ops.entmaxkv.sparse_decode(q, *pool, *info.selection[:2])
    assert_same_bits((out, *info[:3]), want)
    dense = entmaxkv.decode(q, cache, return_info=True)
    got = entmaxkv.decode(q, cache, select=Pages(1, dense_up_to=96), return_info=True)
    assert got[1].selection is None
    assert_same_bits(tensors_in(got), tensors_in(dense))


def test_it_is_told_how_the_step_scores(device, cache):
    seen = []

    class Sees(Pages):
        def select(self, q, cache, scoring):
            seen.append(scoring)
            return super().select(q, cache, scoring)

    alphas, slopes = make_alphas(8, device), make_slopes(8, device)
    for alpha in (2, alphas):
        entmaxkv.decode(
            make_query(2, 8, 64, device=device), cache, alpha=alpha, scale=0.3, alibi_slopes=slopes, select=Sees(0)
        )
    assert [s.number for s in seen] == [2.0, 1.5] and seen[0].per_head is None and seen[1].per_head is alphas
    assert all(s.scale == 0.3 and s.alibi_slopes is slopes for s in seen)


def without(member):
    return types.SimpleNamespace(
        **{name: getattr(Pages(0), name) for name in ("needs", "dense_up_to", "select") if name != member}
    )


def returning(value):
    selector = Pages(0)
    selector.select = lambda q, cache, scoring: value
    return selector


COUNTS = torch.ones(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("select", "text"),
    [
        (Pages, r"decode: select: expected a selector such as KeySketch\(\), or None, got .*, a class"),
        (without("needs"), r"decode: select: expected a selector .* got .*, without needs"),
        (without("select"), r"decode: select: expected a selector .* got .*, without select\(\)"),
        (without("dense_up_to"), r"decode: select: expected a selector .* got .*, without dense_up_to\(\)"),
        (returning((COUNTS[..., None], COUNTS)), r"Pages.select: expected a Selection, got a tuple"),
        (returning(None), r"Pages.select: expected a Selection, got None"),
        (returning(Selection([0], COUNTS)), r"Pages.select: expected a tensor selected, got \[0\]"),
        (returning(Selection(COUNTS[..., None], None)), r"Pages.select: expected a tensor counts, got None"),
        (
            returning(Selection(COUNTS[..., None], COUNTS, True, 0.5)),
            r"Pages.select: expected a tensor delta_bound \[2, 8\] float32, got 0.5",
        ),
        (
            returning(Selection(COUNTS[..., None], COUNTS, True, torch.zeros(3))),
            r"Pages.select: expected a tensor delta_bound \[2, 8\] float32, got a tensor \[3\] float32",
        ),
        (returning(Selection(COUNTS[..., None], COUNTS, "no")), r"Pages.select: expected a bool by_token, got 'no'"),
        (Pages(0, dense_up_to=None), r"Pages.dense_up_to: expected a number of tokens, at least 0, got None"),
    ],
    ids=[
        "class",
        "no needs",
        "no select",
        "no dense_up_to",
        "a tuple",
        "None",
        "selected",
        "counts",
        "delta_bound",
        "shape of delta_bound",
        "by_token",
        "room",
    ],
)
def test_says_what_is_wrong_with_a_selector(select, text):
    cache = entmaxkv.PagedKVCache(2, 16, 2, 64)
    with pytest.raises(ValueError, match=f"^{text}"):
        entmaxkv.decode(make_query(2, 8, 64), cache, select=select)


@pytest.mark.parametrize("needs", ["minmax", {"bounds"}, ["sketch"], None], ids=str)
def test_a_cache_cannot_keep_what_it_does_not_know(needs):
    selector = Pages(0)
    selector.needs = needs
    with pytest.raises(ValueError, match=r"^It: select: Pages.needs: expected a set of any of minmax, moments, sketch"):
        entmaxkv.select.kept_for("It", selector)


@pytest.mark.parametrize("select", [entmaxkv.TopPages(), entmaxkv.Gaussian(), entmaxkv.KeySketch()], ids=str)
def test_a_selector_takes_a_scoring(select, cache):
    with pytest.raises(ValueError, match=rf"^{type(select).__name__}: scoring: expected a Scoring, got 1.5"):
        select.select(make_query(2, 8, 64), cache, 1.5)


def test_a_cache_without_what_a_selector_needs_is_refused(device):
    cache = entmaxkv.PagedKVCache(2, 16, 2, 64, sketch=False, device=device)
    selector = Pages(0)
    selector.needs = frozenset({"sketch"})
    with pytest.raises(ValueError, match=r"^Pages: cache: expected a key sketch, got a cache made with sketch=False"):
        entmaxkv.decode(make_query(2, 8, 64, device=device), cache, select=selector)


def test_what_a_selector_says_of_the_others_is_a_weight(device, cache):
    """Its bound is taken for what a weight can be; NaN says nothing."""
    said = torch.tensor([[0.0, 0.5, 1.0, 2.0, torch.inf, -1.0, torch.nan, 0.25]] * 2, device=device)
    counts = COUNTS.to(device)
    selector = returning(Selection(counts[..., None], counts, by_token=True, delta_bound=said))
    _, info = entmaxkv.decode(make_query(2, 8, 64, device=device), cache, select=selector, return_info=True)
    assert info.delta_bound[0].tolist() == [0, 0.5, 1, 1, 1, 0, 1, 0.25]


def test_a_cache_keeps_what_selectors_need(cache):
    ways = entmaxkv.TopPages(), entmaxkv.Gaussian(), entmaxkv.KeySketch(), Pages(0), None
    kept = [[name for name, wanted in entmaxkv.select.kept_for("It", way).items() if wanted] for way in ways]
    assert kept == [["minmax"], ["moments"], ["sketch"], [], []]
    for need, names in (("minmax", "k_min k_max"), ("moments", "k_mean k_std"), ("sketch", "codes norms")):
        tensors = cache.kept(need, by="It")
        assert all(x is getattr(cache, name) for x, name in zip(tensors, names.split(), strict=True))
        with pytest.raises(ValueError, match=f"^It: cache: expected .*, got a cache made with {need}=False"):
            entmaxkv.PagedKVCache(1, 16, 1, 64, **{need: False}).kept(need, by="It")


def test_scoring_is_checked_where_it_is_made():
    with pytest.raises(ValueError, match=r"^Scoring: alpha: expected a number or a tensor \[q_heads\], got '1.5'"):
        Scoring(alpha="1.5")
    with pytest.raises(TypeError, match="positional"):
        Scoring(1.5)


def test_numbers_shared_with_the_kernels_are_what_they_keep_to():
    """Where an op takes a size or not, and what a cache allocates."""
    numbers = entmaxkv.ops.CONSTANTS
    for head_dim in (1, numbers.sketch_block, numbers.sketch_block + 1, numbers.max_head_dim):
        for page_size in (numbers.min_page_size, numbers.max_page_size):
            cache = entmaxkv.PagedKVCache(1, 1, 1, head_dim, page_size=page_size)
            cache.append(torch.randn(1, 1, 1, head_dim), torch.randn(1, 1, 1, head_dim))
    table = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for head_dim, page_size in (
        (numbers.max_head_dim + 1, 16),
        (64, numbers.min_page_size // 2),
        (64, 2 * numbers.max_page_size),
    ):
        q = torch.zeros(1, 1, head_dim)
        with pytest.raises(RuntimeError, match=r"head_dim|page_size"):
            torch.ops.entmaxkv.score_pages(q, q, q, *table, page_size)
