"""bench/host.py, without a GPU."""

from __future__ import annotations

import compare
import host
import pytest
import torch
from process import isolated


def test_what_counts_as_an_operation() -> None:
    assert all(map(host.computes, ("aten::zeros", "aten::clone", "aten::sum", "aten::mul_", "aten::_to_copy")))
    names = ("aten::view", "aten::slice", "aten::empty_like", "aten::new_empty", "aten::linear", "aten::contiguous", "other")
    assert not any(map(host.computes, names))


def test_operations_within_others_do_not_count() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous() + torch.zeros_like(x.t())  # a copy, zeros and a sum

    assert host.operations(host.Run(lambda: torch.ones(2, 3), call), host.Stub()) == 3


@pytest.mark.compile  # the kernels' module must be importable, and not interpreted
def test_every_case_and_mode_is_measured() -> None:
    answer = isolated("host:host", 120, device="cpu", dtype="bfloat16", blocks=1)
    found = answer["result"]
    assert list(found) == [f"{case.name}, {mode}" for case in host.CASES for mode in host.MODES]
    for what, row in found.items():
        assert row["ours us"] > 0, what
        assert row["ours operations"] >= 2, what  # a product and a launch
        assert ("torch us" in row) == ("backward" not in what)
    assert found["T = 1, states, inference"]["torch operations"] == 1  # its C++ call
    assert found["T = 1, inference"]["ours operations"] == 2
    assert found["plain, inference"]["ours operations"] == 3, "a product, and a launch for each of two steps"
    assert found["plain, backward"]["ours operations"] <= 12 - 3
    lines = host.table({"here": [found], "base": [found]})
    assert len(lines) == 1 + len(found)
    assert all("1.00  (1.00-1.00)" in line for line in lines[1:])


def test_small_calls_are_measured_as_they_are() -> None:
    found = isolated("host:small", 120, blocks=1)["result"]
    assert len(found) == 3 + 4 * 2
    assert all(row.keys() == {"ours us", "torch us"} and min(row.values()) > 0 for row in found.values())
    lines = host.table({"here": [found], "base": [found]})
    assert all("1.00  (1.00-1.00)" in line for line in lines[1:])


def test_a_change_of_host_time_is_flagged() -> None:
    """If it is one in every round; and any operation more."""

    def rounds(*times: float, operations: int = 3) -> list[host.Rows]:
        return [{"plain": {"ours us": t, "ours operations": operations}} for t in times]

    def verdicts(**sides: list[host.Rows]) -> list[str]:
        return [change.verdict for change in compare.host_changes(sides, 0.05)]

    assert verdicts(base=rounds(50, 52), here=rounds(60, 61)) == ["slower", "same"]
    assert verdicts(base=rounds(50, 62), here=rounds(60, 61)) == ["same", "same"]
    assert verdicts(base=rounds(50, 52), here=rounds(51, 53)) == ["same", "same"]
    assert verdicts(base=rounds(50, 52), here=rounds(40, 41, operations=4)) == ["faster", "larger"]
