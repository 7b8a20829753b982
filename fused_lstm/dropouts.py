"""Dropout beyond nn.LSTM's: of the recurrent weights, and of features by one mask for the whole of a sequence."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Result, Sequences, Stack, States
from .functional import run

L = TypeVar("L", bound=nn.Module)


class Dropouts(NamedTuple):
    """A layer's probabilities: of :func:`weight_drop`, then of :func:`variational_dropout`."""

    weight: float = 0.0
    input: float = 0.0
    between: float = 0.0
    output: float = 0.0

    def run(
        self, x: Tensor, hx: States, weights: Sequence[Tensor], stack: Stack, sequences: Sequences, backend: str
    ) -> Result:
        """:func:`fused_lstm.functional.run` in training. Masks are drawn in the order in which they are used: those of all
        weights, of the input, between the layers, of the output."""
        if self.weight:
            step = len(weights) // (stack.num_layers * stack.directions)
            weights = [F.dropout(w, self.weight) if k % step == 1 else w for k, w in enumerate(weights)]
        time, sizes, rows = int(stack.batch_first), sequences.batch_sizes, None
        if sizes is None:
            B = x.shape[1 - time]
        else:  # under a compiler, which knows no numbers, hx is always given
            B, N = hx[1].shape[1] if hx is not None else int(sizes[0]), x.shape[0]
            starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=N)
            rows = (torch.arange(N, device="cpu") - starts).to(x.device, non_blocking=True)  # of the batch, by data row

        def drop(p: float, data: Tensor) -> Tensor:
            if not p:
                return data
            mask = F.dropout(data.new_ones(B, data.shape[-1]), p)
            return data * (mask.unsqueeze(time) if rows is None else mask[rows])

        stack = stack._replace(between=partial(drop, self.between) if self.between else None)
        y, h_n, c_n = run(drop(self.input, x), hx, weights, stack, sequences, backend)
        return drop(self.output, y), h_n, c_n


NO_DROPOUTS = Dropouts()


def weight_drop(layer: L, p: float) -> L:
    """DropConnect of an LSTM's recurrent weights: in training, each call zeroes elements of every W_hh, of each layer and
    direction, with probability ``p`` and scales the others by 1/(1-p); the same elements in all steps and batch rows.

    Wan et al. 2013 (https://proceedings.mlr.press/v28/wan13.html); for LSTMs Merity et al. 2018
    (https://arxiv.org/abs/1708.02182), AWD-LSTM, with p = 0.5. In eval mode the weights are used as they are. Parameters and
    ``state_dict`` stay what they are.

    Args:
        layer: a :class:`fused_lstm.LSTM`, changed in place.
        p: the probability; 0 takes it off again.

    Returns:
        The layer.

    Raises:
        TypeError: ``layer`` is no fused_lstm.LSTM.
        ValueError: ``p`` is not in [0, 1], or the layer has a weight drop already.
    """
    return _set(layer, "weight_drop", weight=p)


def variational_dropout(layer: L, input: float = 0.0, between: float = 0.0, output: float = 0.0) -> L:
    """Dropout by one mask for the whole of a sequence: in training, each call draws for each batch row which features to
    zero, the same ones in all its steps, and scales the others by 1/(1-p).

    Gal & Ghahramani 2016 (https://arxiv.org/abs/1512.05287); the LockedDropout of AWD-LSTM (Merity et al. 2018,
    https://arxiv.org/abs/1708.02182). It does not act on the recurrent connection, where :func:`weight_drop` does, nor on
    h_n and c_n, nor in eval mode. A call is a sequence, whatever its resets; each :meth:`fused_lstm.LSTM.step` is one, too.

    Args:
        layer: a :class:`fused_lstm.LSTM`, changed in place.
        input: probability for the features of the input.
        between: for those that each layer gives to the next, in place of nn.LSTM's ``dropout``, which draws anew for each
            step.
        output: for those of the output. With all three at 0 it is taken off again.

    Returns:
        The layer.

    Raises:
        TypeError: ``layer`` is no fused_lstm.LSTM.
        ValueError: a probability is not in [0, 1], the layer has a variational dropout already, or a ``dropout`` of its own
            beside ``between``.
    """
    _set(layer, "variational_dropout", input=input, between=between, output=output)
    if between and layer.num_layers == 1:
        warnings.warn("variational_dropout: between acts between stacked layers, and there is one layer", stacklevel=2)
    return layer


def _set(layer: L, name: str, **probabilities: float) -> L:
    old = getattr(layer, "_dropouts", None)
    if not isinstance(old, Dropouts):
        raise TypeError(f"{name} expects a fused_lstm.LSTM, got: {type(layer).__module__}.{type(layer).__name__}")
    for key, p in probabilities.items():
        if not isinstance(p, Real) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(f"{name}: {'p' if key == 'weight' else key} should be a number in range [0, 1], got {p!r}")
    if any(probabilities.values()) and any(getattr(old, key) for key in probabilities):
        raise ValueError(f"{name} expects a layer without one, got {old}: {name}(layer, 0) takes it off")
    if probabilities.get("between") and layer.dropout:
        raise ValueError(f"{name}: between takes the place of dropout, which should be 0, got {layer.dropout}")
    layer._dropouts = old._replace(**probabilities)
    return layer
