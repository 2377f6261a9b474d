"""RMSNorm, rotation, SwiGLU and cross-entropy as Triton kernels, for CUDA.

`functions.py` and `loss.py` have the same in plain PyTorch, as 2 to 17 kernels each, and decide
which of the two is used. Like the plain form, the kernels compute in fp32 and round to the dtype of
the result. Sums have another order, so that results may differ in their last bits. Triton comes
with PyTorch's builds for CUDA.

Legend: T tokens, n tokens of a chunk, C channels, D head size, F MLP size, V vocabulary size. A
program has one token, or of SwiGLU 1024 values.
"""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no build for CUDA
    triton, tl, jit = cast(Any, None), SimpleNamespace(constexpr=int), lambda function: function

LANES = 4096  # logits of a token that are read together


@jit
def normalize_kernel(x, weight, y, normal, scale, channels, eps, BLOCK: tl.constexpr):
    """y = weight * normal, where normal = x * scale and scale = 1 / sqrt(mean(x^2) + eps)."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside, at = channel < channels, token * channels + channel
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(value * value, 0) / channels + eps)
    rounded = (value * factor).to(normal.dtype.element_ty)
    gain = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    tl.store(y + at, gain * rounded.to(tl.float32), mask=inside)
    tl.store(normal + at, rounded, mask=inside)
    tl.store(scale + token, factor)


@jit
def normalize_backward_kernel(grad, weight, normal, scale, out, channels, BLOCK: tl.constexpr):
    """out = (inner - normal * mean(inner * normal)) * scale, where inner = grad * weight."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside, at = channel < channels, token * channels + channel
    gain = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
    inner = tl.load(grad + at, mask=inside, other=0).to(tl.float32) * gain
    value = tl.load(normal + at, mask=inside, other=0).to(tl.float32)
    along = tl.sum(inner * value, 0) / channels
    tl.store(out + at, (inner - value * along) * tl.load(scale + token), mask=inside)


@jit
def rotate_kernel(x, y, cos, sin, pairs, half, sign, BLOCK: tl.constexpr):
    """(a, b) = (a cos - b sin, b cos + a sin) for all `pairs` of a token, `half` in each head."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside, angle = pair < pairs, token * half + pair % half
    first = token * pairs * 2 + pair + pair // half * half  # heads before it have 2 * half channels
    a = tl.load(x + first, mask=inside, other=0).to(tl.float32)
    b = tl.load(x + first + half, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + angle, mask=inside, other=0)
    s = tl.load(sin + angle, mask=inside, other=0) * sign
    tl.store(y + first, a * c - b * s, mask=inside)
    tl.store(y + first + half, b * c + a * s, mask=inside)


@jit
def swiglu_kernel(gate, up, out, count):
    """out = silu(gate) * up, for `count` values."""
    at = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, g / (1 + tl.exp(-g)) * u, mask=inside)


@jit
def swiglu_backward_kernel(grad, gate, up, grad_gate, grad_up, count):
    """Gradients of both; silu(g) = g s has the derivative s (1 + g (1 - s)), s = sigmoid(g)."""
    at = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
    inside = at < count
    d = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(grad_gate + at, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(grad_up + at, d * g * s, mask=inside)


@jit
def score_kernel(
    logits, targets, nats, correct,
    V: tl.constexpr, LANES: tl.constexpr, NEEDS_GRAD: tl.constexpr,
):  # fmt: skip
    """The cross-entropy of a token's logits; then, in their place, softmax minus one-hot."""
    token = tl.program_id(0).to(tl.int64)
    row, target = logits + token * V, tl.load(targets + token)
    own = tl.load(row + target).to(tl.float32)
    # Each lane has the largest of its logits so far, and the sum of exp(logit - largest).
    lane = tl.arange(0, LANES)
    largest = tl.full((LANES,), -3e38, tl.float32)  # finite, since a logit may be -inf
    total, ahead = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES):
        word = start + lane
        z = tl.load(row + word, mask=word < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, z)
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
        behind = (z < own) | ((z == own) & (word >= target))  # of equal ones, the first leads
        ahead += tl.where(behind, 0.0, 1.0)
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    tl.store(nats + token, top + tl.log(total) - own)
    tl.store(correct + token, tl.sum(ahead, 0) == 0)
    if NEEDS_GRAD:
        for start in range(0, V, LANES):
            word = start + lane
            z = tl.load(row + word, mask=word < V, other=-float("inf")).to(tl.float32)
            p = tl.exp(z - top) / total
            tl.store(row + word, tl.where(word == target, p - 1, p), mask=word < V)


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of `x (T, C)` with `weight (C,)`: the result (T, C), and for the backward pass
    the normalized x (T, C) and its scale (T, 1).
    """
    x, channels = x.contiguous(), x.shape[-1]
    y, normal = (torch.empty_like(x, dtype=weight.dtype) for _ in range(2))
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(channels)
    normalize_kernel[(scale.numel(),)](x, weight, y, normal, scale, channels, eps, BLOCK=block)
    return y, normal, scale


def normalize_backward(
    grad: Tensor, weight: Tensor, normal: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of x, (T, C) in `dtype`, from that of the result, (T, C)."""
    grad, channels = grad.contiguous(), grad.shape[-1]
    out, block = torch.empty_like(grad, dtype=dtype), triton.next_power_of_2(channels)
    grid = (scale.numel(),)
    normalize_backward_kernel[grid](grad, weight, normal, scale, out, channels, BLOCK=block)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotates the pairs of `x (T, heads, D)` by the angles of `cos`, `sin` (T, 1, D/2) fp32, or
    with sign -1 by their opposites.
    """
    x, (tokens, heads, size) = x.contiguous(), x.shape
    y, pairs = torch.empty_like(x), heads * size // 2
    block = triton.next_power_of_2(pairs)
    rotate_kernel[(tokens,)](x, y, cos, sin, pairs, size // 2, sign, BLOCK=block)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, for (T, F) each."""
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    swiglu_kernel[(triton.cdiv(count, 1024),)](gate, up, out, count)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of the result, (T, F) each."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    grid = (triton.cdiv(count, 1024),)
    swiglu_backward_kernel[grid](grad, gate, up, grad_gate, grad_up, count)
    return grad_gate, grad_up


def score(logits: Tensor, targets: Tensor, nats: Tensor, correct: Tensor, needs_grad: bool) -> None:
    """Fills `nats (n,)` and `correct (n,)` from `logits (n, V)` and `targets (n,)`, all contiguous.

    With `needs_grad`, overwrites `logits` with their gradient.
    """
    n, V = logits.shape
    lanes = min(LANES, triton.next_power_of_2(V))
    constants = {"V": V, "LANES": lanes, "NEEDS_GRAD": needs_grad, "num_warps": 8}
    score_kernel[(n,)](logits, targets, nats, correct, **constants)
