"""The built libraries: free of any Python version, CUDA where there is nvcc, and `python -m entmaxkv` lists them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from emulation.build import OPS, NinjaFile
from gpu_commands import STEPS, commands

import entmaxkv
from entmaxkv.__main__ import cuda_state

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("cuda/*.cu"))
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
with_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")
built_here = pytest.mark.skipif(
    LIBRARIES[0].resolve().parent != ROOT / "entmaxkv" or not (ROOT / "build" / "_C" / "build.ninja").exists(),
    reason="the libraries were built elsewhere",
)


@with_nvcc
def test_cuda_library_is_built_where_there_is_nvcc():
    assert [path.name for path in LIBRARIES] == ["_C.abi3.so", "_cuda.abi3.so"]


@with_cuda
@built_here
def test_no_kernel_spills_registers():
    """ptxas said so for every kernel and architecture when the kernel's object was built."""
    kernel = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL
    )
    built = architectures()
    for source in KERNELS:
        log = (ROOT / "build" / "_cuda" / "cuda" / f"{source.name}.o.log").read_text()
        kernels = kernel.findall(log)
        of = {arch: {name for name, its, *_ in kernels if its == arch} for _, arch, *_ in kernels}
        assert {arch.removesuffix("a") for arch in of} == built
        for names in of.values():
            assert names == next(iter(of.values()))
            assert any(f"{source.stem}_cu" in name for name in names), f"no kernel of {source.name}"
        assert [name for name, _, *spilled in kernels if spilled != ["0", "0"]] == []
        assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}  # nor does a function that kernels call


def dependencies(library: str) -> dict[str, set[Path]]:
    """The files of csrc that make each object of a library, as the compilers told ninja."""
    text = run(sys.executable, "-m", "ninja", "-C", ROOT / "build" / library, "-t", "deps")
    objects = re.findall(r"^(\S+): #deps.*\n((?:    .*\n)*)", text, re.MULTILINE)
    found = {name: {Path(os.path.normpath(line.strip())) for line in lines.splitlines()} for name, lines in objects}
    return {
        name: {path for path in paths if path.is_relative_to(CSRC)}
        for name, paths in found.items()
        if name.endswith(".o")
    }


