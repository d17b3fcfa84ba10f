"""What the tests share: devices, the case list, caches of known content, and the tolerance rule.

The rule: the error of a kernel is at most twice the error of the same formula in PyTorch at the precision in
which the kernel accumulates (fp32), plus half an ulp of the output's type at the output's scale. Both are errors
against float64 on the inputs as rounded to the kernel's type, and each is the largest over a case.
"""

import functools
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import entmaxkv
from entmaxkv import reference

# Tests import bench from here, and the package from wherever PYTHONPATH says: the emulation's is a copy.
sys.path.append(str(Path(__file__).resolve().parents[1]))
if "ENTMAXKV_EMULATION" in os.environ:
    assert Path(entmaxkv.__file__).is_relative_to(os.environ["ENTMAXKV_EMULATION"]), entmaxkv.__file__

settings.register_profile("entmaxkv", derandomize=True, deadline=None, max_examples=20, database=None)
settings.load_profile("entmaxkv")

UNIT = 2.0**-24  # half the spacing of fp32 numbers at 1


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """One configuration; alpha None stands for a different alpha in each head."""

    dtype: torch.dtype
    alpha: float | None
    head_dim: int
    page_size: int
    kv_heads: int
    group: int
    transposed: bool
    alibi: bool
    scale: float | None

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"alpha{self.alpha:.4g}" if self.alpha else "alphas"]
        words += [f"dim{self.head_dim}", f"page{self.page_size}", f"heads{self.kv_heads}x{self.group}"]
        words += ["transposed"] * self.transposed + ["alibi"] * self.alibi + [f"scale{self.scale}"] * bool(self.scale)
        return "-".join(words)

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def seq_lens(self) -> list[int]:
        page = self.page_size
        return [0, 1, page - 1, page, page + 1, 5 * page + 3]

    def cache(self, device: str, seed: int = 0) -> "Cache":
        return make_cache(
            self.seq_lens,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            device=device,
            transposed=self.transposed,
            seed=seed,
        )

    def query(self, device: str, seed: int = 1) -> Tensor:
        return make_query(len(self.seq_lens), self.q_heads, self.head_dim, self.dtype, device, seed)

    def slopes(self, device: str) -> Tensor | None:
        return make_slopes(self.q_heads, device) if self.alibi else None

    def head_alpha(self, device: str) -> Tensor | None:
        return make_alphas(self.q_heads, device) if self.alpha is None else None


