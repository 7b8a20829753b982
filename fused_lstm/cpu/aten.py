"""torch's own LSTM, and what serves better than it on a CPU: a cell for a single step, control columns for ragged rows.

Each way is a function (x, hx, weights, stack, sequences) to output, h_n and c_n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from ..call import PLAIN, Result, Sequences, Stack, States, each_layer
from ..gemm import linear, uses_onednn
from ..reference import cell, lstm_cell
from .ragged import ControlWeights, LayOut, PackedUnfolding, Unfolding, control_weights


def zero_states(x: Tensor, B: int, weights: Sequence[Tensor], stack: Stack) -> tuple[Tensor, Tensor]:
    """The initial states that torch's LSTM wants to be told, where none were given."""
    K = stack.num_layers * stack.directions
    n, P = weights[1].shape
    c0 = x.new_zeros(K, B, n // 4)
    return x.new_zeros(K, B, P) if n // 4 != P else c0, c0


def fused(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """torch's own LSTM."""
    packed = sequences.batch_sizes is not None
    B = int(sequences.batch_sizes[0]) if packed else x.shape[0 if stack.batch_first else 1]
    hx = hx or zero_states(x, B, weights, stack)
    if not x.is_cuda:
        return _fused(x, hx, weights, stack, sequences.batch_sizes)
    with warnings.catch_warnings():  # we keep no flat buffer of weights
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        if packed or stack.dropout > 0 or not torch.is_grad_enabled():
            return _fused(x, hx, weights, stack, sequences.batch_sizes)
        return TwiceDifferentiable.apply(stack, x, *hx, *weights)


def _fused(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None = None) -> Result:
    # The training flag is set whenever dropout acts or a gradient is needed: cuDNN keeps what its backward pass needs only
    # then, and with dropout at 0 the flag changes nothing else.
    train = stack.dropout > 0 or torch.is_grad_enabled()
    how = (stack.has_biases, stack.num_layers, stack.dropout, train, stack.bidirectional)
    if batch_sizes is not None:
        return _VF.lstm(x, batch_sizes, hx, weights, *how)
    return _VF.lstm(x, hx, weights, *how, stack.batch_first)


class TwiceDifferentiable(torch.autograd.Function):
    """torch's own LSTM without dropout, of cuDNN's, whose gradient has none of its own: y, h_n and c_n.

    Where a gradient is to be differentiated, it is taken of a loop over steps instead, which computes the results again.
    """

    @staticmethod
    def forward(ctx: Any, stack: Stack, *tensors: Tensor) -> Result:
        given = [t.detach().requires_grad_(need) for t, need in zip(tensors, ctx.needs_input_grad[1:], strict=True)]
        with torch.enable_grad():
            x, h0, c0, *weights = given
            results = _fused(x, (h0, c0), weights, stack)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.stack, ctx.graph = stack, (results, given)
        return tuple(t.detach() for t in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again, (results, given), needs = torch.is_grad_enabled(), ctx.graph, ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors  # also if not used: here torch sees that they are as they were
        if again:
            given = tensors
            x, h0, c0, *weights = given
            results = _steps(x, (h0, c0), weights, ctx.stack, PLAIN)
        return None, *gradients(results, grads, given, needs, retain_graph=True, create_graph=again, allow_unused=True)


def gradients(
    results: Sequence[Tensor], grads: Sequence[Tensor | None], given: Sequence[Tensor], needs: Sequence[bool], **how: bool
) -> list[Tensor | None]:
    """Those by ``given``, where they are needed, from those by the results that have one."""
    pairs = [(t, g) for t, g in zip(results, grads, strict=True) if g is not None]
    if not pairs:
        return [None] * len(needs)
    wanted = [t for t, need in zip(given, needs, strict=True) if need]
    found = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], **how))
    return [next(found) if need else None for need in needs]


