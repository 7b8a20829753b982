"""What became slower, beyond the noise of the measurement.

    python bench/compare.py OLD.json NEW.json [--threshold 0.1]
    python bench/compare.py --base REV [--threshold 0.05] [any option of bench/run.py]

Compares two result files of bench/run.py; or, with --base, measures the package of a git revision and that of this checkout
in turn, case by case, in one run, and what a call costs the host on either side (bench/host.py). What is compared of a case
is the speed against nn.LSTM in the same process, so that a machine that is busier than before does not count; and bytes of
memory. A change is flagged if it is larger than the threshold and than the spreads that the two records report (half of each
range), added. Exit status: 0, or 1 if anything became slower, larger, wrong, or is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host
import run
from cases import Case
from process import about, copy_of_checkout, output, unpack

KEYS = (*Case.__dataclass_fields__, "mode", "provider")
BYTES = ("peak_bytes", "retained_bytes")


@dataclass(frozen=True)
class Change:
    """What became of one record. Of a speed: new over old."""

    what: str
    verdict: str  # "slower", "faster", "larger", "smaller", "same"; "lost": it was measured, and is not any more
    factor: float
    text: str

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "larger", "lost")


def changes(old: Sequence[run.Record], new: Sequence[run.Record], threshold: float) -> Iterator[Change]:
    """Record by record. A case that is only in ``new`` is no change."""
    known = {tuple(r[k] for k in KEYS): r for r in new}
    for before in old:
        key = tuple(before[k] for k in KEYS)
        what = f"{before['suite']}, {before['name']}, {before['dtype']}, {before['mode']}, {before['provider']}"
        if before["provider"] == "torch" or "us" not in before:
            continue
        after = known.get(key)
        if after is None or "us" not in after:
            why = "not in the new results" if after is None else after.get("refused", "not measured")
            yield Change(what, "lost", math.nan, why.splitlines()[0])
            continue
        if "torch" in before["ratio"] and "torch" in after["ratio"]:
            a, b = before["ratio"]["torch"], after["ratio"]["torch"]
            factor, apart = b[1] / a[1], b[2] < a[0] or a[2] < b[0]
            text = f"{a[1]:.2f} ({a[0]:.2f}-{a[2]:.2f}) to {b[1]:.2f} ({b[0]:.2f}-{b[2]:.2f}) x nn.LSTM"
            yield Change(what, _verdict(factor, threshold, "slower", "faster") if apart else "same", factor, text)
        for k in BYTES:
            if before.get(k) and k in after:
                factor = before[k] / after[k]
                text = f"{k.removesuffix('_bytes')} {before[k] / 2**20:.1f} to {after[k] / 2**20:.1f} MiB"
                yield Change(what, _verdict(factor, threshold, "larger", "smaller"), factor, text)


def host_changes(sides: host.Sides, threshold: float) -> Iterator[Change]:
    """Likewise of what bench/host.py measured on both sides: a time has changed if it has in every round."""
    here, base = host.merged(sides["here"]), host.merged(sides["base"])
    for what, before in base.items():
        factor = before["ours us"] / here[what]["ours us"]
        pairs = zip(sides["base"], sides["here"], strict=True)
        apart = len({old[what]["ours us"] > new[what]["ours us"] for old, new in pairs}) == 1
        text = f"{before['ours us']:.1f} to {here[what]['ours us']:.1f} us of host time"
        yield Change(f"host, {what}", _verdict(factor, threshold, "slower", "faster") if apart else "same", factor, text)
        if "ours operations" in before:
            old, new = before["ours operations"], here[what]["ours operations"]
            text = f"{old} to {new} operations of the device"
            yield Change(f"host, {what}", _verdict(old / new, 0.0, "larger", "smaller"), old / new, text)


def _verdict(factor: float, threshold: float, worse: str, better: str) -> str:
    return worse if factor < 1 - threshold else better if factor > 1 / (1 - threshold) else "same"


def tell(found: Sequence[Change]) -> int:
    """Print what changed; the exit status."""
    for change in sorted(found, key=lambda c: c.factor):
        if change.verdict != "same":
            size = "" if math.isnan(change.factor) else f" by {abs(1 - change.factor):.0%}"
            print(f"{change.verdict}{size}: {change.what}: {change.text}")
    speeds = [c.factor for c in found if c.verdict in ("slower", "faster", "same") and "x nn.LSTM" in c.text]
    if not found:
        print("nothing was compared: no case was measured on the old side", file=sys.stderr)
        return 2
    if speeds:
        print(f"{len(speeds)} speeds compared, geometric mean new/old {run.geometric_mean(speeds):.3f}")
    bad = [c for c in found if c.bad]
    print(f"{len(bad)} changes for the worse" if bad else "no change for the worse beyond the noise")
    return 1 if bad else 0


# --- two revisions in one run


def both(revision: str, args: argparse.Namespace) -> list[list[run.Record]]:
    """Records of the revision and of this checkout, measured in turn."""
    from tqdm import tqdm

    units = run.units(args)
    providers = args.providers or ["torch", "fused"]
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as here:
        sides = [unpack(revision, Path(base)), copy_of_checkout(Path(here))]
        found: list[list[list[dict[str, Any]]]] = [[[] for _ in units] for _ in sides]
        with tqdm(total=2 * args.processes * len(units), unit="process", dynamic_ncols=True, disable=None) as bar:
            for n in range(args.processes):
                for k, (case, modes) in enumerate(units):
                    bar.set_description(f"{case.suite} {case.name} {'/'.join(modes)}")
                    for side in (0, 1) if (n + k) % 2 else (1, 0):
                        found[side][k].append(run.measured(case, modes, providers, args, sides[side]))
                        bar.update()
    return [
        [row for (case, modes), processes in zip(units, side, strict=True) for row in run.merged(case, modes, processes, {})]
        for side in found
    ]


def host_sides(revision: str, args: argparse.Namespace) -> host.Sides:
    """What bench/host.py measures of the revision and of this checkout; nothing, if one side cannot be measured."""
    try:
        return host.measured(revision, args.processes, args.device)
    except RuntimeError as error:
        print(f"host time was not measured: {error}", file=sys.stderr)
        return {"here": [{}], "base": [{}]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="compare.py OLD.json NEW.json | compare.py --base REV", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--base", metavar="REV", help="a git revision to measure beside this checkout")
    parser.add_argument("--threshold", type=float, help="smaller changes are never flagged (default: 0.1; 0.05 with --base)")
    args, others = parser.parse_known_args(arguments)  # others: two files, or options of bench/run.py
    if args.threshold is None:
        args.threshold = 0.1 if args.base is None else 0.05
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold should be between 0 and 1, got {args.threshold}")
    if args.base is None:
        if len(others) != 2 or others[0].startswith("-"):
            parser.error(f"expected two result files, or --base REV; got {' '.join(others) or 'nothing'}")
        try:
            old, new = (json.loads(Path(name).read_text()) for name in others)
            found = list(changes(old["records"], new["records"], args.threshold))
            differ = [k for k in ("device", "threads", "torch", "triton") if old["about"].get(k) != new["about"].get(k)]
            partial = [name for name, side in zip(others, (old, new), strict=True) if not side.get("complete", True)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"expected result files of bench/run.py ({type(error).__name__}: {error})")
        for k in differ:
            print(f"not alike: {k} {old['about'].get(k)} and {new['about'].get(k)}", file=sys.stderr)
        for name in partial:
            print(f"not complete: {name}", file=sys.stderr)
        return tell(found)
    options = run.options(["--processes", "3", *others])
    run.keep_on_signals()
    try:
        old, new = both(args.base, options)
        sides = host_sides(args.base, options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is compared before both sides are measured", file=sys.stderr)
        return 130
    for r in old:
        if "refused" in r:
            print(f"{args.base}: {r['name']}, {r['mode']}, {r['provider']}: {r['refused']}", file=sys.stderr)
    if options.json:
        for name, records in (("base", old), ("new", new)):
            path = options.json.with_name(f"{options.json.stem}-{name}.json")
            run.write_json(path, {"about": about(options.device, options.threads), "records": records, "side": name})
            print(f"written to {path}")
    print(f"{output('git', 'rev-parse', '--short', args.base)} against this checkout")
    return tell([*changes(old, new, args.threshold), *host_changes(sides, args.threshold)])


if __name__ == "__main__":
    sys.exit(main())
