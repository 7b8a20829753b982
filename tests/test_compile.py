"""Every shipped kernel configuration compiles for every target, without a GPU, within the target's resources."""

from __future__ import annotations

import pytest
import torch
from checks import skip_unless_it_compiles

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


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_shipped_configurations(name: str, target: str) -> None:
    import ledger

    from fused_lstm import launch

    dtype, tf32 = ARITHMETIC[name]
    skip_unless_it_compiles(dtype)
    for config in launch.shipped(dtype, tf32):
        for kind, variants in FLAGS.items():
            for flags in variants if target == "sm_90" else [ledger.TRAINING[kind]]:
                built = ledger.compile_kernel(kind, config, target, dtype, tf32, H=512, **flags)
                what = f"{kind} {config} {flags} on {target}"
                assert built.shared <= ledger.SHARED_LIMIT[target], f"{what}: {built.shared} bytes of shared memory"
                if target == "sm_90":
                    assert built.spills == 0, f"{what}: {built.spills} bytes spilled"
                    assert (built.tensor_core > 0) == (name != "fp32"), (
                        f"{what}: {built.tensor_core} tensor-core instructions"
                    )


@pytest.mark.parametrize("H", [16, 64, 128, 256, 528, 656, 768, 1024, 1152, 2048])
def test_hidden_sizes_of_real_workloads(H: int) -> None:
    import ledger

    from fused_lstm import launch

    device = launch.Device("H100", 132)
    for name, B, R in (("bf16", 64, 2), ("tf32", 1, 1)):
        dtype, tf32 = ARITHMETIC[name]
        config = launch.choose(dtype, tf32, H, B, R, device)
        for kind, variants in FLAGS.items():
            flags = variants[0] | {"R": R, "DIRECTIONS": R}
            assert ledger.compile_kernel(kind, config, "sm_90", dtype, tf32, H=H, **flags).spills == 0


def test_a_spilling_configuration_is_seen() -> None:
    import ledger

    from fused_lstm import launch

    greedy = launch.LaunchConfig(block_b=128, block_h=64, block_k=64, num_warps=4)
    built = ledger.compile_kernel("forward", greedy, "sm_90", torch.float16, False, H=512, **FLAGS["forward"][0])
    assert built.spills > 0


@pytest.mark.parametrize("kind", FLAGS)
def test_offsets_are_64_bit(kind: str) -> None:
    """T*B*4H passes 2^31 in real use, so no tensor of offsets is multiplied in 32 bits."""
    import ledger

    from fused_lstm import launch

    config = launch.shipped(torch.float16, False)[0]
    for flags in FLAGS[kind]:
        built = ledger.compile_kernel(kind, config, "sm_90", torch.float16, False, H=512, **flags)
        products = [line for line in built.ttir.splitlines() if "arith.muli" in line and "tensor<" in line]
        assert any("xi64>" in line for line in products)
        assert not [line for line in products if "xi32>" in line]
