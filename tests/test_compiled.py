"""Launches by compiled kernels that are kept: what the driver gets is what Triton's front door would hand it.

A driver of a GPU that is not there compiles for it, and notes the launches instead of making them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fused_lstm.kernels.buffers import Forward
from fused_lstm.kernels.rows import Sequences
from triton import knobs
from triton.runtime import driver

from fused_lstm import launch
from fused_lstm.call import Rows
from fused_lstm.launch import schedule
from fused_lstm.launch.schedule import Recurrence, arithmetic
from fused_lstm.launch.stepwise import STEPWISE, StepwiseConfig, stepwise_kernel

pytestmark = pytest.mark.compile

CONFIG = StepwiseConfig(16, 16, 16)
DEVICES = count(100)  # each test has one of its own, for which Triton knows no kernels yet


class Launched(NamedTuple):
    """What a launcher was given."""

    grid: tuple[int, int, int]
    stream: int
    function: int
    metadata: Any
    told: Any  # the launch's metadata, and its hooks
    enter: Any
    leave: Any
    args: tuple


class Recorder:
    """The driver, and the module that loads its kernels. Functions are numbers."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils, self.device, self.target = self, next(DEVICES), GPUTarget("cuda", 90, 32)
        self.launches: list[Launched] = []
        self.functions = count()

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> Any:
        return self.target

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), next(self.functions), 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, _: object) -> None:
        pass

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        def launch(gridX: int, gridY: int, gridZ: int, stream: int, function: int, *rest: Any) -> None:
            metadata, told, enter, leave, *args = rest
            for hook in (enter, leave):
                if hook is not None:
                    hook(told)
            self.launches.append(
                Launched((gridX, gridY, gridZ), stream, function, metadata, told, enter, leave, tuple(args))
            )

        return launch


@pytest.fixture
def gpu() -> Iterator[Recorder]:
    recorder, before = Recorder(), driver._active
    driver.set_active(recorder)
    yield recorder
    driver._active = before


class Call(NamedTuple):
    """A kernel, and what it is launched with."""

    kernel: schedule.Kernel
    steps: range
    buffers: Forward
    sequences: Sequences
    size: tuple[int, int, int, int]  # T, B and the row strides

    def run(self) -> None:
        self.kernel.run((1, 1, 1), self.buffers, self.sequences, [(s, *self.size) for s in self.steps])

    def by_the_front_door(self) -> None:
        for s in self.steps:
            args = (self.buffers, self.sequences, s, *self.size, *self.kernel.constants)
            self.kernel.kernels[self.kernel.name][1, 1, 1](*args, **self.kernel.options)

    def without(self, *names: str) -> Call:
        return self._replace(buffers=self.buffers._replace(**dict.fromkeys(names)))


def call(dtype: torch.dtype = torch.float32, config: StepwiseConfig = CONFIG) -> Call:
    """A forward recurrence of three steps of two rows that have lengths."""
    buffers = Forward(*(torch.zeros(32, dtype=dtype) for _ in Forward._fields))
    buffers = buffers._replace(running_ptr=torch.zeros(32), zeros_ptr=None)
    kernel = stepwise_kernel.__wrapped__("forward", arithmetic(dtype, False), dtype, 1, 16, 1, config)
    return Call(kernel, range(3), buffers, Sequences(torch.full((2,), 3), None, None), (3, 2, 2, 1))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is b if isinstance(a, Tensor) else a == b


def test_what_is_launched_is_what_the_front_door_launches(gpu: Recorder) -> None:
    one = call()
    one.run()
    one.by_the_front_door()
    given = [launched._replace(told=None, enter=None, leave=None) for launched in gpu.launches]
    ours, public = given[:3], given[3:]
    assert [launched.args[2] for launched in ours] == [0, 1, 2]
    assert same(tuple(ours), tuple(public))
    assert len(one.kernel.known) == 1
    one.run()
    silent = [launched[4:7] == (None, None, None) for launched in gpu.launches]
    assert silent == [False, True, True, *[False] * 3, *[True] * 3], "the front door is for the first launch of a layout"


UNALIGNED, LARGE = torch.zeros(33)[1:], 2**31
ONE_LAYOUT: dict[str, Callable[[Call], Call]] = {
    "another T": lambda c: c._replace(steps=range(7), size=(7, 2, 2, 1)),
    "one step": lambda c: c._replace(steps=range(1), size=(1, 2, 2, 1)),
    "another B": lambda c: c._replace(size=(3, 1, 1, 1)),
    "a B that 16 divides": lambda c: c._replace(size=(3, 32, 32, 1)),
    "other strides": lambda c: c._replace(size=(3, 2, 1, 3)),
}
OTHER_LAYOUTS: dict[str, Callable[[Call], Call]] = {
    "another dtype": lambda c: c._replace(
        buffers=Forward(*(t if t is None else t.half() for t in c.buffers))._replace(running_ptr=c.buffers.running_ptr)
    ),
    "an unaligned pointer": lambda c: c._replace(buffers=c.buffers._replace(w_hh_ptr=UNALIGNED)),
    "T beyond 2^31": lambda c: c._replace(size=(LARGE, 2, 2, 1)),
    "B beyond 2^31": lambda c: c._replace(size=(3, LARGE, LARGE, 1)),
    "no bias": lambda c: c.without("b_hh_ptr"),
    "nothing saved": lambda c: c.without("c_ptr"),
    "no lengths": lambda c: c._replace(sequences=Sequences(None, None, None)),
    "resets": lambda c: c._replace(sequences=c.sequences._replace(resets_ptr=torch.zeros(6, dtype=torch.uint8))),
    "packed": lambda c: c._replace(sequences=c.sequences._replace(starts_ptr=torch.zeros(3, dtype=torch.int64))),
}


