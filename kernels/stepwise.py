"""One fused launch for each time step: h W_hh^T, three gates, candidate, cell update and output; and its gradients.

The buffers and their shapes are in buffers.py. A program owns BLOCK_H hidden units, of all four gates, for BLOCK_B batch
rows of one recurrence. It reads the state before the step and writes the one after it; the next launch finds it there.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .cell import Zoneout, accumulator, masks, narrow, operand, zoned, zoned_backward
from .rows import batch_rows, carried, data_rows, padding_rows, time_of


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for, beside the types of its arguments."""

    R: int
    H: int
    DIRECTIONS: int
    PRECISION: str  # of fp32 products, as tl.dot knows it
    INTERPRET_BF16: bool  # works around the interpreter's bf16: wrong tl.dot, truncating conversion
    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    zoneout: Zoneout | None = None


class Place(NamedTuple):
    """Where a program works in a step."""

    batch: Any  # its batch rows
    offs_h: Any  # (BLOCK_H,) its units
    mask: Any  # (BLOCK_B, BLOCK_H) cells of the batch
    state: Any  # offsets in (R, B, H)
    columns: Any  # offsets within a data row of (N, R, H)
    gates: Any  # ... and of (N, R, 4, H), gate i
    unit: Any  # (4*BLOCK_H,) the units of the columns of a product with all gates, 4*j + g for gate g of the block's unit j
    r: Any


