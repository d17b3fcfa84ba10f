"""Makes the tables and figures of what selectors lose, from the other programs of bench/evals and from training logs.

The rows are those of quality.py, tune.py and end_to_end.py, and of the logs of examples/train/train.py. `TABLES` and
`FIGURES` hold functions of all rows under bench/results, which return "" or None if there are no rows for them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.program import Row
from bench.report.tables import digits, machine_line, size, table

ENTMAX, SOFTMAX, SHIPPED = "twin-entmax", "twin-softmax", "stdlib-entmax"
LONGEST = 131072
KINDS = ("quality", "tune", "end to end", "training")
COLORS = {"dense": "black", "KeySketch": "C3", "bits=2": "C4", "TopPages": "C0", "Gaussian": "C1"}
RANKED = ", 1024"  # the end of the names of tune.py's merits with this budget
QUANTILES, MARGINS = (0.95, 0.99), (0, 0.25)  # the settings of `Gaussian` in its table
CHOICE = (
    (ENTMAX, "dense"),
    (ENTMAX, "KeySketch()"),
    (ENTMAX, "KeySketch(max_tokens=4096)"),
    (ENTMAX, "TopPages(4096)"),
    (ENTMAX, "Gaussian()"),
    (SOFTMAX, "dense"),
    (SOFTMAX, "TopPages(4096)"),
)
ALWAYS = ("dense", "KeySketch()", "KeySketch(max_tokens=1024)", "TopPages(1024)", "Gaussian()")


def load(folder: Path) -> list[Row]:
    """The rows of the kinds in `KINDS`, each with its machine.

    If several files have the same row, the last file by name counts.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        for row in report.get("rows", []):
            if row.get("kind") in KINDS:
                what = tuple(row.get(name) for name in ("kind", "model", "text", "context", "batch", "select", "step"))
                found[what] = row | {"machine": report["machine"]}
    return list(found.values())


