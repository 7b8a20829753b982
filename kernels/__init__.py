"""Device code of fused_lstm: Triton kernels, and nothing that needs torch or a GPU at import.

Glossary, used by every kernel here. All buffers are contiguous in the order given.

=============  ==================  ==========================================================================
name           shape               meaning
=============  ==================  ==========================================================================
T, B, H, R                         time steps, batch rows, hidden units, independent recurrences of one launch
N                                  data rows: T*B when padded, sum(lengths) when packed
row(t, b)                          padded: t*row_stride_t + b*row_stride_b; packed: starts[t] + b
step s                             0 .. T-1 in the order of processing; t = s, or lengths[b]-1-s in reverse
reverse                            r runs backwards in time when DIRECTIONS == 2 and r is odd, or when
                                   DIRECTIONS == -1
gates_ptr      (N, R, 4, H)        in: x @ W_ih^T + biases; out (SAVE): activated i, f, g, o, in torch's order
w_hh_ptr       (R, 4, H, H)        recurrent weights, output unit before input unit
h_ptr          (N, R, H)           hidden state after each step: the layer's output
c_ptr          (N, R, H)           cell state after each step, kept for the backward pass (SAVE)
h0_ptr c0_ptr  (R, B, H)           initial hidden and cell state
hn_ptr         (R, B, H)           hidden state after each row's last step
cn_ptr         (R, B, H)           running cell state, in the accumulator's dtype; c_n after the last step
lengths_ptr    (B,)  int64         steps of each row, 0 .. T (LENGTHS)
starts_ptr     (T,)  int64         first data row of each time step (PACKED)
resets_ptr     (N,)  uint8         not 0 at row(t, b): no state and no gradient passes between t-1 and t (RESETS)
dy_ptr         (N, R, H)           gradient by h_ptr
dhn_ptr        (R, B, H)           gradient by hn_ptr
dc_ptr         (R, B, H)           running gradient by the cell state, in the accumulator's dtype: in, dc_n;
                                   out, dc_0
dgates_ptr     (N, R, 4, H)        gradient by the pre-activations
h_prev_ptr     (N, R, H)           out: hidden state before each step, the other factor of dW_hh
arrived_ptr    (R, tiles, 16)      int64, zero at the start: arrivals at the barrier of each batch tile (PERSISTENT)
=============  ==================  ==========================================================================

A program owns BLOCK_H hidden units, of all four gates, for ROWS batch rows of one recurrence, in tiles of BLOCK_B rows.

One body serves two schedules. With a launch for each time step (last = first + 1) a program reads its part of the state
before the step and writes that after it. With one launch for the sequence (PERSISTENT) it keeps its weights and its cell
state on chip, and passes the hidden state (backwards: dgates) to the others of its batch tile and recurrence through h_ptr
(dgates_ptr), with a barrier among them in each step. A step is, in this order: wait until all have published the state
before; multiply it with the weights; the cell; publish; arrive; then what nobody waits for: saving for the backward pass,
and loading what the next step needs. Programs that have all units (BLOCK_H >= H) exchange nothing and do not wait.
"""

if __name__ != "fused_lstm.kernels":
    raise ImportError(f"this package is fused_lstm.kernels, and was imported as {__name__!r}: import it through fused_lstm")
