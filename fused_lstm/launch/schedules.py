"""The schedules: how a recurrence may be launched, each a record of what it can do, what it costs and how it is run.

A new one is a kernel file and a record in SCHEDULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..call import Rows
from ..kernels import rows as row_map
from ..kernels import stepwise as step_kernels
from ..kernels.backward import lstm_backward_kernel
from ..kernels.cell import lstm_backward, lstm_forward
from ..kernels.forward import lstm_forward_kernel
from . import compiled
from .config import SMALLEST, Device, LaunchConfig, Recurrence, ceil_div, power_of_two

CELL = {"forward": lstm_forward, "backward": lstm_backward}


class Launch:
    """What all launches of one kernel for one problem have in common."""

    def __init__(
        self, problem: Recurrence, config: LaunchConfig, device: Device | None, directions: int, dtype: torch.dtype
    ) -> None:
        self.problem, self.config, self.device, self.directions = problem, config, device, directions
        self.precision = "tf32" if problem.arithmetic == "tf32" else "ieee"
        self.interpret_bf16 = compiled.INTERPRETED and dtype == torch.bfloat16
        self.schedule = SCHEDULES[config.schedule]

    @cached_property
    def kernel(self) -> compiled.Kernel:
        """The stepwise kernel of this problem."""
        p, c = self.problem, self.config
        blocks = c.block_b, c.block_h, c.block_k
        constants = step_kernels.Config(p.R, p.H, self.directions, self.precision, self.interpret_bf16, *blocks)
        grid = c.grid(p.H, p.B, p.R)
        return compiled.Kernel(STEPWISE.kernels, p.kernel, grid, (CELL[p.kernel], constants), options_of(c))


class Schedule(NamedTuple):
    """A way to launch a recurrence."""

    name: str  # as LaunchConfig.schedule has it
    kernels: dict[str, Any]  # forward and backward
    candidates: Callable[[Recurrence, Device], list[LaunchConfig] | str]  # that the device can run, or why there are none
    refusal: Callable[[LaunchConfig, Recurrence, Device], str | None]  # why a device cannot run one
    estimate: Callable[[LaunchConfig, Recurrence, Device], float]  # microseconds of the whole recurrence, roughly
    describe: Callable[[LaunchConfig, Recurrence, Device | None], str]
    launch: Callable[[Launch, Any, Rows], None]  # the buffers as stepwise.Forward or Backward, but of tensors


class Tiles(NamedTuple):
    """The tiles open to the stepwise schedule for one kind of arithmetic; none of them spills on sm_90."""

    min_block_b: int
    max_block_b: int
    blocks_h: tuple[int, ...]
    block_k: int
    num_warps: int = 8
    max_registers: int | None = None


STEPWISE_TILES = {
    "half": Tiles(SMALLEST, 64, (32, 16), 64),
    "tf32": Tiles(64, 64, (32, 16), 32),
    "fp32": Tiles(SMALLEST, 64, (16,), 16, max_registers=255),
    "fp64": Tiles(SMALLEST, 16, (16,), 16, num_warps=4),
}


class Tile(NamedTuple):
    """A tile of the persistent schedule; see LaunchConfig."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    ahead: int
    swap: bool


# For tensor cores that multiply from shared memory (sm_90 and sm_100), which want 64 rows: the gates of 16 units forwards,
# 64 units or 64 batch rows backwards. None of them spills on sm_90 at the sizes that tests/test_compile.py compiles.
PERSISTENT_TILES = {
    ("forward", "half"): (
        Tile(16, 16, 128, 4, 2, True), Tile(16, 32, 128, 4, 2, True), Tile(32, 16, 128, 4, 2, True),
        Tile(32, 32, 128, 8, 2, True), Tile(64, 16, 64, 4, 2, True), Tile(64, 32, 64, 8, 2, True),
        Tile(128, 16, 64, 8, 2, False), Tile(128, 32, 64, 8, 1, True),
    ),
    ("backward", "half"): (
        Tile(16, 64, 128, 4, 2, True), Tile(32, 64, 64, 4, 2, True), Tile(64, 16, 64, 4, 2, False),
        Tile(64, 32, 64, 8, 2, False), Tile(128, 16, 64, 8, 2, False),
    ),
    ("forward", "tf32"): (
        Tile(16, 16, 64, 4, 2, True), Tile(16, 32, 64, 4, 2, True), Tile(32, 16, 64, 4, 2, True),
        Tile(32, 32, 64, 8, 2, True), Tile(64, 16, 32, 4, 2, True), Tile(64, 32, 32, 8, 2, True),
        Tile(128, 16, 32, 8, 2, False),
    ),
    ("backward", "tf32"): (
        Tile(16, 64, 64, 4, 1, True), Tile(64, 16, 64, 8, 1, False), Tile(64, 32, 32, 8, 1, False),
        Tile(128, 16, 32, 8, 1, False),
    ),
    # Not for tensor cores: strict fp32.
    ("forward", "fp32"): (Tile(16, 16, 32, 8, 2, False), Tile(32, 16, 32, 8, 2, False), Tile(64, 16, 32, 8, 2, False)),
    ("backward", "fp32"): (Tile(16, 16, 64, 8, 1, False),),
}  # fmt: skip

