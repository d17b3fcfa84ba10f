"""Decodes the queries of real activations with each selector, and compares the outputs with float64.

The file is a safetensors file. For each KV head NAME it holds NAME.k and NAME.v [tokens, head_dim], and NAME.q [group,
steps, head_dim]: the queries of the last `steps` positions. All of them become the KV heads of one cache. They are
decoded step by step. Before each step one token is appended, so that a query sees the tokens up to its own position.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import entmaxkv
from entmaxkv import metrics

sys.path.append(str(Path(__file__).parents[2]))
from bench.evals.files import load
from bench.inputs import DTYPES, positive
from bench.program import Row, check, machine, parser_of, report, wide_console


def measure(activations: tuple[torch.Tensor, ...], dtype: str, budget: int, device: str, console: Console) -> list[Row]:
    """One row for each selector, over all steps and heads."""
    q, k, v = (x.to(device, DTYPES[dtype]) for x in activations)
    steps, (tokens, kv_heads, head_dim) = len(q), k.shape
    selectors = {
        "dense": None,
        f"TopPages({budget})": entmaxkv.TopPages(budget, dense_below=0),
        "Gaussian()": entmaxkv.Gaussian(dense_below=0),
    }
    cache = entmaxkv.PagedKVCache(1, tokens, kv_heads, head_dim, dtype=DTYPES[dtype], device=device)
    cache.append(k[None, : tokens - steps], v[None, : tokens - steps])
    found: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in selectors}
    for step in track(range(steps), dtype, console=console):
        now = tokens - steps + step
        cache.append(k[None, now : now + 1], v[None, now : now + 1])
        for name, select in selectors.items():
            measured = metrics.measure(q[None, step], cache, select=select)
            values = {
                "support": measured.support.double(),
                "tokens": measured.tokens.double(),
                "delta": measured.dropped_mass,
                "recall": measured.support_recall,
                "error": measured.output_error,
            }
            for key, value in values.items():
                found[name].setdefault(key, []).append(value.cpu())
    rows = []
    for name, by_step in found.items():
        all_steps = {key: torch.cat(x) for key, x in by_step.items()}
        support, error = all_steps["support"], all_steps["error"]
        row = {"dtype": dtype, "select": name, "cases": support.numel()}
        row |= {f"support_{what}": int(getattr(support, what)()) for what in ("min", "median", "max")}
        row |= {f"{key}_mean": float(all_steps[key].mean()) for key in ("tokens", "delta", "recall", "error")}
        rows.append(row | {"error_max": float(error.max())})
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("activations", type=Path, help="safetensors file, as described above")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the cache")
    parser.add_argument("--budget", type=positive, default=2048, help="tokens per KV head that TopPages reads")
    args = parser.parse_args()
    check(parser, args)
    activations = load(args.activations)
    console = wide_console()
    rows = [row for dtype in args.dtype for row in measure(activations, dtype, args.budget, args.device, console)]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    q, k, _ = activations
    shape = {"file": args.activations.name, "tokens": len(k), "kv_heads": k.shape[1], "heads": q.shape[1]}
    shape |= {"head_dim": k.shape[2], "steps": len(q), "budget": args.budget}
    report({"machine": machine(args.device), "shape": shape, "rows": rows}, args, console)


if __name__ == "__main__":
    main()
