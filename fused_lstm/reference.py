"""The LSTM in plain PyTorch, written to be read: the cell, the sequence under autograd, and the backward pass by hand.

Three levels, each checked against the one before it:

* :func:`lstm_cell`, one step as seven lines;
* :func:`layer`, the sequence as a loop over that cell, differentiable by autograd to any order: the oracle of all tests,
  and the path by which second derivatives are taken on every backend;
* :func:`recurrence_forward` and :func:`recurrence_backward`, the same with the gradients derived by hand
  (docs/math.md goes through them line by line): what the Triton kernels do, step by step, on any device and float dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from . import relatives
from .call import LayerCall, Rows, accumulator_dtype
from .cell import EPS, Relative
from .gemm import linear, uses_onednn


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


def layer(call: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all directions, as a loop that autograd follows: y, h_n and c_n."""
    x, lengths, resets, H = call.x, call.lengths, call.resets, call.H
    place = None
    if call.batch_sizes is not None:  # as padded data: by index, which torch.func can follow
        packed = call.rows
        lengths, (t, b) = packed.lengths, packed.times_and_batch_rows(x.shape[0], x.device)
        place = t * packed.B + b
        x, resets = (
            None if data is None else data.new_zeros(packed.T * packed.B, *data.shape[1:]).index_copy(0, place, data)
            for data in (x, resets)
        )
        x = x.view(packed.T, packed.B, -1)
    elif call.batch_first:
        x = x.transpose(0, 1)
        resets = None if resets is None else resets.transpose(0, 1)
    T, B = x.shape[:2]
    rows = Rows(T, B, False, call.directions, lengths, None, None if resets is None else resets.flatten())
    if call.w_ih is not None:
        # Of members, whose recurrences follow one another, if x has an input for each.
        members = (x,) if x.shape[-1] == call.w_ih.shape[1] else x.split(call.w_ih.shape[1], -1)
        w, b = (None if t is None else t.chunk(len(members)) for t in (call.w_ih, call.b_ih))
        x = torch.cat([F.linear(m, w[k], None if b is None else b[k]) for k, m in enumerate(members)], -1)
    gates = x.reshape(T * B, call.R, 4 * H)
    relative = Relative.of(call.cell) if call.cell else None
    zone = relatives.zoneout(call, relative, rows, gates) if relative else None
    outputs, h_n, c_n = [], [], []
    for r in range(call.R):
        part = slice(r * 4 * H, (r + 1) * 4 * H)
        h = x.new_zeros(B, H) if call.h0 is None else call.h0[r]
        c, hs = x.new_zeros(B, H) if call.c0 is None else call.c0[r], []
        bias = None if call.b_hh is None else call.b_hh[part]
        w_first = call.w_hh if call.w_h0 is None or call.h0 is None else call.w_h0
        for s in range(T):
            h_prev, c_prev, keep = h, c, rows.kept(s, r)
            if keep is not None:  # a new episode begins with no memory
                h_prev, c_prev = torch.where(keep, h, 0), torch.where(keep, c, 0)
            w = (w_first if s == 0 else call.w_hh)[part]
            at = rows.at(s, r)
            if relative is None:
                h_new, c_new = cell(gates[at, r] + F.linear(h_prev, w, bias), c_prev)
            else:
                given = gates[at, r] if bias is None else gates[at, r] + bias
                given, recurrent = given.unflatten(-1, (4, H)), F.linear(h_prev, w).unflatten(-1, (4, H))
                units, zone_s = None if call.units is None else call.units[r], zone and zone.at(at, r)
                _, h_new, c_new = relatives.step(given, recurrent, h_prev, c_prev, relative, units, zone_s)
            if s == 0 and h.shape != c.shape:  # from here on the state has the recurrence's width, not h0's
                h = c.new_zeros(c.shape)
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
        outputs.append(y.view(T, B, y.shape[-1]))
    output = torch.cat(outputs, -1)
    if place is not None:
        output = output.flatten(0, 1)[place]
    elif call.batch_first:
        output = output.transpose(0, 1)
    return output, torch.stack(h_n), torch.stack(c_n)


VIEWS = 16  # of steps that are made together


