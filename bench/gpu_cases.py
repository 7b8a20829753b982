"""What must hold of the kernels on a GPU: the cases of gpu_check.py that ask for right results, not for speed.

Each is a function without arguments that returns a record, and raises where something is wrong.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fused_lstm.choose import choose, describe
from fused_lstm.config import LaunchConfig, Recurrence, arithmetic
from fused_lstm.rows import Rows
from timing import graph_of
from torch import Tensor

import fused_lstm

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
KINDS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


class Both:
    """A layer's two recurrences on random data, ragged if asked for, each by a configuration of its own."""

    def __init__(self, kind: str, T: int, H: int, B: int, R: int = 1, ragged: bool = False) -> None:
        self.dtype, self.tf32 = KINDS[kind]
        self.shape, g = (T, H, B, R), torch.Generator(DEVICE).manual_seed(T + H + B + R)

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=DEVICE) * scale).to(self.dtype)

        lengths = torch.randint(0, T + 1, (B,), generator=g, device=DEVICE) if ragged else None
        resets = torch.rand(T * B, generator=g, device=DEVICE) < 0.1 if ragged else None
        self.rows = Rows(T, B, False, 2 if R == 2 else 1, lengths, None, resets)
        self.x, self.w = numbers(T * B, R, 4, H), numbers(R, 4 * H, H, scale=H**-0.5)
        self.h0, self.c0, self.dh_n, self.dc_n = (numbers(R, B, H) for _ in range(4))
        self.dy = numbers(T * B, R, H)

    def chosen(self) -> tuple[LaunchConfig, LaunchConfig]:
        from fused_lstm import launch

        T, H, B, R = self.shape
        device = launch.device(0)
        kind = arithmetic(self.dtype, self.tf32)
        return tuple(choose(Recurrence(k, kind, T, H, B, R), device).config for k in ("forward", "backward"))

    def run(self, forward: LaunchConfig, backward: LaunchConfig) -> list[Tensor]:
        from fused_lstm import launch

        gates, nan = self.x.clone(), float("nan")
        y, c = torch.full_like(self.dy, nan), torch.full_like(self.dy, nan)
        dgates, h_prev = torch.full_like(self.x, nan), torch.full_like(self.dy, nan)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.tf32):
            h_n, c_n = launch.recurrence_forward(gates, self.w, self.h0, self.c0, self.rows, y, c, forward)
            dc0 = launch.recurrence_backward(
                self.dy, self.dh_n, self.dc_n, gates, c, y, self.h0, self.c0, self.w, self.rows, dgates, h_prev, backward
            )
        return [t.nan_to_num(7) for t in (y, h_n, c_n, gates, c, dgates, h_prev, dc0)]


def stepwise_twin(config: LaunchConfig) -> LaunchConfig:
    """The same tiles with a launch for each step."""
    return replace(config, persistent=False, resident=0)


def differing(a: list[Tensor], b: list[Tensor]) -> list[int]:
    return [i for i, (s, t) in enumerate(zip(a, b, strict=True)) if not torch.equal(s, t)]


SIZES = [
    (64, 16, 1), (64, 300, 2), (128, 48, 2), (256, 16, 1), (512, 64, 1), (528, 8, 1), (768, 16, 1), (1024, 64, 1),
    (1024, 16, 2),
]  # fmt: skip


def schedules_agree(kind: str, sizes: list[tuple[int, int, int]] = SIZES) -> dict[str, Any]:
    """Persistent against stepwise at equal tiles, bit for bit: what is chosen for many sizes, plain and ragged."""
    record: dict[str, Any] = {}
    for H, B, R in sizes:
        for ragged in (False, True):
            problem = Both(kind, 33, H, B, R, ragged)
            configs = problem.chosen()
            results = problem.run(*configs)
            twins = problem.run(*(stepwise_twin(c) for c in configs))
            again = problem.run(*configs)
            name = f"H={H} B={B} R={R}{' ragged' if ragged else ''}"
            record[name] = {
                "persistent": [c.persistent for c in configs],
                "differs": differing(results, twins),
                "repeats": differing(results, again),
            }
    wrong = {k: v for k, v in record.items() if v["differs"] or v["repeats"]}
    if wrong:
        raise AssertionError(f"{kind}: results differ (indices of y, h_n, c_n, gates, c, dgates, h_prev, dc0): {wrong}")
    return {"equal": len(record), "persistent": sum(any(v["persistent"]) for v in record.values())}


