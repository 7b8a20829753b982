"""Compare fused_lstm.LSTM with torch.nn.LSTM on this CPU, side by side in one process.

    python bench/cpu.py [--threads 1 2] [--backend auto] [--only train] [--seconds 1.0] [--json FILE]

Every case has a process of its own, since the state in which earlier cases leave the heap decides who pays for page faults
(a block of 32 MiB or more is mapped anew in every call, or not, by what was freed before). It is checked for equal results
first; then the two layers take turns, and each turn of both gives one ratio nn.LSTM's time / fused_lstm's time. Above 1
fused_lstm is faster. Printed: the ratios' median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # "infer" or "train"
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    versus: str = "padded"  # nn.LSTM on padded or packed input, or in a loop over steps that clears the state


SIZES = [
    (8, 32, 64, 64),
    (8, 128, 64, 256),
    (16, 128, 64, 128),
    (32, 64, 256, 256),
    (64, 100, 128, 128),
    (8, 32, 512, 512),
]
CASES = [
    *(Case("ordinary", kind, *size) for kind in ("infer", "train") for size in SIZES),
    *(Case("stacked", kind, 16, 64, 64, 128, layers=2, bidirectional=True) for kind in ("infer", "train")),
    *(Case("bf16", kind, 16, 64, 128, 128, dtype="bfloat16") for kind in ("infer", "train")),
    *(Case("one step", "infer", B, 1, H, H) for B in (1, 8, 64) for H in (128, 512)),
    *(Case("one step", "train", B, 1, H, H) for B in (1, 16, 64) for H in (128, 512)),
    Case("one step, stacked", "infer", 8, 1, 512, 512, layers=2, bidirectional=True),
    *(Case("half", kind, 16, 32, 128, 128, dtype="float16") for kind in ("infer", "train")),
    *(Case("double", kind, *size, dtype="float64") for kind in ("infer", "train") for size in SIZES[1:4]),
    *(
        Case(f"lengths, against {versus}", kind, *size, versus=versus)
        for versus in ("padded", "packed")
        for kind in ("infer", "train")
        for size in ((16, 128, 64, 128), (64, 100, 128, 128), (32, 64, 256, 256))
    ),
    *(
        Case(f"resets, against {versus}", "train", *size, versus=versus)
        for versus in ("padded", "loop")
        for size in ((16, 128, 64, 128), (2, 128, 512, 128))
    ),
    *(Case("recompute", "train", *size) for size in ((16, 128, 64, 128), (64, 128, 512, 512))),
]


def step_of(call: Callable[[], Tensor], module: nn.Module, kind: str) -> Callable[[], Tensor]:
    def infer() -> Tensor:
        with torch.no_grad():
            return call()

    def train() -> Tensor:
        module.zero_grad()
        output = call()
        output.sum().backward()
        return output

    return train if kind == "train" else infer


def packed(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    output, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output, total_length=x.shape[0])[0]


def loop(lstm: nn.LSTM, x: Tensor, resets: Tensor) -> Tensor:
    h = c = x.new_zeros(1, x.shape[1], lstm.hidden_size)
    keep = (~resets)[..., None].to(x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        output, (h, c) = lstm(x[t : t + 1], (h * keep[t], c * keep[t]))
        outputs.append(output)
    return torch.cat(outputs)


def measure(case: Case, threads: int, backend: str, seconds: float) -> dict[str, float | str]:
    torch.set_num_threads(threads)
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    theirs = nn.LSTM(case.I, case.H, case.layers, bidirectional=case.bidirectional, dtype=dtype)
    ours = fused_lstm.LSTM.from_torch(theirs, backend=backend, recompute=case.name == "recompute")
    ours.train()
    x = torch.randn(case.T, case.B, case.I, dtype=dtype)
    ragged: dict[str, Tensor] = {}
    if case.name.startswith("lengths"):
        ragged["lengths"] = torch.randint(case.T // 4, case.T + 1, (case.B,))
    if case.name.startswith("resets"):
        ragged["resets"] = torch.rand(case.T, case.B) < 0.03
    calls = {
        "padded": lambda: theirs(x)[0],
        "packed": lambda: packed(theirs, x, ragged["lengths"]),
        "loop": lambda: loop(theirs, x, ragged["resets"]),
    }
    a = step_of(calls[case.versus], theirs, case.kind)
    b = step_of(lambda: ours(x, **ragged)[0], ours, case.kind)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[case.dtype]
    difference = (a().double() - b().double()).abs().max().item()
    if not difference <= tolerance and not (ragged and case.versus == "padded"):  # that one computes something else
        raise RuntimeError(f"{case}: results differ by {difference:.1e}, more than {tolerance:.0e}: nothing was timed")
    b()
    start = time.perf_counter()
    a()
    once = time.perf_counter() - start
    inner = max(1, int(2e-3 / once))
    ratios = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 9:
        times = []
        for step in (a, b) if len(ratios) % 2 else (b, a):  # neither side always goes first
            start = time.perf_counter()
            for _ in range(inner):
                step()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1] if len(ratios) % 2 else times[1] / times[0])
    low, median, high = statistics.quantiles(ratios, n=4)
    with torch.set_grad_enabled(case.kind == "train"):
        plan = fused_lstm.explain(ours, x, **ragged)
    return {"ratio": median, "low": low, "high": high, "runs": len(ratios), "plan": f"{plan.backend}/{plan.how}"}


def markdown(results: dict[str, Any]) -> str:
    """A table of results: for each kind of case and number of threads, the lowest and highest median ratio of its sizes."""
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in results["rows"]:
        rows.setdefault((row["name"], row["kind"]), {}).setdefault(row["threads"], []).append(row["ratio"])
    threads = sorted({row["threads"] for row in results["rows"]})
    lines = [
        "| case | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in threads) + " |",
        "|---" * (len(threads) + 1) + "|",
    ]
    for (name, kind), ratios in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = [
            f"{min(ratios[n]):.2f} to {max(ratios[n]):.2f}" if len(ratios[n]) > 1 else f"{ratios[n][0]:.2f}" for n in threads
        ]
        lines.append(f"| {name}, {'training' if kind == 'train' else 'inference'} | " + " | ".join(cells) + " |")
    about = f"{results['device']}, torch {results['torch']}, {results['date']}"
    return "\n".join(lines) + f"\n\n({about}; lowest to highest over the sizes of a case.)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backend", default="auto", choices=["auto", "aten", "reference"])
    parser.add_argument("--only", default="", help="run cases whose description contains this text")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if min(args.threads) < 1 or args.seconds <= 0:
        parser.error("--threads and --seconds should be positive")
    records = []
    print(
        f"{'threads':>7} {'case':18} {'kind':5} {'B':>4} {'T':>4} {'I':>4} {'H':>4} {'dtype':8} {'ratio':>6} quartiles  plan"
    )
    for threads in args.threads:
        for case in CASES:
            if args.only not in f"{case.name} {case.kind} {case.dtype}":
                continue
            with get_context("spawn").Pool(1) as process:
                result = process.apply(measure, (case, threads, args.backend, args.seconds))
            records.append({"threads": threads, **asdict(case), **result})
            print(
                f"{threads:7} {case.name:18} {case.kind:5} {case.B:4} {case.T:4} {case.I:4} {case.H:4} {case.dtype:8} "
                f"{result['ratio']:6.2f} {result['low']:.2f}-{result['high']:.2f}  {result['plan']}",
                flush=True,
            )
    if not records:
        sys.exit(f"cpu.py: no case matches --only {args.only!r}; the cases are {sorted({case.name for case in CASES})}")
    if args.json:
        about = {
            "date": date.today().isoformat(),
            "device": _cpu(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "fused_lstm": fused_lstm.__version__, "rows": records}, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