# No weights on chip, and yet no launches: block_k, num_stages and pairs of block_b and block_h.
STREAMED = {
    "half": (64, 3, ((16, 16), (16, 32), (32, 16), (32, 32), (64, 32))),
    "tf32": (32, 3, ((16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (64, 32))),
    "fp32": (32, 2, ((16, 16),)),
    "fp64": (16, 2, ()),
}

# The largest H whose weights are kept on chip, wholly or in part: above it the compiler, or the chip, runs out of registers.
LARGEST_RESIDENT = {"half": 2048, "tf32": 528, "fp32": 528}

# Programs that have all hidden units, by the largest H: (block_b, warps).
LOCAL = {
    ("forward", "half"): {64: ((16, 4), (32, 8), (64, 8)), 128: ((16, 8), (32, 8))},
    ("backward", "half"): {64: ((16, 4), (32, 8)), 128: ((16, 8),)},
    ("forward", "tf32"): {64: ((16, 4), (32, 8))},
    ("backward", "tf32"): {64: ((16, 4), (32, 8))},
}


def stepwise_candidates(problem: Recurrence, device: Device | None = None) -> list[LaunchConfig]:
    """Every configuration with a launch for each time step."""
    tiles = STEPWISE_TILES[problem.arithmetic]
    block_b = min(max(power_of_two(problem.B), tiles.min_block_b), tiles.max_block_b)
    return [
        LaunchConfig(block_b, block_h, tiles.block_k, tiles.num_warps, max_registers=tiles.max_registers)
        for block_h in tiles.blocks_h
        if block_h <= max(problem.H, SMALLEST)
    ]


def stepwise_refusal(config: LaunchConfig, problem: Recurrence, device: Device) -> None:
    """Nothing: any device runs a launch for each step."""


def describe_stepwise(config: LaunchConfig, problem: Recurrence, device: Device | None) -> str:
    return f"{problem.T} launches, one for each time step"


def launch_stepwise(launch: Launch, buffers: Any, rows: Rows) -> None:
    steps = range(rows.T) if launch.problem.kernel == "forward" else range(rows.T - 1, -1, -1)
    launch.kernel.run(steps, buffers, pointers(rows), (rows.T, rows.B, rows.stride_t, rows.stride_b))


def options_of(config: LaunchConfig) -> dict[str, Any]:
    """What Triton's compiler is told."""
    only_nvidia = {} if torch.version.hip else {"maxnreg": config.max_registers}
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **only_nvidia)


PLAIN = row_map.Sequences(None, None, None)


def pointers(rows: Rows) -> row_map.Sequences:
    if rows.lengths is None and rows.resets is None:
        return PLAIN
    resets = None if rows.resets is None else rows.resets.view(torch.uint8)
    return row_map.Sequences(rows.lengths, rows.starts(), resets)


def persistent_candidates(problem: Recurrence, device: Device) -> list[LaunchConfig] | str:
    """Those that the device can run; weights are streamed only if they must be."""
    refusals = {config: refusal(config, problem, device) for config in persistent(problem, device)}
    found = [config for config, why in refusals.items() if why is None]
    if not found:
        reasons = sorted({why for why in refusals.values() if why})
        return f"no persistent schedule fits: {reasons[0] if reasons else f'H = {problem.H} is one tile'}"
    return [c for c in found if c.resident == c.tiles(problem.H)] or found


