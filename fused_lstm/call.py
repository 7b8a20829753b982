"""What a call is, as values: how the layers are built, how the sequences lie in time and in memory, what one layer's op is
given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from .cell import Cell

Result = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n
States = tuple[Tensor, Tensor] | None  # h0 and c0; None: zero


class Stack(NamedTuple):
    """How the layers of one call are built and fed; the same words as :class:`torch.nn.LSTM`."""

    has_biases: bool
    num_layers: int
    dropout: float  # 0 unless training
    bidirectional: bool
    batch_first: bool
    recompute: bool = False  # gates are not kept for the backward pass, which computes them again
    cell: Cell | None = None  # a relative of torch's
    training: bool = False  # zoneout draws masks
    between: Callable[[Tensor], Tensor] | None = None  # what becomes of a layer's output before the next gets it

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def groups(self, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The weights of each layer and direction."""
        step = len(weights) // (self.num_layers * self.directions)
        return [weights[k : k + step] for k in range(0, len(weights), step)]

    def projects(self, weights: Sequence[Tensor]) -> bool:
        """Whether each layer has a projection."""
        own = 0 if self.cell is None else len(self.cell.own(1))
        return len(weights) // (self.num_layers * self.directions) - own > (4 if self.has_biases else 2)


class Sequences(NamedTuple):
    """What a call says of its sequences beyond T and B. All None: every row has T steps and one episode."""

    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU: the data is packed
    lengths: Tensor | None = None  # (B,) int64 on the data's device
    resets: Tensor | None = None  # bool, (T, B) or (B, T) as the data is
    # What their numbers say, where looking at them costs no host sync:
    same_length: int = 0  # of all rows, shorter than T, without resets; 0: not so, or not known
    starts: tuple[int, ...] = ()  # of the stretches of time in which no row is reset; (): not known


PLAIN = Sequences()
NOTHING = nullcontext()
FAKE = torch._C._TorchDispatchModeKey.FAKE
ALIGNMENT = 16  # hidden units that the kernels see come in multiples of it: they read rows in vectors


class OnGPU(NamedTuple):
    """What decides on a GPU between the kernels and torch's own LSTM, beside the rest of a problem."""

    index: int  # the device's
    input_size: int
    tf32: bool  # fp32 products may be TF32
    dropout: bool  # acts
    kernels_only: bool  # torch is told to be deterministic, or not to use cuDNN


class Problem(NamedTuple):
    """What one call of the layer asks for; all that its plan may depend on."""

    device: str  # device type: "cpu", "cuda", ...
    dtype: torch.dtype
    T: int
    B: int
    hidden_size: int
    proj_size: int = 0
    num_layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    lengths: bool = False
    resets: bool = False
    same_length: bool = False  # all rows have one length
    stretches: int = 0  # of time in which no row is reset; 0: not known
    needs_grad: bool = False
    recompute: bool = False
    transformed: bool = False  # a transform of torch.func is at work
    ensemble: bool = False  # vmap maps over the weights
    forward_mode: bool = False  # a level of forward-mode AD is open
    heads: int = 1  # of hidden_size units each
    cell: str = ""  # as LayerCall has it
    gpu: OnGPU | None = None  # on CUDA, for calls that are not compiled


