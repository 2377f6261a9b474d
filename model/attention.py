"""Causal attention over a flat micro-batch: each token sees the earlier tokens of its own example.

On a GPU one variable-length kernel takes all the examples; elsewhere each example is one call,
which costs no more, since attention is quadratic in an example and not in the micro-batch. In half
precision on a CPU that call is written out below: PyTorch's own is slow there in the backward pass.

Legend: T tokens, L of one example, H query heads, G key/value heads, D head size.
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
    """One call an example."""
    examples = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend_example(*example) for example in examples])  # (T, H, D)


def attend_example(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of an example's last L tokens over all its N, by the faster form here.

    (L, H, D), (N, G, D), (N, G, D) -> (L, H, D).
    """
    on_cpu_in_half = v.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16)
    return attend_by_products(q, k, v) if on_cpu_in_half else attend_one(q, k, v)


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_example` in the plain form that every other one is held to."""
    earlier = len(k) - len(q)
    seen = None
    if earlier:
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(earlier)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, L or N, D)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True
    )
    return y[0].transpose(0, 1)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_one` with its matrix products and gradients written out, for half precision on a CPU.

    `q` and `k` are fp32, and so are the scores: a large one keeps its digits. `v` and what becomes
    of it are in half precision. Nothing quadratic is kept for the backward pass, which makes the
    scores again, and at most BLOCK queries are at hand at once.
    """
    return _Products.apply(q, k, v)


BLOCK = 128  # queries: small enough to skip half of what causality hides, large enough to be fast


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (L, H, D), G = q.shape, k.shape[1]
        earlier = len(k) - L
        out = torch.empty(L, H, D, dtype=v.dtype)
        for start, end in _blocks(L):
            p = _probabilities(_by_group(q[start:end], G), k[: earlier + end], H // G)
            y = p.to(v.dtype) @ v[: earlier + end].transpose(0, 1)  # (G, nH/G, D)
            out[start:end] = _by_token(y, end - start)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        assert len(q) == len(k), "no gradient of an example's last tokens alone"
        (L, H, D), G = q.shape, k.shape[1]
        grad_q = torch.empty(L, H, D, dtype=q.dtype)
        grad_k, grad_v = torch.zeros(2, L, G, D)  # fp32: they are sums
        along = torch.linalg.vecdot(grad.float(), out.float())[..., None]  # (L, H, 1)
        half_k = k.to(v.dtype)
        for start, end in _blocks(L):
            queries, g, a = (_by_group(x[start:end], G) for x in (q, grad, along))
            p = _probabilities(queries, k[:end], H // G)  # (G, nH/G, end)
            grad_v[:end] += (p.to(v.dtype).transpose(1, 2) @ g).transpose(0, 1)
            grad_p = g @ v[:end].permute(1, 2, 0)  # (G, nH/G, end)
            grad_s = (grad_p - a).mul_(p).mul_(D**-0.5).to(v.dtype)  # (G, nH/G, end)
            grad_q[start:end] = _by_token(grad_s @ half_k[:end].transpose(0, 1), end - start)
            grad_k[:end] += (grad_s.transpose(1, 2) @ queries.to(v.dtype)).transpose(0, 1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(n, H, D) -> (G, nH/G, D): a group's query heads as more rows of the same keys."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """The reverse: (G, nH/G, D) -> (n, H, D)."""
    return x.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def _probabilities(queries: Tensor, k: Tensor, heads: int) -> Tensor:
    """(G, n * heads, L) fp32: of an example's last n queries `(G, n * heads, D)`, over all its
    keys `(L, G, D)`.
    """
    G, rows, D = queries.shape
    L, n = len(k), rows // heads
    later = torch.full((n, L), -torch.inf).triu_(L - n + 1)
    scores = queries @ k.permute(1, 2, 0)  # (G, n * heads, L)
    scores = scores.view(G, n, heads, L).mul_(D**-0.5).add_(later[:, None])
    return torch.softmax(scores, dim=-1, out=scores).view(G, rows, L)


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
