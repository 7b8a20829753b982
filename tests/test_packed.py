"""Packed sequences on a CPU, against nn.LSTM."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from checks import Config, Rule, add_config
from torch import Tensor, nn

import fused_lstm
from fused_lstm import functional, plan
from fused_lstm.cpu import ragged

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of however few steps; plans of before, and these, are forgotten."""
    monkeypatch.setattr(plan, "packed_steps", lambda p: 1)
    functional._chosen.cache_clear()
    yield
    functional._chosen.cache_clear()


@pytest.mark.usefixtures("in_blocks", "nan_memory")
def test_200_random_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in as many blocks as there can be, where calls cost nothing."""
    rule, ways = Rule(), Counter()
    for seed in range(200):
        if seed == 100:
            for cost in ("STEP_COST", "CALL_COST", "CALL_COST_TIMES_H"):
                monkeypatch.setattr(ragged, cost, 0)
        dtype = (torch.float32, torch.float64)[seed % 2]
        config = replace(Config.random(seed, dtype, 9), mode=("packed", "packed sorted")[seed // 2 % 2])
        add_config({("auto", False): rule}, config)
        lstm = fused_lstm.LSTM.from_torch(config.module().to(dtype))
        ways[fused_lstm.explain(lstm, config.data()[0].to(dtype)).how] += 1
    rule.check()
    assert ways.keys() == {"ragged", "fused"}
    assert ways["ragged"] > 150


def test_packed_rows_are_never_padded_to_more_than_twice_their_data() -> None:
    r = random.Random(0)
    some = [[r.randint(1, r.choice([5, 500])) for _ in range(r.randint(1, 70))] for _ in range(50)]
    for lengths in ([4000] + [5] * 511, [4000] + [6] * 31 + [5] * 480, [9] * 3, *some):
        sizes = torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))])
        for backwards in (False, True):
            layout = ragged.PackedUnfolding(sizes, torch.device("cpu"), backwards, 64)
            assert sum(steps * rows for steps, rows in (block.shape for block in layout.blocks)) <= 2 * sum(lengths)


@pytest.mark.usefixtures("in_blocks")
def test_packed_rows_without_gradients_and_traced() -> None:
    """A trace, which is to serve other lengths, holds torch's own."""
    theirs = nn.LSTM(3, 4, bidirectional=True).double()
    ours = fused_lstm.LSTM.from_torch(theirs).requires_grad_(False)
    x = torch.randn(9, 4, 3).double()

    def run(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h_n, c_n) = lstm(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        return y.data, h_n, c_n

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(lambda x, lengths: run(ours, x, lengths), (x, torch.tensor([9, 2, 1, 7])))
        for lengths in torch.tensor([[9] * 4, [3, 5, 9, 1]]):
            for found in (run(ours, x, lengths), traced(x, lengths)):
                for a, b in zip(found, run(theirs, x, lengths), strict=True):
                    torch.testing.assert_close(a, b)
