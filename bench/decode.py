"""Times one decode step against softmax attention on the same shapes.

Peer: torch.nn.functional.scaled_dot_product_attention on contiguous keys and values; on the CPU with the query heads
of a group as rows of one query over their KV head (there faster than enable_gqa=True), on a GPU by FlashAttention and
by cuDNN. On a GPU a method is captured in a CUDA graph, and each replay starts with a cold L2 cache. The methods take
turns, --repeats times over; the median counts. Beside each time stand the bytes that the method has to read, counted
from tensors, and the dropped mass and output error against dense entmax in float64.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

import entmaxkv
from entmaxkv import metrics

KEYS = {"normal": 0.0, "clustered": 0.97}  # correlation of one key with the next
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


CONTEXTS = {"cpu": [1024, 8192, 32768, 131072], "cuda": [16384, 32768, 131072, 1048576]}
WIDTHS = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
REPEATS = {"cpu": 7, "cuda": 50}
APPENDS = 100


def make_keys(shape: tuple[int, int, int, int], correlation: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Standard normal keys [batch, context, kv_heads, head_dim]; a correlation makes neighbours alike."""
    keys = torch.randn(shape, device=device)
    if correlation:
        batch, context, kv_heads, head_dim = shape
        decay = correlation ** torch.arange(256.0, device=device)  # older keys no longer count
        kernel = decay.flip(0) * (1 - correlation**2) ** 0.5
        series = keys.permute(0, 2, 3, 1).reshape(-1, 1, context)
        series = torch.nn.functional.conv1d(torch.nn.functional.pad(series, (255, 0)), kernel.view(1, 1, -1))
        keys = series.view(batch, kv_heads, head_dim, context).permute(0, 3, 1, 2)
    return keys.to(dtype).contiguous()


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def machine(device: str) -> dict[str, str | int]:
    """The line that must stand beside every figure."""
    facts: dict[str, str | int] = {}
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["gpu"] = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    else:
        model = platform.processor()
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
        facts["cpu"] = f"{model}, {torch.backends.cpu.get_cpu_capability()}"
        facts["threads"] = torch.get_num_threads()
    commit = output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return facts | {"torch": torch.__version__, "commit": commit}


