"""To ONNX, where each layer becomes one LSTM operator. Needs onnx and onnxscript.

What follows :func:`translation_table` writes ONNX's operators, ``op``, for symbolic tensors that torch.onnx.export hands in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

try:
    from onnxscript import opset18 as op
except ImportError as error:
    raise ImportError(f"fused_lstm.onnx needs onnx and onnxscript: pip install onnx onnxscript ({error})") from error

DIRECTIONS = {1: "forward", -1: "reverse", 2: "bidirectional"}
INT32 = 6  # as ONNX numbers dtypes


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> torch.onnx.ONNXProgram | None:
    """Export a model with :class:`fused_lstm.LSTM` layers: :func:`torch.onnx.export`, told how to translate them.

    Layers in fp32 are translated, and in fp16 and bf16, which compute in fp32 as they do on a CPU; both directions, states,
    projections and ``lengths`` included. fp64 is translated too, but onnxruntime has no LSTM in fp64. ``resets`` and packed
    sequences are not: ONNX's LSTM cannot express them.

    Args:
        model: a module on the CPU, as a rule in eval mode, or what :func:`torch.export.export` made of one.
        args, kwargs: example arguments of the model's forward. Sizes that are to stay dynamic should be 2 or more in them.
        f: the file to write; None only returns the program.
        dynamic_shapes: the sizes that stay dynamic, argument by argument, as :func:`torch.onnx.export` takes them.
        options: more for :func:`torch.onnx.export`, such as ``input_names``, or a ``custom_translation_table`` of other ops.

    Returns:
        the program as torch.onnx.export returns it: ``program.model_proto`` is the model, ``program.save(f)`` writes it.

    Raises:
        NotImplementedError: a layer was called with ``resets``, with a packed sequence or under a vmap over its weights, or
            has a cell with peepholes, norms or zoneout.
        torch.onnx.OnnxExporterError: torch cannot export the model.
    """
    table = translation_table() | (options.pop("custom_translation_table", None) or {})
    with torch.no_grad():  # so that the layers keep nothing for a backward pass
        try:
            more = {"kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "custom_translation_table": table} | options
            return torch.onnx.export(model, args, f, dynamo=True, **more)
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Inexpressible):
                cause = cause.__cause__
            if cause is None:
                raise
            raise NotImplementedError(str(cause)) from error


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` with which :func:`torch.onnx.export` itself can translate the layers."""
    return {torch.ops.fused_lstm.layer_forward.default: layer}


class Inexpressible(NotImplementedError):
    """A layer asks for what ONNX's LSTM operator cannot do."""


# Tensors have no annotations here: torch.onnx tells inputs from attributes by them.
def layer(
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_h0, units, lengths, batch_sizes, resets, seed,
    directions: int, batch_first: bool, save: bool, engine: str, recompute: bool, cell: str,
):  # fmt: skip
    """A :class:`fused_lstm.call.LayerCall`, field by field, in ONNX's operators."""
    if cell:
        raise Inexpressible(f"a cell with {cell} is not translated to ONNX; torch's cell, coupled gates and heads are")
    if resets is not None:
        raise Inexpressible("resets cannot be exported: ONNX's LSTM has no means to clear its state between two steps")
    if batch_sizes is not None:
        raise Inexpressible("packed sequences cannot be exported: call the layer with padded input and lengths= instead")
    H = w_hh.shape[1]
    R = w_hh.shape[0] // (4 * H)
    if w_ih is None or abs(directions) != R:
        raise Inexpressible("heads, or vmap over a layer's weights, cannot be exported: ONNX's LSTM has one set of weights")
    if batch_first:  # onnxruntime's LSTM knows time-major data only
        x = op.Transpose(x, perm=[1, 0, 2])
    start = h0
    w_ih, w_hh, w_h0 = (None if w is None else _by_direction(w, R) for w in (w_ih, w_hh, w_h0))
    if w_h0 is not None:
        x, w_ih, start = _with_first(x, h0, lengths, directions), _beside(w_ih, w_h0, R), None
    bias = None if b_ih is None else op.Concat(*(_gates(_by_direction(b, R), H) for b in (b_ih, b_hh)), axis=1)
    ends = None if lengths is None else op.Cast(lengths, to=INT32)
    y, h_n, c_n = op.LSTM(
        x, _gates(w_ih, H), _gates(w_hh, H), bias, ends, start, c0, hidden_size=H, direction=DIRECTIONS[directions]
    )
    y = op.Transpose(y, perm=[2, 0, 1, 3] if batch_first else [0, 2, 1, 3])  # from (T, R, B, H)
    y = op.Reshape(y, op.Constant(value_ints=[0, 0, R * H]))
    if lengths is not None:  # of a row without steps the operator makes zeros, we hand through what it began with
        empty = op.Reshape(op.Equal(lengths, op.Constant(value_int=0)), op.Constant(value_ints=[1, -1, 1]))
        h_n = h_n if start is None else op.Where(empty, start, h_n)
        c_n = c_n if c0 is None else op.Where(empty, c0, c_n)
    # Nothing reads the gates and cell states, which are for a backward pass; what stands for them is dropped.
    return y, h_n, c_n, op.Identity(c_n), op.Identity(c_n)


def _by_direction(w, R: int):
    """(R*n, ...) to (R, n, ...)."""
    return op.Reshape(w, op.Constant(value_ints=[R, w.shape[0] // R, *w.shape[1:]]))


def _gates(w, H: int):
    """w (R, 4H, ...) from torch's order of gates, i, f, g, o, to ONNX's: i, o, f, c, where c is torch's g."""
    order = [k * H + unit for k in (0, 3, 1, 2) for unit in range(H)]
    return op.Gather(w, op.Constant(value_ints=order), axis=1)


def _with_first(x, h0, lengths, directions: int):
    """x (T, B, I) with further features for each recurrence: its h0 (B, P) at its first step, elsewhere zeros.

    A recurrence with a projection folded into w_hh starts at zero and meets h0 in the first pre-activations, which the
    operator makes of x alone.
    """
    steps = op.Shape(x, start=0, end=1)
    t = op.Range(op.Constant(value_int=0), op.Squeeze(steps), op.Constant(value_int=1))
    t = op.Reshape(t, op.Constant(value_ints=[-1, 1, 1]))
    last = op.Sub(steps if lengths is None else lengths, op.Constant(value_int=1))
    last = op.Reshape(last, op.Constant(value_ints=[1, -1, 1]))
    backwards = {1: [False], -1: [True], 2: [False, True]}[directions]
    firsts = [last if back else op.Constant(value_int=0) for back in backwards]
    h0 = op.Split(h0, num_outputs=len(firsts), axis=0) if len(firsts) > 1 else [h0]
    zero = op.CastLike(op.Constant(value_floats=[0.0]), x)
    parts = [op.Where(op.Equal(t, first), h, zero) for first, h in zip(firsts, h0, strict=True)]
    return op.Concat(x, *parts, axis=2)


def _beside(w_ih, w_h0, R: int):
    """The weights (R, 4H, I + R*P) of what :func:`_with_first` made: each recurrence's w_h0 meets its own h0 only."""
    own = [op.Constant(value_floats=[float(q == r) for q in range(R)]) for r in range(R)]
    own = [op.Reshape(op.CastLike(mask, w_h0), op.Constant(value_ints=[R, 1, 1])) for mask in own]
    return op.Concat(w_ih, *[op.Mul(w_h0, mask) for mask in own], axis=2)
