"""Qwen2 on one page: RMSNorm, rotary positions, grouped-query attention with biases, SwiGLU.

A micro-batch is flat: its examples lie end to end in one row of tokens, so nothing is padded and
only attention needs to know where an example ends. Attribute names are the checkpoint's tensor
names, so loading needs no renaming table.

Legend: T tokens, C hidden size, H query heads, G key/value heads, D head size, V vocabulary.
Source: Qwen2 Technical Report, arXiv:2407.10671.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import FlatAttention
from model.functions import rms_norm, rotate, swiglu

# (layer, q (T, H, D), k (T, G, D), v (T, G, D)) -> (T, H, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Qwen2Config:
    """The sizes of a checkpoint, under the names of its `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Qwen2(nn.Module):
    """The causal language model up to its last hidden states.

    The head is applied by whoever needs it: it is the most expensive product of all, and training
    needs it at the supervised tokens only, decoding at the last one: `loss.py`, `generate.py`.
    """

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output embedding, which is the input embedding where the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(
        self, tokens: Tensor, positions: Tensor, lengths: list[int], cache: Attend | None = None
    ) -> Tensor:
        """Hidden states (T, C) of `tokens (T,)`, at `positions (T,)` within examples of `lengths`.

        `cache`, when decoding, attends to the keys and values of earlier calls as well.
        """
        attend = cache if cache is not None else FlatAttention(lengths, tokens.device)
        return self.model(tokens, positions, attend)  # (T, C)


class Decoder(nn.Module):
    """Embedding, layers, and the last norm: tokens (T,) to hidden states (T, C)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed_tokens(tokens)  # (T, C)
        # fp32 at least: in bf16 each of 48 sums would round all that came before it.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rotary = rotary_table(positions, self.config.head_size, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, rotary, attend)  # (T, C)
        return self.norm(x)  # (T, C)


class Layer(nn.Module):
    """Attention, then MLP, each on a normed copy and added back: (T, C) to (T, C)."""

    def __init__(self, config: Qwen2Config, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = self.before_attention(x, rotary)  # (T, H, D), (T, G, D), (T, G, D)
        y = attend(self.self_attn.index, q, k, v)  # (T, H, D)
        return self.after_attention(x, y)  # (T, C)

    # All but attention works on each token by itself: these two are what `compile.py` compiles.

    def before_attention(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.self_attn.queries_keys_values(self.input_layernorm(x), rotary)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(y.flatten(1))  # (T, C)
        return x + self.mlp(self.post_attention_layernorm(x))  # (T, C)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key and value heads; q, k, v have biases."""

    def __init__(self, config: Qwen2Config, index: int):
        super().__init__()
        self.index, self.head_size = index, config.head_size
        C, kv = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, kv)
        self.v_proj = Linear(C, kv)
        self.o_proj = Linear(C, C, bias=False)

    def queries_keys_values(
        self, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, D), (T, G, D), (T, G, D): the first two turned to their positions."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_size))  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))  # (T, G, D)
        return rotate(q, *rotary), rotate(k, *rotary), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, inner, bias=False)
        self.up_proj = Linear(C, inner, bias=False)
        self.down_proj = Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (T, C)


class RMSNorm(nn.Module):
    """Scales each row to a root mean square of 1, then by a weight a channel."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # (T, C)


class Linear(nn.Linear):
    """An `nn.Linear` whose bias may be kept wider than its weight: trained biases are fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


def rotary_table(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, D/2) in fp32: bf16 cannot tell positions apart from 256 on."""
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_size)  # (D/2,)
    angles = positions[:, None].float() * frequencies  # (T, D/2)
    return angles.cos()[:, None], angles.sin()[:, None]
