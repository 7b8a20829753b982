"""Parameters and what is done to them and to the module: torch.nn.LSTM beside it wherever it can do the same."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from pairs import all_equal, assert_all_close, every_backend, failure, flat, pair, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fused_lstm

X = randn(5, 2, 3, dtype=torch.float32)
COMBINATIONS = list(itertools.product((1, 2), (False, True), (0, 2), (False, True)))


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("layers", "bidirectional", "proj", "bias"), COMBINATIONS)
def test_state_dicts_interchange(layers: int, bidirectional: bool, proj: int, bias: bool) -> None:
    theirs, ours = (
        cls(3, 4, layers, bias, bidirectional=bidirectional, proj_size=proj) for cls in (nn.LSTM, fused_lstm.LSTM)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            source.weight_hh_l0 += 1
        assert target.load_state_dict(source.state_dict()) == ([], [])
        assert all_equal(list(target.parameters()), list(source.parameters()))


def test_bad_state_dicts() -> None:
    theirs, ours = pair(3, 4)
    for other in (nn.LSTM(3, 4, 2), nn.LSTM(3, 5), nn.LSTM(3, 4, bias=False)):
        state = other.state_dict()
        assert failure(lambda state=state: ours.load_state_dict(state)) == failure(
            lambda state=state: theirs.load_state_dict(state)
        )


@every_backend
def test_load_by_assignment(backend: str) -> None:
    theirs, ours = pair(3, 4, 2, device="meta", backend=backend)
    state = {k: torch.nn.Parameter(v) for k, v in nn.LSTM(3, 4, 2, dtype=torch.float64).state_dict().items()}
    for module in (theirs, ours):
        module.load_state_dict(state, assign=True)
    assert all(p is state[n] for n, p in ours.named_parameters())
    assert all(a is b for a, b in zip(ours._flat_weights, state.values(), strict=True))
    assert_all_close(flat(ours(X.double())), flat(theirs(X.double())))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)  # fmt: skip
@pytest.mark.parametrize("called", [False, True])
def test_copies(copied: Callable[[nn.Module], nn.Module], called: bool) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, dropout=0.5, proj_size=2, backend="reference").eval()
    if called:
        flat(layer(X))[0].sum().backward()
    other = copied(layer)
    assert repr(other) == repr(layer)
    assert not other.training
    assert all_equal(flat(other(X)), flat(layer(X)))
    if copied is not copy.copy:
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert layer.weight_hh_l0.any(), "the copy has weights of its own"
        assert other._flat_weights[1] is other.weight_hh_l0


@pytest.mark.parametrize("age", ["no backend", "no proj_size", "weights instead of names"])
def test_old_pickles(age: str) -> None:
    """States as older versions of this class and of torch's left them; __setstate__ is all that unpickling calls."""
    layers = []
    for cls in (nn.LSTM, fused_lstm.LSTM):
        torch.manual_seed(0)
        old = cls(3, 4, 2, bidirectional=True)
        state = old.__getstate__()
        for option in ("backend", "recompute"):
            state.pop(option, None)
        state["_flat_weights"] = list(old.parameters())
        if age != "no backend":
            del state["proj_size"]
        if age == "weights instead of names":
            del state["_flat_weights_names"], state["_all_weights"]
            state["all_weights"] = old.all_weights
        layers.append(cls.__new__(cls))
        layers[-1].__setstate__(state)
    theirs, ours = layers
    assert ours.backend == "auto"
    assert ours.recompute is False
    assert ours.proj_size == 0
    assert ours._all_weights == theirs._all_weights
    assert repr(ours) == repr(theirs)
    assert all_equal(flat(ours(X)), flat(theirs(X)))
    assert all_equal(flat(pickle.loads(pickle.dumps(ours))(X)), flat(theirs(X)))


def test_share_memory() -> None:
    layer = fused_lstm.LSTM(3, 4, 2)
    before = flat(layer(X))
    assert layer.share_memory() is layer
    assert all(p.is_shared() for p in layer.parameters())
    assert all_equal(flat(layer(X)), before)


@every_backend
def test_meta_device_and_to_empty(backend: str) -> None:
    layer = fused_lstm.LSTM(3, 4, 2, device="meta", backend=backend).to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    torch.testing.assert_close(flat(layer(X)), flat(nn.LSTM(3, 4, 2)(X)))


@every_backend
@pytest.mark.half
def test_to_dtype(backend: str) -> None:
    theirs, ours = pair(3, 4, 2, backend=backend)
    ours(X)
    for module in (theirs, ours):
        assert module.to(torch.float64) is module
    assert_all_close(flat(ours(X.double())), flat(theirs(X.double())))
    half = flat(ours.bfloat16()(X.bfloat16()))
    assert [t.dtype for t in half] == [torch.bfloat16] * 3
    torch.testing.assert_close(half, flat(theirs.bfloat16()(X.bfloat16())), atol=0.02, rtol=0.02)


@pytest.fixture
def swapping(request: pytest.FixtureRequest) -> Iterator[None]:
    getattr(torch.__future__, f"set_{request.param}_module_params_on_conversion")(True)
    yield
    getattr(torch.__future__, f"set_{request.param}_module_params_on_conversion")(False)


