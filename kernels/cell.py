"""The LSTM cell as a pair of pure functions of registers: no loads, no stores. Kernels are handed the pair they run.

Gate order i, f, g, o, as in torch.nn.LSTM. Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.
"""

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


@triton.jit
def lstm_forward(recurrent, given, c):
    """One step from the two parts of the pre-activations, of h and of x, four each, and the cell state before.

    Returns the gates (i, f, g, o), and c and h after the step.
    """
    f = tl.sigmoid(recurrent[1] + given[1])
    g = tanh(recurrent[2] + given[2])
    i = tl.sigmoid(recurrent[0] + given[0])
    c = f * c + i * g
    o = tl.sigmoid(recurrent[3] + given[3])
    h = o * tanh(c)
    return (i, f, g, o), c, h


@triton.jit
def lstm_backward(gates, c, c_prev, dh, dc):
    """Gradients by the four pre-activations and by c_prev, from those by h and c (docs/math.md derives them)."""
    i, f, g, o = gates
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    da_o = dh * tanh_c * o * (1.0 - o)
    da_i = dc * g * i * (1.0 - i)
    da_f = dc * c_prev * f * (1.0 - f)
    da_g = dc * i * (1.0 - g * g)
    return (da_i, da_f, da_g, da_o), dc * f


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
