"""Key/value cache, so that decoding a token does not recompute the earlier ones.

Each sequence has a row of one tensor that is written in place. Its tokens fill the first slots of
the row, and a mask hides the others. A decoding step stores one slot of each row, then attends to
all rows in one call on a GPU. On a CPU it attends to parts of the rows, so that one long sequence
does not lengthen the work of all others.

Legend: B sequences, P distinct prompts, S slots of a row, T tokens, L tokens of a prompt, N shared
tokens, Q queries of a sequence and key head, H query heads, G key/value heads, D head size, C
hidden size; heads is H for queries and G for keys and values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import FlatAttention, attend_example
from model.qwen2 import Attend, Qwen2

PARTS = 4  # into which the rows are divided on a CPU
ALIGNMENT = 16  # slots attended to on a GPU are a multiple of it: kernels copy other masks
LEAST_SAVED = 64  # tokens of prefill that a shared prefix must save, since it costs a forward pass


class KVCache:
    """Key/value cache of the sequences being decoded; passed to the model as its attention."""

    def __init__(self, model: Qwen2, rows: int, room: int = 0, prefix: "KVCache | None" = None):
        """An empty cache for at most `rows` sequences.

        Args:
            room: slots that a row has for an answer at first; a full cache grows by half.
            prefix: a cache of one row with the tokens that all prompts begin with.
        """
        config, weight = model.config, model.head_weight
        self.model, self.prefix, self.room = model, prefix, room
        self.shared = prefix.lengths[0] if prefix else 0  # tokens of the prefix
        self.sequences: list[int] = []  # in the order of the rows: the index of the prompt
        self.lengths: list[int] = []  # and the number of tokens
        self.device, on_cpu = weight.device, weight.device.type == "cpu"
        self.part_rows = max(1, rows // PARTS) if on_cpu else rows
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        empty = weight.new_empty(layers, rows, groups, 0, config.head_size)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Both are (layers, rows, G, S, D). Keys have the dtype of the result of `rotate`.
        self.keys, self.values = empty.to(wide if on_cpu else weight.dtype), empty

    def prefill(self, sequences: list[int], prompts: list[list[int]]) -> Tensor:
        """Add sequences, and process their prompts; returns their last hidden states (B, C).

        Equal prompts are processed once.
        """
        rests = [tuple(prompt[self.shared :]) for prompt in prompts]
        distinct = list(dict.fromkeys(rests))
        first, lengths = len(self.sequences), [len(rest) for rest in distinct]
        rows = range(first, first + len(distinct))
        self.sequences = self.sequences + sequences
        self.lengths = self.lengths + [len(prompt) for prompt in prompts]
        self._reserve(max(self.lengths))
        if self.prefix:
            for x, shared in ((self.keys, self.prefix.keys), (self.values, self.prefix.values)):
                x[:, rows.start : rows.stop, :, : self.shared] = shared[..., : self.shared, :]

        tokens = [token for rest in distinct for token in rest]
        slots = [self.shared + i for n in lengths for i in range(n)]
        tokens, slots, rows_of = send(
            [tokens, slots, [row for row, n in zip(rows, lengths) for _ in range(n)]], self.device
        )  # (T,) each
        places = self._places(rows_of, slots)  # (T, G)
        attend_prompts = self._prompt_attention(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._store(layer, places, k, v)
            return attend_prompts(layer, q, k, v)

        hidden = self.model(tokens, slots, lengths, cache=attend)  # (T, C)

        # Give each sequence a copy of the keys and values of its prompt.
        index = {rest: i for i, rest in enumerate(distinct)}
        sources = [index[rest] for rest in rests]
        ends = torch.tensor(lengths).cumsum(0) - 1  # (P,)
        sources, ends = send([sources, ends[sources].tolist()], self.device)  # (B,) each
        if len(distinct) < len(rests):
            own, used = slice(first, first + len(rests)), max(self.lengths[first:])
            for x in (self.keys, self.values):
                x = x[..., :used, :]
                x[:, own] = x[:, rows.start : rows.stop].index_select(1, sources)
        return hidden[ends]  # (B, C)

    def advance(self, tokens: list[int]) -> Tensor:
        """Process one more token of each sequence; returns their last hidden states (B, C)."""
        tokens, slots = send([tokens, self.lengths], self.device)  # (B,) each
        self.lengths = [length + 1 for length in self.lengths]
        self._reserve(max(self.lengths))
        places = self._places(torch.arange(len(slots), device=self.device), slots)  # (B, G)
        parts = self._parts(slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._store(layer, places, k, v)
            # The query heads of a group are passed as its queries, so that keys are not copied.
            grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, H/G, D)
            keys, values = self.keys[layer], self.values[layer]  # (rows, G, S, D) each
            y = [
                attend_slots(grouped[rows], keys[rows, :, :used], values[rows, :, :used], mask)
                for rows, used, mask in parts
            ]
            y = y[0] if len(y) == 1 else torch.cat(y)  # (B, G, H/G, D)
            return y.flatten(1, 2)  # (B, H, D)

        return self.model(tokens, slots, [1] * len(slots), cache=attend)  # (B, C)

    def remove(self, sequences: set[int]) -> None:
        """Remove these sequences, if they are here; the last ones move to their rows."""
        for i in reversed(range(len(self.sequences))):
            if self.sequences[i] in sequences:
                end, used = len(self.sequences) - 1, self.lengths[-1]
                if i < end:
                    for x in (self.keys, self.values):
                        x[:, i, :, :used] = x[:, end, :, :used]
                self.sequences[i], self.lengths[i] = self.sequences[end], self.lengths[end]
                self.sequences, self.lengths = self.sequences[:end], self.lengths[:end]

    def _reserve(self, slots: int) -> None:
        """Make sure that rows have this many slots. New ones are 0, since a mask hides no NaN."""
        has = self.values.shape[3]
        if slots > has:
            more = _aligned(max(slots + self.room, has + has // 2)) - has
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def _places(self, rows: Tensor, slots: Tensor) -> Tensor:
        """The index (T, G) in a layer's (rows * G * S, D) of each token's keys and values."""
        _, _, G, S, _ = self.values.shape
        groups = torch.arange(G, device=self.device)
        return (rows[:, None] * G + groups) * S + slots[:, None]

    def _store(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        for cache, x in ((self.keys, k), (self.values, v)):  # x is (T, G, D)
            cache[layer].flatten(0, 2).index_copy_(0, places.flatten(), x.flatten(0, 1))

    def _parts(self, slots: Tensor) -> list[tuple[slice, int, Tensor]]:
        """The rows, the slots and the mask (rows, 1, 1, S) of each call of a decoding step.

        `slots (B,)` are the last ones to attend to.
        """
        parts = []
        for start in range(0, len(slots), self.part_rows):
            rows = slice(start, min(start + self.part_rows, len(slots)))
            used = max(self.lengths[rows])
            if self.device.type != "cpu":
                used = _aligned(used)
            mask = torch.arange(used, device=self.device) <= slots[rows, None]  # (rows, S)
            if self.device.type != "cpu":  # SDPA would convert a boolean mask in every layer
                zeros = torch.zeros(mask.shape, dtype=self.values.dtype, device=self.device)
                mask = zeros.masked_fill_(~mask, -torch.inf)
            parts.append((rows, used, mask[:, None, None]))
        return parts

    def _prompt_attention(self, lengths: list[int]) -> Attend:
        """Attention of the rest of each prompt to itself and to the shared prefix."""
        if not self.prefix:
            return FlatAttention(lengths, self.device)
        if self.device.type == "cpu":
            return lambda layer, q, k, v: attend_each_after(*self._begin(layer), q, k, v, lengths)
        attention = AttentionAfter(self.shared, lengths, self.device)
        return lambda layer, *qkv: attention(layer, *self._begin(layer), *qkv)

    def _begin(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the prefix, (N, G, D) each."""
        assert self.prefix, "no prompts share a prefix"
        keys, values = (
            x[layer, 0, :, : self.shared] for x in (self.prefix.keys, self.prefix.values)
        )
        return keys.transpose(0, 1), values.transpose(0, 1)


