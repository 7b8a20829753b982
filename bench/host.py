"""What a call costs the host, and how many operations it gives the device, beside torch.nn.LSTM.

    python bench/host.py [--base REV] [--rounds N] [--device cpu] [--json FILE]

On a GPU: microseconds until a call returns, the device idle before, and what the profiler saw the device do. Without one
the same road is walked on CPU tensors: what launches a kernel and what multiplies matrices is replaced by functions that
return tensors made beforehand, and of nn.LSTM the C++ function that its module calls; nn.LSTM then has no backward pass.
Operations are the launches, the products (nn.LSTM's C++ call counts as one) and what else computes or moves data. The
schedule is forced. Without a GPU small calls of a CPU are timed as well, as they are: "on a CPU".

With --base, the package of a git revision is measured beside this checkout's, each in processes of its own, in turn.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from process import about, copy_of_checkout, isolated, unpack
from providers import by_schedule
from timing import host_us
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

MODES = ("inference", "forward", "backward")
B, I, H = 4, 48, 32  # noqa: E741  # of no weight: the time of the host does not depend on them
SMALL = ((1, 1, 128), (8, 1, 128), (1, 1, 512), (1, 10, 16), (4, 10, 16), (1, 16, 32), (4, 16, 32))  # B, T and H = I
BLOCKS, CALLS = 50, 5  # the quickest of so many blocks counts, each the median of so many calls


@dataclass(frozen=True)
class Case:
    name: str
    T: int = 2  # few: what each launch of a step adds is seen by the case that has more
    schedule: str = "stepwise"
    layers: int = 1
    bidirectional: bool = False
    lengths: bool = False
    state: bool = False  # h0 and c0 are given

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional


CASES = (
    Case("plain"), Case("T = 1", T=1), Case("T = 1, states", T=1, state=True), Case("T = 16", T=16),
    Case("T = 16, persistent", T=16, schedule="persistent"), Case("lengths", lengths=True),
    Case("two layers", layers=2), Case("both directions", bidirectional=True),
)  # fmt: skip


Rows = dict[str, dict[str, float]]  # of each case and mode
Sides = dict[str, list[Rows]]  # "here" and "base", by process


class Run(NamedTuple):
    """A call to be timed; ``prepare`` makes what it is given, and is not timed."""

    prepare: Callable[[], Any]
    call: Callable[[Any], Any]


def runs(case: Case, module: nn.Module, device: str, dtype: torch.dtype, backward: bool) -> dict[str, Run]:
    """The calls of a layer of ours or of torch's, by mode."""
    x = torch.randn(case.T, B, I, device=device, dtype=dtype)
    lengths = torch.arange(B, device=device) % case.T + 1
    groups = case.layers * case.directions
    hx = tuple(torch.randn(2, groups, B, H, device=device, dtype=dtype)) if case.state else None
    leaf, dy = x.clone().requires_grad_(), torch.randn(case.T, B, H * case.directions, device=device, dtype=dtype)
    wanted = [leaf, *module.parameters()]

    def call(x: Tensor) -> Tensor:
        if not case.lengths:
            return module(x, hx)[0]
        if type(module) is not nn.LSTM:
            return module(x, hx, lengths=lengths)[0]
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        return pad_packed_sequence(module(packed, hx)[0], total_length=case.T)[0]

    def inference(x: Tensor) -> Tensor:
        with torch.no_grad():
            return call(x)

    found = {"inference": Run(lambda: x, inference), "forward": Run(lambda: leaf, call)}
    if backward:
        found["backward"] = Run(lambda: call(leaf), lambda y: torch.autograd.grad(y, wanted, dy))
    return found


# --- in place of a GPU


