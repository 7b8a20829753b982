"""The stack of layers as a function of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, recurrence, reference, relatives
from .call import (
    ALIGNMENT,
    PLAIN,
    Kept,
    LayerCall,
    Problem,
    Result,
    Sequences,
    Stack,
    States,
    active,
    as_lengths,
    as_resets,
    check_batch_sizes,
    differentiates,
    each_layer,
    forward_mode,
    numberless,
    traced,
)
from .cell import Cell, checked_cell
from .checks import autocast, cast_dtype, check, check_like
from .cpu import aten, segments
from .plan import HALVES, Way, choose, choose_compiled, problem_of, unknown_sizes


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
    recompute: bool = False,
    cell: Cell | None = None,
) -> Result:
    """Run a stack of LSTM layers; the function behind :class:`fused_lstm.LSTM`.

    Args:
        input: (T, B, I), (B, T, I) if ``batch_first``, or (N, I) with ``batch_sizes``; fp16, bf16, fp32 or fp64.
        hx: (h0, c0) of shapes (D*num_layers, B, Hout) and (D*num_layers, B, H), with D directions and Hout the
            projection's size, or H without one.
        weights: layer by layer, then direction by direction: ``w_ih`` (4H, I or D*Hout), ``w_hh`` (4H, Hout), with
            ``has_biases`` ``b_ih`` and ``b_hh`` (4H,), with a projection ``w_hr`` (P, H). Gate order i, f, g, o.
        has_biases: whether ``weights`` holds biases.
        num_layers: number of layers.
        dropout: probability of zeroing an element of the output of every layer but the last, if ``training``.
        training: whether dropout acts.
        bidirectional: whether each layer also runs backwards in time.
        batch_first: whether input and output are (B, T, ...) rather than (T, B, ...).
        batch_sizes: (T,) int64 on the CPU: input is packed as in :class:`torch.nn.utils.rnn.PackedSequence`.
        lengths: (B,) integers, 0 to T, on any device: the steps of each batch row. Output past them is zero; h_n and c_n are
            those of a row's last step; the reverse direction starts there.
        resets: bool, integer or float, (T, B), or (B, T) if ``batch_first``. Where not zero, a new episode begins at t: h
            and c are zero before step t, and neither values nor gradients pass, in any layer or direction.
        backend: ``"auto"``, ``"triton"``, ``"aten"`` or ``"reference"``; see :func:`fused_lstm.explain`.
        recompute: keep no gates for the backward pass, which computes them again: less memory, more time.
        cell: a relative of torch's cell, :class:`fused_lstm.Cell`. ``weights`` then have its shapes, and the parameters that
            it adds follow each direction's.

    Returns:
        output, like input with D*Hout features; h_n and c_n, like h0 and c0.

    Raises:
        ValueError: wrong number of weights, wrong dtype, lengths or resets that do not fit, or unknown backend.
        RuntimeError: wrong shape or device, T = 0, or a backend that cannot serve the call.
    """
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(recompute).__name__}")
    if not isinstance(input, Tensor):
        raise TypeError(f"input should be a tensor, of a packed sequence its data, got: {type(input).__name__}")
    given, weights = weights, list(weights)
    if isinstance(given, Tensor) or not all(isinstance(w, Tensor) for w in weights):
        raise TypeError("weights should be a sequence of tensors")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    own = recompute, checked_cell(cell), training
    stack = Stack(has_biases, num_layers, dropout if training else 0.0, bidirectional, batch_first, *own)
    check(input, hx, weights, stack, batch_sizes)
    hx, sequences = settle(input, hx, stack, batch_sizes, lengths, resets)
    return run(input, hx, weights, stack, sequences, backend)


def settle(
    input: Tensor,
    hx: States,
    stack: Stack,
    batch_sizes: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    resets: Tensor | None,
) -> tuple[States, Sequences]:
    """Check what a call says of its sequences, for batched or packed input; returns the states to start from as well."""
    if lengths is None and resets is None and batch_sizes is None:
        return hx, PLAIN
    if batch_sizes is not None and not torch.compiler.is_compiling():
        check_batch_sizes(batch_sizes, input.shape[0])
    if lengths is None and resets is None:
        return hx, Sequences(batch_sizes)
    if batch_sizes is not None:
        raise ValueError(
            "lengths and resets are for padded input, got a packed sequence: pass the padded tensor and lengths= instead "
            "(torch.nn.utils.rnn.pad_packed_sequence gives both)"
        )
    B, T = input.shape[:2] if stack.batch_first else (input.shape[1], input.shape[0])
    same, starts = 0, ()
    if lengths is not None:
        lengths, same = as_lengths(lengths, T, B, input.device)
    if resets is not None:
        resets = as_resets(resets, tuple(input.shape[:2]), input.device)
        if T == 1 and lengths is None:  # with a single step, a reset only clears the state before it
            return _cleared(hx, resets, stack), PLAIN
        same = 0
        if lengths is None and resets.device.type == "cpu" and not traced(resets):
            begins = resets.any(0 if stack.batch_first else 1).nonzero().flatten().tolist()
            starts = (0, *(t for t in begins if t > 0))
    return hx, PLAIN if lengths is None and resets is None else Sequences(None, lengths, resets, same, starts)


def _cleared(hx: States, resets: Tensor, stack: Stack) -> States:
    """States of a single step with the rows cleared that begin an episode; backwards in time none begins there."""
    if hx is None:
        return None
    backwards = torch.arange(hx[0].shape[0], device=hx[0].device)[:, None, None] % stack.directions == 1
    keep = ~resets.reshape(-1, 1) | backwards
    return torch.where(keep, hx[0], 0), torch.where(keep, hx[1], 0)


def run(
    input: Tensor,
    hx: States,
    weights: Sequence[Tensor],
    stack: Stack,
    sequences: Sequences,
    backend: str,
    keep: Keep | None = None,
    tell: Callable[..., None] | None = None,
) -> Result:
    """:func:`lstm` for arguments that were checked. ``keep`` is given what each layer computed, one after the other; ways
    that do not show it give way to the explicit one. ``tell`` is told the stack and the choice of a call without lengths,
    resets or packed rows."""
    if stack.cell is not None:
        weights, stack = uncoupled(weights, stack)
    compiling = torch.compiler.is_compiling()
    if (compiling or torch._C._is_any_autocast_enabled()) and autocast(input):
        h0, c0 = hx or (None, None)
        input, h0, c0, *weights = (None if t is None else t.to(cast_dtype(t)) for t in (input, h0, c0, *weights))
        hx = None if hx is None else (h0, c0)
        with torch.autocast(input.device.type, enabled=False):
            check_like(input, hx, weights)
            return run(input, hx, weights, stack, sequences, backend, keep)
    # Without a look at T and B, which are to stay dynamic; nor at the numbers of lengths and resets where there are none, or
    # torch.jit.trace records the call for others.
    if compiling or (sequences is not PLAIN and (torch._C._get_tracing_state() is not None or numberless(input))):
        levels = (active(), differentiates() or forward_mode())
        what = (1, "") if stack.cell is None else (stack.cell.heads, stack.cell.relative)
        projected = stack.projects(weights)
        word, fp32, transformed = choose_compiled(input.device.type, input.dtype, projected, *levels, backend, *what)
        if word == "onednn" and not unknown_sizes():
            stack = stack._replace(recompute=True)
        choice: Choice = word, fp32, transformed, None
    else:
        choice = _chosen(problem_of(input, input.dtype, hx, weights, stack, sequences), backend)
        if tell is not None and sequences is PLAIN:
            tell(stack, choice)
    if keep is not None and choice[0] != "triton":
        choice = "reference", input.dtype in HALVES, False, None
    return carry_out(input, hx, weights, stack, sequences, choice, keep)


def carry_out(
    input: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences, choice: Choice,
    keep: Keep | None = None,
) -> Result:  # fmt: skip
    """A call by the way that was chosen for it."""
    word, fp32, transformed, runner = choice
    dtype = input.dtype
    if stack.cell is not None and (runner is not None or word == "onednn"):  # torch's own LSTM, which has no heads
        weights, stack = stack.cell.joined_heads(weights, 2 + 2 * stack.has_biases), stack._replace(cell=None)
    if fp32:
        input, weights = input.float(), [w.float() for w in weights]
        hx = None if hx is None else (hx[0].float(), hx[1].float())
    if runner is None:
        y, h_n, c_n = run_layers(input, hx, weights, stack, sequences, word, transformed, keep)
    elif stack.between is None:
        y, h_n, c_n = runner(input, hx, weights, stack, sequences)
    else:  # which torch's own LSTM does not know, nor a way that cuts time: layer by layer over the whole of it
        one = stack._replace(num_layers=1, between=None)
        y, h_n, c_n = each_layer(lambda x, s, w: runner(x, s, list(chain(*w)), one, sequences), input, hx, weights, stack)
    return (y.to(dtype), h_n.to(dtype), c_n.to(dtype)) if fp32 else (y, h_n, c_n)


class Earlier:
    """What ran earlier calls of a layer, for calls that are like them: of plain tensors, without lengths or resets.

    Whether tensors are alike is asked of the check that torch's compiler guards its graphs by, which costs less than to look
    at one tensor from Python: types, dtypes, devices, sizes, who requires a gradient, and that no autocast, tracer,
    transform or mode is at work that was not before. It knows nothing of forward-mode AD.
    """

    def __init__(self) -> None:
        self.known: dict[tuple, tuple[Callable[..., bool], Callable[..., Result], Stack]] = {}

    def find(self, key: tuple, tensors: Sequence[Tensor]) -> tuple[Callable[..., Result], Stack] | None:
        """What ran such a call, which passed all checks. ``key`` holds what else they depend on."""
        found = self.known.get(key)
        alike = found is not None and forward_ad._current_level < 0 and found[0](*tensors)
        return found[1:] if alike else None

    def keep(self, key: tuple, tensors: Sequence[Tensor], stack: Stack, choice: Choice) -> None:
        touched = (
            active() or forward_mode() or torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None
        )
        if touched or GUARDS is None:
            return
        if len(self.known) >= LIMIT:
            self.known.clear()
        sizes, strides = [list(t.shape) for t in tensors], [[None] * t.dim() for t in tensors]
        check = GUARDS(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        word, fp32, transformed, runner = choice
        if fp32:
            runner = partial(carry_out, choice=choice)
        self.known[key] = check, runner or partial(run_layers, engine=word, transformed=transformed), stack


def _guards() -> type | None:
    """torch's own check of tensors; None where it is not as expected, so that nothing is remembered."""
    try:
        found = torch._C._dynamo.guards.TensorGuards
        one = torch.empty(1, device="cpu")
        return found if found(one, dynamic_dims_sizes=[[1]], dynamic_dims_strides=[[None]]).check(one) else None
    except (AttributeError, TypeError):
        return None


