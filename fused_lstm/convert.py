"""To and from torch.nn.LSTM, and what would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .dispatch import Plan, choose_backend
from .layer import LSTM, TorchLSTM

M = TypeVar("M", bound=nn.Module)


def explain(
    lstm: LSTM,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
) -> Plan:
    """What would run for this call, without running it: the backend, how, why, why not the others; and of the kernels, how
    they are launched and whether that was measured on this device.

    Takes what ``lstm(...)`` takes and raises what it would raise. ``print`` the result to read it.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(f"explain expects a fused_lstm.LSTM, got: {type(lstm).__module__}.{type(lstm).__name__}")
    problem = lstm.problem(input, hx, lengths=lengths, resets=resets)
    plan = choose_backend(problem, lstm.backend)
    if plan.backend == "triton":
        from . import launch

        device = (input.data if isinstance(input, PackedSequence) else input).device
        plan = replace(plan, kernels=launch.explain(problem, device))
    return plan


def replace_lstm(model: M, backend: str = "auto", recompute: bool = False) -> M:
    """Swap every :class:`torch.nn.LSTM` inside a model for a :class:`fused_lstm.LSTM` that shares its parameters.

    The model is changed in place and returned; a model that itself is an nn.LSTM is returned converted. Parameters stay
    the same objects, so that optimizers and ties keep working, and a module that occurs twice is replaced by one.
    Subclasses of nn.LSTM, which may compute something else, are left alone; ``LSTM.from_torch`` takes those that keep its
    forward. ``backend`` and ``recompute`` are those of :class:`fused_lstm.LSTM`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_lstm expects a torch.nn.Module, got: {type(model).__name__}")
    done: dict[nn.Module, LSTM] = {}

    def convert(module: nn.Module) -> nn.Module:
        if type(module) is not TorchLSTM:
            return module
        if module not in done:
            done[module] = LSTM.from_torch(module, backend=backend, recompute=recompute)
        return done[module]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = convert(child)
    return convert(model)
