"""Everything that only a GPU can tell, in one call, most important first.

    python bench/gpu_check.py [--out DIR] [--budget SECONDS] [--only TEXT]

Each case runs in a process of its own with a time limit, so that a hang or a crash loses one case. Results go to one JSON
file in DIR (default: the environment's OUT, else bench/results), rewritten after every case; a case that was not run, for
want of time or of something it needs, says so in its record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from timing import graph_of, median_us
from workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    import torch
    import triton

    import fused_lstm

    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory,
        "driver": driver, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__,
        "python": platform.python_version(), "fused_lstm": fused_lstm.__version__,
    }  # fmt: skip


def kernel_tests() -> dict[str, Any]:
    """The kernels' tests, on the GPU."""
    report = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "kernels or gpu", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return {"passed": report.returncode == 0, "output": report.stdout[-6000:]}


def step_times() -> dict[str, Any]:
    """Microseconds of a time step of each kernel, by what is chosen and by a launch for each step."""
    import torch

    from fused_lstm import launch
    from fused_lstm.choose import choose, stepwise
    from fused_lstm.config import Recurrence
    from fused_lstm.tune import Trial, seconds

    T, device, record = 256, launch.device(0), {}
    for H, B in ((64, 64), (128, 64), (256, 16), (512, 16), (512, 64), (768, 16), (1024, 16), (1024, 64), (512, 1024)):
        for kernel in ("forward", "backward"):
            problem = Recurrence(kernel, "half", T, H, B, 1)
            trial = Trial(problem, torch.bfloat16, torch.device("cuda"))
            found = {"chosen": choose(problem, device).config, "stepwise": next(iter(stepwise(problem)))}
            record[f"{kernel} H={H} B={B}"] = {k: 1e6 * seconds(trial, c, 5) / T for k, c in found.items()}
    return record


def tuning() -> dict[str, Any]:
    """The fastest of the likely configurations for the shapes of the workloads; the table goes beside the results."""
    from fused_lstm.tune import main as tune

    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    arguments = [
        "--seconds",
        "200",
        "--out",
        str(out),
        "--hidden",
        "128",
        "256",
        "512",
        "768",
        "1024",
        "--batch",
        "16",
        "64",
    ]
    status = tune(arguments)
    return {"status": status, "folder": str(out)}


