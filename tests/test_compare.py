"""Where torch.nn.LSTM falls short and fused_lstm.LSTM must not: docs/compare.md as tests, in the order of its table.

Each test shows first that nn.LSTM fails, then that ours works, with the right results. Where nn.LSTM fails on CUDA only,
ours alone is tested, on a CPU always and on CUDA where there is a GPU. What is a matter of time
is measured by bench/run.py: suites lengths, latency (T = 1) and grid (fp16).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pairs import Graphs, assert_all_close, flat, layers_in, packed, pair, randn, states
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fused_lstm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script",  # these are torch's own, about nn.LSTM
    "ignore:The tensor attributes self._flat_weights",
)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def on(device: str, theirs: nn.LSTM) -> fused_lstm.LSTM:
    """Ours in fp32, to compare with theirs in fp64 on a CPU, where it knows all derivatives."""
    return fused_lstm.LSTM.from_torch(copy.deepcopy(theirs)).float().to(device)


def close_to(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=1e-4, atol=1e-5)


# --- backward in eval mode; double backward


@every_device
def test_backward_in_eval_mode(device: str) -> None:
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64).eval()
    got = []
    for module in (on(device, theirs), theirs):
        x = randn(6, 3, 3).to(module.weight_ih_l0).requires_grad_()
        loss = sum(t.square().sum() for t in flat(module(x)))
        got.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    close_to(*got)


@every_device
def test_double_backward(device: str) -> None:
    """A gradient penalty, by every parameter."""
    theirs = nn.LSTM(3, 4, dtype=torch.float64)
    got = []
    for module in (on(device, theirs), theirs):
        x = randn(6, 3, 3).to(module.weight_ih_l0).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        got.append(torch.autograd.grad(dx.square().sum(), [x, *module.parameters()], materialize_grads=True))
    close_to(*got)


def test_double_backward_against_finite_differences() -> None:
    layer = fused_lstm.LSTM(2, 3, 2, dtype=torch.float64)
    x, hx = randn(3, 2, 2).requires_grad_(), [t.requires_grad_() for t in states(2, 2, 3)]
    assert torch.autograd.gradgradcheck(lambda x, h, c: flat(layer(x, (h, c))), (x, *hx))


# --- vmap

NO_RULE = "Batching rule not implemented for aten::lstm.input. We could not generate a fallback."


def test_vmap_over_inputs() -> None:
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x = randn(5, 6, 2, 3).float()  # five members
    with pytest.raises(RuntimeError, match=NO_RULE):
        torch.vmap(lambda x: theirs(x)[0])(x)
    got = torch.vmap(lambda x: flat(ours(x)))(x)
    assert_all_close(got, [torch.stack(ts) for ts in zip(*(flat(theirs(member)) for member in x), strict=True)])


def test_vmap_over_stacked_weights() -> None:
    """An ensemble; and the gradients of each member's loss."""
    x = randn(6, 2, 3).float()

    def loss(lstm: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda weights: functional_call(lstm, weights, (x,))[0].square().sum()

    pairs = [pair(3, 4, 2) for _ in range(5)]
    theirs, ours = map(list, zip(*pairs, strict=True))
    with pytest.raises(RuntimeError, match=NO_RULE):
        torch.vmap(loss(theirs[0]))(stack_module_state(theirs)[0])
    grads, losses = torch.vmap(torch.func.grad_and_value(loss(ours[0])))(stack_module_state(ours)[0])
    for k, member in enumerate(theirs):
        alone = loss(member)(dict(member.named_parameters()))
        alone.backward()
        torch.testing.assert_close(losses[k], alone.detach())
        assert_all_close([g[k] for g in grads.values()], [p.grad for p in member.parameters()])


# --- forward-mode AD


def test_forward_mode_ad() -> None:
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x, dx = randn(6, 2, 3), randn(2, 6, 3).transpose(0, 1)
    with pytest.raises(NotImplementedError, match="Trying to use forward AD with mkldnn_rnn_layer"):
        torch.func.jvp(lambda x: theirs(x)[0], (x.float(),), (dx.float(),))  # in fp64, where oneDNN has no LSTM, it works
    single, moved_single = torch.func.jvp(lambda x: ours(x)[0], (x.float(),), (dx.float(),))
    ours = ours.double()
    value, moved = torch.func.jvp(lambda x: ours(x)[0], (x,), (dx,))
    eps = 1e-6
    torch.testing.assert_close(value, ours(x)[0])
    torch.testing.assert_close(moved, (ours(x + eps * dx)[0] - ours(x - eps * dx)[0]) / (2 * eps), rtol=1e-6, atol=1e-8)
    close_to([single, moved_single], [value, moved])


# --- torch.compile, torch.export


DYNAMO = "Dynamo does not support RNN, GRU, or LSTM"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_compile_with_dynamic_shapes(marked: bool, grad: bool) -> None:
    (theirs, ours), graphs = pair(3, 4, 2), Graphs()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=DYNAMO):
        torch.compile(theirs, fullgraph=True, backend=graphs)(randn(5, 2, 3).float())
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    for k in range(20):
        x = randn(2 + 7 * k % 20, 2 + 3 * k % 11, 3).float()
        if marked:
            torch._dynamo.mark_dynamic(x, [0, 1])
        with torch.set_grad_enabled(grad):
            assert_all_close(flat(compiled(x)), flat(theirs(x)))
    # Sizes that nobody marked are dynamic from the second call on.
    assert graphs.layers == [2] * (1 if marked else 2), "one graph, one op per layer"


