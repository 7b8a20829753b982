"""From a recurrence to its launches: which schedule, by which configuration, with which buffers. Needs Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..call import ALIGNMENT, NOTHING, LayerCall, Problem, Rows, accumulator_dtype
from ..cell import Relative
from ..gemm import tf32_allowed
from ..kernels.buffers import Backward, Forward
from ..relatives import Backward as Given
from .choice import BY_NAME, Table, Timing, choose, describe, kernels, tables  # noqa: F401
from .schedule import INTERPRETED, PASSES, Device, Launch, Recurrence, arithmetic, ceil_div
from .stepwise import StepwiseConfig  # noqa: F401

# Triton 3.6's compiler stops at some fp64 products ("fp64 don't support largeK MMA"); 3.9's takes them all.
FP64 = INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@lru_cache
def device(index: int) -> Device:
    """The GPU of an index."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 0),
        (0, 0) if torch.version.hip else (properties.major, properties.minor),
    )


_forced: dict[str, Any] = {}


@contextmanager
def forced(forward: Any, backward: Any = None) -> Iterator[None]:
    """Launch every recurrence by these configurations, in all threads; ``backward`` is ``forward`` unless given."""
    before = dict(_forced)
    _forced.update(forward=forward, backward=backward or forward)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def explain(call: Problem, where: torch.device) -> dict[str, str]:
    """How the kernels would run a call, in words, for each kernel."""
    gpu = device(where.index) if where.type == "cuda" else None
    kind = arithmetic(call.dtype, where.type == "cuda" and tf32_allowed())
    H, R, words = call.hidden_size, call.heads * (2 if call.bidirectional else 1), {}
    if not Relative.of(call.cell).norm:
        H = ceil_div(H, ALIGNMENT) * ALIGNMENT
    for kernel in PASSES if call.needs_grad and call.B else ("forward",) * bool(call.B):
        problem = Recurrence(kernel, kind, call.T, H, call.B, R, call.cell)
        words[kernel] = describe(choose(problem, gpu, tables(gpu.name) if gpu else ()), problem, gpu)
    return words


def timed(index: int) -> Table | None:
    """The first table of a GPU that tells times of layers."""
    return next((table for table in tables(device(index).name) if table.timings), None)


def prepare(kernel: str, like: Tensor, rows: Rows, R: int, H: int, cell: str = "") -> Launch:
    """What the launches of a recurrence of ``like``'s dtype on its device have in common."""
    index = like.device.index if like.is_cuda else None
    tf32 = like.dtype == torch.float32 and index is not None and tf32_allowed()
    single = rows.T == 1  # a choice is the same for all T > 1
    return _prepare(kernel, like.dtype, tf32, single, H, rows.B, R, index, rows.directions, _forced.get(kernel), cell)


@lru_cache(maxsize=4096)
def _prepare(
    kernel: str, dtype: torch.dtype, tf32: bool, single: bool, H: int, B: int, R: int, index: int | None, directions: int,
    config: Any, cell: str,
) -> Launch:  # fmt: skip
    problem = Recurrence(kernel, arithmetic(dtype, tf32), 1 if single else 2, H, B, R, cell)
    gpu = None if index is None else device(index)
    config = config or choose(problem, gpu, tables(gpu.name) if gpu else ()).config
    return Launch(problem, config, BY_NAME[config.schedule], gpu, directions, dtype)


def _run(launch: Launch, buffers: Forward | Backward, rows: Rows) -> None:
    if launch.device is None:
        launch.run(launch, buffers, rows)
        return
    with _on_device_of(buffers.w_hh_ptr):
        launch.run(launch, buffers, rows)


def _on_device_of(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda._DeviceGuard(t.device.index) if t.is_cuda else NOTHING


def _running(launch: Launch, ends: Tensor | None, like: Tensor, *shape: int) -> Tensor | None:
    """Where launches of single steps keep what runs from one to the next: in ``ends`` itself if that is wide enough."""
    dtype = launch.running
    if dtype is None or (ends is not None and ends.dtype == dtype):
        return None if dtype is None else ends
    return like.new_empty(*shape, dtype=dtype)


def recurrence_forward(
    gates: Tensor,  # (N, R, 4, H) in: pre-activations but for the recurrence's own part; out, if c_all: activated gates
    w_hh: Tensor,  # (R*4H, H)
    b_hh: Tensor | None,  # (R*4H,)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor | None,  # (R, B, H); None: zero
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out
    call: LayerCall | None = None,  # of a relative of torch's cell
) -> tuple[Tensor, Tensor]:
    """The forward recurrence. Returns h_n and c_n, (R, B, H)."""
    cell, own = ("", ()) if call is None else (call.cell, _own(call))
    n, H = w_hh.shape
    R = n // (4 * H)
    h_n, c_n = gates.new_empty(R, rows.B, H), gates.new_empty(R, rows.B, H)
    if rows.B:
        launch = prepare("forward", gates, rows, R, H, cell)
        running = _running(launch, c_n, gates, R, rows.B, H)
        _run(launch, Forward(gates, w_hh, b_hh, y, c_all, h0, c0, h_n, c_n, running, None, *own), rows)
    return h_n, c_n


def recurrence_backward(
    dy: Tensor | None,  # (N, R, H); this and the next two None: zero
    dh_n: Tensor | None,  # (R, B, H)
    dc_n: Tensor | None,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated; may be dgates
    c_all: Tensor,  # (N, R, H)
    y: Tensor,  # (N, R, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor | None,  # (R, B, H); None: zero
    w_hh: Tensor,  # (R*4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    h_prev: Tensor,  # (N, R, H) out; with norms neither read nor written
    relative: Given | None = None,
) -> tuple[None, Tensor | None]:
    """The backward recurrence. Returns no dh_0, which dgates give; and dc_0 (R, B, H), None without c0."""
    n, H = w_hh.shape
    R = n // (4 * H)
    dc0, cell, own = None if c0 is None else gates.new_empty(R, rows.B, H), "", ()
    if relative is not None:
        cell, own, norm = relative.call.cell, _own(relative.call), relative.relative.norm
        if relative.relative.zoned or norm:
            relative.passed = gates.new_zeros(R, rows.B, H, dtype=accumulator_dtype(gates.dtype))
            own += (relative.passed,)
        if norm:
            c, products = relative.c_norm, relative.recurrent
            own += (relative.c_prev, c.centered, c.rstd, products.centered, products.rstd, relative.dshown)
            h_prev = None
    if rows.B:
        launch = prepare("backward", gates, rows, R, H, cell)
        running = _running(launch, dc0, gates, R, rows.B, H)
        buffers = dy, dh_n, dc_n, gates, c_all, y, h0, c0, w_hh, dgates, h_prev, dc0, running, None, None, *own
        _run(launch, Backward(*buffers), rows)
    return None, dc0


def _own(call: LayerCall) -> tuple[Tensor | None, Tensor | None]:
    """What the kernels are told of a relative."""
    return None if call.units is None else call.units.contiguous(), call.seed
