"""Which backend runs a call, and why: an ordered list of verifiers, each of which answers with a reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from .segments import segment_steps

BACKENDS = ("auto", "triton", "aten", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Problem(NamedTuple):
    """What one call of the layer asks for; all that a choice of backend may depend on."""

    device: str  # device type: "cpu", "cuda", ...
    dtype: torch.dtype
    T: int
    B: int
    hidden_size: int
    proj_size: int = 0
    num_layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    lengths: bool = False
    resets: bool = False
    needs_grad: bool = False
    recompute: bool = False
    transformed: bool = False  # a transform of torch.func is at work
    ensemble: bool = False  # vmap maps over the weights
    forward_mode: bool = False  # a level of forward-mode AD is open


@dataclass(frozen=True)
class Plan:
    """The outcome: a backend, how it will run, the reason, and why the others were not taken."""

    backend: str
    how: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)  # how each Triton kernel is launched, filled in by explain()

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.how})", f"because: {self.reason}"]
        lines += [f"{kernel} pass: {launches}" for kernel, launches in self.kernels.items()]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.rejected.items()])


@cache
def triton_interpreted() -> bool | None:
    """Whether the kernels run in Triton's interpreter; None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import launch

    return launch.INTERPRETED


@cache
def triton_too_old() -> str | None:
    """The version of a Triton that does not know all that the kernels use (tl.range's disable_licm); None if it does."""
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
    if p.device == "cuda" and p.resets:
        return False, "resets on torch's LSTM would need the number of resets on the host, and so a synchronisation"
    return True, "torch's own LSTM: " + ("cuDNN or MIOpen" if p.device == "cuda" else "oneDNN where it serves")


def supports_onednn(p: Problem) -> bool:
    """Whether the op's oneDNN engine takes the problem, fp16 and bf16 as fp32."""
    return p.device == "cpu" and p.dtype != torch.float64 and p.proj_size == 0 and torch.backends.mkldnn.is_available()


def supports_reference(p: Problem) -> tuple[bool, str]:
    if p.dtype not in FLOATS:
        return False, f"the explicit path knows {', '.join(map(str, FLOATS))}, not {p.dtype}"
    return True, "plain PyTorch with the explicit backward pass"


SUPPORTS: dict[str, Callable[[Problem], tuple[bool, str]]] = {
    "triton": supports_triton,
    "aten": supports_aten,
    "reference": supports_reference,
}


@cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU, as it does with AVX-512; where not, torch's LSTM is a loop over steps."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def better_in_fp32(p: Problem) -> bool:
    """Whether a CPU that computes in fp32 and rounds is many times faster, next to the copies of the weights."""
    if p.dtype == torch.bfloat16:
        return p.device == "cpu" and p.T > 1 and not onednn_has_bf16()
    return p.device == "cpu" and p.dtype == torch.float16


