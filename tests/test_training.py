"""Dropout, autocast and gradients of the layer, with torch.nn.LSTM beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, flat, pair, randn, states
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm
from fused_lstm.plan import onednn_has_bf16

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def gradients(
    module: nn.Module, x: Tensor | PackedSequence, hx: Any = None, of: Sequence[int] = (0, 1, 2), **options: bool
) -> list[Tensor]:
    """By x, hx and the parameters, of the squares of some results; zero where there is no path."""
    data = x.data if isinstance(x, PackedSequence) else x
    results = flat(module(x, hx))
    loss = sum(results[k].square().sum() for k in of)
    return list(torch.autograd.grad(loss, [data, *(hx or []), *module.parameters()], materialize_grads=True, **options))


# --- dropout


def unsorted() -> PackedSequence:
    return pack_sequence([randn(length, 3, dtype=torch.float32) for length in (2, 5, 3)], enforce_sorted=False)


@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({}, randn(5, 2, 3, dtype=torch.float32)),
        ({"batch_first": True, "bidirectional": True, "bias": False}, randn(2, 5, 3, dtype=torch.float32)),
        ({"proj_size": 2}, randn(5, 3, dtype=torch.float32)),
        ({"bidirectional": True}, unsorted()),
    ],
)
def test_dropout_draws_what_torch_draws(options: dict, x: Tensor | PackedSequence) -> None:
    got = []
    for module in pair(3, 4, 3, dropout=0.4, **options):
        torch.manual_seed(3)
        results = flat(module(x))
        grads = torch.autograd.grad(results, list(module.parameters()), results)
        got.append([*results, *grads, torch.get_rng_state()])
    assert all_equal(*got)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_of_the_explicit_path_draws_what_torch_draws(backend: str, batch_first: bool) -> None:
    options = {"dropout": 0.4, "batch_first": batch_first, "bidirectional": True, "dtype": torch.float64}
    got = []
    for module in pair(3, 4, 3, backend=backend, **options):
        torch.manual_seed(3)
        got.append(gradients(module, randn(2, 5, 3).requires_grad_()))
    assert fused_lstm.explain(module, randn(2, 5, 3)).how == "reference"
    assert_all_close(*got)


@every_backend
@pytest.mark.parametrize("steps", [1, 5])
def test_dropout_follows_the_seed(steps: int, backend: str) -> None:
    layer, x = fused_lstm.LSTM(3, 8, 2, dropout=0.5, backend=backend), randn(steps, 4, 3, dtype=torch.float32)
    first, again, other = (layer(x)[0] for seed in (1, 1, 2) if torch.manual_seed(seed))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_backend
@pytest.mark.parametrize("steps", [1, 5])
def test_dropout_in_training_only_and_changeable(steps: int, backend: str) -> None:
    theirs, ours = pair(3, 4, 3, dropout=0.5, dtype=torch.float64, backend=backend)
    x = randn(steps, 4, 3)
    trained = flat(ours(x))
    assert_all_close(flat(ours.eval()(x)), flat(theirs.eval()(x)))
    assert not torch.allclose(ours(x)[0], trained[0])
    for p in (0.0, 1.0):
        ours.dropout = theirs.dropout = p
        assert_all_close(flat(ours.train()(x)), flat(theirs.train()(x)))
    ours.dropout = 0.5
    assert not torch.equal(ours(x)[0], ours(x)[0])


@every_backend
@pytest.mark.parametrize(("steps", "batch"), [(20, 50), (1, 800)])
def test_dropout_mask(steps: int, batch: int, backend: str) -> None:
    """The second layer's gates are set to show its input, one step at a time."""
    H, p, small = 32, 0.3, 0.01
    layer = fused_lstm.LSTM(3, H, 2, dropout=p, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for parameter in (layer.weight_ih_l1, layer.weight_hh_l1, layer.bias_ih_l1, layer.bias_hh_l1):
            parameter.zero_()
        i, f, _, o = layer.bias_ih_l1.view(4, H)
        i += 40
        f -= 40
        o += 40
        layer.weight_ih_l1.view(4, H, H)[2] = small * torch.eye(H)
    x = randn(steps, batch, 3)

    def shown() -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = layer(x)
        return output.atanh().atanh() / small, h_n, c_n

    torch.manual_seed(0)
    dropped, h_n, c_n = shown()
    layer.eval()
    whole, h_whole, c_whole = shown()
    zero = dropped.abs() < 1e-9
    assert abs(zero.double().mean() - p) < 5 * (p * (1 - p) / zero.numel()) ** 0.5
    torch.testing.assert_close(dropped[~zero], whole[~zero] / (1 - p))
    assert len(zero.flatten(0, 1).unique(dim=0)) == steps * batch, "every row of every step has a mask of its own"
    assert_all_close((h_n[0], c_n[0]), (h_whole[0], c_whole[0]))
    torch.testing.assert_close(h_n[1].atanh().atanh() / small, dropped[-1])


# --- autocast


AUTOCASTS = [  # of the module, of the input, whether with states, of autocast
    (torch.float32, torch.float32, True, torch.bfloat16),
    (torch.float32, torch.float32, False, torch.bfloat16),
    (torch.float32, torch.bfloat16, True, torch.bfloat16),
    (torch.bfloat16, torch.float32, False, torch.bfloat16),
    (torch.float64, torch.float64, True, torch.bfloat16),
    (torch.float32, torch.float32, True, torch.float16),
]


def under_autocast(module: nn.LSTM, input_dtype: torch.dtype, with_hx: bool, autocast: torch.dtype) -> list[Tensor]:
    """Results, and gradients with the results as cotangents."""
    wide = torch.float64 if input_dtype == torch.float64 else torch.float32
    hx = states(2, 2, 4, dtype=torch.float32) if with_hx else None
    with torch.autocast("cpu", autocast):
        results = flat(module(randn(5, 2, 3).to(input_dtype), hx and tuple(t.to(wide) for t in hx)))
    return [*results, *torch.autograd.grad(results, list(module.parameters()), results)]


@every_backend
@pytest.mark.parametrize(("module_dtype", "input_dtype", "with_hx", "autocast"), AUTOCASTS)
def test_autocast(
    module_dtype: torch.dtype, input_dtype: torch.dtype, with_hx: bool, autocast: torch.dtype, backend: str
) -> None:
    """Beside nn.LSTM in fp64: not every CPU's takes bf16 and fp16 under autocast."""
    theirs, ours = pair(3, 4, 2, dtype=module_dtype, backend=backend)
    got = under_autocast(ours, input_dtype, with_hx, autocast)
    exact = under_autocast(theirs.double(), torch.float64, with_hx, autocast)
    cast = torch.float64 if module_dtype == torch.float64 else autocast
    assert [t.dtype for t in got] == [cast] * 3 + [module_dtype] * 8
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).norm() < (1e-6 if cast == torch.float64 else 0.03) * b.norm()


