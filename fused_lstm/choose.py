"""Which configuration runs a recurrence on a device: measured ones first, else the one that a model of its time prefers.

Everything here but the reading of tables is pure and needs neither Triton nor a GPU, so that a choice can be tested, and
explained, anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .config import SMALLEST, Device, LaunchConfig, Recurrence, ceil_div, power_of_two, refusal, rounds


class Tiles(NamedTuple):
    """The tiles open to the stepwise schedule for one kind of arithmetic; none of them spills on sm_90."""

    min_block_b: int
    max_block_b: int
    blocks_h: tuple[int, ...]
    block_k: int
    num_warps: int = 8
    max_registers: int | None = None


STEPWISE = {
    "half": Tiles(SMALLEST, 64, (32, 16), 64),
    "tf32": Tiles(64, 64, (32, 16), 32),
    "fp32": Tiles(SMALLEST, 64, (16,), 16, max_registers=255),
    "fp64": Tiles(SMALLEST, 16, (16,), 16, num_warps=4),
}


class Tile(NamedTuple):
    """A tile of the persistent schedule; see LaunchConfig."""

    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    ahead: int
    swap: bool


# For tensor cores that multiply from shared memory (sm_90 and sm_100), which want 64 rows: the gates of 16 units forwards,
# 64 units or 64 batch rows backwards. None of them spills on sm_90 at the sizes that tests/test_compile.py compiles.
PERSISTENT = {
    ("forward", "half"): (
        Tile(16, 16, 128, 4, 2, True), Tile(16, 32, 128, 4, 2, True), Tile(32, 16, 128, 4, 2, True),
        Tile(32, 32, 128, 8, 2, True), Tile(64, 16, 64, 4, 2, True), Tile(64, 32, 64, 8, 2, True),
        Tile(128, 16, 64, 8, 2, False), Tile(128, 32, 64, 8, 1, True),
    ),
    ("backward", "half"): (
        Tile(16, 64, 128, 4, 2, True), Tile(32, 64, 64, 4, 2, True), Tile(64, 16, 64, 4, 2, False),
        Tile(64, 32, 64, 8, 2, False), Tile(128, 16, 64, 8, 2, False),
    ),
    ("forward", "tf32"): (
        Tile(16, 16, 64, 4, 2, True), Tile(16, 32, 64, 4, 2, True), Tile(32, 16, 64, 4, 2, True),
        Tile(32, 32, 64, 8, 2, True), Tile(64, 16, 32, 4, 2, True), Tile(64, 32, 32, 8, 2, True),
        Tile(128, 16, 32, 8, 2, False),
    ),
    ("backward", "tf32"): (
        Tile(16, 64, 64, 4, 1, True), Tile(64, 16, 64, 8, 1, False), Tile(64, 32, 32, 8, 1, False),
        Tile(128, 16, 32, 8, 1, False),
    ),
    # Not for tensor cores: strict fp32.
    ("forward", "fp32"): (Tile(16, 16, 32, 8, 2, False), Tile(32, 16, 32, 8, 2, False), Tile(64, 16, 32, 8, 2, False)),
    ("backward", "fp32"): (Tile(16, 16, 64, 8, 1, False),),
}  # fmt: skip

# No weights on chip, and yet no launches: block_k, num_stages and pairs of block_b and block_h.
STREAMED = {
    "half": (64, 3, ((16, 16), (16, 32), (32, 16), (32, 32), (64, 32))),
    "tf32": (32, 3, ((16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (64, 32))),
    "fp32": (32, 2, ((16, 16),)),
    "fp64": (16, 2, ()),
}

# The largest H whose weights are kept on chip, wholly or in part: above it the compiler, or the chip, runs out of registers.
LARGEST_RESIDENT = {"half": 2048, "tf32": 528, "fp32": 528}

# Programs that have all hidden units, by the largest H: (block_b, warps).
LOCAL = {
    ("forward", "half"): {64: ((16, 4), (32, 8), (64, 8)), 128: ((16, 8), (32, 8))},
    ("backward", "half"): {64: ((16, 4), (32, 8)), 128: ((16, 8),)},
    ("forward", "tf32"): {64: ((16, 4), (32, 8))},
    ("backward", "tf32"): {64: ((16, 4), (32, 8))},
}


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from."""

    config: LaunchConfig
    reason: str
    measured: bool = False


