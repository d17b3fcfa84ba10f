"""Times one decode step, and each of its ops, against softmax attention on the same inputs.

A row is one method on one case: microseconds; their ratio to the best scaled_dot_product_attention (SDPA) softmax of
the case; the bytes that the method has to move, counted from tensors, and the time of the fastest read of as many in
this run, a plain one or softmax's (floor_us, and fraction = floor_us / us); dropped mass (delta) and output error
against dense attention in float64; and the tokens that a KV head reads. Methods of kind `step` go from q to out; those
of kind `op` are the stages of the step that `of` names, each timed alone. Peers run where they are installed, and the
authors' code where --reference leads to a checkout.

On a GPU a method is captured in a CUDA graph, and each replay starts with a cold L2 cache. The methods take turns,
--repeats times over; the median counts.
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
from bench.report.document import check, machine, report, wide_console
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
    """Mean over rows and heads of ||out - truth|| / ||truth||."""
    return ((out.reshape(truth.shape).double() - truth).norm(dim=-1) / truth.norm(dim=-1)).mean().item()


def ways(q: Tensor, paged: PagedKVCache, args: argparse.Namespace) -> dict[str, tuple[Select | None, float]]:
    """Our own steps: selector and alpha of each."""
    found: dict[str, tuple[Select | None, float]] = {"dense softmax": (None, 1.0)}
    if args.alpha > 1:
        found["dense entmax"] = None, args.alpha
        found["KeySketch()"] = KeySketch(dense_below=0), args.alpha
    for budget in args.budget:
        found[f"TopPages({budget})"] = TopPages(budget, dense_below=0), args.alpha
    if args.alpha > 1:  # with alpha 1 there is no threshold, and all but TopPages keep everything
        for budget in args.budget:
            found[f"Gaussian, {budget} tokens"] = gaussian_reading(budget, q, paged, args.alpha), args.alpha
        found["Gaussian()"] = Gaussian(dense_below=0), args.alpha
    return found


def measure(case: Case, inputs: Inputs, args: argparse.Namespace, notes: dict[str, str]) -> list[dict]:
    """One row for each method, the ops of a step behind it."""
    q, k, v = inputs
    paged = filled(case, inputs, room=args.repeats + 8)  # what is appended below, the warm-up included
    others, own = peers(inputs, paged, args.alpha, notes, only_sdpa=args.peers == "sdpa"), ways(q, paged, args)
    ops = {name: stages(q, paged, *way) for name, way in own.items() if way[0]}
    calls: dict[str, Callable[[], object]] = {name: peer.call for name, peer in others.items()}
    calls |= {name: step(q, paged, *way) for name, way in own.items()}
    calls |= {f"{op} of {name}": call for name, parts in ops.items() for op, call in parts.items()}
    times = medians(calls, args.repeats, args.device)
    best = min(times[name].us for name in others if name.startswith("softmax SDPA"))

    def row(kind: str, method: str, alpha: float, time: Time, figures: dict) -> dict:
        entry = asdict(case) | {"alpha": alpha, "kind": kind, "method": method, "timed": time.of, "us": time.us}
        return entry | ({"ratio": time.us / best} if kind == "step" else {}) | figures

    @cache
    def truth(alpha: float) -> Tensor:
        return oracle(inputs, alpha)

    found: list[dict] = []
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


def complete(found: list[dict], device: str) -> float:
    """Adds to the rows what follows from their bytes; returns GB/s of the fastest read of this run.

    That is the sum of a large tensor, or on a GPU, where nothing is cached, softmax if it reads keys and values faster.
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


def show(found: list[dict], console: Console) -> None:
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
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=CONTEXTS, default="cpu", help="where to measure")
    widths = {device: " ".join(names) for device, names in WIDTHS.items()}
    add_case_arguments(parser, by_device(CONTEXTS), by_device(widths))
    parser.add_argument("--alpha", type=float, default=1.5, help="of entmax, in [1, 2]")
    parser.add_argument(
        "--budget", type=positive, nargs="+", default=[2048], help="tokens that TopPages, and a tuned Gaussian, read"
    )
    repeats = f"runs of each method, of which the median counts (default: {by_device(REPEATS)})"
    parser.add_argument("--repeats", type=positive, help=repeats, default=argparse.SUPPRESS)
    parser.add_argument("--peers", choices=["all", "sdpa"], default="all", help="others to time, where installed")
    parser.add_argument("--reference", type=Path, help="a checkout of the authors' entmaxkv, to time it too")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
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