@pytest.mark.skipif(not onednn_has_bf16(), reason="not measured: nn.LSTM takes no bf16 under autocast on this CPU")
@pytest.mark.parametrize(("module_dtype", "input_dtype", "with_hx", "autocast"), AUTOCASTS[:5])
def test_autocast_casts_as_torchs_does(
    module_dtype: torch.dtype, input_dtype: torch.dtype, with_hx: bool, autocast: torch.dtype
) -> None:
    theirs, ours = (under_autocast(m, input_dtype, with_hx, autocast) for m in pair(3, 4, 2, dtype=module_dtype))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]


# --- gradients


@every_backend
@pytest.mark.parametrize("of", [(0,), (1,), (2,)], ids=["output", "h_n", "c_n"])
@pytest.mark.parametrize("steps", [1, 4])
def test_each_result_alone_has_gradients(of: tuple[int], steps: int, backend: str) -> None:
    theirs, ours = pair(3, 4, 2, proj_size=2, bidirectional=True, dtype=torch.float64, backend=backend)
    x, hx = randn(steps, 2, 3).requires_grad_(), [t.requires_grad_() for t in states(4, 2, 4, proj=2)]
    assert_all_close(gradients(ours, x, hx, of), gradients(theirs, x, hx, of))


@every_backend
def test_backward_in_eval_mode(backend: str) -> None:
    layer, x = fused_lstm.LSTM(3, 4, 2, backend=backend), randn(5, 2, 3, dtype=torch.float32).requires_grad_()
    assert all_equal(gradients(layer.eval(), x), gradients(layer.train(), x))


