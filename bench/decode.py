"""Times one decode step, and each op of it, against softmax attention on the same inputs.

A case is a shape, a dtype and a kind of keys. The result has one row for each method of each case:

- us: median time in microseconds. ratio: that time divided by the time of the fastest softmax attention by PyTorch's
  scaled_dot_product_attention (SDPA) on this case.
- bytes: what the method has to move, counted from tensors. floor_us: the time of the fastest read in this run for as
  many bytes, where the fastest read is the sum of a large tensor or, on a GPU, softmax attention. fraction: floor_us
  divided by us.
- delta: attention weight of the tokens that are not read. error: relative error of the output. Both are against dense
  attention in float64.
- tokens: tokens that a KV head reads.

A row of kind "step" is a whole step, from the query to the output. A row of kind "op" is one op of the step that "of"
names, timed alone. Other implementations are timed where they are installed. The authors' code is timed where
--reference names a checkout of it.

On a GPU each method is captured in a CUDA graph, and each replay starts with a cold L2 cache. The methods take turns.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from entmaxkv import Gaussian, KeySketch, PagedKVCache, TopPages, metrics, reference

sys.path.append(str(Path(__file__).parents[1]))
from bench.authors import authors
from bench.inputs import Case, Inputs, add_case_arguments, cases, drawn, filled, positive, rows
from bench.model_text import ModelText
from bench.peers import peers
from bench.program import Row, check, machine, parser_of, report, wide_console
from bench.steps import Select, append_bytes, gaussian_reading, stage_bytes, stages, step
from bench.timing import Time, medians, read_rate

CONTEXTS = {"cpu": "1024 8192 32768 131072", "cuda": "16384 32768 131072 1048576 16x32768"}
WIDTHS = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
REPEATS = {"cpu": 7, "cuda": 30}


def by_device(defaults: Mapping[str, object]) -> str:
    return ", ".join(f"{default} on {device}" for device, default in defaults.items())


def oracle(inputs: Inputs, alpha: float) -> Tensor:
    """Dense attention in float64, [batch, heads, head_dim]."""
    return torch.stack([reference.attention(*row, alpha=alpha)[0] for row in zip(*inputs, strict=True)])


def error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||, the mean over rows and heads."""
    return float(((out.reshape(truth.shape).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).mean())


def ways(q: Tensor, paged: PagedKVCache, args: argparse.Namespace) -> dict[str, tuple[Select | None, float]]:
    """Our own steps by name, each with its selector and alpha."""
    found: dict[str, tuple[Select | None, float]] = {"dense softmax": (None, 1.0)}
    if args.alpha > 1:
        found["dense entmax"] = None, args.alpha
        found["KeySketch()"] = KeySketch(dense_below=0), args.alpha
    for budget in args.budget:
        found[f"TopPages({budget})"] = TopPages(budget, dense_below=0), args.alpha
    if args.alpha > 1:  # softmax (alpha 1) has no threshold: every selector but TopPages selects all tokens
        for budget in args.budget:
            found[f"Gaussian, {budget} tokens"] = gaussian_reading(budget, q, paged, args.alpha), args.alpha
        found["Gaussian()"] = Gaussian(dense_below=0), args.alpha
    return found


def measure(case: Case, inputs: Inputs, args: argparse.Namespace, notes: dict[str, str]) -> list[Row]:
    """One row for each method; the rows of a step's ops follow the row of the step."""
    q, k, v = inputs
    paged = filled(case, inputs, room=args.repeats + 8)  # append_kv below adds a token at each call
    others, own = peers(inputs, paged, args.alpha, notes, only_sdpa=args.peers == "sdpa"), ways(q, paged, args)
    ops = {name: stages(q, paged, *way) for name, way in own.items() if way[0]}
    calls: dict[str, Callable[[], object]] = {name: peer.call for name, peer in others.items()}
    calls |= {name: step(q, paged, *way) for name, way in own.items()}
    calls |= {f"{op} of {name}": call for name, parts in ops.items() for op, call in parts.items()}
    times = medians(calls, args.repeats, args.device)
    best = min(times[name].us for name in others if name.startswith("softmax SDPA"))

    def row(kind: str, method: str, alpha: float, time: Time, figures: Row) -> Row:
        entry = asdict(case) | {"alpha": alpha, "kind": kind, "method": method, "timed": time.of, "us": time.us}
        return entry | ({"ratio": time.us / best} if kind == "step" else {}) | figures

    @cache
    def truth(alpha: float) -> Tensor:
        return oracle(inputs, alpha)

    found: list[Row] = []
    for name, peer in others.items():
        figures = {"error": error(peer.call(), truth(peer.alpha))}
        if peer.alpha == 1:
            figures["bytes"] = k.nbytes + v.nbytes
        found.append(row("step", name, peer.alpha, times[name], figures))
    for name, (select, alpha) in own.items():
        measured = metrics.measure(q, paged, select=select, alpha=alpha)
        figures = {
            "bytes": measured.bytes_read,
            "delta": measured.dropped_mass.mean().item(),
            "error": measured.output_error.mean().item(),
            "tokens": measured.tokens.double().mean().item(),
            "certified": measured.certified.double().mean().item(),
        }
        if isinstance(select, KeySketch):
            figures["refined"] = measured.refined.double().mean().item()
        if isinstance(select, Gaussian) and math.isfinite(select.margin):
            figures["margin"] = select.margin
        found.append(row("step", name, alpha, times[name], figures))
        if select:
            for op, nbytes in zip(ops[name], stage_bytes(q, paged, select, measured), strict=True):
                found.append(row("op", op, alpha, times[f"{op} of {name}"], {"of": name, "bytes": nbytes}))

    if args.reference and args.alpha > 1:
        results, failures = authors(
            args.reference,
            inputs._asdict(),
            page_size=case.page_size,
            budgets=args.budget,
            alpha=args.alpha,
            repeats=args.repeats,
        )
        notes |= failures
        for name, result in results.items():
            figures = {"error": error(result.out, truth(args.alpha)), "tokens": result.tokens}
            entry = row("step", name, args.alpha, Time(result.us, result.timed), figures)
            found.append(entry | {"dtype": result.dtype})

    new = k[:, :1].clone(), v[:, :1].clone()
    time = medians({"append_kv": lambda: paged.append(*new)}, args.repeats, args.device)["append_kv"]
    return [*found, row("op", "append_kv", args.alpha, time, {"of": "one token", "bytes": append_bytes(paged, inputs)})]


def complete(found: list[Row], device: str) -> float:
    """Adds gb_per_s, floor_us and fraction to the rows that have bytes; returns the GB/s of the fastest read.

    The fastest read is the sum of a large tensor. On a GPU it is softmax attention if that reads keys and values
    faster; on the CPU softmax does not count, as its keys and values can be in a cache.
    """
    rate = read_rate(device)
    for row in found:
        if "bytes" in row:
            row["gb_per_s"] = row["bytes"] / row["us"] / 1e3
            if device == "cuda" and row["method"].startswith("softmax"):
                rate = max(rate, row["gb_per_s"])
    for row in found:
        if "bytes" in row:
            row["floor_us"] = row["bytes"] / rate / 1e3
            row["fraction"] = row["floor_us"] / row["us"]
    return rate


def show(found: list[Row], console: Console) -> None:
    """Prints the rows of one case as a table."""
    case = Case(**{name: found[0][name] for name in Case.__dataclass_fields__})
    table = Table(title=f"{case}, alpha {found[-1]['alpha']:g}", title_justify="left")
    table.add_column("method", no_wrap=True)
    formats = {"us": ".1f", "ratio": ".3f", "bytes": ".2f", "gb_per_s": ".1f", "fraction": ".2f", "tokens": ".0f"}
    formats |= {"delta": ".4f", "error": ".2g"}
    for title in ("µs", "of softmax", "MB", "GB/s", "of floor", "tokens", "δ", "error"):
        table.add_column(title, justify="right")
    for row in found:
        name = row["method"] if row["kind"] == "step" else f"  {row['method']}"
        shown = row | ({"bytes": row["bytes"] / 1e6} if "bytes" in row else {})
        table.add_row(name, *(f"{shown[key]:{form}}" if key in shown else "" for key, form in formats.items()))
    console.print(table)


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__)
    widths = {device: " ".join(names) for device, names in WIDTHS.items()}
    add_case_arguments(parser, by_device(CONTEXTS), by_device(widths))
    parser.add_argument("--alpha", type=float, default=1.5, help="alpha of entmax, in [1, 2]; 1 is softmax")
    parser.add_argument(
        "--budget",
        type=positive,
        nargs="+",
        default=[2048],
        help="tokens per KV head that TopPages and the tuned Gaussian read",
    )
    repeats = f"timed runs of each method; the result is their median (default: {by_device(REPEATS)})"
    parser.add_argument("--repeats", type=positive, help=repeats, default=argparse.SUPPRESS)
    parser.add_argument(
        "--peers",
        choices=["all", "sdpa"],
        default="all",
        help="other code to time: SDPA, or all",
    )
    parser.add_argument("--reference", type=Path, help="also time the authors' code, in this checkout of it (GPU only)")
    args = parser.parse_args()
    check(parser, args)
    args.context = getattr(args, "context", [rows(text) for text in CONTEXTS[args.device].split()])
    args.dtype = getattr(args, "dtype", WIDTHS[args.device])
    args.repeats = getattr(args, "repeats", REPEATS[args.device])
    if not 1 <= args.alpha <= 2:
        parser.error(f"expected --alpha in [1, 2], got {args.alpha}")
    if args.reference and args.device == "cpu":
        parser.error("--reference: expected --device cuda (theirs are Triton kernels), got cpu")
    if args.reference and not (args.reference / "entmaxkv" / "attention_topk.py").is_file():
        parser.error(f"--reference: expected a checkout of github.com/deep-spin/entmaxkv, got {args.reference}")

    console = wide_console()
    chosen = cases(args)
    of_model = [case for case in chosen if case.keys == "model"]
    text = ModelText(of_model, args.device, console) if of_model else None
    notes: dict[str, str] = {}
    groups = []
    for case in track(chosen, "measuring", console=console):
        inputs = text.inputs(case) if text and case.keys == "model" else drawn(case, args.device)
        groups.append(measure(case, inputs, args, notes))
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the pools of this case's graphs
    found = [row for group in groups for row in group]
    rate = complete(found, args.device)
    for group in groups:
        show(group, console)
    for name, reason in notes.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    report({"machine": machine(args.device) | {"read_gb_per_s": rate}, "rows": found}, args, console)


if __name__ == "__main__":
    main()
