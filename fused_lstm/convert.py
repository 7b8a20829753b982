"""Weights of other libraries' LSTMs, to and from ours: Keras, flax (linen and nnx), haste. None of them need be installed.

Their cell is torch's with one bias, which becomes ``bias_ih``, beside a ``bias_hh`` of zeros (both train: freeze the second
for a bias that learns as theirs); on the way back the two are added up. Their weights are ours transposed: a kernel (I, 4H)
and a recurrent kernel (H, 4H), with a bias (4H,), in these orders of gates:

- Keras: i, f, c, o, where c is our g (``LSTMCell`` in keras/src/layers/rnn/lstm.py).
- flax: a kernel for each gate, named i, f, g, o, (I, H) or (H, H) (``LSTMCell`` in flax/linen/recurrent.py and
  flax/nnx/nn/recurrent.py); nnx's ``OptimizedLSTMCell`` has them side by side in the order i, f, g, o.
- haste: i, g, f, o (``LSTM`` in frameworks/pytorch/lstm.py).

How the weights were initialised (``unit_forget_bias``, ``forget_bias``) is all in their values. What would give other
results than the layer that is converted is refused; its weights alone, as arrays, are always taken. Arrays are whatever
numpy takes for one, or tensors; the new weights are copies. What goes out is copied, too; bf16, which numpy does not know,
goes out as fp32.

To each function ``options`` are further arguments of :class:`fused_lstm.LSTM`: ``batch_first``, ``dropout``, ``device``,
``dtype``, ``backend``, ``recompute``. The device is by default the first array's, the dtype that of all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .dropouts import NO_DROPOUTS
from .layer import LSTM

Weights = Sequence[Any]  # of one direction: a kernel (I, 4H), a recurrent kernel (H, 4H) and maybe a bias (4H,)

# What a layer's settings have to be; one that a version does not have is as it should be.
KERAS = {"activation": "tanh", "recurrent_activation": "sigmoid", "stateful": False, "time_major": False}
FLAX = {"gate_fn": "sigmoid", "activation_fn": "tanh"}
FLAX_LAYER = {"reverse": False, "merge_fn": "_concatenate"}
HASTE = ("kernel", "recurrent_kernel", "bias")
OPTIONS = ("batch_first", "dropout", "device", "dtype", "backend", "recompute")
DTYPES = ("float16", "bfloat16", "float32", "float64")
I_G_F_O = (0, 2, 1, 3)  # where haste's gates lie in our order, and ours in haste's


def from_keras(*layers: Any, **options: Any) -> LSTM:
    """A fused_lstm.LSTM with the results of Keras layers that stand one on the other: as a rule one.

    Args:
        layers: each a built ``keras.layers.LSTM``, or a ``Bidirectional`` of one, or what ``get_weights()`` of one returns:
            kernel (I, 4H), recurrent_kernel (H, 4H) and, with ``use_bias``, bias (4H,); twice that if bidirectional.
        options: see :mod:`fused_lstm.convert`; ``batch_first`` is True unless given.

    The new layer returns ``output, (h_n, c_n)`` whatever ``return_sequences`` and ``return_state`` are: the whole sequence,
    as with ``return_sequences=True``; ``h_n[-1]`` is what Keras returns without it (of a Bidirectional,
    ``torch.cat((h_n[-2], h_n[-1]), -1)``), and Keras' states are h_n[0], c_n[0], then h_n[1], c_n[1] of the reverse
    direction. A mask that ends each row is ``lengths=mask.sum(1)``; outputs past it are zero, as with
    ``zero_output_for_mask=True``.

    ``dropout`` and ``recurrent_dropout`` of Keras, which act in training only, on the input and on h with one mask for all
    steps, are not taken over: a warning says so. ``dropout=`` here acts between layers.

    Raises:
        TypeError: another kind of layer, a subclass included.
        ValueError: weights whose number or shapes do not fit, as those of a layer that is not built; settings that give
            other results: activations but tanh and sigmoid, ``go_backwards`` (convert the weights alone and call with
            ``x.flip(1)``), ``stateful``, a ``merge_mode`` but "concat".
    """
    found = []
    for layer in layers:
        found.append(_halves(layer if isinstance(layer, (list, tuple)) else _checked_keras("from_keras", layer)))
    return _lstm("from_keras", found, {"batch_first": True} | options)


def to_keras(lstm: nn.LSTM | LSTM, *layers: Any) -> list[list[np.ndarray]]:
    """Each layer's weights as ``set_weights()`` of a Keras layer takes them; those of ``layers``, if given, are set.

    Args:
        lstm: without a projection.
        layers: none, or for each of its layers a built ``keras.layers.LSTM``, or a ``Bidirectional`` of one.

    Returns:
        for each layer kernel (I, 4H), recurrent_kernel (H, 4H) and, if it has biases, bias (4H,); twice that if
        bidirectional. ``from_keras(*to_keras(lstm))`` leads back.

    Raises:
        TypeError, ValueError: as :func:`from_keras`; ValueError for a projection, or layers that are not as many.
    """
    found = [[_numpy(w) for direction in layer for w in direction] for layer in _weights("to_keras", lstm)]
    if layers and len(layers) != len(found):
        raise ValueError(f"to_keras expects a Keras layer for each of the {len(found)} layers, got {len(layers)}")
    for layer in layers:
        _checked_keras("to_keras", layer)
    for layer, weights in zip(layers, found, strict=False):
        layer.set_weights(weights)
    return found


def from_flax(*layers: Any, **options: Any) -> LSTM:
    """A fused_lstm.LSTM with the results of flax' LSTM layers that stand one on the other: as a rule one.

    Args:
        layers: each an ``nnx.LSTMCell`` or ``nnx.OptimizedLSTMCell``, an ``nnx.RNN`` of one or an ``nnx.Bidirectional`` of
            two, or the state of one of these, or the parameters of linen's modules of the same names. Parameters are
            mappings as flax makes them: of a cell, {"ii": {"kernel": (I, H)}, "if": .., "ig": .., "io": ..,
            "hi": {"kernel": (H, H), "bias": (H,)}, "hf": .., "hg": .., "ho": ..}; inside of {"params": ..} or one more name;
            {"forward_rnn": .., "backward_rnn": ..} if bidirectional.
        options: see :mod:`fused_lstm.convert`; ``batch_first`` is True unless given or the nnx module has ``time_major``.

    flax' carry is (c, h), ours (h, c); ``seq_lengths`` is ``lengths``. Parameters alone do not tell the functions of the
    gates: those of linen have to be sigmoid and tanh, as they are by default.

    Raises:
        ValueError: entries or shapes that do not fit; an nnx module with other functions than sigmoid and tanh, with
            ``reverse`` or with a ``merge_fn`` of its own.
    """
    for layer in layers:
        _check("from_flax", _entries(layer), FLAX_LAYER, "from_flax(nnx.state(module))")
    time_major = bool(layers) and _entries(layers[0]).get("time_major", False)
    return _lstm("from_flax", [_flax_directions(layer) for layer in layers], {"batch_first": not time_major} | options)


def to_flax(lstm: nn.LSTM | LSTM, layout: Literal["linen", "nnx", "nnx_optimized"] = "linen") -> list[dict[str, Any]]:
    """Each layer's weights as parameters of a flax cell.

    Args:
        lstm: without a projection.
        layout: of ``linen.LSTMCell`` and ``linen.OptimizedLSTMCell``, of ``nnx.LSTMCell``, or of ``nnx.OptimizedLSTMCell``.

    Returns:
        for each layer a dict of numpy arrays as :func:`from_flax` describes it, for ``cell.apply({"params": ..}, ...)`` or
        ``nnx.update(cell, ..)``; with zeros for biases that the layer does not have. If bidirectional, that of a
        ``Bidirectional`` of two ``RNN``: {"forward_rnn": {"cell": ..}, "backward_rnn": {"cell": ..}}.

    Raises:
        ValueError: another layout; a projection.
    """
    if layout not in ("linen", "nnx", "nnx_optimized"):
        raise ValueError(f"to_flax expects layout 'linen', 'nnx' or 'nnx_optimized', got: {layout!r}")

    def cell(kernel: Tensor, recurrent: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        x, h, b = _numpy(kernel), _numpy(recurrent), _numpy(kernel.new_zeros(kernel.shape[1]) if bias is None else bias)
        if layout == "nnx_optimized":
            return {"dense_i": {"kernel": x}, "dense_h": {"kernel": h, "bias": b}}
        inputs, hidden = _flax_names("if" if layout == "linen" else "if_")
        gates = {name: {"kernel": w} for name, w in zip(inputs, np.split(x, 4, 1), strict=True)}
        parts = zip(hidden, np.split(h, 4, 1), np.split(b, 4), strict=True)
        return gates | {name: {"kernel": w, "bias": b} for name, w, b in parts}

    found = [[cell(*weights) for weights in layer] for layer in _weights("to_flax", lstm)]
    rnns = ("forward_rnn", "backward_rnn")
    return [
        layer[0] if len(layer) == 1 else {name: {"cell": c} for name, c in zip(rnns, layer, strict=True)} for layer in found
    ]


def from_haste(*layers: Any, **options: Any) -> LSTM:
    """A fused_lstm.LSTM with the results of haste's LSTM layers that stand one on the other: as a rule one.

    Args:
        layers: each a ``haste_pytorch.LSTM`` or its ``state_dict()``: kernel (I, 4H), recurrent_kernel (H, 4H), bias (4H,).
        options: see :mod:`fused_lstm.convert`; ``batch_first`` is the first module's unless given.

    ``dropout`` of haste (DropConnect on the recurrent kernel, in training only) is not taken over: a warning says so.
    ``LayerNormLSTM``, another cell, is refused; docs/cells.md says how its weights become ours.

    Raises:
        ValueError: other entries or shapes; a module with zoneout, which also changes what it computes in eval mode. A
            ``state_dict()`` alone does not tell.
    """
    found = []
    for layer in layers:
        state = layer if isinstance(layer, Mapping) else _checked_haste(layer)
        if set(state) != set(HASTE):
            raise ValueError(
                f"from_haste expects a state_dict with the entries {', '.join(HASTE)}, got: {', '.join(state) or 'none'}"
            )
        found.append([[state[name] for name in HASTE]])
    batch_first = bool(layers) and getattr(layers[0], "batch_first", False)
    return _lstm("from_haste", found, {"batch_first": batch_first} | options, I_G_F_O)


def to_haste(lstm: nn.LSTM | LSTM) -> list[dict[str, Tensor]]:
    """Each layer's weights as ``load_state_dict()`` of a ``haste_pytorch.LSTM`` takes them, on the layer's device.

    Args:
        lstm: in one direction and without a projection.

    Returns:
        for each layer kernel (I, 4H), recurrent_kernel (H, 4H) and bias (4H,), zeros if the layer has no biases.

    Raises:
        ValueError: a bidirectional layer, which haste does not have; a projection.
    """
    layers = _weights("to_haste", lstm)
    if lstm.bidirectional:
        raise ValueError("to_haste expects a layer in one direction, as haste's are, got bidirectional=True")
    found = []
    for ((kernel, *more),) in layers:
        bias = [] if lstm.bias else [kernel.new_zeros(kernel.shape[1])]
        weights = [_reordered(w, I_G_F_O) for w in (kernel, *more, *bias)]
        found.append(dict(zip(HASTE, weights, strict=True)))
    return found


def _lstm(
    caller: str, layers: Sequence[Sequence[Weights]], options: Mapping[str, Any], order: Sequence[int] = range(4)
) -> LSTM:
    """The layer of these weights, by layer and direction, in which our gates lie at the places that ``order`` says."""
    if not layers:
        raise ValueError(f"{caller} expects one layer or more, got none")
    if wrong := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"{caller} takes the options {', '.join(OPTIONS)}, got: {', '.join(wrong)}")
    found = [[[*map(partial(_tensor, caller), HASTE, weights)] for weights in layer] for layer in layers]
    dtypes = {w.dtype for layer in found for weights in layer for w in weights}
    if len(dtypes) > 1 and options.get("dtype") is None:
        raise ValueError(f"{caller} expects arrays of one dtype, or dtype=, got: {', '.join(sorted(map(str, dtypes)))}")
    kernel, recurrent = found[0][0][:2]
    features, H, D, n = len(kernel), len(recurrent), len(found[0]), len(found[0][0])
    for k, layer in enumerate(found):
        expected = D * [[(D * H if k else features, 4 * H), (H, 4 * H), (4 * H,)][:n]]
        shapes = [[tuple(w.shape) for w in weights] for weights in layer]
        if shapes != expected:
            raise ValueError(
                f"{caller} expects layer {k} to have, for each direction, a kernel, a recurrent kernel and a bias (or none "
                f"in any layer) with the shapes {expected}, got: {shapes}"
            )
    like = {name: getattr(kernel, name) if options.get(name) is None else options[name] for name in ("device", "dtype")}
    sizes = {"num_layers": len(layers), "bias": n == 3, "bidirectional": D == 2, "proj_size": 0}
    # On the meta device initial weights draw no random numbers.
    lstm = LSTM(features, H, **sizes, **dict(options) | like | {"device": "meta"})
    ours = []
    for weights in (weights for layer in found for weights in layer):
        weights += [torch.zeros_like(bias) for bias in weights[2:]]
        ours += [_reordered(w, order).t().to(**like, copy=True, memory_format=torch.contiguous_format) for w in weights]
    lstm.load_state_dict(dict(zip(lstm._flat_weights_names, ours, strict=True)), assign=True)
    return lstm


def _weights(caller: str, lstm: nn.RNNBase) -> list[list[list[Tensor]]]:
    """The inverse of :func:`_lstm`, as copies."""
    if not isinstance(lstm, nn.RNNBase) or lstm.mode != "LSTM":
        raise TypeError(f"{caller} expects a fused_lstm.LSTM or a torch.nn.LSTM, got: {type(lstm).__name__}")
    cell = getattr(lstm, "cell", None)
    if cell is not None and not cell.torchs:
        raise TypeError(f"{caller} expects torch's own cell, got: {cell}")
    if lstm.proj_size:
        raise ValueError(f"{caller} expects no projection, got proj_size={lstm.proj_size}")
    dropouts = getattr(lstm, "_dropouts", NO_DROPOUTS)
    _warn_of_dropout("fused_lstm", dropouts._asdict(), *dropouts._fields)
    found = []
    with torch.no_grad():
        for group in lstm.all_weights:
            known = [w.float() if w.dtype == torch.bfloat16 else w for w in group]
            merged = [*known[:2], known[2] + known[3]] if lstm.bias else known
            found.append([w.t().clone(memory_format=torch.contiguous_format) for w in merged])
    D = 2 if lstm.bidirectional else 1
    return [found[k : k + D] for k in range(0, len(found), D)]


def _tensor(caller: str, name: str, array: Any) -> Tensor:
    array = array.detach() if isinstance(array, Tensor) else np.asarray(array)
    dtype, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    if dtype not in DTYPES or len(shape) not in (1, 2):
        expected = f"of 1 or 2 dimensions and of dtype {', '.join(DTYPES)}"
        raise ValueError(f"{caller} expects {name} to be {expected}, got: {dtype} of shape {shape}")
    if isinstance(array, Tensor):
        return array
    # Jax' and Keras' own bf16 is one that torch does not know.
    return torch.tensor(array.astype(np.float32) if dtype == "bfloat16" else array, dtype=getattr(torch, dtype))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _check(caller: str, found: Mapping[str, Any], expected: Mapping[str, Any], alone: str) -> None:
    for name, value in expected.items():
        got = found.get(name, value)
        got = getattr(got, "__name__", got)  # of a function
        if got != value:
            raise ValueError(
                f"{caller} expects {name}={value!r}, got: {got!r}, with which a fused_lstm.LSTM would give other results; "
                f"{alone} looks at the weights alone"
            )


def _warn_of_dropout(library: str, found: Mapping[str, Any], *names: str) -> None:
    acting = [f"{name}={found[name]}" for name in names if found.get(name)]
    if acting:
        message = f"{', '.join(acting)} of {library} is not taken over: results are the same in eval mode, not in training"
        warnings.warn(message, stacklevel=4)  # where the user calls


def _checked_keras(caller: str, layer: Any) -> list[np.ndarray]:
    """The weights of a layer of Keras, if it computes what ours does."""
    alone = "from_keras(layer.get_weights())" if caller == "from_keras" else "layer.set_weights(to_keras(lstm)[0])"
    bidirectional = type(layer).__name__ == "Bidirectional"
    inner = [getattr(layer, f"{way}_layer", None) for way in ("forward", "backward")] if bidirectional else [layer]
    if not all(type(part).__name__ == "LSTM" and hasattr(part, "get_config") for part in inner):
        kinds = " and ".join(type(part).__name__ for part in inner)
        raise TypeError(
            f"{caller} expects a keras.layers.LSTM or a Bidirectional of one, got: {type(layer).__module__}."
            f"{type(layer).__name__}{f' of {kinds}' if bidirectional else ''}; {alone} looks at the weights alone"
        )
    if bidirectional:
        _check(caller, {"merge_mode": layer.merge_mode}, {"merge_mode": "concat"}, alone)
    for part, backwards in zip(inner, (False, True), strict=False):
        _check(caller, part.get_config(), KERAS | {"go_backwards": backwards}, alone)
        if caller == "from_keras":
            _warn_of_dropout("Keras", part.get_config(), "dropout", "recurrent_dropout")
    return layer.get_weights()


def _halves(weights: Weights) -> list[Weights]:
    """What get_weights() returns, by direction."""
    if len(weights) not in (2, 3, 4, 6):
        raise ValueError(
            "from_keras expects the arrays kernel, recurrent_kernel and, with use_bias, bias, twice if bidirectional, got "
            f"{len(weights)} arrays{'' if weights else ': build the layer first, by a call or layer.build((None, None, I))'}"
        )
    n = len(weights) // 2 if len(weights) > 3 else len(weights)
    return [weights[k : k + n] for k in range(0, len(weights), n)]


def _checked_haste(layer: Any) -> Mapping[str, Tensor]:
    """The weights of a layer of haste, if it computes what ours does."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"from_haste expects a haste_pytorch.LSTM or its state_dict(), got: {type(layer).__name__}")
    _check("from_haste", vars(layer), {"zoneout": 0}, "from_haste(layer.state_dict())")
    _warn_of_dropout("haste", vars(layer), "dropout")
    return layer.state_dict()


