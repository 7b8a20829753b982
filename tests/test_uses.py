"""What is commonly done to a module and its parameters, after a first call and without a single warning.

The results and gradients are those of torch.nn.LSTM after the same, bit for bit where both run torch's own LSTM.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import NUMPYS, all_equal, assert_all_close, change_and_run, every_backend, flat, pair, randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_lstm

pytestmark = pytest.mark.filterwarnings("error", NUMPYS, "ignore:.*weight_norm. is deprecated:FutureWarning")

X = randn(5, 2, 3)


def outcome(module: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Results, and gradients of the parameters that have one."""
    results = flat(module(x))
    loss = sum(t.square().sum() for t in results)
    return [*results, *torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])]


def assert_same(ours: list[Tensor], theirs: list[Tensor], backend: str) -> None:
    if backend == "aten":
        assert all_equal(ours, theirs)
    else:
        assert_all_close(ours, theirs)


def doubled(module: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in module.state_dict().items()}


def normed(norm: Callable, *args: Any) -> Callable[[nn.Module], Any]:
    """In eval mode, where spectral_norm does not iterate: torch's LSTM asks for parametrized weights several times."""

    def use(module: nn.Module) -> None:
        torch.manual_seed(0)
        norm(module, *args)
        module.eval()

    return use


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    prune.ln_structured(module, "weight_hh_l0", 0.25, n=2, dim=0)
    weights = [(module, name) for name in ("weight_ih_l0", "bias_hh_l1")]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.3)


def pruned_for_good(module: nn.Module) -> None:
    pruned(module)
    module(X)
    for name in ("weight_hh_l0", "weight_ih_l0", "bias_hh_l1"):
        prune.remove(module, name)


def averaged(module: nn.Module) -> AveragedModel:
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        flat(module(X))[0].square().sum().backward()
        optimizer.step()
        average.update_parameters(module)
        average(X)
    return average


def assigned(module: nn.Module) -> None:
    module.weight_hh_l0 = nn.Parameter(randn(16, 4))
    module.bias_ih_l1 = None  # and back again
    module.bias_ih_l1 = nn.Parameter(randn(16))


def data_edited(module: nn.Module) -> None:
    module.weight_hh_l0.data.mul_(2)
    module.bias_ih_l1.data = randn(16)


def tied(module: nn.Module) -> None:
    module.weight_hh_l1, module.weight_ih_l1 = module.weight_hh_l0, module.weight_hh_l0


def vector_given(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector.mul(2), module.parameters())


USES: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm by hook": normed(nn.utils.weight_norm, "weight_hh_l0"),
    "weight_norm": normed(parametrizations.weight_norm, "weight_ih_l0"),
    "spectral_norm by hook": normed(nn.utils.spectral_norm, "weight_hh_l0"),
    "spectral_norm": normed(parametrizations.spectral_norm, "weight_hh_l0"),
    "orthogonal": normed(parametrizations.orthogonal, "weight_hh_l1"),
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "averaged": averaged,
    "assigned": assigned,
    "data edited": data_edited,
    "tied": tied,
    "frozen": lambda m: m.weight_hh_l0.requires_grad_(False),
    "vector given": vector_given,
    "loaded": lambda m: m.load_state_dict(doubled(m)),
    "loaded by assignment": lambda m: m.load_state_dict(doubled(m), assign=True),
    "shared": lambda m: m.share_memory(),
    "deepcopied": copy.deepcopy,
    "to float and back": lambda m: m.float().double(),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
}


@every_backend
@pytest.mark.parametrize("use", USES)
def test_as_torch_does(use: str, backend: str) -> None:
    got, keys = [], []
    keeps_values = use in ("weight_norm by hook", "weight_norm", "frozen", "shared", "deepcopied", "memory format")
    for module in pair(3, 4, 2, dtype=torch.float64, backend=backend):
        before = flat(module(X))
        returned = USES[use](module)
        used = returned if isinstance(returned, nn.Module) else module
        got.append([*outcome(used), *used.buffers()])
        keys.append(list(used.state_dict()))
        assert keeps_values or not all_equal(got[-1][:3], before), "the use has an effect"
    assert_same(got[1], got[0], backend)
    assert keys[0] == keys[1]


@every_backend
def test_weights_assigned_for_a_call(backend: str) -> None:
    """Recurrent dropout as subclasses implement it."""

    class Dropped:
        def forward(self, *args: Any) -> Any:
            kept = self._flat_weights
            names = zip(self._flat_weights_names, kept, strict=True)
            self._flat_weights = [F.dropout(w, 0.5) if name.startswith("weight_hh") else w for name, w in names]
            result = super().forward(*args)
            self._flat_weights = kept
            return result

    got = []
    for base in (nn.LSTM, fused_lstm.LSTM):
        torch.manual_seed(0)
        own = {"backend": backend} if base is fused_lstm.LSTM else {}
        module = type("Module", (Dropped, base), {})(3, 4, 2, dtype=torch.float64, **own)
        got.append(outcome(module))
    assert_same(got[1], got[0], backend)
    kept = module._flat_weights
    with pytest.raises(TypeError, match="does not support item assignment"):
        module._flat_weights[1] = torch.zeros(16, 4)
    for undo in (lambda: module.to("cpu"), lambda: setattr(module, "weight_hh_l0", nn.Parameter(kept[1].detach().clone()))):
        module._flat_weights = [torch.zeros_like(w) for w in kept]
        assert not fused_lstm.LSTM.forward(module, X)[0].any()
        undo()
        assert module._flat_weights[1] is module.weight_hh_l0


