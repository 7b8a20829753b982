"""The persistent kernels in Triton's interpreter, a forked process for each program."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import gluon_interpreter
import pytest
import torch
from checks import DEVICE
from forked import Delays, Program, run_forked
from fused_lstm.kernels.rows import Sequences
from problems import Problem

from fused_lstm import launch
from fused_lstm.launch import persistent
from fused_lstm.launch.schedule import CELLS


def recurrence(dtype: torch.dtype, **options: Any) -> Problem:
    """One without the GEMM before it: x holds the pre-activations."""
    return Problem(dtype, **{"I": None, "H": 32} | options)


def forced(config: persistent.PersistentConfig) -> AbstractContextManager:
    """A configuration forced, for the forward pass in whole where it splits the backward pass."""
    return launch.forced(replace(config, form="whole") if config.form == "split" else config, config)


def interpret(
    monkeypatch: pytest.MonkeyPatch,
    delays: Delays | None = None,
    timeout: float = 60.0,
    modules: dict[str, Any] | None = None,
) -> list[Program]:
    """Launches of the persistent kernels run in the interpreter from now on, a process for each program.

    Where there is a GPU, they run there. Returns the list that their grids are added to. ``modules`` are those of
    gluon_interpreter.interpreted(), with a fault.
    """
    grids: list[Program] = []
    if DEVICE != "cpu":
        real = persistent.launch_once
        monkeypatch.setattr(
            persistent, "launch_once", lambda name, grid, *more: (grids.append(grid), real(name, grid, *more))
        )
        return grids
    modules = modules or gluon_interpreter.interpreted()
    found = {name: value for module in modules.values() for name, value in vars(module).items()}

    def launch(name: str, grid: Program, buffers: Any, sequences: Sequences, numbers: tuple, cut: Any, _: bool) -> None:
        grids.append(grid)
        kernel, cell = found[persistent.KERNELS[name].__name__], CELLS[name.split()[0]]
        args = (buffers, sequences, *numbers, cell, cut)
        run_forked(kernel, grid, args, gluon_interpreter.prepare, delays, timeout)

    monkeypatch.setattr(persistent, "launch_once", launch)
    return grids
