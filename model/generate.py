"""Decoding with a key/value cache: many prompts at once, each token's computation done once.

Prompts are prefilled flat, like a training micro-batch; then every unfinished row advances by one
token a step, and rows that have ended leave the batch. A row's text does not depend on its company:
sampling uses the row's own random numbers.

Legend: B rows in the batch, S cache slots, T tokens, H query heads, G key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import FlatAttention
from model.qwen2 import Qwen2

# Whether an answer ends with these tokens, the last of them just picked.
Stopped = Callable[[list[int]], bool]

COMPACT_EVERY = 16  # steps between removals of finished rows: copying the cache costs about one


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
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    vocabulary: int,
    sampling: Sampling = Sampling(),
    rows: list[int] | None = None,
    stopped: Stopped | None = None,
) -> list[Decoded]:
    """Answers to `prompts` (token ids), decoded together.

    `vocabulary` is the tokenizer's size: the table's rows beyond it mean nothing and are never
    picked. `rows` names each prompt in the random numbers (default: its place), so that a prompt
    draws the same numbers in any batch. `stopped` is asked after each token whether a row's answer
    ends there too.
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
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    vocabulary: int,
    sampling: Sampling = Sampling(),
    rows: list[int] | None = None,
    stopped: Stopped | None = None,
) -> Iterator[list[tuple[int, int, bool]]]:
    """`generate`, step by step: yields (row, token, has it ended) of each unfinished row."""
    if not prompts or max_new_tokens < 1:
        return
    assert all(prompts), "an empty prompt has no last token to go on from"
    device = model.head_weight.device
    head = model.head_weight[:vocabulary]  # (vocabulary, C)
    lengths = [len(p) for p in prompts]
    noise = _noise(rows or list(range(len(prompts))), max_new_tokens, sampling).to(device)
    cache = KVCache(model, lengths, max_new_tokens)

    tokens = torch.tensor([t for p in prompts for t in p], device=device)  # (T,)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (T,)
    hidden = model(tokens, positions, lengths, cache=cache)  # (T, C)
    hidden = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]  # (B, C)
    # Which prompt each row of the batch is; None once that has ended.
    live: list[int | None] = list(range(len(prompts)))
    texts: list[list[int]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        picked = pick(hidden @ head.t(), sampling, noise[:, step])  # (B,)
        emitted = []
        for place, (row, token) in enumerate(zip(live, picked.tolist())):
            if row is not None:
                texts[row].append(token)
                ended = token in eos_ids or stopped is not None and stopped(texts[row])
                emitted.append((row, token, ended))
                live[place] = None if ended else row
        yield emitted
        left = [i for i, row in enumerate(live) if row is not None]
        if not left or step == max_new_tokens - 1:
            return
        if len(left) < len(live) and (step % COMPACT_EVERY == 0 or len(left) * 2 <= len(live)):
            keep = torch.tensor(left, device=device)
            cache.keep(keep)
            picked, noise, live = picked[keep], noise[keep], [live[i] for i in left]
        hidden = model(picked, cache.advance(), [1] * len(picked), cache=cache)  # (B, C)


def pick(logits: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Next tokens (B,) from `logits (B, V)`; `noise (B,)` in [0, 1) takes the part of chance."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
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


def _noise(rows: list[int], steps: int, sampling: Sampling) -> Tensor:
    """(B, steps) uniform numbers that depend on (seed, row, step) alone."""
    if sampling.temperature == 0:
        return torch.zeros(len(rows), steps)
    draws = [np.random.default_rng((sampling.seed, row)).random(steps) for row in rows]
    return torch.from_numpy(np.stack(draws)).float()


class KVCache:
    """Keys and values of every layer, one row a prompt, each row filled from slot 0 on.

    Called as the model's attention: a first call takes whole prompts, later ones one token a row.
    """

    def __init__(self, model: Qwen2, lengths: list[int], max_new_tokens: int):
        config, weight = model.config, model.head_weight
        slots = max(lengths) + max_new_tokens
        shape = (2, config.num_hidden_layers, len(lengths), config.num_key_value_heads, slots,
                 config.head_size)  # fmt: skip
        self.store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.ends = torch.tensor(lengths, device=weight.device)  # (B,): each row's first free slot
        self.longest = max(lengths)
        self.prefill: FlatAttention | None = FlatAttention(lengths, weight.device)
        self.mask: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        keys, values = self.store[0, layer], self.store[1, layer]  # (B, G, S, D)
        if self.prefill is not None:
            lengths = self.prefill.lengths
            for row, (k1, v1) in enumerate(zip(k.split(lengths), v.split(lengths))):
                keys[row, :, : len(k1)] = k1.transpose(0, 1)
                values[row, :, : len(v1)] = v1.transpose(0, 1)
            return self.prefill(layer, q, k, v)
        batch = torch.arange(len(k), device=k.device)
        keys[batch, :, self.ends - 1] = k
        values[batch, :, self.ends - 1] = v
        # A group's query heads stand where queries usually do: its keys are read once, not copied.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, D)
        y = F.scaled_dot_product_attention(
            grouped, keys[:, :, : self.longest], values[:, :, : self.longest], attn_mask=self.mask
        )
        return y.flatten(1, 2)  # (B, H, D)

    def advance(self) -> Tensor:
        """Make room for one more token in every row; returns its position (B,)."""
        self.prefill = None
        self.ends = self.ends + 1
        self.longest += 1
        slots = torch.arange(self.longest, device=self.ends.device)
        self.mask = (slots < self.ends[:, None])[:, None, None]  # (B, 1, 1, longest), True is seen
        return self.ends - 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`."""
        self.store = self.store.index_select(2, rows)
        self.ends = self.ends[rows]
