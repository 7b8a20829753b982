"""One LSTM layer as two torch.library custom ops, forward and backward.

The ops make the large GEMMs (input, weight and bias gradients) and hand the recurrence to an *engine*: the Triton kernels
or the explicit PyTorch reference. Both fill the same buffers, so that everything around them is shared. A third engine,
oneDNN's fused LSTM, does the whole layer by itself.

Shapes: x is (T, B, I), (B, T, I) if ``batch_first``, or (N, I) when packed, which ``batch_sizes`` tells. There are R
recurrences (directions, and under vmap members), K is the size of h0: H, or the projection's size when ``w_h0`` is given.
Without ``w_ih``, x has R*4H features and is what that product would have made: the pre-activations, biases included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import onednn, reference
from .gemm import linear
from .rows import Rows
from .spec import check_range, no_autocast
from .tf32 import tf32_as_cudnn


def _engine(name: str):
    if name == "reference":
        return reference
    if name == "triton":
        from . import launch

        return launch
    raise ValueError(f"engine must be 'triton' or 'reference', got {name!r}")


def _kept(t: Tensor, rows: Rows, r: int) -> Tensor:
    """t (B, ...) at the first step, cleared in the rows that begin with a reset."""
    keep = rows.kept(0, r)
    return t if keep is None else torch.where(keep, t, 0)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a^T @ b for a (N, M), b (N, K): the sum over rows of outer products; in the order that oneDNN is quickest at.

    Rows with gaps between them, as one direction of two has, are copied first: oneDNN is a thousand times slower with them.
    """
    return linear(b.contiguous().t(), a.contiguous().t()).t().contiguous() if a.device.type == "cpu" else a.t() @ b


def _input_gates(
    x: Tensor, h0: Tensor, w_ih: Tensor | None, w_hh: Tensor, bias: Tensor | None, w_h0: Tensor | None, rows: Rows
) -> Tensor:
    """(N, R, 4, H), fresh: the pre-activations but for the product with the recurrence's own state."""
    N, R, H = x.shape[:-1].numel(), w_hh.shape[0], w_hh.shape[2]
    if w_ih is None:
        gates = x.clone(memory_format=torch.contiguous_format).view(N, R, 4, H)
    else:
        flat = x.reshape(N, x.shape[-1])
        gates = linear(flat, w_ih.flatten(0, 1), None if bias is None else bias.flatten()).view(N, R, 4, H)
    if w_h0 is not None:
        for r in range(R):
            gates[rows.at(0, r), r] += linear(_kept(h0[r], rows, r), w_h0[r]).view(-1, 4, H)
    return gates


def _activate(gates: Tensor, w_hh: Tensor, h_prev: Tensor, rows: Rows) -> None:
    """Make :func:`_input_gates` the activated gates, of all steps at once, for each step's state before it is known."""
    for r in range(w_hh.shape[0]):
        gates[:, r].flatten(1).addmm_(h_prev[:, r], w_hh[r].t())
    gates[:, :, :2].sigmoid_()  # i and f
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    rows.clear_padding(gates)  # where no gradients will be written over them


