"""plot_gates by what its pictures show, and by its errors."""

from __future__ import annotations

import dataclasses
import io
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm import Gates, inspect_gates, plot_gates

B, H = 4, 6


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


def seen(figure: Any) -> dict[str, list[str]]:
    """The colours in which each heat map shows the first unit's steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex

    maps, canvas, found = heat_maps(figure), FigureCanvasAgg(figure), {}
    canvas.draw()
    pixels = canvas.buffer_rgba()  # from the top
    for name, ax in maps.items():
        places = [ax.transData.transform((t, 0)).astype(int) for t in range(ax.images[0].get_array().shape[1])]
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
    zero = Gates(**{name: torch.zeros_like(t) for name, t in vars(unbatched).items() if t is not None})
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
