"""The references, each against the one before it: torch's cell, torch's LSTM, the loop under autograd, gradcheck."""

from __future__ import annotations

import pytest
import torch
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
    "padded": dict(T=3, B=2),
    "batch first, backwards": dict(T=3, B=2, directions=-1, batch_first=True),
    "lengths, both directions": dict(T=3, B=3, directions=2, lengths=[3, 0, 2]),
    "packed, both directions": dict(T=3, B=3, directions=2, batch_sizes=[3, 2, 1]),
    "projected": dict(T=2, B=2, K=2),
    "no bias": dict(T=2, B=2, bias=False),
    "states of zero, both directions": dict(T=3, B=3, directions=2, states=False, lengths=[3, 0, 2]),
    "resets, both directions": dict(T=4, B=3, directions=2, resets=True),
    "resets and lengths, batch first": dict(T=4, B=4, directions=2, resets=True, lengths=[4, 0, 2, 3], batch_first=True),
    "resets, packed": dict(T=3, B=3, directions=2, resets=True, batch_sizes=[3, 2, 1]),
    "resets, projected": dict(T=3, B=3, directions=2, K=2, resets=True),
}


def problem(
    T: int,
    B: int,
    directions: int = 1,
    batch_first: bool = False,
    lengths: list[int] | None = None,
    batch_sizes: list[int] | None = None,
    K: int | None = None,
    bias: bool = True,
    resets: bool = False,
    states: bool = True,
) -> tuple[list[Tensor | None], tuple]:
    torch.manual_seed(0)
    I, H, R = 2, 3, 2 if directions == 2 else 1  # noqa: E741
    rows = (sum(batch_sizes),) if batch_sizes else ((B, T) if batch_first else (T, B))
    tensors = [
        numbers(*rows, I), numbers(R, B, K or H), numbers(R, B, H), numbers(R * 4 * H, I), numbers(R * 4 * H, H),
        *(numbers(R * 4 * H) if bias else None for _ in range(2)), numbers(R * 4 * H, K) if K else None, None,
    ]  # fmt: skip
    if not states:
        tensors[1:3] = None, None
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    ragged = (torch.tensor(lengths) if lengths else None, torch.tensor(batch_sizes) if batch_sizes else None)
    begins = torch.rand(rows) < 0.4 if resets else None
    return tensors, (*ragged, begins, None, directions, batch_first)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("nan_memory")
def test_explicit_backward(case: str) -> None:
    tensors, options = problem(**CASES[case])

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return ops.layer(LayerCall(*tensors, *options, True, "reference", False))[:3]

    explicit, loop = run(*tensors), reference.layer(LayerCall(*tensors, *options, False, "loop", False))
    for a, b in zip(explicit, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    assert gradcheck(run, tensors)


@pytest.mark.parametrize("case", CASES)
def test_second_derivative(case: str) -> None:
    tensors, options = problem(**CASES[case])

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return ops.layer(LayerCall(*tensors, *options, True, "reference", False))[:3]

    assert gradgradcheck(run, tensors, fast_mode=True)


def test_second_derivative_stays_inside_the_layer() -> None:
    """h0 made from x: the derivative by x through h0 is autograd's business, not the layer's, and counts once."""
    tensors, options = problem(T=3, B=2)

    def run(x: Tensor, engine: str) -> Tensor:
        h0 = torch.tanh(x.sum((0, 2)))[None, :, None].expand(1, 2, 3)
        given = (x, h0, *tensors[2:])
        if engine == "loop":
            return reference.layer(LayerCall(*given, *options, False, "loop", False))[0].square().sum()
        return ops.layer(LayerCall(*given, *options, True, engine, False))[0].square().sum()

    hessians = []
    for engine in ("loop", "reference"):
        x = tensors[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(run(x, engine), x, create_graph=True)
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
