"""The scripts that need a GPU, as far as a machine without one can run them."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import gpu_check
import measure
import pytest
import report
import timing
import torch
from gpu_check import Done, Job
from process import Worker

BENCH = Path(__file__).parents[1] / "bench"


def serve(jobs: Sequence[Job], seconds: float = 60) -> Done:
    """The jobs' results, each as it was told of."""
    told: Done = {}
    done = gpu_check.serve(jobs, time.monotonic() + seconds, lambda job, done: told.update({job.name: done[job.name]}))
    assert list(told) == [job.name for job in jobs]
    assert told == done
    return done


def test_every_job_is_known_by_one_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And listed with the seconds that it took last time."""
    names = [job.name for job in gpu_check.JOBS]
    assert len(names) == len(set(names))
    (tmp_path / "old.json").write_text(json.dumps({"job_seconds": {"workloads bonito": 12.5}}))
    (tmp_path / "other.json").write_text("{}")
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 0
    listed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in listed] == names
    assert {seconds: name for seconds, name in listed if seconds != "-"} == {"12.5": "workloads bonito"}


def test_what_scripts_import_as_they_run_is_there() -> None:
    pytest.importorskip("triton")
    for path in BENCH.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fused_lstm"):
                exec(ast.unparse(node))


def test_what_crashes_or_hangs_loses_one_job() -> None:
    """One process serves the others, and is started anew after these; what it reads and prints is not taken for a result."""
    quiet = "printf 'no end of line'; cat"
    jobs = [
        Job("first", 20, "os:getpid"), Job("second", 20, "os:getpid"), Job("crash", 20, "os:abort"),
        Job("third", 20, "os:getpid"), Job("hang", 1, "signal:pause"), Job("raises", 20, "math:no_such_function"),
        Job("prints", 20, "os:system", {"command": quiet}), Job("fourth", 20, "os:getpid"),
    ]  # fmt: skip
    done = serve(jobs)
    assert [done[name]["failed"] for name in ("crash", "hang")] == ["exit status -6", "no end after 1 s"]
    assert "no_such_function" in done["raises"]["output"]
    assert done["prints"]["result"] == 0
    pids = [done[name]["result"] for name in ("first", "second", "third", "fourth")]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 3


def test_when_the_time_is_over() -> None:
    done = serve([Job("long", 20, "signal:pause"), Job("next", 20, "os:getpid")], seconds=0.5)
    assert done == {"long": {"not run": "not enough time left: 0 s"}, "next": {"not run": "no time left"}}


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    serve([Job("hang", 1, "os:system", {"command": f"(sleep 2; touch {file}) & wait"})])
    time.sleep(2)
    assert not file.exists()


def test_a_pool_calls_each_rehearsal_once(tmp_path: Path) -> None:
    """At the same time, as many as there are cores; the job whose rehearsal fails is named."""

    def job(name: str, function: str, **arguments: object) -> Job:
        return Job(name, 20, "os:getpid", rehearsal=(function, arguments))

    jobs = [job(str(n), "os:mkdir", path=str(tmp_path / str(n // 2))) for n in range(8)]  # a second one would fail
    jobs += [job("crash", "os:abort"), Job("none", 20, "os:getpid")]
    failed = gpu_check.rehearse(jobs, time.monotonic() + 60)
    assert sorted(file.name for file in tmp_path.iterdir()) == list("0123")
    assert {name: found["failed"] for name, found in failed.items()} == {"crash": "exit status -6"}


def test_all_that_is_measured_is_called_before_at_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(measure, "one_step", lambda runner, data, mode: lambda: called.append((data.case.T, mode)))
    for job in gpu_check.JOBS:
        if job.case is not None:
            function, arguments = job.rehearsal
            assert function == "measure:rehearse"
            assert arguments.items() <= job.arguments.items()
    case = cases.Case("tiny", 2, 9, 3, 4, "fp32", variant="resets")
    measure.rehearse(vars(case), ["inference", "training"], ["torch", "fused", "fused-persistent"], "cpu")
    assert called == [(3, "inference"), (3, "training")] * 2, "and not by a schedule that needs a GPU"


def test_work_of_the_device() -> None:
    work = timing.work_of([(10.0, 5.0, "a"), (30.0, 2.0, "b"), (12.0, 4.0, "a"), (17.0, 1.0, "c")])
    assert work == {"total_us": 12.0, "gaps_us": 13.0, "launches": 4, "top": [[9.0, 2, "a"], [2.0, 1, "b"], [1.0, 1, "c"]]}
    assert timing.work_of([])["launches"] == 0


def test_tests_that_fail_raise() -> None:
    assert "1 passed" in gpu_check.run_tests(["-n0", "tests/test_gpu_check.py", "-k", "one_name"])["output"]
    with pytest.raises(AssertionError, match="deselected"):
        gpu_check.run_tests(["-n0", "tests/test_gpu_check.py", "-k", "no_such_test"])


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="compute-sanitizer is installed")
def test_a_tool_that_is_not_there_is_not_run() -> None:
    jobs = [job for job in gpu_check.JOBS if job.name == "memcheck"]
    assert serve(jobs) == {"memcheck": {"not run": "compute-sanitizer is not installed here"}}


def test_what_happened_to_each_case_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with the process replaced: results, a crash, and a case for which no time is left."""

    def call(self: Worker, function: str, limit: float, **arguments: Any) -> dict[str, Any]:
        if function == "measure:measure" and arguments["case"]["name"] == "bonito":
            return {"failed": "no end after 60 s", "output": "...", "seconds": 60.0}
        if function == "measure:measure":
            case, modes = arguments["case"], arguments["modes"]
            slow = case["name"] == "gnmt"
            times = {"torch": [20.0, 22.0, 21.0], "fused": [40.0, 44.0, 42.0] if slow else [10.0, 11.0, 10.5]}
            rows = [{**case, "mode": m, "provider": p, "plan": "", "rounds_us": times[p]} for m in modes for p in times]
            return {"result": rows, "seconds": 1.0}
        rates = {"flop_per_us": {"fp16": 1e12, "bf16": 1e3, "tf32": 1e12}}
        return {"result": rates if function == "timing:rates" else {}, "seconds": 1.0}

    monkeypatch.setattr(Worker, "call", call)
    jobs = [job for job in gpu_check.JOBS if job.case is None or job.case.suite == "workloads"]
    done = serve(jobs[:-1], seconds=1000) | {jobs[-1].name: {"not run": "no time left"}}
    for job in jobs:
        assert job.name in gpu_check.summary(job, done[job.name]) or job.case
    about = {"device": "A GPU", "kind": "cuda", "date": "2026-01-01T00:00:00", "commit": "0" * 40, "torch": "2"}
    found = gpu_check.results(about, done, complete=True)
    json.dumps(found)
    speeds = [r["ratio"]["torch"][1] for r in found["records"] if r["provider"] == "fused" and "ratio" in r]
    assert sorted(speeds) == [0.5] * 2 + [2.0] * (15 * 2 + 2), "all but the one that hung; two have no training"
    assert found["checks"]["racecheck"] == {"not run": "no time left"}
    assert found["job_seconds"]["workloads bonito"] == 60.0
    page = report.page([report.Results(Path("x.json"), found)], {})
    assert "| gnmt: B=128 T=50 I=1024 H=1024 bidirectional, fp16, lengths | training | 0.50 (0.50-0.50) |" in page
    assert "fused_lstm: failed: no end after 60 s: ... (bonito)" in page
    words = gpu_check.last_words(found["records"])
    assert words[0] == "slower than nn.LSTM: 2 of 36"
    assert all(" gnmt " in line for line in words[1:3])
    assert not any(" bf16 " in line for line in words[4:]), "their floor was made to be far above"
    assert words[3] == f"more than 5 times the floor: {len(words) - 4} of 36"
    assert len(words) > 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run([sys.executable, str(BENCH / "gpu_check.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "needs a CUDA device" in run.stderr
