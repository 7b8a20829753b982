"""fused_lstm: the LSTM layer that torch.nn.LSTM should have been."""

from .convert import explain, replace_lstm
from .dispatch import Plan
from .functional import lstm
from .layer import LSTM, LSTMCell

__version__ = "0.1.0"
__all__ = ["LSTM", "LSTMCell", "Plan", "explain", "lstm", "replace_lstm"]
