"""One LSTM forecasts many time series of different lengths, with intervals, beside two baselines.

    python examples/forecast.py                                  # half a minute on a CPU, writes runs/forecast.png
    python examples/forecast.py --csv FILE --period 24 --horizon 48

The series are home sales, listings and median prices of Texan cities by month (TAMU Real Estate Center, from plotnine), or
a CSV of series, time (a number or an ISO date) and value. The last 3 horizons are forecast in turn, by models fitted to what
came before: a series needs 2 periods to read, 1 horizon to learn from, 3 to forecast. The LSTM takes all in a padded batch,
by `lengths=`, and gives quantiles of a horizon (Wen 2017, arXiv:1711.11053). Ctrl-C loses what was trained.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pandas
import torch
from matplotlib.figure import Figure
from plotnine.data import txhousing
from torch import Tensor, nn
from tqdm import tqdm

import fused_lstm

QUANTILES = (0.1, 0.5, 0.9)  # the outer ones bound an interval of 80%
ORIGINS = 3  # forecasts of each series, a horizon apart; the last ends with the series
HIDDEN, DROPOUT, BATCH, STEPS, LR = 64, 0.3, 32, 400, 3e-3
NAMES = ("seasonal naive", "linear", "LSTM")
Series = namedtuple("Series", ["name", "start", "values", "unit"], defaults=["value"])  # start: in the common calendar


def housing(needed: int) -> tuple[list[Series], list[str]]:
    """Series of at least ``needed`` values after their last gap, and the names of the months that they are of."""
    found = []
    table = txhousing[txhousing.date < 2015.5].sort_values("date")  # many cities lack the last month
    for city, rows in table.groupby("city"):
        for kind, unit in (("sales", "homes sold"), ("listings", "homes for sale"), ("median", "median price in $")):
            values = torch.tensor(rows[kind].to_numpy())
            start = int(values.isnan().nonzero()[-1]) + 1 if values.isnan().any() else 0
            if len(values) - start >= needed:
                found.append(Series(f"{city}, {kind}", start, values[start:], unit))
    return found, [f"{year}-{month:02}" for year, month in zip(rows.year, rows.month, strict=True)]


def read_csv(path: Path) -> tuple[list[Series], list[str]]:
    """The series, and all times of the file in order, of which no series may leave one out after its first."""
    options = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "index_col": False}
    try:
        table = pandas.read_csv(path, usecols=["series", "time", "value"], **options)
    except (OSError, ValueError) as error:  # pandas' own and those of the encoding are ValueErrors
        sys.exit(f"{path}: expected UTF-8 CSV of series, time, value: {str(getattr(error, 'strerror', 0) or error).strip()}")
    times, values = (pandas.to_numeric(table[column], errors="coerce") for column in ("time", "value"))
    if times.isna().all():
        times = pandas.to_datetime(table.time, format="ISO8601", errors="coerce", utc=True)
    for name, read, kind in (("time", times, "a number, or an ISO date in all rows"), ("value", values, "a number")):
        for k in table.index[read.isna() | read.isin([math.inf, -math.inf])]:
            sys.exit(f"{path}, line {k + 2}: expected {kind} in column {name}, got {table[name][k]!r}")
    table, found = table.assign(value=values.astype(float), step=times.rank(method="dense").astype(int) - 1), []
    calendar = table.groupby("step").time.first().tolist()
    for name, rows in table.sort_values("step", kind="stable").groupby("series", sort=False):
        ahead = rows.step.diff().fillna(1)
        for k in rows.index[ahead != 1]:
            got = f"none at {calendar[int(rows.step[k] - ahead[k]) + 1]}" if ahead[k] else f"{rows.time[k]} again"
            sys.exit(f"{path}, line {k + 2}: expected all times of the file in {name!r}, each once, got {got}")
        found.append(Series(str(name), int(rows.step.iloc[0]), torch.tensor(rows.value.to_numpy())))
    return found, calendar


def naive(values: Tensor, period: int, horizon: int) -> Tensor:
    """Seasonal naive forecasts at every step that ends a period, (n - period + 1, horizon): the period again."""
    return values.unfold(0, period, 1).repeat(1, math.ceil(horizon / period))[:, :horizon]


def features(series: Series, period: int) -> tuple[Tensor, Tensor]:
    """Inputs at every step from the end of two periods, (n - 2*period + 1, I), and MASE's scale by the values up to it."""
    y, steps = series.values, torch.arange(2 * period - 1, len(series.values))
    lags = y.unfold(0, 2 * period, 1)
    scale = (y[period:] - y[:-period]).abs().cumsum(0)[period - 1 :] / (steps - period + 1)
    scale = scale.maximum(1e-3 * lags.abs().mean(1)).clamp_min(1e-9)[:, None]  # a series may begin with a constant
    angle = 2 * math.pi * (series.start + steps[:, None]) / period
    season = [wave(k * angle) for k in (1, 2) for wave in (torch.sin, torch.cos)]
    return torch.cat([(lags - lags[:, period:].mean(1, keepdim=True)) / scale, *season, torch.ones_like(scale)], 1), scale


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
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(linear)
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
    padded = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*pieces, strict=True))
    return *(angle.cos() * part + angle.sin() * part.roll(1, 0) for part in padded), lengths.minimum(lengths.roll(1, 0))


