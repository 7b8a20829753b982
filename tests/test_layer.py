"""What torch.nn.LSTM promises of construction and call, with torch.nn.LSTM beside it; state is in test_state.py."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, failure, flat, pair, randn, states
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

ATTRIBUTES = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
    "training", "_all_weights", "_flat_weights_names",
)  # fmt: skip
COMBINATIONS = list(itertools.product((1, 2, 3), (False, True), (0, 2), (False, True)))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 4), {}),
        ((3, 8, 2, False, True, 0.1, True, 2), {}),
        ((3, 4, 2, True, False, 0, False, 0, "cpu", torch.float64), {}),
        ((), {"input_size": 3, "hidden_size": 4, "num_layers": 3, "dtype": torch.bfloat16, "device": "meta"}),
        ((3,), {"hidden_size": 4, "bidirectional": True, "proj_size": 1, "batch_first": True}),
        ((3, 4, 2), {"dropout": 1, "bidirectional": 1}),
    ],
)
def test_construction(args: tuple, kwargs: dict) -> None:
    theirs, ours = nn.LSTM(*args, **kwargs), fused_lstm.LSTM(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    kinds = [[(n, p.shape, p.dtype, p.device) for n, p in m.named_parameters()] for m in (theirs, ours)]
    assert kinds[0] == kinds[1]
    parameters = dict(ours.named_parameters())
    names = [[next(n for n, p in parameters.items() if p is w) for w in group] for group in ours.all_weights]
    assert names == theirs._all_weights
    assert all(parameters[n] is w for n, w in zip(ours._flat_weights_names, ours._flat_weights, strict=True))
    assert len(ours._flat_weight_refs) == len(theirs._flat_weight_refs)


@pytest.mark.parametrize(("layers", "bidirectional", "proj", "bias"), COMBINATIONS)
def test_seeded_initialization_is_that_of_torch(layers: int, bidirectional: bool, proj: int, bias: bool) -> None:
    drawn = []
    for cls in (nn.LSTM, fused_lstm.LSTM):
        torch.manual_seed(1)
        module = cls(3, 5, layers, bias, bidirectional=bidirectional, proj_size=proj)
        first = [p.detach().clone() for p in module.parameters()]
        module.reset_parameters()
        drawn.append([*first, *module.parameters(), torch.rand(1)])
    assert all_equal(*drawn)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 4), {"bias": 1}), ((3, 4, 1, "True"), {}), ((3, 4), {"batch_first": 0}), ((3, 4), {"batch_first": None}),
        ((3.0, 4), {}), (("3", 4), {}), ((3, 4.0), {}), ((3, 4, 1.0), {}), ((0, 4), {}), ((-1, 4), {}), ((3, 0), {}),
        ((3, 4, 0), {}), ((3, 4), {"proj_size": 4}), ((3, 4), {"proj_size": -1}), ((3, 4), {"proj_size": 1.5}),
        ((3, 4, 2), {"dropout": 1.1}), ((3, 4, 2), {"dropout": -0.1}), ((3, 4, 2), {"dropout": True}),
        ((3, 4, 2), {"dropout": "0.5"}), ((3, 4, 2), {"dropout": None}), ((3, 4), {"dtype": torch.int64}),
        ((3, 4), {"device": "nowhere"}), ((3,), {}), ((3, 4), {"lengths": 1}), ((3, 4), {"mode": "LSTM"}),
        ((3, 4, 1, True, False, 0.0, False, 0, None, None, "auto"), {}),
    ],
)  # fmt: skip
def test_bad_construction(args: tuple, kwargs: dict) -> None:
    assert failure(lambda: fused_lstm.LSTM(*args, **kwargs)) == failure(lambda: nn.LSTM(*args, **kwargs))


def test_warning_of_useless_dropout() -> None:
    caught = []
    for cls in (nn.LSTM, fused_lstm.LSTM):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            cls(3, 4, dropout=0.5)
            cls(3, 4, 2, dropout=0.5)
        caught.append([(w.category, str(w.message)) for w in record])
    assert caught[0] == caught[1]
    assert len(caught[0]) == 1


@pytest.mark.parametrize("backend", ["cudnn", "", None, "Auto"])
def test_unknown_backend(backend: Any) -> None:
    message = f"backend should be one of 'auto', 'triton', 'aten', 'reference', got: {backend!r}"
    assert failure(lambda: fused_lstm.LSTM(3, 4, backend=backend)) == (ValueError, message)
    layer = fused_lstm.LSTM(3, 4)
    layer.backend = backend
    assert failure(lambda: layer(torch.randn(2, 1, 3))) == (ValueError, message)


def test_backend_in_repr() -> None:
    assert repr(fused_lstm.LSTM(3, 4, 2, backend="aten")) == "LSTM(3, 4, num_layers=2, backend=aten)"


def test_helper_methods() -> None:
    for theirs, ours, x, sizes in [
        (*pair(3, 4, 2, proj_size=2, bidirectional=True), randn(5, 6, 3, dtype=torch.float32), None),
        (*pair(3, 4, batch_first=True), randn(7, 3, dtype=torch.float32), torch.tensor([4, 2, 1])),
    ]:
        size = ours.get_expected_hidden_size(x, sizes), ours.get_expected_cell_size(x, sizes)
        assert size == (theirs.get_expected_hidden_size(x, sizes), theirs.get_expected_cell_size(x, sizes))
        good = tuple(torch.randn(s) for s in size)
        order = torch.randperm(good[0].shape[1])
        assert all_equal(ours.permute_hidden(good, order), theirs.permute_hidden(good, order))
        assert ours.permute_hidden(good, None) is good
        ours.check_input(x, sizes)
        ours.check_hidden_size(good[1], size[1])
        ours.check_forward_args(x, good, sizes)
        for name, args in [
            ("check_input", (x[0], sizes)), ("check_input", (x[..., :2], sizes)), ("check_input", (x.double(), sizes)),
            ("check_hidden_size", (good[1], (1, 2, 3))), ("check_forward_args", (x, (good[0], good[1][1:]), sizes)),
        ]:  # fmt: skip
            errors = [failure(partial(getattr(module, name), *args)) for module in (ours, theirs)]
            assert errors[0] == errors[1]


def test_flatten_parameters_does_nothing() -> None:
    layer = fused_lstm.LSTM(3, 4, 2)
    before = [p.data_ptr() for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert before == [p.data_ptr() for p in layer.parameters()]


# --- call

LAYOUTS = {
    "T, B": ({}, (5, 2, 3), (4, 2)),
    "B, T": ({"batch_first": True}, (2, 5, 3), (4, 2)),
    "unbatched": ({}, (5, 3), (4,)),
    "unbatched, batch_first": ({"batch_first": True}, (5, 3), (4,)),
    "T = 1": ({}, (1, 2, 3), (4, 2)),
    "T = 1, B, T": ({"batch_first": True}, (2, 1, 3), (4, 2)),
    "B = 1": ({}, (5, 1, 3), (4, 1)),
    "B = 0": ({}, (5, 0, 3), (4, 0)),
    "B = 0, B, T": ({"batch_first": True}, (0, 5, 3), (4, 0)),
    "T = 1, B = 0": ({}, (1, 0, 3), (4, 0)),
}


@every_backend
@pytest.mark.parametrize("proj", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, proj: int, backend: str) -> None:
    """Shapes, results and gradients, with no hx, hx as a tuple and hx as a list; B = 0 too."""
    options, shape, batch = LAYOUTS[layout]
    modules = pair(3, 4, 2, bidirectional=True, proj_size=proj, dtype=torch.float64, backend=backend, **options)
    h0, c0 = states(*batch, 4, proj=proj)
    for kind in (None, tuple, list):
        got = []
        for module in modules:
            x = randn(*shape).requires_grad_()
            hx = kind and kind((h0.clone().requires_grad_(), c0.clone().requires_grad_()))
            output, state = module(x, hx) if kind is list else module(input=x, hx=hx)
            assert type(state) is tuple
            grads = torch.autograd.grad((output, *state), [x, *(hx or []), *module.parameters()], (output, *state))
            got.append([output, *state, *grads])
        assert_all_close(got[1], got[0])


@every_backend
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [(4, 3, 3, 1), (2, 4, 1, 3)])
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed(lengths: tuple[int, ...], with_hx: bool, batch_first: bool, backend: str) -> None:
    theirs, ours = pair(3, 4, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, backend=backend)
    rows = [randn(length, 3) for length in lengths]
    packed = pack_sequence(rows, enforce_sorted=lengths == (4, 3, 3, 1))
    hx = list(states(4, 4, 4)) if with_hx else None
    result = ours(packed, hx)
    assert_all_close(flat(result), flat(theirs(packed, hx)))
    assert isinstance(result[0], PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(result[0], field) is getattr(packed, field)


@every_backend
def test_strides_do_not_matter(backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend=backend)
    x, (h0, c0) = randn(3, 5, 2).permute(1, 2, 0), (randn(4, 2, 2).permute(2, 1, 0), randn(1, 1, 1).expand(2, 2, 4))
    dense = [t.contiguous() for t in (x, h0, c0)]
    assert not any(t is d for t, d in zip((x, h0, c0), dense, strict=True))
    assert_all_close(flat(layer(x, (h0, c0))), flat(layer(dense[0], dense[1:])))


@every_backend
@pytest.mark.parametrize("shape", [(1, 2, 3), (5, 2, 3), (5, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_shares_memory(shape: tuple[int, ...], grad: bool, backend: str) -> None:
    """The call and its backward pass change no argument, and changing one result in place changes no other tensor."""
    layer = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend=backend).requires_grad_(grad)
    x, (h0, c0) = randn(*shape), states(1, *shape[1:-1], 4)
    given = [x, h0, c0, *(p.detach() for p in layer.parameters())]
    before = [t.clone() for t in given]
    results = flat(layer(x, (h0, c0)))
    if grad:
        torch.autograd.backward(results, [torch.ones_like(t) for t in results], retain_graph=True)
    assert all_equal(given, before)
    for k, result in enumerate(results):
        others = [t for j, t in enumerate(results) if j != k] + given
        kept = [t.clone() for t in others]
        result.add_(1)
        assert all_equal(others, kept)


# --- errors

CALLS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Any]]] = {
    "1-D": ({}, lambda m: m(torch.randn(3))),
    "4-D": ({}, lambda m: m(torch.randn(3, 3, 3, 3))),
    "batched, hx 2-D": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 4), torch.randn(1, 4)))),
    "batched, c 2-D": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 4)))),
    "unbatched, hx 3-D": ({}, lambda m: m(torch.randn(5, 3), (torch.randn(1, 1, 4), torch.randn(1, 1, 4)))),
    "unbatched, h 1-D": ({}, lambda m: m(torch.randn(5, 3), (torch.randn(4), torch.randn(1, 4)))),
    "batch of h": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 3, 4), torch.randn(1, 2, 4)))),
    "batch of c": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 3, 4)))),
    "layers of h": ({"num_layers": 2}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(2, 2, 4)))),
    "unbatched width of h": ({}, lambda m: m(torch.randn(5, 3), (torch.randn(1, 3), torch.randn(1, 4)))),
    "h not projected": ({"proj_size": 2}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4),) * 2)),
    "c projected": ({"proj_size": 2}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 2),) * 2)),
    "hx batch first": ({"batch_first": True}, lambda m: m(torch.randn(2, 5, 3), (torch.randn(2, 1, 4),) * 2)),
    "three states": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4),) * 3)),
    "input size": ({}, lambda m: m(torch.randn(5, 2, 2))),
    "input size, unbatched": ({}, lambda m: m(torch.randn(5, 4))),
    "fp64 input": ({}, lambda m: m(torch.randn(5, 2, 3).double())),
    "fp32 input": ({"dtype": torch.float64}, lambda m: m(torch.randn(5, 2, 3))),
    "integer input": ({}, lambda m: m(torch.zeros(5, 2, 3, dtype=torch.int64))),
    "T = 0": ({}, lambda m: m(torch.randn(0, 2, 3))),
    "T = 0, batch first": ({"batch_first": True}, lambda m: m(torch.randn(2, 0, 3))),
    "T = 0, unbatched": ({}, lambda m: m(torch.randn(0, 3))),
    "T = 0, hx": ({}, lambda m: m(torch.randn(0, 2, 3), (torch.randn(1, 2, 4),) * 2)),
    "T = 0, B = 0": ({}, lambda m: m(torch.randn(0, 0, 3))),
    "device of input": ({}, lambda m: m(torch.randn(5, 2, 3, device="meta"))),
    "device of module": ({"device": "meta"}, lambda m: m(torch.randn(5, 2, 3))),
    "device of hx": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4, device="meta"),) * 2)),
    "device of c": ({}, lambda m: m(torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4, device="meta")))),
    "no input": ({}, lambda m: m()),
    "unknown keyword": ({}, lambda m: m(torch.randn(5, 2, 3), h0=None)),
    "a list": ({}, lambda m: m([1.0, 2.0])),
}


@every_backend
@pytest.mark.parametrize("call", CALLS)
def test_bad_call(call: str, backend: str) -> None:
    options, f = CALLS[call]
    assert failure(lambda: f(fused_lstm.LSTM(3, 4, backend=backend, **options))) == failure(
        lambda: f(nn.LSTM(3, 4, **options))
    )


@every_backend
def test_bad_calls_that_torch_words_badly(backend: str) -> None:
    """Where torch fails in its depths, or only on some paths, the same checks say what is wrong."""
    layer, x = fused_lstm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3)
    h, packed = torch.randn(1, 2, 4), pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for k, hx in enumerate([(h.double(), h), (h, h.double())]):
        dtypes = rf"hidden\[{k}\] dtype \(torch.float64\) does not match input dtype \(torch.float32\)"
        for data in (x, packed):
            with pytest.raises(ValueError, match=dtypes):
                layer(data, hx)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 4\), got \[1, 3, 4\]"):
        layer(packed, (torch.randn(1, 3, 4),) * 2)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 4\), got \[2, 4\]"):
        layer(packed, (h, h[0]))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 2"):
        layer(packed._replace(data=packed.data[:, :2]))
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match weight dtype"):
        layer(packed.double())


@every_backend
def test_weights_that_do_not_fit(backend: str) -> None:
    """What is too short would be read past its end, and what has another dtype as well."""
    x, wide = torch.randn(4, 2, 3), dict(fused_lstm.LSTM(3, 32).named_parameters())
    for bad, message in [
        ({"weight_hh_l0": torch.randn(64, 8)}, r"Expected weight_hh_l0 size \(64, 16\), got \[64, 8\]"),
        ({"bias_hh_l0": torch.randn(60)}, r"Expected bias_hh_l0 size \(64,\), got \[60\]"),
        (wide, r"Expected weight_ih_l0 size \(64, 3\), got \[128, 3\]"),
        (
            {"bias_hh_l0": torch.randn(64).half()},
            r"weights should be of one dtype and device, .* bias_hh_l0 of torch.float16",
        ),
        (
            {"weight_hh_l0": torch.randn(64, 16, device="meta")},
            r"one dtype and device, .* weight_hh_l0 of torch.float32 on meta",
        ),
    ]:
        layer = fused_lstm.LSTM(3, 16, backend=backend)
        layer(x)
        for name, weight in bad.items():
            setattr(layer, name, nn.Parameter(weight))
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer(x)


@every_backend
def test_strides_of_biases_and_lengths(backend: str) -> None:
    layer, x = fused_lstm.LSTM(3, 16, backend=backend), torch.randn(4, 2, 3)
    bias, lengths = torch.randn(64, 2)[:, 0], torch.tensor([[3, 9], [2, 9]])[:, 0]
    results = []
    for kind in (torch.Tensor.clone, lambda t: t):
        layer.bias_hh_l0 = nn.Parameter(kind(bias))
        results.append(flat(layer(x, lengths=kind(lengths))))
    assert all_equal(*results)


def test_shapes_on_the_meta_device() -> None:
    theirs, ours = (cls(3, 4, 2, bidirectional=True, proj_size=2, device="meta") for cls in (nn.LSTM, fused_lstm.LSTM))
    x = torch.randn(5, 2, 3, device="meta")
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]


def test_a_number_of_weights_that_does_not_fit() -> None:
    lstm = fused_lstm.LSTM(3, 4, 2)
    with pytest.raises(ValueError, match="_flat_weights should be 8 tensors, got 1"):
        lstm._flat_weights = [torch.randn(16, 3)]
    lstm.num_layers = 1
    with pytest.raises(ValueError, match="expected 4 weights for num_layers=1, got 8"):
        lstm(torch.randn(5, 2, 3))


def double(m: nn.LSTM, x: torch.Tensor) -> Any:
    return flat(m.double()(x.double()))


def replaced(m: nn.LSTM, x: torch.Tensor) -> Any:
    m.weight_hh_l0 = nn.Parameter(torch.ones(20, 5))
    m.bias_ih_l0.data = torch.ones(20)
    return flat(m(x))


def batch_first(m: nn.LSTM, x: torch.Tensor) -> Any:
    m.batch_first = True
    return flat(m(x))


def mapped(m: nn.LSTM, x: torch.Tensor) -> Any:
    return flat(torch.func.vmap(lambda _: m(x))(torch.arange(2)))


def tangent(m: nn.LSTM, x: torch.Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        y = m(torch.autograd.forward_ad.make_dual(x, x.cos()))[0]
        return [torch.autograd.forward_ad.unpack_dual(y).tangent]


def traced(m: nn.LSTM, x: torch.Tensor) -> Any:
    return flat(torch.jit.trace(m, (x,), check_trace=False)(x + 1))


def cast(m: nn.LSTM, x: torch.Tensor) -> Any:
    with torch.autocast("cpu"):
        return flat(m(x))


def frozen(m: nn.LSTM, x: torch.Tensor) -> Any:
    return [torch.tensor(m.requires_grad_(False)(x)[0].requires_grad)]


def dropped(m: nn.LSTM, x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return flat(fused_lstm.weight_drop(m, 0.5)(x))


def copied(m: nn.LSTM, x: torch.Tensor) -> Any:
    return flat(pickle.loads(pickle.dumps(copy.deepcopy(m)))(x))


WRONG: dict[str, Callable[[nn.LSTM, torch.Tensor], Any]] = {
    "I": lambda m, x: m(x[..., :2]),
    "three states": lambda m, x: m(x, (torch.zeros(1, 3, 5),) * 3),
    "no state": lambda m, x: m(x, (torch.zeros(1, 3, 5), None)),
    "B": lambda m, x: m(x, (torch.zeros(1, 2, 5),) * 2),
    "dtype": lambda m, x: m(x.double()),
    "weights": lambda m, x: m.double()(x),
    "backend": lambda m, x: setattr(m, "backend", "triton") or m(x),
}


@pytest.mark.filterwarnings("ignore")  # torch's of torch.jit
@pytest.mark.parametrize("change", [double, replaced, batch_first, mapped, tangent, traced, cast, frozen, dropped, copied])
def test_a_remembered_call_gives_way_to_a_change(change: Callable[..., Any]) -> None:
    m, x = fused_lstm.LSTM(4, 5), torch.randn(3, 3, 4)
    fresh = copy.deepcopy(m)
    for _ in range(2):
        m(x), m(x, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))
    assert_all_close(change(m, x), change(fresh, x))


@pytest.mark.parametrize("what", WRONG)
def test_a_remembered_call_leaves_errors_as_they_are(what: str) -> None:
    m, x = fused_lstm.LSTM(4, 5), torch.randn(3, 3, 4)
    fresh = copy.deepcopy(m)
    for _ in range(2):
        m(x), m(x, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))
    assert failure(partial(WRONG[what], m, x)) == failure(partial(WRONG[what], fresh, x)) is not None


def test_calls_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = fused_lstm.LSTM(4, 5), torch.randn(3, 3, 4)
    first = m(x)
    monkeypatch.setattr(m, "_prepare", None)
    assert all_equal(flat(first), flat(m(x)))
