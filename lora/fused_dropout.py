"""Keyed dropout as one Triton kernel, for CUDA: hash, mask and scale, without storing any of them.

The plain form in `dropout.py` needs some 14 kernels a layer forward, and keeps the mask and the
dropped input for the backward pass. Here both are computed again from the keys. The kernel's
results equal the plain form's bit for bit: zeros keep the sign that a product with 0 has. One
exception: where a dropped gradient times `scale` overflows fp16, the plain form gives NaN. Triton
comes with PyTorch's builds for CUDA. `dropout.fused_works` says whether the kernel is used.
"""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no build for CUDA
    triton, jit = None, lambda function: function

BLOCK = 1024  # channels of a program; a literal in the kernel, which may not read globals
HALF = 2**15  # hashes are 16 bits, read as signed


@jit
def mix32(x):
    """The hash of `dropout.py`'s `_mix32_`, on int32 values that wrap."""
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


@jit
def drop(x, y, keys, channel_keys, channels, threshold, scale):
    """Program (token, block of channels): y = x * mask * scale. Two channels share a hash."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    inside = channel < channels
    pair_keys = tl.load(channel_keys + channel // 2, mask=inside, other=0)
    hashes = mix32(tl.load(keys + token) ^ pair_keys)
    half = tl.where(channel % 2 == 0, hashes << 16, hashes) >> 16  # its 16 bits, with their sign
    kept = (half >= threshold).to(tl.float32)
    value = tl.load(x + token * channels + channel, mask=inside).to(tl.float32)
    tl.store(y + token * channels + channel, value * kept * scale, mask=inside)


class FusedDropout(torch.autograd.Function):
    """`x (T, C)` dropped by keys (T,) and channel keys (C/2,); the gradient is dropped alike."""

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, channel_keys: Tensor, threshold: int, scale: float):
        ctx.save_for_backward(keys, channel_keys)
        ctx.threshold, ctx.scale = threshold, scale
        return launch(x, keys, channel_keys, threshold, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        keys, channel_keys = ctx.saved_tensors
        grad_x = launch(grad, keys, channel_keys, ctx.threshold, ctx.scale)
        return grad_x, None, None, None, None


class FusedUpdate(torch.autograd.Function):
    """`y + scaling * drop(x) @ A.T @ B.T`, in place on `y (T, out)`, for a launch `drop`.

    Autograd would keep the dropped x (T, in) of each adapter, and scale gradients in kernels of
    their own; here the backward pass drops x again, and products scale.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, drop: Callable, scaling: float):
        low = drop(x) @ A.t()  # (T, r)
        ctx.save_for_backward(x, A, B, low)
        ctx.drop, ctx.scaling = drop, scaling
        ctx.mark_dirty(y)
        return y.addmm_(low, B.t(), alpha=scaling)  # (T, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, A, B, low = ctx.saved_tensors
        grad_low = _scaled_product(ctx.scaling, grad, B)  # (T, r)
        grad_B = _scaled_product(ctx.scaling, grad.t(), low)  # (out, r)
        grad_A = grad_low.t() @ ctx.drop(x)  # (r, in)
        grad_x = ctx.drop(grad_low @ A) if ctx.needs_input_grad[1] else None  # (T, in)
        return grad, grad_x, grad_A, grad_B, None, None


apply, update = FusedDropout.apply, FusedUpdate.apply


def _scaled_product(scaling: float, a: Tensor, b: Tensor) -> Tensor:
    """scaling * a @ b in one kernel, rounded once."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def launch(x: Tensor, keys: Tensor, channel_keys: Tensor, threshold: int, scale: float) -> Tensor:
    """`x (T, C)` dropped by keys (T,) and channel keys (C/2,)."""
    x = x.contiguous()
    y, (tokens, channels) = torch.empty_like(x), x.shape
    grid = (tokens, -(-channels // BLOCK))
    drop[grid](x, y, keys, channel_keys, channels, threshold - HALF, scale)
    return y
