"""examples/streaming.py as a user runs it; that it decodes the same as offline, it asserts itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "streaming.py"


def test_decodes_while_the_signal_arrives(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    equal, lstm, threshold, times = run.stdout.splitlines()
    assert equal == "decoded while it arrived: the same as offline"
    errors = [float(line.split()[-1].rstrip("%")) for line in (lstm, threshold)]
    assert errors[0] < 5 < errors[1]
    assert float(times.split()[-1]) > 0