GUARDS = _guards()
LIMIT = 64  # of a layer's calls that are remembered
Choice = tuple[str, bool, bool, Callable[..., Result] | None]  # a way in a word, a Plan's two flags, what runs it, or the op

RUNNERS: dict[Way, Callable[..., Result]] = {  # of the other ways the op runs each layer
    Way.FUSED: aten.fused,
    Way.CELL: aten.single_step,
    Way.PREFIX: aten.prefix,
    Way.STRETCHES: aten.stretches,
    Way.RAGGED: aten.ragged,
    Way.SEGMENTS: segments.segmented,
}

Keep = Callable[[Kept], None]


@lru_cache(maxsize=4096)
def _chosen(problem: Problem, backend: str) -> Choice:
    plan = choose(problem, backend)
    return plan.way.value, plan.in_fp32, plan.transformed, RUNNERS.get(plan.way)


def run_layers(
    x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences, engine: str,
    transformed: bool = False, keep: Keep | None = None,
) -> Result:  # fmt: skip
    """The stack layer by layer through the op, or through the readable loop that torch follows op by op: engine ``"loop"``.

    ``transformed``: by torch.func. The input products are then left to torch, which maps them and their gradients well.
    """
    if sequences.lengths is not None:  # else a NaN in padding, times its gradient of zero, makes dW_ih NaN
        x = torch.where(_valid(x, stack, sequences.lengths), x, 0)
    return each_layer(_layer, x, hx, weights, stack, stack, sequences, engine, transformed, keep)


