"""Generation with a key/value cache: many prompts in parallel, each token computed once.

Prompts wait in a queue. Each step decodes one token of every unfinished sequence; finished ones
leave the batch, and once there is room, the next group of prompts joins it.
A common beginning of all prompts is prefilled once, and so are equal prompts. The text of a
sequence does not depend on the others: each has its own stream of random numbers for sampling.

Legend: B sequences in the batch, C hidden size, V vocabulary size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import BadCheckpoint, BadOption, UserError
from model.attention import HALF_PRECISION
from model.cache import KVCache, send, shared_prefix
from model.packed import PackedWeights
from model.qwen2 import Qwen2

# Prompts join the batch in groups of batch_size // GROUPS. A larger group would have to wait longer
# for room, and meanwhile the places of finished sequences would stay empty.
GROUPS = 4
ROOM = 256  # slots of the cache for each answer at first, except on a GPU: all that it may need

NOT_FINITE = -1  # instead of a token, where the logits are not finite
CANDIDATES = 8  # tokens with the largest rounded logits, among which fp32 decides
NUCLEUS_SIZES = (64, 512, 4096)  # most likely tokens tried in turn, until they sum to top_p

# stopped(tokens so far) -> whether the answer ends here, called after each token
Stopped = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Decoding:
    """When an answer ends, how its next token is chosen, and how many are decoded in parallel."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]  # tokens that end an answer
    vocab_size: int  # of the tokenizer: higher ids, which pad the embedding, are never chosen
    batch_size: int = 128  # most sequences decoded in parallel
    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # sample from the k most likely tokens only; 0: from all
    top_p: float = 1.0  # sample from the fewest most likely tokens that sum to this probability
    seed: int = 0  # of sampling


@dataclass
class Decoded:
    """An answer: its tokens without the end token, and whether the token limit cut it off."""

    tokens: list[int]
    cut_off: bool


def generate(
    model: Qwen2,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    limits: list[int] | None = None,
    sequence_ids: list[int] | None = None,
    stopped: Stopped | None = None,
) -> list[Decoded]:
    """Answers to `prompts`, in their order.

    Args:
        prompts: token ids; none may be empty.
        limits: a token limit for each prompt, instead of `decoding.max_new_tokens` for all.
        sequence_ids: a number for each prompt (default: its index). Samples depend only on this
            number, the seed and the prompt, not on the other prompts.
        stopped: called with an answer's tokens after each new one; True ends the answer.
    """
    answers = [Decoded([], cut_off=True) for _ in prompts]
    steps = decode(
        model, prompts, decoding, limits=limits, sequence_ids=sequence_ids, stopped=stopped
    )
    for step in steps:
        for sequence, token, ended in step:
            answers[sequence].cut_off = not ended
            if token not in decoding.eos_ids:
                answers[sequence].tokens.append(token)
    return answers


