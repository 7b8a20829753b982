"""examples/inside_the_cell.py: the textbook's cell, what it takes for true of a text, and the example as a user runs it."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[1] / "examples" / "inside_the_cell.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as it is for the script, which imports its neighbour
    try:
        import inside_the_cell

        return inside_the_cell
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_the_textbooks_cases(example: ModuleType) -> None:
    phases = example.textbook()
    expected = {  # input, forget and output gate, cell states
        "write": (1, 0, 1, [math.tanh(1)]),
        "keep": (0, 1, 1, [math.tanh(1)] * 6),
        "hide": (0, 1, 0, [math.tanh(1)] * 4),
        "show": (0, 1, 1, [math.tanh(1)] * 3),
        "add": (1, 1, 1, [math.tanh(1) + k * math.tanh(0.5) for k in (1, 2, 3)]),
        "forget": (0, 0, 1, [0.0, 0.0]),
        "replace": (1, 0, 1, [math.tanh(-0.9)] * 2),
    }
    assert list(phases) == list(expected)
    for phase, (i, f, o, c) in expected.items():
        for name, gate in zip("ifo", (i, f, o), strict=True):
            torch.testing.assert_close(phases[phase][name], torch.full((len(c),), float(gate)), rtol=0, atol=1e-6)
        torch.testing.assert_close(phases[phase]["c"], torch.tensor(c), rtol=0, atol=1e-6)
        torch.testing.assert_close(phases[phase]["h"], o * torch.tensor(c).tanh(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["weight_ih_l0", "bias_ih_l0"])
def test_a_cell_with_another_forget_gate_fails_the_textbook(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    lstm = example.textbook_cell()
    getattr(lstm, fault).data[1] *= 0.1
    monkeypatch.setattr(example, "textbook_cell", lambda: lstm)
    with pytest.raises(AssertionError, match=r"stays|zero|left"):
        example.textbook()


def test_what_is_true_of_a_text(example: ModuleType) -> None:
    source = 'def f(x):\n    s = rb\'a(\' + """b\n"""\n\n    # [\n    if x:\n        return {s: [1]}\nf(2)\n'
    indentation, quotes, brackets = ("".join(str(int(n)) for n in row) for row in example.truths(source))
    marks = re.sub(r"[^\n]", "0", source)

    def where(text: str, deep: int = 1, after: int = 0) -> str:
        """The digits of a depth that holds in one place of the source."""
        start = source.index(text, after)
        return marks[:start] + str(deep) * len(text) + marks[start + len(text) :]

    def over(*digits: str) -> str:
        return "".join(map(max, *digits)).replace("\n", "0") if len(digits) > 1 else digits[0].replace("\n", "0")

    assert len(indentation) == len(quotes) == len(brackets) == len(source)
    inside = [k for k, digit in enumerate(quotes) if digit == "1"]
    assert "".join(source[k] for k in inside) == "'a(" + '"""b\n""'  # the last quote ends it
    assert brackets == over(where("(x"), where("{s: [1]"), where("[1", 2), where("(2"))
    first, second, last = source.index("s = rb"), source.index("return"), source.rindex("f(2)")
    assert indentation == "0" * first + "1" * (second - first) + "2" * (last - second) + "0" * (len(source) - last)


def test_auc_is_the_chance_of_the_right_order(example: ModuleType) -> None:
    torch.manual_seed(0)
    values, truth = torch.randn(50, 3), torch.rand(50) < 0.4
    values[:, 0] = truth + 0.1 * torch.rand(50)

    def chance(column: Tensor) -> float:
        return (column[truth][:, None] > column[~truth]).double().mean().item()

    found = example.auc(values.argsort(0).argsort(0), truth)
    assert found.tolist() == pytest.approx([chance(column) for column in values.T])
    assert found[0] == 1


@pytest.mark.parametrize("fault", ["", "text", "seed", "hidden", "validation", "rubbish"])
def test_which_checkpoint_is_taken(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Not one of another text, seed or size, nor one whose training was interrupted before its first validation."""
    text, characters = "some text", sorted("some text")
    model = example.char_model.CharLM(len(characters), 5, 1, example.fused_lstm.LSTM)
    what = f"{len(text)} characters of CRC {example.zlib.crc32(text.encode()):08x}"
    settings = {"text": what, "seed": 3, "hidden": 5, "layers": 1}
    settings |= {"text": {"text": "other"}, "seed": {"seed": 4}, "hidden": {"hidden": 5}}.get(fault, {})
    learner = {"model": model.state_dict(), "plain": {"validation": [] if fault == "validation" else [(7, 1.0)]}}
    saved = {"settings": settings, "learners": {example.char_lm.FUSED: learner}}
    torch.save([1] if fault == "rubbish" else saved, tmp_path / "char_lm.pt")
    args = argparse.Namespace(out=tmp_path, seed=3, hidden=6 if fault == "hidden" else None, seconds=1.0)

    def interrupted(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(example.subprocess, "run", interrupted)
    if fault:
        with pytest.raises(SystemExit, match=r"expected a checkpoint" if fault == "rubbish" else "did not end well"):
            example.trained(args, text, characters)
    else:
        taken = example.trained(args, text, characters)
        assert torch.equal(taken.head.weight.cpu(), model.head.weight)


def test_a_short_run(example: ModuleType, tmp_path: Path) -> None:
    """Trains, scores and draws; leaves a model that a second run would take."""
    sizes = ["--seconds", "0.5", "--hidden", "12", "--files", "16", "--characters", "2500", "--out", "out"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--seed", "1"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = run.stdout
    left = example.char_model.load(tmp_path / "out" / "inside_the_cell" / "char_lm.pt")
    assert f"no checkpoint for {left['settings']['text']}, seed {left['settings']['seed']}: training one" in said
    assert left["settings"]["hidden"] == 12
    assert left["learners"][example.char_lm.FUSED]["plain"]["validation"]
    for name in ("indentation", "quotes", "brackets"):
        line = next(line for line in said.splitlines() if line.startswith(name))
        found = re.fullmatch(
            rf"{name} +layer 0, +(\d+) +(0\.\d+|1\.000) +(0\.\d+|1\.000) +-?[01]\.\d+( +not tracked.*)?", line
        )
        assert found, line
        assert int(found[1]) < 12
        assert (float(found[3]) < 0.8) == bool(found[4])
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    names = ("textbook", *(name + end for name in ("indentation", "quotes", "brackets") for end in ("", "-gates")))
    assert pictures == {f"inside_the_cell-{name}.png" for name in names}
