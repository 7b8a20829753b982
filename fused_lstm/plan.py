"""Which way a call runs, and why: each backend says whether it serves a call, with a reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from .call import OnGPU, Problem, Sequences, Stack, States, active, forward_mode, mapped
from .gemm import tf32_allowed

BACKENDS = ("auto", "triton", "aten", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


class Way(Enum):
    """How a stack of layers is run."""

    TRITON = "triton"  # layer by layer, the recurrence by the kernels
    REFERENCE = "reference"  # ... by plain PyTorch with the explicit backward pass
    ONEDNN = "onednn"  # ... the layer by oneDNN's fused LSTM, as one op
    LOOP = "loop"  # ... by the readable loop, which torch follows op by op
    FUSED = "fused"  # torch's own LSTM
    CELL = "cell"  # a cell per layer and direction, for a single step
    PREFIX = "prefix"  # torch's own LSTM over the steps that all rows have
    STRETCHES = "stretches"  # a call of it for each stretch of time without resets
    RAGGED = "ragged"  # lengths and resets as control columns of it
    SEGMENTS = "segments"  # segments of time, whose gates are computed again in the backward pass


@dataclass(frozen=True)
class Plan:
    """The outcome: a backend, the way it will run, the reason, and why the others were not taken."""

    backend: str
    way: Way
    reason: str
    in_fp32: bool = False  # fp16 or bf16 computed in fp32, and rounded at the end
    transformed: bool = False  # by torch.func, which maps the input products and their gradients well
    rejected: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)  # how each kernel is launched, filled in by explain()

    @property
    def how(self) -> str:
        """The way in a word, and what is special about it."""
        return self.way.value + " fp32" * self.in_fp32 + ", transformed" * self.transformed

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.how})", f"because: {self.reason}"]
        lines += [f"{kernel} pass: {launches}" for kernel, launches in self.kernels.items()]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.rejected.items()])


def problem_of(
    input: Tensor, dtype: torch.dtype, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences
) -> Problem:
    """What a plan needs to know of a call that is computed in ``dtype``. Raises RuntimeError for T = 0, as torch does."""
    shape, sizes = input.shape, sequences.batch_sizes
    if sizes is not None:
        T, B = sizes.shape[0], int(sizes[0])
    else:
        T, B, _ = shape
        T, B = (B, T) if stack.batch_first else (T, B)
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    functions, cell = active(), stack.cell
    rows, K = weights[1].shape  # 4H, and H or the projection's size, which is smaller
    heads, relative = (1, "") if cell is None else (cell.heads, cell.relative)
    H = rows // (4 * heads)
    return Problem(
        "cpu" if input.is_cpu else "cuda" if input.is_cuda else input.device.type,  # the last is slow
        dtype,
        T,
        B,
        H,
        K if K != H else 0,
        stack.num_layers,
        stack.bidirectional,
        sizes is not None,
        sequences.lengths is not None,
        sequences.resets is not None,
        sequences.same_length > 0 if sizes is None else int(sizes[-1]) == B,
        len(sequences.starts),
        torch.is_grad_enabled()
        and (
            input.requires_grad
            or any([w.requires_grad for w in weights])
            or (hx is not None and (hx[0].requires_grad or hx[1].requires_grad))
        ),
        stack.recompute,
        functions,
        functions and mapped(weights),
        forward_mode(),
        heads,
        relative,
        _on_gpu(input, stack) if input.is_cuda else None,
    )


def _on_gpu(input: Tensor, stack: Stack) -> OnGPU:
    tf32, kernels_only = switches()
    return OnGPU(input.device.index, input.shape[-1], tf32, stack.dropout > 0, kernels_only)


def switches() -> tuple[bool, bool]:
    """What torch's switches ask of a call on a GPU: whether fp32 products may be TF32; that the kernels run."""
    return tf32_allowed(), torch.are_deterministic_algorithms_enabled() or not torch.backends.cudnn.enabled


@cache
def triton_interpreted() -> bool | None:
    """Whether the kernels run in Triton's interpreter; None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    if not os.environ.get("TRITON_INTERPRET"):
        return False  # without importing Triton, which takes a CPU's first call a second
    from . import launch

    return launch.INTERPRETED


@cache
def triton_too_old() -> str | None:
    """The version of a Triton older than those the kernels are meant for; None if it is new enough."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # ROCm's has another name
        return None
    return version if tuple(map(int, version.split(".")[:2])) < (3, 5) else None


