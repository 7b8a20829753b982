"""What the kernels cost, read from their compilation for GPUs that need not be there.

    python bench/ledger.py [--arch sm_90] [--dtype bf16] [--hidden 512] [--json FILE]

Prints, for each configuration that is chosen for an architecture: registers and spills of a thread, shared memory of a
program, tensor-core instructions, barriers and instructions in the loop over time, bytes that pass through L2 in a step, and
the loads of W_hh that stand in that loop and before it (as instructions of Triton's GPU code, one for each tile). Needs
Triton, no GPU; everything takes some minutes. Batches of 1, 16, 64, 128 and 2048 rows are asked for, and each configuration
that is chosen for one of them is listed once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from fused_lstm.kernels import stepwise
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lstm.call import Rows, accumulator_dtype
from fused_lstm.launch import FP64
from fused_lstm.launch.choose import choose
from fused_lstm.launch.config import KERNELS, Device, LaunchConfig, Recurrence, arithmetic
from fused_lstm.launch.schedules import SCHEDULES, Launch

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
NAME = re.compile(r"%[\w$.#-]+")  # of a value in Triton's GPU code
TENSOR_CORE = ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Built:
    """What the compiler made of one kernel. Registers, spills and instructions are read from NVIDIA machine code only."""

    shared: int  # bytes of shared memory for each program
    ttir: str
    w_loads_in_loop: int  # loads of W_hh within the loop over time, and before it, in Triton's GPU code
    w_loads_before: int
    registers: int = 0  # for each thread
    spills: int = 0  # bytes of stack for each thread
    instructions: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)  # those in the loop over time

    @property
    def tensor_core(self) -> int:
        return sum(self.instructions[name] for name in TENSOR_CORE)


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
    kind: str, config: LaunchConfig, target: str, dtype: torch.dtype, tf32: bool, H: int, R: int = 1, directions: int = 1,
    absent: Sequence[str] = (), rows: Sequence[str] = (),
) -> Built:  # fmt: skip
    """Compile ``kind`` ("forward" or "backward") for ``target``.

    ``absent`` names buffers that are None, ``rows`` what the sequences have: "lengths" or "packed", "resets".
    """
    data = torch.zeros(16, dtype=dtype)
    fields = {"forward": stepwise.Forward, "backward": stepwise.Backward}[kind]
    buffers = fields(*(None if name in absent else data for name in fields._fields))
    buffers = buffers._replace(running_ptr=data.to(accumulator_dtype(dtype)))
    lengths = torch.ones(1, dtype=torch.int64) if {"lengths", "packed"} & {*rows} else None
    resets = torch.zeros(1, dtype=torch.bool) if "resets" in rows else None
    sequences = Rows(1, 1, False, directions, lengths, lengths if "packed" in rows else None, resets)
    schedule = SCHEDULES[config.schedule]
    compiler = Compiler(schedule.kernels[kind])
    problem = Recurrence(kind, arithmetic(dtype, tf32), 1, H, 1, R)
    driver.set_active(Absent(target))
    try:
        rocm = "7" if TARGETS[target].backend == "hip" else None
        with patch.dict(schedule.kernels, {kind: compiler}), patch.object(torch.version, "hip", rocm):
            schedule.launch(Launch(problem, config, None, directions, dtype), buffers, sequences)
    finally:
        driver._active = None  # whichever there is, found when it is asked for
    compiled = compiler.compiled
    built = {"shared": compiled.metadata.shared, "ttir": compiled.asm["ttir"]}
    place = [name for name in fields._fields if name not in absent].index("w_hh_ptr")
    built |= zip(("w_loads_in_loop", "w_loads_before"), loads(compiled.asm["ttgir"], place), strict=True)
    if "cubin" not in compiled.asm:
        return Built(**built)
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(**built, registers=registers, spills=spills, instructions=count(sass), loop=count(time_loop(sass)))


def loads(ttgir: str, place: int) -> tuple[int, int]:
    """How many loads of a kernel's parameter stand in the loop over time, the first in the code, and how many outside it."""
    parameters = re.findall(r"(%[\w.]+): ", ttgir[ttgir.index("tt.func") :].splitlines()[0])
    pointers, depth, loop, inside, outside = {parameters[place]}, 0, None, 0, 0
    for line in ttgir.splitlines():
        results, _, operation = line.strip().partition(" = ")
        operands = NAME.findall(operation)
        if operation.startswith("scf.for"):
            loop = depth if loop is None else loop
            pointers |= {
                carried for carried, start in re.findall(r"(%[\w$.#-]+) = (%[\w$.#-]+)", operation) if start in pointers
            }
        elif operation.startswith(("tt.load", "ttg.async_copy_global_to_local")):
            if operands[0] in pointers:
                inside, outside = inside + (loop is not None), outside + (loop is None)
        elif "!tt.ptr" in operation and "tt.func" not in line and pointers.intersection(operands):
            pointers.update(NAME.findall(results))
        depth += line.count("{") - line.count("}")
        if loop is not None and depth <= loop:
            break
    return inside, outside


def time_loop(sass: str) -> str:
    """The machine code of the widest loop: the one over time, which has all others in it."""
    labels, jumps, widest = {}, [], ""
    lines = sass.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        if jump := re.search(r"\bBRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)", line):
            jumps.append((number, jump[1]))
    for number, label in jumps:
        if labels.get(label, number) < number:
            widest = max(widest, "\n".join(lines[labels[label] : number + 1]), key=len)
    return widest


