"""Compile the kernels of a step for GPUs that need not be there, and read what became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from fused_lstm.kernels.buffers import Backward, Forward
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lstm.call import Rows, accumulator_dtype
from fused_lstm.cell import Cell
from fused_lstm.launch import relatives
from fused_lstm.launch.schedule import INTERPRETED, Launch, Recurrence, arithmetic, pointers
from fused_lstm.launch.stepwise import STEPWISE, StepwiseConfig, stepwise_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
TORCHS = Cell()
# Of cells with norms, buffers in the accumulator's dtype.
WIDE = {"running", "passed", "c_prev", "c_centered", "c_rstd", "products", "products_rstd", "dshown", "dh"}
TENSOR_CORE = ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Built:
    """What the compiler made of one kernel. What is read from machine code is read from NVIDIA's only."""

    shared: int  # bytes of shared memory for each program
    ttir: str
    registers: int = 0  # for each thread
    spills: int = 0  # bytes of stack for each thread
    cubin: bytes = field(default=b"", repr=False)

    @property
    def tensor_core(self) -> int:
        """How many instructions for tensor cores."""
        sass = tool(self.cubin, "nvdisasm", "-c", "-ndf")
        counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE))
        return sum(counts[name] for name in TENSOR_CORE)


class Absent:
    """A driver of a GPU that need not be there: what Triton asks in order to compile for it."""

    def __init__(self, target: str) -> None:
        self.target, self.number = TARGETS[target], list(TARGETS).index(target)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiler:
    """In a kernel's place, compiles it for the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)

        return launch


def compile_kernel(
    kind: str, config: StepwiseConfig, target: str, dtype: torch.dtype, tf32: bool, H: int, R: int = 1, directions: int = 1,
    absent: Sequence[str] = (), rows: Sequence[str] = (), cell: Cell = TORCHS,
) -> Built:  # fmt: skip
    """Compile ``kind`` ("forward" or "backward") for ``target``.

    ``absent`` names buffers that are None, ``rows`` what the sequences have: "lengths" or "packed", "resets".
    """
    data = torch.zeros(16, dtype=dtype)
    fields = {"forward": Forward, "backward": Backward}[kind]
    buffers = fields(*(None if name in absent or name in fields._field_defaults else data for name in fields._fields))
    running = data.to(accumulator_dtype(dtype))
    buffers = buffers._replace(running_ptr=running, units_ptr=data if cell.peephole else None)
    if any(cell.zoneout):
        seed = None if "seed_ptr" in absent else torch.zeros(1, dtype=torch.int64)
        buffers = buffers._replace(seed_ptr=seed, **{"passed_ptr": running} if kind == "backward" else {})
    sequences = _sequences(directions, rows)
    problem = Recurrence(kind, arithmetic(dtype, tf32), 2, H, 1, R, cell.relative)
    stepwise_kernel.cache_clear()  # of one for another kind of GPU
    launch = Launch(problem, config, STEPWISE, None, directions, dtype)
    return built(STEPWISE.kernels, kind, target, lambda: STEPWISE.launch(launch, buffers, sequences))


def compile_cell(
    kind: str, cell: Cell, target: str, dtype: torch.dtype, H: int, R: int = 1, directions: int = 1,
    absent: Sequence[str] = (), rows: Sequence[str] = (),
) -> Built:  # fmt: skip
    """Likewise the step of a cell with norms."""
    data = torch.zeros(16, dtype=dtype)
    fields, wide = {"forward": Forward, "backward": Backward}[kind], data.to(accumulator_dtype(dtype))
    given = {name: wide if name.removesuffix("_ptr") in WIDE else data for name in fields._fields}
    given |= dict.fromkeys(absent) | {"seed_ptr": None if "seed_ptr" in absent else torch.zeros(1, dtype=torch.int64)}
    relatives._kernel.cache_clear()

    def launch() -> None:
        kernel = relatives._kernel(kind, cell.relative, dtype, R, H, directions)
        kernel.run((1, R, 1), fields(**given), pointers(_sequences(directions, rows)), [(0, 2, 1, 1, 1)])

    return built(relatives.KERNELS, kind, target, launch)


def built(kernels: dict[str, Any], kind: str, target: str, launch: Callable[[], None]) -> Built:
    """What becomes of a kernel that is launched."""
    assert not INTERPRETED
    compiler = Compiler(kernels[kind])
    driver.set_active(Absent(target))
    try:
        rocm = "7" if TARGETS[target].backend == "hip" else None
        with patch.dict(kernels, {kind: compiler}), patch.object(torch.version, "hip", rocm):
            launch()
    finally:
        driver._active = None  # whichever there is, found when it is asked for
    compiled = compiler.compiled
    what = {"shared": compiled.metadata.shared, "ttir": compiled.asm["ttir"]}
    if "cubin" not in compiled.asm:
        return Built(**what)
    usage = tool(compiled.asm["cubin"], "cuobjdump", "-res-usage")
    registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(**what, registers=registers, spills=spills, cubin=compiled.asm["cubin"])


def _sequences(directions: int, rows: Sequence[str]) -> Rows:
    lengths = torch.ones(1, dtype=torch.int64) if {"lengths", "packed"} & {*rows} else None
    resets = torch.zeros(1, dtype=torch.bool) if "resets" in rows else None
    return Rows(2, 1, False, directions, lengths, lengths if "packed" in rows else None, resets)


def tool(cubin: bytes, name: str, *options: str) -> str:
    """What one of NVIDIA's tools says of machine code."""
    command = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(command), *options, file.name], capture_output=True, text=True, check=True).stdout


TRAINING = {"rows": ("lengths", "resets")}  # the most demanding flags
ARITHMETIC = {
    "fp16": (torch.float16, False), "bf16": (torch.bfloat16, False), "tf32": (torch.float32, True),
    "fp32": (torch.float32, False), "fp64": (torch.float64, False),
}  # fmt: skip


def kind_of(name: str) -> str:
    return arithmetic(*ARITHMETIC[name])
