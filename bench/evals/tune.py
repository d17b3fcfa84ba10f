"""Compares page scores and margins that `TopPages` and `Gaussian` could use, by what they lose of a model's attention.

    python bench/evals/tune.py examples/stdlib-entmax --context 4096 16384 --text training

Under a budget, pages are ranked by merit; a page has the best merit that a head of its group gives to it. Formulas use
z = (alpha - 1) s, where s is the score (docs/ops.md). tau is the threshold of the mixture of all pages' Gaussians. What
`Gaussian` reads follows from its quantile and its margin.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv import ops

sys.path.append(str(Path(__file__).parents[2]))
from bench.evals import suites
from bench.evals.decoding import Context, load
from bench.evals.options import check_contexts, chosen, comparing_parser
from bench.evals.suites import SEED, answering, facts_of, held_out_text, probed, tensor
from bench.examples import SEPARATOR, files, held_out
from bench.program import Row, machine, report, wide_console

BUDGETS = (256, 1024)
SEEDS = {"training": SEED + 1, "held-out": SEED}
UNUSED = -1e9  # score of a page without tokens, low enough to have no weight
TRAINING_BYTES = 1_200_000  # about the size of the held-out text


def mixture_threshold(mean: Tensor, std: Tensor, counts: Tensor) -> Tensor:
    """tau [batch, heads] that solves sum_pages counts E[(z - tau)_+^2] = 1 for z ~ N(mean, std^2), with alpha 1.5."""
    low, high = mean.amax(-1) - 1, (mean + 9 * std).amax(-1)
    for _ in range(60):
        tau = (low + high) / 2
        mass = (counts * expected_weight(mean - tau[..., None], std)).sum(-1)
        low, high = torch.where(mass > 1, tau, low), torch.where(mass > 1, high, tau)
    return low


def expected_weight(mean: Tensor, std: Tensor) -> Tensor:
    """E[x_+^2] for x ~ N(mean, std^2)."""
    std = std.clamp_min(1e-12)
    at = mean / std
    below = torch.special.ndtr(at)
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    return ((mean.square() + std.square()) * below + mean * std * density).clamp_min(0)


@dataclass(frozen=True)
class Merit:
    """Selects the pages with the best merits under a budget, by the merit of this name in `MERITS`; alpha is 1.5.

    Every row must have more tokens than the budget.
    """

    name: str
    budget: int

    needs = frozenset({"minmax", "moments"})

    def dense_up_to(self, device_type: str) -> int:
        """See `entmaxkv.Selector.dense_up_to`."""
        return 0

    def select(self, q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> entmaxkv.Selection:
        """See `entmaxkv.Selector.select`."""
        merits = self.merits(q, cache, scoring)
        kept = min(merits.shape[2], max(1, self.budget // cache.page_size))
        selected = merits.topk(kept).indices.sort().values.int()
        counts = torch.full(selected.shape[:2], kept, dtype=torch.int32, device=q.device)
        return entmaxkv.Selection(selected, counts)

    def merits(self, q: Tensor, cache: entmaxkv.PagedKVCache, scoring: entmaxkv.Scoring) -> Tensor:
        """The merits [batch, kv_heads, max_pages] float64: inf for the last page, -inf for pages after it."""
        table = cache.page_table, cache.seq_lens, cache.page_size, scoring.scale, scoring.alibi_slopes
        bound = ops.score_pages(q, cache.k_min, cache.k_max, *table).double()
        least = -ops.score_pages(-q, cache.k_min, cache.k_max, *table).double()
        mean, std = (x.double() for x in ops.score_gaussian(q, cache.k_mean, cache.k_std, *table))
        first = cache.page_size * torch.arange(cache.page_table.shape[1], device=q.device)
        left = cache.seq_lens[:, None, None] - first
        gap = float(scoring.alpha) - 1
        bound, least, mean = (torch.where(left > 0, gap * x, UNUSED) for x in (bound, least, mean))
        std = torch.where(left > 0, gap * std, 0.0)
        counts = left.clamp(0, cache.page_size).double()
        merit = MERITS[self.name](Pages(bound, least, mean, std, counts))
        merit = merit.unflatten(1, (cache.kv_heads, -1)).amax(2)
        return merit.masked_fill(left <= 0, -math.inf).masked_fill((left > 0) & (left <= cache.page_size), math.inf)


@dataclass(frozen=True)
class Pages:
    """What is known about the scores z of each page's tokens.

    Attributes:
        most, least: [batch, heads, pages] float64, bounds.
        mean, std: [batch, heads, pages] float64.
        counts: [batch, heads, pages] float64, tokens of the page.
        tau: [batch, heads, 1] float64.
    """

    most: Tensor
    least: Tensor
    mean: Tensor
    std: Tensor
    counts: Tensor

    @cached_property
    def tau(self) -> Tensor:
        return mixture_threshold(self.mean, self.std, self.counts)[..., None]

    def raised(self, c: float) -> Tensor:
        return self.mean + c * self.std

    def within(self, c: float) -> Tensor:
        """A score between the middle of the box (c = 0) and its upper bound (c = 1)."""
        return (self.most + self.least) / 2 + c * (self.most - self.least) / 2

    def between(self, c: float) -> Tensor:
        """A score between the mean (c = 0) and the upper bound (c = 1)."""
        return self.mean + c * (self.most - self.mean)


def less_best(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


def log_softmax(x: Tensor) -> Tensor:
    """Half the logarithm of the page softmax: x is z = s / 2, and the page softmax is that of s."""
    return x - (2 * x).logsumexp(-1, keepdim=True) / 2


SCORES: dict[str, Callable[[Pages], Tensor]] = {
    "bound": lambda p: p.most,
    **{f"box at {c:g}": lambda p, c=c: p.within(c) for c in (0.4, 0.6, 0.8)},
    "mean to bound at 0.4": lambda p: p.between(0.4),
    "mean + 4 std": lambda p: p.raised(4),
}
MERITS: dict[str, Callable[[Pages], Tensor]] = {
    **SCORES,  # the score by itself
    # minus the best score of the head
    **{f"{name} - best": lambda p, score=score: less_best(score(p)) for name, score in SCORES.items()},
    # as its page softmax
    **{f"{name} - all": lambda p, score=score: log_softmax(score(p)) for name, score in SCORES.items()},
    # minus tau
    **{f"{name} - tau": lambda p, score=score: score(p) - p.tau for name, score in SCORES.items()},
    "expected mass": lambda p: p.counts * expected_weight(p.mean - p.tau, p.std),
}


def gaussians() -> dict[str, Any]:
    """`Gaussian` with several quantiles and margins, by name.

    The last quantile treats 256 pages (4096 tokens) as one page.
    """
    found = {}
    for quantile in (0.8, 0.95, 0.99, 0.95 ** (1 / 256)):
        for margin in (0.0, 0.25, 0.5):
            name = f"Gaussian(quantile={quantile:.6g}, margin={margin:g})"
            found[name] = entmaxkv.Gaussian(quantile=quantile, margin=margin, dense_below=0)
    return found


def training_text(source: Path) -> np.ndarray:
    """An even sample of the standard library's training files, joined."""
    names = {name: path for name, path in files(source).items() if not held_out(name)}
    texts = [names[name].read_bytes() + SEPARATOR for name in sorted(names)]
    stride = max(1, sum(map(len, texts)) // TRAINING_BYTES)
    return np.frombuffer(b"".join(texts[::stride]), np.uint8)


def evaluate(
    model: PreTrainedModel,
    methods: dict[str, Any],
    text: np.ndarray,
    context: int,
    longest: int,
    rows: int,
    seed: int,
    console: Console,
) -> list[Row]:
    """One row for each selector at this context."""
    drawn = suites.prepared(text, context, longest, rows, seed)
    read = Context(model, tensor(drawn["text"].read, model.device), room=suites.STEPS)
    found: dict[str, dict[str, Any]] = {}
    for method, metrics in probed(read, drawn["text"], methods).items():
        found[method] = {what: x for what, x in facts_of(metrics).items() if what not in ("heads", "layer_share")}
    del read
    with Progress(console=console) as bar:
        task = bar.add_task(f"context {context}", total=3 * len(methods))
        for name in ("passkey", "recall"):
            for method, share in answering(model, drawn[name], methods, rows, partial(bar.advance, task)).items():
                found[method][name] = share
    return [{"select": method, "context": context} | facts for method, facts in found.items()]


def main() -> None:
    parser = comparing_parser(__doc__)
    parser.add_argument("--text", choices=SEEDS, default="training", help="which files of the standard library to read")
    args = parser.parse_args()
    text = (training_text if args.text == "training" else held_out_text)(args.source)
    check_contexts(parser, args, text, 2 * args.rows)
    methods: dict[str, Any] = {f"{name}, {budget}": Merit(name, budget) for budget in BUDGETS for name in MERITS}
    methods |= gaussians()
    methods = chosen(parser, args, methods)
    console = wide_console()
    model = load(args.model, args.device)
    if model.config.entmax_alpha != 1.5:
        parser.error(f"expected a model with alpha 1.5, got {model.config.entmax_alpha}")
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    about = {"kind": "tune", "model": args.model.name, "text": args.text}
    for context in args.context:
        longest = max(args.longest or 0, *args.context)
        rows = evaluate(model, methods, text, context, longest, args.rows, SEEDS[args.text], console)
        shown = Table(title=f"{args.text} text, context {context}")
        shown.add_column("selector", no_wrap=True)
        titles = ("tokens", "delta", "support_recall", "error", "passkey", "recall")
        for title in titles:
            shown.add_column(title.replace("_", " "), justify="right", no_wrap=True)
        for row in rows:
            shown.add_row(row["select"], *(f"{row[title]:.4g}" for title in titles))
        console.print(shown)
        document["rows"] += [about | row for row in rows]
        report(document, args, console)


if __name__ == "__main__":
    main()