def _valid(x: Tensor, stack: Stack, lengths: Tensor) -> Tensor:
    """(T, B, 1), or (B, T, 1) if batch_first: where x is not padding."""
    t = torch.arange(x.shape[1 if stack.batch_first else 0], device=x.device)
    return (t < lengths[:, None] if stack.batch_first else t[:, None] < lengths)[..., None]


def _layer(
    x: Tensor, hx: States, groups: Sequence[Sequence[Tensor]], stack: Stack, sequences: Sequences, engine: str,
    transformed: bool, keep: Keep | None,
) -> Result:  # fmt: skip
    """One layer, both directions at once. hx (D, B, Hout) and (D, B, H)."""
    cell, relative, units, seed = stack.cell, "", None, None
    if cell is not None:
        if cell.heads > 1:
            return _by_head(x, hx, groups, stack, sequences, engine, transformed, keep)
        relative, (groups, units, gains) = cell.relative, cell.split(groups)
        if stack.training and any(cell.zoneout):
            seed = torch.randint(2**63 - 1, (1,), device=x.device)
    h0, c0 = (None, None) if hx is None else hx
    w_ih, w_hh, *rest = groups[0] if len(groups) == 1 else [torch.cat(each) for each in zip(*groups, strict=True)]
    b_ih, b_hh = rest[:2] if stack.has_biases else (None, None)
    w_hr, w_h0 = [group[-1] for group in groups] if len(rest) % 2 else [], None
    if w_hr:
        # With h = W_hr m, W_hh h = (W_hh W_hr) m: a plain recurrence over m, which h0 enters through the first step.
        w_h0, w_hh = None if h0 is None else w_hh, torch.cat([group[1] @ group[-1] for group in groups])
    R, H = len(groups), w_hh.shape[1]
    pad = -H % ALIGNMENT if engine == "triton" and not (cell and cell.layer_norm) else 0
    if pad:  # units of zero weight stay at zero: the results are the same, and every row is aligned
        w_ih, w_hh, b_ih, b_hh, w_h0 = (None if w is None else _pad_gates(w, H, pad) for w in (w_ih, w_hh, b_ih, b_hh, w_h0))
        w_hh = F.pad(w_hh, (0, pad))
        c0 = None if c0 is None else F.pad(c0, (0, pad))
        h0 = F.pad(h0, (0, pad)) if h0 is not None and w_h0 is None else h0
        units = None if units is None else F.pad(units, (0, pad))
    if relative and gains is not None:  # the norm of the input's products, for all steps
        biases = [None] * R if b_ih is None else b_ih.chunk(R)
        plain = ops.plain((x, w_ih, gains)) and not forward_mode()
        norm = relatives.NormedInput.apply if plain else relatives.normed_input
        normed = [norm(x, *own) for own in zip(w_ih.chunk(R), gains.chunk(R), biases, strict=True)]
        x, w_ih, b_ih = normed[0] if R == 1 else torch.cat(normed, -1), None, None
    more = (sequences.lengths, sequences.batch_sizes, sequences.resets, seed, stack.directions, stack.batch_first)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_h0, units)
    if transformed and w_ih is not None:
        x = F.linear(x, w_ih, None if b_ih is None else b_ih + b_hh)
        if w_h0 is not None:
            x = recurrence.with_first(x, h0, w_h0, LayerCall(*tensors, *more, False, engine, False))
        tensors = (x, None if w_hr else h0, c0, None, w_hh, None, None, None, units)
    if engine == "loop":
        kept = Kept(*reference.layer(LayerCall(*tensors, *more, False, engine, False, relative)), None, None)
    else:
        # Under vmap a tensor does not tell whether a gradient is asked for outside.
        save = torch.is_grad_enabled() and (
            x.requires_grad or active() or any([t is not None and t.requires_grad for t in tensors])
        )
        recompute = stack.recompute and keep is None
        kept = ops.layer(LayerCall(*tensors, *more, save or keep is not None, engine, recompute, relative))
    y, h_n, c_n = kept[:3]
    if pad:
        parts = y.unflatten(-1, (R, H + pad))[..., :H].flatten(-2), h_n[..., :H], c_n[..., :H]
        y, h_n, c_n = (part.contiguous() for part in parts)
    if w_hr:
        # One by one, since a batched product would give gradients by W_hr that are not dense.
        ys = [F.linear(part, w) for part, w in zip(y.split(H, -1), w_hr, strict=True)]
        y, h_n = torch.cat(ys, -1) if R > 1 else ys[0], torch.stack([F.linear(h, w) for h, w in zip(h_n, w_hr, strict=True)])
        if sequences.lengths is not None:
            # A row without steps keeps h0, which m knows nothing of; and a NaN for padding must not reach w_hr.
            first = h_n.new_zeros(()) if h0 is None else h0
            h_n = torch.where((sequences.lengths == 0)[:, None], first, h_n)
            y = torch.where(_valid(y, stack, sequences.lengths), y, 0)
    if keep is not None:
        keep(kept._replace(y=y, gates=kept.gates[..., :H], c=kept.c[..., :H]))
    return y, h_n, c_n


