"""What the kernels are given: pointers, each with its shape; None for what is not there, which is known at compile time."""

from typing import Any, NamedTuple


class Forward(NamedTuple):
    """Of the forward pass. None: an initial state of zero, no bias, or nothing to be saved."""

    gates_ptr: Any  # (N, R, 4, H) in: input pre-activations; out, if c_ptr is given: activated gates
    w_hh_ptr: Any  # (R, 4, H, H)
    b_hh_ptr: Any  # (R, 4, H)
    h_ptr: Any  # (N, R, H) out; read at the previous step's rows. Persistent: full of 0xFF before
    c_ptr: Any  # (N, R, H) out
    h0_ptr: Any  # (R, B, H)
    c0_ptr: Any  # (R, B, H)
    hn_ptr: Any  # (R, B, H) out; stepwise with norms also the state between launches
    cn_ptr: Any  # (R, B, H) out
    # Stepwise: (R, B, H), the cell state between launches, in the accumulator's dtype; may be cn_ptr. None for one step
    # without norms.
    running_ptr: Any = None
    zeros_ptr: Any = None  # Persistent: (max(4*H, 512),) zeros
    units_ptr: Any = None  # (R, n, H): as there are peepholes p_i, p_f, p_o; gains of the norm of products for
    # i, f, g, o; gain and bias of the cell state's norm. None: torch's cell
    seed_ptr: Any = None  # (1,) int64 of zoneout's masks; None: zoneout by its expected value
    products_ptr: Any = None  # Stepwise, with norms: (R, B, 4, H) of h with W_hh, in the accumulator's dtype


class Backward(NamedTuple):
    """Of the backward pass. None: a gradient or an initial state of zero."""

    dy_ptr: Any  # (N, R, H)
    dhn_ptr: Any  # (R, B, H)
    dcn_ptr: Any  # (R, B, H)
    gates_ptr: Any  # (N, R, 4, H) activated. Stepwise: may be dgates_ptr
    c_ptr: Any  # (N, R, H)
    h_ptr: Any  # (N, R, H)
    h0_ptr: Any  # (R, B, H)
    c0_ptr: Any  # (R, B, H)
    w_hh_ptr: Any  # (R, 4, H, H)
    dgates_ptr: Any  # (N, R, 4, H) out; read at the next step's rows. Persistent: full of 0xFF before
    h_prev_ptr: Any  # (N, R, H) out; None with norms
    dc0_ptr: Any  # (R, B, H) out; None where nobody asks for it
    # Stepwise: (R, B, H), the gradient by the cell state between launches, as above; may be dc0_ptr.
    running_ptr: Any = None
    zeros_ptr: Any = None  # Persistent: as above
    box_ptr: Any = None  # Persistent, split over four programs: (R, 2, owners(H), 3, B, 16) int64, zeros before
    units_ptr: Any = None  # as above, and the next
    seed_ptr: Any = None
    # Of zoneout, (R, B, H) in the accumulator's dtype, out: the gradient by h0 beside the one through the products.
    # Stepwise, also with norms: what of the gradient by h passes on from launch to launch.
    passed_ptr: Any = None
    # Of norms, in the accumulator's dtype; nothing is then read from c_ptr and h_ptr.
    c_prev_ptr: Any = None  # (N, R, H) cell state before each step
    c_centered_ptr: Any = None  # (N, R, H) f * c_prev + i * g minus its mean
    c_rstd_ptr: Any = None  # (N, R) what its norm multiplies that by
    products_ptr: Any = None  # (N, R, 4, H) of h_prev with W_hh, minus their mean
    products_rstd_ptr: Any = None  # (N, R) likewise
    dshown_ptr: Any = None  # (N, R, H) out: the gradient by what tanh sees
    # Stepwise, with norms: (R, B, H), the gradient by h through the products of the next step; and, in the tensors' dtype,
    # (R, B, 4, H) out, the one by those of this step.
    dh_ptr: Any = None
    dproducts_ptr: Any = None
