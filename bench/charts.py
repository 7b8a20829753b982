"""The charts of a report, each for light and for dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from report import Record, Results

# Text, grid, and the colours of up to three series; both sets are told apart with impaired colour vision, too.
THEMES = {
    "light": ("#24292f", "#d0d7de", ("#0969da", "#bc4c00", "#57606a")),
    "dark": ("#e6edf3", "#3d444d", ("#58a6ff", "#f0883e", "#9198a1")),
}


def draw(results: Results, out: Path) -> list[str]:
    """Write the charts that the results have numbers for; returns their names."""
    drawn = []
    for name, (wanted, of) in {"speed": (speeds, speed), "grid": (grids, grid), "memory": (memories, memory)}.items():
        numbers = wanted(results)
        if not numbers:
            continue
        for theme, colours in THEMES.items():
            with plt.rc_context(style(*colours[:2])):
                figure = of(numbers, colours, results)
                figure.savefig(
                    out / f"{results.slug}-{name}-{theme}.svg", transparent=True, bbox_inches="tight",
                    metadata={"Date": None, "Description": f"numbers: {results.digest}"},
                )  # fmt: skip
                plt.close(figure)
        drawn.append(name)
    return drawn


def style(text: str, lines: str) -> dict[str, Any]:
    plain = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), text)
    return plain | {
        "axes.edgecolor": lines, "grid.color": lines, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.facecolor": "none", "font.size": 10, "axes.titlesize": 11,
        "svg.hashsalt": "fused_lstm",
    }  # fmt: skip


def where(results: Results) -> str:
    threads = f", {results.about['threads']} threads" if results.about.get("threads", 1) > 1 else ""
    return f"{results.about['device']}{threads}, torch {results.about['torch']}, {results.about['date'][:10]}"


# --- speed of each workload


def speeds(results: Results) -> list[tuple[str, dict[str, Record]]]:
    found: dict[str, dict[str, Record]] = {}
    for r in results.records("workloads", "fused"):
        if "torch" in r.get("ratio", {}):
            ways = {"lengths": "lengths", "resets": "resets"}
            way = f" ({ways[r['variant']]})" if r["variant"] in ways else ""
            found.setdefault(f"{r['name']}{way}, {r['dtype']}", {})[r["mode"]] = r
    return sorted(found.items(), key=lambda item: -max(r["ratio"]["torch"][1] for r in item[1].values()))


def speed(rows: list[tuple[str, dict[str, Record]]], theme: tuple[str, str, Sequence[str]], results: Results) -> Any:
    text, _, colours = theme
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(rows)))
    modes = [m for m in ("inference", "training") if any(m in found for _, found in rows)]
    height = 0.8 / len(modes)
    highest = max(r["ratio"]["torch"][2] for _, found in rows for r in found.values())
    for k, mode in enumerate(modes):
        places, values, low, high = [], [], [], []
        for n, (_, found) in enumerate(rows):
            if mode in found:
                least, middle, most = found[mode]["ratio"]["torch"]
                places.append(n + (k - (len(modes) - 1) / 2) * height)
                values.append(middle)
                low.append(middle - least)
                high.append(most - middle)
        axes.barh(places, [v - 1 for v in values], height * 0.9, left=1, color=colours[k], label=mode)
        axes.errorbar(values, places, xerr=[low, high], fmt="none", ecolor=text, elinewidth=0.8, capsize=2)
        for place, value, up in zip(places, values, high, strict=True):
            at = (max(value + up, 1), place)
            axes.annotate(f"{value:.2f}", at, (4, 0), textcoords="offset points", va="center", size=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *(r["ratio"]["torch"][0] for _, f in rows for r in f.values())) * 0.95, highest * 1.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.minorticks_off()
    axes.set_xticks([t for t in (0.5, 1, 2, 4, 8, 16, 32) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]])
    axes.axvline(1, color=text, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.6)
    axes.set_xlabel("speed against nn.LSTM (1x: equal; to the right fused_lstm is faster)")
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(f"Workloads of real projects\n{where(results)}", loc="left")
    return figure


# --- time of a step by size


def grids(results: Results) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points of each provider by H and by B; in units of the floor on a CPU, in microseconds of a step on a GPU."""
    gpu = results.about["kind"] == "cuda"
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    records = [r for r in results.records("grid") if "us" in r and r["T"] == 128 and r["mode"] == "training"]
    records = [r for r in records if r["name"].startswith("B=") and "floor_us" in r and r["provider"] in ("torch", "fused")]
    if not records:
        return {}
    for axis, other, at in (("H", "B", 16), ("B", "H", 256)):
        series: dict[str, list[tuple[int, float]]] = {}
        for r in sorted(records, key=lambda r: r[axis]):
            if r[other] == at:
                value = r["us_per_step"] if gpu else r["x_of_floor"]
                series.setdefault({"torch": "nn.LSTM", "fused": "fused_lstm"}[r["provider"]], []).append((r[axis], value))
                if r["provider"] == "fused":
                    series.setdefault("floor", []).append((r[axis], r["floor_us"] / r["T"] if gpu else 1.0))
        panels[f"{axis} ({other} = {at})"] = series
    return panels


