"""Causal attention over a flat micro-batch: tokens attend only within their own example.

On a GPU, one call processes all examples: by a variable-length kernel if one works there, else on
examples padded for the call. On a CPU there is one call per example, which costs no more, since the
work grows with the square of each example's length. For half precision on a CPU that call is
implemented below, because PyTorch's own has a slow backward pass there. `plain_attention` in
`qwen2.py` is the same formula in plain PyTorch.

Legend: T tokens of the micro-batch, L queries and N keys of one example, n queries of a block, H
query heads, G key/value heads, D head size; in `attend_padded`, B examples of at most L tokens.
"""

import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_PRECISION = (torch.bfloat16, torch.float16)

# attend(q (T, H, D), k (T, G, D), v (T, G, D), offsets (examples + 1,), longest) -> (T, H, D)
AttendAll = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class FlatAttention:
    """`attend(layer, q, k, v)` for concatenated examples of the given lengths.

    `offsets`, int32 (examples + 1,), are the boundaries of the examples; None on a CPU.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.offsets = None
        if device.type != "cpu":
            ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            offsets = F.pad(ends, (1, 0))
            if device.type == "cuda":
                offsets = offsets.pin_memory()  # so that the copy is asynchronous
            self.offsets = offsets.to(device, non_blocking=True)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        if self.offsets is None:
            return attend_each(q, k, v, self.lengths)
        attend = working_kernel(q.device, q.dtype, q.shape[1:], k.shape[1:])
        return attend(q, k, v, self.offsets, max(self.lengths))


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
        out = torch.empty(L, H, D, dtype=v.dtype, device=v.device)
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
        grad_q = torch.empty(L, H, D, dtype=q.dtype, device=q.device)
        grad_k, grad_v = torch.zeros(2, L, G, D, device=v.device)  # fp32: they sum over blocks
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
    later = torch.full((n, N), -torch.inf, device=k.device)
    later = later.triu_(N - n + 1)  # (n, N): -inf at later keys, else 0
    scores = queries @ k.permute(1, 2, 0)  # (G, n * heads, N)
    scores = scores.view(G, n, heads, N).mul_(D**-0.5).add_(later[:, None])
    return torch.softmax(scores, dim=-1, out=scores).flatten(1, 2)  # (G, n * heads, N)


# All examples in one call, on a GPU.


@functools.cache
def working_kernel(
    device: torch.device, dtype: torch.dtype, queries: tuple[int, int], keys: tuple[int, int]
) -> AttendAll:
    """The first of KERNELS that runs on this device and agrees with `attend_plainly`.

    Which one it is depends on the GPU and the version of PyTorch. They are tried once for each
    device, dtype, and shape of `queries` (H, D) and `keys` (G, D); rank 0 prints the result.
    """
    chosen, problems = "the plain formula, one example at a time", []
    for name, attend in KERNELS.items():
        try:
            # With hooks of its own, since the trial is not part of a layer that is checkpointed.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                error = kernel_error(attend, device, dtype, queries, keys)
            problem = f"differs by {error:.2g}"
        except torch.OutOfMemoryError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as failure:
            error, problem = torch.inf, (str(failure).splitlines() or [repr(failure)])[0][:80]
        if error < (0.02 if dtype in HALF_PRECISION else 1e-3):
            chosen = name
            break
        problems.append(f"\n  not {name}: {problem}")
    if os.environ.get("RANK", "0") == "0":
        print(f"attention in {str(dtype).removeprefix('torch.')}: {chosen}{''.join(problems)}")
    return KERNELS.get(chosen, attend_plainly)


def kernel_error(
    attend: AttendAll,
    device: torch.device,
    dtype: torch.dtype,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> float:
    """The largest relative difference of values and gradients from `attend_plainly`.

    The arguments are those of `working_kernel`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator(device).manual_seed(0)
        offsets = torch.tensor([0, 40, 43], dtype=torch.int32, device=device)
        q, k, v = (
            torch.randn(43, *heads, generator=generator, device=device, dtype=dtype)
            for heads in (queries, keys, keys)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        results = []
        for y in (attend(q, k, v, offsets, 40), attend_plainly(q, k, v, offsets, 40)):
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        errors = [(a - b).float().norm() / b.float().norm() for a, b in zip(*results)]
        return torch.stack(errors).max().item()


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention by PyTorch's variable-length flash kernel: half precision, Ampere GPUs and newer.

    (T, H, D), (T, G, D), (T, G, D) -> (T, H, D); `offsets (examples + 1,)` are the boundaries of
    the examples, and `longest` is the number of tokens of the longest one. It is the internal
    function that `torch.nn.attention.varlen` wraps in Python, forward and backward, which costs
    the host more than the rest of attention.
    """
    y, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest,
        dropout_p=0.0, is_causal=True, return_debug_mask=False,
    )  # fmt: skip
    return y  # (T, H, D)


def attend_efficient(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention by PyTorch's memory-efficient kernel: any dtype, CUDA GPUs from 2014 on.

    Arguments and result are those of `attend_varlen`. The kernel needs as many key as query heads.
    It is the internal function that scaled_dot_product_attention calls for nested tensors.
    """
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))  # (T, H, D)
    y, *_ = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, offsets, offsets, longest, longest,
        dropout_p=0.0, custom_mask_type=CAUSAL_FROM_TOP_LEFT, compute_log_sumexp=True,
    )  # fmt: skip
    return y[0]  # (T, H, D)


CAUSAL_FROM_TOP_LEFT = 1  # sdp::CustomMaskType: the first query of an example sees its first key


def attend_padded(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention by one call on examples padded to the longest: any device.

    Arguments and result are those of `attend_varlen`. The padding comes after each example, where
    no causal query sees it, so it needs no mask.
    """
    B, tokens = len(offsets) - 1, torch.arange(len(q), device=q.device)  # (T,)
    example = (tokens[:, None] >= offsets[1:]).sum(1)  # (T,)
    slots = tokens - offsets[example] + example * longest  # (T,): of a token in (B * L,)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(B * longest, *x.shape[1:]).index_add(0, slots, x)
        return padded.unflatten(0, (B, longest)).transpose(1, 2)  # (B, H, L, D)

    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))  # (T, H, D)
    y = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True)  # (B, H, L, D)
    return y.transpose(1, 2).flatten(0, 1).index_select(0, slots)  # (T, H, D)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention by `attend_blockwise` in fp32, example by example: any device, slow, host waits.

    Arguments and result are those of `attend_varlen`.
    """
    ends = offsets.tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:])]
    examples = zip(*(x.float().split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend_blockwise(*example) for example in examples]).to(v.dtype)  # (T, H, D)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(T, G, D) -> (T, H, D): each key or value head, once for each query head that uses it."""
    T, G, D = x.shape
    return x[:, :, None].expand(T, G, heads // G, D).reshape(T, heads, D)


KERNELS: dict[str, AttendAll] = {  # in the order of preference
    "one variable-length call": attend_varlen,
    "one call of the memory-efficient kernel": attend_efficient,
    "one call on padded examples": attend_padded,
}
