"""Persistent launches whose programs wait for one another, each in a process of its own, and faults that must show there."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Program, fork_launches, late_store, random_delays, run_forked
from pairs import IN_INTERPRETER, all_equal
from test_kernels import Problem, check
from torch import Tensor

from fused_lstm import launch
from fused_lstm.launch.config import Device, LaunchConfig
from fused_lstm.launch.schedules import SCHEDULES

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("nan_memory"), IN_INTERPRETER]


def persistent(block_b: int, block_h: int, block_k: int, resident: int, **options: Any) -> LaunchConfig:
    return LaunchConfig(block_b, block_h, block_k, schedule="persistent", resident=resident, **options)


def stepwise(config: LaunchConfig) -> LaunchConfig:
    """The other schedule of the same tiles."""
    return replace(config, schedule="stepwise", resident=0, swap=False, rows=config.block_b)


# A configuration, a problem and the grid that the two make: hidden tiles, batch tiles, recurrences.
CASES: dict[str, tuple[LaunchConfig, dict[str, Any], Program]] = {
    "resident": (persistent(16, 16, 16, 2), {"T": 6, "B": 3, "H": 32}, (2, 1, 1)),
    "two batch tiles": (persistent(16, 16, 16, 2), {"T": 5, "B": 20, "H": 32}, (2, 2, 1)),
    "two directions": (persistent(16, 16, 32, 1), {"T": 5, "H": 32, "directions": 2}, (2, 1, 2)),
    "both": (persistent(16, 16, 32, 2), {"T": 3, "B": 17, "H": 64, "directions": 2}, (4, 2, 2)),
    "partly resident": (persistent(16, 16, 16, 2), {"H": 48}, (3, 1, 1)),
    "streamed": (persistent(16, 16, 32, 0), {"H": 48, "directions": -1}, (3, 1, 1)),
    "swapped": (persistent(16, 16, 16, 2, swap=True, ahead=2), {"T": 5, "H": 32}, (2, 1, 1)),
    "swapped, partly": (persistent(32, 16, 16, 1, swap=True), {"H": 48}, (3, 1, 1)),
    "few rows": (persistent(16, 16, 16, 2, rows=3), {"B": 5, "H": 32}, (2, 2, 1)),
    "three ahead": (persistent(16, 16, 16, 3, ahead=3, swap=True), {"H": 48}, (3, 1, 1)),
    "ahead of a part": (persistent(16, 32, 16, 2, ahead=3), {"H": 64, "batch_first": True}, (2, 1, 1)),
    "lengths": (
        persistent(16, 16, 16, 2, rows=3),
        {"B": 6, "H": 32, "directions": 2, "mode": "lengths"},
        (2, 2, 2),
    ),
    "packed": (
        persistent(16, 16, 16, 1, swap=True, rows=2, ahead=2),
        {"T": 5, "B": 4, "H": 32, "directions": -1, "mode": "packed"},
        (2, 2, 1),
    ),
    "resets": (persistent(16, 16, 16, 2), {"H": 32, "directions": 2, "resets": True}, (2, 1, 2)),
    "packed with resets": (
        persistent(16, 16, 32, 0, rows=4),
        {"T": 5, "B": 5, "H": 32, "mode": "packed", "resets": True},
        (2, 2, 1),
    ),
    "projection": (persistent(16, 16, 16, 2), {"H": 32, "K": 3, "mode": "lengths", "resets": True}, (2, 1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_bits_by_both_schedules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options, grid = CASES[name]
    problem = Problem(torch.float32, **options)
    with launch.forced(stepwise(config)):
        expected = problem.run("triton", torch.float32)
    for seed in range(2):
        with monkeypatch.context() as patch, launch.forced(config):
            grids = fork_launches(patch, random_delays(seed))
            assert all_equal(problem.run("triton", torch.float32), expected)
        assert grids == [grid, grid]  # forward and backward


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_equal_bits_in_other_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options, _ = CASES["two directions"]
    problem = Problem(dtype, **options)
    with launch.forced(stepwise(config)):
        expected = problem.run("triton", dtype)
    fork_launches(monkeypatch, random_delays(0))
    with launch.forced(config):
        assert all_equal(problem.run("triton", dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fork_launches(monkeypatch, random_delays(0))
    with launch.forced(persistent(16, 16, 16, 1, rows=3)):
        check([Problem(dtype, B=5, H=32, mode="lengths", resets=True), Problem(dtype, H=32, directions=-1)])


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batch tiles on a GPU that runs two at once."""
    config, prepare = persistent(16, 16, 16, 1, rows=2), launch.prepare
    problem = Problem(torch.float64, T=3, B=5, H=32, directions=2)
    with launch.forced(stepwise(config)):
        expected = problem.run("triton", torch.float64)
    monkeypatch.setattr(launch, "prepare", lambda *args: prepare(*args)._replace(device=Device("small", 8)))
    grids = fork_launches(monkeypatch, random_delays(0))
    with launch.forced(config):
        assert all_equal(problem.run("triton", torch.float64), expected)
    assert grids == [(2, 2, 2), (2, 1, 2)] * 2