class Group:
    """Recurrences ``r``, an index if it is one, that run in the same direction of time; their part of data (N, R, ...)."""

    def __init__(self, rows: Rows, r: int | slice) -> None:
        self.rows, self.r, self.first = rows, r, r if isinstance(r, int) else r.start
        back = rows.backwards(self.first)
        # Where rows of different lengths run backwards, those of a step lie apart: then a copy is in the order of steps.
        self.order = (
            torch.cat([rows.at(s, self.first) for s in range(rows.T)]) if back and rows.lengths is not None else None
        )
        self.reverse, self.batch_first = back and self.order is None, rows.batch_first and self.order is None
        self.written: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def all(rows: Rows, R: int) -> list[Group]:
        if abs(rows.directions) >= R:
            return [Group(rows, r) for r in range(R)]
        return [Group(rows, slice(d, None, 2)) for d in range(2)] if rows.directions == 2 else [Group(rows, slice(0, None))]

    def of(self, data: Tensor | None, written: bool = False) -> Tensor | None:
        """The group's part of data, all steps; if ``written``, :meth:`put_back` is to be called at the end."""
        if data is None or self.order is None:
            return None if data is None else data[:, self.r]
        mine = data[self.order, self.r]
        if written:
            self.written.append((data, mine))
        return mine

    def put_back(self) -> None:
        for data, mine in self.written:
            data[self.order, self.r] = mine

    def by_step(self, mine: Tensor | None, last_first: bool = False) -> Iterator[Tensor | None]:
        """Views of what the group has in each step. A few at a time: Python's garbage collector would look at many."""
        rows = self.rows
        if mine is None:
            return repeat(None, rows.T)
        if rows.batch_sizes is not None:
            sizes = rows.batch_sizes.tolist()
            starts = list(accumulate(sizes, initial=0))[: rows.T]
            order = reversed(range(rows.T)) if last_first else range(rows.T)
            return (mine.narrow(0, starts[s], sizes[s]) for s in order)
        steps = (
            mine.unflatten(0, (rows.B, rows.T)).transpose(0, 1) if self.batch_first else mine.unflatten(0, (rows.T, rows.B))
        )
        back = slice(None, None, -1 if self.reverse != last_first else 1)
        return (view for block in steps.split(VIEWS)[back] for view in block.unbind()[back])

    def state(self, states: Tensor) -> Tensor:
        """Of states (R, B, H): (B, H), or (B, recurrences, H)."""
        return states[self.r] if isinstance(self.r, int) else states[self.r].transpose(0, 1)

    def valid(self, s: int) -> Tensor | None:
        return self._column(self.rows.valid(s))

    def kept(self, s: int) -> Tensor | None:
        return self._column(self.rows.kept(s, self.first))

    def _column(self, mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or isinstance(self.r, int) else mask[..., None]


def recurrence_forward(
    gates: Tensor,  # (N, R, 4, H) in: x @ W_ih^T + b_ih; out: activated gates
    w_hh: Tensor,  # (R*4H, H)
    b_hh: Tensor | None,  # (R*4H,)
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor | None,  # (R, B, H); None: zero
    rows: Rows,
    y: Tensor,  # (N, R, H) out
    c_all: Tensor | None,  # (N, R, H) out: the cell state after each step
    call: LayerCall | None = None,  # of a relative
) -> tuple[Tensor, Tensor]:
    """The recurrence, explicitly. Returns h_n and c_n, (R, B, H)."""
    H = w_hh.shape[1]
    R = w_hh.shape[0] // (4 * H)
    relative = Relative.of("" if call is None else call.cell)
    keeps = call is not None and c_all is not None and not call.recompute
    masks = relatives.drawn(call, relative, rows, y.numel() // (R * H)) if relative.zoned and call.seed is not None else None
    zone = None if call is None else relatives.zoneout(call, relative, rows, y.view(-1, R, H), masks)
    gates, y, w_hh = gates.view(-1, R, 4, H), y.view(-1, R, H), w_hh.view(R, 4 * H, H)
    all_products = None
    if keeps and relative.norm and gates.dtype == accumulator_dtype(gates.dtype):
        all_products = gates.new_empty(gates.shape[0], R, 4 * H)
    h_n, c_n = (y.new_zeros(R, rows.B, H) if state is None else state.clone() for state in (h0, c0))
    for group in Group.all(rows, R):
        r = group.r
        h, c = group.state(h_n), group.state(c_n)
        recurrent = products_with(w_hh[r], None if b_hh is None else b_hh.view(R, 4 * H)[r])
        peepholes, gains, norm_c = relatives.parts(relative, None if call is None or call.units is None else call.units[r])
        gains = None if gains is None else gains.flatten(-2)
        zeros = None if gains is None else torch.zeros_like(gains)
        mine, y_all, c_mine, products_mine = (group.of(t, written=True) for t in (gates, y, c_all, all_products))
        kept = map(group.of, zone or (None, None))
        parts = mine.flatten(-2), products_mine, y_all, c_mine, mine[..., :2, :], *mine.unbind(-2), *kept
        steps = zip(*map(group.by_step, parts), strict=True)
        for s, (flat, products_s, y_s, c_s, i_f, i, f, g, o, kept_h, kept_c) in enumerate(steps):
            n, valid, keep = flat.shape[0], group.valid(s), group.kept(s)
            h_prev, c_prev = (h, c) if n == rows.B else (h[:n], c[:n])
            if keep is not None:  # a new episode begins with no memory
                h_prev, c_prev = torch.where(keep, h_prev, 0), torch.where(keep, c_prev, 0)
            products = recurrent(h_prev, products_s)
            if relative.norm and isinstance(r, int):
                flat += torch.layer_norm(products, (4 * H,), gains, zeros, EPS)
            elif relative.norm:  # each has gains of its own
                flat.addcmul_(torch.layer_norm(products, (4 * H,), None, None, EPS), gains)
            else:
                flat += products
            if relative.peephole:
                i.addcmul_(peepholes[0], c_prev)
                f.addcmul_(peepholes[1], c_prev)
            torch.sigmoid_(i_f)
            torch.tanh_(g)
            c_new = shown = torch.mul(f, c_prev, out=c_s).addcmul_(i, g)
            if relative.norm:
                if isinstance(r, int):
                    shown = torch.layer_norm(c_new, (H,), *norm_c, EPS)
                else:
                    shown = torch.addcmul(norm_c[1], torch.layer_norm(c_new, (H,), None, None, EPS), norm_c[0])
                c_new = c_new.copy_(shown) if relative.norm == "state" else c_new
            if relative.peephole:
                o.addcmul_(peepholes[2], c_new)
            torch.sigmoid_(o)
            h_new = torch.mul(torch.tanh(shown), o, out=y_s)
            if zone is not None:
                h_new, c_new = torch.lerp(h_new, h_prev, kept_h, out=y_s), torch.lerp(c_new, c_prev, kept_c, out=c_s)
            if valid is not None:  # a row without this step keeps its state and shows nothing
                h_new, c_new = torch.where(valid, h_new, h), torch.where(valid, c_new, c, out=c_s)
                y_s.masked_fill_(~valid, 0)
            h = h_new if n == rows.B else torch.cat((h_new, h[n:]))
            c = c_new if n == rows.B else torch.cat((c_new, c[n:]))
        group.state(h_n).copy_(h)
        group.state(c_n).copy_(c)
        group.put_back()
    if keeps:
        c_all.made = relatives.Made(masks, None if all_products is None else relatives.Normalized(all_products))
    return h_n, c_n


def products_with(w: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """The function of x (B, K) that gives x w^T + bias (B, N), for w (N, K), in its second argument if there is one; if w is
    (R, N, K), for each of x (B, R, K)."""
    wt = w.mT

    def product(x: Tensor, out: Tensor | None = None) -> Tensor:
        if w.dim() == 3:
            x = x.transpose(0, 1)
            found = (torch.bmm(x, wt) if bias is None else torch.baddbmm(bias[:, None], x, wt)).transpose(0, 1)
        elif bias is not None or uses_onednn(x, w):
            found = linear(x, w, bias)
        else:
            return torch.mm(x, wt, out=out)
        return found if out is None else out.copy_(found)

    return product


def recurrence_backward(
    dy: Tensor | None,  # (N, R, H); this and the next two None: zero
    dh_n: Tensor | None,  # (R, B, H)
    dc_n: Tensor | None,  # (R, B, H)
    gates: Tensor,  # (N, R, 4, H) activated; may be dgates, whose memory is then used twice
    c_all: Tensor,  # (N, R, H)
    y: Tensor,  # (N, R, H), or empty: found in gates and c_all
    h0: Tensor | None,  # (R, B, H); None: zero
    c0: Tensor | None,  # (R, B, H); None: zero
    w_hh: Tensor,  # (R*4H, H)
    rows: Rows,
    dgates: Tensor,  # (N, R, 4, H) out
    h_prev: Tensor,  # (N, R, H) out; of a relative, in
    relative: relatives.Backward | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients through the recurrence, by hand. Returns those by the state that step 0 reads, dh_0 and dc_0, (R, B, H)."""
    R, H = c_all.shape[1:]
    w_hh, dgates, h_prev = w_hh.view(R, 4 * H, H), dgates.view(-1, R, 4, H), h_prev.view(-1, R, H)
    dy = torch.zeros_like(c_all) if dy is None else dy.view(-1, R, H)
    i, f, g, o = gates.unbind(2)
    zone = None
    if relative is None:
        tanh_c = torch.tanh(c_all)
        y = y.view(-1, R, H) if y.numel() else o * tanh_c
        c_prev = torch.empty_like(c_all)
        for r in range(R):
            h_prev[:, r] = rows.previous(y, None if h0 is None else h0[r], r)
            c_prev[:, r] = rows.previous(c_all, None if c0 is None else c0[r], r)
    else:
        tanh_c, c_prev, zone = torch.tanh(relative.shown), relative.c_prev, relative.zone
    # Before the loop, for all steps: the derivative of c_s by the pre-activations of i, f and g, and of h_s by that of o.
    # They are written to dgates, which may be the memory of gates. So each line reads its gates before it overwrites them,
    # and f, which the loop reads again, is copied.
    f = f.clone() if dgates.data_ptr() == gates.data_ptr() else f
    di, df, dg, do = dgates.unbind(2)
    dc_dh = d_tanh(o, tanh_c)  # h_s = o * tanh(c_s)
    by_i = d_sigmoid(g, i)
    d_tanh(i, g, dg), di.copy_(by_i)
    d_sigmoid(c_prev, f, df), d_sigmoid(tanh_c, o, do)
    if zone is not None:
        changed = 1 - zone.h
        dc_dh.mul_(changed)
        dgates[:, :, 3].mul_(changed)
    del tanh_c, c_prev, y, by_i
    dh_n, dc_0 = (c_all.new_zeros(R, rows.B, H) if grad is None else grad.clone() for grad in (dh_n, dc_n))
    for group in Group.all(rows, R):
        dh_next = group.state(dh_n)  # gradient by h_s that comes from the steps after s, or from h_n
        dc_next = group.state(dc_0)  # and by c_s
        recurrent = products_with(w_hh[group.r].mT)
        mine, dc_mine = group.of(dgates, written=True), group.of(dc_dh, written=True)
        others = map(group.of, (dy, f, *(zone or (None, None))))
        parts = mine.flatten(-2), mine[..., :3, :], mine[..., 3, :], dc_mine, *others
        parts += () if relative is None else relative.parts(group, mine)
        steps = zip(*(group.by_step(part, last_first=True) for part in parts), strict=True)
        for s, (da, da_ifg, da_o, dc_dh_s, dy_s, f_s, kept_h, kept_c, *more) in enumerate(steps, 1 - rows.T):
            n, valid, keep = da.shape[0], group.valid(-s), group.kept(-s)
            dh, dc = (dh_next, dc_next) if n == rows.B else (dh_next[:n], dc_next[:n])
            dh = dy_s + dh  # h_s is seen by the loss and by step s+1
            da_o.mul_(dh)
            products = da
            if relative is None:
                dc = torch.addcmul(dc, dh, dc_dh_s)  # c_s by step s+1 and by h_s
                da_ifg.mul_(dc.unsqueeze(-2))  # i, f and g act through c
                dc.mul_(f_s)
            else:
                products, dc = relative.step(group.r, dh, dc, da, da_ifg, da_o, dc_dh_s, f_s, valid, kept_c, *more)
            from_products = recurrent(products)
            dh = from_products if kept_h is None else from_products.addcmul_(kept_h, dh)
            if keep is not None:  # gradients stay within the episode
                dh, dc = torch.where(keep, dh, 0), torch.where(keep, dc, 0)
            if valid is not None:  # a row without this step hands its gradients through
                dh, dc = torch.where(valid, dh, dh_next), torch.where(valid, dc, dc_next)
                da.masked_fill_(~valid, 0)
            dh_next = dh if n == rows.B else torch.cat((dh, dh_next[n:]))
            dc_next = dc if n == rows.B else torch.cat((dc, dc_next[n:]))
        group.state(dh_n).copy_(dh_next)
        group.state(dc_0).copy_(dc_next)
        group.put_back()
    if relative is not None:
        relative.dshown = dc_dh  # which the steps of a norm wrote over
    return dh_n, dc_0


def d_sigmoid(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient by x of y = sigmoid(x): grad * y * (1 - y)."""
    out = torch.empty_like(grad) if out is None else out
    return torch.ops.aten.sigmoid_backward.grad_input(grad, y, grad_input=out)


def d_tanh(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient by x of y = tanh(x): grad * (1 - y^2)."""
    out = torch.empty_like(grad) if out is None else out
    return torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out)
