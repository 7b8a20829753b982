"""Where a step finds its data: the row map that serves padded, packed and time-reversed sequences alike."""

import triton
import triton.language as tl


@triton.jit
def runs_backwards(r, DIRECTIONS: tl.constexpr):
    """Whether recurrence r processes time from its end."""
    if DIRECTIONS == 2:
        result = r % 2 == 1
    else:
        result = r * 0 != DIRECTIONS - 1  # DIRECTIONS is 1 (never) or -1 (always); a tensor, as above
    return result


@triton.jit
def row_lengths(offs_b, mask_b, T, lengths_ptr, LENGTHS: tl.constexpr):
    """Number of steps of each batch row, int64; 0 outside the batch."""
    if LENGTHS:
        lengths = tl.load(lengths_ptr + offs_b, mask=mask_b, other=0)
    else:
        lengths = tl.where(mask_b, T, 0).to(tl.int64)
    return lengths


@triton.jit
def data_rows(s, offs_b, lengths, backwards, starts_ptr, row_stride_t, row_stride_b, PACKED: tl.constexpr):
    """Data row of step s for each batch row, int64. Meaningless, but in range of int64, where s is not a step of the row."""
    t = tl.where(backwards, lengths - 1 - s, s)
    if PACKED:
        rows = tl.load(starts_ptr + t, mask=(t >= 0) & (t < lengths), other=0) + offs_b
    else:
        rows = t * row_stride_t + offs_b.to(tl.int64) * row_stride_b
    return rows


@triton.jit
def kept(s, rows, prev_rows, mask, lengths, backwards, resets_ptr, RESETS: tl.constexpr):
    """Which batch rows take over the state of the step before s, of those in mask."""
    if RESETS:
        # Between t-1 and t lies the reset of t: of this step forwards, of the step before it backwards in time.
        at = tl.where(backwards, prev_rows, rows)
        boundary = mask & (tl.where(backwards, lengths - s, s) < lengths)  # not before the first step backwards in time
        mask = mask & (tl.load(resets_ptr + at, mask=boundary, other=0) == 0)
    return mask
