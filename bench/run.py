"""Should I use fused_lstm instead of nn.LSTM, and where not? Measured on this machine.

    python bench/run.py [--suite workloads lengths] [--device cpu] [--dtype bf16] [--providers torch fused] [--json FILE]

Every case runs in a process of its own, on a CPU every mode of it: what earlier cases leave on the heap would change its
time, and a crash or a hang then loses one case only. Several such processes (--processes) run some time apart.

First the results are compared with those of fp64. A provider that is wrong, or cannot run, is not timed, and its record says
why. Then all providers take turns, round after round. A ratio is nn.LSTM's time divided by another's in the same round:
above 1 the other is faster. What is printed and kept is the median, with the range from p20 to p80 of the rounds, or that of
the processes' medians if it is wider. Times are taken from the process in which nn.LSTM was quickest. Ctrl-C keeps what
there is.

bench/report.py makes tables and charts of the JSON file, bench/compare.py compares two of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import DTYPES, MODES, SUITES, Case, floor, suite
from process import about, isolated

BASELINES = ("torch", "torch-by-hand", "torch-plain", "fused-plain")
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    keep_on_signals()
    try:
        results = run(args)
    except KeyboardInterrupt:
        kept = f"; what was measured is in {args.json}" if args.json else ""
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    for _, what, mode, base, mean, count in means(results["records"]):
        print(f"{what}, {mode}: {mean:.2f}x {base}, geometric mean of {count} case{'s' * (count > 1)}")
    if args.json:
        print(f"written to {args.json}")
    for case in excluded(args):
        print(f"{case.name}: {too_large(case, args.largest)['refused']}", file=sys.stderr)
    refused = [r for r in results["records"] if r.get("refused", "").startswith(("failed", "wrong"))]
    for r in refused:
        print(f"{r['name']}, {r['mode']}, {r['provider']}: {r['refused']}", file=sys.stderr)
    if not any("us" in r for r in results["records"]):
        print("nothing was measured", file=sys.stderr)
        return 1
    return 1 if any(r["provider"].startswith("fused") or r["provider"] == "torch" for r in refused) else 0


def keep_on_signals() -> None:
    """Ctrl-C and SIGTERM end the run by KeyboardInterrupt, also where a shell has told a job to ignore the first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    import torch
    from providers import PROVIDERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["workloads"], help="(default: workloads)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda if torch sees a GPU)")
    parser.add_argument("--dtype", choices=DTYPES, help="of all cases (default: the workloads' own; on a CPU fp32)")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="(default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer cases, one short process each")
    parser.add_argument("--seconds", type=float, help="of each mode in each process (default: 1; 0.3 if quick)")
    parser.add_argument("--processes", type=int, help="for each case (default: 2 on a CPU; 1 if quick, or on a GPU)")
    parser.add_argument(
        "--largest", type=float, metavar="GFLOP", help="of a training step (default: 110 on a CPU, else any)"
    )
    parser.add_argument("--limit", type=float, default=180, help="seconds that a process may take (default: 180)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cpu" and args.dtype == "tf32":
        parser.error("--dtype tf32 needs a GPU; on a CPU it is fp32")
    for name in ("seconds", "processes", "limit", "threads", "largest"):
        given = getattr(args, name)
        if given is not None and not 0 < given < math.inf:
            parser.error(f"--{name} should be positive and finite, got {given}")
    if args.json:
        problem = unwritable(args.json)
        if problem:
            parser.error(f"--json should name a file that can be written, got {args.json}: {problem}")
    args.suite = list(SUITES) if "all" in args.suite else list(dict.fromkeys(args.suite))
    args.seconds = args.seconds or (0.3 if args.quick else 1.0)
    args.processes = args.processes or (2 if args.device == "cpu" and not args.quick else 1)
    args.largest = args.largest or (110.0 if args.device == "cpu" else math.inf)
    if args.providers and "torch" not in args.providers:
        args.providers = ["torch", *args.providers]  # what all are compared with
    if not any(args.only in case.name for name in args.suite for case in suite(name, args.device, args.dtype, args.quick)):
        parser.error(f"no case of {', '.join(args.suite)} has {args.only!r} in its name")
    return args


def unwritable(path: Path) -> str | None:
    """Why a result file cannot be written there; None if it can. Found out before anything is measured."""
    if path.exists() and not path.is_file():
        return "it is no ordinary file"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return str(error)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything asked for; the file is written anew after each process."""
    from providers import usual
    from tqdm import tqdm

    asked = {k: v for k, v in vars(args).items() if k != "json"}
    asked["largest"] = None if math.isinf(args.largest) else args.largest
    results: dict[str, Any] = {"about": about(args.device, args.threads), "options": asked, "complete": False}
    results |= {"floors": {}, "records": []}
    work = units(args)
    found: list[list[dict[str, Any]]] = [[] for _ in work]
    said: set[str] = set()  # a peer that is not installed is told of once

    def write() -> None:
        parts = [merged(*unit, some, results["floors"]) for unit, some in zip(work, found, strict=True) if some]
        results["records"] = [row for part in parts for row in part] + [too_large(c, args.largest) for c in excluded(args)]
        if args.json:
            write_json(args.json, results)

    write()
    busy = results["about"].get("load_before") or 0.0
    if busy > 0.5:
        print(f"this machine is busy (load {busy}): times will be longer, and ratios less sure", file=sys.stderr)
    with tqdm(total=args.processes * len(work), unit="process", dynamic_ncols=True, disable=None) as bar:
        dtypes = sorted({case.dtype for case, _ in work})
        for _ in range(args.processes):  # not one after another, but some time apart
            bar.set_description("floors")
            limits = isolated("timing:rates", args.limit, device=args.device, dtypes=dtypes, threads=args.threads)
            results["floors"] = better(results["floors"], limits.get("result", {}))
            if "failed" in limits:
                tqdm.write(f"floors: {limits['failed']}\n{limits['output']}", file=sys.stderr)
            for (case, modes), some in zip(work, found, strict=True):
                bar.set_description(f"{case.suite} {case.name} {'/'.join(modes)}")
                some.append(measured(case, modes, args.providers or usual(case.suite, args.device), args))
                if len(some) == args.processes:
                    for row in merged(case, modes, some, results["floors"]):
                        if row.get("refused") not in said:
                            tqdm.write(line(row))
                        said |= {row["refused"]} if "not installed" in row.get("refused", "") else set()
                write()
                bar.update()
    results["complete"] = True
    write()
    return results


def better(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Floors of two measurements: of each the one less disturbed, the higher rate and the shorter time."""
    found = dict(old)
    for key, value in new.items():
        if isinstance(value, dict):
            pick = max if key == "flop_per_us" else min
            found[key] = {k: pick(v, old[key][k]) if k in old.get(key, {}) else v for k, v in value.items()}
        else:
            found[key] = (max if key == "bytes_per_us" else min)(value, old.get(key, value))
    return found


def asked_for(args: argparse.Namespace) -> list[Case]:
    return [c for name in args.suite for c in suite(name, args.device, args.dtype, args.quick) if args.only in c.name]


def excluded(args: argparse.Namespace) -> list[Case]:
    """The cases that are too large for this machine."""
    return [case for case in asked_for(args) if case.flop() > 1e9 * args.largest]


def units(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """What each process is to do. On a CPU a mode has one of its own; on a GPU, where starting takes longer, a case has."""
    cases = [(case, modes_of(case, args.modes)) for case in asked_for(args) if case.flop() <= 1e9 * args.largest]
    return [(case, [m]) for case, modes in cases for m in modes] if args.device == "cpu" else cases


def measured(
    case: Case, modes: Sequence[str], providers: Sequence[str], args: argparse.Namespace, path: Path | None = None
) -> dict[str, Any]:
    """One process's measurement, for :func:`merged`; with the package in ``path``, if given."""
    found = isolated(
        "measure:measure", args.limit, path, case=asdict(case), modes=modes, providers=providers,
        device=args.device, seconds=args.seconds, seed=args.seed, threads=args.threads,
    )  # fmt: skip
    return found | {"providers": providers}


def modes_of(case: Case, asked: Sequence[str]) -> list[str]:
    """One step is what inference does, and memory is a matter of training."""
    if case.suite == "memory":
        return ["training"]
    return [mode for mode in asked if mode == "inference" or case.T > 1 or case.suite == "latency"] or list(asked)


def too_large(case: Case, largest: float) -> Record:
    gflop = case.flop() / 1e9
    why = f"not run: {gflop:.0f} GFLOP in a training step, more than --largest {largest:g}"
    return asdict(case) | {"mode": "training", "provider": "fused", "refused": why}


def merged(case: Case, modes: Sequence[str], processes: list[dict[str, Any]], floors: dict[str, Any]) -> list[Record]:
    """One record for each mode and provider, from those of all processes."""
    from providers import PLAIN

    records = []
    for mode in modes:
        names = processes[0]["providers"]
        rows = [{r["provider"]: r for r in p["result"] if r["mode"] == mode} for p in processes if "result" in p]
        for name in names:
            found = [row[name] for row in rows if name in row]
            limit = floor(case, mode, floors, 1.0 if name in PLAIN or not found else found[0].get("filled", 1.0))
            record = asdict(case) | {"mode": mode, "provider": name, "processes": len(found)}
            # A process that failed does not take the others' results with it.
            failed = [p for p in processes if "failed" in p] if not found else []
            record |= {k: found[-1][k] for k in FROM_LAST if found and k in found[-1]}
            refused = next((r["refused"] for r in found if "refused" in r), None)
            if failed:
                last = failed[0]["output"].strip().splitlines()[-1:] or ["it printed nothing"]
                refused = f"failed: {failed[0]['failed']}: {last[0]}"
                record["output"] = failed[0]["output"]
            if refused:
                records.append(record | {"refused": refused})
                continue
            times = [r["rounds_us"] for r in found]
            # Times, unlike ratios, are those of one process: the one that was disturbed least, by nn.LSTM's time in it.
            yardsticks = [row.get("torch", row[name]).get("rounds_us") or row[name]["rounds_us"] for row in rows]
            quietest = min(range(len(rows)), key=lambda n: statistics.median(yardsticks[n]))
            record["us"] = summary([times[quietest]])
            record["us_per_step"] = record["us"][1] / case.T
            record["rounds"] = sum(map(len, times))
            record["ratio"] = {
                base: summary([
                    [b / own for b, own in zip(row[base]["rounds_us"], row[name]["rounds_us"], strict=True)] for row in rows
                ])
                for base in BASELINES
                if base != name and all("rounds_us" in row.get(base, {}) for row in rows)
            }  # fmt: skip
            if limit:
                record |= limit | {"x_of_floor": record["us"][1] / limit["floor_us"]}
            records.append(record)
    return records


FROM_LAST = (
    "plan", "error", "filled", "peak_bytes", "retained_bytes", "host_us", "device_us", "device_us_missing",
)  # fmt: skip


def summary(processes: list[list[float]]) -> list[float]:
    """Low, median, high: p20 and p80 of all rounds, widened to the medians of the processes."""
    from measure import quantiles

    low, median, high = quantiles([number for process in processes for number in process])
    medians = [statistics.median(process) for process in processes]
    return [min(low, *medians), median, max(high, *medians)]


def line(row: Record) -> str:
    """A record as it is printed."""
    what = f"{row['suite']:9} {row['name']:24} {row['dtype']} {row['mode']:9} {row['provider']:16}"
    if "refused" in row:
        return f"{what} {row['refused'].splitlines()[0][:120]}"
    text = f"{what} {row['us'][1]:11.1f} us {row['us_per_step']:9.2f} us/step"
    if "torch" in row["ratio"]:
        low, middle, high = row["ratio"]["torch"]
        text += f"  {middle:6.2f}x nn.LSTM ({low:.2f}-{high:.2f})"
    if "peak_bytes" in row:
        text += f"  peak {row['peak_bytes'] / 2**20:.1f} MiB, retained {row['retained_bytes'] / 2**20:.1f} MiB"
    if "x_of_floor" in row:
        text += f"  {row['x_of_floor']:7.2f}x of floor"
    return text


KINDS = {  # of a case: what it is called, and what nn.LSTM does about it
    "single": ("single steps", "nn.LSTM"),
    "plain": ("plain sequences", "nn.LSTM"),
    "lengths": ("`lengths=`", "packing"),
    "packed": ("packed sequences", "nn.LSTM"),
    "resets": ("`resets=`", "a loop over steps"),
}


def means(records: Sequence[Record]) -> Iterator[tuple[str, str, str, str, float, int]]:
    """Geometric means of fused_lstm's speeds: suite, kind of case, mode, against what, the mean, and of how many cases.

    Of cases of like kind only; the suites on memory and on a grid of sizes have none that would mean much.
    """
    for part in ("workloads", "latency", "lengths", "packed", "resets"):
        for kind, (what, usual) in KINDS.items():
            for mode in MODES:
                for base, name in (("torch", usual), ("torch-by-hand", BY_HAND.get(kind, ""))):
                    found = [
                        r["ratio"][base][1] for r in records
                        if (r["suite"], r["mode"], r["provider"], kind_of(r)) == (part, mode, "fused", kind)
                        and base in r.get("ratio", {})
                    ]  # fmt: skip
                    if found and name:
                        yield part, f"{part}, {what}", mode, name, geometric_mean(found), len(found)


BY_HAND = {"lengths": "padding and masking by hand", "resets": "a call between resets, by hand"}


def kind_of(record: Record) -> str:
    return "single" if record["variant"] == "plain" and record["T"] == 1 else record["variant"]


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, numbers)))


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: a crash leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
