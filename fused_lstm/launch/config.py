"""What a launch is chosen for, and by: a recurrence, a device and a configuration. Pure: needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    capability: tuple[int, int] = (0, 0)  # of an NVIDIA GPU

    @property
    def wgmma(self) -> bool:
        """Whether its tensor cores multiply from shared memory."""
        return self.capability[0] in (9, 10)


KERNELS = ("forward", "backward")
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
            _check(name, size, SMALLEST, 1024)
            if size != power_of_two(size):
                raise ValueError(f"{name} should be a power of two, got {size}")
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps should be a power of two from 1 to 32, got {self.num_warps!r}")
        _check("num_stages", self.num_stages, 1, 10)
        if self.max_registers is not None:
            _check("max_registers", self.max_registers, 24, 255)

    def grid(self, H: int, B: int, R: int) -> tuple[int, int, int]:
        return ceil_div(H, self.block_h), ceil_div(B, self.block_b), R


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """The kind of arithmetic of a dtype, with fp32 products in TF32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"