@every_backend
@pytest.mark.parametrize("swapping", ["swap", "overwrite"], indirect=True)
@pytest.mark.usefixtures("swapping")
def test_conversion_by_new_parameters(backend: str) -> None:
    """After a first call: nothing in the layer may keep the old tensors, or hold on to those to be swapped."""
    theirs, ours = pair(3, 4, 2, dtype=torch.float64, backend=backend)
    ours(X.double())
    kept = ours.weight_hh_l1
    ours.float()
    assert (kept is ours.weight_hh_l1) == torch.__future__.get_swap_module_params_on_conversion()
    assert ours._flat_weights[5] is ours.weight_hh_l1
    for layer in (ours, pickle.loads(pickle.dumps(ours))):
        layer.load_state_dict(theirs.float().state_dict())
        assert_all_close(flat(layer(X)), flat(theirs(X)))


def train(module: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """Two steps of gradient descent; the results on the way and after."""
    results = []
    for _ in range(2):
        results += [t.detach() for t in flat(module(X.double()))]
        grads = torch.autograd.grad(flat(module(X.double()))[0].square().sum(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.1 * g
    return [*results, *flat(module(X.double()))]


@every_backend
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "weight_hh_l1_reverse"])
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm(kind: str, name: str, backend: str) -> None:
    modules = pair(3, 4, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    normed = {"hook": nn.utils.weight_norm, "parametrization": parametrizations.weight_norm}[kind]
    got = []
    for module in modules:
        normed(module, name)
        got.append(train(module, list(module.parameters())))
        module.float()
        got[-1] += flat(module(X))
        if kind == "hook":
            nn.utils.remove_weight_norm(module, name)
        else:
            parametrize.remove_parametrizations(module, name)
        got[-1] += flat(module(X))
        assert isinstance(module._parameters[name], nn.Parameter)
    assert list(modules[1].state_dict()) == list(modules[0].state_dict())
    assert_all_close(got[1], got[0])


@every_backend
def test_parametrized_layer_copies(backend: str) -> None:
    """torch's own fails here after a call, since it keeps the computed weights."""
    layer = parametrizations.weight_norm(fused_lstm.LSTM(3, 4, backend=backend), "weight_hh_l0")
    layer(X)
    other = copy.deepcopy(layer)
    assert all_equal(flat(other(X)), flat(layer(X)))
    other.parametrizations.weight_hh_l0.original0.data *= 2
    assert not torch.allclose(other(X)[0], layer(X)[0])


@every_backend
def test_tied_parameters(backend: str) -> None:
    """Between two layers of a stack of modules, and between the two layers of one module."""
    got = []
    for first, second in zip(*(pair(3, 3, 2, dtype=torch.float64, backend=backend) for _ in range(2)), strict=True):
        second.weight_hh_l0 = first.weight_hh_l0
        first.weight_ih_l1 = first.weight_ih_l0
        x, _ = first(X.double())
        second(x)[0].square().sum().backward()
        parameters = {**dict(first.named_parameters()), "second": second.weight_hh_l0}
        assert "weight_ih_l1" not in parameters
        assert second.weight_hh_l0 is first.weight_hh_l0
        got.append([p.grad for p in parameters.values()])
    assert_all_close(got[1], got[0])


@every_backend
def test_functional_call(backend: str) -> None:
    """With other weights, of another dtype too, for the time of the call."""
    theirs, ours = pair(3, 4, 2, backend=backend)
    before = flat(ours(X))
    weights = {n: p.detach().double().mul(2).requires_grad_() for n, p in ours.named_parameters()}
    got = []
    for module in (theirs, ours):
        results = flat(torch.func.functional_call(module, weights, (X.double(),)))
        got.append([*results, *torch.autograd.grad(results[0].sum(), list(weights.values()))])
    assert_all_close(got[1], got[0])
    assert all_equal(flat(ours(X)), before)
    assert all(p.grad is None for p in ours.parameters())


@every_backend
def test_weights_changed_by_hand(backend: str) -> None:
    theirs, ours = pair(3, 4, 2, dtype=torch.float64, backend=backend)

    def edit_data(module: nn.Module) -> None:
        module.weight_hh_l0.data.mul_(2)
        module.bias_ih_l1.data = module.bias_hh_l1.data.clone() + 1

    def assign(module: nn.Module) -> None:
        module.weight_ih_l1 = nn.Parameter(randn(16, 4) / 4)
        assert module._flat_weights[4] is module.weight_ih_l1

    def replace_by_a_tensor(module: nn.Module) -> None:
        del module.weight_hh_l1
        module.weight_hh_l1 = randn(4, 16).t() / 4

    def optimize(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        module(X.double())[0].square().sum().backward()
        optimizer.step()

    before = ours(X.double())[0]
    for change in (edit_data, assign, replace_by_a_tensor, optimize):
        for module in (theirs, ours):
            change(module)
        after = flat(ours(X.double()))
        assert not torch.allclose(after[0], before)
        assert_all_close(after, flat(theirs(X.double())))
        before = after[0]


def test_missing_weight() -> None:
    """torch goes on with the weight it remembers; here it is gone."""
    layer = fused_lstm.LSTM(3, 4)
    del layer.weight_hh_l0
    assert failure(lambda: layer(X)) == (AttributeError, "'LSTM' object has no attribute 'weight_hh_l0'")


def test_train_and_eval_keep_the_state() -> None:
    layer = fused_lstm.LSTM(3, 4, 2, dropout=0.5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert layer.eval() is layer
    first = flat(layer(X))
    assert layer.train() is layer
    layer(X)
    assert layer.training
    assert layer.dropout == 0.5
    assert all_equal(flat(layer.eval()(X)), first)
    assert all_equal(list(layer.state_dict().values()), list(before.values()))
