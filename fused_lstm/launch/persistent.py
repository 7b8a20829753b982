"""The persistent schedule: which configurations it has, what they take, and their launches.

One launch for the sequence, in which programs wait for one another's results (kernels/fragments.py). NVIDIA GPUs, sm_80 and
newer; Triton 3.6 and newer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..call import Rows
from ..cell import Relative
from ..kernels.fragments import ROWS, Fragments
from ..kernels.persistent_backward import lstm_backward_fragments
from ..kernels.persistent_forward import lstm_forward_fragments
from ..kernels.persistent_local import lstm_backward_local, lstm_forward_local
from ..kernels.persistent_split import lstm_backward_split, owners
from ..kernels.rows import Sequences
from .schedule import CELLS, Device, Kernel, Launch, Recurrence, Schedule, ceil_div, check_integer, norm, pointers, zoneout

KERNELS: dict[str, Any] = {
    "forward": lstm_forward_fragments,
    "backward": lstm_backward_fragments,
    "backward split": lstm_backward_split,
    "forward local": lstm_forward_local,
    "backward local": lstm_backward_local,
}
TORCHS = Relative.of("")
NORMS = "takes norms only where one program owns all units"


@dataclass(frozen=True)
class PersistentConfig:
    """How a recurrence is cut into programs."""

    schedule: ClassVar[str] = "persistent"

    form: str = "whole"  # the reduction of a program: "whole", "split" over four (backward), or "local": of all units
    units: int = 16  # hidden units of a program
    warps: int = 8
    held: int = 64  # chunks of the weights in registers, at most
    tiles: int = 1  # tiles of 8 rows of a program, in turn
    at_once: int = 0  # recurrences of one launch, where not all find room
    ahead: bool = False  # a turn's states are asked for while the turn before is computed; with two tiles or more

    def __post_init__(self) -> None:
        if self.form not in ("whole", "split", "local"):
            raise ValueError(f"form should be 'whole', 'split' or 'local', got {self.form!r}")
        for name, least in (("units", 16), ("warps", 1), ("held", 0), ("tiles", 1), ("at_once", 0)):
            check_integer(name, getattr(self, name), least)


def local(H: int) -> PersistentConfig:
    """The configuration whose programs own all units."""
    units = max(16, 1 << (H - 1).bit_length())
    return PersistentConfig("local", units, units // 16)


def too_many(problem: Recurrence) -> str | None:
    """Why one program cannot own all units. Norms, and zoneout's masks, need registers that 128 units do not leave."""
    most = 64 if problem.relative.zoned or problem.relative.norm else 128
    if problem.arithmetic == "half" and most >= problem.H:
        return None
    return f"programs that own all units have at most {most}, in half precision"


def room(config: PersistentConfig) -> int:
    """Tiles for whose states there is memory: a power of two, so that one binary serves many batches."""
    return 1 << (config.tiles - 1).bit_length()


@lru_cache(maxsize=1024)
def fragments(
    config: PersistentConfig, H: int, R: int, directions: int, max16: bool = True, relative: Relative = TORCHS
) -> Fragments:
    """The kernel's constexpr configuration. It knows the number of tiles only roughly: one binary for many batches."""
    if relative.norm and config.form != "local":
        raise ValueError(f"the persistent schedule {NORMS}, got {config}")
    return Fragments(
        H, R, directions, config.units, config.warps, config.held, room(config), config.ahead, max16, zoneout(relative),
        norm(relative, H),
    )  # fmt: skip


def grid(config: PersistentConfig, H: int, B: int, R: int) -> tuple[int, int, int]:
    """Programs of one launch, of at most ``config.at_once`` of R recurrences."""
    programs = owners(H) if config.form == "split" else ceil_div(H, config.units)
    return programs, ceil_div(ceil_div(B, ROWS), config.tiles), min(R, config.at_once or R)


