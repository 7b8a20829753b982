"""One layer on oneDNN's fused LSTM, forward and backward, for the custom op: fp32 on a CPU, no projection.

torch's own ``lstm`` does the same under autograd. Inside an op, which a compiler or vmap sees as one, there is no autograd,
so the two halves are called by themselves. Lengths and resets are served as in :mod:`fused_lstm.ragged`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .ragged import Unfolding, control_weights
from .rows import Rows

LSTM_MODE = 2  # as torch numbers the kinds of RNN


class Direction:
    """One recurrence's data as oneDNN is to see it: laid out if the sequences are ragged, else as it is."""

    def __init__(
        self,
        x: Tensor,  # (T, B, I)
        h0: Tensor,  # (B, H)
        c0: Tensor,  # (B, H)
        w_ih: Tensor,  # (4H, I)
        w_hh: Tensor,  # (4H, H)
        bias: Tensor | None,  # (4H,)
        lengths: Tensor | None,  # (B,)
        resets: Tensor | None,  # (T, B)
        backwards: bool,
    ) -> None:
        T, B, self.I = x.shape
        self.layout, self.reverse = None, backwards
        if lengths is not None or resets is not None:
            self.layout, self.reverse = Unfolding(T, B, lengths, resets, backwards), False
            (x,), w_ih = self.layout.lay_out(x), control_weights(w_ih, resets is not None)
            h0, c0 = self._begun(h0), self._begun(c0)
        b = w_ih.new_zeros(w_ih.shape[0]) if bias is None else bias
        weights = (w_ih.contiguous(), w_hh.contiguous(), b.contiguous(), torch.zeros_like(b))
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
        return y, torch.where(self.layout.empty, h0, last), c, workspace

    def backward(self, y: Tensor, c_n: Tensor, dy: Tensor, dh: Tensor, dc: Tensor, workspace: Tensor) -> tuple[Tensor, ...]:
        """Gradients by x, h0, c0, w_ih, w_hh and bias, from those by y (T, B, H), h_n and c_n (B, H)."""
        layout = self.layout
        dh_n = dh
        if layout is not None:
            dy = dy.index_put((layout.last, layout.rows), dh, accumulate=True)  # of an empty row: not spread
            (y,), (dy,) = layout.spread(y), layout.spread(dy)
            dh = torch.zeros_like(dh)
        h0, c0 = self.inputs[-2:]
        h_last = y[0 if self.reverse else -1]
        # It writes into the workspace, but reads nothing there that a backward pass wrote: passes can be repeated.
        dx, dw_ih, dw_hh, db, _, dh0, dc0 = torch.ops.aten.mkldnn_rnn_layer_backward(
            *self.inputs, y.contiguous(), h_last.contiguous(), c_n, dy.contiguous(), dh.contiguous(), dc.contiguous(),
            self.reverse, LSTM_MODE, h0.shape[1], 1, True, True, False, [], False, workspace,
        )  # fmt: skip
        dh0, dc0 = dh0.view(h0.shape), dc0.view(c0.shape)
        if layout is not None:
            dx = layout.gather([dx[..., : self.I]])
            dw_ih = dw_ih[:, : self.I]
            dh0, dc0 = torch.where(layout.empty, dh_n, self._begun(dh0)), self._begun(dc0)
        return dx, dh0, dc0, dw_ih, dw_hh, db


def forward(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, rows: Rows, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n and c_n as :func:`fused_lstm.ops.layer_forward` gives them, and, to be saved, the recurrences' workspaces one
    behind the other; x may hold an input (..., I) for each of several members."""
    if c0.shape[1] == 0:  # which oneDNN does not take
        y = x.new_empty(*x.shape[:-1], w_hh.shape[0] * w_hh.shape[2])
        return y, torch.empty_like(c0), torch.empty_like(c0), x.new_empty(0, dtype=torch.uint8)
    runs = _directions(x, h0, c0, w_ih, w_hh, bias, rows)
    ys, h_n, c_n, spaces = zip(*(run.forward(h0[r], save) for r, run in enumerate(runs)), strict=True)
    y = _as_given(torch.cat(ys, -1) if len(ys) > 1 else ys[0], rows)
    workspace = (torch.cat(spaces) if len(spaces) > 1 else spaces[0]) if save else x.new_empty(0, dtype=torch.uint8)
    return y, torch.stack(h_n), torch.stack(c_n), workspace


def backward(
    dy: Tensor, dh_n: Tensor, dc_n: Tensor, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor,
    bias: Tensor | None, rows: Rows, y: Tensor, workspace: Tensor, c_n: Tensor, by_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients by x (empty unless ``by_x``), h0, c0, w_ih, w_hh and bias. A workspace that was not kept is made again."""
    if c0.shape[1] == 0:
        bias = w_ih[..., 0] if bias is None else bias
        return tuple(torch.zeros_like(t) for t in (x, h0, c0, w_ih, w_hh, bias))
    runs = _directions(x, h0, c0, w_ih, w_hh, bias, rows)
    H = w_hh.shape[2]
    ys, dys = (_padded(t, rows).split(H, -1) for t in (y, dy))
    spaces = workspace.view(len(runs), -1) if workspace.numel() else [run.forward(c0[0], True)[3] for run in runs]
    found = [run.backward(ys[r], c_n[r], dys[r], dh_n[r], dc_n[r], spaces[r]) for r, run in enumerate(runs)]
    dxs, *others = zip(*found, strict=True)
    if not by_x:
        return x.new_empty(0), *(torch.stack(g) for g in others)
    each = len(dxs) // (x.shape[-1] // w_ih.shape[2])  # recurrences of a member
    dx = torch.cat([sum(dxs[k + 1 : k + each], dxs[k]) for k in range(0, len(dxs), each)], -1)
    return _as_given(dx, rows), *(torch.stack(g) for g in others)


def _directions(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, rows: Rows
) -> list[Direction]:
    R, I = w_ih.shape[0], w_ih.shape[2]  # noqa: E741
    resets = None if rows.resets is None else _padded(rows.resets.view(x.shape[:-1]), rows)
    parts = _padded(x, rows).split(I, -1)
    return [
        Direction(
            parts[r * len(parts) // R], h0[r], c0[r], w_ih[r], w_hh[r], None if bias is None else bias[r],
            rows.lengths, resets, rows.backwards(r),
        )
        for r in range(R)
    ]  # fmt: skip


def _padded(data: Tensor, rows: Rows) -> Tensor:
    """Data as the op has it, as (T, B, ...)."""
    if rows.batch_sizes is not None:
        return pad_packed_sequence(PackedSequence(data, rows.batch_sizes))[0]
    return data.transpose(0, 1) if rows.batch_first else data


def _as_given(data: Tensor, rows: Rows) -> Tensor:
    """The inverse of :func:`_padded`."""
    if rows.batch_sizes is not None:
        assert rows.lengths is not None
        return pack_padded_sequence(data, rows.lengths).data
    return data.transpose(0, 1).contiguous() if rows.batch_first else data
