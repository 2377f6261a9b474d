"""A and B of all adapters in the dtype of the base, cast together for one forward pass.

A cast in each layer is two kernels forward and two backward; 24 layers with 96 adapters have 384 of
them. `inject` registers both functions below as hooks of the model. The casts exist only while the
model's forward pass runs, so they are never older than A and B, and autograd takes their gradients
to A and B. A layer that is called by itself, or again by recomputation, casts its own.
"""

from typing import Any

import torch
from torch import nn

from lora.layer import LoRALinear


def cast_adapters(adapters: list[LoRALinear], model: nn.Module, inputs: Any) -> None:
    """Before the forward pass: give each layer its A and B, cast by one concatenation.

    A base in fp32 needs no cast.
    """
    layers = [layer for layer in adapters if layer.enabled and not layer.merged]
    if not layers or (dtype := _dtype(layers[0].base_layer)) == torch.float32:
        return
    matrices = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
    flat = torch.cat([matrix.flatten() for matrix in matrices]).to(dtype)
    parts = flat.split([matrix.numel() for matrix in matrices])
    casts = [part.view_as(matrix) for part, matrix in zip(parts, matrices)]
    for layer, A, B in zip(layers, casts[::2], casts[1::2]):
        layer.cast = A, B


def remove_casts(adapters: list[LoRALinear], model: nn.Module, inputs: Any, outputs: Any) -> None:
    """After the forward pass, also after one that failed."""
    for layer in adapters:
        layer.cast = None


def _dtype(base_layer: nn.Linear) -> torch.dtype:
    """The dtype of the layer's weight, without dequantizing the weight of a quantized layer."""
    return getattr(base_layer, "dtype", None) or base_layer.weight.dtype
