"""examples/char_lm.py as a user runs it: a process of its own, on a tiny text."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "char_lm.py"
SIZES = ["--hidden", "16", "--batch", "4", "--chunk", "8", "--device", "cpu", "--sample", "60"]
STEPS = 450  # several passes over the text, and two validations on the way


def start(folder: Path, *args: object) -> subprocess.Popen[str]:
    # One thread: the sizes are tiny, and other tests may run beside this one.
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--out", str(folder / "out"), *map(str, args)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_bytes(b"".join(b"%d + %d = %d\n" % (i, i * i % 37, i + i * i % 37) for i in range(500)) + b"\xff\n")
    return path


def curves(folder: Path) -> dict[str, tuple[list, list]]:
    learners = torch.load(folder / "out" / "char_lm.pt")["learners"]
    return {name: (own["plain"]["losses"], own["plain"]["validation"]) for name, own in learners.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the printed text of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = finish(start(folder, "--text", write_text(folder), "--steps", STEPS, *SIZES))
    assert code == 0, err
    assert f"step {STEPS}" in err
    return folder, out


def test_prints_and_plots(whole: tuple[Path, str]) -> None:
    folder, out = whole
    assert "training, backend: aten" in out
    assert "\ndef " in out
    for line in ("training, T = 8", "generating, T = 1"):
        ratio = float(next(text for text in out.splitlines() if text.startswith(line)).split()[-1])
        assert ratio > 0
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no plot: it needs matplotlib" in out
    else:
        assert (folder / "out" / "char_lm.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_of_both_models_agree(whole: tuple[Path, str]) -> None:
    folder, out = whole
    ours, theirs = curves(folder)["fused_lstm.LSTM"], curves(folder)["nn.LSTM"]
    assert len(ours[0]) == STEPS
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)
    assert ours[0][-1] < 0.8 * ours[0][0]
    assert "loss curves: " in out
    assert "MORE" not in out


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
def test_an_interrupted_run_goes_on_with_the_same_losses(whole: tuple[Path, str], tmp_path: Path) -> None:
    args = ["--text", whole[0] / "text.txt", *SIZES]
    process = start(tmp_path, *args, "--seconds", 100)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("step 1 ")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGINT, err
    assert "Traceback" not in err
    assert "--resume" in out
    assert 0 < len(curves(tmp_path)["fused_lstm.LSTM"][0]) < STEPS

    code, _, err = finish(start(tmp_path, *args, "--steps", STEPS, "--resume"))
    assert code == 0, err
    assert curves(tmp_path) == curves(whole[0])

    code, _, err = finish(start(tmp_path, *args, "--hidden", 8, "--resume"))
    assert code == 1
    assert "hidden is 16 there and 8 here" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "missing.txt"], "got No such file or directory: missing.txt"),
        (["--text", "text.txt", "--batch", "500"], "expected at least 325,000 characters"),
        (["--text", "text.txt", "--device", "nonsense"], "--device: expected one that works here"),
    ],
    ids=["missing", "short", "device"],
)
def test_errors_say_what_was_expected(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as it is for the script, which imports its neighbour
    monkeypatch.setattr(sys, "argv", ["char_lm.py", "--out", "out", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in stop.value.code
