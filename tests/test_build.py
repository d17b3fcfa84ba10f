"""The built libraries: free of any Python version, CUDA where there is nvcc, and `python -m entmaxkv` lists them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import entmaxkv
from entmaxkv.__main__ import cuda_state

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(Path(entmaxkv.__file__).parent.glob("_*.so"))


def architectures() -> set[str]:
    """What the CUDA library was built for, without suffixes: sm_80, sm_90, ..."""
    built_for = re.search("built for.*", run(sys.executable, "-m", "entmaxkv"))
    return set(re.findall(r"sm_\d+", built_for.group()))


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_no_python(library):
    assert ".abi3." in library.name
    assert not re.findall(r" U (_?Py\w+)", run("nm", "-D", library))
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    assert not [name for name in needed if "python" in name]


with_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc") or os.environ.get("ENTMAXKV_CUDA") == "0", reason="no nvcc, or the CUDA library unwanted"
)
with_cuda = pytest.mark.skipif(len(LIBRARIES) < 2, reason="no CUDA library")


@with_nvcc
def test_cuda_library_is_built_where_there_is_nvcc():
    assert [path.name for path in LIBRARIES] == ["_C.abi3.so", "_cuda.abi3.so"]


@with_cuda
@pytest.mark.skipif(LIBRARIES[0].resolve().parent != ROOT / "entmaxkv", reason="the libraries were built elsewhere")
def test_no_kernel_spills_registers():
    """By what ptxas said of every kernel and architecture when the library was built."""
    kernel = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL
    )
    log = (ROOT / "build" / "cuda.log").read_text()
    kernels = kernel.findall(log)
    of = {arch: {name for name, its, *_ in kernels if its == arch} for _, arch, *_ in kernels}
    assert {arch.removesuffix("a") for arch in of} == architectures()
    for names in of.values():
        assert names == next(iter(of.values()))
        for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
            assert any(f"{source.stem}_cu" in name for name in names), f"no kernel of {source.name}"
    assert [name for name, _, *spilled in kernels if spilled != ["0", "0"]] == []
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}  # nor does a function that kernels call


def test_every_kernel_waits_for_the_previous_one():
    """A kernel that did not wait would still pass most tests."""
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        bodies = re.findall(r"__global__[^;{]*\{\s*(\S+)", source.read_text())
        assert bodies and set(bodies) == {"wait_for_previous_kernel();"}, source.name


@with_nvcc
def test_old_ptx_is_refused():
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "8.9+PTX"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "expected +PTX at 9.0 or later architectures, got 8.9+PTX" in done.stderr


@with_cuda
def test_size_of_the_cuda_library():
    """At most 40 MB for each architecture."""
    (library,) = [path for path in LIBRARIES if path.name.startswith("_cuda")]
    assert library.stat().st_size < 40e6 * len(architectures())


def test_main_says_what_is_installed():
    text = run(sys.executable, "-m", "entmaxkv")
    assert entmaxkv.__version__ in text and "_C.abi3.so" in text
    for op in ("append_kv", "page_stats", "score_pages", "select_pages", "sparse_decode", "dense_decode", "decode"):
        assert f"entmaxkv::{op}(" in text


def test_main_says_why_cuda_is_not_loaded():
    (line,) = re.findall("^cuda +(.*)$", run(sys.executable, "-m", "entmaxkv"), re.MULTILINE)
    if not torch.version.cuda:
        assert line.startswith("not loaded: this torch has no CUDA")
    elif len(LIBRARIES) < 2:
        assert line.startswith("not loaded: no _cuda library was built")
    elif not torch.cuda.device_count():
        assert line.startswith("loaded, but torch sees no GPU")
    else:
        assert line == "loaded"


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ((None, True, ["sm_80"], []), ["not loaded: this torch has no CUDA"]),
        (("13.0", False, [], [(8, 0)]), ["not loaded: no _cuda library was built", "nvcc", "pip install"]),
        ((None, False, [], []), ["this torch has no CUDA", "no _cuda library was built"]),
        (("13.0", True, ["sm_80"], []), ["torch sees no GPU", "CUDA_VISIBLE_DEVICES"]),
        (("13.0", True, ["sm_80", "sm_90a"], [(7, 5)]), ["built for sm_80, sm_90a", "sm_75", "ARCH_LIST='7.5'"]),
        (("13.0", True, ["sm_90a"], [(9, 0), (8, 0), (8, 0)]), ["built for sm_90a, and not for the sm_80 of"]),
        (("13.0", True, ["sm_86"], [(8, 0)]), ["built for sm_86", "sm_80"]),
        (("13.0", True, ["sm_90a"], [(9, 1)]), ["built for sm_90a", "sm_91"]),
        (("13.0", True, ["sm_90a"], [(10, 0)]), ["built for sm_90a", "sm_100"]),
    ],
)
def test_what_keeps_cuda_from_being_used(facts, parts):
    text = cuda_state(*facts)
    assert text != "loaded" and "\n" not in text
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("built", "capability"), [("sm_80", (8, 0)), ("sm_80", (8, 9)), ("sm_90a", (9, 0)), ("sm_100", (10, 3))]
)
def test_nothing_keeps_cuda_from_being_used(built, capability):
    assert cuda_state("13.0", True, ["sm_120", built], [capability]) == "loaded"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize(
    ("extra", "torch_cuda", "asked", "builds"),
    [
        ("demo", None, None, "0"),
        ("demo", "13.0", None, "1"),
        ("demo", None, "1", "1"),
        ("demo", "13.0", "0", "0"),
        ("test", None, None, "1"),
        ("test", None, "0", "0"),
    ],
)
def test_make_builds_cuda_where_it_is_needed(tmp_path, extra, torch_cuda, asked, builds):
    """By what the installation is told; a build for the demo leaves the tests theirs to do."""
    (tmp_path / "torch").mkdir()
    stub = f"from types import SimpleNamespace\nversion = SimpleNamespace(cuda={torch_cuda!r})\n"
    (tmp_path / "torch" / "__init__.py").write_text(stub)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then PYTHONPATH={tmp_path} exec {sys.executable} "$@"; fi\n'
        f'echo "$ENTMAXKV_CUDA $@" >> {tmp_path}/calls\n'
    )
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "ENTMAXKV_CUDA"}
    environment |= {"VIRTUAL_ENV": str(tmp_path)} | ({"ENTMAXKV_CUDA": asked} if asked else {})
    command = ["make", "-C", ROOT, f"{tmp_path}/entmaxkv-{extra}.installed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1] == f"{builds} -m pip install --no-build-isolation --editable .[{extra}]"
    assert [path.name for path in tmp_path.glob("*.installed")] == [f"entmaxkv-{extra}.installed"]


def test_source_distribution_holds_all_that_is_built(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert not {*sources, "CMakeLists.txt", "entmaxkv/py.typed", "LICENSE"} - packed