@torch.inference_mode()
def decode(
    model: Qwen2,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    limits: list[int] | None = None,
    sequence_ids: list[int] | None = None,
    stopped: Stopped | None = None,
    prefix: KVCache | None = None,
) -> Iterator[list[tuple[int, int, bool]]]:
    """`generate`, step by step: yields (prompt's index, token, ended) of each sequence decoded.

    `ended` is True with an end token, or where `stopped` returns True. A sequence that reaches its
    limit has not ended, but gets no further tokens. Raises UserError if logits are not finite.
    `prefix` is a cache of the tokens that all prompts begin with, but for at least one of each; by
    default they are found and processed here.
    """
    limits = limits or [decoding.max_new_tokens] * len(prompts)
    if not prompts or max(limits) < 1:
        return
    assert min(limits) > 0, f"limits must be all positive or all zero: {limits}"
    assert all(prompts), "a prompt must not be empty: its last hidden state gives the first token"
    device = model.head_weight.device
    head = model.head_weight[: decoding.vocab_size]  # (V, C)
    weights = PackedWeights(model, head)
    if prefix is None:
        with weights.active():
            prefix = shared_prefix(model, prompts)
    size = max(1, decoding.batch_size // GROUPS)
    waiting = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
    waiting.reverse()  # so that pop() gives the next group
    answers: list[list[int]] = [[] for _ in prompts]
    draws = [_uniform_draws(i, decoding) for i in sequence_ids or range(len(prompts))]
    room = max(limits) if device.type == "cuda" else min(max(limits), ROOM)
    cache = KVCache(model, min(decoding.batch_size, len(prompts)), room, prefix)
    while cache.sequences or waiting:
        # One more token of each live sequence, and the first of a new group if there is room.
        hidden = []
        with weights.active():
            if cache.sequences:
                hidden.append(cache.advance([answers[i][-1] for i in cache.sequences]))
            if waiting and len(cache.sequences) + len(waiting[-1]) <= decoding.batch_size:
                group = list(waiting.pop())
                hidden.append(cache.prefill(group, [prompts[i] for i in group]))
        states = torch.cat(hidden)  # (B, C)
        logits = weights.logits(states)  # (B, V)
        if decoding.temperature == 0:
            picked = most_likely(logits, states, head)  # (B,)
        else:
            step_draws = send([next(draws[i]) for i in cache.sequences], device)  # (B,)
            picked = sample(logits, decoding, step_draws)  # (B,)

        # Record the tokens, and take finished sequences out of the batch.
        step, finished = [], set()
        for i, token in zip(cache.sequences, picked.tolist()):
            if token == NOT_FINITE:
                raise not_finite_logits(logits.dtype)
            answers[i].append(token)
            ended = token in decoding.eos_ids or stopped is not None and stopped(answers[i])
            step.append((i, token, ended))
            if ended or len(answers[i]) == limits[i]:
                finished.add(i)
        cache.remove(finished)
        yield sorted(step)


def _uniform_draws(sequence_id: int, decoding: Decoding) -> Iterator[float]:
    """Numbers in [0, 1), one per token, that depend only on the seed and `sequence_id`."""
    generator = np.random.default_rng((decoding.seed, sequence_id))
    return iter(generator.random, None)


def most_likely(logits: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """The most likely token (B,) of each row of `logits (B, V)`; `NOT_FINITE` for a row with NaN.

    In half precision the best logits are often equal after rounding, so the best CANDIDATES are
    recomputed in fp32 from `hidden (B, C)` and their rows of `head (V, C)`. Of equal ones the
    lowest token wins, as in fp32.
    """
    if logits.dtype not in HALF_PRECISION:
        largest, token = logits.max(dim=-1)  # equals argmax, in a fifth of its time on a CPU
    else:
        best, candidates = logits.topk(min(CANDIDATES, logits.shape[-1]))  # (B, 8) each
        largest, candidates = best[:, 0], candidates.sort(dim=-1).values  # (B,), (B, 8)
        rows = F.embedding(candidates, head).float()  # (B, 8, C)
        place = (rows * hidden[:, None].float()).sum(dim=-1).argmax(dim=-1, keepdim=True)  # (B, 1)
        token = candidates.gather(1, place).squeeze(1)  # (B,)
    # NaN counts as the largest. The host reads the tokens anyway, so this check costs no wait.
    return token.where(largest.isfinite(), NOT_FINITE)


def sample(logits: Tensor, decoding: Decoding, draws: Tensor) -> Tensor:
    """A token (B,) for each row of `logits (B, V)` and each uniform draw in [0, 1) of `draws (B,)`.

    The draw is mapped by the inverse of the cumulative distribution over the allowed tokens, in the
    order of their ids, so that nothing is sorted. A row with NaN or infinity gives `NOT_FINITE`.
    """
    p = torch.softmax(logits.float() / decoding.temperature, dim=-1)  # (B, V)
    if decoding.top_k or decoding.top_p < 1:
        p = p.where(p >= least_allowed(p, decoding), 0)  # (B, V)
    edges = p.cumsum(dim=-1, dtype=wide_dtype(p))  # (B, V)
    total = edges[:, -1:].contiguous()  # (B, 1)
    place = torch.searchsorted(edges, draws[:, None] * total, right=True)  # (B, 1)
    place = place.minimum(torch.searchsorted(edges, total))  # rounding may exceed the last token
    return place.squeeze(1).where(total.squeeze(1) > 0, NOT_FINITE)  # NaN is not above 0


def least_allowed(p: Tensor, decoding: Decoding) -> Tensor:
    """The smallest probability (B, 1) in each row of `p (B, V)` that top-k and top-p allow.

    They allow the k most likely tokens, and of these the fewest that sum to `top_p`. Tokens as
    likely as the last allowed one are allowed too, so that no order among equals matters.
    """
    assert decoding.top_p > 0, f"top_p {decoding.top_p} allows no token"
    most = min(decoding.top_k or p.shape[-1], p.shape[-1])  # tokens that can be allowed
    for size in (*(n for n in NUCLEUS_SIZES if n < most and decoding.top_p < 1), most):
        best = p.topk(size).values  # (B, size), descending
        if decoding.top_p == 1:
            return best[:, -1:]
        sums = best.cumsum(dim=-1, dtype=wide_dtype(p))  # (B, size)
        if size == most or bool((sums[:, -1] >= decoding.top_p).all()):
            break
    before = F.pad(sums[:, :-1], (1, 0))  # (B, size): the probability of the likelier tokens
    return best.gather(1, (before < decoding.top_p).sum(dim=-1, keepdim=True) - 1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp64, or fp32 on a device without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no fp64


def not_finite_logits(dtype: torch.dtype) -> UserError:
    """The error for NaN or infinity in the logits of a model that computes in `dtype`."""
    if dtype == torch.float16:
        return BadOption(
            "in fp16 the model's logits are not finite: its activations exceed 65504, which is the"
            " largest number of fp16",
            "use --precision bf16 or fp32",
        )
    return BadCheckpoint(
        f"the model's logits are not finite, although it is computed in {str(dtype)[6:]}",
        "the base or its adapter has diverged in training or is damaged: use another",
    )
