"""What only a GPU shows: streams, graphs, and sizes at which offsets, splits and wide supports matter."""

import copy
import dataclasses
import gc
from collections.abc import Iterable

import pytest
import torch
from conftest import (
    CUDA,
    WRONG_ALPHAS,
    WRONG_IDS,
    Cache,
    alpha_calls,
    assert_same_bits,
    check_decode,
    check_hostile,
    check_wrong_alpha,
    disordered_calls,
    draw,
    hard_selections,
    hostile_calls,
    make_cache,
    make_query,
)
from torch import Tensor

import entmaxkv

pytestmark = CUDA.marks
OPS = torch.ops.entmaxkv

SELECTORS = {
    "dense": None,
    "top pages": entmaxkv.TopPages(budget=512, dense_below=0),
    "gaussian": entmaxkv.Gaussian(dense_below=0),
    "key sketch": entmaxkv.KeySketch(dense_below=0),
    "key sketch, 100 tokens": entmaxkv.KeySketch(max_tokens=100, dense_below=0),
}
selectors = pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS)
large = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 60e9, reason="less than 60 GB of free GPU memory"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random_cache(
    seq_lens: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, strength: float = 1.0
) -> tuple[entmaxkv.PagedKVCache, Cache]:
    """A cache of normal keys and values, drawn and appended on the GPU, in shuffled pages; as the tests see it too."""
    cache = entmaxkv.PagedKVCache(len(seq_lens), max(seq_lens), kv_heads, head_dim, dtype=dtype, device="cuda")
    order = torch.randperm(len(cache.k_pages), generator=torch.Generator().manual_seed(0)).int()
    cache.page_table.copy_(order.view(cache.page_table.shape))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = len(seq_lens), max(seq_lens), kv_heads, head_dim
    k, v = (torch.randn(shape, dtype=dtype, device="cuda", generator=generator) for _ in range(2))
    k.mul_(strength)
    cache.append(k, v, torch.tensor(seq_lens, dtype=torch.int32, device="cuda"))
    statistics = cache.k_min, cache.k_max, cache.k_mean, cache.k_std
    rows = [[x[row, :n] for row, n in enumerate(seq_lens)] for x in (k, v)]
    pool = cache.k_pages, cache.v_pages, *statistics, cache.page_table, cache.seq_lens
    return cache, Cache(*rows, *pool, cache.page_size)


def clone(cache: entmaxkv.PagedKVCache) -> entmaxkv.PagedKVCache:
    copy = entmaxkv.PagedKVCache(
        cache.seq_lens.shape[0],
        cache.max_tokens,
        cache.kv_heads,
        cache.k_pages.shape[-1],
        dtype=cache.k_pages.dtype,
        device="cuda",
    )
    for name in ("k_pages", "v_pages", "k_min", "k_max", "k_mean", "k_std", "codes", "norms", "page_table", "seq_lens"):
        getattr(copy, name).copy_(getattr(cache, name))
    return copy


@large
@pytest.mark.parametrize("alpha", [1.0, 4 / 3, 1.5, 2.0])
@dtypes
def test_a_million_tokens(dtype, alpha):
    """Supports from a handful of tokens to most of the context, in one call."""
    _, cache = random_cache([2**20], 8, 128, dtype)
    q = draw(1, 32, 128, seed=1) * torch.logspace(-4.5, 1.2, 32)[:, None]
    q = q.to(dtype).cuda()
    got = cache.dense(q, alpha)
    check_decode(cache, q, got, alpha=alpha)
    if alpha > 1:
        assert got.support.min() < 10 and got.support.max() > 40_000
    assert_same_bits(cache.dense(q, alpha), got)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("head_dim", [64, 80, 100, 256])
@dtypes
def test_lists_of_many_tiles(dtype, head_dim, alpha):
    """Each warp goes through several tiles, whatever the layout of the rows."""
    _, cache = random_cache([200_000, 3000], 2, head_dim, dtype)
    q = make_query(2, 6, head_dim, dtype, "cuda")
    check_decode(cache, q, cache.dense(q, alpha), alpha=alpha)


