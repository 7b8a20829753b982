"""fused_lstm: the LSTM layer that torch.nn.LSTM should have been."""

from . import convert
from .cell import Cell
from .dropouts import variational_dropout, weight_drop
from .functional import lstm
from .gates import Gates, inspect_gates, plot_gates
from .layer import LSTM, LSTMCell, explain, replace_lstm
from .plan import Plan

__version__ = "0.1.0"
__all__ = [
    "LSTM", "Cell", "Gates", "LSTMCell", "Plan", "convert", "explain", "inspect_gates", "lstm", "plot_gates",
    "replace_lstm", "variational_dropout", "weight_drop",
]  # fmt: skip