def attend_each_after(
    keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]
) -> Tensor:
    """Attention of prompts that follow the same N tokens, one call per prompt.

    `keys` and `values` (N, G, D) are those of these tokens. The others have the L tokens of each
    prompt: (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).
    """
    prompts = zip(*(x.split(lengths) for x in (q, k, v)))  # (L, heads, D) each
    return torch.cat([
        attend_example(q1, torch.cat([keys, k1]), torch.cat([values, v1])) for q1, k1, v1 in prompts
    ])  # fmt: skip


class AttentionAfter:
    """`attend_each_after` in one call on a GPU, by the kernel that training uses.

    That kernel needs as many queries as keys, so the shared tokens get queries of zeros, whose
    results are dropped.
    """

    def __init__(self, shared: int, lengths: list[int], device: torch.device):
        whole = [shared + n for n in lengths]
        self.shared, self.flat = shared, FlatAttention(whole, device)
        sources, results, taken = list[int](), list[int](), shared
        for n in lengths:
            results += range(len(sources) + shared, len(sources) + shared + n)
            sources += [*range(shared), *range(taken, taken + n)]
            taken += n
        # (P N + T,): where each token is in (the shared tokens, those of all prompts)
        (self.sources,) = send([sources], device)
        (self.results,) = send([results], device)  # (T,): where the prompts' own tokens are

    def __call__(
        self, layer: int, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        q = F.pad(q, (0, 0, 0, 0, self.shared, 0))  # (N + T, H, D)
        k, v = torch.cat([keys, k]), torch.cat([values, v])  # (N + T, G, D) each
        y = self.flat(layer, *(x.index_select(0, self.sources) for x in (q, k, v)))
        return y.index_select(0, self.results)  # (T, H, D)


def shared_prefix(model: Qwen2, prompts: list[list[int]]) -> KVCache | None:
    """A prefilled cache of the tokens that all prompts begin with; None if it would save little."""
    distinct = {tuple(prompt) for prompt in prompts}
    # The common prefix of the first and last in lexicographic order is common to all.
    first, last = min(distinct), max(distinct)
    shortest = min(len(prompt) for prompt in distinct)
    equal = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), shortest)
    length = min(equal, shortest - 1)  # at least one token of each prompt is left to process
    if length * (len(distinct) - 1) < LEAST_SAVED:
        return None
    prefix = KVCache(model, 1)
    prefix.prefill([0], [list(first[:length])])
    return prefix


def send(numbers: Sequence, device: torch.device) -> Tensor:
    """A tensor of `numbers` on `device`; the copy to a GPU is asynchronous."""
    x = torch.tensor(numbers)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _aligned(slots: int) -> int:
    return -(-slots // ALIGNMENT) * ALIGNMENT


def attend_slots(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over the slots where `mask (B, 1, 1, S)` is True, at least one for each query.

    The mask may also be a bias that is added to the scores, if it has the dtype of q, k and v.
    (B, G, Q, D), (B, G, S, D), (B, G, S, D) -> (B, G, Q, D). Any mask that broadcasts to
    (B, G, Q, S) is allowed, and `q` and `k` may be wider than `v`.
    """
    if q.dtype == v.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, G, Q, S) fp32
    scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v  # (B, G, Q, D)