def test_the_interpreter_alone_refuses() -> None:
    with launch.forced(persistent(16, 16, 16, 2)), pytest.raises(RuntimeError, match="these 2 would wait for one another"):
        Problem(torch.float32, H=32).run("triton", torch.float32)


@dataclass(frozen=True)
class Fault:
    """A kernel with parts of its source replaced, and where its first program has to be late for that to show."""

    kernel: str
    parts: dict[str, str]
    late: int = 0  # which store
    options: tuple[tuple[str, Any], ...] = ()  # of the problem

    def install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from fused_lstm import kernels

        source = (Path(kernels.__path__[0]) / f"{self.kernel}.py").read_text()
        for old, new in self.parts.items():
            assert source.count(old) == 1, f"expected once in the {self.kernel} kernel: {old}"
            source = source.replace(old, new)
        path = folder / f"faulty_{self.kernel}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"fused_lstm.kernels.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, f"lstm_{self.kernel}_kernel")
        monkeypatch.setitem(SCHEDULES["persistent"].kernels, self.kernel, kernel)

    def shows(self, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5, timeout: float = 60.0) -> bool:
        """Whether one launch of this kernel, with a late program, gives other results than the right kernel stepwise."""
        expected = right_results(self.options)
        configs = (TWO, stepwise(TWO)) if self.kernel == "forward" else (stepwise(TWO), TWO)
        with monkeypatch.context() as patch, launch.forced(*configs):
            self.install(folder, patch)
            grids = fork_launches(patch, late_store((0, 0, 0), self.late, seconds), timeout)
            results = small_problem(self.options).run("triton", torch.float32)
        assert len(grids) == 1
        return not all_equal(results, expected)


TWO = persistent(16, 16, 16, 2, rows=2)


def small_problem(options: tuple[tuple[str, Any], ...]) -> Problem:
    return Problem(torch.float32, **{"T": 3, "B": 2, "H": 32, **dict(options)})


@lru_cache
def right_results(options: tuple[tuple[str, Any], ...]) -> list[Tensor]:
    with launch.forced(stepwise(TWO)):
        results = small_problem(options).run("triton", torch.float32)
    assert not any(t.isnan().any() for t in results)  # which would equal nothing
    return results


ARRIVE = "arrive(arrived_ptr)"
WAIT = {"forward": "wait(arrived_ptr, s * programs)", "backward": "wait(arrived_ptr, step * programs)"}
AFTER_PRODUCT = {"forward": "even, odd = tl.split", "backward": "dy, dhn, (i, f, g, o), c, c_prev, h_prev = saved"}
STORE = {
    "forward": "tl.store(buffers.h_ptr + offs, h_new",
    "backward": "store_gates(buffers.dgates_ptr + gate, dgates, mask, H, dtype, INTERPRET_BF16)",
}
LAST_STORE_AFTER_ARRIVAL = """for n in tl.static_range(4):
            if n == 3:
                arrive(arrived_ptr)
            tl.store(buffers.dgates_ptr + gate + n * H, narrow(dgates[n], dtype, INTERPRET_BF16), mask=mask)"""
COUNTER = "(tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 16"


