"""A character-level language model over an LSTM of any make, its text and its training: what examples/char_lm.py runs."""

from __future__ import annotations

import math
import pickle
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIP = {  # folders of the standard library
    "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo", "site-packages", "dist-packages",
}  # fmt: skip
MAX_CHARACTERS = 8_000_000  # of the standard library: more than two minutes on a CPU get through
VOCABULARY = 255  # the most frequent characters; all others are read as one
DECAY = 1000  # steps after which the learning rate has come down by sqrt(2)
State = tuple[Tensor, Tensor] | None


def fail(message: object) -> NoReturn:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def read_text(path: Path | None) -> str:
    """A file, or the source of the standard library, its files in a fixed order that mixes the packages."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace")
    root = Path(sysconfig.get_path("stdlib"))
    names = [p for p in (q.relative_to(root) for q in root.rglob("*.py")) if not SKIP.intersection(p.parts)]
    text = ""
    for name in sorted(names, key=lambda p: (zlib.crc32(p.as_posix().encode()), p)):
        if len(text) < MAX_CHARACTERS:
            text += (root / name).read_text(encoding="utf-8", errors="replace")
    return text[:MAX_CHARACTERS]


def load(path: Path) -> dict:
    """A checkpoint of char_lm.py."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if {"settings", "learners"} <= saved.keys():
            return saved
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError):
        pass
    fail(f"expected a checkpoint of char_lm.py, got some other file: {path}")


def encode(text: str, characters: list[str]) -> Tensor:
    index = {c: i for i, c in enumerate(characters)}
    return torch.tensor([index.get(c, 0) for c in text])


def streams(ids: Tensor, batch: int) -> Tensor:
    """A text as ``batch`` contiguous streams of equal length, to be read side by side."""
    return ids[: len(ids) // batch * batch].view(batch, -1)


class CharLM(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, layers: int, lstm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, min(hidden, 128))
        self.lstm = lstm(self.embedding.embedding_dim, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        y, state = self.lstm(self.embedding(ids), state)
        return self.head(y), state

    def loss(self, piece: Tensor, state: State = None) -> tuple[Tensor, State]:
        logits, state = self(piece[:, :-1], state)
        return F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()), state


class Learner:
    """A model with what belongs to its training: optimizer, carried state, curves and times."""

    def __init__(self, model: CharLM, lr: float, device: torch.device) -> None:
        self.model, self.lr, self.device = model.to(device), lr, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.state: State = None
        self.losses: list[float] = []  # one a step, in nats per character
        self.seconds: list[float] = []  # one a step
        self.validation: list[tuple[int, float]] = []

    def step(self, piece: Tensor, fresh: bool) -> None:
        started = time.perf_counter()
        # A decay that does not depend on how long the training is to be, so that it can be resumed and prolonged.
        self.optimizer.param_groups[0]["lr"] = self.lr / math.sqrt(1 + len(self.losses) / DECAY)
        loss, state = self.model.loss(piece, None if fresh else self.state)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = state[0].detach(), state[1].detach()  # the values go on, the gradient ends here
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            fail(f"the loss is {self.losses[-1]} at step {len(self.losses)}: a smaller --lr than {self.lr} may help")
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def validate(self, piece: Tensor) -> None:
        if not self.validation or self.validation[-1][0] < len(self.losses):
            self.validation.append((len(self.losses), self.model.loss(piece)[0].item()))

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, temperature: float, seed: int) -> tuple[Tensor, list[float]]:
        """Characters drawn one by one, and the seconds that each took."""
        draw, drawn, seconds = torch.Generator().manual_seed(seed), [], []
        logits, state = self.model(prompt[None].to(self.device))  # the prompt in one call
        for _ in range(length):  # then one character a call: T = 1, with the state carried along
            started = time.perf_counter()
            chances = (logits[0, -1] / temperature).softmax(-1).cpu()
            drawn.append(torch.multinomial(chances, 1, generator=draw))
            logits, state = self.model(drawn[-1][None].to(self.device), state)
            seconds.append(time.perf_counter() - started)
        return torch.cat(drawn), seconds

    def state_dict(self) -> dict:
        plain = {k: v for k, v in vars(self).items() if k in ("state", "losses", "seconds", "validation")}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "plain": plain}

    def load_state_dict(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        vars(self).update(saved["plain"])
        self.state = self.state and (self.state[0].to(self.device), self.state[1].to(self.device))
