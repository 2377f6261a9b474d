"""Decoding with a key/value cache: many prompts at once, each token's computation done once.

Prompts wait in a queue. Each step takes every unfinished row one token further; a row that ends
leaves at once, and when enough have left, the next prompts come in as a group with its own cache.
What all prompts begin with is prefilled once, and so are equal prompts. A row's text does not
depend on its company: sampling uses the row's own random numbers.

Legend: B rows, C hidden size, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.cache import KVCache, advance, shared_prefix
from model.packed import PackedWeights
from model.qwen2 import Qwen2

# Whether an answer ends with these tokens, the last of them just picked.
Stopped = Callable[[list[int]], bool]

GROUPS = 4  # that the rows at once come in: with fewer, places stay empty for longer


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: greedily at temperature 0, else from the top-k, top-p part."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Decoded:
    """One answer: its tokens without the end token, and whether it was cut off by the limit."""

    tokens: list[int]
    cut_off: bool


def generate(
    model: Qwen2,
    prompts: list[list[int]],
    *,
    max_new_tokens: int | list[int],
    eos_ids: tuple[int, ...],
    vocabulary: int,
    sampling: Sampling = Sampling(),
    rows: list[int] | None = None,
    stopped: Stopped | None = None,
    at_once: int = 128,
) -> list[Decoded]:
    """Answers to `prompts` (token ids), at most `at_once` of them being decoded at any time.

    `max_new_tokens` is a limit for all, or a list of each prompt's own. `vocabulary` is the
    tokenizer's size: the table's rows beyond it mean nothing and are never picked. `rows` names
    each prompt in the random numbers (default: its place), so that a prompt draws the same numbers
    in any company. `stopped` is asked after each token whether a row's answer ends there too.
    """
    answers = [Decoded([], cut_off=True) for _ in prompts]
    steps = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        vocabulary=vocabulary,
        sampling=sampling,
        rows=rows,
        stopped=stopped,
        at_once=at_once,
    )
    for emitted in steps:
        for row, token, ended in emitted:
            answers[row].cut_off = not ended
            if token not in eos_ids:
                answers[row].tokens.append(token)
    return answers


@torch.inference_mode()
def decode(
    model: Qwen2,
    prompts: list[list[int]],
    *,
    max_new_tokens: int | list[int],
    eos_ids: tuple[int, ...],
    vocabulary: int,
    sampling: Sampling = Sampling(),
    rows: list[int] | None = None,
    stopped: Stopped | None = None,
    at_once: int = 128,
) -> Iterator[list[tuple[int, int, bool]]]:
    """`generate`, step by step: yields (row, token, has it ended) of the rows that are decoded.

    Prompts come in in their order. A row has ended with an end token or where `stopped` says so;
    one that reaches its limit has not, but gets no further token either.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if not prompts or max(limits) < 1:
        return
    assert min(limits) > 0, "a prompt that may get no token"
    assert all(prompts), "an empty prompt has no last token to go on from"
    device = model.head_weight.device
    weights = PackedWeights(model, model.head_weight[:vocabulary])
    with weights.used():
        prefix = shared_prefix(model, prompts)
    together = max(1, at_once // GROUPS)
    waiting = [range(i, i + together)[: len(prompts) - i] for i in range(0, len(prompts), together)]
    waiting.reverse()  # the next group is the last
    texts: list[list[int]] = [[] for _ in prompts]
    chances = [_chances(name, sampling) for name in rows or range(len(prompts))]
    live: list[KVCache] = []
    while live or waiting:
        hidden = []
        with weights.used():
            if live:
                last = [texts[row][-1] for cache in live for row in cache.rows]
                hidden.append(advance(model, live, torch.tensor(last, device=device)))
            if waiting and sum(len(c.rows) for c in live) + len(waiting[-1]) <= at_once:
                group = list(waiting.pop())
                live.append(KVCache(model, group, prefix))
                hidden.append(live[-1].prefill(model, [prompts[row] for row in group]))
        here = [row for cache in live for row in cache.rows]
        noise = torch.tensor([next(chances[row]) for row in here], dtype=torch.float32)
        picked = pick(weights.logits(torch.cat(hidden)), sampling, noise.to(device))  # (B,)

        emitted, left = [], set()
        for row, token in zip(here, picked.tolist()):
            texts[row].append(token)
            ended = token in eos_ids or stopped is not None and stopped(texts[row])
            emitted.append((row, token, ended))
            if ended or len(texts[row]) == limits[row]:
                left.add(row)
        for cache in live:
            cache.drop(left)
        live = [cache for cache in live if cache.rows]
        yield sorted(emitted)


def _chances(name: int, sampling: Sampling) -> Iterator[float]:
    """Uniform numbers in [0, 1), one a step, that depend on (seed, name, step) alone."""
    if sampling.temperature == 0:
        return itertools.repeat(0.0)
    generator = np.random.default_rng((sampling.seed, name))
    return iter(generator.random, None)


def pick(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Next tokens (B,) from `logits (B, V)`; `noise (B,)` in [0, 1) takes the part of chance."""
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices  # on a CPU a fifth of the time of argmax, and the same
    assert sampling.top_p > 0, f"top_p {sampling.top_p} allows no token"
    p = torch.softmax(logits.float() / sampling.temperature, dim=-1)  # (B, V)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    # The mass of all likelier tokens: 0 for the likeliest, which always stays.
    before = p.cumsum(dim=-1) - p  # (B, V)
    allowed = before < sampling.top_p
    if sampling.top_k:
        allowed &= torch.arange(p.shape[-1], device=p.device) < sampling.top_k
    exact = torch.float32 if p.device.type == "mps" else torch.float64  # MPS has no fp64
    edges = (p * allowed).to(exact).cumsum(dim=-1)  # (B, V)
    target = noise.to(exact)[:, None] * edges[:, -1:]  # (B, 1)
    place = torch.searchsorted(edges, target, right=True)  # first edge beyond the target
    place = place.minimum(allowed.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1)