class Stub:
    """Takes the place of launches and products, and counts them."""

    def __init__(self) -> None:
        self.count = 0
        self.made: dict[tuple, itertools.cycle] = {}  # several for each shape: what a call returns shares no memory

    def like(self, x: Tensor, *shape: int) -> Tensor:
        key = (shape, x.dtype)
        if key not in self.made:
            self.made[key] = itertools.cycle([x.new_zeros(shape) for _ in range(8)])
        return next(self.made[key])

    def product(self, out: Tensor | None, x: Tensor, *shape: int) -> Tensor:
        self.count += 1
        return self.like(x, *shape) if out is None else out

    def launch(self, *_: Any, **__: Any) -> None:
        self.count += 1

    def lstm(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """torch._VF.lstm: (x, hx, weights, ...) or, packed, (x, batch_sizes, hx, weights, ...)."""
        self.count += 1
        h0, c0 = args[1] if isinstance(args[0], Tensor) else args[0]
        bidirectional = args[6]
        return self.like(x, *x.shape[:-1], H * (1 + bidirectional)), self.like(x, *h0.shape), self.like(x, *c0.shape)


def stub_products(stub: Stub) -> None:
    """Whatever torch multiplies matrices by, called by these names."""

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return stub.product(None, x, *x.shape[:-1], w.shape[0])

    def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        return stub.product(out, a, *a.shape[:-1], b.shape[-1])

    def sum_of_products(c: Tensor, a: Tensor, b: Tensor, *, out: Tensor | None = None, **_: float) -> Tensor:
        return stub.product(out, a, *a.shape[:-1], b.shape[-1])

    def add_product(c: Tensor, a: Tensor, b: Tensor, **_: float) -> Tensor:
        return stub.product(c, a)

    torch.nn.functional.linear = linear
    torch.mm = torch.bmm = torch.matmul = Tensor.mm = Tensor.bmm = Tensor.matmul = Tensor.__matmul__ = product
    torch.addmm = torch.baddbmm = Tensor.addmm = Tensor.baddbmm = sum_of_products
    Tensor.addmm_ = Tensor.baddbmm_ = add_product


Forced = Callable[[Case, torch.dtype], AbstractContextManager]


def stub_package(stub: Stub) -> Forced:
    """Let fused_lstm take CPU tensors for those of an H100, and launch nothing. Returns what forces a schedule on it."""
    import triton

    from fused_lstm import call, plan, recurrence
    from fused_lstm.launch import schedule
    from fused_lstm.launch.schedule import Device

    plan.SUPPORTS["triton"] = lambda p: (True, "stubbed")
    recurrence.outer, recurrence.product = lambda a, b: a.t() @ b, torch.mm  # as on a GPU
    call.check_range = recurrence.check_range = lambda lengths, T: (0, -1)  # as on a GPU, where it would wait for the device
    # A launch by a kept kernel is all walked through but for the driver's part; a first one compiles nothing.
    schedule.driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0))
    triton.JITFunction.__getitem__ = lambda *_: stub.launch

    def remember(kernel: schedule.Kernel, key: tuple, _: None) -> schedule.Compiled:
        return kernel.known.setdefault(key, schedule.Compiled(None, stub.launch, None, None))

    schedule.Kernel.remember = remember
    return partial(forced, gpu=Device("H100", 132, 232_448, (9, 0)))


def forced(case: Case, dtype: torch.dtype, gpu: Any = None) -> AbstractContextManager:
    """A case's schedule, on the current GPU if none is given."""
    from fused_lstm import launch

    kind = launch.arithmetic(dtype, tf32=dtype == torch.float32 and gpu is None)
    return by_schedule(case.schedule, gpu or launch.device(torch.cuda.current_device()), kind, case.T, H, B, case.directions)


# --- measuring


def computes(name: str) -> bool:
    """Whether an operator that a CPU's trace names gives a GPU work: not a view, not an allocation, not made of others."""
    namespace, _, name = name.partition("::")
    if namespace != "aten" or "empty" in name or name in ("set_", "resize_", "resolve_conj", "resolve_neg"):
        return False
    packet = getattr(torch.ops.aten, name)
    overloads = [op for op in (getattr(packet, o) for o in packet.overloads()) if torch._C._dispatch_has_kernel(op.name())]
    composite = any(op.has_kernel_for_dispatch_key("CompositeImplicitAutograd") for op in overloads)
    returns = [r.alias_info for op in overloads for r in op._schema.returns]
    return not composite and not any(alias is not None and not alias.is_write for alias in returns)


def operations(run: Run, stub: Stub | None) -> int:
    """What the device is given to do in one call."""
    given = run.prepare()
    activity = torch.profiler.ProfilerActivity
    if stub is None:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as trace:
            run.call(given)
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
    before = stub.count
    with torch.profiler.profile(activities=[activity.CPU]) as trace:
        run.call(given)

    def outermost(event: Any) -> bool:
        while event.cpu_parent is not None:
            event = event.cpu_parent
            if computes(event.name):
                return False
        return True

    return stub.count - before + sum(computes(event.name) and outermost(event) for event in trace.events())


def quickest(sides: dict[str, Run], device: str, blocks: int) -> dict[str, float]:
    """Microseconds of each side's call, in turn."""
    gc.collect()
    gc.disable()
    times = [
        {name: host_us(run.call, CALLS, run.prepare, device == "cuda") for name, run in sides.items()} for _ in range(blocks)
    ]
    gc.enable()
    return {f"{name} us": min(block[name] for block in times) for name in sides}


def host(device: str, dtype: str, blocks: int = BLOCKS) -> Rows:
    """Of each case and mode: microseconds and operations of ours and of torch's."""
    import fused_lstm

    torch.set_num_threads(1)
    stub, force = Stub() if device == "cpu" else None, forced
    if stub is not None:
        stub_products(stub)
        force = stub_package(stub)
        torch._VF.lstm = stub.lstm
    found: Rows = {}
    kind = getattr(torch, dtype)
    for case in CASES:
        options = dict(num_layers=case.layers, bidirectional=case.bidirectional, device=device, dtype=kind)
        torchs = nn.LSTM(I, H, **options)
        ours = fused_lstm.LSTM(I, H, backend="triton", **options)
        sides = {"ours": runs(case, ours, device, kind, True), "torch": runs(case, torchs, device, kind, stub is None)}
        with force(case, kind):
            for mode in MODES:
                some = {name: side[mode] for name, side in sides.items() if mode in side}
                for run in some.values():
                    host_us(run.call, CALLS, run.prepare, device == "cuda")
                row = {f"{name} operations": operations(run, stub) for name, run in some.items()}
                found[f"{case.name}, {mode}"] = row | quickest(some, device, blocks)
    return found


