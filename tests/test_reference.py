"""The references, each against the one before it: torch's cell, torch's LSTM, the loop under autograd, gradcheck."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import small_call
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from fused_lstm import ops, reference
from fused_lstm.call import LayerCall


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.5


def test_cell_is_torchs() -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(5, 7).double()
    x, h, c = numbers(3, 5), numbers(3, 7), numbers(3, 7)
    for got, want in zip(reference.lstm_cell(x, h, c, *cell.parameters()), cell(x, (h, c)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_loop_is_torchs_lstm(bidirectional: bool, ragged: bool) -> None:
    torch.manual_seed(0)
    D = 2 if bidirectional else 1
    lstm = nn.LSTM(5, 7, bidirectional=bidirectional).double()
    x, h0, c0, lengths = numbers(6, 3, 5), numbers(D, 3, 7), numbers(D, 3, 7), torch.tensor([4, 6, 1])
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    w = [torch.cat([p for n, p in lstm.named_parameters() if n.startswith(kind)]) for kind in kinds]
    options = (lengths if ragged else None, None, None, None, D, False, False, "loop", False)
    call = LayerCall(x, h0, c0, *w, None, None, *options)
    got = reference.layer(call)
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if ragged else x
    output, (h_n, c_n) = lstm(given, (h0, c0))
    if ragged:
        output, _ = nn.utils.rnn.pad_packed_sequence(output)
    for a, b in zip(got, (output, h_n, c_n), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


CASES = {
    "padded": {},
    "batch first, backwards": dict(directions=-1, batch_first=True),
    "lengths, both directions": dict(B=3, directions=2, mode="lengths"),
    "packed, both directions": dict(B=3, directions=2, mode="packed"),
    "projected": dict(T=2, K=2),
    "no bias": dict(T=2, bias=False),
    "states of zero, both directions": dict(B=3, directions=2, states=False, mode="lengths"),
    "resets, both directions": dict(T=4, B=3, directions=2, resets=True),
    "resets and lengths, batch first": dict(T=4, B=4, directions=2, resets=True, mode="lengths", batch_first=True),
    "resets, packed": dict(B=3, directions=2, resets=True, mode="packed"),
    "resets, projected": dict(B=3, directions=2, K=2, resets=True),
}


def first_results(call: LayerCall) -> Callable[..., tuple[Tensor, ...]]:
    """y, h_n and c_n as a function of the call's inputs."""
    return lambda *inputs: ops.layer(LayerCall(*inputs, *call[ops.N_INPUTS :]))[:3]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("nan_memory")
def test_explicit_backward(case: str) -> None:
    call = small_call(**CASES[case])
    for a, b in zip(ops.layer(call)[:3], reference.layer(call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    assert gradcheck(first_results(call), call[: ops.N_INPUTS])


@pytest.mark.parametrize("case", CASES)
def test_second_derivative(case: str) -> None:
    call = small_call(**CASES[case])
    assert gradgradcheck(first_results(call), call[: ops.N_INPUTS], fast_mode=True)


def test_second_derivative_stays_inside_the_layer() -> None:
    """h0 made from x: the derivative by x through h0 is autograd's business, not the layer's, and counts once."""
    call, hessians = small_call(), []
    for layer in (reference.layer, ops.layer):
        x = call.x.detach().requires_grad_()
        h0 = torch.tanh(x.sum((0, 2)))[None, :, None].expand(1, 2, 3)
        y = layer(call._replace(x=x, h0=h0))[0]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        hessians.append(torch.autograd.grad(first.sin().sum(), x)[0])
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-11, atol=1e-13)


def test_rows_of_packed_data_meet_every_row_once() -> None:
    batch_sizes = torch.tensor([4, 3, 3, 1])
    w = torch.zeros(8, 1)
    empty = [None] * 5
    rows = LayerCall(torch.zeros(11, 1), None, None, w, w, *empty, batch_sizes, None, None, 2, False, False, "", False).rows
    assert rows.lengths.tolist() == [4, 3, 3, 1]
    index = torch.arange(11)
    for r in (0, 1):
        seen = torch.cat([index[rows.at(s, r)] for s in range(rows.T)])
        assert seen.sort().values.tolist() == index.tolist()
    assert index[rows.at(0, 1)].tolist() == [10, 8, 9, 3]  # each row's last step
