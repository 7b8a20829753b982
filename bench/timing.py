"""How time is taken, on a GPU by events, on a CPU by the clock; and a device's rates, which the floors of cases want."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import DTYPES

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


def host_us(call: Callable[[Any], Any], calls: int, prepare: Callable[[], Any] = lambda: None, cuda: bool = True) -> float:
    """What a call costs the host: until it returns, with the device idle before; ``prepare``, which makes what it is given,
    is not timed. The median."""
    times, kept = [], []  # results are kept, so that no time is taken of tearing them down
    for _ in range(calls):
        given = prepare()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        kept.append(call(given))
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def device_us(run: Run) -> dict[str, Any]:
    """What a call costs the device alone: its time in a CUDA graph, or why there is none."""
    try:
        return {"device_us": median_us(graph_of(run))}
    except RuntimeError as error:
        return {"device_us": None, "device_us_missing": str(error)[:200]}


def device_work(run: Run) -> dict[str, Any]:
    """What the device does in a call, by the profiler."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    on_device = [e for e in trace.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    return work_of([(e.start_ns() / 1000, e.duration_ns() / 1000, e.name()) for e in on_device])


def work_of(kernels: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Of kernels (start, time and name): how many, their time, the gaps in which none ran, and those that took longest."""
    by_name: dict[str, list[Any]] = {}
    gaps, end = 0.0, min((start for start, _, _ in kernels), default=0.0)
    for start, us, name in sorted(kernels):
        gaps, end = gaps + max(0.0, start - end), max(end, start + us)
        row = by_name.setdefault(name[:80], [0.0, 0, name[:80]])
        row[0], row[1] = row[0] + us, row[1] + 1
    top = sorted(by_name.values(), reverse=True)[:8]
    return {"total_us": sum(us for _, us, _ in kernels), "gaps_us": gaps, "launches": len(kernels), "top": top}


def rates(device: str, dtypes: list[str], threads: int) -> dict[str, Any]:
    """Everything that :func:`cases.floor` wants to know of a device, measured in the run of the cases."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"flop_per_us": {dtype: gemm_rate(device, dtype) for dtype in dtypes}}
    if device == "cuda":
        found |= {"bytes_per_us": copy_rate(), **launches()}
    return found


def gemm_rate(device: str, dtype: str, n: int = 0) -> float:
    """Floating-point operations per microsecond of a large matrix product, the best of a few runs."""
    if device == "cpu" and not n:
        return max(gemm_rate(device, dtype, n) for n in (512, 1024, 2048))
    n = n or 8192
    if device == "cpu" and dtype == "fp16":
        dtype = "fp32"  # in which it is best computed there
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    if device == "cuda":
        return 2 * n**3 / median_us(lambda: torch.mm(a, b, out=out), 10)
    # torch's two ways to multiply on a CPU, its BLAS and oneDNN: the faster one counts.
    ways = [lambda: torch.mm(a, b, out=out)]
    if dtype in ("fp32", "bf16") and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    times = []
    for multiply in ways:
        multiply()
        for _ in range(10):
            start = time.perf_counter()
            multiply()
            times.append(1e6 * (time.perf_counter() - start))
    return 2 * n**3 / min(times)


def copy_rate() -> float:
    """Bytes per microsecond, read and written, of a large copy on the device."""
    a = torch.empty(2**30, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / median_us(lambda: b.copy_(a), 10)


def launches() -> dict[str, float]:
    """Microseconds that a launch costs: from Python, one after another, and within a CUDA graph."""
    import triton

    @triton.jit
    def nothing(x_ptr):
        pass

    x = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            nothing[(1,)](x)

    return {"launch_us": median_us(hundred) / 100, "graph_launch_us": median_us(graph_of(hundred)) / 100}
