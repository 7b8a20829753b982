"""The layer's place in autograd: first derivatives by the explicit backward op, higher ones through the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .spec import no_autocast

# The differentiable inputs of layer_forward come first: x, h0, c0, w_ih, w_hh, bias, w_h0.
N_INPUTS = 7


class FusedLSTMFunction(torch.autograd.Function):
    """:func:`fused_lstm.ops.layer_forward` with a gradient; the same arguments and results."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.layer_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, directions, batch_first, save, engine = inputs[:14]
        y, _, _, gates, c_all = output
        ctx.mark_non_differentiable(gates, c_all)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, gates, c_all)
        ctx.options = (directions, batch_first, engine)
        ctx.saved_states = save

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: Any) -> tuple:
        if not ctx.saved_states:
            raise RuntimeError("fused_lstm: this layer was run with save=False, so it has nothing to differentiate by")
        *tensors, y, gates, c_all = ctx.saved_tensors
        state = tensors[2]
        dy = y.new_zeros(y.shape) if dy is None else dy
        dh_n = state.new_zeros(state.shape) if dh_n is None else dh_n
        dc_n = state.new_zeros(state.shape) if dc_n is None else dc_n
        needs = list(ctx.needs_input_grad[:N_INPUTS])
        grads = FusedLSTMBackward.apply(dy, dh_n, dc_n, *tensors, y, gates, c_all, *ctx.options, needs)
        others = len(ctx.needs_input_grad) - N_INPUTS  # torch leaves out what is given as its default
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * others


class FusedLSTMBackward(torch.autograd.Function):
    """:func:`fused_lstm.ops.layer_backward` with a gradient of its own, so that it can be differentiated again.

    y, gates and cell states count as constants here: the second derivative recomputes them, with the loop of
    :func:`fused_lstm.reference.layer`, as functions of the inputs. Only those who ask for it pay for it.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.layer_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, _, _, _, directions, batch_first, _, needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.needs = (directions, batch_first), needs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        *tensors, lengths, batch_sizes, resets = ctx.saved_tensors  # dy, dh_n, dc_n and the seven inputs
        wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), no_autocast(tensors[3]):
            # Views, so that what lies behind an input (x behind h0, say) is not differentiated here.
            fresh = [None if t is None else (t.view_as(t) if t.requires_grad else t) for t in tensors]
            inputs = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in fresh[3:]]
            fresh[3:] = inputs
            outputs = reference.layer(*inputs, lengths, batch_sizes, resets, *ctx.options)
            by = [t for t, need in zip(inputs, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(outputs, by, fresh[:3], create_graph=True, allow_unused=True)
            given = [g for g, need in zip(grads, ctx.needs, strict=True) if need]
            pairs = [(f, g) for f, g in zip(first, given, strict=True) if g is not None and f is not None]
            second = torch.autograd.grad(
                [f for f, _ in pairs], [fresh[i] for i in wanted], [g for _, g in pairs],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, g in zip(wanted, second, strict=True):
            result[i] = g
        return tuple(result)


for _op, _function in (("layer_forward", FusedLSTMFunction), ("layer_backward", FusedLSTMBackward)):
    torch.library.register_autograd(f"fused_lstm::{_op}", _function.backward, setup_context=_function.setup_context)
