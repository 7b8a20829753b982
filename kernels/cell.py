"""The LSTM cell as a pair of pure functions of registers: no loads, no stores. Kernels are handed the pair they run.

Gate order i, f, g, o, as in torch.nn.LSTM. Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; their
peepholes, layer norm (Ba et al. 2016), and zoneout around the cell (Krueger et al. 2017), for those who ask for them.
"""

# ruff: noqa: RUF005 - Triton knows no starred elements of a tuple

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.constexpr_function
def accumulator(dtype):
    """What the kernels add up in, and keep the running cell state in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def tanh(x):
    """tanh without libdevice, so that it also runs in the interpreter; right at saturation and near zero."""
    # 1 - 2/(e^2x + 1) ends at exactly -1 and 1, but cancels near zero. There tanh(x) = x + x^3 p(x^2), with our own minimax
    # fits of p for |x| < 0.6: relative error 3e-9 in fp32 and 1e-18 in fp64, before rounding.
    z = x * x
    if x.dtype == tl.float64:
        p = 6.91884965347099e-6 * z - 3.205780559712358e-5
        p = p * z + 9.3300789445011479e-5
        p = p * z - 0.00023794117580839186
        p = p * z + 0.00058976500810057781
        p = p * z - 0.0014557953207693851
        p = p * z + 0.0035921241839503764
        p = p * z - 0.0088632352880040329
        p = p * z + 0.021869488527165524
        p = p * z - 0.053968253968080941
        p = p * z + 0.13333333333333203
        p = p * z - 0.33333333333333333
    else:
        p = -5.863521735e-03 * z + 2.077075846e-02
        p = p * z - 5.377698486e-02
        p = p * z + 1.333185196e-01
        p = p * z - 3.333329568e-01
    return tl.where(tl.abs(x) < 0.6, x + x * (z * p), 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@dataclass(frozen=True)
class LayerNorm:
    """Which norms a cell has: of its recurrent products, over all four gates, and of its cell state."""

    H: int
    state: bool  # whether the normalized cell state is carried on, or shown only
    eps: float
    first: int  # the row of units_ptr from which on their parameters lie there, six rows


class Norm(NamedTuple):
    """The norms as a program has them. It owns all units; SUM(values, room) gives, of each value, the sum over them."""

    units: Any  # gains of the products for i, f, g, o; gain and bias of the cell state's norm
    inside: Any  # which of its units there are
    rooms: Any  # two, for sums in turn


@triton.jit
def added(values):
    total = values[0]
    for k in tl.static_range(1, len(values)):
        total += values[k]
    return total


@triton.jit
def times(a, b):
    """The products of two tuples' elements."""
    products = ()
    for k in tl.static_range(len(a)):
        products = products + (a[k] * b[k],)
    return products


@triton.jit
def scaled(values, factor):
    products = ()
    for k in tl.static_range(len(values)):
        products = products + (values[k] * factor,)
    return products


@triton.jit
def normalized(values, norm, NORM: tl.constexpr, SUM: tl.constexpr):
    """A tuple of values for each unit, which together get mean 0 and variance 1; zero where there is no unit."""
    mean = SUM((added(values),), norm.rooms[0])[0] / (len(values) * NORM.H)
    centered = ()
    for k in tl.static_range(len(values)):
        centered = centered + (tl.where(norm.inside, values[k] - mean, 0.0),)
    variance = SUM((added(times(centered, centered)),), norm.rooms[1])[0] / (len(values) * NORM.H)
    return scaled(centered, 1.0 / tl.sqrt(variance + NORM.eps))


@triton.jit
def normalized_backward(d, centered, rstd, room, NORM: tl.constexpr, SUM: tl.constexpr):
    """The gradients by what a norm was given, from those by what it made: ``centered``, its values minus their mean, times
    ``rstd``."""
    values = scaled(centered, rstd)
    mean, along = SUM((added(d), added(times(d, values))), room)
    mean, along = mean / (len(d) * NORM.H), along / (len(d) * NORM.H)
    found = ()
    for k in tl.static_range(len(d)):
        found = found + (rstd * (d[k] - mean - values[k] * along),)
    return found


@triton.jit
def products_backward(da, centered, rstd, norm, NORM: tl.constexpr, SUM: tl.constexpr):
    """The gradients by the recurrent products, from those by the pre-activations."""
    return normalized_backward(times(da, norm.units), centered, rstd, norm.rooms[1], NORM, SUM)


@triton.jit
def lstm_forward(recurrent, given, c, peepholes, norm, NORM: tl.constexpr, SUM: tl.constexpr):
    """One step from the two parts of the pre-activations, of h and of x, four each, and the cell state before.

    peepholes are (p_i, p_f, p_o), and norm is a Norm; both are () of torch's cell. Returns the gates (i, f, g, o), and c and
    h after the step.
    """
    if len(norm) > 0:
        recurrent = times(normalized(recurrent, norm, NORM, SUM), norm.units)
    a_f = recurrent[1] + given[1]
    if len(peepholes) > 0:
        a_f += peepholes[1] * c
    f = tl.sigmoid(a_f)
    g = tanh(recurrent[2] + given[2])
    a_i = recurrent[0] + given[0]
    if len(peepholes) > 0:
        a_i += peepholes[0] * c
    i = tl.sigmoid(a_i)
    c = f * c + i * g
    shown = c
    if len(norm) > 0:
        shown = normalized((c,), norm, NORM, SUM)[0] * norm.units[4] + norm.units[5]
        if NORM.state:
            c = shown
    a_o = recurrent[3] + given[3]
    if len(peepholes) > 0:
        a_o += peepholes[2] * c
    o = tl.sigmoid(a_o)
    h = o * tanh(shown)
    return (i, f, g, o), c, h


