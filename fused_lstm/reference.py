"""The LSTM in plain PyTorch, written to be read: the cell, the sequence under autograd, and the backward pass by hand.

Three levels, each checked against the one before it:

* :func:`lstm_cell`, one step as seven lines;
* :func:`layer`, the sequence as a loop over that cell, differentiable by autograd to any order: the oracle of all tests,
  and the path by which second derivatives are taken on every backend;
* :func:`recurrence_forward` and :func:`recurrence_backward`, the same with the gradients derived by hand
  (docs/math.md goes through them line by line): what the Triton kernels do, step by step, on any device and float dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .rows import Rows


def cell(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The cell from its pre-activations ``a`` (..., 4H), in gate order i, f, g, o, and cell state ``c`` (..., H)."""
    a_i, a_f, a_g, a_o = a.chunk(4, -1)
    f = torch.sigmoid(a_f)  # 1. forget gate: how much of the old memory stays
    g = torch.tanh(a_g)  # 2. candidate: what could be written
    i = torch.sigmoid(a_i)  # 3. update (input) gate: how much of it is written
    c = f * c + i * g  # 4. cell update
    tanh_c = torch.tanh(c)  # 5. the memory, squashed
    o = torch.sigmoid(a_o)  # 6. output gate: how much of it is shown
    h = o * tanh_c  # 7. hidden state
    return h, c


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One LSTM step: x (B, I), h (B, H), c (B, H) to the next h, c; w_ih (4H, I), w_hh (4H, H), biases (4H,)."""
    return cell(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh), c)


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    w_h0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all directions, as a loop that autograd follows. Arguments as in :func:`fused_lstm.ops.layer_forward`."""
    if batch_sizes is not None:
        packed = PackedSequence(x, batch_sizes)
        x, lengths = pad_packed_sequence(packed)
        lengths = lengths.to(x.device)
    elif batch_first:
        x = x.transpose(0, 1)
    T, B = x.shape[:2]
    rows = Rows(T, B, False, directions, lengths, None)
    outputs, h_n, c_n = [], [], []
    for r in range(w_hh.shape[0]):
        gates = F.linear(x, w_ih[r], None if bias is None else bias[r]).flatten(0, 1)
        h, c, w, hs = h0[r], c0[r], (w_hh if w_h0 is None else w_h0)[r], []
        for s in range(T):
            h_new, c_new = cell(gates[rows.at(s, r)] + h @ w.t(), c)
            if s == 0 and w_h0 is not None:  # from here on the state has the recurrence's width, not h0's
                h, w = c.new_zeros(c.shape), w_hh[r]
            valid = rows.valid(s)
            if valid is None:
                h, c = h_new, c_new
                hs.append(h)
            else:
                h, c = torch.where(valid, h_new, h), torch.where(valid, c_new, c)
                hs.append(torch.where(valid, h, 0))
        h_n.append(h)
        c_n.append(c)
        y = torch.cat(hs)
        if rows.backwards(r):  # back to the order of time: at() is a permutation, and its own inverse
            order = [rows.at(s, r) for s in range(T)]
            index = torch.arange(T * B, device=x.device)
            y = y[torch.cat([index[o] for o in order])]
        outputs.append(y.view(T, B, -1))
    output = torch.cat(outputs, -1)
    if batch_sizes is not None:
        output = torch.cat([output[t, :n] for t, n in enumerate(batch_sizes.tolist())])
    elif batch_first:
        output = output.transpose(0, 1)
    return output, torch.stack(h_n), torch.stack(c_n)


def recurrence_forward(
    gates: Tensor,  # (N, R, 4, H) in: x @ W_ih^T + biases; out, if save: activated gates
    w_hh: Tensor,  # (R, 4H, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out: the cell state after each step
) -> tuple[Tensor, Tensor]:
    """The recurrence, explicitly. Returns h_n and c_n, (R, B, H)."""
    h_n = c0.new_zeros(c0.shape) if h0 is None else h0.clone()
    c_n = c0.clone()
    for r in range(w_hh.shape[0]):
        w_t = w_hh[r].t()
        for s in range(rows.T):
            at, n, valid = rows.at(s, r), rows.active(s), rows.valid(s)
            h_prev, c_prev = h_n[r, :n], c_n[r, :n]
            a = gates[at, r]
            a = torch.addmm(a.flatten(1), h_prev, w_t).view(a.shape)
            i, f, o = torch.sigmoid(a[:, 0]), torch.sigmoid(a[:, 1]), torch.sigmoid(a[:, 3])
            g = torch.tanh(a[:, 2])
            c = torch.addcmul(f * c_prev, i, g)
            h = o * torch.tanh(c)
            if valid is not None:
                y[at, r] = torch.where(valid, h, 0)
                h, c = torch.where(valid, h, h_prev), torch.where(valid, c, c_prev)
            else:
                y[at, r] = h
            if c_all is not None:
                c_all[at, r] = c
                gates[at, r] = torch.stack((i, f, g, o), 1)
            h_n[r, :n], c_n[r, :n] = h, c
    return h_n, c_n


def recurrence_backward(
    dy: Tensor,  # (N, R, H)
    dh_n: Tensor,  # (R, B, H)
    dc_n: Tensor,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated
    c_all: Tensor,  # (N, R, H)
    y: Tensor,  # (N, R, H)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor,  # (R, B, H)
    w_hh: Tensor,  # (R, 4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    h_prev: Tensor,  # (N, R, H) out
) -> Tensor:
    """Gradients through the recurrence, by hand. Returns dc_0, (R, B, H)."""
    dc_0 = dc_n.clone()
    for r in range(w_hh.shape[0]):
        dh_next = dh_n[r].clone()  # gradient by h_s that comes from the steps after s, or from h_n
        for s in range(rows.T - 1, -1, -1):
            at, n, valid = rows.at(s, r), rows.active(s), rows.valid(s)
            if s > 0:
                before = rows.at(s - 1, r, n)
                hp, cp = y[before, r], c_all[before, r]
            else:
                hp, cp = (y.new_zeros(n, y.shape[-1]) if h0 is None else h0[r, :n]), c0[r, :n]
            i, f, g, o = gates[at, r].unbind(1)
            tanh_c = torch.tanh(c_all[at, r])
            dh = dy[at, r] + dh_next[:n]  # h_s is seen by the loss and by step s+1
            dc = dc_0[r, :n] + dh * o * (1 - tanh_c * tanh_c)  # through tanh(c), and from c_{s+1}
            da_o = dh * tanh_c * o * (1 - o)
            da_i = dc * g * i * (1 - i)
            da_f = dc * cp * f * (1 - f)
            da_g = dc * i * (1 - g * g)
            da = torch.stack((da_i, da_f, da_g, da_o), 1)
            dc, dh = dc * f, da.flatten(1) @ w_hh[r]
            if valid is not None:  # a row without this step hands its gradients through
                da, hp = torch.where(valid[..., None], da, 0), torch.where(valid, hp, 0)
                dc, dh = torch.where(valid, dc, dc_0[r, :n]), torch.where(valid, dh, dh_next[:n])
            dgates[at, r], h_prev[at, r] = da, hp
            dc_0[r, :n], dh_next[:n] = dc, dh
    return dc_0
