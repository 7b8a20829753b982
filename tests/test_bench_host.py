"""bench/host.py, without a GPU."""

from __future__ import annotations

import host
import pytest
import torch
from isolate import isolated


def test_what_counts_as_an_operation() -> None:
    assert all(map(host.computes, ("aten::zeros", "aten::clone", "aten::sum", "aten::mul_", "aten::_to_copy")))
    names = ("aten::view", "aten::slice", "aten::empty_like", "aten::new_empty", "aten::linear", "aten::contiguous", "other")
    assert not any(map(host.computes, names))


def test_operations_within_others_do_not_count() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous() + torch.zeros_like(x.t())  # a copy, zeros and a sum

    assert host.operations(host.Run(lambda: torch.ones(2, 3), call), "cpu", host.Stub()) == 3


@pytest.mark.compile  # the kernels' module must be importable, and not interpreted
def test_every_case_and_mode_is_measured() -> None:
    answer = isolated("host:host", 120, device="cpu", dtype="bfloat16", blocks=1)
    found = answer["result"]
    assert list(found) == [f"{case.name}, {mode}" for case in host.CASES for mode in host.MODES]
    for what, row in found.items():
        assert row["ours us"] > 0, what
        assert row["ours operations"] >= 2, what  # a product and a launch
        assert ("torch us" in row) == ("backward" not in what)
    assert found["T = 1, inference"]["torch operations"] == 1  # its C++ call
    lines = host.table({"here": [found], "base": [found]})
    assert len(lines) == 1 + len(found)
    assert all("1.00  (1.00-1.00)" in line for line in lines[1:])
