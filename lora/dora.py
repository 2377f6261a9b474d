"""DoRA: the direction and the magnitude of each row of a weight are trained separately.

    V = W + scaling * B A                  the direction: what plain LoRA would use as its weight
    y = m / ||V|| * (V x) + bias           each row of V rescaled to the trained magnitude

The magnitudes m start as the norms of W's rows, so a fresh adapter leaves the output unchanged bit
for bit. Gradients treat ||V|| as a constant, which saves memory and costs no measurable accuracy
(section 4.3 of the paper). V is never built during training; the forward pass computes

    gain = m / ||V||
    y = base(x) + (gain - 1) * (W x) + gain * scaling * (B A x)

With dropout, x is replaced by dropout(x) in both terms added to base(x), as in PEFT.

Legend:
    T         tokens of a micro-batch
    in, out   input and output features of the base layer
    r         rank of the update
    W, bias   weight (out, in) and bias (out,) of the frozen base layer
    A, B      the trained matrices of `layer.py`, (r, in) and (out, r)
    m, gain   one value per row of the weight, (out,)
    ||.||     Euclidean norm of each row, (out,)

Source: DoRA, arXiv:2402.09353; results equal those of peft 0.21.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.layer import LoRALinear

MIN_SQUARE = 1e-30  # smallest squared norm: keeps the gain of an all-zero row from being 0 / 0


class DoRALinear(LoRALinear):
    """A `LoRALinear` with one more trained vector: `lora_magnitude_vector (out,)`, in fp32.

    Call `init_magnitude` once after construction.
    """

    squares: Tensor  # (out,) fp32: ||W||², needed at every step

    def init_magnitude(self) -> None:
        """Create the magnitudes m, equal to the row norms that the initial A and B give."""
        squares = self.base_layer.weight.detach().float().square().sum(dim=1)  # (out,)
        self.register_buffer("squares", squares, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.norm())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||V||, (out,) fp32, for about the cost of r more tokens in the base layer.

        Row by row: ||w + b A||² = ||w||² + b · (2 w Aᵀ + b A Aᵀ), with scaling included in b.
        """
        weight, A, B = self.original_weight(), self.lora_A, self.scaling * self.lora_B
        cross = (weight @ A.to(weight.dtype).t()).float()  # (out, r)
        squares = self.squares + (B * (2 * cross + B @ (A @ A.t()))).sum(dim=1)  # (out,)
        return squares.clamp_min(MIN_SQUARE).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, in) to (T, out)."""
        y = self.base_layer(x)  # (T, out)
        if not self.enabled or self.merged:
            return y
        gain = self.lora_magnitude_vector / self.norm()  # (out,)
        dropped, bias = self.dropout(x), self.base_layer.bias
        if dropped is not x:
            product = F.linear(dropped, self.base_layer.weight)  # (T, out)
        else:  # nothing was dropped: W x is known
            product = y if bias is None else y - bias  # (T, out)
        A, B = [matrix.to(x.dtype) for matrix in self.cast or (self.lora_A, self.lora_B)]
        low = dropped @ A.t()  # (T, r)
        update = self.scaling * (low @ B.t())  # (T, out)
        # Gains are close to 1, where bf16 is coarse, so gain - 1 is what gets rounded.
        return y + (gain - 1).to(x.dtype) * product + gain.to(x.dtype) * update  # (T, out)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update to the base weight, (out, in) fp32: gain * V - W."""
        weight = self.original_weight().float()  # (out, in)
        gain = (self.lora_magnitude_vector / self.norm())[:, None]  # (out, 1)
        return gain * (weight + super().delta()) - weight