def random_problems(count: int = 200) -> dict[str, Any]:
    """Random calls of the layer by the error rule of the tests, against nn.LSTM in the same precision and in fp64."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checks import Config, Rule, add_config

    torch.backends.cudnn.allow_tf32 = False
    rule = Rule()
    for seed in range(count):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        add_config(rule, Config.random(seed, dtype, largest=random.Random(seed).choice([64, 200, 600])), "triton")
    rule.check()
    return {"problems": count}


def launches_under_load(count: int = 2000) -> dict[str, Any]:
    """The barrier, again and again beside other work: equal bits every time."""
    load, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    record = {}
    for H, B in ((256, 16), (1024, 64)):
        problem = Both("bf16", 16, H, B)
        configs = problem.chosen()
        first = problem.run(*configs)
        wrong = 0
        for n in range(count // 2):
            if n % 4 == 0:
                with torch.cuda.stream(load):
                    a @ a
            wrong += bool(differing(first, problem.run(*configs)))
        record[f"H={H} B={B}"] = {"launches": count // 2, "wrong": wrong}
        if wrong:
            raise AssertionError(f"{wrong} of {count // 2} runs gave other bits: {record}")
    return record


def layer_and_input(H: int = 256, T: int = 40, B: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = fused_lstm.LSTM(H, H, device="cuda", dtype=dtype, backend="triton")
    return layer, torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)


def step_of(layer: Any, x: Tensor) -> Callable[[], list[Tensor]]:
    parameters = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        y, (h, c) = layer(x)
        return [y.detach(), *torch.autograd.grad((y.float().square().sum(), h.sum(), c.sum()), parameters)]

    return run


def cuda_graph() -> dict[str, Any]:
    """Forward and backward captured in a CUDA graph: a replay gives the bits of an ordinary call."""
    layer, x = layer_and_input()
    run = step_of(layer, x)
    expected = run()
    captured: list[Tensor] = []

    def step() -> None:
        captured[:] = run()

    replay = graph_of(step)
    for t in captured:
        t.fill_(float("nan"))
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert not differing(expected, captured), f"other bits: {differing(expected, captured)}"
    return {"replays": 3}


def two_streams() -> dict[str, Any]:
    """Two layers on two streams at once: neither hangs, neither changes the other's bits."""
    pairs = [layer_and_input(512, 64, 32), layer_and_input(1024, 64, 64)]
    runs = [step_of(*pair) for pair in pairs]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    for _ in range(50):
        results = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run())
        torch.cuda.synchronize()
        for a, b in zip(expected, results, strict=True):
            assert not differing(a, b), f"other bits: {differing(a, b)}"
    return {"rounds": 50}


def long_sequence() -> dict[str, Any]:
    """T = 70,000: more steps than a 16-bit counter, bit for bit as a launch for each step."""
    problem = Both("bf16", 70_000, 256, 2)
    configs = problem.chosen()
    wrong = differing(problem.run(*configs), problem.run(*(stepwise_twin(c) for c in configs)))
    assert not wrong, f"other bits: {wrong}"
    return {"steps": 70_000, "persistent": [c.persistent for c in configs]}


def large_offsets() -> dict[str, Any]:
    """More than 2^31 elements of gates: the last rows are as right as the first."""
    T, B, H = 4200, 256, 512
    assert T * B * 4 * H > 2**31
    layer, _ = layer_and_input(H)
    x = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, _ = layer(x)
    rows = [0, B - 1]
    (dx,) = torch.autograd.grad(y[-64:].float().square().sum(), x)
    small = x[:, rows].detach().requires_grad_()
    exact = torch.nn.LSTM(H, H).double().cuda()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    wide = small.double().detach().requires_grad_()
    z, _ = exact(wide)
    (dz,) = torch.autograd.grad(z[-64:].square().sum(), wide)
    record = {
        "elements": T * B * 4 * H,
        "error y": ((y[:, rows].double() - z).norm() / z.norm()).item(),
        "error dx": ((dx[-64:, rows].double() - dz[-64:]).norm() / dz[-64:].norm()).item(),
    }
    assert record["error y"] < 0.02, record
    assert record["error dx"] < 0.05, record
    return record


def sanitizer(tool: str) -> dict[str, Any]:
    """NVIDIA's compute-sanitizer over a small problem of each schedule."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"not run": "compute-sanitizer is not installed here"}
    check = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    tail = (check.stdout + check.stderr)[-3000:]
    assert check.returncode == 0, tail
    return {"output": tail[-300:]}


def choices() -> dict[str, Any]:
    """What choose() says for this device, in words."""
    from fused_lstm import launch

    device, said = launch.device(0), {}
    for kind in KINDS:
        for H, B in ((64, 64), (128, 256), (512, 16), (768, 16), (1024, 64)):
            for kernel in ("forward", "backward"):
                problem = Recurrence(kernel, arithmetic(*KINDS[kind]), 100, H, B, 1)
                said[f"{kernel} {kind} H={H} B={B}"] = describe(choose(problem, device), problem, device)
    return said


def kernel_tests() -> dict[str, Any]:
    """The kernels' tests, on the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernels or gpu", "-p", "no:cacheprovider", "tests"]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert report.returncode == 0, report.stdout[-6000:]
    return {"output": report.stdout[-300:]}


def some_sizes() -> dict[str, Any]:
    """The same for two sizes, which takes less time to compile: to be known before anything is timed."""
    return {kind: schedules_agree(kind, [(256, 16, 1), (512, 64, 1)]) for kind in ("bf16", "tf32")}


CASES: dict[str, Callable[[], Any]] = {
    "schedules agree, some sizes": some_sizes,
    **{f"schedules agree, {kind}": partial(schedules_agree, kind) for kind in KINDS},
    "choices": choices,
    "2,000 launches under load": launches_under_load,
    "CUDA graph": cuda_graph,
    "two streams": two_streams,
    "T = 70,000": long_sequence,
    "more than 2^31 elements": large_offsets,
    "memcheck": partial(sanitizer, "memcheck"),
    "racecheck": partial(sanitizer, "racecheck"),
    "200 random problems": random_problems,
    "kernel tests": kernel_tests,
}


def run_case(name: str) -> Any:
    return CASES[name]()


if __name__ == "__main__":  # what the sanitizer looks at
    for shape in ((3, 64, 4), (3, 256, 4)):
        trial = Both("bf16", *shape, ragged=True)
        trial.run(*trial.chosen())
        trial.run(*(stepwise_twin(c) for c in trial.chosen()))
    torch.cuda.synchronize()
