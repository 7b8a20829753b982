"""The persistent kernels compile for every NVIDIA target, without a GPU, within the target's resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
from fused_lstm.kernels import fragments
from fused_lstm.kernels.buffers import Backward, Forward
from fused_lstm.kernels.rows import Sequences
from persistent_build import GPUS, PACKED, PLAIN, RAGGED, WORKLOADS, build, chosen, total
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fused_lstm.cell import Cell
from fused_lstm.launch import persistent
from fused_lstm.launch.persistent import PersistentConfig
from fused_lstm.launch.schedule import Recurrence

pytestmark = pytest.mark.compile

SECONDS = 8.0  # of processors' time for a kernel, Triton and ptxas; about 1 on a quiet machine


def check(
    kernel: str, config: PersistentConfig, H: int, B: int, R: int, dtype: str, target: str, flags: dict, cell: str = ""
) -> None:
    built, what = (
        build(kernel, config, H, R, dtype, target, **flags, cell=cell),
        f"{kernel} {H} {B} {R} {dtype} {config} {flags} {target} {cell}",
    )
    problem = Recurrence(kernel, "tf32" if dtype == "fp32" else "half", 100, H, B, R, cell)
    assert built.spills == 0, f"{what}: {built.spills} bytes spilled"
    assert built.seconds < SECONDS, f"{what}: {built.seconds} s"
    assert built.shared <= persistent.shared_memory(config, problem), f"{what}: {built.shared} bytes of shared memory"
    assert total(built.loop, "HMMA") > 0
    # A norm's mean and variance take a barrier each forwards, its two sums one backwards.
    barriers = {"": (1, 2), "forward": (5,), "backward": (3,)}[kernel if problem.relative.norm else ""]
    assert total(built.loop, "BAR") in barriers, f"{what}: {total(built.loop, 'BAR')} barriers for a tile of rows"
    polled = total(built.loop, "LDG", "128", "STRONG")
    if config.form == "local":
        assert polled == 0
        return
    # Every piece is 16 bytes wide, and there are two loads for it: before its turn, and while it is not there.
    reduction = 4 * H if kernel == "backward" and config.form == "whole" else H
    pieces = -(-reduction // (32 * config.warps)) * (2 if dtype == "fp32" else 1)
    assert polled == pieces * (2 if config.ahead else 1), f"{what}: {polled} loads of 16 bytes"
    assert total(built.loop, "LDG", "STRONG") == polled + 3 * (config.form == "split")


# Of each form and arithmetic one: packed rows were seen to need as many registers as others, or 4 more where 29 are left.
PACKED_TOO = ((128, 2048, 1, "bf16"), (512, 256, 1, "fp32"), (528, 8, 1, "fp32"), (2048, 16, 2, "bf16"))


@pytest.mark.parametrize(("H", "B", "R", "dtype"), WORKLOADS)
def test_what_an_h100_runs(H: int, B: int, R: int, dtype: str) -> None:
    done = set()
    variants = (PLAIN, RAGGED, PACKED) if (H, B, R, dtype) in PACKED_TOO else (PLAIN, RAGGED)
    for kernel, config in chosen(H, B, R, dtype, "sm_90"):
        if kernel not in done:
            done.add(kernel)
            for flags in variants:
                check(kernel, config, H, B, R, dtype, "sm_90", flags)
    assert done == {"forward", "backward"}


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("H", "B", "R", "dtype"), [(256, 48, 2, "fp16"), (512, 64, 1, "fp32"), (48, 9, 1, "bf16")])
def test_other_targets(H: int, B: int, R: int, dtype: str, target: str) -> None:
    for kernel, config in chosen(H, B, R, dtype, target):
        check(kernel, config, H, B, R, dtype, target, RAGGED)


# Those that need the most registers, and one of few units.
@pytest.mark.parametrize(
    ("H", "B", "R", "dtype"), [(528, 8, 1, "fp32"), (1024, 64, 1, "fp16"), (128, 2048, 1, "bf16"), (64, 16, 1, "bf16")]
)
def test_peepholes_and_zoneout(H: int, B: int, R: int, dtype: str) -> None:
    cell = Cell(peephole=True, zoneout=(0.1, 0.1)).relative
    for kernel, config in chosen(H, B, R, dtype, "sm_90", cell):
        check(kernel, config, H, B, R, dtype, "sm_90", RAGGED, cell)


@pytest.mark.parametrize("target", GPUS)
def test_norms(target: str) -> None:
    norm, all_ = Cell(layer_norm="output"), Cell(layer_norm="state", peephole=True, zoneout=(0.1, 0.1))
    for cell, H, flags in ((norm, 37, PACKED), (all_, 63, PLAIN), (all_, 64, RAGGED)):
        for kernel, config in chosen(H, 9, 1, "bf16", target, cell.relative):
            check(kernel, config, H, 9, 1, "bf16", target, flags, cell.relative)


def test_spills_are_seen() -> None:
    assert build("forward", PersistentConfig(tiles=2, ahead=True), 1024, 1, "fp16", "sm_90", **PLAIN).spills > 0


@gluon.jit
def has_layout(LAYOUT: gl.constexpr, SHAPE: gl.constexpr, EXPECTED: gl.constexpr):
    gl.static_assert(gl.to_linear_layout(LAYOUT, SHAPE) == EXPECTED)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_elements_of_a_thread(swapped: bool) -> None:
    """Which elements of an operand B a thread has, in which registers: what gluon_interpreter.to_threads assumes."""
    registers = [[0, 1, 0], [0, 2, 0], [0, 16, 0]]
    lanes = [[0, 4, 0], [0, 8, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    if swapped:
        registers[1:] = registers[:0:-1]
    warps = [[1, 0, 0], [2, 0, 0]]
    expected = gl.DistributedLinearLayout(registers, lanes, warps, [], [4, 32, 8])
    constants = {"LAYOUT": fragments.operand_layout(1, 4), "SHAPE": [4, 32, 8], "EXPECTED": expected}
    source = GluonASTSource(fn=has_layout, signature=dict.fromkeys(constants, "constexpr"), constexprs=constants)

    def compiled() -> None:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

    if swapped:
        with pytest.raises(Exception, match=r"static_assert|CompileTimeAssertionFailure"):
            compiled()
    else:
        compiled()


class Driver:
    """What the JIT asks of a GPU before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class Warmup:
    """A kernel that is compiled for its arguments, and not launched."""

    def __init__(self, kernel: triton.JITFunction, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))


