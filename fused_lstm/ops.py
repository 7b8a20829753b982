"""The layer's place in torch: custom ops for compilers and torch.func, autograd for eager calls, vmap.

All of it wraps :mod:`fused_lstm.recurrence`. First derivatives go through its explicit backward pass, higher ones through
the readable loop. vmap's mapped dimension becomes more batch rows, or more recurrences: E members that share the recurrent
weights are one batch of E times as many rows; members with weights of their own (an ensemble) are E times as many
recurrences of one call. What fits neither way is run member by member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import recurrence, reference
from .call import Kept, LayerCall, active, check_batch_sizes, no_autocast

N_INPUTS = 9  # the differentiable inputs of a LayerCall come first: x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_h0, units
N_TENSORS = 13

_CALL = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_h0, "
    "Tensor? units, Tensor? lengths, Tensor? batch_sizes, Tensor? resets, Tensor? seed, int directions, bool batch_first, "
    "bool save, str engine, bool recompute, str cell"
)
_LIBRARY = torch.library.Library("fused_lstm", "DEF")
_LIBRARY.define(f"layer_forward({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_CALL}, Tensor y, Tensor gates, Tensor c, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward_op(*args: Any) -> tuple[Tensor, ...]:
    """What was not kept is empty: an op cannot return None."""
    call = LayerCall(*args)
    if call.batch_sizes is not None:  # a compiler, which knows no numbers, could not check them
        check_batch_sizes(call.batch_sizes, call.x.shape[0])
        B = int(call.batch_sizes[0])
        if any(state is not None and state.shape[1] != B for state in (call.h0, call.c0)):
            raise RuntimeError(f"Expected hidden states of {B} batch rows, as the packed input has")
    kept = recurrence.forward(call)
    return tuple(kept.y.new_empty(0) if t is None else t for t in kept)


def _backward_op(*args: Any) -> tuple[Tensor, ...]:
    """As above, and likewise for gradients that are not needed."""
    dy, dh_n, dc_n, *call, y, gates, c, needs = args
    grads = recurrence.backward(dy, dh_n, dc_n, LayerCall(*call), y, _unless_empty(gates), c, needs)
    return tuple(y.new_empty(0) if grad is None else grad for grad in grads)


def _unless_empty(gates: Tensor) -> Tensor | None:
    return gates if gates.dim() == 4 or gates.numel() else None


_LIBRARY.impl("layer_forward", _forward_op, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_backward", _backward_op, "CompositeExplicitAutograd")
layer_forward = torch.ops.fused_lstm.layer_forward.default
layer_backward = torch.ops.fused_lstm.layer_backward.default


@torch.library.register_fake(layer_forward)
def _(*args: Any) -> tuple[Tensor, ...]:
    call = LayerCall(*args)
    x, R, H = call.x, call.R, call.H
    N = math.prod(x.shape[:-1])  # shape.numel() would fix the symbols of a dynamic shape
    B = call.c0.shape[1] if call.c0 is not None else x.shape[0 if call.batch_first else 1]
    gates = x.new_empty((N, R, 4, H) if call.save and not call.recompute else 0)
    c = x.new_empty((N, R, H) if call.save else 0)
    if call.engine == "onednn":
        size = torch.library.get_ctx().new_dynamic_size() if call.save and not call.recompute else 0
        gates, c = x.new_empty(size, dtype=torch.uint8), x.new_empty((R, B, H) if call.save else 0)
    return x.new_empty(*x.shape[:-1], R * H), x.new_empty(R, B, H), x.new_empty(R, B, H), gates, c


@torch.library.register_fake(layer_backward)
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, y, needs = args[3 : 3 + N_INPUTS], args[-4], args[-1]
    return tuple(y.new_empty(t.shape if need and t is not None else 0) for t, need in zip(inputs, needs, strict=True))


PLAIN_TENSORS = {Tensor, nn.Parameter, type(None)}


def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody looks on: no compiler, no tracer, no transform, no mode, no subclass of Tensor."""
    return not (
        torch.compiler.is_compiling()
        or active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    ) and PLAIN_TENSORS.issuperset(map(type, tensors))


def layer(call: LayerCall) -> Kept:
    """Run one layer, with a gradient if it saves what that needs: eager calls at once, all others as an op."""
    if plain(call[:N_TENSORS]):
        if call.save and torch.is_grad_enabled():
            return Kept(*_apply(*call), None, None)  # gates and cell states are the gradient's own
        return recurrence.forward(call)
    if call.save and active() and not torch.compiler.is_compiling():
        return Kept(*MappedLayerFunction.apply(*call))
    return Kept(*layer_forward(*call))


legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _keep(ctx: Any, inputs: tuple, output: Kept) -> None:
    """Keep for the backward pass what a forward pass was given, and what it computed."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:N_TENSORS], output[0], output[3], output[4])
    ctx.options = inputs[N_TENSORS:]


def _keep_of_op(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    _keep(ctx, inputs, output)


def _differentiate(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, *_: None) -> tuple:
    """Gradients by all inputs of a forward pass."""
    if not ctx.options[2]:
        raise RuntimeError("fused_lstm: this layer was run with save=False, so it has nothing to differentiate by")
    *tensors, y, gates, c = ctx.saved_tensors
    grads, needs = (dy, dh_n, dc_n), ctx.needs_input_grad
    rest = [None] * (len(needs) - N_INPUTS)  # torch has no entry for an argument that equals its default
    if dy is None and dh_n is None and dc_n is None:
        return *[None] * N_INPUTS, *rest
    call, needs = (*tensors, *ctx.options), needs[:N_INPUTS]
    # A compiler is to look no further; is_grads_batched maps without being a transform.
    if plain((*grads, *tensors)) and not any([g is not None and legacy_batched(g) for g in grads]):
        saved = y, None if gates is None else _unless_empty(gates), c, needs
        if torch.is_grad_enabled():
            return *LayerGradient.apply(*grads, *call, *saved), *rest
        return *recurrence.backward(*grads, LayerCall(*call), *saved), *rest
    op = MappedLayerGradient.apply if active() else layer_backward
    found = op(*grads, *call, y, y.new_empty(0) if gates is None else gates, c, list(needs))
    return *[grad if need else None for grad, need in zip(found, needs, strict=True)], *rest


class LayerFunction(torch.autograd.Function):
    """:func:`fused_lstm.recurrence.forward` with a gradient, for eager calls: y, h_n and c_n of a LayerCall's fields."""

    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(
        ctx: Any, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_h0, units, lengths, batch_sizes, resets,
        seed, directions, batch_first, save, engine, recompute, cell,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        call = LayerCall(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_h0, units, lengths, batch_sizes, resets,
            seed, directions, batch_first, save, engine, recompute, cell,
        )  # fmt: skip
        kept = recurrence.forward(call)
        # Where the gates tell y, as they do the explicit path, it is not kept, and users may change it in place.
        found = engine == "reference" and kept.gates is not None and not cell
        _keep(ctx, call, kept._replace(y=kept.y.new_empty(0)) if found else kept)
        return kept[:3]


# Function.apply without what it does for torch.func, which no plain call is under.
_apply = super(torch.autograd.Function, LayerFunction).apply


def _keep_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, directions, batch_first, save, engine, recompute, cell, _, _, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options, ctx.needs = (directions, batch_first, save, engine, recompute, cell), needs


def _differentiate_again(ctx: Any, *grads: Tensor | None) -> tuple:
    """Gradients by dy, dh_n, dc_n and the inputs of the forward pass, from those by its gradients.

    y, gates and cell states are constants in :class:`LayerGradient`: here the loop of :func:`fused_lstm.reference.layer`
    computes them again, as functions of the inputs. Only those who ask for a second derivative pay for it.
    """
    *tensors, lengths, batch_sizes, resets, seed = ctx.saved_tensors
    rest = (lengths, batch_sizes, resets, seed, *ctx.options)
    wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
    by = [3 + k for k, need in enumerate(ctx.needs) if need and tensors[3 + k] is not None]
    seen = [k for k in range(3) if tensors[k] is not None]  # of y, h_n and c_n: the others' cotangents are zero

    def first_order(*given: Tensor) -> tuple[Tensor, ...]:
        full = _replaced(tensors, wanted, given)

        def results(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = reference.layer(LayerCall(*_replaced(full, by, inputs)[3:], *rest))
            return tuple(found[k] for k in seen)

        _, pullback = torch.func.vjp(results, *[full[i] for i in by])
        return pullback(tuple(full[k] for k in seen))

    with no_autocast(tensors[3]):
        first, pullback = torch.func.vjp(first_order, *[tensors[i] for i in wanted])
        given = [grads[i - 3] for i in by]
        second = pullback(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(first, given, strict=True)))
    return tuple(_replaced([None] * len(ctx.needs_input_grad), wanted, second))


class LayerGradient(torch.autograd.Function):
    """:func:`fused_lstm.recurrence.backward` with a gradient of its own, so that it can be differentiated again."""

    backward = staticmethod(_differentiate_again)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        _keep_inputs(ctx, args, ())
        dy, dh_n, dc_n, *call, y, gates, c, needs = args
        return tuple(recurrence.backward(dy, dh_n, dc_n, LayerCall(*call), y, gates, c, needs))


def _replaced(tensors: Sequence[Tensor | None], where: Sequence[int], by: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors with those at the indices ``where`` replaced by others."""
    result = list(tensors)
    for i, t in zip(where, by, strict=True):
        result[i] = t
    return result


class MappedLayerFunction(torch.autograd.Function):
    """The op under torch.func, which does not follow the gradient that is registered for it."""

    setup_context = staticmethod(_keep_of_op)
    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, ...]:
        return layer_forward(*call)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Mapped:
        return map_forward(MappedLayerFunction.apply, info, in_dims, *args)


class MappedLayerGradient(torch.autograd.Function):
    """The backward op, likewise."""

    setup_context = staticmethod(_keep_inputs)
    backward = staticmethod(_differentiate_again)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *rest, y, gates, c, needs = args
        return layer_backward(*rest, y, y.new_empty(0) if gates is None else gates, c, needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Mapped:
        return map_backward(MappedLayerGradient.apply, info, in_dims, *args)


INPUTS = LayerCall._fields[:N_TENSORS]
COTANGENTS = ("dy", "dh_n", "dc_n")
SAVED = ("y", "gates", "c")
CALL = slice(3, 3 + len(LayerCall._fields))  # of the backward op's arguments
WEIGHTS = slice(3, 9)  # of INPUTS

Call = Callable[..., tuple[Tensor, ...]]
Mapped = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


@dataclass(frozen=True)
class Fold:
    """A way to give tensors of E members to one call: ``at`` says which dimension of each grows E times."""

    E: int
    at: dict[str, int]
    in_front: bool  # whether members go in front of that dimension's own index, or behind it

    def fits(self, names: Sequence[str], tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> bool:
        return all(n in self.at or d is None for n, t, d in zip(names, tensors, dims, strict=True) if t is not None)

    def __call__(self, name: str, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        if name == "batch_sizes":
            return t if "w_hh" in self.at else t * self.E
        if name not in self.at or _absent(name, t):
            return t
        at = self.at[name]
        t = t.movedim(dim, 0) if dim is not None else t.expand(self.E, *t.shape)
        return t.movedim(0, at if self.in_front else at + 1).flatten(at, at + 1)

    def undo(self, name: str, t: Tensor) -> tuple[Tensor, int | None]:
        """The result and its mapped dimension."""
        if name not in self.at or _absent(name, t):
            return t, None
        at = self.at[name]
        n = t.shape[at] // self.E
        return (t.unflatten(at, (self.E, n)), at) if self.in_front else (t.unflatten(at, (n, self.E)), at + 1)


def _absent(name: str, t: Tensor) -> bool:
    """Whether a buffer was not kept, or a gradient not wanted. oneDNN's bytes, whose number no compiler knows, are there."""
    return t.dim() == 1 and t.dtype != torch.uint8 and t.numel() == 0 and name not in ("lengths", "resets")


STATES = ("h0", "c0", "h_n", "c_n", "dh_n", "dc_n")


def folds(E: int, call: LayerCall, x_dim: int | None) -> list[Fold]:
    """The ways there are for a call: into the batch rows, and into the recurrences. x is mapped over ``x_dim``."""
    last = call.x.dim() - 1 - (x_dim is not None)
    rows = 0 if call.batch_first or call.batch_sizes is not None else 1  # of data
    onednn = call.engine == "onednn"
    into_rows = dict.fromkeys(("x", "y", "dy", "resets"), rows) | dict.fromkeys(STATES, 1)
    into_rows |= dict.fromkeys(("gates", "c", "lengths"), 0)
    into_recurrences = dict.fromkeys(("y", "dy"), last) | dict.fromkeys(STATES, 0) | dict.fromkeys(INPUTS[WEIGHTS], 0)
    into_recurrences |= dict.fromkeys(("gates", "c"), 0 if onednn else 1)
    if call.w_ih is None or onednn:  # x has features for each recurrence, or for each member
        into_recurrences["x"] = last
    # Data rows are counted by time first, or by batch row; members are to stand next to their batch row in either.
    in_front = rows == 0 and call.batch_sizes is None
    ways = [Fold(E, into_rows, in_front), Fold(E, into_recurrences, in_front=True)]
    if call.seed is not None:  # masks are drawn by batch row and recurrence: each member's would be others
        return []
    return ways[1:] if onednn else ways  # whose saved bytes know nothing of batch rows


def map_forward(call: Call, info: Any, in_dims: tuple, *args: Any) -> Mapped:
    """The vmap rule of the forward op, which ``call`` is, or has its arguments."""
    if info.batch_size == 0:
        raise ValueError("vmap over a dimension of size 0: expected at least one member")
    given, n = LayerCall(*args), len(INPUTS)
    tensors, dims, options = args[:n], in_dims[:n], args[n:]
    for fold in folds(info.batch_size, given, dims[0]):
        if fold.fits(INPUTS, tensors, dims):
            results = call(*map(fold, INPUTS, tensors, dims), *options)
            return _transposed([fold.undo(name, t) for name, t in zip(Kept._fields, results, strict=True)])
    return _one_by_one(call, info.batch_size, args, in_dims)


def map_backward(call: Call, info: Any, in_dims: tuple, *args: Any) -> Mapped:
    """The vmap rule of the backward op, whose gradients by weights are each member's own."""
    E, given, needs = info.batch_size, LayerCall(*args[CALL]), args[-1]
    names = (*COTANGENTS, *LayerCall._fields, *SAVED)
    values, dims = args[:-1], in_dims[:-1]
    ways = folds(E, given, dims[3])
    grads = [f"d{name}" for name in INPUTS[:N_INPUTS]]
    by_weights = any(needs[WEIGHTS])

    def folded_by(fold: Fold) -> dict[str, Any]:
        return {n: fold(n, v, d) if isinstance(v, Tensor) else v for n, v, d in zip(names, values, dims, strict=True)}

    by_all = by_weights and (given.w_ih is not None or needs[7] or given.cell)  # then by more than w_hh
    for fold in ways[:-1]:
        if fold.fits(names, values, dims) and not by_all:
            folded = folded_by(fold)
            first = [needs[0] or needs[4], needs[1], needs[2], *[False] * 6]
            results = call(*folded.values(), first)
            found = [fold.undo(g[1:], t) for g, t in zip(grads, results, strict=True)]
            if needs[4]:
                found[4] = _by_w_hh(fold, results[0], LayerCall(*list(folded.values())[CALL]), folded["y"]), 0
            if not needs[0]:
                found[0] = results[0].new_empty(0), None
            return _transposed(found)
    for fold in ways[-1:]:
        if "x" in fold.at and fold.fits(names, values, dims):
            results = call(*folded_by(fold).values(), needs)
            return _transposed([fold.undo(g[1:], t) for g, t in zip(grads, results, strict=True)])
    return _one_by_one(call, E, args, in_dims)


def _by_w_hh(fold: Fold, dgates: Tensor, call: LayerCall, y: Tensor) -> Tensor:
    """(E, R*4H, H): each member's gradient by the recurrent weights that all share, from those by all pre-activations."""
    R, H, rows = call.R, call.H, call.rows
    y, dgates = y.reshape(-1, R, H), dgates.reshape(-1, R, 4 * H)
    result = []
    for r in range(R):
        pair = (dgates[:, r], rows.previous(y, None if call.h0 is None else call.h0[r], r))
        a, h = (t.movedim(dim, 0) for t, dim in (fold.undo("gates", t) for t in pair))
        result.append(torch.bmm(a.mT, h))
    return torch.cat(result, 1)


def _one_by_one(call: Call, E: int, args: Sequence, dims: Sequence) -> Mapped:
    def member(e: int) -> tuple[Tensor, ...]:
        return call(*(t.select(d, e) if isinstance(d, int) else t for t, d in zip(args, dims, strict=True)))

    members = [member(e) for e in range(E)]
    return _transposed([(torch.stack(ts), 0) for ts in zip(*members, strict=True)])


def _transposed(pairs: Sequence[tuple[Tensor, int | None]]) -> Mapped:
    results, dims = zip(*pairs, strict=True)
    return results, dims


for _op, _keeps, _backwards, _rule in (
    (layer_forward, _keep_of_op, _differentiate, map_forward),
    (layer_backward, _keep_inputs, _differentiate_again, map_backward),
):
    torch.library.register_autograd(_op, _backwards, setup_context=_keeps)
    torch.library.register_vmap(_op, partial(_rule, _op))
