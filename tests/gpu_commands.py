"""Prints the commands that test, check, profile and time an op on a machine with a GPU (`make gpu OP=...`)."""

import re
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# The selectors (in the names of bench/profile_decode.py) whose decode steps call an op.
STEPS = {
    "dense_decode": ["dense"],
    "score_gaussian": ["Gaussian"],
    "score_pages": ["TopPages"],
    "select_gaussian": ["Gaussian"],
    "select_pages": ["TopPages"],
    "select_sketch": ["KeySketch"],
    "sparse_decode": ["KeySketch", "TopPages", "Gaussian"],
}


def profile(op: str) -> str:
    """Steps of decoding, and of the other ops the kernels in a small case."""
    command = f"ncu --set full --clock-control none --export {op}"
    if op in STEPS:
        ranges = " ".join(f"--nvtx-include {selector}.{op}/" for selector in STEPS[op])
        return f"{command} --nvtx {ranges} python bench/profile_decode.py --device cuda"
    kernels = re.findall(r"__global__[^;{]*?(\w+)\(\w+ op\b", (KERNELS / f"{op}.cu").read_text())
    return f"{command} --kernel-name 'regex:^({'|'.join(kernels)})$' --launch-count 20 python tests/every_op.py"


def commands(op: str) -> str:
    checks = "\n".join(
        f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} python tests/every_op.py"
        for tool in ("memcheck", "racecheck", "synccheck")
    )
    return f"""\
# Build, for this GPU alone:
arch=$(python -c "import torch; print(*torch.cuda.get_device_capability(), sep='.')" | sed s/9.0/9.0a/)
TORCH_CUDA_ARCH_LIST=$arch python -m pip install --no-build-isolation --editable ".[test]"
# Test:
python -m pytest -q -m cuda tests/test_{op}.py tests/test_cuda.py
# Check with compute-sanitizer; a small case of every op:
{checks}
# Profile with Nsight Compute; ncu --import {op}.ncu-rep shows the report:
{profile(op)}
# Time, beside the other ops of its step:
python bench/decode.py --device cuda --context 32768 131072 16x32768 --peers sdpa"""


if __name__ == "__main__":
    print(commands(sys.argv[1]))
