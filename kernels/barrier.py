"""The barrier among the programs that share a batch tile and a recurrence; the launch must be cooperative.

Every program counts itself in once for each step. A counter only grows, so that nobody needs to reset it, and a program
waits for as many arrivals as all of its group make in the steps it needs.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(arrived_ptr):
    """Make known that this program's stores so far may be read."""
    tl.debug_barrier()  # a release by one thread orders only what the others of its program have done before
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(arrived_ptr, arrivals):
    """Wait until so many arrivals were counted; what was stored before them may then be read."""
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()  # none of the program's threads reads ahead of the one that waited