@cache
def fp64_compiles() -> bool:
    from . import launch

    return launch.FP64


def supports_triton(p: Problem) -> tuple[bool, str]:
    if p.dtype not in FLOATS:
        return False, f"the kernels know {', '.join(map(str, FLOATS))}, not {p.dtype}"
    if p.device not in ("cuda", "cpu"):
        return False, f"the kernels run on CUDA and ROCm devices, not on {p.device!r}"
    interpreted = triton_interpreted()
    if interpreted is None:
        return False, "Triton is not installed (pip install triton)"
    if triton_too_old():
        return False, f"the kernels need Triton 3.5 or newer, found {triton_too_old()}"
    if p.device == "cpu" and not interpreted:
        return False, (
            "the kernels need a GPU and the input is on the CPU; only in Triton's interpreter (TRITON_INTERPRET=1 "
            "set before the first call, for tests) do they take CPU tensors"
        )
    if p.device == "cuda" and interpreted:
        return False, "TRITON_INTERPRET is set, and Triton's interpreter takes CPU tensors only"
    if p.dtype == torch.float64 and not fp64_compiles():
        return False, "fp64 needs Triton 3.9 or newer, whose compiler takes its products"
    return True, "fused kernels"


def supports_aten(p: Problem) -> tuple[bool, str]:
    if p.dtype not in FLOATS:
        return False, f"torch's LSTM knows {', '.join(map(str, FLOATS))}, not {p.dtype}"
    if p.cell:
        return False, f"torch's LSTM has no cell with {p.cell}"
    if p.device == "cuda" and p.resets:
        return False, "resets on torch's LSTM would need the number of resets on the host, and so a synchronisation"
    return True, "torch's own LSTM: " + ("cuDNN or MIOpen" if p.device == "cuda" else "oneDNN where it serves")


def supports_onednn(p: Problem) -> bool:
    """Whether the op's oneDNN engine takes the problem, fp16 and bf16 as fp32."""
    return p.device == "cpu" and p.dtype != torch.float64 and p.proj_size == 0 and torch.backends.mkldnn.is_available()


@cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU, as it does with AVX-512; where not, torch's LSTM is a loop over steps."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def better_in_fp32(p: Problem) -> bool:
    """Whether a CPU that computes in fp32 and rounds is many times faster, next to the copies of the weights."""
    if p.dtype == torch.bfloat16:
        return p.device == "cpu" and p.T > 1 and not onednn_has_bf16()
    return p.device == "cpu" and p.dtype == torch.float16


def supports_reference(p: Problem) -> tuple[bool, str]:
    if p.dtype not in FLOATS:
        return False, f"the explicit path knows {', '.join(map(str, FLOATS))}, not {p.dtype}"
    return True, "plain PyTorch with the explicit backward pass"


SUPPORTS: dict[str, Callable[[Problem], tuple[bool, str]]] = {
    "triton": supports_triton,
    "aten": supports_aten,
    "reference": supports_reference,
}


