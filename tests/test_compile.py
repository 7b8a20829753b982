"""Every shipped kernel configuration compiles for every target, without a GPU, within the target's resources, with offsets
of 64 bits."""

from __future__ import annotations

import pytest
import torch
from checks import skip_unless_it_compiles

pytest.importorskip("triton")

from fused_lstm.cell import Cell
from fused_lstm.launch.schedule import Recurrence
from fused_lstm.launch.stepwise import STEPWISE, StepwiseConfig

pytestmark = pytest.mark.compile

NAMES = ("bf16", "tf32", "fp32", "fp64")
STATES = ("h0_ptr", "c0_ptr")
FLAGS = {
    "forward": [
        {},
        {"rows": ("packed",), "directions": 2, "R": 2, "absent": ("b_hh_ptr",)},
        {"rows": ("lengths", "resets"), "directions": -1, "absent": (*STATES, "c_ptr")},
    ],
    "backward": [
        {"rows": ("lengths", "resets"), "directions": -1, "absent": (*STATES, "dhn_ptr")},
        {},
        {"rows": ("packed",), "directions": 2, "R": 2, "absent": (*STATES, "dy_ptr", "dcn_ptr")},
    ],
}


def check(name: str, problem: Recurrence, config: StepwiseConfig, target: str, flags: dict[str, object]) -> None:
    import stepwise_build

    dtype, tf32 = stepwise_build.ARITHMETIC[name]
    built = stepwise_build.compile_kernel(problem.kernel, config, target, dtype, tf32, H=problem.H, **flags)
    what = f"{name} {problem} {config} {flags} on {target}"
    assert built.shared <= stepwise_build.SHARED_LIMIT[target], f"{what}: {built.shared} bytes of shared memory"
    # T*B*4H passes 2^31 in real use, so no tensor of offsets is multiplied in 32 bits.
    products = [line for line in built.ttir.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert any("xi64>" in line for line in products), what
    philox = "cell" in flags and "seed_ptr" not in flags.get("absent", ())  # which multiplies in 32 bits
    assert philox or not [line for line in products if "xi32>" in line], what
    if target == "sm_90":
        assert built.spills == 0, f"{what}: {built.spills} bytes spilled"
        assert (built.tensor_core > 0) == (name != "fp32"), f"{what}: {built.tensor_core} tensor-core instructions"


@pytest.mark.parametrize("name", NAMES)
def test_all_configurations_on_an_h100(name: str) -> None:
    import stepwise_build

    skip_unless_it_compiles(stepwise_build.ARITHMETIC[name][0])
    for kernel, variants in FLAGS.items():
        problems = [Recurrence(kernel, stepwise_build.kind_of(name), 100, 512, B, 1) for B in (16, 32, 64)]
        made = {c: p for p in problems for c in STEPWISE.candidates(p, None)}
        for n, (config, problem) in enumerate(made.items()):
            check(name, problem, config, "sm_90", variants[n % 3])


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", NAMES)
def test_other_gpus(name: str, target: str) -> None:
    import stepwise_build

    skip_unless_it_compiles(stepwise_build.ARITHMETIC[name][0])
    for kernel in FLAGS:
        problem = Recurrence(kernel, stepwise_build.kind_of(name), 100, 512, 64, 1)
        check(name, problem, STEPWISE.candidates(problem, None)[0], target, stepwise_build.TRAINING)


@pytest.mark.parametrize("name", NAMES)
def test_peepholes_and_zoneout(name: str) -> None:
    import stepwise_build

    skip_unless_it_compiles(stepwise_build.ARITHMETIC[name][0])
    flags = stepwise_build.TRAINING | {"cell": Cell(peephole=True, zoneout=(0.1, 0.1))}
    expected = flags | {"absent": (*flags.get("absent", ()), "seed_ptr")}  # value of zoneout
    for kernel, target, given in (
        ("forward", "sm_90", flags),
        ("backward", "sm_90", flags),
        ("backward", "gfx942", expected),
    ):
        problem = Recurrence(kernel, stepwise_build.kind_of(name), 100, 512, 64, 1)
        check(name, problem, STEPWISE.candidates(problem, None)[0], target, given)


CELLS = {
    "norm": Cell(peephole=True, layer_norm="state", zoneout=(0.1, 0.1)),
    "norm of the output": Cell(layer_norm="output"),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_with_norms(cell: str, target: str) -> None:
    import stepwise_build

    for kernel, dtype, H in (("forward", torch.bfloat16, 1024), ("backward", torch.float32, 768)):
        absent = ["seed_ptr", "dy_ptr" if kernel == "backward" else "c_ptr"] if target == "sm_80" else []
        flags = {"rows": ("packed",), "directions": 2, "R": 2} if target == "sm_100" else stepwise_build.TRAINING
        built = stepwise_build.compile_cell(kernel, CELLS[cell], target, dtype, H, absent=absent, **flags)
        assert built.spills == 0, built
        if "seed_ptr" in absent:  # Philox multiplies in 32 bits
            assert not [line for line in built.ttir.splitlines() if "muli" in line and "tensor<" in line and "xi32>" in line]


def test_a_spilling_configuration_is_seen() -> None:
    import stepwise_build

    greedy = StepwiseConfig(block_b=128, block_h=64, block_k=64, num_warps=4)
    built = stepwise_build.compile_kernel("forward", greedy, "sm_90", torch.float16, False, H=512, **FLAGS["forward"][0])
    assert built.spills > 0
