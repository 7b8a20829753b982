"""The Triton kernels, in Triton's interpreter or on a GPU, against the reference in fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan

import pytest
import torch
from checks import DEVICE, Rule, skip_unless_it_compiles
from torch import Tensor

pytest.importorskip("triton")
from fused_lstm import launch, ops, recurrence, reference
from fused_lstm.call import LayerCall, Rows
from fused_lstm.launch.stepwise import StepwiseConfig

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's, on the way to saturation
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("y", "h_n", "c_n", "dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh", "dw_h0")


class Problem:
    """Inputs of one layer call: numbers of ``dtype``, held in fp64."""

    def __init__(
        self,
        dtype: torch.dtype,
        T: int = 4,
        B: int = 3,
        I: int = 5,  # noqa: E741
        H: int = 16,
        directions: int = 1,
        K: int | None = None,
        mode: str = "padded",
        scale: float = 0.5,
        batch_first: bool = False,
        resets: bool = False,
    ) -> None:
        skip_unless_it_compiles(dtype)
        g = torch.Generator().manual_seed(T * 1000 + B * 100 + H)

        def numbers(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).double()

        R = 2 if directions == 2 else 1
        self.dtype, self.lengths, self.batch_sizes = dtype, None, None
        if mode == "lengths":
            self.lengths = torch.tensor(([T, 0, 1, T - 1, 2, T] * B)[:B])
        if mode == "packed":
            self.batch_sizes = torch.tensor([B, *(max(1, B - t) for t in range(1, T))])
        rows = (int(self.batch_sizes.sum()),) if mode == "packed" else ((B, T) if batch_first else (T, B))
        self.tensors: list[Tensor | None] = [
            numbers(*rows, I), numbers(R, B, K or H), numbers(R, B, H), numbers(R * 4 * H, I), numbers(R * 4 * H, H),
            numbers(R * 4 * H), numbers(R * 4 * H), numbers(R * 4 * H, K) if K else None,
        ]  # fmt: skip
        self.resets = torch.rand(rows, generator=g) < 0.4 if resets else None
        self.options = (directions, batch_first)
        self.cotangents = [numbers(*rows, R * H), numbers(R, B, H), numbers(R, B, H)]

    def call(self, engine: str, dtype: torch.dtype, save: bool = True) -> LayerCall:
        """In ``dtype``; for the kernels, on their device."""
        device = DEVICE if engine == "triton" else "cpu"
        tensors = [None if t is None else t.to(device, dtype) for t in self.tensors]
        lengths, resets = (None if t is None else t.to(device) for t in (self.lengths, self.resets))
        return LayerCall(*tensors, None, lengths, self.batch_sizes, resets, None, *self.options, save, engine, False)

    def run(self, engine: str, dtype: torch.dtype) -> list[Tensor]:
        """y, h_n, c_n and the gradients of all inputs; ``engine="loop"`` is the autograd reference."""
        call = self.call(engine, dtype)
        inputs = [t.requires_grad_() for t in call[: ops.N_INPUTS] if t is not None]
        outputs = reference.layer(call) if engine == "loop" else ops.layer(call)[:3]
        cotangents = [c.to(o.device, dtype) for c, o in zip(self.cotangents, outputs, strict=True)]
        return [t.detach().cpu() for t in (*outputs, *torch.autograd.grad(outputs, inputs, cotangents))]

    def add(self, rule: Rule) -> None:
        results = (self.run("triton", self.dtype), self.run("loop", self.dtype), self.run("loop", torch.float64))
        rule.add(self.options, NAMES[: len(results[0])], *results)


def check(problems: Sequence[Problem]) -> None:
    rule = Rule()
    for problem in problems:
        problem.add(rule)
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("resets", [False, True])
def test_directions_layouts_and_projections(dtype: torch.dtype, mode: str, resets: bool) -> None:
    """All combinations in fp32, in other types every second one, so that every pair is there."""
    layouts = (False,) if mode == "packed" else (False, True)
    with launch.forced(StepwiseConfig(16, 16, 16)):
        check(
            [
                Problem(dtype, mode=mode, directions=directions, batch_first=batch_first, K=K, B=5, resets=resets)
                for n, directions in enumerate((1, -1, 2))
                for batch_first in layouts
                for K in (None, 3)
                if dtype == torch.float32 or (n + batch_first + bool(K) + resets) % 2 == 0
            ]
        )


@pytest.mark.parametrize(("H", "T"), [(1, 3), (20, 3), (519, 2), (650, 2), (1150, 2)])
def test_any_hidden_size_through_the_layer(H: int, T: int) -> None:
    import fused_lstm

    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, H)
    ours = fused_lstm.LSTM.from_torch(theirs, backend="triton")
    x = torch.randn(T, 2, 3)
    ours_on_device = copy.deepcopy(ours).to(DEVICE)
    exact_model = torch.nn.LSTM(3, H).double()
    exact_model.load_state_dict(theirs.state_dict())
    outputs = []
    for module, given in ((ours_on_device, x.to(DEVICE)), (theirs, x), (exact_model, x.double())):
        y, (h, c) = module(given)
        outputs.append([y, h, c, *torch.autograd.grad(y.sum() + (h * c).sum(), list(module.parameters()))])
    rule = Rule()
    names = ["y", "h_n", "c_n", *dict(theirs.named_parameters())]
    rule.add(H, names, *([t.detach().cpu() for t in r] for r in outputs))
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_tiny_and_saturating_numbers(dtype: torch.dtype, scale: float) -> None:
    """With B = 4, of the large ones none falls near zero, where numbers that cancel would leave nothing but rounding."""
    check([Problem(dtype, T=3, B=4, H=16, scale=scale)])


def test_infinite_and_nan_inputs_stay_in_their_row() -> None:
    problem = Problem(torch.float32, T=3, B=4)
    x = problem.tensors[0]
    assert x is not None
    clean = problem.run("triton", torch.float32)
    x[1, 0], x[1, 1] = torch.inf, torch.nan
    y, h_n, c_n = problem.run("triton", torch.float32)[:3]
    expected = problem.run("loop", torch.float32)[:3]
    for got, want, before in zip((y, h_n, c_n), expected, clean, strict=False):
        torch.testing.assert_close(got, want, equal_nan=True)
        assert torch.equal(got[:, 2:], before[:, 2:])
    assert y[1:, 1].isnan().all()


def test_padding_may_hold_anything() -> None:
    problem = Problem(torch.float32, mode="lengths", B=5, directions=2)
    clean = problem.run("triton", torch.float32)
    x, lengths = problem.tensors[0], problem.lengths
    assert x is not None
    assert lengths is not None
    padding = torch.arange(x.shape[0])[:, None] >= lengths
    x[padding] = torch.nan
    dirty = problem.run("triton", torch.float32)
    for name, a, b in zip(NAMES, clean, dirty, strict=False):
        if name != "dw_ih":  # the product with x itself
            assert torch.equal(a, b), name
    assert (dirty[0][padding] == 0).all()
    assert (dirty[3][padding] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_equal_bits(dtype: torch.dtype) -> None:
    problem = Problem(dtype, B=20, H=48, directions=2)
    for a, b in zip(problem.run("triton", dtype), problem.run("triton", dtype), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_equal_the_whole(dtype: torch.dtype) -> None:
    whole = Problem(dtype, T=6, B=3, H=32).call("triton", dtype, save=False)
    y, h_n, c_n, _, _ = recurrence.forward(whole)
    y1, h1, c1, _, _ = recurrence.forward(whole._replace(x=whole.x[:2]))
    y2, h2, c2, _, _ = recurrence.forward(whole._replace(x=whole.x[2:], h0=h1, c0=c1))
    # Not bit for bit: the input GEMM's rounding depends on its size, and c crosses the cut in dtype.
    close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(torch.cat((y1, y2)), y, **close)
    torch.testing.assert_close(h2, h_n, **close)
    torch.testing.assert_close(c2, c_n, **close)


def test_inference_keeps_nothing_and_agrees_with_training() -> None:
    p = Problem(torch.float32, directions=2)
    saved, plain = (recurrence.forward(p.call("triton", torch.float32, save)) for save in (True, False))
    assert plain.gates is plain.c is None
    for a, b in zip(saved[:3], plain[:3], strict=True):
        assert torch.equal(a, b)


def test_empty_batch() -> None:
    p = Problem(torch.float32, B=0)
    y, h_n, c_n, dx, *_, dw_hh, db_ih, db_hh = p.run("triton", torch.float32)
    assert y.shape == (4, 0, 16)
    assert h_n.shape == c_n.shape == (1, 0, 16)
    assert dx.shape == (4, 0, 5)
    assert not dw_hh.any()
    assert not db_ih.any()
    assert not db_hh.any()


CONFIGS = {
    "stepwise": StepwiseConfig(16, 16, 16),
    "wide": StepwiseConfig(16, 32, 64),
    "tall": StepwiseConfig(64, 16, 32),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_many_configurations(dtype: torch.dtype, name: str) -> None:
    problems = [
        Problem(dtype, T=3, B=20, H=48, directions=2),
        Problem(dtype, B=5, H=64, mode="lengths", directions=-1),
        Problem(dtype, B=5, H=16, mode="packed", directions=2, resets=True),
        Problem(dtype, B=5, H=32, K=3, mode="lengths", directions=1, resets=True),
    ]
    with launch.forced(CONFIGS[name]):
        check(problems)


def test_a_configuration_is_forced_for_one_block_of_code() -> None:
    """For each kernel one of its own, in every thread; the blocks may be nested."""
    outer, inner, rows = StepwiseConfig(16, 16, 32), StepwiseConfig(32, 16, 16), Rows(3, 2, False, 1)
    like = torch.zeros(1, device=DEVICE)

    def configs() -> tuple[StepwiseConfig, StepwiseConfig]:
        return tuple(launch.prepare(kernel, like, rows, 1, 16).config for kernel in ("forward", "backward"))

    usual = configs()
    with launch.forced(outer):
        with launch.forced(inner, outer), ThreadPoolExecutor(1) as pool:
            assert pool.submit(configs).result() == (inner, outer)
        assert configs() == (outer, outer)
        with pytest.raises(ZeroDivisionError), launch.forced(inner):
            raise ZeroDivisionError
        assert configs() == (outer, outer)
    assert configs() == usual


# --- The two recurrences alone, without the GEMMs around them


TILES = pytest.mark.parametrize("name", ["stepwise", "wide"])
WRITTEN = ("y", "h_n", "c_n", "gates", "c", "dgates", "h_prev", "dc0")


class Recurrence:
    """Inputs of the recurrences of both directions: ragged rows, some of no step, and resets."""

    def __init__(self, dtype: torch.dtype, H: int = 16) -> None:
        T, B, R, g = 4, 5, 2, torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5).to(DEVICE, dtype)

        lengths, resets = torch.tensor([T, 0, 1, 3, 0]).to(DEVICE), torch.rand(T * B, generator=g) < 0.3
        self.rows = Rows(T, B, False, 2, lengths, None, resets.to(DEVICE))
        self.shape = (T * B, R, H)
        self.gates, self.dy = numbers(T * B, R, 4, H), numbers(*self.shape)
        self.w_hh, self.b_hh = numbers(R * 4 * H, H), numbers(R * 4 * H)
        self.h0, self.c0, self.dh_n, self.dc_n = (numbers(R, B, H) for _ in range(4))
        t, b = self.rows.times_and_batch_rows(T * B, lengths.device)
        self.padding, self.without_steps = t >= lengths[b], lengths == 0

    def run(self, save: bool = True) -> dict[str, Tensor]:
        """All that is written, into memory that holds NaN before."""
        gates, dgates = self.gates.clone(), torch.full_like(self.gates, nan)
        y, h_prev, c_all = (self.gates.new_full(self.shape, nan) for _ in range(3))
        c_all = c_all if save else None
        h_n, c_n = launch.recurrence_forward(gates, self.w_hh, self.b_hh, self.h0, self.c0, self.rows, y, c_all)
        written = dict(zip(WRITTEN, (y, h_n, c_n, gates), strict=False))
        if c_all is not None:
            _, dc0 = launch.recurrence_backward(
                self.dy, self.dh_n, self.dc_n, gates, c_all, y, self.h0, self.c0, self.w_hh, self.rows, dgates, h_prev
            )
            written |= dict(zip(WRITTEN[4:], (c_all, dgates, h_prev, dc0), strict=True))
        return written


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [("b_hh", "h0", "c0", "dc_n"), ("dy", "dh_n")])
def test_none_is_zero(parts: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    """An initial state, a bias or a gradient that is None: the bits of a tensor of zeros in its place."""
    found, p = [], Recurrence(dtype)
    with launch.forced(CONFIGS[name]):
        for value in (0.0, None):
            for part in parts:
                setattr(p, part, None if value is None else torch.zeros_like(getattr(p, part)))
            found.append(p.run())
    zero, none = found
    assert none["dgates"].any()
    assert (none.pop("dc0") is None) == ("c0" in parts)
    for k in none:
        assert torch.equal(none[k].nan_to_num(7), zero[k].nan_to_num(7)), k  # NaN is what nobody wrote


@TILES
@pytest.mark.parametrize("states", [True, False])
def test_padding_is_zero_and_rows_without_steps_hand_through(name: str, states: bool) -> None:
    p = Recurrence(torch.float32)
    if not states:
        p.h0 = p.c0 = p.dh_n = p.dc_n = None
    with launch.forced(CONFIGS[name]):
        found = p.run()
    for k in ("y", "dgates", "h_prev"):
        assert (found[k][p.padding] == 0).all(), k
        assert found[k].isfinite().all(), k
    for k, initial in (("h_n", p.h0), ("c_n", p.c0), ("dc0", p.dc_n)):
        if k == "dc0" and not states:
            assert found[k] is None
            continue
        through = found[k][:, p.without_steps]
        assert torch.equal(through, torch.zeros_like(through) if initial is None else initial[:, p.without_steps]), k


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_the_bias_as_well_as_if_added_before(name: str, dtype: torch.dtype) -> None:
    rule, names = Rule(), ("y", "h_n", "c_n")
    p, before, exact = Recurrence(dtype, H=48), Recurrence(dtype, H=48), Recurrence(dtype, H=48)
    before.gates += before.b_hh.view_as(before.gates[0])
    before.b_hh = None
    tensors = [t.double().cpu() for t in (exact.gates, exact.w_hh, exact.b_hh, exact.h0, exact.c0)]
    rows = exact.rows._replace(lengths=exact.rows.lengths.cpu(), resets=exact.rows.resets.cpu())
    y = torch.empty(exact.shape, dtype=torch.float64)
    h_n, c_n = reference.recurrence_forward(*tensors, rows, y, None)
    with launch.forced(CONFIGS[name]):
        found = [[q.run(save=False)[k].cpu() for k in names] for q in (p, before)]
    rule.add(name, names, *found, (y, h_n, c_n))
    rule.check()
