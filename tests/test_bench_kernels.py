"""The benchmarks' own kernel: its last rung is the shipped one, and it compiles within its resources."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forked import run_forked
from fused_lstm.config import LaunchConfig
from pairs import IN_INTERPRETER


def climb(rung: int, config: LaunchConfig, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Any:
    """The buffers after a launch with a process for each program."""
    import ladder

    from fused_lstm import launch

    monkeypatch.setitem(launch.KERNELS, "ladder", ladder.ladder_kernel)
    problem = ladder.Climb(config, T=3, H=48, B=20, device="cpu", dtype=dtype)
    grid, arguments, meta = problem.arguments(ladder.Rung(rung))
    run_forked("ladder", grid, arguments, meta)
    return problem


@pytest.mark.kernels
@IN_INTERPRETER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_rung_is_the_shipped_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import ladder

    config = LaunchConfig(16, 16, 16, persistent=True, resident=3, ahead=1)
    ours = climb(ladder.Rung.SAVES, config, monkeypatch, dtype)
    shipped = ladder.Climb(LaunchConfig(16, 16, 16), T=3, H=48, B=20, device="cpu", dtype=dtype)  # a launch for each step
    shipped.run_shipped()
    for name in ("gates", "c", "h"):
        assert torch.equal(getattr(ours, name), getattr(shipped, name)), name
    assert not torch.equal(ours.gates, ours.x)


@pytest.mark.kernels
@IN_INTERPRETER
def test_lower_rungs_do_less(monkeypatch: pytest.MonkeyPatch) -> None:
    import ladder

    config = LaunchConfig(16, 16, 16, persistent=True, resident=3, ahead=1)
    for rung in (ladder.Rung.BARRIER, ladder.Rung.EXCHANGE, ladder.Rung.PRODUCT, ladder.Rung.POINTWISE):
        problem = climb(rung, config, monkeypatch, torch.float32)
        fresh = ladder.Climb(config, T=3, H=48, B=20, device="cpu", dtype=torch.float32)
        assert torch.equal(problem.gates, fresh.gates), "only the last rung saves"
        assert torch.equal(problem.h, fresh.h) == (rung == ladder.Rung.BARRIER)
    assert torch.equal(problem.h, climb(ladder.Rung.SAVES, config, monkeypatch, torch.float32).h)


@pytest.mark.compile
@pytest.mark.parametrize(("H", "B"), [(256, 16), (512, 64), (1024, 16), (1024, 64)])
def test_rungs_compile_without_spills(H: int, B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import ladder
    import ledger

    monkeypatch.setitem(ledger.KERNELS, "ladder", ladder.ladder_kernel)
    config = ladder.config_of(H, B, ledger.DEVICES["sm_90"])
    for rung in ladder.Rung:
        built = ledger.compile_kernel("ladder", config, "sm_90", torch.bfloat16, False, H=H, RUNG=int(rung))
        assert built.spills == 0
        assert built.shared <= ledger.SHARED_LIMIT["sm_90"]
        assert (built.tensor_core > 0) == (rung >= ladder.Rung.PRODUCT)
        assert built.w_loads_in_loop == 0
        assert built.w_loads_before == (config.resident if rung >= ladder.Rung.PRODUCT else 0)
        assert built.loop["BAR"] >= 2
