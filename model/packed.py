"""Weights in the order in which a CPU's bf16 products read them, laid out once for all of decoding.

A plain product reorders its weight in every call. With thousands of rows that is little; with the
32 to 128 rows of a decoding step it is a third of the time. The results are the same, bit for bit.

The packed weights are a copy: 1 GB for Qwen2-0.5B while they are held.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedWeights:
    """A model's linear layers, and its head over the first `vocabulary` tokens, as of now.

    Weights of other dtypes or devices, and any on a CPU without the kernel, stay as they are.
    """

    def __init__(self, model: nn.Module, head_weight: Tensor):
        """`head_weight (V, C)`: what `logits` multiplies with."""
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.layers = {m: pack(m.weight) for m in linear if packs(m.weight)}
        self.logits: Callable[[Tensor], Tensor] = functools.partial(F.linear, weight=head_weight)
        if packs(head_weight):
            self.logits = functools.partial(multiply, packed=pack(head_weight))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the model's linear layers compute with them; without gradients."""
        for layer, packed in self.layers.items():
            layer.__dict__["forward"] = functools.partial(_forward, layer, packed)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def _forward(layer: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    return multiply(x, packed, None if layer.bias is None else layer.bias.to(x.dtype))


def packs(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works()


def pack(weight: Tensor) -> Tensor:
    """`weight (out, in)` in oneDNN's order, which holds for any number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """(rows, in) -> (rows, out): `F.linear` with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def packing_works() -> bool:
    """Whether this PyTorch has the two operators, which are young, and they agree with `F.linear`.

    Tried out once. Prints the reason if they do not.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 96), (64, 96), (64,))
    )
    try:
        with torch.inference_mode():
            y, truth = multiply(x, pack(weight), bias), F.linear(x, weight, bias)
        error = ((y - truth).norm() / truth.norm()).item()
        problem = None if error < 0.01 else f"differ from plain products by {error:.2g}"
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        problem = str(failure).splitlines()[0][:80]
    if problem is not None:
        print(f"decoding: plain products, since packed weights {problem}")
    return problem is None
