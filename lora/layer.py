"""The adapter's math: a frozen linear layer plus a trained product of two thin matrices.

    y = base(x) + scaling * (dropout(x) @ A.T) @ B.T

A is random and B is zero, so a fresh adapter changes nothing, and the first gradient reaches B.
Both are fp32 whatever the base is: an update of 2e-4 is lost in the 8 bits of a bf16 weight.

Legend: T tokens, r rank, in and out the base's sizes.
Source: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732.
"""

import math

import torch
from torch import Tensor, nn

from lora.dropout import KeyedDropout


class LoRALinear(nn.Module):
    """Wraps an untouched `nn.Linear`; `lora_A (r, in)` and `lora_B (out, r)` are what is trained.

    Args:
        base_layer: the layer to adapt, of any floating dtype, on any device.
        r: rank; alpha: numerator of the scaling alpha/r, or alpha/sqrt(r) with `rslora`.
        dropout: rate on the adapter's input, never on the base's.
        index: sets this adapter's random numbers apart from the others'; seed: this run's.
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
        assert r > 0, f"rank {r}"
        weight = base_layer.weight
        self.base_layer = base_layer
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = KeyedDropout(dropout, base_layer.in_features, index).to(weight.device)
        self.lora_A = nn.Parameter(init_A(r, base_layer.in_features, seed, index).to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r, device=weight.device))
        self.enabled = True
        self.unmerged_weight: Tensor | None = None  # the base's own, while merged
        self.taken_out = None  # of the base, where its largest directions are trained: `init.py`

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (T, out)
        if not self.enabled or self.merged:
            return y
        low = self.dropout(x) @ self.lora_A.to(x.dtype).t()  # (T, r)
        return torch.addmm(y, low, self.lora_B.to(x.dtype).t(), alpha=self.scaling)  # (T, out)

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def delta(self) -> Tensor:
        """(out, in) fp32: what the adapter adds to the base's weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Add the delta to the base's weight in fp32, rounded once, to `dtype` or else the base's.

        `unmerge` puts the old one back; it is kept as a plain tensor, since parameters are saved.
        """
        assert not self.merged, "merged already"
        weight = self.base_layer.weight
        self.unmerged_weight = weight.data
        rounded = (weight.data.float() + self.delta()).to(dtype or weight.dtype)
        weight.data = rounded.to(weight.dtype)

    def unmerge(self) -> None:
        """Put back the very weight that `merge` set aside."""
        assert self.merged, "not merged"
        self.base_layer.weight.data, self.unmerged_weight = self.unmerged_weight, None


def init_A(r: int, in_features: int, seed: int, index: int) -> Tensor:
    """(r, in) fp32, Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)).

    Drawn from its own generator: it depends on (seed, index) alone, not on what was drawn before.
    """
    bound, generator = 1 / math.sqrt(in_features), generator_of(seed, index)
    return torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)


def generator_of(seed: int, index: int) -> torch.Generator:
    """The source of one adapter's first values."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
