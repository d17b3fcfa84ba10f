"""`python -m entmaxkv`: what is installed."""

import platform
import re
from pathlib import Path

import torch

import entmaxkv

ARCHITECTURE = re.compile(rb"sm_\d+a?")  # as the CUDA library names what it holds


def main() -> None:
    here = Path(entmaxkv.__file__).parent
    libraries = sorted(path.name for path in here.glob("_*.so"))
    built = sorted(
        {name.decode() for path in here.glob("_cuda*.so") for name in ARCHITECTURE.findall(path.read_bytes())}
    )
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
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
    }
    for name, value in facts.items():
        print(f"{name:10} {value}")
    for schema in schemas:
        backends = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, key)]
        print(f"{'+'.join(backends):10} {schema}")


if __name__ == "__main__":
    main()
