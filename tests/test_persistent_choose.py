"""Which configurations the persistent schedule has for a problem, and what it says of them: pure, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from persistent_build import GPUS, WORKLOADS

from fused_lstm.launch import persistent
from fused_lstm.launch.persistent import PersistentConfig, candidates, estimate, grid, local, refusal
from fused_lstm.launch.schedule import PASSES, Device, Recurrence

H100 = GPUS["sm_90"]


def recurrence(
    kernel: str = "forward", arithmetic: str = "half", H: int = 768, B: int = 16, R: int = 1, cell: str = ""
) -> Recurrence:
    return Recurrence(kernel, arithmetic, 100, H, B, R, cell)


def best(problem: Recurrence) -> PersistentConfig:
    able = [c for c in candidates(problem, H100) if refusal(c, problem, H100) is None]
    return min(able, key=lambda c: estimate(c, problem, H100))


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("H", "B", "R", "dtype"), WORKLOADS)
@pytest.mark.parametrize("kernel", PASSES)
def test_candidates(kernel: str, H: int, B: int, R: int, dtype: str, target: str) -> None:
    gpu, problem = GPUS[target], recurrence(kernel, "tf32" if dtype == "fp32" else "half", H, B, R)
    found = candidates(problem, gpu)
    assert len(found) <= {"forward": 2, "backward": 3}[kernel]
    if target == "sm_90":
        assert found
    for config in found:
        x, y, z = grid(config, H, B, R)
        assert config.form == "local" or x * y * z <= gpu.multiprocessors
        assert x * config.units >= H
        assert y * config.tiles * 8 >= B
        assert not config.ahead or config.tiles > 1
        persistent.fragments(config, H, R, 1)


@pytest.mark.parametrize("kernel", PASSES)
def test_sizes_that_fit_nowhere_have_none(kernel: str) -> None:
    assert not candidates(recurrence(kernel, "tf32", H=1152), H100)
    assert not candidates(recurrence(kernel, H=4096), H100)


@pytest.mark.parametrize(
    ("reason", "config", "problem", "gpu"),
    [
        ("compute capability 8.0", PersistentConfig(held=3), {}, replace(H100, capability=(7, 5))),
        ("not in fp32", PersistentConfig(held=3), {"arithmetic": "fp32"}, H100),
        ("at most 128, in half precision", local(128), {"H": 128, "arithmetic": "tf32"}, H100),
        ("at most 64, in half precision", local(128), {"H": 128, "cell": "zoneout=0.1,0.0"}, H100),
        ("at most 64, in half precision", local(65), {"H": 65, "cell": "layer_norm=state"}, H100),
        ("at most 64, in half precision", local(64), {"H": 64, "cell": "layer_norm=state", "arithmetic": "tf32"}, H100),
        ("takes norms only where one program owns all", PersistentConfig(), {"H": 64, "cell": "layer_norm=state"}, H100),
        ("needs 192 programs at once, H100 runs 132", PersistentConfig(held=3), {"B": 32}, H100),
        ("finds no room for the weights of H = 1024", PersistentConfig(held=4), {"H": 1024}, H100),
        ("bytes of shared memory for each program, H100 has 232448", PersistentConfig(held=0), {"H": 2048, "B": 8}, H100),
        (None, PersistentConfig(held=3), {}, H100),
    ],
)
def test_refusals(reason: str | None, config: PersistentConfig, problem: dict[str, Any], gpu: Device) -> None:
    said = refusal(config, recurrence(**problem), gpu)
    assert (said is None) if reason is None else reason in said


@pytest.mark.parametrize(
    ("kernel", "H", "B", "form", "microseconds"),
    [
        ("forward", 768, 16, "whole", 1.80), ("backward", 768, 16, "whole", 2.41),
        ("forward", 256, 16, "whole", 1.45), ("backward", 256, 16, "whole", 1.44), ("backward", 1024, 64, "split", 4.2),
    ],
)  # fmt: skip
def test_estimates(kernel: str, H: int, B: int, form: str, microseconds: float) -> None:
    """What was measured on an H100, but for the last, which was foretold."""
    problem = recurrence(kernel, H=H, B=B)
    assert best(problem).form == form
    assert estimate(best(problem), problem, H100) / problem.T == pytest.approx(microseconds, rel=0.3)


def test_few_units_are_owned_by_one_program() -> None:
    for H in (16, 48, 128):
        assert best(recurrence(H=H)) == local(H)
    assert best(recurrence(H=63, cell="layer_norm=output")) == local(63)
    assert best(recurrence(H=144)).form == "whole"
    assert best(recurrence(H=128, arithmetic="tf32")).form == "whole"


def test_directions_that_do_not_fit_together_take_turns() -> None:
    assert best(recurrence(H=2048, R=2)).at_once == 1
    assert best(recurrence(H=1024, R=2)).at_once == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_unwritten_has_all_bits_set(dtype: torch.dtype) -> None:
    t = persistent.unwritten(torch.zeros(2, 3, dtype=dtype))
    assert t.isnan().all()
    assert (t.view(torch.uint8) == 0xFF).all()