@every_backend
def test_backward_twice_through_one_graph(backend: str) -> None:
    layer, x = fused_lstm.LSTM(3, 4, 2, bidirectional=True, backend=backend), randn(5, 2, 3, dtype=torch.float32)
    results = flat(layer(x))
    by, of = list(layer.parameters()), [torch.ones_like(t) for t in results]
    first = torch.autograd.grad(results, by, of, retain_graph=True)
    assert all_equal(torch.autograd.grad(results, by, of), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(results, by, of)


@every_backend
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "weight_hr", "l0", "l1", ""])
def test_frozen_weights(frozen: str, steps: int, backend: str) -> None:
    """Freezing some weights leaves the gradients of the others as they are; the empty string freezes all."""
    layer = fused_lstm.LSTM(3, 4, 2, proj_size=2, dtype=torch.float64, backend=backend)
    x = randn(steps, 2, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    before = dict(zip(["x", *names], gradients(layer, x), strict=True))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in name)
    sum(t.square().sum() for t in flat(layer(x))).backward()
    torch.testing.assert_close(x.grad, before["x"])
    for name, parameter in layer.named_parameters():
        if frozen in name:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, before[name])


@every_backend
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type, steps: int, backend: str) -> None:
    layer, x = fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend=backend), randn(steps, 2, 3)
    with mode():
        results = flat(layer(x))
    assert not any(t.requires_grad for t in results)
    assert all(t.is_inference() == (mode is torch.inference_mode) for t in results)
    assert_all_close(results, [t.detach() for t in flat(layer(x))])


@every_backend
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    layer = fused_lstm.LSTM(20, 50, 2, bidirectional=True, dropout=0.5, backend=backend)
    x = randn(4, 33, 20, dtype=torch.float32).requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append([*flat(layer(x)), *gradients(layer, x)])
    assert all_equal(*runs)


@every_backend
@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({"bidirectional": True}, randn(4, 3, 3)),
        ({"proj_size": 2, "bias": False}, randn(4, 3, 3)),
        ({"batch_first": True}, randn(3, 4, 3)),
        ({"bidirectional": True, "proj_size": 2}, randn(1, 3, 3)),
        ({"bidirectional": True}, pack_sequence([randn(n, 3) for n in (2, 4, 1)], enforce_sorted=False)),
    ],
    ids=["plain", "projection", "batch_first", "T = 1", "packed"],
)
def test_second_derivatives(options: dict, x: Tensor | PackedSequence, backend: str) -> None:
    got = []
    for module in pair(3, 4, 2, dtype=torch.float64, backend=backend, **options):
        directions = 2 if module.bidirectional else 1
        hx = [t.requires_grad_() for t in states(2 * directions, 3, 4, proj=module.proj_size)]
        data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        first = gradients(module, given, hx, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        got.append([*first, *torch.autograd.grad(norm, [data, *hx, *module.parameters()])])
    assert_all_close(got[1], got[0])


@every_backend
def test_gradient_penalty_trains(backend: str) -> None:
    """backward() through gradients accumulates into the parameters, on top of a first derivative."""
    got = []
    for module in pair(3, 4, dtype=torch.float64, backend=backend):
        x = randn(4, 2, 3).requires_grad_()
        output, _ = module(x)
        (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        ((dx.norm(dim=-1) - 1).square().mean() + output.mean()).backward()
        got.append([x.grad, *(p.grad for p in module.parameters())])
    assert_all_close(got[1], got[0])
