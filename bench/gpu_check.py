"""Everything that only a GPU can tell, in one call, most important first.

    python bench/gpu_check.py [--out DIR] [--budget SECONDS] [--only TEXT ...]

First whether the two schedules agree bit for bit at some sizes; then floors and the suites of bench/run.py: the workloads
of real projects against nn.LSTM (cuDNN), latency, lengths and resets, memory; then the ladder of what a time step is made
of, and a grid of sizes; then stress of the barrier, more sizes and the kernels' tests. What ten minutes do not suffice for
is named in the file, and a later call with --only makes up for it. Each case runs in a process of its own with a time limit,
so that a hang or a crash loses one case. Results go to one JSON file in DIR (default: the environment's OUT, else
bench/results), rewritten after every case, which bench/report.py reads; a case that was not run says why in its record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run
from cases import Case, suite
from process import ROOT, about, isolated

SECONDS = 0.4  # of each mode of a case
FLOORS, LADDER = "floors", "ladder"


@dataclass(frozen=True)
class Job:
    """A function in a process of its own, or the measurement of a case."""

    name: str
    limit: float
    function: str = ""
    case: Case | None = None
    providers: tuple[str, ...] = ()


def check(name: str, limit: float) -> Job:
    """A case of gpu_cases.py, which raises where something is wrong."""
    return Job(name, limit, "gpu_cases:run_case")


def speed(name: str, providers: Sequence[str], limit: float = 60) -> list[Job]:
    """A suite of bench/run.py."""
    quick = name != "workloads"
    return [Job(f"{name} {case.name}", limit, "", case, tuple(providers)) for case in suite(name, "cuda", quick=quick)]


PLAIN = ("torch", "fused")
RAGGED = (*PLAIN, "torch-by-hand", "torch-plain", "fused-plain", "torchrl")
JOBS: tuple[Job, ...] = (
    check("schedules agree, some sizes", 120), Job(FLOORS, 90, "floors:floors"),
    *speed("workloads", PLAIN), *speed("latency", PLAIN),
    *speed("lengths", RAGGED), *speed("resets", RAGGED), *speed("memory", (*PLAIN, "fused-recompute")),
    Job(LADDER, 90, "ladder:ladder"),
    *speed("grid", (*PLAIN, "fused-persistent", "fused-stepwise")),
    check("schedules agree, bf16", 240), check("schedules agree, tf32", 240),
    check("2,000 launches under load", 120), check("CUDA graph", 60), check("two streams", 90), check("T = 70,000", 120),
    check("more than 2^31 elements", 180), check("schedules agree, fp16", 240), check("schedules agree, fp32", 240),
    check("200 random problems", 240), check("memcheck", 180), check("racecheck", 180), check("choices", 60),
    check("kernel tests", 400),
)  # fmt: skip
MODES = ["inference", "training"]


def do(job: Job, limit: float) -> dict[str, Any]:
    if job.case is not None:
        modes = run.modes_of(job.case, MODES)
        return isolated(
            "measure:measure", limit, case=vars(job.case), modes=modes, providers=job.providers,
            device="cuda", seconds=SECONDS, seed=0, threads=1,
        ) | {"providers": job.providers}  # fmt: skip
    if job.name == FLOORS:
        dtypes = sorted({other.case.dtype for other in JOBS if other.case})
        return isolated(job.function, limit, device="cuda", dtypes=dtypes, threads=1)
    return isolated(job.function, limit, **({} if job.name == LADDER else {"name": job.name}))


def summary(job: Job, done: dict[str, Any]) -> str:
    """A line or some."""
    if "result" not in done:
        return f"{job.name}: {done.get('failed') or done['not run']}"
    if job.case is not None:
        rows = run.merged(job.case, run.modes_of(job.case, MODES), [done], {})
        return "\n".join(run.line(row) for row in rows if row["provider"] != "torch")
    result = {k: v for k, v in done["result"].items() if k != "output"}
    most = 1500 if job.name in (FLOORS, LADDER) else 160
    return f"{job.name}: {json.dumps(result)[:most]}"


def results(environment: dict[str, Any], done: dict[str, dict[str, Any]], complete: bool) -> dict[str, Any]:
    """What is written: records as those of bench/run.py, and what became of the rest."""
    floors = done.get(FLOORS, {}).get("result", {})
    found = {"about": environment, "options": {"seconds": SECONDS, "processes": 1, "seed": 0}, "complete": complete}
    found["checks_failed"] = [name for name, record in done.items() if "failed" in record]
    found |= {"floors": floors, "ladder": done.get(LADDER, {}).get("result", {}), "records": [], "checks": {}}
    for job in JOBS:
        if job.name not in done:
            continue
        if job.case is not None and "not run" not in done[job.name]:
            found["records"] += run.merged(job.case, run.modes_of(job.case, MODES), [done[job.name]], floors)
        elif job.case is not None:
            why = {"mode": "training", "provider": "fused", "refused": f"not run: {done[job.name]['not run']}"}
            found["records"].append(vars(job.case) | why)
        elif "result" not in done[job.name] or job.name not in (FLOORS, LADDER):
            found["checks"][job.name] = done[job.name]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default: 570)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the cases whose name has one of these")
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    jobs = [job for job in JOBS if any(text in job.name for text in args.only)]
    if not jobs:
        parser.error(f"no case has any of {args.only} in its name; the cases are {', '.join(job.name for job in JOBS)}")
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
