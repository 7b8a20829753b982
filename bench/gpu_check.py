"""Everything that only a GPU can tell, in one call of three minutes, most important first.

    python bench/gpu_check.py [--out DIR] [--budget SECONDS] [--only TEXT ...] [--dry-run]

First a pool of processes, one for each core, runs every problem at three steps, so that all kernels are compiled. Then one
process does job after job: whether the schedules agree, what the device and the host can do, the workloads of real projects
against nn.LSTM (cuDNN) and what the device does in each, a grid of sizes by either schedule, latency, lengths and resets,
memory, launch configurations for the workloads, stress, the tests that need a GPU, and a few steps below NVIDIA's
compute-sanitizer. Each has a time limit, so that a hang or a crash loses one of them; the process is then started anew.

What there is no time for is named in the file, and a later call with --only makes up for it. Results go to one JSON file in
DIR (default: the environment's OUT, else bench/results), rewritten after every job, which bench/report.py reads. What is
slower than nn.LSTM and what is far from the floor is printed last. --dry-run lists the jobs, with the seconds that each took
last time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import run
from cases import Case, suite
from process import ROOT, Worker, about

SECONDS = 0.4  # of each mode of a case
FLOORS, HOST = "floors", "host time"
FAR = 5  # times the floor
MODES = ["inference", "training"]
Done = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A function to call, in the process that does one after another."""

    name: str
    limit: float
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    rehearsal: tuple[str, Mapping[str, Any]] | None = None  # what to call before, so that its kernels are compiled
    case: Case | None = None  # that it measures


def run_tests(arguments: Sequence[str], tool: str = "") -> dict[str, Any]:
    """pytest with arguments, in a pool or below a ``tool`` of NVIDIA's compute-sanitizer. Raises if a test fails."""
    if tool and shutil.which("compute-sanitizer") is None:
        return {"not run": "compute-sanitizer is not installed here"}
    below = ["compute-sanitizer", "--error-exitcode", "9", "--tool", tool] if tool else []
    pool = ["-n", str(min(8, os.cpu_count() or 1))] if not tool and importlib.util.find_spec("xdist") else []
    command = [*below, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pool, *arguments]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if report.returncode:
        raise AssertionError((report.stdout + report.stderr)[-6000:])
    return {"output": report.stdout[-300:]}


def tuned(problem: Mapping[str, Any], dtype: str, timed: bool = True) -> dict[str, Any]:
    """The fastest launch configuration of a recurrence, as an entry of a table; untimed, only compiled and checked."""
    import torch

    from fused_lstm import launch, tune
    from fused_lstm.launch.schedule import Recurrence

    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    recurrence = Recurrence(arithmetic=tune.KINDS.get(dtype, dtype), **problem)
    trial = tune.Trial(recurrence, tune.DTYPES[dtype], torch.device("cuda"))
    timer = tune.seconds if timed else lambda *_: 1.0
    found = tune.tune(trial, launch.device(torch.cuda.current_device()), 4, timer)
    return {"found": str(found), "entry": tune.entry(recurrence, found.best, 1e6 * found.best_seconds / recurrence.T)}


def check(name: str, limit: float, *arguments: str, tool: str = "") -> Job:
    return Job(name, limit, "gpu_check:run_tests", {"arguments": arguments, "tool": tool})


def speed(name: str, providers: Sequence[str]) -> Iterator[Job]:
    """A suite of bench/run.py."""
    for case in suite(name, "cuda", quick=name != "workloads"):
        peers = ("torchrl",) if name == "workloads" and case.variant == "resets" and HAS_TORCHRL else ()
        what = {"case": vars(case), "modes": run.modes_of(case, MODES), "providers": (*providers, *peers), "device": "cuda"}
        measuring = what | {"seconds": SECONDS, "seed": 0, "threads": 1}
        yield Job(f"{name} {case.name}", 60, "measure:measure", measuring, ("measure:rehearse", what), case)


def profiles() -> Iterator[Job]:
    for case in suite("workloads", "cuda"):
        yield Job(f"profile {case.name}", 30, "measure:profile", {"case": vars(case), "providers": ("fused", "torch")})


