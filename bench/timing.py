"""Times of calls that take turns: CUDA graph replays with a cold L2 cache on a GPU, plain calls on the CPU."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # far more than any cache holds


class Time(NamedTuple):
    """Median microseconds, of a `graph` replay or of a plain `call`."""

    us: float
    of: str


class Stopwatch(NamedTuple):
    """Runs something and returns the microseconds it took."""

    run: Callable[[], float]
    of: str


@cache
def rubbish() -> torch.Tensor:
    """What pushes everything else out of L2."""
    return torch.empty(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def waits(call: Callable[[], object]) -> bool:
    """Whether a call that has run before waits for the GPU, which no graph can hold."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call, after a warm-up on the stream of the capture."""
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
    """Warms a call up, and captures it where it can be."""
    if device == "cpu":

        def on_cpu() -> float:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)

        return Stopwatch(on_cpu, "call")

    call()
    run, of = call, "call"
    if not waits(call):
        with suppress(RuntimeError):  # what cannot be captured is called
            run, of = captured(call), "graph"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        rubbish().zero_()  # lasts until a replay has been queued
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    return Stopwatch(on_gpu, of)


def medians(methods: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Time]:
    """Median time of each method, the methods taking turns after one round that does not count."""
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