def small_calls(B: int, T: int, H: int) -> dict[str, dict[str, Run]]:
    """Calls of ours and of torch's cell or layer on a CPU, by mode."""
    import fused_lstm

    x, dy, h, c = torch.randn(T, B, H), torch.randn(T, B, H), torch.randn(1, B, H), torch.randn(1, B, H)
    leaf = x.clone().requires_grad_()
    ours, torchs = fused_lstm.LSTM(H, H), (nn.LSTMCell if T == 1 else nn.LSTM)(H, H)

    def inference(module: nn.Module, *given: Any) -> Run:
        return Run(lambda: None, torch.no_grad()(lambda _: module(*given)))

    def training(module: nn.Module) -> Run:
        wanted = [leaf, *module.parameters()]
        return Run(lambda: None, lambda _: torch.autograd.grad(module(leaf)[0], wanted, dy))

    if T == 1:
        return {"inference": {"ours": inference(ours, x, (h, c)), "torch": inference(torchs, x[0], (h[0], c[0]))}}
    sides = {"ours": ours, "torch": torchs}
    return {
        "inference": {name: inference(module, x) for name, module in sides.items()},
        "training": {name: training(module) for name, module in sides.items()},
    }


def small(blocks: int = 4 * BLOCKS) -> Rows:
    """Microseconds of small calls on a CPU, with nothing stubbed."""
    torch.set_num_threads(1)
    found = {}
    for B, T, H in SMALL:
        for mode, sides in small_calls(B, T, H).items():
            beside = "nn.LSTMCell" if T == 1 else "nn.LSTM"
            found[f"on a CPU, B={B} T={T} H={H}, {mode}, {beside}"] = quickest(sides, "cpu", blocks)
    return found


def merged(rounds: Sequence[Rows]) -> Rows:
    """The quickest over processes: what else the machine does only ever adds time."""
    return {what: {k: min(r[what][k] for r in rounds) for k in row} for what, row in rounds[0].items()}


def table(sides: Sides) -> list[str]:
    """Lines for a reader: this checkout's rows, and beside each the base's, if there is one."""
    here, base = merged(sides["here"]), merged(sides["base"]) if "base" in sides else None
    head = ["", "us", "nn.LSTM us", "x nn.LSTM", "operations", "nn.LSTM's"]
    lines = [head + (["base us", "here/base", "(rounds)", "base operations"] if base else [])]
    for what, row in here.items():
        theirs = row.get("torch us")
        cells = [what, f"{row['ours us']:.1f}", *([f"{theirs:.1f}", f"{row['ours us'] / theirs:.2f}"] if theirs else "--")]
        cells += [str(row.get(f"{name} operations", "-")) for name in ("ours", "torch")]
        if base:
            ratios = [a[what]["ours us"] / b[what]["ours us"] for a, b in zip(sides["here"], sides["base"], strict=True)]
            cells += [f"{base[what]['ours us']:.1f}", f"{row['ours us'] / base[what]['ours us']:.2f}"]
            cells += [f"({min(ratios):.2f}-{max(ratios):.2f})", str(base[what].get("ours operations", "-"))]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in lines
    ]


def measured(base: str | None, rounds: int, device: str, dtype: str = "bfloat16", limit: float = 300) -> Sides:
    """Results of each process, of this checkout and of a revision if one is given. Raises RuntimeError if one fails."""
    jobs: list[tuple[str, dict[str, Any]]] = [("host:host", {"device": device, "dtype": dtype})]
    if device == "cpu":
        jobs.append(("host:small", {}))
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
        folders = {"here": copy_of_checkout(Path(new))} | ({"base": unpack(base, Path(old))} if base else {})
        if base and not (folders["base"] / "fused_lstm" / "launch" / "schedule.py").is_file():
            raise ValueError(f"expected a base whose package has launch/schedule.py, as this file knows it, got {base}")
        sides: Sides = {name: [] for name in folders}
        for n in range(rounds):
            for name in sorted(folders, reverse=n % 2 == 0):
                sides[name].append({})
                for function, given in jobs:
                    answer = isolated(function, limit, folders[name], **given)
                    if "failed" in answer:
                        raise RuntimeError(f"{name}: {answer['failed']}\n{answer['output']}")
                    sides[name][-1] |= answer["result"]
    return sides


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", help="a git revision to measure beside this checkout")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a process (default: 300)")
    parser.add_argument("--json", type=Path, help="write the results of each process there")
    args = parser.parse_args(arguments)
    try:
        sides = measured(args.base, args.rounds, args.device, args.dtype, args.limit)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(*table(sides), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"about": about(args.device, 1), **sides}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
