"""examples/forecast.py: baselines against plain loops, no leakage, padding, CSV files, and runs as a user starts them."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

for package in ("plotnine", "matplotlib", "tqdm"):
    pytest.importorskip(package)
from matplotlib.figure import Figure  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "examples" / "forecast.py"
M, H = 4, 6  # period and horizon; more than a period, so that the naive forecast wraps


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forecast_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its classes look their annotations up
    spec.loader.exec_module(module)
    return module


def values_of(n: int, seed: int) -> Tensor:
    """A trend, a season and noise, (n,), fp64."""
    t, draw = torch.arange(n).double(), torch.Generator().manual_seed(seed)
    return 50 + 0.3 * t + 8 * torch.sin(2 * math.pi * t / M + seed) + torch.randn(n, generator=draw, dtype=torch.float64)


@pytest.fixture(scope="module")
def series(script: ModuleType) -> list:
    return [script.Series(f"s{k}", k, values_of(n, k)) for k, n in enumerate((31, 60, 44, 25))]


@pytest.fixture(scope="module")
def models(script: ModuleType, series: list) -> tuple[Tensor, torch.nn.Module]:
    """The linear weights, and an LSTM whose every weight matters."""
    linear = script.fit_linear([script.examples(s, M, H) for s in series])
    torch.manual_seed(0)
    lstm = script.Forecaster(linear).eval()
    torch.nn.init.normal_(lstm.head.weight, std=0.5)
    return linear, lstm


def slow_features(y: list[float], start: int) -> tuple[list[float], float]:
    """The features and the scale at the last of the values."""
    changes = [abs(y[t] - y[t - M]) for t in range(M, len(y))]
    scale, level = sum(changes) / len(changes), sum(y[-M:]) / M
    angle = 2 * math.pi * (start + len(y) - 1) / M
    season = [math.sin(angle), math.cos(angle), math.sin(2 * angle), math.cos(2 * angle)]
    return [(v - level) / scale for v in y[-2 * M :]] + season + [1.0], scale


def test_naive_repeats_the_last_period(script: ModuleType, series: list, models: tuple) -> None:
    made = script.forecast(*models, series, M)[:, 0]
    for s, forecast in zip(series, made, strict=True):
        y = s.values.tolist()
        expected = [y[len(y) - M + h % M] for h in range(H)]
        np.testing.assert_allclose(forecast, expected, rtol=1e-6)


def test_linear_is_ridge_regression(script: ModuleType, series: list, models: tuple) -> None:
    """Against numpy's least squares, the penalty written as more rows, features and targets made by loops."""
    x, y = [], []
    for s in series:
        v = s.values.tolist()
        for end in range(2 * M, len(v) - H + 1):
            row, scale = slow_features(v[:end], s.start)
            x.append(row)
            y.append([(v[end + h] - v[end - M + h % M]) / scale for h in range(H)])
    inputs = len(x[0])
    weights, *_ = np.linalg.lstsq(np.vstack([x, np.eye(inputs)]), np.vstack([y, np.zeros((inputs, H))]), rcond=None)
    np.testing.assert_allclose(models[0], weights, atol=1e-4)
    for s, forecast in zip(series, script.forecast(*models, series, M)[:, 1], strict=True):
        v = s.values.tolist()
        row, scale = slow_features(v, s.start)
        expected = [v[len(v) - M + h % M] + scale * (np.array(row) @ weights)[h] for h in range(H)]
        np.testing.assert_allclose(forecast, expected, rtol=1e-4)


def test_training_begins_at_the_linear_model(script: ModuleType, series: list, models: tuple) -> None:
    lstm = script.Forecaster(models[0]).eval()
    torch.nn.init.zeros_(lstm.head.bias)
    made = script.forecast(models[0], lstm, series, M)
    torch.testing.assert_close(made[:, 3], made[:, 1])
    assert (made[:, 2] < made[:, 3]).all()
    assert (made[:, 3] < made[:, 4]).all()


def test_a_step_sees_nothing_later(script: ModuleType, series: list, models: tuple) -> None:
    """What models read, and what the LSTM says, at every step before a changed value stay the same to the last bit."""
    s, changed = series[1], 40
    other = s._replace(values=torch.cat([s.values[:changed], 1000 - s.values[changed:]]))
    (x, scale), (x_other, scale_other) = script.features(s, M), script.features(other, M)
    seen = changed - (2 * M - 1)
    assert torch.equal(x[:seen], x_other[:seen])
    assert torch.equal(scale[:seen], scale_other[:seen])
    assert not torch.equal(x[seen:], x_other[seen:])
    with torch.no_grad():
        out, out_other = (models[1](part.float()[None], torch.tensor([len(part)])) for part in (x, x_other))
    assert torch.equal(out[:, :seen], out_other[:, :seen])
    assert not torch.equal(out[:, seen:], out_other[:, seen:])