@pytest.mark.parametrize("form", ["whole", "split", "local"])
def test_one_binary_for_all_lengths_and_batches(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JIT takes what launch() passes, and compiles nothing anew for another T, B or layout of the rows."""
    H, compiled = 64, []
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for name, kernel in persistent.KERNELS.items():
        monkeypatch.setitem(persistent.KERNELS, name, Warmup(kernel, compiled))
    config = persistent.local(H) if form == "local" else PersistentConfig(form, warps=4, tiles=2, ahead=True)
    forward = replace(config, form="whole") if form == "split" else config
    for T, B in ((1, 16), (7, 9)):
        n = {"R": (1, B, H), "N": (T * B, 1, H), "G": (T * B, 1, 4, H), "w": (1, 4, H, H)}
        t = {k: torch.zeros(v, dtype=torch.float16) for k, v in n.items()}
        lengths = Sequences(torch.full((B,), T), None, None)
        f = Forward(t["G"], t["w"], None, t["N"], t["N"].clone(), t["R"], t["R"], t["R"], t["R"])
        persistent.run("forward", f, lengths, (T, B, B, 1), 1, forward)
        b = Backward(t["N"], None, None, t["G"], *[t["N"]] * 2, t["R"], t["R"], t["w"], t["G"].clone(), t["N"], t["R"])
        persistent.run("backward", b, lengths, (T, B, B, 1), 1, config)
    assert len(compiled) == 4
    assert compiled[0] is compiled[2]
    assert compiled[1] is compiled[3]
    assert [k.metadata.launch_cooperative_grid for k in compiled[:2]] == [form != "local"] * 2
