"""Tables and charts of result files.

    python bench/report.py [FILE ...] [--out FOLDER] [--readme README.md]

Writes FOLDER/README.md and its charts from the JSON files of bench/run.py and bench/gpu_check.py (default: those in
bench/results, into that folder). With --readme the part of that page between its two marks becomes the summary and the chart
of the newest results. Of several files of one device the newest counts. Every number is one of a record in a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from run import Record, means

FOLDER = Path(__file__).resolve().parent / "results"
MARKS = ("<!-- results -->\n", "<!-- end of results -->\n")
NAMES = {"torch": "nn.LSTM", "fused": "fused_lstm", "torch-plain": "nn.LSTM, plain", "fused-plain": "fused_lstm, plain"}
MODES = {"inference": "inference", "forward": "forward, with gradients", "training": "training"}
CASE = tuple(Case.__dataclass_fields__)


@dataclass(frozen=True)
class Results:
    """One result file."""

    path: Path
    data: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        return self.data["about"]

    @property
    def slug(self) -> str:
        """The device's name, and on a CPU the number of threads, as part of a file's name."""
        name = self.about["device"] + (f" {self.about['threads']} threads" if "threads" in self.about else "")
        return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())

    @property
    def digest(self) -> str:
        """Of the numbers, for the charts to say which ones they show."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    def records(self, suite: str, provider: str | None = None) -> list[Record]:
        return [r for r in self.data["records"] if r["suite"] == suite and provider in (None, r["provider"])]

    def other(self, record: Record, provider: str) -> Record:
        """Another provider's record of the same call; empty if there is none."""
        same = (*CASE, "mode")
        return next(
            (r for r in self.data["records"] if r["provider"] == provider and all(r[k] == record[k] for k in same)), {}
        )


