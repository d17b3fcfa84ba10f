"""The programs of bench/ and examples/ say what they do where the packages that they need are not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "bench", "examples", "examples/train"
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if "parse_args()" in path.read_text()
)
OPTIONAL = "adasplash", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "transformers", "triton"


def run_without(packages, program, *options, folder):
    """Runs a program in a Python that cannot import these packages."""
    hidden = "\n".join(f"sys.modules[{package!r}] = None" for package in packages)
    (folder / "sitecustomize.py").write_text(f"import sys\n{hidden}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))}
    return subprocess.run([sys.executable, ROOT / program, *options], env=env, capture_output=True, text=True)


def test_there_are_programs():
    assert {"bench/plot.py", "bench/decode.py", "examples/generate.py", "examples/train/train.py"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_optional_package(program, tmp_path):
    run = run_without(OPTIONAL, program, "--help", folder=tmp_path)
    assert run.returncode == 0 and run.stdout.startswith("usage:"), run.stderr


@pytest.mark.parametrize(
    ("program", "package", "extra"),
    [
        ("bench/plot.py", "matplotlib", "bench"),
        ("bench/decode.py", "rich", "bench"),
        ("examples/generate.py", "rich", "demo"),
    ],
)
def test_what_is_missing_is_said_in_a_line(program, package, extra, tmp_path):
    run = run_without([package], program, folder=tmp_path)
    assert run.returncode == 1
    (line,) = run.stderr.strip().splitlines()
    assert f"expected {package}" in line and f"'.[{extra}]'" in line
