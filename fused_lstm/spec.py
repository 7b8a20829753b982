"""What a call says besides its tensors: how the layers are built, and how the sequences of the batch lie in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .transforms import active

Result = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n


@dataclass(frozen=True)
class Stack:
    """How the layers of one call are built and fed; the same words as :class:`torch.nn.LSTM`."""

    has_biases: bool
    num_layers: int
    dropout: float  # 0 unless training
    bidirectional: bool
    batch_first: bool
    recompute: bool = False  # gates are not kept for the backward pass, which computes them again

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


@dataclass(frozen=True)
class Sequences:
    """What a call says of its sequences beyond T and B. All None: every row has T steps and one episode."""

    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU: the data is packed
    lengths: Tensor | None = None  # (B,) int64 on the data's device
    resets: Tensor | None = None  # bool, (T, B) or (B, T) as the data is

    @property
    def ragged(self) -> bool:
        return self.lengths is not None or self.resets is not None


PLAIN = Sequences()


def check_batch_sizes(batch_sizes: Tensor, N: int) -> None:
    """Raise ValueError unless batch_sizes fit N rows of packed data: otherwise rows would be read that are not there."""
    if not isinstance(batch_sizes, Tensor):
        raise ValueError(f"batch_sizes should be a 1-D int64 tensor on the CPU, got {type(batch_sizes).__name__}")
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise ValueError(
            "batch_sizes should be a 1-D int64 tensor on the CPU, as torch.nn.utils.rnn.PackedSequence has it, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sum(sizes) != N or any(a < b for a, b in pairwise(sizes)):
        raise ValueError(
            f"batch_sizes should not increase, be at least 1 and add up to the {N} rows of the input, got {sizes[:10]}"
            f"{'...' if len(sizes) > 10 else ''} with sum {sum(sizes)}"
        )


def as_lengths(lengths: Tensor | Sequence[int], T: int, B: int, device: torch.device) -> Tensor | None:
    """Lengths as (B,) int64 on ``device``. Off CUDA, where that needs no host sync, the range 0..T is checked, and None
    means that they say nothing: all are T.

    Raises:
        ValueError: wrong shape, dtype or range.
    """
    try:
        given = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths)  # a compiler sees through this one
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths should be {B} integers from 0 to {T}, got {lengths!r}: {error}") from error
    if given.numel() == 0:
        given = given.long()
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise ValueError(f"lengths should be integers, got dtype {given.dtype}")
    if given.shape != (B,):
        raise ValueError(f"lengths should have shape ({B},), one for each batch row, got {tuple(given.shape)}")
    given = given.long()  # unsigned types know no minimum
    if not (active() or torch.compiler.is_compiling()):  # under these only the op, or nobody, sees numbers
        shortest = check_range(given, T)
        if shortest == T:
            return None
    return given.to(device, torch.int64, non_blocking=True)


def check_range(lengths: Tensor, T: int) -> int | None:
    """Raise ValueError unless all lengths are from 0 to T; returns the smallest. Where that needs a host sync, None."""
    if lengths.device.type != "cpu" or lengths.numel() == 0:
        return None
    low, high = map(int, lengths.aminmax())
    if low < 0 or high > T:
        raise ValueError(f"lengths should be between 0 and T = {T}, got {low} to {high}")
    return low


def as_resets(resets: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Resets as bool on ``device``; ``shape`` is that of the data without its features.

    Raises:
        ValueError: wrong type, shape or dtype.
    """
    if not isinstance(resets, Tensor):
        raise ValueError(f"resets should be a tensor of shape {shape}, got {type(resets).__name__}")
    if resets.dtype.is_complex:
        raise ValueError(f"resets should be bool, integer or float, got dtype {resets.dtype}")
    if resets.shape != shape:
        raise ValueError(f"resets should have shape {shape}, the input's without its features, got {tuple(resets.shape)}")
    return resets.to(device, non_blocking=True) != 0


def weight_groups(weights: Sequence[Tensor], stack: Stack) -> list[Sequence[Tensor]]:
    """The weights of each layer and direction."""
    step = len(weights) // (stack.num_layers * stack.directions)
    return [weights[k : k + step] for k in range(0, len(weights), step)]


def no_autocast(x: Tensor) -> AbstractContextManager:
    """For backward passes: autocast casts what a layer is given, before it runs, and is to cast nothing else."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


# A runner serves a whole stack: (input, h0, c0, weights, stack, sequences) to output, h_n and c_n.
Runner = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Stack, Sequences], Result]


def in_fp32(runner: Runner) -> Runner:
    """A runner that computes fp16 and bf16 in fp32 and rounds at the end."""

    def run_in_fp32(
        x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], stack: Stack, sequences: Sequences
    ) -> Result:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return runner(x, h0, c0, weights, stack, sequences)
        wide = runner(x.float(), h0.float(), c0.float(), [w.float() for w in weights], stack, sequences)
        y, h_n, c_n = (t.to(x.dtype) for t in wide)
        return y, h_n, c_n

    return run_in_fp32
