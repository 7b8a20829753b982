"""Which relative of torch's cell a layer has, and the parameters it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5  # of the norms, as in haste and in torch.nn.LayerNorm
NORMS = ("output", "state")


@dataclass(frozen=True, repr=False)
class Cell:
    """A relative of torch's cell: ``fused_lstm.LSTM(..., cell=Cell(peephole=True))``. All fields are off by default.

    The pre-activations a of the gates are W_ih x + b_ih + W_hh h + b_hh, in the order i, f, g, o, each of H rows. H is
    ``hidden_size``; parameters below are those of layer l and direction ``_l{l}`` or ``_l{l}_reverse``.

    Args:
        peephole: gates see the cell state: a_i += p_i * c and a_f += p_f * c of the step before, a_o += p_o * c' of this
            step (Gers and Schmidhuber 2000; Sak et al. 2014). Adds ``weight_peephole`` (3, H), rows p_i, p_f, p_o.
        coupled: i = 1 - f (Greff et al. 2017). There are no weights of i: ``weight_ih``, ``weight_hh`` and biases have 3H
            rows, for f, g, o, and ``weight_peephole`` the rows p_f, p_o.
        layer_norm: LN normalizes to mean 0 and variance 1 (+ 1e-5), without gains of its own. The pre-activations are
            LN(W_ih x) * norm_ih_weight + b_ih + LN(W_hh h) * norm_hh_weight + b_hh, each norm over all 4H, and the cell
            state meets z = LN(c') * norm_c_weight + norm_c_bias. With ``"output"``, h' = o * tanh(z), and c' itself is
            carried on (Ba et al. 2016; haste's LayerNormLSTM). With ``"state"``, z is carried on as well (the
            LayerNormLSTM of PyTorch's benchmarks/fastrnns/custom_lstms.py). Adds ``norm_ih_weight`` and
            ``norm_hh_weight`` (4H,), ``norm_c_weight`` and ``norm_c_bias`` (H,).
        zoneout: probabilities (p_h, p_c) that a unit keeps its h, or its c, of the step before; while training by a mask for
            each step, else by the expected value: p * before + (1 - p) * after (Krueger et al. 2017). The masks come from
            Philox, keyed by one number of torch's generator for each layer and call.
        heads: W_hh is block-diagonal: unit k of H sees only the h of its own block of H / heads units. ``weight_hh`` is
            (4H, H / heads) and holds each row's block.
        forget_bias: initial value of b_if + b_hf; None: as torch.nn.LSTM draws them (Jozefowicz et al. 2015 suggest 1).

    Raises:
        TypeError, ValueError: a field of another type or value; ``layer_norm`` with ``coupled`` or ``heads``, whose norms
            would be over other sets of pre-activations than in the sources.
    """

    peephole: bool = False
    coupled: bool = False
    layer_norm: str | None = None
    zoneout: tuple[float, float] = (0.0, 0.0)
    heads: int = 1
    forget_bias: float | None = None

    def __post_init__(self) -> None:
        for name in ("peephole", "coupled"):
            self._expect(name, "of type bool", type(getattr(self, name)) is bool)
        norm, zoneout, heads, forget = self.layer_norm, self.zoneout, self.heads, self.forget_bias
        is_norm = norm is None or isinstance(norm, str)
        self._expect("layer_norm", "'output', 'state' or None", is_norm, is_norm and norm in (None, *NORMS))
        two = isinstance(zoneout, (tuple, list)) and all(map(_number, zoneout))
        in_range = two and len(zoneout) == 2 and all(0 <= p <= 1 for p in zoneout)
        self._expect("zoneout", "two numbers in range [0, 1], (p_h, p_c)", two, in_range)
        object.__setattr__(self, "zoneout", tuple(map(float, zoneout)))
        whole = _number(heads) and isinstance(heads, Integral)
        self._expect("heads", "an integer of at least 1", whole, whole and heads >= 1)
        object.__setattr__(self, "heads", int(heads))
        if forget is not None:
            known = _number(forget)
            self._expect("forget_bias", "a finite number or None", known, known and abs(forget) <= torch.finfo().max)
            object.__setattr__(self, "forget_bias", float(forget))
        if self.layer_norm and (self.coupled or self.heads > 1):
            with_what = "coupled" if self.coupled else "heads"
            raise ValueError(f"layer_norm cannot be had with {with_what}: its norms are over all four gates and all units")
        object.__setattr__(self, "relative", str(Relative(self.peephole, self.layer_norm or "", *self.zoneout)))

    relative: ClassVar[str]  # as ``LayerCall.cell``; empty if the recurrence is torch's, by weights of another form at most

    def _expect(self, name: str, what: str, type_fits: bool, value_fits: bool = True) -> None:
        if not type_fits or not value_fits:
            kind = ValueError if type_fits else TypeError
            raise kind(f"{name} should be {what}, got: {getattr(self, name)!r}")

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Cell({', '.join(given)})"

    def check_sizes(self, hidden_size: int, bias: bool, proj_size: int) -> None:
        """Raise ValueError where a layer cannot have this cell."""
        if hidden_size % self.heads:
            raise ValueError(f"heads should divide hidden_size={hidden_size}, got: {self.heads}")
        if proj_size and not self.projects:
            raise ValueError(f"proj_size goes with torch's cell or coupled gates, got proj_size={proj_size} and {self}")
        if self.forget_bias is not None and not bias:
            raise ValueError(f"forget_bias={self.forget_bias} needs bias=True")

    @property
    def projects(self) -> bool:
        """Whether it goes with a projection."""
        return self == Cell(coupled=self.coupled, forget_bias=self.forget_bias)

    @property
    def torchs(self) -> bool:
        """Whether it differs from torch's cell in an initial value at most."""
        return self == Cell(forget_bias=self.forget_bias)

    @property
    def gates(self) -> int:
        """How many gates have weights, the candidate among them."""
        return 3 if self.coupled else 4

    def own(self, H: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that the cell adds to a layer and direction."""
        peephole = {"weight_peephole": (self.gates - 1, H)} if self.peephole else {}
        norms = {"norm_ih_weight": (4 * H,), "norm_hh_weight": (4 * H,), "norm_c_weight": (H,), "norm_c_bias": (H,)}
        return peephole | (norms if self.layer_norm else {})

    def uncoupled(self, weights: Sequence[Tensor], size: int) -> list[Tensor]:
        """The weights, ``size`` for each layer and direction, with those of i. Since 1 - sigmoid(a) is sigmoid(-a), they are
        those of f, negated."""
        own, result = len(self.own(1)), []
        for k, w in enumerate(weights):
            place = k % size
            if place >= size - own:  # peepholes
                result.append(torch.cat((-w[:1], w)))
            elif w.dim() == 2 and place > 1:  # a projection
                result.append(w)
            else:
                H = w.shape[0] // 3
                result.append(torch.cat((-w[:H], w)))
        return result

    def head(self, group: Sequence[Tensor], k: int) -> list[Tensor]:
        """The weights of a layer and direction that are head k's, of an LSTM of H / heads units by itself."""
        own = len(self.own(1))
        plain, peepholes = (group[:-own], group[-own:]) if own else (group, ())
        gates = [w.unflatten(0, (4, self.heads, -1))[:, k].flatten(0, 1) for w in plain]
        return gates + [w.unflatten(1, (self.heads, -1))[:, k] for w in peepholes]

    def joined_heads(self, weights: Sequence[Tensor], size: int) -> list[Tensor]:
        """The weights, ``size`` for each layer and direction, of torch's cell: W_hh with zeros between the heads' blocks."""
        own, result = torch.eye(self.heads, dtype=torch.bool, device=weights[0].device)[:, None, :, None], list(weights)
        for k in range(1, len(weights), size):
            blocks = weights[k].unflatten(0, (4, self.heads, -1)).unsqueeze(3)
            result[k] = torch.where(own, blocks, 0).view(len(weights[k]), -1)
        return result

    def split(self, groups: Sequence[Sequence[Tensor]]) -> tuple[Sequence[Sequence[Tensor]], Tensor | None, Tensor | None]:
        """The weights that torch's cell has, by direction; what ``LayerCall.units`` holds; gains of the input's products."""
        own = len(self.own(1))
        if not own:
            return groups, None, None
        units, gains = [], []
        for group in groups:
            rows = list(group[-own:])
            parts = [rows.pop(0)] if self.peephole else []
            if self.layer_norm:
                gain, products, *norm_c = rows
                parts += [products.unflatten(0, (4, -1)), torch.stack(norm_c)]
                gains.append(gain)
            units.append(torch.cat(parts))
        return [group[:-own] for group in groups], torch.stack(units), torch.cat(gains) if gains else None


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def checked_cell(cell: object) -> Cell | None:
    """A layer's cell, None if it is torch's."""
    if cell is not None and not isinstance(cell, Cell):
        raise TypeError(f"cell should be a fused_lstm.Cell or None, got: {type(cell).__name__}")
    return None if cell == Cell() else cell


class Relative(NamedTuple):
    """What distinguishes a recurrence from torch's LSTM's."""

    peephole: bool
    norm: str  # "", "output" or "state"
    zoneout_h: float
    zoneout_c: float

    @property
    def zoned(self) -> bool:
        return self.zoneout_h > 0 or self.zoneout_c > 0

    def __str__(self) -> str:
        """As ``LayerCall.cell``, which :meth:`of` reads."""
        zoneout = f"zoneout={self.zoneout_h!r},{self.zoneout_c!r}" if self.zoned else ""
        return " ".join(filter(None, ("peephole" * self.peephole, self.norm and f"layer_norm={self.norm}", zoneout)))

    @staticmethod
    @lru_cache(maxsize=256)
    def of(text: str) -> Relative:
        words = {name: value for name, _, value in (word.partition("=") for word in text.split())}
        h, c = map(float, words.get("zoneout", "0,0").split(","))
        return Relative("peephole" in words, words.get("layer_norm", ""), h, c)