def before(statement: str, call: str) -> dict[str, str]:
    """A call put before a statement of the loop over time."""
    return {statement: f"if not LOCAL:\n            {call}\n        {statement}"}


def faults(kernel: str) -> dict[str, Fault]:
    """Kernels that do not wait long enough."""
    wait = WAIT[kernel]
    result = {
        "no wait": Fault(kernel, {wait: "pass"}),
        "wait after the product": Fault(kernel, {wait: "pass", **before(AFTER_PRODUCT[kernel], wait)}),
        "wait for one less": Fault(kernel, {wait: wait[:-1] + " - 1)"}),
        "arrive twice": Fault(kernel, {ARRIVE: f"{ARRIVE}\n            {ARRIVE}"}),
        "arrive before the store": Fault(kernel, {ARRIVE: "pass", **before(STORE[kernel], ARRIVE)}),
        "batch tiles share a counter": Fault(kernel, {COUNTER: "tl.program_id(2) * 16"}, options=(("B", 4),)),
        "directions share a counter": Fault(kernel, {COUNTER: "tl.program_id(1) * 16"}, options=(("directions", 2),)),
    }
    if kernel == "backward":
        parts = {ARRIVE: "pass", STORE[kernel]: LAST_STORE_AFTER_ARRIVAL}
        result["arrive before the last store"] = Fault(kernel, parts, late=3)
    return result


FAULTS = {f"{kernel}: {name}": fault for kernel in WAIT for name, fault in faults(kernel).items()}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In half a second the other programs do many steps; where the machine is very busy, they take longer.
    assert any(FAULTS[name].shows(tmp_path, monkeypatch, seconds) for seconds in (0.5, 4.0, 20.0))


@pytest.mark.parametrize("kernel", WAIT)
@pytest.mark.parametrize(("late", "option"), [(0, ("B", 4)), (3, ("directions", 2))])
def test_late_programs_without_a_fault(
    kernel: str, late: int, option: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shows the faults is not the delay."""
    assert not Fault(kernel, {}, late, (option,)).shows(tmp_path, monkeypatch)


@pytest.mark.parametrize("kernel", WAIT)
@pytest.mark.parametrize("name", ["no arrival", "wait for one more"])
def test_a_deadlock_is_an_error(kernel: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = WAIT[kernel]
    fault = Fault(kernel, {ARRIVE: "pass"} if name == "no arrival" else {wait: wait[:-1] + " + 1)"})
    with pytest.raises(TimeoutError, match=rf"{kernel}_kernel: after 1.5 s, these of \(2, 1, 1\) programs still run"):
        fault.shows(tmp_path, monkeypatch, seconds=0.0, timeout=1.5)
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Kernel:
    """A Python function of the program and the arguments, as a kernel."""

    function: Callable[..., None]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __getitem__(self, _: Program) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder

        return lambda *args: self.function(interpreter_builder.grid_idx, *args)


def test_memory_is_shared_as_it_was() -> None:
    """What a program writes to one argument is in all that share its memory, in this process and in the others."""
    a = torch.zeros(2, 3, 2, dtype=torch.int64)
    view = a[1:]

    def write(program: Program, buffers: tuple[Tensor], part: Tensor) -> None:
        (whole,) = buffers
        x, y, z = program
        (part if x else whole)[0, y, z] = 100 + x * 10 + y * 3 + z
        while not (whole != 0).all():
            time.sleep(1e-3)

    run_forked(Kernel(write), (2, 3, 2), ((a,), view), {})
    assert a.tolist() == [[[100 + x * 10 + y * 3 + z for z in range(2)] for y in range(3)] for x in range(2)]
    assert view.data_ptr() == a[1].data_ptr()


def test_a_dead_program_is_an_error() -> None:
    def die(program: Program) -> None:
        if program == (1, 0, 0):
            os._exit(3)
        time.sleep(1000)  # beyond pytest's limit: who waits for it fails

    with pytest.raises(RuntimeError, match=r"die: program \(1, 0, 0\) of \(2, 1, 1\) ended with exit code 3"):
        run_forked(Kernel(die), (2, 1, 1), (), {})
    assert not multiprocessing.active_children()
