"""The scripts that need a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_lstm.config import LaunchConfig
from pairs import IN_INTERPRETER

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

    names = [job.name for job in gpu_check.JOBS]
    assert len(names) == len(set(names))
    assert gpu_cases.CASES.keys() == {job.name for job in gpu_check.JOBS if job.function == "gpu_cases:run_case"}
    assert all(job.limit > 0 for job in gpu_check.JOBS)


def test_what_happened_to_each_case_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with the processes replaced: results, a crash, and cases for which no time is left."""
    import gpu_check
    import report
    import run

    def process(function: str, limit: float, path: Path | None = None, **arguments: Any) -> dict[str, Any]:
        if function == "measure:measure" and arguments["case"]["name"] == "bonito":
            return {"failed": "no end after 60 s", "output": "...", "seconds": 60.0}
        if function == "measure:measure":
            case, modes, providers = (arguments[k] for k in ("case", "modes", "providers"))
            times = {"torch": [20.0, 22.0, 21.0]}
            rows = [
                {**case, "mode": m, "provider": p, "plan": "", "rounds_us": times.get(p, [10.0, 11.0, 10.5])}
                for m in modes for p in providers
            ]  # fmt: skip
            return {"result": rows, "seconds": 1.0}
        return {"result": {"flop_per_us": {}} if function == "floors:floors" else {}, "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "isolated", process)
    jobs = [job for job in gpu_check.JOBS if job.case is None or job.case.suite == "workloads"]
    done = {job.name: gpu_check.do(job, 60) for job in jobs[:-1]} | {jobs[-1].name: {"not run": "no time left"}}
    for job in jobs:
        assert job.name in gpu_check.summary(job, done[job.name]) or job.case
    about = {"device": "A GPU", "kind": "cuda", "date": "2026-01-01T00:00:00", "commit": "0" * 40, "torch": "2"}
    found = gpu_check.results(about, done, complete=True)
    json.dumps(found)
    speeds = [r["ratio"]["torch"][1] for r in found["records"] if r["provider"] == "fused" and "ratio" in r]
    assert speeds == [2.0] * (16 * 2 + 2), "all but the one that hung; two have one step, and no training"
    assert run.geometric_mean(speeds) == pytest.approx(2.0)
    assert found["checks"]["kernel tests"] == {"not run": "no time left"}
    page = report.page([report.Results(Path("x.json"), found)], {})
    assert "| gnmt: B=128 T=50 I=1024 H=1024 bidirectional, fp16, lengths | training | 2.00 (2.00-2.00) |" in page
    assert "fused_lstm: failed: no end after 60 s: ... (bonito)" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, str(BENCH / "gpu_check.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr
