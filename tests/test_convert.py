"""Conversion to and from torch.nn.LSTM, module by module and inside models."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from pairs import all_equal, assert_all_close, failure, flat, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_lstm

X = randn(5, 2, 3)
OPTIONS = [
    {},
    {"num_layers": 2, "bias": False, "bidirectional": True, "proj_size": 2, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]


class Tagger(nn.Module):
    """LSTMs at several depths, one of them used twice, and a subclass that computes something else."""

    class Doubled(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, state = super().forward(input, hx)
            return 2 * output, state

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(3, 4)
        self.layers = nn.ModuleList([nn.LSTM(4, 4, 2), nn.ModuleDict({"inner": nn.LSTM(4, 4, bidirectional=True)})])
        self.again = self.layers[0]
        self.special = self.Doubled(8, 4)
        self.cell = nn.LSTMCell(4, 4)
        self.empty = None
        self.register_module("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        for lstm in (self.first, self.layers[0], self.again, self.layers[1]["inner"], self.special):
            x = lstm(x)[0]
        return self.cell(x[-1])[0]


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().double()


def test_replace_in_a_model() -> None:
    theirs, model = tagger(), tagger()
    parameters = dict(model.named_parameters())
    assert fused_lstm.replace_lstm(model, backend="reference") is model
    for lstm in (model.first, model.layers[0], model.layers[1]["inner"]):
        assert type(lstm) is fused_lstm.LSTM
        assert lstm.backend == "reference"
    assert model.again is model.layers[0]
    assert type(model.special) is Tagger.Doubled
    assert type(model.cell) is nn.LSTMCell
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert all(p is parameters[n] for n, p in model.named_parameters(remove_duplicate=False) if n in parameters)
    torch.testing.assert_close(model(X), theirs(X))
    model.load_state_dict(theirs.state_dict())
    before = repr(model)
    assert repr(fused_lstm.replace_lstm(model)) == before, "a second time there is nothing to do"


def test_an_optimizer_goes_on() -> None:
    models = [tagger(), tagger()]
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in models]
    for step in range(3):
        if step == 1:
            fused_lstm.replace_lstm(models[1])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert_all_close(list(models[1].parameters()), list(models[0].parameters()))


def test_the_model_itself_is_an_lstm() -> None:
    model = nn.LSTM(3, 4, 2, dtype=torch.float64)
    new = fused_lstm.replace_lstm(model)
    assert type(new) is fused_lstm.LSTM
    assert all(a is b for a, b in zip(new.parameters(), model.parameters(), strict=True))
    for other in (new, nn.Linear(3, 4), Tagger.Doubled(3, 4), parametrizations.weight_norm(model, "weight_hh_l0")):
        assert fused_lstm.replace_lstm(other) is other


def test_inside_containers_and_with_dropout() -> None:
    """As an LSTM of a Sequential in training, drawing the same masks as before."""
    got = []
    for convert in (lambda m: m, fused_lstm.replace_lstm):
        torch.manual_seed(0)
        model = convert(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, 2, dropout=0.5)))
        got.append([*flat(model(X.float())), torch.get_rng_state()])
    assert all_equal(*got)


def test_bad_backend_changes_nothing() -> None:
    model = tagger()
    before = repr(model)
    error, message = failure(lambda: fused_lstm.replace_lstm(model, backend="cudnn"))
    assert error is ValueError
    assert "got: 'cudnn'" in message
    assert repr(model) == before
    assert failure(lambda: fused_lstm.LSTM.from_torch(model.first, "cudnn")) == (error, message)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_round_trip(options: dict[str, Any], training: bool) -> None:
    theirs = nn.LSTM(3, 4, dtype=torch.float64, **options).train(training)
    theirs.weight_hh_l0.requires_grad_(False)
    theirs.note = "kept"
    ours = fused_lstm.LSTM.from_torch(theirs, backend="aten")
    back = ours.to_torch()
    assert type(back) is nn.LSTM
    assert ours.backend == "aten"
    assert repr(ours) == repr(theirs)[:-1] + ", backend=aten)"
    assert repr(back) == repr(theirs)
    for module in (ours, back):
        assert module.note == "kept"
        assert module.training is training
        assert list(module.state_dict()) == list(theirs.state_dict())
        assert all(a is b for a, b in zip(module.parameters(), theirs.parameters(), strict=True))
        assert all(a is b for a, b in zip(module._flat_weights, theirs.parameters(), strict=True))
        got = []
        for m in (module, theirs):
            torch.manual_seed(0)
            got.append(flat(m(X)))
        assert_all_close(*got)
    assert vars(back).keys() == vars(theirs).keys()


def test_converted_modules_are_separate_modules() -> None:
    """They share parameters, not what is done to the modules later."""
    theirs = nn.LSTM(3, 4, 2)
    ours = fused_lstm.LSTM.from_torch(theirs)
    back = ours.to_torch()
    ours.eval().dropout = 0.5
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    ours.register_forward_hook(lambda *_: None)
    for module in (theirs, back):
        assert module.training
        assert module.dropout == 0
        assert module.weight_hh_l0.any()
        assert not module._forward_hooks
    assert theirs.weight_hh_l0 is back.weight_hh_l0


def test_conversion_draws_no_random_numbers() -> None:
    theirs = nn.LSTM(3, 4)
    before = torch.get_rng_state()
    fused_lstm.LSTM.from_torch(theirs).to_torch()
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_come_along() -> None:
    calls: list[tuple[str, type]] = []

    def hook(name: str) -> Any:
        return lambda module, *_: calls.append((name, type(module)))

    theirs = nn.LSTM(3, 4)
    theirs.register_forward_pre_hook(hook("before"))
    theirs.register_forward_hook(hook("after"))
    theirs.register_full_backward_hook(hook("backward"))
    theirs.register_state_dict_pre_hook(hook("save"))
    theirs.register_load_state_dict_pre_hook(hook("load"))
    theirs.register_load_state_dict_post_hook(hook("loaded"))
    names = ["before", "after", "backward", "save", "load", "loaded"]
    ours = fused_lstm.LSTM.from_torch(theirs)
    back = ours.to_torch()
    del theirs
    gc.collect()
    for module in (ours, back):
        calls.clear()
        module(X.float().requires_grad_())[0].sum().backward()
        module.load_state_dict(module.state_dict())
        assert calls == [(name, type(module)) for name in names]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_by_hook_comes_along() -> None:
    theirs = nn.utils.weight_norm(nn.LSTM(3, 4, dtype=torch.float64), "weight_hh_l0")
    ours = fused_lstm.LSTM.from_torch(theirs)
    with torch.no_grad():
        theirs.weight_hh_l0_g *= 2
    assert_all_close(flat(ours(X)), flat(theirs(X)))
    assert_all_close(flat(ours.to_torch()(X)), flat(theirs(X)))


@pytest.mark.parametrize("wrong", [nn.GRU(3, 4), nn.LSTMCell(3, 4), fused_lstm.LSTM(3, 4), None, nn.LSTM])
def test_from_torch_takes_an_lstm(wrong: Any) -> None:
    message = f"from_torch expects a torch.nn.LSTM, got: {type(wrong).__name__}"
    assert failure(lambda: fused_lstm.LSTM.from_torch(wrong)) == (TypeError, message)


def test_no_forward_is_lost() -> None:
    class Doubling:
        def forward(self, *args: Any) -> Any:
            output, state = super().forward(*args)
            return 2 * output, state

    class Theirs(Doubling, nn.LSTM):
        """A subclass as libraries have it."""

    class Ours(Doubling, fused_lstm.LSTM):
        """The same over our layer."""

    class Named(nn.LSTM):
        """A subclass that computes what nn.LSTM does."""

    class NamedOurs(fused_lstm.LSTM):
        """One of ours without a forward."""

    theirs, named = Theirs(3, 4, dtype=X.dtype), Named(3, 4, dtype=X.dtype)
    for cls in (fused_lstm.LSTM, NamedOurs):
        with pytest.raises(TypeError, match=r"from_torch expects torch\.nn\.LSTM's own forward, got: Theirs, which has"):
            cls.from_torch(theirs)
    assert_all_close(flat(Ours.from_torch(theirs)(X)), flat(theirs(X)))
    assert_all_close(flat(NamedOurs.from_torch(named)(X)), flat(named(X)))
    assert fused_lstm.replace_lstm(theirs) is theirs


@pytest.mark.parametrize("convert", [fused_lstm.LSTM.from_torch, fused_lstm.replace_lstm, copy.deepcopy])
def test_the_old_modules_compiled_call_is_dropped(convert: Callable) -> None:
    old = nn.LSTM(3, 4, 2, dropout=0.5) if convert is not copy.deepcopy else fused_lstm.LSTM(3, 4, 2, dropout=0.5)
    old.compile(backend="eager")
    old.extra = old.extra_repr  # a method bound to it
    with (
        pytest.warns(UserWarning, match="the compiled call of the old module is dropped")
        if type(old) is nn.LSTM
        else nullcontext()
    ):
        new = convert(old).eval()
    assert all_equal(flat(new(X.float())), flat(new(X.float()))), "dropout is off"
    new(X.float(), lengths=[1, 2])
    new.load_state_dict({name: torch.zeros_like(w) for name, w in new.state_dict().items()}, assign=True)
    assert not new(X.float())[0].any()
    assert new.extra.__self__ is new


def test_a_forward_set_on_a_module_is_not_lost() -> None:
    """As torch.compile and the hooks of accelerate do it: the module is left alone, or refused."""
    theirs, ours = nn.LSTM(3, 4), fused_lstm.LSTM(3, 4)
    for module, convert in ((theirs, fused_lstm.LSTM.from_torch), (ours, fused_lstm.LSTM.to_torch)):
        own = module.forward
        module.forward = partial(lambda forward, *args: [2 * t for t in flat(forward(*args))], own)
        assert fused_lstm.replace_lstm(nn.Sequential(module))[0] is module
        with pytest.raises(TypeError, match="expect a module with its class's forward, got: LSTM with a forward set on"):
            convert(module)
        module.forward = own  # as accelerate leaves it when its hook is taken off
        assert "forward" not in vars(convert(module))
    wrapped = torch.compile(theirs, backend="eager")
    assert type(fused_lstm.replace_lstm(nn.Sequential(wrapped))[0]._orig_mod) is nn.LSTM


def test_torchs_class_is_known_while_its_name_is_ours() -> None:
    theirs, ours = nn.LSTM(3, 4), fused_lstm.LSTM(3, 4)
    torchs = nn.LSTM
    with mock.patch.object(nn, "LSTM", fused_lstm.LSTM):  # as users do while a library builds its model
        assert type(fused_lstm.replace_lstm(nn.Sequential(theirs))[0]) is fused_lstm.LSTM
        assert type(fused_lstm.LSTM.from_torch(theirs)) is fused_lstm.LSTM
        assert type(ours.to_torch()) is torchs
        assert fused_lstm.replace_lstm(ours) is ours
        with pytest.raises(TypeError, match=r"expects a torch\.nn\.LSTM"):
            fused_lstm.LSTM.from_torch(ours)


def test_parametrized_modules_do_not_convert() -> None:
    """Their parametrizations are a class of their own, which the other class cannot take over."""
    for cls, convert in ((nn.LSTM, fused_lstm.LSTM.from_torch), (fused_lstm.LSTM, fused_lstm.LSTM.to_torch)):
        module = parametrizations.weight_norm(cls(3, 4), "weight_hh_l0")
        error, message = failure(lambda convert=convert, module=module: convert(module))
        assert error is TypeError
        assert message.endswith("got: ParametrizedLSTM")


def test_subclasses_convert_to_themselves() -> None:
    class Named(fused_lstm.LSTM):
        """A subclass of ours, with a name of its own."""

    assert type(Named.from_torch(nn.LSTM(3, 4))) is Named
