"""How the kernels are cut into programs: configurations, and the choice among them for a problem and a device.

Everything here is pure and needs neither Triton nor a GPU, so that a choice can be tested, and explained, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# The largest tile of each dimension that Triton's dot product takes on every target is its smallest here.
SMALLEST = 16


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
    wgmma: bool = False  # tensor cores that multiply from shared memory: Hopper and newer


@dataclass(frozen=True)
class Recurrence:
    """One layer's recurrence, as a problem for one kernel."""

    kernel: str  # "forward" or "backward"
    arithmetic: str  # "half", "tf32", "fp32" or "fp64"
    T: int
    H: int  # as the kernels see it: a multiple of 16
    B: int
    R: int  # recurrences of one launch

    @property
    def element_size(self) -> int:
        return {"half": 2, "fp64": 8}.get(self.arithmetic, 4)


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs and compiled.

    A program owns ``block_h`` hidden units of ``rows`` batch rows, in a tile of ``block_b``, and walks its reduction in tiles
    of ``block_k``. The schedule is a launch for each time step, or, if ``persistent``, one for all of them; then the first
    ``resident`` tiles of the weights of each gate stay on chip, and the rest is streamed. ``swap`` puts the gates where
    the tensor cores have their 64 rows, for small batch tiles; ``ahead`` loads of states are under way at a time.
    """

    block_b: int
    block_h: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    persistent: bool = False
    resident: int = 0
    ahead: int = 1
    swap: bool = False
    rows: int = 0  # 0: block_b

    def __post_init__(self) -> None:
        for name in ("block_b", "block_h", "block_k"):
            size = getattr(self, name)
            if size < SMALLEST or size != power_of_two(size):
                raise ValueError(f"{name} should be a power of two of at least {SMALLEST}, got {size}")
        if not self.rows:
            object.__setattr__(self, "rows", self.block_b)
        if not 1 <= self.rows <= self.block_b:
            raise ValueError(f"rows should be between 1 and block_b = {self.block_b}, got {self.rows}")
        if self.resident and not self.persistent:
            raise ValueError("resident weights need the persistent schedule: a launch for each step keeps nothing")

    def tiles(self, H: int) -> int:
        """Tiles of the reduction over the units of one gate."""
        return ceil_div(H, self.block_k)

    def local(self, H: int) -> bool:
        """Whether one program has all hidden units, so that nothing is exchanged between programs."""
        return self.persistent and self.block_h >= H

    def check(self, H: int) -> None:
        """Raises ValueError where the configuration is none for H hidden units."""
        if self.resident > self.tiles(H):
            raise ValueError(f"resident should be at most the {self.tiles(H)} tiles of H = {H}, got {self.resident}")
        if self.local(H) and (self.block_k != self.block_h or self.resident != 1):
            raise ValueError(
                f"a program with all of H = {H} keeps its weights in one tile: block_k should be block_h and resident 1, "
                f"got {self.block_k} and {self.resident}"
            )

    def grid(self, H: int, B: int, R: int) -> tuple[int, int, int]:
        return ceil_div(H, self.block_h), ceil_div(B, self.rows), R

    def shared_memory(self, problem: Recurrence) -> int:
        """An upper bound of what a program keeps in shared memory, in bytes, for a kernel with resident weights."""
        weights = self.resident * self.block_k * 4 * self.block_h * problem.element_size
        staging = (self.ahead + 1) * self.block_b * self.block_k * problem.element_size
        if self.local(problem.H):
            staging = 4 * self.block_b * self.block_k * problem.element_size
        width = 4 if problem.kernel == "forward" else 1
        layouts = self.block_b * width * (self.block_h + 4) * (8 if problem.arithmetic == "fp64" else 4)
        return weights + max(staging, layouts) + 2048


def rounds(config: LaunchConfig, problem: Recurrence, device: Device) -> int:
    """Launches that a persistent configuration needs for all batch tiles, since its programs must all run at once."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    if config.local(problem.H):
        return 1  # nobody waits for anybody
    at_once = device.multiprocessors // (x * z)
    return ceil_div(y, at_once) if at_once else 0


def refusal(config: LaunchConfig, problem: Recurrence, device: Device) -> str | None:
    """Why a device cannot run a persistent configuration; None if it can."""
    need = config.shared_memory(problem)
    if need > device.shared_memory:
        return f"needs {need} bytes of shared memory for each program, {device.name} has {device.shared_memory}"
    if rounds(config, problem, device) == 0:
        x, _, z = config.grid(problem.H, problem.B, problem.R)
        return f"needs {x * z} programs at once for a batch tile, {device.name} runs {device.multiprocessors}"
    return None


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """The kind of arithmetic of a dtype, with fp32 products in TF32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"


@dataclass(frozen=True)
class Tiles:
    """The tiles open to the stepwise schedule for one kind of arithmetic.

    Bounded by registers (no spills on sm_90) and by the 64 KB of shared memory that every target has; tests/test_compile.py
    compiles each of them for each target.
    """

    max_block_b: int
    blocks_h: tuple[int, ...]  # largest first
    block_k: int
    wide: int  # tiles of at least this many elements take 8 warps
    num_stages: int = 2
    small_stages: int = 2  # of tiles with fewer than 512 elements

    def config(self, block_b: int, block_h: int) -> LaunchConfig:
        num_warps = 8 if block_b * block_h >= self.wide else 4
        num_stages = self.small_stages if block_b * block_h < 512 else self.num_stages
        return LaunchConfig(block_b, block_h, self.block_k, num_warps, num_stages)


STEPWISE = {
    "half": Tiles(max_block_b=64, blocks_h=(32, 16), block_k=64, wide=4096),
    "tf32": Tiles(max_block_b=64, blocks_h=(32, 16), block_k=32, wide=2048, small_stages=3),
    "fp32": Tiles(max_block_b=64, blocks_h=(16,), block_k=16, wide=512, num_stages=3, small_stages=3),
    "fp64": Tiles(max_block_b=16, blocks_h=(16,), block_k=16, wide=512),
}


def stepwise(problem: Recurrence, device: Device) -> LaunchConfig:
    """The largest tile of hidden units that still gives every multiprocessor a program."""
    tiles = STEPWISE[problem.arithmetic]
    block_b = min(max(power_of_two(problem.B), SMALLEST), tiles.max_block_b)
    for block_h in tiles.blocks_h:
        x, y, z = tiles.config(block_b, block_h).grid(problem.H, problem.B, problem.R)
        if block_h <= problem.H and x * y * z >= device.multiprocessors:
            break
    return tiles.config(block_b, block_h)


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from."""

    config: LaunchConfig
    reason: str
    measured: bool = False


def interpreted(problem: Recurrence) -> Choice:
    """For Triton's interpreter, whose time goes by the number of operations, not by their size."""
    if problem.H <= 64:
        block = max(power_of_two(problem.H), SMALLEST)
        return Choice(LaunchConfig(16, block, block, persistent=True, resident=1), "one program has all hidden units")
    return Choice(LaunchConfig(16, 64, 256), "the interpreter runs programs one after another, so that none may wait")


def choose(problem: Recurrence, device: Device | None) -> Choice:
    """The configuration for a problem; pure, so that it can be tested without a GPU.

    Args:
        problem: the recurrence.
        device: the GPU, or None for Triton's interpreter.
    """
    if device is None:
        return interpreted(problem)
    return Choice(stepwise(problem, device), "")
