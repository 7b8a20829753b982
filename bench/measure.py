"""One case in one process: equal results first, then all providers in turn, round after round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from cases import DTYPES, MODES, Case
from providers import PLAIN, PROVIDERS, CannotRun, Ragged, Runner, with_torch
from timing import Timer, device_us, device_work, host_us
from torch import Tensor, nn

# Results are compared with fp64's, of all batch rows; of larger cases than so many operations, of some rows drawn anew.
CHECKED_WHOLE = {"cpu": 2e11, "cuda": 5e12}
CHECKED_ROWS = 16
FEWEST_ROUNDS = 5


class Data:
    """A case's layer, inputs, lengths or resets, cotangent: the same in every process, by the seed."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case, self.device = case, device
        torch.manual_seed(seed)
        dtype = DTYPES[case.dtype]
        size = dict(num_layers=case.layers, bidirectional=case.bidirectional, proj_size=case.proj)
        self.layer = nn.LSTM(case.I, case.H, **size).to(device, dtype)
        generator = torch.Generator(device).manual_seed(seed)

        def numbers(features: int) -> Tensor:
            return torch.randn(case.T, case.B, features, generator=generator, device=device).to(dtype)

        self.inputs = [numbers(case.I).requires_grad_() for _ in range(4)]  # taken in turn, lest a cache keep one
        self.cotangent = numbers((case.proj or case.H) * (1 + case.bidirectional))
        # Results are checked with cotangents of h_n and c_n as well; what is timed has none, as most users' loss has not.
        D = case.layers * (1 + case.bidirectional)
        sizes = (case.proj or case.H, case.H)
        self.cotangents = self.all_cotangents = [
            torch.randn(D, case.B, n, generator=generator, device=device).to(dtype) for n in sizes
        ]
        self.ragged: Ragged = {}
        if case.variant in ("lengths", "packed"):
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


def relative(found: Tensor | None, exact: Tensor) -> Tensor:
    """Errors of a result, relative to its largest value, or to 0.01 if that is larger; not finite where it is missing."""
    if found is None or found.shape != exact.shape:
        return torch.full((1,), math.inf)
    scale = max(exact.abs().amax().item() if exact.numel() else 0.0, 0.01)
    return torch.nan_to_num((found.double() - exact).abs() / scale, torch.inf).flatten()


def rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


class Rule:
    """The error rule: our error against fp64 is at most twice torch's in the same precision, plus a tiny term.

    RMS and maximum, of errors relative to the tensor's largest value, or to 0.01 if that is larger: inside the cell
    numbers are of order one, and so is what their rounding costs. The RMS is judged tensor by tensor; where it would be
    that of a few numbers, and for the maximum, which one unlucky rounding decides, over all tensors and problems added.
    The tiny term is one unit in the last place for the maximum, half a unit for the RMS; in fp64, where torch's own result
    is the reference, 32 such units. What breaks the rule raises AssertionError.
    """

    SMALL = 256  # elements below which a tensor's error is too few samples to be judged alone

    def __init__(self) -> None:
        self.all: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self.small: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def add(
        self,
        what: object,
        names: Sequence[str],
        ours: Sequence[Tensor],
        torchs: Sequence[Tensor],
        exact: Sequence[Tensor],
    ) -> None:
        for name, a, b, e in zip(names, ours, torchs, exact, strict=True):
            assert a.dtype == b.dtype, f"{what}: {name}: dtype {a.dtype}, expected {b.dtype}"
            self.add_one(f"{what}: {name}", a, relative(b, e), e, largest=0.1)

    def add_one(self, what: str, ours: Tensor | None, torchs: Tensor, exact: Tensor, largest: float = math.inf) -> None:
        """A result, beside torch's errors; none of its own may be as large as ``largest``."""
        shape = None if ours is None else tuple(ours.shape)
        assert shape == exact.shape, f"{what}: shape {shape}, expected {tuple(exact.shape)}"
        if not exact.any():
            assert not ours.any(), f"{what}: should be zero"
            return
        errors = relative(ours, exact)
        assert errors.max() < largest, f"{what}: relative error {errors.max():.1e}"
        self.all.setdefault(ours.dtype, []).append((errors, torchs))
        if exact.numel() >= self.SMALL:
            self._judge(what, ours.dtype, "RMS", errors, torchs)
        else:
            self.small.setdefault(ours.dtype, []).append((errors, torchs))

    def check(self) -> None:
        for kind, pools in (("maximum", self.all), ("RMS", self.small)):
            for dtype, pool in pools.items():
                self._judge(str(dtype), dtype, kind, *(torch.cat(e) for e in zip(*pool, strict=True)))

    @staticmethod
    def _judge(what: str, dtype: torch.dtype, kind: str, mine: Tensor, theirs: Tensor) -> None:
        unit = torch.finfo(dtype).eps * (32 if dtype == torch.float64 else 1)
        got, yardstick, tiny = (
            (mine.amax().item(), theirs.amax().item(), unit) if kind == "maximum" else (rms(mine), rms(theirs), unit / 2)
        )
        assert got <= 2 * yardstick + tiny, f"{what}: relative {kind} error {got:.2e}, torch's {yardstick:.2e}"


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The RMS of each result's relative errors; 1e99 where it is missing, not finite, or of another shape."""
    return {name: min(rms(relative(found.get(name), e)), 1e99) for name, e in exact.items()}


