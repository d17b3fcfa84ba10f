"""Builds a copy of the package whose library holds the CUDA kernels compiled as C++, and runs tests on it.

python tests/emulation/build.py OP [pytest arguments]    tests/test_OP.py with the emulated kernels

The copy stays in build/emulation, so that the next build compiles only what has changed.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension

sys.path.append(str(Path(__file__).resolve().parents[2]))

from ninja_file import CXX, TORCH, NinjaFile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"

DOORS = sorted(path for path in CSRC.glob("*.cpp") if path.name != "parallel_torch.cpp")
# decode is made of other ops.
OPS = [path.stem for path in DOORS if "\nENTMAXKV_OP" in path.read_text() and path.stem != "decode"]
TRUSTING = "dense_decode", "sparse_decode", "select_gaussian", "select_sketch"


def build(package: Path = ROOT / "entmaxkv") -> dict[str, str]:
    """Brings the copy up to date; returns the environment whose Python imports it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # another run of the tests may be building
        fcntl.flock(lock, fcntl.LOCK_EX)
        link_modules(package, BUILD / "entmaxkv")
        compile_kernels()
    return os.environ | {"PYTHONPATH": str(BUILD), "ENTMAXKV_EMULATION": str(BUILD)}  # conftest.py looks at the latter


def link_modules(package: Path, copy: Path) -> None:
    """Makes the copy's modules links to the package's."""
    copy.mkdir(exist_ok=True)
    modules = {path.name: path for path in package.iterdir() if path.suffix != ".so" and path.name != "__pycache__"}
    for link in copy.iterdir():
        if link.is_symlink() and modules.get(link.name) != link.readlink():
            link.unlink()
    for name, module in modules.items():
        if not (copy / name).is_symlink():
            (copy / name).symlink_to(module)


def compile_kernels() -> None:
    ninja = NinjaFile(BUILD)
    flags = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-w", "-DEMULATE_CUDA", f"-I{HERE}", *TORCH]
    ninja.compiler("compile", CXX, [*flags, "-x", "c++"])
    ninja.compiler("compile_trusting", CXX, [*flags, "-DEMULATE_TRUST"])
    kernels = ninja.compile("compile", [*sorted(CSRC.glob("cuda/*.cu")), HERE / "emulation.cpp"])
    checked = ninja.compile("compile", DOORS)
    # A second library has the same kernels behind front doors that look at no values, as on a device.
    trusting = ninja.compile("compile_trusting", [path for path in DOORS if path.stem in TRUSTING], into="trusting/")
    torch = [f"-L{cpp_extension.TORCH_LIB_PATH}", "-ltorch_cpu"]
    ninja.link("entmaxkv/_C.abi3.so", kernels + checked, CXX, torch)
    ninja.link("trusting.so", kernels + trusting, CXX, torch)
    ninja.run()


def main(op: str, *arguments: str) -> int:
    if op not in OPS:
        print(f"expected OP among {', '.join(OPS)}, got {op!r}", file=sys.stderr)
        return 2
    try:
        environment = build()
    except subprocess.CalledProcessError as failed:  # the compiler has said why
        return failed.returncode
    test = str(HERE.parent / f"test_{op}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not cuda", test, *arguments]
    return subprocess.run(command, env=environment, cwd=BUILD).returncode


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or [""])))
