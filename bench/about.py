"""What a result has to say of itself: device, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


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