# Registers of a thread for weights and states together without spills, by what compilers make of the kernels: where all
# weights are in registers, and where some come from shared memory, for which others are needed.
WHOLLY = {"half": {"forward": 125, "backward": 192, "split": 180}, "tf32": {"forward": 165, "backward": 170, "split": 180}}
PARTLY = {"half": {"forward": 112, "backward": 160, "split": 150}, "tf32": {"forward": 112, "backward": 140, "split": 160}}
TIGHTLY = {"forward": 120, "backward": 180, "split": 150}  # ... where shared memory holds no more


def _columns(config: PersistentConfig, kernel: str) -> int:
    """Rows of a program's operand A."""
    return {"forward": 4 * config.units, "backward": config.units}[kernel] if config.form == "whole" else 64


def _reduction(config: PersistentConfig, problem: Recurrence) -> int:
    return 4 * problem.H if problem.kernel == "backward" and config.form == "whole" else problem.H


def _chunks(config: PersistentConfig, problem: Recurrence) -> int:
    return ceil_div(_reduction(config, problem), 32 * config.warps)


def _held(config: PersistentConfig, problem: Recurrence, gpu: Device) -> int | None:
    """Chunks of the weights to keep in registers; None where the weights find no room."""
    kind = "split" if config.form == "split" else problem.kernel
    chunks, words = _chunks(config, problem), problem.element_size / 4
    chunk, states = _columns(config, problem.kernel) * words, 8 * words * chunks * (2 if config.ahead else 1)
    if chunks * chunk + states <= WHOLLY[problem.arithmetic][kind]:
        return chunks
    tight = config.ahead or (problem.cell and kind == "split")
    if problem.kernel == "backward" and problem.arithmetic == "tf32" and tight:
        return None
    least = next((n for n in range(chunks) if shared_memory(replace(config, held=n), problem) <= gpu.shared_memory), chunks)
    # sm_80's compiler needs some more for itself where both operands are fp32; peepholes and zoneout need some, too.
    tf32 = problem.arithmetic == "tf32"
    own = (10 if tf32 else 24) * bool(problem.cell)
    partly = PARTLY[problem.arithmetic][kind] - 10 * (tf32 and kind == "split" and gpu.capability < (9, 0)) - own
    held = max(least, int((partly - states) // chunk))
    return held if held * chunk + states <= max(partly, TIGHTLY[kind] - own if held == least else 0) else None


def shared_memory(config: PersistentConfig, problem: Recurrence) -> int:
    """What a program keeps in shared memory, in bytes, at most."""
    if config.form == "local":  # states or gradients of two steps, a gate's weights on their way to registers, sums
        return 128 * config.units + 2 * config.units**2 + 8 * config.units * bool(problem.relative.norm)
    columns = _columns(config, problem.kernel)
    chunk = config.warps * columns * 32 * problem.element_size
    parts, states = config.warps * columns * ROWS * 4, room(config) * config.units * ROWS * 4
    if problem.relative.zoned:
        states *= 2
    elsewhere = max(0, _chunks(config, problem) - config.held)
    on_the_way = chunk if problem.kernel == "backward" else 0
    return parts + states + elsewhere * chunk + on_the_way


def unsuitable(problem: Recurrence, gpu: Device) -> str | None:
    """Why the schedule does not serve a problem, whatever the configuration."""
    if problem.T == 1:
        return "is for sequences of more than one step"
    if gpu.capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer, {gpu.name} is none"
    if problem.arithmetic not in ("half", "tf32"):
        return f"multiplies in half precision and in TF32, not in {problem.arithmetic}"
    if problem.relative.norm and (why := too_many(problem)):
        return f"{NORMS}, and {why}"
    return None


def refusal(config: PersistentConfig, problem: Recurrence, gpu: Device) -> str | None:
    """Why a device cannot run a configuration; None if it can."""
    why = unsuitable(problem, gpu)
    if why is not None:
        return why
    if config.form == "local" and (why := too_many(problem)):
        return why
    if config.form != "local" and problem.relative.norm:
        return NORMS
    x, y, z = grid(config, problem.H, problem.B, problem.R)
    if config.form != "local" and x * y * z > gpu.multiprocessors:
        return f"needs {x * y * z} programs at once, {gpu.name} runs {gpu.multiprocessors}"
    most = 0 if config.form == "local" else _held(config, problem, gpu)
    if most is None or (config.form != "local" and most < min(config.held, _chunks(config, problem))):
        return f"finds no room for the weights of H = {problem.H} on {gpu.name}"
    need = shared_memory(config, problem)
    if need > gpu.shared_memory:
        return f"needs {need} bytes of shared memory for each program, {gpu.name} has {gpu.shared_memory}"
    return None


def candidates(problem: Recurrence, gpu: Device) -> list[PersistentConfig]:
    """The few configurations that are worth a comparison; some may be refused."""
    if unsuitable(problem, gpu):
        return []
    if too_many(problem) is None:
        return [local(problem.H)]
    found = []
    for form in ("whole", "split") if problem.kernel == "backward" else ("whole",):
        for units in (16, 32) if form == "whole" and problem.H % 32 == 0 else (16,):
            config = PersistentConfig(form, units)
            x, y, z = grid(config, problem.H, problem.B, problem.R)
            at_once = min(z, gpu.multiprocessors // x)
            if not at_once:
                continue
            groups = gpu.multiprocessors // (x * at_once)
            tiles = ceil_div(y, min(groups, y))
            for ahead in (True, False) if tiles > 1 else (False,):
                config = replace(config, tiles=tiles, ahead=ahead, at_once=at_once)
                held = _held(config, problem, gpu)
                if held is not None and (units == 16 or held == _chunks(config, problem)):
                    found.append(replace(config, held=held))
                    break
    return found


# Of an earlier form of these kernels, one tile of rows, on an H100, in us and bytes: a step's latency, what L2 gives in a
# us, and a second exchange.
LATENCY = {"forward": 1.44, "backward": 1.24}
L2 = 3.9e6
SECOND_EXCHANGE = 0.9
TILE = 0.6  # us of work for a tile of rows, where others hide its latency: estimated, not measured
LOCAL = 0.8  # us of a step without exchange: estimated
DRAM = 2.5e6  # bytes in a us
MULTIPLY_ADDS = {"half": 1.5e8, "tf32": 0.75e8}  # of all tensor cores in a us, in tiles as narrow as ours


def traffic(config: PersistentConfig, problem: Recurrence) -> float:
    """Bytes that all programs together read from L2 in a step."""
    row = problem.B * problem.R * problem.H * problem.element_size
    if config.form == "local":
        return 0.0
    if config.form == "split":
        return row * problem.H / 16 + 48 * problem.B * problem.R * problem.H
    return row * (1 if problem.kernel == "forward" else 4) * problem.H / config.units


def estimate(config: PersistentConfig, problem: Recurrence, gpu: Device) -> float:
    """Microseconds of the whole recurrence, roughly: good for a comparison, not for a promise."""
    share = gpu.multiprocessors / 132  # of an H100
    x, y, z = grid(config, problem.H, problem.B, problem.R)
    if config.form == "local":
        step = LOCAL * ceil_div(x * y * z, gpu.multiprocessors)
    else:
        latency = LATENCY[problem.kernel] + SECOND_EXCHANGE * (config.form == "split" and config.tiles == 1)
        work = (TILE * config.units / 16 if config.ahead else latency) * config.tiles
        step = max(latency, work) + traffic(config, problem) / ceil_div(problem.R, z) / (L2 * share)
    elements = problem.B * problem.R * problem.H
    memory = elements * problem.element_size * (10 if problem.kernel == "forward" else 13) / (DRAM * share)
    multiply = elements * 4 * problem.H / (MULTIPLY_ADDS[problem.arithmetic] * share)
    launches = ceil_div(problem.R, z)
    return problem.T * max(step * launches, memory, multiply)


@lru_cache
def zeros(device: torch.device, dtype: torch.dtype, n: int) -> Tensor:
    """Zeros that nobody writes: the state before the first step. Kept, so that they cost nothing."""
    return torch.zeros(n, device=device, dtype=dtype)


def unwritten(t: Tensor) -> Tensor:
    """Fill t with the bits that mean "not there yet"."""
    bits = {2: torch.int16, 4: torch.int32}[t.element_size()]
    t.view(bits).fill_(-1)
    return t


def run(
    kernel: str,  # "forward" or "backward"
    buffers: Any,  # Forward or Backward of tensors; what is to be written is allocated
    sequences: Sequences,
    size: tuple[int, int, int, int],  # T, B, and from one time step's and one batch row's data row to the next's
    directions: int,
    config: PersistentConfig,
    relative: Relative = TORCHS,
) -> None:
    """One pass. h, dgates and h_prev are zero past a row's length."""
    H, B = buffers.w_hh_ptr.shape[-1], size[1]
    R = buffers.w_hh_ptr.numel() // (4 * H * H)
    if not B:
        return
    exchanged = buffers.h_ptr if kernel == "forward" else buffers.dgates_ptr
    if kernel == "backward":
        if buffers.gates_ptr is exchanged:  # which is filled before the gates are read
            buffers = buffers._replace(gates_ptr=buffers.gates_ptr.clone())
        if config.form == "split":
            buffers = buffers._replace(box_ptr=exchanged.new_zeros(R, 2, owners(H), 3, B, 16, dtype=torch.int64))
    if config.form != "local":
        unwritten(exchanged)
    buffers = buffers._replace(zeros_ptr=zeros(exchanged.device, exchanged.dtype, max(4 * H, 512)))
    cut = fragments(config, H, R, directions, _max16(exchanged.device), relative)
    name = kernel if config.form == "whole" else f"{kernel} {config.form}"
    x, y, z = grid(config, H, B, R)
    # Programs that wait for one another must all run at once: the driver sees to it, or refuses.
    waits = config.form != "local" and x > 1
    for first_r in range(0, R, z):
        numbers = (*size[:2], config.tiles, first_r, *size[2:])
        launch_once(name, (x, y, min(z, R - first_r)), buffers, sequences, numbers, cut, waits)


@lru_cache
def _max16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def options(warps: int) -> dict[str, Any]:
    """For the compiler: the registers that there are, which it would else ration to run two programs side by side."""
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps)), "enable_fp_fusion": True}


