"""From rows of text to flat micro-batches of token ids. Knows nothing of the model or adapters."""

from data.batches import Schedule, flat_batch
from data.chat import ChatFormat
from data.encode import encode_problems
from data.split import split_problems
from data.tasks import load_source

__all__ = [
    "ChatFormat",
    "Schedule",
    "encode_problems",
    "flat_batch",
    "load_source",
    "split_problems",
]
