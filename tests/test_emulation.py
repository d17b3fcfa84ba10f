"""The CUDA kernels where there is no GPU: compiled as C++, run by the CPU (tests/emulation), put to the ops' tests."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WRONG_ALPHAS, alpha_calls, assert_same_bits, check_wrong_alpha, hard_selections
from torch.utils import cpp_extension

import entmaxkv

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
PACKAGE = Path(entmaxkv.__file__).parent

TRUSTING = "dense_decode", "sparse_decode", "select_gaussian", "select_sketch"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="threads are switched in x86-64 assembly")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Builds a copy of the package whose library holds the emulated kernels; the environment that imports it."""
    root = tmp_path_factory.mktemp("emulation")
    package = root / "entmaxkv"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    doors = [path for path in CSRC.glob("*.cpp") if path.name != "parallel_torch.cpp"]
    sources = [*doors, *CSRC.glob("cuda/*.cu"), HERE / "emulation" / "emulation.cpp"]
    flags = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-w", "-DEMULATE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{path}" for path in (HERE / "emulation", *cpp_extension.include_paths())]
    compiler = os.environ.get("CXX", "c++")
    link = ["-shared", f"-L{cpp_extension.TORCH_LIB_PATH}", "-ltorch_cpu"]
    # A second library has the same kernels behind front doors that look at no values, as on a device.
    kernels, trusting = sources[len(doors) :], [path for path in doors if path.stem in TRUSTING]
    rules = [
        f"rule compile\n  command = {compiler} {shlex.join(flags)} $trust -x c++ -c $in -o $out",
        f"rule link\n  command = {compiler} $in {shlex.join(link)} -o $out",
        *(f"build {source.name}.o: compile {str(source).replace(' ', '$ ')}" for source in sources),
        f"build entmaxkv/_C.abi3.so: link {' '.join(f'{source.name}.o' for source in sources)}",
        *(
            f"build trusting/{source.name}.o: compile {str(source).replace(' ', '$ ')}\n  trust = -DEMULATE_TRUST"
            for source in trusting
        ),
        f"build trusting.so: link {' '.join(f'{source.name}.o' for source in kernels)} "
        + " ".join(f"trusting/{source.name}.o" for source in trusting),
    ]
    (root / "build.ninja").write_text("\n".join(rules) + "\n")
    run(os.environ | {"PYTHONPATH": str(root)}, "-m", "ninja")
    return os.environ | {"PYTHONPATH": str(root)}


def run(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=environment["PYTHONPATH"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_copy_is_what_runs(environment):
    run(environment, "-c", f"import entmaxkv; assert entmaxkv.__file__.startswith({environment['PYTHONPATH']!r})")


@pytest.mark.parametrize(
    "op",
    [
        "append_kv",
        "build_sketch",
        "page_stats",
        "score_pages",
        "score_gaussian",
        "select_pages",
        "select_gaussian",
        "select_sketch",
        "sparse_decode",
        "dense_decode",
    ],
)
def test_op(environment, op):
    test = str(HERE / f"test_{op}.py")
    run(environment, "-m", "pytest", "-q", "-x", "-m", "not cuda", "-p", "no:cacheprovider", test)


SELECT = """
import torch, entmaxkv
calls = torch.load("calls.pt")
torch.save([torch.ops.entmaxkv.select_pages(*call) for call in calls], "selections.pt")
"""


def test_select_pages_chooses_what_the_cpu_chooses(environment):
    """From the same scores, bit for bit, whatever ties and special numbers are among them."""
    calls = [call for pages in (1, 2, 1024, 2049, 8705) for call in hard_selections(pages)]
    root = Path(environment["PYTHONPATH"])
    torch.save(calls, root / "calls.pt")
    run(environment, "-c", SELECT)
    for call, got in zip(calls, torch.load(root / "selections.pt"), strict=True):
        assert_same_bits(got, torch.ops.entmaxkv.select_pages(*call))


TRUST = """
import torch
torch.ops.load_library("trusting.so")
torch.save([getattr(torch.ops.entmaxkv, op)(*arguments) for op, *arguments in torch.load("calls.pt")], "results.pt")
"""


@pytest.mark.parametrize("alpha", WRONG_ALPHAS, ids=str)
def test_a_wrong_alpha_of_a_head_ends_in_nan(environment, alpha):
    """Nobody has looked at head_alpha: its head has no result, selections end, and other heads have what they had."""
    root = Path(environment["PYTHONPATH"])
    calls = {}
    for name, value in (("good", 1.75), ("wrong", alpha)):
        head_alpha = torch.tensor([1.5, value, 1.0, 4 / 3])
        calls[name] = alpha_calls(head_alpha, "cpu")
    torch.save(calls["good"] + calls["wrong"], root / "calls.pt")
    run(environment, "-c", TRUST)
    results = torch.load(root / "results.pt")
    for call, good, wrong in zip(
        calls["good"], results[: len(results) // 2], results[len(results) // 2 :], strict=True
    ):
        check_wrong_alpha(call, good, wrong)
