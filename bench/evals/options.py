"""The options of the programs that decode with a model, and the checks of these options."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evals import suites
from bench.examples import default_source
from bench.inputs import positive
from bench.program import check, parser_of


def decoding_parser(
    description: str | None, context: int, *, devices: Sequence[str] = ("cpu", "cuda")
) -> argparse.ArgumentParser:
    """The options of every program that decodes with a model; `context` is a default."""
    parser = parser_of(description, devices=devices)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[context], help="bytes that the model reads before it decodes"
    )
    parser.add_argument("--source", type=Path, default=default_source(), help="folder of the standard library")
    return parser


def comparing_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the programs that compare selectors."""
    parser = decoding_parser(description, 4096)
    parser.add_argument("--rows", type=positive, default=8, help="number of texts; there are twice as many passkeys")
    parser.add_argument("--select", nargs="+", help="names of the selectors to measure (default: all)")
    longest = "choose the decoded bytes as for a run with this context, too (default: the longest --context)"
    parser.add_argument("--longest", type=positive, help=longest)
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, methods: dict[str, Any]) -> dict[str, Any]:
    """The methods that --select names, in the order of `methods`; "dense" always, if it is one of them."""
    for name in args.select or []:
        if name not in methods:
            parser.error(f"--select: expected names out of {', '.join(map(repr, methods))}, got {name!r}")
    return {name: method for name, method in methods.items() if not args.select or name in ("dense", *args.select)}


def check_contexts(parser: argparse.ArgumentParser, args: argparse.Namespace, text: suites.Bytes, rows: int) -> None:
    """Ends the program, before it loads the model, if the text is too short or an option does not fit."""
    check(parser, args)
    if not (args.model / "config.json").is_file():
        parser.error(f"expected a folder with a config.json, got {args.model}")
    if not len(text):
        parser.error(f"--source: expected a standard library with held-out files, got {args.source}")
    for context in args.context:
        if context % 16 or context < suites.LEAST_CONTEXT:
            parser.error(f"--context: expected multiples of 16 of at least {suites.LEAST_CONTEXT}, got {context}")
    longest = max(args.longest or 0, *args.context)  # the decoded bytes are the same for every context
    if len(text) < longest + suites.STEPS + rows:
        parser.error(f"--context, --longest: expected less than the {len(text)} bytes of text, got {longest}")
