"""Measuring launch configurations: in the interpreter with made-up times, which is enough for all but the times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from pairs import IN_INTERPRETER

import fused_lstm

pytest.importorskip("triton")
from fused_lstm import tune
from fused_lstm.launch import schedule
from fused_lstm.launch.schedule import Device, Recurrence
from fused_lstm.launch.stepwise import StepwiseConfig

H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 * 1024, (9, 0))
WIDE = StepwiseConfig(16, 16, 32)
STEPWISE = StepwiseConfig(16, 16, 16)


def test_candidates_are_of_both_schedules_and_can_run() -> None:
    for kernel in ("forward", "backward"):
        found = tune.candidates(Recurrence(kernel, "half", 100, 512, 64, 1), H100, 1000)
        assert {c.schedule for c in found} == {"stepwise", "persistent"}
        assert len(found) == len(set(found)) >= 3
        assert tune.candidates(Recurrence(kernel, "half", 100, 512, 64, 1), H100, 2) == found[:2]
        single = tune.candidates(Recurrence(kernel, "half", 1, 512, 64, 1), H100, 1000)
        assert {c.schedule for c in single} == {"stepwise"}


@pytest.mark.kernels
@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
class TestInTheInterpreter:
    pytestmark = IN_INTERPRETER

    @pytest.fixture
    def trial(self, kernel: str, R: int, monkeypatch: pytest.MonkeyPatch) -> tune.Trial:
        monkeypatch.setattr(tune, "candidates", lambda *_: [STEPWISE, WIDE])
        return tune.Trial(Recurrence(kernel, "fp32", 3, 16, 2, R), torch.float32, torch.device("cpu"))

    def test_the_fastest_is_taken(self, trial: tune.Trial) -> None:
        for fast, slow in ((WIDE, STEPWISE), (STEPWISE, WIDE)):
            result = tune.tune(trial, H100, 8, lambda _, config, fast=fast: 1.0 if config == fast else 3.0)
            assert result.best == fast != slow
            assert result.best_seconds == 1.0
            assert result.heuristic_seconds == 3.0
            assert "3.00x the heuristic's, best of 3" in str(result)

    def test_times_are_those_of_the_run(self, trial: tune.Trial) -> None:
        assert 0 < tune.seconds(trial, WIDE, 1) < 60

    def test_a_wrong_result_is_refused(
        self, trial: tune.Trial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        right = trial.run
        monkeypatch.setattr(trial, "run", lambda config: right(config) * (1.01 if config == WIDE else 1.0))
        assert tune.tune(trial, H100, 8, lambda _, config: 1.0 if config == WIDE else 2.0).best != WIDE
        assert "not taken: StepwiseConfig(block_b=16" in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.parametrize("training", [False, True])
def test_a_call_is_timed_by_both_backends(training: bool) -> None:
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for call in tune.calls([16], [2], "fp32", [2], 3):
        if call.training == training:
            result = tune.timed(call, where, 1)
            assert result[:10] == call[:10]
            assert result.kernels_us > 0 < result.torch_us


def layouts(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> set[tuple]:
    """What is compiled for ``run``: kernels with their constants, and which of their arguments there are."""
    found = set()

    def record(kernel: schedule.Kernel, grid: tuple, buffers: tuple, sequences: tuple, numbers: list) -> None:
        absent = [t is None for t in (*buffers, *sequences)]
        found.add((kernel.name, kernel.constants, buffers.gates_ptr.dtype, *absent))
        for t in buffers:  # the layer goes on with what a kernel would have written
            if t is not None and t.is_floating_point():
                t.zero_()

    with monkeypatch.context() as patch:
        patch.setattr(schedule.Kernel, "run", record)
        run()
    return found


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("layer", "given"),
    [
        ({}, {"hx": True, "loss_of": ["output", "c_n"]}),
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, {"lengths": True, "loss_of": ["h_n"]}),
        ({"proj_size": 4, "bias": False, "dtype": torch.bfloat16}, {"resets": True}),
        ({"recompute": True}, {"T": 1, "hx": True, "loss_of": ["output"]}),
        ({"cell": fused_lstm.Cell(peephole=True, zoneout=(0.1, 0.0))}, {"loss_of": ["output"]}),
    ],
)
@IN_INTERPRETER
def test_precompiled_is_what_a_call_needs(layer: dict, given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    T, B = given.get("T", 7), 3
    lstm = fused_lstm.LSTM(5, 20, backend="triton", **layer)
    K, kind = lstm.num_layers * (1 + lstm.bidirectional), lstm.weight_hh_l0.dtype
    x = torch.randn(*((B, T) if lstm.batch_first else (T, B)), 5, dtype=kind)
    states = (torch.randn(K, B, lstm.proj_size or 20, dtype=kind), torch.randn(K, B, 20, dtype=kind))
    lengths = torch.tensor([1, T, 2]) if given.get("lengths") else None
    resets = torch.rand(x.shape[:2]) < 0.3 if given.get("resets") else None

    def run() -> None:
        with torch.set_grad_enabled("loss_of" in given):
            y, ends = lstm(x, states if given.get("hx") else None, lengths=lengths, resets=resets)
        results = dict(zip(tune.RESULTS, (y, *ends), strict=True))
        if "loss_of" in given:
            torch.autograd.backward([results[name].sum() for name in given["loss_of"]])

    names = ("hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size", "recompute")
    call = {"T": 3, "loss_of": [], "hx": False, "lengths": False, "resets": False, "tf32": False, "device": "cpu"} | given
    call |= {"layer": {k: getattr(lstm, k) for k in names}, "dtype": str(kind).removeprefix("torch."), "B": B}
    call["cell"] = lstm.cell and asdict(lstm.cell)
    needed = layouts(monkeypatch, run)
    assert len(needed) >= 1 + ("loss_of" in given)
    assert layouts(monkeypatch, lambda: tune.run_call(**call)) == needed


@pytest.mark.kernels
@IN_INTERPRETER
def test_calls_to_precompile_run_in_processes_of_their_own() -> None:
    layer = {"hidden_size": 16}
    call = {"layer": layer, "cell": None, "dtype": "float32", "device": "cpu", "tf32": False, "T": 1, "loss_of": ["output"]}
    call |= {"B": 2, "hx": True, "lengths": False, "resets": False}
    tune._in_a_process(call)
    with pytest.raises(RuntimeError, match=r"the call with B=2 failed: (?s:.*)hidden_size must be greater than zero"):
        tune._in_a_process({**call, "layer": {**layer, "hidden_size": 0}})


def test_precompile_refuses_what_makes_no_sense() -> None:
    lstm = fused_lstm.LSTM(3, 4)
    for B in ([2, 0], [], 2.5, "4", torch.zeros(5, 2, 3)):
        with pytest.raises(ValueError, match="B should be one or more integers of at least 1, got"):
            tune.precompile(lstm, B)
    with pytest.raises(TypeError, match=r"expects a fused_lstm.LSTM, got: torch.nn.modules.rnn.LSTM"):
        tune.precompile(torch.nn.LSTM(3, 4), 2)
    with pytest.raises(ValueError, match="some of output, h_n, c_n, got"):
        tune.precompile(lstm, 2, loss_of="y")
    with pytest.raises(RuntimeError, match=r"expected a layer on a GPU.*got cpu"):
        tune.precompile(lstm, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert tune.main([]) == 2
    assert "needs a CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.kernels
def test_explain_says_how_the_kernels_are_launched() -> None:
    layer = fused_lstm.LSTM(8, 20, bidirectional=True, backend="triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = fused_lstm.explain(layer.to(device), torch.randn(5, 3, 8, device=device))
    assert plan.kernels.keys() == {"forward", "backward"}
    assert "forward pass: " in str(plan)
    if device == "cpu":
        assert plan.kernels["forward"].startswith("5 launches, one for each time step; 1 x 1 x 2 programs of 32 units")
    with torch.no_grad():
        assert fused_lstm.explain(layer, torch.randn(5, 3, 8, device=device)).kernels.keys() == {"forward"}
