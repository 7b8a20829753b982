"""What is done once on a machine with a GPU: measure the kernels, and compile them ahead (:func:`precompile`).

    python -m fused_lstm.tune [--hidden 256 512] [--batch 16 64] [--dtype fp16 tf32] [--directions 1 2] [--steps 128]

The command measures launch configurations, and then the layer beside torch's own LSTM. It writes a table for this device to
$FUSED_LSTM_CONFIGS, else to fused_lstm/ in the user's cache folder. From then on the layer takes what was measured fastest
for a problem's kernel, arithmetic, hidden size, recurrences and batch size (up to the next power of two); other problems are
left to the heuristic. ``backend="auto"`` takes torch's own LSTM where that was the faster one at the nearest size. Nothing
is measured at run time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, launch
from .call import ALIGNMENT, Rows
from .cell import Cell
from .checks import cast_dtype
from .gemm import tf32_allowed
from .launch.choice import (
    BY_NAME,
    SCHEDULES,
    STEPWISE,
    Choice,
    Timing,
    choose,
    entry,
    file_name,
    read_table,
    user_folder,
    write_table,
)  # fmt: skip
from .launch.schedule import Device, Recurrence, ceil_div
from .layer import LSTM

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
KINDS = {"fp16": "half", "bf16": "half"}
RUN = """import json, sys
path, given = json.load(sys.stdin)
sys.path[:] = path
from fused_lstm.tune import run_call
run_call(**given)"""
RESULTS = ("output", "h_n", "c_n")


def candidates(problem: Recurrence, device: Device, at_most: int) -> list[Any]:
    """The configurations that are worth measuring: those the models of their time like best, of all schedules."""
    able = [
        config
        for schedule in SCHEDULES
        for config in schedule.candidates(problem, device)
        if schedule.refusal(config, problem, device) is None
    ]
    return sorted(able, key=lambda config: BY_NAME[config.schedule].estimate(config, problem, device))[:at_most]


class Trial:
    """One problem's buffers, and its recurrence by any configuration."""

    def __init__(self, problem: Recurrence, dtype: torch.dtype, where: torch.device) -> None:
        T, H, B, R = problem.T, problem.H, problem.B, problem.R
        self.problem, generator = problem, torch.Generator(where).manual_seed(0)

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=where) * scale).to(dtype)

        self.rows = Rows(T, B, False, 2 if R == 2 else 1)
        self.w_hh, self.b_hh = numbers(R * 4 * H, H, scale=H**-0.5), numbers(R * 4 * H)
        self.x = numbers(T * B, R, 4, H)
        self.state = [numbers(R, B, H) for _ in range(4)]  # h0, c0, dh_n, dc_n
        self.dy = numbers(T * B, R, H)
        # What a forward pass writes; for the backward pass, numbers such as it leaves behind.
        self.gates, self.y, self.c = self.x.sigmoid(), self.dy.tanh(), self.dy.clone()
        self.out = torch.empty_like(self.x), torch.empty_like(self.dy)

    def prepare(self) -> None:
        """Undo what a forward pass did to its input."""
        if self.problem.kernel == "forward":
            self.gates.copy_(self.x)

    def run(self, config: Any) -> Tensor:
        h0, c0, dh_n, dc_n = self.state
        with launch.forced(config):
            if self.problem.kernel == "forward":
                launch.recurrence_forward(self.gates, self.w_hh, self.b_hh, h0, c0, self.rows, self.y, self.c)
                return self.y
            launch.recurrence_backward(
                self.dy, dh_n, dc_n, self.gates, self.c, self.y, h0, c0, self.w_hh, self.rows, *self.out
            )
            return self.out[0]


def seconds(trial: Trial, config: Any, repeats: int = 7) -> float:
    """Median time of a run after a first one, which compiles."""
    cuda, times = trial.x.is_cuda, []
    for n in range(repeats + 1):
        trial.prepare()
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            trial.run(config)
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            trial.run(config)
            elapsed = time.perf_counter() - start
        if n:
            times.append(elapsed)
    return statistics.median(times)


