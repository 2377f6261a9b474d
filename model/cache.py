"""Keys and values of earlier tokens, kept for the rows that are decoded.

Rows that came in together share a cache in which all end at the same slot. The rows of several
caches go through the network as one micro-batch: only attention knows that they are several.

Legend: B rows, S slots of a cache, T tokens, L tokens of a prompt, H query heads, G key/value
heads, D head size, C hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import FlatAttention, attend_example
from model.qwen2 import Qwen2

BLOCK = 64  # slots by which a cache grows
LEAST_SAVED = 64  # tokens, for which a common beginning is worth a forward of its own


class KVCache:
    """Of rows that came in together; called as the model's attention.

    A row's slots: the shared prefix, a gap, the rest of its prompt, its answer. The gap makes all
    rows end at the same slot, so a step writes one slot of all rows, and only gaps are masked.
    """

    def __init__(self, model: Qwen2, rows: list[int], prefix: "KVCache | None" = None):
        config, weight = model.config, model.head_weight
        self.rows = rows  # which prompt each row is
        self.shared = 0 if prefix is None else prefix.used
        self.used = self.shared  # slots
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        nothing = weight.new_empty(layers, 1, groups, 0, config.head_size)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Both (layers, B, G, S, D); keys in the dtype in which `rotate` gives them.
        self.keys = nothing.to(wide if weight.device.type == "cpu" else weight.dtype)
        self.values = nothing
        if prefix is not None:
            self.keys, self.values = prefix.keys, prefix.values
        self.incoming: list[int] = []  # while prefilling, the tokens of each prompt

    def prefill(self, model: Qwen2, prompts: list[list[int]]) -> Tensor:
        """Take in each row's prompt, equal ones once; returns their last hidden states (B, C)."""
        device = self.values.device
        own = [tuple(prompt[self.shared :]) for prompt in prompts]
        distinct = list(dict.fromkeys(own))
        self.incoming = [len(prompt) for prompt in distinct]
        self.used += max(self.incoming)
        room = (0, 0, 0, self.used + BLOCK - self.shared)
        self.keys, self.values = (
            F.pad(x[..., : self.shared, :].expand(-1, len(distinct), -1, -1, -1), room)
            for x in (self.keys, self.values)
        )
        slots = torch.arange(self.values.shape[3], device=device)
        starts = self.used - torch.tensor(self.incoming, device=device)  # (B,)
        self.seen = (slots < self.shared) | (slots >= starts[:, None])  # (B, S)
        self.gaps = starts - self.shared  # (B,)

        tokens = torch.tensor([t for prompt in distinct for t in prompt], device=device)  # (T,)
        positions = torch.cat([torch.arange(n) for n in self.incoming]) + self.shared  # (T,)
        hidden = model(tokens, positions.to(device), self.incoming, cache=self)  # (T, C)
        ends = torch.tensor(self.incoming, device=device).cumsum(0) - 1
        self.incoming = []
        place = {prompt: i for i, prompt in enumerate(distinct)}
        sources = torch.tensor([place[prompt] for prompt in own], device=device)  # (B,)
        if len(distinct) < len(own):
            self.keys = self.keys.index_select(1, sources)
            self.values = self.values.index_select(1, sources)
            self.seen, self.gaps = self.seen[sources], self.gaps[sources]
        return hidden[ends[sources]]  # (B, C)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        keys, values = (x[layer, :, :, : self.used] for x in (self.keys, self.values))
        if self.incoming:  # prompts
            parts = list(zip(*(x.split(self.incoming) for x in (q, k, v))))  # each (L, heads, D)
            for row, (_, k1, v1) in enumerate(parts):
                keys[row, :, -len(k1) :] = k1.transpose(0, 1)
                values[row, :, -len(v1) :] = v1.transpose(0, 1)
            if not self.shared:
                return FlatAttention(self.incoming, q.device)(layer, q, k, v)
            before = [x[0, :, : self.shared].transpose(0, 1) for x in (keys, values)]
            return torch.cat([
                attend_example(q1, torch.cat([before[0], k1]), torch.cat([before[1], v1]))
                for q1, k1, v1 in parts
            ])  # fmt: skip
        keys[:, :, -1], values[:, :, -1] = k, v
        # A group's query heads stand where queries usually do: its keys are read once, not copied.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, D)
        seen = self.seen[:, None, None, : self.used]  # (B, 1, 1, used)
        return attend_slots(grouped, keys, values, seen).flatten(1, 2)  # (B, H, D)

    def grow(self) -> Tensor:
        """Make room for one more token in every row; returns its position (B,)."""
        if self.used == self.values.shape[3]:
            self.keys, self.values = (
                torch.cat([x, torch.empty_like(x[..., :BLOCK, :])], dim=3)
                for x in (self.keys, self.values)
            )
            self.seen = F.pad(self.seen, (0, BLOCK), value=True)
        self.used += 1
        return self.used - 1 - self.gaps

    def drop(self, rows: set[int]) -> None:
        """Remove these rows, if they are here; the last ones move into their places."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place] in rows:
                end = len(self.rows) - 1
                self.keys[:, place], self.values[:, place] = self.keys[:, end], self.values[:, end]
                self.seen[place], self.gaps[place] = self.seen[end], self.gaps[end]
                self.rows[place] = self.rows[end]
                self.keys, self.values = self.keys[:, :end], self.values[:, :end]
                self.rows, self.seen, self.gaps = self.rows[:end], self.seen[:end], self.gaps[:end]


def shared_prefix(model: Qwen2, prompts: list[list[int]]) -> KVCache | None:
    """What all prompts begin with, prefilled; None where that would save too little."""
    distinct = {tuple(prompt) for prompt in prompts}
    first, last = min(distinct), max(distinct)  # by their tokens: all others lie between
    shortest = min(len(prompt) for prompt in distinct)
    equal = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), shortest)
    length = min(equal, shortest - 1)  # each prompt's last token is its own
    if length * (len(distinct) - 1) < LEAST_SAVED:
        return None
    prefix = KVCache(model, [0])
    prefix.prefill(model, [list(first[:length])])
    return prefix


def advance(model: Qwen2, caches: list[KVCache], tokens: Tensor) -> Tensor:
    """Hidden states (B, C) of one more token (B,) in each row of all caches, one after another."""
    sizes = [len(cache.rows) for cache in caches]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(caches, q.split(sizes), k.split(sizes), v.split(sizes))
        return torch.cat([cache(layer, *qkv) for cache, *qkv in parts])  # (B, H, D)

    positions = torch.cat([cache.grow() for cache in caches])  # (B,)
    return model(tokens, positions, [1] * len(tokens), cache=attend)


def attend_slots(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Each query over the slots that are `seen (B, 1, 1, S)`, which is at least one.

    (B, G, Q, D), (B, G, S, D), (B, G, S, D) -> (B, G, Q, D).
    """
    if q.dtype == v.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, G, Q, S) fp32
    scores.masked_fill_(~seen, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v
