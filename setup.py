"""Builds entmaxkv/_C (schemas and CPU kernels) and, where nvcc is found, entmaxkv/_cuda (CUDA kernels).

Both use the LibTorch stable ABI and no Python API: one build serves every Python >= 3.10 and every torch >= 2.10.
TORCH_CUDA_ARCH_LIST (for example "9.0a") narrows the GPU architectures; ENTMAXKV_CUDA=0 leaves the CUDA library out.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CSRC = Path("csrc")
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10
HOST_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
SOURCES = [path for path in CSRC.rglob("*") if path.is_file()]
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


def cpu_library() -> cpp_extension.CppExtension:
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    return cpp_extension.CppExtension(
        "entmaxkv._C",
        sorted(str(source) for source in sources if source.name != "parallel_std.cpp"),
        depends=[str(source) for source in SOURCES],
        extra_compile_args=[*HOST_FLAGS, *STABLE_ABI],
        py_limited_api=True,
    )


def cuda_library(cuda: Path) -> cpp_extension.CppExtension:
    cpp_extension.CUDA_HOME = str(cuda)  # torch looks for it only where torch itself has CUDA
    kernels = sorted(CSRC.glob("cuda/*.cu"))
    doors = sorted(source for source in CSRC.glob("*.cpp") if source.name != "parallel_torch.cpp")
    # The current stream comes from libtorch_cuda. Where torch has none, an empty library of that name makes the
    # loader look for the real one at run time.
    libraries = [Path(cpp_extension.TORCH_LIB_PATH)]
    if not (libraries[0] / "libtorch_cuda.so").exists():
        stub = ROOT / "build" / "stub"
        stub.mkdir(parents=True, exist_ok=True)
        command = [
            "c++",
            "-shared",
            "-Wl,-soname,libtorch_cuda.so",
            "-o",
            str(stub / "libtorch_cuda.so"),
            "-x",
            "c++",
        ]
        subprocess.run([*command, os.devnull], check=True)
        libraries.append(stub)
    return cpp_extension.CppExtension(
        "entmaxkv._cuda",
        [str(source) for source in (*doors, *kernels)],
        depends=[str(source) for source in SOURCES],
        include_dirs=[str(cuda / "include")],
        library_dirs=[str(cuda / "lib64"), *map(str, libraries)],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": [*HOST_FLAGS, "-DUSE_CUDA", *STABLE_ABI],
            "nvcc": [
                "-O3",
                "-DUSE_CUDA",
                "--expt-relaxed-constexpr",
                "-Xptxas=-v",
                *STABLE_ABI,
                *gencode(cuda),
            ],
        },
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda"],
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps the objects of the two libraries apart: both compile the front doors, each in its own way."""

    def build_extension(self, ext) -> None:
        shared = self.build_temp
        self.build_temp = str(Path(shared) / ext.name)
        if ext.name.endswith("_cuda"):
            self.build_cuda(ext)
        else:
            super().build_extension(ext)
        self.build_temp = shared

    def build_cuda(self, ext) -> None:
        """Compiles all kernels or none, and keeps what ptxas says of them in build/cuda.log.

        An old object would not be in that log, and might miss a change: where torch has no CUDA, it does not tell ninja
        which headers a .cu file includes.
        """
        objects = list(Path(self.build_temp).rglob("*.o"))
        if objects and max(map(modified, SOURCES)) > min(map(modified, objects)):
            shutil.rmtree(self.build_temp)
        screen = os.dup(1)
        with tempfile.TemporaryFile("w+") as output:
            os.dup2(output.fileno(), 1)  # ninja writes there, past sys.stdout
            try:
                super().build_extension(ext)
            except BaseException:
                shutil.rmtree(self.build_temp, ignore_errors=True)
                raise
            finally:
                os.dup2(screen, 1)
                os.close(screen)
                output.seek(0)
                text = output.read()
                print(text, end="")
        if "ptxas info" in text:
            log = ROOT / "build" / "cuda.log"
            log.parent.mkdir(exist_ok=True)
            log.write_text(text)


def modified(path: Path) -> float:
    return path.stat().st_mtime


os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, if nobody activated it
cuda = find_cuda()
setup(
    ext_modules=[cpu_library(), *([cuda_library(cuda)] if cuda else [])],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
