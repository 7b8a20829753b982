"""Backward recurrence: dh = dy_t + dgates_{t+1} @ W_hh and the cell's gradients, fused.

The two schedules are those of the forward kernel; the buffers and their shapes are in the glossary of this package
(kernels/__init__.py).
"""

import triton
import triton.language as tl

from .barrier import arrive, wait
from .cell import cell_backward, narrow
from .product import accumulator, multiply_add, product, resident_weights
from .rows import data_rows, kept, row_lengths, runs_backwards


@triton.jit(do_not_specialize=["first", "last", "first_tile", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_backward_kernel(
    dy_ptr,  # (N, R, H)
    dhn_ptr,  # (R, B, H)
    dc_ptr,  # (R, B, H) in and out: the running gradient by the cell state
    gates_ptr,  # (N, R, 4, H) activated gates of the forward pass
    c_ptr,  # (N, R, H)
    h_ptr,  # (N, R, H)
    h0_ptr,  # (R, B, H), if HAS_H0
    c0_ptr,  # (R, B, H)
    w_hh_ptr,  # (R, 4, H, H)
    dgates_ptr,  # (N, R, 4, H) out; read at the next step's rows
    h_prev_ptr,  # (N, R, H) out
    lengths_ptr,  # (B,) if LENGTHS
    starts_ptr,  # (T,) if PACKED
    resets_ptr,  # (N,) if RESETS
    arrived_ptr,  # (R, batch tiles, 16) zeros, if PERSISTENT
    first,  # steps last-1 .. first are to be done
    last,
    first_tile,  # the batch tile of the first programs
    T,
    B,
    row_stride_t,
    row_stride_b,
    R: tl.constexpr,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    HAS_H0: tl.constexpr,
    LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    RESETS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SWAP: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,  # batch rows of a program: BLOCK_B, or fewer where the tensor cores want a taller tile
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = dc_ptr.dtype.element_ty
    dtype: tl.constexpr = dgates_ptr.dtype.element_ty
    LOCAL: tl.constexpr = PERSISTENT and BLOCK_H >= H  # the program has all of dgates: nothing to exchange
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = (first_tile + tl.program_id(1)) * ROWS + tl.arange(0, BLOCK_B)
    mask_h = offs_h < H
    mask_b = (tl.arange(0, BLOCK_B) < ROWS) & (offs_b < B)
    programs = tl.num_programs(0)
    if PERSISTENT:
        arrived_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 16

    w_cols = w_hh_ptr + r * (4 * H) * H + offs_h
    weights = resident_weights(w_cols, mask_h, H, H, 4, RESIDENT, BLOCK_K)

    backwards = runs_backwards(r, DIRECTIONS)
    lengths = row_lengths(offs_b, mask_b, T, lengths_ptr, LENGTHS)
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    last = tl.minimum(last, tl.max(lengths, 0).to(tl.int32))
    s = tl.maximum(last - 1, 0)  # where no row has a step, one that none has
    next_rows = data_rows(last, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    rows = data_rows(s, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    prev_rows = data_rows(s - 1, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    mask_s = s < lengths  # rows that have this step
    keep = kept(s, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)  # ... and a state from before
    # Rows that get a gradient from the step after this one, in order of processing: none if there is no such step, or a
    # reset before it.
    mask_a = kept(last, next_rows, rows, last < lengths, lengths, backwards, resets_ptr, RESETS)
    a_rows = dgates_ptr + (next_rows * R + r) * (4 * H)
    dc = tl.load(dc_ptr + state, mask=mask_b[:, None] & mask_h[None, :], other=0.0)
    if LOCAL:
        local = a_rows[:, None] + offs_h[None, :]
        mask_local = mask_a[:, None] & mask_h[None, :]
        da_i = tl.load(local, mask=mask_local, other=0.0)
        da_f = tl.load(local + H, mask=mask_local, other=0.0)
        da_g = tl.load(local + 2 * H, mask=mask_local, other=0.0)
        da_o = tl.load(local + 3 * H, mask=mask_local, other=0.0)
    saved = load_saved(
        dy_ptr, dhn_ptr, gates_ptr, c_ptr, h_ptr, h0_ptr, c0_ptr,
        s, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths, R, H, HAS_H0, ACC,
    )  # fmt: skip

    for step in tl.range(0, last - first, num_stages=1, disable_licm=True):
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
            if PERSISTENT:
                wait(arrived_ptr, step * programs)
            acc = product(
                a_rows, mask_a, weights, w_cols, mask_h,
                ACC, BLOCK_H, H, H, 4, RESIDENT, AHEAD, SWAP, PRECISION, INTERPRET_BF16, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        dy, dhn, i, f, g, o, c, c_prev, h_prev = saved
        dh = acc + dy.to(ACC) + dhn.to(ACC)
        da_i, da_f, da_g, da_o, dc_new = cell_backward(
            i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC), c.to(ACC), c_prev.to(ACC), dh, dc
        )
        mask = mask_s[:, None] & mask_h[None, :]
        dc = tl.where(mask, tl.where(keep[:, None], dc_new, 0.0), dc)
        da_i, da_f = narrow(da_i, dtype, INTERPRET_BF16), narrow(da_f, dtype, INTERPRET_BF16)
        da_g, da_o = narrow(da_g, dtype, INTERPRET_BF16), narrow(da_o, dtype, INTERPRET_BF16)
        gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i
        tl.store(dgates_ptr + gate, da_i, mask=mask)
        tl.store(dgates_ptr + gate + H, da_f, mask=mask)
        tl.store(dgates_ptr + gate + 2 * H, da_g, mask=mask)
        tl.store(dgates_ptr + gate + 3 * H, da_o, mask=mask)
        if PERSISTENT and not LOCAL:
            arrive(arrived_ptr)
        # What nobody waits for comes after the arrival: h_prev, and what the next step needs.
        tl.store(h_prev_ptr + (rows * R + r)[:, None] * H + offs_h[None, :], h_prev, mask=mask)
        if PERSISTENT:
            a_rows = dgates_ptr + (rows * R + r) * (4 * H)
            mask_a = keep
            if LOCAL:
                da_i, da_f = tl.where(keep[:, None], da_i, 0.0), tl.where(keep[:, None], da_f, 0.0)
                da_g, da_o = tl.where(keep[:, None], da_g, 0.0), tl.where(keep[:, None], da_o, 0.0)
            rows = prev_rows
            prev_rows = data_rows(s - 2, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
            mask_s = (s - 1 < lengths) & (lengths * 0 + s > 0)
            keep = kept(s - 1, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)
            saved = load_saved(
                dy_ptr, dhn_ptr, gates_ptr, c_ptr, h_ptr, h0_ptr, c0_ptr,
                s - 1, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths, R, H, HAS_H0, ACC,
            )  # fmt: skip
    tl.store(dc_ptr + state, dc, mask=mask_b[:, None] & mask_h[None, :])


@triton.jit
def load_saved(
    dy_ptr, dhn_ptr, gates_ptr, c_ptr, h_ptr, h0_ptr, c0_ptr,
    s, rows, prev_rows, r, state, offs_h, mask_s, keep, lengths,
    R: tl.constexpr, H: tl.constexpr, HAS_H0: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All that step s needs but the gradients of the step after it, (BLOCK_B, BLOCK_H) each."""
    mask_h = (offs_h < H)[None, :]
    mask = mask_s[:, None] & mask_h
    mask_keep = keep[:, None] & mask_h
    offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
    gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    dhn = tl.load(dhn_ptr + state, mask=mask & (s == lengths - 1)[:, None], other=0.0)
    i = tl.load(gates_ptr + gate, mask=mask, other=0.0)
    f = tl.load(gates_ptr + gate + H, mask=mask, other=0.0)
    g = tl.load(gates_ptr + gate + 2 * H, mask=mask, other=0.0)
    o = tl.load(gates_ptr + gate + 3 * H, mask=mask, other=0.0)
    c = tl.load(c_ptr + offs, mask=mask, other=0.0)
    if s == 0:
        c_prev = tl.load(c0_ptr + state, mask=mask_keep, other=0.0)
        h_prev = tl.load(h0_ptr + state, mask=mask_keep & HAS_H0, other=0.0)
    else:
        prev = (prev_rows * R + r)[:, None] * H + offs_h[None, :]
        c_prev = tl.load(c_ptr + prev, mask=mask_keep, other=0.0)
        h_prev = tl.load(h_ptr + prev, mask=mask_keep, other=0.0)
    return dy, dhn, i, f, g, o, c, c_prev, h_prev