def _by_head(
    x: Tensor, hx: States, groups: Sequence[Sequence[Tensor]], stack: Stack, sequences: Sequences, engine: str,
    transformed: bool, keep: Keep | None,
) -> Result:  # fmt: skip
    """As :func:`_layer`, each head being a recurrence of its own that sees all of x."""
    cell, D = stack.cell, len(groups)
    n = cell.heads
    heads = [cell.head(group, k) for k in range(n) for group in groups]
    hx = None if hx is None else [s.unflatten(-1, (n, -1)).permute(2, 0, 1, 3).flatten(0, 1) for s in hx]

    def joined(t: Tensor) -> Tensor:
        """(..., n*D*h) to (..., D*n*h)."""
        return t.unflatten(-1, (n, D, -1)).transpose(-3, -2).flatten(-3) if D > 1 else t

    def joined_units(t: Tensor) -> Tensor:
        """(N, n*D, ..., h) to (N, D, ..., H)."""
        return t.unflatten(1, (n, D)).movedim(1, -2).flatten(-2)

    def keep_joined(kept: Kept) -> None:
        keep(kept._replace(y=joined(kept.y), gates=joined_units(kept.gates), c=joined_units(kept.c)))

    single = stack._replace(cell=dataclasses.replace(cell, heads=1))
    y, h_n, c_n = _layer(x, hx, heads, single, sequences, engine, transformed, None if keep is None else keep_joined)
    return joined(y), *(s.unflatten(0, (n, D)).permute(1, 2, 0, 3).flatten(-2) for s in (h_n, c_n))


def uncoupled(weights: Sequence[Tensor], stack: Stack) -> tuple[Sequence[Tensor], Stack]:
    """Weights and stack of a call without coupled gates; of torch's cell, if nothing else is special."""
    cell = stack.cell
    if cell is None:
        return weights, stack
    if cell.coupled:
        weights = cell.uncoupled(weights, len(weights) // (stack.num_layers * stack.directions))
        cell = dataclasses.replace(cell, coupled=False)
    return weights, stack._replace(cell=cell if cell.relative or cell.heads > 1 else None)


def _pad_gates(w: Tensor, H: int, pad: int) -> Tensor:
    """(R*4H, ...) to (R*4(H+pad), ...), each gate padded with zeros."""
    w = w.unflatten(0, (-1, H))
    return F.pad(w, (0, 0) * (w.dim() - 2) + (0, pad)).flatten(0, 1)