def of(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows that have all of the wanted values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def family(select: str) -> str:
    """The last name of `COLORS` that is part of the selector's name."""
    return next(name for name in reversed(COLORS) if name in select)


def name(select: str) -> str:
    """The selector as the pages write it."""
    return select if select == "dense" else f"`{select}`"


def contexts(rows: list[Row]) -> list[int]:
    return sorted({row["context"] for row in rows})


def by_context(rows: list[Row], cell: Callable[[Row], str], **wanted: Any) -> list[str]:
    """A cell for each context of the rows; it is empty if no wanted row has this context."""
    found = {row["context"]: row for row in of(rows, **wanted)}
    return [cell(found[context]) if context in found else "" for context in contexts(rows)]


def percent(share: float) -> str:
    return f"{share:.0%}"


def quality_at(model: str, context: int) -> Callable[[list[Row]], str]:
    """A table of every selector's losses and costs at one context."""

    def made(rows: list[Row]) -> str:
        here = of(rows, kind="quality", model=model, context=context)
        titles = ["selector", "bits per byte", "passkey", "recall", "common prefix", "δ", "support recall"]
        lines = [
            [
                name(row["select"]),
                f"{row['bits']:.3f}" + (f" ± {row['bits_above_se']:.3f}" if row.get("bits_above_se") else ""),
                percent(row["passkey"]),
                percent(row["recall"]),
                f"{row['common_prefix']:.0f}",
                digits(row["delta"]),
                f"{row['support_recall']:.3f}",
                digits(row["error"]),
                f"{row['tokens']:.0f}",
                f"{row['share']:.1%}",
            ]
            for row in here
        ]
        return table([*titles, "output error", "keys read", "KV bytes"], lines, here)

    return made


def twins(rows: list[Row]) -> list[Row]:
    """The rows of quality.py with one of the two twins."""
    return [row for row in of(rows, kind="quality") if row["model"] in (ENTMAX, SOFTMAX)]


def attention(model: str) -> str:
    """The attention of a twin: entmax or softmax."""
    return model.removeprefix("twin-")


def contexts_of(cell: Callable[[Row], str]) -> Callable[[list[Row]], str]:
    """A table of one measure by context, for both twins."""

    def made(rows: list[Row]) -> str:
        here = [row for row in twins(rows) if row["select"] in ALWAYS]
        lines = [
            [attention(model), name(select), *by_context(here, cell, model=model, select=select)]
            for model in (ENTMAX, SOFTMAX)
            for select in ALWAYS
            if of(here, model=model, select=select)
        ]
        return table(["attention", "selector", *(size(1, context) for context in contexts(here))], lines, here)

    return made


def twins_of(what: str) -> Callable[[list[Row]], str]:
    """A table of what top pages lose with entmax and with softmax, at the same budgets."""

    def cell(row: Row) -> str:
        return digits(row[what])

    def made(rows: list[Row]) -> str:
        here = [row for row in twins(rows) if row["select"].startswith("TopPages")]
        lines = [
            [name(select), attention(model), *by_context(here, cell, model=model, select=select)]
            for select in dict.fromkeys(row["select"] for row in here)
            for model in (ENTMAX, SOFTMAX)
        ]
        return table(["selector", "attention", *(size(1, context) for context in contexts(here))], lines, here)

    return made


def table_of_choice(rows: list[Row]) -> str:
    """What the selectors in `CHOICE` lose at the longest context, and how fast the whole model is with them."""
    lines, used = [], []
    for model, select in CHOICE:
        found = of(rows, kind="quality", model=model, context=LONGEST, select=select)
        dense = of(rows, kind="quality", model=model, context=LONGEST, select="dense")
        speeds = [
            of(rows, kind="end to end", model=model, context=LONGEST, batch=batch, select=select) for batch in (1, 8)
        ]
        if not (found and dense and all(speeds)):
            continue
        (row,) = found
        more = row["bits"] - dense[0]["bits"]
        cells = [f"{more:.3f}", f"{16 * row['passkey']:.0f}", f"{64 * row['recall']:.0f}", digits(row["delta"])]
        lines.append(
            [attention(model), name(select), *cells, percent(row["share"])]
            + [f"{here[0]['tokens_per_s']:.0f}" for here in speeds]
        )
        used += [row, *(here[0] for here in speeds)]
    titles = ["attention", "selector", "bits per byte above dense", "passkeys found, of 16", "values found, of 64"]
    return table([*titles, "δ", "KV bytes", "tokens/s, 1 row", "tokens/s, 8 rows"], lines, used)


def table_of_gaussian(rows: list[Row]) -> str:
    """Figures that the paper has, too: `Gaussian` with the paper's quantile, and passkeys."""
    here = twins(rows)
    paper = "Gaussian(quantile=0.95)"
    measures: dict[str, Callable[[Row], str]] = {
        "δ": lambda row: digits(row["delta"]),
        "support recall": lambda row: f"{row['support_recall']:.3f}",
        "output error": lambda row: digits(row["error"]),
    }
    lines = [
        ["entmax", name(paper), what, *by_context(here, cell, model=ENTMAX, select=paper)]
        for what, cell in measures.items()
    ]
    for model in (ENTMAX, SOFTMAX):
        for select in ("TopPages(1024)", "TopPages(4096)"):
            found = by_context(here, lambda row: percent(row["passkey"]), model=model, select=select)
            lines.append([attention(model), name(select), "passkeys found", *found])
    titles = ["attention", "selector", "measure", *(size(1, context) for context in contexts(here))]
    return table(titles, lines if here else [], here)


def table_of_end_to_end(rows: list[Row]) -> str:
    """Tokens per second of the whole model, and the parts of a step's time."""
    here = of(rows, kind="end to end")
    parts = ("graph", "attention", "append", "other", "eager")
    lines = [
        [
            row["model"].removeprefix("twin-"),
            size(row["batch"], row["context"]),
            name(row["select"]),
            f"{row['tokens_per_s']:.0f}",
            *(f"{row[f'{part}_us']:.0f}" for part in parts),
        ]
        for row in here
    ]
    titles = ["attention", "cache", "selector", "tokens/s", "step, µs", "reading the cache", "appending"]
    return table([*titles, "all other kernels", "eager step"], lines, here)


def table_of_training(rows: list[Row]) -> str:
    """The twins at the end of their training."""
    here = [row for row in of(rows, kind="training") if "distant_bits" in row]
    lines = [
        [
            row["model"],
            f"{row['steps']}",
            f"{row['minutes']:.1f}",
            f"{row['bits']:.3f}",
            f"{row['distant_bits']:.3f}",
            percent(row["recalled"]),
        ]
        for row in here
    ]
    titles = [
        "model",
        "steps",
        "minutes",
        "bits per byte, held out",
        "without near relatives",
        "bytes of facts recalled",
    ]
    return table(titles, lines, here)


def table_of_merits(rows: list[Row]) -> str:
    """What top pages lose when ranked by other merits.

    A merit would be chosen on training text; held-out text shows what the choice is worth.
    """
    here = [row for row in of(rows, kind="tune", model=ENTMAX) if row["select"].endswith(RANKED)]
    places = [
        (context, text)
        for context in contexts(here)
        for text in ("training", "held-out")
        if of(here, context=context, text=text)
    ]
    lines = []
    for select in sorted({row["select"] for row in here}):
        cells = []
        for context, text in places:
            (row,) = of(here, select=select, context=context, text=text) or [{}]
            cells += [digits(row["delta"]), percent(row["passkey"]), percent(row["recall"])] if row else [""] * 3
        lines.append([select.removesuffix(RANKED), *cells])
    titles = [f"{size(1, context)}, {text}: {what}" for context, text in places for what in ("δ", "passkeys", "values")]
    return table(["merit", *titles], lines, here)


def table_of_quantiles(rows: list[Row]) -> str:
    """`Gaussian` by its quantile and margin: keys read, and what is lost."""
    found = []
    for row in of(rows, kind="tune", model=ENTMAX):
        setting = re.match(r"Gaussian\(quantile=(.*), margin=(.*)\)", row["select"])
        if setting and float(setting[1]) in QUANTILES and float(setting[2]) in MARGINS:
            found.append((row["context"], row["text"], float(setting[1]), float(setting[2]), row))
    found.sort(key=lambda case: case[:-1])
    lines = [
        [
            size(1, context),
            text,
            f"{quantile:g}",
            f"{margin:g}",
            f"{row['tokens']:.0f}",
            digits(row["delta"]),
            percent(row["passkey"]),
            percent(row["recall"]),
        ]
        for context, text, quantile, margin, row in found
    ]
    titles = ["context", "text", "quantile", "margin", "keys read", "δ", "passkeys", "values"]
    return table(titles, lines, [case[-1] for case in found])


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "quality_16K": quality_at(ENTMAX, 16384),
    "quality_128K": quality_at(ENTMAX, LONGEST),
    "quality_softmax_128K": quality_at(SOFTMAX, LONGEST),
    "quality_shipped": quality_at(SHIPPED, 16384),
    "choice": table_of_choice,
    "contexts_bits": contexts_of(lambda row: f"{row['bits']:.3f}"),
    "contexts_passkey": contexts_of(lambda row: percent(row["passkey"])),
    "contexts_recall": contexts_of(lambda row: percent(row["recall"])),
    "twins_delta": twins_of("delta"),
    "twins_error": twins_of("error"),
    "beside": table_of_gaussian,
    "end_to_end": table_of_end_to_end,
    "training": table_of_training,
    "merits": table_of_merits,
    "quantiles": table_of_quantiles,
}


