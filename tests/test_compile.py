"""Every shipped kernel configuration compiles for every target, without a GPU, within the target's resources, with offsets
of 64 bits."""

from __future__ import annotations

import pytest
import torch
from checks import skip_unless_it_compiles

pytest.importorskip("triton")
from fused_lstm.launch.schedules import persistent, refusal, stepwise_candidates

from fused_lstm.launch.choose import choose
from fused_lstm.launch.config import LaunchConfig, Recurrence

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
SIZES = {  # those of real workloads, as padded
    "bf16": (64, 128, 256, 512, 528, 640, 656, 768, 1024, 1152, 2048),
    "tf32": (64, 128, 256, 528, 1152),
    "fp32": (64, 512, 1152),
}


def check(name: str, problem: Recurrence, config: LaunchConfig, target: str, flags: dict[str, object]) -> None:
    import ledger

    dtype, tf32 = ledger.ARITHMETIC[name]
    built = ledger.compile_kernel(problem.kernel, config, target, dtype, tf32, H=problem.H, **flags)
    what = f"{name} {problem} {config} {flags} on {target}"
    assert built.shared <= ledger.SHARED_LIMIT[target], f"{what}: {built.shared} bytes of shared memory"
    if config.schedule == "persistent":
        bound = config.shared_memory(problem)
        assert built.shared <= bound, f"{what}: {built.shared} bytes of shared memory, expected at most {bound}"
        segments = 4 if problem.kernel == "backward" else 1
        before, whole = segments * config.resident, config.resident == config.tiles(problem.H)
        assert built.w_loads_before == before, f"{what}: {built.w_loads_before} loads of W_hh before the loop, not {before}"
        assert (built.w_loads_in_loop == 0) == whole, f"{what}: {built.w_loads_in_loop} loads of W_hh in the loop over time"
    # T*B*4H passes 2^31 in real use, so no tensor of offsets is multiplied in 32 bits.
    products = [line for line in built.ttir.splitlines() if "arith.muli" in line and "tensor<" in line]
    assert any("xi64>" in line for line in products), what
    assert not [line for line in products if "xi32>" in line], what
    if target == "sm_90":
        assert built.spills == 0, f"{what}: {built.spills} bytes spilled"
        assert (built.tensor_core > 0) == (name != "fp32"), f"{what}: {built.tensor_core} tensor-core instructions"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", NAMES)
def test_stepwise_configurations(name: str, target: str) -> None:
    import ledger

    skip_unless_it_compiles(ledger.ARITHMETIC[name][0])
    for kernel, variants in FLAGS.items():
        problems = [Recurrence(kernel, ledger.kind_of(name), 100, 512, B, 1) for B in (16, 32, 64)]
        for config, problem in {c: p for p in problems for c in stepwise_candidates(p)}.items():
            for flags in variants if target == "sm_90" else [ledger.TRAINING]:
                check(name, problem, config, target, flags)


@pytest.mark.parametrize(("name", "H"), [(name, H) for name, sizes in SIZES.items() for H in sizes])
def test_what_an_h100_runs(name: str, H: int) -> None:
    """What is chosen for each hidden size: persistent, weights on chip and out of the loop over time, no spills."""
    import ledger

    device = ledger.DEVICES["sm_90"]
    largest = {"bf16": 1152, "tf32": 528, "fp32": 512}[name]
    for n, (problem, config) in enumerate(ledger.chosen(name, device, [H], (16, 64, 2048))):
        if largest >= H and problem.B <= 64:
            assert config.schedule == "persistent"
            assert config.resident == config.tiles(H)
        check(name, problem, config, "sm_90", FLAGS[problem.kernel][n % 3])


@pytest.mark.parametrize("H", [64, 528])
def test_fp16_is_compiled_like_bf16(H: int) -> None:
    import ledger

    for problem, config in ledger.chosen("fp16", ledger.DEVICES["sm_90"], [H], (16,)):
        check("fp16", problem, config, "sm_90", FLAGS[problem.kernel][0])


@pytest.mark.parametrize("name", ["bf16", "tf32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_persistent_configurations_of_other_devices(name: str, target: str) -> None:
    import ledger

    device = ledger.DEVICES[target]
    for kernel in FLAGS:
        for H in (64, 256):
            problem = Recurrence(kernel, ledger.kind_of(name), 100, H, 64, 1)
            runnable = [c for c in persistent(problem, device) if refusal(c, problem, device) is None]
            for config in {choose(problem, device).config, *runnable[:1]}:
                check(name, problem, config, target, ledger.TRAINING)


def test_a_spilling_configuration_is_seen() -> None:
    import ledger

    greedy = LaunchConfig(block_b=128, block_h=64, block_k=64, num_warps=4)
    built = ledger.compile_kernel("forward", greedy, "sm_90", torch.float16, False, H=512, **FLAGS["forward"][0])
    assert built.spills > 0


def test_loads_within_the_loop_over_time_are_seen() -> None:
    import ledger

    for resident, expected in ((8, (0, 8)), (3, (None, 3)), (0, (None, 0))):
        config = LaunchConfig(64, 16, 64, schedule="persistent", resident=resident)
        built = ledger.compile_kernel("forward", config, "sm_90", torch.float16, False, H=512, **FLAGS["forward"][0])
        assert built.w_loads_before == expected[1]
        assert (built.w_loads_in_loop == 0) == (expected[0] == 0)
        assert 0 < built.loop.total() < built.instructions.total()
        assert built.loop["BAR"] > 0


@pytest.mark.parametrize("arguments", [["--arch", "sm_80", "--dtype", "bf16", "--hidden", "64"]])
def test_the_command_writes_its_rows(arguments: list[str], tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import json
    import sys

    import ledger

    file = tmp_path / "ledger.json"
    monkeypatch.setattr(sys, "argv", ["ledger.py", *arguments, "--json", str(file)])
    ledger.main()
    rows = json.loads(file.read_text())["rows"]
    assert {r["kernel"] for r in rows} == {"forward", "backward"}
    for r in rows:
        assert {"arch", "config", "registers", "spills", "shared", "l2_bytes_per_step", "loop_barriers"} <= r.keys()
        assert r["arch"] == "sm_80"
        assert r["registers"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
