"""Qwen2: the network, its weights, its loss and its decoding. Knows nothing of adapters or data."""
