"""Measures what a model loses with each selector, and what each selector reads, on text held out from training.

    python bench/evals/quality.py examples/stdlib-entmax --json bench/results/cpu-quality.json

The model reads a context with dense attention, and then decodes what follows with each selector in turn:

- text: held-out files of the standard library, the same bytes after contexts of every length. Measured are bits per
  byte, how often the likeliest next byte is the one of dense decoding, and how long a greedy continuation agrees.
- passkey: the context has one line `# key NAME = VALUE`, which is asked for at the end.
- recall: the context has 32 such lines, and eight of them are asked for.

A passkey or a recalled value counts if all of its digits are right. At some steps of the text, each layer's queries are
also compared with attention in float64, by `entmaxkv.metrics.measure`.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv.select import Selector

sys.path.append(str(Path(__file__).parents[2]))
from bench.evals import suites
from bench.evals.decoding import Context, Decoded, Stepper, load
from bench.evals.options import check_contexts, chosen, comparing_parser
from bench.evals.suites import Suite, answering, facts_of, held_out_text, probed, tensor
from bench.program import Row, machine, report, wide_console

BUDGETS = (64, 256, 1024, 4096)


def selectors(alpha: float) -> dict[str, Selector | None]:
    """The selectors that are compared, by name; `dense_below=0` keeps short contexts from being decoded densely."""
    found: dict[str, Selector | None] = {"dense": None}
    if alpha > 1:
        found["KeySketch()"] = entmaxkv.KeySketch(dense_below=0)
        found["KeySketch(certainty=1-1e-9)"] = entmaxkv.KeySketch(certainty=1 - 1e-9, dense_below=0)
    for bits, option in ((4, ""), (2, "bits=2, ")):
        for budget in BUDGETS:
            select = entmaxkv.KeySketch(bits=bits, max_tokens=budget, dense_below=0)
            found[f"KeySketch({option}max_tokens={budget})"] = select
    for budget in BUDGETS:
        found[f"TopPages({budget})"] = entmaxkv.TopPages(budget, dense_below=0)
    if alpha > 1:
        found["Gaussian(quantile=0.95)"] = entmaxkv.Gaussian(quantile=0.95, dense_below=0)  # the paper's
        found["Gaussian()"] = entmaxkv.Gaussian(dense_below=0)
        found["Gaussian(margin=0.5)"] = entmaxkv.Gaussian(margin=0.5, dense_below=0)
    return found


def decode_text(
    model: PreTrainedModel, suite: Suite, methods: dict[str, Any], advance: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    """Each selector's loss on the text beside that of dense decoding, which is the first; and its metrics."""
    found: dict[str, dict[str, Any]] = {}
    read = Context(model, tensor(suite.read, model.device), room=suites.STEPS)
    follows = tensor(suite.follows, model.device)
    rows = len(follows)
    dense: Decoded | None = None
    written: Tensor | None = None
    for method, select in methods.items():
        stepper = Stepper(read, select)
        decoded, mine = stepper.read(follows), stepper.write(follows[:, :1], suites.STEPS)
        if dense is None or written is None:
            dense, written = decoded, mine
        above = (decoded.bits - dense.bits).double().mean(1)
        found[method] = {
            "rows": rows,
            "bits": decoded.bits.double().mean().item(),
            "bits_above": above.mean().item(),
            "bits_above_se": (above.std() / rows**0.5).item() if rows > 1 else 0.0,
            "agreement": (decoded.argmax == dense.argmax).double().mean().item(),
            "common_prefix": (mine == written).cumprod(dim=1).sum(dim=1).double().mean().item(),
        }
        advance()
    for method, metrics in probed(read, suite, methods).items():
        found[method] |= facts_of(metrics)
    advance()
    return found


def evaluate(
    model: PreTrainedModel,
    methods: dict[str, Selector | None],
    text: np.ndarray,
    context: int,
    longest: int,
    rows: int,
    console: Console,
) -> list[Row]:
    """One row per selector at this context."""
    drawn = suites.prepared(text, context, longest, rows)
    with Progress(console=console) as bar:
        # The passkeys have twice as many rows, and are decoded in two halves.
        task = bar.add_task(f"context {context}", total=4 * len(methods) + 1)
        advance = partial(bar.advance, task)
        found = decode_text(model, drawn["text"], methods, advance)
        for name in ("passkey", "recall"):
            for method, share in answering(model, drawn[name], methods, rows, advance).items():
                found[method][name] = share
    return [{"select": method, "context": context} | facts for method, facts in found.items()]


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"context {rows[0]['context']}")
    shown.add_column("selector", no_wrap=True)
    titles = ("bits", "agrees", "prefix", "passkey", "recall", "δ", "support", "error", "keys", "bytes")
    for title in titles:
        shown.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["select"],
            f"{row['bits']:.4f}",
            f"{row['agreement']:.1%}",
            f"{row['common_prefix']:.0f}",
            *(f"{row[name]:.0%}" for name in ("passkey", "recall")),
            f"{row['delta']:.2g}",
            f"{row['support_recall']:.3f}",
            f"{row['error']:.2g}",
            f"{row['tokens']:.0f}",
            f"{row['share']:.1%}",
        )
    shown.caption = (
        "agrees: the likeliest next byte is that of dense decoding. "
        f"prefix: bytes of a greedy continuation of {suites.STEPS} before the first that differs from dense decoding. "
        "δ: attention mass dropped. support: share of the dense support that is read. error: of the attention output. "
        "keys: read per step and KV head. bytes: read, as a share of the KV cache; page statistics or sketch included."
    )
    return shown


def main() -> None:
    parser = comparing_parser(__doc__)
    args = parser.parse_args()
    text = held_out_text(args.source)
    check_contexts(parser, args, text, 2 * args.rows)
    console = wide_console()
    model = load(args.model, args.device)
    methods = chosen(parser, args, selectors(model.config.entmax_alpha))
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    about = {"kind": "quality", "model": args.model.name, "alpha": model.config.entmax_alpha}
    longest = max(args.longest or 0, *args.context)
    for context in sorted(args.context):
        rows = evaluate(model, methods, text, context, longest, args.rows, console)
        console.print(table(rows))
        document["rows"] += [about | row for row in rows]
        report(document, args, console)


if __name__ == "__main__":
    main()
