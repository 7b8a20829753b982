"""Which configuration runs a recurrence on a device: measured ones first, else the one that a model of its time prefers.

Everything here but the reading of tables is pure and needs no GPU, so that a choice can be tested, and explained, anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

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
    for table in tables:
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
        return Choice(best["stepwise"], "one step, one launch")
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


@dataclass(frozen=True, eq=False)
class Table:
    """Measured configurations of one device, and the file they come from."""

    source: str
    configs: dict[Key, Any]


def key_of(problem: Recurrence) -> Key:
    """What a measured configuration is for: a batch size stands for all with the same next power of two."""
    return problem.kernel, problem.arithmetic, problem.H, power_of_two(problem.B), problem.R


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
    shipped = Path(__file__).parents[1] / "kernels" / "configs"
    if not shipped.is_dir():  # an editable install
        shipped = Path(__file__).parents[2] / "kernels" / "configs"
    paths = (folder / file_name(device_name) for folder in (user_folder(), shipped))
    return tuple(read_table(path) for path in paths if path.is_file())


def read_table(path: Path) -> Table:
    """The table in a file. Raises ValueError if the file holds none, rather than go on as if it were not there."""
    try:
        entries = json.loads(path.read_text())["configs"]
        if not isinstance(entries, list):
            raise TypeError(f"configs should be a list, got {type(entries).__name__}")
        configs = {}
        for entry in entries:
            problem = Recurrence(T=1, **{k: entry[k] for k in KEYS})
            configs[key_of(problem)] = read_config(entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of launch configurations ({type(error).__name__}: {error}); "
            "remove it, and measure anew with python -m fused_lstm.tune"
        ) from error
    return Table(str(path), configs)


def read_config(fields: dict[str, Any]) -> Any:
    """A configuration from a table's entry."""
    fields = dict(fields)
    return BY_NAME[fields.pop("schedule")].config(**fields)


def write_table(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add measured entries to a table, in place of those for the same problems. Raises what :func:`read_table` raises."""
    old = json.loads(path.read_text())["configs"] if path.is_file() and read_table(path) else []
    new = {key_of(Recurrence(T=1, **{k: e[k] for k in KEYS})): e for e in (*old, *entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"configs": list(new.values())}, indent=1) + "\n")
    tables.cache_clear()


def entry(problem: Recurrence, config: Any, microseconds: float, **about: str) -> dict[str, Any]:
    """A table's entry: the problem, its configuration, the time of a step, and where and when that was measured."""
    return {k: getattr(problem, k) for k in KEYS} | {
        "config": {"schedule": config.schedule, **asdict(config)},
        "microseconds": microseconds,
        **about,
    }
