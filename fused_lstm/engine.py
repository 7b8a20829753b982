"""The stack run layer by layer through the custom op, its recurrence by the Triton kernels or by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, reference, transforms
from .autograd import FusedLSTMFunction
from .config import ALIGNMENT
from .rows import Rows
from .spec import Result, Runner, Sequences, Stack, in_fp32, weight_groups


class Kept(NamedTuple):
    """What a layer computed, with N data rows, as the input lies in memory. Past a row's length, anything."""

    y: Tensor  # the layer's output, (..., D*Hout)
    gates: Tensor  # activated, (N, D, 4, H)
    c: Tensor  # cell states after each step, (N, D, H)


Keep = Callable[[Kept], None]


def layers(engine: str, transformed: bool = False, keep: Keep | None = None) -> Runner:
    """Runs the stack layer by layer through the custom op, with the recurrence done by ``engine``; or through the readable
    loop that torch follows op by op, which is the engine ``"loop"``.

    ``transformed``: by torch.func. The input projections are then left to torch, which maps them and their gradients well.
    ``keep``: is given what each layer computed, one after the other. Not with the loop, which keeps no gates.
    """

    def run_layers(
        x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences
    ) -> Result:
        D = stack.directions
        if sequences.lengths is not None:  # whatever padding holds, it must not meet a zero gradient in a product
            x = torch.where(_valid(x, stack, sequences.lengths), x, 0)
        groups = weight_groups(weights, stack)
        states = []
        for layer in range(stack.num_layers):
            part = slice(layer * D, (layer + 1) * D)
            if layer > 0 and stack.dropout > 0:
                x = F.dropout(x, stack.dropout)
            x, *state = _layer(engine, transformed, keep, x, h0[part], c0[part], groups[part], stack, sequences)
            states.append(state)
        h_n, c_n = (torch.cat(s) if len(s) > 1 else s[0] for s in zip(*states, strict=True))
        return x, h_n, c_n

    return run_layers


def _valid(x: Tensor, stack: Stack, lengths: Tensor) -> Tensor:
    """(T, B, 1), or (B, T, 1) if batch_first: where x is not padding."""
    t = torch.arange(x.shape[1 if stack.batch_first else 0], device=x.device)
    return (t < lengths[:, None] if stack.batch_first else t[:, None] < lengths)[..., None]


def _layer(
    engine: str,
    transformed: bool,
    keep: Keep | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    groups: Sequence[Sequence[Tensor]],
    stack: Stack,
    sequences: Sequences,
) -> Result:
    """One layer, both directions at once. h0 (D, B, Hout), c0 (D, B, H)."""
    join = (lambda k: torch.stack([g[k] for g in groups])) if len(groups) > 1 else (lambda k: groups[0][k].unsqueeze(0))
    w_ih, w_hh = join(0), join(1)
    # a - (-1) b, not a + b, whose gradients would be two views of one tensor: what accumulation or clipping does to the one
    # bias's in place it would do to the other's as well.
    bias = torch.sub(join(2), join(3), alpha=-1) if stack.has_biases else None
    w_hr = join(-1) if len(groups[0]) > (4 if stack.has_biases else 2) else None
    w_h0 = None
    if w_hr is not None:
        # With h = W_hr m, W_hh h = (W_hh W_hr) m: a plain recurrence over m, which h0 enters through the first step.
        w_h0, w_hh = w_hh, w_hh @ w_hr
    R, _, H = c0.shape
    pad = -H % ALIGNMENT if engine == "triton" else 0
    if pad:  # units of zero weight stay at zero: the results are the same, and every row is aligned
        w_ih, w_hh = _pad_gates(w_ih, pad), F.pad(_pad_gates(w_hh, pad), (0, pad))
        bias = None if bias is None else _pad_gates(bias, pad)
        c0 = F.pad(c0, (0, pad))
        w_h0 = None if w_h0 is None else _pad_gates(w_h0, pad)
        h0 = F.pad(h0, (0, pad)) if w_h0 is None else h0
    directions = 2 if stack.bidirectional else 1
    ragged = (sequences.lengths, sequences.batch_sizes, sequences.resets)
    tensors = (x, h0, c0, w_ih, w_hh, bias, w_h0)
    if transformed:
        x = F.linear(x, w_ih.flatten(0, 1), None if bias is None else bias.flatten())
        if w_h0 is not None:
            x = _with_first(x, h0, w_h0, Rows.of(x, c0, *ragged, directions, stack.batch_first))
        tensors = (x, h0 if w_h0 is None else torch.zeros_like(c0), c0, None, w_hh, None, None)
    if engine == "loop":
        y, h_n, c_n = reference.layer(*tensors, *ragged, directions, stack.batch_first)
    else:
        # Under vmap a tensor does not tell whether a gradient is asked for outside.
        save = torch.is_grad_enabled() and (transforms.active() or any(t is not None and t.requires_grad for t in tensors))
        save, recompute = save or keep is not None, stack.recompute and keep is None
        # The compiler takes the op itself, which has the same gradient registered: one node in its graph.
        call = FusedLSTMFunction.apply if save and not torch.compiler.is_compiling() else ops.layer_forward
        y, h_n, c_n, gates, c_all = call(*tensors, *ragged, directions, stack.batch_first, save, engine, recompute)
    if pad or w_hr is not None:
        y = y.unflatten(-1, (R, H + pad))[..., :H]
        h_n, c_n = h_n[..., :H], c_n[..., :H]
        if w_hr is not None:
            y = torch.einsum("...rh,rph->...rp", y, w_hr)
            h_n = h_n @ w_hr.mT
            if sequences.lengths is not None:
                # A row without steps keeps h0, which m knows nothing of; and a NaN for padding must not reach w_hr.
                h_n = torch.where((sequences.lengths == 0)[:, None], h0, h_n)
                y = torch.where(_valid(y, stack, sequences.lengths)[..., None], y, 0)
        y = y.flatten(-2)
    if keep is not None:
        keep(Kept(y, gates[..., :H], c_all[..., :H]))
    return y, h_n, c_n


def _with_first(x: Tensor, h0: Tensor, w_h0: Tensor, rows: Rows) -> Tensor:
    """The pre-activations x (..., R*4H) with what h0 (R, B, K) adds to each recurrence's first step, out of place."""
    R = w_h0.shape[0]
    gates = x.reshape(-1, R, w_h0.shape[1])
    for r in range(R):
        first = torch.arange(gates.shape[0], device=x.device)[rows.at(0, r)]
        keep = rows.kept(0, r)
        h = h0[r] if keep is None else torch.where(keep, h0[r], 0)
        gates = gates.index_put((first, torch.full_like(first, r)), h @ w_h0[r].t(), accumulate=True)
    return gates.view(x.shape)


def _pad_gates(w: Tensor, pad: int) -> Tensor:
    """(R, 4H, ...) to (R, 4(H+pad), ...), each gate padded with zeros."""
    w = w.unflatten(1, (4, -1))
    return F.pad(w, (0, 0) * (w.dim() - 3) + (0, pad)).flatten(1, 2)


RUNNERS = {
    "triton": layers("triton"),
    "reference": in_fp32(layers("reference")),
    "triton, transformed": layers("triton", transformed=True),
    "reference, transformed": in_fp32(layers("reference", transformed=True)),
    "onednn": in_fp32(layers("onednn")),
    "loop": in_fp32(layers("loop")),
}
