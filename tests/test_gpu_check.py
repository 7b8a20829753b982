"""The scripts that need a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import report
import run
import torch

BENCH = Path(__file__).parents[1] / "bench"


def test_every_job_is_known_by_one_name() -> None:
    names = [job.name for job in gpu_check.JOBS]
    assert len(names) == len(set(names))
    assert all(job.limit > 0 for job in gpu_check.JOBS)
    assert all(bool(job.function) != bool(job.case) for job in gpu_check.JOBS)


def test_tests_that_fail_raise() -> None:
    assert "1 passed" in gpu_check.run_tests(["tests/test_gpu_check.py", "-k", "one_name"])["output"]
    with pytest.raises(AssertionError, match="deselected"):
        gpu_check.run_tests(["tests/test_gpu_check.py", "-k", "no_such_test"])


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="compute-sanitizer is installed")
def test_a_tool_that_is_not_there_is_not_run() -> None:
    (job,) = [job for job in gpu_check.JOBS if job.name == "memcheck"]
    assert gpu_check.do(job, 60) == {"not run": "compute-sanitizer is not installed here"}


def test_what_happened_to_each_case_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with the processes replaced: results, a crash, and cases for which no time is left."""

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
        return {"result": {"flop_per_us": {}} if function == "timing:rates" else {}, "seconds": 1.0}

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
    assert found["checks"]["racecheck"] == {"not run": "no time left"}
    page = report.page([report.Results(Path("x.json"), found)], {})
    assert "| gnmt: B=128 T=50 I=1024 H=1024 bidirectional, fp16, lengths | training | 2.00 (2.00-2.00) |" in page
    assert "fused_lstm: failed: no end after 60 s: ... (bonito)" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, str(BENCH / "gpu_check.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr
