"""Draws the figures of times and of bytes, from the results of bench/decode.py and bench/evals/certify.py."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from bench.program import Row
from bench.report.tables import (
    KEYS,
    OPS,
    OWN,
    SKETCH,
    TOP,
    TUNED,
    machine_line,
    measured,
    places,
    size,
    standard,
    steps,
)

plt.rcParams["font.size"] = 8

STAGES = {"whole": "0.65", "score": "C0", "select": "C1", "sparse": "C2"}
MOST_SHOWN = 2.7  # times softmax
STACKED = ["softmax SDPA, flash", "softmax SDPA, cuDNN", "dense softmax", *OWN]


def panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, sharex=True, sharey=True)
    return figure, [list(line) for line in grid]


def present(rows: list[Row]) -> list[str]:
    """The kinds of keys that were measured, in the order of the pages."""
    return [keys for keys in KEYS if any(row["keys"] == keys for row in rows)]


def lines(rows: list[Row], keys: str) -> dict[str, list[Row]]:
    """The rows with batch 1 by method, short contexts first. An op counts only in the step that `OPS` names for it."""
    found: dict[str, list[Row]] = {}
    for (of, batch, _), here in places(rows).items():
        for row in here if of == keys and batch == 1 else []:
            if row["kind"] == "step" or OPS[row["method"]] == row["of"]:
                found.setdefault(row["method"], []).append(row)
    return found


def draw_steps(rows: list[Row]) -> Figure | None:
    """Step time relative to softmax, by method and context. A step is divided among its ops by their own times."""
    rows = standard(rows, "gpu", "bf16")
    columns = list(dict.fromkeys(place[1:] for place in places(rows)))
    methods = [method for method in STACKED if any(row["method"] == method for row in rows)]
    if not rows:
        return None
    figure, grid = panels(
        len(present(rows)), len(columns), width=2.4 + 2.1 * len(columns), height=0.8 + 2 * len(present(rows))
    )
    for line, keys in zip(grid, present(rows), strict=True):
        for panel, (batch, context) in zip(line, columns, strict=True):
            here = places(rows).get((keys, batch, context), [])
            found = steps(here)
            for y, method in enumerate(methods):
                if method not in found:
                    continue
                ops = {row["method"]: row["us"] for row in here if row.get("of") == method}
                stages = {op.split("_")[0]: us / sum(ops.values()) for op, us in ops.items()} or {"whole": 1.0}
                left = 0.0
                for stage, share in stages.items():
                    width = share * found[method]["ratio"]
                    panel.barh(y, width, left=left, color=STAGES[stage])
                    left += width
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                panel.text(min(left, MOST_SHOWN) + 0.05, y, f"{left:.2f}", va="center", bbox=box)
            panel.axvline(1, color="black", linewidth=0.6)
            panel.set_title(f"{KEYS[keys]}, {size(batch, context)}")
    grid[0][0].set_yticks(range(len(methods)), [method.removeprefix("softmax ") for method in methods])
    grid[0][0].invert_yaxis()
    grid[0][0].set_xlim(0, MOST_SHOWN + 0.6)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in STAGES.values()]
    labels = ["whole step", "score pages", "select pages or tokens", "decode them"]
    figure.legend(handles, labels, loc="lower center", ncols=len(STAGES), frameon=False)
    figure.suptitle(f"time of a step, softmax = 1\n{machine_line(rows)}")
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    return figure


def draw_floor(rows: list[Row]) -> Figure | None:
    """The fraction of the machine's read rate that each op and each dense step reaches, against context."""
    rows = standard(rows, "gpu", "bf16")
    if not rows:
        return None
    figure, (line,) = panels(1, len(present(rows)), width=2 + 3.2 * len(present(rows)), height=3.8)
    for panel, keys in zip(line, present(rows), strict=True):
        found = lines(rows, keys)
        for method in measured(("softmax SDPA, cuDNN", "dense softmax", "dense entmax", *OPS), rows):
            points = found.get(method, [])
            style = "o--" if method in OPS else "o-"
            panel.plot(
                [row["context"] for row in points], [row["fraction"] for row in points], style, label=method, ms=4
            )
        panel.set_xscale("log", base=2)
        panel.set_title(f"{KEYS[keys]} keys")
        panel.set_xlabel("context, tokens")
        panel.grid(alpha=0.3)
    line[0].set_ylabel("fraction of the floor")
    line[0].set_ylim(0, 1.05)
    line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"time to read the bytes at the machine's best / time taken\n{machine_line(rows)}")
    figure.tight_layout()
    return figure


