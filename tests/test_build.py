"""The built libraries: free of any Python version, CUDA where there is nvcc, and `python -m entmaxkv` lists them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import entmaxkv

LIBRARIES = sorted(Path(entmaxkv.__file__).parent.glob("_*.so"))


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_no_python(library):
    assert ".abi3." in library.name
    assert not re.findall(r" U (_?Py\w+)", run("nm", "-D", library))
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    assert not [name for name in needed if "python" in name]


@pytest.mark.skipif(
    not shutil.which("nvcc") or os.environ.get("ENTMAXKV_CUDA") == "0", reason="no nvcc, or the CUDA library unwanted"
)
def test_cuda_library_is_built_where_there_is_nvcc():
    assert [path.name for path in LIBRARIES] == ["_C.abi3.so", "_cuda.abi3.so"]


def test_main_says_what_is_installed():
    text = run(sys.executable, "-m", "entmaxkv")
    assert entmaxkv.__version__ in text and "_C.abi3.so" in text
    for op in ("append_kv", "page_stats", "score_pages", "select_pages", "sparse_decode", "dense_decode", "decode"):
        assert f"entmaxkv::{op}(" in text
