"""Every load and store of the kernels stays within its arguments: checked address by address in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork_launches
from fused_lstm.config import LaunchConfig
from pairs import IN_INTERPRETER
from test_kernels import Problem, force

pytestmark = [pytest.mark.kernels, IN_INTERPRETER]

CONFIGS = {
    "stepwise": LaunchConfig(16, 16, 16),
    "rows": LaunchConfig(16, 32, 32, rows=2),
    "swapped": LaunchConfig(32, 16, 64, swap=True),
    "local": LaunchConfig(16, 64, 64, persistent=True, resident=1),
    "persistent": LaunchConfig(16, 32, 32, persistent=True, resident=1, ahead=2, rows=2),
}


class Memory:
    """The arguments of a launch, and the accesses that were compared with them."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.checked = 0

    def of(self, args: tuple) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]

    def check(self, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in self.ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"{(~inside).sum()} of {inside.size} addresses lie outside the kernel's arguments")
        self.checked += inside.size


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    from triton.runtime.interpreter import interpreter_builder

    from fused_lstm import launch

    watched = Memory()

    def checked(run: Callable, mask_at: int) -> Callable:
        def access(pointers: Any, *args: Any) -> Any:
            watched.check(pointers, args[mask_at])
            return run(pointers, *args)

        return access

    run = launch.launch

    def launched(kernel: str, grid: tuple[int, int, int], args: tuple, meta: dict[str, Any]) -> None:
        watched.of(args)
        run(kernel, grid, args, meta)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", checked(interpreter_builder.create_masked_load, 0))
    monkeypatch.setattr(interpreter_builder, "create_masked_store", checked(interpreter_builder.create_masked_store, 1))
    monkeypatch.setattr(launch, "launch", launched)
    return watched


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 3, 2], [0, 0, 0, 0, 0], [3, 3, 3, 3, 0]])
def test_every_access_is_within_an_argument(
    name: str, lengths: list[int] | None, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, CONFIGS[name])
    if name == "persistent":
        fork_launches(monkeypatch)
        monkeypatch.setattr("fused_lstm.launch.launch", _recording(memory))
    problem = Problem(torch.float32, T=3, B=5, H=48, directions=2, resets=True)
    problem.lengths = None if lengths is None else torch.tensor(lengths)
    problem.run("triton", torch.float32)
    if name != "persistent":
        assert memory.checked > 1000


def _recording(memory: Memory) -> Callable:
    """Launch by forked processes, each of which compares its accesses and dies of a wrong one."""
    from fused_lstm import launch

    forked = launch.launch

    def launched(kernel: str, grid: tuple[int, int, int], args: tuple, meta: dict[str, Any]) -> None:
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg.share_memory_()  # moves it, so before its place is noted
        memory.of(args)
        forked(kernel, grid, args, meta)

    return launched


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_in_both_directions(mode: str, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows", "local"):
        force(monkeypatch, CONFIGS[name])
        for directions in (1, -1):
            Problem(torch.float32, B=5, H=48, directions=directions, mode=mode, resets=True).run("triton", torch.float32)
    assert memory.checked > 1000


def test_an_access_outside_is_seen(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import InterpreterError

    force(monkeypatch, CONFIGS["stepwise"])
    of = memory.of
    monkeypatch.setattr(memory, "of", lambda args: (of(args), memory.ranges.pop()))
    problem = Problem(torch.float32, H=16, resets=True)
    with pytest.raises((AssertionError, InterpreterError), match="addresses lie outside the kernel"):
        problem.run("triton", torch.float32)
