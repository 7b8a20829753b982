"""Steps of cells with layer norm, also with peepholes or zoneout: a launch for each time step, after a GEMM of the state.

A norm is over all units of a batch row, so a program owns one batch row of a recurrence with all its units, and takes the
products h W_hh^T from that GEMM. States lie in (R, B, H), where the next GEMM reads them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell import Zoneout, accumulator, narrow, passed, tanh, zoned
from .rows import batch_rows, carried, data_rows
from .stepwise import load_gates, store_gates, zoneout


@dataclass(frozen=True)
class Cell:
    """Which relative. Rows of ``units_ptr``: of peepholes p_i, p_f, p_o; then the gains of the products for i, f, g, o, and
    gain and bias of the cell state's norm."""

    PEEPHOLE: bool
    NORM: str  # "output" or "state"
    EPS: float


@dataclass(frozen=True)
class Constants:
    R: int
    H: int
    DIRECTIONS: int
    INTERPRET_BF16: bool
    BLOCK_H: int
    zoneout: Zoneout | None


class Forward(NamedTuple):
    gates_ptr: Any  # (N, R, 4, H) in: pre-activations but for the products; out, if c_ptr is given: activated gates
    products_f32_ptr: Any  # (R, B, 4, H) of the state before with W_hh; f32: in the accumulator's dtype, as below
    units_ptr: Any  # (R, n, H)
    seed_ptr: Any  # (1,) int64; None: zoneout by its expected value
    state_h_ptr: Any  # (R, B, H) in and out
    state_c_f32_ptr: Any  # (R, B, H) likewise
    h_ptr: Any  # (N, R, H) out
    c_ptr: Any  # (N, R, H) out


class Backward(NamedTuple):
    """What ends in f32 is in the accumulator's dtype."""

    dy_ptr: Any  # (N, R, H); None: zero
    gates_ptr: Any  # (N, R, 4, H) activated
    c_prev_f32_ptr: Any  # (N, R, H) cell state before each step
    products_f32_ptr: Any  # (N, R, 4, H) normalized
    products_rstd_f32_ptr: Any  # (N, R)
    c_f32_ptr: Any  # (N, R, H) f * c_prev + i * g, normalized
    c_rstd_f32_ptr: Any  # (N, R)
    units_ptr: Any  # (R, n, H)
    seed_ptr: Any  # (1,) int64
    dh_f32_ptr: Any  # (R, B, H) by the state h after the step, through the products of the next
    passed_f32_ptr: Any  # (R, B, H) in and out: ... and past them
    dc_f32_ptr: Any  # (R, B, H) in and out: by the cell state
    dgates_ptr: Any  # (N, R, 4, H) out
    dproducts_ptr: Any  # (R, B, 4, H) out: by the products of this step
    dshown_f32_ptr: Any  # (N, R, H) out: by what tanh sees


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
def unit_row(units_ptr, at, n: tl.constexpr, CELL: tl.constexpr, config: tl.constexpr):
    """(1, BLOCK_H): row n of the cell's parameters."""
    rows: tl.constexpr = 3 * CELL.PEEPHOLE + 6
    offs = (at.r * rows + n) * config.H + at.unit
    return tl.load(units_ptr + offs, mask=at.inside, other=0.0)


@triton.jit
def normalized(x, inside, N: tl.constexpr, EPS: tl.constexpr):
    """N values of a row with mean 0 and variance 1; zero outside."""
    x = tl.where(inside, x - tl.sum(x, 1)[:, None] / N, 0.0)
    return x / tl.sqrt(tl.sum(x * x, 1)[:, None] / N + EPS)