# Every pair of values of two columns occurs, which test_cases.py checks.
CASES = [
    Case(torch.float32, 1.0, 33, 8, 2, 3, True, True, 0.3),
    Case(torch.float32, 1.0, 80, 32, 1, 8, True, True, -0.2),
    Case(torch.float32, 1.0, 96, 128, 1, 1, True, False, None),
    Case(torch.float32, 1.0, 256, 8, 1, 3, True, True, -0.2),
    Case(torch.float32, 1.25, 80, 32, 2, 3, False, False, None),
    Case(torch.float32, 1.25, 128, 32, 3, 1, True, False, None),
    Case(torch.float32, 4 / 3, 256, 32, 2, 1, True, True, 0.3),
    Case(torch.float32, 1.5, 64, 32, 2, 8, True, False, None),
    Case(torch.float32, 1.5, 256, 64, 1, 3, True, False, 0.3),
    Case(torch.float32, 1.75, 33, 32, 3, 4, False, False, 0.3),
    Case(torch.float32, 1.75, 80, 128, 1, 3, False, True, 0.3),
    Case(torch.float32, 1.75, 128, 8, 3, 8, False, True, None),
    Case(torch.float32, 2.0, 64, 32, 2, 3, False, True, -0.2),
    Case(torch.float32, 2.0, 128, 128, 2, 1, True, False, 0.3),
    Case(torch.float32, None, 33, 128, 1, 4, True, True, -0.2),
    Case(torch.float32, None, 64, 128, 3, 1, True, True, 0.3),
    Case(torch.float32, None, 80, 16, 3, 8, False, False, -0.2),
    Case(torch.bfloat16, 1.0, 64, 64, 3, 3, True, False, None),
    Case(torch.bfloat16, 1.25, 33, 64, 1, 8, True, True, 0.3),
    Case(torch.bfloat16, 1.25, 64, 16, 1, 4, True, True, None),
    Case(torch.bfloat16, 4 / 3, 80, 64, 3, 1, False, False, 0.3),
    Case(torch.bfloat16, 1.5, 33, 128, 1, 8, False, True, -0.2),
    Case(torch.bfloat16, 1.75, 96, 64, 1, 4, True, True, -0.2),
    Case(torch.bfloat16, 1.75, 256, 32, 1, 8, False, False, None),
    Case(torch.bfloat16, 2.0, 33, 8, 1, 1, False, True, None),
    Case(torch.bfloat16, None, 128, 64, 2, 3, False, True, None),
    Case(torch.float16, 1.0, 128, 16, 1, 4, False, True, -0.2),
    Case(torch.float16, 1.25, 96, 8, 2, 4, True, True, None),
    Case(torch.float16, 1.25, 256, 128, 1, 1, True, True, -0.2),
    Case(torch.float16, 4 / 3, 33, 16, 3, 3, False, False, None),
    Case(torch.float16, 4 / 3, 64, 8, 2, 4, False, True, 0.3),
    Case(torch.float16, 4 / 3, 96, 8, 1, 8, True, True, -0.2),
    Case(torch.float16, 4 / 3, 128, 128, 1, 1, True, True, None),
    Case(torch.float16, 1.5, 80, 8, 3, 4, False, True, -0.2),
    Case(torch.float16, 1.5, 96, 16, 3, 3, True, True, 0.3),
    Case(torch.float16, 1.5, 128, 8, 3, 1, False, False, 0.3),
    Case(torch.float16, 1.75, 64, 16, 2, 1, True, True, -0.2),
    Case(torch.float16, 2.0, 80, 16, 3, 4, False, False, 0.3),
    Case(torch.float16, 2.0, 96, 64, 2, 8, False, False, -0.2),
    Case(torch.float16, 2.0, 256, 16, 3, 1, True, False, None),
    Case(torch.float16, None, 96, 32, 1, 8, True, True, 0.3),
    Case(torch.float16, None, 256, 8, 1, 4, True, False, None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass
class Cache:
    """The tensors that the ops take, and the tokens that they hold; all other memory is NaN."""

    k: list[Tensor]  # per row [tokens, kv_heads, head_dim]
    v: list[Tensor]
    k_pages: Tensor
    v_pages: Tensor
    k_min: Tensor
    k_max: Tensor
    k_mean: Tensor
    k_std: Tensor
    page_table: Tensor
    seq_lens: Tensor
    page_size: int

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_min, self.k_max, self.k_mean, self.k_std

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k_pages, self.v_pages, *self.statistics, self.page_table, self.seq_lens

    @property
    def lengths(self) -> list[int]:
        return self.seq_lens.tolist()

    def used(self, row: int) -> Tensor:
        """Physical pages of a row."""
        return self.page_table[row, : -(-self.lengths[row] // self.page_size)].long()

    def used_pages(self) -> Tensor:
        return torch.cat([self.used(row) for row in range(len(self.k))])

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None, sketch: Iterable[Tensor] = ()) -> None:
        torch.ops.entmaxkv.append_kv(k, v, lengths, *self.tensors, *sketch)

    def blank_sketch(self) -> tuple[Tensor, Tensor]:
        """Codes and norms of 77."""
        pages, kv_heads, _, head_dim = self.k_pages.shape
        new = functools.partial(torch.full, fill_value=77, dtype=torch.uint8, device=self.k_pages.device)
        row_bytes = -(-head_dim // 64) * 16
        return new((pages, kv_heads, 2, self.page_size, row_bytes)), new((pages, kv_heads, 3, self.page_size))

    def sketch(self) -> tuple[Tensor, Tensor]:
        sketch = self.blank_sketch()
        torch.ops.entmaxkv.build_sketch(self.k_pages, self.page_table, self.seq_lens, *sketch)
        return sketch

    def dense(self, q: Tensor, alpha: float = 1.5, scale: float | None = None, **options: Tensor | None) -> "Decoded":
        table = self.page_table, self.seq_lens
        return Decoded(*torch.ops.entmaxkv.dense_decode(q, self.k_pages, self.v_pages, *table, alpha, scale, **options))

    def sparse(
        self,
        q: Tensor,
        selected: Tensor,
        counts: Tensor,
        alpha: float = 1.5,
        scale: float | None = None,
        **options: Tensor | bool | None,
    ) -> "Decoded":
        inputs = q, self.k_pages, self.v_pages, self.page_table, self.seq_lens, selected, counts
        return Decoded(*torch.ops.entmaxkv.sparse_decode(*inputs, alpha, scale, **options))

    def row(self, row: int) -> "Cache":
        """A batch of one row over the same pool."""
        table = self.page_table[row : row + 1], self.seq_lens[row : row + 1]
        pool = self.k_pages, self.v_pages, *self.statistics
        return Cache(self.k[row : row + 1], self.v[row : row + 1], *pool, *table, self.page_size)

    def permuted(self, seed: int = 7) -> "Cache":
        """The same logical content in other physical pages."""
        to = torch.randperm(len(self.k_pages), generator=torch.Generator().manual_seed(seed)).to(self.k_pages.device)
        pool = [torch.empty_like(x).index_copy_(0, to, x) for x in (self.k_pages, self.v_pages, *self.statistics)]
        return Cache(self.k, self.v, *pool, to.int()[self.page_table.long()], self.seq_lens.clone(), self.page_size)

    def clone(self) -> "Cache":
        return Cache(self.k, self.v, *(x.clone() for x in self.tensors), self.page_size)


class Decoded(NamedTuple):
    out: Tensor
    tau: Tensor
    support: Tensor
    tokens: Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def make_pages(k: list[Tensor], page_table: Tensor, page_size: int, pages: int, transposed: bool = False) -> Tensor:
    """A pool that holds each row of k under the page table, NaN elsewhere."""
    _, kv_heads, head_dim = k[0].shape
    if transposed:
        pool = k[0].new_full((pages, page_size, kv_heads, head_dim), torch.nan).transpose(1, 2)
    else:
        pool = k[0].new_full((pages, kv_heads, page_size, head_dim), torch.nan)
    for row, tokens in enumerate(k):
        for page, part in enumerate(tokens.split(page_size) if len(tokens) else ()):
            pool[page_table[row, page], :, : len(part)] = part.transpose(0, 1)
    return pool


def make_cache(
    seq_lens: list[int],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    transposed: bool = False,
    max_pages: int | None = None,
    seed: int = 0,
    k: list[Tensor] | None = None,
    v: list[Tensor] | None = None,
) -> Cache:
    """A cache in shuffled physical pages, with spare ones; normal keys and values unless given."""
    shapes = [(n, kv_heads, head_dim) for n in seq_lens]
    if k is None:
        k = [draw(*shape, seed=1000 * seed + row) for row, shape in enumerate(shapes)]
    if v is None:
        v = [draw(*shape, seed=1000 * seed + 500 + row) for row, shape in enumerate(shapes)]
    k, v = ([x.to(dtype).to(device) for x in rows] for rows in (k, v))
    max_pages = max_pages or -(-max(seq_lens) // page_size) + 2
    pages = len(seq_lens) * max_pages + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
    page_table = order[: len(seq_lens) * max_pages].view(len(seq_lens), max_pages)
    statistics = [torch.full((pages, kv_heads, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(4)]
    for row, tokens in enumerate(k):
        if len(tokens):
            used = page_table[row, : -(-len(tokens) // page_size)].long()
            values = *reference.page_bounds(tokens, page_size), *reference.page_moments(tokens, page_size)
            for statistic, value in zip(statistics, values, strict=True):
                statistic[used] = value.to(dtype)
    return Cache(
        k,
        v,
        make_pages(k, page_table, page_size, pages, transposed),
        make_pages(v, page_table, page_size, pages, transposed),
        *statistics,
        page_table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        page_size,
    )


def make_query(
    batch: int,
    q_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 1,
) -> Tensor:
    """Normal queries whose heads range from wide supports to narrow ones."""
    strength = torch.logspace(-1, 0.8, q_heads)[:, None]
    return (draw(batch, q_heads, head_dim, seed=seed) * strength).to(dtype).to(device)


def make_slopes(q_heads: int, device: str = "cpu") -> Tensor:
    """ALiBi slopes, one head without and the rest from 1/2 down."""
    slopes = 2.0 ** -torch.arange(q_heads, dtype=torch.float32)
    slopes[0] = 0
    return slopes.to(device)


def make_alphas(q_heads: int, device: str = "cpu") -> Tensor:
    return torch.tensor([1.5, 1.0, 2.0, 1.1, 4 / 3, 1.25, 1.75]).repeat(5)[:q_heads].to(device)


WRONG_ALPHAS = [1e8, math.inf, math.nan, 0.5, -1.0, 2.0000002, 0.99999994, -math.inf, 0.0]


def alpha_calls(head_alpha: Tensor, device: str) -> list[tuple]:
    """Calls of the ops that take head_alpha, for short lists and long ones: op, arguments."""
    calls: list[tuple] = []
    for lengths in ([0, 40, 300], [1500]):
        cache = make_cache(lengths, device=device)
        for x in cache.tensors[:6]:
            x.nan_to_num_()
        q = make_query(len(lengths), len(head_alpha), 64, device=device)
        pool, table = (cache.k_pages, cache.v_pages), (cache.page_table, cache.seq_lens)
        gaussian = torch.ops.entmaxkv.score_gaussian(q, *cache.statistics[2:], *table, cache.page_size)
        keep = [torch.ones(2, -(-n // cache.page_size), dtype=torch.bool) for n in lengths]
        options = 1.5, None, None, head_alpha
        calls += [
            ("dense_decode", q, *pool, *table, *options),
            ("sparse_decode", q, *pool, *table, *selection(keep, table[0].shape[1], device), *options),
            ("select_gaussian", *gaussian, table[1], 2, cache.page_size, 1.5, 0.99, 0.0, head_alpha),
            ("select_sketch", q, pool[0], *cache.sketch(), *table, *options),
            ("select_sketch", q, pool[0], *cache.sketch(), *table, *options, 4, 1.0, 20),
        ]
    return calls


WRONG_IDS = [-1, 10**6, 2**31 - 1, -(2**31)]


def hostile_calls(wrong: int | None, device: str) -> list[tuple]:
    """Decode calls for short lists, and for lists of more than 4096 tokens: op, arguments. If `wrong` is not None, it
    replaces a page id of row 0 or an index of its selection. Row 1 stays as it is."""
    calls: list[tuple] = []
    for lengths, alpha in itertools.product(([300, 40], [4500, 700]), (1.0, 1.5)):
        cache = make_cache(lengths, device=device)
        q = make_query(len(lengths), 4, 64, device=device)
        of_pages = [-(-n // cache.page_size) for n in lengths]
        pages = selection([torch.ones(2, n, dtype=torch.bool) for n in of_pages], max(of_pages), device)
        tokens = selection([torch.ones(2, n, dtype=torch.bool) for n in lengths], max(lengths), device)
        if wrong is not None:
            pages[0][0, 0, 7] = pages[0][0, 1, -1] = tokens[0][0, 0, 70] = tokens[0][0, 1, -1] = wrong
        inputs = q, cache.k_pages, cache.v_pages
        table = cache.page_table.clone()
        calls += [
            ("sparse_decode", *inputs, table.clone(), cache.seq_lens, *pages, alpha),
            ("sparse_decode", *inputs, table.clone(), cache.seq_lens, *tokens, alpha, None, None, None, True),
        ]
        if wrong is not None:
            table[0, 7] = wrong
        calls.append(("dense_decode", *inputs, table, cache.seq_lens, alpha))
    return calls


def disordered_calls(disorder: bool, device: str) -> list[tuple]:
    """Decode calls for long lists of pages: op, arguments. With disorder, row 0 begins with its last page, which is
    not full."""
    calls: list[tuple] = []
    for alpha, dtype in itertools.product((1.0, 1.5), (torch.float32, torch.bfloat16)):
        cache = make_cache([4498, 700], dtype=dtype, device=device)
        q = make_query(2, 4, 64, dtype, device)
        pages = selection([torch.ones(2, n, dtype=torch.bool) for n in (282, 44)], 282, device)
        if disorder:
            pages[0][0] = pages[0][0].roll(1, -1)
        calls.append(
            ("sparse_decode", q, cache.k_pages, cache.v_pages, cache.page_table, cache.seq_lens, *pages, alpha)
        )
    return calls


def check_hostile(good: tuple[Tensor, ...], wrong: tuple[Tensor, ...]) -> None:
    """Results of one of hostile_calls or disordered_calls, first without what is wrong."""
    assert wrong[0][0].isnan().all() and wrong[1][0].isnan().all() and not wrong[2][0].any()
    assert_same_bits([x[1] for x in wrong], [x[1] for x in good])


def check_wrong_alpha(call: tuple, good: tuple[Tensor, ...], wrong: tuple[Tensor, ...]) -> None:
    """Results of a call, and of the same one where alpha of head 1, the second of the first group, is none."""
    op = call[0]
    if op.endswith("decode"):
        out, tau, support, tokens = wrong
        filled = tokens[:, 0] > 0
        assert out[filled, 1].isnan().all() and tau[filled, 1].isnan().all() and not support[:, 1].any()
        assert not out[~filled].any() and torch.equal(tokens, good[3])
        for x, y in zip(wrong[:3], good[:3], strict=True):
            assert_same_bits([x[:, [0, 2, 3]]], [y[:, [0, 2, 3]]])
        return
    for x, y in zip(wrong[:2], good[:2], strict=True):
        assert_same_bits([x[:, 1:]], [y[:, 1:]])
    selected, counts = wrong[:2]
    assert (counts >= 0).all() and (counts <= selected.shape[2]).all()
    if op == "select_sketch":
        assert (wrong[2][:, 1] == 1).all()


def hard_selections(pages: int, group: int = 4) -> list[tuple[Tensor, Tensor, int, int, int]]:
    """Arguments of select_pages in which ties and special numbers abound, and rows are of all lengths."""
    scores = draw(2, 2 * group, pages)
    scores[1] = (scores[1] * 4).round()
    scores[:, 3] = torch.nan
    scores[:, 5] = -torch.inf
    scores[:, 6] = scores[:, 6].abs() * 1e-42
    special = draw(2, 2 * group, pages) * torch.logspace(-1, 1, 2 * group)[:, None]
    special[0, 0, ::7], special[0, 1, ::5], special[1, 2, 3:4] = torch.inf, torch.nan, torch.inf
    eighths = -(torch.arange(pages) % 8).float().expand(8, 2 * group, -1).contiguous()  # 256 or 257 of 2049 are equal
    lengths = [min(n, pages * 16) for n in (0, 1, 16, 17, pages * 2 - 1, pages * 2 + 1, pages * 16 - 5, pages * 16)]
    full = [pages * 16, pages * 16 - 5]
    budgets = (1, 16, 33, pages * 8, pages * 16 - 1, pages * 16, 10**9)
    return [
        (x, torch.tensor(seq_lens, dtype=torch.int32), 2, 16, budget)
        for x, seq_lens in ((scores, full), (special, full), (eighths, lengths))
        for budget in budgets
    ]


def selection(keep: list[Tensor], width: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Page masks, per row [kv_heads, pages], as the ops write them: ascending, padded with -1, and counts."""
    selected = torch.full((len(keep), len(keep[0]), width), -1, dtype=torch.int32)
    for row, head in itertools.product(range(len(keep)), range(len(keep[0]))):
        pages = keep[row][head].nonzero().flatten()
        selected[row, head, : len(pages)] = pages
    counts = torch.stack([mask.sum(-1).int().cpu() for mask in keep])
    return selected.to(device), counts.to(device)


def token_mask(pages: Tensor, page_size: int, seq_len: int) -> Tensor:
    """A page mask [kv_heads, pages] as a token mask [kv_heads, seq_len]."""
    return pages.repeat_interleave(page_size, 1)[:, :seq_len]


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors in a tuple of tuples, such as a `DecodeInfo` with its selection."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same_bits(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b)), f"tensor {index} differs in its bits"


def half_ulp(dtype: torch.dtype, scale: float) -> float:
    info = torch.finfo(dtype)
    return info.eps / 2 * max(scale, info.smallest_normal)


def orders(head_dim: int) -> list[Tensor]:
    """Orders in which a plain sum over coordinates can be taken: one alone may happen to round to almost nothing."""
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(head_dim), *(torch.randperm(head_dim, generator=generator) for _ in range(3))]


class Rule:
    """The tolerance rule over everything that was added to it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.error = self.plain_error = self.scale = 0.0

    def add(self, got: Tensor, plain: Sequence[Tensor], truth: Tensor) -> None:
        """Compares the kernel's result and PyTorch's, in each of its `orders`, with the truth, all of one shape."""
        assert got.dtype == self.dtype and got.shape == truth.shape
        if truth.numel():
            assert got.isfinite().all(), "result is not finite"
            self.error = max(self.error, (got.double() - truth).abs().max().item())
            self.plain_error = max(self.plain_error, *((x.double() - truth).abs().max().item() for x in plain))
            self.scale = max(self.scale, truth.abs().max().item())

    def check(self) -> None:
        allowed = 2 * self.plain_error + half_ulp(self.dtype, self.scale)
        assert self.error <= allowed, (
            f"error {self.error:.3g} > {allowed:.3g}: twice {self.plain_error:.3g}, ulps at {self.scale:.3g}"
        )


def score_error(q: Tensor, k: Tensor, scale: float | None, alibi_slopes: Tensor | None) -> Tensor:
    """Bound on the rounding of an fp32 score: head_dim + 4 units of its terms' sizes. [q_heads, tokens]"""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    size = reference.scores(q.abs(), k.abs(), scale=abs(scale))
    if alibi_slopes is not None:
        size = size + reference.scores(torch.zeros_like(q), k, alibi_slopes=alibi_slopes).abs()
    return (k.shape[-1] + 4) * UNIT * size


def check_decode(
    cache: Cache,
    q: Tensor,
    got: Decoded,
    *,
    alpha: float = 1.5,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    head_alpha: Tensor | None = None,
    keep: list[Tensor] | None = None,
) -> None:
    """Compares a decode, over the kept pages or all, with the oracle: out by the rule, tau by score rounding.

    Scores that are off by e move tau by at most (alpha - 1) e, a mass that is off by m by at most (alpha - 1) m,
    as it falls with slope at least 1/(alpha - 1). A token that close to tau may count as support or not.
    """
    batch, q_heads, _ = q.shape
    kv_heads = cache.k_pages.shape[1]
    assert got.tau.dtype == torch.float32 and got.tau.shape == (batch, q_heads)
    assert got.support.dtype == torch.int32 and got.support.shape == (batch, q_heads)
    assert got.tokens.dtype == torch.int32 and got.tokens.shape == (batch, kv_heads)
    rule = Rule(q.dtype)
    a = (
        torch.full((q_heads,), alpha, dtype=torch.float64, device=q.device)
        if head_alpha is None
        else head_alpha.double()
    )
    for row, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        seen = torch.ones(kv_heads, len(k), dtype=torch.bool, device=q.device)
        if keep is not None:
            seen = token_mask(keep[row], cache.page_size, len(k))
        options = {"alpha": a, "scale": scale, "alibi_slopes": alibi_slopes, "keep": seen}
        out, _, tau = reference.attention(q[row], k, v, **options)
        plain = [
            reference.attention(q[row][:, order], k[..., order], v, **options, dtype=torch.float32)[0]
            for order in orders(q.shape[-1])
        ]
        rule.add(got.out[row], plain, out)
        assert torch.equal(got.tokens[row].long(), seen.sum(-1))

        seen = seen.repeat_interleave(q_heads // kv_heads, 0)
        empty = ~seen.any(-1)
        s = reference.scores(q[row], k, scale=scale, alibi_slopes=alibi_slopes).masked_fill(~seen, -torch.inf)
        error = score_error(q[row], k, scale, alibi_slopes).masked_fill(~seen, 0).amax(-1) if len(k) else 0 * tau
        softmax = a == 1
        z = torch.where(softmax, 1, a - 1)[:, None] * s
        slack = torch.where(softmax, 1, a - 1) * (error + 1e-6) + 4 * UNIT * tau.abs()
        off = (got.tau[row].double() - tau).abs()
        assert (off <= slack).all(), f"tau of row {row} is off by {off.tolist()}, allowed {slack.tolist()}"

        above = z - tau[:, None]
        # A weight below the smallest normal fp32 number may count as 0.
        tiny = torch.where(softmax, -126 * math.log(2), 2.0 ** (-126 * (a - 1)))
        least = (above > torch.where(softmax, tiny, tiny.maximum(2 * slack))[:, None]).sum(-1)
        most = (seen & (softmax[:, None] | (above > -2 * slack[:, None]))).sum(-1)
        least, most = (count.masked_fill(empty, 0) for count in (least, most))
        support = got.support[row]
        assert ((least <= support) & (support <= most)).all(), (
            f"support {support.tolist()} of row {row}: {least}..{most}"
        )
    rule.check()
