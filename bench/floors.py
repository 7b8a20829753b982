"""The least time that a case may take on a device, from what was measured there in the same run.

On a CPU the floor of a case is the time of its matrix products at the rate of a large one. On a GPU there is also the memory
to be moved, and the steps of a layer, one after another: each waits for a state from all programs, or for a launch.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import TORCH_DTYPES
from timing import graph_of, median_us
from workloads import Case

PROGRAMS = (16, 32, 64, 128)
EXCHANGES = ((16, 256), (16, 1024), (64, 256), (64, 1024))  # batch rows and hidden units of a state


def floors(device: str, dtypes: list[str], threads: int) -> dict[str, Any]:
    """Everything that :func:`floor` wants to know of a device."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"flop_per_us": {dtype: gemm_rate(device, dtype) for dtype in dtypes}}
    if device == "cuda":
        found |= {"bytes_per_us": copy_rate(), **launches(), **waiting()}
    return found


def gemm_rate(device: str, dtype: str, n: int = 0) -> float:
    """Floating-point operations per microsecond of a large matrix product, the best of a few runs."""
    if device == "cpu" and not n:
        return max(gemm_rate(device, dtype, n) for n in (512, 1024, 2048))
    n = n or 8192
    if device == "cpu" and dtype == "fp16":
        dtype = "fp32"  # in which it is best computed there
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    a, b = (torch.randn(n, n, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
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
    from ladder import nothing

    x = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            nothing[(1,)](x)

    return {"launch_us": median_us(hundred) / 100, "graph_launch_us": median_us(graph_of(hundred)) / 100}


def waiting() -> dict[str, dict[str, float]]:
    """Microseconds of a step that only waits, and of one that also passes a state of bf16 on."""
    from ladder import Rung, step_us

    barrier = {str(n): step_us(Rung.BARRIER, 16, 16 * n) for n in PROGRAMS}
    exchange = {f"{B}x{H}": step_us(Rung.EXCHANGE, B, H) for B, H in EXCHANGES}
    return {"barrier_us": barrier, "exchange_us": exchange}


def floor(
    case: Case, mode: str, found: dict[str, Any], filled: float = 1.0, longest: int | None = None
) -> dict[str, float] | None:
    """Microseconds that a case takes at least, and what they are made of; None where its dtype's rate was not measured.

    With lengths, ``filled`` is the part of the steps that lie within one, and ``longest`` the largest.

    products: all matrix products at the rate of a large one. On a GPU also memory: inputs and outputs, read and written
    once at the rate of a large copy; and steps: T times the cheapest way to pass a state on (an exchange behind a barrier,
    or a launch in a CUDA graph), for each layer, and once more in a backward pass. A program that has all hidden units
    (H up to 128) passes nothing on. Input projections do not overlap with steps in any known implementation, but could:
    the floor is the largest of the three, not their sum.
    """
    rate = found.get("flop_per_us", {}).get(case.dtype)
    if rate is None:
        return None
    parts = {"products": case.flop(mode, filled) / rate}
    if "bytes_per_us" in found:
        size = TORCH_DTYPES[case.dtype].itemsize
        outputs = (case.proj or case.H) * (1 + case.bidirectional)
        once = filled * case.B * case.T * size * (sum(case.widths()) + case.layers * outputs)
        parts["memory"] = once * (2 if mode == "training" else 1) / found["bytes_per_us"]
        passes = 2 if mode == "training" else 1
        parts["steps"] = 0.0 if case.H <= 128 else passes * case.layers * (longest or case.T) * _passing_on(case, found)
    return {"floor_us": max(parts.values()), **{f"floor_{k}_us": v for k, v in parts.items()}}


def _passing_on(case: Case, found: dict[str, Any]) -> float:
    """The cheapest measured way, at no more than the case's size: a floor may be too low, not too high."""
    small = [us for key, us in found["exchange_us"].items() if int(key.split("x")[1]) <= case.H]
    return min([found["graph_launch_us"], *(small or [min(found["exchange_us"].values())])])
