"""vmap for the layer's functions: the mapped dimension becomes more batch rows, or more recurrences.

E members that share the recurrent weights are one batch of E times as many rows. Members with weights of their own (an
ensemble) are E times as many recurrences of one call. What fits neither way is run member by member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import Rows

INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "bias", "w_h0", "lengths", "batch_sizes", "resets")
COTANGENTS = ("dy", "dh_n", "dc_n")
SAVED = ("y", "gates", "c_all")
WEIGHTS = slice(3, 7)  # of INPUTS

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


def folds(E: int, x: Tensor, x_dim: int | None, w_ih: Any, batch_sizes: Any, batch_first: bool, engine: str) -> list[Fold]:
    """The ways there are for a call: into the batch rows, and into the recurrences."""
    last = x.dim() - 1 - (x_dim is not None)
    rows = 0 if batch_first or batch_sizes is not None else 1  # of data
    into_rows = dict.fromkeys(("x", "y", "dy", "resets"), rows) | dict.fromkeys(STATES, 1)
    into_rows |= dict.fromkeys(("gates", "c_all", "lengths"), 0)
    into_recurrences = dict.fromkeys(("y", "dy"), last) | dict.fromkeys(STATES, 0) | dict.fromkeys(INPUTS[WEIGHTS], 0)
    into_recurrences |= dict.fromkeys(("gates", "c_all"), 0 if engine == "onednn" else 1)
    if w_ih is None or engine == "onednn":  # x has features for each recurrence, or for each member
        into_recurrences["x"] = last
    # Data rows are counted by time first, or by batch row; members are to stand next to their batch row in either.
    ways = [Fold(E, into_rows, in_front=rows == 0 and batch_sizes is None), Fold(E, into_recurrences, in_front=True)]
    return ways[1:] if engine == "onednn" else ways  # whose saved bytes know nothing of batch rows


def forward(call: Call, info: Any, in_dims: tuple, *args: Any) -> Mapped:
    """The vmap rule of :func:`fused_lstm.ops.layer_forward`, which ``call`` is, or has its arguments."""
    if info.batch_size == 0:
        raise ValueError("vmap over a dimension of size 0: expected at least one member")
    n = len(INPUTS)
    tensors, dims, options = args[:n], in_dims[:n], args[n:]
    _, batch_first, _, engine, *_ = options
    for fold in folds(info.batch_size, tensors[0], dims[0], tensors[3], tensors[8], batch_first, engine):
        if fold.fits(INPUTS, tensors, dims):
            results = call(*map(fold, INPUTS, tensors, dims), *options)
            names = ("y", "h_n", "c_n", "gates", "c_all")
            return _transposed([fold.undo(name, t) for name, t in zip(names, results, strict=True)])
    return _one_by_one(call, info.batch_size, tensors, dims, options)


def backward(call: Call, info: Any, in_dims: tuple, *args: Any) -> Mapped:
    """The vmap rule of :func:`fused_lstm.ops.layer_backward`, whose gradients by weights are each member's own."""
    names = (*COTANGENTS, *INPUTS, *SAVED)
    n, E = len(names), info.batch_size
    tensors, dims, options = args[:n], in_dims[:n], args[n:]
    directions, batch_first, engine, needs = options
    x, w_ih, w_hh, batch_sizes = tensors[3], tensors[6], tensors[7], tensors[11]
    *into_rows, into_recurrences = folds(E, x, dims[3], w_ih, batch_sizes, batch_first, engine)
    grads = [f"d{name}" for name in INPUTS[:7]]
    by_weights = any(needs[WEIGHTS])
    for fold in into_rows:
        if fold.fits(names, tensors, dims) and (not by_weights or (w_ih is None and not needs[6])):
            folded = dict(zip(names, map(fold, names, tensors, dims), strict=True))
            first = [needs[0] or needs[4], needs[1], needs[2], False, False, False, False]
            results = call(*folded.values(), directions, batch_first, engine, first)
            found = [fold.undo(g[1:], t) for g, t in zip(grads, results, strict=True)]
            if needs[4]:
                found[4] = _by_w_hh(fold, results[0], folded, w_hh, directions, batch_first), 0
            if not needs[0]:
                found[0] = results[0].new_empty(0), None
            return _transposed(found)
    if "x" in into_recurrences.at and into_recurrences.fits(names, tensors, dims):
        results = call(*map(into_recurrences, names, tensors, dims), *options)
        return _transposed([into_recurrences.undo(g[1:], t) for g, t in zip(grads, results, strict=True)])
    return _one_by_one(call, E, tensors, dims, options)


def _by_w_hh(fold: Fold, dgates: Tensor, folded: dict[str, Any], w_hh: Tensor, directions: int, batch_first: bool) -> Tensor:
    """(E, R, 4H, H): each member's gradient by the recurrent weights that all share, from those by all pre-activations."""
    R, _, H = w_hh.shape
    sequences = (folded["lengths"], folded["batch_sizes"], folded["resets"])
    rows = Rows.of(folded["x"], folded["c0"], *sequences, directions, batch_first)
    y, dgates = folded["y"].reshape(-1, R, H), dgates.reshape(-1, R, 4 * H)
    result = []
    for r in range(R):
        pair = (dgates[:, r], rows.previous(y, folded["h0"][r], r))
        a, h = (t.movedim(dim, 0) for t, dim in (fold.undo("gates", t) for t in pair))
        result.append(torch.bmm(a.mT, h))
    return torch.stack(result, 1)


def _one_by_one(call: Call, E: int, tensors: Sequence, dims: Sequence, options: Sequence) -> Mapped:
    members = [
        call(*(t if d is None else t.select(d, e) for t, d in zip(tensors, dims, strict=True)), *options) for e in range(E)
    ]
    return _transposed([(torch.stack(ts), 0) for ts in zip(*members, strict=True)])


def _transposed(pairs: Sequence[tuple[Tensor, int | None]]) -> Mapped:
    results, dims = zip(*pairs, strict=True)
    return results, dims
