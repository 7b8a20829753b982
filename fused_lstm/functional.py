"""The stack of layers as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from . import ops
from .autograd import FusedLSTMFunction
from .dispatch import Problem, choose_backend
from .gemm import linear, uses_onednn
from .reference import cell, lstm_cell

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Stack:
    """How the layers of one call are built and fed; the same words as :class:`torch.nn.LSTM`."""

    has_biases: bool
    num_layers: int
    dropout: float  # 0 unless training
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    backend: str = "auto",
) -> Result:
    """Run a stack of LSTM layers; the function behind :class:`fused_lstm.LSTM`.

    Args:
        input: (T, B, I), (B, T, I) if ``batch_first``, or (N, I) with ``batch_sizes``; fp16, bf16, fp32 or fp64.
        hx: (h0, c0) of shapes (D*num_layers, B, Hout) and (D*num_layers, B, H), with D directions and Hout the
            projection's size, or H without one.
        weights: layer by layer, then direction by direction: ``w_ih`` (4H, I or D*Hout), ``w_hh`` (4H, Hout), with
            ``has_biases`` ``b_ih`` and ``b_hh`` (4H,), with a projection ``w_hr`` (P, H). Gate order i, f, g, o.
        has_biases: whether ``weights`` holds biases.
        num_layers: number of layers.
        dropout: probability of zeroing an element of the output of every layer but the last, if ``training``.
        training: whether dropout acts.
        bidirectional: whether each layer also runs backwards in time.
        batch_first: whether input and output are (B, T, ...) rather than (T, B, ...).
        batch_sizes: (T,) int64 on the CPU: input is packed as in :class:`torch.nn.utils.rnn.PackedSequence`.
        backend: ``"auto"``, ``"triton"``, ``"aten"`` or ``"reference"``; see :func:`fused_lstm.explain`.

    Returns:
        output, like input with D*Hout features; h_n and c_n, like h0 and c0.

    Raises:
        ValueError: wrong number of weights, wrong dtype, or unknown backend.
        RuntimeError: wrong shape or device, T = 0, or a backend that cannot serve the call.
    """
    stack = Stack(has_biases, num_layers, dropout if training else 0.0, bidirectional, batch_first)
    check(input, hx, weights, stack, batch_sizes)
    return run(input, hx, weights, stack, batch_sizes, backend)


def run(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    stack: Stack,
    batch_sizes: Tensor | None,
    backend: str,
) -> Result:
    """:func:`lstm` for arguments that were checked."""
    h0, c0 = hx
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # As torch's own autocast does, which leaves fp64 alone.
        input, h0, c0, *weights = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, h0, c0, *weights))
        with torch.autocast(device, enabled=False):
            check_like(input, (h0, c0), weights)
            return run(input, (h0, c0), weights, stack, batch_sizes, backend)
    plan = choose_backend(problem_of(input, h0, c0, weights, stack, batch_sizes), backend)
    return RUNNERS[plan.how](input, h0, c0, weights, stack, batch_sizes)


def problem_of(
    input: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
) -> Problem:
    """What dispatch needs to know of a call. Raises RuntimeError for T = 0, as torch does."""
    time_dim = 1 if stack.batch_first else 0
    T = input.shape[time_dim] if batch_sizes is None else batch_sizes.shape[0]
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    H = c0.shape[2]
    return Problem(
        device=input.device.type,
        dtype=input.dtype,
        T=T,
        B=c0.shape[1],
        hidden_size=H,
        proj_size=h0.shape[2] if h0.shape[2] != H else 0,
        packed=batch_sizes is not None,
        needs_grad=torch.is_grad_enabled()
        and (input.requires_grad or h0.requires_grad or c0.requires_grad or any(w.requires_grad for w in weights)),
    )


def check(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
) -> None:
    """Shapes, dtypes and devices of a functional call, by the words that torch.nn.LSTM uses."""
    groups = stack.num_layers * stack.directions
    plain = 4 if stack.has_biases else 2
    if len(weights) not in (groups * plain, groups * (plain + 1)):
        raise ValueError(
            f"weights should hold {groups * plain} tensors, or {groups * (plain + 1)} with projections, for "
            f"num_layers={stack.num_layers}, bidirectional={stack.bidirectional} and has_biases={stack.has_biases}; "
            f"got {len(weights)}"
        )
    dims = 2 if batch_sizes is not None else 3
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    B = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if stack.batch_first else 1]
    step = len(weights) // groups
    P, H = (weights[step - 1].shape if step > plain else (weights[1].shape[1],) * 2) if groups else (0, 0)
    for group in range(groups):
        w = weights[group * step : (group + 1) * step]
        width = input.shape[-1] if group < stack.directions else stack.directions * P
        shapes = [(4 * H, width), (4 * H, P), *[(4 * H,)] * (plain - 2), *[(P, H)] * (step - plain)]
        for k, (tensor, shape) in enumerate(zip(w, shapes, strict=True)):
            if tensor.shape != shape:
                raise RuntimeError(f"Expected weights[{group * step + k}] size {shape}, got {list(tensor.shape)}")
    for k, (tensor, width) in enumerate(zip(hx, (P, H), strict=True)):
        if tensor.shape != (groups, B, width):
            raise RuntimeError(f"Expected hidden[{k}] size {(groups, B, width)}, got {list(tensor.shape)}")
    check_like(input, hx, weights)


def check_like(input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor]) -> None:
    """Devices and dtypes of states and weights against the input's."""
    w = weights[0]
    if w.device != input.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {input.device} and "
            f"parameter tensor at {w.device}"
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    if w.dtype != input.dtype and not autocast:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({w.dtype}). Convert input: "
            f"input.to({w.dtype}), or convert model: model.to({input.dtype})"
        )
    for k, state in enumerate(hx):
        if state.device != input.device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {input.device} and "
                f"hidden tensor at {state.device}"
            )
        if state.dtype != input.dtype and not autocast:
            raise ValueError(
                f"hidden[{k}] dtype ({state.dtype}) does not match input dtype ({input.dtype}). Convert it: "
                f"hidden.to({input.dtype})"
            )


