"""Steps of cells with layer norm, also with peepholes or zoneout: a launch for each time step, after a GEMM of the state.

A norm is over all units of a batch row, so a program owns one batch row of a recurrence with all its units, and takes the
products h W_hh^T from that GEMM. States lie in (R, B, H), where the next GEMM reads them.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell import LayerNorm, Norm, Zoneout, accumulator, narrow, products_backward, zoned, zoned_backward
from .rows import batch_rows, carried, data_rows
from .stepwise import load_gates, store_gates, zoneout


@dataclass(frozen=True)
class Constants:
    R: int
    H: int
    DIRECTIONS: int
    INTERPRET_BF16: bool
    BLOCK_H: int
    norm: LayerNorm
    zoneout: Zoneout | None


class Place(NamedTuple):
    """Where a program works in a step."""

    batch: Any
    mask: Any  # (1, BLOCK_H) its cells, if the row has the step
    carry: Any  # ... and carries state over to it
    inside: Any  # ... or whatever the row has
    state: Any  # offsets in (R, B, H)
    products: Any  # ... in (R, B, 4, H), gate i
    cells: Any  # ... in (N, R, H)
    gates: Any  # ... in (N, R, 4, H), gate i
    row: Any  # ... in (N, R)
    unit: Any
    r: Any


@triton.jit
def place_of(sequences, s, T, B, row_stride_t, row_stride_b, config: tl.constexpr):
    H: tl.constexpr = config.H
    r = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0) + tl.arange(0, 1)
    batch = batch_rows(sequences, offs_b, offs_b < B, r, T, row_stride_t, row_stride_b, config.DIRECTIONS)
    rows, prev_rows = data_rows(sequences, batch, s), data_rows(sequences, batch, s - 1)
    keep = carried(sequences, batch, s, rows, prev_rows)
    unit = tl.arange(0, config.BLOCK_H)[None, :]
    inside = unit < H
    mask = inside & (s < batch.lengths)[:, None]
    state, row = (r * B + offs_b)[:, None], (rows * config.R + r)[:, None]
    return Place(
        batch, mask, mask & keep[:, None], inside, state * H + unit, state * (4 * H) + unit, row * H + unit,
        row * (4 * H) + unit, row, unit, r,
    )  # fmt: skip


@triton.jit
def own_values(units_ptr, at, ACC: tl.constexpr, config: tl.constexpr):
    """The peepholes, or (), and the norms."""
    FIRST: tl.constexpr = config.norm.first
    peepholes = ()
    units = ()
    for n in tl.static_range(FIRST + 6):
        offs = (at.r * (FIRST + 6) + n) * config.H + at.unit
        own = (tl.load(units_ptr + offs, mask=at.inside, other=0.0).to(ACC),)
        if n < FIRST:
            peepholes = peepholes + own
        else:
            units = units + own
    return peepholes, Norm(units, at.inside, ((), ()))


@triton.jit
def over_row(values, room):
    """The sum of each over all units."""
    sums = ()
    for k in tl.static_range(len(values)):
        sums = sums + (tl.sum(values[k], 1)[:, None],)
    return sums


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def cell_forward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the forward pass. ``buffers`` is a Forward, ``sequences`` a Sequences."""
    H: tl.constexpr = config.H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    NORM: tl.constexpr = config.norm  # Triton 3.6 takes it by a name only
    dtype: tl.constexpr = buffers.h_ptr.dtype.element_ty
    at = place_of(sequences, s, T, B, row_stride_t, row_stride_b, config)
    mask = at.mask
    c_prev = tl.load(buffers.running_ptr + at.state, mask=at.carry, other=0.0)
    recurrent = load_gates(buffers.products_ptr + at.products, at.carry, H, ACC)
    given = load_gates(buffers.gates_ptr + at.gates, mask, H, ACC)
    peepholes, norm = own_values(buffers.units_ptr, at, ACC, config)
    gates, c, h = CELL(recurrent, given, c_prev, peepholes, norm, NORM, over_row)
    if config.zoneout is not None:
        kept = zoneout(buffers.seed_ptr, at.batch, at.unit, at.r, s, B, config)
        h_prev = tl.load(buffers.hn_ptr + at.state, mask=at.carry, other=0.0).to(ACC)
        h, c = zoned(h_prev, h, kept, 0, config.zoneout.h), zoned(c_prev, c, kept, 1, config.zoneout.c)
    h = narrow(h, dtype, BF16)
    tl.store(buffers.hn_ptr + at.state, h, mask=mask)
    tl.store(buffers.running_ptr + at.state, c, mask=mask)
    tl.store(buffers.h_ptr + at.cells, h, mask=mask)
    if buffers.c_ptr is not None:
        tl.store(buffers.c_ptr + at.cells, narrow(c, dtype, BF16), mask=mask)
        store_gates(buffers.gates_ptr + at.gates, gates, mask, H, dtype, BF16)


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def cell_backward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the backward pass. ``buffers`` is a Backward."""
    H: tl.constexpr = config.H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    NORM: tl.constexpr = config.norm
    dtype: tl.constexpr = buffers.dgates_ptr.dtype.element_ty
    at = place_of(sequences, s, T, B, row_stride_t, row_stride_b, config)
    mask, has = at.mask, (s < at.batch.lengths)[:, None]
    dh = tl.load(buffers.dh_ptr + at.state, mask=mask, other=0.0)
    dh += tl.load(buffers.passed_ptr + at.state, mask=mask, other=0.0)
    if buffers.dy_ptr is not None:
        dh += tl.load(buffers.dy_ptr + at.cells, mask=mask, other=0.0).to(ACC)
    dc = tl.load(buffers.running_ptr + at.state, mask=mask, other=0.0)
    c_prev = tl.load(buffers.c_prev_ptr + at.cells, mask=mask, other=0.0)
    gates = load_gates(buffers.gates_ptr + at.gates, mask, H, ACC)
    c = tl.load(buffers.c_centered_ptr + at.cells, mask=mask, other=0.0)
    rstd = tl.load(buffers.c_rstd_ptr + at.row, mask=has, other=0.0)
    peepholes, norm = own_values(buffers.units_ptr, at, ACC, config)
    if config.zoneout is None:
        passed = tl.zeros_like(dh)
        da, dc, dshown = CELL(gates, c, c_prev, dh, dc, peepholes, norm, rstd, NORM, over_row)
    else:
        ZONEOUT: tl.constexpr = config.zoneout
        kept = zoneout(buffers.seed_ptr, at.batch, at.unit, at.r, s, B, config)
        da, dc, dshown, passed = zoned_backward(
            gates, c, c_prev, dh, dc, peepholes, norm, rstd, kept, CELL, NORM, over_row, ZONEOUT
        )
    tl.store(buffers.dshown_ptr + at.cells, dshown, mask=mask)
    store_gates(buffers.dgates_ptr + at.gates, da, mask, H, dtype, BF16)
    products = load_gates(buffers.products_ptr + at.gates, mask, H, ACC)
    rstd = tl.load(buffers.products_rstd_ptr + at.row, mask=has, other=0.0)
    d_i, d_f, d_g, d_o = products_backward(da, products, rstd, norm, NORM, over_row)
    # Nothing passes to a step that is not carried over from.
    keep = at.carry
    d_i, d_f = tl.where(keep, d_i, 0.0), tl.where(keep, d_f, 0.0)
    d_g, d_o = tl.where(keep, d_g, 0.0), tl.where(keep, d_o, 0.0)
    store_gates(buffers.dproducts_ptr + at.products, (d_i, d_f, d_g, d_o), mask, H, dtype, BF16)
    tl.store(buffers.passed_ptr + at.state, tl.where(keep, passed, 0.0), mask=mask)
    tl.store(buffers.running_ptr + at.state, tl.where(keep, dc, 0.0), mask=mask)
