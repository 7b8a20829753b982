"""The scripts that need a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import IN_INTERPRETER

from fused_lstm.config import LaunchConfig

BENCH = Path(__file__).parents[1] / "bench"
LOCAL = LaunchConfig(16, 32, 32, persistent=True, resident=1)


@pytest.mark.kernels
@IN_INTERPRETER
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_schedules_are_compared_bit_for_bit(kind: str, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_cases

    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    problem = gpu_cases.Both(kind, T=4, H=32, B=5, R=2, ragged=ragged)
    twin = gpu_cases.stepwise_twin(LOCAL)
    assert not twin.persistent
    results, twins = problem.run(LOCAL, LOCAL), problem.run(twin, twin)
    assert gpu_cases.differing(results, twins) == []
    problem.w[0, 0, 0] += 1
    assert gpu_cases.differing(results, problem.run(LOCAL, LOCAL)) != []


def test_every_case_is_known_by_one_name() -> None:
    pytest.importorskip("triton")
    import gpu_cases
    import gpu_check

    assert gpu_cases.CASES.keys() <= gpu_check.CASES.keys()
    assert all(limit > 0 for limit, _ in gpu_check.CASES.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, str(BENCH / "gpu_check.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr
