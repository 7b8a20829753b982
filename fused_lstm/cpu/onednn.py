"""One layer on oneDNN's fused LSTM, forward and backward, for the custom op: fp32 on a CPU, no projection.

torch's own ``lstm`` does the same under autograd. Inside an op, which a compiler or vmap sees as one, there is no autograd,
so the two halves are called by themselves. Lengths and resets are served as in :mod:`fused_lstm.ragged`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Kept, LayerCall, Rows
from .ragged import PackedUnfolding, Unfolding, control_weights

LSTM_MODE = 2  # as torch numbers the kinds of RNN


class Direction:
    """One recurrence's data as oneDNN is to see it: laid out if the sequences are ragged, else as it is."""

    def __init__(
        self,
        x: Tensor,  # (T, B, I), or (N, I) if packed
        h0: Tensor,  # (B, H)
        c0: Tensor,  # (B, H)
        w_ih: Tensor,  # (4H, I)
        w_hh: Tensor,  # (4H, H)
        biases: Sequence[Tensor | None],  # (4H,) each
        layout: Unfolding | None,  # in one block
        backwards: bool,
    ) -> None:
        self.I, self.layout, self.reverse = x.shape[-1], layout, backwards and layout is None
        if layout is not None:
            (x,) = layout.lay_out(x)
            w_ih = control_weights(w_ih, layout.resets) if layout.blocks[0].columns else w_ih
            h0, c0 = self._begun(h0), self._begun(c0)
        b_ih, b_hh = (w_ih.new_zeros(w_ih.shape[0]) if b is None else b.contiguous() for b in biases)
        weights = (w_ih.contiguous(), w_hh.contiguous(), b_ih, b_hh)
        self.inputs = (x.contiguous(), *weights, h0.contiguous(), c0.contiguous())

    def _begun(self, state: Tensor) -> Tensor:
        """A state, or a gradient by one, where an episode begins at the first step: not seen."""
        assert self.layout is not None
        return state if self.layout.begins is None else torch.where(self.layout.begins, 0, state)

    def forward(self, h0: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y (T, B, H), h_n and c_n (B, H), and what the backward pass needs, in a form that only oneDNN knows."""
        H = h0.shape[1]
        with torch.set_grad_enabled(save):  # else there is no workspace
            y, h, c, workspace = torch.ops.aten.mkldnn_rnn_layer(
                *self.inputs, self.reverse, [], LSTM_MODE, H, 1, True, False, False, save
            )
        if self.layout is None:
            return y, h, c, workspace
        # What is held to the end is c_n of every row, also of one without steps.
        y, last = self.layout.take_back([y], c)
        return y, last if self.layout.empty is None else torch.where(self.layout.empty, h0, last), c, workspace

    def backward(self, y: Tensor, c_n: Tensor, dy: Tensor, dh: Tensor, dc: Tensor, workspace: Tensor) -> tuple[Tensor, ...]:
        """Gradients by x, h0, c0, w_ih, w_hh and both biases, from those by y (T, B, H), h_n and c_n (B, H)."""
        layout = self.layout
        dh_n = dh
        if layout is not None:
            (y,), (dy,) = layout.spread(y), layout.spread(dy, dh)  # of an empty row: not spread
            dh = torch.zeros_like(dh)
        h0, c0 = self.inputs[-2:]
        h_last = y[0 if self.reverse else -1]
        # It writes into the workspace, but reads nothing there that a backward pass wrote: passes can be repeated.
        dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0 = torch.ops.aten.mkldnn_rnn_layer_backward(
            *self.inputs, y.contiguous(), h_last.contiguous(), c_n, dy.contiguous(), dh.contiguous(), dc.contiguous(),
            self.reverse, LSTM_MODE, h0.shape[1], 1, True, True, False, [], False, workspace,
        )  # fmt: skip
        dh0, dc0 = dh0.view(h0.shape), dc0.view(c0.shape)
        if layout is not None:
            dx = layout.gather([dx[..., : self.I]])
            dw_ih = dw_ih[:, : self.I].contiguous()
            dh0, dc0 = self._begun(dh0), self._begun(dc0)
            dh0 = dh0 if layout.empty is None else torch.where(layout.empty, dh_n, dh0)
        return dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh


def forward(call: LayerCall, rows: Rows) -> Kept:
    """The layer; what is kept of gates are the recurrences' workspaces one behind the other, of cell states the last.

    x may hold an input (..., I) for each of several members.
    """
    x, save, R, H = call.x, call.save and not call.recompute, call.R, call.H
    states = x.new_empty((R, rows.B, H))
    workspace = None
    if rows.B == 0:  # which oneDNN does not take
        y, h_n = x.new_empty((*x.shape[:-1], R * H)), torch.empty_like(states)
    else:
        runs, h0 = _directions(call, rows)
        ys, hs, cs, spaces = zip(*(run.forward(h0[r], save) for r, run in enumerate(runs)), strict=True)
        y = _time_first(torch.cat(ys, -1) if len(ys) > 1 else ys[0], rows).contiguous()
        h_n, states = torch.stack(hs), torch.stack(cs)
        workspace = torch.cat(spaces) if save else None
    c_n = states.clone() if call.save else states
    return Kept(y, h_n, c_n, workspace, states if call.save else None)


def backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, call: LayerCall, rows: Rows, y: Tensor,
    workspace: Tensor | None, c_n: Tensor, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients as :func:`fused_lstm.recurrence.backward` gives them. A workspace that was not kept is made again."""
    inputs = call[:9]
    if rows.B == 0:
        return [None if t is None or not need else torch.zeros_like(t) for t, need in zip(inputs, needs, strict=True)]
    x, H = call.x, call.H
    runs, h0 = _directions(call, rows)
    dy = torch.zeros_like(y) if dy is None else dy
    dh_n, dc_n = (torch.zeros_like(c_n) if grad is None else grad for grad in (dh_n, dc_n))
    ys, dys = (_time_first(t, rows).split(H, -1) for t in (y, dy))
    spaces = workspace.view(len(runs), -1) if workspace is not None else [run.forward(h0[0], True)[3] for run in runs]
    found = [run.backward(ys[r], c_n[r], dys[r], dh_n[r], dc_n[r], spaces[r]) for r, run in enumerate(runs)]
    dxs, dh0, dc0, *others = zip(*found, strict=True)
    dx = None
    if needs[0]:
        each = len(dxs) // (x.shape[-1] // call.w_ih.shape[1])  # recurrences of a member
        dx = torch.cat([sum(dxs[k + 1 : k + each], dxs[k]) for k in range(0, len(dxs), each)], -1)
        dx = _time_first(dx, rows).contiguous()
    grads = (dx, torch.stack(dh0), torch.stack(dc0), *(torch.cat(g) for g in others), None, None)
    return [grad if need and t is not None else None for grad, t, need in zip(grads, inputs, needs, strict=True)]


def _directions(call: LayerCall, rows: Rows) -> tuple[list[Direction], Tensor]:
    """Each recurrence, and the initial hidden states (R, B, H)."""
    R, H, I = call.R, call.H, call.w_ih.shape[1]  # noqa: E741
    resets = None if rows.resets is None else _time_first(rows.resets.view(call.x.shape[:-1]), rows)
    parts = _time_first(call.x, rows).split(I, -1)
    w_ih, w_hh = call.w_ih.chunk(R), call.w_hh.chunk(R)
    b_ih, b_hh = ([None] * R if b is None else b.chunk(R) for b in (call.b_ih, call.b_hh))
    h0, c0 = (call.x.new_zeros(R, rows.B, H) if s is None else s for s in (call.h0, call.c0))

    def run(r: int) -> Direction:
        backwards, layout, x = rows.backwards(r), None, parts[r * len(parts) // R]
        if rows.batch_sizes is not None:
            layout = PackedUnfolding(rows.batch_sizes, x.device, backwards)
        elif rows.lengths is not None or resets is not None:
            layout = Unfolding(rows.T, rows.B, rows.lengths, resets, backwards)
        return Direction(x, h0[r], c0[r], w_ih[r], w_hh[r], (b_ih[r], b_hh[r]), layout, backwards)

    return [run(r) for r in range(R)], h0


def _time_first(data: Tensor, rows: Rows) -> Tensor:
    """Data as the op has it, as (T, B, ...) unless it is packed; or the other way round."""
    return data.transpose(0, 1) if rows.batch_first and rows.batch_sizes is None else data