@every_backend
def test_parametrized_weights_are_computed_once_for_a_call(backend: str) -> None:
    """As in nn.Linear: spectral_norm iterates whenever its weight is asked for, and power iterations take time."""
    calls: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, weight: Tensor) -> Tensor:
            calls.append(self.name)
            return 2 * weight

    layer = fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend=backend)
    names = [name for name, _ in layer.named_parameters()]
    for name in names:
        parametrize.register_parametrization(layer, name, Noted(name), unsafe=True)
    for what, expected in [
        (lambda: layer(X), names),
        (lambda: fused_lstm.explain(layer, X), names),
        (lambda: copy.deepcopy(layer), []),
        (lambda: layer.float().double(), []),
        (lambda: setattr(layer, "note", 1), []),
        (lambda: layer.load_state_dict(layer.state_dict()), []),
    ]:
        calls.clear()
        what()
        assert calls == expected


@every_backend
def test_spectral_norm_trains_as_in_a_linear_layer(backend: str) -> None:
    layer, linear = fused_lstm.LSTM(3, 4, dtype=torch.float64, backend=backend), nn.Linear(4, 16, dtype=torch.float64)
    linear.weight = nn.Parameter(layer.weight_hh_l0.detach().clone())
    for module, name in ((layer, "weight_hh_l0"), (linear, "weight")):
        torch.manual_seed(0)
        parametrizations.spectral_norm(module, name)
    for _ in range(3):
        layer(X)
        linear(X[..., :1].expand(5, 2, 4))
    assert all_equal(list(layer.buffers()), list(linear.buffers()))
    other = copy.deepcopy(layer)
    assert all_equal(list(other.buffers()), list(layer.buffers()))
    assert all_equal(outcome(other), outcome(layer))


@every_backend
def test_tied_weights_with_an_optimizer(backend: str) -> None:
    """The biases of a layer made one, by assignment and by .data: they are one after every step."""
    got = []
    for module in pair(3, 4, dtype=torch.float64, backend=backend):
        module.bias_hh_l0 = module.bias_ih_l0
        module.weight_hh_l0.data = module.weight_ih_l0.data.new_zeros(16, 4) + 0.1
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            flat(module(X))[0].square().sum().backward()
            optimizer.step()
        assert module.bias_hh_l0 is module.bias_ih_l0
        got.append(list(module.parameters()))
    assert_all_close(got[1], got[0])


@every_backend
def test_swapped_tensors(backend: str) -> None:
    """torch's own holds weak references to its weights, with which they cannot be swapped."""
    layer, other = (fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend=backend) for _ in range(2))
    first, second = outcome(layer), outcome(other)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(a, b)
    assert all_equal(outcome(layer), second)
    assert all_equal(outcome(other), first)


@every_backend
@pytest.mark.parametrize("norm", [None, nn.utils.weight_norm, parametrizations.weight_norm])
def test_replicas(norm: Callable | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's replicate, as DataParallel calls it, with copies on the CPU in place of those on GPUs."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    layer = fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend=backend)
    if norm is not None:
        norm(layer, "weight_hh_l0")
    parameters = list(layer.parameters())
    whole = layer(X)[0]
    replicas = replicate.replicate(nn.Sequential(layer), [0, 1])
    assert not list(replicas[0].parameters()), "a replica's weights are plain tensors"
    parts = torch.cat([replica(part)[0] for replica, part in zip(replicas, X.split(1, dim=1), strict=True)], 1)
    assert_all_close([parts], [whole])
    grads = [torch.autograd.grad(output.square().sum(), parameters) for output in (parts, whole)]
    assert_all_close(*map(list, grads))
    assert list(layer.parameters()) == parameters


def test_shared_with_a_spawned_process() -> None:
    """The module is pickled; its weights are memory that both processes see."""
    layer = fused_lstm.LSTM(3, 4, 2, dtype=torch.float64, backend="aten").share_memory()
    before = layer.weight_hh_l0.detach().clone()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=change_and_run, args=(layer, X, queue))
    worker.start()
    got = queue.get(timeout=120)
    worker.join()
    assert worker.exitcode == 0
    assert torch.equal(layer.weight_hh_l0, before + 1)
    assert got == [t.detach().tolist() for t in flat(layer(X))]


def test_state_dict_hooks() -> None:
    """All kinds, called in torch's order; those that load rename the keys of an older file."""
    calls: list[list[Any]] = []
    for module in pair(3, 4, 2):
        noted: list[Any] = []
        module._register_state_dict_hook(lambda m, state, prefix, _, noted=noted: noted.append(("raw", prefix, list(state))))
        module.register_state_dict_post_hook(lambda m, *_, noted=noted: noted.append(("post", type(m).__name__)))
        module.register_state_dict_pre_hook(lambda m, prefix, keep, noted=noted: noted.append(("pre", prefix, keep)))

        def rename(m: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any, noted: Any = noted) -> None:
            noted.append(("load", prefix, type(m).__name__))
            for key in [k for k in state if "old" in k]:
                state[key.replace("old", "weight")] = state.pop(key)

        module.register_load_state_dict_pre_hook(rename)
        module.register_load_state_dict_post_hook(lambda m, keys, noted=noted: noted.append(("loaded", *keys)))
        outer = nn.ModuleDict({"lstm": module})
        state = {key.replace("weight", "old"): value + 1 for key, value in outer.state_dict().items()}
        expected = [p + 1 for p in module.parameters()]
        outer.load_state_dict(state)
        assert all_equal(list(module.parameters()), expected)
        calls.append(noted)
    assert calls[0] == calls[1]
    assert [call[0] for call in calls[1]] == ["pre", "raw", "post", "load", "loaded"]