def stopwatch(call: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that runs `call` and returns the milliseconds it took."""
    if device == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return on_cpu

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rubbish = torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")

    def on_gpu() -> float:
        rubbish.zero_()  # pushes everything out of L2, and lasts until the replay has been queued
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return on_gpu


def median_ms(methods: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each method, the methods taking turns after one warm-up each."""
    watches = {name: stopwatch(call, device) for name, call in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, watch in watches.items():
            ms = watch()
            if repeat > 0:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Softmax attention of q [batch, heads, head_dim] over k and v [batch, context, kv_heads, head_dim]."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    k_rows, v_rows = (x.transpose(1, 2).contiguous() for x in (k, v))
    if q.device.type == "cpu":
        q_rows = q.view(len(q), k.shape[2], -1, q.shape[2])
        return {"softmax SDPA": lambda: sdpa(q_rows, k_rows, v_rows)}

    def by(backend: SDPBackend) -> Callable[[], object]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return sdpa(q[:, :, None], k_rows, v_rows, enable_gqa=True)

        return call

    methods = {}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,  # slow, but takes everything
    }
    for name, backend in backends.items():
        call = by(backend)
        try:
            if name != "math" or not methods:
                call()
                methods[f"softmax SDPA, {name}"] = call
        except RuntimeError:  # not for this dtype or head_dim
            continue
    return methods


def measure(context: int, dtype: str, keys: str, args: argparse.Namespace) -> list[dict]:
    """One row per method."""
    torch.manual_seed(0)
    shape = args.batch, context, args.kv_heads, args.head_dim
    k = make_keys(shape, KEYS[keys], DTYPES[dtype], args.device)
    v = torch.randn_like(k)
    q = torch.randn(args.batch, args.heads, args.head_dim, dtype=k.dtype, device=args.device)
    cache = entmaxkv.PagedKVCache(
        args.batch,
        context + 2 * APPENDS,
        args.kv_heads,
        args.head_dim,
        page_size=args.page_size,
        dtype=k.dtype,
        device=args.device,
    )
    cache.append(k, v)
    selectors = {
        "dense entmax": None,
        f"TopPages({args.budget})": entmaxkv.TopPages(args.budget),
        "Gaussian()": entmaxkv.Gaussian(),
    }

    def decode(select: entmaxkv.select.Selector | None) -> Callable[[], object]:
        return lambda: entmaxkv.decode(q, cache, alpha=args.alpha, select=select)

    peers = softmax(q, k, v)
    methods = peers | {name: decode(select) for name, select in selectors.items()}
    times = median_ms(methods, args.repeats, args.device)
    best = min(times[name] for name in peers)
    found = {name: metrics.measure(q, cache, select=select, alpha=args.alpha) for name, select in selectors.items()}
    k_new, v_new = k[:, :1].clone(), v[:, :1].clone()
    times |= median_ms({"append one token": lambda: cache.append(k_new, v_new)}, APPENDS, args.device)

    rows = []
    for name, ms in times.items():
        row = {"context": context, "dtype": dtype, "keys": keys, "method": name, "ms": ms}
        if name in methods:
            row["ratio"] = best / ms
        if name in peers:
            row["bytes"] = k.nbytes + v.nbytes
        elif name in selectors:
            row["bytes"] = int(found[name].bytes_read)
            row["delta"] = float(found[name].dropped_mass.mean())
            row["error"] = float(found[name].output_error.mean())
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
            f"{row['ms']:.4f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
            f"{rate:.1f}" if rate else "",
            f"{row['delta']:.4f}" if "delta" in row else "",
            f"{row['error']:.4f}" if "error" in row else "",
        )
        table.add_row(str(row["context"]), row["dtype"], row["keys"], row["method"], *figures)
    console.print(table)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses, before anything is measured, what could not be measured or written."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA GPU, got none")
    if args.budget < 1:
        parser.error(f"expected --budget >= 1, got {args.budget}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: expected a file in a directory that exists, got {args.json}")


def report(rows: list[dict], shape: dict[str, int | float | str], args: argparse.Namespace, console: Console) -> None:
    """Prints the machine, and writes it with shape and rows to --json."""
    where = machine(args.device)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "shape": shape, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=CONTEXTS, default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="rows, all of the same length")
    on_device = {"default": argparse.SUPPRESS}  # depends on the device
    parser.add_argument("--context", type=int, nargs="+", help=f"tokens (default: {CONTEXTS})", **on_device)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"(default: {WIDTHS})", **on_device)
    parser.add_argument("--keys", nargs="+", choices=KEYS, default=["normal"], help="how keys are drawn")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--budget", type=int, default=2048, help="tokens that TopPages reads")
    repeats = f"runs of each method, of which the median counts (default: {REPEATS})"
    parser.add_argument("--repeats", type=int, help=repeats, **on_device)
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    args = parser.parse_args()
    check(parser, args)
    for name, defaults in (("context", CONTEXTS), ("dtype", WIDTHS), ("repeats", REPEATS)):
        setattr(args, name, getattr(args, name, defaults[args.device]))
    for name in ("batch", "context", "heads", "kv_heads", "head_dim", "repeats"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"expected --{name.replace('_', '-')} >= 1, got {value}")
    if args.heads % args.kv_heads:
        parser.error(f"expected --heads to be a multiple of --kv-heads {args.kv_heads}, got {args.heads}")

    console = Console(width=None if sys.stdout.isatty() else 120)
    cases = [(context, dtype, keys) for keys in args.keys for dtype in args.dtype for context in args.context]
    rows = [row for case in track(cases, "measuring", console=console) for row in measure(*case, args)]
    show(rows, console)
    shape = {name: getattr(args, name) for name in ("batch", "heads", "kv_heads", "head_dim", "page_size", "alpha")}
    report(rows, shape, args, console)


if __name__ == "__main__":
    main()
