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
from fused_lstm.kernels import stepwise
from triton import knobs
from triton.runtime import driver

from fused_lstm.call import Rows
from fused_lstm.launch import compiled
from fused_lstm.launch.config import LaunchConfig, Recurrence
from fused_lstm.launch.schedules import SCHEDULES, Launch

pytestmark = pytest.mark.compile

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
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(compiled, "_known", {})
    recorder, before = Recorder(), driver._active
    driver.set_active(recorder)
    yield recorder
    driver._active = before


class Call(NamedTuple):
    """What :func:`fused_lstm.launch.compiled.run` is given."""

    kernel: Any
    grid: tuple[int, int, int]
    calls: list[tuple]
    options: dict[str, Any]

    def run(self) -> None:
        compiled.run(*self)

    def by_the_front_door(self) -> None:
        for args in self.calls:
            self.kernel[self.grid](*args, **self.options)


def call(
    dtype: torch.dtype = torch.float32, T: int = 3, B: int = 2, batch_first: bool = False, absent: tuple[str, ...] = (),
    config: LaunchConfig = LaunchConfig(16, 16, 16),  # noqa: B008
) -> Call:  # fmt: skip
    """A forward recurrence's launches."""
    buffers = stepwise.Forward(*(None if f in absent else torch.zeros(32, dtype=dtype) for f in stepwise.Forward._fields))
    buffers = buffers._replace(running_ptr=torch.zeros(32))
    rows = Rows(T, B, batch_first, 1, torch.full((B,), T))
    found: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compiled, "run", lambda kernel, grid, calls, options: found.append(Call(kernel, grid, [*calls], options))
        )
        launch = Launch(Recurrence("forward", "fp32", T, 16, B, 1), config, None, 1, False)
        SCHEDULES["stepwise"].launch(launch, buffers, rows)
    assert len(found[0].calls) == T
    return found[0]


def replaced(one: Call, **fields: Any) -> Call:
    """With other buffers, or other numbers for T, B and the strides."""
    names = ("buffers", "sequences", "s", "T", "B", "stride_t", "stride_b", "CELL", "config")
    calls = []
    for args in one.calls:
        given = dict(zip(names, args, strict=True))
        given |= {k: v for k, v in fields.items() if k in names}
        buffers = {k: v for k, v in fields.items() if k not in names}
        calls.append((given.pop("buffers")._replace(**buffers), *given.values()))
    return one._replace(calls=calls)


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
    assert len(compiled._known) == 1
    one.run()
    silent = [launched[4:7] == (None, None, None) for launched in gpu.launches]
    assert silent == [False, True, True, *[False] * 3, *[True] * 3], "the front door is for the first launch of a layout"


UNALIGNED = torch.zeros(33)[1:]
ONE_LAYOUT = {
    "another T": lambda: call(T=7),
    "one step": lambda: call(T=1),
    "another B": lambda: call(B=1),
    "a B that 16 divides": lambda: call(B=32),
    "other strides": lambda: call(batch_first=True),
}
OTHER_LAYOUTS = {
    "another dtype": lambda: call(torch.bfloat16),
    "an unaligned pointer": lambda: replaced(call(), w_hh_ptr=UNALIGNED),
    "a stride beyond 2^31": lambda: replaced(call(), stride_t=2**31),
    "a T beyond 2^31": lambda: replaced(call(), T=2**31),
    "another configuration": lambda: call(config=LaunchConfig(16, 16, 32)),
    "other warps": lambda: call(config=LaunchConfig(16, 16, 16, num_warps=8)),
    "no bias": lambda: call(absent=("b_hh_ptr",)),
    "nothing saved": lambda: call(absent=("c_ptr",)),
}


@pytest.mark.parametrize("name", [*ONE_LAYOUT, *OTHER_LAYOUTS])
def test_layouts(name: str, gpu: Recorder) -> None:
    """A kept kernel serves the calls for which Triton itself would take it, and no others."""
    call().run()
    (ONE_LAYOUT | OTHER_LAYOUTS)[name]().run()
    other = (ONE_LAYOUT | OTHER_LAYOUTS)[name]()
    n = len(gpu.launches)
    other.run()
    other.by_the_front_door()
    assert gpu.launches[n].told is None, "known by now"
    assert len({launched.function for launched in gpu.launches[n:]}) == 1
    assert (gpu.launches[-1].function == gpu.launches[0].function) == (name in ONE_LAYOUT)
    assert len(compiled._known) == (1 if name in ONE_LAYOUT else 2)


def test_on_rocm_a_layout_tells_which_tensors_32_bits_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (torch.empty(n, dtype=torch.uint8, device="meta") for n in (compiled.INT32, compiled.INT32 + 1))
    assert compiled.layout((small,)) == compiled.layout((large,))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert compiled.layout((small,)) != compiled.layout((large,))


def test_each_device_has_kernels_of_its_own(gpu: Recorder) -> None:
    one = call()
    one.run()
    gpu.device = next(DEVICES)
    one.run()
    assert [launched.stream - 1000 for launched in gpu.launches] == [gpu.device - 1] * 3 + [gpu.device] * 3
    assert len({launched.function for launched in gpu.launches}) == len(compiled._known) == 2


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
    assert compiled._known == {}
    assert len(launched) == 6
    assert same(tuple(args[-len(one.calls[0]) :] for args in launched), (*one.calls, *one.calls))


def test_a_limit_on_what_is_kept(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIMIT", 2)
    for name in ("no bias", "nothing saved", "other warps", "no bias"):
        OTHER_LAYOUTS[name]().run()
        assert 1 <= len(compiled._known) <= 2
    assert gpu.launches[0].function == gpu.launches[-1].function


def test_another_thread_may_forget_all(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the worst moment: right after a kernel was kept."""

    class Forgetful(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            self.clear()

    monkeypatch.setattr(compiled, "_known", Forgetful())
    call().run()
    assert [launched.args[2] for launched in gpu.launches] == [0, 1, 2]


def test_threads(gpu: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LIMIT", 1)
    different = [call(), *(OTHER_LAYOUTS[name]() for name in ("no bias", "nothing saved"))]
    for one in different:
        one.run()
    right = {id(one.calls[0][0]): gpu.launches[3 * k].function for k, one in enumerate(different)}
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(one.run) for one in different * 20]:
            done.result()
    assert len(gpu.launches) == 9 + 3 * 60
    assert all(launched.function == right[id(launched.args[0])] for launched in gpu.launches)
