"""The persistent kernels in Triton's interpreter, a process for each program, and faults that must show there."""

from __future__ import annotations

import ast
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cell_problems
import gluon_interpreter
import numpy as np
import pytest
import torch
from checks import DEVICE, Rule
from forked import late_store, random_delays
from pairs import IN_INTERPRETER, all_equal
from persistent_problems import forced, interpret, recurrence
from problems import moved, results

from fused_lstm import LSTM, Cell, launch
from fused_lstm.launch import persistent
from fused_lstm.launch.persistent import PersistentConfig
from fused_lstm.recurrence import forward

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # NumPy's
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FOUR = PersistentConfig(warps=4)
TURNS = PersistentConfig(warps=4, tiles=2, ahead=True)
SPLIT = PersistentConfig("split", warps=4)
SPLIT_TURNS = PersistentConfig("split", warps=4, tiles=2, ahead=True)
PEEPHOLE = Cell(peephole=True)
BOTH = Cell(peephole=True, zoneout=(0.3, 0.2))
NORM = Cell(layer_norm="output")
ALL = Cell(layer_norm="state", peephole=True, zoneout=(0.3, 0.2))

# A configuration and a problem.
CASES: dict[str, tuple[PersistentConfig, dict[str, Any]]] = {
    "plain": (FOUR, {"H": 32}),
    "one unit block": (FOUR, {"H": 16, "T": 2}),
    "one step": (FOUR, {"H": 32, "T": 1}),
    "no states, no bias": (FOUR, {"H": 32, "states": False, "bias": False}),
    "beyond the last chunk": (FOUR, {"H": 48, "B": 9}),
    "two tiles in turn": (TURNS, {"H": 32, "B": 13}),
    "three tiles in turn, two groups": (PersistentConfig(warps=4, tiles=3, ahead=True), {"H": 32, "B": 35, "T": 3}),
    "tiles in turn, nothing ahead": (PersistentConfig(warps=4, tiles=2), {"H": 32, "B": 13, "T": 3}),
    "split over gates, nothing ahead": (PersistentConfig("split", warps=4, tiles=2), {"H": 64, "B": 13, "T": 3}),
    "tiles that are empty": (PersistentConfig(warps=4, tiles=4), {"H": 32, "B": 13, "T": 2}),
    "eight warps": (PersistentConfig(warps=8), {"H": 48, "B": 4}),
    "32 units": (PersistentConfig(warps=4, units=32, tiles=2, ahead=True), {"H": 64, "B": 10}),
    "weights in shared memory": (PersistentConfig(warps=4, held=0), {"H": 48, "B": 4}),
    "weights in both": (PersistentConfig(warps=4, held=1, tiles=2, ahead=True), {"H": 144, "B": 10, "T": 2}),
    "lengths": (FOUR, {"H": 32, "B": 6, "mode": "lengths"}),
    "lengths, batch first, both directions": (
        TURNS,
        {"H": 32, "B": 10, "mode": "lengths", "directions": 2, "batch_first": True},
    ),
    "packed": (FOUR, {"H": 32, "B": 5, "mode": "packed"}),
    "packed, backwards": (TURNS, {"H": 32, "B": 11, "T": 5, "mode": "packed", "directions": -1}),
    "resets": (FOUR, {"H": 32, "B": 5, "resets": True, "directions": 2}),
    "lengths with resets": (TURNS, {"H": 32, "B": 12, "mode": "lengths", "resets": True, "directions": 2}),
    "packed with resets": (FOUR, {"H": 48, "B": 5, "mode": "packed", "resets": True, "directions": 2}),
    "split over gates": (SPLIT, {"H": 64, "B": 4}),
    "split over gates, in turns": (SPLIT_TURNS, {"H": 64, "B": 13}),
    "split over gates, three tiles": (
        PersistentConfig("split", warps=4, tiles=3, held=0, ahead=True),
        {"H": 64, "B": 20, "T": 2},
    ),
    "split over gates, lengths with resets": (
        SPLIT_TURNS,
        {"H": 64, "B": 12, "mode": "lengths", "resets": True, "directions": 2},
    ),
    "split over gates, units that are none": (SPLIT, {"H": 80, "B": 4, "T": 3}),
    "split over gates, packed": (SPLIT, {"H": 64, "B": 5, "T": 5, "mode": "packed", "resets": True, "directions": -1}),
    "members": (FOUR, {"H": 16, "B": 5, "members": 2, "directions": 2}),
    "peepholes": (FOUR, {"H": 48, "states": False, "cell": PEEPHOLE}),
    "peepholes and zoneout, lengths with resets": (
        TURNS,
        {"H": 32, "B": 12, "mode": "lengths", "resets": True, "directions": 2, "cell": BOTH},
    ),
    "zoneout on average, packed": (FOUR, {"H": 16, "B": 5, "mode": "packed", "directions": 2, "cell": BOTH, "masks": False}),
    "split over gates, peepholes and zoneout": (SPLIT, {"H": 64, "B": 5, "T": 5, "mode": "packed", "cell": BOTH}),
    "split over gates, in turns, peepholes and zoneout": (
        SPLIT_TURNS,
        {"H": 64, "B": 12, "mode": "lengths", "resets": True, "directions": 2, "cell": BOTH},
    ),
}


