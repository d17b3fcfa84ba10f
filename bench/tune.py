"""Page scores and margins that `TopPages` and `Gaussian` could have, by what they drop of a model's attention.

    python bench/tune.py examples/stdlib-entmax --context 4096 16384 --text training

Under a budget, pages are ranked by the merit that their best head gives them; z = (alpha - 1) s as in the README, tau
is the threshold that the mixture of the pages' Gaussians has. What `Gaussian` reads follows its quantile and margin.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decoding import Context, Stepper, load
from inputs import positive
from quality import STEPS, answered, facts_of, held_out_text, probed, suites, tensor
from report import check, machine, report
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import entmaxkv
from entmaxkv import ops

from corpus import SEPARATOR, default_source, files, held_out  # isort: skip

BUDGETS = (256, 1024)
# As the model's text, so that training text and held-out text are equally long.
TRAINING_BYTES = 1_200_000


def mixture_threshold(mean: Tensor, std: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """tau [batch, heads] of sum_pages counts E[(z - tau)_+^2] = 1 for z ~ N(mean, std^2); alpha must be 1.5."""
    if alpha != 1.5:
        raise SystemExit(f"expected a model with alpha 1.5, got {alpha}")
    low, high = mean.amax(-1) - 1, (mean + 9 * std).amax(-1)
    for _ in range(60):
        tau = (low + high) / 2
        mass = (counts * expected_weight(mean - tau[..., None], std)).sum(-1)
        low, high = torch.where(mass > 1, tau, low), torch.where(mass > 1, high, tau)
    return low


def expected_weight(mean: Tensor, std: Tensor) -> Tensor:
    """E[x_+^2] of x ~ N(mean, std^2)."""
    std = std.clamp_min(1e-12)
    at = mean / std
    below = torch.special.ndtr(at)
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    return ((mean.square() + std.square()) * below + mean * std * density).clamp_min(0)


@dataclass(frozen=True)
class Merit:
    """Best pages under a budget by one of the merits in `MERITS`."""

    name: str
    budget: int

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
        table = cache.page_table, cache.seq_lens, cache.page_size, scale, alibi_slopes
        bound = ops.score_pages(q, cache.k_min, cache.k_max, *table).double()
        least = -ops.score_pages(-q, cache.k_min, cache.k_max, *table).double()
        mean, std = (x.double() for x in ops.score_gaussian(q, cache.k_mean, cache.k_std, *table))
        used = -(-int(cache.seq_lens[0]) // cache.page_size)
        gap = float(alpha) - 1
        bound, least, mean, std = (gap * x[..., :used] for x in (bound, least, mean, std))
        counts = torch.full_like(mean, cache.page_size)
        counts[..., -1] = int(cache.seq_lens[0]) - (used - 1) * cache.page_size
        tau = mixture_threshold(mean, std, counts, float(alpha))[..., None]
        merit = MERITS[self.name](Pages(bound, least, mean, std, tau, counts))
        merit = merit.unflatten(1, (cache.kv_heads, -1)).amax(2)
        merit[..., -1] = math.inf
        kept = min(used, max(1, self.budget // cache.page_size))
        chosen = merit.topk(kept).indices.sort().values.int()
        return chosen, torch.full(chosen.shape[:2], kept, dtype=torch.int32, device=q.device)


class Pages(NamedTuple):
    """What is known of the scores z of each page's tokens: [batch, heads, pages] but for tau, [batch, heads, 1]."""

    most: Tensor
    least: Tensor
    mean: Tensor
    std: Tensor
    tau: Tensor
    counts: Tensor

    def raised(self, c: float) -> Tensor:
        return self.mean + c * self.std

    def within(self, c: float) -> Tensor:
        """From the middle of the box, c = 0, to its bound, c = 1."""
        return (self.most + self.least) / 2 + c * (self.most - self.least) / 2

    def between(self, c: float) -> Tensor:
        """From the mean, c = 0, to the bound, c = 1."""
        return self.mean + c * (self.most - self.mean)


