"""The persistent schedule: which configurations it has, what they take, and their launches.

One launch for the sequence, in which programs wait for one another's results (kernels/fragments.py). NVIDIA GPUs, sm_80 and
newer; Triton 3.6 and newer.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .kernels.fragments import ROWS, Fragments, Sequences, lstm_backward, lstm_forward
from .kernels.persistent_backward import Backward, lstm_backward_fragments
from .kernels.persistent_forward import Forward, lstm_forward_fragments
from .kernels.persistent_local import lstm_backward_local, lstm_forward_local
from .kernels.persistent_split import lstm_backward_split

KERNELS: dict[str, Any] = {
    "forward": lstm_forward_fragments,
    "backward": lstm_backward_fragments,
    "backward split": lstm_backward_split,
    "forward local": lstm_forward_local,
    "backward local": lstm_backward_local,
}
CELLS: dict[str, Any] = {"forward": lstm_forward, "backward": lstm_backward}


@dataclass(frozen=True)
class Config:
    """How a recurrence is cut into programs."""

    form: str = "whole"  # the reduction of a program: "whole", "split" over four (backward), or "local": of all units
    units: int = 16  # hidden units of a program
    warps: int = 8
    held: int = 64  # chunks of the weights in registers, at most
    tiles: int = 1  # tiles of 8 rows of a program, in turn


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def local(H: int) -> Config:
    """The configuration whose programs own all units."""
    units = max(16, 1 << (H - 1).bit_length())
    return Config("local", units, units // 16)


def fragments(config: Config, H: int, R: int, directions: int, max16: bool = True) -> Fragments:
    """The kernel's constexpr configuration. It knows the number of tiles only roughly: one binary for many batches."""
    room = 1 << (config.tiles - 1).bit_length()
    return Fragments(H, R, directions, config.units, config.warps, config.held, room, max16)


def grid(config: Config, H: int, B: int, R: int) -> tuple[int, int, int]:
    return ceil_div(H, config.units), ceil_div(ceil_div(B, ROWS), config.tiles), R


@lru_cache
def zeros(device: torch.device, dtype: torch.dtype, n: int) -> Tensor:
    """Zeros that nobody writes: the state before the first step. Kept, so that they cost nothing."""
    return torch.zeros(n, device=device, dtype=dtype)


def unwritten(t: Tensor) -> Tensor:
    """Fill t with the bits that mean "not there yet"."""
    bits = {2: torch.int16, 4: torch.int32}[t.element_size()]
    t.view(bits).fill_(-1)
    return t


def forward(
    buffers: Forward,  # tensors, h allocated; zeros may be None
    sequences: Sequences,
    T: int,
    B: int,
    row_stride_t: int,
    row_stride_b: int,
    directions: int,
    config: Config,
) -> None:
    """Fill h, hn and cn, and where there is c, that and the activated gates. h is zero past a row's length."""
    _run("forward", buffers, buffers.h, sequences, (T, B, row_stride_t, row_stride_b), directions, config)


def backward(
    buffers: Backward,  # tensors, dgates allocated: not the memory of gates; zeros may be None
    sequences: Sequences,
    T: int,
    B: int,
    row_stride_t: int,
    row_stride_b: int,
    directions: int,
    config: Config,
) -> None:
    """Fill dgates, h_prev and dc0; the first two are zero past a row's length."""
    if config.form == "split":
        R, B, H = buffers.dc0.shape
        buffers = buffers._replace(box=buffers.dgates.new_zeros(R, 2, H // 16, 3, B, 16, dtype=torch.int64))
    _run("backward", buffers, buffers.dgates, sequences, (T, B, row_stride_t, row_stride_b), directions, config)


def _run(
    kernel: str,
    buffers: Any,
    exchanged: Tensor,
    sequences: Sequences,
    size: tuple[int, int, int, int],
    directions: int,
    config: Config,
) -> None:
    R, H, B = buffers.w_hh.shape[0], buffers.w_hh.shape[-1], size[1]
    if config.form != "local":
        unwritten(exchanged)
    buffers = buffers._replace(zeros=zeros(exchanged.device, exchanged.dtype, max(4 * H, 512)))
    given = (*size[:2], config.tiles, *size[2:])
    cut = fragments(config, H, R, directions, _max16(exchanged))
    name = kernel if config.form == "whole" else f"{kernel} {config.form}"
    # Programs that wait for one another must all run at once: the driver sees to it, or refuses.
    waits = config.form != "local" and grid(config, H, B, R)[0] > 1
    launch(name, grid(config, H, B, R), (buffers, sequences, *given, CELLS[kernel], cut), waits)


def _max16(t: Tensor) -> bool:
    return not t.is_cuda or torch.cuda.get_device_capability(t.device)[0] >= 9


def options(warps: int) -> dict[str, Any]:
    """For the compiler: the registers that there are, which it would else ration to run two programs side by side."""
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps)), "enable_fp_fusion": True}


def launch(kernel: str, grid: tuple[int, int, int], args: tuple, cooperative: bool) -> None:
    """One launch."""
    like = args[0].zeros
    with torch.cuda.device_of(like) if like.is_cuda else nullcontext():
        KERNELS[kernel][grid](*args, launch_cooperative_grid=cooperative, **options(args[-1].warps))
