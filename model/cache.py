"""Key/value caches, so that decoding a token does not recompute the earlier ones.

Sequences that start together share one cache, in which all of them end at the same slot. The
sequences of several caches go through the network as one micro-batch; only attention treats the
caches one by one.

Legend: B sequences, P distinct prompts, S slots of a cache, T tokens, L tokens of a prompt, Q
queries of a sequence and key head, H query heads, G key/value heads, D head size, C hidden size;
heads is H for queries and G for keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import FlatAttention, attend_example
from model.qwen2 import Qwen2

GROWTH = 64  # slots added when a cache is full
LEAST_SAVED = 64  # tokens of prefill that a shared prefix must save, since it costs a forward pass


class KVCache:
    """Key/value cache of one group of sequences; passed to the model as its attention.

    The slots of a sequence are: the shared prefix, padding, the rest of its prompt, its answer. The
    padding makes all sequences end at the same slot, so that a decoding step writes a single slot,
    and the padding is all that the mask hides.
    """

    def __init__(self, model: Qwen2, sequences: list[int], prefix: "KVCache | None" = None):
        """`sequences` are the indices of the prompts; `prefix` holds the tokens all begin with."""
        config, weight = model.config, model.head_weight
        self.sequences = sequences
        self.shared = 0 if prefix is None else prefix.used  # slots of the shared prefix
        self.used = self.shared  # slots in use; the others are room to grow
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        empty = weight.new_empty(layers, 1, groups, 0, config.head_size)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Both are (layers, B, G, S, D). Keys have the dtype of the result of `rotate`.
        self.keys = empty.to(wide if weight.device.type == "cpu" else weight.dtype)
        self.values = empty
        if prefix is not None:
            self.keys, self.values = prefix.keys, prefix.values
        self.mask: Tensor  # (B, S) bool, False at padding; prefill sets it
        self.padding: Tensor  # (B,) number of padding slots; prefill sets it
        self.prompt_lengths: list[int] = []  # of the prompts being prefilled, otherwise empty

    def prefill(self, model: Qwen2, prompts: list[list[int]]) -> Tensor:
        """Process the prompts, equal ones once; returns their last hidden states (B, C)."""
        device = self.values.device
        rests = [tuple(prompt[self.shared :]) for prompt in prompts]
        distinct = list(dict.fromkeys(rests))
        lengths = [len(rest) for rest in distinct]
        self.used += max(lengths)
        new_slots = (0, 0, 0, self.used + GROWTH - self.shared)
        self.keys, self.values = (  # (layers, P, G, S, D) each
            F.pad(x[..., : self.shared, :].expand(-1, len(distinct), -1, -1, -1), new_slots)
            for x in (self.keys, self.values)
        )
        slots = torch.arange(self.values.shape[3], device=device)  # (S,)
        starts = self.used - torch.tensor(lengths, device=device)  # (P,)
        self.mask = (slots < self.shared) | (slots >= starts[:, None])  # (P, S)
        self.padding = starts - self.shared  # (P,)

        tokens = torch.tensor([t for rest in distinct for t in rest], device=device)  # (T,)
        positions = torch.cat([torch.arange(n) for n in lengths]) + self.shared  # (T,)
        self.prompt_lengths = lengths
        hidden = model(tokens, positions.to(device), lengths, cache=self)  # (T, C)
        self.prompt_lengths = []
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1  # (P,)

        # Give each sequence a copy of the keys and values of its prompt.
        index = {rest: i for i, rest in enumerate(distinct)}
        sources = torch.tensor([index[rest] for rest in rests], device=device)  # (B,)
        if len(distinct) < len(rests):
            self.keys = self.keys.index_select(1, sources)
            self.values = self.values.index_select(1, sources)
            self.mask, self.padding = self.mask[sources], self.padding[sources]
        return hidden[ends[sources]]  # (B, C)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend: (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).

        T is the sum of the prompts' lengths during prefill, otherwise B: one token per sequence.
        """
        if self.prompt_lengths:
            return self._attend_prompts(layer, q, k, v)
        keys, values = (x[layer, :, :, : self.used] for x in (self.keys, self.values))
        keys[:, :, -1], values[:, :, -1] = k, v
        # The query heads of a group are passed as its queries, so that its keys are not copied.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, D)
        mask = self.mask[:, None, None, : self.used]  # (B, 1, 1, used)
        return attend_slots(grouped, keys, values, mask).flatten(1, 2)  # (B, H, D)

    def _attend_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`__call__` during prefill, when the tokens are those of the P distinct prompts."""
        keys, values = (x[layer, :, :, : self.used] for x in (self.keys, self.values))
        prompts = list(
            zip(*(x.split(self.prompt_lengths) for x in (q, k, v)))
        )  # (L, heads, D) each
        for i, (_, k1, v1) in enumerate(prompts):
            keys[i, :, -len(k1) :] = k1.transpose(0, 1)
            values[i, :, -len(v1) :] = v1.transpose(0, 1)
        if not self.shared:
            return FlatAttention(self.prompt_lengths, q.device)(layer, q, k, v)
        prefix = [x[0, :, : self.shared].transpose(0, 1) for x in (keys, values)]  # (S, G, D) each
        return torch.cat([
            attend_example(q1, torch.cat([prefix[0], k1]), torch.cat([prefix[1], v1]))
            for q1, k1, v1 in prompts
        ])  # (T, H, D)  # fmt: skip

    def grow(self) -> Tensor:
        """Make room for one more token in every sequence; returns its positions (B,)."""
        if self.used == self.values.shape[3]:
            self.keys, self.values = (
                torch.cat([x, torch.empty_like(x[..., :GROWTH, :])], dim=3)
                for x in (self.keys, self.values)
            )
            self.mask = F.pad(self.mask, (0, GROWTH), value=True)
        self.used += 1
        return self.used - 1 - self.padding  # (B,)

    def remove(self, sequences: set[int]) -> None:
        """Remove these sequences, if they are here; the last ones move to their places."""
        for i in reversed(range(len(self.sequences))):
            if self.sequences[i] in sequences:
                end = len(self.sequences) - 1
                self.keys[:, i], self.values[:, i] = self.keys[:, end], self.values[:, end]
                self.mask[i], self.padding[i] = self.mask[end], self.padding[end]
                self.sequences[i] = self.sequences[end]
                self.keys, self.values = self.keys[:, :end], self.values[:, :end]
                self.mask, self.padding = self.mask[:end], self.padding[:end]
                self.sequences = self.sequences[:end]


def shared_prefix(model: Qwen2, prompts: list[list[int]]) -> KVCache | None:
    """A prefilled cache of the tokens that all prompts begin with; None if it would save little."""
    distinct = {tuple(prompt) for prompt in prompts}
    # What the first and the last in lexicographic order share, all the others share too.
    first, last = min(distinct), max(distinct)
    shortest = min(len(prompt) for prompt in distinct)
    equal = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), shortest)
    length = min(equal, shortest - 1)  # at least one token of each prompt is left to process
    if length * (len(distinct) - 1) < LEAST_SAVED:
        return None
    prefix = KVCache(model, [0])
    prefix.prefill(model, [list(first[:length])])
    return prefix


def advance(model: Qwen2, caches: list[KVCache], tokens: Tensor) -> Tensor:
    """Process one more token of every sequence: tokens (B,) -> last hidden states (B, C).

    The order is that of the caches, and within a cache that of its sequences.
    """
    sizes = [len(cache.sequences) for cache in caches]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(caches, q.split(sizes), k.split(sizes), v.split(sizes))
        return torch.cat([cache(layer, *qkv) for cache, *qkv in parts])  # (B, H, D)

    positions = torch.cat([cache.grow() for cache in caches])  # (B,)
    return model(tokens, positions, [1] * len(tokens), cache=attend)  # (B, C)


def attend_slots(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over the slots where `mask (B, 1, 1, S)` is True, at least one for each query.

    (B, G, Q, D), (B, G, S, D), (B, G, S, D) -> (B, G, Q, D). Any mask that broadcasts to
    (B, G, Q, S) is allowed, and `q` and `k` may be wider than `v`.
    """
    if q.dtype == v.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, G, Q, S) fp32
    scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v  # (B, G, Q, D)
