"""PyTorch's own test inputs for nn.LSTM, as they are in the torch that is installed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, flat
from torch import Tensor, nn

import fused_lstm

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch's internal module database cannot be imported"
)
INFO = next(info for info in common_modules.module_db if info.module_cls is nn.LSTM)
DTYPES = (torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def module_inputs(dtype: torch.dtype, requires_grad: bool, training: bool, backend: str) -> list[Any]:
    torch.manual_seed(0)
    samples = INFO.module_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    return samples[::5] if backend == "triton" else samples  # the interpreter is slow


def modules(sample: Any, dtype: torch.dtype, training: bool, backend: str) -> tuple[nn.LSTM, fused_lstm.LSTM]:
    arguments = sample.constructor_input
    theirs = nn.LSTM(*arguments.args, **arguments.kwargs).to(dtype).train(training)
    ours = fused_lstm.LSTM(*arguments.args, **arguments.kwargs, backend=backend).to(dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors_in(*arguments: Any) -> list[Tensor]:
    return [t for a in arguments for t in ((a,) if isinstance(a, Tensor) else tensors_in(*a))]


@every_backend
@each_dtype
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_and_gradients(requires_grad: bool, training: bool, dtype: torch.dtype, backend: str) -> None:
    samples = module_inputs(dtype, requires_grad, training, backend)
    assert samples
    for sample in samples:
        theirs, ours = modules(sample, dtype, training, backend)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        results = flat(ours(*args, **kwargs))
        assert_all_close(results, flat(sample.reference_fn(ours, *args, **kwargs)))
        theirs_results = flat(theirs(*args, **kwargs))
        assert_all_close(results, theirs_results)
        data = [t for t in tensors_in(*args, *kwargs.values()) if t.requires_grad]
        assert bool(data) == requires_grad
        grads = [
            torch.autograd.grad(r, [*data, *m.parameters()], [torch.ones_like(t) for t in r])
            for m, r in ((ours, results), (theirs, theirs_results))
        ]
        assert_all_close(*grads)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(training: bool, backend: str) -> None:
    """torch's test_gradgrad, as far as a few samples go; first derivatives of all of them are compared above."""
    for sample in module_inputs(torch.float64, True, training, backend)[3::7]:
        _, ours = modules(sample, torch.float64, training, backend)
        x, *hx = tensors_in(*sample.forward_input.args)
        parameters = dict(ours.named_parameters())

        def call(x: Tensor, *rest: Tensor, n: int = len(hx), ours: nn.Module = ours, names: Any = parameters) -> Any:
            weights = dict(zip(names, rest[n:], strict=True))
            return tuple(flat(torch.func.functional_call(ours, weights, (x, rest[:n] or None))))

        inputs = (x, *hx, *parameters.values())
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@every_backend
@each_dtype
def test_inputs_are_neither_changed_nor_need_to_be_dense(dtype: torch.dtype, backend: str) -> None:
    """torch's test_non_contiguous_tensors."""
    for sample in module_inputs(dtype, False, True, backend):
        _, ours = modules(sample, dtype, True, backend)
        dense = tensors_in(*sample.forward_input.args)
        kept = [t.clone() for t in dense]
        sparse = [torch.stack((t, t), -1)[..., 0] for t in dense]
        assert not any(t.is_contiguous() for t in sparse)
        results = [flat(ours(x, hx or None)) for x, *hx in (dense, sparse)]
        assert_all_close(*results)
        assert all_equal(dense, kept)


@pytest.mark.parametrize("cls", [nn.LSTM, fused_lstm.LSTM])
@each_dtype
def test_errors(dtype: torch.dtype, cls: type[nn.Module]) -> None:
    """torch's test_errors; on torch's class too, to show that the samples are read right."""
    samples = INFO.module_error_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=False, training=False)
    assert samples
    for sample in samples:
        arguments, data = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        on_construction = sample.error_on == common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR
        module = None if on_construction else cls(*arguments.args, **arguments.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex) as info:
            cls(*arguments.args, **arguments.kwargs) if on_construction else module(*data.args, **data.kwargs)
        assert info.type is sample.error_type
        assert re.match(sample.error_regex, str(info.value))
