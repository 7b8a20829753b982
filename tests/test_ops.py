"""The custom ops and their autograd Function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import DEVICE
from test_reference import problem
from torch import Tensor

from fused_lstm import ops, recurrence, reference
from fused_lstm.call import LayerCall

CASES: dict[str, dict[str, Any]] = {
    "padded": dict(T=3, B=2),
    "both directions, batch first": dict(T=3, B=2, directions=2, batch_first=True),
    "lengths": dict(T=3, B=3, lengths=[3, 1, 2]),
    "resets": dict(T=4, B=3, directions=2, resets=True),
    "projected, no bias": dict(T=2, B=2, K=2, bias=False),
}


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        *((case, "reference") for case in CASES),
        *(pytest.param(case, "triton", marks=pytest.mark.kernels) for case in ("lengths", "projected, no bias")),
    ],
)
def test_opcheck(case: str, engine: str) -> None:
    tensors, options = problem(**CASES[case])
    if engine == "triton":
        tensors = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in tensors]
        lengths, batch_sizes, resets, *rest = options
        options = (*(None if t is None else t.to(DEVICE) for t in (lengths, batch_sizes, resets)), *rest)
    torch.library.opcheck(ops.layer_forward, (*tensors, *options, True, engine, False, ""))
    with torch.no_grad():
        y, h_n, c_n, gates, c_all = ops.layer_forward(*tensors, *options, True, engine, False, "")
    needs = [t is not None for t in tensors]
    args = (y, h_n, c_n, *tensors, *options, True, engine, False, "", y, gates, c_all, needs)
    torch.library.opcheck(ops.layer_backward, args)


@pytest.mark.parametrize("case", CASES)
def test_op_and_function_agree(case: str) -> None:
    tensors, options = problem(**CASES[case])
    inputs = [t for t in tensors if t is not None]
    grads = []
    for run in (lambda call: ops.layer_forward(*call), ops.layer):
        y, h_n, c_n, _, _ = run(LayerCall(*tensors, *options, True, "reference", False))
        grads.append(torch.autograd.grad(y.sum() + (h_n * c_n).sum(), inputs))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (0, 2)])
def test_loss_of_some_outputs(outputs: tuple[int, ...]) -> None:
    tensors, options = problem(T=3, B=2)
    inputs = [t for t in tensors if t is not None]
    grads = []
    for call in (
        lambda: ops.layer(LayerCall(*tensors, *options, True, "reference", False)),
        lambda: reference.layer(LayerCall(*tensors, *options, False, "loop", False)),
    ):
        results = call()
        grads.append(torch.autograd.grad(sum(results[k].square().sum() for k in outputs), inputs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradients_that_nobody_needs_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = problem(T=3, B=2)
    tensors[0] = tensors[0].detach()
    tensors[4] = tensors[4].detach()
    asked: list[list[bool]] = []
    real = recurrence.backward

    def spy(*args: Any) -> list[Tensor | None]:
        asked.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(recurrence, "backward", spy)
    ops.layer(LayerCall(*tensors, *options, True, "reference", False))[0].sum().backward()
    assert asked == [[False, True, True, True, False, True, True, False, False]]
    assert tensors[3].grad is not None


def test_without_save_there_is_nothing_to_differentiate_by() -> None:
    tensors, options = problem(T=3, B=2)
    y = ops.layer_forward(*tensors, *options, False, "reference", False, "")[0]
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


def test_unknown_engine() -> None:
    tensors, options = problem(T=3, B=2)
    with pytest.raises(ValueError, match="engine must be 'triton', 'reference' or 'onednn', got 'cudnn'"):
        ops.layer_forward(*tensors, *options, True, "cudnn", False, "")


def test_graph_may_be_walked_twice() -> None:
    tensors, options = problem(T=3, B=2, directions=2)
    inputs = [t for t in tensors if t is not None]
    y = ops.layer(LayerCall(*tensors, *options, True, "reference", False))[0]
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_changing_the_output_in_place_is_noticed() -> None:
    """Where the backward pass reads it, to compute the gates again."""
    tensors, options = problem(T=3, B=2)
    y = ops.layer(LayerCall(*tensors, *options, True, "reference", True))[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
