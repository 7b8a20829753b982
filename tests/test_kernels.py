"""The Triton kernels, in Triton's interpreter or on a GPU, against the reference in fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from checks import DEVICE, Rule, skip_unless_it_compiles
from fused_lstm.autograd import FusedLSTMFunction
from torch import Tensor

from fused_lstm import ops, reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's, on the way to saturation
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("y", "h_n", "c_n", "dx", "dh0", "dc0", "dw_ih", "dw_hh", "dbias", "dw_h0")


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
            numbers(*rows, I), numbers(R, B, K or H), numbers(R, B, H), numbers(R, 4 * H, I), numbers(R, 4 * H, H),
            numbers(R, 4 * H), numbers(R, 4 * H, K) if K else None,
        ]  # fmt: skip
        self.resets = torch.rand(rows, generator=g) < 0.4 if resets else None
        self.options = (directions, batch_first)
        self.cotangents = [numbers(*rows, R * H), numbers(R, B, H), numbers(R, B, H)]

    def run(self, engine: str, dtype: torch.dtype) -> list[Tensor]:
        """y, h_n, c_n and the gradients of all inputs; ``engine="loop"`` is the autograd reference."""
        tensors = [None if t is None else t.to(dtype).requires_grad_() for t in self.tensors]
        if engine == "loop":
            outputs = reference.layer(*tensors, self.lengths, self.batch_sizes, self.resets, *self.options)
        else:
            given = [None if t is None else t.to(DEVICE) for t in (*tensors, self.lengths)]
            resets = None if self.resets is None else self.resets.to(DEVICE)
            outputs = FusedLSTMFunction.apply(*given, self.batch_sizes, resets, *self.options, True, engine)[:3]
        inputs = [t for t in tensors if t is not None]
        cotangents = [c.to(o.device, dtype) for c, o in zip(self.cotangents, outputs, strict=True)]
        return [t.cpu() for t in (*outputs, *torch.autograd.grad(outputs, inputs, cotangents))]

    def add(self, rule: Rule) -> None:
        results = (self.run("triton", self.dtype), self.run("loop", self.dtype), self.run("loop", torch.float64))
        rule.add(self.options, NAMES[: len(results[0])], *([t.detach() for t in r] for r in results))


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
    check([Problem(dtype, T=3, B=3, H=16, scale=scale)])


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
    p = Problem(dtype, T=6, B=3, H=32)
    x, h0, c0, *rest = (None if t is None else t.to(DEVICE, dtype) for t in p.tensors)
    options = (None, None, None, *p.options, False, "triton")
    y, h_n, c_n, _, _ = ops.layer_forward(x, h0, c0, *rest, *options)
    y1, h1, c1, _, _ = ops.layer_forward(x[:2], h0, c0, *rest, *options)
    y2, h2, c2, _, _ = ops.layer_forward(x[2:], h1, c1, *rest, *options)
    # Not bit for bit: the input GEMM's rounding depends on its size, and c crosses the cut in dtype.
    close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(torch.cat((y1, y2)), y, **close)
    torch.testing.assert_close(h2, h_n, **close)
    torch.testing.assert_close(c2, c_n, **close)


def test_inference_keeps_nothing_and_agrees_with_training() -> None:
    p = Problem(torch.float32, directions=2)
    tensors = [None if t is None else t.to(DEVICE, torch.float32) for t in p.tensors]
    saved = ops.layer_forward(*tensors, None, None, None, *p.options, True, "triton")
    plain = ops.layer_forward(*tensors, None, None, None, *p.options, False, "triton")
    assert plain[3].numel() == plain[4].numel() == 0
    for a, b in zip(saved[:3], plain[:3], strict=True):
        assert torch.equal(a, b)


def test_empty_batch() -> None:
    p = Problem(torch.float32, B=0)
    y, h_n, c_n, dx, *_, dw_hh, dbias = p.run("triton", torch.float32)
    assert y.shape == (4, 0, 16)
    assert h_n.shape == c_n.shape == (1, 0, 16)
    assert dx.shape == (4, 0, 5)
    assert not dw_hh.any()
    assert not dbias.any()


def force(monkeypatch: pytest.MonkeyPatch, config: object) -> None:
    """Make every launch take a configuration."""
    from fused_lstm import choose as choices
    from fused_lstm import launch

    monkeypatch.setattr(launch, "choose", lambda *_: choices.Choice(config, "forced"))


def configurations(H: int) -> dict[str, object]:
    """Stepwise tilings of H hidden units, and one that keeps them all in one persistent program."""
    from fused_lstm.config import LaunchConfig

    return {
        "stepwise": LaunchConfig(16, 16, 16),
        "wide": LaunchConfig(16, 32, 64),
        "tall": LaunchConfig(64, 16, 32),
        "swapped": LaunchConfig(32, 16, 32, swap=True),
        "rows": LaunchConfig(32, 16, 32, rows=3),
        "local": LaunchConfig(16, 64, 64, persistent=True, resident=1),
        "local swapped": LaunchConfig(32, 64, 64, persistent=True, resident=1, swap=True, rows=7),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", configurations(0))
def test_many_configurations(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, configurations(0)[name])
    problems = [
        Problem(dtype, T=3, B=20, H=48, directions=2),
        Problem(dtype, B=5, H=64, mode="lengths", directions=-1),
        Problem(dtype, B=5, H=16, mode="packed", directions=2, resets=True),
        Problem(dtype, B=5, H=32, K=3, mode="lengths", directions=1, resets=True),
    ]
    check(problems)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swap", [False, True])
def test_both_schedules_give_equal_bits(dtype: torch.dtype, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_lstm.config import LaunchConfig

    problems = [
        Problem(dtype, T=5, B=20, H=48, directions=2, mode="lengths" if resets else "padded", resets=resets)
        for resets in (False, True)
    ]
    results = []
    for persistent in (False, True):
        force(monkeypatch, LaunchConfig(16, 64, 64, persistent=persistent, resident=int(persistent), swap=swap))
        results.append([t for p in problems for t in p.run("triton", dtype)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