def _groups(weights: Sequence[Tensor], stack: Stack) -> list[Sequence[Tensor]]:
    """The weights of each layer and direction."""
    step = len(weights) // (stack.num_layers * stack.directions)
    return [weights[k : k + step] for k in range(0, len(weights), step)]


def _engine_layers(engine: str) -> Callable[..., Result]:
    """Runs the stack layer by layer through the custom op, with the recurrence done by ``engine``."""

    def run_layers(
        x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
    ) -> Result:
        D = stack.directions
        groups = _groups(weights, stack)
        states = []
        for layer in range(stack.num_layers):
            part = slice(layer * D, (layer + 1) * D)
            if layer > 0 and stack.dropout > 0:
                x = F.dropout(x, stack.dropout)
            x, *state = _layer(engine, x, h0[part], c0[part], groups[part], stack, batch_sizes)
            states.append(state)
        h_n, c_n = (torch.cat(s) if len(s) > 1 else s[0] for s in zip(*states, strict=True))
        return x, h_n, c_n

    return run_layers


# The kernels read rows of h and W_hh in vectors of 16 elements.
ALIGNMENT = 16


def _layer(
    engine: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    groups: Sequence[Sequence[Tensor]],
    stack: Stack,
    batch_sizes: Tensor | None,
) -> Result:
    """One layer, both directions at once. h0 (D, B, Hout), c0 (D, B, H)."""
    join = (lambda k: torch.stack([g[k] for g in groups])) if len(groups) > 1 else (lambda k: groups[0][k].unsqueeze(0))
    w_ih, w_hh = join(0), join(1)
    bias = join(2) + join(3) if stack.has_biases else None
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
    tensors = (x, h0, c0, w_ih, w_hh, bias, w_h0)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    call = FusedLSTMFunction.apply if save else ops.layer_forward
    directions = 2 if stack.bidirectional else 1
    y, h_n, c_n, _, _ = call(*tensors, None, batch_sizes, None, directions, stack.batch_first, save, engine)
    if pad or w_hr is not None:
        y = y.unflatten(-1, (R, H + pad))[..., :H]
        h_n, c_n = h_n[..., :H], c_n[..., :H]
        if w_hr is not None:
            y = torch.einsum("...rh,rph->...rp", y, w_hr)
            h_n = h_n @ w_hr.mT
        y = y.flatten(-2)
    return y, h_n, c_n


def _pad_gates(w: Tensor, pad: int) -> Tensor:
    """(R, 4H, ...) to (R, 4(H+pad), ...), each gate padded with zeros."""
    w = w.unflatten(1, (4, -1))
    return F.pad(w, (0, 0) * (w.dim() - 3) + (0, pad)).flatten(1, 2)


def _aten(x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None) -> Result:
    """torch's own LSTM. Its training flag is set whenever dropout acts or a gradient is needed: cuDNN keeps what its
    backward pass needs only then, and with dropout at 0 the flag changes nothing else."""
    train = stack.dropout > 0 or torch.is_grad_enabled()
    weights = list(weights)
    if batch_sizes is not None:
        return _VF.lstm(
            x,
            batch_sizes,
            (h0, c0),
            weights,
            stack.has_biases,
            stack.num_layers,
            stack.dropout,
            train,
            stack.bidirectional,
        )
    return _VF.lstm(
        x,
        (h0, c0),
        weights,
        stack.has_biases,
        stack.num_layers,
        stack.dropout,
        train,
        stack.bidirectional,
        stack.batch_first,
    )


def _in_fp32(runner: Callable[..., Result]) -> Callable[..., Result]:
    """A runner that computes fp16 and bf16 in fp32 and rounds at the end."""

    def run_in_fp32(
        x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
    ) -> Result:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return runner(x, h0, c0, weights, stack, batch_sizes)
        wide = runner(x.float(), h0.float(), c0.float(), [w.float() for w in weights], stack, batch_sizes)
        y, h_n, c_n = (t.to(x.dtype) for t in wide)
        return y, h_n, c_n

    return run_in_fp32


def _aten_cell(
    x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
) -> Result:
    """A single time step: a cell per layer and direction."""
    x = x.squeeze(1 if stack.batch_first else 0)
    D = stack.directions
    groups = _groups(weights, stack)
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


RUNNERS: dict[str, Callable[..., Result]] = {
    "triton": _engine_layers("triton"),
    "reference": _in_fp32(_engine_layers("reference")),
    "fused": _aten,
    "fp32": _in_fp32(_aten),
    "cell": _in_fp32(_aten_cell),
}
