"""TF32 as a GPU does it, in Triton's interpreter: the tensor cores drop bits of what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import WORKLOADS
from measure import Data, relative, wrong
from pairs import IN_INTERPRETER
from problems import rounded
from providers import with_fused
from torch import Tensor

pytest.importorskip("triton")
import numpy as np
from fused_lstm.kernels import stepwise
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from fused_lstm import launch, reference
from fused_lstm.launch.stepwise import StepwiseConfig

pytestmark = [pytest.mark.kernels, IN_INTERPRETER]
CASES = {case.name: case for case in WORKLOADS}


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The kernels are asked for TF32, and of what is multiplied in TF32 13 bits are dropped. Gives whether any were lost."""
    multiply, lost = interpreter_builder.create_dot, []

    def dropped(x: TensorHandle) -> TensorHandle:
        data = (x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        lost.append(not np.array_equal(data, x.data))
        return TensorHandle(data, x.dtype)

    def create_dot(a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, most: int) -> TensorHandle:
        assert precision == INPUT_PRECISION.TF32
        return multiply(dropped(a), dropped(b), acc, precision, most)

    monkeypatch.setattr(interpreter_builder, "create_dot", create_dot)
    monkeypatch.setattr(launch, "arithmetic", lambda dtype, tf32: "tf32")
    launch._prepare.cache_clear()
    yield lost
    launch._prepare.cache_clear()


def products_with(w: Tensor, bias: Tensor | None = None, multiply: Callable = reference.products_with) -> Callable:
    """The reference's products of rounded numbers."""
    product = multiply(rounded(w), bias)
    return lambda x, out=None: product(rounded(x), out)


def refusal(name: str, T: int, B: int, monkeypatch: pytest.MonkeyPatch, of: str = "") -> str | None:
    """What breaks the error rule in a workload of fewer steps and rows, ``of`` results; the yardstick rounds to nearest."""
    case = replace(CASES[name], T=T, B=B, dtype="tf32")
    data = Data(case, "cpu", seed=0)

    def results(backend: str) -> dict[str, Tensor]:
        return data.results(with_fused(data.layer, case, data.ragged, backend=backend), "training")

    exact = data.exact(data.ragged, "training")
    with launch.forced(StepwiseConfig(64 if B > 16 else 16, 128, 256)):
        ours = results("triton")
    with monkeypatch.context() as patched:
        patched.setattr(reference, "products_with", products_with)
        torchs = {k: relative(v, exact[k]) for k, v in results("reference").items()}
    return wrong(ours, torchs, {k: v for k, v in exact.items() if k.startswith(of)})


@pytest.mark.parametrize(
    ("name", "T", "B"), [("hydrology", 24, 64), ("awd-lstm", 2, 64), ("torchrl-reset-bench", 3, 64), ("torchbeast", 3, 8)]
)
def test_workloads(name: str, T: int, B: int, tensor_cores: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias gradients among the results: they are sums over all steps and rows."""
    assert refusal(name, T, B, monkeypatch) is None
    assert tensor_cores
    assert not any(tensor_cores), "bits that the kernel left to be dropped"


def test_what_the_tensor_cores_drop_shows(tensor_cores: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwise, "operand", lambda x, precision: x)
    assert "dbias" in str(refusal("hydrology", 24, 64, monkeypatch, of="dbias"))
    assert any(tensor_cores)


def test_numbers_that_rounding_might_harm(tensor_cores: list[bool]) -> None:
    """A NaN stays one and an infinity stays one, in their rows; what the user sees is not rounded."""
    T, B, H = 2, 4, 16
    torch.manual_seed(0)
    gates, w_hh, h0 = torch.randn(T * B, 1, 4, H), torch.randn(4 * H, H), torch.randn(1, B, H)
    h0[0, 0, 0], h0[0, 1, 0] = torch.nan, torch.inf
    h0.view(torch.int32)[0, 2, 0] = 0x7FFFFFFF  # the NaN that a GPU's arithmetic makes
    y = torch.empty(T * B, 1, H)
    rows = launch.Rows(T, B, False, 1)
    h_n, _ = launch.recurrence_forward(gates, w_hh, None, h0, None, rows, y, None)
    expected = torch.empty_like(y)
    reference.recurrence_forward(gates.clone(), rounded(w_hh), None, h0, None, rows, expected, None)
    assert y[0].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[3::B], expected[3::B], atol=2e-2, rtol=0)
    assert not torch.equal(rounded(y[3]), y[3])
    assert torch.equal(h_n[0, 3], y[-1, 0])
