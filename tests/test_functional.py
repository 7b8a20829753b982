"""fused_lstm.lstm, the function behind the layer, and LSTMCell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, failure, flat, pair, randn, states
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "bias": False},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True},
        {"proj_size": 1, "bias": False},
    ],
)
def test_agrees_with_the_modules(options: dict[str, Any], backend: str) -> None:
    """Values and gradients: bit for bit those of our module, and close to those of torch's."""
    theirs, ours = pair(3, 4, dtype=torch.float64, backend=backend, **options)
    shape = (2, 5, 3) if ours.batch_first else (5, 2, 3)
    directions = 2 if ours.bidirectional else 1
    x, (h0, c0) = randn(*shape).requires_grad_(), states(ours.num_layers * directions, 2, 4, proj=ours.proj_size)
    weights = list(ours.parameters())
    keywords = {"has_biases" if k == "bias" else k: v for k, v in options.items() if k != "proj_size"}
    results = [
        list(fused_lstm.lstm(x, (h0, c0), weights, backend=backend, **keywords)),
        flat(ours(x, (h0, c0))),
        flat(theirs(x, (h0, c0))),
    ]
    for r, by in zip(results, (weights, weights, list(theirs.parameters())), strict=True):
        r += torch.autograd.grad(r, [x, *by], [t.detach() for t in r])
    assert all_equal(results[0], results[1])
    assert_all_close(results[0], results[2])


@every_backend
def test_packed_data(backend: str) -> None:
    _, ours = pair(3, 4, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    packed, hx = pack_sequence([randn(n, 3) for n in (4, 2, 2)]), states(4, 3, 4)
    weights = list(ours.parameters())
    got = fused_lstm.lstm(
        packed.data, hx, weights, num_layers=2, bidirectional=True, batch_sizes=packed.batch_sizes, backend=backend
    )
    assert all_equal(got, flat(ours(packed, hx)))


@every_backend
def test_dropout_needs_training(backend: str) -> None:
    _, ours = pair(3, 4, 2, dropout=0.5, backend=backend)
    x, hx, weights = randn(5, 2, 3).float(), states(2, 2, 4, dtype=torch.float32), list(ours.parameters())
    for training in (False, True):
        torch.manual_seed(0)
        got = fused_lstm.lstm(x, hx, weights, num_layers=2, dropout=0.5, training=training, backend=backend)
        torch.manual_seed(0)
        assert all_equal(got, flat(ours.train(training)(x, hx)))


X, HX = randn(5, 2, 3), states(2, 2, 4, proj=2)
WEIGHTS = list(nn.LSTM(3, 4, 2, proj_size=2, dtype=torch.float64).requires_grad_(False).parameters())


def changed(weights: list[Tensor], k: int, tensor: Tensor) -> list[Tensor]:
    return [*weights[:k], tensor, *weights[k + 1 :]]


SIZES = ", for the cell of torch.nn.LSTM, hidden_size=4 and proj_size=2"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": WEIGHTS[:-1]}, ValueError,
         "weights should hold 8 tensors, or 10 with projections, for num_layers=2, bidirectional=False and "
         "has_biases=True; got 9"),
        ({"num_layers": 1}, ValueError,
         "weights should hold 4 tensors, or 5 with projections, for num_layers=1, bidirectional=False and "
         "has_biases=True; got 10"),
        ({"has_biases": False}, ValueError,
         "weights should hold 4 tensors, or 6 with projections, for num_layers=2, bidirectional=False and "
         "has_biases=False; got 10"),
        ({"bidirectional": True}, ValueError,
         "weights should hold 16 tensors, or 20 with projections, for num_layers=2, bidirectional=True and "
         "has_biases=True; got 10"),
        ({"weights": changed(WEIGHTS, 1, WEIGHTS[1].t())}, RuntimeError,
         "Expected weights[1] size (16, 2), got [2, 16]" + SIZES),
        ({"weights": changed(WEIGHTS, 3, WEIGHTS[3][:, None])}, RuntimeError,
         "Expected weights[3] size (16,), got [16, 1]" + SIZES),
        ({"weights": changed(WEIGHTS, 5, WEIGHTS[0])}, RuntimeError,
         "Expected weights[5] size (16, 2), got [16, 3]" + SIZES),
        ({"weights": changed(WEIGHTS, 9, WEIGHTS[9].t())}, RuntimeError,
         "Expected weights[9] size (2, 4), got [4, 2]" + SIZES),
        ({"input": X[..., :2]}, RuntimeError,
         "Expected weights[0] size (16, 2), got [16, 3]" + SIZES),
        ({"input": X[0]}, RuntimeError, "input must have 3 dimensions, got 2"),
        ({"batch_sizes": torch.tensor([2, 2])}, RuntimeError, "input must have 2 dimensions, got 3"),
        ({"input": X[:0]}, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
        ({"hx": (HX[0][:1], HX[1])}, RuntimeError, "Expected hidden[0] size (2, 2, 2), got [1, 2, 2]"),
        ({"hx": (HX[0], HX[1][:, :1])}, RuntimeError, "Expected hidden[1] size (2, 2, 4), got [2, 1, 4]"),
        ({"hx": (HX[0][0], HX[1][0])}, RuntimeError, "Expected hidden[0] size (2, 2, 2), got [2, 2]"),
        ({"hx": (HX[0], HX[1].float())}, ValueError,
         "hidden[1] dtype (torch.float32) does not match input dtype (torch.float64). Convert it: "
         "hidden.to(torch.float64)"),
        ({"hx": (HX[0].to("meta"), HX[1])}, RuntimeError,
         "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta"),
        ({"input": X.float()}, ValueError,
         "RNN input dtype (torch.float32) does not match weight dtype (torch.float64). Convert input: "
         "input.to(torch.float64), or convert model: model.to(torch.float32)"),
        ({"backend": "cudnn"}, ValueError,
         "backend should be one of 'auto', 'triton', 'aten', 'reference', got: 'cudnn'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"input": X, "hx": HX, "weights": WEIGHTS, "num_layers": 2}
    fused_lstm.lstm(**arguments)
    assert failure(lambda: fused_lstm.lstm(**{**arguments, **change})) == (error, message)


# --- LSTMCell


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)])
def test_cell(shape: tuple[int, ...], bias: bool) -> None:
    got = []
    for cls in (nn.LSTMCell, fused_lstm.LSTMCell):
        torch.manual_seed(0)
        cell = cls(3, 4, bias, dtype=torch.float64)
        x = randn(*shape).requires_grad_()
        state = tuple(t.requires_grad_() for t in states(*shape[:-1], 4))
        first = cell(x)
        second = cell(x, state)
        results = [*first, *second]
        got.append([*results, *torch.autograd.grad(results, [x, *state, *cell.parameters()], results)])
        assert issubclass(cls, nn.LSTMCell)
    assert all_equal(*got)
    assert repr(fused_lstm.LSTMCell(3, 4, bias)) == repr(nn.LSTMCell(3, 4, bias))


