"""The stepwise schedule: a launch for each time step. Any size, any GPU, and Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch

from ..call import Rows
from ..kernels.cell import Zoneout
from ..kernels.stepwise import Constants, lstm_backward_step, lstm_forward_step
from . import relatives
from .schedule import (
    CELLS,
    INTERPRETED,
    SMALLEST,
    Device,
    Kernel,
    Launch,
    Recurrence,
    Schedule,
    ceil_div,
    check_integer,
    pointers,
    power_of_two,
    zoneout,
)


@dataclass(frozen=True)
class StepwiseConfig:
    """How the stepwise kernels are cut into programs and compiled.

    A program owns ``block_h`` hidden units of ``block_b`` batch rows, and walks its reduction in tiles of ``block_k``.
    """

    schedule: ClassVar[str] = "stepwise"

    block_b: int
    block_h: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None  # of a thread; None: the compiler chooses, and may choose too few and spill

    def __post_init__(self) -> None:
        for name in ("block_b", "block_h", "block_k"):
            size = getattr(self, name)
            check_integer(name, size, SMALLEST, 1024)
            if size != power_of_two(size):
                raise ValueError(f"{name} should be a power of two, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps should be a power of two from 1 to 32, got {self.num_warps!r}")
        check_integer("num_stages", self.num_stages, 1, 10)
        if self.max_registers is not None:
            check_integer("max_registers", self.max_registers, 24, 255)

    def grid(self, H: int, B: int, R: int) -> tuple[int, int, int]:
        return ceil_div(H, self.block_h), ceil_div(B, self.block_b), R


class Tiles(NamedTuple):
    """The tiles open to the stepwise schedule for one kind of arithmetic; none of them spills on sm_90."""

    min_block_b: int
    max_block_b: int
    blocks_h: tuple[int, ...]
    block_k: int
    num_warps: int = 8
    max_registers: int | None = None


TILES = {
    "half": Tiles(SMALLEST, 64, (32, 16), 64, max_registers=255),
    "tf32": Tiles(64, 64, (32, 16), 32),
    "fp32": Tiles(SMALLEST, 64, (16,), 16, max_registers=255),
    "fp64": Tiles(SMALLEST, 16, (16,), 16, num_warps=4),
}


def candidates(problem: Recurrence, device: Device | None = None) -> list[StepwiseConfig]:
    """Every configuration with a launch for each time step."""
    tiles = TILES[problem.arithmetic]
    block_b = min(max(power_of_two(problem.B), tiles.min_block_b), tiles.max_block_b)
    return [
        StepwiseConfig(block_b, block_h, tiles.block_k, tiles.num_warps, max_registers=tiles.max_registers)
        for block_h in tiles.blocks_h
        if block_h <= max(problem.H, SMALLEST)
    ]


def unsuitable(problem: Recurrence, device: Device) -> None:
    """Nothing: any device runs a launch for each step."""


def refusal(config: StepwiseConfig, problem: Recurrence, device: Device) -> None:
    """Nothing, likewise."""


# What the model below reckons with, in microseconds and bytes or multiply-adds per microsecond: public numbers of H100s.
LAUNCH, STEP = 2.5, 0.7  # STEP: a step's own latencies, whatever its size
L2_PROGRAM, L2_DEVICE = 42e3, 5.5e6  # bytes
MULTIPLY_ADDS = {"half": 1.7e6, "tf32": 0.85e6, "fp32": 0.2e6, "fp64": 0.1e6}  # of a multiprocessor


def estimate(config: StepwiseConfig, problem: Recurrence, device: Device) -> float:
    """Microseconds of the whole recurrence, roughly: good for a comparison, not for a promise."""
    if problem.relative.norm:  # a GEMM, then a launch that reads what it wrote; about 64 bytes for each unit
        return problem.T * (2 * (LAUNCH + STEP) + 64 * problem.B * problem.R * problem.H / L2_DEVICE)
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    segments, width = (1, 4) if problem.kernel == "forward" else (4, 1)
    K, N = segments * ceil_div(problem.H, config.block_k) * config.block_k, width * config.block_h
    M = max(config.block_b, 64) if device.wgmma and problem.arithmetic in ("half", "tf32") else config.block_b
    multiply = M * N * K / MULTIPLY_ADDS[problem.arithmetic]
    states = min(config.block_b, problem.B) * segments * problem.H * problem.element_size
    weights = ceil_div(problem.H, config.block_k) * config.block_k * 4 * config.block_h * problem.element_size
    waves = ceil_div(x * y * z, device.multiprocessors)
    moved = max((states + weights) / L2_PROGRAM, x * y * z * (states + weights) / L2_DEVICE / waves)
    return problem.T * (LAUNCH + waves * (STEP + multiply + moved))


def describe(config: StepwiseConfig, problem: Recurrence) -> str:
    if problem.relative.norm:
        programs = problem.B * problem.R
        return f"for each of {problem.T} steps a GEMM and a launch of {programs} programs, one for each row"
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    programs = f"{x} x {y} x {z} programs of {config.block_h} units x {config.block_b} rows"
    return f"{problem.T} launches, one for each time step; {programs}"


@lru_cache(maxsize=1024)
def stepwise_kernel(
    kernel: str, arithmetic: str, dtype: torch.dtype, R: int, H: int, directions: int, config: StepwiseConfig,
    zone: Zoneout | None = None,
) -> Kernel:  # fmt: skip
    """A kernel for problems of any T and B."""
    precision = "tf32" if arithmetic == "tf32" else "ieee"
    bf16 = INTERPRETED and dtype == torch.bfloat16
    constants = Constants(R, H, directions, precision, bf16, config.block_b, config.block_h, config.block_k, zone)
    only_nvidia = {} if torch.version.hip else {"maxnreg": config.max_registers}
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **only_nvidia)
    return Kernel(STEPWISE.kernels, kernel, (CELLS[kernel], constants), options)


def launch(launch: Launch, buffers: Any, rows: Rows) -> None:
    p, T = launch.problem, rows.T
    if p.relative.norm:
        relatives.launch(launch, buffers, rows)
        return
    if launch.kernel is None:
        what = p.kernel, p.arithmetic, launch.dtype, p.R, p.H, launch.directions, launch.config, zoneout(p.relative)
        launch.kernel, launch.grid = stepwise_kernel(*what), launch.config.grid(p.H, rows.B, p.R)
    steps = range(T) if p.kernel == "forward" else range(T - 1, -1, -1)
    size = rows.size
    launch.kernel.run(launch.grid, buffers, pointers(rows), [(s, *size) for s in steps])


STEPWISE = Schedule(
    "stepwise", StepwiseConfig, {"forward": lstm_forward_step, "backward": lstm_backward_step},
    unsuitable, candidates, refusal, estimate, describe, launch,
)  # fmt: skip
