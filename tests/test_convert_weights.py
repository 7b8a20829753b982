"""Weights of Keras, flax and haste, to and from ours: against their formulas in numpy, and themselves where installed.

The extra `libraries` brings Keras. flax has an extra of its own, since jax is large; haste needs CUDA to build.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pairs import assert_all_close, failure, flat, randn
from torch import Tensor, nn

import fused_lstm
from fused_lstm.convert import HASTE, from_flax, from_haste, from_keras, to_flax, to_haste, to_keras

T, B, I, H = 5, 2, 3, 4  # noqa: E741
KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Gates = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]  # of x (B, I) and h (B, H), by gate
DOUBLE = {"dtype": torch.float64}


def ours(bidirectional: bool = False, num_layers: int = 2, **options: Any) -> fused_lstm.LSTM:
    torch.manual_seed(0)
    return fused_lstm.LSTM(I, H, num_layers, bidirectional=bidirectional, batch_first=True, **DOUBLE | options)


def keras_gates(kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray | float = 0.0) -> Gates:
    return lambda x, h: dict(zip("ifgo", np.split(x @ kernel + h @ recurrent + bias, 4, axis=1), strict=True))


def haste_gates(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> Gates:
    k, r, b = (w.numpy() for w in (kernel, recurrent_kernel, bias))
    return lambda x, h: dict(zip("igfo", np.split(x @ k + h @ r + b, 4, axis=1), strict=True))


def flax_gates(cell: dict[str, Any]) -> Gates:
    if "dense_i" in cell:
        return keras_gates(cell["dense_i"]["kernel"], cell["dense_h"]["kernel"], cell["dense_h"]["bias"])

    def gate(name: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        dense_i, dense_h = cell["if_" if "if_" in cell and name == "f" else f"i{name}"], cell[f"h{name}"]
        return x @ dense_i["kernel"] + h @ dense_h["kernel"] + dense_h["bias"]

    return lambda x, h: {name: gate(name, x, h) for name in "ifgo"}


def keras_layers(weights: list[list[np.ndarray]], D: int) -> Iterator[list[Gates]]:
    for layer in weights:
        n = len(layer) // D
        yield [keras_gates(*layer[:n])] if D == 1 else [keras_gates(*layer[:n]), keras_gates(*layer[n:])]


def flax_layers(cells: list[dict[str, Any]], D: int) -> Iterator[list[Gates]]:
    for cell in cells:
        yield [flax_gates(cell)] if D == 1 else [flax_gates(cell[f"{way}_rnn"]["cell"]) for way in ("forward", "backward")]


def haste_layers(states: list[dict[str, Tensor]], _: int) -> Iterator[list[Gates]]:
    return ([haste_gates(**state)] for state in states)


def loop(x: np.ndarray, layers: Iterator[list[Gates]]) -> list[Tensor]:
    """x (B, T, I) through the layers, step by step; output, h_n and c_n."""
    last = []
    for directions in layers:
        outputs = []
        for d, gates in enumerate(directions):
            h = c = np.zeros((B, H))
            steps = {}
            for t in range(T)[:: -1 if d else 1]:
                z = gates(x[:, t], h)
                i, f, o = (1 / (1 + np.exp(-z[name])) for name in "ifo")
                c = f * c + i * np.tanh(z["g"])
                h = steps[t] = o * np.tanh(c)
            outputs.append(np.stack([steps[t] for t in range(T)], 1))
            last.append((h, c))
        x = np.concatenate(outputs, -1)
    return [torch.from_numpy(a) for a in (x, *map(np.stack, zip(*last, strict=True)))]


LIBRARIES: dict[str, tuple[Callable, Callable, Callable]] = {
    "keras": (to_keras, from_keras, keras_layers),
    "linen": (to_flax, from_flax, flax_layers),
    "nnx": (lambda lstm: to_flax(lstm, "nnx"), from_flax, flax_layers),
    "nnx_optimized": (lambda lstm: to_flax(lstm, "nnx_optimized"), from_flax, flax_layers),
    "haste": (to_haste, lambda *w: from_haste(*w, batch_first=True), haste_layers),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("library", "bidirectional"),
    [(name, both) for name in LIBRARIES for both in (False, True) if (name, both) != ("haste", True)],
)
def test_formula_and_way_back(library: str, bidirectional: bool, bias: bool) -> None:
    """What goes out gives by the library's formula what ours gives; what comes back gives it again, as copies."""
    lstm, (export, load, layers), x = ours(bidirectional, bias=bias), LIBRARIES[library], randn(B, T, I)
    expected = flat(lstm(x))
    assert_all_close(loop(x.numpy(), layers(export(lstm), 1 + bidirectional)), expected)
    random = torch.get_rng_state()
    back = load(*export(lstm))
    assert torch.equal(torch.get_rng_state(), random)
    assert type(back) is fused_lstm.LSTM
    assert back.bias == (bias or library != "keras"), "flax and haste have no cell without"
    assert all(p.requires_grad and p.is_contiguous() for p in back.parameters())
    assert not any(b.count_nonzero() for name, b in back.named_parameters() if "bias_hh" in name)
    nn.init.zeros_(lstm.weight_hh_l0)
    assert_all_close(flat(back(x)), expected)


