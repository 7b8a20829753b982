"""recompute=True: the same results from less memory."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import IN_INTERPRETER, all_equal, assert_all_close, every_backend, flat, pair, randn, states
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_lstm
from fused_lstm.call import LayerCall, Rows
from fused_lstm.plan import segment_steps

KERNELS = pytest.param("triton", marks=pytest.mark.kernels)
ON_CPU = ["aten", "reference", pytest.param("triton", marks=[pytest.mark.kernels, IN_INTERPRETER])]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


# --- results; those of random calls are in test_random.py and test_ragged.py

T, B = 13, 4
LENGTHS, RESETS = torch.tensor([10, 13, 0, 4]), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.2
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stacked": ({"num_layers": 2, "bidirectional": True, "bias": False}, {}),
    "projected": ({"num_layers": 2, "proj_size": 2, "bidirectional": True}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": LENGTHS}),
    "resets": ({"bidirectional": True}, {"resets": RESETS}),
    "both, batch first": ({"bidirectional": True, "batch_first": True}, {"lengths": LENGTHS, "resets": RESETS.t()}),
    "packed": ({"num_layers": 2, "bidirectional": True}, {"packed": (10, 13, 1, 4)}),
    "packed, batch first": ({"batch_first": True}, {"packed": (2, 13, 13, 1)}),
}


def call(
    module: nn.Module, packed: tuple[int, ...] | None = None, of: tuple[int, ...] = (0, 1, 2), **given: Any
) -> list[Tensor]:
    """Results and gradients by input, states and parameters, from cotangents on some of the results."""
    groups = module.num_layers * (2 if module.bidirectional else 1)
    x = (randn(sum(packed), 3) if packed else randn(B, T, 3) if module.batch_first else randn(T, B, 3)).requires_grad_()
    hx = tuple(s.requires_grad_() for s in states(groups, B, 4, proj=module.proj_size))
    data: Tensor | PackedSequence = pack_sequence(x.split(packed), enforce_sorted=False) if packed else x
    results = flat(module(data, hx, **given))
    cotangents = [randn(*t.shape) for t in results]
    by = [t for t in (x, *hx, *module.parameters()) if t.requires_grad]
    grads = torch.autograd.grad([results[k] for k in of], by, [cotangents[k] for k in of], materialize_grads=True)
    return [t.detach() for t in (*results, *grads)]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.usefixtures("nan_memory")
def test_many_steps(case: str, backend: str) -> None:
    """More than one step in a segment, and segments in which some rows have no step."""
    options, given = CALLS[case]
    _, plain = pair(3, 4, dtype=torch.float64, backend="reference", **options)
    ours = fused_lstm.LSTM.from_torch(plain.to_torch(), backend=backend, recompute=True)
    for a, b in zip(call(ours, **given), call(plain, **given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("of", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_results_by_some_inputs(of: tuple[int, ...], backend: str) -> None:
    options = {"proj_size": 2, "bidirectional": True, "dtype": torch.float64}
    theirs, ours = pair(3, 4, backend=backend, recompute=True, **options)
    assert_all_close(call(ours, of=of), call(theirs, of=of))
    for name in ("weight_ih_l0", "weight_hr_l0", "bias_hh_l0_reverse")[: 1 if backend == "triton" else 3]:
        theirs.get_parameter(name).requires_grad_(False)
        ours.get_parameter(name).requires_grad_(False)
        assert_all_close(call(ours, of=of), call(theirs, of=of))


@pytest.mark.parametrize("backend", ON_CPU)
def test_nothing_but_the_input_needs_a_gradient(backend: str) -> None:
    theirs, ours = pair(3, 4, dtype=torch.float64, backend=backend, recompute=True)
    grads = []
    for module in (theirs, ours):
        x = randn(T, B, 3).requires_grad_()
        grads += torch.autograd.grad(module.requires_grad_(False)(x)[0].sum(), x)
    torch.testing.assert_close(*grads)


def test_dropout_draws_what_torch_draws() -> None:
    for options in ({}, {"batch_first": True, "bidirectional": True}):
        theirs, ours = pair(3, 4, 3, dropout=0.4, dtype=torch.float64, backend="aten", recompute=True, **options)
        got = []
        for module in (theirs, ours):
            torch.manual_seed(0)
            got.append(call(module))
        assert_all_close(*got)


@pytest.mark.parametrize("backend", ON_CPU)
def test_backward_twice_through_one_graph(backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, bidirectional=True, backend=backend, recompute=True)
    loss = layer(randn(9, 2, 3).float())[0].square().sum()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    assert all_equal(torch.autograd.grad(loss, list(layer.parameters())), first)


def test_what_the_backward_pass_reads_again_must_not_change() -> None:
    layer, x = fused_lstm.LSTM(3, 4, recompute=True), randn(5, 2, 3).float()
    lengths, packed = torch.tensor([5, 3]), pack_sequence([x[:, 0], x[:3, 0]])
    outputs = [(layer(x, lengths=lengths)[0], lengths), (layer(packed)[0].data, packed.batch_sizes)]
    for output, given in outputs:
        given.sub_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("steps", [1, 9])
def test_without_gradients_nothing_changes(steps: int, backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, bidirectional=True, backend=backend, recompute=True)
    plain = fused_lstm.LSTM.from_torch(layer.to_torch(), backend=backend)
    x = randn(steps, 2, 3).float()
    with torch.no_grad():
        assert all_equal(flat(layer(x)), flat(plain(x)))
    assert fused_lstm.explain(layer.requires_grad_(False), x) == fused_lstm.explain(plain.requires_grad_(False), x)


@pytest.mark.parametrize("backend", ON_CPU)
def test_backward_inside_autocast(backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, backend=backend, recompute=True)
    by, x = list(layer.parameters()), randn(9, 2, 3).float()
    expected = torch.autograd.grad(layer(x)[0].square().sum(), by)
    loss = layer(x)[0].square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert all_equal(torch.autograd.grad(loss, by, retain_graph=True), expected)
        cast = torch.autograd.grad(layer(x)[0].float().square().sum(), by)
    for a, b in zip(cast, expected, strict=True):
        assert 0 < (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 2}])
@pytest.mark.parametrize("given", [{}, {"lengths": [2, 4]}, {"resets": [[0, 1], [1, 0], [0, 0], [0, 1]]}], ids=str)
def test_first_and_second_derivatives(options: dict, given: dict, backend: str) -> None:
    layer = fused_lstm.LSTM(2, 3, dtype=torch.float64, backend=backend, recompute=True, **options)
    given = {k: torch.tensor(v) for k, v in given.items()}
    D = 2 if layer.bidirectional else 1
    inputs = [randn(4, 2, 2), *states(D, 2, 3, proj=layer.proj_size), *(p.detach().clone() for p in layer.parameters())]
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> list[Tensor]:
        return flat(torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, (h0, c0)), given))

    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_second_derivative_stays_inside_the_layer(backend: str) -> None:
    """h0 made from x: the derivative by x through h0 counts once."""
    hessians = []
    for module in pair(3, 4, dtype=torch.float64, backend=backend, recompute=True):
        x = randn(5, 2, 3).requires_grad_()
        h0 = torch.tanh(x.sum((0, 2)))[None, :, None].expand(1, 2, 4)
        (first,) = torch.autograd.grad(module(x, (h0, h0))[0].square().sum(), x, create_graph=True)
        hessians.append(torch.autograd.grad(first.sin().sum(), x)[0])
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_compiled_by_dynamo(backend: str) -> None:
    layer = fused_lstm.LSTM(2, 3, bidirectional=True, dtype=torch.float64, backend=backend, recompute=True)
    x = randn(5, 3, 2).requires_grad_()
    results = []
    for module in (layer, torch.compile(layer, backend="aot_eager")):
        got = flat(module(x))
        results.append([*got, *torch.autograd.grad(got, [x, *layer.parameters()], [t.detach() for t in got])])
    assert_all_close(*results)


# --- the explicit path's parts


def previous_step_by_step(states: Tensor, first: Tensor | None, rows: Rows, r: int) -> Tensor:
    result = torch.full_like(states[:, r], torch.nan)
    for s in range(rows.T):
        before = states[rows.at(s - 1, r, rows.active(s)), r] if s else states.new_zeros(()) if first is None else first
        for mask in (rows.valid(s), rows.kept(s, r)):
            before = before if mask is None else torch.where(mask, before, 0)
        result[rows.at(s, r)] = before
    return result


def test_previous_states() -> None:
    for seed in range(400):
        r, g = random.Random(seed), torch.Generator().manual_seed(seed)
        T, B, mode = r.randint(1, 6), r.randint(1, 4), r.choice(["padded", "batch first", "lengths", "packed"])
        lengths = torch.randint(0, T + 1, (B,), generator=g) if mode == "lengths" else None
        sizes = torch.tensor(sorted((B, *(r.randint(1, B) for _ in range(T - 1))), reverse=True))
        N, directions = int(sizes.sum()) if mode == "packed" else T * B, r.choice([1, -1, 2])
        resets = torch.rand(N, generator=g) < 0.4 if r.random() < 0.6 else None
        x = torch.zeros((N, 1) if mode == "packed" else (B, T, 1) if mode == "batch first" else (T, B, 1))
        batch_sizes = sizes if mode == "packed" else None
        call = (x, None, torch.zeros(2, B, 2), None, *[None] * 5, lengths, batch_sizes, resets, None, directions)
        rows = LayerCall(*call, mode == "batch first", False, "", False).rows
        given, first = torch.randn(N, 2, 2, generator=g), torch.randn(B, 2, generator=g) if r.random() < 0.7 else None
        for k in range(2 if directions == 2 else 1):
            assert torch.equal(rows.previous(given, first, k), previous_step_by_step(given, first, rows, k)), (seed, mode)


# --- memory


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a call keeps for its backward pass, parameters and input aside."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = layer(x)
        del output
        return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=[pytest.mark.kernels, IN_INTERPRETER])])
def test_explicit_path_keeps_no_gates(backend: str) -> None:
    H, x = 64, torch.randn(16, 4, 8)
    layers = [fused_lstm.LSTM(8, H, bidirectional=True, backend=backend, recompute=recompute) for recompute in (False, True)]
    plain, recomputed = (saved_bytes(layer, x) for layer in layers)
    gates, output = 4 * (2 * 4 * H) * 16 * 4, 4 * (2 * H) * 16 * 4  # fp32, 4H or H in both directions, T, B
    assert plain - recomputed == gates - (output if backend == "reference" else 0)  # which finds the output in the gates


def test_segments_keep_a_few_states() -> None:
    H, x = 64, torch.randn(50, 4, 8)
    n = 50 // segment_steps(50)
    assert n == 10
    # The first states are h0 and c0, which here are one tensor of zeros for both directions.
    assert saved_bytes(fused_lstm.LSTM(8, H, bidirectional=True, recompute=True), x) == 4 * (2 * (n - 1) * 2 + 2) * 4 * H


def test_torch_func() -> None:
    theirs, ours = pair(3, 4, recompute=True)
    x = torch.randn(5, 2, 3)
    expected = torch.autograd.functional.jacobian(lambda q: theirs(q)[0].sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda q: ours(q)[0].sum())(x), expected)


MEASURE = """
import sys, torch, fused_lstm

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

