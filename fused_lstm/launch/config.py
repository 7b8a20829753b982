"""What a launch is chosen for, and by: a recurrence, a device and a configuration. Pure: needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    wgmma: bool = False  # tensor cores that multiply from shared memory: sm_90 and sm_100


KERNELS = ("forward", "backward")
SCHEDULES = ("stepwise", "persistent")
ARITHMETICS = ("half", "tf32", "fp32", "fp64")


def _check(name: str, value: object, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} should be an integer {bounds}, got {value!r}")


@dataclass(frozen=True)
class Recurrence:
    """One layer's recurrence, as a problem for one kernel."""

    kernel: str  # "forward" or "backward"
    arithmetic: str  # "half", "tf32", "fp32" or "fp64"
    T: int
    H: int  # as the kernels see it: a multiple of 16
    B: int
    R: int  # recurrences of one launch

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or self.arithmetic not in ARITHMETICS:
            raise ValueError(
                f"kernel should be one of {', '.join(KERNELS)} and arithmetic one of {', '.join(ARITHMETICS)}, "
                f"got {self.kernel!r} and {self.arithmetic!r}"
            )
        for name in ("T", "H", "B", "R"):
            _check(name, getattr(self, name), 1)

    @property
    def element_size(self) -> int:
        return {"half": 2, "fp64": 8}.get(self.arithmetic, 4)


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut into programs and compiled.

    A program owns ``block_h`` hidden units of ``rows`` batch rows, in a tile of ``block_b``, and walks its reduction in
    tiles of ``block_k``. ``schedule`` names the record in schedules.py that launches it. Of a persistent one the first
    ``resident`` tiles of the weights of each gate stay on chip, and the rest is streamed; ``swap`` puts the gates where the
    tensor cores have their 64 rows, for small batch tiles; ``ahead`` loads of states are under way at a time.
    """

    block_b: int
    block_h: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    schedule: str = "stepwise"
    resident: int = 0
    ahead: int = 1
    swap: bool = False
    rows: int = 0  # 0: block_b
    max_registers: int | None = None  # of a thread; None: the compiler chooses, and may choose too few and spill

    def __post_init__(self) -> None:
        for name in ("block_b", "block_h", "block_k"):
            size = getattr(self, name)
            _check(name, size, SMALLEST, 1024)
            if size != power_of_two(size):
                raise ValueError(f"{name} should be a power of two, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps should be a power of two from 1 to 32, got {self.num_warps!r}")
        _check("num_stages", self.num_stages, 1, 10)
        _check("resident", self.resident, 0)
        _check("ahead", self.ahead, 0)
        if self.max_registers is not None:
            _check("max_registers", self.max_registers, 24, 255)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule should be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if type(self.swap) is not bool:
            raise ValueError(f"swap should be a bool, got {self.swap!r}")
        if self.rows == 0:
            object.__setattr__(self, "rows", self.block_b)
        _check("rows", self.rows, 1, self.block_b)
        if self.schedule == "stepwise":
            if self.resident:
                raise ValueError("resident weights need the persistent schedule: a launch for each step keeps nothing")
            if self.swap or self.rows != self.block_b:
                raise ValueError("swap and rows need the persistent schedule: a launch for each step fills its tiles")

    def tiles(self, H: int) -> int:
        """Tiles of the reduction over the units of one gate."""
        return ceil_div(H, self.block_k)

    def local(self, H: int) -> bool:
        """Whether one program has all hidden units, so that nothing is exchanged between programs."""
        return self.schedule == "persistent" and self.block_h >= H

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
        """An upper bound of what a program keeps in shared memory, in bytes, by the persistent schedule."""
        size, columns = problem.element_size, self.block_h * (4 if problem.kernel == "forward" else 1)
        weights = self.resident * self.block_k * 4 * self.block_h * size
        staging = (self.ahead + 1) * self.block_b * self.block_k * size
        if self.local(problem.H):
            staging = 4 * self.block_b * self.block_k * size
        elif self.resident < self.tiles(problem.H):  # the pipeline of what is streamed
            staging += self.num_stages * (self.block_b + columns) * self.block_k * size
        layouts = self.block_b * (columns + 16) * (8 if problem.arithmetic == "fp64" else 4)
        return weights + max(staging, layouts) + 2048


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """The kind of arithmetic of a dtype, with fp32 products in TF32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"
