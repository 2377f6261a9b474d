"""Qwen2: network, weights, loss and text generation. Knows nothing of adapters or data."""

from model.checkpoint import find_checkpoint
from model.generate import Decoding, generate
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config

__all__ = [
    "Decoding",
    "Qwen2",
    "Qwen2Config",
    "find_checkpoint",
    "generate",
    "linear_cross_entropy",
    "load_model",
]
