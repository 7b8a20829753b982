"""inspect_gates against the forward pass, bit for bit, and against the equations; plot_gates by what it draws."""

from __future__ import annotations

import dataclasses
import io
import itertools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, Rule
from pairs import BACKENDS, NUMPYS, all_equal, call, failure, flat, packed, pair, randn, states
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from fused_lstm import Gates, inspect_gates, plot_gates

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings(NUMPYS),
]

NAMES = tuple(field.name for field in dataclasses.fields(Gates) if field.name != "lengths")
EXTRAS = ("", "hx", "lengths", "resets", "hx lengths resets")
CASES = list(itertools.product((1, 2), (False, True), (0, 3), (False, True), EXTRAS))
T, B, I, H = 5, 4, 3, 6  # noqa: E741
every_case = pytest.mark.parametrize(("layers", "bidirectional", "proj", "batch_first", "extras"), CASES)


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


@every_case
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_shows_the_numbers_of_the_forward_pass_bit_for_bit(
    layers: int, bidirectional: bool, proj: int, batch_first: bool, extras: str, backend: str
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


@pytest.fixture(scope="module")
def values() -> Gates:
    torch.manual_seed(5)
    lstm = fused_lstm.LSTM(2, H, 2, bidirectional=True, proj_size=3)
    return inspect_gates(lstm, torch.randn(8, B, 2), lengths=[8, 8, 3, 5])


def heat_maps(figure: Any) -> dict[str, Any]:
    """The axes that hold a picture, by the first letter of their label; colour bars have none."""
    pytest.importorskip("matplotlib")
    figure.savefig(io.BytesIO(), format="png")  # draws it, which must work without a display
    return {ax.get_ylabel()[0]: ax for ax in figure.axes if ax.images}


def test_draws_gates_and_states(values: Gates) -> None:
    pytest.importorskip("matplotlib")
    maps = heat_maps(plot_gates(values, layer=1, direction=1, row=2, title="backwards"))
    assert list(maps) == list("ifgoch")
    for name, ax in maps.items():
        (image,) = ax.images
        data = getattr(values, name)[1, 1, :, 2]
        assert torch.equal(torch.tensor(image.get_array()), data.T.double())
        limits = image.get_clim()
        largest = 1 if name == "g" else pytest.approx(data.abs().max().item())
        assert limits == (0, 1) if name in "ifo" else limits[0] == -limits[1] and limits[1] == largest
        assert ax.get_xlim() == (-0.5, 7.5)
        assert ax.get_shared_x_axes().joined(ax, maps["i"])
    assert maps["i"].images[0].get_cmap().name != maps["c"].images[0].get_cmap().name
    assert maps["h"].get_xlabel() == "time step"


def test_draws_chosen_units_below_a_text_and_numbers(values: Gates) -> None:
    pytest.importorskip("matplotlib")
    x = torch.randn(8, 2)
    figure = plot_gates(values, units=[4, 1], gates="ch", x=x, axis="a b\t\n$$c")
    series, maps = figure.axes[0], heat_maps(figure)
    assert list(maps) == ["c", "h"]
    for k, line in enumerate(series.lines):
        assert torch.equal(torch.tensor(line.get_ydata()), x[:, k].double())
    assert len(series.lines) == 2
    assert torch.equal(torch.tensor(maps["c"].images[0].get_array()), values.c[0, 0, :, 0][:, [4, 1]].T.double())
    assert maps["h"].images[0].get_array().shape == (3, 8)  # projected: no units of the cell
    assert [label.get_text() for label in maps["c"].get_yticklabels()] == ["4", "1"]
    assert [label.get_text() for label in maps["h"].get_xticklabels()] == list("a\u2423b\u2192\u21b5$$c")


def seen(figure: Any, unit: int = 0) -> dict[str, list[str]]:
    """The colours in which each heat map shows a unit's steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex

    maps, canvas, found = heat_maps(figure), FigureCanvasAgg(figure), {}
    canvas.draw()
    pixels = canvas.buffer_rgba()  # from the top
    for name, ax in maps.items():
        places = [ax.transData.transform((t, unit)).astype(int) for t in range(ax.images[0].get_array().shape[1])]
        found[name] = [to_hex([pixels[pixels.shape[0] - 1 - up, x, k] / 255 for k in range(3)]) for x, up in places]
    return found


def test_draws_nothing_past_a_length_and_nan_unlike_zero(values: Gates) -> None:
    pytest.importorskip("matplotlib")
    grey, magenta = "#cccccc", "#ff00ff"
    for row, length in ((0, 8), (2, 3)):
        figure = plot_gates(values, row=row, x=torch.ones(8))
        assert len(figure.axes[0].lines[0].get_ydata()) == length
        for colours in seen(figure).values():
            assert [colour == grey for colour in colours] == [t >= length for t in range(8)]
    lstm = fused_lstm.LSTM(2, H)
    nothing = inspect_gates(lstm, torch.randn(3, 1, 2), lengths=[0])
    assert all(colours == [grey] * 3 for colours in seen(plot_gates(nothing)).values())
    unbatched = inspect_gates(lstm, torch.tensor([[1.0, 2], [torch.nan, 0], [1, 2]]), lengths=[2])
    for first, *others in seen(plot_gates(unbatched)).values():
        assert first not in (grey, magenta)
        assert others == [magenta, grey]


def test_says_what_it_shows(values: Gates) -> None:
    pytest.importorskip("matplotlib")
    assert plot_gates(values, layer=1, direction=1, row=3).get_suptitle() == "layer 1, backwards, row 3"
    assert plot_gates(values, title="").get_suptitle() == ""
    lstm, x = fused_lstm.LSTM(2, H), torch.randn(3, 2, 2)
    assert plot_gates(inspect_gates(lstm, x)).get_suptitle() == "row 0"
    assert plot_gates(inspect_gates(lstm, x[:, 0])).get_suptitle() == ""
    formula = plot_gates(values, title="$\\frac$", gates="c")
    heat_maps(formula)  # is drawn as it stands: it is no formula
    assert formula.get_suptitle() == "$\\frac$"


@pytest.mark.parametrize(("K", "legend"), [(None, None), (1, None), (3, ["0", "1", "2"]), (7, None)])
def test_lines_have_a_legend_where_it_helps(values: Gates, K: int | None, legend: list[str] | None) -> None:
    pytest.importorskip("matplotlib")
    figure = plot_gates(values, gates="c", x=torch.randn(8) if K is None else torch.randn(8, K))
    heat_maps(figure)
    found = figure.axes[0].get_legend()
    assert (found and [label.get_text() for label in found.get_texts()]) == legend


def test_a_single_step_is_seen() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_gates(inspect_gates(fused_lstm.LSTM(2, H), torch.randn(1, 2)), x=[3])
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert [tick for tick in heat_maps(figure)["h"].get_xticks() if abs(tick) < 0.5] == [0]


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (60, 1), (170, 1), (500, 3), (2000, 12)])
def test_labels_of_steps_do_not_overlap(steps: int, every: int) -> None:
    pytest.importorskip("matplotlib")
    gates = inspect_gates(fused_lstm.LSTM(2, 1), torch.randn(steps, 2))
    for axis in ("W" * steps, ["word"] * steps):
        ax = heat_maps(plot_gates(gates, axis=axis, gates="f"))["f"]
        assert ax.get_xticks().tolist() == list(range(0, steps, every))
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_draws_unbatched_values_words_and_zeros() -> None:
    pytest.importorskip("matplotlib")
    lstm = fused_lstm.LSTM(2, H)
    nn.init.zeros_(lstm.weight_ih_l0)
    unbatched = inspect_gates(lstm, torch.randn(3, 2))
    maps = heat_maps(plot_gates(unbatched, x=[1, 2, 3], axis=["one", "two", "$a$"]))
    assert maps["c"].images[0].get_array().shape == (H, 3)
    zero = Gates(**{name: torch.zeros_like(t) for name, t in all_of(unbatched).items()})
    image = heat_maps(plot_gates(zero))["c"].images[0]
    assert image.get_clim() == (-1, 1)
    assert image.colorbar.ax.get_ylabel() == ""
    large = dataclasses.replace(zero, c=torch.tensor([0.5, 1, 50])[:, None].expand(3, H)[None, None])
    image = heat_maps(plot_gates(large))["c"].images[0]
    assert image.colorbar.ax.get_ylabel() == "log beyond 1"
    norm = image.norm
    assert (norm.vmin, norm.vmax) == (-50, 50)
    assert norm(0) == 0.5
    assert norm(0.5) > 0.55  # on a linear scale it would be 0.505, the colour of zero


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 2}, "layer should be an integer from 0 to 1, got 2"),
        ({"direction": -1}, "direction should be an integer from 0 to 1, got -1"),
        ({"row": 4}, "row should be an integer from 0 to 3, got 4"),
        ({"row": 1.5}, r"row should be an integer from 0 to 3, got 1\.5"),
        ({"row": "a"}, "row should be an integer from 0 to 3, got 'a'"),
        ({"units": [0, 6]}, r"units should be a list of integers from 0 to 5, got \[0, 6\]"),
        ({"units": [1.5]}, r"units should be a list of integers from 0 to 5, got \[1\.5\]"),
        ({"units": []}, r"units should be a list of integers from 0 to 5, got \[\]"),
        ({"units": 3}, "units should be a list of integers from 0 to 5, got 3"),
        ({"gates": "ix"}, "gates should be letters of 'ifgoch', got 'ix'"),
        ({"gates": ""}, "gates should be letters"),
        ({"x": [1, 2]}, r"x should have shape \(8,\) or \(8, K\), one for each step, got \(2,\)"),
        ({"axis": "abc"}, "axis should have 8 labels, one for each step, got 3"),
    ],
)
def test_plot_says_what_it_expected(values: Gates, arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        plot_gates(values, **arguments)
    with pytest.raises(TypeError, match=r"expects the result of fused_lstm\.inspect_gates, got: Tensor"):
        plot_gates(values.c)


def test_indices_may_be_tensors_and_a_row_is_needed(values: Gates) -> None:
    pytest.importorskip("matplotlib")
    ax = heat_maps(plot_gates(values, gates="c", row=torch.tensor(1), units=torch.tensor([4, 1])))["c"]
    assert torch.equal(torch.tensor(ax.images[0].get_array()), values.c[0, 0, :, 1][:, [4, 1]].T.double())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "1"]
    empty = inspect_gates(fused_lstm.LSTM(2, 3), torch.randn(4, 0, 2))
    with pytest.raises(ValueError, match=r"expects at least one batch row, got gates of shape \(1, 1, 4, 0, 3\)"):
        plot_gates(empty)


def test_without_matplotlib(values: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_gates(values)
