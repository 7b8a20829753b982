"""One LSTM forecasts many time series of different lengths, with intervals, beside two baselines.

    python examples/forecast.py                                  # half a minute on a CPU, writes runs/forecast.png
    python examples/forecast.py --csv FILE --period 24 --horizon 48

The series are home sales, listings and median prices of Texan cities by month (the TAMU Real Estate Center's, as shipped by
plotnine), or a CSV in long format: a row per value, with columns series, time (a number or an ISO date) and value.
The last horizons of every series are forecast one after the other, each by models fitted anew to what came before. The LSTM
takes all series as a padded batch, with `lengths=`, and gives quantiles of a whole horizon (Wen 2017, arXiv:1711.11053).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from matplotlib.figure import Figure
from plotnine.data import txhousing
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import fused_lstm

QUANTILES = (0.1, 0.5, 0.9)  # the outer ones bound an interval of 80%
ORIGINS = 3  # forecasts of each series, a horizon apart; the last ends with the series
HIDDEN, DROPOUT, BATCH, STEPS, LR = 64, 0.3, 32, 400, 3e-3
NAMES = ("seasonal naive", "linear", "LSTM")


class Series(NamedTuple):
    name: str
    start: int  # the first value's place in the calendar that all series share
    values: Tensor  # (n,), fp64


def housing(needed: int) -> tuple[list[Series], list[str]]:
    """Series of at least ``needed`` values after their last gap, and the names of the months that they are of."""
    found = []
    table = txhousing[txhousing.date < 2015.5].sort_values("date")  # many cities lack the last month
    for city, rows in table.groupby("city"):
        for kind in ("sales", "listings", "median"):
            values = torch.tensor(rows[kind].to_numpy())
            start = int(values.isnan().nonzero()[-1]) + 1 if values.isnan().any() else 0
            if len(values) - start >= needed:
                found.append(Series(f"{city}, {kind}", start, values[start:]))
    if not found:
        sys.exit(f"expected a smaller --period or --horizon: no series has the {needed} values that they need")
    return found, [f"{year}-{month:02}" for year, month in zip(rows.year, rows.month, strict=True)]


def read_csv(path: Path, needed: int) -> tuple[list[Series], list[str]]:
    """Series of at least ``needed`` values, and all times of the file in order, of which no series may leave one out."""
    table = pandas.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False)
    if table.empty or not {"series", "time", "value"} <= set(table.columns):
        sys.exit(f"{path}: expected rows of columns series, time, value, got {len(table)} of {', '.join(table.columns)}")
    times, values = (pandas.to_numeric(table[column], errors="coerce") for column in ("time", "value"))
    if times.isna().all():
        times = pandas.to_datetime(table.time, format="ISO8601", errors="coerce", utc=True)
    for name, read, kind in (("time", times, "a number, or an ISO date in all rows"), ("value", values, "a number")):
        for k in table.index[read.isna() | read.isin([math.inf, -math.inf])]:
            sys.exit(f"{path}, line {k + 2}: expected {kind} in column {name}, got {table[name][k]!r}")
    table, found = table.assign(value=values.astype(float), step=times.rank(method="dense").astype(int) - 1), []
    for name, rows in table.sort_values("step", kind="stable").groupby("series", sort=False):
        for k in rows.index[rows.step.diff().fillna(1) != 1]:
            sys.exit(f"{path}, line {k + 2}: expected all times of the file in {name!r}, each once, got {rows.time[k]}")
        if len(rows) < needed:
            sys.exit(f"{path}, line {rows.index.max() + 2}: expected {needed} values or more of {name!r}, got {len(rows)}")
        found.append(Series(str(name), int(rows.step.iloc[0]), torch.tensor(rows.value.to_numpy())))
    return found, table.groupby("step").time.first().tolist()


def naive(values: Tensor, period: int, horizon: int) -> Tensor:
    """Seasonal naive forecasts at every step that ends a period, (n - period + 1, horizon): the period again."""
    return values.unfold(0, period, 1).repeat(1, math.ceil(horizon / period))[:, :horizon]


def features(series: Series, period: int) -> tuple[Tensor, Tensor]:
    """What the models read at every step from the end of two periods, (n - 2*period + 1, I), and the scale there, as in
    MASE: the mean absolute change over a period. Level and scale are those of the values up to the step."""
    y, steps = series.values, torch.arange(2 * period - 1, len(series.values))
    lags = y.unfold(0, 2 * period, 1)
    scale = (y[period:] - y[:-period]).abs().cumsum(0)[period - 1 :] / (steps - period + 1)
    scale = scale.maximum(1e-3 * lags.abs().mean(1)).clamp_min(1e-9)[:, None]  # a series may begin with a constant
    angle = 2 * math.pi * (series.start + steps[:, None]) / period
    season = [wave(k * angle) for k in (1, 2) for wave in (torch.sin, torch.cos)]
    lags = (lags - lags[:, period:].mean(1, keepdim=True)) / scale
    return torch.cat([lags, *season, torch.ones_like(scale)], 1), scale


def examples(series: Series, period: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Features (N, I) and targets (N, horizon): what then came, less the naive forecast, in scales."""
    (x, scale), base = features(series, period), naive(series.values, period, horizon)[period:]
    target = (series.values.unfold(0, horizon, 1)[2 * period :] - base[:-horizon]) / scale[:-horizon]
    return x[:-horizon].float(), target.float()


