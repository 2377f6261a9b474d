"""RMSNorm, rotation and SwiGLU with hand-written gradients, which save memory in training.

Autograd would keep every intermediate result of these formulas for the backward pass: most of the
memory of training, though they are cheap to recompute. The functions here keep few tensors and
recompute the others. On CUDA they are Triton kernels (`fused.py`), if these give the same
results there. `qwen2.py` has the same formulas in plain PyTorch.

Legend: T tokens, C hidden size, heads query or key heads, D head size, F MLP size.
"""

import functools
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import fused

BLOCK_TOKENS = 128  # processed together by SwiGLU on a CPU: 1.2 MB of bf16 in Qwen2-0.5B


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in the weight's dtype.

    The normalization is computed in fp32 and rounded to the weight's dtype before the weight is
    applied, so `x (T, C)` may have a wider dtype than `weight (C,)`.
    """
    return _RMSNorm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair `(a, b) = (x[i], x[i + D/2])` of `x (T, heads, D)` by its position's angle.

    Computes `(a cos - b sin, b cos + a sin)` in fp32, with `cos` and `sin` (T, 1, D/2). The result
    stays fp32 on a CPU, where attention computes its scores in fp32; on other devices it has the
    dtype of `x`, which their attention kernels require.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Rotate.apply(x, cos, sin, wide if x.device.type == "cpu" else x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` for `gate (T, F)` and `up (T, F)`."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        forward = fused.normalize if takes_kernels(weight) else normalize
        y, normal, scale = forward(x, weight, eps)  # (T, C), (T, C), (T, 1)
        ctx.save_for_backward(normal, weight, scale)
        ctx.dtype = x.dtype
        return y  # (T, C)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normal, weight, scale = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal.to(scale.dtype)).flatten(0, -2).sum(0)  # (C,)
            grad_weight = grad_weight.to(weight.dtype)
        backward = fused.normalize_backward if takes_kernels(weight) else normalize_backward
        return backward(grad, weight, normal, scale, ctx.dtype), grad_weight, None


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm`, and for its gradient the normalized x (T, C) and its scale (T, 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares would overflow in fp16
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # (T, 1)
    normal = (wide * scale).to(weight.dtype)  # (T, C)
    return weight * normal, normal, scale


def normalize_backward(
    grad: Tensor, weight: Tensor, normal: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of x, (T, C) in `dtype`, from that of the result, (T, C)."""
    # d(normal)/dx removes the component along `normal`, then scales.
    inner = grad * weight.to(scale.dtype)  # (T, C), at least fp32
    along = torch.linalg.vecdot(inner, normal.to(inner.dtype))[..., None]  # (T, 1)
    along = along / normal.shape[-1]
    inner.addcmul_(normal, along, value=-1).mul_(scale)  # (T, C)
    return inner.to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return (
            fused.rotate(x, cos, sin, 1) if takes_kernels(x) else rotate_pairs(x, cos, sin, dtype)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors  # the inverse rotation has the opposite angles
        if takes_kernels(grad):
            return fused.rotate(grad, cos, sin, -1), None, None, None
        return rotate_pairs(grad, cos, -sin, ctx.dtype), None, None, None


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """`rotate`, with a result in `dtype`."""
    a, b = x.chunk(2, dim=-1)  # (T, heads, D/2) each; multiplying by fp32 gives fp32
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    half = x.shape[-1] // 2
    out[..., :half] = (a * cos).sub_(b * sin)  # (T, heads, D/2)
    out[..., half:] = (b * cos).add_(a * sin)  # (T, heads, D/2)
    return out


@functools.cache
def fused_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run on `device` and agree with the plain forms in `dtype`."""
    return kernels_work("RMSNorm, rotation and SwiGLU", partial(differing_kernels, device, dtype))


def takes_kernels(
    x: Tensor, works: Callable[[torch.device, torch.dtype], bool] = fused_works
) -> bool:
    """Whether Triton kernels compute results like `x`: on CUDA, if they work there, unless a
    compiler fuses the plain forms.
    """
    if torch.compiler.is_compiling() or x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    return works(x.device, x.dtype)


def kernels_work(names: str, trial: Callable[[], list[str]]) -> bool:
    """Whether Triton kernels run and `trial` finds none that differs from its plain form.

    Rank 0 prints why they are not used, which `names` them.
    """
    if fused.triton is None:
        return False
    try:
        with torch.inference_mode(False):
            differing = trial()
        reason = f"{', '.join(differing)} differ from the plain form" if differing else None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's compiler or the driver: anything may be missing
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"{names} without their Triton kernels: {reason}")
    return reason is None


def differing_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernels whose results in `dtype` differ from the plain form's by more than rounding."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = torch.randn(2, 5, 84, generator=generator, device=device)  # fp32 (T, C) each
    cos, sin = torch.randn(2, 5, 1, 14, generator=generator, device=device)  # (T, 1, D/2) each
    weight = torch.linspace(-1, 2, 84, device=device).to(dtype)
    _, normal, scale = normalize(x, weight, 1e-6)
    half_x, half_y = x.to(dtype), y.to(dtype)
    heads = half_y.unflatten(-1, (3, 28))  # (T, heads, D)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        return rotate_pairs(x, cos, sin * sign, dtype)

    trials = (  # the kernel, its plain form, and arguments for both
        ("normalize", normalize, (x, weight, 1e-6)),
        ("normalize_backward", normalize_backward, (half_y, weight, normal, scale, x.dtype)),
        ("rotate", rotate, (heads, cos, sin, 1)),
        ("rotate", rotate, (heads, cos, sin, -1)),
        ("swiglu", swiglu_in_blocks, (half_x, half_y)),
        ("swiglu_backward", swiglu_backward, (half_y, half_x, half_y)),
    )
    return [
        name
        for name, plain, arguments in trials
        if not agree(getattr(fused, name)(*arguments), plain(*arguments))
    ]


def agree(ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> bool:
    """Whether each result differs by rounding only: its relative error is small for its dtype."""
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        return all(map(agree, ours, theirs))
    largest = 1e-5 if ours.dtype == torch.float32 else 1e-2
    return bool((ours - theirs).float().norm() <= largest * theirs.float().norm())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return fused.swiglu(gate, up) if takes_kernels(gate) else swiglu_in_blocks(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        backward = fused.swiglu_backward if takes_kernels(grad) else swiglu_backward
        return backward(grad, *ctx.saved_tensors)


def swiglu_in_blocks(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in few passes over memory."""
    if torch.compiler.is_compiling():  # PyTorch 2.11 drops gradients of `out=`
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    for g, u, o in _blocks(gate, up, out):
        torch.ops.aten.silu.out(g, out=o).mul_(u)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of the result, (T, F) each."""
    if torch.compiler.is_compiling():
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    for g, u, d, dg, du in _blocks(gate, up, grad, grad_gate, grad_up):
        torch.ops.aten.silu.out(g, out=du).mul_(d)
        torch.mul(d, u, out=dg)
        torch.ops.aten.silu_backward.grad_input(dg, g, grad_input=dg)
    return grad_gate, grad_up


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of the tensors with the same few tokens each, which stay in a CPU's cache.

    On other devices, and when compiling, there is one block with all tokens.
    """
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return iter((tensors,))
    return zip(*(x.split(BLOCK_TOKENS) for x in tensors))
