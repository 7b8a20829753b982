"""What a schedule is chosen by and launched with: a recurrence, a device, and kernels for the price of their launch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

from ..call import Rows, accumulator_dtype
from ..cell import EPS, Relative
from ..kernels.cell import LayerNorm, Zoneout, lstm_backward, lstm_forward
from ..kernels.rows import Sequences
from ..kernels.stepwise import lstm_forward_step
from ..relatives import ROUNDS

SMALLEST = 16  # what Triton's dot product takes in each dimension


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Device:
    """What :func:`choose` needs to know of a GPU."""

    name: str
    multiprocessors: int
    shared_memory: int = 0  # bytes that one program may use
    capability: tuple[int, int] = (0, 0)  # of an NVIDIA GPU

    @property
    def wgmma(self) -> bool:
        """Whether its tensor cores multiply from shared memory."""
        return self.capability[0] in (9, 10)


PASSES = ("forward", "backward")
CELLS: dict[str, Any] = {"forward": lstm_forward, "backward": lstm_backward}
ARITHMETICS = ("half", "tf32", "fp32", "fp64")


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} should be an integer {bounds}, got {value!r}")


@dataclass(frozen=True)
class Recurrence:
    """One layer's recurrence, as a problem for one kernel."""

    kernel: str  # "forward" or "backward"
    arithmetic: str  # "half", "tf32", "fp32" or "fp64"
    T: int
    H: int  # as the kernels see it: a multiple of 16, but for norms
    B: int
    R: int  # recurrences of one launch
    cell: str = ""  # as LayerCall has it

    def __post_init__(self) -> None:
        if self.kernel not in PASSES or self.arithmetic not in ARITHMETICS:
            raise ValueError(
                f"kernel should be one of {', '.join(PASSES)} and arithmetic one of {', '.join(ARITHMETICS)}, "
                f"got {self.kernel!r} and {self.arithmetic!r}"
            )
        for name in ("T", "H", "B", "R"):
            check_integer(name, getattr(self, name), 1)

    @property
    def relative(self) -> Relative:
        return Relative.of(self.cell)

    @property
    def element_size(self) -> int:
        return {"half": 2, "fp64": 8}.get(self.arithmetic, 4)


def zoneout(relative: Relative) -> Zoneout | None:
    """What the kernels are told of it."""
    return Zoneout(relative.zoneout_h, relative.zoneout_c, ROUNDS) if relative.zoned else None


def norm(relative: Relative, H: int) -> LayerNorm | None:
    """Likewise."""
    return LayerNorm(H, relative.norm == "state", EPS, 3 * relative.peephole) if relative.norm else None


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """The kind of arithmetic of a dtype, with fp32 products in TF32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"


# TRITON_INTERPRET=1, set before the kernels are imported, makes them run on CPU tensors.
INTERPRETED = not isinstance(lstm_forward_step, triton.JITFunction)

LOG = logging.getLogger("fused_lstm")
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
    """One of a schedule's kernels with its constants and options, to be launched again and again.

    What it is compiled for depends on its arguments' layout: which tensors there are, their dtypes (here that of the gates
    tells all), alignment, the width of integers; not on T, B or strides. The first launch of a layout goes through Triton's
    front door, which takes a hundred microseconds to find that out. Those that follow go to what it compiled.
    """

    def __init__(self, kernels: dict[str, Any], name: str, constants: tuple, options: dict[str, Any]) -> None:
        self.kernels, self.name, self.constants, self.options = kernels, name, constants, options
        self.known: dict[tuple, Compiled] = {}

    def run(self, grid: tuple[int, int, int], buffers: tuple, sequences: tuple, numbers: Sequence[tuple[int, ...]]) -> None:
        """Launch it for each of ``numbers``, which are of one width."""
        constants = self.constants
        if INTERPRETED:
            for each in numbers:
                self.kernels[self.name][grid](buffers, sequences, *each, *constants, **self.options)
            return
        device = driver.active.get_current_device()
        wide = max(numbers[0]) > INT32
        tensors = buffers if sequences is PLAIN else (*buffers, *sequences)
        key = (device, wide, buffers.gates_ptr.dtype, *[t if t is None else t.data_ptr() % 16 for t in tensors])
        if HIP:  # there also whether 32-bit offsets reach all of a tensor
            key += tuple([t is not None and t.untyped_storage().size() > INT32 for t in tensors])
        found, stream = self.known.get(key), driver.active.get_current_stream(device)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        for each in numbers:
            args = (buffers, sequences, *each, *constants)
            if found is None:
                LOG.info(
                    "first launch of %s (%s): Triton compiles it, or finds it in its cache", self.name, self.constants[1]
                )
                found = self.remember(key, self.kernels[self.name][grid](*args, **self.options))
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
        found = self.known[key] = Compiled(kernel, launcher, kernel.function, kernel.packed_metadata)
        return found  # which another thread may have forgotten by now


class Launch:
    """What all launches of one kernel for one problem have in common."""

    def __init__(
        self,
        problem: Recurrence,
        config: Any,
        schedule: Schedule,
        device: Device | None,
        directions: int,
        dtype: torch.dtype,
    ) -> None:
        self.problem, self.config, self.device, self.directions, self.dtype = problem, config, device, directions, dtype
        self.run = schedule.launch
        steps = schedule.name == "stepwise" and (problem.T > 1 or problem.relative.norm)
        self.running = accumulator_dtype(dtype) if steps else None  # the dtype of what runs from one launch to the next
        self.kernel: Kernel | None = None  # this and its grid once it was launched, by a schedule that has but one
        self.grid = (0, 0, 0)


class Schedule(NamedTuple):
    """A way to launch a recurrence."""

    name: str  # as a configuration's ``schedule`` has it
    config: type  # of its configurations
    kernels: dict[str, Any]
    unsuitable: Callable[[Recurrence, Device], str | None]  # why it does not serve a problem, whatever the configuration
    candidates: Callable[[Recurrence, Device], list[Any]]
    refusal: Callable[[Any, Recurrence, Device], str | None]  # why a device cannot run a configuration
    estimate: Callable[[Any, Recurrence, Device], float]  # microseconds of the whole recurrence, roughly
    describe: Callable[[Any, Recurrence], str]
    launch: Callable[[Launch, Any, Rows], None]  # given Forward or Backward, but of tensors


def pointers(rows: Rows) -> Sequences:
    """What the kernels are told of the sequences."""
    if rows.lengths is None and rows.resets is None:
        return PLAIN
    return Sequences(rows.lengths, rows.starts(), None if rows.resets is None else rows.resets.view(torch.uint8))


PLAIN = Sequences(None, None, None)
