"""Lengths and resets for an LSTM that knows only plain sequences: torch's fused one.

Two columns are appended to the input and to W_ih, with weights so large that a 1 in them decides every gate: one makes a
step hold the cell and show nothing (padding), the other makes it clear the state (a reset, on a step put in between). The
fused kernel then serves ragged batches at the speed of padded ones, and its own backward pass is exact: shut gates have a
derivative of zero. What no gate can stop is a NaN: zero times NaN is NaN, so one in the state outlives a reset here.
"""

from __future__ import annotations

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
        self.T, self.B = T, B
        t = torch.arange(T, device=device)[:, None]
        lengths = torch.full((B,), T, device=device) if lengths is None else lengths
        valid = t < lengths
        over = ~valid
        self.past = Rest(over.flatten())
        # Rows whose hx is not to be seen, since an episode begins at their first step; (B, 1), None if there are none.
        self.begins = None if resets is None or backwards else (resets[0] & valid[0])[:, None]
        self.empty = (lengths == 0)[:, None]
        self.rows = torch.arange(B, device=device)
        self.last = torch.zeros_like(lengths) if backwards else (lengths - 1).clamp(min=0)  # time of each row's last step
        self.steps = T
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
            self.blocks, self.inverse = [Block((T, B), None, self.past, [over])], None
        else:
            self._lay_out(marks, position, ends, flags)

    def _lay_out(self, marks: list[int], position: Tensor | None, ends: Tensor, flags: Tensor | None) -> None:
        """The blocks between marks, and in ``inverse`` where in them, one behind the other, each t*B + b is."""
        T, B, steps = self.T, self.B, self.steps
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
        return [block.with_columns(x) for block in self.blocks]

    def spread(self, y: Tensor) -> list[Tensor]:
        """y (T, B, H) as it is laid out, of each block, and zero in what is put in between."""
        return [block.of(y) for block in self.blocks]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`spread` undoes: the steps of time 0..T-1, (T, B, H), zero past a row's length."""
        parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
        y = self.past.cleared(y) if self.inverse is None else self.past.clear_(y.index_select(0, self.inverse))
        return y.view(self.T, self.B, y.shape[-1])

    def sorted(self, state: Tensor) -> Tensor:
        """A state (B, ...) in the order of the blocks' rows."""
        return state if self.order is None else state.index_select(0, self.order)

    def unsorted(self, state: Tensor) -> Tensor:
        return state if self.ranks is None else state.index_select(0, self.ranks)

    def take_back(self, parts: Sequence[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
        """Output of each step (T, B, H) and of each row's last (B, H), from the blocks' outputs and the last block's c."""
        (y, *more) = parts
        if more or self.inverse is not None or y.requires_grad or y.device.type != "cpu" or c.isnan().any():
            return TakeBack.apply(self, *parts)
        # Zero past a row's length as it is, since the output gate is shut; unless a NaN got in, which the cell then holds.
        return y, y[self.last, self.rows]


def cuts(ends: Tensor, steps: int, H: int) -> list[int]:
    """The steps at which to go on with the longer rows only, from 0 to the last, so that rows that end at ``ends`` (B,) take
    the least time; [0, steps] if cutting does not pay."""
    B, call, once = len(ends), CALL_COST + CALL_COST_TIMES_H // H, CUT_COST_TIMES_H // H
    enough = 0.95 * (call + steps * (B + STEP_COST)) - once
    last = int(ends.max()) if B else 0
    # In one call up to the last end, or in two or more: less they cannot cost.
    if last == 0 or min(call + last * (B + STEP_COST), 2 * call + int(ends.sum()) + last * STEP_COST) > enough:
        return [0, steps]
    ordered = ends.sort().values
    n = min(16, max(9, B // 8))  # ends of so many rows, the last among them: more would take longer to choose from
    marks = sorted({0, *ordered[(torch.arange(1, n + 1, device=ends.device) * B + n - 1) // n - 1].tolist()})
    ordered = ordered.tolist()
    longer = [B, *(B - bisect_right(ordered, mark) for mark in marks[1:])]  # at first all, also those without a step
    best = [(0, 0)]  # the least cost up to each mark, and the mark before it
    for j in range(1, len(marks)):
        best.append(min((best[i][0] + call + (marks[j] - marks[i]) * (longer[i] + STEP_COST), i) for i in range(j)))
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

    def cleared(self, data: Tensor) -> Tensor:
        return data.masked_fill(self.mask, 0) if self.index is None else data.index_fill(0, self.index, 0)


@dataclass
class Block:
    """Some steps of a layout, of some of its rows."""

    shape: tuple[int, int]  # steps, rows
    source: Tensor | None  # (steps*rows,) whose data they hold, t*B + b; None: their own
    blank: Rest
    columns: list[Tensor]  # the control columns, (steps, rows) each

    def of(self, y: Tensor) -> Tensor:
        y = y.reshape(-1, y.shape[-1])
        y = self.blank.cleared(y) if self.source is None else self.blank.clear_(y.index_select(0, self.source))
        return y.view(*self.shape, y.shape[-1])

    def with_columns(self, x: Tensor) -> Tensor:
        I = x.shape[-1]  # noqa: E741
        laid_out = x.new_empty(*self.shape, I + len(self.columns))
        flat = laid_out.flatten(0, 1)
        if self.source is None:
            laid_out[..., :I] = x
        else:
            torch.index_select(x.flatten(0, 1), 0, self.source, out=flat[:, :I])
        self.blank.clear_(flat)
        for k, column in enumerate(self.columns):
            laid_out[..., I + k] = column
        return laid_out


class LayOut(torch.autograd.Function):
    """:meth:`Unfolding.lay_out` with a gradient."""

    @staticmethod
    def forward(layout: Unfolding, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layout.lay_out(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.layout, x = inputs
        ctx.features = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.layout.gather([g[..., : ctx.features] for g in grads])


class TakeBack(torch.autograd.Function):
    """:meth:`Unfolding.gather` and the output (B, H) of each row's last step, with a gradient."""

    @staticmethod
    def forward(layout: Unfolding, *parts: Tensor) -> tuple[Tensor, Tensor]:
        y = layout.gather(parts)
        return y, y[layout.last, layout.rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.layout = inputs[0]
        ctx.features = output[0].shape[-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        layout = ctx.layout
        if dy is None and dh is None:
            return None, *(None for _ in layout.blocks)
        if dy is None:
            dy = dh.new_zeros(layout.T, layout.B, ctx.features)
        if dh is not None:
            dy = dy.index_put((layout.last, layout.rows), dh, accumulate=True)
        return None, *layout.spread(dy)


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