@torch.library.custom_op("fused_lstm::layer_forward", mutates_args=())
def layer_forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor | None,
    w_h0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    directions: int,
    batch_first: bool,
    save: bool,
    engine: str,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer.

    Args:
        x: input, see the module's text.
        h0: (R, B, K) initial hidden state.
        c0: (R, B, H) initial cell state.
        w_ih: (R, 4H, I) input weights, gate order i, f, g, o, or None.
        w_hh: (R, 4H, H) recurrent weights.
        bias: (R, 4H) sum of both biases, or None.
        w_h0: (R, 4H, K) weights that h0 meets in the first step, where they are not ``w_hh``: with a projection folded
            into ``w_hh``, the recurrence's own state starts at zero and h0 enters through the first pre-activations.
        lengths: (B,) int64 on x's device, padded data only.
        batch_sizes: (T,) int64 on the CPU, packed data only.
        resets: bool, x's shape without the features: no state and no gradient passes from time t-1 to t, in either
            direction, where resets is True at t; at t = 0, none from h0 and c0 of the forward direction.
        directions: 1 forward, -1 backwards in time, 2 both (odd r backwards).
        batch_first: whether padded data is (B, T, ...).
        save: keep what the backward pass needs.
        engine: ``"triton"``, ``"reference"``, or ``"onednn"``: torch's own LSTM, for fp32 on a CPU without ``w_h0``, which
            keeps bytes of its own in place of gates and cell states.
        recompute: of that, keep no gates, so that the backward pass computes them again.

    Returns:
        y with R*H features, zero past a row's length; h_n (R, B, H); c_n (R, B, H); activated gates (N, R, 4, H) and cell
        states (N, R, H), both empty unless ``save``, the gates also if ``recompute``.
    """
    R, H = w_hh.shape[0], w_hh.shape[2]
    rows = Rows.of(x, c0, lengths, batch_sizes, resets, directions, batch_first)
    N = x.shape[:-1].numel()
    if rows.T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        check_range(lengths, rows.T)
    if engine == "onednn":
        y, h_n, c_n, workspace = onednn.forward(x, h0, c0, w_ih, w_hh, bias, rows, save and not recompute)
        return y, h_n, c_n, workspace, c_n.clone() if save else x.new_empty(0)
    with tf32_as_cudnn(x):
        gates = _input_gates(x, h0, w_ih, w_hh, bias, w_h0, rows)
        new = x.new_empty if lengths is None else x.new_zeros  # no one writes what lies past a row's length
        y = new(*x.shape[:-1], R * H)
        c_all = new(N, R, H) if save else None
        start = h0.contiguous() if w_h0 is None else None
        h_n, c_n = _engine(engine).recurrence_forward(
            gates, w_hh.contiguous(), start, c0.contiguous(), rows, y.view(N, R, H), c_all
        )
    nothing = x.new_empty(0)
    return y, h_n, c_n, gates if save and not recompute else nothing, x.new_empty(0) if c_all is None else c_all


@layer_forward.register_fake
def _(
    x, h0, c0, w_ih, w_hh, bias, w_h0, lengths, batch_sizes, resets, directions, batch_first, save, engine, recompute=False
):
    R, H = w_hh.shape[0], w_hh.shape[2]
    N = math.prod(x.shape[:-1])  # shape.numel() would fix the symbols of a dynamic shape
    gates = x.new_empty(N, R, 4, H) if save and not recompute else x.new_empty(0)
    c_all = x.new_empty(N, R, H) if save else x.new_empty(0)
    if engine == "onednn":
        size = torch.library.get_ctx().new_dynamic_size() if save and not recompute else 0
        gates, c_all = x.new_empty(size, dtype=torch.uint8), x.new_empty(c0.shape if save else 0)
    return x.new_empty(*x.shape[:-1], R * H), x.new_empty(c0.shape), x.new_empty(c0.shape), gates, c_all


@torch.library.custom_op("fused_lstm::layer_backward", mutates_args=())
def layer_backward(
    dy: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor | None,
    w_h0: Tensor | None,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    y: Tensor,
    gates: Tensor,
    c_all: Tensor,
    directions: int,
    batch_first: bool,
    engine: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`layer_forward` by x, h0, c0, w_ih, w_hh, bias and w_h0, in this order.

    ``dy``, ``dh_n`` and ``dc_n`` have the shapes of y, h_n and c_n. Gates that were not kept are empty, and computed again.
    A gradient whose entry in ``needs`` is False comes back empty and costs nothing.
    """
    R, H = w_hh.shape[0], w_hh.shape[2]
    rows = Rows.of(x, c0, lengths, batch_sizes, resets, directions, batch_first)
    if engine == "onednn":
        found = onednn.backward(dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, bias, rows, y, gates, c_all, needs[0])
        return *(g if need else x.new_empty(0) for g, need in zip(found, needs[:6], strict=True)), x.new_empty(0)
    N = c_all.shape[0]
    with no_autocast(x), tf32_as_cudnn(x):
        y, gates, c_all = y.contiguous(), gates.contiguous(), c_all.contiguous()  # vmap may hand in views
        new = x.new_empty if lengths is None else x.new_zeros
        h_prev = new(N, R, H)
        start = h0.contiguous() if w_h0 is None else None
        if gates.dim() == 4:
            dgates = new(N, R, 4, H)
        else:  # not kept; their gradients then overwrite them
            for r in range(R):
                h_prev[:, r] = rows.previous(y.view(N, R, H), None if start is None else start[r], r)
            dgates = gates = _input_gates(x, h0, w_ih, w_hh, bias, w_h0, rows)
            _activate(gates, w_hh, h_prev, rows)
        dc0 = _engine(engine).recurrence_backward(
            dy.contiguous().view(N, R, H), dh_n.contiguous(), dc_n.contiguous(), gates, c_all, y.view(N, R, H),
            start, c0.contiguous(), w_hh.contiguous(), rows, dgates, h_prev,
        )  # fmt: skip
        flat = dgates.view(N, R * 4 * H)
        dx = dw_ih = None
        if needs[0]:
            dx = (flat if w_ih is None else linear(flat, w_ih.flatten(0, 1).t())).view(x.shape)
        if needs[3] and w_ih is not None:
            dw_ih = _products(flat, x.reshape(N, x.shape[-1])).view(w_ih.shape)
        dw_hh = torch.stack([_products(dgates[:, r].flatten(1), h_prev[:, r]) for r in range(R)]) if needs[4] else None
        dbias = flat.sum(0).view(R, 4 * H) if needs[5] else None
        first = [_kept(dgates[rows.at(0, r), r].flatten(1), rows, r) for r in range(R)] if needs[1] or needs[6] else []
        w = w_hh if w_h0 is None else w_h0
        dh0 = torch.stack([linear(da, w[r].t()) for r, da in enumerate(first)]) if needs[1] else None
        dw_h0 = torch.stack([_products(da, h0[r]) for r, da in enumerate(first)]) if needs[6] else None
    if dh0 is not None and w_h0 is None and lengths is not None:  # a row without steps hands h0 through
        dh0 = torch.where((lengths == 0)[:, None], dh_n, dh0)
    grads = (dx, dh0, dc0 if needs[2] else None, dw_ih, dw_hh, dbias, dw_h0)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@layer_backward.register_fake
def _(
    dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, bias, w_h0, lengths, batch_sizes, resets, y, gates, c_all,
    directions, batch_first, engine, needs,
):  # fmt: skip
    inputs = (x, h0, c0, w_ih, w_hh, bias, w_h0)
    return tuple(x.new_empty(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True))
