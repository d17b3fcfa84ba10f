"""Runs decode steps for a profiler. Each op runs in a range named SELECTOR.OP.

On a GPU the ranges are NVTX ranges, and the program prints the command lines that profile it with Nsight Systems and
Nsight Compute. On the CPU it prints the table of torch.profiler.
"""

import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from entmaxkv import Gaussian, KeySketch, TopPages

sys.path.append(str(Path(__file__).parents[1]))
from bench.inputs import add_case_arguments, cases, drawn, filled, positive, rows
from bench.model_text import ModelText
from bench.program import check, parser_of, wide_console
from bench.steps import stages

WARM_UP = 3


def ranged(name: str, device: str) -> AbstractContextManager[object]:
    return torch.cuda.nvtx.range(name) if device == "cuda" else torch.profiler.record_function(name)


def commands(ranges: list[str], arguments: list[str]) -> list[str]:
    """Command lines that profile this program with these arguments: a trace by nsys, and the ranges' kernels by ncu."""
    command = shlex.join(["python", *arguments])
    included = " ".join(f"--nvtx-include {name}/" for name in ranges)  # the slash means a push/pop range
    return [
        f"nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi --output decode {command}",
        f"ncu --set full --clock-control none --nvtx {included} --export decode {command}",
    ]


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__, writes=False)
    add_case_arguments(parser, "32768", "bf16")
    parser.add_argument("--alpha", type=float, default=1.5, help="alpha of entmax, in (1, 2]")
    parser.add_argument("--budget", type=positive, default=2048, help="tokens per KV head that TopPages reads")
    parser.add_argument("--steps", type=positive, default=5, help="steps of each selector")
    args = parser.parse_args()
    check(parser, args)
    args.context = getattr(args, "context", [rows("32768")])
    args.dtype = getattr(args, "dtype", ["bf16"])
    if not 1 < args.alpha <= 2:
        parser.error(f"expected --alpha in (1, 2], got {args.alpha}")
    chosen = cases(args)
    if len(chosen) > 1:
        parser.error(f"expected one case, got {len(chosen)}: {'; '.join(map(str, chosen))}")

    (case,) = chosen
    console = wide_console()
    inputs = ModelText(chosen, args.device, console).inputs(case) if case.keys == "model" else drawn(case, args.device)
    cache = filled(case, inputs)
    selectors = {"dense": None, "KeySketch": KeySketch(), "TopPages": TopPages(args.budget), "Gaussian": Gaussian()}
    ops = {
        f"{name}.{op}": call
        for name, select in selectors.items()
        for op, call in stages(inputs.q, cache, select, args.alpha).items()
    }
    for _ in range(WARM_UP):
        for call in ops.values():
            call()

    def run() -> None:
        for _ in range(args.steps):
            for name, call in ops.items():
                with ranged(name, args.device):
                    call()

    console.print(f"{args.steps} steps of each selector: {case}")
    if args.device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        columns = {"sort_by": "cpu_time_total", "row_limit": 2 * len(ops), "max_name_column_width": 40}
        print(profile.key_averages().table(**columns))
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    print("\n".join(commands(list(ops), sys.argv)))


if __name__ == "__main__":
    main()
