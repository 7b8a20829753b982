"""Who computes a case: nn.LSTM, fused_lstm in each of its ways, and peers, where they are installed.

A provider takes torch's layer, whose weights it copies, and returns a Runner, or raises CannotRun with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import DTYPES, Case
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm

Ragged = dict[str, Tensor]  # lengths (B,) or resets (T, B), or nothing


class CannotRun(Exception):
    """A provider cannot compute a case; the message says why."""


@dataclass(frozen=True)
class Runner:
    """A layer ready to run."""

    # x (T, B, I) to the output (T, B, D * H), zero past a row's length, and, if ``states``, h_n and c_n.
    call: Callable[[Tensor], Sequence[Tensor]]
    gradients: Callable[[], dict[str, Tensor]]  # of the weights after a backward pass, by nn.LSTM's names
    parameters: Sequence[Tensor]  # those to clear before one
    plan: str = ""
    within: Callable[[], AbstractContextManager] = nullcontext  # what to do everything in
    states: bool = True


def flat(results: tuple[Tensor, tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    output, (h_n, c_n) = results
    return output, h_n, c_n


def of_module(module: nn.Module, call: Callable[[Tensor], Sequence[Tensor]], plan: str = "", **more: Any) -> Runner:
    """A module whose parameters are named as nn.LSTM's."""
    names = dict(module.named_parameters())
    return Runner(call, lambda: {name: p.grad for name, p in names.items()}, list(names.values()), plan, **more)


# --- torch


def with_torch(theirs: nn.LSTM, case: Case, ragged: Ragged) -> Runner:
    """nn.LSTM, with what its users do about lengths (pack and unpack) and resets (a loop over steps)."""
    if "lengths" in ragged:
        lengths = ragged["lengths"].cpu()  # as pack_padded_sequence wants them
        return of_module(theirs, lambda x: _packed(theirs, x, lengths), "packed")
    if "resets" in ragged:
        if case.bidirectional:
            raise CannotRun("a loop over steps cannot go backwards in time")
        keep = (~ragged["resets"])[:, None, :, None].to(theirs.weight_ih_l0.dtype)
        return of_module(theirs, lambda x: _loop(theirs, x, keep), "a loop over steps")
    return of_module(theirs, lambda x: flat(theirs(x)))


def _packed(lstm: nn.Module, x: Tensor, lengths: Tensor) -> Sequence[Tensor]:
    output, states = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output, total_length=x.shape[0])[0], *states


def _loop(lstm: nn.LSTM, x: Tensor, keep: Tensor) -> Sequence[Tensor]:
    outputs = []
    h, c = (x.new_zeros(lstm.num_layers, x.shape[1], n) for n in (lstm.proj_size or lstm.hidden_size, lstm.hidden_size))
    for step, kept in zip(x.split(1), keep, strict=True):
        output, (h, c) = lstm(step, (h * kept, c * kept))
        outputs.append(output)
    return torch.cat(outputs), h, c


def with_torch_by_hand(theirs: nn.LSTM, case: Case, ragged: Ragged) -> Runner:
    """nn.LSTM, by what a careful user may do in some cases: pad and mask the output (in one direction; c_n is then not that
    of a row's last step), or call it once for each run of steps without a reset in any row."""
    if not ragged or case.bidirectional:
        raise CannotRun("for lengths and resets in one direction")
    if "lengths" in ragged:
        valid = (torch.arange(case.T, device=ragged["lengths"].device)[:, None] < ragged["lengths"])[..., None]
        return of_module(theirs, lambda x: (theirs(x)[0] * valid,), "padded and masked", states=False)
    resets = ragged["resets"]
    starts = sorted({0, *resets.any(1).nonzero().flatten().tolist()})
    pieces = [end - start for start, end in zip(starts, [*starts[1:], case.T], strict=True)]
    keep = (~resets[starts])[:, None, :, None].to(theirs.weight_ih_l0.dtype)
    return of_module(theirs, lambda x: _pieces(theirs, x, pieces, keep), "a call between resets")


def _pieces(lstm: nn.LSTM, x: Tensor, pieces: list[int], keep: Tensor) -> Sequence[Tensor]:
    outputs = []
    h, c = (x.new_zeros(lstm.num_layers, x.shape[1], n) for n in (lstm.proj_size or lstm.hidden_size, lstm.hidden_size))
    for piece, kept in zip(x.split(pieces), keep, strict=True):
        output, (h, c) = lstm(piece, (h * kept, c * kept))
        outputs.append(output)
    return torch.cat(outputs), h, c


def with_torch_compile(theirs: nn.LSTM, case: Case, ragged: Ragged) -> Runner:
    """torch.compile of nn.LSTM, which breaks the graph at the layer."""
    if ragged:
        raise CannotRun("torch.compile is measured on plain input")
    compiled = torch.compile(theirs)
    return of_module(theirs, lambda x: flat(compiled(x)))