def panels(columns: int, *, width: float = 4.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    inches = (1 + width * columns, height)
    figure, grid = plt.subplots(1, columns, figsize=inches, squeeze=False, layout="constrained")
    return figure, list(grid[0])


def finish(figure: Figure, rows: list[Row]) -> Figure:
    figure.suptitle(machine_line(rows), fontsize=7)
    return figure


def draw_quality(rows: list[Row]) -> Figure | None:
    """Losses against the bytes that are read, at the longest context."""
    here = of(rows, kind="quality", model=ENTMAX, context=LONGEST)
    if not here:
        return None
    figure, axes = panels(3)
    (dense,) = of(here, select="dense")
    measures: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("bits per byte, above dense", lambda row: row["bits"] - dense["bits"]),
        ("values recalled, of 32 in the context", lambda row: row["recall"]),
        ("δ, mass dropped", lambda row: row["delta"]),
    )
    for panel, (title, value) in zip(axes, measures, strict=True):
        for kind, color in COLORS.items():
            points = [row for row in here if family(row["select"]) == kind and "certainty" not in row["select"]]
            points.sort(key=lambda row: row["share"])
            if points:
                share = [100 * row["share"] for row in points]
                panel.plot(share, [value(row) for row in points], "o-", color=color, label=kind, ms=4)
        panel.set_xlabel("% of the bytes of keys and values read")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    axes[0].set_yscale("symlog", linthresh=1e-2)
    axes[-1].legend()
    return finish(figure, here)


def draw_contexts(rows: list[Row]) -> Figure | None:
    """Bits per byte, δ and recall against context, with entmax and with softmax."""
    here = [row for row in of(rows, kind="quality") if row["model"] in (ENTMAX, SOFTMAX) and row["select"] in ALWAYS]
    if not here:
        return None
    figure, axes = panels(3)
    for panel, what, title in zip(axes, ("bits", "delta", "recall"), ("bits per byte", "δ", "recall"), strict=True):
        for model, style in ((ENTMAX, "o-"), (SOFTMAX, "s--")):
            for select in dict.fromkeys(row["select"] for row in of(here, model=model)):
                points = sorted(of(here, model=model, select=select), key=lambda row: row["context"])
                label = f"{model.removeprefix('twin-')}, {select}"
                color = "C4" if "max_tokens" in select else COLORS[family(select)]
                x = [row["context"] for row in points]
                panel.plot(x, [row[what] for row in points], style, color=color, label=label, ms=4)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("context, bytes")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(figure, here)


