"""A function in a process of its own, with a time limit: a crash or a hang loses one result."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
MARK = "result: "  # what else a process prints is not its result


def isolated(function: str, limit: float, path: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Call ``module:function`` of this folder with arguments that JSON can hold; with ``path`` before all packages.

    Returns {"result": what it returned} or {"failed": why, "output": the end of what it printed}; "seconds" in both.
    """
    start = time.monotonic()
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # In a session of its own, so that its children can be ended with it.
    with subprocess.Popen(command, **pipes, text=True, cwd=BENCH.parent, env=environment, start_new_session=True) as child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(child)
            out, err = child.communicate()
            return {"failed": f"no end after {limit:.0f} s", "output": (out + err)[-3000:], "seconds": round(limit, 1)}
        except BaseException:  # Ctrl-C
            _end(child)
            raise
    seconds = round(time.monotonic() - start, 1)
    results = [line for line in out.splitlines() if line.startswith(MARK)]
    if child.returncode != 0 or not results:
        output = (out + err)[-3000:]
        return {"failed": f"exit status {child.returncode}", "output": output, "seconds": seconds}
    return {"result": json.loads(results[-1].removeprefix(MARK)), "seconds": seconds}


def _end(child: subprocess.Popen[str]) -> None:
    """A process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def main() -> None:
    module, function = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