def step(lstm, x):
    y, (h, c) = lstm(x)
    (y.square().mean() + h.mean() + c.mean()).backward()

def make(*sizes):
    return torch.nn.LSTM(*sizes) if sys.argv[1] == "torch" else fused_lstm.LSTM(*sizes, recompute=True)

torch.set_num_threads(1)
step(make(4, 4), torch.randn(3, 2, 4, requires_grad=True))  # what torch loads at the first call is not the layer's
lstm, x = make(512, 512), torch.randn(128, 64, 512, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = kilobytes("VmRSS")
step(lstm, x)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_half_the_memory_of_torchs_lstm(tmp_path: Path) -> None:
    def peak(which: str) -> int:
        command = [sys.executable, "-c", MEASURE, which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)

    theirs, ours = peak("torch"), peak("ours")
    assert theirs > 200_000, "the measurement sees what nn.LSTM keeps"
    assert ours <= theirs / 2, f"{ours} KiB, torch.nn.LSTM {theirs} KiB"


# --- the option


def test_function() -> None:
    _, layer = pair(3, 4, dtype=torch.float64, recompute=True)
    x, hx, weights = randn(9, 2, 3), states(1, 2, 4), list(layer.parameters())
    got = fused_lstm.lstm(x, hx, weights, recompute=True)
    assert all_equal(got, flat(layer(x, hx)))
    assert got[0].grad_fn.name() == flat(layer(x, hx))[0].grad_fn.name() == "RecomputedBackward"


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_it(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = copied(fused_lstm.LSTM(3, 4, recompute=True))
    assert layer.recompute is True
    assert repr(layer) == "LSTM(3, 4, recompute=True)"
    assert repr(copied(fused_lstm.LSTM(3, 4))) == "LSTM(3, 4)"


def test_conversions() -> None:
    theirs = nn.LSTM(3, 4)
    ours = fused_lstm.LSTM.from_torch(theirs, recompute=True)
    assert ours.recompute
    assert not hasattr(ours.to_torch(), "recompute")
    assert not fused_lstm.LSTM.from_torch(theirs).recompute
    assert fused_lstm.replace_lstm(nn.Sequential(theirs), recompute=True)[0].recompute
    assert not fused_lstm.replace_lstm(nn.Sequential(theirs))[0].recompute


def test_it_is_a_bool() -> None:
    with pytest.raises(TypeError, match="recompute should be of type bool, got: str"):
        fused_lstm.LSTM(3, 4, recompute="yes")
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        fused_lstm.LSTM.from_torch(nn.LSTM(3, 4), recompute=1)


@every_backend
@pytest.mark.parametrize(("ragged", "cell"), [(False, None), (True, None), (False, fused_lstm.Cell(layer_norm="state"))])
def test_batched_gradients(backend: str, ragged: bool, cell: fused_lstm.Cell | None) -> None:
    """As gradcheck and jacobian(vectorize=True) ask for them: several cotangents in one backward pass."""
    backend = "auto" if cell and backend == "aten" else backend  # which has no norms
    layer = fused_lstm.LSTM(3, 4, bidirectional=True, backend=backend, recompute=True, cell=cell)
    x = torch.randn(5, 2, 3, requires_grad=True)
    by = [x, *layer.parameters()]
    y = layer(x, lengths=[5, 2] if ragged else None)[0]
    cotangents = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, by, cotangents, is_grads_batched=True, retain_graph=True)
    for k, cotangent in enumerate(cotangents):
        for a, b in zip(together, torch.autograd.grad(y, by, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-5, atol=1e-5)