def test_dtypes_and_arguments() -> None:
    """Dtype and device are the first array's unless given, bf16 passes through fp32, and the rest is LSTM's."""
    lstm = ours(num_layers=1, dtype=torch.bfloat16)
    (weights,) = to_keras(lstm)
    assert {w.dtype for w in weights} == {np.dtype("float32")}
    assert from_keras(weights).weight_hh_l0.dtype == torch.float32
    options = {"batch_first": False, "backend": "reference", "recompute": True, "dropout": 0.0}
    back = from_keras(weights, dtype=torch.bfloat16, device="cpu", **options)
    assert {name: getattr(back, name) for name in options} == options
    assert torch.equal(back.weight_hh_l0, lstm.weight_hh_l0)
    assert from_keras([w.astype(np.float16) for w in weights], dtype=None, device=None).bias_ih_l0.dtype == torch.float16
    assert from_haste(*to_haste(lstm)).batch_first is False
    types_of_jax = pytest.importorskip("ml_dtypes")
    half = from_keras([w.astype(types_of_jax.bfloat16) for w in weights])
    assert torch.equal(half.weight_ih_l0, lstm.weight_ih_l0)


def test_of_torch_and_parametrized_layers() -> None:
    """As they are: nn.LSTM as ours, and a parametrized weight as it is computed."""
    lstm = nn.LSTM(I, H, batch_first=True, **DOUBLE)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0").parametrizations.weight_hh_l0.original0.data.mul_(2)
    assert_all_close(flat(from_haste(*to_haste(lstm), batch_first=True)(randn(B, T, I))), flat(lstm(randn(B, T, I))))


def haste_module(**options: Any) -> nn.Module:
    """What haste_pytorch.LSTM keeps."""
    module = nn.Module()
    for name, weight in to_haste(ours(num_layers=1))[0].items():
        module.register_parameter(name, nn.Parameter(weight))
    module.__dict__.update({"batch_first": True, "dropout": 0.0, "zoneout": 0.0} | options)
    return module


def test_haste_modules() -> None:
    lstm, x = ours(num_layers=1), randn(B, T, I)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_all_close(flat(from_haste(haste_module())(x)), flat(lstm(x)))
    with pytest.warns(UserWarning, match=r"^dropout=0\.5 of haste is not taken over") as record:
        from_haste(haste_module(dropout=0.5))
    assert record[0].filename == __file__
    kind, message = failure(lambda: from_haste(haste_module(zoneout=0.1)))
    assert kind is ValueError
    assert "expects zoneout=0, got: 0.1" in message
    assert message.endswith("from_haste(layer.state_dict()) looks at the weights alone")


def test_dropouts_are_not_taken_over() -> None:
    for export in (to_keras, to_flax, to_haste):
        with pytest.warns(UserWarning, match=r"^weight=0\.5, input=0\.1 of fused_lstm is not taken over") as record:
            export(fused_lstm.variational_dropout(fused_lstm.weight_drop(ours(), 0.5), 0.1))
        assert record[0].filename == __file__