# --- fused_lstm


def with_fused(theirs: nn.LSTM, case: Case, ragged: Ragged, schedule: str = "", **options: Any) -> Runner:
    ours = fused_lstm.LSTM.from_torch(theirs, **options).train()
    x = torch.empty(case.T, case.B, case.I, device=theirs.weight_ih_l0.device, dtype=theirs.weight_ih_l0.dtype)
    call, given, more = partial(_call, ours, ragged), x, ragged
    if case.variant == "packed" and ragged:  # as a model does that was written for nn.LSTM
        lengths = ragged["lengths"].cpu()
        call, given = partial(_packed, ours, lengths=lengths), pack_padded_sequence(x, lengths, enforce_sorted=False)
        more = {}
    within = nullcontext
    if schedule:
        if not torch.cuda.is_available():
            raise CannotRun("needs a GPU")
        from fused_lstm import launch

        gpu, kind = launch.device(torch.cuda.current_device()), launch.arithmetic(DTYPES[case.dtype], case.dtype == "tf32")
        within = partial(by_schedule, schedule, gpu, kind, case.T, case.H, case.B, 1 + case.bidirectional)
    try:
        with within():
            plan = str(fused_lstm.explain(ours, given, **more))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CannotRun(str(error)) from error
    return of_module(ours, call, plan, within=within)


def _call(lstm: nn.Module, ragged: Ragged, x: Tensor) -> Sequence[Tensor]:
    return flat(lstm(x, **ragged))


def by_schedule(name: str, device: Any, arithmetic: str, T: int, H: int, B: int, R: int) -> AbstractContextManager:
    """The kernels by one schedule, whatever would be chosen. Raises CannotRun where the device has none that fits."""
    from fused_lstm import launch
    from fused_lstm.launch.choice import BY_NAME
    from fused_lstm.launch.schedule import PASSES, Recurrence

    schedule, configs = BY_NAME[name], []
    for kernel in PASSES:
        problem = Recurrence(kernel, arithmetic, T, H + -H % 16, B, R)
        found = [c for c in schedule.candidates(problem, device) if schedule.refusal(c, problem, device) is None]
        if not found:
            raise CannotRun(f"no {name} configuration of {problem} fits {device.name}")
        configs.append(min(found, key=lambda config: schedule.estimate(config, problem, device)))
    return launch.forced(*configs)


# --- peers


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(f"{package} is not installed ({error})") from error


def _one_plain_layer(case: Case, who: str) -> None:
    if case.layers > 1 or case.bidirectional or case.proj:
        raise CannotRun(f"{who} has one layer, one direction, no projection")


def with_torchrl(theirs: nn.LSTM, case: Case, ragged: Ragged, backend: str = "triton") -> Runner:
    """TorchRL's LSTMModule, recurrent_backend="triton"."""
    modules, tensordict = _import("torchrl.modules", "torchrl"), _import("tensordict", "tensordict")
    if backend == "triton" and not theirs.weight_ih_l0.is_cuda:
        raise CannotRun("TorchRL's Triton backend needs a GPU")
    if case.bidirectional or case.proj:
        raise CannotRun("TorchRL's Triton backend has neither two directions nor projections")
    if "lengths" in ragged:
        raise CannotRun("TorchRL's LSTMModule takes no lengths")
    lstm = nn.LSTM(case.I, case.H, case.layers, batch_first=True).to(theirs.weight_ih_l0)
    lstm.load_state_dict(theirs.state_dict())
    begins = ragged.get("resets", torch.zeros(case.T, case.B, dtype=torch.bool)).to(theirs.weight_ih_l0.device)
    module = modules.LSTMModule(
        lstm=lstm, in_keys=["x", "h", "c"], out_keys=["y", ("next", "h"), ("next", "c")],
        recurrent_backend=backend, default_recurrent_mode=True,
    )  # fmt: skip
    is_init = begins.t().contiguous()[..., None]

    def call(x: Tensor) -> Sequence[Tensor]:
        data = tensordict.TensorDict({"x": x.transpose(0, 1), "is_init": is_init}, [case.B, case.T])
        return (module(data)["y"].transpose(0, 1),)

    return of_module(lstm, call, f"torchrl {_version('torchrl')}, recurrent_backend={backend!r}", states=False)


