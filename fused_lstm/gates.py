"""What happens inside the cell: every gate and state of a call, and pictures of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from .call import Kept, differentiates, forward_mode
from .functional import run
from .layer import LSTM, TorchLSTM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"i": "input gate", "f": "forget gate", "g": "candidate", "o": "output gate", "c": "cell state", "h": "hidden state"}


@dataclass(frozen=True, eq=False, repr=False)
class Gates:
    """The gates and states of a call, by layer, direction, time step and batch row: (layers, directions, T, B, H), without
    B when unbatched. See :func:`inspect_gates`."""

    i: Tensor  # input gate, in [0, 1]
    f: Tensor  # forget gate, in [0, 1]
    g: Tensor  # candidate, in [-1, 1]
    o: Tensor  # output gate, in [0, 1]
    c: Tensor  # cell state after the step
    h: Tensor  # hidden state after the step, (layers, directions, T, B, Hout)
    output: Tensor  # as the layer returns it, and so are the last two
    h_n: Tensor
    c_n: Tensor
    lengths: Tensor | None = None  # steps of each batch row, (B,), () when unbatched; None: all T

    def __repr__(self) -> str:
        shapes = {name: tuple(t.shape) for name, t in vars(self).items() if t is not None}
        return f"Gates({', '.join(f'{name}={shape}' for name, shape in shapes.items())}, dtype={self.c.dtype})"


@torch.no_grad()
def inspect_gates(
    lstm: LSTM,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
) -> Gates:
    """Every gate and state of a call of the layer; with the layer's arguments, checks and errors.

    Time is the input's, in both directions and whatever ``batch_first`` is: entry t is what step t computed, of the reverse
    direction the state after t, ..., T-1 were read from the end. Zero past a row's length. At each step
    ``c = f * c_before + i * g`` and ``h = o * tanh(c)``, or W_hr times this with a projection, up to rounding; with
    norms and zoneout as :class:`fused_lstm.Cell` has it; zoneout of a layer in training draws masks, as a call does.

    The backends ``triton`` and ``reference`` show the very numbers that the forward pass computes with, bit for bit. torch's
    own LSTM, the backend ``aten``, does not show its gates: the explicit path of ``reference`` takes its place, and its
    output equals the layer's up to rounding. Where fp16 and bf16 are computed in fp32, all are rounded at the end, as the
    output is. Dropout does not act, no gradient is kept, and hooks of the module are not called. ``vmap`` may be around the
    call, derivatives of ``torch.func`` may not: they would be zero.

    Args:
        lstm: the layer; a torch.nn.LSTM becomes one by ``fused_lstm.LSTM.from_torch``.
        x: input, (T, B, I), (B, T, I) if the layer is ``batch_first``, or (T, I); padded, not packed.
        hx, lengths, resets: as the layer takes them.

    Raises:
        TypeError: ``lstm`` is no fused_lstm.LSTM, or ``x`` is packed or no tensor.
        RuntimeError: a derivative is taken around the call.
        ValueError, RuntimeError: what the layer raises for these arguments.
    """
    if not isinstance(lstm, LSTM):
        hint = ": convert it by fused_lstm.LSTM.from_torch" if isinstance(lstm, TorchLSTM) else ""
        hint += " before it is parametrized" if hint and is_parametrized(lstm) else ""
        got = f"{type(lstm).__module__}.{type(lstm).__name__}"
        raise TypeError(f"inspect_gates expects a fused_lstm.LSTM, got: {got}{hint}")
    if isinstance(x, PackedSequence):
        raise TypeError(
            "inspect_gates expects padded input, got a PackedSequence: pass the padded tensor and lengths= instead "
            "(torch.nn.utils.rnn.pad_packed_sequence gives both)"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"inspect_gates expects x to be a tensor, got: {type(x).__module__}.{type(x).__name__}")
    if forward_mode() or differentiates():
        raise RuntimeError(
            "inspect_gates has no derivatives, expected a call outside of forward-mode AD and of torch.func's grad, vjp, jvp"
        )
    weights, stack = lstm._weights(), lstm._stack()._replace(dropout=0.0)
    data, states, sequences = lstm._prepare(x, hx, weights, stack, lengths, resets)
    kept: list[Kept] = []
    output, h_n, c_n = run(data, states, weights, stack, sequences, lstm.backend, keep=kept.append)

    valid = None
    if sequences.lengths is not None:
        t = torch.arange(data.shape[1 if lstm.batch_first else 0], device=data.device)
        valid = (t[:, None] < sequences.lengths)[..., None]  # (T, B, 1)

    def arrange(layers: Sequence[Tensor]) -> Tensor:
        """A tensor (T*B, directions, H) of each layer, in the order of the data, to (layers, directions, T, B, H)."""
        steps = torch.stack([layer.unflatten(0, data.shape[:2]) for layer in layers])
        steps = (steps.transpose(1, 2) if lstm.batch_first else steps).movedim(3, 1)
        steps = steps if valid is None else torch.where(valid, steps, 0)
        return (steps if x.dim() == 3 else steps.squeeze(3)).to(output.dtype)

    gates = (arrange([layer.gates[:, :, k] for layer in kept]) for k in range(4))
    c = arrange([layer.c for layer in kept])
    h = arrange([layer.y.reshape(*layer.c.shape[:2], h_n.shape[-1]) for layer in kept])
    if x.dim() == 2:
        output, h_n, c_n = output.squeeze(0 if lstm.batch_first else 1), h_n.squeeze(1), c_n.squeeze(1)
    lengths = sequences.lengths if x.dim() == 3 or sequences.lengths is None else sequences.lengths.squeeze(0)
    return Gates(*gates, c, h, output, h_n, c_n, lengths)


def plot_gates(
    values: Gates,
    *,
    layer: int = 0,
    direction: int = 0,
    row: int = 0,
    units: Sequence[int] | None = None,
    gates: str = "ifgoch",
    x: Tensor | Sequence[float] | None = None,
    axis: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Heat maps over time, a row for each unit: gates from 0 to 1, candidate and states in colours centred on 0.

    Grey is past the row's length, magenta is NaN. Meant for up to some 80 steps and 32 units. Needs matplotlib
    (``pip install matplotlib``), but no display.

    Args:
        values: of :func:`inspect_gates`.
        layer, direction, row: which of the layers, directions (1: backwards in time) and batch rows to draw.
        units: hidden units to draw, in this order; all if None. A projected hidden state, which has no such units, is drawn
            whole.
        gates: which to draw, in this order: letters of "ifgoch", the fields of :class:`Gates`.
        x: numbers to draw above, such as the input: (T,), or (T, K) for K lines.
        axis: a label for each of the T steps: a text of T characters, whose whitespace is made visible, or T texts. Of
            more than fit, every second is drawn, or third.
        title: of the figure; if None, which layer, direction and row it shows, of those that there are several of.

    Returns:
        A matplotlib Figure; ``figure.savefig("gates.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: arguments that do not fit ``values``; says what was expected.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.colors import Normalize, SymLogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot_gates needs matplotlib: pip install matplotlib") from error
    if not isinstance(values, Gates):
        raise TypeError(f"plot_gates expects the result of fused_lstm.inspect_gates, got: {type(values).__name__}")
    if not gates or set(gates) - set(NAMES):
        raise ValueError(f"gates should be letters of {''.join(NAMES)!r}, got {gates!r}")
    batched = values.c.dim() == 5
    T, H = values.c.shape[2], values.c.shape[-1]
    place = {"layer": layer, "direction": direction, "row": row}
    sizes = [*values.c.shape[:2], values.c.shape[3] if batched else 1]
    if 0 in sizes:
        raise ValueError(f"plot_gates expects at least one batch row, got gates of shape {tuple(values.c.shape)}")
    for (name, index), size in zip(place.items(), sizes, strict=True):
        if index not in range(size):
            raise ValueError(f"{name} should be an integer from 0 to {size - 1}, got {index!r}")
    layer, direction, row = map(int, place.values())
    if units is not None:
        asked = list(units) if isinstance(units, Iterable) else []
        if not asked or any(u not in range(H) for u in asked):
            raise ValueError(f"units should be a list of integers from 0 to {H - 1}, got {units!r}")
        units = list(map(int, asked))
    length = T if values.lengths is None else int(values.lengths[row] if batched else values.lengths)
    series = None if x is None else torch.as_tensor(x).detach().cpu().double()
    if series is not None and (series.dim() not in (1, 2) or len(series) != T):
        raise ValueError(f"x should have shape ({T},) or ({T}, K), one for each step, got {tuple(series.shape)}")
    if axis is not None and len(axis) != T:
        raise ValueError(f"axis should have {T} labels, one for each step, got {len(axis)}")

    panels: list[tuple[str, Tensor, list[int]]] = []  # name, (T, units), the units' numbers
    for name in gates:
        data = getattr(values, name)[layer, direction]
        data = (data[:, row] if batched else data).detach().cpu().double()
        chosen = list(range(data.shape[-1])) if units is None or data.shape[-1] != H else units
        panels.append((name, data[:, chosen], chosen))
    heights = [1.0] * (series is not None) + [min(3.0, max(0.8, 0.07 * len(chosen))) for _, _, chosen in panels]
    size = (min(24.0, max(7.0, 2.5 + 0.13 * T)), sum(heights) + 0.25 * len(heights) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    if series is not None:
        marker = "o" if length == 1 else None  # a line needs two points
        lines = axes[0].plot(
            range(length), series[:length].numpy(), drawstyle="steps-mid", linewidth=1, marker=marker, markersize=3
        )
        axes[0].set_ylabel("x", fontsize=8)
        axes[0].tick_params(axis="y", labelsize=7)
        if 1 < len(lines) <= 6:
            above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0, "ncols": len(lines)}
            axes[0].legend(lines, range(len(lines)), fontsize=7, frameon=False, **above)
    for ax, (name, data, chosen) in zip(axes[len(axes) - len(panels) :], panels, strict=True):
        if name in "ifo":
            low, high, colours = 0.0, 1.0, "viridis"
        else:  # a candidate fills its range as a gate does; states may be small or large, and get a range that fits
            high = 1.0 if name == "g" else data.nan_to_num(0, 0, 0).abs().amax().item() or 1.0
            low, colours = -high, "RdBu_r"
        # Cells that count would dwarf the others: large states are drawn by their logarithm beyond 1, where tanh saturates.
        norm = SymLogNorm(1, vmin=low, vmax=high) if name == "c" and high > 4 else Normalize(low, high)
        cmap = colormaps[colours].with_extremes(bad="magenta")
        image = ax.imshow(data.T.numpy(), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=7)
        if isinstance(norm, SymLogNorm):
            bar.set_label("log beyond 1", fontsize=7)
        ax.set_ylabel(f"{name}\n{NAMES[name]}", fontsize=8)
        shown = range(0, len(chosen), math.ceil(len(chosen) / 8))
        ax.set_yticks(shown, [str(chosen[k]) for k in shown], fontsize=7)
    if length < T:  # what is there is zero, a value like any other: covered
        for ax in axes:
            ax.axvspan(length - 0.5, T - 0.5, facecolor="0.8", zorder=2)
    if axis is None:
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[-1].set_xlabel("time step", fontsize=8)
        axes[-1].tick_params(axis="x", labelsize=7)
    else:
        single = all(len(label) == 1 for label in axis)
        font = {"fontfamily": "monospace", "fontsize": 8, "rotation": 0 if single else 90}
        shown = range(0, T, math.ceil(0.12 * T / (size[0] - 2.5)))  # a label takes up to 0.12 of an inch
        axes[-1].set_xticks(shown, [_visible(axis[t]) for t in shown], parse_math=False, **font)
        for ax in axes:
            ax.tick_params(axis="x", length=0 if single else 3)
    if title is None:
        parts = (f"layer {layer}", ("forwards", "backwards")[direction], f"row {row}")
        title = ", ".join(part for part, size in zip(parts, sizes, strict=True) if size > 1)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _visible(label: str) -> str:
    """A label whose whitespace shows."""
    return label.translate({ord(" "): "\u2423", ord("\n"): "\u21b5", ord("\t"): "\u2192"}) if len(label) == 1 else label