WEIGHTS = to_keras(ours(num_layers=1))[0]
CELL = to_flax(ours(num_layers=1))[0]
RAISES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: from_keras(), ValueError, "from_keras expects one layer or more, got none"),
    (lambda: from_keras([]), ValueError, "got 0 arrays: build the layer first"),
    (lambda: from_keras(WEIGHTS + WEIGHTS[:2]), ValueError, "twice if bidirectional, got 5 arrays"),
    (lambda: from_keras(WEIGHTS[::-1]), ValueError, "shapes [[(16, 16), (4, 16), (16,)]], got: [[(16,), (4, 16), (3, 16)]]"),
    (lambda: from_keras(WEIGHTS, WEIGHTS), ValueError, "expects layer 1 to have"),
    (lambda: from_keras(WEIGHTS, WEIGHTS[:2]), ValueError, "expects layer 1 to have"),
    (lambda: from_keras(WEIGHTS, num_layers=2, cell=1), TypeError, "backend, recompute, got: num_layers, cell"),
    (lambda: from_flax(CELL, cell=fused_lstm.Cell(forget_bias=1.0)), TypeError, "from_flax takes the options batch_first, "),
    (lambda: from_haste(*to_haste(ours()), bias=False), TypeError, "from_haste takes the options batch_first, "),
    (lambda: from_keras([w.astype(object) for w in WEIGHTS]), ValueError, "got: object of shape (3, 16)"),
    (
        lambda: from_keras([w * 1j for w in WEIGHTS]),
        ValueError,
        "expects kernel to be of 1 or 2 dimensions and of dtype float16",
    ),
    (lambda: from_keras([*WEIGHTS[:2], 0.0]), ValueError, "from_keras expects bias to be of 1 or 2 dimensions"),
    (lambda: from_keras([WEIGHTS[0].astype("f"), *WEIGHTS[1:]]), ValueError, "or dtype=, got: torch.float32, torch.float64"),
    (lambda: from_haste(dict.fromkeys(HASTE, torch.ones(4, 9).int())), ValueError, "got: int32 of shape (4, 9)"),
    (lambda: from_keras(nn.LSTM(I, H)), TypeError, "from_keras expects a keras.layers.LSTM or a Bidirectional of one"),
    (lambda: to_keras(nn.GRU(I, H)), TypeError, "expects a fused_lstm.LSTM or a torch.nn.LSTM, got: GRU"),
    (lambda: to_keras(ours(proj_size=2)), ValueError, "expects no projection, got proj_size=2"),
    (lambda: to_keras(ours(), WEIGHTS), ValueError, "to_keras expects a Keras layer for each of the 2 layers, got 1"),
    (lambda: from_flax({k: CELL[k] for k in ("ii", "if", "ig")}), ValueError, "dense_i and dense_h, got: ii, if, ig"),
    (lambda: from_flax({}), ValueError, "dense_i and dense_h, got: none"),
    (lambda: from_flax(CELL | {"hx": CELL["hi"]}), ValueError, "dense_h, got: ii, if, ig, io, hi, hf, hg, ho, hx"),
    (lambda: from_flax(CELL | {"ii": CELL["hi"]}), ValueError, "expects ii to have the entries kernel, got: kernel, bias"),
    (lambda: from_flax(CELL | {"hf": CELL["ii"]}), ValueError, "expects hf to have the entries kernel, bias, got: kernel"),
    (lambda: from_flax(CELL | {"io": np.ones((I, H))}), ValueError, "expects io to have the entries kernel, got: ndarray"),
    (lambda: from_flax(CELL | {"ig": {"kernel": np.ones((2, H))}}), ValueError, "shape of ii's, (3, 4), got: (2, 4)"),
    (lambda: from_flax(nn.LSTM(I, H)), ValueError, "dense_i and dense_h, got: LSTM"),
    (lambda: to_flax(ours(), "jax"), ValueError, "expects layout 'linen', 'nnx' or 'nnx_optimized', got: 'jax'"),
    (lambda: from_haste({}), ValueError, "kernel, recurrent_kernel, bias, got: none"),
    (lambda: from_haste({"kernel": 0, "gamma": 0}), ValueError, "kernel, recurrent_kernel, bias, got: kernel, gamma"),
    (lambda: from_haste(dict.fromkeys(HASTE, torch.ones(4, 9))), ValueError, "got: [[(4, 9), (4, 9), (4, 9)]]"),
    (lambda: from_haste(WEIGHTS), TypeError, "expects a haste_pytorch.LSTM or its state_dict(), got: list"),
    (lambda: to_haste(ours(bidirectional=True)), ValueError, "got bidirectional=True"),
]


