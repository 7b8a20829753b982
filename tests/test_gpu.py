"""What only a GPU can show: kernels that wait for one another on a busy device, sizes beyond 16 and 32 bits."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from cases import DTYPES
from checks import DEVICE, Config, Rule, add_config
from pairs import IN_INTERPRETER, all_equal, call, flat, randn
from providers import CannotRun, by_schedule
from timing import graph_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fused_lstm

pytest.importorskip("triton")
from fused_lstm import launch
from fused_lstm.launch.choice import BY_NAME
from fused_lstm.launch.stepwise import StepwiseConfig

OTHERS = [name for name in BY_NAME if name != "stepwise"]
RAGGED = "hx lengths resets"
SIZES = [  # H, B, directions
    (64, 16, 1), (64, 300, 2), (128, 48, 2), (256, 16, 1), (512, 64, 1), (528, 8, 1), (768, 16, 1), (1024, 64, 1),
    (1024, 16, 2),
]  # fmt: skip


class Problem:
    """A layer and what it is given: numbers of a kind."""

    def __init__(self, kind: str, T: int, H: int, B: int, directions: int = 1, extras: str = "") -> None:
        torch.manual_seed(0)
        self.kind, self.size = kind, (T, H, B, directions)
        self.layer = fused_lstm.LSTM(32, H, bidirectional=directions == 2, dtype=DTYPES[kind], backend="triton").to(DEVICE)
        self.given = tree_map(lambda t: t.to(DEVICE), call(self.layer, extras, T, B))
        state = (directions, B, H)
        self.cotangents = [randn(*shape).to(DEVICE, DTYPES[kind]) for shape in ((T, B, directions * H), state, state)]

    def step(self, dtype: torch.dtype | None = None, backend: str = "triton") -> Callable[[], list[Tensor]]:
        """A call with gradients, ready to run: output, states, and gradients by all that has one."""
        dtype = dtype or DTYPES[self.kind]
        layer = copy.deepcopy(self.layer).to(dtype)
        layer.backend = backend
        given = tree_map(lambda t: t.to(dtype).requires_grad_() if t.is_floating_point() else t, self.given)
        wanted = [t for t in (*tree_leaves(given), *layer.parameters()) if t.requires_grad]
        cotangents = [t.to(dtype) for t in self.cotangents]

        def run() -> list[Tensor]:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.kind == "tf32"):
                results = flat(layer(**given))
                return [t.detach() for t in (*results, *torch.autograd.grad(results, wanted, cotangents))]

        return run

    def forced(self, schedule: str) -> AbstractContextManager:
        """The kernels by a schedule, or as they are chosen. Raises CannotRun where no configuration of it fits."""
        if not schedule:
            return nullcontext()
        if DEVICE == "cpu":
            return launch.forced(StepwiseConfig(16, 16, 16))
        return by_schedule(schedule, launch.device(0), launch.arithmetic(DTYPES[self.kind], self.kind == "tf32"), *self.size)

    def run(self, schedule: str = "") -> list[Tensor]:
        with self.forced(schedule):
            return self.step()()

    def agree(self, rule: Rule, ours: list[Tensor], exact: list[Tensor] | None = None) -> None:
        """Results against those by a launch for each step; fp64's are those of plain PyTorch."""
        exact = exact or self.step(torch.float64, "reference")()
        rule.add((self.kind, self.size), list(map(str, range(len(ours)))), ours, self.run("stepwise"), exact)


def check(problem: Problem, schedule: str, rule: Rule) -> None:
    """A schedule gives right results, and the same bits again."""
    ours = problem.run(schedule)
    problem.agree(rule, ours)
    assert all_equal(ours, problem.run(schedule))


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", OTHERS)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "fp32"])
def test_schedules_agree(kind: str, schedule: str) -> None:
    rule, tried = Rule(), 0
    for H, B, directions in SIZES:
        for extras in ("hx", RAGGED):
            try:
                check(Problem(kind, 33, H, B, directions, extras), schedule, rule)
            except CannotRun:
                continue
            tried += 1
    if not tried:
        pytest.skip(f"no configuration of the {schedule} schedule fits")
    rule.check()


