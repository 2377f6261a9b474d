"""The memory of a training step, estimated from shapes before any weight is read.

The peak is at the end of the forward pass, where the loss has its buffers, or at the start of the
backward pass, where the last layer has its gradients: what the layers keep is complete in both.
With `--checkpoint-activations`, a layer keeps only its input, and one layer at a time is complete:

    peak = weights + adapters + activations + max(loss, backward)

`docs/scaling.md` compares it with the peak of CUDA's allocator. Generated answers (`--stop-on
exact-match`) are not part of it.

Legend: C hidden size, H query heads, G key/value heads, D head size, F MLP size, V vocabulary size,
r rank of an adapter, b bytes of a value in the base's dtype; fp32 values have 4 bytes.
"""

from dataclasses import astuple, dataclass, replace

import torch
from torch import nn

from data.batches import Schedule
from errors import BadOption
from lora.config import LoRAConfig, added_parameters, layer_ranks
from model.attention import HALF_PRECISION
from model.loss import LOGITS_BYTES, PROBABILITIES_BYTES
from model.qwen2 import Qwen2
from run.device import describe, free_memory_gb

TOLERANCE = 0.1  # relative error of the estimate: a run is refused if it cannot fit in spite of it
BITS = {"nf4": 4.5, "int8": 8.5}  # of a weight and its share of a scale
CUBLAS_BYTES = 50e6  # its workspaces: about 75 MB on an H100, 25 MB on older GPUs
# Without dropout, adapters that have the same input keep it once.
SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by what they hold."""

    weights: float
    adapters: float  # with their gradients and AdamW's two moments
    activations: float  # kept for the backward pass
    buffers: float  # of the loss, or of a layer's backward pass if that has more

    @property
    def gb(self) -> float:
        """The sum, in GB of 10^9 bytes."""
        return sum(astuple(self)) / 1e9

    def __str__(self) -> str:
        parts = zip(("weights", "adapters", "activations", "buffers"), astuple(self))
        return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)


@dataclass(frozen=True)
class MemoryModel:
    """What the memory of a step follows from, apart from the size of its micro-batches."""

    network: Qwen2  # without adapters; only its shapes are read
    lora: LoRAConfig
    dtype: torch.dtype
    device: torch.device
    base_precision: str | None = None  # of `Base`
    parts: int = 1  # the ranks that the layers are spread over
    compiled: bool = False  # `--compile`

    def weight_bytes(self) -> float:
        """The base as it is held; with several parts, also two layers that are gathered."""
        b, layers = self.dtype.itemsize, self.network.model.layers
        inside = sum(p.numel() for p in layers.parameters())
        linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
        bits = BITS.get(self.base_precision, 8 * b)
        held = (inside - linear) * b + linear * bits / 8
        whole = (sum(p.numel() for p in self.network.parameters()) - inside) * b
        return whole + held / self.parts + 2 * held / len(layers) * (self.parts > 1)

    def of_a_step(self, tokens: int, supervised: int, *, recompute: bool) -> Memory:
        """The peak of a step whose largest micro-batch has `tokens`, `supervised` with a target."""
        config, b = self.network.config, self.dtype.itemsize
        C, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        added = added_parameters(self.network, self.lora)
        layer = tokens * self.layer_bytes() + added / layers * b * (b < 4)  # A and B are cast
        ends = tokens * (2 * C * b + 4 * config.head_size + 64)  # norm, rotary table, ids
        backward = tokens * (3 * F * b + C * (8 + b)) + recompute * layer
        backward += C * F * (8 + b) * bool(self.base_precision)  # one weight is dequantized
        return Memory(
            weights=self.weight_bytes(),
            adapters=16 * added,
            activations=layers * (tokens * 4 * C if recompute else layer) + ends,
            buffers=max(self.loss_bytes(supervised), backward)
            + CUBLAS_BYTES * (self.device.type == "cuda"),
        )

    def layer_bytes(self) -> float:
        """What a layer keeps of each token for the backward pass."""
        config, b = self.network.config, self.dtype.itemsize
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_size
        norms = 2 * (config.hidden_size * b + 4) + config.is_qwen3 * (H + G) * (D * b + 4)
        if self.device.type == "cpu":  # where queries and keys are fp32
            attention = (H + G) * D * (4 + b)
        else:  # the variable-length kernel needs no keys and values for each query head
            keys = G if has_varlen_kernel(self.device, self.dtype) else H
            attention = 2 * (H + keys) * D * b + 4 * H
        return norms + attention + 2 * config.intermediate_size * b + self.adapter_bytes()

    def adapter_bytes(self) -> float:
        """What the adapters of a layer keep of each token, on average over the layers."""
        b, on_cuda = self.dtype.itemsize, self.device.type == "cuda"
        inputs, others = {}, 0  # inputs: place -> bytes of the input that is kept there
        for name, r in layer_ranks(self.network, self.lora).items():
            out_features, in_features = self.network.get_submodule(name).weight.shape
            others += r * b + self.lora.dora * 2 * out_features * b
            layer, _, last = name.rpartition(".")
            # Where dropout is a Triton kernel, the backward pass drops the input again.
            kept = self.lora.dora or self.compiled or not on_cuda
            if self.lora.dropout and kept:  # a CPU keeps the mask too
                inputs[name] = in_features * (b + (not on_cuda))
            elif not (on_cuda and last == "o_proj"):  # there the result of attention, kept anyway
                inputs[layer, SHARED_INPUT.get(last, last)] = in_features * b
        return (sum(inputs.values()) + others) / self.network.config.num_hidden_layers

    def loss_bytes(self, supervised: int) -> float:
        """Hidden states and their gradient, logits of a chunk, and probabilities of a block."""
        config, b = self.network.config, self.dtype.itemsize
        C, V = config.hidden_size, config.vocab_size
        chunk = max(1, min(supervised, LOGITS_BYTES // (V * b)))
        block = max(1, min(chunk, PROBABILITIES_BYTES // (V * 4)))
        copies = 2 if self.dtype == torch.bfloat16 else 1  # softmax reads only fp16 without a copy
        if self.device.type == "cuda":
            copies = 0  # a Triton kernel holds no probabilities
        return supervised * 2 * C * b + V * (chunk * b + block * 4 * copies)


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one call computes the attention of a micro-batch; assumed of a GPU that is absent."""
    if device.type != "cuda" or dtype not in HALF_PRECISION:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def largest_micro_batch(schedule: Schedule, halved: int = 0) -> tuple[int, int]:
    """(tokens, supervised tokens) of the micro-batch with the most tokens."""
    sizes = (
        (sum(len(e.tokens) for e in examples), sum(e.supervised_count for e in examples))
        for i in range(schedule.total_steps)
        for examples in schedule.step(i, halved).micro_batches
    )
    return max(sizes, default=(0, 0))


