"""Builds entmaxkv/_C (schemas and CPU kernels) and, where nvcc is found, entmaxkv/_cuda (CUDA kernels).

Both use the LibTorch stable ABI and no Python API: one build serves every Python >= 3.10 and every torch >= 2.10.
TORCH_CUDA_ARCH_LIST (for example "9.0a") narrows the GPU architectures; ENTMAXKV_CUDA=0 leaves the CUDA library out.
CXX, CXXFLAGS and LDFLAGS have their usual meaning; CC, if it is set, is the host compiler of nvcc.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

sys.path.append(str(Path(__file__).resolve().parent))  # a build backend does not look there

from ninja_file import CXX, TORCH, NinjaFile

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
HOST_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fwrapv", "-ffp-contract=fast", "-fvisibility=hidden"]
HOST_FLAGS += ["-Wall", "-Wno-maybe-uninitialized", *shlex.split(os.environ.get("CXXFLAGS", ""))]
LINK_FLAGS = shlex.split(os.environ.get("LDFLAGS", ""))
# A kernel has to say where it converts numbers of 16 bits.
NO_OPERATORS = ["HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"]
ARCHITECTURES = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]


def find_cuda() -> Path | None:
    """The CUDA toolkit's root, if there is an nvcc and it is wanted."""
    if os.environ.get("ENTMAXKV_CUDA", "1") == "0":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = (None if "CUDA_HOME" in os.environ else shutil.which("nvcc")) or home / "bin" / "nvcc"
    if not Path(nvcc).exists():
        return None
    # nvcc may be a wrapper or a link: it knows best where its toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "-"], input="", capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", dry_run.stderr)
    return Path(top.group(1)).resolve() if top else None


def gencode(cuda: Path) -> list[str]:
    """One -gencode per wanted architecture that this nvcc knows."""
    wanted = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ARCHITECTURES))
    known = subprocess.run([cuda / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    flags = []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        if f"sm_{number.rstrip('a')}" in known:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                # A later GPU would compile such code for itself, and launch it as if it were in clusters.
                if float(arch[:-4].rstrip("a")) < 9:
                    raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: expected +PTX at 9.0 or later architectures, got {arch}")
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: expected architectures among {known}, got {wanted}")
    return flags


class Library(Extension):
    """A library that ninja builds in a folder of its own: both compile the front doors, each in its own way."""

    def __init__(self, name: str) -> None:
        super().__init__(f"entmaxkv.{name}", [], py_limited_api=True)
        self.ninja = NinjaFile(BUILD / name)
        self.built = self.ninja.folder / f"{name}.so"

    def link(self, objects: list[str], flags: list[str]) -> None:
        flags = [*LINK_FLAGS, f"-L{cpp_extension.TORCH_LIB_PATH}", "-lc10", "-ltorch_cpu", *flags]
        self.ninja.link(self.built.name, objects, CXX, flags)


def cpu_library() -> Library:
    library = Library("_C")
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")])
    library.ninja.compiler("cxx", CXX, [*HOST_FLAGS, *TORCH])
    library.link(library.ninja.compile("cxx", [source for source in sources if source.name != "parallel_std.cpp"]), [])
    return library


def cuda_library(cuda: Path) -> Library:
    library = Library("_cuda")
    host_compiler = os.environ.get("CC", "gcc")
    flags = ["-ccbin", host_compiler, "-std=c++20", "-O3", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
    flags += [f"-D__CUDA_NO_{what}__" for what in NO_OPERATORS]
    flags += ["-Xptxas=-v", *gencode(cuda)]  # the tests read what ptxas says
    library.ninja.compiler("nvcc", [str(cuda / "bin" / "nvcc")], flags, calls=[[host_compiler]], keep_log=True)
    library.ninja.compiler("cxx", CXX, [*HOST_FLAGS, "-DUSE_CUDA", f"-I{cuda}/include", *TORCH])
    doors = sorted(source for source in CSRC.glob("*.cpp") if source.name != "parallel_torch.cpp")
    objects = library.ninja.compile("nvcc", sorted(CSRC.glob("cuda/*.cu"))) + library.ninja.compile("cxx", doors)
    # The current stream comes from libtorch_cuda. Where torch has none, an empty library of that name makes the
    # loader look for the real one at run time.
    stub = BUILD / "stub" / "libtorch_cuda.so"
    if not (Path(cpp_extension.TORCH_LIB_PATH) / stub.name).exists() and not stub.exists():
        stub.parent.mkdir(parents=True, exist_ok=True)
        command = [*CXX, "-shared", f"-Wl,-soname,{stub.name}", "-o", str(stub), "-x", "c++", os.devnull]
        subprocess.run(command, check=True)
    runtime = [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    library.link(objects, [f"-L{stub.parent}", *runtime, "-Wl,--no-as-needed", "-ltorch_cuda"])
    return library


class BuildLibraries(build_ext):
    """Runs ninja, in a folder that outlives the build: pip's would be gone before the next one."""

    def build_extension(self, ext: Library) -> None:
        ext.ninja.run()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ext.built), str(target))


cuda = find_cuda()
setup(
    ext_modules=[cpu_library(), *([cuda_library(cuda)] if cuda else [])],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
