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
    hn_ptr: Any  # (R, B, H) out
    cn_ptr: Any  # (R, B, H) out
    # Stepwise: (R, B, H), the cell state between launches, in the accumulator's dtype; may be cn_ptr; None for one step.
    running_ptr: Any = None
    zeros_ptr: Any = None  # Persistent: (max(4*H, 512),) zeros
    units_ptr: Any = None  # (R, 3, H) peepholes p_i, p_f, p_o; None: torch's cell
    seed_ptr: Any = None  # (1,) int64 of zoneout's masks; None: zoneout by its expected value


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
    h_prev_ptr: Any  # (N, R, H) out
    dc0_ptr: Any  # (R, B, H) out; None where nobody asks for it
    # Stepwise: (R, B, H), the gradient by the cell state between launches, as above; may be dc0_ptr.
    running_ptr: Any = None
    zeros_ptr: Any = None  # Persistent: as above
    box_ptr: Any = None  # Persistent, split over four programs: (R, 2, owners(H), 3, B, 16) int64, zeros before
    units_ptr: Any = None  # as above, and the next
    seed_ptr: Any = None
    # Of zoneout, (R, B, H) in the accumulator's dtype, out: the gradient by h0 beside the one through the products.
    # Stepwise: what of the gradient by h passes on from launch to launch.
    passed_ptr: Any = None
