"""Causal attention over a flat micro-batch: each token sees the earlier tokens of its own example.

On a GPU one variable-length kernel takes all the examples; elsewhere each example is one call,
which costs no more, since attention is quadratic in an example and not in the micro-batch.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class FlatAttention:
    """`attend(layer, q, k, v)` for examples of the given lengths, none of which sees another."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.offsets = None
        if device.type == "cuda":
            ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            offsets = F.pad(ends, (1, 0)).pin_memory()  # unpinned, the host would wait
            self.offsets = offsets.to(device, non_blocking=True)  # (examples + 1,)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        if self.offsets is not None and varlen_works(q.device, q.dtype, q.shape[1:], k.shape[1:]):
            return attend_varlen(q, k, v, self.offsets, max(self.lengths))
        return attend_each(q, k, v, self.lengths)


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One call an example: the plain form that every other one is held to."""
    examples = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend_one(*example) for example in examples])  # (T, H, D)


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one example, (L, H, D), (L, G, D), (L, G, D) -> (L, H, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, L, D)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y[0].transpose(0, 1)


@functools.cache
def varlen_works(
    device: torch.device, dtype: torch.dtype, queries: tuple[int, int], keys: tuple[int, int]
) -> bool:
    """Whether the variable-length kernel runs here and agrees with the plain form, tried out once
    for each device, dtype, and (H, D) and (G, D) of the model.

    It needs an Ampere GPU and half precision, and its interface is young. Prints what it found.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            generator = torch.Generator(device).manual_seed(0)
            offsets = torch.tensor([0, 40, 43], dtype=torch.int32, device=device)
            inputs = [
                torch.randn(43, *heads, generator=generator, device=device, dtype=dtype)
                for heads in (queries, keys, keys)
            ]
            inputs = [x.requires_grad_() for x in inputs]
            results = []
            for y in (attend_varlen(*inputs, offsets, 40), attend_each(*inputs, [40, 3])):
                results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))
        problem = None if error < 0.02 else f"differs from the plain form by {error:.2g}"
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        problem = str(failure).splitlines()[0][:80]
    chosen = "one variable-length call" if problem is None else f"one call an example ({problem})"
    print(f"attention: {chosen}")
    return problem is None


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """All examples in one call of the variable-length flash kernel (CUDA, half precision)."""
    # window (-1, 0): all earlier tokens, no later one; a group's keys and values are not copied
    return varlen_attn(
        q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=True
    )
