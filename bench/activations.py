"""Decodes the queries of real activations with each way of reading the cache, and compares with float64.

The file (safetensors) holds, for each KV head NAME, NAME.k and NAME.v [tokens, head_dim] and NAME.q [group, steps,
head_dim], the queries of the last `steps` positions: query i sees the tokens up to its own. All of them go into one
cache as its KV heads, and are decoded step by step, with one token appended before each.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from decode import DTYPES, machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file

import entmaxkv
from entmaxkv import metrics


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [steps, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
    file = load_file(path)
    names = sorted(name.removesuffix(".k") for name in file if name.endswith(".k"))
    if not names:
        raise SystemExit(f"{path}: expected tensors NAME.q, NAME.k and NAME.v, got {sorted(file)}")
    k, v = (torch.stack([file[f"{name}.{part}"] for name in names], dim=1) for part in "kv")
    q = torch.cat([file[f"{name}.q"] for name in names]).transpose(0, 1)
    return q, k, v


def measure(path: Path, dtype: str, budget: int, device: str, console: Console) -> list[dict]:
    """One row per selector."""
    q, k, v = (x.to(device, DTYPES[dtype]) for x in load(path))
    steps, (tokens, kv_heads, head_dim) = len(q), k.shape
    selectors = {"dense": None, f"TopPages({budget})": entmaxkv.TopPages(budget), "Gaussian()": entmaxkv.Gaussian()}
    cache = entmaxkv.PagedKVCache(1, tokens, kv_heads, head_dim, dtype=DTYPES[dtype], device=device)
    cache.append(k[None, : tokens - steps], v[None, : tokens - steps])
    found: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in selectors}
    for step in track(range(steps), dtype, console=console):
        now = tokens - steps + step
        cache.append(k[None, now : now + 1], v[None, now : now + 1])
        for name, select in selectors.items():
            _, info = entmaxkv.decode(q[None, step], cache, select=select, return_info=True)
            measured = metrics.measure(q[None, step], cache, select=select)
            values = {
                "support": info.support.double(),
                "tokens": measured.tokens.double(),
                "delta": measured.dropped_mass,
                "recall": measured.support_recall,
                "error": measured.output_error,
            }
            for key, value in values.items():
                found[name].setdefault(key, []).append(value.cpu())
    rows = []
    for name, values in found.items():
        all_steps = {key: torch.cat(value) for key, value in values.items()}
        support, error = all_steps["support"], all_steps["error"]
        row = {"dtype": dtype, "select": name, "cases": support.numel()}
        row |= {f"support_{what}": int(getattr(support, what)()) for what in ("min", "median", "max")}
        row |= {f"{key}_mean": float(all_steps[key].mean()) for key in ("tokens", "delta", "recall", "error")}
        rows.append(row | {"error_max": float(error.max())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("activations", type=Path, help="safetensors file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--budget", type=int, default=2048, help="tokens that TopPages reads")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    args = parser.parse_args()
    if not args.activations.exists():
        parser.error(f"expected a file, got {args.activations}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = [row for dtype in args.dtype for row in measure(args.activations, dtype, args.budget, args.device, console)]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(args.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
