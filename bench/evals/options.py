"""The command line options that the programs which decode with a model share, and the checks of them."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench.evals import suites
from bench.examples import default_source
from bench.inputs import positive
from bench.report.document import check


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
        if context % 16 or context < suites.LEAST_CONTEXT:
            parser.error(f"--context: expected multiples of 16 of at least {suites.LEAST_CONTEXT}, got {context}")
    longest = max(args.longest or 0, *args.context)  # what is decoded is the same after every context
    if len(text) < longest + suites.STEPS + rows:
        parser.error(f"--context, --longest: expected less than the {len(text)} bytes of text, got {longest}")
