"""How device time is taken: by events, as a median, in a CUDA graph where launches are not to count."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def median_us(run: Callable[[], None], repeats: int = 20) -> float:
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


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
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
