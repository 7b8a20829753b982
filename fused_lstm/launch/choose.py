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
from typing import Any, NamedTuple

import torch
import triton

from ..call import Rows
from ..kernels.cell import lstm_backward, lstm_forward
from ..kernels.stepwise import Constants, lstm_backward_step, lstm_forward_step
from .compiled import INTERPRETED, Kernel, Launch, Schedule, pointers
from .config import SMALLEST, Device, LaunchConfig, Recurrence, ceil_div, power_of_two


class Tiles(NamedTuple):
    """The tiles open to the stepwise schedule for one kind of arithmetic; none of them spills on sm_90."""

    min_block_b: int
    max_block_b: int
    blocks_h: tuple[int, ...]
    block_k: int
    num_warps: int = 8
    max_registers: int | None = None


TILES = {
    "half": Tiles(SMALLEST, 64, (32, 16), 64, max_registers=255),
    "tf32": Tiles(64, 64, (32, 16), 32),
    "fp32": Tiles(SMALLEST, 64, (16,), 16, max_registers=255),
    "fp64": Tiles(SMALLEST, 16, (16,), 16, num_warps=4),
}


def candidates(problem: Recurrence, device: Device | None = None) -> list[LaunchConfig]:
    """Every configuration with a launch for each time step."""
    tiles = TILES[problem.arithmetic]
    block_b = min(max(power_of_two(problem.B), tiles.min_block_b), tiles.max_block_b)
    return [
        LaunchConfig(block_b, block_h, tiles.block_k, tiles.num_warps, max_registers=tiles.max_registers)
        for block_h in tiles.blocks_h
        if block_h <= max(problem.H, SMALLEST)
    ]


def unsuitable(problem: Recurrence, device: Device) -> None:
    """Nothing: any device runs a launch for each step."""


def refusal(config: LaunchConfig, problem: Recurrence, device: Device) -> None:
    """Nothing, likewise."""


# What the model below reckons with, in microseconds and bytes or multiply-adds per microsecond: public numbers of H100s.
LAUNCH, STEP = 2.5, 0.7  # STEP: a step's own latencies, whatever its size
L2_PROGRAM, L2_DEVICE = 42e3, 5.5e6  # bytes
MULTIPLY_ADDS = {"half": 1.7e6, "tf32": 0.85e6, "fp32": 0.2e6, "fp64": 0.1e6}  # of a multiprocessor


def estimate(config: LaunchConfig, problem: Recurrence, device: Device) -> float:
    """Microseconds of the whole recurrence, roughly: good for a comparison, not for a promise."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    segments, width = (1, 4) if problem.kernel == "forward" else (4, 1)
    K, N = segments * ceil_div(problem.H, config.block_k) * config.block_k, width * config.block_h
    M = max(config.block_b, 64) if device.wgmma and problem.arithmetic in ("half", "tf32") else config.block_b
    multiply = M * N * K / MULTIPLY_ADDS[problem.arithmetic]
    states = min(config.block_b, problem.B) * segments * problem.H * problem.element_size
    weights = ceil_div(problem.H, config.block_k) * config.block_k * 4 * config.block_h * problem.element_size
    waves = ceil_div(x * y * z, device.multiprocessors)
    moved = max((states + weights) / L2_PROGRAM, x * y * z * (states + weights) / L2_DEVICE / waves)
    return problem.T * (LAUNCH + waves * (STEP + multiply + moved))


def describe_stepwise(config: LaunchConfig, problem: Recurrence) -> str:
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    programs = f"{x} x {y} x {z} programs of {config.block_h} units x {config.block_b} rows"
    return f"{problem.T} launches, one for each time step; {programs}"


@lru_cache(maxsize=1024)
def stepwise_kernel(
    kernel: str, arithmetic: str, dtype: torch.dtype, R: int, H: int, directions: int, config: LaunchConfig
) -> Kernel:
    """A kernel for problems of any T and B."""
    precision = "tf32" if arithmetic == "tf32" else "ieee"
    bf16 = INTERPRETED and dtype == torch.bfloat16
    constants = Constants(R, H, directions, precision, bf16, config.block_b, config.block_h, config.block_k)
    only_nvidia = {} if torch.version.hip else {"maxnreg": config.max_registers}
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **only_nvidia)
    return Kernel(STEPWISE.kernels, kernel, (CELL[kernel], constants), options)


def launch_stepwise(launch: Launch, buffers: Any, rows: Rows) -> None:
    p, T, B = launch.problem, rows.T, rows.B
    if launch.kernel is None:
        what = p.kernel, p.arithmetic, launch.dtype, p.R, p.H, launch.directions, launch.config
        launch.kernel, launch.grid = stepwise_kernel(*what), launch.config.grid(p.H, B, p.R)
    steps = range(T) if p.kernel == "forward" else range(T - 1, -1, -1)
    size = T, B, rows.stride_t, rows.stride_b
    launch.kernel.run(launch.grid, buffers, pointers(rows), [(s, *size) for s in steps])


CELL = {"forward": lstm_forward, "backward": lstm_backward}
STEPWISE = Schedule(
    "stepwise", LaunchConfig, {"forward": lstm_forward_step, "backward": lstm_backward_step},
    unsuitable, candidates, refusal, estimate, describe_stepwise, launch_stepwise,
)  # fmt: skip
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
    return Choice(LaunchConfig(16, block_h, block_k), "Triton's interpreter, which runs programs one after another")


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
