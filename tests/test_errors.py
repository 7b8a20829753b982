"""Calls that do not fit: the error says what was expected, and what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fused_lstm
from fused_lstm import Cell

LSTM = fused_lstm.LSTM(2, 3)
X, H = torch.zeros(4, 3, 2), torch.zeros(1, 3, 3)  # T = 4, B = 3
PACKED = pack_sequence([torch.zeros(2, 2), torch.zeros(1, 2)])
WEIGHTS = list(LSTM.parameters())
PEEPHOLE, HEADS = Cell(peephole=True), Cell(heads=3)


def function(x: Any = X, hx: Any = (H, H), weights: Any = WEIGHTS, **kwargs: Any) -> Any:
    return fused_lstm.lstm(x, hx, weights, **kwargs)


def of(cell: Cell | None, **options: Any) -> list[torch.Tensor]:
    return fused_lstm.LSTM(2, 3, cell=cell, **options).all_weights[0]


def plot(batch: int = 3, **arguments: Any) -> Any:
    pytest.importorskip("matplotlib")
    return fused_lstm.plot_gates(fused_lstm.inspect_gates(LSTM, X[:, :batch]), **arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: LSTM(torch.zeros(2)), "LSTM: Expected input to be 2D or 3D, got 1D instead"),
        (lambda: LSTM(X[..., :1]), "input.size(-1) must be equal to input_size. Expected 2, got 1"),
        (lambda: LSTM(X, (H[0], H[0])), "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2-D) tensors"),
        (lambda: LSTM(X.to("meta")), "Input and parameter tensors are not at the same device, found input tensor at meta"),
        (lambda: LSTM(X, (H.to("meta"), H)), "found input tensor at cpu and hidden tensor at meta"),
        (lambda: fused_lstm.LSTM(2, 3, recompute=1), "recompute should be of type bool, got: int"),
        (lambda: LSTM(X, lengths="abc"), "lengths should be 3 integers from 0 to 4, got 'abc': "),
        (lambda: LSTM(X, resets=[0, 1]), "resets should be a tensor of shape (4, 3), got list"),
        (lambda: LSTM(X, resets=torch.zeros(4, 3) * 1j), "should be bool, integer or float, got dtype torch.complex64"),
        (lambda: LSTM.step(X), "step: expected one step of input, (B, I) or (I,), got shape (4, 3, 2)"),
        (lambda: LSTM.step(X[0], (H, H, H)), "step: expected state to be two tensors, (h, c), got 3"),
        (lambda: LSTM.step(X[0], (H[0], H)), "with an input of 2 dimensions, expected h and c of 3, got shapes (3, 3)"),
        (lambda: LSTM.step(X[0], inplace=True), "inplace=True writes to the tensors of state, expected (h, c), got None"),
        (lambda: LSTM.step(X[0], (H, H), inplace=True), "expected (h, c), got one tensor twice"),
        (lambda: fused_lstm.replace_lstm(nn.LSTM), "replace_lstm expects a torch.nn.Module, got: type"),
        (lambda: function(PACKED), "input should be a tensor, of a packed sequence its data, got: PackedSequence"),
        (lambda: function(X[0]), "input must have 3 dimensions, got 2"),
        (lambda: function(hx=H), "lstm expects two hidden states, (h0, c0), got Tensor"),
        (lambda: function(weights=WEIGHTS[0]), "weights should be a sequence of tensors"),
        (lambda: function(weights=[*WEIGHTS[:3], torch.zeros(5)]), "Expected weights[3] size (12,), got [5]"),
        (lambda: function(weights=[*WEIGHTS[:3], WEIGHTS[3].double()]), "weights[3] of torch.float64 on cpu"),
        (lambda: function(weights=[*WEIGHTS, torch.zeros(3, 3)]), "proj_size has to be smaller than hidden_size, got"),
        (lambda: function(hx=(None, None)), "lstm expects two hidden states, (h0, c0), got NoneType, NoneType"),
        (lambda: function(weights=iter(WEIGHTS[:3])), "or 5 with projections, for num_layers=1, bidirectional=False and "
         "has_biases=True; got 3"),
        (lambda: function(cell=PEEPHOLE), "weights should hold 5 tensors, for num_layers=1"),
        (lambda: function(cell=PEEPHOLE), "has_biases=True, Cell(peephole=True); got 4"),
        (lambda: function(weights=of(HEADS)), "size (12, 3), got [12, 1], for the cell of torch.nn.LSTM, hidden_size=3 and"),
        (lambda: function(cell=HEADS), "size (12, 1), got [12, 3], for Cell(heads=3), hidden_size=3 and"),
        (lambda: function(weights=of(HEADS), cell=Cell(heads=2)), "heads should divide hidden_size=3, got: 2"),
        (lambda: function(weights=of(None, proj_size=2), cell=PEEPHOLE), "weights[1] size (12, 3), got [12, 2], for Cell("),
        (lambda: function(num_layers=0), "num_layers must be greater than zero, got 0"),
        (lambda: function(dropout=2), "dropout should be a number in range [0, 1], got 2"),
        (lambda: function(PACKED.data, batch_sizes=[2, 1]), "batch_sizes should be a 1-D int64 tensor on the CPU, got list"),
        (lambda: function(PACKED.data, batch_sizes=torch.tensor([2, 1]).int()), "got 1-D torch.int32 on cpu"),
        (lambda: fused_lstm.plot_gates(X), "plot_gates expects the result of fused_lstm.inspect_gates, got: Tensor"),
        (lambda: plot(batch=0), "plot_gates expects at least one batch row, got gates of shape (1, 1, 4, 0, 3)"),
        (lambda: plot(row=3), "row should be an integer from 0 to 2, got 3"),
        (lambda: plot(units=[7]), "units should be a list of integers from 0 to 2, got [7]"),
        (lambda: plot(x=torch.zeros(5)), "x should have shape (4,) or (4, K), one for each step, got (5,)"),
        (lambda: plot(axis="abc"), "axis should have 4 labels, one for each step, got 3"),
    ],
)  # fmt: skip
def test_says_what_was_expected(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        bad()
    assert message in str(error.value)
