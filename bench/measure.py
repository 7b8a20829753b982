"""One case in one process: equal results first, then all providers in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from providers import PLAIN, PROVIDERS, CannotRun, Ragged, Runner, with_torch
from timing import Timer, device_us, host_us
from torch import Tensor, nn
from workloads import MODES, Case

TORCH_DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
# Results are compared with fp64's, of all batch rows; of larger cases than so many operations, of some rows drawn anew.
CHECKED_WHOLE = {"cpu": 2e11, "cuda": 5e12}
CHECKED_ROWS = 16
FEWEST_ROUNDS = 5


class Data:
    """A case's layer, inputs, lengths or resets, cotangent: the same in every process, by the seed."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case, self.device = case, device
        torch.manual_seed(seed)
        dtype = TORCH_DTYPES[case.dtype]
        size = dict(num_layers=case.layers, bidirectional=case.bidirectional, proj_size=case.proj)
        self.layer = nn.LSTM(case.I, case.H, **size).to(device, dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def numbers(features: int) -> Tensor:
            return torch.randn(case.T, case.B, features, generator=generator, device=device).to(dtype)

        self.inputs = [numbers(case.I).requires_grad_() for _ in range(4)]  # taken in turn, lest a cache keep one
        self.cotangent = numbers((case.proj or case.H) * (1 + case.bidirectional))
        # For the results alone: h_n and c_n count, too. Not for what is timed: most users have a loss on the output.
        D = case.layers * (1 + case.bidirectional)
        sizes = (case.proj or case.H, case.H)
        self.cotangents = self.all_cotangents = [
            torch.randn(D, case.B, n, generator=generator, device=device).to(dtype) for n in sizes
        ]
        self.ragged: Ragged = {}
        if case.variant == "lengths":
            least = max(1, case.T // 4)
            self.ragged["lengths"] = torch.randint(least, case.T + 1, (case.B,), generator=generator, device=device)
        if case.variant == "resets":
            self.ragged["resets"] = torch.rand(case.T, case.B, generator=generator, device=device) < 0.03
        whole = case.flop() <= CHECKED_WHOLE[device]
        rows = torch.arange(case.B) if whole else torch.randperm(case.B)[:CHECKED_ROWS].sort().values
        self.rows = rows.to(device)

    def ragged_of(self, name: str) -> Ragged:
        return {} if name in PLAIN else self.ragged

    def exact(self, ragged: Ragged, mode: str) -> dict[str, Tensor]:
        """Results in fp64, of the rows to check."""
        rows = self.rows
        layer = deepcopy(self.layer).double()
        some = {k: v[rows] if k == "lengths" else v[:, rows] for k, v in ragged.items()}
        x = self.inputs[0].detach()[:, rows].double().requires_grad_()
        runner = with_torch(layer, replace(self.case, B=len(rows)), some)
        return self._results(runner, x, [g[:, rows].double() for g in (self.cotangent, *self.cotangents)], mode)

    def results(self, runner: Runner, mode: str) -> dict[str, Tensor]:
        """Results of the whole batch, as far as those of the rows to check go: others have no cotangent."""
        cotangents = []
        for whole in (self.cotangent, *self.cotangents):
            cotangents.append(torch.zeros_like(whole))
            cotangents[-1][:, self.rows] = whole[:, self.rows]
        found = self._results(runner, self.inputs[0], cotangents, mode)
        return {k: v[:, self.rows] if k in ("output", "dx", "h_n", "c_n") else v for k, v in found.items()}

    @staticmethod
    def _results(runner: Runner, x: Tensor, cotangents: list[Tensor], mode: str) -> dict[str, Tensor]:
        with runner.within(), torch.set_grad_enabled(mode != "inference"):
            results = runner.call(x)
            found = dict(zip(("output", "h_n", "c_n"), (t.detach() for t in results), strict=False))
            if mode != "training":
                return found
            x.grad = None
            for p in runner.parameters:
                p.grad = None
            # Those who return no states, or not both, are asked for gradients by the output alone.
            count = 3 if len(results) == 3 and len(cotangents) == 3 else 1
            torch.autograd.backward(results[:count], cotangents[:count])
        return found | {"dx": x.grad, **{"d" + k: v.clone() for k, v in runner.gradients().items()}}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each result, by the 2-norm, absolute where it should be zero; 1e99 where it is missing, not
    finite, or of another shape."""
    record = {}
    for name, e in exact.items():
        a = found.get(name)
        right = a is not None and a.shape == e.shape and bool(a.isfinite().all())
        record[name] = ((a.double() - e).norm() / (e.norm().item() or 1.0)).item() if right else 1e99
    return record


def wrong(got: dict[str, float], torchs: dict[str, float], dtype: torch.dtype) -> str | None:
    """What breaks the error rule: at most twice torch's own error in the same precision, plus half a unit."""
    unit = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 0.5)  # in fp64 torch's result is the reference
    broken = [f"{k}: {got[k]:.1e}, torch's {t:.1e}" for k, t in torchs.items() if not got[k] <= 2 * t + unit]
    return f"wrong result, not timed; relative error of {'; '.join(broken)}" if broken else None


def one_step(runner: Runner, data: Data, mode: str) -> Callable[[], None]:
    """A call as it is timed; the inputs take turns."""
    turn = 0

    def run() -> None:
        nonlocal turn
        turn = (turn + 1) % len(data.inputs)
        x = data.inputs[turn]
        if mode == "inference":
            with torch.no_grad():
                runner.call(x)
            return
        output = runner.call(x)[0]
        if mode == "training":
            x.grad = None
            for p in runner.parameters:
                p.grad = None
            output.backward(data.cotangent)

    return run


def quantiles(numbers: Sequence[float]) -> list[float]:
    """p20, p50, p80."""
    if len(numbers) < 2:
        return list(numbers) * 3
    tenths = statistics.quantiles(numbers, n=10, method="inclusive")
    return [tenths[1], tenths[4], tenths[7]]


def memory(runner: Runner, data: Data) -> dict[str, int]:
    """Bytes that torch allocates in a training step: at its peak, and between its forward and its backward pass."""
    x = data.inputs[0]

    def forward() -> Tensor:
        x.grad = None
        for p in runner.parameters:
            p.grad = None
        return runner.call(x)[0]

    with runner.within():
        forward().backward(data.cotangent)
        if data.device == "cuda":
            forward()  # leaves no gradients
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output = forward()
            retained = torch.cuda.memory_allocated() - before
            output.backward(data.cotangent)
            torch.cuda.synchronize()
            return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "retained_bytes": retained}
        forward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            output = forward()
            with torch.profiler.record_function("between the passes"):
                pass
            output.backward(data.cotangent)
    return _from_trace(trace)