def draw_delta(rows: list[Row]) -> Figure | None:
    """δ of the selectors against the time of a step, one point for each context."""
    rows = standard(rows, "gpu", "bf16")
    if not rows:
        return None
    figure, (line,) = panels(1, len(present(rows)), width=2.4 + 3.4 * len(present(rows)), height=3.8)
    for panel, keys in zip(line, present(rows), strict=True):
        found = lines(rows, keys)
        for method in measured((TOP, TUNED, "Gaussian()", "dense entmax", SKETCH), rows):
            points = found.get(method, [])
            panel.plot([row["us"] for row in points], [row["delta"] for row in points], "o-", label=method, ms=4)
            for row in points:
                name = size(1, row["context"])
                panel.annotate(name, (row["us"], row["delta"]), (3, 3), textcoords="offset points", fontsize=6)
        panel.set_xscale("log")
        panel.set_xticks([30, 100, 300, 1000], ["30", "100", "300", "1000"])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yscale("symlog", linthresh=1e-3)
        panel.set_title(f"{KEYS[keys]} keys")
        panel.set_xlabel("µs per step")
        panel.grid(alpha=0.3)
    line[0].set_ylim(-1e-4, 1.5)
    line[0].set_ylabel("δ, mass dropped")
    line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(machine_line(rows))
    figure.tight_layout()
    return figure


def draw_cpu(rows: list[Row]) -> Figure | None:
    """Step time on the CPU against context, one panel for each dtype."""
    by_dtype = {dtype: standard(rows, "cpu", dtype) for dtype in ("fp32", "bf16", "fp16")}
    by_dtype = {dtype: here for dtype, here in by_dtype.items() if here}
    if not by_dtype:
        return None
    figure, (line,) = panels(1, len(by_dtype), width=max(7, 4.5 * len(by_dtype)), height=3.8)
    for panel, (dtype, here) in zip(line, by_dtype.items(), strict=True):
        keys = present(here)[0]
        for method, points in lines(here, keys).items():
            if method not in OPS:
                panel.loglog(
                    [row["context"] for row in points], [row["us"] / 1e3 for row in points], "o-", label=method, ms=4
                )
        panel.set_xscale("log", base=2)
        panel.set_title(f"{dtype}, {KEYS[keys]} keys")
        panel.set_xlabel("context, tokens")
        panel.grid(alpha=0.3)
    line[0].set_ylabel("ms per step")
    line[-1].legend()
    figure.suptitle(machine_line(by_dtype[next(iter(by_dtype))]))
    figure.tight_layout()
    return figure


def draw_sketch(rows: list[Row]) -> Figure | None:
    """δ of the selectors against the bytes that they read, one panel for each report of certify.py."""
    reports: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "delta":
            reports.setdefault((machine_line([row]), row["keys"], row["tokens"]), []).append(row)
    if not reports:
        return None
    figure, (line,) = panels(1, len(reports), width=1 + 4.2 * len(reports), height=3.4)
    for panel, ((machine, keys, tokens), here) in zip(line, reports.items(), strict=True):
        for name, color in (("TopPages", "C0"), ("Gaussian", "C1"), ("KeySketch", "C3")):
            points = sorted((row for row in here if row["select"] == name), key=lambda row: row["bytes_share"])
            share, delta = ([row[what] for row in points] for what in ("bytes_share", "delta"))
            panel.plot([100 * x for x in share], delta, "o-", color=color, label=name, ms=4)
        exact = [row for row in here if row["select"] == "KeySketch" and row["certified"] == 1]
        for row in exact:
            place = (100 * row["bytes_share"], row["delta"])
            panel.annotate("proved to be 0", place, (-4, 8), textcoords="offset points", ha="right", fontsize=7)
        panel.set_yscale("symlog", linthresh=1e-3)
        source = "activations" if keys == "file" else f"{KEYS.get(keys, keys)} keys"
        panel.set_title(f"{source}, {size(1, tokens)} tokens\n{machine}", fontsize=7)
        panel.set_xlabel("% of the bytes of keys and values read")
        panel.grid(alpha=0.3)
    line[0].set_ylim(-1e-4, 1.5)
    line[0].set_ylabel("δ, mass dropped")
    line[-1].legend()
    figure.tight_layout()
    return figure


FIGURES = {"steps.png": draw_steps, "floor.png": draw_floor, "delta.png": draw_delta, "cpu.png": draw_cpu}