def workload(case: Workload) -> dict[str, Any]:
    """fused_lstm's kernels against nn.LSTM (cuDNN): equal results first, then the two in turn."""
    import torch

    import fused_lstm

    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(
        case.I, case.H, case.layers, bidirectional=case.bidirectional, proj_size=case.proj, device="cuda", dtype=dtype
    )
    ours = fused_lstm.LSTM.from_torch(theirs, backend="triton")
    x = torch.randn(case.T, case.B, case.I, device="cuda", dtype=dtype, requires_grad=True)
    record: dict[str, Any] = {"explain": str(fused_lstm.explain(ours, x))}

    exact = torch.nn.LSTM(case.I, case.H, case.layers, bidirectional=case.bidirectional, proj_size=case.proj).double().cuda()
    exact.load_state_dict(theirs.state_dict())
    part = slice(0, 16)  # fp64 is slow: some rows are enough
    with torch.no_grad():
        reference = exact(x[:, part].double())[0]
    errors = {}
    for name, module in (("fused", ours), ("torch", theirs)):
        with torch.no_grad():
            errors[name] = ((module(x[:, part])[0].double() - reference).norm() / reference.norm()).item()
    record["relative_error"] = errors
    if not errors["fused"] <= 2 * errors["torch"] + torch.finfo(dtype).eps:
        return record | {"refused": "the result is wrong, so nothing was timed"}

    def step(module: torch.nn.Module, train: bool) -> Callable[[], None]:
        cotangent = torch.randn_like(module(x)[0])

        def run() -> None:
            if train:
                module(x)[0].backward(cotangent)
            else:
                with torch.no_grad():
                    module(x)

        return run

    for kind in ("infer", "train"):
        a, b = step(theirs, kind == "train"), step(ours, kind == "train")
        pairs = [(median_us(a, 5), median_us(b, 5)) for _ in range(5)]
        ratios = sorted(t / o for t, o in pairs)
        record[kind] = {
            "torch_us_per_step": statistics.median(t for t, _ in pairs) / case.T,
            "fused_us_per_step": statistics.median(o for _, o in pairs) / case.T,
            "ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]],
        }  # fmt: skip
    record["infer"]["fused_graph_us_per_step"] = median_us(graph_of(step(ours, False)), 5) / case.T
    for name, module in (("torch", theirs), ("fused", ours)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, True)()
        torch.cuda.synchronize()
        record[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return record


def floor(name: str) -> Any:
    import floors

    return getattr(floors, name)()


def correctness(name: str) -> Any:
    from gpu_cases import CASES as cases

    return cases[name]()


# What must hold comes first, then the workloads, then what explains them. name: (time limit in seconds, function)
CASES: dict[str, tuple[int, Callable[[], Any]]] = {
    "environment": (60, environment),
    **{f"schedules agree, {kind}": (240, partial(correctness, f"schedules agree, {kind}")) for kind in ("bf16", "tf32")},
    "barrier floor": (60, partial(floor, "barrier")),
    "step times": (120, step_times),
    **{f"workload {w.name}": (60, partial(workload, w)) for w in WORKLOADS},
    **{
        name: (limit, partial(correctness, name))
        for name, limit in {
            "2,000 launches under load": 120, "CUDA graph": 60, "two streams": 90, "T = 70,000": 120,
            "more than 2^31 elements": 180, "schedules agree, fp16": 240, "schedules agree, fp32": 240,
            "200 random problems": 240, "memcheck": 180, "racecheck": 180, "choices": 60,
        }.items()
    },
    "kernel tests": (400, kernel_tests),
    "launch floor": (60, partial(floor, "launches")),
    "tuning": (260, tuning),
}  # fmt: skip


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def run_case(name: str, limit: float) -> dict[str, Any]:
    started = time.monotonic()
    try:
        child = subprocess.run(
            [sys.executable, __file__, "--case", name], capture_output=True, text=True, timeout=limit, cwd=ROOT
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {limit:.0f} s"}
    seconds = round(time.monotonic() - started, 1)
    if child.returncode != 0:
        return {
            "failed": f"exit status {child.returncode}",
            "output": (child.stdout + child.stderr)[-3000:],
            "seconds": seconds,
        }
    return {"result": json.loads(child.stdout.splitlines()[-1]), "seconds": seconds}


def summary(record: dict[str, Any]) -> str:
    result = record.get("result")
    if result is None:
        return record.get("failed") or record["not run"]
    if "train" in result:
        return ", ".join(f"{k} {result[k]['ratio']:.2f}x nn.LSTM" for k in ("infer", "train"))
    return json.dumps({k: v for k, v in result.items() if k not in ("output", "explain")})[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench" / "results"))
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything")
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.case][1]()))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    if not any(args.only in name for name in CASES):
        parser.error(f"no case has {args.only!r} in its name; the cases are {', '.join(CASES)}")
    end = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "commit": _output("git", "rev-parse", "HEAD")}
    file = args.out / f"gpu_check-{about['date']}.json"
    records: dict[str, Any] = {}
    for name in (name for name in CASES if args.only in name):
        left = end - time.monotonic()
        limit = min(CASES[name][0], left)
        records[name] = run_case(name, limit) if left > 10 else {"not run": "no time left"}
        print(f"{name}: {summary(records[name])}", flush=True)
        file.write_text(json.dumps({**about, "cases": records}, indent=1) + "\n")
    print(f"written to {file}")
    ran = records.get("kernel tests", {}).get("result", {})
    return 0 if ran.get("passed", True) and not any("failed" in r for r in records.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