def test_compiled_gradients() -> None:
    torch.compiler.reset()
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x, got = randn(5, 2, 3).float().requires_grad_(), []
    for module in (torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs):
        results = flat(module(x))
        got.append([*results, *torch.autograd.grad(results, [x, *module.parameters()], results)])
    assert_all_close(*got)


def test_compile_packed_input() -> None:
    (theirs, ours), graphs = pair(3, 4, bidirectional=True), Graphs()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    for lengths in ([5, 2, 4], [3, 6], [7, 1, 2, 6]):
        packed = pack_sequence([randn(n, 3).float() for n in lengths], enforce_sorted=False)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=DYNAMO):
            torch.compile(theirs, fullgraph=True, backend=graphs)(packed)
        assert_all_close(flat(compiled(packed)), flat(theirs(packed)))
    assert graphs.layers == [1, 1]


def test_export_with_dynamic_length() -> None:
    theirs, ours = pair(3, 4, 2)
    x, shapes = randn(5, 2, 3).float(), ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with pytest.raises(torch._dynamo.exc.UserError, match=r"your code specialized it to be a constant \(5\)"):
        torch.export.export(theirs, (x,), dynamic_shapes=shapes)
    exported = torch.export.export(ours, (x,), dynamic_shapes=shapes)
    assert layers_in(exported.graph) == 2
    for T, B in ((5, 2), (2, 7), (50, 3)):
        x = randn(T, B, 3).float()
        assert_all_close(flat(exported.module()(x)), flat(theirs(x)))


# --- lengths


def test_lengths_unsorted() -> None:
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x, lengths = randn(6, 4, 3).float(), torch.tensor([3, 6, 1, 4])
    with pytest.raises(RuntimeError, match="`lengths` array must be sorted in decreasing order"):
        pack_padded_sequence(x, lengths)
    assert_all_close(flat(ours(x, lengths=lengths)), packed(theirs, x, lengths))


def test_lengths_of_zero() -> None:
    theirs, ours = pair(3, 4)
    x, hx, lengths = randn(6, 3, 3).float(), states(1, 3, 4, dtype=torch.float32), torch.tensor([3, 0, 6])
    with pytest.raises(RuntimeError, match="Length of all samples has to be greater than 0"):
        packed(theirs, x, lengths)
    y, (h_n, c_n) = ours(x, hx, lengths=lengths)
    assert not y[:, 1].any()
    assert_all_close([h_n[:, 1], c_n[:, 1]], [s[:, 1] for s in hx])
    expected = flat(theirs(x[:3, 0], tuple(s[:, 0] for s in hx)))
    assert_all_close([y[:3, 0], h_n[:, 0], c_n[:, 0]], expected)


# --- resets


