"""Every load and store of the stepwise kernels is within its arguments: each address is checked in Triton's interpreter.

So is every sum and product of int32 on the way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from forked import Program, Redirected, redirect_launches, tensors_in
from pairs import IN_INTERPRETER
from problems import Problem

pytest.importorskip("triton")
import triton
from triton import language as tl

import fused_lstm
from fused_lstm import launch
from fused_lstm.launch import relatives
from fused_lstm.launch.stepwise import StepwiseConfig

pytestmark = [pytest.mark.kernels, IN_INTERPRETER]

CONFIGS = {
    "stepwise": StepwiseConfig(16, 16, 16),
    "wide": StepwiseConfig(16, 32, 64),
}


class Memory:
    """The arguments of a launch, and the accesses that were compared with them."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.checked = 0

    def of(self, args: tuple) -> None:
        tensors = tensors_in(args)
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
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    from quick_interpreter import check_overflow
    from triton.runtime.interpreter import interpreter_builder

    watched = Memory()

    def checked(run: Callable, mask_at: int) -> Callable:
        def access(pointers: Any, *args: Any) -> Any:
            watched.check(pointers, args[mask_at])
            return run(pointers, *args)

        return access

    def launched(kernel: Any, grid: Program, args: tuple, meta: dict[str, Any]) -> None:
        watched.of(args)
        kernel[grid](*args, **meta)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", checked(interpreter_builder.create_masked_load, 0))
    monkeypatch.setattr(interpreter_builder, "create_masked_store", checked(interpreter_builder.create_masked_store, 1))
    redirect_launches(monkeypatch, "stepwise", launched)
    for name, kernel in relatives.KERNELS.items():
        monkeypatch.setitem(relatives.KERNELS, name, Redirected(kernel, launched))
    check_overflow(True)
    yield watched
    check_overflow(False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 3, 2], [0, 0, 0, 0, 0], [3, 3, 3, 3, 0]])
def test_every_access_is_within_an_argument(name: str, lengths: list[int] | None, memory: Memory) -> None:
    problem = Problem(torch.float32, T=3, B=5, H=48, directions=2, resets=True)
    problem.given = problem.given._replace(lengths=None if lengths is None else torch.tensor(lengths))
    with launch.forced(CONFIGS[name]):
        problem.ours()
    assert memory.checked > 1000


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_in_both_directions(mode: str, memory: Memory) -> None:
    for directions in (1, -1):
        problem = Problem(torch.float32, B=5, H=48, directions=directions, mode=mode, resets=True)
        with launch.forced(CONFIGS["wide"]):
            problem.ours()


@pytest.mark.parametrize("norm", [None, "state"])
def test_of_other_cells(norm: str | None, memory: Memory) -> None:
    cell = fused_lstm.Cell(peephole=True, layer_norm=norm, zoneout=(0.3, 0.2))
    lstm = fused_lstm.LSTM(3, 20, bidirectional=True, cell=cell, backend="triton")
    with launch.forced(CONFIGS["wide"]):
        lstm(torch.randn(3, 4, 3), lengths=torch.tensor([3, 0, 1, 2]))[0].sum().backward()
    assert memory.checked > 1000


def test_an_access_outside_is_seen(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the resets taken for no argument."""
    from triton.runtime.errors import InterpreterError

    of = memory.of
    monkeypatch.setattr(memory, "of", lambda args: (of(args), memory.ranges.pop()))
    with launch.forced(CONFIGS["stepwise"]), pytest.raises(InterpreterError, match=r"addresses lie outside the kernel"):
        Problem(torch.float32, H=16, resets=True).ours()


@triton.jit
def doubled(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, x + x)


def test_an_overflow_is_seen(memory: Memory) -> None:
    from triton.runtime.errors import InterpreterError

    x = torch.tensor([2**30], dtype=torch.int32)
    memory.of((x,))
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        doubled[(1,)](x)
