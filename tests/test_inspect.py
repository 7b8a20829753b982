"""inspect_gates against the forward pass, bit for bit, and against the equations."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, Rule
from pairs import BACKENDS, IN_INTERPRETER, NUMPYS, all_equal, call, failure, flat, packed, pair, randn, states
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from fused_lstm import Gates, inspect_gates

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(NUMPYS),
]

NAMES = tuple(field.name for field in dataclasses.fields(Gates) if field.name != "lengths")
EXTRAS = ("", "hx", "lengths", "resets", "hx lengths resets")
CASES = list(itertools.product((1, 2), (False, True), (0, 3), (False, True), EXTRAS))
T, B, I, H = 5, 4, 3, 6  # noqa: E741
OPTIONS = ("layers", "bidirectional", "proj", "batch_first", "extras")
every_case = pytest.mark.parametrize(OPTIONS, CASES)


def all_of(values: Gates) -> dict[str, Tensor]:
    return {name: getattr(values, name) for name in NAMES}


def saved_in_forward(output: Tensor, layers: int) -> list[tuple[Tensor, Tensor]]:
    """Gates (N, D, 4, H) and cell states (N, D, H) that each layer saved for its backward pass."""
    found, nodes = [], [output.grad_fn]
    while nodes and len(found) < layers:
        node = nodes.pop(0)
        if type(node).__name__ == "FusedLSTMFunctionBackward":
            found.append(node.saved_tensors[-2:])
        nodes += [after for after, _ in node.next_functions if after is not None]
    return found[::-1]


def by_hand(
    lstm: nn.LSTM,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> dict[str, Tensor]:
    """The fields i to h of Gates by the equations, a row, a direction and a step at a time."""
    D, P = 1 + lstm.bidirectional, lstm.proj_size or lstm.hidden_size
    x, resets = (t if t is None or not lstm.batch_first else t.transpose(0, 1) for t in (input, resets))
    T, B = x.shape[:2]
    found = {n: x.new_zeros(lstm.num_layers, D, T, B, P if n == "h" else lstm.hidden_size) for n in "ifgoch"}
    for layer, d, b in itertools.product(range(lstm.num_layers), range(D), range(B)):
        if layer > 0 and d == b == 0:
            x = torch.cat(found["h"][layer - 1].unbind(0), -1)
        k = layer * D + d
        w_ih, w_hh, b_ih, b_hh, *w_hr = lstm.all_weights[k]
        h, c = (x.new_zeros(P), x.new_zeros(lstm.hidden_size)) if hx is None else (hx[0][k, b], hx[1][k, b])
        n = T if lengths is None else int(lengths[b])
        for s in range(n):
            t = n - 1 - s if d else s
            if resets is not None and ((s > 0 and resets[t + 1, b]) if d else resets[t, b]):
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            i, f, g, o = (F.linear(x[t, b], w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            h = F.linear(h, w_hr[0]) if w_hr else h
            for name, value in zip("ifgoch", (i, f, g, o, c, h), strict=True):
                found[name][layer, d, t, b] = value.detach()
    return found


@pytest.mark.parametrize(
    ("backend", *OPTIONS),
    [  # for the kernels a third of the cases, with every pair of options among them
        *(("reference", *case) for case in CASES),
        *(pytest.param("triton", *case, marks=[pytest.mark.kernels, IN_INTERPRETER]) for case in CASES[::3]),
    ],
)
def test_shows_the_numbers_of_the_forward_pass_bit_for_bit(
    backend: str, layers: int, bidirectional: bool, proj: int, batch_first: bool, extras: str
) -> None:
    torch.manual_seed(0)
    lstm = fused_lstm.LSTM(
        I, H, layers, bidirectional=bidirectional, proj_size=proj, batch_first=batch_first, backend=backend
    )
    given = call(lstm, extras, T, B)
    values = inspect_gates(lstm, given.pop("input").requires_grad_(), **given)
    given = call(lstm, extras, T, B)  # again, so that a change of the arguments would show
    with torch.no_grad():
        assert all_equal((values.output, values.h_n, values.c_n), flat(lstm(**given)))
    output, _ = lstm(**given)
    D = 1 + bidirectional
    assert values.h.shape == (layers, D, T, B, proj or H)
    shown = values.output if not batch_first else values.output.transpose(0, 1)
    assert torch.equal(torch.cat(values.h[-1].unbind(0), -1), shown)
    lengths = given.get("lengths", torch.full((B,), T))
    valid = torch.arange(T)[:, None] < lengths
    for layer, (gates, c) in enumerate(saved_in_forward(output, layers)):
        for name, saved in zip("ifgoc", (*gates[..., :H].unbind(2), c[..., :H]), strict=True):
            shown = getattr(values, name)[layer]
            assert shown.shape == (D, T, B, H)
            saved = saved.unflatten(0, (B, T)).transpose(0, 1) if batch_first else saved.unflatten(0, (T, B))
            assert torch.equal(shown[:, valid], saved.movedim(2, 0)[:, valid]), (layer, name)
            assert not shown[:, ~valid].any()
    assert not any(t.requires_grad for t in all_of(values).values())


@every_case
def test_equals_the_equations(layers: int, bidirectional: bool, proj: int, batch_first: bool, extras: str) -> None:
    """On aten and reference, in fp64, in each field; and the error rule in fp32 on aten, which runs the explicit path."""
    torch.manual_seed(1)
    options = {"bidirectional": bidirectional, "proj_size": proj, "batch_first": batch_first}
    theirs, ours = pair(I, H, layers, backend="aten", **options)
    given = call(ours, extras, T, B)
    yardstick = by_hand(theirs, **given)
    found = all_of(inspect_gates(ours, given.pop("input"), **given))
    exactly = {k: tuple(s.double() for s in v) if k == "hx" else v for k, v in given.items()}
    x = call(ours, "", T, B)["input"].double()
    exact = by_hand(theirs.double(), x, **exactly)
    for backend in ("aten", "reference"):
        ours.backend = backend
        values = inspect_gates(ours.double(), x, **exactly)
        for name in "ifgoch":
            torch.testing.assert_close(getattr(values, name), exact[name], rtol=1e-12, atol=1e-14)
        for mine, layers_own in zip((values.output, values.h_n, values.c_n), flat(ours(x, **exactly)), strict=True):
            torch.testing.assert_close(mine, layers_own, rtol=1e-12, atol=1e-14)
    rule = Rule()
    rule.add("gates", list("ifgoch"), *([own[n] for n in "ifgoch"] for own in (found, yardstick, exact)))
    rule.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bidirectional", "proj"), [(False, 0), (True, 0), (True, 3)])
def test_torchs_own_lstm_is_reproduced_by_the_error_rule(bidirectional: bool, proj: int, dtype: torch.dtype) -> None:
    """What inspect_gates returns for aten, which shows no gates, beside what nn.LSTM returns."""
    rule = Rule()
    for seed, lengths in itertools.product(range(8), (None, torch.tensor([9, 2, 5]))):
        torch.manual_seed(seed)
        theirs, ours = pair(I, 32, 2, backend="aten", bidirectional=bidirectional, proj_size=proj, dtype=dtype)
        x = torch.randn(9, 3, I, dtype=dtype)

        def run(x: Tensor, theirs: nn.LSTM = theirs, lengths: Tensor | None = lengths) -> list[Tensor]:
            return [t.detach() for t in (flat(theirs(x)) if lengths is None else packed(theirs, x, lengths))]

        values, torchs = inspect_gates(ours, x, lengths=lengths), run(x)
        theirs.double()
        rule.add(seed, ("output", "h_n", "c_n"), (values.output, values.h_n, values.c_n), torchs, run(x.double()))
    rule.check()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("extras", EXTRAS)
def test_values_agree_with_one_another(extras: str, backend: str) -> None:
    """c = f c_before + i g and h = o tanh(c), from the values shown alone."""
    torch.manual_seed(2)
    lstm = fused_lstm.LSTM(I, H, 2, bidirectional=True, backend=backend)
    given = call(lstm, extras, T, B)
    hx, resets = given.get("hx"), given.get("resets", torch.zeros(T, B, dtype=torch.bool))
    lengths = given.get("lengths", torch.full((B,), T))
    values = inspect_gates(lstm, given.pop("input"), **given)
    torch.testing.assert_close(values.h, values.o * values.c.tanh())
    for layer, d, b in itertools.product(range(2), range(2), range(B)):
        before = torch.zeros(H) if hx is None else hx[1][layer * 2 + d, b]
        times = range(int(lengths[b]))
        for t in reversed(times) if d else times:
            # Between t-1 and t lies the reset of t; the first step backwards in time has none before it.
            reset = (t + 1 < lengths[b] and resets[t + 1, b]) if d else resets[t, b]
            i, f, g, c = (getattr(values, name)[layer, d, t, b] for name in "ifgc")
            torch.testing.assert_close(c, i * g if reset else f * before + i * g)
            before = c
        torch.testing.assert_close(values.c_n[layer * 2 + d, b], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(3)
    lstm = fused_lstm.LSTM(I, H, 2, bidirectional=True, dtype=dtype, backend=backend)
    x, lengths = randn(T, B, I, dtype=dtype), [5, 2, 0, 4]
    values = inspect_gates(lstm, x, lengths=lengths)
    assert {t.dtype for t in all_of(values).values()} == {dtype}
    with torch.no_grad():
        assert all_equal((values.output, values.h_n, values.c_n), flat(lstm(x, lengths=lengths)))
    if backend == "reference":  # which computes in fp32 and rounds at the end
        wide = inspect_gates(lstm.float(), x.float(), lengths=lengths)
        assert all_equal(all_of(values).values(), [t.to(dtype) for t in all_of(wide).values()])


@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_autocast(backend: str) -> None:
    lstm, x = fused_lstm.LSTM(I, H, backend=backend).to(DEVICE), randn(T, B, I, dtype=torch.float32).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        values = inspect_gates(lstm, x)
        assert {t.dtype for t in all_of(values).values()} == {torch.bfloat16}
        assert all_equal((values.output, values.h_n, values.c_n), flat(lstm(x)))


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input_has_no_batch_dimension(batch_first: bool) -> None:
    lstm = fused_lstm.LSTM(I, H, 2, bidirectional=True, proj_size=2, batch_first=batch_first, backend="reference")
    x, (h0, c0), resets = (
        randn(T, I, dtype=torch.float32),
        states(4, H, proj=2, dtype=torch.float32),
        torch.tensor([0, 0, 1, 0, 0]),
    )
    values = inspect_gates(lstm, x, (h0, c0), resets=resets)
    time = 0 if not batch_first else 1
    batched = inspect_gates(lstm, x.unsqueeze(1 - time), (h0[:, None], c0[:, None]), resets=resets.unsqueeze(1 - time))
    assert values.i.shape == (2, 2, T, H)
    assert values.h.shape == (2, 2, T, 2)
    assert all_equal([getattr(values, n) for n in "ifgoch"], [getattr(batched, n).squeeze(3) for n in "ifgoch"])
    with torch.no_grad():
        assert all_equal((values.output, values.h_n, values.c_n), flat(lstm(x, (h0, c0), resets=resets)))


def test_lengths_are_kept_and_the_repr_gives_shapes() -> None:
    lstm = fused_lstm.LSTM(I, H, batch_first=True, proj_size=2)
    batched, single = inspect_gates(lstm, torch.randn(2, T, I), lengths=[3, 0]), torch.randn(T, I)
    assert batched.lengths.tolist() == [3, 0]
    assert inspect_gates(lstm, single, lengths=[3]).lengths.shape == ()
    assert inspect_gates(lstm, single, lengths=[3]).lengths == 3
    assert inspect_gates(lstm, single).lengths is None
    cells = "i=(1, 1, 5, 2, 6), f=(1, 1, 5, 2, 6), g=(1, 1, 5, 2, 6), o=(1, 1, 5, 2, 6), c=(1, 1, 5, 2, 6)"
    rest = "h=(1, 1, 5, 2, 2), output=(2, 5, 2), h_n=(1, 2, 2), c_n=(1, 2, 6), lengths=(2,), dtype=torch.float32"
    assert repr(batched) == f"Gates({cells}, {rest})"
    assert "lengths" not in repr(inspect_gates(lstm, single))


def test_an_empty_batch_and_a_single_step() -> None:
    lstm = fused_lstm.LSTM(I, H, 2)
    assert inspect_gates(lstm, torch.randn(T, 0, I)).i.shape == (2, 1, T, 0, H)
    x, hx = torch.randn(1, B, I), states(2, B, H, dtype=torch.float32)
    values = inspect_gates(lstm, x, hx, resets=torch.ones(1, B))  # then nothing of hx is left
    assert torch.equal(values.c, inspect_gates(lstm, x).c)


def test_dropout_and_recompute_and_the_random_generator_stay_out_of_it() -> None:
    torch.manual_seed(4)
    lstm = fused_lstm.LSTM(I, H, 2, dropout=0.5, backend="reference", recompute=True).train()
    x, before = torch.randn(T, B, I), torch.get_rng_state()
    values = inspect_gates(lstm, x)
    assert torch.equal(before, torch.get_rng_state())
    assert lstm.training
    with torch.no_grad():
        assert torch.equal(values.output, lstm.eval()(x)[0])


def test_inside_vmap_and_a_compiled_graph() -> None:
    for backend in ("reference", "aten"):
        lstm, x = fused_lstm.LSTM(I, H, backend=backend), torch.randn(2, T, B, I)
        torch.testing.assert_close(
            torch.vmap(lambda x, lstm=lstm: inspect_gates(lstm, x).f)(x),
            torch.stack([inspect_gates(lstm, member).f for member in x]),
        )
        torch.compiler.reset()
        compiled = torch.compile(lambda x, lstm=lstm: inspect_gates(lstm, x).f, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x[0]), inspect_gates(lstm, x[0]).f)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.LSTM(I, H), r"torch.nn.modules.rnn.LSTM: convert it by fused_lstm\.LSTM\.from_torch"),
        (weight_norm(nn.LSTM(I, H), "weight_hh_l0"), r".*: convert it by .*\.from_torch before it is parametrized"),
        (nn.GRU(I, H), r"torch\.nn\.modules\.rnn\.GRU"),
        (weight_norm(nn.GRU(I, H), "weight_hh_l0"), r"[\w.]*\.ParametrizedGRU"),
        (None, r"builtins\.NoneType"),
    ],
)
def test_takes_no_other_modules(module: object, what: str) -> None:
    with pytest.raises(TypeError, match=rf"^inspect_gates expects a fused_lstm\.LSTM, got: {what}$"):
        inspect_gates(module, torch.randn(T, B, I))


def test_takes_layers_that_were_parametrized_after_they_were_converted() -> None:
    lstm = weight_norm(fused_lstm.LSTM.from_torch(nn.LSTM(I, H)), "weight_hh_l0")
    x = torch.randn(T, B, I)
    torch.testing.assert_close(inspect_gates(lstm, x).output, lstm(x)[0])


@pytest.mark.parametrize(
    ("x", "got"), [("text", "builtins.str"), ([[1.0, 2.0]], "builtins.list"), (torch.zeros(T, I).numpy(), "numpy.ndarray")]
)
def test_takes_nothing_but_tensors(x: object, got: str) -> None:
    with pytest.raises(TypeError, match=rf"inspect_gates expects x to be a tensor, got: {got}$"):
        inspect_gates(fused_lstm.LSTM(I, H), x)


def test_takes_no_packed_sequence_and_no_derivatives() -> None:
    lstm, x = fused_lstm.LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(TypeError, match=r"got a PackedSequence: pass the padded tensor and lengths= instead"):
        inspect_gates(lstm, pack_padded_sequence(x, [5, 4, 2, 1]))
    transforms = (
        lambda function: torch.func.jvp(function, (x,), (x,)),
        lambda function: torch.func.grad(function)(x),
        lambda function: torch.func.vjp(function, x),
        lambda function: torch.func.jacrev(function)(x),
        lambda function: torch.vmap(torch.func.grad(function), 1)(x[:, :, None]),
    )
    for transform in transforms:
        with pytest.raises(RuntimeError, match="inspect_gates has no derivatives, expected a call outside of"):
            transform(lambda x: inspect_gates(lstm, x).c.sum())


@pytest.mark.parametrize(
    ("x", "arguments", "backend"),
    [
        (torch.randn(I), {}, "auto"),
        (torch.randn(T, B, I + 1), {}, "auto"),
        (torch.randn(T, B, I).double(), {}, "auto"),
        (torch.randn(0, B, I), {}, "auto"),
        (torch.randn(T, B, I), {"hx": (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))}, "auto"),
        (torch.randn(T, B, I), {"hx": (torch.zeros(1, B, H),)}, "auto"),
        (torch.randn(T, B, I), {"lengths": [1, 2, 3, T + 1]}, "auto"),
        (torch.randn(T, B, I), {"lengths": [1, 2]}, "auto"),
        (torch.randn(T, B, I), {"resets": torch.zeros(B, T)}, "auto"),
        pytest.param(torch.randn(T, B, I), {}, "triton", marks=pytest.mark.skipif(
            "os.environ.get('TRITON_INTERPRET') == '1'", reason="the kernels take CPU tensors in the interpreter")),
    ],
)  # fmt: skip
def test_errors_are_the_layers(x: Tensor, arguments: dict[str, Any], backend: str) -> None:
    lstm = fused_lstm.LSTM(I, H, backend=backend)
    assert failure(lambda: inspect_gates(lstm, x, **arguments)) == failure(lambda: lstm(x, **arguments))