@pytest.mark.parametrize("alpha", [1.0, 1.06, 1.5, [1.0, 1.2, 1.4, 1.5]], ids=str)
@pytest.mark.parametrize("tokens", [9000, 70_000, 170_000])
def test_neither_room_nor_other_rows_change_a_bit_of_wide_heads(tokens, alpha):
    """Their tokens are added up by as many blocks as the GPU has for each head: fewer, the more rows there are."""
    dtype = torch.bfloat16 if tokens > 100_000 else torch.float32
    _, cache = random_cache([tokens], 2, 64, dtype)
    q = make_query(1, 4, 64, dtype, "cuda") * 0.01
    heads = {"head_alpha": torch.tensor(alpha, device="cuda")} if isinstance(alpha, list) else {"alpha": alpha}
    got = cache.dense(q, **heads)
    assert got.support.min() > 1024
    roomy = torch.nn.functional.pad(cache.page_table, (0, 20_000 - cache.page_table.shape[1]))
    assert_same_bits(dataclasses.replace(cache, page_table=roomy).dense(q, **heads), got)
    for rows in (20, 50, 700):
        table, lengths = (x.expand(rows, *x.shape[1:]).contiguous() for x in (cache.page_table, cache.seq_lens))
        repeated = dataclasses.replace(cache, page_table=table, seq_lens=lengths)
        each = repeated.dense(q.expand(rows, -1, -1).contiguous(), **heads)
        for row in (0, rows - 1):
            assert_same_bits([x[row : row + 1] for x in each], got)


@large
@dtypes
def test_a_large_batch(dtype):
    seq_lens = [32768 - 500 * row for row in range(64)]
    _, cache = random_cache(seq_lens, 8, 128, dtype)
    q = make_query(64, 32, 128, dtype, "cuda")
    got = cache.dense(q)
    check_decode(cache, q, got)
    for row in (0, 31, 63):
        assert_same_bits(cache.row(row).dense(q[row : row + 1]), [x[row : row + 1] for x in got])


@pytest.mark.parametrize("pages", [1, 2, 1025, 2560, 2561, 5121, 10241, 20480, 65536, 65537, 131072])
def test_select_pages_chooses_what_the_cpu_chooses(pages):
    check_selections(pages)


@pytest.mark.parametrize("group", [4, 5, 17])
def test_select_pages_by_the_blocks_of_a_cluster(group):
    check_selections(10241, group)


def check_selections(pages: int, group: int = 4) -> None:
    for scores, seq_lens, *sizes in hard_selections(pages, group):
        want = OPS.select_pages(scores, seq_lens, *sizes)
        got = OPS.select_pages(scores.cuda(), seq_lens.cuda(), *sizes)
        assert_same_bits([x.cpu() for x in got], want)


@selectors
def test_no_step_waits(select):
    cache, _ = random_cache([1000, 20, 0], 2, 64, torch.bfloat16)
    q, k, v = (draw(3, *heads, 64, dtype=torch.bfloat16, device="cuda") for heads in ((8,), (1, 2), (1, 2)))
    cache.seq_lens.clamp_(max=500)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(256):
            cache.append(k, v)
            entmaxkv.decode(q, cache, select=select)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.seq_lens.tolist() == [756, 276, 256]


@selectors
def test_one_graph_serves_a_growing_cache(select):
    cache = entmaxkv.PagedKVCache(2, 5000, 2, 64, device="cuda")
    cache.append(*(draw(2, 1024, 2, 64, device="cuda", seed=seed) for seed in (0, 1)))
    steps = [draw(3200, 2, *heads, 64, device="cuda", seed=seed) for seed, heads in enumerate([(8,), (1, 2), (1, 2)])]
    eager = clone(cache)
    q, k, v = (x[0].clone() for x in steps)

    def step() -> Tensor:
        cache.append(k, v)
        return entmaxkv.decode(q, cache, select=select)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # a first call outside the capture
        cache.seq_lens.sub_(1)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(3200):
        for static, x in zip((q, k, v), steps, strict=True):
            static.copy_(x[i])
        graph.replay()
        eager.append(steps[1][i], steps[2][i])
        if i % 400 == 0 or i == 3199:
            assert_same_bits([out], [entmaxkv.decode(steps[0][i], eager, select=select)])
    assert cache.seq_lens.tolist() == [4224, 4224]
    assert_same_bits([cache.k_pages[:, :, 0], cache.k_mean], [eager.k_pages[:, :, 0], eager.k_mean])