def wrong(found: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]) -> str | None:
    """What breaks the error rule, if anything does. ``torchs``: its relative errors."""
    rule = Rule()
    try:
        for name, e in exact.items():
            rule.add_one(name, found.get(name), torchs[name], e)
        rule.check()
    except AssertionError as error:
        return f"wrong result, not timed; {error}"
    return None


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


def prepared(case: Case, device: str, seed: int = 0) -> Data:
    """A case's data, and torch's switches as its dtype wants them."""
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    return Data(case, device, seed)


def rehearse(case: dict[str, Any], modes: Sequence[str], providers: Sequence[str], device: str) -> None:
    """Call once, at three steps, what :func:`measure` will call, so that it finds the kernels compiled: T is none of their
    constants."""
    data = prepared(Case(**case | {"T": min(case["T"], 3)}), device)
    for name in providers:
        with suppress(CannotRun):
            runner = PROVIDERS[name](data.layer, data.case, data.ragged_of(name))
            for mode in modes:
                data.results(runner, mode)
                with runner.within():
                    one_step(runner, data, mode)()


def profile(case: dict[str, Any], providers: Sequence[str]) -> dict[str, Any]:
    """What a GPU does in a training step, or, of a single step, in inference."""
    data, found = prepared(Case(**case), "cuda"), {}
    for name in providers:
        runner = PROVIDERS[name](data.layer, data.case, data.ragged_of(name))
        with runner.within():
            found[name] = device_work(one_step(runner, data, "training" if data.case.T > 1 else "inference"))
    return found


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
    case_, data, records = Case(**case), prepared(Case(**case), device, seed), []
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}")
        rows = {name: dict(asdict(case_), mode=mode, provider=name) for name in providers}
        if "lengths" in data.ragged:
            lengths = data.ragged["lengths"]
            for row in rows.values():
                row["filled"] = lengths.sum().item() / (case_.B * case_.T)
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
                    rows[name] |= {"host_us": host_us(lambda _, run=run: run(), 50), **device_us(run)}
        records += rows.values()
    return records


def checked(data: Data, mode: str, rows: dict[str, dict[str, Any]]) -> dict[str, Runner]:
    """The providers that can run and compute the right result; the others' records say why not."""
    exacts: dict[tuple[bool, bool], dict[str, Tensor]] = {}  # with lengths or resets, with cotangents of the states
    torchs: dict[bool, dict[str, Tensor]] = {}  # torch's errors: the larger of nn.LSTM's on plain input and by its ways
    why = ""
    for states in (True, False):
        data.cotangents = data.all_cotangents if states else []
        for ragged in [{}, data.ragged] if data.ragged else [{}]:
            try:
                exact = exacts[bool(ragged), states] = data.exact(ragged, mode)
            except CannotRun as error:
                why = f"cannot run: {error}, so that there is nothing to compare with"
                continue
            found, known = data.results(with_torch(data.layer, data.case, ragged), mode), torchs.setdefault(states, {})
            for name, e in exact.items():
                known[name] = max(known.get(name, e.new_zeros(1)), relative(found[name], e), key=rms)
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
            found = data.results(runner, mode)
            row["error"] = errors(found, exact)
            refusal = wrong(found, torchs[states], exact)
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
