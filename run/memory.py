"""The memory of a training step, estimated from shapes before any weight is read.

The peak is at the end of the forward pass, where the loss has its buffers, or at the start of the
backward pass, where the last layer has its gradients: what the layers keep is whole in both. With
`--checkpoint-activations`, a layer keeps only its input, and one layer at a time is whole. So

    peak = weights + adapters + kept + max(loss, backward)

`docs/scaling.md` compares it with the allocator's exact peak.

Legend: T tokens of the largest micro-batch, N supervised ones, C hidden size, H query heads, G
key/value heads, D head size, F MLP size, V vocabulary size, r rank of an adapter, b bytes of a value
in the base's dtype; fp32 values have 4 bytes.
"""

from dataclasses import astuple, dataclass

import torch

from lora.config import LoRAConfig, added_parameters, layer_ranks
from model.attention import HALF_PRECISION
from model.loss import DEVICE_PROBABILITIES_BYTES, LOGITS_BYTES, PROBABILITIES_BYTES
from model.qwen2 import Qwen2

TOLERANCE = 0.1  # of the estimate: only what exceeds the free memory by more is refused


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by what they hold."""

    weights: float
    adapters: float  # with their gradients and AdamW's two moments
    activations: float  # kept for the backward pass
    passing: float  # buffers of the loss, or of a layer's backward pass if they are larger

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = "weights", "adapters and optimizer", "activations", "buffers"
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in zip(parts, astuple(self)))


@dataclass(frozen=True)
class MemoryModel:
    """What the memory of a run's steps follows from, apart from the sizes of a micro-batch."""

    network: Qwen2  # without adapters; only its shapes are read
    lora: LoRAConfig
    dtype: torch.dtype
    device: torch.device

    def of_a_step(self, tokens: int, supervised: int, *, recompute: bool) -> Memory:
        """The peak with a largest micro-batch of `tokens`, of which `supervised` have a target."""
        config, b = self.network.config, self.dtype.itemsize
        C, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        added = added_parameters(self.network, self.lora)
        layer = self.layer_bytes() * tokens
        working_copies = added * b * (b < 4)  # adapters in the base's dtype, kept by each layer
        kept = layers * (4 * C * tokens if recompute else layer)
        ends = tokens * (
            2 * C * b + 4 * config.head_size + 64
        )  # last norm, its result, angles, ids
        backward = tokens * (3 * F * b + C * (8 + b)) + recompute * layer
        return Memory(
            weights=sum(p.numel() for p in self.network.parameters()) * b,
            adapters=16 * added,
            activations=kept + ends + working_copies / (layers if recompute else 1),
            passing=max(self.loss_bytes(supervised), backward),
        )

    def layer_bytes(self) -> float:
        """What a layer keeps of a token for its backward pass."""
        config, b = self.network.config, self.dtype.itemsize
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_size
        kept = 2 * (config.hidden_size * b + 4) + 2 * config.intermediate_size * b  # norms, SwiGLU
        kept += config.is_qwen3 * (H + G) * (D * b + 4)  # the norms of queries and keys
        if self.device.type == "cpu":  # queries and keys are fp32
            kept += (H + G) * D * 4 + (H + G) * D * b
        else:
            kept += 2 * (H + (G if self.has_flash() else H)) * D * b + 4 * H
        dropout, of_layer = self.lora.dropout > 0, self.network.model.layers[0]
        for name, r in layer_ranks(self.network, self.lora).items():
            if not name.startswith("model.layers.0."):
                continue
            out, inputs = of_layer.get_submodule(name.removeprefix("model.layers.0.")).weight.shape
            kept += (inputs * dropout + r) * b + 2 * out * b * self.lora.dora
            kept += inputs * dropout * (self.device.type != "cuda")  # the mask
        return kept

    def loss_bytes(self, supervised: int) -> float:
        """The loss's buffers: hidden states and their gradient, logits of a chunk, probabilities."""
        config, b = self.network.config, self.dtype.itemsize
        size = PROBABILITIES_BYTES if self.device.type == "cpu" else DEVICE_PROBABILITIES_BYTES
        chunk = max(1, min(supervised, LOGITS_BYTES // (config.vocab_size * b)))
        block = max(1, min(chunk, size // (config.vocab_size * 4)))
        return 2 * supervised * config.hidden_size * b + config.vocab_size * (chunk * b + block * 4)

    def has_flash(self) -> bool:
        """Whether attention is the variable-length kernel, which does not repeat keys for queries."""
        half = self.dtype in HALF_PRECISION
        return half and torch.cuda.get_device_capability(self.device) >= (8, 0)