def included(source: Path) -> set[Path]:
    """A file of csrc, and all files of csrc that it includes, under whatever condition."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE)
            left += [Path(os.path.normpath(path.parent / name)) for name in names]
    return found


@with_cuda
@built_here
def test_kernels_depend_on_what_they_include():
    """A change of one .cu file makes one object; a change of a header makes those of the kernels that include it."""
    objects = dependencies("_cuda")
    for source in KERNELS:
        assert objects[f"cuda/{source.name}.o"] == included(source)
        assert [name for name, files in objects.items() if source in files] == [f"cuda/{source.name}.o"]
    assert {name for name in objects if name.startswith("cuda/")} >= {f"cuda/{source.name}.o" for source in KERNELS}
    assert all(CSRC / "ops.h" in files for files in objects.values())
    assert not [file for files in objects.values() for file in files if file.is_relative_to(CSRC / "cpu")]


@built_here
def test_the_cpu_library_depends_on_what_it_includes():
    objects = dependencies("_C")
    for source in CSRC.glob("cpu/*.cpp"):
        if source.name != "parallel_std.cpp":
            assert objects[f"cpu/{source.name}.o"] <= included(source)
            assert [name for name, files in objects.items() if source in files] == [f"cpu/{source.name}.o"]
    assert not [file for files in objects.values() for file in files if file.is_relative_to(CSRC / "cuda")]


@pytest.fixture
def toy(tmp_path):
    """A function that builds a library of two sources, one with a header, and says which objects that made."""
    (tmp_path / "one.cpp").write_text('#include "part.h"\nint one() { return kPart; }\n')
    (tmp_path / "two.cpp").write_text("int two() { return 2; }\n")
    (tmp_path / "part.h").write_text("constexpr int kPart = 1;\n")
    folder = tmp_path / "with space"

    def build(*flags: str) -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.o")}
        ninja = NinjaFile(folder)
        ninja.compiler("cxx", ["env", "c++"], ["-fPIC", *flags], keep_log=True)
        objects = ninja.compile("cxx", [tmp_path / "one.cpp", tmp_path / "two.cpp"], into="objects/")
        ninja.link("toy.so", objects, ["c++"], [])
        ninja.run()
        assert (folder / "toy.so").exists()
        return {path.name for path in folder.rglob("*.o") if path.stat().st_mtime_ns != before.get(path)}

    assert build() == {"one.cpp.o", "two.cpp.o"}
    return build


def test_ninja_compiles_what_has_changed(tmp_path, toy):
    assert toy() == set()
    (tmp_path / "part.h").write_text("constexpr int kPart = 3;\n")
    assert toy() == {"one.cpp.o"}
    (tmp_path / "part.h").rename(tmp_path / "room.h")
    (tmp_path / "one.cpp").write_text('#include "room.h"\nint one() { return kPart; }\n')
    assert toy() == {"one.cpp.o"}
    assert toy("-O1") == {"one.cpp.o", "two.cpp.o"}
    assert toy("-O1") == set()
    (version,) = tmp_path.rglob("cxx.version")
    version.write_text("an older compiler")
    assert toy("-O1") == {"one.cpp.o", "two.cpp.o"}


def test_an_object_has_a_log_of_its_own(tmp_path, toy, capfd):
    (log,) = tmp_path.rglob("two.cpp.o.log")
    log.unlink()
    assert toy() == {"two.cpp.o"} and log.read_text() == ""
    (tmp_path / "two.cpp").write_text("int two() { int unused; return 2; }\n")
    toy("-Wall")
    assert "unused" in log.read_text() and "unused" in capfd.readouterr().out
    (tmp_path / "two.cpp").write_text("an error\n")
    with pytest.raises(subprocess.CalledProcessError):
        toy("-Wall")
    assert "error" in capfd.readouterr().out


def test_every_kernel_waits_for_the_previous_one():
    """A kernel that did not wait would still pass most tests."""
    for source in KERNELS:
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


@with_make
@pytest.mark.parametrize(
    ("extra", "torch_cuda", "asked", "builds"),
    [
        ("demo", None, {}, "0 for []"),
        ("demo", "13.0", {}, "1 for []"),
        ("demo", None, {"ENTMAXKV_CUDA": "1"}, "1 for []"),
        ("demo", "13.0", {"ENTMAXKV_CUDA": "0"}, "0 for []"),
        ("test", None, {}, "1 for []"),
        ("test", None, {"TORCH_CUDA_ARCH_LIST": "9.0a"}, "1 for [9.0a]"),
        ("test", None, {"ENTMAXKV_CUDA": "0"}, "0 for []"),
        ("test", "13.0", {}, "1 for []"),
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
        f'echo "$ENTMAXKV_CUDA for [$TORCH_CUDA_ARCH_LIST] $@" >> {tmp_path}/calls\n'
    )
    python.chmod(0o755)
    ours = "ENTMAXKV_CUDA", "TORCH_CUDA_ARCH_LIST"
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"VIRTUAL_ENV": str(tmp_path)} | asked
    command = ["make", "-C", ROOT, f"{tmp_path}/entmaxkv-{extra}.installed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1] == f"{builds} -m pip install --no-build-isolation --editable .[{extra}]"
    assert [path.name for path in tmp_path.glob("*.installed")] == [f"entmaxkv-{extra}.installed"]


@with_make
@pytest.mark.parametrize("target", ["kernel", "gpu"])
def test_make_lists_the_ops(target):
    done = subprocess.run(["make", "-C", ROOT, target, "OP=nonsense"], capture_output=True, text=True)
    assert done.returncode != 0 and f'expected OP among {" ".join(OPS)}, got "nonsense"' in done.stderr


@with_make
def test_make_help_lists_the_targets():
    text = run("make", "-s", "-C", ROOT, "help")
    assert set(re.findall(r"^(\w+) +\w", text, re.MULTILINE)) >= {"demo", "test", "kernel", "gpu", "bench", "clean"}


@with_make
def test_make_gpu_prints_commands():
    assert (
        run("make", "-s", "-C", ROOT, "gpu", "OP=select_pages", f"PYTHON={sys.executable}")
        == f"{commands('select_pages')}\n"
    )


def test_gpu_commands_are_right():
    """Programs take the options, ranges are those of the profiled steps, and kernels those of the op."""
    small = shlex.split("--context 64 --heads 2/1 --head-dim 8 --dtype fp32 --steps 1")
    profiled = run(sys.executable, ROOT / "bench/profile_decode.py", *small)
    options: dict[str, set[str]] = {}
    for op in OPS:
        text = commands(op)
        for program, arguments in re.findall(r"python (\S+\.py)(.*)", text):
            if arguments and program not in options:
                options[program] = set(re.findall(r"--[\w-]+", run(sys.executable, ROOT / program, "--help")))
            assert (ROOT / program).exists() and set(re.findall(r"--[\w-]+", arguments)) <= options.get(program, set())
        assert (ROOT / f"tests/test_{op}.py").exists() and f"tests/test_{op}.py" in text
        if op in STEPS:
            assert all(f"{selector}.{op}" in profiled for selector in STEPS[op])
        else:
            (kernels,) = re.findall(r"regex:\^\((.+)\)\$", text)
            assert len(kernels.split("|")) == (CSRC / "cuda" / f"{op}.cu").read_text().count("__global__")


def test_versions_of_pre_commit_are_those_of_the_tests():
    pinned = re.findall(r"[\w-]+==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 3 and all(f'"{version}"' in (ROOT / "pyproject.toml").read_text() for version in pinned)


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
    assert not {*sources, "CMakeLists.txt", "ninja_file.py", "entmaxkv/py.typed", "LICENSE"} - packed
