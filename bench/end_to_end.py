"""Tokens per second of a whole language model that decodes through `entmaxkv.hf`, and where the time goes.

    python bench/end_to_end.py runs/entmax --context 131072 --batch 1 8 --json bench/results/h200-end-to-end.json

A step is the whole model, from a byte to the logits of the next: as a CUDA graph, and eager, which is as transformers'
`generate` calls it. The profiler tells the graph's attention kernels from the others.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from decoding import Context, Stepper, load
from inputs import positive
from quality import haystacks, held_out_text, tensor
from report import check, machine, report
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv.select import Selector

SELECTORS: dict[str, Selector | None] = {
    "dense": None,
    "KeySketch()": entmaxkv.KeySketch(dense_below=0),
    "TopPages(1024)": entmaxkv.TopPages(1024),
    "Gaussian()": entmaxkv.Gaussian(),
}
ROOM, WARM, TIMED = 256, 8, 64


def microseconds(stepper: Stepper) -> float:
    """Of one step, after text that the model is at home in: the bytes that it takes for the likeliest."""
    stepper.rewind()
    for i in range(WARM + TIMED):
        if i == WARM:
            torch.cuda.synchronize()
            start = time.perf_counter()
        stepper.step()
        stepper.ids.copy_(stepper.logits.argmax(-1, keepdim=True))
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / TIMED


def kernels(stepper: Stepper) -> dict[str, float]:
    """Microseconds of the graph's kernels: reading the cache, appending to it, and everything else."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(WARM):
            stepper.step()
        torch.cuda.synchronize()
    found = {"attention": 0.0, "append": 0.0, "other": 0.0}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ours = "entmaxkv" in event.name
            appends = any(name in event.name for name in ("append_", "advance", "code_new"))
            found["append" if ours and appends else "attention" if ours else "other"] += event.device_time_total / WARM
    return found


def evaluate(model: PreTrainedModel, context: int, batch: int, source: Path) -> list[dict[str, Any]]:
    text = held_out_text(source)
    read, follows = haystacks(text, batch, context, context)
    state = Context(model, tensor(read, model.device), room=ROOM)
    rows: list[dict[str, Any]] = []
    names = SELECTORS if model.config.entmax_alpha > 1 else ("dense", "TopPages(1024)")
    for name in names:
        row: dict[str, Any] = {"select": name, "context": context, "batch": batch}
        for how, eager in (("graph", False), ("eager", True)):
            stepper = Stepper(state, SELECTORS[name], eager=eager)
            stepper.ids.copy_(tensor(follows[:, :1], model.device))
            row[f"{how}_us"] = microseconds(stepper)
            if not eager:
                row |= {f"{part}_us": us for part, us in kernels(stepper).items()}
        rows.append(row | {"tokens_per_s": 1e6 * batch / row["graph_us"]})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{rows[0]['model']}, {rows[0]['batch']} rows of {rows[0]['context']} tokens")
    shown.add_column("selector")
    for title in ("tokens/s", "µs", "attention", "append", "other kernels", "eager µs"):
        shown.add_column(title, justify="right")
    for row in rows:
        parts = (row[f"{name}_us"] for name in ("graph", "attention", "append", "other", "eager"))
        shown.add_row(row["select"], f"{row['tokens_per_s']:.0f}", *(f"{us:.0f}" for us in parts))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--context", type=positive, nargs="+", default=[131072], help="bytes read first")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="rows")
    parser.add_argument("--source", type=Path, help="folder of the standard library (default: the running Python's)")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    args.device = "cuda"
    check(parser, args)
    from corpus import default_source

    console = Console()
    model = load(args.model, args.device)
    about = {"kind": "end to end", "model": args.model.name, "alpha": model.config.entmax_alpha}
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    for context in args.context:
        for batch in args.batch:
            rows = [about | row for row in evaluate(model, context, batch, args.source or default_source())]
            console.print(table(rows))
            document["rows"] += rows
    report(document, args, console)


if __name__ == "__main__":
    main()
