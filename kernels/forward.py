"""Forward recurrence: h_{t-1} @ W_hh^T, three gates, candidate, cell update and output, in one launch per time step.

The buffers and their shapes are in the glossary of this package (kernels/__init__.py).
"""

import triton
import triton.language as tl

from .cell import cell_forward, narrow
from .rows import data_rows, kept, row_lengths, runs_backwards


@triton.jit(do_not_specialize=["s", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_forward_kernel(
    gates_ptr,  # (N, R, 4, H) in: input pre-activations; out, if SAVE: activated gates
    w_hh_ptr,  # (R, 4, H, H)
    h_ptr,  # (N, R, H) out; read at the previous step's rows
    c_ptr,  # (N, R, H) out, if SAVE
    h0_ptr,  # (R, B, H), if HAS_H0
    c0_ptr,  # (R, B, H)
    hn_ptr,  # (R, B, H) out
    cn_ptr,  # (R, B, H) in (but for step 0) and out: the running cell state
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
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,  # works around the interpreter's bf16: wrong tl.dot, truncating conversion
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = cn_ptr.dtype.element_ty
    dtype: tl.constexpr = h_ptr.dtype.element_ty
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
    mask_s = s < lengths  # rows that have this step
    mask = mask_s[:, None] & mask_h[None, :]
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
    gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i

    mask_r = kept(s, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)  # rows with a state from before
    mask_c = mask_r[:, None] & mask_h[None, :]
    if s == 0:
        h_rows = h0_ptr + (r * B + offs_b)[:, None] * H
        c = tl.load(c0_ptr + state, mask=mask_c, other=0.0).to(ACC)
        mask_r = mask_r & HAS_H0
    else:
        h_rows = h_ptr + (prev_rows * R + r)[:, None] * H
        c = tl.load(cn_ptr + state, mask=mask_c, other=0.0)
    a_i = tl.load(gates_ptr + gate, mask=mask, other=0.0).to(ACC)
    a_f = tl.load(gates_ptr + gate + H, mask=mask, other=0.0).to(ACC)
    a_g = tl.load(gates_ptr + gate + 2 * H, mask=mask, other=0.0).to(ACC)
    a_o = tl.load(gates_ptr + gate + 3 * H, mask=mask, other=0.0).to(ACC)

    w_rows = w_hh_ptr + (r * (4 * H) + offs_h)[None, :] * H  # output unit offs_h of gate i
    for k in range(0, H, BLOCK_K):
        mask_k = k + offs_k < H
        mask_w = mask_k[:, None] & mask_h[None, :]
        h = tl.load(h_rows + (k + offs_k)[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        w = w_rows + (k + offs_k)[:, None]
        w_i = tl.load(w, mask=mask_w, other=0.0)
        w_f = tl.load(w + H * H, mask=mask_w, other=0.0)
        w_g = tl.load(w + 2 * H * H, mask=mask_w, other=0.0)
        w_o = tl.load(w + 3 * H * H, mask=mask_w, other=0.0)
        if INTERPRET_BF16:
            h = h.to(ACC)
            w_i, w_f, w_g, w_o = w_i.to(ACC), w_f.to(ACC), w_g.to(ACC), w_o.to(ACC)
        a_i = tl.dot(h, w_i, a_i, input_precision=PRECISION, out_dtype=ACC)
        a_f = tl.dot(h, w_f, a_f, input_precision=PRECISION, out_dtype=ACC)
        a_g = tl.dot(h, w_g, a_g, input_precision=PRECISION, out_dtype=ACC)
        a_o = tl.dot(h, w_o, a_o, input_precision=PRECISION, out_dtype=ACC)

    i, f, g, o, c, h_new = cell_forward(a_i, a_f, a_g, a_o, c)
    h_new = narrow(h_new, dtype, INTERPRET_BF16)
    tl.store(h_ptr + offs, h_new, mask=mask)
    tl.store(cn_ptr + state, c, mask=mask)
    tl.store(hn_ptr + state, h_new, mask=mask & (s == lengths - 1)[:, None])
    if SAVE:
        tl.store(c_ptr + offs, narrow(c, dtype, INTERPRET_BF16), mask=mask)
        tl.store(gates_ptr + gate, narrow(i, dtype, INTERPRET_BF16), mask=mask)
        tl.store(gates_ptr + gate + H, narrow(f, dtype, INTERPRET_BF16), mask=mask)
        tl.store(gates_ptr + gate + 2 * H, narrow(g, dtype, INTERPRET_BF16), mask=mask)
        tl.store(gates_ptr + gate + 3 * H, narrow(o, dtype, INTERPRET_BF16), mask=mask)