@pytest.mark.parametrize("by_token", [False, True], ids=["top pages", "key sketch"])
def test_compile_with_graphs(by_token):
    cache = make_cache([1000, 300], page_size=16, device="cuda", max_pages=80)
    eager = cache.clone()
    cache_tensors, eager_tensors = ((*x.tensors, *x.sketch()) for x in (cache, eager))
    draws = [draw(8, 2, *heads, 64, device="cuda", seed=i) for i, heads in enumerate([(8,), (1, 2), (1, 2)])]

    def step(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        OPS.append_kv(k, v, None, *tensors)
        k_pages, v_pages, k_min, k_max, _, _, page_table, seq_lens, codes, norms = tensors
        if not by_token:
            return OPS.decode(q, k_pages, v_pages, k_min, k_max, page_table, seq_lens, 256) * 2
        selected, counts, _ = OPS.select_sketch(q, k_pages, codes, norms, page_table, seq_lens)
        read = page_table, seq_lens, selected, counts
        return OPS.sparse_decode(q, k_pages, v_pages, *read, by_token=True)[0] * 2

    for x in cache_tensors:
        torch._dynamo.mark_static_address(x)  # a graph may change them in place
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for q, k, v in zip(*draws, strict=True):
        got = compiled(q, k, v, *cache_tensors).clone()
        assert_same_bits([got], [step(q, k, v, *eager_tensors)])
    assert cache.lengths == [1008, 308]
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


@selectors
def test_neither_other_rows_nor_another_run_change_a_bit(select):
    cache, _ = random_cache([70_000, 0, 3000, 1], 2, 64, torch.bfloat16)
    q = make_query(4, 8, 64, torch.bfloat16, "cuda")

    def decode(q: Tensor, cache: entmaxkv.PagedKVCache) -> list[Tensor]:
        out, info = entmaxkv.decode(q, cache, select=select, return_info=True)
        return [out, info.tau, info.support, info.tokens]

    want = decode(q, cache)
    assert_same_bits(decode(q, cache), want)
    for row in range(4):
        one, alone = slice(row, row + 1), copy.copy(cache)
        alone.batch, alone.page_table, alone.seq_lens = 1, cache.page_table[one], cache.seq_lens[one]
        assert_same_bits(decode(q[one], alone), [x[one] for x in want])


@selectors
def test_launches_wait_for_those_before_them(select):
    """A chain of ops gives the same bits as one that waits after each op."""
    cache, _ = random_cache([20_000, 300], 2, 64, torch.bfloat16)
    steps = [draw(32, 2, *heads, 64, dtype=torch.bfloat16, device="cuda") for heads in ((8,), (1, 2), (1, 2))]
    cache.seq_lens.sub_(32)
    slow = clone(cache)
    chain, waiting = [], []
    for q, k, v in zip(*steps, strict=True):
        cache.append(k, v)
        chain.append(entmaxkv.decode(q, cache, select=select))
    for q, k, v in zip(*steps, strict=True):
        slow.append(k, v)
        torch.cuda.synchronize()
        waiting.append(entmaxkv.decode(q, slow, select=select))
        torch.cuda.synchronize()
    assert_same_bits(chain, waiting)


@selectors
def test_memory_does_not_grow(select):
    cache = entmaxkv.PagedKVCache(1, 4096, 2, 64, dtype=torch.bfloat16, device="cuda")
    q, k, v = (draw(1, *heads, 64, dtype=torch.bfloat16, device="cuda") for heads in ((8,), (1, 2), (1, 2)))
    gc.collect()
    for step in range(10_000):
        if step == 10:
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        cache.append(k, v)
        entmaxkv.decode(q, cache, select=select)
        if step % 4000 == 3999:
            cache.seq_lens.zero_()
    assert torch.cuda.memory_allocated() <= before[0] and torch.cuda.memory_reserved() <= before[1]


@selectors
def test_work_is_ordered_on_the_current_stream(select):
    cache, _ = random_cache([1000, 20], 2, 64, torch.float32)
    q, k, v = (draw(2, *heads, 64, device="cuda") for heads in ((8,), (1, 2), (1, 2)))
    expected = clone(cache)
    expected.seq_lens.sub_(1)
    expected.append(k, v)
    want = entmaxkv.decode(q, expected, select=select)
    cache.seq_lens.sub_(1)
    late = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # all is done on the default one
        torch.cuda._sleep(10**8)
        for x, y in zip(late, (q, k, v), strict=True):
            x.copy_(y)
        cache.append(*late[1:])
        got = entmaxkv.decode(late[0], cache, select=select).clone()
        torch.cuda.current_stream().synchronize()
    assert_same_bits([got], [want])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@selectors
def test_the_device_of_the_tensors_counts(select):
    outs = []
    for device in ("cuda:0", "cuda:1"):
        cache = entmaxkv.PagedKVCache(2, 1000, 2, 64, device=device)
        cache.append(*(draw(2, 900, 2, 64, device=device, seed=seed) for seed in (0, 1)))
        outs.append(entmaxkv.decode(draw(2, 8, 64, device=device), cache, select=select).cpu())
        assert torch.cuda.current_device() == 0
    assert_same_bits(outs[:1], outs[1:])


def test_a_failed_launch_is_named():
    rows = 2**16  # more than a grid has room for in its last dimension
    q = torch.zeros(rows, 1, 8, device="cuda")
    k_min = torch.zeros(1, 1, 8, device="cuda")
    page_table, seq_lens = (torch.zeros(rows, *n, dtype=torch.int32, device="cuda") for n in ((1,), ()))
    with pytest.raises(RuntimeError, match="entmaxkv::score_pages: kernel launch failed: "):
        OPS.score_pages(q, k_min, k_min, page_table, seq_lens, 16)
    assert OPS.score_pages(q[:4], k_min, k_min, page_table[:4], seq_lens[:4], 16).isneginf().all()


def test_lengths_beyond_the_page_table_are_cut():
    """On a GPU nothing looks at lengths before a kernel does; it stays within the page table."""
    cache, q = make_cache([64, 40], page_size=16, device="cuda", max_pages=4), make_query(2, 4, 64, device="cuda")
    want = cache.dense(q)
    cache.seq_lens[0] = 1000
    assert_same_bits([x[0] for x in cache.dense(q)], [x[0] for x in want])
    cache.append(*(draw(2, 1, 2, 64, device="cuda") for _ in range(2)))
    assert cache.lengths == [64, 41]


@pytest.mark.parametrize("alpha", WRONG_ALPHAS, ids=str)
def test_a_wrong_alpha_of_a_head_ends_in_nan(alpha):
    """Nobody has looked at head_alpha: its head has no result, selections end, other heads are what they were."""
    good, wrong = (
        alpha_calls(torch.tensor([1.5, value, 1.0, 4 / 3], device="cuda"), "cuda") for value in (1.75, alpha)
    )
    for call, other in zip(good, wrong, strict=True):
        results = [getattr(OPS, op)(*arguments) for op, *arguments in (call, other)]
        torch.cuda.synchronize()
        check_wrong_alpha(call, *results)


def results_of(calls: Iterable[tuple]) -> list[tuple[Tensor, ...]]:
    results = [getattr(OPS, op)(*arguments) for op, *arguments in calls]
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("wrong", WRONG_IDS)
def test_a_page_that_is_not_there_makes_its_row_nan(wrong):
    for calls in zip(hostile_calls(None, "cuda"), hostile_calls(wrong, "cuda"), strict=True):
        check_hostile(*results_of(calls))


def test_a_page_listed_before_others_makes_its_row_nan():
    for calls in zip(disordered_calls(False, "cuda"), disordered_calls(True, "cuda"), strict=True):
        check_hostile(*results_of(calls))
