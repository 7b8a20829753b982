"""A character-level language model with fused_lstm.LSTM, beside the same model with torch.nn.LSTM.

    python examples/char_lm.py                          # two minutes on the source of Python's standard library
    python examples/char_lm.py --text FILE --steps 5000 --hidden 512 --sample 2000
    python examples/char_lm.py --resume --seconds 600   # goes on from runs/char_lm.pt, exactly where it stopped

Both models start from the same seed and see the same batches in turn, each step timed, so that their loss curves should
lie on each other and their times can be compared. Prints text from the fused model and saves a plot, runs/char_lm.png.
Ctrl-C saves a checkpoint and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from char_model import VOCABULARY, CharLM, Learner, encode, fail, load, read_text, streams
from torch import Tensor, nn

import fused_lstm

EVERY = 200  # steps between two validations, each of which also saves the checkpoint
VALIDATION = 2048  # characters of each stream that a validation reads
TORCH, FUSED = "nn.LSTM", "fused_lstm.LSTM"


class Run:
    """The learners on their common batches, with the budget, the checkpoint and the line of progress."""

    def __init__(self, args: argparse.Namespace, settings: dict, learners: dict[str, Learner], text: Tensor) -> None:
        self.args, self.settings, self.learners, self.text = args, settings, learners, text
        self.step, self.spent, self.shown, self.position = 0, 0.0, -math.inf, text.shape[1]

    def done(self) -> float:
        """The fraction of the budget of steps or seconds that is spent."""
        return min(1.0, self.step / self.args.steps if self.args.steps else self.spent / self.args.seconds)

    def piece(self) -> tuple[Tensor, bool]:
        """The next chunk of each stream, and whether it begins a new pass, into which no state is carried."""
        chunk = self.args.chunk
        fresh = self.position + chunk >= self.text.shape[1]
        if fresh:  # a random start, so that the text is cut at other places than in the pass before
            self.position = int(torch.randint(chunk, ()))
        self.position += chunk
        return self.text[:, self.position - chunk : self.position + 1], fresh

    def train(self, held_out: Tensor) -> int:
        """Train until the budget is spent, or until a signal comes: returns its number, or 0. Saves in both cases."""
        signals: list[int] = []
        before = {s: signal.signal(s, lambda s, _: signals.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
        begun, learners = time.perf_counter() - self.spent, list(self.learners.values())
        while self.done() < 1 and not signals:
            piece, fresh = self.piece()
            for learner in learners[:: 1 if self.step % 2 else -1]:  # each is first in half of the steps
                learner.step(piece, fresh)
            self.step += 1
            self.spent = time.perf_counter() - begun
            self.progress(learners[-1], last=bool(self.done() == 1 or signals))
            if self.step % EVERY == 0:
                for learner in learners:
                    learner.validate(held_out)
                self.save()
        if not signals:
            for learner in learners:
                learner.validate(held_out)
        self.save()
        for number, handler in before.items():
            signal.signal(number, handler)
        return signals[0] if signals else 0

    def progress(self, learner: Learner, last: bool) -> None:
        """One line on stderr: redrawn in place on a terminal, a new one every ten seconds elsewhere."""
        bar, now = sys.stderr.isatty(), time.perf_counter()
        if last or now - self.shown > (0.2 if bar else 10):
            self.shown, left = now, round(self.spent / self.done() - self.spent)
            loss, seconds = fmean(learner.losses[-50:]), fmean(learner.seconds[-50:])
            line = f"step {self.step} (mean of {min(50, self.step)})  loss {loss:.3f}  {loss / math.log(2):.3f} bits/char  "
            line += f"{self.args.batch * self.args.chunk / seconds:,.0f} char/s  {left // 60}:{left % 60:02} left"
            line = f"\r[{'#' * round(8 * self.done()):8}] {line}\x1b[K" if bar else line
            print(line, end="" if bar and not last else "\n", file=sys.stderr, flush=True)

    def save(self) -> None:
        learners = {name: learner.state_dict() for name, learner in self.learners.items()}
        own = {"step": self.step, "spent": self.spent, "position": self.position, "rng": torch.get_rng_state()}
        beside = self.args.checkpoint.with_suffix(".tmp")  # a crash while writing leaves the old checkpoint whole
        torch.save({"settings": self.settings, "learners": learners, **own}, beside)
        beside.replace(self.args.checkpoint)

    def resume(self) -> None:
        saved = load(self.args.checkpoint)
        theirs = saved["settings"]
        differ = [f"{k} is {theirs.get(k)} there and {v} here" for k, v in self.settings.items() if theirs.get(k) != v]
        if differ:
            fail(f"--resume: expected the settings that {self.args.checkpoint} was made with, but {', '.join(differ)}")
        for name, learner in self.learners.items():
            learner.load_state_dict(saved["learners"][name])
        self.step, self.spent, self.position = saved["step"], saved["spent"], saved["position"]
        torch.set_rng_state(saved["rng"])


def compare(a: Tensor, b: Tensor) -> str:
    """The largest difference of two loss curves, and whether rounding explains it."""
    difference, at = (a - b).abs().max(0)
    if difference == 0:
        return "loss curves: identical at every step"
    # Training amplifies rounding: with weights changed in the last digit, single losses came to differ by up to 0.9
    # times the median change of the loss from one batch to the next, and without the carried state by twice that.
    first, scatter = (a[0] - b[0]).abs(), (a[1:] - a[:-1]).abs().median()
    noise = difference < 1.5 * scatter and first < 1e-3
    return (
        f"loss curves: largest difference {difference:.4f} bits/char (step {at + 1}; {first:.1e} at step 1): "
        f"{'no more' if noise else 'MORE'} than rounding explains; one batch differs from the next by {scatter:.4f}"
    )


def plot(path: Path, learners: dict[str, Learner], work: list[tuple[str, int, list[float]]]) -> None:
    """Loss curves, and characters a second, side by side."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")  # a file needs no display
    from matplotlib import pyplot

    figure, (loss, speed) = pyplot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(5, 3), layout="constrained")
    # The first is drawn wide and pale, so that it stays visible under the second where they coincide.
    looks = [("#f5b041", "-", 5, 9), ("#1a5276", "--", 1.2, 4)][-len(learners) :]
    for k, ((name, learner), (color, line, width, marker)) in enumerate(zip(learners.items(), looks, strict=True)):
        window = max(1, len(learner.losses) // 200)
        nats = torch.tensor(learner.losses)[: len(learner.losses) // window * window].view(-1, window).mean(1)
        steps = (torch.arange(len(nats)) + 0.5) * window
        loss.plot(steps, nats / math.log(2), line, color=color, linewidth=width, label=f"{name}, training")
        steps, nats = torch.tensor(learner.validation).unbind(1)
        loss.plot(steps, nats / math.log(2), "o", color=color, markersize=marker, label=f"{name}, validation")
        places = [x + 0.4 * k for x in range(len(work))]
        bars = speed.bar(places, [times[0] / times[k] for _, _, times in work], 0.38, color=color, label=name)
        speed.bar_label(bars, [f"{size / times[k]:,.0f}/s" for _, size, times in work], padding=2, fontsize=9)
    loss.set(xlabel="step", ylabel="bits per character", title="Loss")
    speed.set(ylabel=f"relative to {next(iter(learners))}", title="Characters per second")
    speed.set_xticks([x + 0.2 * (len(learners) - 1) for x in range(len(work))], [name for name, _, _ in work])
    speed.set_ylim(0, 1.35 * speed.get_ylim()[1])  # room for the legend
    loss.legend()
    speed.legend()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def positive(text: str, kind: type = int) -> float:
    with contextlib.suppress(ValueError):
        if 0 < kind(text) < math.inf:
            return kind(text)
    raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, real = parser.add_argument, partial(positive, kind=float)
    add("--text", type=Path, metavar="FILE", help="what to learn (default: the source of Python's standard library)")
    add("--hidden", type=positive, default=256)
    add("--layers", type=positive, default=1)
    add("--batch", type=positive, default=32, help="streams read side by side (default: %(default)s)")
    add("--chunk", type=positive, default=64, help="characters that a gradient goes through (default: %(default)s)")
    add("--lr", type=real, default=4e-3, help="learning rate at the start (default: %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=positive, help="train for so many steps")
    budget.add_argument("--seconds", type=real, default=120, help="train for so long (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=["auto", "triton", "aten", "reference"], default="auto", help="of fused_lstm.LSTM")
    add("--seed", type=int, default=0)
    add("--no-compare", action="store_true", help="train the fused model only")
    add("--sample", type=positive, default=800, metavar="N", help="characters to generate (default: %(default)s)")
    add("--prompt", default="def ", help="what they follow (default: %(default)r)")
    add("--temperature", type=real, default=0.7)
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="where plot and checkpoint go (default: runs)")
    add("--checkpoint", type=Path, metavar="FILE", help="default: DIR/char_lm.pt")
    add("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or args.out / "char_lm.pt"
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device: expected one that works here, such as cpu, got {args.device}: {str(error).splitlines()[0]}")
    for folder in (args.out, args.checkpoint.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    text = read_text(args.text)
    needed = 10 * args.batch * (args.chunk + 1)
    if len(text) < needed:
        sizes = f"--batch {args.batch} --chunk {args.chunk}"
        source = args.text or "the standard library"
        fail(f"expected at least {needed:,} characters of text for {sizes}, got {len(text):,} from {source}")
    characters = ["\ufffd", *(c for c, _ in Counter(text).most_common(VOCABULARY))]
    ids = encode(text, characters).to(args.device)
    split = len(ids) * 9 // 10
    held_out = streams(ids[split:], args.batch)[:, : VALIDATION + 1]

    layers = {TORCH: nn.LSTM, FUSED: partial(fused_lstm.LSTM, backend=args.backend)}
    learners = {}
    for name in [FUSED] if args.no_compare else layers:
        torch.manual_seed(args.seed)  # anew for each model: both layers draw the same initial weights
        model = CharLM(len(characters), args.hidden, args.layers, layers[name])
        learners[name] = Learner(model, args.lr, args.device)
    try:
        print(f"text: {len(text):,} characters, {len(characters)} different ones")
        print("training,", fused_lstm.explain(model.lstm, model.embedding(held_out[:, : args.chunk])))
        with torch.no_grad():
            print("generating,", fused_lstm.explain(model.lstm, model.embedding(held_out[:1, :1])), flush=True)
    except RuntimeError as error:
        fail(error)

    settings = {k: getattr(args, k) for k in ("hidden", "layers", "batch", "chunk", "lr", "seed", "no_compare")}
    settings["text"] = f"{len(text)} characters of CRC {zlib.crc32(text.encode()):08x}"
    run = Run(args, settings, learners, streams(ids[:split], args.batch))
    if args.resume:
        run.resume()
    interrupted = run.train(held_out)
    if interrupted:
        print(f"interrupted after step {run.step} and saved to {args.checkpoint}: --resume, with all else equal, goes on")
        sys.exit(128 + interrupted)

    prompt = encode(args.prompt, characters)
    drawn = {k: learner.generate(prompt, args.sample, args.temperature, args.seed) for k, learner in learners.items()}
    print(f"\n{args.prompt}{''.join(characters[i] for i in drawn[FUSED][0])}\n")
    steps = [median(learner.seconds) for learner in learners.values()]
    singles = [median(seconds) for _, seconds in drawn.values()]
    work = [(f"training, T = {args.chunk}", args.batch * args.chunk, steps), ("generating, T = 1", 1, singles)]
    print(f"{'median time of a step':24}" + "".join(f"{name:>17}" for name in learners) + "   ratio" * (len(learners) - 1))
    for what, _, times in work:
        ratios = "".join(f"{times[0] / t:8.2f}" for t in times[1:])
        print(f"{what:24}" + "".join(f"{1e3 * t:14.3f} ms" for t in times) + ratios)
    final = [learner.validation[-1][1] / math.log(2) for learner in learners.values()]
    print(f"{'validation, bits/char':24}" + "".join(f"{bits:17.4f}" for bits in final))
    if not args.no_compare:
        print(compare(*(torch.tensor(learner.losses) / math.log(2) for learner in learners.values())))
    plot(args.out / "char_lm.png", learners, work)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except OSError as error:
        fail(f"expected a usable file or folder, got {error.strerror}: {error.filename}")
