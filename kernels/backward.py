"""Backward recurrence in one launch: dh = dy_t + dgates_{t+1} @ W_hh and the cell's gradients; see the forward kernel."""

import triton
import triton.language as tl

from .barrier import arrive, wait
from .cell import narrow
from .product import accumulator, multiply_add, product, resident_weights
from .rows import batch_rows, carried, data_rows
from .stepwise import load_gates, store_gates


@triton.jit(do_not_specialize=["first_tile", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_backward_kernel(
    buffers,  # stepwise.Backward
    sequences,  # rows.Sequences
    arrived_ptr,  # (R, batch tiles, 16) zeros
    first_tile,  # the batch tile of the first programs
    T,
    B,
    row_stride_t,
    row_stride_b,
    R: tl.constexpr,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,
    CELL: tl.constexpr,
    SWAP: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,  # batch rows of a program: BLOCK_B, or fewer where the tensor cores want a taller tile
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = buffers.running_ptr.dtype.element_ty
    dtype: tl.constexpr = buffers.dgates_ptr.dtype.element_ty
    LOCAL: tl.constexpr = BLOCK_H >= H  # the program has all of dgates: nothing to exchange
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = (first_tile + tl.program_id(1)) * ROWS + tl.arange(0, BLOCK_B)
    mask_h = offs_h < H
    mask_b = (tl.arange(0, BLOCK_B) < ROWS) & (offs_b < B)
    programs = tl.num_programs(0)
    arrived_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 16

    w_cols = buffers.w_hh_ptr + r * (4 * H) * H + offs_h
    weights = resident_weights(w_cols, mask_h, H, H, 4, RESIDENT, BLOCK_K)

    batch = batch_rows(sequences, offs_b, mask_b, r, T, row_stride_t, row_stride_b, DIRECTIONS)
    lengths = batch.lengths
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    last = tl.minimum(T, tl.max(lengths, 0).to(tl.int32))
    s = tl.maximum(last - 1, 0)  # where no row has a step, one that none has
    rows, prev_rows = data_rows(sequences, batch, s), data_rows(sequences, batch, s - 1)
    a_rows = buffers.dgates_ptr + (rows * R + r) * (4 * H)
    mask_s = s < lengths  # rows that have this step
    mask_a = mask_b & False  # rows that get a gradient from the step after this one, in order of processing
    keep = carried(sequences, batch, s, rows, prev_rows)  # ... and a state from before
    if buffers.dcn_ptr is None:
        dc = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    else:
        dc = tl.load(buffers.dcn_ptr + state, mask=mask_b[:, None] & mask_h[None, :], other=0.0).to(ACC)
    if LOCAL:
        da_i = tl.zeros((BLOCK_B, BLOCK_H), dtype)
        da_f, da_g, da_o = da_i, da_i, da_i
    saved = load_saved(buffers, s, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths, R, H)

    for step in tl.range(0, last, num_stages=1, disable_licm=True):
        s = last - 1 - step
        if LOCAL:
            acc = accumulator(ACC, BLOCK_H, SWAP, BLOCK_B)
            acc = multiply_add(acc, da_i, weights[0], SWAP, PRECISION, INTERPRET_BF16)
            acc = multiply_add(acc, da_f, weights[1], SWAP, PRECISION, INTERPRET_BF16)
            acc = multiply_add(acc, da_g, weights[2], SWAP, PRECISION, INTERPRET_BF16)
            acc = multiply_add(acc, da_o, weights[3], SWAP, PRECISION, INTERPRET_BF16)
            if SWAP:
                acc = tl.trans(acc)
        else:
            wait(arrived_ptr, step * programs)
            acc = product(
                a_rows, mask_a, weights, w_cols, mask_h,
                ACC, BLOCK_H, H, H, 4, RESIDENT, AHEAD, SWAP, PRECISION, INTERPRET_BF16, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        dy, dhn, (i, f, g, o), c, c_prev, h_prev = saved
        dh = acc + dy.to(ACC) + dhn.to(ACC)
        gates = (i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC))
        dgates, dc_new = CELL(gates, c.to(ACC), c_prev.to(ACC), dh, dc)
        mask = mask_s[:, None] & mask_h[None, :]
        dc = tl.where(mask, tl.where(keep[:, None], dc_new, 0.0), dc)
        gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i
        store_gates(buffers.dgates_ptr + gate, dgates, mask, H, dtype, INTERPRET_BF16)
        if not LOCAL:
            arrive(arrived_ptr)
        # What nobody waits for comes after the arrival: h_prev, and what the next step needs.
        tl.store(buffers.h_prev_ptr + (rows * R + r)[:, None] * H + offs_h[None, :], h_prev, mask=mask)
        a_rows = buffers.dgates_ptr + (rows * R + r) * (4 * H)
        mask_a = keep
        if LOCAL:
            da_i = tl.where(keep[:, None], narrow(dgates[0], dtype, INTERPRET_BF16), 0.0)
            da_f = tl.where(keep[:, None], narrow(dgates[1], dtype, INTERPRET_BF16), 0.0)
            da_g = tl.where(keep[:, None], narrow(dgates[2], dtype, INTERPRET_BF16), 0.0)
            da_o = tl.where(keep[:, None], narrow(dgates[3], dtype, INTERPRET_BF16), 0.0)
        rows = prev_rows
        prev_rows = data_rows(sequences, batch, s - 2)
        mask_s = (s - 1 < lengths) & (lengths * 0 + s > 0)
        keep = carried(sequences, batch, s - 1, rows, prev_rows) & mask_s
        saved = load_saved(buffers, s - 1, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths, R, H)
    tl.store(buffers.dc0_ptr + state, narrow(dc, dtype, INTERPRET_BF16), mask=mask_b[:, None] & mask_h[None, :])


@triton.jit
def load_saved(
    buffers, s, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths, R: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """All that step s needs but the gradients of the step after it, (BLOCK_B, BLOCK_H) each."""
    dtype: tl.constexpr = buffers.dgates_ptr.dtype.element_ty
    mask_h = (offs_h < H)[None, :]
    mask = mask_s[:, None] & mask_h
    mask_keep = keep[:, None] & mask_h
    offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
    gates = load_gates(buffers.gates_ptr + (rows * R + r)[:, None] * (4 * H) + offs_h[None, :], mask, H, dtype)
    c = tl.load(buffers.c_ptr + offs, mask=mask, other=0.0)
    dy, dhn = tl.zeros_like(c), tl.zeros_like(c)
    if buffers.dy_ptr is not None:
        dy = tl.load(buffers.dy_ptr + offs, mask=mask, other=0.0)
    if buffers.dhn_ptr is not None:
        dhn = tl.load(buffers.dhn_ptr + state, mask=mask & (s == lengths - 1)[:, None], other=0.0)
    c_prev, h_prev = tl.zeros_like(c), tl.zeros_like(c)
    if s > 0:
        prev = (prev_rows * R + r)[:, None] * H + offs_h[None, :]
        c_prev = tl.load(buffers.c_ptr + prev, mask=mask_keep, other=0.0)
        h_prev = tl.load(buffers.h_ptr + prev, mask=mask_keep, other=0.0)
    else:
        if buffers.c0_ptr is not None:
            c_prev = tl.load(buffers.c0_ptr + state, mask=mask_keep, other=0.0)
        if buffers.h0_ptr is not None:
            h_prev = tl.load(buffers.h0_ptr + state, mask=mask_keep, other=0.0)
    return dy, dhn, gates, c, c_prev, h_prev
