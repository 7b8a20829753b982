"""Ways of a CPU, and of torch's own LSTM on any device."""