LOCAL: dict[str, dict[str, Any]] = {
    "plain": {"H": 32},
    "units that are none": {"H": 48, "B": 9},
    "one warp": {"H": 16, "states": False, "bias": False, "T": 1},
    "eight warps": {"H": 128, "B": 2, "T": 2},
    "lengths": {"H": 32, "B": 10, "mode": "lengths", "directions": 2, "batch_first": True},
    "packed": {"H": 48, "B": 5, "T": 5, "mode": "packed", "directions": -1},
    "lengths with resets": {"H": 32, "B": 12, "mode": "lengths", "resets": True, "directions": 2},
    "packed with resets": {"H": 16, "B": 5, "mode": "packed", "resets": True, "members": 2},
    "peepholes and zoneout": {"H": 48, "B": 12, "mode": "lengths", "resets": True, "directions": 2, "cell": BOTH},
    "zoneout on average": {"H": 16, "B": 5, "mode": "packed", "directions": -1, "cell": BOTH, "masks": False},
    "norms, lengths": {"H": 32, "B": 10, "mode": "lengths", "directions": 2, "batch_first": True, "cell": NORM},
    "norms of an odd number of units": {"H": 37, "B": 9, "T": 2, "cell": NORM},
    "norms, one step, one warp": {"H": 16, "states": False, "bias": False, "T": 1, "cell": Cell(layer_norm="state")},
    "norms and all": {"H": 48, "B": 12, "mode": "lengths", "resets": True, "directions": 2, "cell": ALL},
    "norms and all on average": {"H": 64, "B": 5, "mode": "packed", "directions": -1, "cell": ALL, "masks": False},
    "norms, packed with resets": {"H": 20, "B": 5, "T": 5, "mode": "packed", "resets": True, "members": 2, "cell": NORM},
}


@pytest.mark.parametrize("name", LOCAL)
def test_programs_that_own_all_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    rule = Rule()
    for dtype in (torch.float16, torch.bfloat16):
        with forced(persistent.local(LOCAL[name]["H"])):
            recurrence(dtype, **LOCAL[name]).add(rule)
    rule.check()


@pytest.mark.parametrize("name", CASES)
def test_error_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = CASES[name]
    interpret(monkeypatch)
    rule, n = Rule(), list(CASES).index(name) % 3
    for dtype in DTYPES if name in ("plain", "two tiles in turn", "split over gates") else DTYPES[n : n + 1]:
        with forced(config):
            recurrence(dtype, **options).add(rule, tf32=True)
    rule.check()


def test_a_layer_of_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are told of its cell, and the gradients by its initial states and parameters."""
    grids = interpret(monkeypatch)
    torch.manual_seed(0)
    lstm = LSTM(3, 20, bidirectional=True, cell=BOTH, backend="triton").to(DEVICE, torch.float16)
    given = [torch.randn(s, device=DEVICE).half().requires_grad_() for s in ((3, 2, 3), (2, 2, 20), (2, 2, 20))]
    found = []
    for dtype, lstm.backend in ((torch.float16, "triton"), (torch.float16, "reference"), (torch.float64, "reference")):
        lstm.to(dtype)
        x, h0, c0 = (t.to(dtype) for t in given)
        torch.manual_seed(1)
        with launch.forced(FOUR):
            y, states = lstm(x, (h0, c0), lengths=torch.tensor([3, 0], device=DEVICE))
            loss = y.sum() + sum((s * s).sum() for s in states)
            found.append([y, *states, *torch.autograd.grad(loss, [*given, *lstm.parameters()])])
    assert grids == [(2, 1, 2)] * 2
    rule = Rule()
    rule.add("layer", [str(k) for k in range(len(found[0]))], *([t.detach().cpu() for t in f] for f in found))
    rule.check()


def test_layers_of_programs_that_own_all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random calls of random cells, most of them with norms."""
    grids, rule = interpret(monkeypatch), Rule()
    for seed in range(8, 18):
        problem = cell_problems.Problem(cell_problems.random_cell(seed), seed, torch.float16)
        exact, torchs = (problem.run(dtype, None) for dtype in (torch.float64, torch.float16))
        with launch.forced(persistent.local(16)):
            ours = problem.run(torch.float16, "triton")
        rule.add(f"{seed} {problem.lstm} {problem.config}", [str(k) for k in range(len(exact))], ours, torchs, exact)
    assert len(grids) >= 20
    rule.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_halves_equal_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    with forced(FOUR):
        recurrence(dtype).check_halves()


