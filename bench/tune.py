"""Page scores and margins that `TopPages` and `Gaussian` could have, by what they drop of a model's attention.

    python bench/tune.py examples/stdlib-entmax --context 4096 16384 --text training

Under a budget, pages are ranked by the merit that their best head gives them; z = (alpha - 1) s as in the README, tau is
the threshold that the mixture of the pages' Gaussians has. What `Gaussian` reads instead follows its quantile and margin.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decoding import Context, load
from inputs import positive
from quality import Suite, facts_of, haystacks, held_out_text, probed, tensor
from report import check, machine, report
from rich.console import Console
from rich.table import Table
from torch import Tensor

import entmaxkv
from entmaxkv import ops

from corpus import SEPARATOR, default_source, files, held_out  # isort: skip

BUDGETS = (256, 1024, 4096)
ROWS = 4
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
        mean, std = (x.double() for x in ops.score_gaussian(q, cache.k_mean, cache.k_std, *table))
        used = -(-int(cache.seq_lens[0]) // cache.page_size)
        gap = float(alpha) - 1
        bound, mean, std = (gap * x[..., :used] for x in (bound, mean, std))
        counts = torch.full_like(mean, cache.page_size)
        counts[..., -1] = int(cache.seq_lens[0]) - (used - 1) * cache.page_size
        tau = mixture_threshold(mean, std, counts, float(alpha))[..., None]
        merit = MERITS[self.name](bound, mean, std, tau, counts)
        merit = merit.unflatten(1, (cache.kv_heads, -1)).amax(2)
        merit[..., -1] = math.inf
        kept = min(used, max(1, self.budget // cache.page_size))
        chosen = merit.topk(kept).indices.sort().values.int()
        return chosen, torch.full(chosen.shape[:2], kept, dtype=torch.int32, device=q.device)


def raised(c: float) -> Any:
    return lambda bound, mean, std, tau, counts: mean + c * std - tau


def against_best(c: float) -> Any:
    return lambda bound, mean, std, tau, counts: mean + c * std - (mean + c * std).amax(-1, keepdim=True)


MERITS: dict[str, Any] = {
    "bound - best": lambda bound, mean, std, tau, counts: bound - bound.amax(-1, keepdim=True),
    "bound - tau": lambda bound, mean, std, tau, counts: bound - tau,
    "bound": lambda bound, mean, std, tau, counts: bound,
    **{f"mean + {c:g} std - best": against_best(c) for c in (1.0, 2.0, 3.0)},
    **{f"mean + {c:g} std - tau": raised(c) for c in (1.0, 1.5, 2.0, 3.0, 4.0)},
    "min(bound, mean + 3 std) - tau": lambda bound, mean, std, tau, counts: torch.minimum(bound, mean + 3 * std) - tau,
    "(mean - tau) / std": lambda bound, mean, std, tau, counts: (mean - tau) / std.clamp_min(1e-12),
    "expected mass": lambda bound, mean, std, tau, counts: counts * expected_weight(mean - tau, std),
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
    methods: dict[str, Any] = {"TopPages(1024)": entmaxkv.TopPages(1024, dense_below=0)}
    methods |= {f"{name}, {budget}": Merit(name, budget) for budget in BUDGETS for name in MERITS} | gaussians()
    document: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    about = {"kind": "tune", "model": args.model.name, "text": args.text}
    for context in args.context:
        read, follows = haystacks(text, ROWS, context, max(args.context))
        suite = Suite(read, follows, np.zeros(follows.shape, bool))
        found = probed(Context(model, tensor(read, model.device), room=follows.shape[1]), suite, methods)
        shown = Table(title=f"{args.text} text, context {context}")
        shown.add_column("selector")
        for title in ("tokens", "δ", "support recall", "error"):
            shown.add_column(title, justify="right")
        for name, metrics in found.items():
            row = facts_of(metrics)
            row.pop("heads")
            document["rows"].append(about | {"select": name, "context": context} | row)
            shown.add_row(
                name,
                f"{row['tokens']:.0f}",
                f"{row['delta']:.4f}",
                f"{row['support_recall']:.4f}",
                f"{row['error']:.4f}",
            )
        console.print(shown)
    report(document, args, console)


if __name__ == "__main__":
    main()
