"""What a model loses by each way of reading its cache, and what it reads, on text that it was not trained on.

    python bench/quality.py examples/stdlib-entmax --context 4096 --json bench/results/cpu-quality.json

The model reads a context, exactly, and then decodes what follows with each selector in turn:

- text: held-out files of the standard library, the same bytes after contexts of every length; bits per byte, and how
  long a greedy continuation is the dense one,
- passkey: one line `key NAME = VALUE` somewhere in the text, asked for at the end,
- recall: 32 such lines, of which eight are asked for; both count values that are right to the last digit.

At some steps of the text each layer's queries also go through `entmaxkv.metrics.measure`, against float64.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decoding import Context, Stepper, load
from inputs import positive
from report import check, machine, report
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv.metrics import Metrics, measure
from entmaxkv.select import Selector

from corpus import SEPARATOR, default_source, files, held_out  # isort: skip
from tasks import RECALL, draw, put  # isort: skip

BUDGETS = (64, 256, 1024, 4096)
ROWS = {"text": 8, "passkey": 16, "recall": 8}
STEPS = 256  # bytes decoded of each text
FACTS, ASKED = 32, 8
PROBED_STEPS = 2
SEED = 0


def selectors(alpha: float) -> dict[str, Selector | None]:
    """What is compared; a selector reads what it reads whatever the cache's size."""
    found: dict[str, Selector | None] = {"dense": None}
    if alpha > 1:
        found["KeySketch()"] = entmaxkv.KeySketch(dense_below=0)
        found["KeySketch(certainty=1-1e-9)"] = entmaxkv.KeySketch(certainty=1 - 1e-9, dense_below=0)
        for budget in BUDGETS:
            found[f"KeySketch(max_tokens={budget})"] = entmaxkv.KeySketch(max_tokens=budget, dense_below=0)
    for budget in BUDGETS:
        found[f"TopPages({budget})"] = entmaxkv.TopPages(budget, dense_below=0)
    if alpha > 1:
        found["Gaussian()"] = entmaxkv.Gaussian(dense_below=0)
        for margin in (0.5, 1.0):
            found[f"Gaussian(margin={margin:g})"] = entmaxkv.Gaussian(margin=margin, dense_below=0)
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


def asking(text: np.ndarray, rows: int, context: int, longest: int, facts: int, asked: int) -> Suite:
    """Facts spread over each context, some asked for after it; of a single one, each row holds it elsewhere."""
    read = haystacks(text, rows, context, longest)[0].copy()
    follows, answers = [], []
    for row, window in enumerate(read):
        rng = np.random.default_rng((SEED, row))
        drawn = [draw(rng) for _ in range(facts)]
        spacing = (context - 64) / facts
        for i, (question, value) in enumerate(drawn):
            depth = (row + 0.5) / rows if facts == 1 else rng.random()
            put(window, int((i + depth) * spacing), question + value + b"\n")
        chosen = [drawn[i] for i in rng.permutation(facts)[:asked]]
        follows.append(b"".join(question + value for question, value in chosen) + b"\n")
        answers.append(
            [i for question, value in chosen for i in [False] * len(question) + [True] * len(value)] + [False]
        )
    return Suite(read, np.stack([np.frombuffer(line, np.uint8) for line in follows]), np.array(answers))


def suites(text: np.ndarray, context: int, longest: int) -> dict[str, Suite]:
    read, follows = haystacks(text, ROWS["text"], context, longest)
    return {
        "text": Suite(read, follows, np.zeros(follows.shape, bool)),
        "passkey": asking(text, ROWS["passkey"], context, longest, 1, 1),
        "recall": asking(text, ROWS["recall"], context, longest, FACTS, ASKED),
    }


