"""Where a step finds its data: the row map that serves padded, packed and time-reversed sequences alike."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequences(NamedTuple):
    """What a launch is told of its sequences beyond T and B: pointers, None where there is nothing to tell."""

    lengths_ptr: Any  # (B,) int64
    starts_ptr: Any  # (T,) int64: the data is packed
    resets_ptr: Any  # (N,) uint8


class BatchRows(NamedTuple):
    """The batch rows of a program, and how their steps lie in memory. Without Sequences: Triton 3.6 returns no None."""

    offs_b: Any  # (BLOCK_B,)
    mask: Any  # (BLOCK_B,) which of them the batch has
    lengths: Any  # (BLOCK_B,) int64 steps of each; 0 outside the batch
    backwards: Any  # whether they run from the end of time
    row_stride_t: Any
    row_stride_b: Any


@triton.jit
def runs_backwards(r, DIRECTIONS: tl.constexpr):
    """Whether recurrence r runs from the end of time."""
    if DIRECTIONS == 2:
        backwards = r % 2 == 1
    else:
        backwards = r * 0 != DIRECTIONS - 1  # DIRECTIONS is 1 (never) or -1 (always); a tensor, as above
    return backwards


@triton.jit
def row_lengths(sequences, offs_b, mask, T):
    """Steps of each batch row, int64; 0 where not in ``mask``."""
    if sequences.lengths_ptr is None:
        lengths = tl.where(mask, T, 0).to(tl.int64)
    else:
        lengths = tl.load(sequences.lengths_ptr + offs_b, mask=mask, other=0)
    return lengths


@triton.jit
def batch_rows(sequences, offs_b, mask, r, T, row_stride_t, row_stride_b, DIRECTIONS: tl.constexpr):
    """The batch rows ``offs_b`` of recurrence r."""
    lengths = row_lengths(sequences, offs_b, mask, T)
    return BatchRows(offs_b, mask, lengths, runs_backwards(r, DIRECTIONS), row_stride_t, row_stride_b)


@triton.jit
def time_of(backwards, lengths, s):
    """At which time a row of so many steps has step s; some number where it has not, int64."""
    return tl.where(backwards, lengths - 1 - s, s)


@triton.jit
def data_rows(sequences, batch, s):
    """Data row of step s of each batch row, int64. For a batch row without a step s it is some number, to be masked."""
    t = time_of(batch.backwards, batch.lengths, s)
    if sequences.starts_ptr is None:
        rows = t * batch.row_stride_t + batch.offs_b.to(tl.int64) * batch.row_stride_b
    else:
        rows = tl.load(sequences.starts_ptr + t, mask=(t >= 0) & (t < batch.lengths), other=0) + batch.offs_b
    return rows


@triton.jit
def padding_rows(batch, s):
    """Data row of time s of each batch row, of padded data."""
    return tl.cast(s, tl.int64) * batch.row_stride_t + batch.offs_b.to(tl.int64) * batch.row_stride_b


@triton.jit
def carried(sequences, batch, s, rows, prev_rows):
    """Batch rows that carry state over from step s - 1 to step s, whose data rows are ``prev_rows`` and ``rows``; at s = 0,
    from the initial state."""
    mask = s < batch.lengths
    if sequences.resets_ptr is not None:
        # Between t-1 and t lies the reset of t: of step s forwards, of step s - 1 backwards in time. Backwards, no reset
        # lies before step 0.
        at = tl.where(batch.backwards, prev_rows, rows)
        t = tl.where(batch.backwards, batch.lengths - s, s)
        boundary = mask & (t >= 0) & (t < batch.lengths)
        mask = mask & (tl.load(sequences.resets_ptr + at, mask=boundary, other=0) == 0)
    return mask
