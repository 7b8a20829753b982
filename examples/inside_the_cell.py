"""A look inside the cell, by fused_lstm.inspect_gates: what gates are for, and which cells of a trained model track what.

    python examples/inside_the_cell.py    # trains for two minutes, unless examples/char_lm.py left its model in runs/

First a cell of one unit, its weights set by hand so that inputs open and shut its gates: it writes, keeps, hides, adds up
and forgets, as the textbook says, which is asserted. Then the character model of examples/char_lm.py, which has read the
source of Python's standard library: is there a cell that tracks indentation, quotes or brackets (Karpathy et al. 2015,
https://arxiv.org/abs/1506.02078)? Python's tokenizer knows the truth. A cell's score is the area under the ROC curve (AUC)
of its value. The best cell is chosen on some files and scored on others; the model was trained on none of them.
"""

from __future__ import annotations

import argparse
import io
import math
import subprocess
import sys
import sysconfig
import tokenize
import zlib
from collections import Counter
from functools import partial
from itertools import accumulate
from pathlib import Path

import char_lm
import char_model
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fused_lstm

# What the one unit is told to do: for how many steps, and the inputs value, write, keep and show.
PHASES = {
    "write": (1, (1.0, 1, 0, 1)),  # input gate open: the candidate is written
    "keep": (6, (-0.5, 0, 1, 1)),  # forget gate open, input gate shut: whatever comes in, the memory stays
    "hide": (4, (-0.5, 0, 1, 0)),  # output gate shut: the memory is there and does not show
    "show": (3, (-0.5, 0, 1, 1)),
    "add": (3, (0.5, 1, 1, 1)),  # both open: what comes in is added to what is there
    "forget": (2, (-0.5, 0, 0, 1)),  # forget gate shut
    "replace": (2, (-0.9, 1, 0, 1)),  # forget gate shut, input gate open
}
PROPERTIES = {"indentation": 2, "quotes": 1, "brackets": 1}  # a character has one that is at least so deep in it
TRACKS = 0.8  # AUC from which a cell is said to track a property
CHUNK = 500  # steps inspected at once: the gates of many take much memory
SNIPPET, STRETCH = 700, 72  # characters of a picture of text, and of one of gates


def textbook_cell() -> fused_lstm.LSTM:
    """One unit with i = write, f = keep, o = show, to 2e-9, and g = tanh(value)."""
    lstm = fused_lstm.LSTM(4, 1).requires_grad_(False)
    for w in lstm.parameters():
        w.zero_()
    for gate, control in ((0, 1), (1, 2), (3, 3)):  # rows i, f, g, o; columns value, write, keep, show
        lstm.weight_ih_l0[gate, control], lstm.bias_ih_l0[gate] = 40, -20
    lstm.weight_ih_l0[2, 0] = 1
    return lstm


def textbook() -> dict[str, dict[str, Tensor]]:
    """Gates and states of each phase, (steps,) each, after what the textbook says of them was asserted."""
    counts, inputs = zip(*PHASES.values(), strict=True)
    x = torch.tensor(inputs).repeat_interleave(torch.tensor(counts), 0)
    values = fused_lstm.inspect_gates(textbook_cell(), x[:, None])
    parts = {name: getattr(values, name).flatten().split(counts) for name in "ifgoch"}
    phases = {phase: {name: parts[name][k] for name in parts} for k, phase in enumerate(PHASES)}

    def close(a: Tensor, b: Tensor | float) -> bool:
        return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=1e-6)

    written = phases["write"]["c"][-1]
    assert close(written, math.tanh(1.0)), "write: c is the candidate"
    for phase in ("keep", "hide", "show"):
        assert close(phases[phase]["c"], written), f"{phase}: c stays"
    assert close(phases["hide"]["h"], 0), "hide: h is zero"
    assert close(phases["show"]["h"], written.tanh()), "show: h = tanh(c) is back"
    assert close(phases["add"]["c"], written + math.tanh(0.5) * torch.arange(1, 4)), "add: c grows by the candidate"
    assert close(phases["forget"]["c"], 0), "forget: c is zero"
    assert close(phases["replace"]["c"], math.tanh(-0.9)), "replace: nothing is left of what was there"
    return phases


def draw_textbook(phases: dict[str, dict[str, Tensor]], path: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1, 1, 2))
    lines = (("i", "black", "input gate"), ("f", "black", "forget gate"), ("o", "black", "output gate"),
             ("g", "0.6", "candidate"), ("c", "#a93226", "cell state"), ("h", "#1a5276", "hidden state"))  # fmt: skip
    for k, (name, color, label) in enumerate(lines):
        line = torch.cat([values[name] for values in phases.values()])
        axes[min(k, 3)].plot(range(len(line)), line, drawstyle="steps-mid", color=color, label=f"{label} {name}")
    first = 0
    for k, (phase, (count, _)) in enumerate(PHASES.items()):
        for ax in axes:
            ax.axvspan(first - 0.5, first + count - 0.5, color="0.5", alpha=0.15 * (k % 2), linewidth=0)
        axes[0].text(first + count / 2 - 0.5, 1.2, phase, ha="center", va="bottom")
        first += count
    for ax in axes:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes[3].set(xlabel="time step", xlim=(-0.5, first - 0.5), xticks=range(first))
    figure.savefig(path, dpi=120)


