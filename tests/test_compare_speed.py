"""Where torch.nn.LSTM is slow on a CPU: the rows of docs/compare.md that are a matter of time.

The two layers take turns, so that a busy machine slows both. What is asked for is well below what was measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pairs import assert_all_close, flat, packed, pair, randn, states
from torch import Tensor


def speed_up(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> float:
    """Median of the ratios of their time to ours, round by round."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 2):
        for run, taken in zip((theirs, ours), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(a / b for a, b in zip(*(t[2:] for t in times), strict=True))


@pytest.mark.parametrize("train", [False, True])
def test_lengths_are_faster_than_packing(train: bool) -> None:
    """Lengths spread from 1 to T; 1.6 times were measured, 2.1 in training."""
    theirs, ours = pair(64, 128)
    x, lengths = randn(64, 32, 64).float(), torch.arange(1, 65, 2)

    def step(call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.set_grad_enabled(train):
                results = call()
                if train:
                    results[0].sum().backward()
            return results

        return run

    run_theirs, run_ours = step(lambda: packed(theirs, x, lengths)), step(lambda: flat(ours(x, lengths=lengths)))
    assert_all_close(run_ours(), run_theirs())
    assert speed_up(run_theirs, run_ours, 15) > 1.1


def test_one_step() -> None:
    """nn.LSTM reorders its weights in every call, most of the time of one step; 3.7 to 6.6 times were measured."""
    theirs, ours = pair(512, 512)
    x, hx = randn(1, 1, 512).float(), states(1, 1, 512, dtype=torch.float32)
    with torch.no_grad():
        assert_all_close(flat(ours(x, hx)), flat(theirs(x, hx)))
        assert speed_up(lambda: theirs(x, hx), lambda: ours(x, hx), 50) > 1.5


def test_half_precision() -> None:
    """18 times were measured."""
    theirs, ours = pair(32, 64, dtype=torch.float16)
    x = randn(16, 16, 32).half()
    with torch.no_grad():
        got, expected = flat(ours(x)), flat(theirs.double()(x.double()))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-3)
        theirs.half()
        assert speed_up(lambda: theirs(x), lambda: ours(x), 15) > 3