def tuning() -> Iterator[Job]:
    """Both recurrences of each workload."""
    for case in suite("workloads", "cuda"):
        for kernel in ("forward", "backward") if case.T > 1 else ():
            size = {"H": case.H + -case.H % 16, "B": case.B, "R": 1 + case.bidirectional}
            problem = {"kernel": kernel, "T": min(case.T, 128)} | size
            ahead = {"problem": problem | {"T": 3}, "dtype": case.dtype, "timed": False}
            given = {"problem": problem, "dtype": case.dtype}
            yield Job(f"tune {case.name} {kernel}", 60, "gpu_check:tuned", given, ("gpu_check:tuned", ahead))


HAS_TORCHRL = importlib.util.find_spec("torchrl") is not None
PLAIN = ("torch", "fused")
RAGGED = (*PLAIN, "torch-by-hand", "torch-plain", "fused-plain", "torchrl")
STRESS = "under_load or streams or cuda_graph"
CASES = (*speed("workloads", PLAIN), *profiles(), *speed("grid", (*PLAIN, "fused-persistent", "fused-stepwise")),
         *speed("latency", PLAIN), *speed("lengths", RAGGED), *speed("resets", RAGGED),
         *speed("memory", (*PLAIN, "fused-recompute")))  # fmt: skip
RATES = {"device": "cuda", "dtypes": sorted({job.case.dtype for job in CASES if job.case}), "threads": 1}
JOBS: tuple[Job, ...] = (
    check("schedules agree", 120, "tests/test_gpu.py", "-m", "gpu", "-k", "schedules_agree"),
    Job(FLOORS, 90, "timing:rates", RATES), Job(HOST, 120, "host:host", {"device": "cuda", "dtype": "bfloat16"}), *CASES,
    *tuning(),
    check("stress", 120, "tests/test_gpu.py", "-m", "gpu", "-k", STRESS),
    check("tests on a GPU", 400, "-m", "gpu", "-k", f"not (schedules_agree or {STRESS})"),
    check("kernel tests", 400, "-m", "kernels"),
    *(check(tool, 180, "tests/test_gpu.py", "-k", "few_steps", tool=tool) for tool in ("memcheck", "racecheck")),
)  # fmt: skip


def rehearse(jobs: Sequence[Job], end: float) -> Done:
    """Everything that is to be called before the jobs, by a process for each core. What failed is told here and no more: the
    job itself will say so."""
    calls = {json.dumps(job.rehearsal): job for job in jobs if job.rehearsal is not None}  # each once
    with ExitStack() as stack:
        idle: SimpleQueue[Worker] = SimpleQueue()
        cores = min(os.cpu_count() or 1, len(calls) or 1)
        for _ in range(cores):
            idle.put(stack.enter_context(Worker()))

        def call(job: Job) -> dict[str, Any]:
            worker = idle.get()
            try:
                function, arguments = job.rehearsal
                return worker.call(function, max(0.0, min(job.limit, end - time.monotonic())), **arguments)
            finally:
                idle.put(worker)

        done = ThreadPoolExecutor(cores).map(call, calls.values())
        return {job.name: found for job, found in zip(calls.values(), done, strict=True) if "failed" in found}


def serve(jobs: Sequence[Job], end: float, tell: Callable[[Job, Done], None]) -> Done:
    """Do the jobs, one after another in one process, until the time is over; ``tell`` is called after each."""
    done: Done = {}
    with Worker() as worker:
        for job in jobs:
            left = end - time.monotonic()
            found = {"not run": "no time left"}
            if left > 0:
                found = worker.call(job.function, min(job.limit, left), **job.arguments)
            if "no end after" in found.get("failed", "") and left < job.limit:
                found = {"not run": f"not enough time left: {left:.0f} s"}
            refused = found.get("result")
            done[job.name] = refused if isinstance(refused, dict) and "not run" in refused else found
            tell(job, done)
    return done


def summary(job: Job, done: dict[str, Any]) -> str:
    """A line or some."""
    if "result" not in done:
        return f"{job.name}: {done.get('failed') or done['not run']}"
    if job.case is not None:
        return "\n".join(run.line(row) for row in records_of(job, done) if row["provider"] != "torch")
    result = {k: v for k, v in done["result"].items() if k not in ("output", "entry")}
    most = 1500 if job.name in (FLOORS, HOST) else 160
    return f"{job.name}: {json.dumps(result)[:most]}"


