"""The LSTM's relatives against the loop of cell_problems.py, in fp64; and on every path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cell_problems import Problem, philox, random_cell
from checks import DEVICE
from measure import Rule
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import fused_lstm
from fused_lstm import LSTM, Cell, relatives
from fused_lstm.call import LayerCall
from fused_lstm.call import Problem as Asked
from fused_lstm.cell import Relative
from fused_lstm.plan import Way, choose

CELLS = {
    "peephole": Cell(peephole=True),
    "coupled": Cell(coupled=True),
    "coupled peephole": Cell(peephole=True, coupled=True, forget_bias=1.0),
    "norm of the output": Cell(layer_norm="output"),
    "norm of the state": Cell(layer_norm="state", peephole=True),
    "zoneout": Cell(zoneout=(0.3, 0.2)),
    "norm and zoneout": Cell(layer_norm="output", zoneout=(0.0, 0.4)),
    "heads": Cell(heads=2),
    "all but norms": Cell(peephole=True, coupled=True, zoneout=(0.1, 0.0), heads=2),
}
KERNELS = pytest.param("triton", marks=pytest.mark.kernels)


def test_philox(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's kat_vectors: philox4x32 10, all zero
    assert philox(0, 0, 10) == known
    seed, index = 2**62 + 12345678901, torch.tensor([0, 1, 77, 2**32 + 5, 2**40])
    ours = torch.stack(relatives.philox(torch.tensor([seed]), index), 1).tolist()
    assert ours == [philox(seed, n, relatives.ROUNDS) for n in index.tolist()]
    monkeypatch.setattr(relatives, "ROUNDS", 10)
    assert [int(c) for c in relatives.philox(torch.tensor([0]), torch.tensor([0]))] == known


@pytest.mark.parametrize(("backend", "count"), [("auto", 100), pytest.param("triton", 12, marks=pytest.mark.kernels)])
def test_random_problems_in_fp64(backend: str, count: int) -> None:
    for seed in range(count):
        problem = Problem(random_cell(seed), seed)
        ours, exact = problem.run(torch.float64, backend), problem.run(torch.float64, None)
        for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
            # A norm multiplies rounding errors by up to 300 in each step.
            what = f"{problem.lstm} {problem.config} {k}: "
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=what.__add__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "count"), [("auto", 100), pytest.param("triton", 60, marks=pytest.mark.kernels)])
def test_random_problems_by_the_error_rule(backend: str, count: int, dtype: torch.dtype) -> None:
    rule = Rule()
    for seed in range(count):
        problem = Problem(random_cell(seed), seed, dtype)
        exact, torchs, ours = (problem.run(*how) for how in ((torch.float64, None), (dtype, None), (dtype, backend)))
        rule.add(f"{seed} {problem.lstm} {problem.config}", [str(k) for k in range(len(exact))], ours, torchs, exact)
    rule.check()


def call(lstm: LSTM, seed: int = 0) -> tuple[list[Tensor], Callable[..., list[Tensor]]]:
    """The tensors of a call in fp64, and the call as their function, with the same masks each time."""
    torch.manual_seed(seed)
    D, names = lstm.num_layers * (1 + lstm.bidirectional), [n for n, _ in lstm.named_parameters()]
    shapes = (2, 2, lstm.input_size), (D, 2, lstm.hidden_size), (D, 2, lstm.hidden_size)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    inputs += [p.detach().requires_grad_() for p in lstm.parameters()]

    def run(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> list[Tensor]:
        torch.manual_seed(seed)
        output, states = functional_call(lstm, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return [output, *states]

    return inputs, run


def layer(cell: str, **options: Any) -> LSTM:
    torch.manual_seed(0)
    lstm = LSTM(4, 6, cell=CELLS[cell], **options).double()
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            if name.startswith("norm"):
                p.add_(torch.randn_like(p) * 0.3)
    return lstm


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell: str) -> None:
    inputs, run = call(layer(cell, bidirectional=True))
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)
    assert gradcheck(run, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("cell", ["norm of the output", "norm of the state"])
def test_higher_derivatives_of_norms(cell: str) -> None:
    """The third in reverse mode, and reverse over forward mode: both are wrong for torch's own layer_norm."""
    lstm = layer(cell)
    (x, *_), _ = call(lstm)
    v, weights = torch.randn_like(x), dict(lstm.named_parameters())

    def along(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The derivative by x in the direction of v."""
        return lambda x: (torch.autograd.grad(f(x), x, create_graph=True)[0] * v).sum()

    def forwards(w_ih: Tensor) -> Tensor:
        run = partial(functional_call, lstm, weights | {"weight_ih_l0": w_ih})
        return jvp(lambda x: run((x,))[0], (x.detach(),), (v,))[1].square().sum()

    assert gradcheck(along(along(lambda x: lstm(x)[0].pow(3).sum())), [x], fast_mode=True)
    assert gradcheck(forwards, [lstm.weight_ih_l0], fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_recompute(cell: str) -> None:
    lstm = layer(cell, bidirectional=True)
    found = []
    for lstm.recompute in (False, True):
        inputs, run = call(lstm)
        results = run(*inputs)
        found.append([*results, *torch.autograd.grad(sum(r.sin().sum() for r in results), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_vmap(cell: str) -> None:
    """Over inputs and states, and over all of them and the weights; of the result and of the gradients."""
    lstm = layer(cell).eval()
    inputs, run = call(lstm)
    members = [torch.randn(3, *t.shape, dtype=torch.float64) for t in inputs]

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *i: sum(r.sin().sum() for r in run(*i)), tuple(range(len(inputs))))(*inputs)

    for mapped in (2, len(inputs)):
        given = [m if k < mapped else t.detach() for k, (m, t) in enumerate(zip(members, inputs, strict=True))]
        for f in (run, gradients):
            found = vmap(f, tuple(0 if k < mapped else None for k in range(len(inputs))))(*given)
            for e in range(3):
                each = f(*(t[e] if k < mapped else t for k, t in enumerate(given)))
                for a, b in zip(found, each, strict=True):
                    torch.testing.assert_close(a[e], b, rtol=1e-10, atol=1e-11)


def test_vmap_draws_masks_as_it_is_told() -> None:
    lstm, x = layer("zoneout"), torch.randn(3, 4, 2, 4, dtype=torch.float64)
    same = x[:1].expand(3, -1, -1, -1)
    outputs = {r: vmap(lambda x: lstm(x)[0], randomness=r)(same) for r in ("different", "same")}
    assert not torch.equal(outputs["different"][0], outputs["different"][1])
    assert torch.equal(outputs["same"][0], outputs["same"][1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: lstm(x)[0])(x)


@pytest.mark.parametrize("cell", ["peephole", "norm of the state", "zoneout", "all but norms"])
def test_compile(cell: str) -> None:
    """As one op for each layer, forwards and backwards; masks are the compiler's own."""
    torch._dynamo.reset()
    lstm = layer(cell, num_layers=2).float()
    lstm.train("zoneout" not in cell and "norms" not in cell)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 4, requires_grad=True)
    found = []
    for module in (lstm, compiled):
        output, states = module(x, lengths=torch.tensor([4, 2, 0]))
        found.append([output, *states, *torch.autograd.grad(output.sin().sum(), [x, *lstm.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_draws_anew() -> None:
    torch._dynamo.reset()
    lstm, x = layer("zoneout").float(), torch.randn(4, 3, 4)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", KERNELS])
def test_equal_seeds_give_equal_bits(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lstm = LSTM(4, 6, bidirectional=True, cell=CELLS["norm and zoneout"], backend=backend).to(DEVICE, dtype)
    x, found = torch.randn(3, 2, 4, device=DEVICE, dtype=dtype), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        output, states = lstm(x)
        found.append([output, *states, *torch.autograd.grad(output.sum(), list(lstm.parameters()))])
    assert all(map(torch.equal, *found[:2]))
    assert not torch.equal(found[0][0], found[2][0])


def test_masks_of_zoneout() -> None:
    """Independent of each other, of the probabilities asked for; at the ends of the range all or none."""
    cell = Relative.of(Cell(zoneout=(0.3, 0.1)).relative)
    state = torch.zeros(1, 8, 50)
    given = LayerCall(torch.zeros(41, 8, 200), None, state, None, torch.zeros(200, 50), *[None] * 7, torch.tensor([5]), 1,
                      False, False, "", False)  # fmt: skip
    masks = relatives.zoneout(given, cell, given.rows, torch.zeros(41 * 8, 1, 50))
    n = 41 * 8 * 50
    h, c = (m.view(41, 8, 50).double() for m in masks)
    for mask, p in ((h, 0.3), (c, 0.1), (h * c, 0.03), (h[1:] * h[:-1], 0.09), (h[:, 1:] * h[:, :-1], 0.09)):
        assert abs(mask.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5 * 1.1
    ends = relatives.zoneout(given, cell._replace(zoneout_h=1.0, zoneout_c=0.0), given.rows, torch.zeros(41 * 8, 1, 50))
    assert ends.h.all()
    assert not ends.c.any()
    lstm = layer("zoneout", bidirectional=True)
    lstm(torch.randn(5, 0, 4, dtype=torch.float64))[0].sum().backward()  # an empty batch
    assert not lstm.weight_hh_l0.grad.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_masks_are_drawn_once_for_a_training_step(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again by a backward pass that is to keep little."""
    lstm, x = layer("zoneout", num_layers=2, recompute=recompute), torch.randn(3, 2, 4).double()
    real, seeds = relatives.drawn, []
    monkeypatch.setattr(relatives, "drawn", lambda call, *more: seeds.append(int(call.seed)) or real(call, *more))
    lstm(x)[0].sum().backward()
    assert (len(seeds), len(set(seeds))) == (4 if recompute else 2, 2)
    with torch.inference_mode():
        assert not torch.equal(lstm(x)[0], lstm(x)[0])


def test_heads_are_a_block_diagonal_layer() -> None:
    torch.manual_seed(0)
    lstm, dense = LSTM(4, 6, bidirectional=True, cell=Cell(heads=3)), nn.LSTM(4, 6, bidirectional=True)
    weights = lstm.state_dict()
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        blocks = weights[name].view(4, 3, 2, 2)
        weights[name] = torch.stack([torch.block_diag(*gate) for gate in blocks]).flatten(0, 1)
    dense.load_state_dict(weights)
    x = torch.randn(5, 2, 4)
    (a, states), (b, expected) = lstm(x), dense(x)
    for got, wanted in zip((a, *states), (b, *expected), strict=True):
        torch.testing.assert_close(got, wanted)


def test_heads_on_torchs_lstm() -> None:
    torch.manual_seed(0)
    lstm = LSTM(3, 4, 2, bidirectional=True, cell=Cell(heads=2, coupled=True), backend="aten").double()
    x, resets = torch.randn(5, 2, 3).double(), torch.rand(5, 2) < 0.4
    ours, _ = lstm(x, resets=resets)
    lstm.backend = "reference"
    torch.testing.assert_close(ours, lstm(x, resets=resets)[0])
    for hidden_size, way in ((64, Way.FUSED), (65, Way.REFERENCE)):  # of each head
        assert choose(Asked("cpu", torch.float32, 8, 2, hidden_size, heads=4)).way is way


class PyTorchsLayerNormLSTMCell(nn.Module):
    """As in PyTorch's benchmarks/fastrnns/custom_lstms.py, with nn.LayerNorm."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.randn(4 * hidden_size, hidden_size))
        self.layernorm_i, self.layernorm_h = nn.LayerNorm(4 * hidden_size), nn.LayerNorm(4 * hidden_size)
        self.layernorm_c = nn.LayerNorm(hidden_size)

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hx, cx = state
        gates = self.layernorm_i(input @ self.weight_ih.t()) + self.layernorm_h(hx @ self.weight_hh.t())
        ingate, forgetgate, cellgate, outgate = gates.chunk(4, 1)
        cy = self.layernorm_c(forgetgate.sigmoid() * cx + ingate.sigmoid() * cellgate.tanh())
        return outgate.sigmoid() * torch.tanh(cy), cy


def test_pytorchs_layer_norm_lstm() -> None:
    torch.manual_seed(0)
    cell, lstm = PyTorchsLayerNormLSTMCell(4, 6).double(), LSTM(4, 6, cell=Cell(layer_norm="state")).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    lstm.load_state_dict({
        "weight_ih_l0": cell.weight_ih, "weight_hh_l0": cell.weight_hh,
        "bias_ih_l0": cell.layernorm_i.bias, "bias_hh_l0": cell.layernorm_h.bias,
        "norm_ih_weight_l0": cell.layernorm_i.weight, "norm_hh_weight_l0": cell.layernorm_h.weight,
        "norm_c_weight_l0": cell.layernorm_c.weight, "norm_c_bias_l0": cell.layernorm_c.bias,
    })  # fmt: skip
    x, h, c = torch.randn(5, 2, 4).double(), torch.randn(2, 6).double(), torch.randn(2, 6).double()
    output, states = lstm(x, (h[None], c[None]))
    for t in range(5):
        h, c = cell(x[t], (h, c))
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(states[1][0], c)


@pytest.mark.parametrize("coupled", [False, True])
def test_onnxruntimes_peepholes_and_coupled_gates(coupled: bool) -> None:
    """ONNX's LSTM knows both (P and input_forget), with gates in the order i, o, f, c."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    I, H = 3, 5  # noqa: E741
    lstm = LSTM(I, H, cell=Cell(peephole=True, coupled=coupled))

    def order(w: Tensor, own: str, theirs: str) -> Any:
        gates = dict(zip(own, w.detach().unflatten(0, (-1, H)), strict=True))
        gates.setdefault("i", -gates["f"])  # it takes f from i, and not the other way round
        return torch.cat([gates[k] for k in theirs])[None].numpy()

    own = "fgo" if coupled else "ifgo"
    w, r, p = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.weight_peephole_l0.flatten()
    bias = torch.cat([torch.from_numpy(order(b, own, "iofg")) for b in (lstm.bias_ih_l0, lstm.bias_hh_l0)], 1).numpy()
    given = {"W": order(w, own, "iofg"), "R": order(r, own, "iofg"), "B": bias, "P": order(p, own.replace("g", ""), "iof")}
    x = torch.randn(4, 2, I)
    node = onnx.helper.make_node(
        "LSTM", ["X", "W", "R", "B", "", "", "", "P"], ["Y"], hidden_size=H, input_forget=int(coupled)
    )  # fmt: skip
    numbers = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "lstm", [onnx.helper.make_tensor_value_info("X", numbers, list(x.shape))],
        [onnx.helper.make_tensor_value_info("Y", numbers, [4, 1, 2, H])],
        [onnx.numpy_helper.from_array(v, k) for k, v in given.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    (expected,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"X": x.numpy()})
    torch.testing.assert_close(lstm(x)[0], torch.from_numpy(expected[:, 0]), rtol=1e-5, atol=1e-6)


def test_parameters() -> None:
    lstm = LSTM(4, 6, 2, bidirectional=True, cell=Cell(peephole=True, coupled=True, heads=2, forget_bias=1.0))
    shapes = {name: tuple(p.shape) for name, p in lstm.named_parameters() if name.endswith("l1_reverse")}
    assert shapes == {
        "weight_ih_l1_reverse": (18, 12), "weight_hh_l1_reverse": (18, 3), "bias_ih_l1_reverse": (18,),
        "bias_hh_l1_reverse": (18,), "weight_peephole_l1_reverse": (2, 6),
    }  # fmt: skip
    assert (lstm.bias_ih_l1[:6] + lstm.bias_hh_l1[:6] == 1).all()
    assert not (lstm.bias_ih_l1[6:] == 1).any()
    norms = dict(LSTM(4, 6, cell=CELLS["norm of the output"]).named_parameters())
    assert {n: (*p.shape, p.min().item(), p.max().item()) for n, p in norms.items() if n.startswith("norm")} == {
        "norm_ih_weight_l0": (24, 1, 1), "norm_hh_weight_l0": (24, 1, 1), "norm_c_weight_l0": (6, 1, 1),
        "norm_c_bias_l0": (6, 0, 0),
    }  # fmt: skip
    x = torch.randn(3, 2, 4)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), LSTM(4, 6, 2, bidirectional=True, cell=lstm.cell)):
        other.load_state_dict(lstm.state_dict())
        assert torch.equal(other(x)[0], lstm(x)[0])
    assert (
        repr(lstm)
        == "LSTM(4, 6, num_layers=2, bidirectional=True, cell=Cell(peephole=True, coupled=True, heads=2, forget_bias=1.0))"
    )
    assert LSTM(4, 6, cell=Cell()).cell is None
    assert repr(Cell(heads=np.int64(2), forget_bias=np.float32(1))) == "Cell(heads=2, forget_bias=1.0)"
    states, options = (torch.zeros(4, 2, 6),) * 2, dict(num_layers=2, bidirectional=True, cell=lstm.cell)
    assert torch.equal(fused_lstm.lstm(x, states, lstm._flat_weights, **options)[0], lstm(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_initial_values(cell: str) -> None:
    """A seed's are torch's where the shapes are; they are drawn once, so that they can be drawn again."""
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 6, 2)
    torch.manual_seed(0)
    lstm = LSTM(4, 6, 2, cell=CELLS[cell])
    mine = dict(lstm.named_parameters())
    if not CELLS[cell].coupled and CELLS[cell].heads == 1:
        assert all(torch.equal(p, mine[name]) for name, p in theirs.named_parameters())
    again = copy.deepcopy(lstm)
    torch.manual_seed(0)
    again.reset_parameters()
    assert all(map(torch.equal, lstm.parameters(), again.parameters()))


@pytest.mark.parametrize("cell", CELLS)
def test_looking_inside(cell: str) -> None:
    lstm, x = layer(cell, num_layers=2, bidirectional=True), torch.randn(4, 2, 4).double()
    for _ in range(2):
        torch.manual_seed(1)
        gates = fused_lstm.inspect_gates(lstm, x, lengths=torch.tensor([4, 3]))
        torch.manual_seed(1)
        output, (_, c_n) = lstm(x, lengths=torch.tensor([4, 3]))
        torch.testing.assert_close(gates.h[1].permute(1, 2, 0, 3).flatten(2), output)
        torch.testing.assert_close(gates.c[:, 1, 0], c_n[1::2])
        lstm.eval()
    if CELLS[cell].coupled:
        torch.testing.assert_close(gates.i[..., 0, :], 1 - gates.f[..., 0, :])


def test_errors() -> None:
    for error, message, build in (
        (TypeError, "peephole should be of type bool, got: 1", lambda: Cell(peephole=1)),
        (TypeError, "layer_norm should be 'output', 'state' or None, got: True", lambda: Cell(layer_norm=True)),
        (ValueError, "layer_norm should be 'output', 'state' or None, got: 'x'", lambda: Cell(layer_norm="x")),
        (TypeError, r"zoneout should be two numbers in range \[0, 1\], \(p_h, p_c\), got: 0.1", lambda: Cell(zoneout=0.1)),
        (ValueError, "zoneout should be two numbers", lambda: Cell(zoneout=(0.1, 1.5))),
        (TypeError, "zoneout should be two numbers", lambda: Cell(zoneout=("a", True))),
        (TypeError, "forget_bias should be a finite number or None, got: 'x'", lambda: Cell(forget_bias="x")),
        (ValueError, "forget_bias should be a finite number or None, got: nan", lambda: Cell(forget_bias=float("nan"))),
        (ValueError, "forget_bias should be a finite number or None, got: 1000", lambda: Cell(forget_bias=10**400)),
        (TypeError, "heads should be an integer of at least 1, got: 2.0", lambda: Cell(heads=2.0)),
        (ValueError, "heads should be an integer of at least 1, got: 0", lambda: Cell(heads=0)),
        (ValueError, "layer_norm cannot be had with coupled", lambda: Cell(layer_norm="state", coupled=True)),
        (
            ValueError,
            "layer_norm cannot be had with heads: its norms are over all four gates and all units",
            lambda: Cell(layer_norm="state", heads=2),
        ),
        (TypeError, "cell should be a fused_lstm.Cell or None, got: str", lambda: LSTM(2, 4, cell="peephole")),
        (ValueError, "heads should divide hidden_size=4, got: 3", lambda: LSTM(2, 4, cell=Cell(heads=3))),
        (ValueError, "proj_size goes with", lambda: LSTM(2, 4, proj_size=2, cell=Cell(peephole=True))),
        (ValueError, "forget_bias=1.0 needs bias=True", lambda: LSTM(2, 4, bias=False, cell=Cell(forget_bias=1.0))),
        (AttributeError, "cell is set on construction", lambda: setattr(LSTM(2, 4), "cell", Cell(zoneout=(0.1, 0.1)))),
        (TypeError, "to_torch expects torch's own cell, got: Cell", lambda: LSTM(2, 4, cell=Cell(heads=2)).to_torch()),
        (TypeError, "torch's own cell", lambda: fused_lstm.convert.to_keras(LSTM(2, 4, cell=Cell(coupled=True)))),
        (RuntimeError, "aten.*has no cell with peephole", lambda: LSTM(2, 4, cell=Cell(peephole=True), backend="aten")(X)),
    ):
        with pytest.raises(error, match=message):
            build()
    assert torch.equal(LSTM(2, 4, cell=Cell(forget_bias=1.0)).to_torch().bias_ih_l0[4:8], torch.ones(4))
    assert LSTM(2, 4, proj_size=2, cell=Cell(coupled=True))(X)[0].shape == (3, 1, 2)


X = torch.zeros(3, 1, 2)