def grid(panels: dict[str, dict[str, list[tuple[int, float]]]], theme: tuple, results: Results) -> Any:
    _, _, colours = theme
    figure, both = plt.subplots(1, len(panels), figsize=(8, 3.4), sharey=True)
    looks = {"nn.LSTM": (colours[1], "s-"), "fused_lstm": (colours[0], "o-"), "floor": (colours[2], "--")}
    for axes, (title, series) in zip(both, panels.items(), strict=True):
        for name, points in sorted(series.items(), key=lambda item: item[0] == "fused_lstm"):
            colour, look = looks[name]
            axes.plot(*zip(*points, strict=True), look, color=colour, label=name, markersize=5 if name == "nn.LSTM" else 3.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "1235" else ""))
        axes.set_xlabel(title)
        axes.grid(linewidth=0.6)
    gpu = results.about["kind"] == "cuda"
    both[0].set_ylabel("us of a step" if gpu else "time, in times of the floor")
    both[-1].legend(frameon=False)
    figure.suptitle(f"Forward and backward pass, T = 128\n{where(results)}", x=0.02, ha="left", size=11)
    figure.tight_layout()
    return figure


# --- memory


def memories(results: Results) -> list[tuple[str, dict[str, Record]]]:
    cases: dict[str, dict[str, Record]] = {}
    for r in results.records("memory"):
        if "peak_bytes" in r:
            cases.setdefault(r["name"], {})[r["provider"]] = r
    return list(cases.items())


def memory(rows: list[tuple[str, dict[str, Record]]], theme: tuple, results: Results) -> Any:
    """Bars of the peak, and in them what is kept for the backward pass; relative to nn.LSTM's peak."""
    text, _, colours = theme
    names = {"torch": "nn.LSTM", "fused": "fused_lstm", "fused-recompute": "fused_lstm, recompute=True"}
    colour = {"torch": colours[1], "fused": colours[0], "fused-recompute": colours[2]}
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.8 * len(rows)))
    for k, (provider, name) in enumerate(names.items()):
        for n, (_, found) in enumerate(rows):
            if provider not in found:
                continue
            unit, place = found["torch"]["peak_bytes"], n + (k - 1) * 0.27
            peak, kept = found[provider]["peak_bytes"], found[provider]["retained_bytes"]
            axes.barh(place, peak / unit, 0.24, color=colour[provider], alpha=0.45)
            axes.barh(place, kept / unit, 0.24, color=colour[provider], label=name if n == 0 else None)
            axes.annotate(f"{peak / 2**20:.0f} MiB, {kept / 2**20:.0f} kept", (peak / unit, place), (4, 0),
                          textcoords="offset points", va="center", size=8, color=text)  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.2)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.6)
    axes.set_xlabel("peak (pale) and what is kept for the backward pass (full), in nn.LSTM's peak")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.55 / len(rows)), ncols=3)
    axes.set_title(f"Memory of a training step\n{where(results)}", loc="left")
    return figure
