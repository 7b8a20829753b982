"""Every shipped kernel configuration compiles for every target, without a GPU, within the target's resources."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import skip_unless_it_compiles

from fused_lstm.choose import choose, stepwise
from fused_lstm.config import Device, LaunchConfig, Recurrence

pytestmark = pytest.mark.compile

ARITHMETIC = {
    "fp16": (torch.float16, False), "bf16": (torch.bfloat16, False), "tf32": (torch.float32, True),
    "fp32": (torch.float32, False), "fp64": (torch.float64, False),
}  # fmt: skip
FLAGS = {
    "forward": [
        {"SAVE": True, "LENGTHS": False, "PACKED": False, "RESETS": False, "DIRECTIONS": 1},
        {"SAVE": True, "LENGTHS": True, "PACKED": True, "RESETS": False, "DIRECTIONS": 2, "R": 2},
        {"SAVE": False, "LENGTHS": True, "PACKED": False, "RESETS": True, "DIRECTIONS": -1, "HAS_H0": False},
    ],
    "backward": [
        {"LENGTHS": True, "PACKED": False, "RESETS": True, "DIRECTIONS": -1, "HAS_H0": False},
        {"LENGTHS": False, "PACKED": False, "RESETS": False, "DIRECTIONS": 1},
        {"LENGTHS": True, "PACKED": True, "RESETS": False, "DIRECTIONS": 2, "R": 2, "HAS_H0": False},
    ],
}
H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 * 1024, wgmma=True)
SIZES = [16, 64, 128, 256, 512, 528, 640, 656, 768, 1024, 1152]  # powers of two, and those of bench/workloads.py


def kind(name: str) -> str:
    return "half" if name in ("fp16", "bf16") else name


def shipped(name: str, device: Device) -> list[tuple[Recurrence, LaunchConfig]]:
    """What choose() picks for some problems of one arithmetic, each pair of size and tiles once."""
    found = {}
    for kernel in ("forward", "backward"):
        for H in SIZES:
            for B in (1, 16, 64, 128, 2048):
                problem = Recurrence(kernel, kind(name), 100, H, B, 1)
                config = choose(problem, device).config
                found[kernel, H, replace(config, rows=config.block_b)] = problem, config
    return list(found.values())


def check(name: str, kernel: str, H: int, config: LaunchConfig, target: str, flags: dict[str, object]) -> None:
    import ledger

    dtype, tf32 = ARITHMETIC[name]
    built = ledger.compile_kernel(kernel, config, target, dtype, tf32, H=H, **flags)
    what = f"{kernel} {name} H={H} {config} {flags} on {target}"
    assert built.shared <= ledger.SHARED_LIMIT[target], f"{what}: {built.shared} bytes of shared memory"
    if config.persistent:
        bound = config.shared_memory(Recurrence(kernel, kind(name), 100, H, 64, 1))
        assert built.shared <= bound, f"{what}: {built.shared} bytes of shared memory, expected at most {bound}"
        tiles = 4 * config.tiles(H) if kernel == "backward" else config.tiles(H)
        resident = 4 * config.resident if kernel == "backward" else config.resident
        assert built.w_loads_before == resident, f"{what}: {built.w_loads_before} loads of W_hh before the loop over time"
        assert (built.w_loads_in_loop > 0) == (resident < tiles), (
            f"{what}: {built.w_loads_in_loop} loads of W_hh in the loop"
        )
    if target == "sm_90":
        assert built.spills == 0, f"{what}: {built.spills} bytes spilled"
        assert (built.tensor_core > 0) == (name != "fp32"), f"{what}: {built.tensor_core} tensor-core instructions"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_stepwise_configurations(name: str, target: str) -> None:
    import ledger

    skip_unless_it_compiles(ARITHMETIC[name][0])
    configs = {c for B in (16, 32, 64) for c in stepwise(Recurrence("forward", kind(name), 100, 512, B, 1))}
    for config in configs:
        for kernel, variants in FLAGS.items():
            for flags in variants if target == "sm_90" else [ledger.TRAINING[kernel]]:
                check(name, kernel, 512, config, target, flags)


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("kernel", FLAGS)
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32", "fp32"])
def test_chosen_configurations_of_an_h100(name: str, kernel: str, H: int) -> None:
    """What choose() picks: no spills, weights on chip and out of the loop over time."""
    largest = 1152 if kind(name) == "half" else 656 if name == "tf32" else 512
    chosen = [(p, c) for p, c in shipped(name, H100) if p.kernel == kernel and p.H == H]
    assert all(config.persistent for _, config in chosen)
    if largest >= H:
        assert all(config.resident == config.tiles(H) for _, config in chosen)
    for n, (_, config) in enumerate(chosen):
        check(name, kernel, H, config, "sm_90", FLAGS[kernel][n % 3])


def test_a_spilling_configuration_is_seen() -> None:
    import ledger

    greedy = LaunchConfig(block_b=128, block_h=64, block_k=64, num_warps=4)
    built = ledger.compile_kernel("forward", greedy, "sm_90", torch.float16, False, H=512, **FLAGS["forward"][0])
    assert built.spills > 0


@pytest.mark.parametrize("kernel", FLAGS)
def test_offsets_are_64_bit(kernel: str) -> None:
    """T*B*4H passes 2^31 in real use, so no tensor of offsets is multiplied in 32 bits."""
    import ledger

    for config in (LaunchConfig(16, 16, 64), LaunchConfig(64, 16, 64, persistent=True, resident=8)):
        for flags in FLAGS[kernel]:
            built = ledger.compile_kernel(kernel, config, "sm_90", torch.float16, False, H=512, **flags)
            products = [line for line in built.ttir.splitlines() if "arith.muli" in line and "tensor<" in line]
            assert any("xi64>" in line for line in products)
            assert not [line for line in products if "xi32>" in line]
