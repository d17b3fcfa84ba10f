"""What a model loses by each way of reading its cache, and what it reads, on text that it was not trained on.

    python bench/quality.py examples/stdlib-entmax --json bench/results/cpu-quality.json

The model reads a context, exactly, and then decodes what follows with each selector in turn:

- text: held-out files of the standard library, the same bytes after contexts of every length; bits per byte, where the
  argmax is dense decoding's, and how long a greedy continuation is,
- passkey: one line `# key NAME = VALUE` somewhere in the text, asked for at the end,
- recall: 32 such lines, of which eight are asked for; both count values that are right to the last digit.

At some steps of the text each layer's queries also go through `entmaxkv.metrics.measure`, against float64.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decoding import Context, Stepper, load
from inputs import positive
from report import check, machine, report, wide_console
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from watch import Watch

import entmaxkv
from entmaxkv.metrics import Metrics, measure
from entmaxkv.select import Selector

from corpus import RELATED, SEPARATOR, default_source, files, held_out  # isort: skip
from tasks import LINE, RECALL, draw, put  # isort: skip

BUDGETS = (64, 256, 1024, 4096)
STEPS = 256  # bytes decoded of each text
FACTS, ASKED = 32, 8
LEAST_CONTEXT = 2 * FACTS * LINE
PROBED_ROWS, PROBED_STEPS = 8, 2
SEED = 2**33  # of the facts; training draws others


def selectors(alpha: float) -> dict[str, Selector | None]:
    """What is compared, none of it falling back to dense decoding."""
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


class Suite(NamedTuple):
    """Contexts [rows, context], what follows [rows, steps + 1], and which of its bytes are answers."""

    read: np.ndarray
    follows: np.ndarray
    answers: np.ndarray


def haystacks(text: np.ndarray, rows: int, context: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [rows, context] and the STEPS + 1 bytes after each, which are the same for every context."""
    ends = np.linspace(longest, len(text) - STEPS - 1, rows).astype(int)
    return np.stack([text[end - context : end] for end in ends]), np.stack([text[end:][: STEPS + 1] for end in ends])


def asking(text: np.ndarray, rows: int, context: int, longest: int, facts: int, asked: int, seed: int = SEED) -> Suite:
    """Facts spread over each context, some asked for after it; of a single one, each row holds it elsewhere."""
    read = haystacks(text, rows, context, longest)[0].copy()
    follows, answers = [], []
    for row, window in enumerate(read):
        rng = np.random.default_rng((seed, facts, row))
        drawn = [draw(rng) for _ in range(facts)]
        room = context // facts
        for i, (question, value) in enumerate(drawn):
            depth = (row + 0.5) / rows if facts == 1 else rng.random()
            put(window, i * room + int(depth * (room - LINE)), question + value + b"\n")
        chosen = [drawn[i] for i in rng.permutation(facts)[:asked]]
        follows.append(b"".join(question + value for question, value in chosen) + b"\n")
        marks = [[False] * len(question) + [True] * len(value) for question, value in chosen]
        answers.append([mark for line in marks for mark in line] + [False])
    return Suite(read, np.stack([np.frombuffer(line, np.uint8) for line in follows]), np.array(answers))


def suites(text: np.ndarray, context: int, longest: int, rows: int, seed: int = SEED) -> dict[str, Suite]:
    """What is decoded after a context, leaving room before it for the longest."""
    read, follows = haystacks(text, rows, context, longest)
    return {
        "text": Suite(read, follows, np.zeros(follows.shape, bool)),
        "passkey": asking(text, 2 * rows, context, longest, 1, 1, seed),
        "recall": asking(text, rows, context, longest, FACTS, ASKED, seed),
    }


def tensor(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int64)).to(device)


def answered(suite: Suite, argmax: Tensor) -> float:
    """Share of the values whose every byte is the argmax."""
    expected = suite.follows[:, 1:][suite.answers[:, 1:]].reshape(-1, RECALL)
    got = argmax.cpu().numpy()[suite.answers[:, 1:]].reshape(-1, RECALL)
    return float((expected == got).all(axis=1).mean())


def answering(
    model: PreTrainedModel, suite: Suite, methods: dict[str, Any], at_a_time: int, advance: Callable[[], object]
) -> dict[str, float]:
    """What `answered` says of each method, after so many contexts at a time."""
    found = dict.fromkeys(methods, 0.0)
    for start in range(0, len(suite.read), at_a_time):
        part = Suite(*(x[start : start + at_a_time] for x in suite))
        read = Context(model, tensor(part.read, model.device), room=part.follows.shape[1])
        follows = tensor(part.follows, model.device)
        for method, select in methods.items():
            argmax = Stepper(read, select).read(follows).argmax
            found[method] += answered(part, argmax) * len(part.read) / len(suite.read)
            advance()
    return found