@pytest.mark.parametrize("k", range(len(RAISES)))
def test_errors(k: int) -> None:
    call, kind, words = RAISES[k]
    got, message = failure(call)
    assert got is kind
    assert words in message


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """Keras 3 on torch, on the CPU, with nothing written to the home directory."""
    settings = {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cpu", "KERAS_HOME": str(tmp_path_factory.mktemp("keras"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield pytest.importorskip("keras", minversion="3")


def assert_keras_agrees(lstm: fused_lstm.LSTM, layers: list[Any], dtype: torch.dtype) -> None:
    """Output and states of a stack of Keras layers with return_state, of which each last one's are compared."""
    x = randn(B, T, I, dtype=dtype)
    output, (h_n, c_n) = lstm(x)
    theirs, states = x, []
    for layer in layers:
        theirs, *state = layer(theirs)
        states += state
    assert_all_close([output, *h_n], [theirs, *states[0::2]])
    assert_all_close(list(c_n), states[1::2])


@KERAS_WARNS
@pytest.mark.parametrize(
    ("dtype", "bidirectional", "use_bias"),
    [(torch.float32, False, True), (torch.float32, True, False), (torch.float64, False, False), (torch.float64, True, True)],
)
def test_keras_itself(keras: types.ModuleType, dtype: torch.dtype, bidirectional: bool, use_bias: bool) -> None:
    def stack() -> list[Any]:
        options = {"return_sequences": True, "return_state": True, "use_bias": use_bias, "bias_initializer": "glorot_normal"}
        layers = [keras.layers.LSTM(H, dtype=str(dtype)[6:], **options) for _ in range(2)]
        layers = [keras.layers.Bidirectional(layer, dtype=str(dtype)[6:]) for layer in layers] if bidirectional else layers
        for layer, size in zip(layers, (I, (1 + bidirectional) * H), strict=True):
            layer.build((None, None, size))
            layer.set_weights([np.random.default_rng(0).normal(size=w.shape) for w in layer.get_weights()])
        return layers

    layers = stack()
    lstm = from_keras(*layers)
    assert lstm.weight_hh_l0.dtype == dtype
    assert_keras_agrees(lstm, layers, dtype)
    for p in lstm.parameters():  # so that both biases of ours count
        nn.init.normal_(p)
    layers = stack()
    assert [len(weights) for weights in to_keras(lstm, *layers)] == 2 * [len(layers[0].get_weights())]
    assert_keras_agrees(lstm, layers, dtype)


@KERAS_WARNS
@pytest.mark.parametrize("bidirectional", [False, True])
def test_masks_and_last_outputs_of_keras(keras: types.ModuleType, bidirectional: bool) -> None:
    """In fp32: with a mask Keras computes in it."""
    x, lengths = torch.randn(3, T, I), torch.tensor([T, 1, 3])
    for sequences in (True, False):
        layer = keras.layers.LSTM(H, return_sequences=sequences, zero_output_for_mask=sequences)
        layer = keras.layers.Bidirectional(layer) if bidirectional else layer
        result = layer(x, mask=torch.arange(T) < lengths[:, None])
        output, (h_n, _) = from_keras(layer)(x, lengths=lengths)
        last = torch.cat((h_n[-2], h_n[-1]), -1) if bidirectional else h_n[-1]
        assert_all_close([output if sequences else last], [result])


@KERAS_WARNS
def test_what_keras_layers_are_refused(keras: types.ModuleType) -> None:
    def built(wrap: bool = False, **options: Any) -> Any:
        layer = keras.layers.LSTM(H, **options)
        layer = keras.layers.Bidirectional(layer, merge_mode="sum") if wrap else layer
        layer.build((B, None, I))
        return layer

    refused = {"activation": "relu", "recurrent_activation": "hard_sigmoid", "go_backwards": True, "stateful": True}
    for name, value in refused.items():
        for call in (from_keras, lambda layer: to_keras(ours(num_layers=1), layer)):
            kind, message = failure(lambda name=name, value=value, call=call: call(built(**{name: value})))
            assert kind is ValueError
            assert f"expects {name}=" in message
            assert f"got: {value!r}" in message
            assert re.search(r"[gs]et_weights\(.*\) looks at the weights alone$", message)
    assert "expects merge_mode='concat', got: 'sum'" in failure(lambda: from_keras(built(wrap=True)))[1]
    gru = keras.layers.Bidirectional(keras.layers.GRU(H))
    kind, message = failure(lambda: from_keras(gru))
    assert kind is TypeError
    assert "Bidirectional of GRU and GRU; " in message
    assert "got 0 arrays: build the layer first" in failure(lambda: from_keras(keras.layers.LSTM(H)))[1]

    backwards, x = built(go_backwards=True, return_sequences=True), torch.randn(B, T, I)
    assert_all_close([from_keras(backwards.get_weights())(x.flip(1))[0]], [backwards(x)])
    with pytest.warns(UserWarning, match=r"^dropout=0\.1, recurrent_dropout=0\.2 of Keras is not taken over") as record:
        from_keras(built(dropout=0.1, recurrent_dropout=0.2))
    assert record[0].filename == __file__


@pytest.fixture(scope="module")
def flax() -> types.ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        found = pytest.importorskip("flax")
        pytest.importorskip("flax.nnx")
    return found


@pytest.mark.parametrize(("dtype", "bidirectional"), [(torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell"])
def test_flax_itself(flax: types.ModuleType, dtype: torch.dtype, bidirectional: bool, cell: str) -> None:
    """linen's parameters and nnx's modules, there and back."""
    import jax

    linen, nnx, name = flax.linen, flax.nnx, str(dtype)[6:]
    x = randn(B, T, I, dtype=dtype)
    options = {"bias_init": jax.nn.initializers.normal(), "param_dtype": name}

    def assert_agrees(lstm: fused_lstm.LSTM, result: tuple[Any, Any]) -> None:
        """With carry, a (c, h) for each direction, and output."""
        carry, output = result
        c_n, h_n = (np.stack(s) for s in zip(*carry if bidirectional else [carry], strict=True))
        assert lstm.weight_hh_l0.dtype == dtype
        assert_all_close(flat(lstm(x)), [torch.from_numpy(np.array(a)) for a in (output, h_n, c_n)])

    with jax.enable_x64(dtype == torch.float64):
        rnns = [linen.RNN(getattr(linen, cell)(H, **options), return_carry=True) for _ in range(1 + bidirectional)]
        module = linen.Bidirectional(*rnns, return_carry=True) if bidirectional else rnns[0]
        variables = module.init(jax.random.key(0), x.numpy())
        lstm = from_flax(variables)
        assert_agrees(lstm, module.apply(variables, x.numpy()))
        for p in lstm.parameters():  # so that both biases of ours count
            nn.init.normal_(p)
        (parameters,) = to_flax(lstm)
        parameters = parameters if bidirectional else {"cell": parameters}
        assert jax.tree.map(np.shape, {"params": parameters}) == jax.tree.map(np.shape, dict(variables))
        assert_agrees(lstm, module.apply({"params": parameters}, x.numpy()))

        cells = [getattr(nnx, cell)(I, H, rngs=nnx.Rngs(k), **options) for k in range(1 + bidirectional)]
        rnns = [nnx.RNN(c, return_carry=True) for c in cells]
        module = nnx.Bidirectional(*rnns, return_carry=True) if bidirectional else rnns[0]
        for source in (module, nnx.state(module, nnx.Param), nnx.to_pure_dict(nnx.state(module, nnx.Param))):
            assert_agrees(from_flax(source), module(x.numpy()))
        (parameters,) = to_flax(lstm, "nnx" if cell == "LSTMCell" else "nnx_optimized")
        nnx.update(module if bidirectional else cells[0], parameters)
        assert_agrees(lstm, module(x.numpy()))


def test_what_nnx_modules_are_refused(flax: types.ModuleType) -> None:
    import jax

    nnx = flax.nnx

    def rnn(options: dict[str, Any], **more: Any) -> Any:
        return nnx.RNN(nnx.LSTMCell(I, H, rngs=nnx.Rngs(0), **options), **more)

    merged = nnx.Bidirectional(rnn({}), rnn({}), merge_fn=jax.numpy.add)
    for module, name in (
        (rnn({"gate_fn": jax.nn.hard_sigmoid}), "gate_fn='sigmoid', got: 'hard_sigmoid'"),
        (rnn({"activation_fn": jax.nn.relu}), "activation_fn='tanh', got: 'relu'"),
        (rnn({}, reverse=True), "reverse=False, got: True"),
        (merged, "merge_fn='_concatenate', got: 'add'"),
    ):
        assert f"from_flax expects {name}, with which" in failure(lambda module=module: from_flax(module))[1]
    assert not from_flax(rnn({}, time_major=True)).batch_first