class LayerCall(NamedTuple):
    """What one layer is given, in the order of the op's schema. There are R recurrences: directions, and under vmap members.

    At the borders of torch.library and autograd.Function, which want flat arguments, it is spread by ``*``.
    """

    x: Tensor  # (T, B, I), (B, T, I) if batch_first, (N, I) if packed; without w_ih, R*4H features: pre-activations
    h0: Tensor | None  # (R, B, K) initial hidden state; K is H, or the projection's size if w_h0 is given; None: zero
    c0: Tensor | None  # (R, B, H) initial cell state; None: zero
    w_ih: Tensor | None  # (R*4H, I) input weights, gate order i, f, g, o
    w_hh: Tensor  # (R*4H, H) recurrent weights
    b_ih: Tensor | None  # (R*4H,)
    b_hh: Tensor | None  # (R*4H,)
    # (R*4H, K) weights that h0 meets in the first step, where they are not w_hh: with a projection folded into w_hh, the
    # recurrence's own state starts at zero and h0 enters through the first pre-activations.
    w_h0: Tensor | None
    units: Tensor | None  # (R, n, H) parameters of the cell itself, by hidden unit; None: torch's cell, which has none
    lengths: Tensor | None  # (B,) int64 on x's device, padded data only
    batch_sizes: Tensor | None  # (T,) int64 on the CPU, packed data only
    # bool, x's shape without the features: no state and no gradient passes from time t-1 to t, in either direction, where
    # resets is True at t; at t = 0, none from h0 and c0 of the forward direction.
    resets: Tensor | None
    seed: Tensor | None  # (1,) int64 on x's device, of the masks that the cell draws
    directions: int  # 1 forward, -1 backwards in time, 2 both (odd r backwards)
    batch_first: bool  # whether padded data is (B, T, ...)
    save: bool  # keep what the backward pass needs
    engine: str  # "triton", "reference", or "onednn": torch's own LSTM, for fp32 on a CPU without w_h0
    recompute: bool  # of that, keep no gates, so that the backward pass computes them again
    cell: str = ""  # which relative of torch's cell, as :class:`fused_lstm.cell.Relative` reads it

    @property
    def R(self) -> int:
        return self.sizes[0]

    @property
    def H(self) -> int:
        return self.sizes[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """R and H."""
        n, H = self.w_hh.shape
        return n // (4 * H), H

    @property
    def rows(self) -> Rows:
        """Where the sequences lie in memory."""
        x, batch_sizes, lengths, resets = self.x, self.batch_sizes, self.lengths, self.resets
        if batch_sizes is not None:
            T, B = batch_sizes.shape[0], int(batch_sizes[0]) if self.c0 is None else self.c0.shape[1]
            lengths = (batch_sizes[:, None] > torch.arange(B, device="cpu")).sum(0).to(x.device, non_blocking=True)
        else:
            T, B, _ = x.shape
            T, B = (B, T) if self.batch_first else (T, B)
            lengths = None if lengths is None else lengths.contiguous()  # the kernels know no stride of theirs
        resets = None if resets is None else resets.flatten()
        return Rows(T, B, self.batch_first, self.directions, lengths, batch_sizes, resets)


class Kept(NamedTuple):
    """What one layer computed."""

    y: Tensor  # x's shape with R*H features, zero past a row's length
    h_n: Tensor  # (R, B, H)
    c_n: Tensor  # (R, B, H)
    gates: Tensor | None  # (N, R, 4, H) activated, or what oneDNN keeps instead; None unless to be saved
    c: Tensor | None  # (N, R, H) cell states after each step; None unless to be saved


class Rows(NamedTuple):
    """Where a layer's sequences lie in memory: maps (step s, batch row b) to a data row of flat (N, ...) buffers.

    Padded data has T*B rows, time-major or batch-major. Packed data, in the order of
    :class:`torch.nn.utils.rnn.PackedSequence`, has sum(lengths) rows. Recurrence r runs backwards in time when
    ``directions == 2`` and r is odd, or when ``directions == -1``; it then starts at each row's last valid step.
    """

    T: int
    B: int
    batch_first: bool
    directions: int
    lengths: Tensor | None = None  # (B,) int64, on the data's device
    batch_sizes: Tensor | None = None  # (T,) int64, on the CPU; packed data only
    resets: Tensor | None = None  # (N,) bool: no state and no gradient passes between this row's time and the one before

    @property
    def stride_t(self) -> int:
        return 1 if self.batch_first else self.B

    @property
    def stride_b(self) -> int:
        return self.T if self.batch_first else 1

    @property
    def size(self) -> tuple[int, int, int, int]:
        """What each launch is told: T, B, and both strides."""
        T, B = self.T, self.B
        return (T, B, 1, T) if self.batch_first else (T, B, B, 1)

    def starts(self) -> Tensor | None:
        """First data row of each time step, (T,) int64 on the data's device; None when padded."""
        if self.batch_sizes is None:
            return None
        assert self.lengths is not None
        return (self.batch_sizes.cumsum(0) - self.batch_sizes).to(self.lengths.device, non_blocking=True)

    def backwards(self, r: int) -> bool:
        return self.directions == -1 or (self.directions == 2 and r % 2 == 1)

    def active(self, s: int) -> int:
        """How many batch rows, counted from the first, may have a step s."""
        return self.B if self.batch_sizes is None else int(self.batch_sizes[s])

    def valid(self, s: int) -> Tensor | None:
        """(B, 1) bool: which of the active batch rows have a step s; None if all."""
        return None if self.lengths is None or self.batch_sizes is not None else (s < self.lengths)[:, None]

    def kept(self, s: int, r: int) -> Tensor | None:
        """(n, 1) bool: which of the active batch rows take over the state of the step before s; None if all."""
        if self.resets is None or (s == 0 and self.backwards(r)):
            return None
        # Between t-1 and t lies the reset of t: of this step forwards, of the step before it backwards in time.
        return ~self.resets[self.at(s - 1, r, self.active(s)) if self.backwards(r) else self.at(s, r)][:, None]

    def at(self, s: int, r: int, n: int | None = None) -> slice | Tensor:
        """Data rows of step s for the first n batch rows (all active ones by default), as an index.

        A padded row that has no step s is given its padding position s: in range, and no other row's.
        """
        n = self.active(s) if n is None else n
        if self.lengths is None:
            t = self.T - 1 - s if self.backwards(r) else s
            first = t * self.stride_t
            return slice(first, first + n) if not self.batch_first else slice(first, None, self.T)
        if not self.backwards(r):
            if self.batch_sizes is not None:
                first = int(self.batch_sizes[:s].sum())
                return slice(first, first + n)
            first = s * self.stride_t
            return slice(first, first + n) if not self.batch_first else slice(first, None, self.T)
        lengths = self.lengths[:n]
        t = torch.where(s < lengths, lengths - 1 - s, s)
        b = torch.arange(n, device=lengths.device)
        starts = self.starts()
        return t * self.stride_t + b * self.stride_b if starts is None else starts[t] + b

    def previous(self, states: Tensor, first: Tensor | None, r: int) -> Tensor:
        """(N, H): the state before each data row's step, of ``states`` (N, R, H) with the ones after it.

        ``first`` (B, H), or zero if None, before step 0; zero where a reset lies between, and past a row's length.
        """
        N, back = states.shape[0], self.backwards(r)
        if self.lengths is None and not self.batch_first and not back:  # one step later, without an index
            start = states.new_zeros(self.B, states.shape[2]) if first is None else first
            result = torch.cat((start, states[: N - self.B, r]))
            return result if self.resets is None else result.masked_fill_(self.resets[:, None], 0)
        t, b = self.times_and_batch_rows(N, states.device)
        end = self.T if self.lengths is None else self.lengths[b]
        starts = self.starts()
        before = t + 1 if back else t - 1  # the time of the step before; in range but at step 0
        before = before * self.stride_t + b * self.stride_b if starts is None else starts[before.clamp(0, self.T - 1)] + b
        before = before.clamp(0, max(N - 1, 0))
        result = states[:, r].index_select(0, before)
        result[self.at(0, r)] = result.new_zeros(()) if first is None else first
        if self.resets is not None:  # as in kept()
            cut = self.resets[before] & (t + 1 < end) if back else self.resets
            result.masked_fill_(cut[:, None], 0)
        self.clear_padding(result)
        return result

    def times_and_batch_rows(self, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Time and batch row of each of the N data rows, both (N,) int64."""
        row = torch.arange(N, device=device)
        if self.batch_sizes is not None:
            t = torch.arange(self.T, device="cpu").repeat_interleave(self.batch_sizes).to(device, non_blocking=True)
            starts = self.starts()
            assert starts is not None
            return t, row - starts[t]
        if self.batch_first:
            return row % self.T, row // self.T
        return row // max(self.B, 1), row % max(self.B, 1)

    def clear_padding(self, data: Tensor) -> None:
        """Put zero past each row's length, in data (N, ...)."""
        if self.lengths is not None and self.batch_sizes is None:
            t, b = self.times_and_batch_rows(data.shape[0], data.device)
            data.masked_fill_((t >= self.lengths[b]).view(-1, *[1] * (data.dim() - 1)), 0)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels add up in, and keep the running cell state in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_mode() -> bool:
    """Whether a level of forward-mode AD is open: torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def active() -> bool:
    """Whether a transform of torch.func (vmap, grad, vjp, jvp, ...) is at work around the call."""
    return torch._C._are_functorch_transforms_active()


def differentiates() -> bool:
    """Whether one of them takes a derivative."""
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


for _function in (active, differentiates):  # a compiler is to call these, while it traces, not to look inside
    _function._dynamo_marked_constant = True


def mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether vmap maps over one of the tensors."""
    functorch = torch._C._functorch
    for t in tensors:
        while functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_batchedtensor(t):
                return True
            t = functorch.get_unwrapped(t)
    return False


def numberless(t: Tensor) -> bool:
    """Whether what is made of t has a shape only: it is on the meta device, one of FakeTensorMode's, or seen by that."""
    return t.is_meta or isinstance(t, FakeTensor) or torch._C._get_dispatch_mode(FAKE) is not None


def traced(t: Tensor) -> bool:
    """Whether t's numbers are unknown, or the call is recorded for others, so that nothing may depend on them."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or active() or numberless(t)


def check_batch_sizes(batch_sizes: Tensor, N: int) -> None:
    """Raise ValueError unless batch_sizes fit N rows of packed data: otherwise rows would be read that are not there."""
    b, is_tensor = batch_sizes, isinstance(batch_sizes, Tensor)
    if not is_tensor or b.dim() != 1 or b.dtype != torch.int64 or b.device.type != "cpu":
        got = f"{b.dim()}-D {b.dtype} on {b.device}" if is_tensor else type(b).__name__
        raise ValueError(f"batch_sizes should be a 1-D int64 tensor on the CPU, got {got}")
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sum(sizes) != N or any(a < b for a, b in pairwise(sizes)):
        raise ValueError(
            f"batch_sizes should not increase, be at least 1 and add up to the {N} rows of the input, got {sizes[:10]}"
            f"{'...' if len(sizes) > 10 else ''} with sum {sum(sizes)}"
        )


def as_lengths(lengths: Tensor | Sequence[int], T: int, B: int, device: torch.device) -> tuple[Tensor | None, int]:
    """Lengths as (B,) int64 on ``device``, and the one that all rows have, if less than T; else 0.

    None means that they say nothing: all are T. Their numbers are looked at, and checked, where that needs no host sync.

    Raises:
        ValueError: wrong shape, dtype or range.
    """
    try:
        given = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths, device="cpu")  # where they are checked
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"lengths should be {B} integers from 0 to {T}, got {lengths!r}: {error}") from error
    if given.numel() == 0:
        given = given.long()
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise ValueError(f"lengths should be integers, got dtype {given.dtype}")
    if given.shape != (B,):
        raise ValueError(f"lengths should have shape ({B},), one for each batch row, got {tuple(given.shape)}")
    given = given.long()  # unsigned types know no minimum
    moved, same = _moved(given, device), 0
    seen = given if given.device.type == "cpu" else moved
    if not traced(seen):  # else only the op, or nobody, sees numbers
        low, high = check_range(seen, T)
        if low == high == T:
            return None, 0
        same = low if low == high else 0
    return moved, same


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """t on ``device``. Nothing waits for a copy to a GPU; what comes to the CPU is read at once."""
    return t.to(device, non_blocking=device.type != "cpu")


def check_range(lengths: Tensor, T: int) -> tuple[int, int]:
    """Raise ValueError unless all lengths are from 0 to T; returns the smallest and the largest, or 0 and -1 where looking
    at them needs a host sync or there are none."""
    if lengths.device.type != "cpu" or lengths.numel() == 0:
        return 0, -1
    low, high = map(int, lengths.aminmax())
    if low < 0 or high > T:
        raise ValueError(f"lengths should be between 0 and T = {T}, got {low} to {high}")
    return low, high


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
    return _moved(resets, device) != 0


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switches autocast off for a backward pass: the layer's inputs were cast before it ran; nothing else is to be cast."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return NOTHING
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def each_layer(
    run: Callable[..., Result], x: Tensor, states: States, weights: Sequence[Tensor], stack: Stack, *more: object
) -> Result:
    """x through the layers, with dropout between them; ``run`` is given each layer's input, its states (D, B, ...) or None,
    its weights by direction, and ``more``."""
    if stack.num_layers == 1:
        return run(x, states, stack.groups(weights) if stack.bidirectional else (weights,), *more)
    groups, D, last = stack.groups(weights), stack.directions, []
    for layer in range(stack.num_layers):
        part = slice(layer * D, (layer + 1) * D)
        if layer > 0 and stack.dropout > 0:
            swap = stack.batch_first and x.dim() == 3 and x.device.type == "cpu"  # to the order in which nn.LSTM draws
            x = F.dropout(x.transpose(0, 1).contiguous() if swap else x, stack.dropout)
            x = x.transpose(0, 1) if swap else x
        if layer > 0 and stack.between is not None:
            x = stack.between(x)
        x, h, c = run(x, None if states is None else (states[0][part], states[1][part]), groups[part], *more)
        last.append((h, c))
    h_n, c_n = (torch.cat(s) for s in zip(*last, strict=True))
    return x, h_n, c_n
