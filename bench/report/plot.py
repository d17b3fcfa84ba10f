"""Draws the figures, and writes the tables of README.md and docs/*.md, from the JSON files in bench/results.

A table stands between <!-- bench:NAME --> and <!-- /bench -->. tables.py and figures.py show the results of
bench/decode.py and bench/evals/certify.py; accuracy.py shows those of the other programs in bench/evals, and the logs
of examples/train/train.py.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
from bench.program import Help
from bench.report.tables import TABLES, TABLES_OF_CERTIFIED, load, load_certified

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def pages() -> list[Path]:
    """README.md, and the pages of docs/ that have a table to write."""
    return [ROOT / "README.md", *(page for page in sorted(ROOT.glob("docs/*.md")) if BLOCK.search(page.read_text()))]


def with_tables(page: Path, tables: dict[str, Callable[[], str]]) -> str:
    """The text of the page, with new contents for each of its tables."""

    def block(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in tables:
            raise SystemExit(f"{page}: expected bench:NAME to be one of {', '.join(tables)}, got bench:{name}")
        if not (text := tables[name]()):
            raise SystemExit(f"{page}: bench:{name}: expected rows for it in the results, got none")
        return f"{start}{text}\n{end}"

    return BLOCK.sub(block, page.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "bench" / "results",
        help="folder of the JSON files; the figures are written there, too",
    )
    parser.add_argument("--pages", type=Path, nargs="+", default=pages(), help="pages whose tables to write")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a table would change")
    args = parser.parse_args()
    try:
        from bench.report import accuracy, figures
    except ImportError as error:
        parser.error(f"expected matplotlib, got {error}; pip install --no-build-isolation '.[bench]' installs it")
    for page in args.pages:
        if not page.is_file():
            parser.error(f"--pages: expected files, got {page}")
    rows, lost = load(args.results), accuracy.load(args.results)
    if not rows:
        parser.error(f"--results: expected JSON of bench/decode.py, got none in {args.results}")
    tables: dict[str, Callable[[], str]] = {name: partial(made, rows) for name, made in TABLES.items()}
    tables |= {name: partial(made, lost) for name, made in accuracy.TABLES.items()}
    certified = load_certified(args.results)
    tables |= {name: partial(made, certified) for name, made in TABLES_OF_CERTIFIED.items()}
    texts = {page: with_tables(page, tables) for page in args.pages}
    for page, text in texts.items():
        if args.check and text != page.read_text():
            raise SystemExit(f"{page}: expected the tables of {args.results}, got others: run bench/report/plot.py")
    if args.check:
        return
    for page, text in texts.items():
        page.write_text(text)
    drawn = {name: draw(rows) for name, draw in figures.FIGURES.items()}
    drawn["sketch.png"] = figures.draw_sketch(certified)
    drawn |= {name: draw(lost) for name, draw in accuracy.FIGURES.items()}
    for name, figure in drawn.items():
        if figure:
            figure.savefig(args.results / name, dpi=120)
            print(args.results / name)


if __name__ == "__main__":
    main()