def load(paths: Iterable[Path]) -> list[Results]:
    """The newest results of each device, newest first. Raises ValueError for a file that holds no results."""
    newest: dict[str, Results] = {}
    older = []
    for path in paths:
        try:
            results = Results(path, json.loads(path.read_text()))
            key = (results.about["date"], results.data["records"], results.slug, results.about["kind"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of bench/run.py ({type(error).__name__}: {error})") from error
        old = newest.get(key[2])
        if old is None or old.about["date"] < results.about["date"]:
            newest[key[2]] = results
            older += [old.path] if old else []
        else:
            older.append(path)
    for path in older:
        print(f"not shown: {path}, of which device there are newer results", file=sys.stderr)
    return sorted(newest.values(), key=lambda r: r.about["date"], reverse=True)


# --- words and tables


def times(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def spread(numbers: Sequence[float]) -> str:
    """Median and range."""
    low, middle, high = numbers
    return f"{times(middle)} ({times(low)}-{times(high)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def ratio(record: Record, base: str = "torch") -> str:
    if "refused" in record:
        return record["refused"].splitlines()[0].removeprefix("cannot run: ")
    return spread(record["ratio"][base]) if base in record.get("ratio", {}) else ""


def floors(results: Results, record: Record) -> str:
    """How far from the floor: ours, nn.LSTM's."""
    both = (record, results.other(record, "torch"))
    return " / ".join(times(r["x_of_floor"]) if "x_of_floor" in r else "-" for r in both)


def summary(results: Results) -> str:
    """A sentence: the geometric means over the workloads."""
    found: dict[tuple[str, str], list[str]] = {}
    for suite, what, mode, base, mean, count in means(results.data["records"]):
        if suite == "workloads" and mode != "forward":
            said = f"{times(mean)}x in {mode} ({count} case{'s' * (count > 1)})"
            found.setdefault((what.removeprefix("workloads, "), base), []).append(said)
    if not found:
        return f"No workloads were measured on {where(results)}."
    parts = [f"{what}{f', against {base}' * (base != 'nn.LSTM')}: {', '.join(said)}" for (what, base), said in found.items()]
    on = f"on {where(results)}, geometric means over the workloads of real projects"
    return f"Speed against `nn.LSTM` {on}: {'; '.join(parts)}."


def where(results: Results) -> str:
    threads = results.about.get("threads")
    return results.about["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def commit(results: Results) -> str:
    """The commit in short; a plus says that the checkout had changes beyond it."""
    name = results.about["commit"]
    return name[:12] + "+" * name.endswith("+")


def page(all_results: Sequence[Results], charts: dict[str, list[str]], out: Path = FOLDER) -> str:
    """The report, to be in the folder ``out``. ``charts``: for each device the names of its charts."""
    bench = Path(os.path.relpath(FOLDER.parent, out)).as_posix()
    lines = [
        "# Results", "",
        f"Made by `python bench/report.py` from the JSON files named here; [`bench/run.py`]({bench}/run.py) says how they "
        "are measured. A ratio is `nn.LSTM`'s time over the other's, call by call in turn: above 1 the other is faster. In "
        "brackets: from p20 to p80 of the rounds, or among the medians of the processes if that is wider. *x of floor* is a "
        f"time over the least that it may take ([`bench/cases.py`]({bench}/cases.py)): fused_lstm's / `nn.LSTM`'s; "
        "below 1, if ever, the machine was slower when the floor was measured.", "",
    ]  # fmt: skip
    for results in all_results:
        lines += device(results, charts.get(results.slug, []), out)
    return "\n".join(lines).rstrip() + "\n"


def device(results: Results, charts: Sequence[str], out: Path) -> Iterator[str]:
    about, options = results.about, results.data.get("options", {})
    yield f"## {about['device']}"
    yield ""
    skipped = ("device", "kind", "commit", "date")
    said = [f"{k} {v}" for k, v in about.items() if v is not None and k not in skipped]
    file = f"[`{results.path.name}`]({Path(os.path.relpath(results.path, out)).as_posix()})"
    yield f"{file}, {about['date'][:10]}, commit `{commit(results)}`; {', '.join(said)}."
    rounds = [f"{k} {options[k]}" for k in ("seconds", "processes", "seed") if k in options]
    yield f"Of each case: {', '.join(rounds)}." if rounds else ""
    if not results.data.get("complete", True):
        yield "**Ended early: some cases were measured by fewer processes, or not at all.**"
    if (about.get("load_before") or 0) > 0.5 and about["kind"] == "cpu":
        yield f"**The machine was busy with other work when this began (load {about['load_before']}).**"
    for name in results.data.get("checks_failed", []):
        yield f"**Failed: {name}.**"
    yield ""
    for name, title in CHARTS.items():
        if name in charts:
            yield from picture(f"{results.slug}-{name}", title)
    yield from sections(results)


def sections(results: Results) -> Iterator[str]:
    found = list(means(results.data["records"]))
    if found:
        yield "### Geometric means"
        yield ""
        rows = [(what, MODES[mode], base, times(mean), str(n)) for _, what, mode, base, mean, n in found]
        yield from table(("what", "mode", "against", "speed", "cases"), rows)
    yield from slower(results)
    for suite, title in SUITES.items():
        ours = [r for r in results.records(suite, "fused") if "refused" not in r]
        if ours:
            yield f"### {title}"
            yield ""
            yield from suite_table(results, suite, ours)
    if results.data.get("checks"):
        yield "### Checks"
        yield ""
        for name, check in results.data["checks"].items():
            said = check.get("failed") or check.get("not run")
            yield f"- {name}: {'**failed**, ' * ('failed' in check)}{said or 'passed'}"
        yield ""
    yield from not_run(results)
    yield from measured_floors(results)


SUITES = {
    "workloads": "Workloads of real projects",
    "lengths": "Rows of different lengths",
    "packed": "Packed rows",
    "resets": "Episodes that begin anywhere",
    "latency": "Few steps, few rows",
    "memory": "Memory of a training step",
    "grid": "By size",
}


def suite_table(results: Results, suite: str, ours: Sequence[Record]) -> Iterator[str]:
    def call(r: Record) -> tuple[str, ...]:
        shape = Case(**{k: r[k] for k in CASE}).shape()
        what = f"{r['name']}: {shape}" if r["name"] != shape else shape
        variant = f", {r['variant']}" if r["variant"] != "plain" and suite == "workloads" else ""
        return f"{what}, {r['dtype']}{variant}", MODES[r["mode"]]

    providers = {r["provider"] for r in results.records(suite) if "ratio" in r}
    others = [p for p in sorted(providers) if p not in ("torch", "fused", "torch-by-hand", "torch-plain", "fused-plain")]
    step = results.about["kind"] == "cuda"  # on a CPU a bare time says little
    head = ["case", "mode", "x nn.LSTM"] + [f"{p}, x nn.LSTM" for p in others]
    if "torch-by-hand" in providers:
        head += ["x nn.LSTM, by hand"]
    if suite in ("lengths", "resets"):
        head += ["x nn.LSTM that ignores them", "x fused_lstm without them"]
    if suite == "memory":
        three = ("fused_lstm", "recompute=True")
        head = ["case", "peak: nn.LSTM", *three, "kept for the backward pass: nn.LSTM", *three]
        head.append("speed with recompute, x nn.LSTM")
    if suite == "latency" and step:
        head += ["host us: fused_lstm / nn.LSTM", "device us: fused_lstm / nn.LSTM"]
    rows = []
    for r in ours:
        if suite == "memory":
            three = [results.other(r, p) for p in ("torch", "fused", "fused-recompute")]
            mib = [f"{q[k] / 2**20:.1f} MiB" if k in q else "-" for k in ("peak_bytes", "retained_bytes") for q in three]
            rows.append((call(r)[0], *mib, ratio(three[2])))
            continue
        row = [*call(r), ratio(r)]
        for provider in others:
            other = results.other(r, provider)
            row.append(ratio(other) if "refused" not in other else "-")
        if "torch-by-hand" in providers:
            row.append(ratio(r, "torch-by-hand") or "-")
        if suite in ("lengths", "resets"):
            row += [ratio(r, "torch-plain"), ratio(r, "fused-plain")]
        if suite == "latency" and step:
            both = (r, results.other(r, "torch"))
            row += [" / ".join(f"{q[k]:.1f}" if q.get(k) else "-" for q in both) for k in ("host_us", "device_us")]
        rows.append((*row, *([f"{r['us_per_step']:.2f}"] if step else []), floors(results, r)))
    if suite != "memory":
        head += ["us/step"] * step + ["x of floor"]
    yield from table(head, rows)


def slower(results: Results) -> Iterator[str]:
    """The list that a reader should see before he takes the library."""
    yield "### Where nn.LSTM is still faster"
    yield ""
    ours = [r for r in results.data["records"] if r["provider"] == "fused" and "torch" in r.get("ratio", {})]
    behind = sorted((r for r in ours if r["ratio"]["torch"][1] < 1), key=lambda r: r["ratio"]["torch"][1])
    clear = [r for r in behind if r["ratio"]["torch"][2] < 1]
    said = (
        f"Of {len(ours)} calls measured, {len(behind)} have a ratio below 1, {len(clear)} of them by more than the spread."
    )
    if results.about["kind"] == "cpu":
        said += " Plain sequences on a CPU are torch's own LSTM behind some microseconds of Python."
    yield said
    yield ""
    for r in behind:
        if r in clear or r["suite"] == "workloads":
            within = "" if r in clear else ", within the spread"
            yield f"- {r['suite']}, {r['name']}, {r['dtype']}, {MODES[r['mode']]}: {spread(r['ratio']['torch'])}{within}"
    rest = [r["ratio"]["torch"][1] for r in behind if r not in clear and r["suite"] != "workloads"]
    if rest:
        yield f"- {len(rest)} more in other suites, within the spread: {times(min(rest))} to {times(max(rest))}"
    yield ""
    hand = [r for r in ours if r["ratio"].get("torch-by-hand", [1, 1, 1])[1] < 1]
    if hand:
        yield "Where a careful user of nn.LSTM is faster who pads and masks by hand, or cuts at the resets:"
        yield ""
        for r in sorted(hand, key=lambda r: r["ratio"]["torch-by-hand"][1]):
            low = spread(r["ratio"]["torch-by-hand"])
            yield f"- {r['suite']}, {r['name']}, {r['dtype']}, {MODES[r['mode']]}: {low}"
        yield ""


def not_run(results: Results) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for r in results.data["records"]:
        if "refused" in r:
            provider = NAMES.get(r["provider"], r["provider"])
            reason = r["refused"].splitlines()[0][:300].removesuffix(" ")
            reasons.setdefault(f"{provider}: {reason}", []).append(f"{r['name']}")
    if reasons:
        yield "### Not measured, and why"
        yield ""
        for reason, names in reasons.items():
            distinct = list(dict.fromkeys(names))
            of = ", ".join(distinct) if len(distinct) <= 4 else f"{len(distinct)} cases"
            yield f"- {reason} ({of})"
        yield ""


def measured_floors(results: Results) -> Iterator[str]:
    found = results.data.get("floors")
    if not found:
        return
    yield "### Floors"
    yield ""
    for dtype, rate in found["flop_per_us"].items():
        yield f"- a large {dtype} product: {rate / 1e6:.2f} TFLOP/s"
    if "bytes_per_us" in found:
        yield f"- a large copy, bytes read and written: {found['bytes_per_us'] / 1e3:.0f} GB/s"
        yield f"- a launch: {times(found['launch_us'])} us from Python, {times(found['graph_launch_us'])} us in a CUDA graph"
    yield ""


def picture(name: str, title: str) -> Iterator[str]:
    """A chart that is readable on light and on dark pages."""
    yield from (
        "<picture>", f'<source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">',
        f'<img alt="{title}" src="{name}-light.svg">', "</picture>", "",
    )  # fmt: skip


def readme_part(all_results: Sequence[Results]) -> str:
    """What the main page shows: the newest results of a GPU and of a CPU, of the first the chart as well."""
    newest = {results.about["kind"]: results for results in reversed(all_results)}
    shown = [newest[kind] for kind in ("cuda", "cpu") if kind in newest]
    lines = [
        f"{summary(r)} (commit {commit(r)}, torch {r.about['torch']}, {r.about['date'][:10]}; "
        "[all results](bench/results/README.md))\n"
        for r in shown
    ]
    return "\n".join([*lines, *picture(f"bench/results/{shown[0].slug}-speed", CHARTS["speed"])])


# --- charts

CHARTS = {
    "speed": "Speed of fused_lstm against nn.LSTM, workload by workload",
    "grid": "Time of a step by hidden size and by batch size, with floors",
    "memory": "Memory of a training step",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=None, help="(default: the first file's folder)")
    parser.add_argument("--readme", type=Path, default=None, help="a page with the two marks")
    args = parser.parse_args(arguments)
    files = args.files or sorted(FOLDER.glob("*.json"))
    if not files:
        parser.error(f"no result files given, none in {FOLDER}")
    out = args.out or files[0].parent
    try:
        all_results = load(files)
    except ValueError as error:
        parser.error(str(error))
    from charts import draw

    out.mkdir(parents=True, exist_ok=True)
    charts = {results.slug: draw(results, out) for results in all_results}
    (out / "README.md").write_text(page(all_results, charts, out))
    print(f"written: {out / 'README.md'}")
    if args.readme:
        text = args.readme.read_text()
        if any(text.count(mark) != 1 for mark in MARKS):
            parser.error(f"--readme: expected a page with the lines {' and '.join(mark.strip() for mark in MARKS)}")
        before, rest = text.split(MARKS[0])
        _, after = rest.split(MARKS[1])
        args.readme.write_text(before + MARKS[0] + readme_part(all_results) + MARKS[1] + after)
        print(f"written: {args.readme}")
    for results in all_results:
        print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