def _from_trace(trace: Any) -> dict[str, int]:
    now = peak = retained = 0
    events = sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    for event in events:
        if event.name() == "between the passes":
            retained = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return {"peak_bytes": peak, "retained_bytes": retained}


def measure(
    case: dict[str, Any],
    modes: Sequence[str],
    providers: Sequence[str],
    device: str,
    seconds: float,
    seed: int,
    threads: int,
) -> list[dict[str, Any]]:
    """Records of a case for each mode and provider: the times of each round, or why there are none."""
    torch.set_num_threads(threads)
    case_ = Case(**case)
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case_.dtype == "tf32"
    data = Data(case_, device, seed)
    records = []
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}")
        rows = {name: dict(asdict(case_), mode=mode, provider=name) for name in providers}
        if "lengths" in data.ragged:
            lengths = data.ragged["lengths"]
            for row in rows.values():
                row |= {"filled": lengths.sum().item() / (case_.B * case_.T), "longest": int(lengths.max())}
        runners = checked(data, mode, rows)
        if runners:
            timed(data, mode, seconds, runners, rows)
        if mode == "training" and (device == "cuda" or case_.suite == "memory"):
            for name, runner in runners.items():
                rows[name] |= memory(runner, data)
        if device == "cuda" and case_.suite == "latency":
            for name, runner in runners.items():
                with runner.within():
                    run = one_step(runner, data, mode)
                    rows[name] |= {"host_us": host_us(run), **device_us(run, mode)}
        records += rows.values()
    return records


def checked(data: Data, mode: str, rows: dict[str, dict[str, Any]]) -> dict[str, Runner]:
    """The providers that can run and compute the right result; the others' records say why not."""
    dtype = TORCH_DTYPES[data.case.dtype]
    exacts: dict[tuple[bool, bool], dict[str, Tensor]] = {}  # with lengths or resets, with cotangents of the states
    torchs: dict[bool, dict[str, float]] = {}  # torch's errors: the larger of nn.LSTM's on plain input and by its ways
    why = ""
    for states in (True, False):
        data.cotangents = data.all_cotangents if states else []
        for ragged in [{}, data.ragged] if data.ragged else [{}]:
            try:
                exact = exacts[bool(ragged), states] = data.exact(ragged, mode)
            except CannotRun as error:
                why = f"cannot run: {error}, so that there is nothing to compare with"
                continue
            found = errors(data.results(with_torch(data.layer, data.case, ragged), mode), exact)
            torchs[states] = {k: max(v, torchs.get(states, {}).get(k, 0)) for k, v in found.items()}
        if mode != "training":
            break
    runners = {}
    for name, row in rows.items():
        ragged = data.ragged_of(name)
        if (bool(ragged), True) not in exacts:
            row["refused"] = why
            continue
        try:
            runner = PROVIDERS[name](data.layer, data.case, ragged)
            row["plan"] = runner.plan
            states = runner.states or mode != "training"
            data.cotangents = data.all_cotangents if states else []
            exact = exacts[bool(ragged), states]
            if not runner.states:
                exact = {k: v for k, v in exact.items() if k not in ("h_n", "c_n")}
            row["error"] = errors(data.results(runner, mode), exact)
            refusal = wrong(row["error"], {k: torchs[states][k] for k in exact}, dtype)
        except CannotRun as error:
            refusal = f"cannot run: {error}"
        except Exception as error:  # a peer's failure is a result, too
            refusal = f"failed: {type(error).__name__}: {str(error)[:500]}"
        if refusal is None:
            runners[name] = runner
        else:
            row["refused"] = refusal
    return runners


def timed(data: Data, mode: str, seconds: float, runners: dict[str, Runner], rows: dict[str, dict[str, Any]]) -> None:
    """Times of each round into the records; nobody always goes first."""
    timer = Timer(data.device)
    runs: list[tuple[str, Callable[[], None], Callable[[], AbstractContextManager]]] = [
        (name, one_step(runner, data, mode), runner.within) for name, runner in runners.items()
    ]
    for _, run, within in runs:
        with within():
            run()
            timer.repeat_for(run)
    times: dict[str, list[float]] = {name: [] for name in runners}
    start, n = time.perf_counter(), 0
    # At least some rounds, but on a machine that is too busy for them no more than three.
    while (spent := time.perf_counter() - start) < seconds or n < (FEWEST_ROUNDS if spent < 20 else 3):
        k = n % len(runs)
        for name, run, within in runs[k:] + runs[:k]:
            with within():
                times[name].append(timer.time(run))
        timer.wait()
        n += 1
    for name, found in times.items():
        rows[name]["rounds_us"] = timer.microseconds(found)
