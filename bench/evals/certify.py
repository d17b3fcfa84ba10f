"""Counts the tokens that KeySketch misses, and measures what other selectors lose when they read as many bytes.

A case is one query head at one step. Its support is that of float64. A miss is a token of the support that was not
read. Cases come in sets that share one cache: the steps of the activations file, if one is given, or 64 steps over
drawn keys. The scale of drawn queries differs from head to head, so that some supports are wide and others narrow.
"adversarial" keys are a mixture of nearly equal keys, keys with a single coordinate that is not 0, and keys with norms
from 0.001 to 500; half of their queries are keys.

If --max-tokens names a number, selectors are compared at equal bytes, on the first set of the first kind of keys:
KeySketch(max_tokens=...), TopPages with the smallest budget and Gaussian with the smallest margin that read at least as
many bytes. Bytes are those of the keys, of the values, and of what the selectors look at.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from entmaxkv import Gaussian, KeySketch, PagedKVCache, Scoring, Selector, TopPages, decode, metrics, reference

sys.path.append(str(Path(__file__).parents[2]))
from bench.evals.files import load
from bench.inputs import DTYPES, Case, drawn, head_dim, positive
from bench.model_text import ModelText
from bench.program import Row, check, machine, parser_of, report, wide_console

STEPS, KV_HEADS, GROUP, PAGE_SIZE = 64, 8, 2, 16
AT_A_TIME = {"cpu": 1 << 22, "cuda": 1 << 26}  # float64 scores in memory at once
EXACT: dict[str, Selector | None] = {
    "certain": KeySketch(dense_below=0),
    "2 bits": KeySketch(bits=2, dense_below=0),
    "1 - 1e-9": KeySketch(certainty=1 - 1e-9, dense_below=0),
}
ALPHA = 1.5
SEARCH = 4  # steps that the search for settings of equal bytes looks at
HALVINGS = 14


class Steps(NamedTuple):
    """Cases that share a cache.

    Attributes:
        q: [steps, heads, head_dim].
        k, v: [tokens, kv_heads, head_dim].
        seq_lens: [steps] int32, tokens that each step sees.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seq_lens: Tensor

    @property
    def cases(self) -> int:
        return self.q.shape[0] * self.q.shape[1]


def of_file(path: Path, dtype: torch.dtype, device: str) -> Steps:
    q, k, v = (x.to(device, dtype) for x in load(path))
    steps, tokens = len(q), len(k)
    return Steps(q, k, v, torch.arange(tokens - steps + 1, tokens + 1, dtype=torch.int32, device=device))


def adversarial(k: Tensor) -> Tensor:
    """Keys [tokens, kv_heads, head_dim] made from k that are hard to encode in a few bits."""
    tokens, _, head_dim = k.shape
    kind = torch.randint(4, (tokens, 1, 1), device=k.device)
    ties = k[:1] * (1 + 1e-3 * torch.randn_like(k))
    single = torch.nn.functional.one_hot(torch.randint(head_dim, k.shape[:2], device=k.device), head_dim).to(k) * k * 8
    scaled = k * 10 ** (4 * torch.rand(tokens, 1, 1, device=k.device) - 3)
    rare = k * torch.where(torch.rand(tokens, 1, 1, device=k.device) < 0.01, 50.0, 1.0)
    return torch.where(kind == 0, ties, torch.where(kind == 1, single, torch.where(kind == 2, scaled, rare)))