def truths(source: str) -> Tensor:
    """(3, characters): how deep in indentation, quotes and brackets one is, as it is known when a character was read."""
    offsets = list(accumulate((len(line) + 1 for line in source.split("\n")), initial=0))
    change = torch.zeros(3, len(source) + 2)
    for kind, string, start, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = (min(offsets[line - 1] + column, len(source) + 1) for line, column in (start, end))
        name = tokenize.tok_name[kind]
        if name in ("INDENT", "DEDENT"):
            change[0, last] += 1 if name == "INDENT" else -1
        if name == "STRING" or name.endswith("STRING_START"):  # of f-strings, from Python 3.12 on
            change[1, first + len(string) - len(string.lstrip("bBfFrRtTuU"))] += 1
        if name == "STRING" or name.endswith("STRING_END"):
            change[1, last - 1] -= 1
        if name == "OP" and string in "()[]{}":
            change[2, first] += 1 if string in "([{" else -1
    return change.cumsum(1)[:, : len(source)]


def held_out_files(text: str, characters: int) -> list[str]:
    """Files of the standard library that lie, as a whole, in the part of the text that is kept for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (p for p in sorted(root.rglob("*.py")) if not char_model.SKIP.intersection(p.relative_to(root).parts))
    sources = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return [s for s in sources if len(s) >= characters and text.find(s, len(text) * 9 // 10) >= 0]


def trained(args: argparse.Namespace, text: str, characters: list[str]) -> char_model.CharLM:
    """The model of a checkpoint that was trained on this text, from this seed and to the size asked for, or of a new one."""
    own = args.out / "inside_the_cell" / "char_lm.pt"
    what = f"{len(text)} characters of CRC {zlib.crc32(text.encode()):08x}"  # as char_lm.py says it
    for path in (args.out / "char_lm.pt", own):
        saved = char_model.load(path) if path.exists() else {"settings": {}}
        settings = saved["settings"]
        same = settings.get("text") == what and settings["seed"] == args.seed and args.hidden in (None, settings["hidden"])
        if same and saved["learners"][char_lm.FUSED]["plain"]["validation"]:
            break
    else:
        print(f"no checkpoint for {what}, seed {args.seed}: training one for {args.seconds:g} seconds", flush=True)
        path, unfinished = own, own.with_name("unfinished.pt")
        options = {"seconds": args.seconds, "hidden": args.hidden or 256, "seed": args.seed, "checkpoint": unfinished}
        command = [char_lm.__file__, "--no-compare", "--sample=1", f"--out={own.parent}"]
        command += [f"--{name}={value}" for name, value in options.items()]
        if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
            char_model.fail(f"the training of {path} did not end well")
        saved = char_model.load(unfinished.replace(path))
    settings, learner = saved["settings"], saved["learners"][char_lm.FUSED]
    model = char_model.CharLM(len(characters), settings["hidden"], settings["layers"], fused_lstm.LSTM)
    model.load_state_dict(learner["model"])
    step, nats = learner["plain"]["validation"][-1]
    size = f"{settings['layers']} x {settings['hidden']} cells, after {step} steps"
    print(f"model: {path}, {size}, {nats / math.log(2):.3f} bits/char on held-out text")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)


def cells(model: char_model.CharLM, ids: Tensor) -> Tensor:
    """The cell states (B, T, layers*H) after each character of the texts ids (B, T)."""
    state, parts = None, []
    for piece in ids.split(CHUNK, 1):
        values = fused_lstm.inspect_gates(model.lstm, model.embedding(piece), state)
        state = values.h_n, values.c_n  # where the next piece goes on
        parts.append(values.c[:, 0].permute(2, 1, 0, 3).flatten(2))
    return torch.cat(parts, 1)


def auc(ranks: Tensor, truth: Tensor) -> Tensor:
    """The chance, for each column of ranks (N, U), that a row with truth (N,) ranks above one without (Mann-Whitney)."""
    n = truth.sum().double()
    if not 0 < n < len(truth):
        char_model.fail("expected characters with and without a property: more --files may help")
    return (ranks[truth].double().sum(0) - n * (n - 1) / 2) / (n * (len(truth) - n))


def richest(truth: Tensor, size: int) -> tuple[int, int]:
    """Row and start of the window of truth (B, T) that is half true and half not, as nearly as can be."""
    halves = (truth.double().unfold(1, size, 1).mean(-1) - 0.5).abs()
    return divmod(int(halves.argmin()), halves.shape[1])


def draw_text(path: Path, text: str, values: Tensor, truth: Tensor, title: str) -> None:
    """The characters on the colour of their cell's value; underlined where the property holds."""
    lines = text.split("\n")
    figure = Figure(figsize=(2 + 0.08 * max(map(len, lines)), 1 + 0.21 * len(lines)), layout="constrained")
    ax, grid = figure.subplots(), torch.full((len(lines), 1 + max(map(len, lines))), math.nan)
    places = [(r, k) for r, line in enumerate(lines) for k in range(len(line) + (r < len(lines) - 1))]
    characters = zip(text.replace("\n", "\u21b5"), values.tolist(), truth.tolist(), strict=True)
    for (r, k), (character, value, true) in zip(places, characters, strict=True):
        grid[r, k] = value
        ax.text(k, r, character, family="monospace", size=8, ha="center", va="center", parse_math=False)
        if true:
            ax.plot((k - 0.5, k + 0.5), (r + 0.42, r + 0.42), color="black", linewidth=1)
    top = values.abs().max().item()
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-top, vmax=top, alpha=0.7, aspect="auto", interpolation="nearest")
    figure.colorbar(image, label="cell state c", aspect=30)
    ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    seconds, size = partial(char_lm.positive, kind=float), char_lm.positive
    add("--seconds", type=seconds, default=120, help="to train for, if it must (default: %(default)s)")
    add("--hidden", type=size, help="cells of the model (default: those of a model that is there, else 256)")
    add("--seed", type=int, default=0, help="of the model (default: %(default)s)")
    add("--files", type=size, default=32, help="files to read, half of them to score on (default: %(default)s)")
    add("--characters", type=size, default=4000, help="of each file (default: %(default)s)")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for pictures and models (default: runs)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_textbook(textbook(), args.out / "inside_the_cell-textbook.png")
    print("a cell set by hand writes, keeps, hides, shows, adds, forgets and replaces: as the textbook says")

    text = char_model.read_text(None)
    characters = ["\ufffd", *(c for c, _ in Counter(text).most_common(char_model.VOCABULARY))]
    files = held_out_files(text, args.characters)[: args.files]
    if len(files) < 2 or args.characters < SNIPPET:
        got = f"{len(files)} and {args.characters}"
        parser.error(f"expected at least 2 held-out files and {SNIPPET} characters of each, got {got}")
    model = trained(args, text, characters)
    device, start = model.head.weight.device, slice(args.characters)
    ids = torch.stack([char_model.encode(source[start], characters) for source in files]).to(device)
    truth = torch.stack([truths(source)[:, start] for source in files], 1).to(device)  # (3, files, characters)
    c = cells(model, ids)
    half = len(files) // 2  # the best unit is chosen on the first half, and scored on the second
    ranks = [part.flatten(0, 1).argsort(0).argsort(0) for part in (c[:half], c[half:])]
    print(f"{'property':12} {'cell':>14} {'AUC, chosen':>12} {'AUC, others':>12} {'correlation with depth':>23}")
    for k, (name, depth) in enumerate(PROPERTIES.items()):
        holds = truth[k] >= depth
        chosen, scored = auc(ranks[0], holds[:half].flatten()), auc(ranks[1], holds[half:].flatten())
        best = (chosen - 0.5).abs().topk(min(8, len(chosen))).indices
        layer, number = divmod(unit := int(best[0]), model.lstm.hidden_size)
        sign = 1 if chosen[unit] > 0.5 else -1  # a cell may as well be low where the property holds
        found, score = (0.5 + sign * (t[unit].item() - 0.5) for t in (chosen, scored))
        r = torch.corrcoef(torch.stack([c[half:, :, unit].flatten(), truth[k, half:].flatten()]))[0, 1].item()
        verdict = "" if score >= TRACKS else f"  not tracked (AUC below {TRACKS})"
        print(f"{name:12} {f'layer {layer}, {number:3}':>14} {found:12.3f} {score:12.3f} {r:23.2f}{verdict}")
        file, first = richest(holds[half:], SNIPPET)
        file, first = half + file, files[half + file].rfind("\n", 0, first) + 1  # from the start of a line
        end = files[file].rfind("\n", first, first + SNIPPET)  # of whole lines, unless one is very long
        shown = slice(first, max(end, first + SNIPPET // 2))
        title = f"cell {number} of layer {layer}; underlined: {name}, at least {depth} deep; AUC {score:.2f}{verdict}"
        path = args.out / f"inside_the_cell-{name}.png"
        draw_text(path, files[file][shown], c[file, shown, unit], holds[file, shown], title)
        first = max(1, first + richest(holds[file : file + 1, shown], STRETCH)[1])
        shown = slice(first, first + STRETCH)
        _, state = model.lstm(model.embedding(ids[file : file + 1, :first]))
        values = fused_lstm.inspect_gates(model.lstm, model.embedding(ids[file : file + 1, shown]), state)
        units = [u % model.lstm.hidden_size for u in best.tolist() if u // model.lstm.hidden_size == layer]
        title, x = f"{name}: the best cells of layer {layer}, best first; x is the depth", truth[k, file, shown]
        figure = fused_lstm.plot_gates(values, layer=layer, units=units, x=x, axis=files[file][shown], title=title)
        figure.savefig(path.with_stem(f"{path.stem}-gates"), dpi=120)
    print(f"pictures: {args.out}/inside_the_cell-*.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        char_model.fail(f"expected a usable file or folder, got {error.strerror}: {error.filename}")