def count(sass: str) -> Counter[str]:
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        return output(str(tools / "cuobjdump"), "-res-usage"), output(str(tools / "nvdisasm"))


TRAINING = {"rows": ("lengths", "resets")}  # the most demanding flags
ARITHMETIC = {
    "fp16": (torch.float16, False), "bf16": (torch.bfloat16, False), "tf32": (torch.float32, True),
    "fp32": (torch.float32, False), "fp64": (torch.float64, False),
}  # fmt: skip
# The devices for which configurations are chosen; numbers from the makers' data sheets.
DEVICES = {
    "sm_80": Device("A100", 108, SHARED_LIMIT["sm_80"]),
    "sm_90": Device("H100", 132, SHARED_LIMIT["sm_90"], wgmma=True),
    "sm_100": Device("B200", 148, SHARED_LIMIT["sm_100"], wgmma=True),
    "gfx942": Device("MI300X", 304, SHARED_LIMIT["gfx942"]),
}
SIZES = [64, 128, 256, 512, 528, 640, 656, 768, 1024, 1152, 2048]  # powers of two, and padded ones of bench/workloads.py


def kind_of(name: str) -> str:
    return arithmetic(*ARITHMETIC[name])


def chosen(
    name: str, device: Device, sizes: Sequence[int] = SIZES, batches: Sequence[int] = (1, 16, 64, 128, 2048)
) -> list[tuple[Recurrence, LaunchConfig]]:
    """What choose() picks for batches of several sizes: each configuration once for each hidden size and kernel."""
    found = {}
    for kernel in KERNELS:
        for H in sizes:
            for B in batches:
                problem = Recurrence(kernel, kind_of(name), 100, H, B, 1)
                config = choose(problem, device).config
                found.setdefault((kernel, H, replace(config, rows=config.block_b)), (problem, config))
    return list(found.values())


def exchanged(config: LaunchConfig, problem: Recurrence) -> int:
    """Bytes that all programs together move through L2 in a step: states read and written, weights that are streamed."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    width = problem.H * problem.element_size * (1 if problem.kernel == "forward" else 4)
    states = 0 if config.local(problem.H) else (x + 1) * problem.B * problem.R * width
    streamed = (config.tiles(problem.H) - config.resident) * config.block_k * 4 * config.block_h * problem.element_size
    return states + x * y * z * streamed


def row(name: str, target: str, problem: Recurrence, config: LaunchConfig) -> dict[str, Any]:
    """One record of the ledger."""
    built = compile_kernel(problem.kernel, config, target, *ARITHMETIC[name], problem.H, **TRAINING)
    return {
        "kernel": problem.kernel, "arch": target, "dtype": name, "H": problem.H, "B": problem.B,
        "schedule": config.schedule, "config": asdict(config),
        "registers": built.registers, "spills": built.spills, "shared": built.shared,
        "tensor_core": built.tensor_core, "instructions": built.instructions.total(),
        "loop_instructions": built.loop.total(), "loop_barriers": built.loop["BAR"],
        "loop_tensor_core": sum(built.loop[n] for n in TENSOR_CORE), "l2_bytes_per_step": exchanged(config, problem),
        "w_hh_loads_in_loop": built.w_loads_in_loop, "w_hh_loads_before_loop": built.w_loads_before,
    }  # fmt: skip


COLUMNS = {
    "arch": 7, "kernel": 8, "dtype": 5, "H": 5, "B": 5, "schedule": 10, "registers": 9, "spills": 6, "shared": 7,
    "tensor_core": 11, "loop_tensor_core": 16, "loop_barriers": 13, "loop_instructions": 17, "l2_bytes_per_step": 17,
    "w_hh_loads_in_loop": 18, "w_hh_loads_before_loop": 22,
}  # fmt: skip


NVIDIA_ONLY = {"registers", "spills", "tensor_core", "loop_tensor_core", "loop_barriers", "loop_instructions"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(TARGETS), nargs="+", default=["sm_90"])
    parser.add_argument("--dtype", choices=list(ARITHMETIC), nargs="+", default=list(ARITHMETIC))
    parser.add_argument("--hidden", type=int, nargs="+", default=SIZES, metavar="H", help="hidden sizes, multiples of 16")
    parser.add_argument("--json", type=Path, help="write {'rows': [...]} to this file")
    args = parser.parse_args()
    if any(H < 16 or H % 16 for H in args.hidden):
        parser.error(f"--hidden should be multiples of 16, to which the layer pads, got {args.hidden}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    print(f"Triton {triton.__version__}; registers, spills and instructions are known for NVIDIA targets only")
    print(*(f"{name:>{width}}" for name, width in COLUMNS.items()), "config")
    rows = []
    for target in args.arch:
        for name in args.dtype:
            if name == "fp64" and not FP64:
                print(f"{target}: fp64 needs Triton 3.9 or newer")
                continue
            for problem, config in chosen(name, DEVICES[target], args.hidden):
                rows.append(row(name, target, problem, config))
                tile = f"{config.block_b}x{config.block_h}x{config.block_k}, {config.num_warps} warps"
                tile += f", {config.resident} tiles on chip" + (", swapped" if config.swap else "")
                hidden = set() if TARGETS[target].backend == "cuda" else NVIDIA_ONLY
                cells = {key: "-" if key in hidden else rows[-1][key] for key in COLUMNS}
                print(*(f"{cells[key]:>{width}}" for key, width in COLUMNS.items()), tile, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
