"""Linear cross-entropy that never builds the (tokens, vocabulary) matrix, the largest of all.

The head is frozen, and the loss is a plain sum over rows. So each chunk of rows can be taken all
the way while its logits are at hand: logits, loss, and already the gradient of its hidden states.
The backward pass only multiplies that gradient by the one number it is given.

Legend: T tokens, N supervised rows, C hidden size, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -100  # the target of a token that is not supervised, as in PyTorch's own cross-entropy

CHUNK_BYTES = 160 << 20  # logits at hand at once: some 550 rows of Qwen2's vocabulary in bf16
BLOCK_BYTES = 24 << 20  # fp32 probabilities at hand at once: read several times, so in cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, supervised_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of nats, and count of correct tokens, over the supervised rows.

    Args:
        hidden: (T, C) hidden states.
        weight: (V, C) output embedding; its gradient is made only if it requires one.
        targets: (T,) token ids, `IGNORE` where nothing is supervised.
        supervised_rows: (N,) indices of the supervised rows, where the caller knows them: on a GPU
            that saves waiting for the device to count them.

    Returns:
        nats: (), fp32 (fp64 for fp64 input), differentiable: minus the sum of log-probabilities.
        correct: (), int64: rows whose target is the first largest logit.
    """
    if supervised_rows is None:
        supervised_rows = (targets != IGNORE).nonzero().squeeze(1)  # (N,)
    return _LinearCrossEntropy.apply(
        hidden.index_select(0, supervised_rows), weight, targets[supervised_rows]
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` over rows that are all supervised: (N, C), (V, C), (N,)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        (N, _), V = hidden.shape, weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        nats = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)

        rows = max(1, min(N, CHUNK_BYTES // (V * hidden.element_size())))
        # One buffer for all chunks: fresh pages cost more than the product.
        logits = hidden.new_empty(rows, V)
        for chunk, target, start in zip(hidden.split(rows), targets.split(rows), range(0, N, rows)):
            logits = torch.mm(chunk, weight.t(), out=logits[: len(chunk)])  # (n, V)
            chunk_nats, chunk_correct = _score_in_place(
                logits, target, wide, any(ctx.needs_input_grad)
            )
            nats += chunk_nats
            correct += chunk_correct
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + len(chunk)])
            if grad_weight is not None:
                grad_weight += logits.t() @ chunk

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(correct)
        return nats, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nats: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # Wide, because a factor in bf16 would tilt every gradient by 0.2 %.
            wide = grad_hidden.to(grad_nats.dtype, copy=True)
            grad_hidden = wide.mul_(grad_nats).to(ctx.hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_nats).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def _score_in_place(
    logits: Tensor, targets: Tensor, wide: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Nats and correct tokens of `logits (n, V)`, which become the gradient: softmax minus one-hot.

    Works by blocks of a few rows, in the wide dtype, so that the probabilities stay in cache. The
    log-sum-exp is read off the likeliest token, whose probability is at least 1/V and so has a log.
    """
    n, V = logits.shape
    nats = torch.zeros((), dtype=wide, device=logits.device)
    correct = torch.zeros((), dtype=torch.int64, device=logits.device)
    block = max(1, min(n, BLOCK_BYTES // (V * wide.itemsize))) if logits.device.type == "cpu" else n
    probabilities = torch.empty(block, V, dtype=wide, device=logits.device)
    for z, target in zip(logits.split(block), targets.split(block)):
        p = torch.softmax(z, dim=-1, dtype=wide, out=probabilities[: len(z)])  # (b, V)
        top_p, top = p.max(dim=-1)  # (b,), (b,)
        logsumexp = z.gather(1, top[:, None]).squeeze(1).to(wide) - top_p.log()  # (b,)
        nats += (logsumexp - z.gather(1, target[:, None]).squeeze(1)).sum()
        correct += (top == target).sum()
        if needs_grad:
            p[torch.arange(len(p), device=p.device), target] -= 1
            z.copy_(p)
    return nats, correct
