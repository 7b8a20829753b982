"""Launching a kernel for the price of its launch: what Triton works out of the arguments is kept for others like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..kernels.stepwise import lstm_forward_step

# TRITON_INTERPRET=1, set before the kernels are imported, makes them run on CPU tensors.
INTERPRETED = not isinstance(lstm_forward_step, triton.JITFunction)

LIMIT = 1024  # compiled kernels that are remembered here; Triton itself remembers all
INT32 = 2**31 - 1


class Compiled(NamedTuple):
    """A kernel as Triton compiled it for a layout of arguments."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


_known: dict[tuple, Compiled] = {}


def run(kernel: Any, grid: tuple[int, int, int], calls: Iterable[tuple], options: dict[str, Any]) -> None:
    """Launch a kernel for each of ``calls``, its arguments, of which all are of the first one's layout.

    What a kernel is compiled for depends on its arguments' layout: on dtypes and alignment, not on T, B or the strides.
    The first launch of a layout goes through Triton's front door, which takes a hundred microseconds to find that out. Those
    that follow hand the arguments to the compiled kernel.
    """
    if INTERPRETED:
        for args in calls:
            kernel[grid](*args, **options)
        return
    device = driver.active.get_current_device()
    found, key = None, None
    for args in calls:
        if key is None:
            key = (kernel, device, layout(args), *options.values())
            found, stream = _known.get(key), driver.active.get_current_stream(device)
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        if found is None:
            found = remember(key, kernel[grid](*args, **options))
        elif hooked:
            told = found.kernel.launch_metadata(grid, stream, *args)
            found.run(*grid, stream, found.function, found.metadata, told, enter, leave, *args)
        else:
            found.run(*grid, stream, found.function, found.metadata, None, None, None, *args)


def layout(args: tuple) -> tuple:
    """What Triton compiles a kernel for: of each tensor dtype and alignment, of each number its width, constants."""
    return tuple([_kind(arg) for arg in args])


def _kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        # On ROCm also whether 32-bit offsets reach all of it.
        return arg.dtype, arg.data_ptr() % 16 == 0, torch.version.hip and arg.untyped_storage().size() > INT32
    if type(arg) is int:
        return -INT32 - 1 <= arg <= INT32
    return layout(arg) if isinstance(arg, tuple) else arg


def remember(key: tuple, kernel: Any) -> Compiled | None:
    """Keep a compiled kernel; None where its launcher is not as expected, so that Triton's front door stays in use."""
    launcher = getattr(kernel, "run", None)
    expected = ["gridX", "gridY", "gridZ", "stream", "function"]
    if launcher is None or list(inspect.signature(launcher).parameters)[:5] != expected:
        return None
    if len(_known) >= LIMIT:
        _known.clear()
    found = _known[key] = Compiled(kernel, launcher, kernel.function, kernel.packed_metadata)
    return found
