"""Launching a kernel for the price of its launch: what Triton works out of the arguments is kept for others like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

from ..kernels.stepwise import lstm_forward_step

# TRITON_INTERPRET=1, set before the kernels are imported, makes them run on CPU tensors.
INTERPRETED = not isinstance(lstm_forward_step, triton.JITFunction)

LIMIT = 64  # layouts that are remembered of one kernel; Triton itself remembers all
INT32 = 2**31 - 1
HIP = torch.version.hip is not None


class Compiled(NamedTuple):
    """A kernel as Triton compiled it for a layout of arguments."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


class Kernel:
    """A Triton kernel with its constants and options, to be launched again and again.

    What it is compiled for depends on its arguments' layout: which tensors there are, dtypes (of one kernel always the same
    ones here), alignment, the width of integers; not on T, B or strides. The first launch of a layout goes through Triton's
    front door, which takes a hundred microseconds to find that out. Those that follow go to what it compiled.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], constants: tuple, options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.known: dict[tuple, Compiled] = {}

    def run(self, steps: Iterable[int], buffers: tuple, sequences: tuple, size: tuple[int, int, int, int]) -> None:
        """Launch it once for each of ``steps``; T, B and the row strides are the ``size``."""
        if INTERPRETED:
            for s in steps:
                self.kernel[self.grid](buffers, sequences, s, *size, *self.constants, **self.options)
            return
        grid, constants = self.grid, self.constants
        device = driver.active.get_current_device()
        key = (device, size[0] | size[1] > INT32, *[t if t is None else t.data_ptr() % 16 for t in (*buffers, *sequences)])
        if HIP:  # there also whether 32-bit offsets reach all of a tensor
            key += tuple([t is not None and t.untyped_storage().size() > INT32 for t in (*buffers, *sequences)])
        found, stream = self.known.get(key), driver.active.get_current_stream(device)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        for s in steps:
            args = (buffers, sequences, s, *size, *constants)
            if found is None:
                found = self.remember(key, self.kernel[grid](*args, **self.options))
            elif hooked:
                told = found.kernel.launch_metadata(grid, stream, *args)
                found.run(*grid, stream, found.function, found.metadata, told, enter, leave, *args)
            else:
                found.run(*grid, stream, found.function, found.metadata, None, None, None, *args)

    def remember(self, key: tuple, kernel: Any) -> Compiled | None:
        """Keep a compiled kernel; None where its launcher is not as expected, so that Triton's front door stays in use."""
        launcher = getattr(kernel, "run", None)
        expected = ["gridX", "gridY", "gridZ", "stream", "function"]
        if launcher is None or list(inspect.signature(launcher).parameters)[:5] != expected:
            return None
        if len(self.known) >= LIMIT:
            self.known.clear()
        self.known[key] = Compiled(kernel, launcher, kernel.function, kernel.packed_metadata)
        return self.known[key]