def probed(context: Context, suite: Suite, methods: dict[str, Any]) -> dict[str, list[list[Metrics]]]:
    """What `measure` says of each method at some steps of the text, [layer][step], of the first PROBED_ROWS."""
    found: dict[str, list[list[Metrics]]] = {name: [[] for _ in context.layers] for name in methods}
    layers = itertools.cycle(range(len(context.layers)))
    at = {(2 * i + 1) * STEPS // (2 * PROBED_STEPS) for i in range(PROBED_STEPS)}

    def see(q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> None:
        layer = next(layers)
        if step not in at:
            return
        rows = copy.copy(cache)
        rows.batch = min(PROBED_ROWS, cache.batch)
        rows.page_table, rows.seq_lens = cache.page_table[: rows.batch], cache.seq_lens[: rows.batch]
        for name, select in methods.items():
            found[name][layer].append(measure(q[: rows.batch], rows, select=select, **vars(scoring)))

    stepper = Stepper(context, Watch(see), eager=True)
    follows = tensor(suite.follows, context.model.device)
    for step in range(max(at) + 1):
        stepper.ids.copy_(follows[:, step : step + 1])
        stepper.step()
    return found


def by_head(found: list[list[Metrics]], name: str) -> Tensor:
    """Mean of a metric over steps and rows, [layers, heads] float64."""
    layers = [torch.stack([getattr(step, name).double().mean(0) for step in layer]).mean(0) for layer in found]
    return torch.stack(layers).cpu()


def share(steps: list[Metrics]) -> float:
    return sum(step.bytes_read for step in steps) / sum(step.kv_bytes for step in steps)


def facts_of(found: list[list[Metrics]]) -> dict[str, Any]:
    """A selector's metrics: their means, and those of each layer's heads; bytes are a layer's."""
    names = {
        "delta": "dropped_mass",
        "support_recall": "support_recall",
        "error": "output_error",
        "tokens": "tokens",
        "support": "support",
    }
    heads = {name: by_head(found, metric) for name, metric in names.items()}
    means = {name: x.mean().item() for name, x in heads.items()}
    rounded = {name: [[float(f"{x:.3g}") for x in layer] for layer in x.tolist()] for name, x in heads.items()}
    return {
        **means,
        "share": share([step for layer in found for step in layer]),
        "certified": by_head(found, "certified").mean().item(),
        "layer_share": [float(f"{share(layer):.3g}") for layer in found],
        "heads": rounded,
    }


def decode_text(
    model: PreTrainedModel, suite: Suite, methods: dict[str, Any], advance: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    """What each method makes of the text, beside the first one, which is dense; and what `probed` finds."""
    found: dict[str, dict[str, Any]] = {}
    read = Context(model, tensor(suite.read, model.device), room=STEPS)
    follows = tensor(suite.follows, model.device)
    rows = len(follows)
    dense = written = None
    for method, select in methods.items():
        stepper = Stepper(read, select)
        decoded, mine = stepper.read(follows), stepper.write(follows[:, :1], STEPS)
        if dense is None:
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
) -> list[dict]:
    """One row per selector at this context."""
    drawn = suites(text, context, longest, rows)
    with Progress(console=console) as bar:
        # Of passkeys there are twice as many rows, half of them at a time.
        task = bar.add_task(f"context {context}", total=4 * len(methods) + 1)
        advance = partial(bar.advance, task)
        found = decode_text(model, drawn["text"], methods, advance)
        for name in ("passkey", "recall"):
            for method, share in answering(model, drawn[name], methods, rows, advance).items():
                found[method][name] = share
    return [{"select": method, "context": context} | facts for method, facts in found.items()]


def table(rows: list[dict]) -> Table:
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
        f"agrees: argmax as dense. prefix: of {STEPS} greedily decoded bytes those before the first that is not dense "
        "decoding's. δ: mass dropped. support: share of the dense support that is read. error: of the attention "
        "output. keys: read per token and KV head. bytes: of the KV cache, page statistics or sketch included."
    )
    return shown


def held_out_text(source: Path) -> np.ndarray:
    """The held-out files of the standard library joined, those with near relatives in the training text last."""
    names = {name: path for name, path in files(source).items() if held_out(name)}
    order = sorted(names, key=lambda name: (name.startswith(RELATED), name))
    return np.frombuffer(b"".join(names[name].read_bytes() + SEPARATOR for name in order), np.uint8)


def parser_of(description: str, context: int) -> argparse.ArgumentParser:
    """What the programs that decode with a model have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[context], help=f"bytes read first (default {context})"
    )
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser


def evaluating_parser(description: str) -> argparse.ArgumentParser:
    """And what those have in common that compare selectors."""
    parser = parser_of(description, 4096)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--rows", type=positive, default=8, help="texts; twice as many passkeys (default 8)")
    parser.add_argument("--select", nargs="+", help="of the table's rows only those of these names (default all)")
    parser.add_argument(
        "--longest", type=positive, help="leave room for such contexts, too, before what is decoded (default: none)"
    )
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, methods: dict[str, Any]) -> dict[str, Any]:
    """The methods that --select names, in their order, and the dense one where there is one."""
    for name in args.select or []:
        if name not in methods:
            parser.error(f"--select: expected some of {', '.join(map(repr, methods))}, got {name!r}")
    return {name: method for name, method in methods.items() if not args.select or name in ("dense", *args.select)}


def check_contexts(parser: argparse.ArgumentParser, args: argparse.Namespace, text: np.ndarray, rows: int) -> None:
    """Refuses, before a model is loaded, what could not be decoded."""
    check(parser, args)
    if not (args.model / "config.json").is_file():
        parser.error(f"expected a folder with a config.json, got {args.model}")
    if not len(text):
        parser.error(f"--source: expected a standard library with held-out files, got {args.source}")
    for context in args.context:
        if context % 16 or context < LEAST_CONTEXT:
            parser.error(f"--context: expected multiples of 16 of at least {LEAST_CONTEXT}, got {context}")
    longest = max(args.longest or 0, *args.context)  # what is decoded is the same after every context
    if len(text) < longest + STEPS + rows:
        parser.error(f"--context, --longest: expected less than the {len(text)} bytes of text, got {longest}")


def main() -> None:
    parser = evaluating_parser(__doc__)
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
