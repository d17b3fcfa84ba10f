"""Threads that share a cache: every result is that of some whole state of it, and an append claims its room or refuses.

The tests run for seconds. For longer, with more threads: python tests/test_threads.py --seconds 60 --threads 8
"""

import argparse
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from conftest import Decoded, draw, make_query
from torch import Tensor

import entmaxkv

OPS = torch.ops.entmaxkv
PAGE, TOKENS, KV_HEADS, GROUP, HEAD_DIM = 16, 480, 2, 2, 64
QUERIES = 3


class Counts(NamedTuple):
    appends: int
    decodes: int


class Growing:
    """A cache whose rows grow to known tokens, each by a thread of its own, and its dense results at every length."""

    def __init__(self, rows: int) -> None:
        self.k, self.v = (draw(rows, TOKENS, KV_HEADS, HEAD_DIM, seed=seed) for seed in (0, 1))
        self.cache = entmaxkv.PagedKVCache(rows, TOKENS, KV_HEADS, HEAD_DIM, page_size=PAGE)
        self.queries = [make_query(rows, KV_HEADS * GROUP, HEAD_DIM, seed=seed) for seed in range(QUERIES)]
        self.cache.append(self.k, self.v)
        lengths = torch.arange(TOKENS + 1, dtype=torch.int32)
        pool = self.cache.k_pages, self.cache.v_pages

        def at_every_length(q: Tensor, row: int) -> Tensor:
            tables = self.cache.page_table[row].repeat(TOKENS + 1, 1)
            return OPS.dense_decode(q[row].expand(TOKENS + 1, -1, -1), *pool, tables, lengths)[0]

        every = [torch.stack([at_every_length(q, row) for row in range(rows)]) for q in self.queries]
        self.dense = torch.stack(every)  # [query, row, length, q_heads, head_dim]

    def start_again(self) -> None:
        """Empties the rows, and leaves nothing that a reader behind the end could take for their tokens."""
        self.cache.clear()
        for x in (self.cache.k_pages, self.cache.v_pages):
            x.fill_(torch.nan)

    def want(self, query: int, lengths: Tensor) -> Tensor:
        return self.dense[query, torch.arange(len(lengths)), lengths.long()]

    def append_to(self, row: int, seed: int) -> int:
        """Fills a row in chunks of any size; returns how many there were."""
        sizes = random.Random(seed)
        length = appends = 0
        while length < TOKENS:
            tokens = min(sizes.choice([1, 1, 2, 15, 16, 17, 40]), TOKENS - length)
            part = slice(length, length + tokens)
            if sizes.random() < 0.5:  # as one row of the batch, or as a batch of one row
                lengths = torch.zeros(len(self.k), dtype=torch.int32)
                lengths[row] = tokens
                self.cache.append(self.k[row, part].expand(len(self.k), -1, -1, -1), self.v[:, part], lengths)
            else:
                x = self.cache
                statistics = x.k_min, x.k_max, x.k_mean, x.k_std
                its = slice(row, row + 1)
                OPS.append_kv(
                    self.k[its, part],
                    self.v[its, part],
                    None,
                    x.k_pages,
                    x.v_pages,
                    *statistics,
                    x.page_table[its],
                    x.seq_lens[its],
                    x.codes,
                    x.norms,
                )
            length += tokens
            appends += 1
        return appends

    def check_dense(self, query: int) -> None:
        x = self.cache
        got = Decoded(*OPS.dense_decode(self.queries[query], x.k_pages, x.v_pages, x.page_table, x.seq_lens))
        assert torch.equal(got.tokens[:, :1].expand_as(got.tokens), got.tokens)
        assert torch.equal(got.out, self.want(query, got.tokens[:, 0]))

    def check_sketch(self, query: int) -> None:
        """Two ops read the lengths twice, unless they are given those of one moment."""
        x, q = self.cache, self.queries[query]
        table = x.page_table, x.seq_lens.clone()
        selected, counts, bound = OPS.select_sketch(q, x.k_pages, x.codes, x.norms, *table)
        out = OPS.sparse_decode(q, x.k_pages, x.v_pages, *table, selected, counts, by_token=True)[0]
        assert not bound.any()
        torch.testing.assert_close(out, self.want(query, table[1]), rtol=1e-5, atol=1e-5)

    def check_growing_sketch(self, query: int) -> None:
        """The lengths may move while the op runs."""
        x = self.cache
        before = x.seq_lens.clone()
        selected, counts, bound = OPS.select_sketch(
            self.queries[query], x.k_pages, x.codes, x.norms, x.page_table, x.seq_lens
        )
        last = selected.gather(2, (counts.long() - 1).clamp(min=0)[..., None])[..., 0]
        assert not bound.any() and (last < x.seq_lens[:, None]).all()
        assert ((counts > 0) | (before == 0)[:, None]).all()

    def check_decode(self, query: int) -> None:
        """An op of three steps sees one state: with room for all pages, the dense result of a moment while it ran."""
        x, q = self.cache, self.queries[query]
        before = x.seq_lens.clone()
        out = OPS.decode(q, x.k_pages, x.v_pages, x.k_min, x.k_max, x.page_table, x.seq_lens, TOKENS)
        for row, (first, last) in enumerate(zip(before.tolist(), x.seq_lens.tolist(), strict=True)):
            states = self.dense[query, row, first : last + 1]
            assert (states == out[row]).flatten(1).all(1).any(), f"row {row} is of no length in {first} ... {last}"


