"""Times calls that take turns: CUDA graph replays with a cold L2 cache on a GPU, plain calls on the CPU."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # many times the size of any cache


class Time(NamedTuple):
    """A median in microseconds; `of` says whether of a "graph" replay or of a plain "call"."""

    us: float
    of: str


class Stopwatch(NamedTuple):
    """Runs something and returns the microseconds it took."""

    run: Callable[[], float]
    of: str


@cache
def rubbish() -> torch.Tensor:
    """A tensor so large that writing it evicts everything else from L2."""
    return torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def waits(call: Callable[[], object]) -> bool:
    """Whether the call waits for the GPU, so that it cannot be captured in a graph; it must have run before."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Captures the call in a graph, after a warm-up on the same stream, and returns the graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def stopwatch(call: Callable[[], object], device: str) -> Stopwatch:
    """A stopwatch for the call, which is warmed up, and on a GPU captured in a graph if that is possible."""
    if device == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)

        return Stopwatch(on_cpu, "call")

    call()
    run, of = call, "call"
    if not waits(call):
        with suppress(RuntimeError):  # a call that cannot be captured is timed as a plain call
            run, of = captured(call), "graph"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        rubbish().zero_()  # keeps the GPU busy until the replay has been queued
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    return Stopwatch(on_gpu, of)


def medians(methods: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Time]:
    """The median time of each method. Methods take turns, and the first round does not count."""
    watches = {name: stopwatch(call, device) for name, call in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats + 1):
        for name, watch in watches.items():
            times[name].append(watch.run())
    return {name: Time(statistics.median(times[name][1:]), watch.of) for name, watch in watches.items()}


def read_rate(device: str) -> float:
    """GB/s at which one large tensor is summed."""
    numbers = torch.ones(READ_BYTES[device] // 4, device=device)
    return numbers.nbytes / medians({"sum": numbers.sum}, 10, device)["sum"].us / 1e3
