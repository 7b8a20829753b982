"""torch.compile: one graph, one op for each layer, whatever the batch and the number of steps."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from pairs import IN_INTERPRETER
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import fused_lstm

HAS_CXX = shutil.which(os.environ.get("CXX", "g++")) is not None
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
I, H = 3, 8  # noqa: E741
LAYERS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"proj_size": 2, "bias": False},
    {"recompute": True},
]
SIZES = [(2, 2), (2, 4), (3, 6), (5, 9), (7, 12), (7, 2)]
# In a graph "auto" is as "aten", and that as "reference" where there is a projection or a transform (test_plan.py).
KERNELS = pytest.param("triton", marks=[pytest.mark.kernels, IN_INTERPRETER])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def arguments(module: fused_lstm.LSTM, B: int, T: int, ragged: str) -> tuple[Tensor, dict[str, Tensor]]:
    shape = (B, T) if module.batch_first else (T, B)
    x = torch.randn(*shape, I, dtype=module.weight_ih_l0.dtype, requires_grad=True)
    given = {}
    if "lengths" in ragged:
        given["lengths"] = torch.randint(0, T + 1, (B,))
    if "resets" in ragged:
        given["resets"] = torch.rand(*shape) < 0.3
    for t in (x, *given.values()):
        for dim in range(min(t.dim(), 2)):
            torch._dynamo.mark_dynamic(t, dim)
    return x, given


def everything(module: nn.Module, parameters: list[Tensor], x: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    """Results and gradients."""
    results = tree_leaves(module(x, **given))
    return [*results, *torch.autograd.grad([t.square().sum() for t in results], [x, *parameters])]


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def layer_ops(graphs: list[torch.fx.GraphModule]) -> list[int]:
    return [sum("fused_lstm.layer_forward" in str(node.target) for node in graph.graph.nodes) for graph in graphs]


def one_graph(backend: str, layer: dict[str, Any], ragged: str, sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    module = fused_lstm.LSTM(I, H, **layer, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for B, T in sizes:
        x, given = arguments(module, B, T, ragged)
        parameters = list(module.parameters())
        assert_close(everything(compiled, parameters, x, given), everything(module, parameters, x, given))
        with torch.no_grad():
            assert_close(tree_leaves(compiled(x, **given)), tree_leaves(module(x, **given)))
    assert layer_ops(counter.graphs) == [module.num_layers] * 2  # for training and inference


RAGGED = ["", "lengths", "resets", "lengths and resets"]


@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "bidirectional", "projection", "recompute"])
def test_one_graph_for_all_batches_and_times(layer: dict[str, Any], ragged: str) -> None:
    one_graph("aten", layer, ragged, SIZES)


@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize(("layer", "ragged"), list(zip(LAYERS, RAGGED, strict=True)), ids=RAGGED)
def test_one_graph_around_other_engines(layer: dict[str, Any], ragged: str, backend: str) -> None:
    """To the compiler they are the same op."""
    one_graph(backend, layer, ragged, SIZES[:3])


@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_in_a_list_are_no_constants(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    module, x = fused_lstm.LSTM(I, H), torch.randn(20, 4, I)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    graphs = []
    for n in range(9):
        lengths = [19, n, 18 - n, 11]  # none is a size of something at first, which torch would take for the same number
        assert_close(tree_leaves(compiled(x, lengths=lengths)), tree_leaves(module(x, lengths=lengths)))
        graphs.append(len(counter.graphs))
    assert graphs[-1] == graphs[0 if dynamic else 3]  # unless told, torch learns that they change, and 0 and 1 are special


@pytest.mark.parametrize(
    ("dtype", "compiler"),
    [
        (torch.float32, "aot_eager"),
        (torch.float64, "aot_eager"),
        (torch.float16, "aot_eager"),
        pytest.param(torch.bfloat16, "inductor", marks=pytest.mark.skipif(not HAS_CXX, reason="needs a C++ compiler")),
    ],
)
def test_compilers_and_dtypes(compiler: str, dtype: torch.dtype) -> None:
    """A model around the layer, with states and lengths given."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fused_lstm.LSTM(I, H, 2, bidirectional=True)
            self.head = nn.Linear(2 * H, 2)

        def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            y, (h, c) = self.lstm(x.relu(), (h, c), lengths=lengths)
            return self.head(y).tanh(), h * c

    torch.manual_seed(0)
    model = Model().to(dtype)
    x, h, c = (torch.randn(*shape, dtype=dtype) for shape in ((5, 3, I), (4, 3, H), (4, 3, H)))
    given = {"h": h, "c": c, "lengths": torch.tensor([5, 0, 3])}
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    parameters = list(model.parameters())
    x.requires_grad_()
    ours, expected = (everything(m, parameters, x, given) for m in (compiled, model))
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(
    ("backend", "enforce_sorted"),
    [("aten", False), ("aten", True), ("reference", False), pytest.param("triton", False, marks=KERNELS.marks)],
)
def test_packed(backend: str, enforce_sorted: bool) -> None:
    torch.manual_seed(0)
    module = fused_lstm.LSTM(I, H, bidirectional=True, backend=backend)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for lengths in ((4, 3, 1), (5, 5), (6, 2, 2, 1)):
        rows = [torch.randn(n, I) for n in (lengths if enforce_sorted else lengths[::-1])]
        packed = pack_sequence(rows, enforce_sorted=enforce_sorted)
        ours, theirs = (m(packed) for m in (compiled, module))
        assert_close(tree_leaves((ours[0].data, ours[1])), tree_leaves((theirs[0].data, theirs[1])))
        by = list(module.parameters())
        a, b = (torch.autograd.grad(y.data.sum() + h.sum() + c.sum(), by) for y, (h, c) in (ours, theirs))
        assert_close(list(a), list(b))


