"""The stack of layers as a function of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import aten, engine, segments, transforms
from .dispatch import Problem, choose_backend, how_compiled, unknown_sizes
from .spec import PLAIN, Result, Runner, Sequences, Stack, as_lengths, as_resets, check_batch_sizes


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
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    recompute: bool = False,
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
        lengths: (B,) integers, 0 to T, on any device: the steps of each batch row. Output past them is zero; h_n and c_n are
            those of a row's last step; the reverse direction starts there.
        resets: bool, integer or float, (T, B), or (B, T) if ``batch_first``. Where not zero, a new episode begins at t: h
            and c are zero before step t, and neither values nor gradients pass, in any layer or direction.
        backend: ``"auto"``, ``"triton"``, ``"aten"`` or ``"reference"``; see :func:`fused_lstm.explain`.
        recompute: keep no gates for the backward pass, which computes them again: less memory, more time.

    Returns:
        output, like input with D*Hout features; h_n and c_n, like h0 and c0.

    Raises:
        ValueError: wrong number of weights, wrong dtype, lengths or resets that do not fit, or unknown backend.
        RuntimeError: wrong shape or device, T = 0, or a backend that cannot serve the call.
    """
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(recompute).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"input should be a tensor, of a packed sequence its data, got: {type(input).__name__}")
    if isinstance(weights, Tensor) or not all(isinstance(w, Tensor) for w in weights):
        raise TypeError("weights should be a sequence of tensors")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    weights = list(weights)
    stack = Stack(has_biases, num_layers, dropout if training else 0.0, bidirectional, batch_first, recompute)
    check(input, hx, weights, stack, batch_sizes)
    hx, sequences = settle(input, hx, stack, batch_sizes, lengths, resets)
    return run(input, hx, weights, stack, sequences, backend)


def settle(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    stack: Stack,
    batch_sizes: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    resets: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], Sequences]:
    """Check what a call says of its sequences, for batched or packed input; returns the states to start from as well."""
    if lengths is None and resets is None and batch_sizes is None:
        return hx, PLAIN
    if batch_sizes is not None and not torch.compiler.is_compiling():
        check_batch_sizes(batch_sizes, input.shape[0])
    if lengths is None and resets is None:
        return hx, Sequences(batch_sizes)
    if batch_sizes is not None:
        raise ValueError(
            "lengths and resets are for padded input, got a packed sequence: pass the padded tensor and lengths= instead "
            "(torch.nn.utils.rnn.pad_packed_sequence gives both)"
        )
    B, T = input.shape[:2] if stack.batch_first else (input.shape[1], input.shape[0])
    if lengths is not None:
        lengths = as_lengths(lengths, T, B, input.device)
    if resets is not None:
        resets = as_resets(resets, tuple(input.shape[:2]), input.device)
        if T == 1 and lengths is None:  # then a reset is no more than a state of zero
            return _cleared(*hx, resets, stack), PLAIN
    return hx, PLAIN if lengths is None and resets is None else Sequences(None, lengths, resets)


def _cleared(h0: Tensor, c0: Tensor, resets: Tensor, stack: Stack) -> tuple[Tensor, Tensor]:
    """States of a single step with the rows cleared that begin an episode; backwards in time none begins there."""
    backwards = torch.arange(h0.shape[0], device=h0.device)[:, None, None] % stack.directions == 1
    keep = ~resets.reshape(-1, 1) | backwards
    return torch.where(keep, h0, 0), torch.where(keep, c0, 0)


def run(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    stack: Stack,
    sequences: Sequences,
    backend: str,
    runners: Mapping[str, Runner] | None = None,
) -> Result:
    """:func:`lstm` for arguments that were checked; ``runners`` take the place of the usual ones."""
    h0, c0 = hx
    if _autocast(input):
        input, h0, c0, *weights = (t.to(_cast_dtype(t)) for t in (input, h0, c0, *weights))
        with torch.autocast(input.device.type, enabled=False):
            check_like(input, (h0, c0), weights)
            return run(input, (h0, c0), weights, stack, sequences, backend, runners)
    if torch.compiler.is_compiling():  # without a look at T and B, which are to stay dynamic
        levels = (transforms.active(), transforms.differentiates() or transforms.forward_mode())
        projected = len(weights) // (stack.num_layers * stack.directions) > (4 if stack.has_biases else 2)
        how = how_compiled(input.device.type, input.dtype, projected, *levels, backend)
        if how == "onednn" and not unknown_sizes():
            stack = dataclasses.replace(stack, recompute=True)
    else:
        how = choose_backend(problem_of(input, h0, c0, weights, stack, sequences), backend).how
    return (runners or RUNNERS)[how](input, h0, c0, weights, stack, sequences)


