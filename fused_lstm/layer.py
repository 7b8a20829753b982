"""The modules: a drop-in for torch.nn.LSTM, and one for torch.nn.LSTMCell; to and from torch's, and what would run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from .call import PLAIN, Problem, Sequences, Stack, States, as_resets, numberless
from .cell import Cell, checked_cell
from .checks import cast_dtype, check_like, check_weights
from .dropouts import NO_DROPOUTS
from .functional import Earlier, run, settle, uncoupled
from .plan import Plan, check_backend, choose, problem_of, switches

L = TypeVar("L", bound=nn.RNNBase)
M = TypeVar("M", bound=nn.Module)
TorchLSTM = nn.LSTM  # torch's class, also while a user has set torch.nn.LSTM to ours to build a model


class LSTM(nn.RNNBase):
    """A drop-in for :class:`torch.nn.LSTM`: the same arguments, parameters, ``state_dict``, results and errors.

    Args:
        input_size: features I of the input.
        hidden_size: hidden units H.
        num_layers: stacked layers.
        bias: whether the gates have biases.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...).
        dropout: probability of zeroing an element of every layer's output but the last's, while training.
        bidirectional: run each layer in both directions of time.
        proj_size: size P of a projection of the hidden state; 0 for none.
        device, dtype: of the parameters; fp16, bf16, fp32 or fp64.
        backend: ``"auto"``, ``"triton"`` (the fused kernels), ``"aten"`` (torch's own LSTM) or ``"reference"`` (plain
            PyTorch). All but ``"auto"`` fail rather than let another backend step in. See :func:`fused_lstm.explain`.
        recompute: train with less memory in more time. The gates, most of what a backward pass keeps of an LSTM, are not
            kept but computed again. Results are the same up to rounding; without gradients nothing changes.
        cell: a relative of torch's cell, :class:`fused_lstm.Cell`; None: torch's.

    Call with ``input`` of shape (T, B, I), (B, T, I) if ``batch_first``, (T, I) unbatched, or a PackedSequence, and
    optionally ``hx = (h0, c0)`` of shapes (D*num_layers, B, Hout) and (D*num_layers, B, H), without B when unbatched;
    D is the number of directions, Hout is P, or H without a projection. Returns ``output, (h_n, c_n)``: output like
    input with D*Hout features, the states shaped like h0 and c0. Two keyword arguments say how padded sequences lie in
    time, without sorting and without a host sync on CUDA:

    - ``lengths``, (B,) integers from 0 to T: the steps of each batch row. Output past them is zero, h_n and c_n are those
      of a row's last step (h0 and c0 if it has none), and the reverse direction starts there.
    - ``resets``, bool, integer or float, (T, B), (B, T) if ``batch_first``, (T,) unbatched. Where not zero, a new episode
      begins at t: h and c are zero before step t, also at t = 0, where hx is then ignored. Neither values nor gradients
      pass, in any layer or direction.

    Data that arrives one time step at a time goes through :meth:`step`.

    Raises:
        TypeError, ValueError: on construction, as torch.nn.LSTM.
        ValueError: wrong number of dimensions or wrong dtype of the input; lengths or resets that do not fit.
        RuntimeError: wrong sizes or devices, T = 0, or a backend that cannot serve the call.

    The equations, in torch's gate order i, f, g, o (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000)::

        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      forget gate
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)      candidate
        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      update (input) gate
        c' = f * c + i * g                              cell
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      output gate
        h' = o * tanh(c')                               hidden state; W_hr (o * tanh(c')) with a projection
    """

    backend: str = "auto"  # on the class too, so that pickles from before an option existed still load
    recompute: bool = False
    cell: Cell | None = None
    _dropouts = NO_DROPOUTS
    _assigned: tuple[tuple[int, Tensor, Tensor], ...] = ()  # by _flat_weights: a weight's index, the weight, its stand-in

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def __init__(
        self, *args: Any, backend: str = "auto", recompute: bool = False, cell: Cell | None = None, **kwargs: Any
    ) -> None:
        own = _checked(backend, recompute) | {"cell": checked_cell(cell)}
        self.__dict__["reset_parameters"] = lambda: None  # which RNNBase calls before there are the weights of the cell
        super().__init__("LSTM", *args, **kwargs)
        del self.__dict__["reset_parameters"]
        self.__dict__.update(own)
        if self.cell is not None:
            self._take_cell(self.cell)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cell":
            raise AttributeError("cell is set on construction: make another layer, and load the state_dict")
        if name == "dropout" and value and (between := self._dropouts.between):
            raise ValueError(f"dropout should be 0 beside variational_dropout's between={between}, got {value}")
        nn.Module.__setattr__(self, name, value)  # RNNBase's writes to _flat_weights, which computes parametrized weights

    def _take_cell(self, cell: Cell) -> None:
        """Give the layer the parameters of another cell than torch's."""
        cell.check_sizes(self.hidden_size, self.bias, self.proj_size)
        own, names = cell.own(self.hidden_size), []
        for direction in self._all_weights:
            suffix = direction[0].removeprefix("weight_ih")
            for name in direction:
                old = self._parameters[name]
                if not name.startswith("weight_hr"):
                    width = [n // cell.heads if name.startswith("weight_hh") else n for n in old.shape[1:]]
                    self._parameters[name] = nn.Parameter(old.new_empty(cell.gates * self.hidden_size, *width))
            for name, shape in own.items():
                self.register_parameter(name + suffix, nn.Parameter(old.new_empty(shape)))
                direction.append(name + suffix)
            names += direction
        self._flat_weights_names = names
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.cell is None:
            return
        H, forget = self.hidden_size, self.cell.forget_bias
        f = slice(0, H) if self.cell.coupled else slice(H, 2 * H)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("norm_"):
                    parameter.fill_(0.0 if name.startswith("norm_c_bias") else 1.0)
                if forget is not None and name.startswith("bias_"):
                    parameter[f] = forget if name.startswith("bias_ih") else 0.0

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:
        # RNNBase stores a list, which would still hold the old weights when functional_call or parametrizations replaced
        # them. So they are looked up at each call. A tuple, so that nobody changes an entry in vain.
        return tuple(self._weights(None))

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        # What somebody puts in a weight's place here, for recurrent dropout say, calls take, as nn.LSTM's do: as long as the
        # module holds that weight, and computes none by that name.
        if len(weights) != len(self._flat_weights_names):
            raise ValueError(f"_flat_weights should be {len(self._flat_weights_names)} tensors, got {len(weights)}")
        pairs = enumerate(zip(map(self._held, self._flat_weights_names), weights, strict=True))
        self.__dict__["_assigned"] = tuple((k, old, w) for k, (old, w) in pairs if old is not None and w is not old)

    def _held(self, name: str) -> Tensor | None:
        return self._parameters.get(name, self.__dict__.get(name))

    def _init_flat_weights(self) -> None:
        # RNNBase refers to its weights weakly, to see that its list is old; torch cannot swap a tensor so referred to.
        self._flat_weight_refs = [None] * len(self._flat_weights_names)
        # torch.fx takes modules of torch.nn for leaves, and asks the module, not its class.
        self.__dict__.update(_assigned=(), _earlier=Earlier(), __module__="torch.nn")

    def __getstate__(self) -> dict[str, Any]:
        without = {"_assigned": (), "_earlier": None, "_compiled_call_impl": None}  # which would run this module
        return super().__getstate__() | without

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({k: v for k, v in state.items() if k != "_flat_weights"})
        self._init_flat_weights()

    def _check_states(self, x: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], batch_sizes: Tensor | None) -> None:
        # As check_forward_args and check_like, which are slow, and so only asked for their words.
        B = x.shape[0 if self.batch_first else 1]
        if batch_sizes is not None:  # numbers that no compiler knows: then the op compares them
            B = hx[0].shape[1] if torch.compiler.is_compiling() or numberless(x) else int(batch_sizes[0])
        (h, c), H, like = hx, self.hidden_size, (x.dtype, x.device)
        K, P = self.num_layers * (2 if self.bidirectional else 1), self.proj_size or H
        if (h.shape, c.shape, h.dtype, h.device, c.dtype, c.device) != ((K, B, P), (K, B, H), *like, *like):
            self.check_forward_args(x, hx, batch_sizes)
            check_like(x, hx, weights)

    @classmethod
    def from_torch(cls, module: nn.LSTM, backend: str = "auto", recompute: bool = False) -> LSTM:
        """The same layer as ``module``, sharing its parameters, hooks and mode of training.

        A subclass of nn.LSTM whose forward is its own needs a class of ours that has one, too: else it would be lost.
        """
        if not isinstance(module, TorchLSTM) or is_parametrized(module):
            raise TypeError(f"from_torch expects a torch.nn.LSTM, got: {type(module).__name__}")
        if type(module).forward is not TorchLSTM.forward and cls.forward is LSTM.forward:
            raise TypeError(
                f"from_torch expects torch.nn.LSTM's own forward, got: {type(module).__name__}, which has another: give a "
                "subclass of fused_lstm.LSTM its methods, and call from_torch of that class"
            )
        return _share(module, cls, **_checked(backend, recompute))

    def to_torch(self) -> nn.LSTM:
        """A torch.nn.LSTM that shares this layer's parameters, hooks and mode of training."""
        if is_parametrized(self):
            raise TypeError(f"to_torch expects no parametrizations, got: {type(self).__name__}")
        if self.cell is not None and not self.cell.torchs:
            raise TypeError(f"to_torch expects torch's own cell, got: {self.cell}")
        if self._dropouts != NO_DROPOUTS:
            raise TypeError(f"to_torch expects no dropout that nn.LSTM does not have, got: {self._dropouts}")
        return _share(self, TorchLSTM)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat weight buffer to keep in order. Here for code that calls it."""

    def extra_repr(self) -> str:
        backend = f", backend={self.backend}" if self.backend != "auto" else ""
        cell = "" if self.cell is None else f", cell={self.cell}"
        dropouts = f", {self._dropouts}" if self._dropouts != NO_DROPOUTS else ""
        return super().extra_repr() + backend + (", recompute=True" if self.recompute else "") + cell + dropouts

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        weights, tell = self._weights(), None
        plain = type(input) is Tensor and lengths is None and resets is None and not torch.compiler.is_compiling()
        if plain and (hx is None or type(hx) is tuple) and self.cell is None and self._dropouts is NO_DROPOUTS:
            tensors = (input, *weights) if hx is None else (input, *hx, *weights)
            key = (
                input.shape, len(tensors), torch.is_grad_enabled(), None if input.is_cpu else switches(),
                self.backend, self.training, self.recompute, self.dropout, self.batch_first, self.bias, self.num_layers,
                self.bidirectional,
            )  # fmt: skip
            found = self._earlier.find(key, tensors)
            if found is not None:
                runner, stack = found
                output, h_n, c_n = runner(input, hx, weights, stack, PLAIN)
                return output, (h_n, c_n)
            tell = partial(self._earlier.keep, key, tensors)
        stack = self._stack()
        x, states, sequences = self._prepare(input, hx, weights, stack, lengths, resets)
        if self.training and self._dropouts != NO_DROPOUTS:
            output, h_n, c_n = self._dropouts.run(x, states, weights, stack, sequences, self.backend)
        else:
            tell = tell if x is input else None
            output, h_n, c_n = run(x, states, weights, stack, sequences, self.backend, tell=tell)
        if x is input:
            return output, (h_n, c_n)
        if isinstance(input, PackedSequence):
            packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self.permute_hidden((h_n, c_n), input.unsorted_indices)
        return output.squeeze(0 if self.batch_first else 1), (h_n.squeeze(1), c_n.squeeze(1))

    def step(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None, *, inplace: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step, for data that arrives step by step: as a call with a sequence of one step, hooks included.

        Nothing in it waits for a GPU. A CUDA graph can capture it, after a first call outside, which compiles the kernels:
        with ``inplace``, each replay reads the captured input, moves the captured state on and fills the captured output.

        Args:
            input: (B, I), or (I,) unbatched, of the weights' dtype.
            state: h (num_layers, B, Hout) and c (num_layers, B, H), without B when unbatched, of the input's dtype; zero
                if None.
            inplace: write the new state into the tensors of ``state`` and return these. For calls without gradients.

        Returns:
            output, (B, Hout) or (Hout,), which never shares memory with the state; (h, c) after the step.

        Raises:
            ValueError: wrong number of dimensions or wrong dtype; ``inplace`` without two tensors to write to.
            RuntimeError: wrong sizes or devices, a bidirectional layer, ``inplace`` where a gradient is needed.
        """
        if self.bidirectional:
            raise RuntimeError("step: a bidirectional layer cannot be streamed, its reverse direction begins at the end")
        dims = input.dim() if isinstance(input, Tensor) else 0
        if dims not in (1, 2):
            got = f"shape {tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"step: expected one step of input, (B, I) or (I,), got {got}")
        if state is not None and len(state) != 2:
            raise ValueError(f"step: expected state to be two tensors, (h, c), got {len(state)}")
        if state is not None and not state[0].dim() == state[1].dim() == dims + 1:
            raise ValueError(
                f"step: with an input of {dims} dimensions, expected h and c of {dims + 1}, got shapes "
                f"{tuple(state[0].shape)} and {tuple(state[1].shape)}"
            )
        # One tensor given twice, or two views that begin at the same address. A compiler knows no addresses, and a tensor
        # without memory has address 0.
        if inplace and (
            state is None
            or state[0] is state[1]
            or (not torch.compiler.is_compiling() and state[0].data_ptr() == state[1].data_ptr() != 0)
        ):
            got = "None" if state is None else "one tensor twice"
            raise ValueError(f"step: inplace=True writes to the tensors of state, expected (h, c), got {got}")
        time = 1 if self.batch_first and dims == 2 else 0
        output, new = self(input.unsqueeze(time), state)
        if inplace:
            if new[0].requires_grad:
                raise RuntimeError(
                    "step: inplace=True overwrites what a gradient needs, expected torch.no_grad() or input, state and "
                    "weights that require no gradient, got some that do"
                )
            if new[0].dtype != state[0].dtype:  # by autocast; all else was compared by the call
                raise ValueError(f"step: expected a state of the new one's dtype {new[0].dtype}, got {state[0].dtype}")
            for old, value in zip(state, new, strict=True):
                old.copy_(value)
            new = state[0], state[1]
        return output.squeeze(time), new

    def problem(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> Problem:
        """What a call with these arguments would ask of a backend; raises what the call would raise."""
        weights, stack = self._weights(), self._stack()
        x, states, sequences = self._prepare(input, hx, weights, stack, lengths, resets)
        return problem_of(x, cast_dtype(x), states, *uncoupled(weights, stack), sequences)

    def _stack(self) -> Stack:
        dropout = self.dropout if self.training else 0.0
        own = self.recompute, self.cell, self.training
        return Stack(self.bias, self.num_layers, dropout, self.bidirectional, self.batch_first, *own)

    def _weights(self, *default: None) -> list[Tensor]:
        # Once for a call: a parametrized weight is computed whenever it is asked for.
        names, held = self._flat_weights_names, self._parameters
        try:
            weights = [held[name] for name in names]  # nn.Module's own look-up is slow
        except KeyError:
            weights = [getattr(self, name, *default) for name in names]
        for k, replaced, w in self._assigned:
            if self._held(names[k]) is replaced:
                weights[k] = w
        return weights

    def _prepare(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None,
        weights: list[Tensor],
        stack: Stack,
        lengths: Tensor | Sequence[int] | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, States, Sequences]:
        """Check the arguments; returns batched data, batched states (None: zero) and how the sequences lie in time."""
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        batch_sizes = None
        if isinstance(input, PackedSequence):
            x, batch_sizes = input.data, input.batch_sizes
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            elif torch.compiler.is_compiling() or numberless(x):  # there the op has no other way to tell B
                order, K = input.sorted_indices, self.num_layers * (2 if self.bidirectional else 1)
                B = int(batch_sizes[0]) if order is None else order.shape[0]
                c0 = x.new_zeros(K, B, self.hidden_size)
                hx = (x.new_zeros(K, B, self.proj_size) if self.proj_size else c0, c0)
        else:
            dims = input.dim()
            if dims not in (2, 3):
                raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
            x = input if dims == 3 else input.unsqueeze(0 if self.batch_first else 1)
            if hx is not None:
                if hx[0].dim() != dims or hx[1].dim() != dims:
                    raise RuntimeError(
                        f"For {'batched' if dims == 3 else 'unbatched'} {dims}-D input, hx and cx should "
                        f"also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                    )
                hx = (hx[0], hx[1]) if dims == 3 else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        # RNNBase's check_input asks _flat_weights for a dtype, which computes parametrized weights once more: slow, and with
        # spectral_norm a further iteration. So it is asked only where it would fail; check_like looks at dtypes as well.
        wrong = (batch_sizes is not None and x.dim() != 2) or x.shape[-1] != self.input_size
        if wrong or (x.dtype != weights[0].dtype and self._flat_weights_names[0] in self._parameters):
            self.check_input(x, batch_sizes)
        if hx is not None:
            self._check_states(x, hx, weights, batch_sizes)
        check_weights(x, weights, stack, (self.input_size, self.hidden_size, self.proj_size), self._flat_weights_names)
        if resets is not None and x is not input and batch_sizes is None:
            resets = as_resets(resets, (input.shape[0],), x.device).unsqueeze(0 if self.batch_first else 1)
        hx, sequences = settle(x, hx, stack, batch_sizes, lengths, resets)
        return x, hx, sequences


def _checked(backend: str, recompute: bool) -> dict[str, Any]:
    """The attributes that nn.LSTM does not have."""
    check_backend(backend)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute should be of type bool, got: {type(recompute).__name__}")
    return {"backend": backend, "recompute": recompute}


# What one of the two classes keeps in its modules and the other does not, and what would go on running the old module.
OWN = (
    "_flat_weights", "_assigned", "_earlier", "__module__", "backend", "recompute", "cell", "_dropouts",
    "_compiled_call_impl", "forward",
)  # fmt: skip


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody set a forward on the module itself. Hooks that were taken off again leave the class's there."""
    return "forward" in vars(module) and getattr(module.forward, "__func__", None) is not type(module).forward


def _share(module: nn.RNNBase, cls: type[L], **own: Any) -> L:
    """A module of another class with a module's attributes: containers are copied, what they hold is shared."""
    if _has_own_forward(module):
        raise TypeError(
            f"from_torch and to_torch expect a module with its class's forward, got: {type(module).__name__} with a forward "
            "set on the module (module.forward = ...): convert first, then set it"
        )
    if module._compiled_call_impl is not None:
        warnings.warn("the compiled call of the old module is dropped: call compile() on the new one", stacklevel=3)
    new = cls.__new__(cls)  # not initialized, which would draw from the random generator
    for key, value in vars(module).items():
        if key not in OWN:
            bound = isinstance(value, MethodType) and value.__self__ is module
            value = MethodType(value.__func__, new) if bound else value
            new.__dict__[key] = value.copy() if isinstance(value, (dict, list, set)) else value
    new.__dict__.update(own)
    for key, hook in new._load_state_dict_pre_hooks.items():  # the only hooks that hold on to their module
        if getattr(hook, "with_module", False):
            new._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, new)
    new._init_flat_weights()
    return new


class LSTMCell(nn.LSTMCell):
    """A drop-in for :class:`torch.nn.LSTMCell`; h and c of one step, (B, H) or (H,)."""


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
    plan = choose(problem, lstm.backend)
    if plan.backend == "triton":
        from . import launch

        device = (input.data if isinstance(input, PackedSequence) else input).device
        plan = dataclasses.replace(plan, kernels=launch.explain(problem, device))
    return plan


def replace_lstm(model: M, backend: str = "auto", recompute: bool = False) -> M:
    """Swap every :class:`torch.nn.LSTM` inside a model for a :class:`fused_lstm.LSTM` that shares its parameters.

    The model is changed in place and returned; a model that itself is an nn.LSTM is returned converted. Parameters stay
    the same objects, so that optimizers and ties keep working, and a module that occurs twice is replaced by one.
    Subclasses of nn.LSTM, which may compute something else, are left alone; ``LSTM.from_torch`` takes those that keep its
    forward. So are those that ``torch.compile(module)`` wraps, or whose forward somebody replaced, as accelerate's hooks do.
    A compiled call (``module.compile()``) is dropped with a warning. The other arguments are those of fused_lstm.LSTM.
    """
    _checked(backend, recompute)
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_lstm expects a torch.nn.Module, got: {type(model).__name__}")
    done: dict[nn.Module, LSTM] = {}

    def convert(module: nn.Module) -> nn.Module:
        if type(module) is not TorchLSTM or _has_own_forward(module):
            return module
        if module not in done:
            done[module] = LSTM.from_torch(module, backend=backend, recompute=recompute)
        return done[module]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and name != "_orig_mod":
                parent._modules[name] = convert(child)
    return convert(model)
