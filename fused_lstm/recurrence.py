"""One layer, forward and backward: the large GEMMs around a recurrence, which an *engine* runs.

The Triton kernels and the explicit PyTorch reference fill the same buffers, so that everything around them is shared. A
third engine, oneDNN's fused LSTM, does the whole layer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference, relatives
from .call import Kept, LayerCall, Rows, check_range, no_autocast
from .cell import Relative
from .cpu import onednn
from .gemm import linear, outer, product, tf32_as_cudnn


@cache
def _engine(name: str) -> ModuleType:
    if name == "reference":
        return reference
    if name == "triton":
        from . import launch

        return launch
    raise ValueError(f"engine must be 'triton', 'reference' or 'onednn', got {name!r}")


def _carried(t: Tensor, rows: Rows, r: int) -> Tensor:
    """t (B, ...) at the first step, cleared in the rows that begin with a reset."""
    keep = rows.kept(0, r)
    return t if keep is None else torch.where(keep, t, 0)


def _pre_activations(call: LayerCall, rows: Rows, b_ih: Tensor | None) -> Tensor:
    """x's shape with R*4H features, fresh: the pre-activations but for the product with the recurrence's own state."""
    x, w_ih = call.x, call.w_ih
    gates = x.clone(memory_format=torch.contiguous_format) if w_ih is None else linear(x, w_ih, b_ih)
    if call.w_h0 is not None and call.h0 is not None:
        parts = gates.view(-1, call.R, 4, call.H)
        for r, w in enumerate(call.w_h0.chunk(call.R)):
            parts[rows.at(0, r), r] += linear(_carried(call.h0[r], rows, r), w).view(-1, 4, call.H)
    return gates


def with_first(x: Tensor, h0: Tensor, w_h0: Tensor, call: LayerCall) -> Tensor:
    """The pre-activations x (..., R*4H) with what h0 (R, B, K) adds to each recurrence's first step, out of place."""
    rows, R = call.rows, h0.shape[0]
    gates = x.reshape(-1, R, x.shape[-1] // R)
    for r, w in enumerate(w_h0.chunk(R)):
        first = torch.arange(gates.shape[0], device=x.device)[rows.at(0, r)]
        keep = rows.kept(0, r)
        h = h0[r] if keep is None else torch.where(keep, h0[r], 0)
        gates = gates.index_put((first, torch.full_like(first, r)), h @ w.t(), accumulate=True)
    return gates.view(x.shape)


def forward(call: LayerCall) -> Kept:
    """Run one layer."""
    rows = call.rows
    if rows.T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if call.lengths is not None:
        check_range(call.lengths, rows.T)
    if call.engine == "onednn":
        return onednn.forward(call, rows)
    x, w_hh, h0 = call.x, call.w_hh.contiguous(), call.h0
    h0 = _contiguous(h0) if call.w_h0 is None else None
    with tf32_as_cudnn(x):
        gates = _pre_activations(call, rows, call.b_ih)
        R, H = call.sizes
        y, c_all = gates.new_empty(*x.shape[:-1], R * H), None  # one by one, which torch takes in half the time of a tuple
        if call.save:
            # What lies past a row's length nobody writes or reads; but an op's results are the same every time.
            new = gates.new_empty if call.lengths is None else gates.new_zeros
            c_all = new(y.numel() // (R * H), R, H)
        b_hh, c0 = _contiguous(call.b_hh), _contiguous(call.c0)
        if call.cell and b_hh is not None and Relative.of(call.cell).norm:  # of the products, which does not see it
            gates.view(-1, R * 4 * H).add_(b_hh)
            b_hh = None
        more = (call,) if call.cell else ()
        h_n, c_n = _engine(call.engine).recurrence_forward(gates, w_hh, b_hh, h0, c0, rows, y, c_all, *more)
    return Kept(y, h_n, c_n, gates.view(-1, R, 4, H) if call.save and not call.recompute else None, c_all)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    call: LayerCall,
    y: Tensor,
    gates: Tensor | None,
    c_all: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by the first nine tensors of ``call``, from those by y, h_n and c_n, None of which is zero.

    Gates that were not kept are computed again. A gradient that is not in ``needs`` is None and costs nothing.
    """
    rows = call.rows
    if call.engine == "onednn":
        return onednn.backward(dy, dh_n, dc_n, call, rows, y, gates, c_all, needs)
    x, (R, H) = call.x, call.sizes
    N = c_all.shape[0]
    start, w_hh = _contiguous(call.h0 if call.w_h0 is None else None), call.w_hh.contiguous()
    with no_autocast(x), tf32_as_cudnn(x):
        y, gates, c_all = y.contiguous(), _contiguous(gates), c_all.contiguous()  # vmap may hand in views
        h_prev, more = x.new_empty(N, R * H), ()
        if call.cell:
            relative, h_prev, gates = _relative(call, rows, y, c_all, gates, h_prev)
            more = (relative,)
            flat = dgates = x.new_empty(N, R * 4 * H)
        elif gates is not None:
            flat = dgates = x.new_empty(N, R * 4 * H)
        else:  # the gates were not kept: compute them again, then overwrite them with dgates
            dgates = gates = _activated(call, rows, y, h_prev.view(N, R, H), start)
            flat = gates.view(N, R * 4 * H)
        by_h0, dc0 = _engine(call.engine).recurrence_backward(
            _contiguous(dy), _contiguous(dh_n), _contiguous(dc_n), gates, c_all, y, start, _contiguous(call.c0), w_hh, rows,
            dgates, h_prev, *more,
        )  # fmt: skip
        dx = dw_ih = dw_hh = db_ih = db_hh = dh0 = dw_h0 = dunits = None
        by_products = relative.by_products(flat.view(N, R, 4, H)) if call.cell else _by_recurrence(flat, R)
        if needs[8] and call.cell:
            dunits = relative.by_units(flat.view(N, R, 4, H))
        if needs[0]:
            dx = (flat if call.w_ih is None else product(flat, call.w_ih)).view_as(x)  # view takes long to read a shape
        if needs[3] and call.w_ih is not None:
            dw_ih = outer(flat, x.reshape(N, x.shape[-1]))
        if needs[4]:
            each = list(map(outer, by_products, _by_recurrence(h_prev, R)))
            dw_hh = each[0] if R == 1 else torch.cat(each)
        if needs[5]:
            db_ih = flat.sum(0)
        if needs[6]:
            db_hh = flat.sum(0) if db_ih is None else db_ih.clone()  # not one tensor twice: a .grad may be changed
        if call.cell and by_h0 is not None:
            dh0 = by_h0 if needs[1] and call.h0 is not None else None
        elif (needs[1] or needs[7]) and call.h0 is not None:
            first = [_carried(da[rows.at(0, r)], rows, r) for r, da in enumerate(by_products)]
            if needs[1]:
                ws = (w_hh if call.w_h0 is None else call.w_h0).chunk(R)
                dh0 = torch.stack([product(da, w) for da, w in zip(first, ws, strict=True)])
                if call.cell and relative.passed is not None:
                    dh0 += relative.passed
            if needs[7]:
                dw_h0 = torch.cat([outer(da, h) for da, h in zip(first, call.h0, strict=True)])
    if dh0 is not None and call.w_h0 is None and call.lengths is not None:
        dh0 = torch.where((call.lengths == 0)[:, None], 0 if dh_n is None else dh_n, dh0)  # by rows without steps
    return [dx, dh0, dc0 if needs[2] and call.c0 is not None else None, dw_ih, dw_hh, db_ih, db_hh, dw_h0, dunits]


def _by_recurrence(t: Tensor, R: int) -> Sequence[Tensor]:
    """The parts of t (N, R*n)."""
    return (t,) if R == 1 else t.chunk(R, 1)


def _relative(
    call: LayerCall, rows: Rows, y: Tensor, c_all: Tensor, gates: Tensor | None, h_prev: Tensor
) -> tuple[relatives.Backward, Tensor, Tensor]:
    """The backward pass of a relative, the states ``h_prev`` (N, R*H) before each step, which kernels without norms fill in
    themselves, and the gates, made again if not kept."""
    relative = relatives.Backward(call, rows, gates, y.view(c_all.shape), c_all)
    if gates is None:
        given = _pre_activations(call, rows, call.b_ih).view(-1, call.R, 4, call.H)
        relative.gates = gates = relatives.gates_of(call, given, relative.h_prev, relative.c_prev.to(c_all.dtype))
        rows.clear_padding(gates)
    if call.engine == "reference" or relative.relative.norm:
        h_prev = relative.h_prev.flatten(1)
    return relative, h_prev, gates


def _activated(call: LayerCall, rows: Rows, y: Tensor, h_prev: Tensor, start: Tensor | None) -> Tensor:
    """The activated gates (N, R, 4, H) of all steps at once, and in ``h_prev`` (N, R, H) the states before each."""
    R, H = call.R, call.H
    bias = None if call.b_ih is None or call.b_hh is None else call.b_ih + call.b_hh
    gates = _pre_activations(call, rows, bias).view(-1, R, 4, H)
    for r, w in enumerate(call.w_hh.chunk(R)):
        h_prev[:, r] = rows.previous(y.view(-1, R, H), None if start is None else start[r], r)
        gates[:, r].flatten(1).addmm_(h_prev[:, r], w.t())
    gates[:, :, :2].sigmoid_()  # i and f
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    rows.clear_padding(gates)  # where no gradients will be written over them
    return gates
