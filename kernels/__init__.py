"""Device code of fused_lstm: Triton kernels, and nothing that needs torch or a GPU at import.

Glossary, used by every kernel here. All buffers are contiguous in the order given.

=============  ==================  ==========================================================================
name           shape               meaning
=============  ==================  ==========================================================================
T, B, H, R                         time steps, batch rows, hidden units, independent recurrences of one launch
N                                  data rows: T*B when padded, sum(lengths) when packed
row(t, b)                          padded: t*row_stride_t + b*row_stride_b; packed: starts[t] + b
step s                             0 .. T-1 in the order of processing; t = s, or lengths[b]-1-s in reverse
reverse                            r runs backwards in time when DIRECTIONS is 2 and r is odd, or when it is -1
lengths_ptr    (B,)  int64         steps of each row, 0 .. T
starts_ptr     (T,)  int64         first data row of each time step, of packed data
resets_ptr     (N,)  uint8         not 0 at row(t, b): no state and no gradient passes between t-1 and t
gates_ptr      (N, R, 4, H)        in: x @ W_ih^T + b_ih; out, if c_ptr is given: activated, in torch's order
w_hh_ptr       (R, 4, H, H)        recurrent weights, output unit before input unit
h_ptr c_ptr    (N, R, H)           hidden and cell state after each step; h is the layer's output
=============  ==================  ==========================================================================

buffers.py lists all buffers of the two passes. The schedules share them, the row map (rows.py) and the cell (cell.py):

- stepwise.py: one launch for each time step;
- relatives.py: with norms, a GEMM and a launch for each time step;
- fragments.py, persistent_*.py: one launch for the sequence (or for some of its recurrences at a time), in Gluon.
"""

if __name__ != "fused_lstm.kernels":
    raise ImportError(f"this package is fused_lstm.kernels, and was imported as {__name__!r}: import it through fused_lstm")
