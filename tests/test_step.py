"""LSTM.step, one time step at a time: the numbers of a call with T = 1, and states that can be written in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, failure, flat, randn, states
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, N, H = 4, 3, 5, 8  # N input features
LAYERS = [{}, {"num_layers": 3, "proj_size": 2}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "batch_first": True}]
each_layer = pytest.mark.parametrize("options", LAYERS, ids=["plain", "proj", "nobias", "batch_first"])


def layer(backend: str = "auto", **options: Any) -> fused_lstm.LSTM:
    torch.manual_seed(0)
    return fused_lstm.LSTM(N, H, backend=backend, **{"dtype": torch.float32, **options})


def zeros(lstm: fused_lstm.LSTM, *batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    h = torch.zeros(lstm.num_layers, *batch, lstm.proj_size or H, dtype=dtype)
    return h, torch.zeros(lstm.num_layers, *batch, H, dtype=dtype)


@every_backend
@each_layer
@pytest.mark.parametrize("grad", [False, True])
def test_same_bits_as_a_sequence_of_one_step(options: dict, grad: bool, backend: str) -> None:
    lstm, time = layer(backend, **options), int("batch_first" in options)
    x = randn(B, N, dtype=torch.float32)
    hx = states(lstm.num_layers, B, H, proj=lstm.proj_size, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        for state in (hx, list(hx), None):
            expected, (h, c) = lstm(x.unsqueeze(time), state)
            assert all_equal(flat(lstm.step(x, state)), [expected.squeeze(time), h, c])
        one = (hx[0][:, 0], hx[1][:, 0])
        expected, (h, c) = lstm(x[:1], one)
        assert all_equal(flat(lstm.step(x[0], one)), [expected[0], h, c])


@every_backend
@each_layer
def test_steps_and_their_gradients_are_those_of_the_sequence(options: dict, backend: str) -> None:
    lstm, time = layer(backend, **options), int("batch_first" in options)
    x = randn(T, B, N, dtype=torch.float32)
    grads, results = [], []
    for stepwise in (True, False):
        lstm.zero_grad()
        state, outputs = None, []
        for x_t in x if stepwise else ():
            output, state = lstm.step(x_t, state)
            outputs.append(output)
        y, state = (torch.stack(outputs, time), state) if stepwise else lstm(x.transpose(0, time))
        (y.square().sum() + state[1].sum()).backward()
        results.append([y, *state])
        grads.append([p.grad for p in lstm.parameters()])
    assert_all_close(*results)
    assert_all_close(*grads)


def test_dropout_acts_as_in_a_call() -> None:
    lstm, x = layer(num_layers=2, dropout=0.5), randn(B, N, dtype=torch.float32)
    torch.manual_seed(1)
    expected = lstm(x[None])[0][0]
    torch.manual_seed(1)
    assert torch.equal(lstm.step(x)[0], expected)
    assert not torch.equal(lstm.eval().step(x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_hooks_act() -> None:
    lstm, x = nn.utils.weight_norm(layer(), "weight_hh_l0"), randn(B, N, dtype=torch.float32)
    hx = states(1, B, H, dtype=torch.float32)
    with torch.no_grad():
        before = lstm.step(x, hx)[0]
        lstm.weight_hh_l0_g.mul_(2)  # the weight follows in a hook before the call
        after = lstm.step(x, hx)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, lstm(x[None], hx)[0][0])


@every_backend
@each_layer
@pytest.mark.parametrize("batch", [(B,), (0,), ()], ids=["batched", "empty", "unbatched"])
@torch.no_grad()
def test_inplace_moves_the_given_tensors_on(options: dict, batch: tuple, backend: str) -> None:
    lstm = layer(backend, **options)
    held, carried, kept = zeros(lstm, *batch), None, []
    for x_t in randn(T, *batch, N, dtype=torch.float32):
        output, state = lstm.step(x_t, held, inplace=True)
        expected, carried = lstm.step(x_t, carried)
        kept.append((output, expected))
        assert state[0] is held[0]
        assert state[1] is held[1]
        assert all_equal(held, carried)
    assert all_equal(*zip(*kept, strict=True)), "an output changed with the state"


def test_inplace_with_frozen_weights_needs_no_grad_mode() -> None:
    lstm = layer().requires_grad_(False)
    held = zeros(lstm, B)
    lstm.step(randn(B, N, dtype=torch.float32), held, inplace=True)
    assert held[0].any()


def test_compiles_as_one_graph() -> None:
    lstm = layer(num_layers=2)
    compiled = torch.compile(lstm.step, fullgraph=True, backend="eager")
    ours, theirs = zeros(lstm, B), zeros(lstm, B)
    with torch.no_grad():
        for x_t in randn(T, B, N, dtype=torch.float32):
            output, state = compiled(x_t, ours, inplace=True)
            assert_all_close([output, *ours], flat(lstm.step(x_t, theirs, inplace=True)))
            assert state[0] is ours[0]


X, Z = torch.zeros(B, N), torch.zeros(1, B, H)
ERRORS: list[tuple[Callable[[fused_lstm.LSTM], Any], type[Exception], str]] = [
    (lambda m: m.step(X[None]), ValueError, "(B, I) or (I,), got shape (1, 3, 5)"),
    (lambda m: m.step(pack_sequence([X])), ValueError, "(B, I) or (I,), got PackedSequence"),
    (lambda m: m.step(X[:, :2]), RuntimeError, "Expected 5, got 2"),
    (lambda m: m.step(X, (Z, Z, Z)), ValueError, "two tensors, (h, c), got 3"),
    (lambda m: m.step(X, (Z[0], Z)), ValueError, "an input of 2 dimensions, expected h and c of 3, got shapes (3, 8) and"),
    (lambda m: m.step(X[0], (Z, Z)), ValueError, "an input of 1 dimensions, expected h and c of 2, got shapes (1, 3, 8)"),
    (lambda m: m.step(X, (Z[:, :2], Z)), RuntimeError, "Expected hidden[0] size (1, 3, 8), got [1, 2, 8]"),
    (lambda m: m.step(X, (Z, Z.double())), ValueError, "hidden[1] dtype (torch.float64) does not match"),
    (lambda m: m.step(X, inplace=True), ValueError, "expected (h, c), got None"),
    (lambda m: m.step(X, (Z, Z), inplace=True), ValueError, "expected (h, c), got one tensor twice"),
    (lambda m: m.step(X, (Z, Z.clone()), inplace=True), RuntimeError, "overwrites what a gradient needs, expected torch.n"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_say_what_was_expected(call: Callable, error: type[Exception], message: str) -> None:
    raised, text = failure(lambda: call(layer()))
    assert raised is error
    assert message in text
    assert not Z.any(), "a refused call wrote to the state"


def test_a_state_that_requires_a_gradient_is_not_overwritten() -> None:
    held = zeros(lstm := layer().requires_grad_(False), B)
    held[1].requires_grad_()
    with pytest.raises(RuntimeError, match="overwrites what a gradient needs"):
        lstm.step(X, held, inplace=True)


def test_autocast_changes_the_dtype_of_the_state_that_inplace_expects() -> None:
    lstm = layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"dtype torch\.bfloat16, got torch\.float32"):
            lstm.step(X, zeros(lstm, B), inplace=True)
        held = zeros(lstm, B, dtype=torch.bfloat16)
        lstm.step(X + 1, held, inplace=True)
    assert held[0].any()


def test_a_bidirectional_layer_is_refused() -> None:
    with pytest.raises(RuntimeError, match="bidirectional layer cannot be streamed"):
        layer(bidirectional=True).step(X)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("size", [H, 256])
@torch.no_grad()
def test_in_a_cuda_graph(size: int, backend: str) -> None:
    lstm = fused_lstm.LSTM(N, size, num_layers=2, device="cuda", backend=backend)
    x = torch.zeros(B, N, device="cuda")
    held = tuple(torch.zeros(2, B, size, device="cuda") for _ in range(2))
    lstm.step(x, held, inplace=True)  # compiles the kernels, which a capture could not wait for
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = lstm.step(x, held, inplace=True)
    for s in held:
        s.zero_()
    carried = None
    for x_t in randn(T, B, N, dtype=torch.float32).cuda():
        x.copy_(x_t)
        graph.replay()
        expected, carried = lstm.step(x_t, carried)
        assert_all_close([output, *held], [expected, *carried])


@pytest.mark.gpu
@torch.no_grad()
def test_does_not_wait_for_the_gpu() -> None:
    lstm, x = fused_lstm.LSTM(N, H, num_layers=2, device="cuda"), torch.zeros(B, N, device="cuda")
    _, held = lstm.step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lstm.step(x)
        lstm.step(x, held, inplace=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inplace_refuses_a_state_that_is_one_memory() -> None:
    lstm, s = fused_lstm.LSTM(2, 3), torch.zeros(1, 2, 3)
    with torch.no_grad(), pytest.raises(ValueError, match="got one tensor twice"):
        lstm.step(torch.randn(2, 2), (s, s.view(1, 2, 3)), inplace=True)