def fitting_flags(memory: MemoryModel, schedule: Schedule, free_gb: float) -> list[str]:
    """Flags that make a step fit into `free_gb` and change neither steps nor losses: the largest
    micro-batch that fits, without and with recomputation, which excludes `--compile`.
    """
    found, ways = [], [("", False), ("--checkpoint-activations", True)]
    for flag, recompute in ways[:1] if memory.compiled else ways:
        for parts in (n for n in range(1, schedule.batch_size + 1) if schedule.batch_size % n == 0):
            size, grad_accum = schedule.batch_size // parts, schedule.grad_accum * parts
            tried = replace(schedule, batch_size=size, grad_accum=grad_accum)
            if memory.of_a_step(*largest_micro_batch(tried), recompute=recompute).gb <= free_gb:
                split = f" --batch-size {size} --grad-accum {grad_accum}" * (parts > 1)
                found.append((flag + split).strip())
                break
    return found


def check_memory(
    memory: MemoryModel, schedule: Schedule, *, recompute: bool, halved: int = 0
) -> str:
    """The estimate for people, with flags that make a run fit if it may not.

    Raises BadOption if it cannot fit into a GPU's free memory, with these flags as the remedy.
    """
    tokens, supervised = largest_micro_batch(schedule, halved)
    need = memory.of_a_step(tokens, supervised, recompute=recompute)
    free_gb = free_memory_gb(memory.device)
    if not need.gb > free_gb:
        whole = f"about {need.gb:.2f} of {free_gb:.1f} GB free"
        return f"memory      {whole}, for a micro-batch of {tokens:,} tokens\n            {need}"
    smaller = replace(memory, base_precision=memory.base_precision or "nf4")
    flags = fitting_flags(memory, schedule, free_gb) or [
        f"--base-precision nf4 {flag}".strip() for flag in fitting_flags(smaller, schedule, free_gb)
    ]
    remedy = "use " + (" or ".join(flags) or "a smaller base, or a shorter --max-length")
    cause = (
        f"a micro-batch of {tokens:,} tokens needs about {need.gb:.1f} GB of memory ({need}),"
        f" and {describe(memory.device)} has {free_gb:.1f} GB free"
    )
    if memory.device.type == "cuda" and need.gb * (1 - TOLERANCE) > free_gb:
        raise BadOption(cause, remedy)
    return f"memory may not suffice: {cause}\n  {remedy}"
