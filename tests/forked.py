"""Persistent launches in Triton's interpreter: a process for each program, so that programs can wait for one another.

The interpreter runs the programs of a grid one after another, and one that waits for a later one would wait forever. Here
each is a forked process over tensors in shared memory; the interpreter's atomics are real ones, and so is a barrier made
of them. What cannot show here is a missing order among the threads of one program: a program is a single thread.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import torch

Program = tuple[int, int, int]
# For a program: how many seconds it sleeps before each of its operations: "load", "store", "atomic" or "barrier".
Delays = Callable[[Program], Callable[[str], float]]

OPERATIONS = {
    "create_masked_load": "load",
    "create_masked_store": "store",
    "create_atomic_rmw": "atomic",
    "create_barrier": "barrier",
}


def random_delays(seed: int) -> Delays:
    """One operation in ten is late, by up to 2 ms."""

    def of(program: Program) -> Callable[[str], float]:
        chance = random.Random(f"{seed} {program}")
        return lambda _: chance.random() * 2e-3 if chance.random() < 0.1 else 0.0

    return of


def late_store(late: Program, n: int, seconds: float) -> Delays:
    """One program's store number n is so late that every other program gets as far as the barrier lets it."""

    def of(program: Program) -> Callable[[str], float]:
        stores = 0

        def delay(operation: str) -> float:
            nonlocal stores
            stores += operation == "store"
            return seconds if program == late and operation == "store" and stores == n + 1 else 0.0

        return delay

    return of


def tensors_in(args: tuple) -> Iterator[torch.Tensor]:
    """Those among a kernel's arguments, and in tuples among them."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from tensors_in(arg)
        elif isinstance(arg, torch.Tensor):
            yield arg


def run_forked(
    kernel: Any, grid: Program, args: tuple, prepare: Callable[[], None], delays: Delays | None, timeout: float
) -> None:
    """Launch an interpreted kernel with a process for each program, which calls ``prepare`` before; they have ``timeout``
    seconds in all.

    Raises TimeoutError where some do not end, and RuntimeError where one dies.
    """
    for tensor in tensors_in(args):
        tensor.share_memory_()  # moves its storage, which all its views share: what is one memory stays one
    context = multiprocessing.get_context("fork")
    programs = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
    start = context.Barrier(len(programs))
    children = {
        p: context.Process(target=_child, args=(p, start, kernel, grid, args, prepare, delays, timeout), daemon=True)
        for p in programs
    }
    end = time.monotonic() + timeout
    try:
        for child in children.values():
            child.start()
        running = dict(children)
        while running:
            left = end - time.monotonic()
            if left <= 0 or not multiprocessing.connection.wait([c.sentinel for c in running.values()], left):
                raise TimeoutError(
                    f"{kernel.__name__}: after {timeout} s, these of {grid} programs still run: {list(running)}"
                )
            for program, child in list(running.items()):
                if not child.is_alive():
                    del running[program]
                    if child.exitcode:
                        code = child.exitcode
                        raise RuntimeError(f"{kernel.__name__}: program {program} of {grid} ended with exit code {code}")
    finally:
        for child in children.values():
            if child.pid is not None:
                child.kill()
                child.join()
                child.close()


def _child(
    program: Program,
    start: Barrier,
    kernel: Any,
    grid: Program,
    args: tuple,
    prepare: Callable[[], None],
    delays: Delays | None,
    timeout: float,
) -> None:
    """Run one program of the grid. Whatever is patched here dies with the process."""
    from triton.runtime import interpreter

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(timeout) + 2)  # should the parent be killed, nobody else ends a program that waits
    torch.set_num_threads(1)
    builder = interpreter.interpreter_builder
    delay = delays(program) if delays else lambda _: 0.0
    for name, operation in OPERATIONS.items():
        setattr(builder, name, _delayed(getattr(builder, name), operation, delay))
    builder.set_grid_dim(*grid)
    builder.set_grid_idx(*program)
    builder.set_grid_dim = builder.set_grid_idx = lambda *_: None  # the launch below is of a grid of one
    # After its run the interpreter copies arguments back, onto themselves here: nothing to do, and a race if it were done.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    start.wait()  # none gets ahead because it was forked first
    prepare()
    kernel[(1, 1, 1)](*args)


def _delayed(run: Callable, operation: str, delay: Callable[[str], float]) -> Callable:
    # A program that waits must leave the processor to those that it waits for.
    least = 1e-4 if operation == "atomic" else 0.0

    def delayed(*args: Any, **kwargs: Any) -> Any:
        seconds = max(delay(operation), least)
        if seconds:
            time.sleep(seconds)
        return run(*args, **kwargs)

    return delayed


@dataclass(frozen=True)
class Redirected:
    """A kernel that ``run`` launches: a function of kernel, grid, positional and named arguments."""

    kernel: Any
    run: Callable[[Any, Program, tuple, dict[str, Any]], None]

    def __getitem__(self, grid: Program) -> Callable[..., None]:
        return lambda *args, **meta: self.run(self.kernel, grid, args, meta)


def redirect_launches(monkeypatch: pytest.MonkeyPatch, schedule: str, run: Callable[..., None]) -> None:
    """Have :class:`Redirected` launch the kernels of a schedule from now on."""
    from fused_lstm.launch.choice import BY_NAME

    kernels = BY_NAME[schedule].kernels
    for name, kernel in list(kernels.items()):
        monkeypatch.setitem(kernels, name, Redirected(kernel, run))
