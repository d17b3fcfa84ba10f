"""Reads the rows of bench/decode.py from bench/results, and makes the tables of these rows.

`TABLES` has a function for each NAME in <!-- bench:NAME -->. It returns "" if there are no rows for the table.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from bench.program import Row

SHAPE = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 16}  # the shape in every figure and table
CASE = (*SHAPE, "dtype", "keys", "batch", "context")
KEYS = {
    "model": "model",
    "clustered": "clustered",
    "normal": "i.i.d.",
    "outlier": "outlier",
}  # as the pages call them, in the order of the pages
TIMES = "\N{MULTIPLICATION SIGN}"
BUDGET = 2048
TOP, TUNED = f"TopPages({BUDGET})", f"Gaussian, {BUDGET} tokens"
SKETCH = "KeySketch()"
OWN = {  # our steps, as the pages call them
    "dense entmax": "dense entmax",
    SKETCH: f"`{SKETCH}`",
    TOP: f"`{TOP}`",
    TUNED: f"`Gaussian`, {BUDGET} tokens",
    "Gaussian()": "`Gaussian()`",
}
LOSSY = (TOP, TUNED, "Gaussian()")
SUMMARY_COLUMNS = ("µs", "time", "bytes read", "δ")
OWN_STEPS = ("dense softmax", *OWN)
CERTIFIED = {  # the names of bench/evals/certify.py, as the documents call them
    "certain": f"`{SKETCH}`",
    "2 bits": "`KeySketch(bits=2)`",
    "1 - 1e-9": "`KeySketch(certainty=1 - 1e-9)`",
}
OPS = {  # each op, and the step whose op is shown
    "score_pages": TOP,
    "select_pages": TOP,
    "sparse_decode": TOP,
    "score_gaussian": TUNED,
    "select_gaussian": TUNED,
    "select_sketch": SKETCH,
    "append_kv": "one token",
}

Place = tuple[str, int, int]  # keys, batch, context


def load(folder: Path) -> list[Row]:
    """The rows of every report, each with its machine.

    If several files have the same row, the last file by name counts.
    Rows of a report that also has the authors' code are kept apart from the others: `beside_authors` is true for them.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        beside = any(by_authors(row) for row in report.get("rows", []) if "method" in row)
        for row in report.get("rows", []):
            if "us" in row and row["alpha"] == (1 if "softmax" in row["method"] else 1.5):
                device = "gpu" if "gpu" in report["machine"] else "cpu"
                what = (device, *(row[name] for name in (*CASE, "kind", "method")), row.get("of"), beside)
                found[what] = row | {"device": device, "machine": report["machine"], "beside_authors": beside}
    return list(found.values())


def load_certified(folder: Path) -> list[Row]:
    """The rows of every report of bench/evals/certify.py, with its machine and shape."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        row | {"machine": report["machine"], "shape": report["shape"]}
        for report in reports
        for row in report.get("rows", [])
        if row.get("kind") in ("exact", "delta")
    ]


def standard(rows: list[Row], device: str, dtype: str, *, others: bool = False) -> list[Row]:
    """The rows with the usual shape, from reports without the authors' code.

    Steps of other implementations are left out, except SDPA's, unless `others`.
    """
    wanted = SHAPE | {"device": device, "dtype": dtype, "beside_authors": False}
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row for row in rows if others or row["kind"] == "op" or by_sdpa(row) or row["method"] in OWN_STEPS]


def places(rows: list[Row]) -> dict[Place, list[Row]]:
    """The rows by place. Places are sorted by keys in the order of `KEYS`, then by batch, then by context."""
    found: dict[Place, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(KEYS).index(row["keys"]), row["batch"], row["context"])):
        found.setdefault((row["keys"], row["batch"], row["context"]), []).append(row)
    return found


def steps(rows: list[Row]) -> dict[str, Row]:
    """The whole steps among the rows of one place, by method."""
    return {row["method"]: row for row in rows if row["kind"] == "step"}


def best_softmax(rows: list[Row]) -> Row:
    """The fastest SDPA row, to which ratios refer."""
    return min((row for row in steps(rows).values() if by_sdpa(row)), key=lambda row: row["us"])


def measured(names: Iterable[str], rows: list[Row]) -> list[str]:
    """The names that have a row."""
    there = {row["method"] for row in rows}
    return [name for name in names if name in there]


def by_sdpa(row: Row) -> bool:
    return bool(row["method"].startswith("softmax SDPA"))


def by_authors(row: Row) -> bool:
    return bool(row["method"].startswith("authors"))


def size(batch: int, context: int) -> str:
    """A size in words, such as 16K, 1M or 16 rows of 32K."""
    unit, divisor = next(pair for pair in (("M", 1 << 20), ("K", 1 << 10), ("", 1)) if context >= pair[1])
    return (f"{batch} rows of " if batch > 1 else "") + f"{context / divisor:g}{unit}"


def where(keys: str, batch: int, context: int) -> str:
    return f"{KEYS[keys]}, {size(batch, context)}"


def machine_line(rows: list[Row]) -> str:
    """The machines and commits that the rows were measured with, and the read rates of these machines."""
    lines: dict[str, None] = {}
    for row in rows:
        facts = row["machine"]
        processor = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
        rate = f", measured read bandwidth {facts['read_gb_per_s']:.0f} GB/s" if "read_gb_per_s" in facts else ""
        commit = f", commit {facts['commit']}" if "commit" in facts else ""
        lines[f"{processor}, torch {facts['torch']}{commit}{rate}"] = None
    return "; ".join(lines)


def digits(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def us(row: Row | None) -> str:
    return f"{row['us']:.1f}" if row and row["us"] < 1000 else f"{row['us']:.0f}" if row else ""


def speed(row: Row | None) -> str:
    """How many times as fast as softmax the row is."""
    return f"{1 / row['ratio']:.2f}" if row else ""


def percent(fraction: float) -> str:
    """A percentage of two significant digits, or of all digits before the point."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 or fraction == 0 else f"{100 * fraction:.2g} %"