def time_first(way: Callable[..., Result]) -> Callable[..., Result]:
    """A way for time-major data and given states, for any."""

    def run(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
        swap = stack.batch_first and sequences.batch_sizes is None
        if swap:
            x, resets = x.transpose(0, 1), sequences.resets
            sequences = sequences._replace(resets=None if resets is None else resets.t())
        B = x.shape[1] if sequences.batch_sizes is None else int(sequences.batch_sizes[0])
        hx = hx or zero_states(x, B, weights, stack)
        y, h_n, c_n = way(x, hx, weights, stack._replace(batch_first=False), sequences)
        return y.transpose(0, 1) if swap else y, h_n, c_n

    return run


@time_first
def prefix(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """torch's own LSTM over the steps that all rows have."""
    y, h_n, c_n = fused(x[: sequences.same_length], hx, weights, stack, PLAIN)
    return F.pad(y, (0, 0, 0, 0, 0, x.shape[0] - sequences.same_length)), h_n, c_n


@time_first
def stretches(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """torch's own LSTM, a call for each stretch of time without resets; resets clear the states between them."""
    outputs, (h, c) = [], hx
    for first, end in zip(sequences.starts, (*sequences.starts[1:], x.shape[0]), strict=True):
        begins = sequences.resets[first].nonzero().flatten()
        states = h.index_fill(1, begins, 0), c.index_fill(1, begins, 0)
        y, h, c = fused(x[first:end], states, weights, stack, PLAIN)
        outputs.append(y)
    return torch.cat(outputs), h, c


@time_first
def ragged(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """lengths and resets through torch's fused LSTM, by control columns (see :mod:`fused_lstm.cpu.ragged`)."""
    H, layouts = hx[1].shape[-1], []
    for backwards in (False, True)[: stack.directions]:
        if sequences.batch_sizes is not None:
            layouts.append(PackedUnfolding(sequences.batch_sizes, x.device, backwards, H))
        else:
            layouts.append(Unfolding(*x.shape[:2], sequences.lengths, sequences.resets, backwards, H))
    return by_direction([partial(controlled, layout) for layout in layouts], x, hx, weights, stack)


def controlled(layout: Unfolding, x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], one: Stack) -> Result:
    """One direction of one layer over x (T, B, I), in the layout given; h0 and c0 (B, ...)."""
    w_ih, *others = weights
    controls = None
    if any(block.columns for block in layout.blocks):
        controls = (ControlWeights.apply if w_ih.requires_grad else control_weights)(w_ih, layout.resets)
    h, c = (layout.sorted(s if layout.begins is None else torch.where(layout.begins, 0, s))[None] for s in (h0, c0))
    parts, held = [], []
    for laid_out in LayOut.apply(layout, x) if torch.is_grad_enabled() else layout.lay_out(x):
        n = laid_out.shape[1]  # the others have ended, and hold their cell state
        held.append(c[0, n:])
        w = w_ih if laid_out.shape[-1] == w_ih.shape[-1] else controls
        y, h, c = fused(laid_out, (h[:, :n], c[:, :n]), [w, *others], one, PLAIN)
        parts.append(y)
    y, h_n = layout.take_back(parts, c)
    c_n = layout.unsorted(torch.cat([c[0], *reversed(held)]))
    if layout.empty is None:
        return y, h_n, c_n
    return y, torch.where(layout.empty, h0, h_n), torch.where(layout.empty, c0, c_n)


def by_direction(
    runs: Sequence[Callable[..., Result]], x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack
) -> Result:
    """The stack, each layer by a function for each direction: (x, h, c, weights, stack of one) to y, h_n and c_n."""
    one = stack._replace(num_layers=1, dropout=0.0, bidirectional=False, batch_first=False)

    def layer(x: Tensor, hx: States, groups: Sequence[Sequence[Tensor]]) -> Result:
        found = [run(x, hx[0][d], hx[1][d], groups[d], one) for d, run in enumerate(runs)]
        y, h, c = zip(*found, strict=True)
        return torch.cat(y, -1) if len(y) > 1 else y[0], torch.stack(h), torch.stack(c)

    return each_layer(layer, x, hx, weights, stack)


@time_first
def _steps(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """The stack as a loop over cells, without dropout, which torch differentiates to any order."""

    def direction(
        order: slice, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], one: Stack
    ) -> tuple[Tensor, Tensor, Tensor]:
        ys = []
        for x_t in x.unbind(0)[order]:
            h, c = _cell(x_t, h, c, weights, one.has_biases)
            ys.append(h)
        return torch.stack(ys[order]), h, c

    runs = [partial(direction, slice(None, None, 1 - 2 * d)) for d in range(stack.directions)]
    return by_direction(runs, x, hx, weights, stack._replace(dropout=0.0))


def single_step(x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """A single time step: a cell per layer and direction."""
    x = x.squeeze(1 if stack.batch_first else 0)
    hx = hx or zero_states(x, x.shape[0], weights, stack)
    if stack.num_layers == 1 and not stack.bidirectional:
        h, c = _cell(x, hx[0].squeeze(0), hx[1].squeeze(0), weights, stack.has_biases)
        h, c = h.unsqueeze(0), c.unsqueeze(0)
        return h.transpose(0, 1).clone() if stack.batch_first else h.clone(), h, c  # which share no memory
    y, h_n, c_n = each_layer(_cells, x, hx, weights, stack, stack.has_biases)
    return y.unsqueeze(1 if stack.batch_first else 0), h_n, c_n


def _cells(x: Tensor, hx: States, groups: Sequence[Sequence[Tensor]], has_biases: bool) -> Result:
    """A layer's cells."""
    hs, cs = zip(*(_cell(x, hx[0][d], hx[1][d], g, has_biases) for d, g in enumerate(groups)), strict=True)
    return torch.cat(hs, -1), torch.stack(hs), torch.stack(cs)


def _cell(x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor, Tensor]:
    projected, grad = len(weights) > (4 if has_biases else 2), torch.is_grad_enabled()
    if not projected and (grad or not uses_onednn(h, weights[1])):
        return torch.lstm_cell(x, (h, c), *weights)
    w_ih, w_hh, b_ih, b_hh = weights[:4] if has_biases else (*weights[:2], None, None)
    if grad:
        h, c = lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
        return h @ weights[-1].t(), c
    h, c = cell(linear(x, w_ih, b_ih).add_(linear(h, w_hh, b_hh)), c)
    return linear(h, weights[-1]) if projected else h, c
