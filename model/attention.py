"""Causal attention over a flat micro-batch: tokens attend only within their own example.

On a GPU, one variable-length kernel processes all examples. Elsewhere there is one call per
example, which costs no more, since the work grows with the square of each example's length. For
half precision on a CPU that call is implemented below, because PyTorch's own has a slow backward
pass there. `plain_attention` in `qwen2.py` is the same formula in plain PyTorch.

Legend: T tokens of the micro-batch, L queries and N keys of one example, n queries of a block, H
query heads, G key/value heads, D head size.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_PRECISION = (torch.bfloat16, torch.float16)


class FlatAttention:
    """`attend(layer, q, k, v)` for concatenated examples of the given lengths.

    `offsets`, int32 (examples + 1,), are the boundaries of the examples; None except on CUDA.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.offsets = None
        if device.type == "cuda":
            ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            offsets = F.pad(ends, (1, 0)).pin_memory()  # pinned, so that the copy is asynchronous
            self.offsets = offsets.to(device, non_blocking=True)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        if self.offsets is not None and varlen_works(q.device, q.dtype, q.shape[1:], k.shape[1:]):
            return attend_varlen(q, k, v, self.offsets, max(self.lengths))
        return attend_each(q, k, v, self.lengths)


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One call per example: (T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
    examples = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attend_example(*example) for example in examples])  # (T, H, D)


def attend_example(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of an example's last L tokens over all its N tokens.

    (L, H, D), (N, G, D), (N, G, D) -> (L, H, D). Uses the faster implementation for the device and
    dtype.
    """
    half_on_cpu = v.device.type == "cpu" and v.dtype in HALF_PRECISION
    return attend_blockwise(q, k, v) if half_on_cpu else attend_sdpa(q, k, v)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_example` by PyTorch's scaled_dot_product_attention."""
    earlier = len(k) - len(q)  # keys before the first query
    mask = None
    if earlier:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(earlier)  # (L, N)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, L or N, D)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return y[0].transpose(0, 1)  # (L, H, D)


def attend_blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_example` with explicit matrix products and gradients, for half precision on a CPU.

    `q`, `k` and the scores are fp32, so that large scores keep their digits; `v` and the products
    with it are in half precision. Queries are processed in blocks of QUERY_BLOCK, and nothing
    quadratic is kept for the backward pass, which recomputes the scores.
    """
    return _BlockwiseAttention.apply(q, k, v)


# Small enough to skip about half of the masked scores, large enough for fast matrix products.
QUERY_BLOCK = 128


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (L, H, D), G = q.shape, k.shape[1]
        earlier = len(k) - L
        out = torch.empty(L, H, D, dtype=v.dtype)
        for start, end in _blocks(L):
            queries = _by_group(q[start:end], G)  # (G, nH/G, D)
            p = _probabilities(queries, k[: earlier + end], H // G)  # (G, nH/G, earlier + end)
            y = p.to(v.dtype) @ v[: earlier + end].transpose(0, 1)  # (G, nH/G, D)
            out[start:end] = _by_token(y, end - start)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        assert len(q) == len(k), "the backward pass needs all queries of the example"
        (L, H, D), G = q.shape, k.shape[1]
        grad_q = torch.empty(L, H, D, dtype=q.dtype)
        grad_k, grad_v = torch.zeros(2, L, G, D)  # fp32, since they accumulate over blocks
        along = torch.linalg.vecdot(grad.float(), out.float())[..., None]  # (L, H, 1)
        half_k = k.to(v.dtype)
        for start, end in _blocks(L):
            # (G, nH/G, D), (G, nH/G, D), (G, nH/G, 1)
            queries, g, a = (_by_group(x[start:end], G) for x in (q, grad, along))
            p = _probabilities(queries, k[:end], H // G)  # (G, nH/G, end)
            grad_v[:end] += (p.to(v.dtype).transpose(1, 2) @ g).transpose(0, 1)
            grad_p = g @ v[:end].permute(1, 2, 0)  # (G, nH/G, end)
            grad_s = (grad_p - a).mul_(p).mul_(D**-0.5).to(v.dtype)  # (G, nH/G, end)
            grad_q[start:end] = _by_token(grad_s @ half_k[:end].transpose(0, 1), end - start)
            grad_k[:end] += (grad_s.transpose(1, 2) @ queries.to(v.dtype)).transpose(0, 1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, end) of each block of queries."""
    return [(i, min(i + QUERY_BLOCK, length)) for i in range(0, length, QUERY_BLOCK)]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(n, H, D) -> (G, nH/G, D): the query heads that share a key head, as further queries."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `_by_group`: (G, nH/G, D) -> (n, H, D)."""
    return x.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)


def _probabilities(queries: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention probabilities of the last n tokens over all N keys, fp32, causally masked.

    `queries (G, n * heads, D)`, by group, with H/G `heads`; `k (N, G, D)` -> (G, n * heads, N).
    """
    G, _, D = queries.shape
    N, n = len(k), queries.shape[1] // heads
    later = torch.full((n, N), -torch.inf).triu_(N - n + 1)  # (n, N): -inf at later keys, else 0
    scores = queries @ k.permute(1, 2, 0)  # (G, n * heads, N)
    scores = scores.view(G, n, heads, N).mul_(D**-0.5).add_(later[:, None])
    return torch.softmax(scores, dim=-1, out=scores).flatten(1, 2)  # (G, n * heads, N)


@functools.cache
def varlen_works(
    device: torch.device, dtype: torch.dtype, queries: tuple[int, int], keys: tuple[int, int]
) -> bool:
    """Whether the variable-length kernel runs here and agrees with `attend_each`.

    It needs an Ampere GPU and half precision, and PyTorch may still change its interface. It is
    tried once for each device, dtype, and shape of `queries` (H, D) and `keys` (G, D); the result
    is printed.
    """
    if dtype not in HALF_PRECISION:
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
        problem = None if error < 0.02 else f"differs from one call per example by {error:.2g}"
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as failure:
        problem = str(failure).splitlines()[0][:80]
    chosen = "one variable-length call" if problem is None else f"one call per example ({problem})"
    print(f"attention: {chosen}")
    return problem is None


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """All examples in one call of the variable-length flash kernel (CUDA, half precision).

    (T, H, D), (T, G, D), (T, G, D) -> (T, H, D); `offsets (examples + 1,)` are their boundaries.
    """
    return varlen_kernel()(q, k, v, offsets, offsets, longest, longest)


@functools.cache
def varlen_kernel() -> Callable[..., Tensor]:
    """PyTorch's variable-length attention, causal, with the arguments that this version takes.

    Raises ImportError in versions of PyTorch before 2.10, which do not have it.
    """
    from torch.nn.attention.varlen import varlen_attn  # here, so that older versions can start

    known = inspect.signature(varlen_attn).parameters
    # From 2.11 on a window: all earlier tokens and no later one.
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # from 2.12 on; earlier kernels take grouped heads without it
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)