@triton.jit
def place_of(sequences, T, B, row_stride_t, row_stride_b, config: tl.constexpr):
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * config.BLOCK_H + tl.arange(0, config.BLOCK_H)
    offs_b = tl.program_id(1) * config.BLOCK_B + tl.arange(0, config.BLOCK_B)
    batch = batch_rows(sequences, offs_b, offs_b < B, r, T, row_stride_t, row_stride_b, config.DIRECTIONS)
    return Place(
        batch,
        offs_h,
        batch.mask[:, None] & (offs_h < config.H)[None, :],
        (r * B + offs_b)[:, None] * config.H + offs_h[None, :],
        r * config.H + offs_h[None, :],
        r * (4 * config.H) + offs_h[None, :],
        tl.program_id(0) * config.BLOCK_H + tl.arange(0, 4 * config.BLOCK_H) // 4,
        r,
    )


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_forward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the forward pass. ``buffers`` is a Forward, ``sequences`` a Sequences; CELL is the cell's forward half."""
    R: tl.constexpr = config.R
    H: tl.constexpr = config.H
    BLOCK_B: tl.constexpr = config.BLOCK_B
    BLOCK_H: tl.constexpr = config.BLOCK_H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    dtype: tl.constexpr = buffers.h_ptr.dtype.element_ty
    at = place_of(sequences, T, B, row_stride_t, row_stride_b, config)
    batch = at.batch
    rows, prev_rows = data_rows(sequences, batch, s), data_rows(sequences, batch, s - 1)
    keep = carried(sequences, batch, s, rows, prev_rows)
    mask = at.mask & (s < batch.lengths)[:, None]
    mask_keep = at.mask & keep[:, None]

    h_ptr, h_rows = buffers.h_ptr, prev_rows * R + at.r
    if buffers.h0_ptr is not None:  # not in the branch below, out of which Triton 3.6 for ROCm takes no pointers
        h_ptr = tl.where(s == 0, buffers.h0_ptr, h_ptr)
        h_rows = tl.where(s == 0, at.r * B + batch.offs_b, h_rows)
    if s == 0:
        if buffers.h0_ptr is None:
            keep = keep & False
        if buffers.c0_ptr is None:
            c = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        else:
            c = tl.load(buffers.c0_ptr + at.state, mask=mask_keep, other=0.0).to(ACC)
    else:
        c = tl.zeros((BLOCK_B, BLOCK_H), ACC)
        if buffers.running_ptr is not None:
            c = tl.load(buffers.running_ptr + at.state, mask=mask_keep, other=0.0)

    unit, gate = at.unit, tl.arange(0, 4 * BLOCK_H) % 4
    w_rows = buffers.w_hh_ptr + ((at.r * 4 + gate) * H + unit) * H
    acc = tl.zeros((BLOCK_B, 4 * BLOCK_H), ACC)
    acc = product(acc, h_ptr + h_rows * H, keep, w_rows, unit < H, 0, 1, config)
    if buffers.b_hh_ptr is not None:
        acc += tl.load(buffers.b_hh_ptr + (at.r * 4 + gate) * H + unit, mask=unit < H, other=0.0).to(ACC)[None, :]
    even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_H, 2, 2)))
    a_i, a_g = tl.split(even)
    a_f, a_o = tl.split(odd)
    offs = (rows * R)[:, None] * H + at.columns
    gates_ptr = buffers.gates_ptr + (rows * R)[:, None] * (4 * H) + at.gates
    given = load_gates(gates_ptr, mask, H, ACC)
    c_prev = c
    own = peepholes(buffers.units_ptr, at, ACC, config)
    gates, c, h = CELL((a_i, a_f, a_g, a_o), given, c, own, (), None, None)
    if config.zoneout is not None:
        kept = zoneout(buffers.seed_ptr, batch, at.offs_h[None, :], at.r, s, B, config)
        h_ptrs = h_ptr + (h_rows * H)[:, None] + at.offs_h[None, :]
        h_prev = tl.load(h_ptrs, mask=at.mask & keep[:, None], other=0.0).to(ACC)
        h, c = zoned(h_prev, h, kept, 0, config.zoneout.h), zoned(c_prev, c, kept, 1, config.zoneout.c)

    h, c_out = narrow(h, dtype, BF16), narrow(c, dtype, BF16)
    tl.store(buffers.h_ptr + offs, h, mask=mask)
    if buffers.running_ptr is not None:
        tl.store(buffers.running_ptr + at.state, c, mask=mask)
    last = mask & (s == batch.lengths - 1)[:, None]
    tl.store(buffers.hn_ptr + at.state, h, mask=last)
    tl.store(buffers.cn_ptr + at.state, c_out, mask=last)
    if buffers.c_ptr is not None:
        tl.store(buffers.c_ptr + offs, c_out, mask=mask)
        store_gates(gates_ptr, gates, mask, H, dtype, BF16)
    if sequences.lengths_ptr is not None:
        if sequences.starts_ptr is None:  # padding is zero
            past = at.mask & (s >= batch.lengths)[:, None]
            offs = (padding_rows(batch, s) * R)[:, None] * H + at.columns
            tl.store(buffers.h_ptr + offs, tl.zeros_like(h), mask=past)
        if s == 0:  # a row without steps ends with its initial state
            store_first(buffers.hn_ptr + at.state, buffers.h0_ptr, at)
            store_first(buffers.cn_ptr + at.state, buffers.c0_ptr, at)


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_backward_step(buffers, sequences, s, T, B, row_stride_t, row_stride_b, CELL: tl.constexpr, config: tl.constexpr):
    """Step s of the backward pass: dh = dy + dgates_{s+1} @ W_hh, then the cell's gradients. ``buffers`` is a Backward."""
    R: tl.constexpr = config.R
    H: tl.constexpr = config.H
    BLOCK_B: tl.constexpr = config.BLOCK_B
    BLOCK_H: tl.constexpr = config.BLOCK_H
    ACC: tl.constexpr = accumulator(buffers.gates_ptr.dtype.element_ty)
    BF16: tl.constexpr = config.INTERPRET_BF16
    dtype: tl.constexpr = buffers.dgates_ptr.dtype.element_ty
    at = place_of(sequences, T, B, row_stride_t, row_stride_b, config)
    batch = at.batch
    rows, prev_rows = data_rows(sequences, batch, s), data_rows(sequences, batch, s - 1)
    next_rows = data_rows(sequences, batch, s + 1)
    keep = carried(sequences, batch, s, rows, prev_rows)
    keep_next = carried(sequences, batch, s + 1, next_rows, rows)  # rows whose next step hands a gradient back
    mask = at.mask & (s < batch.lengths)[:, None]
    mask_keep = at.mask & keep[:, None]
    last = mask & (s == batch.lengths - 1)[:, None]

    w_rows = buffers.w_hh_ptr + at.r * (4 * H) * H + at.offs_h
    dh = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for gate in tl.static_range(4):
        a_rows = buffers.dgates_ptr + (next_rows * R + at.r) * (4 * H) + gate * H
        dh = product(dh, a_rows, keep_next, w_rows, at.offs_h < H, gate, H, config)
    offs = (rows * R)[:, None] * H + at.columns
    if buffers.dy_ptr is not None:
        dh += tl.load(buffers.dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    if buffers.dhn_ptr is not None:
        dh += tl.load(buffers.dhn_ptr + at.state, mask=last, other=0.0).to(ACC)
    if buffers.passed_ptr is not None:
        dh += tl.load(buffers.passed_ptr + at.state, mask=mask & (s + 1 < batch.lengths)[:, None], other=0.0)
    dc = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    if buffers.running_ptr is not None:
        dc = tl.load(buffers.running_ptr + at.state, mask=mask & (s + 1 < batch.lengths)[:, None], other=0.0)
    if buffers.dcn_ptr is not None:
        dc = tl.where(last, tl.load(buffers.dcn_ptr + at.state, mask=last, other=0.0).to(ACC), dc)

    c_prev, h_prev = tl.zeros_like(dc), tl.zeros_like(dc).to(dtype)
    if s > 0:
        prev = (prev_rows * R)[:, None] * H + at.columns
        c_prev = tl.load(buffers.c_ptr + prev, mask=mask_keep, other=0.0).to(ACC)
        h_prev = tl.load(buffers.h_ptr + prev, mask=mask_keep, other=0.0)
    else:
        if buffers.c0_ptr is not None:
            c_prev = tl.load(buffers.c0_ptr + at.state, mask=mask_keep, other=0.0).to(ACC)
        if buffers.h0_ptr is not None:
            h_prev = tl.load(buffers.h0_ptr + at.state, mask=mask_keep, other=0.0)
    c = tl.load(buffers.c_ptr + offs, mask=mask, other=0.0).to(ACC)
    gate_offs = (rows * R)[:, None] * (4 * H) + at.gates
    gates, own = load_gates(buffers.gates_ptr + gate_offs, mask, H, ACC), peepholes(buffers.units_ptr, at, ACC, config)
    if config.zoneout is None:
        dgates, dc, _ = CELL(gates, c, c_prev, dh, dc, own, (), (), None, None)
    else:
        ZONEOUT: tl.constexpr = config.zoneout
        kept = zoneout(buffers.seed_ptr, batch, at.offs_h[None, :], at.r, s, B, config)
        dgates, dc, _, passed = zoned_backward(gates, c, c_prev, dh, dc, own, (), (), kept, CELL, None, None, ZONEOUT)
        tl.store(buffers.passed_ptr + at.state, tl.where(mask_keep, passed, 0.0), mask=mask)
    dc = tl.where(mask_keep, dc, 0.0)

    store_gates(buffers.dgates_ptr + gate_offs, dgates, mask, H, dtype, BF16)
    tl.store(buffers.h_prev_ptr + offs, h_prev, mask=mask)
    if buffers.running_ptr is not None:
        tl.store(buffers.running_ptr + at.state, dc, mask=mask)
    if buffers.dc0_ptr is not None:  # noqa: SIM102 - which Triton knows as it compiles
        if s == 0:
            tl.store(buffers.dc0_ptr + at.state, narrow(dc, dtype, BF16), mask=mask)
            if sequences.lengths_ptr is not None:  # a row without steps hands its gradient through
                store_first(buffers.dc0_ptr + at.state, buffers.dcn_ptr, at)
    if sequences.lengths_ptr is not None and sequences.starts_ptr is None:  # padding is zero
        past = at.mask & (s >= batch.lengths)[:, None]
        padding = (padding_rows(batch, s) * R)[:, None]
        tl.store(buffers.h_prev_ptr + padding * H + at.columns, tl.zeros_like(h_prev), mask=past)
        zeros = (tl.zeros_like(dc), tl.zeros_like(dc), tl.zeros_like(dc), tl.zeros_like(dc))
        store_gates(buffers.dgates_ptr + padding * (4 * H) + at.gates, zeros, past, H, dtype, BF16)


@triton.jit
def product(acc, a_rows, mask_rows, w_rows, mask_n, segment, stride_k: tl.constexpr, config: tl.constexpr):
    """acc + a @ w^T for the H values at ``a_rows`` (BLOCK_B,) and those of W_hh that belong to them.

    ``w_rows`` (N,) points at the weights of the first value of segment 0, ``stride_k`` lies from one value's to the next's;
    values are those of gate ``segment``. Rows not in ``mask_rows`` count as zero.
    """
    PRECISION: tl.constexpr = config.PRECISION
    bound = tl.where(tl.max(mask_rows.to(tl.int32), 0) > 0, config.H, 0)  # nothing is read where no row has values
    for k in range(0, bound, config.BLOCK_K):
        offs_k = k + tl.arange(0, config.BLOCK_K)
        mask_k = (offs_k < config.H)[None, :]
        a = tl.load(a_rows[:, None] + offs_k[None, :], mask=mask_rows[:, None] & mask_k, other=0.0, cache_modifier=".cg")
        offs_w = (segment * config.H + offs_k).to(tl.int64) * stride_k
        w = tl.load(w_rows[:, None] + offs_w[None, :], mask=mask_n[:, None] & mask_k, other=0.0)
        if config.INTERPRET_BF16:
            a, w = a.to(tl.float32), w.to(tl.float32)
        a, w = operand(a, PRECISION), operand(w, PRECISION)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def peepholes(units_ptr, at, ACC: tl.constexpr, config: tl.constexpr):
    """(1, BLOCK_H) each, or () of torch's cell."""
    own = ()
    if units_ptr is not None:
        for n in tl.static_range(3):
            p = tl.load(units_ptr + (at.r * 3 + n) * config.H + at.offs_h, mask=at.offs_h < config.H, other=0.0)
            own = own + (p.to(ACC)[None, :],)
    return own


@triton.jit
def zoneout(seed_ptr, batch, unit, r, s, B, config: tl.constexpr):
    """The masks of step s for units (1, n)."""
    ZONEOUT: tl.constexpr = config.zoneout  # Triton 3.6 takes it by a name only
    seed = ()
    if seed_ptr is not None:
        seed = (tl.load(seed_ptr),)
    t = time_of(batch.backwards, batch.lengths, s)[:, None]
    return masks(seed, t, batch.offs_b[:, None], r, unit, B, config.R, config.H, ZONEOUT)


@triton.jit
def load_gates(gates_ptr, mask, H: tl.constexpr, ACC: tl.constexpr):
    """The four values at pointers to gate i."""
    i = tl.load(gates_ptr, mask=mask, other=0.0).to(ACC)
    f = tl.load(gates_ptr + H, mask=mask, other=0.0).to(ACC)
    g = tl.load(gates_ptr + 2 * H, mask=mask, other=0.0).to(ACC)
    o = tl.load(gates_ptr + 3 * H, mask=mask, other=0.0).to(ACC)
    return i, f, g, o


@triton.jit
def store_gates(gates_ptr, values, mask, H: tl.constexpr, dtype: tl.constexpr, BF16: tl.constexpr):
    for gate in tl.static_range(4):
        tl.store(gates_ptr + gate * H, narrow(values[gate], dtype, BF16), mask=mask)


@triton.jit
def store_first(to_ptrs, first_ptr, at):
    """For batch rows without steps, what stands in a state (R, B, H), or zero."""
    mask = at.mask & (at.batch.lengths == 0)[:, None]
    if first_ptr is None:
        value = tl.zeros(at.mask.shape, to_ptrs.dtype.element_ty)
    else:
        value = tl.load(first_ptr + at.state, mask=mask, other=0.0)
    tl.store(to_ptrs, value, mask=mask)
