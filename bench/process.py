"""Where a measurement runs: in a process of its own, with this package or another revision's, on a device it tells of."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
MARK = "result: "  # what else a process prints is not its result


class Worker:
    """A process that serves one call after another: what it has imported, and its place on a GPU, it pays for once.

    It is started when it is first called, and again after a crash or a hang, which lose one call. ``path`` goes before all
    packages.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
        self.child: subprocess.Popen[str] | None = None
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # what it prints; None: it has ended

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all that it started."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.close()
            self.child.wait()
            self.child = None

    def start(self) -> subprocess.Popen[str]:
        # In a session of its own, so that its children can be ended with it.
        child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", cwd=ROOT, env=self.environment, start_new_session=True,
        )  # fmt: skip
        self.child, self.lines = child, queue.SimpleQueue()
        threading.Thread(target=_read, args=(child.stdout, self.lines), daemon=True).start()
        return child

    def call(self, function: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Call ``module:function`` of this folder with arguments that JSON can hold.

        Returns {"result": what it returned} or {"failed": why, "output": the end of what it printed}; "seconds" in both.
        """
        start, output = time.monotonic(), []
        child = self.child or self.start()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps([function, arguments]) + "\n")
            child.stdin.flush()
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, start + limit - time.monotonic()))
            except queue.Empty:
                why = f"no end after {limit:.0f} s"
                break
            if line is None:
                why = f"exit status {child.wait()}"
                break
            if line.startswith(MARK):
                return {"result": json.loads(line.removeprefix(MARK)), "seconds": round(time.monotonic() - start, 1)}
            output.append(line)
        self.__exit__()
        return {"failed": why, "output": "".join(output)[-3000:], "seconds": round(time.monotonic() - start, 1)}


def _read(pipe: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)


def isolated(function: str, limit: float, path: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """A call in a process of its own, as :meth:`Worker.call`."""
    with Worker(path) as worker:
        return worker.call(function, limit, **arguments)


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
    """Serve the calls that come in; nobody else is to read them."""
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for request in iter(requests.readline, ""):
        name, arguments = json.loads(request)
        module, function = name.split(":")
        result = getattr(importlib.import_module(module), function)(**arguments)
        print(f"\n{MARK}{json.dumps(result)}", flush=True)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():  # its memory is for the next one
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
