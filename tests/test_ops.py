"""The custom ops and their autograd Function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import all_equal
from problems import check_ops, inputs, small_call
from torch import Tensor

from fused_lstm import ops, recurrence, reference

CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "both directions, batch first": dict(directions=2, batch_first=True),
    "lengths": dict(B=3, mode="lengths"),
    "resets": dict(T=4, B=3, directions=2, resets=True),
    "projected, no bias": dict(T=2, K=2, bias=False),
}
RECOMPUTED = [dict(mode="lengths", directions=2, resets=True), dict(K=2, batch_first=True)]


@pytest.mark.parametrize(
    ("case", "engine", "recompute"),
    [
        *((case, "reference", False) for case in CASES.values()),
        *((case, "reference", True) for case in RECOMPUTED),
        *(
            pytest.param(CASES[case], "triton", False, marks=pytest.mark.kernels)
            for case in ("lengths", "projected, no bias")
        ),
        pytest.param({}, "triton", True, marks=pytest.mark.kernels),
    ],
)
def test_opcheck(case: dict[str, Any], engine: str, recompute: bool) -> None:
    check_ops(small_call(**case, engine=engine, recompute=recompute))


@pytest.mark.parametrize("case", CASES)
def test_op_and_function_agree(case: str) -> None:
    call, grads = small_call(**CASES[case]), []
    for y, h_n, c_n, _, _ in (ops.layer_forward(*call), ops.layer(call)):
        grads.append(torch.autograd.grad(y.sum() + (h_n * c_n).sum(), list(inputs(call).values())))
    assert all_equal(*grads)


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (0, 2)])
def test_loss_of_some_outputs(outputs: tuple[int, ...]) -> None:
    call, grads = small_call(), []
    for results in (ops.layer(call), reference.layer(call)):
        grads.append(torch.autograd.grad(sum(results[k].square().sum() for k in outputs), list(inputs(call).values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradients_that_nobody_needs_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    call = small_call()
    call = call._replace(x=call.x.detach(), w_hh=call.w_hh.detach())
    asked: list[list[bool]] = []
    real = recurrence.backward

    def spy(*args: Any) -> list[Tensor | None]:
        asked.append(list(args[-1]))
        return real(*args)

    monkeypatch.setattr(recurrence, "backward", spy)
    ops.layer(call)[0].sum().backward()
    assert asked == [[False, True, True, True, False, True, True, False, False]]
    assert call.w_ih.grad is not None


def test_without_save_there_is_nothing_to_differentiate_by() -> None:
    y = ops.layer_forward(*small_call(save=False))[0]
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine must be 'triton', 'reference' or 'onednn', got 'cudnn'"):
        ops.layer_forward(*small_call(engine="cudnn"))


def test_graph_may_be_walked_twice() -> None:
    call = small_call(directions=2)
    y = ops.layer(call)[0]
    assert all_equal(*(torch.autograd.grad(y.sum(), list(inputs(call).values()), retain_graph=True) for _ in range(2)))


def test_changing_the_output_in_place_is_noticed() -> None:
    """Where the backward pass reads it, to compute the gates again."""
    y = ops.layer(small_call(recompute=True))[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
