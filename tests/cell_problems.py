"""Random problems of the LSTM's relatives, and a loop by rows and steps to compare with, of no code of the package's."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from checks import DEVICE, RAGGED, Config, results
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_lstm import LSTM, Cell, relatives


def philox(seed: int, index: int, rounds: int) -> list[int]:
    """Philox4x32 of one counter, as its authors' paper has it."""
    word = 2**32
    c, k = [index % word, index // word, 0, 0], [seed % word, seed // word]
    for _ in range(rounds):
        (h0, l0), (h1, l1) = divmod(0xD2511F53 * c[0], word), divmod(0xCD9E8D57 * c[2], word)
        c = [h1 ^ c[1] ^ k[0], l1, h0 ^ c[3] ^ k[1], l0]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape)


def by_row(
    lstm: LSTM,
    x: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """The layer on x (T, B, I): one row, one step, one head after the other, by the formulas of Cell's docstring."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        y, ends = by_row(lstm, padded, hx, lengths)
        return pack_padded_sequence(y, lengths), ends
    seeds = [int(torch.randint(2**63 - 1, (1,))) for _ in range(lstm.num_layers)] if lstm.training else []
    cell, H, D, (T, B) = lstm.cell or Cell(), lstm.hidden_size, 1 + lstm.bidirectional, x.shape[:2]
    lengths = [T] * B if lengths is None else lengths.tolist()
    h_n, c_n, n = [], [], (lstm.cell or Cell()).heads
    weights = dict(lstm.named_parameters())
    for layer in range(lstm.num_layers):
        columns = []
        for d in range(D):

            def w(name: str, d: int = d, layer: int = layer) -> Tensor | float:
                found = weights.get(f"{name}_l{layer}" + "_reverse" * d)
                return 0.0 if found is None else found

            per_row = []
            for b in range(B):
                k = layer * D + d
                h, c = (x.new_zeros(H), x.new_zeros(H)) if hx is None else (hx[0][k, b], hx[1][k, b])
                ys = [x.new_zeros(H)] * T
                order = range(lengths[b]) if d == 0 else range(lengths[b] - 1, -1, -1)
                for t in order:
                    boundary = t if d == 0 else t + 1  # the reset between the step before and this one
                    if resets is not None and (d == 0 or boundary < lengths[b]) and resets[boundary, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    own = w("weight_hh").view(-1, n, H // n, H // n)
                    product = torch.stack([own[:, j] @ h[j * (H // n) : (j + 1) * (H // n)] for j in range(n)], 1).flatten()
                    given = w("weight_ih") @ x[t, b]
                    if cell.layer_norm:
                        given, product = norm(given) * w("norm_ih_weight"), norm(product) * w("norm_hh_weight")
                    a = given + w("bias_ih") + product + w("bias_hh")
                    p = w("weight_peephole")
                    a_f, a_g, a_o = a[-3 * H :].view(3, H)
                    f = torch.sigmoid(a_f + (p[-2] * c if cell.peephole else 0))
                    i = 1 - f if cell.coupled else torch.sigmoid(a[:H] + (p[0] * c if cell.peephole else 0))
                    new_c = shown = f * c + i * torch.tanh(a_g)
                    if cell.layer_norm:
                        shown = norm(new_c) * w("norm_c_weight") + w("norm_c_bias")
                    if cell.layer_norm == "state":
                        new_c = shown
                    new_h = torch.sigmoid(a_o + (p[-1] * new_c if cell.peephole else 0)) * torch.tanh(shown)
                    if any(cell.zoneout):
                        kept = [x.new_full((H,), q) for q in cell.zoneout]
                        if lstm.training:
                            for u in range(H):
                                head, unit = divmod(u, H // n)
                                padded = -(-(H // n) // 16) * 16
                                index = ((t // 2 * B + b) * n * D + head * D + d) * padded + unit
                                words = philox(seeds[layer], index, relatives.ROUNDS)[t % 2 * 2 :]
                                for which in range(2):
                                    kept[which][u] = float(words[which] < round(cell.zoneout[which] * 2**32))
                        new_h = kept[0] * h + (1 - kept[0]) * new_h
                        new_c = kept[1] * c + (1 - kept[1]) * new_c
                    h, c = new_h, new_c
                    ys[t] = h
                per_row.append((torch.stack(ys), h, c))
            y, hs, cs = (torch.stack(s, dim) for s, dim in zip(zip(*per_row, strict=True), (1, 0, 0), strict=True))
            columns.append(y)
            h_n.append(hs)
            c_n.append(cs)
        x = torch.cat(columns, -1)
    return x, (torch.stack(h_n), torch.stack(c_n))


class Problem:
    """A layer and a call, drawn by a seed."""

    def __init__(self, cell: Cell, seed: int, dtype: torch.dtype = torch.float64) -> None:
        r, config = random.Random(f"layer {seed}"), Config.random(seed, dtype, 1, ("padded", "packed sorted", *RAGGED))
        B, I, H = min(config.B, 3), min(config.I, 4), cell.heads * r.randint(1, 3)  # noqa: E741
        layers = 1 if dtype == torch.bfloat16 else min(config.layers, 2)
        # A norm of few numbers, which may be close to each other, multiplies rounding errors; tensors of 256 or more would
        # be judged alone, though all their errors may have one origin.
        if cell.layer_norm:
            I, H = I + 3, 7 if dtype == torch.bfloat16 else 5  # noqa: E741
        self.config = replace(config, B=B, I=I, H=H, layers=layers, proj=0, batch_first=False)
        torch.manual_seed(seed)
        self.lstm = LSTM(I, H, layers, config.bias, bidirectional=config.bidirectional, cell=cell).train(r.random() < 0.7)
        with torch.no_grad():
            for name, p in self.lstm.named_parameters():
                if name.startswith(("norm", "weight_peephole")):  # of which torch's own would be ones and zeros
                    p.add_(torch.randn_like(p) * 0.3)
        self.lstm.to(dtype).double()

    def run(self, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        """Results and gradients in ``dtype``; without a backend by the loop."""
        lstm = copy.deepcopy(self.lstm).to(dtype)
        lstm.backend = backend or "auto"
        torch.manual_seed(self.config.seed)  # of zoneout's masks
        device = DEVICE if backend == "triton" else "cpu"
        return results(lstm, self.config, dtype, device, None if backend else partial(by_row, lstm))[1]


def random_cell(seed: int) -> Cell:
    r = random.Random(f"cell {seed}")  # of another stream than the rest of a problem
    cell = Cell(
        peephole=r.random() < 0.5,
        layer_norm=r.choice([None, "output", "state"]),
        zoneout=r.choice([(0.0, 0.0), (0.3, 0.1), (0.0, 0.5)]),
    )
    return cell if cell.layer_norm else replace(cell, coupled=r.random() < 0.5, heads=r.choice([1, 2, 3]))