@triton.jit
def normalized_gates(x, inside, N: tl.constexpr, EPS: tl.constexpr):
    """Likewise the four gates' together."""
    mean = tl.sum(x[0] + x[1] + x[2] + x[3], 1)[:, None] / N
    i, f = tl.where(inside, x[0] - mean, 0.0), tl.where(inside, x[1] - mean, 0.0)
    g, o = tl.where(inside, x[2] - mean, 0.0), tl.where(inside, x[3] - mean, 0.0)
    deviation = tl.sqrt(tl.sum(i * i + f * f + g * g + o * o, 1)[:, None] / N + EPS)
    return i / deviation, f / deviation, g / deviation, o / deviation


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def cell_forward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the forward pass. ``buffers`` is a Forward, ``sequences`` a Sequences."""
    H: tl.constexpr = config.H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    dtype: tl.constexpr = buffers.h_ptr.dtype.element_ty
    P: tl.constexpr = 3 * CELL.PEEPHOLE  # the first row of the norms'
    at = place_of(sequences, s, T, B, row_stride_t, row_stride_b, config)
    mask, units_ptr = at.mask, buffers.units_ptr
    c = tl.load(buffers.state_c_f32_ptr + at.state, mask=at.carry, other=0.0)
    a_i, a_f, a_g, a_o = load_gates(buffers.products_f32_ptr + at.products, at.carry, H, ACC)
    a_i, a_f, a_g, a_o = normalized_gates((a_i, a_f, a_g, a_o), at.inside, 4 * H, CELL.EPS)
    a_i *= unit_row(units_ptr, at, P, CELL, config)
    a_f *= unit_row(units_ptr, at, P + 1, CELL, config)
    a_g *= unit_row(units_ptr, at, P + 2, CELL, config)
    a_o *= unit_row(units_ptr, at, P + 3, CELL, config)
    given = load_gates(buffers.gates_ptr + at.gates, mask, H, ACC)
    a_i, a_f, a_g, a_o = a_i + given[0], a_f + given[1], a_g + given[2], a_o + given[3]
    if CELL.PEEPHOLE:
        a_i += unit_row(units_ptr, at, 0, CELL, config) * c
        a_f += unit_row(units_ptr, at, 1, CELL, config) * c
    f = tl.sigmoid(a_f)
    g = tanh(a_g)
    i = tl.sigmoid(a_i)
    new_c = f * c + i * g
    shown = normalized(tl.where(at.inside, new_c, 0.0), at.inside, H, CELL.EPS)
    shown = shown * unit_row(units_ptr, at, P + 4, CELL, config) + unit_row(units_ptr, at, P + 5, CELL, config)
    if CELL.NORM == "state":
        new_c = shown
    if CELL.PEEPHOLE:
        a_o += unit_row(units_ptr, at, 2, CELL, config) * new_c
    o = tl.sigmoid(a_o)
    h = o * tanh(shown)
    if config.zoneout is not None:
        kept = zoneout(buffers.seed_ptr, at.batch, at.unit, at.r, s, B, config)
        h_prev = tl.load(buffers.state_h_ptr + at.state, mask=at.carry, other=0.0).to(ACC)
        h, new_c = zoned(h_prev, h, kept, 0, config.zoneout.h), zoned(c, new_c, kept, 1, config.zoneout.c)
    h = narrow(h, dtype, BF16)
    tl.store(buffers.state_h_ptr + at.state, h, mask=mask)
    tl.store(buffers.state_c_f32_ptr + at.state, new_c, mask=mask)
    tl.store(buffers.h_ptr + at.cells, h, mask=mask)
    if buffers.c_ptr is not None:
        tl.store(buffers.c_ptr + at.cells, narrow(new_c, dtype, BF16), mask=mask)
        store_gates(buffers.gates_ptr + at.gates, (i, f, g, o), mask, H, dtype, BF16)


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def cell_backward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the backward pass. ``buffers`` is a Backward."""
    H: tl.constexpr = config.H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    dtype: tl.constexpr = buffers.dgates_ptr.dtype.element_ty
    P: tl.constexpr = 3 * CELL.PEEPHOLE
    at = place_of(sequences, s, T, B, row_stride_t, row_stride_b, config)
    mask, units_ptr = at.mask, buffers.units_ptr
    dh = tl.load(buffers.dh_f32_ptr + at.state, mask=mask, other=0.0)
    dh += tl.load(buffers.passed_f32_ptr + at.state, mask=mask, other=0.0)
    if buffers.dy_ptr is not None:
        dh += tl.load(buffers.dy_ptr + at.cells, mask=mask, other=0.0).to(ACC)
    dc = tl.load(buffers.dc_f32_ptr + at.state, mask=mask, other=0.0)
    c_prev = tl.load(buffers.c_prev_f32_ptr + at.cells, mask=mask, other=0.0)
    i, f, g, o = load_gates(buffers.gates_ptr + at.gates, mask, H, ACC)
    c = tl.load(buffers.c_f32_ptr + at.cells, mask=mask, other=0.0)
    gain = unit_row(units_ptr, at, P + 4, CELL, config).to(ACC)
    tanh_c = tanh(c * gain + unit_row(units_ptr, at, P + 5, CELL, config))
    passed_h, passed_c = tl.zeros_like(dh), tl.zeros_like(dc)
    if config.zoneout is not None:
        kept = zoneout(buffers.seed_ptr, at.batch, at.unit, at.r, s, B, config)
        passed_h, passed_c = passed(dh, kept, 0, config.zoneout.h), passed(dc, kept, 1, config.zoneout.c)
        dh, dc = dh - passed_h, dc - passed_c
    da_o = dh * tanh_c * o * (1.0 - o)
    dshown = dh * o * (1.0 - tanh_c * tanh_c)
    if CELL.PEEPHOLE:
        dc += unit_row(units_ptr, at, 2, CELL, config) * da_o
    if CELL.NORM == "state":
        dshown += dc
        dc = tl.zeros_like(dc)
    tl.store(buffers.dshown_f32_ptr + at.cells, dshown, mask=mask)
    d = dshown * gain
    rstd = tl.load(buffers.c_rstd_f32_ptr + at.row, mask=(s < at.batch.lengths)[:, None], other=0.0)
    dc += rstd * (d - tl.sum(d, 1)[:, None] / H - c * (tl.sum(d * c, 1)[:, None] / H))
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    dc = dc * f + passed_c
    if CELL.PEEPHOLE:
        dc += unit_row(units_ptr, at, 0, CELL, config) * da_i + unit_row(units_ptr, at, 1, CELL, config) * da_f
    store_gates(buffers.dgates_ptr + at.gates, (da_i, da_f, da_g, da_o), mask, H, dtype, BF16)
    p_i, p_f, p_g, p_o = load_gates(buffers.products_f32_ptr + at.gates, mask, H, ACC)
    d_i, d_f = da_i * unit_row(units_ptr, at, P, CELL, config), da_f * unit_row(units_ptr, at, P + 1, CELL, config)
    d_g, d_o = da_g * unit_row(units_ptr, at, P + 2, CELL, config), da_o * unit_row(units_ptr, at, P + 3, CELL, config)
    mean = tl.sum(d_i + d_f + d_g + d_o, 1)[:, None] / (4 * H)
    along = tl.sum(d_i * p_i + d_f * p_f + d_g * p_g + d_o * p_o, 1)[:, None] / (4 * H)
    rstd = tl.load(buffers.products_rstd_f32_ptr + at.row, mask=(s < at.batch.lengths)[:, None], other=0.0)
    da_i, da_f = rstd * (d_i - mean - p_i * along), rstd * (d_f - mean - p_f * along)
    da_g, da_o = rstd * (d_g - mean - p_g * along), rstd * (d_o - mean - p_o * along)
    # Nothing passes to a step that is not carried over from.
    keep = at.carry
    da_i, da_f = tl.where(keep, da_i, 0.0), tl.where(keep, da_f, 0.0)
    da_g, da_o = tl.where(keep, da_g, 0.0), tl.where(keep, da_o, 0.0)
    store_gates(buffers.dproducts_ptr + at.products, (da_i, da_f, da_g, da_o), mask, H, dtype, BF16)
    tl.store(buffers.passed_f32_ptr + at.state, tl.where(keep, passed_h, 0.0), mask=mask)
    tl.store(buffers.dc_f32_ptr + at.state, tl.where(keep, dc, 0.0), mask=mask)