def test_recurrences_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions and members that do not fit together take several launches, to the same bits."""
    grids = interpret(monkeypatch)
    problem, found = recurrence(torch.float16, T=2, directions=2, members=2, mode="lengths"), []
    for config in (FOUR, PersistentConfig(warps=4, at_once=3)):
        with forced(config):
            found.append(list(problem.ours().values()))
    assert grids == [(2, 1, 4)] * 2 + [(2, 1, 3), (2, 1, 1)] * 2
    assert all_equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_tiny_and_saturating_numbers(dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    rule = Rule()
    with forced(FOUR):
        recurrence(dtype, H=16, scale=scale).add(rule, tf32=True)
    rule.check()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lengths with resets", torch.float16),
        ("lengths with resets", torch.float32),
        ("split over gates, lengths with resets", torch.bfloat16),
    ],
)
def test_equal_bits_on_every_run(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = CASES[name]
    problem, found = recurrence(dtype, **options | {"directions": 1}), []
    for seed in range(2):
        with monkeypatch.context() as patch, forced(config):
            grids = interpret(patch, random_delays(seed))
            found.append(list(problem.ours().values()))
        assert grids == [(options["H"] // 16, 1, 1)] * 2
    assert all_equal(*found)


def test_inference_keeps_nothing_and_agrees_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    call = recurrence(torch.float16, mode="lengths", B=6).call("triton", torch.float16, save=False)
    gates = call.x.detach().clone()
    y, given = torch.full_like(gates[..., :32], torch.nan), (call.w_hh, call.b_hh, call.h0, call.c0, call.rows)
    with forced(FOUR):
        saved = forward(call._replace(save=True))[:3]
        plain = launch.recurrence_forward(gates, *given, y, None)
    assert torch.equal(gates, call.x)
    assert all_equal(saved, [y, *plain])


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """NaN of several payloads and both signs, all bits set among them, and both infinities."""
    if dtype == torch.float32:
        words = [-1, 0x7FFFFFFF, 0x7FC00000, 0x7F800001, -0x400000, -0x7FFFFF, 0x7F800000, -0x800000]
        return torch.tensor(words, dtype=torch.int32).view(dtype)
    inf = 0x7C00 if dtype == torch.float16 else 0x7F80
    words = [-1, 0x7FFF, inf + 0x40, inf + 1, inf + 1 - 0x8000, inf + 0x41 - 0x8000, inf, inf - 0x8000]
    return torch.tensor(words, dtype=torch.int16).view(dtype)


EXCHANGED = ("x", "w_hh", "y")  # what reaches the states or gradients that programs exchange
BUFFERS = (*EXCHANGED, "b_hh", "h0", "c0", "h_n", "c_n")


@pytest.mark.parametrize(
    ("form", "dtype", "where"),
    [
        *(("whole", torch.float16, where) for where in BUFFERS),
        *(("whole", dtype, where) for dtype in (torch.bfloat16, torch.float32) for where in EXCHANGED),
        *(
            (form, dtype, where)
            for form, dtype in (("split", torch.bfloat16), ("local", torch.float16))
            for where in EXCHANGED
        ),
    ],
)
def test_no_number_hangs_a_kernel(form: str, dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a user's numbers, or the cotangents of results, are, the programs end, and what they have touched is NaN as
    in torch."""
    interpret(monkeypatch, timeout=30.0)
    config, H = {"whole": (TURNS, 32), "split": (SPLIT_TURNS, 64), "local": (persistent.local(32), 32)}[form]
    problem = recurrence(dtype, H=H, B=12, T=3, resets=True)
    call, cotangents = problem.call("triton", dtype), [c.to(DEVICE, dtype) for c in problem.cotangents]
    dirty = (call._asdict() | dict(zip(("y", "h_n", "c_n"), cotangents, strict=True)))[where].detach()
    if where == "w_hh":
        dirty[3::H, :8] = patterns(dtype)
    elif where == "b_hh":
        dirty.view(4, H)[:, :8] = patterns(dtype)
    else:  # in some rows, of one batch tile and of the next
        for b in (1, 9):
            dirty[0, b] = patterns(dtype).repeat(dirty.shape[-1] // 8)
    with forced(config):
        ours = results(call, cotangents)
    expected = results(moved(call._replace(engine="loop"), "cpu", torch.float64), cotangents)
    assert any(v.isnan().any() for v in expected.values())
    for name in ("y", "h_n", "c_n", "dx", "dc0"):
        found = ours[name].isnan()
        if where == "w_hh":  # which meets the zeros of rows that get no gradient, too
            assert (found | ~expected[name].isnan()).all(), name
        else:
            assert torch.equal(found, expected[name].isnan()), name


class Fault:
    """A function of the kernels' modules, or of the host's, replaced by another."""

    def __init__(
        self,
        where: str,
        name: str,
        change: Callable[[Callable], Callable],
        config: PersistentConfig = TURNS,
        store: int = 2,
        **options: Any,
    ) -> None:
        self.where, self.name, self.change, self.config, self.options = where, name, change, config, options
        self.store = store  # that of the first program which is late

    def run(self, monkeypatch: pytest.MonkeyPatch, late: float, timeout: float) -> bool:
        """Whether the results of a run, in which one program is late, are wrong; a hang is a TimeoutError."""
        problem = recurrence(torch.float16, **{"B": 12, "T": 3} | self.options)
        with monkeypatch.context() as patch, forced(self.config):
            interpret(patch)
            expected = problem.ours()
        with monkeypatch.context() as patch:
            modules = gluon_interpreter.interpreted()
            module = persistent if self.where == "host" else modules[self.where]
            patch.setattr(module, self.name, self.change(getattr(module, self.name)))
            interpret(patch, late_store((0, 0, 0), self.store, late), timeout, modules)
            with forced(self.config):
                found = problem.ours()
        return not all_equal(list(found.values()), list(expected.values()))


def waiting(condition: Callable) -> Callable:
    """source_at with another condition for waiting."""
    return lambda source_at: lambda rows, zeros, wait, *more: source_at(rows, zeros, condition(wait), *more)


def other_step(by: int) -> Callable:
    return lambda f: lambda buffers, place, s, *more: f(buffers, place, s + by, *more)


def other_rows(received: Callable) -> Callable:
    """No word is waited for."""
    return lambda box, place, s, *more: received(box, place, place.T + s, *more)


def keeping_all(step_of: Callable) -> Callable:
    def changed(*args: Any) -> Any:
        step = step_of(*args)
        return step._replace(keep=step.b >= 0)

    return changed


def without_settling(_: Callable) -> Callable:
    return lambda begun, source, dtype, *more: tuple(x.to(dtype, bitcast=True) for x in begun)


WRONG = {
    "a prefill left out": Fault("host", "unwritten", lambda _: lambda t: t.zero_()),
    "nothing is waited for": Fault("persistent_forward", "source_at", waiting(lambda wait: wait != wait)),
    "nothing is waited for, backward": Fault("persistent_backward", "source_at", waiting(lambda wait: wait != wait)),
    "a wrong slot": Fault("persistent_forward", "state_before", other_step(-1)),
    "a wrong slot, backward": Fault("persistent_backward", "gradients_after", other_step(1)),
    "a load too early": Fault("persistent_forward", "settle", without_settling),
    "a load too early, backward": Fault("persistent_backward", "settle", without_settling),
    "words of any step are taken": Fault(
        "persistent_split", "receive_code", lambda code: lambda: code().replace("@p bra again;", ""), SPLIT, 10, H=64
    ),
    "words that are not waited for": Fault("persistent_split", "received", other_rows, SPLIT_TURNS, H=64),
}


@IN_INTERPRETER
@pytest.mark.parametrize("name", WRONG)
def test_faults_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In half a second the other programs do many steps; where the machine is very busy, they take longer.
    assert any(WRONG[name].run(monkeypatch, seconds, 60.0) for seconds in (0.5, 4.0, 20.0))


@IN_INTERPRETER
def test_late_programs_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows the faults is not the delay."""
    assert not Fault("host", "unwritten", lambda f: f).run(monkeypatch, 0.5, 60.0)


HANGS = {
    "a slot that is never stored": Fault("persistent_forward", "state_before", other_step(1)),
    "a row past its length is waited for": Fault("persistent_backward", "step_of", keeping_all, mode="packed"),
}


@IN_INTERPRETER
@pytest.mark.parametrize("name", HANGS)
def test_waiting_in_vain_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="programs still run"):
        HANGS[name].run(monkeypatch, 0.0, 5.0)
    assert time.monotonic() - begin < 60


@IN_INTERPRETER
@pytest.mark.parametrize("fault", ["h0 is waited for", "results are stored as they are"])
def test_numbers_that_look_like_nothing_hang_a_careless_kernel(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_no_number_hangs_a_kernel guards against happens in kernels with these faults."""
    problem, modules = recurrence(torch.float16), gluon_interpreter.interpreted()
    call, cotangents = problem.call("triton", torch.float16), [c.half() for c in problem.cotangents]
    if fault == "h0 is waited for":
        module = modules["persistent_forward"]
        persistent.unwritten(call.h0.detach())
        monkeypatch.setattr(module, "source_at", waiting(lambda wait: wait == wait)(module.source_at))
    else:
        persistent.unwritten(cotangents[2])
        monkeypatch.setattr(modules["persistent_backward"], "exchangeable", lambda x, dtype: x.to(dtype))
    interpret(monkeypatch, timeout=5.0, modules=modules)
    with pytest.raises(TimeoutError, match="programs still run"), forced(FOUR):
        results(call, cotangents)


@pytest.mark.parametrize(("each", "max16"), [(4, True), (4, False), (8, True)])
def test_the_pattern_is_found_wherever_it_is(each: int, max16: bool) -> None:
    """The assembly that decides whether all elements are there, for random words and such as are like it."""
    from fused_lstm.kernels.fragments import exchange_code

    code = exchange_code(1, 0, each, False, True, True, max16).removesuffix("@p bra again;\n}")
    rng = np.random.default_rng(0)
    near = [0xFFFF, 0xFFFE, 0x7FFF, 0, 1, 0x8000, 0xFEFF] if each == 4 else [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0xFFFF]
    kind = np.uint16 if each == 4 else np.uint32
    words = np.where(rng.random((4096, 8)) < 0.1, rng.choice(near, (4096, 8)), rng.integers(0, 1 << 8, (4096, 8))).astype(
        kind
    )
    found = list(np.ascontiguousarray(words).view(np.uint32).T)
    for wait in (0, 0xFFFFFFFF):
        tied, address = [np.zeros(4096, np.uint32)] * each, [np.zeros(4096, np.uint64)] * 8
        assembly = gluon_interpreter.Assembly(code, [*found, *tied, *address, *[np.full(4096, wait, np.uint32)] * 8])
        assembly.run()
        expected = (words == kind(near[0])).any(1) & (wait != 0)
        assert (assembly.named["p"] == expected).all()
        assert expected.any() == (wait != 0)


def test_error_rule_by_the_older_test_of_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on sm_80."""
    monkeypatch.setattr(persistent, "_max16", lambda _: False)
    interpret(monkeypatch)
    rule = Rule()
    with forced(TURNS):
        recurrence(torch.float16, H=48, B=12, mode="lengths").add(rule)
    rule.check()


def gluon_names(module: str) -> set[str]:
    """What a module of kernels uses of gluon.language."""
    tree = ast.parse((Path(importlib.import_module("fused_lstm.kernels").__path__[0]) / f"{module}.py").read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return {n.attr for n in nodes if n.value.id == "gl"}


@pytest.mark.parametrize("module", gluon_interpreter.MODULES)
def test_the_stand_in_has_what_the_kernels_use(module: str) -> None:
    from triton.experimental.gluon import language as real

    used, stand_in = gluon_names(module), gluon_interpreter.language()
    assert used
    assert not {name for name in used if not hasattr(stand_in, name)}
    assert not {name for name in used if not hasattr(real, name)}


def test_the_stand_in_has_nothing_else() -> None:
    used = set().union(*(gluon_names(module) for module in gluon_interpreter.MODULES))
    assert {name for name in vars(gluon_interpreter.language()) if not name.startswith("_")} <= used
