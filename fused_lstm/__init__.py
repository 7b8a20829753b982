"""fused_lstm: the LSTM layer that torch.nn.LSTM should have been."""

from .convert import explain, replace_lstm
from .dispatch import Plan
from .functional import lstm
from .inspect import Gates, inspect_gates, plot_gates
from .layer import LSTM, LSTMCell

__version__ = "0.1.0"
__all__ = ["LSTM", "Gates", "LSTMCell", "Plan", "explain", "inspect_gates", "lstm", "plot_gates", "replace_lstm"]