def stepwise(problem: Recurrence) -> Iterator[LaunchConfig]:
    """Every configuration with a launch for each time step."""
    tiles = STEPWISE[problem.arithmetic]
    block_b = min(max(power_of_two(problem.B), tiles.min_block_b), tiles.max_block_b)
    for block_h in tiles.blocks_h:
        if block_h <= max(problem.H, SMALLEST):
            yield LaunchConfig(block_b, block_h, tiles.block_k, tiles.num_warps, max_registers=tiles.max_registers)


def persistent(problem: Recurrence, device: Device) -> Iterator[LaunchConfig]:
    """Every persistent configuration, whether the device can run it or not: local ones, then exchanging ones."""
    key = (problem.kernel, problem.arithmetic)
    H = problem.H
    if device.wgmma:
        for largest, options in LOCAL.get(key, {}).items():
            if largest >= H:
                block = max(power_of_two(H), 16 if problem.kernel == "forward" else 64)
                for block_b, num_warps in options:
                    yield LaunchConfig(block_b, block, block, num_warps, persistent=True, resident=1, swap=True)
                break
        for tile in PERSISTENT.get(key, ()):
            if tile.block_h < H <= LARGEST_RESIDENT[problem.arithmetic]:
                yield from _resident(tile, problem, device)
    block_k, num_stages, tiles = STREAMED[problem.arithmetic]
    for block_b, block_h in tiles:
        if block_h < H and block_b <= max(power_of_two(problem.B), SMALLEST):
            yield LaunchConfig(block_b, block_h, block_k, 8, num_stages, persistent=True, max_registers=255)


def _resident(tile: Tile, problem: Recurrence, device: Device) -> Iterator[LaunchConfig]:
    """A tile with as much of the weights on chip as fits, for several numbers of batch rows."""
    block_k = min(tile.block_k, power_of_two(problem.H))
    config = LaunchConfig(
        tile.block_b, tile.block_h, block_k, tile.num_warps, 2, persistent=True, ahead=tile.ahead, swap=tile.swap,
        max_registers=255 if problem.arithmetic == "fp32" else None,
    )  # fmt: skip
    config = replace(config, resident=config.tiles(problem.H))
    while config.resident and config.shared_memory(problem) > device.shared_memory:
        config = replace(config, resident=config.resident - 1)
    if config.resident < config.tiles(problem.H) and tile.block_b > 64:
        return  # spills
    for rows in (8, 16, 32, 64, 128):  # whatever B is: what is compiled does not depend on it
        if rows <= tile.block_b:
            yield replace(config, rows=rows)


# What the model below reckons with, in microseconds and bytes or multiply-adds per microsecond: public numbers of H100s.
LAUNCH, BARRIER, STEP = 2.5, 1.2, 0.7  # STEP: a step's own latencies, whatever its size
L2_PROGRAM, L2_DEVICE = 42e3, 5.5e6  # bytes
MULTIPLY_ADDS = {"half": 1.7e6, "tf32": 0.85e6, "fp32": 0.2e6, "fp64": 0.1e6}  # of a multiprocessor


def estimate(config: LaunchConfig, problem: Recurrence, device: Device) -> float:
    """Microseconds of the whole recurrence, roughly: good for a comparison, not for a promise."""
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    local = config.local(problem.H)
    segments, width = (1, 4) if problem.kernel == "forward" else (4, 1)
    K, N = segments * config.tiles(problem.H) * config.block_k, width * config.block_h
    if device.wgmma and problem.arithmetic in ("half", "tf32"):
        M, N = (max(N, 64), config.block_b) if config.swap else (max(config.block_b, 64), N)
    else:
        M = config.block_b
    multiply = M * N * K / MULTIPLY_ADDS[problem.arithmetic]
    states = 0 if local else min(config.rows, problem.B) * segments * problem.H * problem.element_size
    weights = (config.tiles(problem.H) - config.resident) * config.block_k * 4 * config.block_h * problem.element_size
    launches = rounds(config, problem, device) if config.persistent else 1
    at_once = ceil_div(x * y * z, launches)
    waves = ceil_div(at_once, device.multiprocessors)
    moved = max((states + weights) / L2_PROGRAM, at_once * (states + weights) / L2_DEVICE / waves)
    wait = 0 if local else BARRIER if config.persistent else LAUNCH
    return problem.T * launches * (wait + waves * (STEP + multiply + moved))


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
        if config is not None and (not config.persistent or refusal(config, problem, device) is None):
            return Choice(config, f"measured on {device.name}, {table.source}", measured=True)
    best = min(stepwise(problem), key=lambda config: estimate(config, problem, device))
    if problem.T == 1:
        return Choice(best, "one step, one launch")
    if not device.shared_memory:
        return Choice(best, f"a launch for each step, since the shared memory of {device.name} is not known")
    candidates = [c for c in persistent(problem, device) if refusal(c, problem, device) is None]
    if not candidates:
        reasons = {refusal(c, problem, device) for c in persistent(problem, device)}
        why = "; ".join(sorted(filter(None, reasons))[:1]) or f"H = {problem.H} is one tile"
        return Choice(best, f"a launch for each step, since no persistent schedule fits: {why}")
    whole = [c for c in candidates if c.resident == c.tiles(problem.H)]  # weights are streamed only if they must be
    chosen = min(whole or candidates, key=lambda config: estimate(config, problem, device))
    if estimate(best, problem, device) < estimate(chosen, problem, device):
        return Choice(best, "a launch for each step, which the model of its time prefers at this size")
    return Choice(chosen, "the persistent schedule that the model of its time prefers at this size")