@pytest.mark.parametrize("name", [*ONE_LAYOUT, *OTHER_LAYOUTS])
def test_layouts(name: str, gpu: Recorder) -> None:
    """A kept kernel serves the launches for which Triton itself would take it, and no others."""
    one = call()
    one.run()
    other = (ONE_LAYOUT | OTHER_LAYOUTS)[name](one)
    other.run()
    n = len(gpu.launches)
    other.run()
    other.by_the_front_door()
    assert gpu.launches[n].told is None, "known by now"
    assert len({launched.function for launched in gpu.launches[n:]}) == 1
    assert (gpu.launches[-1].function == gpu.launches[0].function) == (name in ONE_LAYOUT)
    assert len(one.kernel.known) == (1 if name in ONE_LAYOUT else 2)


def test_what_launches_have_in_common() -> None:
    """One kernel for each dtype, size and configuration; T and the strides are arguments."""
    rows, like = Rows(3, 2, False, 1), torch.zeros(1)
    one = launch.prepare("forward", like, rows, 1, 16)
    assert launch.prepare("forward", like, Rows(5, 2, True, 1), 1, 16) is one
    others = [
        launch.prepare(*arguments)
        for arguments in (
            ("backward", like, rows, 1, 16), ("forward", like.half(), rows, 1, 16), ("forward", like, rows, 2, 16),
            ("forward", like, rows._replace(directions=-1), 1, 16), ("forward", like, rows, 1, 32),
        )
    ]  # fmt: skip
    with launch.forced(StepwiseConfig(16, 16, 32)):
        others.append(launch.prepare("forward", like, rows, 1, 16))
    assert len({id(launched) for launched in (one, *others)}) == 1 + len(others)


def test_on_rocm_a_layout_tells_which_tensors_32_bits_reach(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "HIP", True)
    monkeypatch.setattr(schedule, "INT32", 100)  # the buffers have 128 bytes
    small = call()
    large = small._replace(buffers=small.buffers._replace(c0_ptr=torch.zeros(16)))
    for one in (small, large, small):
        one.run()
    assert len(small.kernel.known) == 2


def test_each_device_has_kernels_of_its_own(gpu: Recorder) -> None:
    one = call()
    one.run()
    first, gpu.device = gpu.device, next(DEVICES)
    one.run()
    assert [launched.stream - 1000 for launched in gpu.launches] == [first] * 3 + [gpu.device] * 3
    assert len({launched.function for launched in gpu.launches}) == len(one.kernel.known) == 2


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_served(which: str, gpu: Recorder) -> None:
    """As a profiler adds them: each launch has them and what they are told."""
    one, heard = call(), []
    one.run()
    hook, chain = lambda told: heard.append(told.get()), getattr(knobs.runtime, which)
    chain.add(hook)
    try:
        one.run()
        one.by_the_front_door()
    finally:
        chain.remove(hook)
    assert heard == heard[:1] * 6
    assert heard[0]["name"] == "lstm_forward_step"
    for ours, public in zip(gpu.launches[3:6], gpu.launches[6:9], strict=True):
        assert same(ours._replace(told=None), public._replace(told=None))
    one.run()
    assert gpu.launches[-1].told is None


def test_a_launcher_that_is_not_as_expected_is_left_to_triton(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(gpu, "launcher_cls", lambda *_: lambda *args: launched.append(args), raising=False)
    one = call()
    one.run()
    one.by_the_front_door()
    assert one.kernel.known == {}
    assert [args[-7] for args in launched] == [0, 1, 2] * 2, "the steps"


def test_a_limit_on_what_is_kept(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LIMIT", 2)
    one = call()
    for name in ("no bias", "nothing saved", "no lengths", "no bias"):
        OTHER_LAYOUTS[name](one).run()
        assert 1 <= len(one.kernel.known) <= 2
    assert gpu.launches[0].function == gpu.launches[-1].function


def test_another_thread_may_forget_all(gpu: Recorder) -> None:
    """At the worst moment: right after a kernel was kept."""

    class Forgetful(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            self.clear()

    one = call()
    one.kernel.known = Forgetful()
    one.run()
    assert [launched.args[2] for launched in gpu.launches] == [0, 1, 2]


def test_threads(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LIMIT", 1)
    one = call()
    different = [one, *(OTHER_LAYOUTS[name](one) for name in ("no bias", "nothing saved"))]
    for c in different:
        c.run()
    right = {id(c.buffers): gpu.launches[3 * k].function for k, c in enumerate(different)}
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(c.run) for c in different * 20]:
            done.result()
    assert len(gpu.launches) == 9 + 3 * 60
    assert all(launched.function == right[id(launched.args[0])] for launched in gpu.launches)


def test_another_batch_size_is_no_other_kernel() -> None:
    kernels = set()
    for B in (2, 3, 5):
        problem = Recurrence("forward", "fp32", 2, 16, B, 1)
        launched = schedule.Launch(problem, CONFIG, STEPWISE, None, 1, torch.float32)
        rows = Rows(1, B, False, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule.Kernel, "run", lambda kernel, *_: kernels.add(kernel))
            STEPWISE.launch(launched, Forward(*[None] * 9), rows)
    assert len(kernels) == 1