def train(linear: Tensor, rows: list[tuple[Tensor, Tensor]], period: int, seconds: float, title: str) -> Forecaster:
    """Trains on features and targets for STEPS, or for so many seconds, on the device of ``linear``."""
    model = Forecaster(linear).to(linear.device)
    optimizer = torch.optim.AdamW(model.parameters())  # its default decay, 0.01
    for step in (bar := tqdm(range(STEPS), desc=title, unit="step", mininterval=1)):
        if (done := max(step / STEPS, bar.format_dict["elapsed"] / seconds)) >= 1:
            tqdm.write(f"note: {title}: --minutes ended the training after {step} of {STEPS} steps")
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
    errors = (made[[0, 1, 3]] - truth).abs() / scale
    mase, best = errors.mean((2, 3)), errors.mean((2, 3)).argmin(0)
    means = {"MASE": mase.mean(1)} | {f"MASE at origin {i + 1}": e for i, e in enumerate(errors.mean((1, 3)).unbind(1))}
    print("MASE: the mean error, in units of the mean change over a period before the forecast; lower is better")
    print(f"{'':16}mean MASE    most accurate in    LSTM more accurate in")
    for k, name in enumerate(NAMES):
        beaten = f"{(mase[2] < mase[k]).sum():6} of {len(best)} series" if name != "LSTM" else ""
        print(f"{name:16}{means['MASE'][k]:9.3f}{(best == k).sum():6} of {len(best)} series{beaten}")
    for k, name in enumerate(NAMES[:2]):
        if behind := [what for what, e in means.items() if e[2] >= e[k]]:
            print(f"the LSTM is not better than {name} in: {', '.join(behind)}")
    inside = (made[2] <= truth) & (truth <= made[4])
    print(f"80% interval of the LSTM: {inside.double().mean():.1%} of the truth is inside")
    return mase[2]


def plot(path: Path, series: list[Series], made: Tensor, mase: Tensor, calendar: list[str]) -> None:
    """Six series, evenly spaced in rank of the LSTM's MASE. made: as in ``report``."""
    chosen = mase.argsort()[torch.linspace(0, len(mase) - 1, min(6, len(mase))).long()].tolist()
    figure = Figure(figsize=(10, 1 + 2.2 * len(chosen)), layout="constrained")
    for axis, k in zip(figure.subplots(len(chosen), squeeze=False).flat, chosen, strict=True):
        end, (origins, horizon) = series[k].start + len(series[k].values), made.shape[2:]
        steps, seen = range(end - origins * horizon, end), series[k].values[-2 * origins * horizon :]
        axis.plot(range(end - len(seen), end), seen, "k", linewidth=1.2, label="truth")
        axis.plot(steps, made[0, k].flatten(), "--", color="#e67e22", linewidth=1.2, label=NAMES[0])
        axis.plot(steps, made[3, k].flatten(), color="#1f618d", linewidth=1.8, label="LSTM, median")
        axis.plot(steps, made[1, k].flatten(), color="#2ecc71", linewidth=0.8, label=NAMES[1])
        axis.fill_between(steps, *made[[2, 4], k].flatten(1), color="#5dade2", alpha=0.35, label="LSTM, 80% interval")
        name = series[k].name if len(series[k].name) <= 36 else f"{series[k].name[:18]}\u2026{series[k].name[-17:]}"
        axis.set_title(f"{name} (MASE of the LSTM: {mase[k]:.2f})", parse_math=False)
        axis.set(ylabel=series[k].unit, xticks=steps[::horizon], xticklabels=[calendar[t] for t in steps[::horizon]])
        axis.grid(axis="x", linestyle=":", color="gray")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.supxlabel("time; at each dotted line a forecast begins, made from the values before it")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="series,time,value rows (default: Texan housing by month)")
    parser.add_argument("--period", type=int, default=12, help="steps in a season (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=12, help="steps to forecast at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="train for so long at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    period, horizon, minutes, seed = args.period, args.horizon, args.minutes, args.seed
    if not (min(period, horizon) > 0 and 0 < minutes < math.inf and 0 <= seed < 2**31):
        parser.error(f"expected --period, --horizon, --minutes > 0, --seed >= 0, got {period, horizon, minutes, seed}")
    try:
        torch.zeros(1, device=args.device).item()
        Path("runs").mkdir(exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(f"expected --device and folder runs to work, got {args.device}: {str(error).splitlines()[0]}")
    needed = 2 * period + (ORIGINS + 1) * horizon
    series, calendar = read_csv(args.csv) if args.csv else housing(needed)
    least = min(series, key=lambda s: len(s.values), default=Series("any series", 0, torch.empty(0)))
    if len(least.values) < needed:
        why = f"2 periods of {period} to read, a horizon of {horizon} to learn from and {ORIGINS} to forecast"
        sys.exit(f"{args.csv or 'housing'}: expected {needed} values ({why}), got {len(least.values)} of {least.name!r}")
    print(f"{len(series)} series of {len(least.values)} values or more; origins: {ORIGINS}, horizon: {horizon}")
    if early := sum(s.start + len(s.values) < len(calendar) for s in series):
        print(f"note: {early} series end before others, whose later values the models learn from")
    torch.manual_seed(seed)
    outputs, scales = [], []
    for k in range(ORIGINS, 0, -1):
        pasts = [s._replace(values=s.values[: -k * horizon]) for s in series]
        rows = [examples(s, period, horizon) for s in pasts]
        linear = fit_linear(rows).to(args.device)
        lstm = train(linear, rows, period, 60 * minutes / ORIGINS, f"origin {ORIGINS - k + 1} of {ORIGINS}")
        outputs.append(forecast(linear, lstm, pasts, period))
        scales.append(torch.stack([features(s, period)[1][-1] for s in pasts]))
    made, scale = torch.stack(outputs, 2).movedim(1, 0), torch.stack(scales, 1)
    truth = torch.stack([s.values[-ORIGINS * horizon :].view(ORIGINS, horizon) for s in series])
    plot(Path("runs/forecast.png"), series, made, report(made, truth, scale), calendar)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(print("\ninterrupted: training is lost", file=sys.stderr) or 130))
    main()
