"""Where a measurement runs: in a process of its own, with this package or another revision's, on a device it tells of."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
MARK = "result: "  # what else a process prints is not its result


def isolated(function: str, limit: float, path: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """Call ``module:function`` of this folder with arguments that JSON can hold; with ``path`` before all packages.

    A crash or a hang, which ``limit`` seconds end, loses one result.

    Returns {"result": what it returned} or {"failed": why, "output": the end of what it printed}; "seconds" in both.
    """
    start = time.monotonic()
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # In a session of its own, so that its children can be ended with it.
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment, start_new_session=True) as child:
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


def unpack(revision: str, folder: Path) -> Path:
    """The package of a revision, laid out as it is installed; returns what PYTHONPATH has to name."""
    archive = subprocess.run(["git", "archive", revision, "fused_lstm", "kernels"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ValueError(f"{revision!r} is no revision with the package in it: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "kernels").rename(folder / "fused_lstm" / "kernels")
    return folder


def copy_of_checkout(folder: Path) -> Path:
    """This checkout's package as it is now, so that editing it meanwhile changes nothing; what PYTHONPATH has to name."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fused_lstm", folder / "fused_lstm", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "fused_lstm" / "kernels", ignore=ignore)
    return folder


def about(device: str, threads: int = 0) -> dict[str, Any]:
    """The environment of a measurement on ``device`` ("cpu" or "cuda"), for a JSON file."""
    import torch

    import fused_lstm

    record: dict[str, Any] = {
        "kind": device, "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "fused_lstm": fused_lstm.__version__, "torch": torch.__version__, "triton": _triton(),
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    if device == "cpu":
        return {"device": _cpu(), "threads": threads, "cores": os.cpu_count(), "load_before": load(), **record}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory,
        "driver": driver, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, **record,
    }  # fmt: skip


def load() -> float | None:
    """Processes that want to run now, about; None where the system does not tell."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def commit() -> str:
    """The checkout's commit; with "+" if files of it, other than results, were changed since."""
    found = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return found + "+" * bool(changed and not found.startswith("unknown"))


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def main() -> None:
    module, function = sys.argv[1].split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
