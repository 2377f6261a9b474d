"""DoRA: the direction and the length of each row of a weight are trained apart.

    y = m * (W x + scaling * B A x) / ||W + scaling * B A|| + bias

The direction is the plain adapter's of `layer.py`; the lengths m start as the rows' own, so a fresh
adapter changes nothing, bit for bit. Gradients take the norm for a constant (section 4.3). As in
PEFT, with dropout the base's part W x of a gain that is not 1 sees the dropped input too.

Legend: r rank, in and out the base's sizes.
Source: DoRA, arXiv:2402.09353; the numbers are peft 0.21's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.layer import LoRALinear

TINY = 1e-30  # squared length of a row of zeros: its gain is 0 / 0 without


class DoRALinear(LoRALinear):
    """A `LoRALinear` with one trained vector more, `lora_magnitude_vector (out,)`, in fp32.

    `start_magnitude` makes it, once A, B and the base's weight are what training starts from.
    """

    def start_magnitude(self) -> None:
        squares = self.base_layer.weight.detach().float().square().sum(dim=1)  # (out,)
        self.register_buffer("squares", squares, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.norm())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """(out,) fp32: the lengths of the rows of W + scaling * B A, which is never built.

        |w + b A|^2 = |w|^2 + b . (2 w A.T + b A A.T): no dearer than r tokens' forward.
        """
        weight, A, B = self._weight(), self.lora_A, self.scaling * self.lora_B
        cross = (weight @ A.to(weight.dtype).t()).float()  # (out, r)
        squares = self.squares + (B * (2 * cross + B @ (A @ A.t()))).sum(dim=1)  # (out,)
        return squares.clamp_min(TINY).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., out)
        if not self.enabled or self.merged:
            return y
        gain = self.lora_magnitude_vector / self.norm()  # (out,)
        dropped, bias = self.dropout(x), self.base_layer.bias
        if dropped is not x:
            product = F.linear(dropped, self.base_layer.weight)  # (..., out)
        else:
            product = y if bias is None else y - bias.to(y.dtype)  # (..., out)
        low = dropped @ self.lora_A.to(x.dtype).t()  # (..., r)
        added = self.scaling * (low @ self.lora_B.to(x.dtype).t())  # (..., out)
        # What bf16 can hold of a gain close to 1 is its distance from 1, so that is rounded.
        return y + (gain - 1).to(x.dtype) * product + gain.to(x.dtype) * added  # (..., out)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(out, in) fp32: what the adapter adds to the base's weight, its gain included."""
        weight = self._weight().float()  # (out, in)
        gain = (self.lora_magnitude_vector / self.norm())[:, None]  # (out, 1)
        return gain * (weight + super().delta()) - weight

    def _weight(self) -> Tensor:
        return self.unmerged_weight if self.merged else self.base_layer.weight.detach()
