"""The layer's place in autograd: first derivatives by the explicit backward op, higher ones through the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import batching, ops, reference
from .spec import no_autocast

# The differentiable inputs of layer_forward come first: x, h0, c0, w_ih, w_hh, bias, w_h0.
N_INPUTS = 7


class FusedLSTMFunction(torch.autograd.Function):
    """:func:`fused_lstm.ops.layer_forward` with a gradient; the same arguments and results."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.layer_forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> batching.Mapped:
        return batching.forward(FusedLSTMFunction.apply, info, in_dims, *args)

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
    def vmap(info: Any, in_dims: tuple, *args: Any) -> batching.Mapped:
        return batching.backward(FusedLSTMBackward.apply, info, in_dims, *args)

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
        by = [3 + i for i, need in enumerate(ctx.needs) if need]

        def first_order(*given: Tensor) -> tuple[Tensor, ...]:
            full = _replaced(tensors, wanted, given)

            def results(*inputs: Tensor) -> tuple[Tensor, ...]:
                return reference.layer(*_replaced(full, by, inputs)[3:], lengths, batch_sizes, resets, *ctx.options)

            _, pullback = torch.func.vjp(results, *[full[i] for i in by])
            return pullback(tuple(full[:3]))

        with no_autocast(tensors[3]):
            first, pullback = torch.func.vjp(first_order, *[tensors[i] for i in wanted])
            given = [g for g, need in zip(grads, ctx.needs, strict=True) if need]
            second = pullback(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(first, given, strict=True)))
        return tuple(_replaced([None] * len(ctx.needs_input_grad), wanted, second))


def _replaced(tensors: Sequence[Tensor | None], where: Sequence[int], by: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors with those at the indices ``where`` replaced by others."""
    result = list(tensors)
    for i, t in zip(where, by, strict=True):
        result[i] = t
    return result


for _op, _function, _rule in (
    (ops.layer_forward, FusedLSTMFunction, batching.forward),
    (ops.layer_backward, FusedLSTMBackward, batching.backward),
):
    torch.library.register_autograd(_op, _function.backward, setup_context=_function.setup_context)
    torch.library.register_vmap(_op, partial(_rule, _op))