def with_flashrnn(theirs: nn.LSTM, case: Case, ragged: Ragged, backend: str = "cuda_fused") -> Runner:
    """FlashRNN with one head: a linear layer before its recurrence."""
    run = _import("flashrnn", "flashrnn").flashrnn
    _one_plain_layer(case, "FlashRNN")
    if ragged:
        raise CannotRun("FlashRNN takes neither lengths nor resets")
    if backend != "vanilla" and not theirs.weight_ih_l0.is_cuda:
        raise CannotRun("FlashRNN's kernels need a GPU")
    dtype = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}.get(theirs.weight_ih_l0.dtype)
    if dtype is None:
        raise CannotRun("FlashRNN computes in bf16, fp16 and fp32")
    H = case.H
    w_ih = theirs.weight_ih_l0.detach().clone().requires_grad_()
    recurrent = theirs.weight_hh_l0.detach().view(4, 1, H, H).clone().requires_grad_()  # gate, head, out, in
    bias = (theirs.bias_ih_l0 + theirs.bias_hh_l0).detach().view(4, 1, H).clone().requires_grad_()

    def call(x: Tensor) -> Sequence[Tensor]:
        gates = nn.functional.linear(x.transpose(0, 1), w_ih).view(case.B, case.T, 4, 1, H)
        states, _ = run(gates, recurrent, bias, function="lstm", backend=backend, dtype=dtype)
        return (states[0].view(case.B, case.T, H).transpose(0, 1),)

    def gradients() -> dict[str, Tensor]:
        b = bias.grad.reshape(4 * H)
        return {
            "weight_ih_l0": w_ih.grad, "weight_hh_l0": recurrent.grad.reshape(4 * H, H), "bias_ih_l0": b, "bias_hh_l0": b,
        }  # fmt: skip

    plan = f"flashrnn {_version('flashrnn')}, backend={backend!r}"
    return Runner(call, gradients, [w_ih, recurrent, bias], plan, states=False)


def with_haste(theirs: nn.LSTM, case: Case, ragged: Ragged) -> Runner:
    """haste's LSTM; its gates are in the order i, g, f, o and its weights transposed."""
    haste = _import("haste_pytorch", "haste_pytorch")
    _one_plain_layer(case, "haste")
    if ragged:
        raise CannotRun("haste takes neither lengths nor resets")
    if theirs.weight_ih_l0.dtype not in (torch.float32, torch.float64):
        raise CannotRun("haste computes in fp32 and fp64")
    layer = haste.LSTM(case.I, case.H).to(theirs.weight_ih_l0).train()

    def order(w: Tensor) -> Tensor:  # its own inverse
        i, f, g, o = w.chunk(4)
        return torch.cat([i, g, f, o])

    with torch.no_grad():
        layer.kernel.copy_(order(theirs.weight_ih_l0).t())
        layer.recurrent_kernel.copy_(order(theirs.weight_hh_l0).t())
        layer.bias.copy_(order(theirs.bias_ih_l0 + theirs.bias_hh_l0))

    def gradients() -> dict[str, Tensor]:
        b = order(layer.bias.grad)
        return {
            "weight_ih_l0": order(layer.kernel.grad.t()), "weight_hh_l0": order(layer.recurrent_kernel.grad.t()),
            "bias_ih_l0": b, "bias_hh_l0": b,
        }  # fmt: skip

    plan = f"haste_pytorch {_version('haste_pytorch')}"
    return Runner(lambda x: (layer(x)[0],), gradients, list(layer.parameters()), plan, states=False)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


Provider = Callable[[nn.LSTM, Case, Ragged], Runner]


def _fused(**options: Any) -> Provider:
    return lambda theirs, case, ragged: with_fused(theirs, case, ragged, **options)


PROVIDERS: dict[str, Provider] = {
    "torch": with_torch,
    "torch-compile": with_torch_compile,
    "fused": _fused(),
    "fused-persistent": _fused(backend="triton", schedule="persistent"),
    "fused-stepwise": _fused(backend="triton", schedule="stepwise"),
    "fused-aten": _fused(backend="aten"),
    "fused-reference": _fused(backend="reference"),
    "fused-recompute": _fused(recompute=True),
    "torch-by-hand": with_torch_by_hand,
    # What a layer costs when it does not heed the lengths or resets: another result, and the least to hope for.
    "torch-plain": lambda theirs, case, ragged: with_torch(theirs, case, {}),
    "fused-plain": lambda theirs, case, ragged: with_fused(theirs, case, {}),
    "torchrl": with_torchrl,
    "flashrnn": with_flashrnn,
    "haste": with_haste,
}
PLAIN = ("torch-plain", "fused-plain")
PEERS = ("torchrl", "flashrnn", "haste")


def usual(suite: str, device: str) -> list[str]:
    """The providers of a suite, if none are asked for."""
    names = ["torch", "fused"]
    if suite in ("workloads", "grid"):
        names += ["torch-by-hand", "torch-compile"] if suite == "workloads" else []
        names += ["fused-persistent", "fused-stepwise"] if device == "cuda" else []
        names += PEERS
    if suite in ("lengths", "resets"):
        names += ["torch-by-hand", *PLAIN, "torchrl"]
    if suite == "memory":
        names += ["fused-recompute"]
    return names
