"""LoRA: a frozen linear layer plus a trained low-rank update.

    y = base(x) + scaling * dropout(x) @ A.T @ B.T

A starts random and B starts at zero, so a fresh adapter leaves the output unchanged, and the first
gradient reaches only B. A and B are fp32 whatever the dtype of the base: bf16 keeps 8 significant
bits, so most updates at a learning rate of 2e-4 would be rounded away.

Legend:
    T         tokens of a micro-batch
    in, out   input and output features of the base layer
    r         rank of the update
    x, y      input (T, in) and output (T, out), in the dtype of the base
    A, B      the trained matrices, (r, in) and (out, r); `lora_A` and `lora_B` as in PEFT
    scaling   alpha / r, or alpha / sqrt(r) with rsLoRA

Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732.
"""

import math

import torch
from torch import Tensor, nn

from lora import fused_dropout
from lora.dropout import KeyedDropout


class LoRALinear(nn.Module):
    """Wraps an `nn.Linear` and adds a trained low-rank update to its output.

    Args:
        base_layer: the layer to adapt, of any floating-point dtype, on any device.
        r: rank of the update.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input of the update; the base layer sees all of x.
        rslora: divide alpha by sqrt(r) instead of r.
        index: number of this adapter in the model; adapters with different indices get
            independent initial values and dropout masks.
        seed: seed of the initial values.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        index: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        assert r > 0, f"rank {r} is not positive"
        device, in_features = next(base_layer.parameters()).device, base_layer.in_features
        self.base_layer = base_layer
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = KeyedDropout(dropout, in_features, index).to(device)
        self.lora_A = nn.Parameter(initial_A(r, in_features, seed, index).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r, device=device))
        self.enabled = True
        self.unmerged_weight: Tensor | None = None  # the original base weight while merged
        self.cast: tuple[Tensor, Tensor] | None = None  # A and B in the base's dtype: see cast.py

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, in) to (T, out)."""
        y = self.base_layer(x)  # (T, out)
        if not self.enabled or self.merged:
            return y
        A, B = [matrix.to(x.dtype) for matrix in self.cast or (self.lora_A, self.lora_B)]
        # On CUDA the two lines below are one function, which does not keep dropout(x).
        if drop := self.dropout.kernel(x):
            return fused_dropout.update(y, x, A, B, drop, self.scaling)  # (T, out)
        low = self.dropout(x) @ A.t()  # (T, r)
        return y.addmm_(low, B.t(), alpha=self.scaling)  # (T, out), in place

    @property
    def merged(self) -> bool:
        """Whether the base weight currently contains the update."""
        return self.unmerged_weight is not None

    def original_weight(self) -> Tensor:
        """The base weight without the update, (out, in), also while merged."""
        weight = self.base_layer.weight.detach()
        return weight if self.unmerged_weight is None else self.unmerged_weight

    def delta(self) -> Tensor:
        """The update to the base weight, (out, in) fp32: scaling * B A."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Add the update to the base weight in fp32 and round the sum once.

        The sum is rounded to `dtype` (default: the weight's own) and stored in the weight's dtype.
        `unmerge` restores the original, which is kept as a plain tensor so that it is not part of
        the model's state dict.
        """
        assert not self.merged, "the adapter is already merged"
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter), "a quantized weight cannot hold the update"
        self.unmerged_weight = weight.data
        rounded = (weight.data.float() + self.delta()).to(dtype or weight.dtype)  # (out, in)
        weight.data = rounded.to(weight.dtype)

    def unmerge(self) -> None:
        """Restore the original base weight, bit for bit."""
        assert self.unmerged_weight is not None, "the adapter is not merged"
        self.base_layer.weight.data, self.unmerged_weight = self.unmerged_weight, None


def initial_A(r: int, in_features: int, seed: int, index: int) -> Tensor:
    """Initial values of A, (r, in) fp32: uniform in ±1/sqrt(in), as in PEFT.

    This is Kaiming-uniform with a = sqrt(5). The values depend only on the arguments, because each
    adapter has its own generator; PyTorch's global generator is neither read nor advanced.
    """
    bound = 1 / math.sqrt(in_features)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)
