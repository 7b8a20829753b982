"""Launchers of the Triton kernels: which schedule, which grid, which arguments.

This module needs Triton; nothing else in the package imports it before a kernel is to run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .choose import Choice, describe, tables
from .choose import choose as choose_config
from .config import ALIGNMENT, Device, LaunchConfig, Recurrence, arithmetic, ceil_div, rounds
from .dispatch import Problem
from .kernels.backward import lstm_backward_kernel
from .kernels.forward import lstm_forward_kernel
from .rows import Rows, accumulator_dtype
from .tf32 import tf32_allowed

# TRITON_INTERPRET=1, set before the kernels are imported, makes them run on CPU tensors.
INTERPRETED = not isinstance(lstm_forward_kernel, triton.JITFunction)

# Triton 3.6's compiler stops at some fp64 products ("fp64 don't support largeK MMA"); 3.9's takes them all.
FP64 = INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

KERNELS = {"forward": lstm_forward_kernel, "backward": lstm_backward_kernel}
COUNTER = 16  # int64 elements from one barrier's counter to the next: a cache line


@lru_cache
def device(index: int) -> Device:
    """The GPU of an index."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 0),
        wgmma=torch.version.hip is None and properties.major in (9, 10),
    )


def constants(config: LaunchConfig, H: int) -> dict[str, Any]:
    """The constexpr arguments and the compiler's options that a configuration stands for."""
    config.check(H)
    only_nvidia = {} if torch.version.hip else {"maxnreg": config.max_registers}
    return dict(
        PERSISTENT=config.persistent, SWAP=config.swap, RESIDENT=config.resident, AHEAD=config.ahead, ROWS=config.rows,
        BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **only_nvidia,
        # Where a program waits for others, the driver must let all of them run at once, or refuse.
        launch_cooperative_grid=config.persistent and not config.local(H),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _choose(problem: Recurrence, device: Device | None) -> Choice:
    return choose_config(problem, device, tables(device.name) if device else ())


def choose(problem: Recurrence, device: Device | None) -> Choice:
    """The configuration for a problem, by what was measured on the device if anything was; the same for all T > 1."""
    return _choose(replace(problem, T=min(problem.T, 2)), device)


def explain(call: Problem, where: torch.device) -> dict[str, str]:
    """How the kernels would run a call, in words, for each kernel."""
    gpu = device(where.index) if where.type == "cuda" else None
    kind = arithmetic(call.dtype, where.type == "cuda" and tf32_allowed())
    H = ceil_div(call.hidden_size, ALIGNMENT) * ALIGNMENT
    words = {}
    for kernel in KERNELS if call.needs_grad and call.B else ("forward",) * bool(call.B):
        problem = Recurrence(kernel, kind, call.T, H, call.B, 2 if call.bidirectional else 1)
        words[kernel] = describe(choose(problem, gpu), problem, gpu)
    return words


def problem_of(kernel: str, rows: Rows, like: Tensor, R: int, H: int) -> Recurrence:
    tf32 = like.dtype == torch.float32 and like.is_cuda and tf32_allowed()
    return Recurrence(kernel, arithmetic(like.dtype, tf32), rows.T, H, rows.B, R)


def _run(
    kernel: str,
    tensors: list[Tensor | None],
    rows: Rows,
    R: int,
    H: int,
    like: Tensor,
    config: LaunchConfig | None,
    **flags: bool,
) -> None:
    """Launch a kernel for all steps, by the schedule chosen. ``tensors`` are its buffers up to the row map's."""
    B = rows.B
    if not B:
        return
    problem = problem_of(kernel, rows, like, R, H)
    where = device(like.device.index) if like.is_cuda else None
    config = config or choose(problem, where).config
    x, y, z = config.grid(H, B, R)
    meta = dict(
        R=R, H=H, DIRECTIONS=rows.directions,
        LENGTHS=rows.lengths is not None, PACKED=rows.batch_sizes is not None, RESETS=rows.resets is not None,
        PRECISION="tf32" if problem.arithmetic == "tf32" else "ieee",
        INTERPRET_BF16=INTERPRETED and like.dtype == torch.bfloat16,
        **flags, **constants(config, H),
    )  # fmt: skip
    resets = None if rows.resets is None else rows.resets.view(torch.uint8)
    tensors = [*tensors, rows.lengths, rows.starts(), resets]
    size = (rows.T, B, rows.stride_t, rows.stride_b)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(like) if like.is_cuda else nullcontext():
        if not config.persistent:
            steps = range(rows.T) if kernel == "forward" else range(rows.T - 1, -1, -1)
            for s in steps:
                launch(kernel, (x, y, z), (*tensors, None, s, s + 1, 0, *size), meta)
            return
        per_launch = y if where is None else ceil_div(y, rounds(config, problem, where))
        for tile in range(0, y, per_launch):
            now = min(per_launch, y - tile)
            arrived = torch.zeros(z, now, COUNTER, dtype=torch.int64, device=like.device)
            launch(kernel, (x, now, z), (*tensors, arrived, 0, rows.T, tile, *size), meta)


def launch(kernel: str, grid: tuple[int, int, int], args: tuple, meta: dict[str, Any]) -> None:
    """One launch."""
    if INTERPRETED and meta["PERSISTENT"] and grid[0] > 1:
        raise RuntimeError(
            f"the interpreter runs programs one after another, and these {grid[0]} would wait for one another: "
            "expected a configuration with one hidden tile, or a launch for each step"
        )
    KERNELS[kernel][grid](*args, **meta)


def recurrence_forward(
    gates: Tensor,  # (N, R, 4, H) in: x @ W_ih^T + biases; out, if c_all is given: activated gates
    w_hh: Tensor,  # (R, 4H, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out
    config: LaunchConfig | None = None,  # None: by choose()
) -> tuple[Tensor, Tensor]:
    """The forward recurrence. Returns h_n and c_n, (R, B, H)."""
    R, _, H = c0.shape
    dtype = accumulator_dtype(c0.dtype)
    if rows.lengths is None:
        h_n, c_n = torch.empty_like(c0), c0.new_empty(c0.shape, dtype=dtype)
    else:  # a row without steps keeps its initial state
        h_n, c_n = torch.zeros_like(c0) if h0 is None else h0.clone(), c0.to(dtype, copy=True)
    tensors = [gates, w_hh, y, y if c_all is None else c_all, c0 if h0 is None else h0, c0, h_n, c_n]
    _run("forward", tensors, rows, R, H, gates, config, HAS_H0=h0 is not None, SAVE=c_all is not None)
    return h_n, c_n.to(c0.dtype)


def recurrence_backward(
    dy: Tensor,  # (N, R, H)
    dh_n: Tensor,  # (R, B, H)
    dc_n: Tensor,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated
    c_all: Tensor,  # (N, R, H)
    y: Tensor,  # (N, R, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    w_hh: Tensor,  # (R, 4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    h_prev: Tensor,  # (N, R, H) out
    config: LaunchConfig | None = None,  # None: by choose()
) -> Tensor:
    """The backward recurrence. Returns dc_0, (R, B, H)."""
    R, _, H = c0.shape
    dc = dc_n.to(accumulator_dtype(dc_n.dtype), copy=True)
    tensors = [dy, dh_n, dc, gates, c_all, y, c0 if h0 is None else h0, c0, w_hh, dgates, h_prev]
    _run("backward", tensors, rows, R, H, gates, config, HAS_H0=h0 is not None)
    return dc.to(dc_n.dtype)
