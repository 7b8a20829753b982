"""Backward passes in every mode: after inference, again, by some tensors only, from some results only."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from pairs import NUMPYS, all_equal, assert_all_close, every_backend, every_quick_backend, flat, pair, randn, states
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("error", NUMPYS)

SHAPES = {"T = 1": (1, 3, 3), "T = 4": (4, 3, 3), "unbatched": (4, 3)}
KINDS = {
    "padded": {},
    "lengths": {"lengths": [4, 1, 0]},
    "resets": {"resets": torch.arange(12).view(4, 3) % 5 == 2},
    "recompute": {},
    "packed": {},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer_and_call(kind: str, backend: str) -> tuple[fused_lstm.LSTM, Tensor | PackedSequence, dict[str, Any]]:
    torch.manual_seed(0)
    layer = fused_lstm.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64, backend=backend, recompute=kind == "recompute")
    x = pack_sequence([randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False) if kind == "packed" else randn(4, 3, 3)
    return layer, x, KINDS[kind]


def loss(results: list[Tensor]) -> Tensor:
    return sum(t.square().sum() for t in results)


@every_backend
@each_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_after_inference(mode: type, kind: str, backend: str) -> None:
    """A call without gradients leaves nothing behind that a later one could not save for its backward pass."""
    used, x, options = layer_and_call(kind, backend)
    fresh = copy.deepcopy(used)
    with mode():
        used.eval()(x, **options)
    got = []
    for layer in (used.train(), fresh):
        results = flat(layer(x, **options))
        got.append([*results, *torch.autograd.grad(loss(results), list(layer.parameters()))])
    assert all_equal(*got)


@every_backend
@each_kind
def test_in_eval_mode_as_in_training(kind: str, backend: str) -> None:
    layer, x, options = layer_and_call(kind, backend)
    layer.dropout = 0.5
    layer.eval()
    results = flat(layer(x, **options))
    evaluated = torch.autograd.grad(loss(results), list(layer.parameters()))
    layer.dropout = 0.0
    layer.train()
    trained = torch.autograd.grad(loss(flat(layer(x, **options))), list(layer.parameters()))
    assert all_equal(evaluated, trained)


@every_backend
@each_kind
def test_retained_graph(kind: str, backend: str) -> None:
    """Each time the same gradients, and of each result alone what adds up to those of all."""
    layer, x, options = layer_and_call(kind, backend)
    results, by = flat(layer(x, **options)), list(layer.parameters())
    losses = [t.square().sum() for t in results]
    first, again = (torch.autograd.grad(sum(losses), by, retain_graph=True) for _ in range(2))
    assert all_equal(first, again)
    parts = [torch.autograd.grad(part, by, retain_graph=True) for part in losses]
    assert_all_close([sum(grads) for grads in zip(*parts, strict=True)], list(first))


@every_quick_backend
@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_subset_of_tensors(shape: str, proj: int, backend: str) -> None:
    """Whatever is frozen, input, state or weight: the gradients of the rest are those of the call with nothing frozen."""
    torch.manual_seed(0)
    layer = fused_lstm.LSTM(3, 4, proj_size=proj, bias=proj == 0, dtype=torch.float64, backend=backend)
    x, hx = randn(*SHAPES[shape]), states(1, *SHAPES[shape][1:-1], 4, proj=proj)
    tensors = [x, *hx, *layer.parameters()]

    def gradients(needed: tuple[bool, ...]) -> list[Tensor | None]:
        for t, need in zip(tensors, needed, strict=True):
            t.requires_grad_(need).grad = None
        loss(flat(layer(x, hx))).backward()
        return [t.grad for t in tensors]

    all_needed = gradients((True,) * len(tensors))
    for needed in itertools.product((False, True), repeat=len(tensors)):
        if any(needed):
            for grad, whole, need in zip(gradients(needed), all_needed, needed, strict=True):
                assert (grad is not None) == need, needed
                if need:
                    torch.testing.assert_close(grad, whole)


@every_quick_backend
@pytest.mark.parametrize("frozen", list(itertools.product((False, True), repeat=4)))
def test_frozen_layers_and_directions(frozen: tuple[bool, ...], backend: str) -> None:
    """torch.nn.LSTM beside it, which leaves the same gradients out."""
    got = []
    for module in pair(3, 4, 2, bidirectional=True, dtype=torch.float64, backend=backend):
        for names, freeze in zip(module._all_weights, frozen, strict=True):
            for name in names:
                getattr(module, name).requires_grad_(not freeze)
        results = flat(module(randn(4, 2, 3)))
        assert all(t.requires_grad != all(frozen) for t in results)
        if not all(frozen):
            loss(results).backward()
        got.append([p.grad for p in module.parameters()])
    assert [g is None for g in got[1]] == [g is None for g in got[0]]
    assert_all_close(*([g for g in grads if g is not None] for grads in reversed(got)))


@every_backend
@each_kind
@pytest.mark.parametrize("k", [1, 2], ids=["h_n", "c_n"])
def test_from_a_state_alone(k: int, kind: str, backend: str) -> None:
    """As by the chain rule from the single step that a row ends with: output past it has no part in its gradient."""
    layer, x, options = layer_and_call(kind, backend)
    results = flat(layer(x, **options))
    grads = torch.autograd.grad(results[k].sum(), [*layer.parameters()], materialize_grads=True, retain_graph=True)
    cotangents = [torch.zeros_like(t) for t in results]
    cotangents[k] += 1
    with_zeros = torch.autograd.grad(results, [*layer.parameters()], cotangents)
    assert_all_close(list(grads), list(with_zeros))
    assert all(g.any() for name, g in zip(dict(layer.named_parameters()), grads, strict=True) if "l0" in name)