def test_packed_calls_that_do_not_fit() -> None:
    """A compiler cannot look at batch sizes: the op does."""
    layer, x, sizes = fused_lstm.LSTM(3, 4, backend="reference"), torch.randn(9, 3), torch.tensor([4, 3, 2])
    compiled = torch.compile(layer, backend="eager")
    for bad, hx, message in [
        (torch.tensor([4, 3, 3]), None, "add up to the 9 rows of the input"),
        (sizes, (torch.zeros(1, 7, 4),) * 2, "Expected hidden states of 4 batch rows"),
        (sizes, (torch.zeros(1, 4, 3), torch.zeros(1, 4, 4)), r"Expected hidden\[0\] size \(1, 4, 4\), got \[1, 4, 3\]"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            compiled(PackedSequence(x, bad), hx)


def test_under_autocast() -> None:
    module, x = fused_lstm.LSTM(I, H), torch.randn(4, 2, I)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(tree_leaves(compiled(x)), tree_leaves(module(x)), strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


def test_a_bad_length_is_noticed() -> None:
    compiled = torch.compile(fused_lstm.LSTM(I, H), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="between 0 and T = 4, got 1 to 5"):
        compiled(torch.randn(4, 2, I), lengths=torch.tensor([1, 5]))


def test_an_empty_batch() -> None:
    module = fused_lstm.LSTM(I, H, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 0, I, requires_grad=True)
    ours, theirs = (everything(m, list(module.parameters()), x, {}) for m in (compiled, module))
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("backend", "proj_size"), [("aten", 0), ("reference", 2), pytest.param("triton", 0, marks=KERNELS.marks)]
)
def test_states_of_dynamic_shapes(backend: str, proj_size: int) -> None:
    """Carried from call to call, and step by step."""
    module = fused_lstm.LSTM(I, H, proj_size=proj_size, backend=backend)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    step = torch.compile(module.step, backend="aot_eager", fullgraph=True, dynamic=True)
    for B, T in SIZES[:3]:
        x, state = torch.randn(T, B, I), None
        for _ in range(2):
            ours, theirs = compiled(x, state), module(x, state)
            assert_close(tree_leaves(ours), tree_leaves(theirs))
            state = theirs[1]
        assert_close(tree_leaves(step(x[0], state)), tree_leaves(module.step(x[0], state)))


def test_no_steps_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        torch.compile(fused_lstm.LSTM(I, H), backend="aot_eager", fullgraph=True)(torch.ones(0, 2, I))


def test_one_graph_also_where_breaks_are_allowed() -> None:
    """There torch takes no tensor of a size that only the op knows, such as oneDNN's workspace."""
    module, x = fused_lstm.LSTM(I, H, 2), torch.randn(4, 2, I, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    parameters = list(module.parameters())
    compiled = everything(torch.compile(module, backend=counter), parameters, x, {})
    assert_close(compiled, everything(module, parameters, x, {}))
    assert layer_ops(counter.graphs) == [2]


def test_tangents_are_not_lost() -> None:
    """torch itself drops what forward-mode AD brings to an op in a graph without gradients."""
    module, x = fused_lstm.LSTM(I, H), torch.randn(4, 2, I)
    compiled = torch.compile(lambda x: module(x)[0], backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)  # as a graph without tangents
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            ours, expected = (forward_ad.unpack_dual(f(dual)).tangent for f in (compiled, lambda x: module(x)[0]))
            assert expected.any()
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("mode", ["vmap", "ensemble", "grad", "jvp", "per-sample gradients"])
@pytest.mark.parametrize("backend", ["reference", KERNELS])
def test_transforms_inside_a_graph(backend: str, mode: str) -> None:
    torch.manual_seed(0)
    module, x = fused_lstm.LSTM(I, H, backend=backend), torch.randn(2, 3, 2, I)
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    def run(x: Tensor) -> Any:
        if mode == "vmap":
            return torch.vmap(lambda x: module(x))(x)
        if mode == "ensemble":
            members = {name: torch.stack([w, 0.5 * w]) for name, w in weights.items()}
            return torch.vmap(loss, (0, None))(members, x[0])
        if mode == "grad":
            return torch.func.grad(loss)(weights, x[0])
        if mode == "jvp":
            x = x.sum(0)  # not a view, with which torch 2.13 fails here for nn.Linear too
            return torch.func.jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
        return torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)

    ours, expected = (tree_leaves(f(x)) for f in (torch.compile(run, backend="aot_eager", fullgraph=True), run))
    assert_close(ours, expected)
    if mode in ("vmap", "ensemble"):
        by = list(weights.values())
        a, b = (torch.autograd.grad([t.sum() for t in results], by) for results in (ours, expected))
        assert_close(list(a), list(b))


@pytest.mark.parametrize("mode", ["eager", "vmap", "to differentiate again", "one training step"])
def test_compiled_autograd(mode: str) -> None:
    """One graph with one op also for the backward pass."""
    torch.manual_seed(0)
    module, x = fused_lstm.LSTM(I, H, backend="reference"), torch.randn(4, 3, I)
    given = {"lengths": torch.tensor([4, 0, 2]), "resets": torch.rand(4, 3) < 0.3} if mode == "eager" else {}
    by, counter = list(module.parameters()), CompileCounterWithBackend("eager")

    def loss() -> Tensor:
        y = torch.vmap(lambda x: module(x)[0])(x[None]) if mode == "vmap" else module(x, **given)[0]
        return y.square().sum()

    expected = torch.autograd.grad(loss(), by)
    if mode == "one training step":
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda: loss().backward(), backend=counter)()
        ours = [p.grad for p in by]
    else:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
            ours = torch.autograd.grad(loss(), by, create_graph=mode == "to differentiate again")
    assert_close(list(ours), list(expected))
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("fused_lstm.layer_backward" in target for target in targets) == 1