def _interpreted(problem: Recurrence) -> Choice:
    """For Triton's interpreter, whose time goes by the number of operations, not by their size."""
    if problem.H <= 64:
        block = max(power_of_two(problem.H), SMALLEST)
        config = LaunchConfig(16, block, block, persistent=True, resident=1)
        return Choice(config, "Triton's interpreter: one program has all hidden units")
    return Choice(LaunchConfig(16, 64, 256), "Triton's interpreter runs programs one by one, so that none may wait")


def describe(choice: Choice, problem: Recurrence, device: Device | None) -> str:
    """A choice in words."""
    config = choice.config
    x, y, z = config.grid(problem.H, problem.B, problem.R)
    if not config.persistent:
        schedule = f"{problem.T} launches, one for each time step"
    else:
        n = 1 if device is None else rounds(config, problem, device)
        schedule = (
            "one launch for the whole sequence" if n == 1 else f"{n} launches, each for the whole sequence of some rows"
        )
        on_chip = config.resident / config.tiles(problem.H)
        schedule += ", weights on chip" if on_chip == 1 else f", {on_chip:.0%} of the weights on chip" if on_chip else ""
        schedule += ", no barrier" if config.local(problem.H) else f", a barrier among {x} programs in each step"
    text = f"{schedule}; {x} x {y} x {z} programs of {config.block_h} units x {config.rows} rows ({choice.reason}"
    return text + (")" if choice.measured or device is None else f"; not measured on {device.name})")


Key = tuple[str, str, int, int, int]
KEYS = ("kernel", "arithmetic", "H", "B", "R")


@dataclass(frozen=True, eq=False)
class Table:
    """Measured configurations of one device, and the file they come from."""

    source: str
    configs: dict[Key, LaunchConfig]


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
    shipped = Path(__file__).parent / "kernels" / "configs"
    if not shipped.is_dir():  # an editable install
        shipped = Path(__file__).parents[1] / "kernels" / "configs"
    paths = (folder / file_name(device_name) for folder in (user_folder(), shipped))
    return tuple(read_table(path) for path in paths if path.is_file())


def read_table(path: Path) -> Table:
    """Raises ValueError for a file that is no table: what it says is not to be lost in silence."""
    try:
        entries = json.loads(path.read_text())["configs"]
        if not isinstance(entries, list):
            raise TypeError(f"configs should be a list, got {type(entries).__name__}")
        configs = {}
        for entry in entries:
            problem = Recurrence(T=1, **{k: entry[k] for k in KEYS})
            configs[key_of(problem)] = LaunchConfig(**entry["config"])
            configs[key_of(problem)].check(problem.H)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of launch configurations ({type(error).__name__}: {error}); "
            "remove it, and measure anew with python -m fused_lstm.tune"
        ) from error
    return Table(str(path), configs)


def write_table(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add measured entries to a table, in place of those for the same problems. Raises what :func:`read_table` raises."""
    old = json.loads(path.read_text())["configs"] if path.is_file() and read_table(path) else []
    new = {key_of(Recurrence(T=1, **{k: e[k] for k in KEYS})): e for e in (*old, *entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"configs": list(new.values())}, indent=1) + "\n")
    tables.cache_clear()


def entry(problem: Recurrence, config: LaunchConfig, microseconds: float, **about: str) -> dict[str, Any]:
    """A table's entry: the problem, its configuration, the time of a step, and where and when that was measured."""
    return {k: getattr(problem, k) for k in KEYS} | {"config": asdict(config), "microseconds": microseconds, **about}