def _entries(node: Any) -> Mapping[str, Any]:
    """Those of a mapping, or the attributes of an nnx module."""
    return node if isinstance(node, Mapping) else getattr(node, "__dict__", {})


def _flax_names(forget: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What flax calls the parts of a cell that see x and h, in our order of gates."""
    return ("ii", forget, "ig", "io"), ("hi", "hf", "hg", "ho")


def _flax_directions(node: Any) -> list[Weights]:
    """A cell's weights, or those of two directions, from whatever holds them."""
    found = _entries(node)
    _check("from_flax", found, FLAX, "from_flax(nnx.state(module))")
    if "forward_rnn" in found and "backward_rnn" in found:
        return [*_flax_directions(found["forward_rnn"]), *_flax_directions(found["backward_rnn"])]
    inside = next(iter(found.values())) if len(found) == 1 else found.get("cell", found.get("params"))
    if inside is not None:
        return _flax_directions(inside)
    names = (("dense_i",), ("dense_h",)) if "dense_i" in found else _flax_names("if_" if "if_" in found else "if")
    cell, state = {*names[0], *names[1]}, isinstance(node, Mapping)
    if not cell <= set(found) or (state and set(found) - cell - {"rngs"}):
        raise ValueError(
            "from_flax expects the parameters of an LSTMCell, with the entries ii, if, ig, io, hi, hf, hg, ho, or dense_i "
            f"and dense_h, got: {(', '.join(map(str, found)) or 'none') if state else type(node).__name__}"
        )
    return [[*_side_by_side(found, names[0], "kernel"), *_side_by_side(found, names[1], "kernel", "bias")]]


def _side_by_side(cell: Mapping[str, Any], names: Sequence[str], *entries: str) -> list[Tensor]:
    """Each of these entries of a cell's parts, from all parts as one tensor."""
    found: dict[str, list[Tensor]] = {entry: [] for entry in entries}
    for name in names:
        part = {k: v for k, v in _entries(cell[name]).items() if v is not None}
        if not set(entries) <= set(part) or (isinstance(cell[name], Mapping) and len(part) > len(entries)):
            got = ", ".join(map(str, part)) or type(cell[name]).__name__
            raise ValueError(f"from_flax expects {name} to have the entries {', '.join(entries)}, got: {got}")
        for entry, weights in found.items():
            weights.append(_tensor("from_flax", f"{name}/{entry}", part[entry]))
            first, last = (tuple(weights[k].shape) for k in (0, -1))
            if first != last:
                raise ValueError(f"from_flax expects {name}/{entry} to have the shape of {names[0]}'s, {first}, got: {last}")
    return [torch.cat(weights, -1) for weights in found.values()]


def _reordered(weight: Tensor, order: Sequence[int]) -> Tensor:
    """A weight (..., 4H) with the gates at these places."""
    gates = weight.chunk(4, -1)
    return torch.cat([gates[k] for k in order], -1)
