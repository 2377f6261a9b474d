"""Three formulas with their gradients written out: they keep their inputs and nothing else.

Autograd remembers every intermediate of a formula. Between the products of a layer nearly all of
them can be had again for one cheap pass, and in fp32 they are the larger part of what training
holds. Each function here equals the plain formula in its docstring, and its tests hold it to that.

Legend: T tokens, C hidden size, D head size, F MLP size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128  # of the MLP's width in bf16: about 1 MB a tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` along the last dimension, in the weight's dtype.

    The middle part is fp32, and rounded before the weight: `x` may be wider than the weight.
    """
    return _RMSNorm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair `(x[i], x[i + D/2])` of `x (T, heads, D)` by its position's angle, in fp32.

    `(a cos - b sin, b cos + a sin)`, with cosines and sines (T, 1, D/2). On a CPU the outcome stays
    fp32, since attention multiplies it so; a GPU's kernel wants it rounded to the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Rotate.apply(x, cos, sin, wide if x.device.type == "cpu" else x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both (T, F)."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of fp16 overflow
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (T, 1)
        normal = (wide * scale).to(weight.dtype)  # (T, C)
        ctx.save_for_backward(normal, weight, scale)
        ctx.dtype = x.dtype
        return weight * normal

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normal, weight, scale = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal.to(scale.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        inner = grad * weight.to(scale.dtype)  # (T, C), wide
        along = torch.linalg.vecdot(inner, normal.to(inner.dtype))[..., None] / normal.shape[-1]
        inner.addcmul_(normal, along, value=-1).mul_(scale)  # along is (T, 1)
        return inner.to(ctx.dtype), grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.dtype), None, None, None  # the transpose turns back


def _turn(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = x.chunk(2, dim=-1)  # (T, heads, D/2) each; the products with fp32 are fp32
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    half = x.shape[-1] // 2
    out[..., :half] = (a * cos).sub_(b * sin)
    out[..., half:] = (b * cos).add_(a * sin)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for g, u, o in _in_cache(gate, up, out):
            torch.ops.aten.silu.out(g, out=o).mul_(u)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, d, dg, du in _in_cache(gate, up, grad, grad_gate, grad_up):
            torch.ops.aten.silu.out(g, out=du).mul_(d)
            torch.mul(d, u, out=dg)
            torch.ops.aten.silu_backward.grad_input(dg, g, grad_input=dg)
        return grad_gate, grad_up


def _in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each at a time on a CPU, where a second pass then finds them in cache;
    all at once elsewhere.
    """
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return iter((tensors,))
    return zip(*(x.split(ROWS) for x in tensors))
