"""Output embedding and cross-entropy in one function that never holds all logits (N, V).

The loss is a sum over tokens, so tokens are processed in chunks: logits, loss, and already the
gradient of the hidden states, which needs the logits. The backward pass only multiplies that
gradient by the gradient of the loss, which is one number. On CUDA, a chunk's logits are scored by
one Triton kernel (`fused.py`), if it gives the same results there. `plain_loss` in `qwen2.py` is
the same formula in plain PyTorch.

Legend: T tokens, N supervised tokens, n tokens of a chunk, b tokens of a block, C hidden size, V
vocabulary size.
"""

import functools
from functools import partial

import torch
from torch import Tensor

from model import fused
from model.functions import agree, kernels_work, takes_kernels

IGNORE = -100  # target of a token that is not supervised, as in F.cross_entropy

LOGITS_BYTES = 160 << 20  # logits of a chunk: about 550 tokens of Qwen2's vocabulary in bf16
# Probabilities of a block in fp32: they fit a CPU's cache; without the kernel, 128 tokens of Qwen2.
PROBABILITIES_BYTES, DEVICE_PROBABILITIES_BYTES = 24 << 20, 75 << 20


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, supervised_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy in nats, and count of correct predictions, over supervised tokens.

    Args:
        hidden: (T, C) hidden states of all tokens.
        weight: (V, C) output embedding; its gradient is computed only if it requires one.
        targets: (T,) token ids, `IGNORE` at tokens that are not supervised.
        supervised_rows: (N,) indices of the supervised tokens. Without it they are found from
            `targets`, and the host then waits for a GPU to count them.

    Returns:
        nats: (), fp32 (fp64 for fp64 input), differentiable: the negative sum of the targets'
            log-probabilities.
        correct: (), int64: the number of tokens whose target has the largest logit (the first of
            equal ones).
    """
    if supervised_rows is None:
        supervised_rows = (targets != IGNORE).nonzero().squeeze(1)  # (N,)
    supervised = hidden.index_select(0, supervised_rows)  # (N, C)
    return _LinearCrossEntropy.apply(supervised, weight, targets[supervised_rows])


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of supervised tokens only: hidden (N, C), weight (V, C), targets (N,)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        (N, _), V = hidden.shape, weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        nats = torch.empty(N, dtype=wide, device=hidden.device)  # of each token
        correct = torch.empty(N, dtype=torch.bool, device=hidden.device)

        needs_grad = any(ctx.needs_input_grad)
        score = fused.score if takes_kernels(hidden, kernel_works) else score_in_place
        size = max(1, min(N, LOGITS_BYTES // (V * hidden.element_size())))  # tokens of a chunk
        # All chunks share one buffer, since allocating its pages would cost more than the product.
        buffer = hidden.new_empty(size, V)
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits = torch.mm(hidden[rows], weight.t(), out=buffer[: N - start])  # (n, V)
            score(logits, targets[rows], nats[rows], correct[rows], needs_grad)
            if grad_hidden is not None:  # `logits` now holds the gradient of the logits
                torch.mm(logits, weight, out=grad_hidden[rows])  # (n, C)
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden[rows]  # (V, C)

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        correct = correct.sum()
        ctx.mark_non_differentiable(correct)
        return nats.sum(), correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nats: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # In fp32: rounding grad_nats to bf16 would change every gradient by up to 0.4 %.
            wide = grad_hidden.to(grad_nats.dtype, copy=True)
            grad_hidden = wide.mul_(grad_nats).to(ctx.hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_nats).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def score_in_place(
    logits: Tensor, targets: Tensor, nats: Tensor, correct: Tensor, needs_grad: bool
) -> None:
    """Fills `nats (n,)` and `correct (n,)` from `logits (n, V)` and `targets (n,)`.

    With `needs_grad`, overwrites `logits` with their gradient: softmax minus one-hot. Probabilities
    are computed in the dtype of `nats`, in blocks. The log-sum-exp follows from the most likely
    token, whose probability is at least 1/V, so that its log is finite.
    """
    n, V = logits.shape
    wide, on_cpu = nats.dtype, logits.device.type == "cpu"
    size = PROBABILITIES_BYTES if on_cpu else DEVICE_PROBABILITIES_BYTES
    block = max(1, min(n, size // (V * wide.itemsize)))
    probabilities = torch.empty(block, V, dtype=wide, device=logits.device)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        z, target = logits[rows], targets[rows]  # (b, V), (b,)
        p = torch.softmax(z, dim=-1, dtype=wide, out=probabilities[: len(z)])  # (b, V)
        top_p, top = p.max(dim=-1)  # (b,), (b,)
        logsumexp = z.gather(1, top[:, None]).squeeze(1).to(wide) - top_p.log()  # (b,)
        nats[rows] = logsumexp - z.gather(1, target[:, None]).squeeze(1)
        correct[rows] = top == target
        if needs_grad:
            p[torch.arange(len(p), device=p.device), target] -= 1
            z.copy_(p)


@functools.cache
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel runs on `device` and agrees with `score_in_place` in `dtype`."""
    return kernels_work("the loss", partial(differing_scores, device, dtype))


def differing_scores(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernel, if its results on some logits differ by more than rounding."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(5, 5000, generator=generator, device=device).to(dtype)  # (n, V)
    targets = torch.tensor([0, 4095, 4096, 4999, 7], device=device)
    logits[4, [7, 4500]] = 9  # the first of the two is the prediction
    found = []
    for score in (fused.score, score_in_place):
        gradient = logits.clone()
        nats, correct = torch.empty(5, device=device), torch.empty_like(targets, dtype=torch.bool)
        score(gradient, targets, nats, correct, True)
        found.append((nats, correct.float(), gradient))
    return [] if agree(*found) else ["score"]