def test_resets() -> None:
    """Each row's episodes as nn.LSTM sees them one by one."""
    theirs, ours = pair(3, 4, 2, bidirectional=True)
    x = randn(9, 3, 3).float()
    begins = [(0, 3, 4), (0, 8), (0,)]
    resets = torch.zeros(9, 3, dtype=torch.bool)
    for row, times in enumerate(begins):
        resets[list(times), row] = True
    with pytest.raises(TypeError, match="unexpected keyword argument 'resets'"):
        theirs(x, resets=resets)
    y, _ = ours(x, resets=resets)
    for row, times in enumerate(begins):
        episodes = [theirs(x[a:b, row])[0] for a, b in pairwise((*times, 9))]
        torch.testing.assert_close(y[:, row], torch.cat(episodes))


# --- sizes and types that cuDNN has a slow algorithm for


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidirectional_stack_of_an_odd_batch(dtype: torch.dtype, device: str) -> None:
    theirs = nn.LSTM(24, 40, 2, bidirectional=True, dtype=torch.float64)
    x = randn(20, 13, 24)
    got, expected = flat(on(device, theirs).to(dtype)(x.to(device, dtype))), flat(theirs(x))
    for a, b in zip(got, expected, strict=True):
        assert (a.double().cpu() - b).norm() < (1e-5 if dtype == torch.float32 else 0.02) * b.norm()


@every_device
def test_dropout_by_the_seed_and_repeatable_gradients(device: str) -> None:
    layer, x = fused_lstm.LSTM(16, 32, 3, bidirectional=True, dropout=0.5).to(device), randn(20, 13, 16).float().to(device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results = flat(layer(x))
        runs.append([*results, *torch.autograd.grad(results, list(layer.parameters()), results)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True)), "the same seed, the same bits"
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True)), "another seed, another mask"


# --- no flat buffer of weights


@every_device
def test_no_warning_of_flattened_weights(device: str) -> None:
    def weight_drop(lstm: nn.Module) -> None:
        raw = lstm.weight_hh_l0.detach()
        del lstm.weight_hh_l0
        lstm.weight_hh_l0 = F.dropout(raw, 0.5)

    x = randn(6, 2, 3).float().to(device)
    for use in (lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l0"), weight_drop):
        lstm = fused_lstm.LSTM(3, 4).to(device)
        use(lstm)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = functional_call(fused_lstm.LSTM(3, 4), {n: getattr(lstm, n) for n in lstm._flat_weights_names}, (x,))
            lstm.flatten_parameters()
            assert_all_close(flat(lstm(x)), flat(expected))


def test_weights_that_are_swapped() -> None:
    """nn.LSTM holds on to its weights by weak references, with which torch cannot swap them."""
    (theirs, ours), x = pair(3, 4), randn(6, 2, 3).float()
    with pytest.raises(RuntimeError, match="Cannot swap t1 because it has weakref associated with it"):
        torch.utils.swap_tensors(theirs.weight_ih_l0, nn.Parameter(torch.zeros(16, 3)))
    torch.utils.swap_tensors(ours.weight_ih_l0, nn.Parameter(torch.zeros(16, 3)))
    nn.init.zeros_(theirs.weight_ih_l0)
    assert_all_close(flat(ours(x)), flat(theirs(x)))


def test_parametrized_weights_are_computed_once() -> None:
    calls: list[int] = []
    got = []
    for k, lstm in enumerate(pair(3, 4)):
        doubled = nn.Identity()
        parametrize.register_parametrization(lstm, "weight_hh_l0", doubled)
        doubled.register_forward_hook(lambda _, __, weight, k=k: calls.append(k) or 2 * weight)
        got.append(flat(lstm(randn(6, 2, 3).float())))
    assert calls.count(0) > 1, "torch asks its weights several times"
    assert calls.count(1) == 1
    assert_all_close(*got)


@every_device
def test_more_than_65535_steps(device: str) -> None:
    theirs = nn.LSTM(2, 3)  # which works on a CPU
    x, got = randn(70_000, 1, 2), []
    for module in (on(device, theirs), theirs):
        results = flat(module(x.to(module.weight_ih_l0)))
        got.append([*results, *torch.autograd.grad(results[0][-1].sum(), list(module.parameters()))])
    close_to(*got)