@triton.jit
def lstm_backward(gates, c, c_prev, dh, dc, peepholes, norm, rstd, NORM: tl.constexpr, SUM: tl.constexpr):
    """Gradients by the four pre-activations and by c_prev, from those by h and c (docs/math.md derives them).

    With a norm, c is f * c_prev + i * g minus its mean, and rstd what the norm multiplies that by; else (). Also returns the
    gradient by what tanh sees.
    """
    i, f, g, o = gates
    shown = c
    if len(norm) > 0:
        shown = c * rstd * norm.units[4] + norm.units[5]
    tanh_c = tanh(shown)
    dshown = dh * o * (1.0 - tanh_c * tanh_c)
    if len(norm) == 0:
        dc += dshown
    da_o = dh * tanh_c * o * (1.0 - o)
    if len(peepholes) > 0:
        dc += peepholes[2] * da_o
    if len(norm) > 0:
        if NORM.state:
            dshown += dc
        through = normalized_backward((dshown * norm.units[4],), (c,), rstd, norm.rooms[0], NORM, SUM)[0]
        if NORM.state:
            dc = through
        else:
            dc += through
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    dc = dc * f
    if len(peepholes) > 0:
        dc += peepholes[0] * da_i + peepholes[1] * da_f
    return (da_i, da_f, da_g, da_o), dc, dshown


@dataclass(frozen=True)
class Zoneout:
    """Probabilities that a unit keeps its h, or its c, of the step before."""

    h: float
    c: float
    rounds: int  # of Philox


@triton.constexpr_function
def threshold(probability):
    return round(probability * 2**32)


@triton.jit
def masks(seed, t, b, r, unit, B, R: tl.constexpr, H: tl.constexpr, ZONEOUT: tl.constexpr):
    """Which units keep their h, and which their c, at time t of batch row b; (), all of them in part, if seed is ().

    A draw gives four words: of h and of c, at two times. It is counted by units as if H were a multiple of 16.
    """
    kept = ()
    if len(seed) > 0:
        index = ((t // 2 * B + b) * R + r) * ((H + 15) // 16 * 16) + unit
        low = (index & 0xFFFFFFFF).to(tl.uint32)
        words = tl.philox(seed[0], low, (index >> 32).to(tl.uint32), low * 0, low * 0, ZONEOUT.rounds)
        odd = t % 2 == 1
        kept_h = tl.where(odd, words[2], words[0]).to(tl.int64) < threshold(ZONEOUT.h)
        kept_c = tl.where(odd, words[3], words[1]).to(tl.int64) < threshold(ZONEOUT.c)
        kept = (kept_h, kept_c)
    return kept


@triton.jit
def zoned(before, after, kept, n: tl.constexpr, PROBABILITY: tl.constexpr):
    """What zoneout makes of a state before and after a step, of h (n = 0) or of c (1), given its masks."""
    if len(kept) > 0:
        state = tl.where(kept[n], before, after)
    else:
        state = PROBABILITY * before + (1.0 - PROBABILITY) * after
    return state


@triton.jit
def passed(gradient, kept, n: tl.constexpr, PROBABILITY: tl.constexpr):
    """The part of the gradient by a state after a step that goes straight to the one before."""
    if len(kept) > 0:
        part = tl.where(kept[n], gradient, 0.0)
    else:
        part = PROBABILITY * gradient
    return part


@triton.jit
def zoned_backward(
    gates, c, c_prev, dh, dc, peepholes, norm, rstd, kept,
    CELL: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr, ZONEOUT: tl.constexpr,
):  # fmt: skip
    """As the cell's backward half, with zoneout around the cell. Also returns what of dh goes straight to the h before."""
    passed_h, passed_c = passed(dh, kept, 0, ZONEOUT.h), passed(dc, kept, 1, ZONEOUT.c)
    if len(norm) == 0:
        c = gates[1] * c_prev + gates[0] * gates[2]  # as the cell made it
    da, dc, dshown = CELL(gates, c, c_prev, dh - passed_h, dc - passed_c, peepholes, norm, rstd, NORM, SUM)
    return da, dc + passed_c, dshown, passed_h


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRET_BF16: tl.constexpr):
    """x rounded to dtype, to nearest even; Triton's interpreter would truncate fp32 to bf16."""
    if INTERPRET_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x for a product of fp32 numbers in that precision: in TF32 to nearest, where the tensor cores would drop the bits.

    What they drop has one sign, so that errors do not cancel in a sum. Numbers of other types are left as they are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)  # a NaN could overflow
    return x
