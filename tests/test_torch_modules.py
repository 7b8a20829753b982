"""PyTorch's own test inputs for nn.LSTM, as they are in the torch that is installed, and what its suite checks by them.

What torch marks as failing for its own class, on CUDA, is not marked here: gradients, second derivatives, states that are
not contiguous.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, every_quick_backend, flat
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


def each_sample(dtype: torch.dtype, backend: str = "auto", training: bool = True) -> Iterator[tuple[nn.Module, list, dict]]:
    """A layer of ours for every sample, and what to call it with."""
    for sample in module_inputs(dtype, False, training, backend):
        _, ours = modules(sample, dtype, training, backend)
        yield ours, sample.forward_input.args, sample.forward_input.kwargs


@each_dtype
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_dtype_of_construction(device: str, dtype: torch.dtype) -> None:
    """torch's test_factory_kwargs and test_device_ctx_init."""
    for sample in module_inputs(dtype, False, True, "auto"):
        arguments = sample.constructor_input
        layers = [fused_lstm.LSTM(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)]
        with torch.device(device):
            layers.append(fused_lstm.LSTM(*arguments.args, **arguments.kwargs).to(dtype))
        assert {(p.device.type, p.dtype) for layer in layers for p in layer.parameters()} == {(device, dtype)}


@every_quick_backend
@each_dtype
@pytest.mark.parametrize("training", [True, False])
def test_copies(training: bool, dtype: torch.dtype, backend: str) -> None:
    """torch's test_save_load and test_pickle; in full and as a dictionary of states, and by deepcopy."""
    for ours, args, kwargs in each_sample(dtype, backend, training):
        expected, file = flat(ours(*args, **kwargs)), io.BytesIO()
        torch.save((ours, ours.state_dict()), file)
        file.seek(0)
        loaded, state = torch.load(file, weights_only=False)
        filled = copy.deepcopy(ours).to_empty(device="cpu")
        filled.load_state_dict(state)
        for other in (loaded, filled, copy.deepcopy(ours)):
            assert repr(other) == repr(ours)
            assert other.training is training
            assert all_equal(flat(other(*args, **kwargs)), expected)


@every_backend
@each_dtype
def test_training_flag_counts(dtype: torch.dtype, backend: str) -> None:
    """torch's test_if_train_and_eval_modes_differ: without the flag a forward pass says that it is missing."""
    assert INFO.train_and_eval_differ
    for ours, args, kwargs in each_sample(dtype, backend):
        del ours.training
        with pytest.raises(AttributeError, match="'training'"):
            ours(*args, **kwargs)


@every_quick_backend
@each_dtype
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d])
def test_memory_format(form: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    for ours, args, kwargs in each_sample(dtype, backend):
        expected = flat(ours(*args, **kwargs))
        assert ours.to(memory_format=form) is ours
        assert all_equal(flat(ours(*args, **kwargs)), expected)


@pytest.fixture
def swapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


@every_quick_backend
@pytest.mark.parametrize("swapping", [False, True], indirect=True)
def test_moved(swapping: bool, backend: str) -> None:
    """torch's test_to and test_to_empty: through another dtype and device and back, the gradients too."""
    for ours, args, kwargs in each_sample(torch.float64, backend):
        flat(ours(*args, **kwargs))[0].sum().backward()
        ours.float()
        assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
        before, ids = [p.detach().clone() for p in ours.parameters()], list(map(id, ours.parameters()))
        expected = [t.double() for t in before]
        ours.to("cpu", torch.float64)
        assert all_equal(list(ours.parameters()), expected)
        assert list(map(id, ours.parameters())) == ids
        results = [t.detach() for t in flat(ours(*args, **kwargs))]  # tensors in a graph cannot be swapped
        state = copy.deepcopy(ours.state_dict())
        ours.zero_grad()
        ours.to("meta")
        assert {p.device.type for p in ours.parameters()} == {"meta"}
        ours.to_empty(device="cpu").load_state_dict(state)
        assert all_equal(flat(ours(*args, **kwargs)), results)


@every_backend
@pytest.mark.parametrize("training", [True, False])
def test_parity_with_double(training: bool, backend: str) -> None:
    """torch's test_cpu_gpu_parity, of two precisions in place of two devices; in double the yardstick is torch's class."""
    for sample in module_inputs(torch.float32, True, training, backend):
        theirs, ours = modules(sample, torch.float32, training, backend)
        x, *hx = data = tensors_in(*sample.forward_input.args)
        theirs.double()
        wide = [t.detach().double().requires_grad_() for t in data]
        got = []
        for module, (x, *hx) in ((ours, data), (theirs, wide)):
            results = flat(module(x, hx or None))
            loss = sum(t.square().sum() for t in results)
            got.append([*results, *torch.autograd.grad(loss, [x, *hx, *module.parameters()])])
        assert_all_close(got[0], [t.float() for t in got[1]])


def test_failures_that_torch_expects_of_its_own_class() -> None:
    """Each has its test in this file: if a torch to come names another, it is to be looked at here."""
    names = {getattr(decorator, "test_name", None) for decorator in INFO.decorators} - {None}
    assert names <= {"test_grad", "test_gradgrad", "test_non_contiguous_tensors"}


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
