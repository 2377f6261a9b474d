"""Low-rank adapters for the linear layers of any PyTorch model: everything most programs need.

from lora import LoRAConfig, inject, seed_dropout, save_adapter

This package does not know the network, the data, or the scripts that use it.
"""

from lora.config import LoRAConfig
from lora.inject import (
    count,
    disabled,
    inject,
    merge,
    seed_dropout,
    trained_parameters,
    unmerge,
)
from lora.peft_format import read_adapter, save_adapter

__all__ = [
    "LoRAConfig",
    "count",
    "disabled",
    "inject",
    "merge",
    "read_adapter",
    "save_adapter",
    "seed_dropout",
    "trained_parameters",
    "unmerge",
]
