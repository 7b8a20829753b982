"""What no schedule can go below on a device: what a launch costs, a barrier, and an exchange of states through L2."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from fused_lstm.kernels.barrier import arrive, wait
from timing import graph_of, median_us


@triton.jit
def nothing(x_ptr):
    pass


@triton.jit(do_not_specialize=["steps"])
def waiting_steps(arrived_ptr, h_ptr, steps, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Steps of a recurrence without arithmetic: a barrier and, if BLOCK > 0, reading all of h and writing a part of it."""
    offs_b = tl.arange(0, ROWS)[:, None] * H
    own = offs_b + tl.program_id(0) * 16 + tl.arange(0, 16)[None, :]
    total = tl.zeros((ROWS, 16), dtype=tl.float32)
    for s in tl.range(0, steps, num_stages=1):
        wait(arrived_ptr, s * tl.num_programs(0))
        if BLOCK > 0:
            here = h_ptr + (s % 2) * ROWS * H
            for k in range(0, H, BLOCK):
                h = tl.load(here + offs_b + k + tl.arange(0, BLOCK)[None, :], cache_modifier=".cg")
                total += tl.sum(h.to(tl.float32), 1)[:, None]
            tl.store(h_ptr + ((s + 1) % 2) * ROWS * H + own, total.to(tl.bfloat16))
        arrive(arrived_ptr)


def launches() -> dict[str, float]:
    """Microseconds that a launch costs: from Python, one after another, and within a CUDA graph."""
    x = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            nothing[(1,)](x)

    return {"from_python_us": median_us(hundred) / 100, "in_a_graph_us": median_us(graph_of(hundred)) / 100}


def barrier() -> dict[str, float]:
    """Microseconds of a step that only waits, for several numbers of programs; and of one that exchanges a state, too."""
    record = {}
    for H in (256, 512, 1024):
        for rows, block in ((16, 0), (16, 256), (64, 64)):
            h = torch.zeros(2, rows, H, device="cuda", dtype=torch.bfloat16)
            what = f"exchange of {rows} x {H} bf16" if block else "barrier"
            record[f"{what}, {H // 16} programs"] = median_us(partial(_thousand, h, H, rows, block), 5) / 1000
    return record


def _thousand(h: torch.Tensor, H: int, rows: int, block: int) -> None:
    arrived = torch.zeros(16, dtype=torch.int64, device="cuda")
    waiting_steps[(H // 16,)](arrived, h, 1000, H, rows, block, launch_cooperative_grid=True)