class Probe:
    """A selector that keeps every page, and measures what others would have done with the same query.

    Attributes:
        found: [selector][layer] metrics of each measured step.
    """

    def __init__(self, methods: dict[str, Selector | None], layers: int):
        self.active, self.calls = False, 0
        self.methods = methods
        self.found: dict[str, list[list[Metrics]]] = {name: [[] for _ in range(layers)] for name in methods}
        self.layers = layers

    def pages(
        self,
        q: Tensor,
        cache: entmaxkv.PagedKVCache,
        *,
        alpha: float | Tensor = 1.5,
        scale: float | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `entmaxkv.select.PageSelector.pages`."""
        options = {"alpha": alpha, "scale": scale, "alibi_slopes": alibi_slopes}
        if self.active:
            for name, select in self.methods.items():
                self.found[name][self.calls % self.layers].append(measure(q, cache, select=select, **options))
        self.calls += 1
        return entmaxkv.TopPages(cache.max_tokens).pages(q, cache, **options)


def tensor(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int64)).to(device)


def answered(suite: Suite, likeliest: Tensor) -> float:
    """Share of the values whose every byte is the likeliest."""
    expected = suite.follows[:, 1:][suite.answers[:, 1:]].reshape(-1, RECALL)
    got = likeliest.cpu().numpy()[suite.answers[:, 1:]].reshape(-1, RECALL)
    return float((expected == got).all(axis=1).mean())


def probed(context: Context, suite: Suite, methods: dict[str, Selector | None]) -> dict[str, list[list[Metrics]]]:
    """What `measure` says of each method at some steps of the text, [layer][step]."""
    probe = Probe(methods, len(context.layers))
    stepper = Stepper(context, probe, eager=True)
    follows = tensor(suite.follows, context.model.device)
    at = {(2 * i + 1) * STEPS // (2 * PROBED_STEPS) for i in range(PROBED_STEPS)}
    for i in range(max(at) + 1):
        probe.active = i in at
        stepper.ids.copy_(follows[:, i : i + 1])
        stepper.step()
    return probe.found


def by_head(found: list[list[Metrics]], name: str) -> Tensor:
    """Mean of a metric over steps and rows, [layers, heads] float64."""
    return torch.stack(
        [torch.stack([getattr(step, name).double().mean(0) for step in layer]).mean(0) for layer in found]
    )


def facts_of(found: list[list[Metrics]]) -> dict[str, Any]:
    """A selector's metrics: means, and of each layer's heads what the figures show."""
    every = [step for layer in found for step in layer]
    heads = {name: by_head(found, name).cpu() for name in ("dropped_mass", "output_error", "support", "tokens")}
    return {
        "delta": heads["dropped_mass"].mean().item(),
        "support_recall": by_head(found, "support_recall").mean().item(),
        "error": heads["output_error"].mean().item(),
        "tokens": heads["tokens"].mean().item(),
        "share": sum(step.bytes_read for step in every) / sum(step.kv_bytes for step in every),
        "certified": by_head(found, "certified").mean().item(),
        "heads": {name: [[float(f"{x:.3g}") for x in layer] for layer in x.tolist()] for name, x in heads.items()},
    }


def evaluate(model: PreTrainedModel, text: np.ndarray, context: int, longest: int, console: Console) -> list[dict]:
    """One row per selector at this context."""
    methods = selectors(model.config.entmax_alpha)
    rows: dict[str, dict[str, Any]] = {name: {"select": name, "context": context} for name in methods}
    with Progress(console=console) as bar:
        task = bar.add_task(f"context {context}", total=3 * len(methods) + 1)
        for name, suite in suites(text, context, longest).items():
            read = Context(model, tensor(suite.read, model.device), room=max(STEPS, suite.follows.shape[1]))
            follows = tensor(suite.follows, model.device)
            written = None
            for method, select in methods.items():
                stepper = Stepper(read, select)
                decoded = stepper.read(follows)
                if name == "text":
                    rows[method]["bits"] = decoded.bits.double().mean().item()
                    mine = stepper.write(follows[:, :1], STEPS)
                    written = mine if written is None else written
                    rows[method]["same"] = (mine == written).cumprod(dim=1).sum(dim=1).double().mean().item()
                else:
                    rows[method][name] = answered(suite, decoded.likeliest)
                bar.advance(task)
            if name == "text":
                for method, found in probed(read, suite, methods).items():
                    rows[method] |= facts_of(found)
                bar.advance(task)
    return list(rows.values())


def table(rows: list[dict]) -> Table:
    shown = Table(title=f"context {rows[0]['context']}")
    shown.add_column("selector")
    titles = ("bits", "passkey", "recall", "same bytes", "δ", "support recall", "error", "tokens", "% of KV bytes")
    for title in titles:
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(
            row["select"],
            f"{row['bits']:.4f}",
            *(f"{row[name]:.0%}" for name in ("passkey", "recall")),
            f"{row['same']:.0f}",
            f"{row['delta']:.2g}",
            f"{row['support_recall']:.4f}",
            f"{row['error']:.2g}",
            f"{row['tokens']:.0f}",
            f"{100 * row['share']:.1f}",
        )
    return shown


def held_out_text(source: Path) -> np.ndarray:
    """The held-out files of the standard library joined, those with near relatives in the training text last."""
    names = {name: path for name, path in files(source).items() if held_out(name)}
    last = ("encodings/", "test/")
    order = sorted(names, key=lambda name: (name.startswith(last), name))
    return np.frombuffer(b"".join(names[name].read_bytes() + SEPARATOR for name in order), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--context", type=positive, nargs="+", default=[4096], help="bytes read first (default 4096)")
    parser.add_argument("--longest", type=positive, help="leave room for such contexts too (default: the longest)")
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    check(parser, args)
    if not (args.model / "config.json").is_file():
        parser.error(f"expected a folder with a config.json, got {args.model}")
    console = Console()
    text = held_out_text(args.source)
    longest = max(args.longest or 0, *args.context)
    if len(text) < longest + STEPS + ROWS["passkey"]:
        parser.error(f"expected contexts shorter than the {len(text)} bytes of held-out text, got {longest}")
    model = load(args.model, args.device)
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    alpha = model.config.entmax_alpha
    about = {"kind": "quality", "model": args.model.name, "alpha": alpha}
    for context in sorted(args.context):
        rows = evaluate(model, text, context, longest, console)
        console.print(table(rows))
        document["rows"] += [about | row for row in rows]
        report(document, args, console)


if __name__ == "__main__":
    main()
