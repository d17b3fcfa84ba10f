"""The programs of bench and examples print their help, also where matplotlib is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "parse_args()" in path.read_text()
)


def run_without_matplotlib(program: str, *options: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))}
    return subprocess.run([sys.executable, ROOT / program, *options], env=env, capture_output=True, text=True)


def test_there_are_programs():
    assert {"bench/report/plot.py", "bench/decode.py", "examples/generate.py", "examples/train/train.py"} <= set(
        PROGRAMS
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, tmp_path):
    run = run_without_matplotlib(program, "--help", folder=tmp_path)
    assert run.returncode == 0 and run.stdout.startswith("usage:"), run.stderr


def test_plot_says_that_it_needs_matplotlib(tmp_path):
    run = run_without_matplotlib("bench/report/plot.py", folder=tmp_path)
    assert run.returncode == 2 and "expected matplotlib, got" in run.stderr and "'.[bench]'" in run.stderr