def decode_beside_append(seconds: float, threads: int) -> Counts:
    """Half of the threads fill a row each, the others decode, until the time is over."""
    growing = Growing(max(1, threads // 2))
    rows = len(growing.k)
    checks = [growing.check_dense, growing.check_sketch, growing.check_growing_sketch, growing.check_decode]
    end, rounds, appends, decodes = time.monotonic() + seconds, 0, 0, 0
    with ThreadPoolExecutor(threads) as pool:
        while time.monotonic() < end:
            growing.start_again()
            writers = [pool.submit(growing.append_to, row, rounds * rows + row) for row in range(rows)]

            def decode(first: int, writers: list = writers) -> int:
                for nth in itertools.count():
                    if all(writer.done() for writer in writers):
                        return nth
                    checks[(first + nth) % len(checks)](nth % QUERIES)
                raise AssertionError

            readers = [pool.submit(decode, first) for first in range(threads - rows)]
            appends += sum(writer.result() for writer in writers)
            decodes += sum(reader.result() for reader in readers)
            assert growing.cache.seq_lens.tolist() == [TOKENS] * rows
            for query in range(QUERIES):
                growing.check_dense(query)
            rounds += 1
    return Counts(appends, decodes)


def claim_room(seconds: float, threads: int) -> Counts:
    """Threads append to one row until it is full, in front of another row whose tokens must stay."""
    capacity, chunk = 16 * PAGE, 24
    cache = entmaxkv.PagedKVCache(2, capacity, KV_HEADS, HEAD_DIM, page_size=PAGE)
    full = torch.tensor([0, capacity], dtype=torch.int32)
    rest = draw(2, capacity, KV_HEADS, HEAD_DIM)
    end, appends, refusals = time.monotonic() + seconds, 0, 0

    def fill(thread: int) -> list[int]:
        """Appends its own numbers; returns those that were taken."""
        taken: list[int] = []
        for nth in itertools.count(1):
            number = thread * 1000 + nth
            x = torch.full((2, chunk, KV_HEADS, HEAD_DIM), float(number))
            lengths = torch.tensor([1 + (number * 7) % chunk, 0], dtype=torch.int32)
            try:
                cache.append(x, x, lengths)
            except RuntimeError as error:
                assert "append_kv: seq_lens: expected 0 ... 256 tokens per row after the append" in str(error)
                return taken
            taken += [number] * int(lengths[0])
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        while time.monotonic() < end:
            cache.clear()
            cache.append(rest, rest, full)
            taken = sorted(itertools.chain.from_iterable(pool.map(fill, range(1, threads + 1))))
            length = int(cache.seq_lens[0])
            assert cache.seq_lens[1] == capacity and capacity - chunk < length <= capacity
            for pages in (cache.k_pages, cache.v_pages):
                tokens = pages[cache.page_table].transpose(2, 3).flatten(1, 2)  # [row, token, kv_heads, head_dim]
                assert torch.equal(tokens[1], rest[1])
                numbers = tokens[0, :length]
                assert (numbers == numbers[:, :1, :1]).all()
                assert sorted(numbers[:, 0, 0].int().tolist()) == taken
                runs = [number for number, _ in itertools.groupby(numbers[:, 0, 0].tolist())]
                assert len(runs) == len(set(runs)), "the tokens of an append lie apart"
            appends += len(set(taken))
            refusals += threads
    return Counts(appends, refusals)


@pytest.fixture(autouse=True)
def one_thread_each(threads: None) -> None:
    torch.set_num_threads(1)


def test_decode_beside_append():
    decode_beside_append(2, 4)


def test_append_claims_its_room_or_refuses():
    claim_room(1, 4)


def test_batches_that_overlap():
    """Appends to many rows, of which some are the same, neither mix in a row nor wait for each other for ever."""
    rows, appends, page = 100, 100, 8
    cache = entmaxkv.PagedKVCache(rows, 2 * appends, 1, 8, page_size=page)
    pool = cache.k_pages, cache.v_pages, None, None, None, None

    def append(number: int, its: slice) -> None:
        table, seq_lens = cache.page_table[its], cache.seq_lens[its]
        k = torch.full((len(table), 1, 1, 8), float(number))
        for _ in range(appends):
            OPS.append_kv(k, k, None, *pool, table, seq_lens)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(append, (1, 2), (slice(0, 80), slice(20, rows))))
    for row, (length, tokens) in enumerate(zip(cache.seq_lens.tolist(), cache.k_pages[cache.page_table], strict=True)):
        numbers = tokens.reshape(-1, 8)[:length, 0].tolist()
        assert (numbers.count(1), numbers.count(2)) == (appends * (row < 80), appends * (row >= 20))


class AppendsMeanwhile:
    """A selector beside which another thread appends."""

    def __init__(self, cache: entmaxkv.PagedKVCache, selector: entmaxkv.Selector):
        self.cache, self.selector, self.needs = cache, selector, selector.needs

    def dense_up_to(self, device_type: str) -> int:
        return self.selector.dense_up_to(device_type)

    def select(self, q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> entmaxkv.Selection:
        chosen = self.selector.select(q, cache, scoring)
        self.cache.append(draw(1, 40, KV_HEADS, HEAD_DIM, seed=5), draw(1, 40, KV_HEADS, HEAD_DIM, seed=6))
        return chosen


@pytest.mark.parametrize("select", [entmaxkv.KeySketch(dense_below=0), entmaxkv.TopPages(64)], ids=["sketch", "pages"])
def test_a_step_sees_one_state(select):
    """Also tau, which ALiBi moves with the length, and the certificate."""
    cache = entmaxkv.PagedKVCache(1, 200, KV_HEADS, HEAD_DIM)
    cache.append(draw(1, 150, KV_HEADS, HEAD_DIM), draw(1, 150, KV_HEADS, HEAD_DIM, seed=1))
    q, slopes = make_query(1, 4, HEAD_DIM), torch.full((4,), 0.01)
    options = {"alibi_slopes": slopes, "return_info": True}
    out, want = entmaxkv.decode(q, cache, select=select, **options)
    beside, got = entmaxkv.decode(q, cache, select=AppendsMeanwhile(cache, select), **options)
    assert cache.seq_lens.tolist() == [190]
    assert torch.equal(beside, out) and torch.equal(got.tau, want.tau)
    if isinstance(select, entmaxkv.KeySketch):
        assert torch.equal(got.delta_bound, want.delta_bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for run, kinds in ((decode_beside_append, "appends, decodes"), (claim_room, "appends, refusals")):
        print(f"{run.__name__}: {kinds} {tuple(run(arguments.seconds, arguments.threads))}, all right")


if __name__ == "__main__":
    main()