def persistent(problem: Recurrence, device: Device) -> Iterator[LaunchConfig]:
    """Every persistent configuration, whether the device can run it or not: local ones, then exchanging ones."""
    key = (problem.kernel, problem.arithmetic)
    H = problem.H
    if device.wgmma:
        for largest, options in LOCAL.get(key, {}).items():
            if largest >= H:
                block = max(power_of_two(H), 16 if problem.kernel == "forward" else 64)
                for block_b, num_warps in options:
                    yield LaunchConfig(block_b, block, block, num_warps, schedule="persistent", resident=1, swap=True)
                break
        for tile in PERSISTENT_TILES.get(key, ()):
            if tile.block_h < H <= LARGEST_RESIDENT[problem.arithmetic]:
                yield from _resident(tile, problem, device)
    block_k, num_stages, tiles = STREAMED[problem.arithmetic]
    for block_b, block_h in tiles:
        if block_h < H and block_b <= max(power_of_two(problem.B), SMALLEST):
            yield LaunchConfig(block_b, block_h, block_k, 8, num_stages, schedule="persistent", max_registers=255)


def _resident(tile: Tile, problem: Recurrence, device: Device) -> Iterator[LaunchConfig]:
    """A tile with as much of the weights on chip as fits, for several numbers of batch rows."""
    block_k = min(tile.block_k, power_of_two(problem.H))
    config = LaunchConfig(
        tile.block_b, tile.block_h, block_k, tile.num_warps, 2, schedule="persistent", ahead=tile.ahead, swap=tile.swap,
        max_registers=255 if problem.arithmetic == "fp32" else None,
    )  # fmt: skip
    config = replace(config, resident=config.tiles(problem.H))
    while config.resident and config.shared_memory(problem) > device.shared_memory:
        config = replace(config, resident=config.resident - 1)
    if config.resident < config.tiles(problem.H) and tile.block_b > 64:
        return  # spills
    for rows in (8, 16, 32, 64, 128):  # whatever B is: what is compiled does not depend on it
        if rows <= tile.block_b:
            yield replace(config, rows=rows)


# The constants of estimate(), from public numbers of H100s: times in microseconds, bytes and multiply-adds per microsecond.
LAUNCH, BARRIER, STEP = 2.5, 1.2, 0.7  # STEP: a step's own latencies, whatever its size
L2_PROGRAM, L2_DEVICE = 42e3, 5.5e6  # bytes
MULTIPLY_ADDS = {"half": 1.7e6, "tf32": 0.85e6, "fp32": 0.2e6, "fp64": 0.1e6}  # of a multiprocessor


def estimate(config: LaunchConfig, problem: Recurrence, device: Device) -> float:
    """Microseconds of the whole recurrence, roughly: good for a comparison, not for a promise."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    local = config.local(problem.H)
    segments, width = (1, 4) if problem.kernel == "forward" else (4, 1)
    K, N = segments * config.tiles(problem.H) * config.block_k, width * config.block_h
    if device.wgmma and problem.arithmetic in ("half", "tf32"):
        M, N = (max(N, 64), config.block_b) if config.swap else (max(config.block_b, 64), N)
    else:
        M = config.block_b
    multiply = M * N * K / MULTIPLY_ADDS[problem.arithmetic]
    states = 0 if local else min(config.rows, problem.B) * segments * problem.H * problem.element_size
    weights = (config.tiles(problem.H) - config.resident) * config.block_k * 4 * config.block_h * problem.element_size
    persistent = config.schedule == "persistent"
    launches = rounds(config, problem, device) if persistent else 1
    at_once = ceil_div(x * y * z, launches)
    waves = ceil_div(at_once, device.multiprocessors)
    moved = max((states + weights) / L2_PROGRAM, at_once * (states + weights) / L2_DEVICE / waves)
    wait = 0 if local else BARRIER if persistent else LAUNCH
    return problem.T * launches * (wait + waves * (STEP + multiply + moved))


def rounds(config: LaunchConfig, problem: Recurrence, device: Device) -> int:
    """Launches that a persistent configuration needs for all batch tiles, since its programs must all run at once."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    if config.local(problem.H):
        return 1  # nobody waits for anybody
    at_once = device.multiprocessors // (x * z)
    return ceil_div(y, at_once) if at_once else 0