def _autocast(x: Tensor) -> bool:
    """Whether autocast acts on x's device; the meta device, for one, does not know it."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype x is computed in: as torch's own autocast does, which leaves fp64 alone."""
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) and x.dtype != torch.float64 else x.dtype


def problem_of(
    input: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences
) -> Problem:
    """What dispatch needs to know of a call. Raises RuntimeError for T = 0, as torch does."""
    time_dim = 1 if stack.batch_first else 0
    T = input.shape[time_dim] if sequences.batch_sizes is None else sequences.batch_sizes.shape[0]
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    H = c0.shape[2]
    return Problem(
        device=input.device.type,
        dtype=_cast_dtype(input),
        T=T,
        B=c0.shape[1],
        hidden_size=H,
        proj_size=h0.shape[2] if h0.shape[2] != H else 0,
        num_layers=stack.num_layers,
        bidirectional=stack.bidirectional,
        packed=sequences.batch_sizes is not None,
        lengths=sequences.lengths is not None,
        resets=sequences.resets is not None,
        recompute=stack.recompute,
        transformed=transforms.active(),
        ensemble=transforms.active() and transforms.mapped(weights),
        forward_mode=transforms.forward_mode(),
        needs_grad=torch.is_grad_enabled()
        and (input.requires_grad or h0.requires_grad or c0.requires_grad or any([w.requires_grad for w in weights])),
    )


def check(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
) -> None:
    """Shapes, dtypes and devices of a functional call, by the words that torch.nn.LSTM uses."""
    if stack.num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {stack.num_layers}")
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, (h0, c0), got {type(hx).__name__}")
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
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.shape[0])
    B = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if stack.batch_first else 1]
    step = len(weights) // groups
    P, H = weights[step - 1].shape if step > plain else (weights[1].shape[1],) * 2
    if step > plain and P >= H:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got weights of {P} and {H}")
    for group in range(groups):
        w = weights[group * step : (group + 1) * step]
        width = input.shape[-1] if group < stack.directions else stack.directions * P
        shapes = [(4 * H, width), (4 * H, P), *[(4 * H,)] * (plain - 2), *[(P, H)] * (step - plain)]
        for k, (tensor, shape) in enumerate(zip(w, shapes, strict=True)):
            if tensor.shape != shape:
                raise RuntimeError(f"Expected weights[{group * step + k}] size {shape}, got {list(tensor.shape)}")
            if tensor.dtype != weights[0].dtype or tensor.device != weights[0].device:
                raise ValueError(
                    f"weights should be of one dtype and device, got {weights[0].dtype} on {weights[0].device} and "
                    f"weights[{group * step + k}] of {tensor.dtype} on {tensor.device}"
                )
    for k, (tensor, width) in enumerate(zip(hx, (P, H), strict=True)):
        if tensor.shape != (groups, B, width):
            raise RuntimeError(f"Expected hidden[{k}] size {(groups, B, width)}, got {list(tensor.shape)}")
    check_like(input, hx, weights)


def check_like(input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor]) -> None:
    """Devices and dtypes of states and weights against the input's."""
    w, dtype, device = weights[0], input.dtype, input.device
    if w.device != device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {input.device} and "
            f"parameter tensor at {w.device}"
        )
    if w.dtype != dtype and not _autocast(input):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({w.dtype}). Convert input: "
            f"input.to({w.dtype}), or convert model: model.to({input.dtype})"
        )
    for k, state in enumerate(hx):
        if state.device != device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {input.device} and "
                f"hidden tensor at {state.device}"
            )
        if state.dtype != dtype and not _autocast(input):
            raise ValueError(
                f"hidden[{k}] dtype ({state.dtype}) does not match input dtype ({input.dtype}). Convert it: "
                f"hidden.to({input.dtype})"
            )


RUNNERS: dict[str, Runner] = {**engine.RUNNERS, **aten.RUNNERS, **segments.RUNNERS}
