"""Compile the persistent kernels for GPUs that need not be there, and read what became of them.

    python tests/persistent_build.py [TARGET ...]

prints a ledger of what the candidates for the workloads need on each target.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fused_lstm.kernels.buffers import Backward, Forward
from fused_lstm.kernels.rows import Sequences
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from fused_lstm.cell import Relative
from fused_lstm.launch import persistent
from fused_lstm.launch.persistent import PersistentConfig
from fused_lstm.launch.schedule import CELLS, Device, Recurrence

GPUS = {
    "sm_80": Device("A100", 108, 163 * 1024, (8, 0)),
    "sm_90": Device("H100", 132, 227 * 1024, (9, 0)),
    "sm_100": Device("B200", 148, 227 * 1024, (10, 0)),
    "sm_120": Device("RTX 5090", 170, 99 * 1024, (12, 0)),
}
# H as padded, B, recurrences and dtype of the shapes of bench/workloads.py.
WORKLOADS = [
    (128, 2, 1, "fp32"), (128, 2048, 1, "bf16"), (256, 4096, 1, "fp32"), (512, 256, 1, "fp32"), (528, 8, 1, "fp32"),
    (640, 16, 1, "bf16"), (2048, 16, 2, "bf16"), (1024, 128, 1, "fp16"), (1024, 128, 2, "fp16"), (192, 1503, 2, "fp32"),
    (768, 16, 1, "bf16"), (768, 16, 1, "fp16"), (128, 256, 1, "fp32"), (1024, 64, 1, "fp16"), (256, 48, 2, "fp16"),
    (512, 64, 1, "fp32"),
]  # fmt: skip
PLAIN: dict[str, Any] = {"directions": 1, "absent": ()}
RAGGED: dict[str, Any] = {"directions": 2, "absent": ("starts",)}
PACKED: dict[str, Any] = {"directions": -1, "absent": ("resets", "h0", "c0", "b_hh", "dhn", "dcn")}


@dataclass(frozen=True)
class Built:
    registers: int  # of a thread
    spills: int  # bytes of stack of a thread
    shared: int  # bytes of shared memory of a program
    seconds: float  # of processors' time
    loop: Counter[str]  # instructions in the loop over turns


def build(
    kernel: str, config: PersistentConfig, H: int, R: int, dtype: str, target: str, directions: int, absent: tuple,
    cell: str = "",
) -> Built:  # fmt: skip
    """Compile a kernel for tensors of all kinds but those that are absent."""
    function = persistent.KERNELS[kernel if config.form == "whole" else f"{kernel} {config.form}"]
    gpu = GPUS[target]
    relative = Relative.of(cell)
    cut = persistent.fragments(config, H, R, directions, gpu.capability >= (9, 0), relative)
    types = {"lengths": "*i64", "starts": "*i64", "resets": "*u8", "box": "*i64", "seed": "*i64", "passed": "*fp32"}
    norms = ("c_prev", "c_centered", "c_rstd", "products", "products_rstd", "dshown")
    types |= dict.fromkeys(norms, "*fp32")
    absent = (*absent, *(("b_hh",) if relative.norm else () if relative.peephole else ("units",)))
    absent = (*absent, *["seed", "passed"] * (not relative.zoned), "dh", "dproducts")
    absent = (*absent, *(("h_prev",) if relative.norm and kernel == "backward" else norms))
    if directions == 1:
        absent = (*absent, "lengths", "starts", "resets")
    if config.form != "split":
        absent = (*absent, "box")
    absent = (*absent, "running", *["dc0"] * ("c0" in absent))
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {"CELL": CELLS[kernel], "CONFIG": cut}
    aligned = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif kind := {"buffers": Forward if kernel == "forward" else Backward, "sequences": Sequences}.get(name):
            fields = [field.removesuffix("_ptr") for field in kind._fields]
            signature[name] = kind(*("constexpr" if f in absent else types.get(f, f"*{dtype}") for f in fields))
            constants |= {(i, j): None for j, f in enumerate(fields) if f in absent}
            aligned |= {(i, j): [["tt.divisibility", 16]] for j, f in enumerate(fields) if f not in absent}
        else:
            signature[name] = "i32"
    source = GluonASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    begin = _seconds()
    options = persistent.options(config.warps)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=options)
    seconds = _seconds() - begin
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((tools / "cuobjdump", "-res-usage"), (tools / "nvdisasm", "-c", "-ndf"))
        )
    registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(registers, spills, compiled.metadata.shared, seconds, Counter(widest_loop(sass)))


def _seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def widest_loop(sass: str) -> list[str]:
    """Instructions, with their modifiers, of the loop that has all others in it: the one over turns."""
    lines, labels, widest = sass.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        if (jump := re.search(r"\bBRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)", line)) and labels.get(jump[1], number) < number:
            widest = max(widest, lines[labels[jump[1]] : number + 1], key=len)
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", "\n".join(widest), re.MULTILINE)


def total(loop: Counter[str], *parts: str) -> int:
    """How many instructions have all these parts in their name."""
    return sum(n for name, n in loop.items() if all(part in name.split(".") for part in parts))


def chosen(H: int, B: int, R: int, dtype: str, target: str, cell: str = "") -> Iterator[tuple[str, PersistentConfig]]:
    """For each kernel, the configurations that a GPU can run, the quickest by estimate first."""
    for kernel in ("forward", "backward"):
        problem = Recurrence(kernel, "tf32" if dtype == "fp32" else "half", 100, H, B, R, cell)
        gpu = GPUS[target]
        able = [c for c in persistent.candidates(problem, gpu) if persistent.refusal(c, problem, gpu) is None]
        for config in sorted(able, key=lambda c: persistent.estimate(c, problem, gpu)):
            yield kernel, config


def main() -> None:
    print(f"Triton {triton.__version__}")
    columns = "registers spills shared seconds HMMA BAR polled instructions"
    print(f"{'target':7}{'kernel':9}{'dtype':5}{'H':>5}{'B':>5}{'R':>2}", columns)
    seen = set()
    for target in sys.argv[1:] or GPUS:
        for H, B, R, dtype in WORKLOADS:
            for kernel, config in chosen(H, B, R, dtype, target):
                for flags in (PLAIN, RAGGED) if R > 1 or B < 16 else (PLAIN,):
                    key = (target, kernel, H, R, dtype, persistent.fragments(config, H, R, 1), config.form, str(flags))
                    if key in seen:
                        continue
                    seen.add(key)
                    b = build(kernel, config, H, R, dtype, target, **flags)
                    counts = total(b.loop, "HMMA"), total(b.loop, "BAR"), total(b.loop, "128", "STRONG"), b.loop.total()
                    numbers = (b.registers, b.spills, b.shared, f"{b.seconds:.1f}", *counts)
                    what = "ragged" if flags is RAGGED else "plain"
                    print(
                        f"{target:7}{kernel:9}{dtype:5}{H:5}{B:5}{R:2}",
                        *(f"{n:>6}" for n in numbers),
                        what,
                        config,
                        flush=True,
                    )


if __name__ == "__main__":
    main()
