"""A process killed while it appends: each row has its old length or its new one, and what it shows is whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Cache, assert_same_bits, check_decode, make_cache, make_query

APPENDS = 400
BATCH, KV_HEADS, HEAD_DIM, PAGE_SIZE, MAX_PAGES = 3, 2, 64, 8, 700

# The parent maps the same files. Forked children start at once, where a fresh interpreter would take seconds.
CHILD = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import torch
from test_interrupted_append import APPENDS, attach, chunk
torch.set_num_threads(1)
cache, chunks = attach(sys.argv[1]), [chunk(step) for step in range(APPENDS)]
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        for each in chunks:
            cache.append(*each)
        signal.pause()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def chunk(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and lengths of one append; every number tells its step, row and place."""
    lengths = torch.tensor([1 + step % 3, step % 2, 1 + 5 * (step % 5)], dtype=torch.int32) % 12
    place = torch.arange(BATCH * 11 * KV_HEADS * HEAD_DIM, dtype=torch.float32).view(BATCH, 11, KV_HEADS, HEAD_DIM)
    return torch.sin(place + 0.37 * step), torch.cos(place * 3 + step), lengths


def history() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Keys and values per row of all appends, and the lengths [APPENDS + 1, BATCH] after each."""
    k, v, lengths = zip(*(chunk(step) for step in range(APPENDS)), strict=True)
    rows = [
        [torch.cat([x[row, : n[row]] for x, n in zip(steps, lengths, strict=True)]) for row in range(BATCH)]
        for steps in (k, v)
    ]
    return *rows, torch.cat([torch.zeros(1, BATCH), torch.stack(lengths).cumsum(0)]).long()


def attach(folder: str) -> Cache:
    """The cache in shared files, its page table a fixed shuffle."""
    pages = BATCH * MAX_PAGES

    def shared(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return torch.from_file(os.path.join(folder, name), shared=True, size=size, dtype=dtype).view(shape)

    pool = [shared(name, pages, KV_HEADS, PAGE_SIZE, HEAD_DIM) for name in ("k_pages", "v_pages")]
    statistics = [shared(name, pages, KV_HEADS, HEAD_DIM) for name in ("k_min", "k_max", "k_mean", "k_std")]
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(BATCH, MAX_PAGES)
    return Cache([], [], *pool, *statistics, table, shared("seq_lens", BATCH, dtype=torch.int32), PAGE_SIZE)


@pytest.fixture(scope="module")
def past() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    return history()


def test_every_kill_leaves_a_whole_cache(tmp_path, past):
    k, v, lengths = past
    cache = attach(str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    moments, seen, victim = random.Random(0), set(), 0
    q = make_query(BATCH, 4, HEAD_DIM)
    try:
        # On a busy machine a child may run to its end before its parent wakes to kill it: such kills prove nothing
        # and are not counted.
        for _ in range(500):
            if len(seen) == 30:
                break
            for x in cache.tensors[:6]:
                x.fill_(torch.nan)
            cache.seq_lens.zero_()
            child.stdin.write("\n")
            child.stdin.flush()
            victim = int(child.stdout.readline())
            moment, give_up = lengths[moments.randrange(APPENDS)].sum(), time.monotonic() + 60
            while cache.seq_lens.sum() < moment:
                assert time.monotonic() < give_up, "the child hangs"
            time.sleep(moments.uniform(0, 1e-4))
            os.kill(victim, signal.SIGKILL)
            victim = 0
            assert child.stdout.readline() == "gone\n"
            check_visible(cache, k, v, lengths, q)
            if 0 < cache.seq_lens.sum() < lengths[-1].sum():
                seen.add(tuple(cache.lengths))
    finally:
        if victim:
            os.kill(victim, signal.SIGKILL)
        child.stdin.close()
        child.wait()
    assert len(seen) == 30, "the kills came too early or too late to prove anything"


def check_visible(
    cache: Cache, k: list[torch.Tensor], v: list[torch.Tensor], lengths: torch.Tensor, q: torch.Tensor
) -> None:
    visible = cache.seq_lens.clone().long()
    steps = [(lengths[:, row] == visible[row]).nonzero().flatten() for row in range(BATCH)]
    assert all(len(s) for s in steps), f"{visible.tolist()} is between two appends"
    # Rows are at most one append apart: some step is the last or the one under way for all of them.
    old = int(min(s.max() for s in steps))
    assert all(((s == old) | (s == old + 1)).any() for s in steps), f"{visible.tolist()} mixes distant appends"
    now = Cache(
        [x[:n] for x, n in zip(k, visible, strict=True)],
        [x[:n] for x, n in zip(v, visible, strict=True)],
        *cache.tensors,
        PAGE_SIZE,
    )
    check_decode(now, q, now.dense(q))
    top = torch.ops.entmaxkv.decode(q, *cache.tensors[:4], cache.page_table, cache.seq_lens, 10**6)
    assert_same_bits([top], [now.dense(q).out])


def test_appending_again_heals(tmp_path, past):
    """Whatever an interrupted append wrote behind the visible end, the next one overwrites."""
    _, _, lengths = past
    cache, clean = attach(str(tmp_path)), make_cache([0] * BATCH, page_size=PAGE_SIZE, max_pages=MAX_PAGES)
    clean.page_table = cache.page_table
    clean = Cache(
        [], [], *(torch.zeros_like(x) for x in cache.tensors[:6]), cache.page_table, clean.seq_lens, PAGE_SIZE
    )
    for step in range(20):
        clean.append(*chunk(step))
        before = cache.seq_lens.clone()
        cache.append(*chunk(step))
        cache.seq_lens.copy_(before)  # as if killed just before the lengths moved
        cache.append(*chunk(step))
    assert cache.lengths == lengths[20].tolist()
    assert_same_bits(cache.tensors, clean.tensors)
