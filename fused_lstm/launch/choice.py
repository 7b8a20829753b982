"""Which configuration runs a recurrence on a device: measured ones first, else the one that a model of its time prefers.

Everything here but the reading of tables is pure and needs no GPU, so that a choice can be tested, and explained, anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .. import kernels as device_code
from .schedule import SMALLEST, Device, Recurrence, power_of_two
from .stepwise import STEPWISE, StepwiseConfig

GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if GLUON:
    from . import persistent

SCHEDULES = (STEPWISE, persistent.PERSISTENT) if GLUON else (STEPWISE,)
BY_NAME = {schedule.name: schedule for schedule in SCHEDULES}


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from."""

    config: Any  # of one of the schedules
    reason: str
    measured: bool = False


def choose(problem: Recurrence, device: Device | None, tables: Sequence[Table] = ()) -> Choice:
    """The configuration for a problem; pure, so that it can be tested without a GPU.

    Args:
        problem: the recurrence.
        device: the GPU, or None for Triton's interpreter.
        tables: what was measured on the device; the first that knows the problem decides.
    """
    if device is None:
        return _interpreted(problem)
    for table in () if problem.cell else tables:  # which know torch's cell
        config = table.configs.get(key_of(problem))
        if config is not None and BY_NAME[config.schedule].refusal(config, problem, device) is None:
            return Choice(config, f"measured on {device.name}, {table.source}", measured=True)
    best: dict[str, Any] = {}
    refused = [] if GLUON else ["the persistent one needs Triton 3.6 or newer"]
    for schedule in SCHEDULES:
        candidates = schedule.candidates(problem, device)
        refusals = [schedule.refusal(config, problem, device) for config in candidates]
        able = [config for config, why in zip(candidates, refusals, strict=True) if why is None]
        if able:
            best[schedule.name] = min(able, key=lambda config: schedule.estimate(config, problem, device))
        else:
            why = schedule.unsuitable(problem, device) or f"finds no room for the weights of H = {problem.H}"
            refused.append(f"the {schedule.name} one {refusals[0] if refusals else why}")
    if problem.T == 1:
        return Choice(best["stepwise"], "one step")
    if len(best) == 1:
        return Choice(best["stepwise"], f"a launch for each step, since no other schedule fits: {'; '.join(refused)}")
    name = min(best, key=lambda name: BY_NAME[name].estimate(best[name], problem, device))
    return Choice(best[name], f"the {name} schedule, which the model of its time prefers at this size")


def _interpreted(problem: Recurrence) -> Choice:
    """For Triton's interpreter, whose time goes by the number of operations, not by their size."""
    block_h, block_k = (min(max(power_of_two(problem.H), SMALLEST), most) for most in (64, 256))
    return Choice(StepwiseConfig(16, block_h, block_k), "Triton's interpreter, which runs programs one after another")


def describe(choice: Choice, problem: Recurrence, device: Device | None) -> str:
    """A choice in words."""
    text = f"{BY_NAME[choice.config.schedule].describe(choice.config, problem)} ({choice.reason}"
    return text + (")" if choice.measured or device is None else f"; not measured on {device.name})")


Key = tuple[str, str, int, int, int]
KEYS = ("kernel", "arithmetic", "H", "B", "R")