def fit_linear(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Weights (I, horizon) of a ridge regression on the last two periods and the season, one for all series."""
    x, y = (torch.cat(part).double() for part in zip(*rows, strict=True))
    return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y).float()


class Forecaster(nn.Module):
    """An LSTM and a linear way past it, both relative to the naive forecast and in scales. Begins as the linear baseline."""

    def __init__(self, linear: Tensor) -> None:
        super().__init__()
        self.lstm = fused_lstm.LSTM(len(linear), HIDDEN, batch_first=True)
        self.dropout, self.head = nn.Dropout(DROPOUT), nn.Linear(HIDDEN, len(QUANTILES) * linear.shape[1])
        self.linear = nn.Parameter(linear.clone())
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """A padded batch (B, T, I) to quantiles at every step, (B, T, 3, horizon)."""
        hidden, _ = self.lstm(x, lengths=lengths)
        low, median, high = self.head(self.dropout(hidden)).unflatten(-1, (3, -1)).unbind(-2)
        median = median + x @ self.linear
        return torch.stack([median - nn.functional.softplus(low), median, median + nn.functional.softplus(high)], -2)


@torch.no_grad()
def forecast(linear: Tensor, lstm: Forecaster, histories: list[Series], period: int) -> Tensor:
    """What follows the last value of each history, of which alone it is made: naive, linear, quantiles (B, 5, horizon)."""
    rows, scales = zip(*(features(s, period) for s in histories), strict=True)
    x = pad_sequence(rows, batch_first=True).to(linear)
    lengths = torch.tensor([len(row) for row in rows], device=x.device)
    line = (x @ linear)[:, :, None]
    steps = torch.cat([torch.zeros_like(line), line, lstm(x, lengths)], 2)  # forecasts at all steps; wanted is the last
    out = steps[torch.arange(len(rows), device=x.device), lengths - 1].cpu().double()
    base = torch.stack([naive(s.values, period, linear.shape[1])[-1:] for s in histories])
    return base + torch.stack([scale[-1:] for scale in scales]) * out


def draw(rows: list[tuple[Tensor, Tensor]], shortest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random pieces, each mixed with another, as a padded batch: features, targets and lengths. From whole series the LSTM
    would learn the years by heart; mixtures are plausible series too, and many more (Ansari 2024, arXiv:2403.07815)."""
    pieces = []
    for k in torch.randint(len(rows), (BATCH,)).tolist():
        length = int(torch.randint(min(len(rows[k][0]), shortest), len(rows[k][0]) + 1, ()))
        begin = int(torch.randint(len(rows[k][0]) - length + 1, ()))
        pieces.append([part[begin : begin + length] for part in rows[k]])
    lengths = torch.tensor([len(x) for x, _ in pieces])
    angle = math.pi / 2 * torch.rand(BATCH, 1, 1)  # the squared weights' sum is 1, which keeps the size of the noise
    padded = (pad_sequence(part, batch_first=True) for part in zip(*pieces, strict=True))
    x, y = (angle.cos() * part + angle.sin() * part.roll(1, 0) for part in padded)
    return x, y, lengths.minimum(lengths.roll(1, 0))


def train(linear: Tensor, rows: list[tuple[Tensor, Tensor]], period: int, seconds: float, title: str) -> Forecaster:
    """Trains on features and targets for STEPS, or for so many seconds, on the device of ``linear``."""
    model, began = Forecaster(linear).to(linear.device), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters())  # its default decay, 0.01
    for step in tqdm(range(STEPS), desc=title, unit="step", mininterval=1):
        if (done := max(step / STEPS, (time.perf_counter() - began) / seconds)) >= 1:
            break
        optimizer.param_groups[0]["lr"] = LR * min(10 * (step + 1) / STEPS, 1 - done)  # up, then down to 0
        x, y, lengths = (part.to(linear.device) for part in draw(rows, period))
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # not padding
        error = y.unsqueeze(-2) - model(x, lengths)
        loss = ((linear.new_tensor(QUANTILES)[:, None] - (error < 0).float()) * error)[real].mean()  # pinball loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def report(made: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    """Prints the table; returns the LSTM's MASE of each series. made, (5, series, origins, horizon): as by ``forecast``."""
    points, inside = made[[0, 1, 3]], (made[2] <= truth) & (truth <= made[4])
    errors = (points - truth).abs() / scale
    smape = 2 * (points - truth).abs() / (points.abs() + truth.abs()).clamp_min(1e-9)
    mase, best = errors.mean((2, 3)), errors.mean((2, 3)).argmin(0)
    at_origin = {f"MASE at origin {i + 1}": e for i, e in enumerate(errors.mean((1, 3)).unbind(1))}
    means = {"MASE": mase.mean(1), "sMAPE": smape.mean((1, 2, 3)), **at_origin}
    print(f"{'means':16}   MASE   sMAPE          best in   the LSTM against it: MASE, lower in, not better in the mean of")
    for k, name in enumerate(NAMES):
        print(f"{name:16}{means['MASE'][k]:7.3f}{means['sMAPE'][k]:8.2%}{(best == k).sum():4} of {len(best)} series", end="")
        behind = ", ".join(what for what, e in means.items() if e[2] >= e[k]) or "nothing"
        ratio = means["MASE"][2] / means["MASE"][k] - 1
        print(f"   {ratio:+.1%}, {(mase[2] < mase[k]).sum()} series, {behind}" if k < 2 else "")
    print(f"80% interval of the LSTM: {inside.double().mean():.1%} of the truth is inside")
    return mase[2]


