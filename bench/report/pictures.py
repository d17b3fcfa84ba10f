"""Draws README.md's pictures: what a step costs and loses, the weights of entmax, and what each stage reads.

    python bench/report/pictures.py

`cost.png` and `step.png` take their numbers from bench/decode.py's JSON. `weights.png` computes its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.append(str(Path(__file__).parents[2]))
from bench.program import Help, Row
from bench.report.tables import (
    LOSSY,
    OWN,
    SKETCH,
    best_softmax,
    load,
    machine_line,
    percent,
    places,
    size,
    standard,
    steps,
)
from entmaxkv import reference

if TYPE_CHECKING:  # --help needs no matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
WAYS = ("softmax", *OWN)  # in the order of README.md's table
CONTEXTS = (131072, 1048576)
EXACT, RED, PALE, SOFT = "#1b7837", "#c0392b", "#e8e8e8", "0.45"
CELLS = 56  # tokens that the picture of a step shows


def draw_cost(rows: list[Row]) -> Figure:
    """For each way of decoding, the time of a step on the left, and the weight that it loses on the right."""
    import matplotlib.pyplot as plt

    rows = standard(rows, "gpu", "bf16")
    figure, panels = plt.subplots(
        1, 4, figsize=(9.6, 3.4), sharey=True, layout="constrained", width_ratios=[1.3, 1, 1.3, 1]
    )
    for context, (time, loss) in zip(CONTEXTS, (panels[:2], panels[2:]), strict=True):
        here = places(rows)["model", 1, context]
        found = steps(here) | {"softmax": best_softmax(here)}
        for y, way in enumerate(WAYS):
            row = found[way]
            dropped = row.get("delta", 0.0)
            color = SOFT if way == "softmax" else RED if way in LOSSY else EXACT
            time.barh(y, row["ratio"], color=color, height=0.62)
            time.text(row["ratio"] + 0.03, y, percent(row["ratio"]), va="center")
            loss.barh(y, dropped, color=color, height=0.62)
            said = "baseline" if way == "softmax" else percent(dropped) if way in LOSSY else "0, exact"
            loss.text(dropped + 0.004, y, said, va="center", color=color)
        time.set_xlim(0, 1.4)
        time.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        loss.set_xlim(0, 0.26)
        loss.set_xticks([0, 0.1, 0.2], ["0", "10 %", "20 %"])
        time.set_title(f"{size(1, context)} tokens: time\n(softmax = 100 %)", fontsize=9.5)
        loss.set_title(f"{size(1, context)} tokens: attention\nweight that is lost", fontsize=9.5)
    panels[0].set_yticks(range(len(WAYS)), [OWN.get(way, way).replace("`", "") for way in WAYS])
    panels[0].invert_yaxis()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    used = [row for row in rows if row["keys"] == "model" and row["context"] in CONTEXTS]
    gpu = machine_line(used).split(",")[0]
    figure.supxlabel(
        f"One attention step of one sequence, not the whole model. {gpu}, keys of the shipped model.\n"
        "Grey: softmax. Green: exact. Red: some tokens with weight above 0 are not read.",
        fontsize=9,
    )
    return figure


def draw_weights() -> Figure:
    """Softmax and 1.5-entmax weights of the same scores, largest first, on a logarithmic scale that also shows 0."""
    import matplotlib.pyplot as plt

    tokens = 64
    scores = 1.7 * torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(tokens).double().flip(0) + 0.5) / tokens)
    softmax = scores.softmax(dim=0)
    entmax = reference.entmax(scores, 1.5)[0]
    support = int((entmax > 0).sum())
    figure, panel = plt.subplots(figsize=(7.6, 3.1), layout="constrained")
    x = torch.arange(1, tokens + 1)
    panel.axhspan(-6e-8, 6e-8, color="0.93")
    panel.plot(x, softmax, "o", color=SOFT, ms=4, label=f"softmax: all {tokens} tokens have weight")
    panel.plot(
        x[:support], entmax[:support], "s", color=EXACT, ms=4.5, label=f"1.5-entmax: {support} tokens have weight"
    )
    panel.plot(x[support:], entmax[support:], "s", mfc="white", mec=EXACT, ms=4.5)
    panel.annotate(
        f"1.5-entmax: {tokens - support} tokens have weight exactly 0.\nTheir value vectors are not read.",
        ((support + tokens) / 2, 1e-8),
        ((support + tokens) / 2, 2e-6),
        ha="center",
        color=EXACT,
        arrowprops={"arrowstyle": "-", "color": EXACT, "linewidth": 0.8},
    )
    panel.set_yscale("symlog", linthresh=1e-7, linscale=0.5)
    panel.set_ylim(-6e-8, 1.5)
    ticks = [0, 1e-6, 1e-4, 1e-2, 1]
    panel.set_yticks(ticks, ["0", "10⁻⁶", "10⁻⁴", "0.01", "1"])
    panel.set_xlabel("tokens, highest score first")
    panel.set_ylabel("weight (log scale, and 0)")
    panel.legend(loc="upper right", frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def strip(panel: Axes, y: float, name: str, read: list[int], color: str, note: str) -> None:
    """One row of cells, a cell per token; the cells in `read` are coloured."""
    for cell in range(CELLS):
        color_of = color if cell in read else PALE
        panel.broken_barh([(0.255 + cell * 0.0078, 0.0062)], (y, 0.042), color=color_of, linewidth=0)
    panel.text(0.247, y + 0.021, name, ha="right", va="center", fontsize=9)
    panel.text(0.70, y + 0.021, note, ha="left", va="center", fontsize=9)


def draw_step(rows: list[Row]) -> Figure:
    """What each stage of a `KeySketch()` step reads of the cache."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    here = places(standard(rows, "gpu", "bf16"))["model", 1, CONTEXTS[0]]
    found = steps(here)
    row = found[SKETCH]
    read, of_tokens = row["bytes"] / best_softmax(here)["bytes"], row["tokens"] / row["context"]
    everything = list(range(CELLS))
    new = [CELLS - 1]
    sampled, candidates, support = [9, 30, 44, 54], [9, 17, 30, 38, 53, 54, 55], [9, 30, 54, 55]
    figure, panel = plt.subplots(figsize=(9.6, 4.4))
    figure.subplots_adjust(0, 0, 1, 1)
    panel.set_axis_off()
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    stages = (
        ("1  sketch", "once per token,\nwhen it is appended", 0.79, "#4c78a8"),
        ("2  select", "which tokens can have\nweight for this query?", 0.50, "#e08214"),
        ("3  decode", "threshold, weights,\noutput", 0.21, EXACT),
    )
    for title, what, y, color in stages:
        panel.add_patch(
            FancyBboxPatch((0.015, y - 0.085), 0.16, 0.2, boxstyle="round,pad=0.005", fc="white", ec=color, lw=1.6)
        )
        panel.text(0.095, y + 0.065, title, ha="center", weight="bold", color=color, fontsize=10.5)
        panel.text(0.095, y - 0.055, what, ha="center", fontsize=9)
    for y in (0.79, 0.50):
        panel.annotate("", (0.095, y - 0.17), (0.095, y - 0.09), arrowprops={"arrowstyle": "->", "linewidth": 1.4})
    blue, orange = stages[0][3], stages[1][3]
    strip(panel, 0.84, "keys", new, blue, "read: the key of the new token")
    strip(panel, 0.74, "codes", new, blue, "written: its code, 4 bits per coordinate")
    strip(
        panel,
        0.55,
        "codes",
        everything,
        orange,
        "read: 2 bits of all, 2 more where needed.\nThey bound every score.",
    )
    strip(panel, 0.45, "keys", sampled, orange, "read: at most 64 per query head.\nThey give a floor of the threshold.")
    strip(panel, 0.26, "keys", candidates, EXACT, "read: keys of candidates, the tokens\nwith a bound above the floor")
    strip(panel, 0.16, "values", support, EXACT, "read: values of the tokens with\nweight above 0")
    panel.text(
        0.255,
        0.065,
        "A token whose bound is not above the floor has weight 0, even if its key was read in stage 2. "
        "So nothing is lost.\n"
        f"On the shipped model's keys at {size(1, CONTEXTS[0])} tokens {100 * of_tokens:.1f} % of the tokens are "
        f"candidates. Stages 2 and 3 read\n{100 * read:.0f} % of the bytes that softmax reads.",
        fontsize=8.5,
        va="center",
    )
    panel.text(
        0.255,
        0.93,
        "One cell is one token of the cache, the newest on the right. "
        "Coloured cells are read or written. Not to scale.",
        fontsize=8.5,
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder of the pictures")
    args = parser.parse_args()
    try:
        import matplotlib as mpl
    except ImportError as error:
        parser.error(f"expected matplotlib, got {error}; pip install --no-build-isolation '.[bench]' installs it")
    rows = load(args.results)
    if not rows:
        parser.error(f"--results: expected JSON of bench/decode.py, got none in {args.results}")
    args.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9}):
        drawn = {"cost.png": draw_cost(rows), "weights.png": draw_weights(), "step.png": draw_step(rows)}
    for name, figure in drawn.items():
        figure.savefig(args.out / name, dpi=108, metadata={"Software": None})
        print(args.out / name)


if __name__ == "__main__":
    main()
