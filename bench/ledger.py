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
from fused_lstm.kernels.backward import lstm_backward_kernel
from fused_lstm.kernels.forward import lstm_forward_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lstm.launch import LaunchConfig, arithmetic, shipped

KERNELS = {"forward": lstm_forward_kernel, "backward": lstm_backward_kernel}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
TENSOR_CORE = ("HMMA", "HGMMA", "DMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Built:
    """What the compiler made of one kernel. Registers, spills and instructions are read from NVIDIA machine code only."""

    shared: int  # bytes of shared memory for each program
    ttir: str
    registers: int = 0  # for each thread
    spills: int = 0  # bytes of stack for each thread
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def tensor_core(self) -> int:
        return sum(self.instructions[name] for name in TENSOR_CORE)


def compile_kernel(
    kind: str, config: LaunchConfig, target: str, dtype: torch.dtype, tf32: bool, H: int, **flags: Any
) -> Built:
    """Compile ``kind`` ("forward" or "backward") for ``target``; ``flags`` are the kernel's other constexpr arguments."""
    kernel = KERNELS[kind]
    constants = dict(
        R=1, H=H, DIRECTIONS=1, HAS_H0=True, INTERPRET_BF16=False, PRECISION="tf32" if tf32 else "ieee",
        BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k,
    ) | flags  # fmt: skip
    accumulator = "*fp64" if dtype == torch.float64 else "*fp32"
    types = {"cn_ptr": accumulator, "dc_ptr": accumulator, "lengths_ptr": "*i64", "starts_ptr": "*i64", "resets_ptr": "*u8"}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, "*" + TYPES[dtype])
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared, ttir = compiled.metadata.shared, compiled.asm["ttir"]
    if "cubin" not in compiled.asm:
        return Built(shared, ttir)
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, spills = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE)
    return Built(shared, ttir, registers, spills, Counter(names))


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
