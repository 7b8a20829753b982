"""Forward recurrence: h_{t-1} @ W_hh^T, three gates, candidate, cell update and output, fused.

One body, two schedules: a launch for each time step, or one for all of them (PERSISTENT), in which weights and cell state
stay on chip and a barrier stands between steps. The buffers and their shapes are in the glossary of this package
(kernels/__init__.py).
"""

import triton
import triton.language as tl

from .barrier import arrive, wait
from .cell import cell_forward, narrow
from .product import accumulator, multiply_add, product, resident_weights
from .rows import data_rows, kept, row_lengths, runs_backwards


@triton.jit(do_not_specialize=["first", "last", "first_tile", "T", "B", "row_stride_t", "row_stride_b"])
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
    arrived_ptr,  # (R, batch tiles, 16) zeros, if PERSISTENT
    first,  # steps first .. last-1 are to be done
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
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET_BF16: tl.constexpr,  # works around the interpreter's bf16: wrong tl.dot, truncating conversion
    PERSISTENT: tl.constexpr,
    SWAP: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    ROWS: tl.constexpr,  # batch rows of a program: BLOCK_B, or fewer where the tensor cores want a taller tile
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = cn_ptr.dtype.element_ty
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    LOCAL: tl.constexpr = PERSISTENT and BLOCK_H >= H  # the program has all of h: nothing to exchange
    r = tl.program_id(2).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_b = (first_tile + tl.program_id(1)) * ROWS + tl.arange(0, BLOCK_B)
    mask_h = offs_h < H
    mask_b = (tl.arange(0, BLOCK_B) < ROWS) & (offs_b < B)
    programs = tl.num_programs(0)
    if PERSISTENT:
        arrived_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 16

    # Column 4*j + g of the weights is gate g of unit j, so that a program's gates come apart by two splits.
    offs_n = tl.arange(0, 4 * BLOCK_H)
    unit = tl.program_id(0) * BLOCK_H + offs_n // 4
    mask_n = unit < H
    w_cols = w_hh_ptr + ((r * 4 + offs_n % 4) * H + unit) * H
    weights = resident_weights(w_cols, mask_n, H, 1, 1, RESIDENT, BLOCK_K)

    backwards = runs_backwards(r, DIRECTIONS)
    lengths = row_lengths(offs_b, mask_b, T, lengths_ptr, LENGTHS)
    rows = data_rows(first, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    prev_rows = data_rows(first - 1, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
    mask_s = first < lengths  # rows that have this step
    keep = kept(first, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)  # ... and a state from before
    mask_a = keep
    state = (r * B + offs_b)[:, None] * H + offs_h[None, :]  # (R, B, H)
    mask_c = mask_s[:, None] & mask_h[None, :]
    if first == 0:
        h_rows = h0_ptr + (r * B + offs_b) * H
        c = tl.load(c0_ptr + state, mask=mask_c, other=0.0).to(ACC)
        mask_a = keep & HAS_H0
    else:
        h_rows = h_ptr + (prev_rows * R + r) * H
        c = tl.load(cn_ptr + state, mask=mask_c, other=0.0)
    if LOCAL:
        h = tl.load(h_rows[:, None] + offs_h[None, :], mask=mask_a[:, None] & mask_h[None, :], other=0.0)
    x_i, x_f, x_g, x_o = load_gates(gates_ptr, rows, r, offs_h, mask_s, R, H)

    for s in tl.range(first, tl.minimum(last, tl.max(lengths, 0).to(tl.int32)), num_stages=1, disable_licm=True):
        if LOCAL:
            acc = accumulator(ACC, 4 * BLOCK_H, SWAP, BLOCK_B)
            acc = multiply_add(acc, h, weights[0], SWAP, PRECISION, INTERPRET_BF16)
            if SWAP:
                acc = tl.trans(acc)
        else:
            if PERSISTENT:
                wait(arrived_ptr, (s - first) * programs)
            acc = product(
                h_rows, mask_a, weights, w_cols, mask_n,
                ACC, 4 * BLOCK_H, H, 1, 1, RESIDENT, AHEAD, SWAP, PRECISION, INTERPRET_BF16, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_H, 2, 2)))
        a_i, a_g = tl.split(even)
        a_f, a_o = tl.split(odd)
        c_prev = tl.where(keep[:, None], c, 0.0)
        i, f, g, o, c_new, h_new = cell_forward(
            a_i + x_i.to(ACC), a_f + x_f.to(ACC), a_g + x_g.to(ACC), a_o + x_o.to(ACC), c_prev
        )
        mask = mask_s[:, None] & mask_h[None, :]
        c = tl.where(mask, c_new, c)
        h_new = narrow(h_new, dtype, INTERPRET_BF16)
        offs = (rows * R + r)[:, None] * H + offs_h[None, :]  # (N, R, H)
        tl.store(h_ptr + offs, h_new, mask=mask)
        if PERSISTENT and not LOCAL:
            arrive(arrived_ptr)
        # What nobody waits for comes after the arrival: results, and the next step's input.
        tl.store(hn_ptr + state, h_new, mask=mask & (s == lengths - 1)[:, None])
        if SAVE:
            gate = (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i
            tl.store(c_ptr + offs, narrow(c, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gates_ptr + gate, narrow(i, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gates_ptr + gate + H, narrow(f, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gates_ptr + gate + 2 * H, narrow(g, dtype, INTERPRET_BF16), mask=mask)
            tl.store(gates_ptr + gate + 3 * H, narrow(o, dtype, INTERPRET_BF16), mask=mask)
        if PERSISTENT:
            h_rows = h_ptr + (rows * R + r) * H
            prev_rows = rows
            rows = data_rows(s + 1, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED)
            mask_s = s + 1 < lengths
            keep = kept(s + 1, rows, prev_rows, mask_s, lengths, backwards, resets_ptr, RESETS)
            mask_a = keep
            x_i, x_f, x_g, x_o = load_gates(gates_ptr, rows, r, offs_h, mask_s, R, H)
            if LOCAL:
                h = tl.where(keep[:, None], h_new, 0.0)
    tl.store(cn_ptr + state, c, mask=mask_c)


@triton.jit
def load_gates(gates_ptr, rows, r, offs_h, mask_s, R: tl.constexpr, H: tl.constexpr):
    """Gates i, f, g, o of the data rows, (BLOCK_B, BLOCK_H) each."""
    gate = gates_ptr + (rows * R + r)[:, None] * (4 * H) + offs_h[None, :]  # (N, R, 4, H), gate i
    mask = mask_s[:, None] & (offs_h < H)[None, :]
    i = tl.load(gate, mask=mask, other=0.0)
    f = tl.load(gate + H, mask=mask, other=0.0)
    g = tl.load(gate + 2 * H, mask=mask, other=0.0)
    o = tl.load(gate + 3 * H, mask=mask, other=0.0)
    return i, f, g, o
