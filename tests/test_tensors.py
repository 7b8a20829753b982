"""The results as tensors: dense and to be changed in place where nn.LSTM's are, without numbers where the input has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import call, every_backend, every_quick_backend, flat, pair
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {}, "lengths": {"lengths": [3, 1]}, "resets": {"resets": torch.tensor([[0, 1], [1, 0], [0, 0]])},
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("layer", [{}, {"proj_size": 3}, {"bidirectional": True, "proj_size": 3}], ids=str)
def test_results_and_gradients_are_dense(backend: str, layer: dict[str, Any]) -> None:
    """H = 5 is no multiple of what the kernels want."""
    theirs, ours = pair(3, 5, **layer, backend=backend)
    x = torch.randn(3, 2, 3, requires_grad=True)

    def tensors(lstm: nn.LSTM, **extras: Any) -> list[Tensor]:
        found = flat(lstm(x, **extras))
        return [*found, *torch.autograd.grad(sum(t.sin().sum() for t in found), [x, *lstm.parameters()])]

    assert all(t.is_contiguous() for t in tensors(theirs))
    for extras in EXTRAS.values() if backend != "triton" else ({}, EXTRAS["lengths"]):
        assert all(t.is_contiguous() for t in tensors(ours, **extras))


@every_quick_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", [*EXTRAS, "packed"])
def test_results_may_be_changed_in_place(backend: str, dtype: torch.dtype, what: str) -> None:
    """But the output of oneDNN's LSTM, which nn.LSTM gives, and which its backward pass reads."""
    lstm = fused_lstm.LSTM(3, 4, backend=backend, dtype=dtype)
    x = torch.randn(40 if what == "packed" else 3, 2, 3, dtype=dtype)
    given = (pack_padded_sequence(x, [40, 7]) if what == "packed" else x), EXTRAS.get(what, {})
    oneDNNs = what == "plain" and dtype == torch.float32 and backend != "reference"
    for k in range(oneDNNs, 3):
        grads = []
        for relu in (F.relu, F.relu_):
            results = flat(lstm(given[0], **given[1]))
            results[k] = relu(results[k])
            grads.append(torch.autograd.grad(sum(t.cos().sum() for t in results), list(lstm.parameters())))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_without_numbers(backend: str, dtype: torch.dtype, device: str) -> None:
    """Of FakeTensorMode, or on the meta device."""
    if (backend, device) == ("triton", "meta"):
        pytest.skip("the kernels refuse the meta device")
    for layer in ({}, {"proj_size": 3, "batch_first": True}, {"bidirectional": True, "num_layers": 2, "recompute": True}):
        for names in ("", "lengths", "resets", "lengths resets"):
            real = fused_lstm.LSTM(3, 5, **layer, dtype=dtype)
            expected = flat(real(**call(real, names, 4, 2)))
            with FakeTensorMode() if device == "cpu" else torch.device("meta"):
                lstm = fused_lstm.LSTM(3, 5, **layer, backend=backend, dtype=dtype)
                shape = (2, 4, 3) if lstm.batch_first else (4, 2, 3)
                given = {"lengths": torch.ones(2, dtype=torch.int64), "resets": torch.ones(shape[:2])}
                results = flat(lstm(torch.ones(shape, dtype=dtype), **{name: given[name] for name in names.split()}))
                sum(t.sum() for t in results).backward()
            assert all(w.grad.shape == w.shape for w in lstm.parameters())
            for a, b in zip(results, expected, strict=True):
                assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, device)


@every_quick_backend
def test_numbers_that_a_fake_mode_hides(backend: str) -> None:
    """Real lengths and batch sizes beside data of FakeTensorMode: nothing looks at them, or torch's error says so."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    sizes, lengths, data = torch.tensor([2, 2, 1]), torch.tensor([6, 2, 1]), torch.randn(6, 3, 7)
    lstm = fused_lstm.LSTM(7, 4, backend=backend)
    with mode:
        packed = PackedSequence(mode.from_tensor(data.flatten(0, 1)[:5]), sizes)
        assert lstm(packed, (torch.zeros(1, 2, 4),) * 2)[1][0].shape == (1, 2, 4)
        with pytest.raises(DataDependentOutputException):
            lstm(packed)
        assert lstm(mode.from_tensor(data), lengths=lengths)[0].shape == (6, 3, 4)
