"""A streaming decoder: bits sent over an echoing, noisy channel are decoded while the signal arrives.

    python examples/streaming.py                # seconds on a CPU
    python examples/streaming.py --hidden 512

Every sample mixes three bits. An LSTM learns from whole recordings to tell them apart; then a decoder that keeps its state
is fed sample by sample, or chunk by chunk, with the same result. On a CUDA device a step is captured in a CUDA graph, which
every sample replays. Prints bit errors, and the time of a sample beside torch.nn.LSTM's.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_lstm

CHANNEL, NOISE = (0.6, 1.0, 0.7), 0.3  # how much of a bit is in its sample and in the next two
DELAY = len(CHANNEL) - 1  # a bit is decoded when all of it has arrived


def transmit(bits: Tensor) -> Tensor:
    """Bits to received samples, both (T, B, 1)."""
    sent = F.pad(2.0 * bits - 1, (0, 0, 0, 0, DELAY, 0))
    heard = sum(a * sent[DELAY - k : len(sent) - k] for k, a in enumerate(CHANNEL))
    return heard + NOISE * torch.randn(bits.shape, device=bits.device)


def train(lstm: fused_lstm.LSTM, head: nn.Linear, device: torch.device) -> None:
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(150):
        bits = torch.randint(2, (32, 32, 1), device=device)
        logits = head(lstm(transmit(bits))[0])
        loss = F.binary_cross_entropy_with_logits(logits[DELAY:], bits[:-DELAY].to(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Decoder:
    """Decodes one stream as it arrives, and keeps the LSTM's state in between. For use without gradients."""

    def __init__(self, lstm: fused_lstm.LSTM, head: nn.Linear, device: torch.device) -> None:
        self.lstm, self.head, self.step = lstm, head, self._step
        self.state = tuple(torch.zeros(2, 1, 1, lstm.hidden_size, device=device))
        self.sample, self.logit = torch.zeros(2, 1, 1, device=device)
        if device.type == "cuda":
            self._step()  # compiles the kernels, which a capture cannot wait for
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.step = graph.replay
            for s in self.state:
                s.zero_()

    def _step(self) -> None:
        """Reads the sample, moves the state on and fills the logit, all in the same memory each time."""
        y, _ = self.lstm.step(self.sample, self.state, inplace=True)
        self.logit.copy_(self.head(y))

    def feed(self, samples: Tensor) -> Tensor:
        """Sample by sample: (n, 1, 1) to logits, at t that of the bit at t - DELAY."""
        logits = []
        for sample in samples:
            self.sample.copy_(sample)
            self.step()
            logits.append(self.logit.clone())
        return torch.stack(logits)

    def feed_chunk(self, samples: Tensor) -> Tensor:
        """The same in one call of the layer, quicker where many samples arrive at once."""
        y, state = self.lstm(samples, self.state)
        for old, new in zip(self.state, state, strict=True):
            old.copy_(new)
        return self.head(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=128, help="size of the LSTM (default: %(default)s)")
    hidden = parser.parse_args().hidden
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # for the comparison with the offline run
    lstm, head = fused_lstm.LSTM(1, hidden, device=device), nn.Linear(hidden, 1, device=device)
    train(lstm, head, device)

    torch.set_grad_enabled(False)
    bits = torch.randint(2, (1000, 1, 1), device=device)
    signal = transmit(bits)
    decoder, offline = Decoder(lstm, head, device), head(lstm(signal)[0])
    arriving = signal.split((400, 1, 250, 349))
    logits = [decoder.feed(arriving[0]), *map(decoder.feed_chunk, arriving[1:3]), decoder.feed(arriving[3])]
    torch.testing.assert_close(torch.cat(logits), offline, rtol=1e-3, atol=1e-3)
    print("decoded while it arrived: the same as offline")
    for name, level in {"LSTM": offline[DELAY:], "threshold": signal[1 : 1 - DELAY]}.items():
        print(f"bit errors, {name}: {((level > 0) != bits[:-DELAY]).float().mean():.1%}")

    theirs = nn.LSTM(1, hidden, device=device)
    theirs.load_state_dict(lstm.state_dict())
    calls = (lambda: head(theirs(signal[:1], decoder.state)[0]), decoder.step)
    times: tuple[list[float], list[float]] = ([], [])
    for call, taken in [*zip(calls, times, strict=True)] * 500:  # in turn
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - started))
    before, now = map(median, times)
    print(f"one sample: {now:.0f} us, with nn.LSTM {before:.0f} us, ratio {before / now:.2f}")


if __name__ == "__main__":
    main()