def test_a_cell_steps_like_the_layer() -> None:
    _, layer = pair(3, 4, dtype=torch.float64)
    cell = fused_lstm.LSTMCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, state, outputs = randn(5, 2, 3), None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    assert_all_close([torch.stack(outputs), state[0][None], state[1][None]], flat(layer(x)))


def test_bad_calls_of_the_cell() -> None:
    for call in (
        lambda cls: cls(3, 4, bias=None)(torch.randn(2, 2)),
        lambda cls: cls(3, 4)(torch.randn(2, 2)),
        lambda cls: cls(3, 4)(torch.randn(1, 2, 3)),
        lambda cls: cls(3, 4)(torch.randn(2, 3), (torch.randn(2, 5),) * 2),
        lambda cls: cls(3, 4)(torch.randn(2, 3), (torch.randn(1, 2, 4),) * 2),
        lambda cls: cls(3, 4, backend="auto"),
    ):
        assert failure(lambda call=call: call(fused_lstm.LSTMCell)) == failure(lambda call=call: call(nn.LSTMCell))


@pytest.mark.parametrize("sizes", [[2, 1, 1], [1, 2], [3, 0], [], [2, 2]])
def test_batch_sizes_that_do_not_fit(sizes: list[int]) -> None:
    x = torch.zeros(3, 2)
    packed = PackedSequence(x, torch.tensor(sizes, dtype=torch.int64)) if sizes else None
    weights = list(fused_lstm.LSTM(2, 3).parameters())
    hx = (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="batch_sizes should not increase, be at least 1 and add up to the 3 rows"):
        fused_lstm.lstm(x, hx, weights, batch_sizes=torch.tensor(sizes, dtype=torch.int64))
    if packed is not None:
        with pytest.raises(ValueError, match="batch_sizes should not increase"):
            fused_lstm.LSTM(2, 3)(packed)


def test_more_errors_of_the_function() -> None:
    lstm = fused_lstm.LSTM(2, 3)
    weights, x = list(lstm.parameters()), torch.zeros(4, 1, 2)
    h = torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match="num_layers must be greater than zero, got 0"):
        fused_lstm.lstm(x, (h, h), weights, num_layers=0)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        fused_lstm.lstm(x, (h, h, h), weights)
    with pytest.raises(ValueError, match=r"of one dtype and device, got torch.float32 .* weights\[1\] of torch"):
        fused_lstm.lstm(x, (h, h), [weights[0], weights[1].double(), *weights[2:]])