def plot(path: Path, series: list[Series], made: Tensor, mase: Tensor, calendar: list[str]) -> None:
    """Six series, evenly spaced in rank of the LSTM's MASE. made: as in ``report``."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    chosen = mase.argsort()[torch.linspace(0, len(mase) - 1, min(6, len(mase))).long()].tolist()
    for axis, k in zip(figure.subplots(3, 2).flat, chosen, strict=False):
        end, (origins, horizon) = series[k].start + len(series[k].values), made.shape[2:]
        steps, seen = range(end - origins * horizon, end), series[k].values[-2 * origins * horizon :]
        axis.plot(range(end - len(seen), end), seen, "k", linewidth=1.2, label="truth")
        axis.plot(steps, made[0, k].flatten(), "--", color="#e67e22", linewidth=1.2, label=NAMES[0])
        axis.plot(steps, made[3, k].flatten(), color="#1f618d", linewidth=1.8, label="LSTM, median")
        axis.fill_between(steps, *made[[2, 4], k].flatten(1), color="#5dade2", alpha=0.35, label="LSTM, 80% interval")
        axis.set_title(f"{series[k].name} (MASE of the LSTM: {mase[k]:.2f})")
        axis.set_xticks(steps[::horizon], [calendar[t] for t in steps[::horizon]])
        axis.grid(axis="x", linestyle=":", color="gray")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("time; at each dotted line a forecast begins, made from the values before it")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, metavar="FILE", help="series,time,value rows (default: Texan housing by month)")
    parser.add_argument("--period", type=int, default=12, help="steps in a season (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=12, help="steps to forecast at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="train for so long at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    period, horizon = args.period, args.horizon
    if not min(period, horizon, args.minutes) > 0:
        sys.exit(f"expected positive --period, --horizon and --minutes, got {period}, {horizon} and {args.minutes}")
    needed = 2 * period + (ORIGINS + 1) * horizon  # one horizon to learn from before the first origin
    series, calendar = read_csv(args.csv, needed) if args.csv else housing(needed)
    lengths = [len(s.values) for s in series]
    print(f"{len(series)} series of {min(lengths)} to {max(lengths)} values; origins: {ORIGINS}, horizon: {horizon}")
    if early := sum(s.start + len(s.values) < len(calendar) for s in series):
        print(f"note: {early} series end before others, whose later values the models learn from")
    torch.manual_seed(args.seed)
    outputs, scales = [], []
    for k in range(ORIGINS, 0, -1):
        pasts = [s._replace(values=s.values[: -k * horizon]) for s in series]
        rows = [examples(s, period, horizon) for s in pasts]
        linear = fit_linear(rows).to(args.device)
        lstm = train(linear, rows, period, 60 * args.minutes / ORIGINS, f"origin {ORIGINS - k + 1} of {ORIGINS}")
        outputs.append(forecast(linear, lstm, pasts, period))
        scales.append(torch.stack([features(s, period)[1][-1] for s in pasts]))
    made, scale = torch.stack(outputs, 2).movedim(1, 0), torch.stack(scales, 1)
    truth = torch.stack([s.values[-ORIGINS * horizon :].view(ORIGINS, horizon) for s in series])
    plot(Path("runs/forecast.png"), series, made, report(made, truth, scale), calendar)


if __name__ == "__main__":
    try:
        main()
    except (OSError, pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        sys.exit(f"forecast.py: expected a CSV file and a folder to write to, got {error}")
