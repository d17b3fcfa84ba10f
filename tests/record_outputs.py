"""Runs every op on fixed inputs and records a hash of each output, to show that a change keeps every bit.

python tests/record_outputs.py --json before.json                    # at one commit
python tests/record_outputs.py --compare before.json                 # at another, on the same machine
python tests/record_outputs.py --device cuda --json before-h200.json

The CUDA kernels run without a GPU, too: `make kernel` builds a package with the kernels run by the CPU under
build/emulation; PYTHONPATH=build/emulation makes this script use it.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import entmaxkv

OPS = torch.ops.entmaxkv
Named = Iterator[tuple[str, Tensor]]


class Case(NamedTuple):
    """One cache and the queries that read it."""

    dtype: torch.dtype
    head_dim: int
    group: int
    page_size: int
    lengths: list[int]
    keys: str = "normal"  # or "ties": eight different keys, so that many scores are equal

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lengths = "+".join(map(str, self.lengths))
        return f"{dtype} {self.head_dim}x{self.group} page {self.page_size} {self.keys} {lengths}"


def cases(long: bool) -> list[Case]:
    small = [
        Case(dtype, head_dim, group, page_size, [700, 37, 0])
        for dtype, (head_dim, group, page_size) in itertools.product(
            (torch.float32, torch.float16, torch.bfloat16), ((64, 4, 16), (33, 1, 8), (128, 9, 64), (256, 2, 32))
        )
    ]
    small += [Case(torch.bfloat16, 64, 4, 16, [2100, 700], "ties"), Case(torch.float32, 64, 3, 16, [5000])]
    if not long:
        return small
    return [
        *small,
        Case(torch.bfloat16, 128, 4, 16, [200_000]),
        Case(torch.bfloat16, 128, 4, 16, [150_000], "ties"),
        Case(torch.float16, 64, 8, 32, [30_000, 1, 9000, 17]),
        Case(torch.float32, 96, 2, 64, [40_000, 4097]),
    ]


def known(selected: Tensor, counts: Tensor) -> Tensor:
    """A selection without what stands behind its counts, which may be anything."""
    places = torch.arange(selected.shape[2], device=selected.device)
    return selected.masked_fill(places >= counts[..., None], -1)


def outputs(case: Case, device: str) -> Named:
    """Every output of every op, by a name that says how it came about."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    batch, kv_heads, most = len(case.lengths), 2, max(case.lengths)
    q_heads, head_dim = kv_heads * case.group, case.head_dim
    if case.keys == "ties":
        keys = draw(8, kv_heads, head_dim)[torch.randint(8, (batch, most), generator=generator)]
    else:
        keys = draw(batch, most, kv_heads, head_dim)
    values = draw(batch, most, kv_heads, head_dim)
    cache = entmaxkv.PagedKVCache(
        batch, most + 100, kv_heads, head_dim, page_size=case.page_size, dtype=case.dtype, device=device
    )
    names = "k_pages", "v_pages", "k_min", "k_max", "k_mean", "k_std", "codes", "norms", "seq_lens"
    kept = {name: getattr(cache, name).zero_() for name in names}  # a cache does not clear what it has not filled
    keys, values = (x.to(device, case.dtype) for x in (keys, values))
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    cache.append(keys, values, lengths)
    cache.append(keys[:, :1], values[:, :1])
    for name, tensor in kept.items():
        yield f"append_kv {name}", tensor
    table = cache.page_table, cache.seq_lens
    statistics = [kept[name].zero_() for name in ("k_min", "k_max", "k_mean", "k_std")]
    sketch = [kept[name].zero_() for name in ("codes", "norms")]
    OPS.page_stats(cache.k_pages, *table, *statistics)
    OPS.build_sketch(cache.k_pages, *table, *sketch)
    for name in ("k_min", "k_max", "k_mean", "k_std"):
        yield f"page_stats {name}", kept[name]
    for name in ("codes", "norms"):
        yield f"build_sketch {name}", kept[name]

    pages = cache.k_pages, cache.v_pages, *table
    slopes = (0.5 ** torch.arange(1, q_heads + 1)).float().to(device)
    head_alpha = torch.linspace(1, 2, q_heads).to(device)
    for strength, slope in ((3.0, None), (0.05, None), (1.0, slopes)):
        q = (draw(batch, q_heads, head_dim) * strength).to(device, case.dtype)
        step = f"q x {strength}{' alibi' if slope is not None else ''}"
        page = cache.page_size
        scores = OPS.score_pages(q, cache.k_min, cache.k_max, *table, page, None, slope, 0.25)
        mean, std = OPS.score_gaussian(q, cache.k_mean, cache.k_std, *table, page, None, slope)
        yield f"{step} score_pages", scores
        yield f"{step} score_gaussian mean", mean
        yield f"{step} score_gaussian std", std
        for budget in (1, 5 * page, most // 2 + 1):
            selected, counts = OPS.select_pages(scores, cache.seq_lens, kv_heads, page, budget)
            yield f"{step} select_pages {budget} selected", known(selected, counts)
        for alpha, per_head in ((1.5, None), (1.0, None), (1.05, None), (4 / 3, None), (2.0, None), (1.5, head_alpha)):
            at = f"{step} alpha {'per head' if per_head is not None else round(alpha, 3)}"
            chosen = OPS.select_gaussian(mean, std, cache.seq_lens, kv_heads, page, alpha, 0.99, 0.0, per_head)
            yield f"{at} select_gaussian", known(*chosen)
            tokens = {}
            for bits, certainty, cap in ((4, 1.0, None), (2, 1.0, None), (4, 1 - 1e-9, None), (4, 1.0, 50)):
                *selection, bound = OPS.select_sketch(
                    q, cache.k_pages, *sketch, *table, alpha, None, slope, per_head, bits, certainty, cap
                )
                tokens[bits, cap] = selection
                yield f"{at} select_sketch {bits} {certainty} {cap}", known(*selection)
                yield f"{at} select_sketch {bits} {certainty} {cap} delta_bound", bound
            reads = {
                "pages": (OPS.sparse_decode, (selected, counts), (False,)),
                "gaussian": (OPS.sparse_decode, chosen, (False,)),
                "tokens": (OPS.sparse_decode, tokens[4, None], (True,)),
                "capped": (OPS.sparse_decode, tokens[4, 50], (True,)),
                "all": (OPS.dense_decode, (), ()),
            }
            for read, (op, selection, by_token) in reads.items():
                results = op(q, *pages, *selection, alpha, None, slope, per_head, *by_token)
                for name, result in zip(("out", "tau", "support", "tokens"), results, strict=True):
                    yield f"{at} decode {read} {name}", result
            budget = 5 * page
            bounds = cache.k_min, cache.k_max
            yield f"{at} decode op", OPS.decode(q, *pages[:2], *bounds, *table, budget, alpha, 0.2, slope, per_head)


def hashed(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--long", action="store_true", help="also caches of up to 200 000 tokens (always on CUDA)")
    parser.add_argument("--json", type=Path, help="write the hashes to this file")
    parser.add_argument("--compare", type=Path, help="compare with the hashes in this file; exit with 1 if any differs")
    arguments = parser.parse_args()
    got = {
        f"{case.name}: {name}": hashed(tensor)
        for case in cases(arguments.long or arguments.device == "cuda")
        for name, tensor in outputs(case, arguments.device)
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(got, indent=0) + "\n")
    print(f"{len(got)} outputs")
    if arguments.compare:
        want = json.loads(arguments.compare.read_text())
        changed = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
        print(f"{len(changed)} differ from {arguments.compare}", *changed[:40], sep="\n  ")
        raise SystemExit(1 if changed else 0)


if __name__ == "__main__":
    main()
