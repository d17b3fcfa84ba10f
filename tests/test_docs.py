"""docs: the pages and the API reference are built without warnings, and the reference's examples run."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BUILD = """
import sys
from sphinx.cmd.build import build_main

docs, built = sys.argv[1:]
options = ["-q", "-W", "--keep-going", "-d", f"{built}/doctrees"]
sys.exit(max([build_main([*options, "-b", builder, docs, f"{built}/{builder}"]) for builder in ("html", "doctest")]))
"""


def test_builds_without_warnings_and_examples_run(tmp_path):
    for module in ("sphinx", "myst_parser", "furo", "transformers"):
        pytest.importorskip(module)
    built = subprocess.run([sys.executable, "-c", BUILD, DOCS, tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
