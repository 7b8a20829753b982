"""How time is taken: on a GPU by events on the device, on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], None]


class Timer:
    """Times calls one by one. On a GPU the L2 cache is flushed before each; on a CPU a short one is repeated to 2 ms."""

    def __init__(self, device: str) -> None:
        self.cuda, self.repeats = device == "cuda", 1
        if self.cuda:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            self.flush = torch.empty(2 * max(properties.L2_cache_size, 2**24), dtype=torch.int8, device="cuda")

    def repeat_for(self, run: Run) -> None:
        """Take the repetitions that a call needs into account."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            self.repeats = max(self.repeats, int(2e-3 / (time.perf_counter() - start)))

    def time(self, run: Run) -> Any:
        """One measurement, for :meth:`microseconds`."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(self.repeats):
                run()
            return (time.perf_counter() - start) / self.repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        return start, end

    def wait(self) -> None:
        """Until the device has done what it was given, so that the clock on the host knows how long that takes."""
        if self.cuda:
            torch.cuda.synchronize()

    def microseconds(self, measured: list[Any]) -> list[float]:
        if not self.cuda:
            return [1e6 * seconds for seconds in measured]
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(end) for start, end in measured]


def median_us(run: Run, repeats: int = 20) -> float:
    """Median device time of a call in microseconds, by events, after two warm-up calls."""
    times = []
    for k in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if k >= 2:
            times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def graph_of(run: Run) -> Run:
    """A CUDA graph of a call, ready to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_us(run: Run, calls: int = 50) -> float:
    """What a call costs the host on a GPU: until it returns, with the device idle before."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def device_us(run: Run, mode: str) -> dict[str, Any]:
    """What a call costs the device alone: its time in a CUDA graph, or why there is none."""
    try:
        return {"device_us": median_us(graph_of(run))}
    except RuntimeError as error:
        return {"device_us": None, "device_us_missing": str(error)[:200]}