def how_aten(p: Problem) -> tuple[str, str]:
    """The form in which the aten backend serves a problem, and the reason for that form."""
    if p.recompute and p.needs_grad and p.T > 1:
        n = segment_steps(p.T)
        why = f"torch's own fused LSTM, gates recomputed in the backward pass, in segments of {n} step{'s' * (n > 1)}"
        if better_in_fp32(p):
            return "segments fp32", why + ", computed in fp32"
        return "segments", why
    if p.lengths or p.resets:
        why = "lengths and resets as control columns of torch's own fused LSTM"
        if p.resets and not p.lengths and not p.bidirectional and p.device == "cpu":
            why += ", or, where the steps between resets have many rows, a call for each run of them"
        if better_in_fp32(p):
            return "ragged fp32", why + ", computed in fp32"
        return "ragged", why
    few = (16 if p.needs_grad else max(16, p.hidden_size // 8)) >= p.B  # rows, next to the weights' size
    if p.device == "cpu" and p.T == 1 and few and not p.packed and p.dtype != torch.bfloat16:
        return "cell", "T = 1: a cell per layer and direction, since torch's LSTM reorders its weights on every call"
    if better_in_fp32(p):
        what = "fp16 on a CPU" if p.dtype == torch.float16 else "bf16 on a CPU without AVX-512"
        return "fp32", f"{what}: computed in fp32, which is many times faster, and rounded at the end"
    return "fused", "torch's own fused LSTM"


def _recomputed(p: Problem) -> str:
    """What the explicit path adds to its reason."""
    return ", gates recomputed in the backward pass" if p.recompute and p.needs_grad else ""


def prefers_reference(p: Problem) -> str | None:
    """Why a CPU is better served by the explicit PyTorch path, as bench/run.py measures; None if it is not."""
    if p.recompute and p.needs_grad:  # there torch's LSTM, segment by segment, takes half the memory
        return None
    if p.dtype == torch.float64 and p.needs_grad and p.T > 1 and not (p.packed or p.lengths or p.resets):
        return "fp64 training on a CPU, where oneDNN has no LSTM: the explicit backward pass is faster than torch's"
    return None


def choose_backend(p: Problem, backend: str = "auto") -> Plan:
    """The plan for a problem.

    torch's own LSTM knows neither vmap nor forward-mode AD, and is slow under the other transforms of torch.func; the
    kernels do not know forward-mode AD. There the explicit path in plain PyTorch steps in, whichever backend was asked for.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: the backend that was asked for cannot serve the problem; says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend should be one of {', '.join(map(repr, BACKENDS))}, got: {backend!r}")
    plan = _choose(p, backend)
    if p.forward_mode:
        return Plan(
            "reference", "loop", "forward-mode AD, which torch follows op by op through the readable loop", plan.rejected
        )
    if p.transformed and p.ensemble and plan.backend == "aten" and supports_onednn(p):
        return Plan("aten", "onednn", "vmap over weights: a call of oneDNN's fused LSTM for each member", plan.rejected)
    if p.transformed:
        engine = "triton" if plan.backend == "triton" else "reference"
        why = "torch.func: vmap's members become batch rows, or recurrences of one call if each has weights of its own"
        return Plan(engine, f"{engine}, transformed", why, plan.rejected)
    return plan


def _choose(p: Problem, backend: str) -> Plan:
    if backend != "auto":
        ok, reason = SUPPORTS[backend](p)
        if not ok:
            raise RuntimeError(f"backend={backend!r} cannot serve this call: {reason}")
        how, why = how_aten(p) if backend == "aten" else (backend, reason + _recomputed(p))
        return Plan(backend, how, f"asked for; {why}")
    rejected = {}
    if p.device == "cuda":
        ok, reason = supports_triton(p)
        if ok:
            return Plan("triton", "triton", f"{reason}{_recomputed(p)}; not measured against torch's own on this device")
        rejected["triton"] = reason
    else:
        rejected["triton"] = "slower than torch's LSTM in the interpreter" if triton_interpreted() else supports_triton(p)[1]
        why = prefers_reference(p)
        if why is not None:
            return Plan("reference", "reference", why, rejected)
    ok, reason = supports_aten(p)
    if ok:
        how, why = how_aten(p)
        return Plan("aten", how, why, rejected)
    rejected["aten"] = reason
    ok, reason = supports_reference(p)
    if not ok:
        raise RuntimeError(f"no backend can serve this call: {reason}")
    return Plan("reference", "reference", reason + _recomputed(p), rejected)


def how_compiled(
    device: str, dtype: torch.dtype, projected: bool, transformed: bool, differentiated: bool, backend: str
) -> str:
    """How a call runs in a graph of torch.compile or torch.export: as one op per layer, whatever T and B will be.

    A derivative taken by torch.func inside the graph is the exception: torch differentiates an op only outside of it, and
    the readable loop is compiled, step after step.

    Raises:
        ValueError, RuntimeError: as :func:`choose_backend`.
    """
    p = Problem(device, dtype, T=2, B=2, hidden_size=2, proj_size=int(projected), transformed=transformed)
    plan = choose_backend(p, backend)
    if differentiated:
        return "loop"
    if plan.backend != "aten":
        return plan.how
    return "onednn" if supports_onednn(p) else "reference"


def unknown_sizes() -> bool:
    """Whether a graph may hold a tensor whose size only its op knows, as oneDNN's workspace. Where not, as in torch.compile
    without ``fullgraph``, it would break the graph; it is then not kept but made again in the backward pass."""
    return torch.compiler.is_exporting() or torch._dynamo.config.capture_dynamic_output_shape_ops


for _function in (how_compiled, unknown_sizes):  # the compiler is to call these, not to look inside
    _function._dynamo_marked_constant = True
