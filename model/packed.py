"""Weights in the memory layout of oneDNN's bf16 kernels on a CPU, reordered once for all decoding.

`F.linear` reorders the weight in every call. That is a small part of a product with thousands of
tokens, but a third of one with the 32 to 128 tokens of a decoding step. Results are bit-equal.

The packed weights are a copy: 1 GB for Qwen2-0.5B, as long as they are held.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedWeights:
    """Packed copies of the weights of a model's linear layers and of its output embedding.

    They are copies of the current values. Weights of another dtype or device are not packed, nor
    any if PyTorch lacks the kernel: those layers compute as usual.
    """

    def __init__(self, model: nn.Module, head_weight: Tensor):
        """`head_weight (V, C)` is what `logits` multiplies the hidden states with."""
        plain = (m for m in model.modules() if type(m) is nn.Linear)  # none that are quantized
        linear = [m for m in plain if type(m.weight) is nn.Parameter]  # and none sharded
        self.layers = {m: pack(m.weight) for m in linear if can_pack(m.weight)}
        self.logits: Callable[[Tensor], Tensor] = functools.partial(F.linear, weight=head_weight)
        if can_pack(head_weight):
            self.logits = functools.partial(packed_linear, weight=pack(head_weight))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, linear layers use the packed weights, and compute no gradients."""
        for layer, weight in self.layers.items():
            # A `forward` in the instance's dict takes precedence over the one of its class.
            layer.__dict__["forward"] = functools.partial(
                packed_linear, weight=weight, bias=layer.bias
            )
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has packed kernels for `weight`: bf16 on a CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packing_works()


def pack(weight: Tensor) -> Tensor:
    """`weight (out, in)` in oneDNN's layout, which does not depend on the number of tokens."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a packed weight: (tokens, in) -> (tokens, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def packing_works() -> bool:
    """Whether this PyTorch has the two operators, and they agree with `F.linear`.

    They are internal to PyTorch and may change, so they are tried once; a failure is printed.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 96), (64, 96), (64,))
    )
    try:
        with torch.inference_mode():
            y, expected = packed_linear(x, pack(weight), bias), F.linear(x, weight, bias)
        error = ((y - expected).norm() / expected.norm()).item()
        problem = None if error < 0.01 else f"they differ from F.linear by {error:.2g}"
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        problem = str(failure).splitlines()[0][:80]
    if problem is not None:
        print(f"decoding: packed weights are not used: {problem}")
    return problem is None