def of_drawn(keys: str, context: int, head_dim: int, dtype: str, device: str, seed: int) -> Steps:
    """A set of drawn keys, the same at every call."""
    name = "normal" if keys == "adversarial" else keys
    case = Case(name, "fp32", GROUP * KV_HEADS, KV_HEADS, head_dim, PAGE_SIZE, 1, context)
    _, k, v = drawn(case, device, seed)
    heads = GROUP * KV_HEADS
    q = torch.randn(STEPS, heads, head_dim, device=device) * torch.logspace(-1, 0.8, heads, device=device)[:, None]
    if keys == "adversarial":
        k = adversarial(k[0])[None]
        some = torch.randint(context, (STEPS // 2,), device=device)
        q[::2] = k[0, some].repeat_interleave(GROUP, dim=1)
    seq_lens = torch.full((STEPS,), context, dtype=torch.int32, device=device)
    return Steps(*(x.to(DTYPES[dtype]) for x in (q, k[0], v[0])), seq_lens)


def of_model(sets: int, context: int, head_dim: int, dtype: str, device: str, console: Console) -> Iterator[Steps]:
    """The shipped model's own caches; every query sees the whole context."""
    case = Case("model", dtype, STEPS * GROUP * KV_HEADS, KV_HEADS, head_dim, PAGE_SIZE, sets, context)
    inputs = ModelText([case], device, console).inputs(case)
    seq_lens = torch.full((STEPS,), context, dtype=torch.int32, device=device)
    for q, k, v in zip(*inputs, strict=True):
        q = q.view(KV_HEADS, STEPS, GROUP, head_dim).transpose(0, 1).flatten(1, 2)
        yield Steps(q.contiguous(), k, v, seq_lens)


def filled(steps: Steps) -> PagedKVCache:
    tokens, kv_heads, head_dim = steps.k.shape
    sizes = {"page_size": PAGE_SIZE, "dtype": steps.k.dtype, "device": steps.k.device}
    cache = PagedKVCache(1, tokens, kv_heads, head_dim, **sizes)
    cache.append(steps.k[None], steps.v[None])
    return cache


def seen_by(cache: PagedKVCache, seq_lens: Tensor) -> PagedKVCache:
    """A batch of len(seq_lens) rows, each of which sees the first tokens of the one row of `cache`."""
    rows = copy.copy(cache)
    rows.batch, rows.seq_lens = len(seq_lens), seq_lens
    rows.page_table = cache.page_table.repeat(len(seq_lens), 1)
    return rows


class Found:
    """Sums over the cases of one selector."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.most: dict[str, float] = {}

    def add(self, sums: dict[str, Tensor | float], most: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + float(value)
        for name, values in most.items():
            self.most[name] = max(self.most.get(name, 0.0), float(values.max()))

    def row(self) -> Row:
        """Counts as counts, and everything else as a fraction of its whole or as a mean per case."""
        s = self.sums
        row: Row = {name: int(s[name]) for name in ("cases", "misses", "other_supports", "broken_bounds")}
        row |= self.most
        row |= {f"{name}_share": s[name] / s["rows_of_keys"] for name in ("candidates", "refined")}
        row["bytes_share"] = s["bytes"] / s["kv_bytes"]
        row |= {name: s[name] / s["cases"] for name in ("certified", "delta")}
        return row


def evaluate(
    steps: Steps, selectors: dict[str, Selector | None], found: dict[str, Found], advance: Callable[[int], object]
) -> None:
    """Adds to `found` what each selector does at each step."""
    whole, kv_heads = filled(steps), steps.k.shape[1]
    tokens, heads = len(steps.k), steps.q.shape[1]
    group = heads // kv_heads
    row_bytes = steps.k[0, 0].nbytes
    size = max(1, AT_A_TIME[steps.k.device.type] // (heads * tokens))
    for q, seq_lens in zip(steps.q.split(size), steps.seq_lens.split(size), strict=True):
        cache, rows = seen_by(whole, seq_lens), len(q)
        # The queries of all rows become one group per KV head: [kv_heads, rows * group, head_dim].
        queries = q.view(rows, kv_heads, group, -1).transpose(0, 1).reshape(kv_heads * rows * group, -1)
        s = reference.scores(queries, steps.k).view(kv_heads, rows, group, tokens).transpose(0, 1)
        seen = torch.arange(tokens, device=q.device) < seq_lens[:, None]
        s = s.masked_fill(~seen[:, None, None], -torch.inf)
        p, _ = reference.entmax(s, ALPHA)
        dense, of_dense = decode(q, cache, return_info=True)
        for name, select in selectors.items():
            out, info = decode(q, cache, select=select, return_info=True)
            keep = seen[:, None] if info.selection is None else info.selection.reads(tokens, PAGE_SIZE)
            left = ~keep[:, :, None]
            misses = ((p > 0) & left).sum(-1)
            delta = p.masked_fill(~left, 0).sum(-1)
            weight = p
            if misses.any():
                weight, _ = reference.entmax(s.masked_fill(left, -torch.inf), ALPHA)
            values = int((weight > 0).any(dim=2).sum())
            refined, index_bytes = metrics.index(select, q, cache, Scoring(alpha=ALPHA))
            bound = info.delta_bound.view_as(delta).double()
            wrong = (delta > bound + 1e-12) | (info.certified.view_as(misses) & (misses > 0))
            off = (out.double() - dense.double()).norm(dim=-1) / dense.double().norm(dim=-1)
            sums = {
                "cases": rows * heads,
                "misses": misses.sum(),
                "other_supports": (info.support != of_dense.support).sum(),
                "broken_bounds": wrong.sum(),
                "candidates": info.tokens.sum(),
                "refined": refined.sum(),
                "rows_of_keys": int(seq_lens.sum()) * kv_heads,
                "bytes": index_bytes + (int(info.tokens.sum()) + values) * row_bytes,
                "kv_bytes": 2 * int(seq_lens.sum()) * kv_heads * row_bytes,
                "certified": info.certified.sum(),
                "delta": delta.sum(),
            }
            found[name].add(sums, {"tau_off": (info.tau - of_dense.tau).abs(), "out_off": off, "delta_max": delta})
        advance(rows * heads)


def bytes_share(steps: Steps, select: Selector) -> float:
    found = Found()
    evaluate(steps, {"it": select}, {"it": found}, lambda cases: None)
    return found.row()["bytes_share"]


def reading(steps: Steps, share: float) -> tuple[TopPages, Gaussian]:
    """TopPages and Gaussian with the smallest settings that read at least this fraction of the bytes."""
    least, most = 1, -(-len(steps.k) // PAGE_SIZE)
    while least < most:
        pages = (least + most) // 2
        if bytes_share(steps, TopPages(pages * PAGE_SIZE, dense_below=0)) < share:
            least = pages + 1
        else:
            most = pages
    low, high = -16.0, 16.0
    for _ in range(HALVINGS):
        margin = (low + high) / 2
        if bytes_share(steps, Gaussian(margin=margin, dense_below=0)) < share:
            low = margin
        else:
            high = margin
    return TopPages(least * PAGE_SIZE, dense_below=0), Gaussian(margin=high, dense_below=0)


def at_equal_bytes(steps: Steps, max_tokens: list[int], bar: Progress) -> list[Row]:
    """For each of max_tokens three rows with δ: KeySketch, then TopPages and Gaussian at as many bytes."""
    few = torch.linspace(0, len(steps.q) - 1, min(SEARCH, len(steps.q))).long().to(steps.q.device)
    some = Steps(steps.q[few], steps.k, steps.v, steps.seq_lens[few])
    rows = []
    task = bar.add_task("δ at equal bytes", total=len(max_tokens) + 1)
    for most in [*max_tokens, None]:
        sketch = KeySketch(max_tokens=most, dense_below=0)
        pages, gaussian = reading(some, bytes_share(some, sketch))
        ways = {"KeySketch": sketch, "TopPages": pages, "Gaussian": gaussian}
        found = {name: Found() for name in ways}
        evaluate(steps, ways, found, lambda cases: None)
        for name in ways:
            setting = {"KeySketch": most, "TopPages": pages.budget, "Gaussian": gaussian.margin}[name]
            rows.append({"kind": "delta", "max_tokens": most, "select": name, "setting": setting} | found[name].row())
        bar.advance(task)
    return rows


def show(rows: list[Row], console: Console) -> None:
    exact = Table(title="misses of KeySketch, and what it reads", title_justify="left")
    titles = (
        "keys",
        "tokens",
        "selector",
        "cases",
        "misses",
        "supports unlike dense",
        "broken bounds",
        "τ error",
        "output error",
    )
    for title in (*titles, "candidates", "refined", "bytes", "certified", "δ"):
        exact.add_column(title)
    for row in (row for row in rows if row["kind"] == "exact"):
        counts = (str(row[name]) for name in ("tokens", "select", "cases", "misses", "other_supports", "broken_bounds"))
        offs = (f"{row[name]:.1e}" for name in ("tau_off", "out_off"))
        shares = (f"{row[name]:.2%}" for name in ("candidates_share", "refined_share", "bytes_share", "certified"))
        exact.add_row(row["keys"], *counts, *offs, *shares, f"{row['delta']:.2g}")
    console.print(exact)
    delta = [row for row in rows if row["kind"] == "delta"]
    if not delta:
        return
    equal = Table(title="δ at equal bytes; times: δ divided by the δ of KeySketch", title_justify="left")
    for title in ("max_tokens", "bytes", "KeySketch", "TopPages", "times", "Gaussian", "times"):
        equal.add_column(title)
    for sketch, pages, gaussian in zip(*(iter(delta),) * 3, strict=True):
        cells = [str(sketch["max_tokens"]), f"{sketch['bytes_share']:.2%}", f"{sketch['delta']:.2g}"]
        for row in (pages, gaussian):
            times = f"{row['delta'] / sketch['delta']:.0f}" if sketch["delta"] else "∞"
            cells += [f"{row['delta']:.2g}", times]
        equal.add_row(*cells)
    console.print(equal)


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("activations", type=Path, nargs="?", help="safetensors file, see bench/evals/activations.py")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the caches")
    kinds = ["model", "normal", "clustered", "outlier", "adversarial"]
    parser.add_argument("--keys", nargs="*", choices=kinds, default=kinds, help="keys to measure beside the file")
    parser.add_argument("--context", type=positive, nargs="+", default=[16384], help="tokens; not for the file")
    parser.add_argument("--head-dim", type=head_dim, default=64, help="size of a head; not for the file")
    capped = "the max_tokens of KeySketch to compare at equal bytes; without a number, compare nothing"
    parser.add_argument("--cases", type=positive, default=1024, help="at least so many for each kind and context")
    parser.add_argument("--max-tokens", type=positive, nargs="*", default=[16, 64, 256, 1024], help=capped)
    args = parser.parse_args()
    check(parser, args)
    if not args.activations and not args.keys:
        parser.error("expected an activations file or --keys, got neither")
    console = wide_console()
    sets = -(-args.cases // (STEPS * GROUP * KV_HEADS))

    def sources() -> Iterator[tuple[str, int, Iterator[Steps]]]:
        """The kinds of keys, each with its tokens and its sets."""
        if args.activations:
            steps = of_file(args.activations, DTYPES[args.dtype], args.device)
            yield "file", len(steps.k), iter([steps])
        for keys in args.keys:
            for context in args.context:
                like = (context, args.head_dim, args.dtype, args.device)
                if keys == "model":
                    yield keys, context, of_model(sets, *like, console)
                else:
                    yield keys, context, (of_drawn(keys, *like, seed) for seed in range(sets))

    rows: list[Row] = []
    first: tuple[str, int, Steps] | None = None
    for keys, tokens, of in sources():
        found = {name: Found() for name in EXACT}
        of = list(of) if keys in ("model", "file") else of  # the model reads before the bar starts
        with Progress(console=console) as bar:
            total = sum(steps.cases for steps in of) if isinstance(of, list) else sets * STEPS * GROUP * KV_HEADS
            task = bar.add_task(f"{keys}, {tokens} tokens", total=total)
            for steps in of:
                first = first or (keys, tokens, steps)
                evaluate(steps, EXACT, found, lambda cases, task=task, bar=bar: bar.advance(task, cases))
        for name, sums in found.items():
            rows.append({"kind": "exact", "keys": keys, "tokens": tokens, "select": name} | sums.row())
    if args.max_tokens:
        keys, tokens, steps = first
        with Progress(console=console) as bar:
            rows += [row | {"keys": keys, "tokens": tokens} for row in at_equal_bytes(steps, args.max_tokens, bar)]
    show(rows, console)
    shape = {"dtype": args.dtype, "head_dim": steps.k.shape[2], "alpha": ALPHA}
    if args.activations:
        shape["file"] = args.activations.name
    report({"machine": machine(args.device), "shape": shape, "rows": rows}, args, console)


if __name__ == "__main__":
    main()