def records_of(job: Job, done: dict[str, Any], floors: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    measured = done | {"providers": job.arguments["providers"]}
    return run.merged(job.case, job.arguments["modes"], [measured], dict(floors or {}))


def results(environment: dict[str, Any], done: Done, complete: bool) -> dict[str, Any]:
    """What is written: records as those of bench/run.py, and what became of the rest."""
    floors = done.get(FLOORS, {}).get("result", {})
    found = {"about": environment, "options": {"seconds": SECONDS, "processes": 1, "seed": 0}, "complete": complete}
    found["checks_failed"] = [name for name, record in done.items() if "failed" in record]
    found["job_seconds"] = {name: record["seconds"] for name, record in done.items() if "seconds" in record}
    found |= {"floors": floors, "host": done.get(HOST, {}).get("result", {}), "records": [], "checks": {}}
    for job in JOBS:
        if job.name not in done:
            continue
        if job.case is not None and "not run" not in done[job.name]:
            found["records"] += records_of(job, done[job.name], floors)
        elif job.case is not None:
            why = {"mode": "training", "provider": "fused", "refused": f"not run: {done[job.name]['not run']}"}
            found["records"].append(vars(job.case) | why)
        elif "result" not in done[job.name] or job.name not in (FLOORS, HOST):
            found["checks"][job.name] = done[job.name]
    return found


def last_words(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is slower than nn.LSTM, slowest first, and what is far from the floor, farthest first."""
    ours = [r for r in records if r["provider"] == "fused"]
    slower = [r for r in ours if r.get("ratio", {}).get("torch", (0, 1, 2))[1] < 1]
    far = [r for r in ours if r.get("x_of_floor", 0) > FAR]
    slower.sort(key=lambda r: r["ratio"]["torch"][1])
    far.sort(key=lambda r: -r["x_of_floor"])
    return [
        f"slower than nn.LSTM: {len(slower)} of {len(ours)}", *map(run.line, slower),
        f"more than {FAR} times the floor: {len(far)} of {len(ours)}", *map(run.line, far),
    ]  # fmt: skip


def last_times(folder: Path) -> dict[str, float]:
    """Seconds of each job, by the newest file that has them."""
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        found = json.loads(file.read_text()).get("job_seconds")
        if found:
            return found
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument("--budget", type=float, default=180, help="seconds for everything (default: 180)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="the jobs whose name has one of these")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and the seconds that each took last time")
    args = parser.parse_args(arguments)
    jobs = [job for job in JOBS if any(text in job.name for text in args.only)]
    if not jobs:
        parser.error(f"no job has any of {args.only} in its name; the jobs are {', '.join(job.name for job in JOBS)}")
    if args.dry_run:
        times = last_times(args.out)
        for job in jobs:
            print(f"{times.get(job.name, '-'):>6}  {job.name}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    start = time.monotonic()
    environment = about("cuda")
    device = "".join(c if c.isalnum() else "-" for c in environment["device"].lower())
    file = args.out / f"{device}-{environment['date'][:19].replace(':', '')}.json"
    failed = rehearse(jobs, start + args.budget / 2)  # of kernels that hang, the first jobs tell more
    print(f"kernels compiled after {time.monotonic() - start:.0f} s")
    for name, found in failed.items():
        print(f"  not those of {name}: {found['failed']}: {''.join(found['output'].strip().splitlines()[-1:])}")

    def tell(job: Job, done: Done) -> None:
        print(summary(job, done[job.name]), flush=True)
        whole = len(done) == len(JOBS) and not any("not run" in record for record in done.values())
        run.write_json(file, results(environment, done, complete=whole))

    done = serve(jobs, start + args.budget, tell)
    print(f"written to {file} after {time.monotonic() - start:.0f} s; python bench/report.py {file} makes a report of it")
    print(*last_words(results(environment, done, complete=False)["records"]), sep="\n")
    return 1 if any("failed" in record for record in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