class Timing(NamedTuple):
    """Microseconds of a call of the layer, the host's part included."""

    dtype: str  # "float16", "bfloat16", "float64"; of fp32 "tf32" or "float32"
    training: bool
    lengths: bool
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    directions: int
    P: int  # of a projection, or 0
    kernels_us: float = 0.0
    torch_us: float = 0.0  # of torch's own LSTM, by the "aten" backend

    @property
    def algorithm(self) -> str:
        """Which of cuDNN's algorithms torch takes (``get_algo`` in its ATen/native/cudnn/RNN.cpp)."""
        if self.P or self.dtype == "float64":
            return "standard"
        if (128 if self.training else 192) >= self.H:
            return "small persistent"
        in_128s = self.H % 128 == 0 and self.I % 128 == 0 and self.B % 8 == 0
        single = self.layers == self.directions == 1 and not self.lengths
        if self.dtype == "float16" and single and in_128s and self.H <= 1024 and self.B <= 128:
            return "persistent"
        return "standard"

    def like(self, other: Timing) -> bool:
        """Whether the times of the one say something of the other's."""
        return self[:3] == other[:3] and self.algorithm == other.algorithm

    def distance(self, other: Timing) -> float:
        """How far apart two sizes are: by how many times, in all."""
        return sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(self[3:10], other[3:10], strict=True))

    def __str__(self) -> str:
        more = f" layers={self.layers}" * (self.layers > 1) + " both directions" * (self.directions > 1)
        return f"T={self.T} B={self.B} I={self.I} H={self.H}" + more + f" P={self.P}" * (self.P > 0)


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured on one device, and the file that says it."""

    source: str
    configs: dict[Key, Any]
    timings: tuple[Timing, ...] = ()
    kernels: str = ""  # with which kernels the timings were measured

    def nearest(self, to: Timing) -> Timing | None:
        """What was measured of a call like this one, at the size that is nearest to its."""
        return min((t for t in self.timings if t.like(to)), key=to.distance, default=None)


def key_of(problem: Recurrence) -> Key:
    """What a measured configuration is for: a batch size stands for all with the same next power of two."""
    return problem.kernel, problem.arithmetic, problem.H, power_of_two(problem.B), problem.R


def _key(entry: dict[str, Any]) -> Key:
    return key_of(Recurrence(T=1, **{k: entry[k] for k in KEYS}))


def user_folder() -> Path:
    """Where ``python -m fused_lstm.tune`` keeps tables: $FUSED_LSTM_CONFIGS, else fused_lstm in the user's cache.

    Raises ValueError where the variable names something else than a folder; one that is not there yet is no error.
    """
    given = os.environ.get("FUSED_LSTM_CONFIGS")
    if not given:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_lstm"
    folder = Path(given).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"FUSED_LSTM_CONFIGS should name a folder, got {given}, which is none")
    return folder


def file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in device_name) + ".json"


@lru_cache
def tables(device_name: str) -> tuple[Table, ...]:
    """What is known of a device: the user's table, then the one that comes with the package."""
    shipped = Path(device_code.__file__).parent / "configs"
    paths = (folder / file_name(device_name) for folder in (user_folder(), shipped))
    return tuple(read_table(path) for path in paths if path.is_file())


@lru_cache
def kernels() -> str:
    """A digest of the kernels' sources, to tell whether they are those that were measured."""
    files = sorted(Path(device_code.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def read_table(path: Path) -> Table:
    """The table in a file. Raises ValueError if the file holds none, rather than go on as if it were not there."""
    try:
        data = json.loads(path.read_text())
        entries = data["configs"]
        if not isinstance(entries, list):
            raise TypeError(f"configs should be a list, got {type(entries).__name__}")
        timings = tuple(Timing(**t) for t in data.get("timings", ()))
        configs = {}
        for entry in entries:
            configs[_key(entry)] = read_config(entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of launch configurations ({type(error).__name__}: {error}); "
            "remove it, and measure anew with python -m fused_lstm.tune"
        ) from error
    return Table(str(path), configs, timings, data.get("kernels", ""))


def read_config(fields: dict[str, Any]) -> Any:
    """A configuration from a table's entry."""
    fields = dict(fields)
    return BY_NAME[fields.pop("schedule")].config(**fields)


def write_table(path: Path, entries: Sequence[dict[str, Any]], timings: Sequence[Timing] = ()) -> None:
    """Add what was measured to a table, in place of what it holds of the same problems; timings of other kernels go.

    Raises what :func:`read_table` raises.
    """
    old, table = [], None
    if path.is_file():
        table, old = read_table(path), json.loads(path.read_text())["configs"]
    new = {_key(e): e for e in (*old, *entries)}
    kept = table.timings if table is not None and table.kernels == kernels() else ()
    timed = [t._asdict() for t in {t[:10]: t for t in (*kept, *timings)}.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"configs": list(new.values()), "kernels": kernels(), "timings": timed}, indent=1) + "\n")
    tables.cache_clear()


def entry(problem: Recurrence, config: Any, microseconds: float, **about: str) -> dict[str, Any]:
    """A table's entry: the problem, its configuration, the time of a step, and where and when that was measured."""
    return {k: getattr(problem, k) for k in KEYS} | {
        "config": {"schedule": config.schedule, **asdict(config)},
        "microseconds": microseconds,
        **about,
    }