@dataclass(frozen=True)
class Result:
    """The fastest configuration of a problem, the heuristic's, and their seconds."""

    problem: Recurrence
    best: Any
    best_seconds: float
    heuristic: Choice
    heuristic_seconds: float
    measured: int

    def __str__(self) -> str:
        p, c = self.problem, self.best
        return (
            f"{p.kernel:8} {p.arithmetic:4} H={p.H:<5} B={p.B:<5} R={p.R}: {1e6 * self.best_seconds / p.T:8.2f} us/step, "
            f"{self.heuristic_seconds / self.best_seconds:.2f}x the heuristic's, best of {self.measured}: "
            f"{c.schedule}, {c}"
        )


def tune(trial: Trial, device: Device, at_most: int, timer: Callable[[Trial, Any], float] = seconds) -> Result:
    """Measure a problem's candidates. One whose result is not the reference's is refused, with a warning on stderr."""
    problem = trial.problem
    heuristic = choose(problem, device)
    configs = dict.fromkeys([heuristic.config, *candidates(problem, device, at_most)])
    trial.prepare()
    reference = trial.run(STEPWISE.candidates(problem, device)[0]).double()
    tolerance = 64 * torch.finfo(trial.x.dtype if problem.arithmetic != "tf32" else torch.float16).eps
    times = {}
    for config in configs:
        try:
            trial.prepare()
            error = ((trial.run(config).double() - reference).norm() / reference.norm()).item()
            if not error <= tolerance:
                raise ArithmeticError(f"relative error {error:.1e}, expected at most {tolerance:.1e}")
            times[config] = timer(trial, config)
        except (RuntimeError, ArithmeticError) as problem_with_it:
            print(f"not taken: {config}: {problem_with_it}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"no configuration runs {problem} on {device.name}")
    best = min(times, key=lambda config: times[config])
    return Result(problem, best, times[best], heuristic, times.get(heuristic.config, float("nan")), len(times))


def calls(hidden: Iterable[int], batch: Iterable[int], kind: str, directions: Iterable[int], T: int) -> list[Timing]:
    """Calls of one layer to time: a sequence, the same with lengths, a single step."""
    dtype = kind if kind == "tf32" else str(DTYPES[kind]).removeprefix("torch.")
    return [
        Timing(dtype, training, lengths, steps, B, H, H, 1, D, 0)
        for H in hidden for B in batch for D in directions for training in (False, True)
        for lengths, steps in ((False, T), (True, T), (False, 1))
    ]  # fmt: skip


def timed(call: Timing, where: torch.device, repeats: int = 7) -> Timing:
    """A call's times by the kernels and by torch's own LSTM, in turn: the quickest of each, and the device waited for."""
    dtype = torch.float32 if call.dtype == "tf32" else getattr(torch, call.dtype)
    layer = LSTM(
        call.I, call.H, call.layers, bidirectional=call.directions == 2, proj_size=call.P, device=where, dtype=dtype
    )  # fmt: skip
    x = torch.randn(call.T, call.B, call.I, device=where, dtype=dtype)
    lengths = torch.arange(call.B, device=where) % call.T + 1 if call.lengths else None
    wanted, times = [x.requires_grad_(), *layer.parameters()], {"triton": [], "aten": []}
    dy = torch.randn(call.T, call.B, call.directions * (call.P or call.H), device=where, dtype=dtype)
    for _ in range(repeats + 1):
        for layer.backend, found in times.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(call.training):
                y = layer(x, lengths=lengths)[0]
            if call.training:
                torch.autograd.grad(y, wanted, dy)
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            found.append(1e6 * (time.perf_counter() - start))
    kernels, torchs = (min(found[1:]) for found in times.values())  # the first compiles
    return call._replace(kernels_us=kernels, torch_us=torchs)


def problems(hidden: Iterable[int], batch: Iterable[int], kind: str, directions: Iterable[int], T: int) -> list[Recurrence]:
    return [
        Recurrence(kernel, kind, T, H, B, R)
        for H in hidden for B in batch for R in directions for kernel in ("forward", "backward")
    ]  # fmt: skip


def precompile(
    lstm: LSTM,
    B: int | Sequence[int],
    *,
    single_step: bool = False,
    training: bool = False,
    loss_of: Iterable[str] = ("output",),
    hx: bool = False,
    lengths: bool = False,
    resets: bool = False,
) -> None:
    """Compile what calls like these will need on the layer's GPU, so that the first of them need not wait for it.

    Each call runs once, in a process of its own, which leaves its kernels in Triton's cache on disk; they are the same for
    any T but 1. Takes some seconds for each call, as many at a time as there are CPU cores.

    Args:
        lstm: the layer; under autocast call this under autocast, too.
        B: batch size, or several of them.
        single_step: for calls with T = 1, as :meth:`fused_lstm.LSTM.step` makes them, in place of longer ones.
        training: for calls with a gradient, in place of those without.
        loss_of: which of ``"output"``, ``"h_n"``, ``"c_n"`` the gradient comes from.
        hx: for calls that are given initial states.
        lengths, resets: for calls that are given these.

    Raises:
        TypeError: not a fused_lstm.LSTM.
        RuntimeError: the layer is not on a GPU, or a call failed; says how.
        ValueError: B below 1 or no integer, or something unknown in ``loss_of``.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(f"precompile expects a fused_lstm.LSTM, got: {type(lstm).__module__}.{type(lstm).__name__}")
    sizes = list(B) if isinstance(B, (list, tuple, range, set)) else [B]
    loss_of = [loss_of] if isinstance(loss_of, str) else list(loss_of)
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"B should be one or more integers of at least 1, got {B!r}")
    if not loss_of or not set(loss_of) <= set(RESULTS):
        raise ValueError(f"loss_of should hold some of {', '.join(RESULTS)}, got {loss_of}")
    weight = lstm.weight_hh_l0
    if not weight.is_cuda:
        raise RuntimeError(
            f"precompile: expected a layer on a GPU, for which there is something to compile, got {weight.device}"
        )
    names = ("hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size", "recompute")
    given = {
        "layer": {name: getattr(lstm, name) for name in names}, "cell": lstm.cell and asdict(lstm.cell),
        "dtype": str(cast_dtype(weight)).removeprefix("torch."), "device": str(weight.device),
        "tf32": tf32_allowed(), "T": 1 if single_step else 3, "loss_of": loss_of if training else [],
        "hx": hx, "lengths": lengths, "resets": resets,
    }  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_in_a_process, ({**given, "B": size} for size in sizes)))


def _in_a_process(given: dict[str, Any]) -> None:
    message = json.dumps([sys.path, given])
    done = subprocess.run([sys.executable, "-c", RUN], input=message, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"precompile: the call with B={given['B']} failed: {done.stderr.strip()[-2000:]}")


def run_call(
    layer: dict[str, Any], cell: dict[str, Any] | None, dtype: str, device: str, tf32: bool, T: int, B: int,
    loss_of: list[str], hx: bool, lengths: bool, resets: bool,
) -> None:  # fmt: skip
    """One call by the kernels, which do not depend on the input's features."""
    if tf32 != tf32_allowed():
        torch.backends.cudnn.allow_tf32 = tf32
    options = {"device": device, "dtype": getattr(torch, dtype)}
    lstm = LSTM(1, **layer, cell=cell and Cell(**cell), backend="triton", **options).train(bool(loss_of))
    K, H, P = lstm.num_layers * (1 + lstm.bidirectional), lstm.hidden_size, lstm.proj_size
    shape = (B, T) if lstm.batch_first else (T, B)
    states = (torch.zeros(K, B, P or H, **options), torch.zeros(K, B, H, **options)) if hx else None
    steps = torch.full((B,), T - 1, device=device) if lengths else None
    begins = torch.zeros(shape, device=device) if resets else None
    with torch.set_grad_enabled(bool(loss_of)):
        y, (h_n, c_n) = lstm(torch.zeros(*shape, 1, **options), states, lengths=steps, resets=begins)
    if loss_of:
        results = dict(zip(RESULTS, (y, h_n, c_n), strict=True))
        torch.autograd.backward([results[name].sum() for name in loss_of])
    if device != "cpu":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_lstm.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    hidden, batch, dtypes = [64, 128, 256, 512, 768, 1024], [1, 16, 64, 256], ["fp16", "bf16", "tf32"]
    parser.add_argument("--hidden", type=int, nargs="+", default=hidden, metavar="H", help=f"hidden sizes {default}")
    parser.add_argument("--batch", type=int, nargs="+", default=batch, metavar="B", help=f"batch sizes {default}")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=dtypes, help=f"{default}")
    parser.add_argument("--directions", type=int, choices=[1, 2], nargs="+", default=[1], help=f"of the layer {default}")
    parser.add_argument("--steps", type=int, default=128, metavar="T", help="time steps of a trial")
    parser.add_argument("--candidates", type=int, default=8, help="configurations to measure for each problem")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, keeping what is measured")
    parser.add_argument("--out", type=Path, default=None, help="folder for the table (default: the user's)")
    args = parser.parse_args(arguments)
    if min(*args.hidden, *args.batch, args.steps, args.candidates) < 1:
        parser.error("--hidden, --batch, --steps and --candidates should be at least 1")
    if not torch.cuda.is_available():
        print("fused_lstm.tune needs a CUDA or ROCm device, and torch sees none here", file=sys.stderr)
        return 2
    device = launch.device(torch.cuda.current_device())
    path = (args.out or user_folder()) / file_name(device.name)
    about = {
        "device": device.name, "torch": torch.__version__, "triton": launch.triton.__version__,
        "fused_lstm": __version__, "date": date.today().isoformat(),
    }  # fmt: skip
    hidden = sorted({ceil_div(H, ALIGNMENT) * ALIGNMENT for H in args.hidden})  # as the layer pads them
    work: list[tuple[str, Recurrence | Timing]] = []
    for kind, name in {KINDS.get(name, name): name for name in args.dtype}.items():  # one serves fp16 and bf16
        work += [(name, p) for p in problems(hidden, args.batch, kind, args.directions, args.steps)]
    for name in args.dtype:
        work += [(name, c) for c in calls(hidden, args.batch, name, args.directions, args.steps)]
    if path.is_file():
        read_table(path)  # one that is broken is an error now, not after the first measurement
    end, written = time.monotonic() + args.seconds, 0
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        for n, (name, problem) in enumerate(work, 1):
            if time.monotonic() > end:
                print(f"out of time: {len(work) - n + 1} of {len(work)} problems were not measured", file=sys.stderr)
                break
            torch.backends.cudnn.allow_tf32 = name == "tf32"
            if isinstance(problem, Timing):
                result = timed(problem, torch.device("cuda"))
                write_table(path, [], [result])
                written += 1
                what = f"{result.dtype} {'training' if result.training else 'inference'}{', lengths' * result.lengths}"
                ratio = result.torch_us / result.kernels_us
                print(f"{n}/{len(work)} {what} {result}: {result.kernels_us:.0f} us, {ratio:.2f}x torch's own", flush=True)
                continue
            result = tune(Trial(problem, DTYPES[name], torch.device("cuda")), device, args.candidates)
            write_table(path, [entry(problem, result.best, 1e6 * result.best_seconds / problem.T, **about)])
            written += 1
            print(f"{n}/{len(work)} {result}", flush=True)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    print(f"{written} results written to {path}" if written else "nothing was measured, nothing written")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