def test_a_whole_evaluation_sees_no_future(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two horizons of every series changed: forecasts made before them, training included, are the same bits."""
    made: list[Tensor] = []
    for factor in (1.0, -3.0):
        rows = ["series,time,value"]
        for k, n in enumerate((50, 41, 46)):
            values = values_of(n, k)
            values[-2 * H :] *= factor
            rows += [f"s{k},{60 - n + t},{v!r}" for t, v in enumerate(values.tolist())]
        (tmp_path / "rows.csv").write_text("\n".join(rows))
        monkeypatch.setattr(sys, "argv", ["forecast.py", *f"--csv rows.csv --period {M} --horizon {H} --device cpu".split()])
        monkeypatch.setattr(script, "STEPS", 12)
        monkeypatch.setattr(script, "plot", lambda path, series, forecasts, *rest: made.append(forecasts))
        monkeypatch.chdir(tmp_path)
        script.main()
    assert made[0].shape == (5, 3, script.ORIGINS, H)
    assert torch.equal(made[0][:, :, :2], made[1][:, :, :2])
    assert not torch.equal(made[0][:, :, 2], made[1][:, :, 2])  # made from what was changed


def test_padding_does_not_matter(script: ModuleType, series: list, models: tuple) -> None:
    together = script.forecast(*models, series, M)
    alone = torch.cat([script.forecast(*models, [s], M) for s in series])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_pieces_for_training_have_their_lengths(script: ModuleType, series: list) -> None:
    torch.manual_seed(0)
    rows = [script.examples(s, M, H) for s in series]
    x, y, lengths = script.draw(rows, M)
    assert x.shape[:2] == y.shape[:2]
    assert lengths.min() >= M
    assert lengths.max() <= x.shape[1]
    # the constant feature of a mixture is cos + sin of an angle below 90 degrees, past neither part's end
    constant = x[..., -1]
    real = torch.arange(x.shape[1]) < lengths[:, None]
    assert (constant[real] > 0.999).all()
    assert (constant[real] < 1.415).all()


def test_report(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Naive errs by 2, linear by 1, the LSTM by 0.5 in one series and by 3 in the other; its interval is 1 wide each way."""
    truth = torch.full((2, 3, H), 10.0, dtype=torch.float64)
    lstm = truth + torch.tensor([0.5, 3.0]).view(2, 1, 1)
    made = torch.stack([truth + 2, truth - 1, lstm - 1, lstm, lstm + 1])
    mase = script.report(made, truth, torch.full((2, 3, 1), 2.0))
    assert mase.tolist() == [0.25, 1.5]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "seasonal naive      1.000     0 of 2 series     1 of 2 series",
        "linear              0.500     1 of 2 series     1 of 2 series",
        "LSTM                0.875     1 of 2 series",
        "the LSTM is not better than linear in: MASE, MASE at origin 1, MASE at origin 2, MASE at origin 3",
        "80% interval of the LSTM: 50.0% of the truth is inside",
    ]


