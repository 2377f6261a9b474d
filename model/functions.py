"""Three formulas with their gradients written out: they keep their inputs and nothing else.

Autograd remembers every intermediate of a formula. Between the products of a layer nearly all of
them can be had again for one cheap pass, and in fp32 they are the larger part of what training
holds. Each function here equals the plain formula in its docstring, and its tests hold it to that.

Legend: T tokens, C hidden size, D head size, F MLP size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` along the last dimension, the middle part in fp32."""
    return _RMSNorm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair `(x[i], x[i + D/2])` of `x (T, heads, D)` by its position's angle, in fp32.

    `(a cos - b sin, b cos + a sin)`, with cosines and sines (T, 1, D/2).
    """
    return _Rotate.apply(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both (T, F)."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of fp16 overflow
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (T, 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale  # (T, C), wide
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        inner = grad * weight.to(scale.dtype)  # (T, C), wide
        along = torch.linalg.vecdot(inner, normal)[..., None] / x.shape[-1]  # (T, 1)
        inner.addcmul_(normal, along, value=-1).mul_(scale)
        return inner.to(x.dtype), grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # a rotation's transpose turns back


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)  # (T, heads, D/2) each; the products with fp32 are fp32
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    out[..., :half] = (a * cos).sub_(b * sin)
    out[..., half:] = (b * cos).add_(a * sin)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
