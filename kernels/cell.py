"""The LSTM cell as pure functions of registers: no loads, no stores. All kernels share them.

Gate order i, f, g, o, as in torch.nn.LSTM. Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh without libdevice, so that it also runs in the interpreter; right at saturation and near zero."""
    # 1 - 2/(e^2x + 1) ends at exactly -1 and 1, but cancels near zero, where an odd polynomial takes over: our own
    # minimax fit for |x| < 0.6, relative error 3e-9 before rounding. In fp64 the cancellation costs 1e-16 and stays.
    wide = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if x.dtype == tl.float64:
        result = wide
    else:
        z = x * x
        p = -5.863521735e-03 * z + 2.077075846e-02
        p = p * z - 5.377698486e-02
        p = p * z + 1.333185196e-01
        p = p * z - 3.333329568e-01
        result = tl.where(tl.abs(x) < 0.6, x + x * (z * p), wide)
    return result


@triton.jit
def cell_forward(a_i, a_f, a_g, a_o, c):
    """One step from the pre-activations and the previous cell state; returns i, f, g, o and the new c and h."""
    f = tl.sigmoid(a_f)
    g = tanh(a_g)
    i = tl.sigmoid(a_i)
    c = f * c + i * g
    o = tl.sigmoid(a_o)
    h = o * tanh(c)
    return i, f, g, o, c, h


@triton.jit
def cell_backward(i, f, g, o, c, c_prev, dh, dc):
    """Gradients by the four pre-activations and by c_prev, from those by h and c (docs/math.md derives them)."""
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    da_o = dh * tanh_c * o * (1.0 - o)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    return da_i, da_f, da_g, da_o, dc * f


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRET_BF16: tl.constexpr):
    """x rounded to dtype, to nearest even; Triton's interpreter would truncate fp32 to bf16."""
    if INTERPRET_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
