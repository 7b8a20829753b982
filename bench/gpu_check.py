"""Everything that only a GPU can tell, in one call, most important first.

    python bench/gpu_check.py [--out DIR] [--budget SECONDS] [--only TEXT ...]

First what the device and the host can do, then the suites of bench/run.py: the workloads of real projects against nn.LSTM
(cuDNN), latency, lengths and resets, memory; each is checked before it is timed. Then a grid of sizes by either schedule,
and the tests that need a GPU. What ten minutes do not suffice for is named in the file, and a later call with --only makes
up for it. Each job runs in a process of its own with a time limit, so that a hang or a crash loses one of them. Results go
to one JSON file in DIR (default: the environment's OUT, else bench/results), rewritten after every job, which
bench/report.py reads; a job that was not run says why in its record.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import run
from cases import Case, suite
from process import ROOT, about, isolated

SECONDS = 0.4  # of each mode of a case
FLOORS, HOST = "floors", "host time"


@dataclass(frozen=True)
class Job:
    """A function in a process of its own, or the measurement of a case."""

    name: str
    limit: float
    function: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    case: Case | None = None
    providers: tuple[str, ...] = ()


def run_tests(arguments: Sequence[str], tool: str = "") -> dict[str, Any]:
    """pytest with arguments, below a ``tool`` of NVIDIA's compute-sanitizer if one is named. Raises if a test fails."""
    if tool and shutil.which("compute-sanitizer") is None:
        return {"not run": "compute-sanitizer is not installed here"}
    below = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool] if tool else []
    command = [*below, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if report.returncode:
        raise AssertionError((report.stdout + report.stderr)[-6000:])
    return {"output": report.stdout[-300:]}


def check(name: str, limit: float, *arguments: str, tool: str = "") -> Job:
    return Job(name, limit, "gpu_check:run_tests", {"arguments": arguments, "tool": tool})


def speed(name: str, providers: Sequence[str], limit: float = 60) -> list[Job]:
    """A suite of bench/run.py."""
    quick = name != "workloads"
    cases = suite(name, "cuda", quick=quick)
    return [Job(f"{name} {case.name}", limit, case=case, providers=tuple(providers)) for case in cases]


PLAIN = ("torch", "fused")
RAGGED = (*PLAIN, "torch-by-hand", "torch-plain", "fused-plain", "torchrl")
CASES: tuple[Job, ...] = (
    *speed("workloads", PLAIN), *speed("latency", PLAIN),
    *speed("lengths", RAGGED), *speed("resets", RAGGED), *speed("memory", (*PLAIN, "fused-recompute")),
    *speed("grid", (*PLAIN, "fused-persistent", "fused-stepwise")),
)  # fmt: skip
RATES = {"device": "cuda", "dtypes": sorted({job.case.dtype for job in CASES if job.case}), "threads": 1}
JOBS: tuple[Job, ...] = (
    Job(FLOORS, 90, "timing:rates", RATES), Job(HOST, 120, "host:host", {"device": "cuda", "dtype": "bfloat16"}), *CASES,
    check("tests on a GPU", 400, "-m", "gpu"), check("kernel tests", 400, "-m", "kernels"),
    *(check(tool, 180, "tests/test_gpu.py", "-k", "few_steps", tool=tool) for tool in ("memcheck", "racecheck")),
)  # fmt: skip
MODES = ["inference", "training"]


def do(job: Job, limit: float) -> dict[str, Any]:
    if job.case is not None:
        modes = run.modes_of(job.case, MODES)
        return isolated(
            "measure:measure", limit, case=vars(job.case), modes=modes, providers=job.providers,
            device="cuda", seconds=SECONDS, seed=0, threads=1,
        ) | {"providers": job.providers}  # fmt: skip
    done = isolated(job.function, limit, **job.arguments)
    return done["result"] if "not run" in done.get("result", {}) else done


def summary(job: Job, done: dict[str, Any]) -> str:
    """A line or some."""
    if "result" not in done:
        return f"{job.name}: {done.get('failed') or done['not run']}"
    if job.case is not None:
        rows = run.merged(job.case, run.modes_of(job.case, MODES), [done], {})
        return "\n".join(run.line(row) for row in rows if row["provider"] != "torch")
    result = {k: v for k, v in done["result"].items() if k != "output"}
    most = 1500 if job.name in (FLOORS, HOST) else 160
    return f"{job.name}: {json.dumps(result)[:most]}"


def results(environment: dict[str, Any], done: dict[str, dict[str, Any]], complete: bool) -> dict[str, Any]:
    """What is written: records as those of bench/run.py, and what became of the rest."""
    floors = done.get(FLOORS, {}).get("result", {})
    found = {"about": environment, "options": {"seconds": SECONDS, "processes": 1, "seed": 0}, "complete": complete}
    found["checks_failed"] = [name for name, record in done.items() if "failed" in record]
    found |= {"floors": floors, "host": done.get(HOST, {}).get("result", {}), "records": [], "checks": {}}
    for job in JOBS:
        if job.name not in done:
            continue
        if job.case is not None and "not run" not in done[job.name]:
            found["records"] += run.merged(job.case, run.modes_of(job.case, MODES), [done[job.name]], floors)
        elif job.case is not None:
            why = {"mode": "training", "provider": "fused", "refused": f"not run: {done[job.name]['not run']}"}
            found["records"].append(vars(job.case) | why)
        elif "result" not in done[job.name] or job.name not in (FLOORS, HOST):
            found["checks"][job.name] = done[job.name]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default: 570)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the jobs whose name has one of these")
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    jobs = [job for job in JOBS if any(text in job.name for text in args.only)]
    if not jobs:
        parser.error(f"no job has any of {args.only} in its name; the jobs are {', '.join(job.name for job in JOBS)}")
    end = time.monotonic() + args.budget
    environment = about("cuda")
    device = "".join(c if c.isalnum() else "-" for c in environment["device"].lower())
    file = args.out / f"{device}-{environment['date'][:19].replace(':', '')}.json"
    done: dict[str, dict[str, Any]] = {}
    for job in jobs:
        left = end - time.monotonic()
        done[job.name] = do(job, min(job.limit, left)) if left > 10 else {"not run": "no time left"}
        if "no end after" in done[job.name].get("failed", "") and left < job.limit:
            done[job.name] = {"not run": f"not enough time left: {left:.0f} s"}
        print(summary(job, done[job.name]), flush=True)
        whole = len(done) == len(JOBS) and not any("not run" in record for record in done.values())
        run.write_json(file, results(environment, done, complete=whole))
    print(f"written to {file}; python bench/report.py {file} makes a report of it")
    return 1 if any("failed" in record for record in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