def delta(row: Row | None) -> str:
    return digits(row["delta"]) if row and "delta" in row else ""


def table(titles: list[str], lines: list[list[str]], rows: list[Row]) -> str:
    """A Markdown table with the machine line of the rows below it."""
    both = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in both) + f"\n\n{machine_line(rows)}" if lines else ""


def table_of_steps(rows: list[Row]) -> str:
    """Whole steps: µs, speed relative to softmax, and δ."""
    rows = standard(rows, "gpu", "bf16")
    titles = ["keys, tokens", "softmax µs", "dense entmax, exact, µs", TIMES]
    selecting = measured((SKETCH, TOP, TUNED, "Gaussian()"), rows)
    titles += [title for name in selecting for title in (f"{OWN[name]} µs", TIMES, "δ")]
    lines = []
    for place, here in places(rows).items():
        found = steps(here)
        dense = found.get("dense entmax")
        line = [where(*place), us(best_softmax(here)), us(dense), speed(dense)]
        for name in selecting:
            line += [us(found.get(name)), speed(found.get(name)), delta(found.get(name))]
        lines.append(line)
    return table(titles, lines, rows)


def table_of_ops(rows: list[Row]) -> str:
    """Each op's µs, and the fraction of that time that reading its bytes takes at the machine's best rate."""
    rows = standard(rows, "gpu", "bf16")
    ops = measured(OPS, rows)
    lines = []
    for place, here in places(rows).items():
        found = {row["method"]: row for row in here if row["kind"] == "op" and OPS[row["method"]] == row["of"]}
        cells = [f"{us(found[op])} ({found[op]['fraction']:.0%})" if op in found else "" for op in ops]
        lines.append([where(*place), *cells])
    return table(["keys, tokens", *(f"`{op}`" for op in ops)], lines, rows)


def table_of_peers(rows: list[Row]) -> str:
    """The µs and the output error of every implementation, on the first kind of keys."""
    whole = places(standard(rows, "gpu", "bf16", others=True))
    first = next(iter(whole), ("", 0, 0))[0]
    here = {place: steps(found) for place, found in whole.items() if place[0] == first}
    lines = [
        [method]
        + [
            f"{us(found[method])} ({digits(found[method]['error'])})" if method in found else ""
            for found in here.values()
        ]
        for method in dict.fromkeys(method for found in here.values() for method in found)
    ]
    used = [row for found in here.values() for row in found.values()]
    return table([f"{KEYS.get(first)} keys", *(size(*place[1:]) for place in here)], lines, used)


def table_of_authors(rows: list[Row]) -> str:
    """The authors' code beside ours: µs, tokens read and output error."""
    used = [row for row in rows if row["beside_authors"] and (row["method"] in OWN or by_authors(row))]
    lines = [
        [where(*place), OWN.get(name, name), us(row), f"{row['tokens']:.0f}", digits(row["error"])]
        for place, here in places(used).items()
        for name, row in steps(here).items()
    ]
    return table(["keys, tokens", "step", "µs", "tokens read", "output error"], lines, used)


def table_of_cpu(rows: list[Row]) -> str:
    """The longest context on the CPU: times on the first kind of keys, and δ on every kind."""
    by_dtype = {dtype: places(standard(rows, "cpu", dtype)) for dtype in ("fp32", "bf16")}
    if not all(by_dtype.values()):
        return ""
    longest = max(context for _, _, context in by_dtype["fp32"])
    here = {
        dtype: {keys: steps(found) for (keys, batch, context), found in of.items() if (batch, context) == (1, longest)}
        for dtype, of in by_dtype.items()
    }
    first = next(iter(here["fp32"]))
    titles = [where(first, 1, longest), "fp32 ms", TIMES, "bf16 ms", TIMES, "bytes of K+V read"]
    titles += [f"δ, {KEYS[keys]} keys" for keys in here["fp32"]]
    lines = []
    common = [row for of in here.values() for row in of[first].values()]
    for name in ("softmax SDPA", "dense softmax", *measured(OWN, common)):
        found = {dtype: of[first][name] for dtype, of in here.items()}
        times = [cell for row in found.values() for cell in (f"{row['us'] / 1e3:.1f}", speed(row))]
        share = found["fp32"]["bytes"] / here["fp32"][first]["softmax SDPA"]["bytes"]
        lines.append([OWN.get(name, name), *times, f"{share:.1%}", *(delta(of[name]) for of in here["fp32"].values())])
    return table(titles, lines, common)


def table_of_summary(rows: list[Row]) -> str:
    """Each way of decoding at the two longest contexts: µs, time and bytes where softmax has 100 %, and δ."""
    whole = places(standard(rows, "gpu", "bf16"))
    first = next(iter(whole), ("", 0, 0))[0]
    longest = [place for place in whole if place[:2] == (first, 1)][-2:]
    columns = [steps(whole[place]) | {"softmax": best_softmax(whole[place])} for place in longest]
    titles = ["way", "exact", *(f"{size(1, context)}: {what}" for *_, context in longest for what in SUMMARY_COLUMNS)]
    lines = []
    for name in ("softmax", *OWN) if longest else ():
        if not all(name in found for found in columns):
            continue
        exact = {"softmax": "(baseline)", SKETCH: "yes, proved"} | dict.fromkeys(LOSSY, "no")
        line = [OWN.get(name, name), exact.get(name, "yes")]
        for found in columns:
            row, softmax = found[name], found["softmax"]
            shares = (row["ratio"], row["bytes"] / softmax["bytes"], row.get("delta", 0.0))
            line += [us(row), *map(percent, shares)]
        lines.append(line)
    return table(titles, lines, [row for found in columns for row in found.values()])


def table_of_certified(rows: list[Row]) -> str:
    """What bench/evals/certify.py counted, over all its reports: cases, certified heads, misses, and what was read."""
    rows = [row for row in rows if row["kind"] == "exact"]
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["keys"], row["tokens"])):
        found.setdefault((row["keys"], row["tokens"], row["select"]), []).append(row)
    lines = []
    for (keys, tokens, name), here in found.items():
        cases = sum(row["cases"] for row in here)
        shares = (
            sum(row["cases"] * row[what] for row in here) / cases
            for what in ("certified", "candidates_share", "bytes_share")
        )
        certified, candidates, read = (f"{share:.0%}" if share in (0, 1) else f"{share:.1%}" for share in shares)
        misses = sum(row["misses"] for row in here)
        line = [KEYS.get(keys, keys), size(1, tokens), CERTIFIED[name], f"{cases}", certified, f"{misses}"]
        lines.append([*line, candidates, read])
    titles = ["keys", "tokens", "selector", "cases", "certified heads", "misses", "candidates", "bytes read"]
    return table(titles, lines, rows)


def table_of_equal_bytes(rows: list[Row]) -> str:
    """δ and bytes of `KeySketch` with each cap, and of the page selectors that read as many bytes."""
    rows = [row for row in rows if row["kind"] == "delta"]
    found: dict[tuple[str, int, int | None], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["keys"], row["tokens"], row["max_tokens"]), {})[row["select"]] = row
    ways = ("KeySketch", "TopPages", "Gaussian")
    lines = [
        [KEYS.get(keys, keys), size(1, tokens), f"{most or 'none'}"]
        + [cell for way in ways for cell in (f"{here[way]['bytes_share']:.1%}", digits(here[way]["delta"]))]
        for (keys, tokens, most), here in found.items()
    ]
    titles = ["keys", "tokens", "cap of `KeySketch`", *(f"`{way}`: {what}" for way in ways for what in ("bytes", "δ"))]
    return table(titles, lines, rows)


TABLES = {
    "summary": table_of_summary,
    "steps": table_of_steps,
    "ops": table_of_ops,
    "peers": table_of_peers,
    "authors": table_of_authors,
    "cpu": table_of_cpu,
}
# These tables are made from what `load_certified` returns.
TABLES_OF_CERTIFIED = {"certified": table_of_certified, "equal_bytes": table_of_equal_bytes}