def segment_steps(T: int) -> int:
    """Steps of a segment: the root of T/2, rounded up. Fewer would take a little less memory and clearly more time."""
    return math.isqrt((T - 1) // 2) + 1


def packed_steps(p: Problem) -> float:
    """How many steps packed rows need for a CPU to run them in blocks.

    torch's own packed LSTM is a loop over steps, and its backward pass takes time by their square; only rows of one length
    does it give to oneDNN. With fewer steps than these it is faster (measured, H from 16 to 512, B to 64).
    """
    if supports_onednn(p):
        return 32 if p.needs_grad else 128
    return 256 if p.needs_grad else math.inf  # a block is a loop as well


def _way_of_aten(p: Problem) -> tuple[Way, str]:
    """How the aten backend serves a problem, and the reason."""
    if p.recompute and p.needs_grad and p.T > 1:
        n = segment_steps(p.T)
        why = f"torch's own fused LSTM, gates recomputed in the backward pass, in segments of {n} step{'s' * (n > 1)}"
        return Way.SEGMENTS, why
    if p.packed and p.device == "cpu" and packed_steps(p) <= p.T and not (p.same_length and supports_onednn(p)):
        return Way.RAGGED, "packed rows in blocks of time, each by torch's own fused LSTM"
    if p.same_length and not p.packed:
        return Way.PREFIX, "all rows have the same length: torch's own fused LSTM over so many steps"
    # A call for each stretch is worth more than control columns where the stretches have many rows (measured, H from 128 to
    # 512), in one direction, on a CPU.
    if p.stretches and not (p.lengths or p.bidirectional) and p.stretches * (128 + p.hidden_size // 2) <= p.T * p.B:
        return Way.STRETCHES, f"torch's own fused LSTM, a call for each of {p.stretches} stretches of time without resets"
    if p.lengths or p.resets:
        return Way.RAGGED, "lengths and resets as control columns of torch's own fused LSTM"
    few = (16 if p.needs_grad else max(16, p.hidden_size // 8)) >= p.B  # rows, next to the weights' size
    if p.device == "cpu" and p.T == 1 and few and not p.packed and p.dtype != torch.bfloat16:
        return Way.CELL, "T = 1: a cell per layer and direction, since torch's LSTM reorders its weights on every call"
    return Way.FUSED, "torch's own fused LSTM"


def _by_aten(p: Problem, asked: str = "", **more: object) -> Plan:
    (way, why), fp32 = _way_of_aten(p), better_in_fp32(p)
    why += ", computed in fp32 and rounded at the end, which is many times faster" * fp32
    return Plan("aten", way, asked + why, fp32, **more)


def _explicit(way: Way, p: Problem, reason: str, **more: object) -> Plan:
    """A plan of the ways that go layer by layer."""
    backend = {Way.TRITON: "triton", Way.ONEDNN: "aten"}.get(way, "reference")
    return Plan(backend, way, reason, in_fp32=way is not Way.TRITON and p.dtype in HALVES, **more)


def _recomputed(p: Problem) -> str:
    """What the explicit path adds to its reason."""
    return ", gates recomputed in the backward pass" if p.recompute and p.needs_grad else ""


def prefers_reference(p: Problem) -> str | None:
    """Why a CPU is better served by the explicit PyTorch path, as bench/run.py measures; None if it is not."""
    if p.recompute and p.needs_grad:  # there torch's LSTM, segment by segment, takes half the memory
        return None
    if p.dtype == torch.float64 and p.needs_grad and p.T > 1 and not (p.packed or p.lengths or p.resets):
        return "fp64 training on a CPU, where oneDNN has no LSTM: the explicit backward pass is faster than torch's"
    if p.heads * p.hidden_size > 256 and p.heads > 1:
        return "heads, which torch's LSTM takes as one recurrence with zeros between them: slower from so many units on"
    return None


def beside_torch(p: Problem) -> tuple[bool, str]:
    """Whether torch's own LSTM serves a call on a GPU and was measured faster there than the kernels; and the reason."""
    gpu = p.gpu
    own = p.resets or p.packed or p.transformed or p.forward_mode or (p.recompute and p.needs_grad) or p.cell or p.heads > 1
    if gpu is None or own:  # what only the kernels do, or torch's LSTM was not timed at
        return False, ""
    if gpu.dropout or gpu.kernels_only:  # two generators of masks; and the kernels repeat their bits
        return False, "; not torch's own, since " + ("dropout acts" if gpu.dropout else "torch's switches rule cuDNN out")
    from . import launch

    table = launch.timed(gpu.index)
    if table is None:
        return False, "; not measured against torch's own on this device"
    if table.kernels != launch.kernels():
        return False, f"; the kernels have changed since {table.source} was measured, python -m fused_lstm.tune does it anew"
    dtype = "tf32" if p.dtype == torch.float32 and gpu.tf32 else str(p.dtype).removeprefix("torch.")
    near = table.nearest(launch.Timing(
        dtype, p.needs_grad, p.lengths, p.T, p.B, gpu.input_size, p.hidden_size, p.num_layers, 1 + p.bidirectional,
        p.proj_size,
    ))  # fmt: skip
    if near is None:
        return False, f"; nothing like this call in {table.source}"
    ratio = near.torch_us / near.kernels_us
    words = f"{ratio:.2f}x as fast as torch's own at the nearest size measured, {near}, in {table.source}"
    return ratio < 1, f"the kernels are {words}" if ratio < 1 else f"; {words}"


def check_backend(backend: str) -> None:
    """Raise ValueError unless it is a backend's name, or "auto"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(map(repr, BACKENDS))}, got: {backend!r}")


def choose(p: Problem, backend: str = "auto") -> Plan:
    """The plan for a problem.

    torch's own LSTM knows neither vmap nor forward-mode AD, and is slow under the other transforms of torch.func; the
    kernels do not know forward-mode AD. There the explicit path in plain PyTorch steps in, whichever backend was asked for.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: the backend that was asked for cannot serve the problem; says why.
    """
    check_backend(backend)
    plan = _choose(p, backend)
    if p.forward_mode:
        why = "forward-mode AD, which torch follows op by op through the readable loop"
        return _explicit(Way.LOOP, p, why, rejected=plan.rejected)
    if p.transformed and p.ensemble and plan.backend == "aten" and supports_onednn(p):
        why = "vmap over weights: a call of oneDNN's fused LSTM for each member"
        return _explicit(Way.ONEDNN, p, why, rejected=plan.rejected)
    if p.transformed:
        way = Way.TRITON if plan.backend == "triton" else Way.REFERENCE
        why = "torch.func: vmap's members become batch rows, or recurrences of one call if each has weights of its own"
        return _explicit(way, p, why, transformed=True, rejected=plan.rejected)
    return plan


def _choose(p: Problem, backend: str) -> Plan:
    if backend != "auto":
        ok, reason = SUPPORTS[backend](p)
        if not ok:
            raise RuntimeError(f"backend={backend!r} cannot serve this call: {reason}")
        if backend == "aten":
            return _by_aten(p, "asked for; ")
        return _explicit(Way(backend), p, f"asked for; {reason}{_recomputed(p)}")
    rejected = {}
    if p.device == "cuda":
        ok, reason = supports_triton(p)
        if ok:
            faster, words = beside_torch(p)
            if not faster:
                return _explicit(Way.TRITON, p, f"{reason}{_recomputed(p)}{words}")
            reason = words
        rejected["triton"] = reason
    else:
        rejected["triton"] = "slower than torch's LSTM in the interpreter" if triton_interpreted() else supports_triton(p)[1]
        why = prefers_reference(p)
        if why is not None:
            return _explicit(Way.REFERENCE, p, why, rejected=rejected)
    ok, reason = supports_aten(p)
    if ok:
        return _by_aten(p, rejected=rejected)
    rejected["aten"] = reason
    ok, reason = supports_reference(p)
    if not ok:
        raise RuntimeError(f"no backend can serve this call: {reason}")
    return _explicit(Way.REFERENCE, p, reason + _recomputed(p), rejected=rejected)


def choose_compiled(
    device: str, dtype: torch.dtype, projected: bool, transformed: bool, differentiated: bool, backend: str,
    heads: int = 1, cell: str = "",
) -> tuple[str, bool, bool]:  # fmt: skip
    """The way of a call in a graph of torch.compile or torch.export, in a word, and a Plan's two flags: as one op per layer,
    whatever T and B will be.

    A derivative taken by torch.func inside the graph is the exception: torch differentiates an op only outside of it, and
    the readable loop is compiled, step after step.

    Raises:
        ValueError, RuntimeError: as :func:`choose`.
    """
    own = dict(proj_size=int(projected), transformed=transformed, heads=heads, cell=cell)
    p = Problem(device, dtype, T=2, B=2, hidden_size=2, **own)
    plan = choose(p, backend)
    if differentiated:
        return Way.LOOP.value, dtype in HALVES, False
    if plan.backend != "aten":
        return plan.way.value, plan.in_fp32, plan.transformed
    return (Way.ONEDNN if supports_onednn(p) else Way.REFERENCE).value, dtype in HALVES, False


def unknown_sizes() -> bool:
    """Whether a graph may hold oneDNN's workspace, whose size is not known before the op has run. torch.export and
    ``torch.compile(fullgraph=True)`` allow that. Without ``fullgraph`` such a tensor would break the graph; then the op does
    not return the workspace, and computes it again in the backward pass."""
    return torch.compiler.is_exporting() or torch._dynamo.config.capture_dynamic_output_shape_ops


for _function in (choose_compiled, unknown_sizes):  # the compiler is to call these, not to look inside
    _function._dynamo_marked_constant = True
