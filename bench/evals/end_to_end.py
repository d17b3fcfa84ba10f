"""Measures the tokens per second of a whole language model that decodes through `entmaxkv.hf`, and where the time goes.

    python bench/evals/end_to_end.py runs/twin-entmax --batch 1 8 --json bench/results/h200-end-to-end-entmax.json

A step is the whole model, from a byte to the logits of the next byte. It is timed twice: as a CUDA graph, and eager, as
transformers' `generate` runs it. The profiler gives the times of the graph's kernels. A GPU is needed.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv.select import Selector

sys.path.append(str(Path(__file__).parents[2]))
from bench.evals.decoding import Context, Stepper, load
from bench.evals.options import check_contexts, decoding_parser
from bench.evals.suites import haystacks, held_out_text, tensor
from bench.inputs import positive
from bench.program import Row, machine, report, wide_console

SELECTORS: dict[str, Selector | None] = {
    "dense": None,
    "KeySketch()": entmaxkv.KeySketch(dense_below=0),
    "KeySketch(max_tokens=64)": entmaxkv.KeySketch(max_tokens=64, dense_below=0),
    "KeySketch(max_tokens=4096)": entmaxkv.KeySketch(max_tokens=4096, dense_below=0),
    "TopPages(1024)": entmaxkv.TopPages(1024, dense_below=0),
    "TopPages(4096)": entmaxkv.TopPages(4096, dense_below=0),
    "Gaussian()": entmaxkv.Gaussian(dense_below=0),
}
FOR_ZEROS = ("KeySketch()", "Gaussian()")  # with softmax these two select every token
ROOM, WARM, TIMED = 256, 8, 64


def microseconds(stepper: Stepper) -> float:
    """The time of one step in microseconds, while the model decodes a greedy continuation."""
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
    """Microseconds of the graph's kernels: reading the cache, appending to it, and everything else.

    A kernel of a dependent launch overlaps with the kernel before it, so the sum can be larger than the step's time.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(WARM):
            stepper.step()
        torch.cuda.synchronize()
    found = {"attention": 0.0, "append": 0.0, "other": 0.0}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:  # type: ignore[attr-defined]
            ours = "entmaxkv" in event.name
            appends = any(name in event.name for name in ("append_", "advance", "code_new"))
            found["append" if ours and appends else "attention" if ours else "other"] += event.device_time_total / WARM
    return found


def evaluate(model: PreTrainedModel, text: np.ndarray, context: int, batch: int) -> list[Row]:
    """One row for each selector, on a batch of contexts."""
    read, follows = haystacks(text, batch, context, context)
    state = Context(model, tensor(read, model.device), room=ROOM)
    rows: list[Row] = []
    softmax = model.config.entmax_alpha == 1
    for name in [name for name in SELECTORS if not (softmax and name in FOR_ZEROS)]:
        row: dict[str, Any] = {"select": name, "context": context, "batch": batch}
        for how, eager in (("graph", False), ("eager", True)):
            stepper = Stepper(state, SELECTORS[name], eager=eager)
            stepper.ids.copy_(tensor(follows[:, :1], model.device))
            row[f"{how}_us"] = microseconds(stepper)
            if not eager:
                row |= {f"{part}_us": us for part, us in kernels(stepper).items()}
        rows.append(row | {"tokens_per_s": 1e6 * batch / row["graph_us"]})
    return rows


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"{rows[0]['model']}, {rows[0]['batch']} rows of {rows[0]['context']} tokens")
    shown.add_column("selector")
    for title in ("tokens/s", "µs", "attention", "append", "other kernels", "eager µs"):
        shown.add_column(title, justify="right")
    for row in rows:
        parts = (row[f"{name}_us"] for name in ("graph", "attention", "append", "other", "eager"))
        shown.add_row(row["select"], f"{row['tokens_per_s']:.0f}", *(f"{us:.0f}" for us in parts))
    return shown


def main() -> None:
    parser = decoding_parser(__doc__, 131072, devices=("cuda",))
    parser.set_defaults(longest=None)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="contexts that are decoded together")
    args = parser.parse_args()
    text = held_out_text(args.source)
    check_contexts(parser, args, text, max(args.batch))
    console = wide_console()
    model = load(args.model, args.device)
    about = {"kind": "end to end", "model": args.model.name, "alpha": model.config.entmax_alpha}
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    for context in args.context:
        for batch in args.batch:
            rows = [about | row for row in evaluate(model, text, context, batch)]
            console.print(table(rows))
            document["rows"] += rows
            report(document, args, console)


if __name__ == "__main__":
    main()
