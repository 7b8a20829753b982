"""What is done in place to gradients that parameters hold: accumulation, clipping; each gradient is memory of its own."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from pairs import assert_all_close, every_backend, flat, pair, randn
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

HAS_CXX = shutil.which(os.environ.get("CXX", "g++")) is not None
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(not HAS_CXX, reason="needs a C++ compiler"))
CALLS: dict[str, dict[str, Any]] = {"plain": {}, "lengths": {"lengths": [4, 1, 2]}, "resets": {"resets": torch.eye(4, 3)}}


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_share_no_memory(recompute: bool, steps: int, proj: int, bidirectional: bool, backend: str) -> None:
    """As two views of one tensor would: autograd hands such views to the parameters as they are."""
    layer = fused_lstm.LSTM(3, 4, bidirectional=bidirectional, proj_size=proj, backend=backend, recompute=recompute)
    flat(layer(randn(steps, 2, 3, dtype=torch.float32)))[0].sum().backward()
    for k, parameter in enumerate(layer.parameters()):
        parameter.grad.fill_(k)
    assert all((p.grad == k).all() for k, p in enumerate(layer.parameters()))


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [*CALLS, "packed"])
def test_accumulation(kind: str, bidirectional: bool, backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, bidirectional=bidirectional, dtype=torch.float64, backend=backend)
    x = pack_sequence([randn(n, 3) for n in (4, 2, 1)]) if kind == "packed" else randn(4, 3, 3)
    losses = [t.square().sum() for t in flat(layer(x, **CALLS.get(kind, {})))]
    once = torch.autograd.grad(sum(losses), list(layer.parameters()), retain_graph=True)
    for loss in (*losses, sum(losses)):
        loss.backward(retain_graph=True)
    assert_all_close([p.grad for p in layer.parameters()], [2 * g for g in once])


@every_backend
@pytest.mark.parametrize("k", [0, 1, 2], ids=["output", "h_n", "c_n"])
def test_training_with_accumulation_and_clipping(k: int, backend: str) -> None:
    """On one result alone, two batches to a step; torch.nn.LSTM beside it."""
    got = []
    for module in pair(3, 4, 2, batch_first=True, dtype=torch.float64, backend=backend):
        optimizer = torch.optim.SGD(module.parameters(), 0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            for x in (randn(2, 5, 3), randn(2, 3, 3)):
                flat(module(x))[k].square().sum().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
        got.append(list(module.parameters()))
    assert_all_close(got[1], got[0])


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_accumulation_of_a_compiled_layer(backend: str, compiler: str) -> None:
    """A compiler may see that two gradients are equal and compute them once, but not keep them in one place."""
    torch.compiler.reset()
    layer, x = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend=backend), randn(4, 2, 3)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    compiled(x)[0].square().sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    compiled(x)[0].square().sum().backward()
    assert_all_close([p.grad for p in layer.parameters()], [2 * g for g in once])
