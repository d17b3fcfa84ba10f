"""`python -m entmaxkv` prints what is installed, and why CUDA cannot be used where it cannot."""

import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import entmaxkv

ARCHITECTURE = re.compile(rb"sm_\d+a?")  # as the CUDA library names what it holds


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as sm_80 or sm_90a, runs on a GPU of a compute capability."""
    number = architecture.removeprefix("sm_")
    major, minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
    return (major, minor) == capability if number.endswith("a") else major == capability[0] and minor <= capability[1]


def cuda_state(
    torch_cuda: str | None, library: bool, built: Sequence[str], capabilities: Sequence[tuple[int, int]]
) -> str:
    """Says whether CUDA can be used, and if not, why not and what to do.

    Args:
        torch_cuda: the version of CUDA that torch was built with, if any.
        library: whether there is a _cuda library.
        built: the architectures that it holds.
        capabilities: those of the GPUs that torch sees.
    """
    reasons = []
    if not torch_cuda:
        reasons.append("this torch has no CUDA (https://pytorch.org says how to install one that has)")
    if not library:
        reasons.append(
            "no _cuda library was built (with nvcc in PATH or CUDA_HOME set, `pip install --no-build-isolation "
            "--editable .` builds it, unless ENTMAXKV_CUDA=0)"
        )
    if reasons:
        return f"not loaded: {'; '.join(reasons)}"
    if not capabilities:
        return "loaded, but torch sees no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    unfit = [c for c in dict.fromkeys(capabilities) if not any(runs_on(architecture, c) for architecture in built)]
    if unfit:
        gpus = ", ".join(f"sm_{major}{minor}" for major, minor in unfit)
        wanted = ";".join(f"{major}.{minor}" for major, minor in unfit)
        return (
            f"loaded, but built for {', '.join(built)}, and not for the {gpus} of this machine "
            f"(build it again with TORCH_CUDA_ARCH_LIST='{wanted}')"
        )
    return "loaded"


def main() -> None:
    here = Path(entmaxkv.__file__).parent
    libraries = sorted(path.name for path in here.glob("_*.so"))
    cuda_libraries = list(here.glob("_cuda*.so"))
    built = sorted({name.decode() for path in cuda_libraries for name in ARCHITECTURE.findall(path.read_bytes())})
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})" for i, (major, minor) in enumerate(capabilities)]
    schemas = sorted(
        (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("entmaxkv::")),
        key=lambda schema: schema.name,
    )
    facts = {
        "entmaxkv": entmaxkv.__version__,
        "libraries": ", ".join(libraries),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": ", ".join(gpus) or "none",
        "built for": ", ".join(built) or "no GPU",
        "cuda": cuda_state(torch.version.cuda, bool(cuda_libraries), built, capabilities),
    }
    for name, value in facts.items():
        print(f"{name:10} {value}")
    for schema in schemas:
        keys = {"CPU": "CPU", "CUDA": "CUDA", "CompositeExplicitAutograd": "any"}
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        print(f"{'+'.join(name for key, name in keys.items() if has_kernel(schema.name, key)):10} {schema}")


if __name__ == "__main__":
    main()
