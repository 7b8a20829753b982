"""Backward recurrence: dh = dy_t + dgates_{t+1} @ W_hh and the cell's gradients, in one launch per time step.

The buffers and their shapes are in the glossary of this package (kernels/__init__.py).
"""

import triton
import triton.language as tl

from .cell import cell_backward, narrow
from .rows import data_rows, kept, row_lengths, runs_backwards


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
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
    s,  # the step to do
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
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = dc_ptr.dtype.element_ty
    dtype: tl.constexpr = dgates_ptr.dtype.element_ty
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_k = tl.arange(0, BLOCK_K)
    mask_h = offs_h < H
    mask_b = offs_b < B

    backwards = runs_backwards(r, DIRECTIONS)
    lengths = row_lengths(offs_b, mask_b, T, lengths_ptr, LENGTHS)
    rows = data_rows(s, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    prev_rows = data_rows(s - 1, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    next_rows = data_rows(s + 1, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    mask_s = s < lengths
    mask = mask_s[:, None] & mask_h[None, :]
    keep = kept(s, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)[:, None] & mask_h[None, :]
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
    prev_offs = (prev_rows * R + r)[:, None] * H + offs_h[None, :]
    gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i

    # dh from the step after this one, in time of processing; no such step, or a reset before it: nothing is read
    dh = tl.zeros((BLOCK_B, BLOCK_H), dtype=ACC)
    next_gates = dgates_ptr + (next_rows * R + r)[:, None] * (4 * H)
    mask_next = kept(s + 1, next_rows, rows, s + 1 < lengths, lengths, backwards, resets_ptr, RESETS)
    w_rows = w_hh_ptr + r * (4 * H) * H + offs_h[None, :]
    for k in range(0, 4 * H, BLOCK_K):
        mask_k = k + offs_k < 4 * H
        da = tl.load(next_gates + (k + offs_k)[None, :], mask=mask_next[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_rows + (k + offs_k)[:, None].to(tl.int64) * H, mask=mask_k[:, None] & mask_h[None, :], other=0.0)
        if INTERPRET_BF16:
            da, w = da.to(ACC), w.to(ACC)
        dh = tl.dot(da, w, dh, input_precision=PRECISION, out_dtype=ACC)

    dh += tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    dh += tl.load(dhn_ptr + state, mask=mask & (s == lengths - 1)[:, None], other=0.0).to(ACC)
    dc = tl.load(dc_ptr + state, mask=mask, other=0.0)
    if s == 0:
        c_prev = tl.load(c0_ptr + state, mask=keep, other=0.0).to(ACC)
        h_prev = tl.load(h0_ptr + state, mask=keep & HAS_H0, other=0.0)
    else:
        c_prev = tl.load(c_ptr + prev_offs, mask=keep, other=0.0).to(ACC)
        h_prev = tl.load(h_ptr + prev_offs, mask=keep, other=0.0)
    c = tl.load(c_ptr + offs, mask=mask, other=0.0).to(ACC)
    i = tl.load(gates_ptr + gate, mask=mask, other=0.0).to(ACC)
    f = tl.load(gates_ptr + gate + H, mask=mask, other=0.0).to(ACC)
    g = tl.load(gates_ptr + gate + 2 * H, mask=mask, other=0.0).to(ACC)
    o = tl.load(gates_ptr + gate + 3 * H, mask=mask, other=0.0).to(ACC)

    da_i, da_f, da_g, da_o, dc = cell_backward(i, f, g, o, c, c_prev, dh, dc)
    tl.store(dgates_ptr + gate, narrow(da_i, dtype, INTERPRET_BF16), mask=mask)
    tl.store(dgates_ptr + gate + H, narrow(da_f, dtype, INTERPRET_BF16), mask=mask)
    tl.store(dgates_ptr + gate + 2 * H, narrow(da_g, dtype, INTERPRET_BF16), mask=mask)
    tl.store(dgates_ptr + gate + 3 * H, narrow(da_o, dtype, INTERPRET_BF16), mask=mask)
    tl.store(dc_ptr + state, tl.where(keep, dc, 0.0), mask=mask)
    tl.store(h_prev_ptr + offs, h_prev, mask=mask)
