"""Lengths and resets for an LSTM that knows only plain sequences: torch's fused one.

Two columns are appended to the input and to W_ih, with weights so large that a 1 in them decides every gate: one makes a
step hold the cell and show nothing (padding), the other makes it clear the state (a reset, on a step put in between). The
fused kernel then serves ragged batches at the speed of padded ones, and its own backward pass is exact: shut gates have a
derivative of zero. What no gate can stop is a NaN: zero times NaN is NaN, so one in the state outlives a reset here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Measured costs, for H from 64 to 640, in units of the time that one row adds to one step: of a step, whatever its rows; of
# a call, CALL_COST + CALL_COST_TIMES_H / H; of cutting a layout into blocks, CUT_COST_TIMES_H / H.
STEP_COST = 4
CALL_COST, CALL_COST_TIMES_H, CUT_COST_TIMES_H = 40, 28_000, 40_000


class Unfolding:
    """How one direction of ragged sequences is laid out for an LSTM that knows only plain ones.

    Each row is laid out in the order of processing, with one more step in front of each reset, on which the state is
    cleared; what remains at the end of the ``steps`` steps is padding, on which the cell holds. With lengths alone, forward,
    all stays where it is. On a CPU, for a layer of H hidden units, the layout is cut into blocks where that pays: each goes
    on with those rows only that have not ended, the longest first.
    """

    def __init__(
        self, T: int, B: int, lengths: Tensor | None, resets: Tensor | None, backwards: bool, H: int | None = None
    ) -> None:
        device = (resets if lengths is None else lengths).device
        t = torch.arange(T, device=device)[:, None]
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths
        valid = t < lengths
        over = ~valid
        self.past = Rest(over.flatten())
        # Rows whose hx is not to be seen, since an episode begins at their first step; (B, 1), None if there are none.
        self.begins = None if resets is None or backwards else (resets[0] & valid[0])[:, None]
        self.empty = (lengths == 0)[:, None]
        self.rows = torch.arange(B, device=device)
        # Where each row's last step lies, t*B + b.
        self.last = self.rows if backwards else (lengths - 1).clamp(min=0) * B + self.rows
        self.shape, self.steps = (T, B), T
        position = None  # where it is t
        if backwards:
            position = torch.where(valid, lengths - 1 - t, t)  # in the order of processing
        ends, flags = lengths, None
        if resets is not None:
            # Between t-1 and t: before step t forwards; backwards before t-1, and so not for t = 0.
            resets = resets & valid
            self.steps = T + int(resets.sum(0).max()) if B else T  # as many in either direction
            if backwards:
                resets = torch.cat((resets[1:], torch.zeros_like(resets[:1])))
            total = resets.sum(0)
            before = resets.flip(0).cumsum(0).flip(0) if backwards else resets.cumsum(0)
            position = (t if position is None else position) + torch.where(valid, before, total)
            flags = torch.zeros(self.steps, B, dtype=torch.bool, device=device)
            flags[(position - 1)[resets], self.rows.expand(T, B)[resets]] = True
            ends = ends + total
        self.resets = flags is not None
        marks = [0, self.steps] if H is None or device.type != "cpu" else cuts(ends, self.steps, H)
        # Rows in the order of their ends, the longest first, and the place of each in it; None where they stay in theirs.
        self.order = self.ranks = None
        if marks != [0, self.steps]:
            self.order = ends.argsort(descending=True, stable=True)
            self.ranks = self.order.argsort()
        if position is None and self.order is None:  # all stays where it is
            self.blocks, self.inverse = [Block((T, B), slice(None), self.past, [over])], None
        else:
            self._lay_out(marks, position, ends, flags)

    def _lay_out(self, marks: list[int], position: Tensor | None, ends: Tensor, flags: Tensor | None) -> None:
        """The blocks between marks, and in ``inverse`` where in them, one behind the other, each t*B + b is."""
        (T, B), steps = self.shape, self.steps
        order = rows = self.rows
        if self.order is not None:
            order, rows = self.order, self.ranks
            ends, flags = ends[order], None if flags is None else flags[:, order]
        step = torch.arange(steps, device=ends.device)[:, None]
        padding = step >= ends
        blank = padding if flags is None else padding | flags
        # Whose data a step of the layout holds, as t*B + b, whatever where it is blank.
        if position is None:
            times = step * B + order
        else:
            times = torch.zeros(steps, B, dtype=torch.long, device=ends.device)
            times[position, rows] = torch.arange(T * B, device=ends.device).view(T, B)
        cells = torch.zeros_like(times)
        self.blocks, taken = [], 0
        for first, end in pairwise(marks):
            n = B if first == 0 else int((ends > first).sum())  # only a CPU has further blocks: no sync
            part = slice(first, end), slice(n)
            columns = [mask[part] for mask in (padding, flags) if mask is not None]
            self.blocks.append(Block((end - first, n), times[part].flatten(), Rest(blank[part].flatten()), columns))
            cells[part] = torch.arange(taken, taken + (end - first) * n, device=ends.device).view(end - first, n)
            taken += (end - first) * n
        self.inverse = (cells[:, rows] if position is None else cells[position, rows]).flatten()

    def lay_out(self, x: Tensor) -> list[Tensor]:
        """x (T, B, I) with its control columns, of each block; what x holds past a row's length does not matter."""
        x = x.flatten(0, -2)
        return [block.with_columns(x) for block in self.blocks]

    def spread(self, y: Tensor, last: Tensor | None = None) -> list[Tensor]:
        """y (T, B, H) as it is laid out, of each block, and zero in what is put in between; ``last`` (B, H) is added to the
        last step of each row."""
        y = y.reshape(-1, y.shape[-1])
        if last is not None:
            y = y.index_put((self.last,), last, accumulate=True)
        return [block.of(y) for block in self.blocks]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`spread` undoes: the steps of time 0..T-1, (T, B, H), zero past a row's length. Shares no memory."""
        parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        y = torch.cat(parts) if len(parts) > 1 or self.inverse is None else parts[0]
        if self.inverse is not None:
            y = y.index_select(0, self.inverse)
        if self.past is not None:
            self.past.clear_(y)
        # No view for autograd, which would forbid users to change in place what a Function returns.
        return torch.ops.aten._unsafe_view(y, (*self.shape, y.shape[-1]))

    def sorted(self, state: Tensor) -> Tensor:
        """A state (B, ...) in the order of the blocks' rows."""
        return state if self.order is None else state.index_select(0, self.order)

    def unsorted(self, state: Tensor) -> Tensor:
        return state if self.ranks is None else state.index_select(0, self.ranks)

    def take_back(self, parts: Sequence[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
        """Output of each step (T, B, H) and of each row's last (B, H), from the blocks' outputs and the last block's c."""
        (y, *more) = parts
        if y.requires_grad:
            return TakeBack.apply(self, *parts)
        # Zero past a row's length as it is, since the output gate is shut; unless a NaN got in, which the cell then holds.
        if more or self.inverse is not None or y.device.type != "cpu" or c.isnan().any():
            y = self.gather(parts)
        return y.view(*self.shape, y.shape[-1]), y.view(-1, y.shape[-1])[self.last]


class PackedUnfolding(Unfolding):
    """The same for packed data (N, I), whose rows go from the longest to the shortest.

    A block in which no row ends is plain data without control columns, and forward not even a copy.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device, backwards: bool, H: int | None = None) -> None:
        sizes = batch_sizes.tolist()
        N, T, rows = sum(sizes), len(sizes), torch.arange(sizes[0], device="cpu")
        starts = batch_sizes.cumsum(0) - batch_sizes  # of each time, in the data
        lengths = torch.searchsorted(-batch_sizes, -rows)  # how many times have a row more than these
        self.shape, self.resets = (N,), False
        self.past = self.begins = self.empty = self.order = self.ranks = self.inverse = None
        self.last = (rows if backwards else starts[lengths - 1] + rows).to(device, non_blocking=True)
        self.blocks, taken = [], 0
        inverse = batch_sizes.new_empty(N + 1)  # the last for padding
        marks = [0, T] if H is None or device.type != "cpu" else cuts(lengths, T, H, packed=True)
        for first, end in pairwise(marks):
            n, blank, columns = sizes[first], None, []
            size, whole = n * (end - first), n == sizes[end - 1]
            if whole and not backwards:
                source = slice(int(starts[first]), int(starts[first]) + size)
                inverse[source] = torch.arange(taken, taken + size, device="cpu")
            else:
                self.inverse = inverse  # else the blocks, one behind the other, are the data
                step, ends = torch.arange(first, end, device="cpu")[:, None], lengths[:n]
                padding = step >= ends
                source = torch.where(padding, N, starts[ends - 1 - step if backwards else step] + rows[:n]).flatten()
                inverse[source] = torch.arange(taken, taken + size, device="cpu")
                source = source.clamp(max=N - 1).to(device, non_blocking=True)
                if not whole:
                    padding = padding.to(device, non_blocking=True)
                    blank, columns = Rest(padding.flatten()), [padding]
            self.blocks.append(Block((end - first, n), source, blank, columns))
            taken += size
        if self.inverse is not None:
            self.inverse = inverse[:N].to(device, non_blocking=True)


def cuts(ends: Tensor, steps: int, H: int, packed: bool = False) -> list[int]:
    """The steps at which to go on with the longer rows only, from 0 to the last, so that rows that end at ``ends`` (B,) take
    the least time; [0, steps] if cutting does not pay. ``packed``: and so that no block has more padding than data."""
    B, call, once = len(ends), CALL_COST + CALL_COST_TIMES_H // H, CUT_COST_TIMES_H // H
    enough = math.inf if packed else 0.95 * (call + steps * (B + STEP_COST)) - once
    last = int(ends.max()) if B else 0
    # In one call up to the last end, or in two or more: less they cannot cost.
    if last == 0 or min(call + last * (B + STEP_COST), 2 * call + int(ends.sum()) + last * STEP_COST) > enough:
        return [0, steps]
    ordered = ends.sort().values
    n = min(16, max(9, B // 8))  # ends of so many rows, the last among them: more would take longer to choose from
    ranks = [(k * B - 1) // n for k in range(1, n + 1)]
    if packed:  # and those after which half of the rows are left, a quarter, ...: else padding could be more than data
        ranks += [B - 1 - (B >> k) for k in range(1, B.bit_length())]
    marks = sorted({0, *ordered[ranks].tolist()})
    if packed:  # how many steps before each mark hold data
        filled = ordered.clamp(max=torch.tensor(marks, device=ends.device)[:, None]).sum(1).tolist()
    ordered = ordered.tolist()
    longer = [B, *(B - bisect_right(ordered, mark) for mark in marks[1:])]  # at first all, also those without a step
    best = [(0, 0)]  # the least cost up to each mark, and the mark before it
    for j in range(1, len(marks)):
        best.append(
            min(
                (best[i][0] + call + (marks[j] - marks[i]) * (longer[i] + STEP_COST), i)
                for i in range(j)
                if not packed or longer[i] * (marks[j] - marks[i]) <= 2 * (filled[j] - filled[i])
            )
        )
    if best[-1][0] > enough:
        return [0, steps]
    path = [len(marks) - 1]
    while path[-1]:
        path.append(best[path[-1]][1])
    return [marks[j] for j in reversed(path)]


class Rest:
    """The data rows that hold no step, where ``mask`` (N,) is True."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[:, None]
        # On a CPU the indices of these rows are cheap to find, and to fill few rows by index is several times faster than
        # masked_fill, which decides for every element.
        self.index = mask.nonzero()[:, 0] if mask.device.type == "cpu" else None

    def clear_(self, data: Tensor) -> Tensor:
        """Put zero in these rows of data (N, features)."""
        return data.masked_fill_(self.mask, 0) if self.index is None else data.index_fill_(0, self.index, 0)


@dataclass
class Block:
    """Some steps of a layout, of some of its rows."""

    shape: tuple[int, int]  # steps, rows
    source: slice | Tensor  # (steps*rows,) the data rows that they hold
    blank: Rest | None = None  # None, and then there are no columns: all hold data
    columns: Sequence[Tensor] = ()  # the control columns, (steps, rows) each

    def of(self, y: Tensor) -> Tensor:
        """Of data (N, features), in memory of its own unless all of the block are its rows, one behind the other."""
        y = y[self.source] if isinstance(self.source, slice) else y.index_select(0, self.source)
        if self.blank is not None:
            y = self.blank.clear_(y.clone() if isinstance(self.source, slice) else y)
        return y.view(*self.shape, y.shape[-1])

    def with_columns(self, x: Tensor) -> Tensor:
        if self.blank is None:
            return self.of(x)
        I = x.shape[-1]  # noqa: E741
        laid_out = x.new_empty(*self.shape, I + len(self.columns))
        flat = laid_out.flatten(0, 1)
        if isinstance(self.source, slice):
            flat[:, :I] = x[self.source]
        else:
            torch.index_select(x, 0, self.source, out=flat[:, :I])
        self.blank.clear_(flat)
        for k, column in enumerate(self.columns):
            laid_out[..., I + k] = column
        return laid_out


class LayOut(torch.autograd.Function):
    """:meth:`Unfolding.lay_out` with a gradient."""

    @staticmethod
    def forward(ctx: Any, layout: Unfolding, x: Tensor) -> tuple[Tensor, ...]:
        ctx.layout, ctx.features = layout, x.shape[-1]
        return tuple(layout.lay_out(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.layout.gather([g[..., : ctx.features] for g in grads])


class TakeBack(torch.autograd.Function):
    """:meth:`Unfolding.gather` and the output (B, H) of each row's last step, with a gradient."""

    @staticmethod
    def forward(ctx: Any, layout: Unfolding, *parts: Tensor) -> tuple[Tensor, Tensor]:
        y = layout.gather(parts)
        ctx.layout, ctx.features = layout, y.shape[-1]
        ctx.set_materialize_grads(False)
        return y, y.flatten(0, -2)[layout.last]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        if dy is None and dh is None:
            return None, *[None] * len(layout.blocks)
        if dy is None:
            dy = dh.new_zeros(*layout.shape, ctx.features)
        return None, *layout.spread(dy, dh)


def control_weights(w_ih: Tensor, resets: bool) -> Tensor:
    """w_ih (4H, I) with the weights of the control columns: gates so far open or shut that nothing else matters.

    On padding the forget gate is open, input and output gate are shut: the cell holds, the output is zero. On a clearing
    step all three are shut: cell and output are zero, and with them all that the next step sees.
    """
    H = w_ih.shape[0] // 4
    shut = w_ih.new_full((H,), -min(1e20, torch.finfo(w_ih.dtype).max / 2))
    zero = torch.zeros_like(shut)
    columns = [torch.cat((shut, -shut, zero, shut))]
    if resets:
        columns.append(torch.cat((shut, shut, zero, shut)))
    return torch.cat((w_ih, torch.stack(columns, 1)), 1)


class ControlWeights(torch.autograd.Function):
    """:func:`control_weights` with a gradient, which is dense: that of its last step, torch.cat, would be a view."""

    @staticmethod
    def forward(ctx: Any, w_ih: Tensor, resets: bool) -> Tensor:
        ctx.features = w_ih.shape[1]
        return control_weights(w_ih, resets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, : ctx.features].contiguous(), None
