"""torch's own LSTM, and what serves better than it on a CPU: a cell for a single step, control columns for ragged rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from .gemm import linear, uses_onednn
from .ragged import LayOut, Unfolding, control_weights
from .reference import cell, lstm_cell
from .spec import PLAIN, Result, Sequences, Stack, in_fp32, weight_groups


def fused(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """torch's own LSTM. Its training flag is set whenever dropout acts or a gradient is needed: cuDNN keeps what its
    backward pass needs only then, and with dropout at 0 the flag changes nothing else."""
    train = stack.dropout > 0 or torch.is_grad_enabled()
    how = (stack.has_biases, stack.num_layers, stack.dropout, train, stack.bidirectional)
    if sequences.batch_sizes is not None:
        return _VF.lstm(x, sequences.batch_sizes, (h0, c0), list(weights), *how)
    return _VF.lstm(x, (h0, c0), list(weights), *how, stack.batch_first)


def ragged(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """lengths and resets through torch's fused LSTM, by control columns (see :mod:`fused_lstm.ragged`), or by a call for
    each run of steps between resets."""
    resets = sequences.resets
    if stack.batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.t()
    same = same_length(sequences)
    if same:
        y, h_n, c_n = fused(x[:same], h0, c0, weights, dataclasses.replace(stack, batch_first=False), PLAIN)
        y = F.pad(y, (0, 0, 0, 0, 0, x.shape[0] - same))
        return y.transpose(0, 1) if stack.batch_first else y, h_n, c_n
    pieces = uninterrupted(sequences, resets, stack, c0.shape[-1])
    if pieces:
        y, h_n, c_n = piecewise(pieces, x, h0, c0, weights, dataclasses.replace(stack, batch_first=False), resets)
        return y.transpose(0, 1) if stack.batch_first else y, h_n, c_n
    ragged = (*x.shape[:2], sequences.lengths, resets)
    layouts = [Unfolding(*ragged, backwards=d == 1, H=c0.shape[-1]) for d in range(stack.directions)]
    x, h_n, c_n = by_direction([partial(controlled, layout) for layout in layouts], x, h0, c0, weights, stack)
    return x.transpose(0, 1) if stack.batch_first else x, h_n, c_n


def same_length(sequences: Sequences) -> int:
    """The length that all rows have, and there are no resets; else 0. Known only on a CPU."""
    lengths = sequences.lengths
    if lengths is None or sequences.resets is not None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return 0
    low, high = map(int, lengths.aminmax())
    return low if low == high else 0


def uninterrupted(sequences: Sequences, resets: Tensor | None, stack: Stack, H: int) -> list[int]:
    """The numbers of steps from one with a reset (T, B) to the next, if a call for each is worth more than control columns:
    where these runs have many rows (measured with H from 128 to 512), in one direction, on a CPU. Else nothing."""
    if resets is None or sequences.lengths is not None or stack.bidirectional or resets.device.type != "cpu":
        return []
    T, B = resets.shape
    starts = [0, *(t for t in resets.any(1).nonzero().flatten().tolist() if t > 0)]
    if len(starts) * (128 + H // 2) > T * B:
        return []
    return [end - start for start, end in zip(starts, [*starts[1:], T], strict=True)]


def piecewise(
    pieces: Sequence[int], x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], stack: Stack, resets: Tensor
) -> Result:
    """torch's own LSTM over x (T, B, I), piece by piece; resets (T, B) clear the states between them."""
    outputs, first = [], 0
    for piece in x.split(pieces):
        begins = resets[first].nonzero().flatten()
        y, h, c = fused(piece, h.index_fill(1, begins, 0), c.index_fill(1, begins, 0), weights, stack, PLAIN)
        outputs.append(y)
        first += len(piece)
    return torch.cat(outputs), h, c


def controlled(layout: Unfolding, x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], one: Stack) -> Result:
    """One direction of one layer over x (T, B, I), in the layout given; h0 and c0 (B, ...)."""
    w_ih, *others = weights
    weights = [control_weights(w_ih, layout.resets), *others]
    h, c = (layout.sorted(s if layout.begins is None else torch.where(layout.begins, 0, s))[None] for s in (h0, c0))
    parts, held = [], []
    for laid_out in LayOut.apply(layout, x) if torch.is_grad_enabled() else layout.lay_out(x):
        n = laid_out.shape[1]  # the others have ended, and hold their cell state
        held.append(c[0, n:])
        y, h, c = fused(laid_out, h[:, :n], c[:, :n], weights, one, PLAIN)
        parts.append(y)
    y, last = layout.take_back(parts, c)
    h_n = torch.where(layout.empty, h0, last)
    return y, h_n, torch.where(layout.empty, c0, layout.unsorted(torch.cat([c[0], *reversed(held)])))


def by_direction(
    runs: Sequence[Callable[..., Result]], x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack
) -> Result:
    """The stack, each layer by a function for each direction: (x, h, c, weights, stack of one) to y, h_n and c_n."""
    D = stack.directions
    one = dataclasses.replace(stack, num_layers=1, dropout=0.0, bidirectional=False, batch_first=False)
    groups = weight_groups(weights, stack)
    states = []
    for layer in range(stack.num_layers):
        if layer > 0 and stack.dropout > 0:
            x = F.dropout(x, stack.dropout)
        outputs = []
        for d, run in enumerate(runs):
            k = layer * D + d
            y, *state = run(x, h0[k], c0[k], groups[k], one)
            outputs.append(y)
            states.append(state)
        x = torch.cat(outputs, -1) if D > 1 else outputs[0]
    h_n, c_n = (torch.stack(s) for s in zip(*states, strict=True))
    return x, h_n, c_n


def single_step(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences) -> Result:
    """A single time step: a cell per layer and direction."""
    x = x.squeeze(1 if stack.batch_first else 0)
    D = stack.directions
    groups = weight_groups(weights, stack)
    hs, cs = [], []
    for layer in range(stack.num_layers):
        if layer > 0 and stack.dropout > 0:
            x = F.dropout(x, stack.dropout)
        for k in range(layer * D, (layer + 1) * D):
            h, c = _cell(x, h0[k], c0[k], groups[k], stack.has_biases)
            hs.append(h)
            cs.append(c)
        x = torch.cat(hs[-D:], -1) if D > 1 else hs[-1]
    return x.unsqueeze(1 if stack.batch_first else 0), torch.stack(hs), torch.stack(cs)


def _cell(x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projected = len(rest) % 2 == 1
    if torch.is_grad_enabled():
        if not projected:
            return torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)
        h, c = lstm_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    elif projected or uses_onednn(h, w_hh):
        h, c = cell(linear(x, w_ih, b_ih).add_(linear(h, w_hh, b_hh)), c)
    else:
        return torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)
    return (linear(h, rest[-1]) if not torch.is_grad_enabled() else h @ rest[-1].t()) if projected else h, c


RUNNERS = {
    "fused": fused,
    "fp32": in_fp32(fused),
    "cell": in_fp32(single_step),
    "ragged": ragged,
    "ragged fp32": in_fp32(ragged),
}