def test_report_of_a_constant_series(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    truth = torch.full((1, 3, H), 10.0, dtype=torch.float64)
    script.report(torch.stack([truth, truth, truth, truth + 1, truth + 2]), truth, torch.full((1, 3, 1), 2.0))
    out = capsys.readouterr().out
    assert "inf" not in out
    assert "nan" not in out
    for name in ("seasonal naive", "linear"):
        assert f"the LSTM is not better than {name} in: MASE, " in out


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_picture_has_a_panel_for_each_series(
    script: ModuleType, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list = []
    monkeypatch.setattr(script, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    names = ["$\\frac$", "begin" + 100 * "x" + "end", "c", "d", "e", "f", "g", "h"]
    series = [script.Series(name, 0, values_of(50, k), "homes") for k, name in enumerate(names[:count])]
    made = torch.rand(5, count, script.ORIGINS, H)
    script.plot(tmp_path / "x.png", series, made, torch.arange(count) / 4, [f"day {t}" for t in range(50)])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes
    assert len(axes) == min(6, count)
    assert all("linear" in [line.get_label() for line in axis.lines] for axis in axes)
    assert {axis.get_ylabel() for axis in axes} == {"homes"}
    assert axes[0].get_title() == "$\\frac$ (MASE of the LSTM: 0.00)"
    if count > 1:
        title = axes[1].get_title()
        assert title.startswith("beginxxx")
        assert "\u2026" in title
        assert title.endswith("xxxend (MASE of the LSTM: 0.25)")
        assert axes[1].title.get_window_extent().x1 < figures[0].bbox.x1


def test_housing(script: ModuleType) -> None:
    series, months = script.housing(72)
    assert (months[0], months[-1], len(months)) == ("2000-01", "2015-06", 186)
    lengths = [len(s.values) for s in series]
    assert len(series) > 100
    assert min(lengths) >= 72
    assert len(set(lengths)) > 20
    for s in series:
        assert s.start + len(s.values) == 186
        assert s.values.isfinite().all()
    (abilene,) = [s for s in series if s.name == "Abilene, sales"]
    assert abilene.values[:3].tolist() == [72, 98, 130]


def test_reads_a_csv_in_any_order(script: ModuleType, tmp_path: Path) -> None:
    rows = [f"b,2001-{m:02},{m}" for m in range(12, 3, -1)] + [f"a,2001-{m:02},-{m}e1" for m in range(1, 13)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["series,time,value", *rows]))
    series, names = script.read_csv(path)
    found = {s.name: (s.start, s.values.tolist()) for s in series}
    assert found == {"a": (0, [-10.0 * m for m in range(1, 13)]), "b": (3, [float(m) for m in range(4, 13)])}
    assert names == [f"2001-{m:02}" for m in range(1, 13)]


def test_numbers_as_times_are_in_order_of_size(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("series,time,value\n" + "\n".join(f"a,{t},{t * t}" for t in (9, 10, 8, 11)))
    assert script.read_csv(path)[0][0].values.tolist() == [64, 81, 100, 121]


WHY = "2 periods of 12 to read, a horizon of {} to learn from and 3 to forecast"
GOOD = "a,1,5\na,2,6\na,3,7\na,4,8\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,time,value\n" + GOOD, "expected UTF-8 CSV of series, time, value: Usecols do not match"),
        ("", "expected UTF-8 CSV of series, time, value: No columns"),
        ('series,time,value\na,1,"5\n', "expected UTF-8 CSV of series, time, value: Error tokenizing"),
        ("series,time,value\na,1,5\na,2,six\n", "line 3: expected a number in column value, got 'six'"),
        ("series,time,value\na,1,5\na,2,\n", "line 3: expected a number in column value, got ''"),
        ("series,time,value\na,1,5\na,2,inf\n", "line 3: expected a number in column value, got 'inf'"),
        ("series,time,value\na,1,5\na,2\n", "line 3: expected a number in column value"),
        ("series,time,value\na,1,5\n\na,2,6\n", "line 3: expected a number, or an ISO date in all rows in column time"),
        ("series,time,value\na,1,5\na,May,6\n", "line 3: expected a number, or an ISO date in all rows in column time"),
        (
            "series,time,value\n" + GOOD + "b,1,1\nb,4,1\n",
            "line 7: expected all times of the file in 'b', each once, got none at 2",
        ),
        (
            "series,time,value\n" + GOOD + "a,2,9\n",
            "line 6: expected all times of the file in 'a', each once, got 2 again",
        ),
    ],
)
def test_bad_csv(script: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as error:
        script.read_csv(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        ("series,time,value\n\u00e9,1,2\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
        (bytes(range(256)), "Usecols|decode"),
    ],
    ids=["missing", "latin-1", "binary"],
)
def test_files_that_are_not_csv(script: ModuleType, tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        script.read_csv(path)
    message = str(error.value)
    assert re.match(f"{re.escape(str(path))}: expected UTF-8 CSV of series, time, value: .*({why})", message)
    assert "\n" not in message


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *args],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_short_run_writes_the_picture(tmp_path: Path) -> None:
    done = run(tmp_path, "--minutes", "0.02")
    assert done.returncode == 0, done.stderr
    assert "origin 3 of 3" in done.stderr
    assert (tmp_path / "runs" / "forecast.png").read_bytes().startswith(b"\x89PNG")
    first, *lines = done.stdout.splitlines()
    notes, lines = lines[:3], lines[3:]
    assert first == "114 series of 77 values or more; origins: 3, horizon: 12"
    for k, note in enumerate(notes):
        ended = f"note: origin {k + 1} of 3: --minutes ended the training after (\\d+) of 400 steps"
        assert 0 < int(re.fullmatch(ended, note)[1]) < 400
    naive, linear, lstm = (line.split() for line in lines[2:5])
    assert [naive[0], linear[0], lstm[0]] == ["seasonal", "linear", "LSTM"]
    assert float(naive[2]) > float(linear[1]) > 0
    assert 0 < float(lines[-2].split()[5].rstrip("%")) < 100
    assert lines[-1] == f"picture: {Path('runs/forecast.png')}"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process")
def test_an_interrupted_run_ends_in_a_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--device", "cpu"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while "origin 1" not in seen:
        assert process.poll() is None
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted: training is lost\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--csv", "missing.csv"], "missing.csv: expected UTF-8 CSV of series, time, value: No such file or directory"),
        (["--csv", "short.csv"], f"short.csv: expected 72 values ({WHY.format(12)}), got 1 of 'a'"),
        (["--csv", "head.csv"], f"head.csv: expected 72 values ({WHY.format(12)}), got 0 of 'any series'"),
        (["--horizon", "60"], f"housing: expected 264 values ({WHY.format(60)}), got 0 of 'any series'"),
        (["--horizon", "0"], "expected --period, --horizon, --minutes > 0, --seed >= 0, got (12, 0, 3.0, 0)"),
        (["--minutes", "nan"], "--minutes > 0, --seed >= 0, got (12, 12, nan, 0)"),
        (["--seed", "-1"], "--seed >= 0, got (12, 12, 3.0, -1)"),
        (["--device", "nonsense"], "expected --device and folder runs to work, got nonsense: "),
    ],
)
def test_errors_say_what_was_expected(
    script: ModuleType, tmp_path: Path, args: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "head.csv").write_text("series,time,value\n")
    (tmp_path / "short.csv").write_text("series,time,value\na,1,5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forecast.py", "--device", "cpu", *args])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert message in (capsys.readouterr().err if error.value.code == 2 else str(error.value))
