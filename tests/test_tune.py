"""Measuring launch configurations: in the interpreter with made-up times, which is enough for all but the times."""

from __future__ import annotations

import pytest
import torch
from pairs import IN_INTERPRETER

import fused_lstm

pytest.importorskip("triton")
from fused_lstm import tune
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
