"""What stands beside every figure, and where figures are written."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def machine(device: str) -> dict[str, str | int | float]:
    """The line that must stand beside every figure."""
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
    """Refuses, before anything is measured, what could not be measured or written."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA GPU, got none")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: expected a file in a directory that exists, got {args.json}")


def report(document: dict, args: argparse.Namespace, console: Console) -> None:
    """Prints the document's machine, and writes the document to --json, one line for each row."""
    document["machine"] = rounded(document["machine"])
    console.print(", ".join(f"{name} {value}" for name, value in document["machine"].items()))
    if args.json:
        head = json.dumps({name: part for name, part in document.items() if name != "rows"}, indent=1)
        rows = ",\n  ".join(json.dumps(rounded(row)) for row in document["rows"])
        args.json.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def wide_console() -> Console:
    """As wide as the terminal; without one, as the tables."""
    return Console(width=None if sys.stdout.isatty() else 160)


def rounded(facts: dict) -> dict:
    """Floats with as many digits as any measurement has."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in facts.items()}
