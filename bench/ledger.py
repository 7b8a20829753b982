"""What the kernels cost, read from their compilation for GPUs that need not be there.

    python bench/ledger.py [--arch sm_90] [--json FILE]

Prints, for each shipped configuration: registers, spills, shared memory and tensor-core instructions. Needs Triton, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lstm.config import LaunchConfig, arithmetic
from fused_lstm.launch import KERNELS, constants
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
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


def compile_kernel(
    kind: str, config: LaunchConfig, target: str, dtype: torch.dtype, tf32: bool, H: int, **flags: Any
) -> Built:
    """Compile ``kind`` ("forward" or "backward") for ``target``; ``flags`` are the kernel's other constexpr arguments."""
    kernel = KERNELS[kind]
    meta = constants(config, H) | dict(
        R=1, H=H, DIRECTIONS=1, HAS_H0=True, INTERPRET_BF16=False, PRECISION="tf32" if tf32 else "ieee"
    ) | flags  # fmt: skip
    accumulator = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"cn_ptr": accumulator, "dc_ptr": accumulator, "resets_ptr": "*u8"}
    types |= dict.fromkeys(("lengths_ptr", "starts_ptr", "arrived_ptr"), "*i64")
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in meta:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, "*" + TYPES[dtype])
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    constexprs = {name: value for name, value in meta.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {name: value for name, value in meta.items() if name not in kernel.arg_names}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    built = {"shared": compiled.metadata.shared, "ttir": compiled.asm["ttir"]}
    built |= zip(("w_loads_in_loop", "w_loads_before"), w_hh_loads(compiled.asm["ttgir"]), strict=True)
    if "cubin" not in compiled.asm:
        return Built(**built)
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(**built, registers=registers, spills=spills, instructions=count(sass), loop=count(time_loop(sass)))


def w_hh_loads(ttgir: str) -> tuple[int, int]:
    """How many loads of W_hh stand in the loop over time, the first one in the code, and how many outside it."""
    pointers, depth, loop, inside, outside = {"%w_hh_ptr"}, 0, None, 0, 0
    for line in ttgir.splitlines():
        results, _, operation = line.strip().partition(" = ")
        operands = NAME.findall(operation)
        if operation.startswith("scf.for"):
            loop = depth if loop is None else loop
            pointers |= {carried for carried, start in re.findall(r"(%[\w$.#-]+) = (%[\w$.#-]+)", operation) if start in pointers}
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


# The most demanding flags of each kernel.
TRAINING = {
    "forward": {"SAVE": True, "LENGTHS": True, "PACKED": False, "RESETS": True},
    "backward": {"LENGTHS": True, "PACKED": False, "RESETS": True},
}
ARITHMETIC = [
    (torch.float16, False),
    (torch.bfloat16, False),
    (torch.float32, True),
    (torch.float32, False),
    (torch.float64, False),
]


def rows(target: str, H: int = 512) -> list[dict[str, Any]]:
    """One record for each shipped configuration and kernel."""
    found = []
    for dtype, tf32 in ARITHMETIC:
        for config in shipped(dtype, tf32):
            for kind, flags in TRAINING.items():
                built = compile_kernel(kind, config, target, dtype, tf32, H, **flags)
                name = TYPES[dtype] if arithmetic(dtype, tf32) == "half" else arithmetic(dtype, tf32)
                found.append(
                    {"kernel": kind, "arch": target, "dtype": name, "H": H, "config": asdict(config),
                     "registers": built.registers, "spills": built.spills, "shared": built.shared,
                     "tensor_core": built.tensor_core, "instructions": built.instructions.total()}
                )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(TARGETS), nargs="+", default=["sm_90"])
    parser.add_argument("--json", type=Path, help="write {'rows': [...]} to this file")
    args = parser.parse_args()
    records = []
    print(f"Triton {triton.__version__}; registers, spills and instructions are known for NVIDIA targets only")
    print("arch    kernel   dtype block_b block_h block_k warps registers spills shared tensor-core instructions")
    for target in args.arch:
        for row in rows(target):
            c = row["config"]
            print(
                f"{row['arch']:7} {row['kernel']:8} {row['dtype']:5} {c['block_b']:7} {c['block_h']:7} {c['block_k']:7} "
                f"{c['num_warps']:5} {row['registers']:9} {row['spills']:6} {row['shared']:6} {row['tensor_core']:11} "
                f"{row['instructions']:12}",
                flush=True,
            )
            records.append(row)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
