"""Times one decode step against softmax attention on the same shapes.

Peer: torch.nn.functional.scaled_dot_product_attention on contiguous keys and values, with the query heads of a group as
rows of one query over their KV head (on the CPU faster than enable_gqa=True). The methods take turns,
--repeats times over; the median counts. Beside each time stand the bytes that the method has to read, counted from
tensors, and the dropped mass and output error against dense entmax in float64.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import entmaxkv
from entmaxkv import metrics

KEYS = {"normal": 0.0, "clustered": 0.97}  # correlation of one key with the next
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_keys(context: int, kv_heads: int, head_dim: int, correlation: float, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal keys [1, context, kv_heads, head_dim]; a correlation makes neighbours alike."""
    keys = torch.randn(1, context, kv_heads, head_dim)
    if correlation:
        decay = correlation ** torch.arange(256.0)  # older keys no longer count
        kernel = decay.flip(0) * (1 - correlation**2) ** 0.5
        series = keys.permute(0, 2, 3, 1).reshape(-1, 1, context)
        series = torch.nn.functional.conv1d(torch.nn.functional.pad(series, (255, 0)), kernel.view(1, 1, -1))
        keys = series.view(1, kv_heads, head_dim, context).permute(0, 3, 1, 2)
    return keys.to(dtype).contiguous()


def machine() -> dict[str, str | int]:
    """The line that must stand beside every figure."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": f"{model}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def median_ms(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each method, the methods taking turns after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, call in methods.items():
            start = time.perf_counter()
            call()
            if repeat > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(context: int, dtype: str, keys: str, args: argparse.Namespace) -> list[dict]:
    """One row per method."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim = args.heads, args.kv_heads, args.head_dim
    k = make_keys(context, kv_heads, head_dim, KEYS[keys], DTYPES[dtype])
    v = torch.randn_like(k)
    q = torch.randn(1, heads, head_dim, dtype=k.dtype)
    # Room for one more page: appending must not meet a full cache.
    cache = entmaxkv.PagedKVCache(
        1, context + args.page_size, kv_heads, head_dim, page_size=args.page_size, dtype=k.dtype
    )
    cache.append(k, v)
    k_rows, v_rows = (x.transpose(1, 2).contiguous() for x in (k, v))
    q_rows = q.view(1, kv_heads, heads // kv_heads, head_dim)
    k_new, v_new = k[:, :1], v[:, :1]

    def append() -> None:
        cache.append(k_new, v_new)
        cache.seq_lens.sub_(1)

    selectors = {
        "dense entmax": None,
        f"TopPages({args.budget})": entmaxkv.TopPages(args.budget),
        "Gaussian()": entmaxkv.Gaussian(),
    }

    def decode(select: entmaxkv.select.Selector | None) -> Callable[[], object]:
        return lambda: entmaxkv.decode(q, cache, alpha=args.alpha, select=select)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    methods: dict[str, Callable[[], object]] = {"softmax SDPA": lambda: sdpa(q_rows, k_rows, v_rows)}
    methods |= {name: decode(select) for name, select in selectors.items()}
    times = median_ms(methods, args.repeats) | median_ms({"append one token": append}, 100)

    rows = []
    for name, ms in times.items():
        row = {
            "context": context,
            "dtype": dtype,
            "keys": keys,
            "method": name,
            "ms": ms,
            "ratio": times["softmax SDPA"] / ms,
        }
        if name == "softmax SDPA":
            row["bytes"] = k.nbytes + v.nbytes
        elif name in selectors:
            found = metrics.measure(q, cache, select=selectors[name], alpha=args.alpha)
            row["bytes"] = int(found.bytes_read)
            row["delta"] = float(found.dropped_mass.mean())
            row["error"] = float(found.output_error.mean())
        rows.append(row)
    return rows


def show(rows: list[dict], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table("context", "dtype", "keys", "method", *("ms", "x softmax", "MB", "GB/s", "δ", "error"))
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        rate = row["bytes"] / row["ms"] / 1e6 if "bytes" in row else None
        figures = (
            f"{row['ms']:.3f}",
            f"{row['ratio']:.2f}" if "bytes" in row else "",
            f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
            f"{rate:.1f}" if rate else "",
            f"{row['delta']:.4f}" if "delta" in row else "",
            f"{row['error']:.4f}" if "error" in row else "",
        )
        table.add_row(str(row["context"]), row["dtype"], row["keys"], row["method"], *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768, 131072], help="tokens")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=["normal"], help="how keys are drawn")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--budget", type=int, default=2048, help="tokens that TopPages reads")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    args = parser.parse_args()
    for name in ("context", "heads", "kv_heads", "head_dim", "repeats"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"expected --{name.replace('_', '-')} >= 1, got {value}")
    if args.heads % args.kv_heads:
        parser.error(f"expected --heads to be a multiple of --kv-heads {args.kv_heads}, got {args.heads}")

    console = Console(width=None if sys.stdout.isatty() else 120)
    cases = [(context, dtype, keys) for keys in args.keys for dtype in args.dtype for context in args.context]
    rows = [row for case in track(cases, "measuring", console=console) for row in measure(*case, args)]
    show(rows, console)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if args.json:
        shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "page_size", "alpha")}
        report = {"machine": machine(), "shape": shape, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
