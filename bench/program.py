"""What every program of bench shares: its options, its checks, and the document that it prints and writes."""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

Row = dict[str, Any]  # one line of a document


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds to the text of each option its default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def parser_of(
    description: str | None, *, devices: Sequence[str] = ("cpu", "cuda"), writes: bool = True
) -> argparse.ArgumentParser:
    """The parser of a program with this docstring: --device, of which the first is the default, and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run")
    if writes:
        parser.add_argument("--json", type=Path, help="also write the results and the machine line to this file")
    return parser


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def machine(device: str) -> dict[str, str | int | float]:
    """What identifies the machine, the torch and the commit of a measurement; stands beside every figure."""
    facts: dict[str, str | int | float] = {}
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["gpu"] = f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"
    else:
        model = platform.processor()
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
        facts["cpu"] = f"{model}, {torch.backends.cpu.get_cpu_capability()}"
        facts["threads"] = torch.get_num_threads()
    commit = output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return facts | {"torch": torch.__version__, "commit": commit}


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program, before it measures anything, if the device or the folder of --json does not exist."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA GPU, got none")
    json = getattr(args, "json", None)
    if json and not json.parent.is_dir():
        parser.error(f"--json: expected a file in a directory that exists, got {json}")


def report(document: Row, args: argparse.Namespace, console: Console) -> None:
    """Prints the machine line, and writes the document to --json, each of its rows on one line."""
    document["machine"] = rounded(document["machine"])
    console.print(", ".join(f"{name} {value}" for name, value in document["machine"].items()))
    if args.json:
        head = json.dumps({name: part for name, part in document.items() if name != "rows"}, indent=1)
        rows = ",\n  ".join(json.dumps(rounded(row)) for row in document["rows"])
        args.json.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def wide_console() -> Console:
    """A console as wide as the terminal, or wide enough for the tables where the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)


def rounded(facts: Row) -> Row:
    """The facts, their floats rounded to six significant digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in facts.items()}