def draw_heads(rows: list[Row]) -> Figure | None:
    """The size of each head's support, and δ of top pages for each head, by context."""
    here = sorted(of(rows, kind="quality", model=ENTMAX, select="dense"), key=lambda row: row["context"])
    if not here:
        return None
    inches = (1 + 2.4 * len(here), 6)
    figure, grid = plt.subplots(2, len(here), figsize=inches, squeeze=False, sharex=True, layout="constrained")
    most = max(np.max(row["heads"]["support"]) for row in here)
    for column, row in enumerate(here):
        support = np.array(row["heads"]["support"])
        (pages,) = of(rows, kind="quality", model=ENTMAX, select="TopPages(1024)", context=row["context"])
        above = grid[0][column].imshow(support, norm="log", vmin=1, vmax=most, aspect="auto")
        below = grid[1][column].imshow(pages["heads"]["delta"], vmin=0, vmax=1, cmap="magma", aspect="auto")
        grid[0][column].set_title(f"{size(1, row['context'])}: median {np.median(support):.0f}")
        grid[1][column].set_title(f"mean {np.mean(pages['heads']['delta']):.2f}")
        grid[1][column].set_xlabel("query head")
        grid[1][column].set_xticks(range(support.shape[1]), range(1, support.shape[1] + 1))
        for panel in grid[:, column]:
            panel.set_yticks(range(len(support)), range(1, len(support) + 1))
    for line, image, title in ((grid[0], above, "tokens with weight"), (grid[1], below, "δ of TopPages(1024)")):
        line[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(line), label=title)
    return finish(figure, here)


def draw_training(rows: list[Row]) -> Figure | None:
    """Held-out loss and recall of the twins against training steps, for the trained and the longest context."""
    here = [row for row in of(rows, kind="training") if "train_bits" in row]
    if not here:
        return None
    figure, axes = panels(2)
    longest = max(row["context"] for row in here)
    for model, color in ((ENTMAX, "C3"), (SOFTMAX, "C0")):
        points = of(here, model=model)
        steps = [row["step"] for row in points]
        for panel, what in zip(axes, ("bits", "recalled"), strict=True):
            now = [row.get(f"{what}_{row['context']}", np.nan) for row in points]
            panel.plot(steps, now, "--", color=color, lw=1)
            panel.plot(steps, [row[f"{what}_{longest}"] for row in points], color=color, label=model)
    axes[0].set_ylim(0.5, 3)
    axes[0].set_title("bits per byte of held-out text")
    axes[1].set_title("bytes of facts that are recalled")
    for panel in axes:
        panel.set_xlabel(f"step; windows of {longest}, and dashed those trained on")
        panel.grid(alpha=0.3)
        panel.legend()
    return finish(figure, here)


def draw_tuning(rows: list[Row]) -> Figure | None:
    """What `Gaussian` loses, by quantile and margin, and top pages by some merits, against the keys that are read."""
    here = of(rows, kind="tune", model=ENTMAX, text="held-out")
    here = of(here, context=max(contexts(here), default=0))
    if not here:
        return None
    figure, axes = panels(3)
    lines: dict[str, list[Row]] = {}
    for row in here:
        quantile = re.match(r"Gaussian\(quantile=(.*), margin=", row["select"])
        merit = re.match(r"(bound - best|box at 0.6 - best|box at 0.6 - all), ", row["select"])
        if quantile:
            lines.setdefault(f"Gaussian, quantile {float(quantile[1]):.6g}", []).append(row)
        elif merit:
            lines.setdefault(f"pages by {merit[1]}", []).append(row)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, sum(label.startswith("Gaussian") for label in lines)))
    for panel, what in zip(axes, ("delta", "passkey", "recall"), strict=True):
        of_quantile = iter(colors)
        for label, points in lines.items():
            points.sort(key=lambda row: row["tokens"])
            color = next(of_quantile) if label.startswith("Gaussian") else None
            style = "o-" if label.startswith("Gaussian") else "s--"
            x, y = ([row[axis] for row in points] for axis in ("tokens", what))
            panel.plot(x, y, style, color=color, label=label, ms=4)
        panel.set_xscale("log")
        panel.set_xlabel(f"keys read, of {here[0]['context']}")
        panel.set_title({"delta": "δ, mass dropped"}.get(what, what))
        panel.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return finish(figure, here)


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    "quality.png": draw_quality,
    "contexts.png": draw_contexts,
    "heads.png": draw_heads,
    "training.png": draw_training,
    "tuning.png": draw_tuning,
}
