"""Cells with layer norm, stepwise: for each time step a GEMM with the state, then a launch of the cell."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..call import Rows
from ..cell import Relative
from ..gemm import batched
from ..kernels.relatives import Constants, cell_backward_step, cell_forward_step
from .schedule import CELLS, INTERPRETED, Kernel, Launch, norm, pointers, power_of_two, zoneout

KERNELS: dict[str, Any] = {"forward": cell_forward_step, "backward": cell_backward_step}


@lru_cache(maxsize=1024)
def _kernel(kernel: str, cell: str, dtype: torch.dtype, R: int, H: int, directions: int) -> Kernel:
    relative, bf16 = Relative.of(cell), INTERPRETED and dtype == torch.bfloat16
    constants = Constants(R, H, directions, bf16, power_of_two(H), norm(relative, H), zoneout(relative))
    warps = min(max(power_of_two(H) // 128, 1), 8)
    options = dict(num_warps=warps, enable_fp_fusion=True, **{} if torch.version.hip else {"maxnreg": 255})
    return Kernel(KERNELS, kernel, (CELLS[kernel], constants), options)


def launch(launch: Launch, buffers: Any, rows: Rows) -> None:
    p = launch.problem
    if launch.kernel is None:
        launch.kernel = _kernel(p.kernel, p.cell, launch.dtype, p.R, p.H, launch.directions)
    (_forward if p.kernel == "forward" else _backward)(launch.kernel, buffers, rows)


def _forward(kernel: Kernel, buffers: Any, rows: Rows) -> None:
    R, B, H = buffers.hn_ptr.shape
    h, c, size, told = buffers.hn_ptr, buffers.running_ptr, rows.size, pointers(rows)
    if rows.lengths is not None and rows.batch_sizes is None:
        buffers.h_ptr.zero_()
    for state, first in ((h, buffers.h0_ptr), (c, buffers.c0_ptr)):
        state.zero_() if first is None else state.copy_(first)
    products, w = c.new_empty(R, B, 4 * H), buffers.w_hh_ptr.view(R, 4 * H, H).mT
    buffers = buffers._replace(products_ptr=products)
    for s in range(rows.T):
        batched(h, w, products)
        kernel.run((B, R, 1), buffers, told, [(s, *size)])
    buffers.cn_ptr.copy_(c)


def _backward(kernel: Kernel, buffers: Any, rows: Rows) -> None:
    R, B, H = buffers.passed_ptr.shape
    passed, dc, size, told = buffers.passed_ptr, buffers.running_ptr, rows.size, pointers(rows)
    if rows.lengths is not None and rows.batch_sizes is None:
        buffers.dgates_ptr.zero_()
    for gradient, last in ((passed, buffers.dhn_ptr), (dc, buffers.dcn_ptr)):
        gradient.zero_() if last is None else gradient.copy_(last)
    dproducts, w = buffers.gates_ptr.new_zeros(R, B, 4 * H), buffers.w_hh_ptr.view(R, 4 * H, H)
    buffers = buffers._replace(dh_ptr=torch.empty_like(passed), dproducts_ptr=dproducts)
    for s in range(rows.T - 1, -1, -1):
        batched(dproducts, w, buffers.dh_ptr)
        kernel.run((B, R, 1), buffers, told, [(s, *size)])
    if buffers.dc0_ptr is not None:
        buffers.dc0_ptr.copy_(dc)
