"""Training with less memory on torch's own LSTM: the backward pass runs the layer again, segment by segment of time.

The forward pass keeps, of each direction of a layer, its input and the states between segments. The backward pass goes
through the segments from the last to the first, runs each again and differentiates it. With segments of about sqrt(T) steps
(Chen et al. 2016, https://arxiv.org/abs/1604.06174) all that is alive at once is small beside the layer's input and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..call import PLAIN, Result, Sequences, Stack, States, accumulator_dtype, no_autocast
from ..plan import segment_steps
from .aten import by_direction, controlled, fused, gradients, time_first
from .ragged import PackedUnfolding, Unfolding


@dataclass(frozen=True)
class SegmentedDirection:
    """One direction of a layer, over data whose first dimension is time, (T, B, ...), or that is packed, (N, ...)."""

    T: int
    backwards: bool
    sequences: Sequences  # resets (T, B)

    def __call__(self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], one: Stack) -> Result:
        return Recomputed.apply(self, one, x, h, c, *weights)

    def segments(self) -> list[tuple[int, int]]:
        """First time and end of each segment, in the order of processing."""
        n = segment_steps(self.T)
        times = [(t, min(t + n, self.T)) for t in range(0, self.T, n)]
        return times[::-1] if self.backwards else times

    def rows(self, first: int, end: int) -> slice:
        """Where the data of first <= t < end lies."""
        sizes = self.sequences.batch_sizes
        return slice(first, end) if sizes is None else slice(int(sizes[:first].sum()), int(sizes[:end].sum()))

    def run(
        self, first: int, end: int, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], one: Stack
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The steps of first <= t < end, of which x is the data, from states (B, ...) to y and new states."""
        sizes, lengths, resets = self.sequences.batch_sizes, self.sequences.lengths, self.sequences.resets
        if sizes is not None:
            n = int(sizes[first])  # the rows that have a step here; the others keep their states
            layout = PackedUnfolding(sizes[first:end], x.device, self.backwards, c.shape[-1])
            y, h_n, c_n = controlled(layout, x, h[:n], c[:n], weights, one)
            return y, torch.cat((h_n, h[n:])), torch.cat((c_n, c[n:]))
        if lengths is None and resets is None:
            y, h, c = fused(x.flip(0) if self.backwards else x, (h[None], c[None]), weights, one, PLAIN)
            return y.flip(0) if self.backwards else y, h[0], c[0]
        steps = None if lengths is None else (lengths - first).clamp(0, end - first)
        resets_here = None if resets is None else resets[first:end]
        layout = Unfolding(*x.shape[:2], steps, resets_here, self.backwards, c.shape[-1])
        y, h, c = controlled(layout, x, h, c, weights, one)
        if self.backwards and resets is not None and first > 0:  # a reset between this segment and the next to be processed
            cut = (resets[first] if lengths is None else resets[first] & (first < lengths))[:, None]
            h, c = torch.where(cut, 0, h), torch.where(cut, 0, c)
        return y, h, c


class Recomputed(torch.autograd.Function):
    """A :class:`SegmentedDirection` from its first step to its last, with a gradient that is computed segment by segment."""

    @staticmethod
    def forward(
        ctx: Any, direction: SegmentedDirection, one: Stack, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor
    ) -> Result:
        y = x.new_empty(*x.shape[:-1], h.shape[-1])
        states = []
        for first, end in direction.segments():
            rows = direction.rows(first, end)
            states += [h, c]
            y[rows], h, c = direction.run(first, end, x[rows], h, c, weights, one)
        ctx.direction, ctx.one, ctx.n_states = replace(direction, sequences=PLAIN), one, len(states)
        ctx.set_materialize_grads(False)
        # What says how the sequences lie, too: so that torch raises where somebody changed it before it is read again.
        ctx.save_for_backward(*direction.sequences[:3], x, *states, *weights)
        return y, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        one, needs = ctx.one, ctx.needs_input_grad[2:]
        batch_sizes, lengths, resets, x, *saved = ctx.saved_tensors
        direction = replace(ctx.direction, sequences=Sequences(batch_sizes, lengths, resets))
        states, weights = saved[: ctx.n_states], saved[ctx.n_states :]
        with no_autocast(x):
            if torch.is_grad_enabled():
                # To be differentiated again: all steps at once, on a graph that stays. By views, so that what lies behind
                # an input (x behind h0, say) is not differentiated here.
                given = [t.view_as(t) for t in (x, *states[:2], *weights)]
                return None, None, *_gradients(direction, one, 0, direction.T, given, needs, grads)
            return None, None, *_in_segments(direction, one, x, states, weights, needs, grads)


def _in_segments(
    direction: SegmentedDirection,
    one: Stack,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by x, h0, c0 and the weights, from those by y, h_n and c_n, with the graph of one segment at a time."""
    needs = [needs[0], True, True, *needs[3:]]  # the states hand the gradient from segment to segment
    dy, dh, dc = grads
    # dx and totals are allocated when the first part's gradients are there, and from these: under is_grads_batched vmap has
    # mapped them, and they can only be written to tensors that are mapped as well.
    dx: Tensor | None = None
    totals: list[Tensor | None] = [None] * len(weights)
    for (first, end), h, c in reversed(list(zip(direction.segments(), states[::2], states[1::2], strict=True))):
        rows = direction.rows(first, end)
        given = [t.detach().requires_grad_(need) for t, need in zip((x[rows], h, c, *weights), needs, strict=True)]
        dy_part = None if dy is None else dy[rows]
        dx_part, dh, dc, *parts = _gradients(direction, one, first, end, given, needs, (dy_part, dh, dc))
        if dx_part is not None:
            dx = dx_part.new_empty(x.shape) if dx is None else dx
            dx[rows] = dx_part
        for k, part in enumerate(parts):
            if part is not None:  # added up in fp32 where the parts are of less
                total = totals[k]
                totals[k] = part.to(accumulator_dtype(part.dtype), copy=True) if total is None else total.add_(part)
        del given, dx_part, part, parts  # before the next segment takes as much
    return [dx, dh, dc, *(t if t is None else t.to(w.dtype) for t, w in zip(totals, weights, strict=True))]


def _gradients(
    direction: SegmentedDirection,
    one: Stack,
    first: int,
    end: int,
    given: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients by those of x, h, c and the weights that need one, over the steps of first <= t < end."""
    create_graph = torch.is_grad_enabled()
    x, h, c, *weights = given
    with torch.enable_grad():
        results = direction.run(first, end, x, h, c, weights, one)
    return gradients(results, grads, given, needs, create_graph=create_graph, materialize_grads=True)


@time_first
def segmented(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """The stack on torch's own LSTM, to be trained segment by segment."""
    T = x.shape[0] if sequences.batch_sizes is None else sequences.batch_sizes.shape[0]
    runs = [SegmentedDirection(T, d == 1, sequences) for d in range(stack.directions)]
    return by_direction(runs, x, hx, weights, stack)
