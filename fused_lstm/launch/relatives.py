"""Cells with layer norm on a GPU: for each time step a GEMM with the state, then a launch of the cell."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..call import LayerCall, Rows, accumulator_dtype
from ..cell import EPS, Relative
from ..gemm import batched
from ..kernels.relatives import Backward, Cell, Constants, Forward, cell_backward_step, cell_forward_step
from ..relatives import Backward as Given
from .schedule import INTERPRETED, Kernel, pointers, power_of_two, zoneout

KERNELS: dict[str, Any] = {"forward": cell_forward_step, "backward": cell_backward_step}


@lru_cache(maxsize=1024)
def _kernel(kernel: str, cell: str, dtype: torch.dtype, R: int, H: int, directions: int) -> Kernel:
    relative, bf16 = Relative.of(cell), INTERPRETED and dtype == torch.bfloat16
    constants = Constants(R, H, directions, bf16, power_of_two(H), zoneout(relative))
    warps = min(max(power_of_two(H) // 128, 1), 8)
    what = Cell(relative.peephole, relative.norm, EPS)
    return Kernel(KERNELS, kernel, (what, constants), dict(num_warps=warps, enable_fp_fusion=True))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    gates: Tensor,  # (N, R, 4, H) in: pre-activations but for the products; out, if c_all: activated gates
    w_hh: Tensor,  # (R*4H, H)
    b_hh: Tensor | None,  # (R*4H,)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor | None,  # (R, B, H); None: zero
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out
    call: LayerCall,
) -> tuple[Tensor, Tensor]:
    """The forward recurrence. Returns h_n and c_n, (R, B, H)."""
    R, H, T, B = call.R, call.H, rows.T, rows.B
    dtype, acc = y.dtype, accumulator_dtype(y.dtype)
    if b_hh is not None:  # which a norm of the products does not see
        gates.view(-1, R * 4 * H).add_(b_hh)
    if rows.lengths is not None and rows.batch_sizes is None:
        y.zero_()
    h = y.new_zeros(R, B, H) if h0 is None else h0.clone()
    c = y.new_zeros(R, B, H, dtype=acc) if c0 is None else c0.to(acc, copy=True)
    products, w = y.new_empty(R, B, 4 * H, dtype=acc), w_hh.view(R, 4 * H, H).mT
    kernel = _kernel("forward", call.cell, dtype, R, H, rows.directions)
    buffers = Forward(gates, products, _contiguous(call.units), call.seed, h, c, y, c_all)
    size, told = rows.size, pointers(rows)
    for s in range(T):
        batched(h, w, products)
        kernel.run((B, R, 1), buffers, told, [(s, *size)])
    return h, c.to(dtype)


def backward(
    dy: Tensor | None,  # (N, R, H); this and the next two None: zero
    dh_n: Tensor | None,  # (R, B, H)
    dc_n: Tensor | None,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated
    w_hh: Tensor,  # (R*4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    given: Given,  # what was computed for all steps; its ``dshown`` is filled in
) -> tuple[Tensor, Tensor]:
    """The backward recurrence. Returns dh_0 and dc_0, (R, B, H)."""
    call = given.call
    R, H, T, B = call.R, call.H, rows.T, rows.B
    dtype, acc = gates.dtype, accumulator_dtype(gates.dtype)
    if rows.lengths is not None and rows.batch_sizes is None:
        dgates.zero_()
    passed, dc = (gates.new_zeros(R, B, H, dtype=acc) if grad is None else grad.to(acc, copy=True) for grad in (dh_n, dc_n))
    dh, dproducts, w = torch.zeros_like(passed), gates.new_zeros(R, B, 4 * H), w_hh.view(R, 4 * H, H)
    norms = given.recurrent.value, given.recurrent.rstd, given.c_norm.value, given.c_norm.rstd
    buffers = Backward(
        dy, gates, given.c_prev, *norms, _contiguous(call.units), call.seed, dh, passed, dc, dgates, dproducts,
        given.dshown,
    )  # fmt: skip
    kernel = _kernel("backward", call.cell, dtype, R, H, rows.directions)
    size, told = rows.size, pointers(rows)
    for s in range(T - 1, -1, -1):
        kernel.run((B, R, 1), buffers, told, [(s, *size)])
        batched(dproducts, w, dh)
    return passed.add_(dh).to(dtype), dc.to(dtype)