@pytest.mark.kernels
@IN_INTERPRETER
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_schedules_agree_in_the_interpreter(kind: str) -> None:
    """Of one tile; and a layer with other weights does not agree."""
    problem, rule = Problem(kind, 4, 32, 5, 2, RAGGED), Rule()
    check(problem, "", rule)
    rule.check()
    right = problem.step(torch.float64, "reference")()
    with torch.no_grad():
        problem.layer.weight_hh_l0[:, 0] += 1
    ours = problem.run()
    with torch.no_grad():
        problem.layer.weight_hh_l0[:, 0] -= 1
    with pytest.raises(AssertionError, match="relative"):
        problem.agree(Rule(), ours, right)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", BY_NAME)
def test_a_few_steps(schedule: str) -> None:
    """What compute-sanitizer looks at."""
    for H in (64, 256):
        assert all(t.isfinite().all() for t in Problem("bf16", 3, H, 4, extras=RAGGED).run(schedule))


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "B"), [(256, 16), (1024, 64)])
def test_a_thousand_steps_under_load(H: int, B: int) -> None:
    """Equal bits every time, beside other work."""
    load, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    run = Problem("bf16", 16, H, B).step()
    first = run()
    for n in range(1000):
        if n % 4 == 0:
            with torch.cuda.stream(load):
                a @ a
        assert all_equal(first, run()), n


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Forward and backward: a replay gives the bits of an ordinary call."""
    run = Problem("bf16", 40, 256, 16).step()
    expected, captured = run(), []

    def step() -> None:
        captured[:] = run()

    replay = graph_of(step)
    for t in captured:
        t.fill_(torch.nan)
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert all_equal(expected, captured)


@pytest.mark.gpu
def test_two_layers_on_two_streams() -> None:
    """Neither hangs, neither changes the other's bits."""
    runs = [Problem("bf16", 64, 512, 32).step(), Problem("bf16", 64, 1024, 64).step()]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    for _ in range(50):
        results = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run())
        torch.cuda.synchronize()
        assert all(map(all_equal, expected, results))


@pytest.mark.gpu
def test_more_steps_than_16_bits_count() -> None:
    problem, rule = Problem("bf16", 70_000, 256, 2), Rule()
    ours = problem.run()
    with problem.forced("stepwise"):  # plain PyTorch would take minutes
        exact = [t.double() for t in problem.step(torch.float32)()]
    problem.agree(rule, ours, exact)
    rule.check()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """The last rows are as right as the first."""
    T, B, H = 4200, 256, 512
    assert T * B * 4 * H > 2**31
    torch.manual_seed(0)
    layer = fused_lstm.LSTM(H, H, device="cuda", dtype=torch.bfloat16, backend="triton")
    x, rows = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16), [0, B - 1]
    dy = torch.zeros(64, B, H, device="cuda", dtype=torch.bfloat16)
    dy[:, rows] = torch.randn(64, 2, H, device="cuda", dtype=torch.bfloat16)

    def results(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y, _ = layer(leaf)
        (dx,) = torch.autograd.grad(y[-64:], leaf, dy)
        return y.detach(), dx[-64:]

    ours = [t[:, rows] for t in results(layer, x, dy)]
    theirs = layer.to_torch()
    small, found = (x[:, rows], dy[:, rows]), []
    for module, dtype in ((theirs, torch.bfloat16), (copy.deepcopy(theirs).double(), torch.float64)):
        found.append(results(module, *(t.to(dtype) for t in small)))
    rule = Rule()
    rule.add("2^31", ["y", "dx"], ours, *found)
    rule.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_problems(dtype: torch.dtype) -> None:
    """Of sizes that the interpreter is too slow for, against nn.LSTM."""
    rule = Rule()
    for seed in range(66):
        largest = random.Random(seed).choice([64, 200, 600])
        add_config({("triton", False): rule}, Config.random(seed, dtype, largest))
    rule.check()