def to_best(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


MERITS: dict[str, Callable[[Pages], Tensor]] = {
    "bound - best": lambda p: to_best(p.most),
    "bound - tau": lambda p: p.most - p.tau,
    "bound": lambda p: p.most,
    **{f"box at {c:g} - best": lambda p, c=c: to_best(p.within(c)) for c in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)},
    **{f"mean to bound at {c:g} - best": lambda p, c=c: to_best(p.between(c)) for c in (0.2, 0.3, 0.4, 0.5, 0.6)},
    **{f"mean + {c:g} std - best": lambda p, c=c: to_best(p.raised(c)) for c in (1, 2, 3, 4, 6, 8)},
    **{f"mean + {c:g} std - tau": lambda p, c=c: p.raised(c) - p.tau for c in (2, 3)},
    "expected mass": lambda p: p.counts * expected_weight(p.mean - p.tau, p.std),
}


def gaussians() -> dict[str, Any]:
    """Quantiles of a page's best token, those that count all pages of 4096 or 131072 tokens too, and margins."""
    found = {}
    for quantile in (0.5, 0.8, 0.95, 0.99, 0.95 ** (1 / 256), 0.95 ** (1 / 8192)):
        for margin in (-0.25, 0.0, 0.25, 0.5, 1.0):
            name = f"Gaussian(quantile={quantile:.6g}, margin={margin:g})"
            found[name] = entmaxkv.Gaussian(quantile=quantile, margin=margin, dense_below=0)
    return found


def training_text(source: Path) -> np.ndarray:
    """Training files of the standard library joined, evenly taken, as long as the held-out text."""
    names = {name: path for name, path in files(source).items() if not held_out(name)}
    texts = [names[name].read_bytes() + SEPARATOR for name in sorted(names)]
    stride = max(1, sum(map(len, texts)) // TRAINING_BYTES)
    return np.frombuffer(b"".join(texts[::stride]), np.uint8)


def evaluate(model: PreTrainedModel, text: np.ndarray, context: int, longest: int, console: Console) -> list[dict]:
    """One row per selector at this context."""
    methods: dict[str, Any] = {f"{name}, {budget}": Merit(name, budget) for budget in BUDGETS for name in MERITS}
    methods |= gaussians()
    rows: dict[str, dict[str, Any]] = {name: {"select": name, "context": context} for name in methods}
    for name, suite in suites(text, context, longest).items():
        room = max(STEPS, suite.follows.shape[1])
        read = Context(model, tensor(suite.read, model.device), room=room)
        if name == "text":
            for method, found in probed(read, suite, methods).items():
                rows[method] |= {name: x for name, x in facts_of(found).items() if name != "heads"}
            continue
        follows = tensor(suite.follows, model.device)
        for method in track(methods, f"{name} at {context}", console=console):
            decoded = Stepper(read, methods[method], eager=True).read(follows)
            rows[method][name] = answered(suite, decoded.likeliest)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--context", type=positive, nargs="+", default=[4096], help="bytes read first (default 4096)")
    parser.add_argument("--text", choices=["training", "held-out"], default="training", help="default training")
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    check(parser, args)
    console = Console()
    text = (training_text if args.text == "training" else held_out_text)(args.source)
    model = load(args.model, args.device)
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    about = {"kind": "tune", "model": args.model.name, "text": args.text}
    for context in args.context:
        rows = evaluate(model, text, context, max(args.context), console)
        shown = Table(title=f"{args.text} text, context {context}")
        shown.add_column("selector", no_wrap=True)
        titles = ("tokens", "delta", "support_recall", "error", "passkey", "recall")
        for title in titles:
            shown.add_column(title.replace("_", " "), justify="right")
        for row in rows:
            shown.add_row(row["select"], *(f"{row[title]:.4g}" for title in titles))
        console.print(shown)
        document["rows"] += [about | row for row in rows]
    report(document, args, console)


if __name__ == "__main__":
    main()
