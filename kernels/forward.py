"""Forward recurrence in one launch: weights and cell state stay on chip, a barrier stands between steps.

The buffers and their shapes are in the glossary of this package (kernels/__init__.py).
"""

import triton
import triton.language as tl

from .barrier import arrive, wait
from .cell import narrow
from .product import accumulator, multiply_add, product, resident_weights
from .rows import batch_rows, carried, data_rows
from .stepwise import load_gates, store_gates


@triton.jit(do_not_specialize=["first_tile", "T", "B", "row_stride_t", "row_stride_b"])
def lstm_forward_kernel(
    buffers,  # stepwise.Forward
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
    INTERPRET_BF16: tl.constexpr,  # works around the interpreter's bf16: wrong tl.dot, truncating conversion
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
    dtype: tl.constexpr = buffers.h_ptr.dtype.element_ty
    LOCAL: tl.constexpr = BLOCK_H >= H  # the program has all of h: nothing to exchange
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = (first_tile + tl.program_id(1)) * ROWS + tl.arange(0, BLOCK_B)
    mask_h = offs_h < H
    mask_b = (tl.arange(0, BLOCK_B) < ROWS) & (offs_b < B)
    programs = tl.num_programs(0)
    arrived_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 16

    # Column 4*j + g of the weights is gate g of unit j, so that a program's gates come apart by two splits.
    offs_n = tl.arange(0, 4 * BLOCK_H)
    unit = tl.program_id(0) * BLOCK_H + offs_n // 4
    mask_n = unit < H
    w_cols = buffers.w_hh_ptr + ((r * 4 + offs_n % 4) * H + unit) * H
    weights = resident_weights(w_cols, mask_n, H, 1, 1, RESIDENT, BLOCK_K)
    if buffers.b_hh_ptr is not None:
        bias = tl.load(buffers.b_hh_ptr + (r * 4 + offs_n % 4) * H + unit, mask=mask_n, other=0.0).to(ACC)[None, :]

    batch = batch_rows(sequences, offs_b, mask_b, r, T, row_stride_t, row_stride_b, DIRECTIONS)
    lengths = batch.lengths
    zero = T * 0
    rows, prev_rows = data_rows(sequences, batch, zero), data_rows(sequences, batch, zero - 1)
    mask_s = lengths > 0  # rows that have this step
    keep = carried(sequences, batch, zero, rows, prev_rows)  # ... and a state from before
    mask_a = keep
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    if buffers.h0_ptr is None:
        h_rows = buffers.h_ptr + rows * 0
        mask_a = keep & False
    else:
        h_rows = buffers.h0_ptr + (r * B + offs_b) * H
    if buffers.c0_ptr is None:
        c = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    else:
        c = tl.load(buffers.c0_ptr + state, mask=mask_b[:, None] & mask_h[None, :], other=0.0).to(ACC)
    if LOCAL:
        h = tl.load(h_rows[:, None] + offs_h[None, :], mask=mask_a[:, None] & mask_h[None, :], other=0.0)
    gates_ptr = buffers.gates_ptr + (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]
    given = load_gates(gates_ptr, mask_s[:, None] & mask_h[None, :], H, dtype)

    for s in tl.range(0, tl.max(lengths, 0).to(tl.int32), num_stages=1, disable_licm=True):
        if LOCAL:
            acc = accumulator(ACC, 4 * BLOCK_H, SWAP, BLOCK_B)
            acc = multiply_add(acc, h, weights[0], SWAP, PRECISION, INTERPRET_BF16)
            if SWAP:
                acc = tl.trans(acc)
        else:
            wait(arrived_ptr, s * programs)
            acc = product(
                h_rows, mask_a, weights, w_cols, mask_n,
                ACC, 4 * BLOCK_H, H, 1, 1, RESIDENT, AHEAD, SWAP, PRECISION, INTERPRET_BF16, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        if buffers.b_hh_ptr is not None:
            acc += bias
        even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_H, 2, 2)))
        a_i, a_g = tl.split(even)
        a_f, a_o = tl.split(odd)
        c_prev = tl.where(keep[:, None], c, 0.0)
        x_i, x_f, x_g, x_o = given
        gates, c_new, h_new = CELL((a_i, a_f, a_g, a_o), (x_i.to(ACC), x_f.to(ACC), x_g.to(ACC), x_o.to(ACC)), c_prev)
        mask = mask_s[:, None] & mask_h[None, :]
        c = tl.where(mask, c_new, c)
        h_new = narrow(h_new, dtype, INTERPRET_BF16)
        offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
        tl.store(buffers.h_ptr + offs, h_new, mask=mask)
        if not LOCAL:
            arrive(arrived_ptr)
        # What nobody waits for comes after the arrival: results, and the next step's input.
        tl.store(buffers.hn_ptr + state, h_new, mask=mask & (s == lengths - 1)[:, None])
        if buffers.c_ptr is not None:
            tl.store(buffers.c_ptr + offs, narrow(c, dtype, INTERPRET_BF16), mask=mask)
            store_gates(gates_ptr, gates, mask, H, dtype, INTERPRET_BF16)
        h_rows = buffers.h_ptr + (rows * R + r) * H
        prev_rows = rows
        rows = data_rows(sequences, batch, s + 1)
        mask_s = s + 1 < lengths
        keep = carried(sequences, batch, s + 1, rows, prev_rows)
        mask_a = keep
        gates_ptr = buffers.gates_ptr + (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]
        given = load_gates(gates_ptr, mask_s[:, None] & mask_h[None, :], H, dtype)
        if LOCAL:
            h = tl.where(keep[:, None], h_new, 0.0)
    tl.store(buffers.cn_ptr + state, narrow(c, dtype, INTERPRET_BF16), mask=mask_b[:, None] & mask_h[None, :])