def refusal(config: LaunchConfig, problem: Recurrence, device: Device) -> str | None:
    """Why a device cannot run a persistent configuration; None if it can."""
    if problem.T == 1:
        return "one step needs one launch"
    if not device.shared_memory:
        return f"the shared memory of {device.name} is not known"
    need = config.shared_memory(problem)
    if need > device.shared_memory:
        return f"needs {need} bytes of shared memory for each program, {device.name} has {device.shared_memory}"
    if rounds(config, problem, device) == 0:
        x, _, z = config.grid(problem.H, problem.B, problem.R)
        return f"needs {x * z} programs at once for a batch tile, {device.name} runs {device.multiprocessors}"
    return None


def describe_persistent(config: LaunchConfig, problem: Recurrence, device: Device | None) -> str:
    n = 1 if device is None else rounds(config, problem, device)
    words = "one launch for the whole sequence" if n == 1 else f"{n} launches, each for the whole sequence of some rows"
    on_chip = config.resident / config.tiles(problem.H)
    words += ", weights on chip" if on_chip == 1 else f", {on_chip:.0%} of the weights on chip" if on_chip else ""
    x = config.grid(problem.H, problem.B, problem.R)[0]
    return words + (", no barrier" if config.local(problem.H) else f", a barrier among {x} programs in each step")


def check_waiting(programs: int) -> None:
    """Raise RuntimeError where programs that wait for one another would wait forever."""
    if compiled.INTERPRETED and programs > 1:
        raise RuntimeError(
            f"the interpreter runs programs one after another, and these {programs} would wait for one another: "
            "expected a configuration with one hidden tile, or a launch for each step"
        )


COUNTER = 16  # int64 elements from one barrier's counter to the next: a cache line


def launch_persistent(launch: Launch, buffers: Any, rows: Rows) -> None:
    problem, config = launch.problem, launch.config
    config.check(problem.H)
    if rows.lengths is not None:  # no one writes what lies past a row's length, nor the states of a row without steps
        if problem.kernel == "forward":
            buffers.h_ptr.zero_()
            buffers.hn_ptr.zero_() if buffers.h0_ptr is None else buffers.hn_ptr.copy_(buffers.h0_ptr)
        else:
            h_prev, dgates = buffers.h_prev_ptr, buffers.dgates_ptr
            if dgates is buffers.gates_ptr:
                buffers = buffers._replace(gates_ptr=dgates.clone())
            dgates.zero_(), h_prev.zero_()
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    waits = not config.local(problem.H)
    meta = dict(
        R=problem.R, H=problem.H, DIRECTIONS=launch.directions, PRECISION=launch.precision,
        INTERPRET_BF16=launch.interpret_bf16, CELL=CELL[problem.kernel], SWAP=config.swap, RESIDENT=config.resident,
        AHEAD=config.ahead, ROWS=config.rows, BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k,
        # Where a program waits for others, the driver must let all of them run at once, or refuse.
        launch_cooperative_grid=waits, **options_of(config),
    )  # fmt: skip
    if waits:
        check_waiting(x)
    per_launch = y if launch.device is None else ceil_div(y, rounds(config, problem, launch.device))
    for tile in range(0, y, per_launch):
        now = min(per_launch, y - tile)
        arrived = torch.zeros(z, now, COUNTER, dtype=torch.int64, device=buffers.w_hh_ptr.device)
        args = (buffers, pointers(rows), arrived, tile, rows.T, problem.B, rows.stride_t, rows.stride_b)
        PERSISTENT.kernels[problem.kernel][x, now, z](*args, **meta)


STEPWISE = Schedule(
    "stepwise",
    {"forward": step_kernels.lstm_forward_step, "backward": step_kernels.lstm_backward_step},
    stepwise_candidates, stepwise_refusal, estimate, describe_stepwise, launch_stepwise,
)  # fmt: skip
PERSISTENT = Schedule(
    "persistent",
    {"forward": lstm_forward_kernel, "backward": lstm_backward_kernel},
    persistent_candidates, refusal, estimate, describe_persistent, launch_persistent,
)  # fmt: skip
SCHEDULES = {schedule.name: schedule for schedule in (STEPWISE, PERSISTENT)}
