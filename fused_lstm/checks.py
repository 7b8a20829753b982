"""Whether a call's tensors fit together: shapes, dtypes and devices, autocast taken into account."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter

import torch
from torch import Tensor

from .call import Stack, States, check_batch_sizes
from .cell import Cell


def autocast(x: Tensor) -> bool:
    """Whether autocast acts on x's device; the meta device, for one, does not know it."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast_dtype(x: Tensor) -> torch.dtype:
    """The dtype x is computed in: as torch's own autocast does, which leaves fp64 alone."""
    return torch.get_autocast_dtype(x.device.type) if autocast(x) and x.dtype != torch.float64 else x.dtype


def check(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], stack: Stack, batch_sizes: Tensor | None
) -> None:
    """Check shapes, dtypes and devices of a functional call; the messages are those of torch.nn.LSTM."""
    if stack.num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {stack.num_layers}")
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(state, Tensor) for state in hx):
        got = ", ".join(type(state).__name__ for state in (hx if isinstance(hx, (tuple, list)) else [hx]))
        raise RuntimeError(f"lstm expects two hidden states, (h0, c0), got {got}")
    groups = stack.num_layers * stack.directions
    plain, cell = 4 if stack.has_biases else 2, stack.cell
    own, projects = (0, True) if cell is None else (len(cell.own(1)), cell.projects)
    if len(weights) not in (groups * (plain + own), groups * (plain + own + projects)):
        raise ValueError(
            f"weights should hold {groups * (plain + own)} tensors"
            f"{f', or {groups * (plain + own + 1)} with projections' * projects}, for "
            f"num_layers={stack.num_layers}, bidirectional={stack.bidirectional} and has_biases={stack.has_biases}"
            f"{f', {cell}' * (cell is not None)}; got {len(weights)}"
        )
    dims = 2 if batch_sizes is not None else 3
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, input.shape[0])
    B = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if stack.batch_first else 1]
    step = len(weights) // groups - own
    H = len(weights[0]) // (4 if cell is None else cell.gates)
    P = len(weights[step - 1]) if step > plain else H
    if step > plain and P >= H:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got weights of {P} and {H}")
    if cell is not None:
        cell.check_sizes(H, stack.has_biases, P if step > plain else 0)
    check_weights(input, weights, stack, (input.shape[-1], H, P if step > plain else 0))
    for k, (tensor, width) in enumerate(zip(hx, (P, H), strict=True)):
        if tensor.shape != (groups, B, width):
            raise RuntimeError(f"Expected hidden[{k}] size {(groups, B, width)}, got {list(tensor.shape)}")
    check_like(input, hx, weights)


KIND = attrgetter("shape", "dtype", "device")  # which compilers do not look into


def check_weights(
    input: Tensor, weights: Sequence[Tensor], stack: Stack, sizes: tuple[int, int, int], names: Sequence[str] | None = None
) -> None:
    """Shapes, dtypes and devices of the weights, which would else be read past their ends. ``sizes``: I, H and P, or 0."""
    compiling = torch.compiler.is_compiling()
    of = stack.has_biases, stack.num_layers, stack.bidirectional, stack.cell, *sizes
    if not compiling and list(map(KIND, weights)) == _kinds(*of, input.dtype, input.device):
        return
    kinds = (_kinds.__wrapped__ if compiling else _kinds)(*of, weights[0].dtype, weights[0].device)
    if len(kinds) != len(weights):
        raise ValueError(f"expected {len(kinds)} weights for num_layers={stack.num_layers}, got {len(weights)}")
    for k, (w, (shape, dtype, device)) in enumerate(zip(weights, kinds, strict=True)):
        name = names[k] if names else f"weights[{k}]"
        if w.shape != shape:
            of = f"{stack.cell or 'the cell of torch.nn.LSTM'}, hidden_size={sizes[1]} and proj_size={sizes[2]}"
            raise RuntimeError(f"Expected {name} size {shape}, got {list(w.shape)}, for {of}")
        if w.device != device or (w.dtype != dtype and not autocast(w)):
            raise ValueError(
                f"weights should be of one dtype and device, got {dtype} on {device} and {name} of {w.dtype} on {w.device}"
            )
    check_like(input, None, weights)


@lru_cache(maxsize=4096)
def _kinds(
    biases: bool, layers: int, bidirectional: bool, cell: Cell | None, I: int, H: int, P: int,  # noqa: E741
    dtype: torch.dtype, device: torch.device,
) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:  # fmt: skip
    """What a call's weights should be, in their order."""
    directions = 1 + bidirectional
    widths = [I] * directions + [directions * (P or H)] * (directions * (layers - 1))
    N, heads, own = (4 * H, 1, ()) if cell is None else (cell.gates * H, cell.heads, cell.own(H).values())
    rest = [(N, P or H // heads), *[(N,)] * (2 * bool(biases)), *[(P, H)] * (P > 0), *own]
    return [(shape, dtype, device) for width in widths for shape in ((N, width), *rest)]


def check_like(input: Tensor, hx: States, weights: Sequence[Tensor]) -> None:
    """Devices and dtypes of states and weights against the input's."""
    w, dtype, device = weights[0], input.dtype, input.device
    if w.device != device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {input.device} and "
            f"parameter tensor at {w.device}"
        )
    if w.dtype != dtype and not autocast(input):
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({w.dtype}). Convert input: "
            f"input.to({w.dtype}), or convert model: model.to({input.dtype})"
        )
    for k, state in enumerate(hx or ()):
        if state.device != device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {input.device} and "
                f"hidden tensor at {state.device}"
            )
        if state.dtype != dtype and not autocast(input):
            raise ValueError(
                f"hidden[{k}] dtype ({state.dtype}) does not match input dtype ({input.dtype}). Convert it: "
                f"hidden.to({input.dtype})"
            )
