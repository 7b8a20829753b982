"""Where a layer's sequences lie in memory: the host's side of the kernels' row map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Maps (step s, batch row b) to a data row of flat (N, ...) buffers.

    Padded data has T*B rows, time-major or batch-major. Packed data, in the order of
    :class:`torch.nn.utils.rnn.PackedSequence`, has sum(lengths) rows. Recurrence r runs backwards in time when
    ``directions == 2`` and r is odd, or when ``directions == -1``; it then starts at each row's last valid step.
    """

    T: int
    B: int
    batch_first: bool
    directions: int
    lengths: Tensor | None  # (B,) int64, on the data's device
    batch_sizes: Tensor | None  # (T,) int64, on the CPU; packed data only
    resets: Tensor | None = None  # (N,) bool: no state and no gradient passes between this row's time and the one before

    @staticmethod
    def of(
        x: Tensor,
        c0: Tensor,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        directions: int,
        batch_first: bool,
    ) -> Rows:
        if batch_sizes is not None:
            T = batch_sizes.shape[0]
            lengths = (batch_sizes[:, None] > torch.arange(c0.shape[1])).sum(0).to(x.device, non_blocking=True)
        else:
            T = x.shape[1 if batch_first else 0]
        resets = None if resets is None else resets.flatten()
        return Rows(T, c0.shape[1], batch_first, directions, lengths, batch_sizes, resets)

    @property
    def stride_t(self) -> int:
        return 1 if self.batch_first else self.B

    @property
    def stride_b(self) -> int:
        return self.T if self.batch_first else 1

    def starts(self) -> Tensor | None:
        """First data row of each time step, (T,) int64 on the data's device; None when padded."""
        if self.batch_sizes is None:
            return None
        assert self.lengths is not None
        return (self.batch_sizes.cumsum(0) - self.batch_sizes).to(self.lengths.device, non_blocking=True)

    def backwards(self, r: int) -> bool:
        return self.directions == -1 or (self.directions == 2 and r % 2 == 1)

    def in_step(self, R: int) -> list[slice]:
        """The recurrences, in groups that run in the same direction of time."""
        return [slice(d, None, 2) for d in range(min(R, 2))] if self.directions == 2 else [slice(0, None)]

    def active(self, s: int) -> int:
        """How many batch rows, counted from the first, may have a step s."""
        return self.B if self.batch_sizes is None else int(self.batch_sizes[s])

    def valid(self, s: int) -> Tensor | None:
        """(B, 1) bool: which of the active batch rows have a step s; None if all."""
        return None if self.lengths is None or self.batch_sizes is not None else (s < self.lengths)[:, None]

    def kept(self, s: int, r: int) -> Tensor | None:
        """(n, 1) bool: which of the active batch rows take over the state of the step before s; None if all."""
        if self.resets is None or (s == 0 and self.backwards(r)):
            return None
        # Between t-1 and t lies the reset of t: of this step forwards, of the step before it backwards in time.
        return ~self.resets[self.at(s - 1, r, self.active(s)) if self.backwards(r) else self.at(s, r)][:, None]

    def at(self, s: int, r: int, n: int | None = None) -> slice | Tensor:
        """Data rows of step s for the first n batch rows (all active ones by default), as an index.

        A padded row that has no step s is given its padding position s: in range, and no other row's.
        """
        n = self.active(s) if n is None else n
        if self.lengths is None:
            t = self.T - 1 - s if self.backwards(r) else s
            first = t * self.stride_t
            return slice(first, first + n) if not self.batch_first else slice(first, None, self.T)
        if not self.backwards(r):
            if self.batch_sizes is not None:
                first = int(self.batch_sizes[:s].sum())
                return slice(first, first + n)
            first = s * self.stride_t
            return slice(first, first + n) if not self.batch_first else slice(first, None, self.T)
        lengths = self.lengths[:n]
        t = torch.where(s < lengths, lengths - 1 - s, s)
        b = torch.arange(n, device=lengths.device)
        starts = self.starts()
        return t * self.stride_t + b * self.stride_b if starts is None else starts[t] + b

    def previous(self, states: Tensor, first: Tensor | None, r: int) -> Tensor:
        """(N, H): the state before each data row's step, of ``states`` (N, R, H) with the ones after it.

        ``first`` (B, H), or zero if None, before step 0; zero where a reset lies between, and past a row's length.
        """
        N, back = states.shape[0], self.backwards(r)
        t, b = self.times_and_batch_rows(N, states.device)
        end = self.T if self.lengths is None else self.lengths[b]
        starts = self.starts()
        before = t + 1 if back else t - 1  # the time of the step before; in range but at step 0
        before = before * self.stride_t + b * self.stride_b if starts is None else starts[before.clamp(0, self.T - 1)] + b
        before = before.clamp(0, max(N - 1, 0))
        result = states[:, r].index_select(0, before)
        result[self.at(0, r)] = result.new_zeros(()) if first is None else first
        if self.resets is not None:  # as in kept()
            cut = self.resets[before] & (t + 1 < end) if back else self.resets
            result.masked_fill_(cut[:, None], 0)
        self.clear_padding(result)
        return result

    def times_and_batch_rows(self, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Time and batch row of each of the N data rows, both (N,) int64."""
        row = torch.arange(N, device=device)
        if self.batch_sizes is not None:
            t = torch.arange(self.T).repeat_interleave(self.batch_sizes).to(device, non_blocking=True)
            starts = self.starts()
            assert starts is not None
            return t, row - starts[t]
        if self.batch_first:
            return row % self.T, row // self.T
        return row // max(self.B, 1), row % max(self.B, 1)

    def clear_padding(self, data: Tensor) -> None:
        """Put zero past each row's length, in data (N, ...)."""
        if self.lengths is not None and self.batch_sizes is None:
            t, b = self.times_and_batch_rows(data.shape[0], data.device)
            data.masked_fill_((t >= self.lengths[b]).view(-1, *[1] * (data.dim() - 1)), 0)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in, and keep the running cell state in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