@lru_cache(maxsize=1024)
def compiled_kernel(name: str, cut: Fragments, waits: bool) -> Kernel:
    constants = CELLS[name.split()[0]], cut
    return Kernel(KERNELS, name, constants, {"launch_cooperative_grid": waits, **options(cut.warps)})


def launch_once(
    name: str, grid: tuple[int, int, int], buffers: Any, sequences: Sequences, numbers: tuple, cut: Fragments, waits: bool
) -> None:
    compiled_kernel(name, cut, waits).run(grid, buffers, sequences, [numbers])


def launch(given: Launch, buffers: Any, rows: Rows) -> None:
    p = given.problem
    run(p.kernel, buffers, pointers(rows), rows.size, given.directions, given.config, p.relative)


def describe(config: PersistentConfig, problem: Recurrence) -> str:
    x, y, z = grid(config, problem.H, problem.B, problem.R)
    n = ceil_div(problem.R, z)
    words = "one launch for the whole sequence" if n == 1 else f"{n} launches, each of some recurrences"
    cut = {
        "whole": "weights on chip, a word from every program to every other in each step",
        "split": "weights on chip, the reduction split over four programs",
        "local": "a program has all hidden units and waits for nobody",
    }[config.form]
    programs = f"{x} x {y} x {z} programs of {config.units} units x {config.tiles * ROWS} rows"
    return f"{words}, {cut}; {programs}"


PERSISTENT = Schedule("persistent", PersistentConfig, KERNELS, unsuitable, candidates, refusal, estimate, describe, launch)
