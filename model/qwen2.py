"""Qwen2 on one page: RMSNorm, rotary positions, grouped-query attention with biases, SwiGLU.

Qwen3 (dense) is the same network with an RMSNorm on each query and key head instead of biases, and
with its own head size.

A micro-batch is flat: its examples are concatenated into one sequence of tokens without padding,
and only attention needs to know where each example ends. Attribute names equal the checkpoint's
tensor names, so loading needs no renaming table.

Norm, rotation, attention and loss are written in plain PyTorch at the end of this page. The model
runs faster versions of them, from functions.py, attention.py and loss.py; tests check that these
give the same values and gradients.

Legend: T tokens, N supervised tokens, C hidden size, H query heads, G key/value heads, D head
size, F MLP size, V vocabulary size.
Sources: Qwen2 Technical Report, arXiv:2407.10671; Qwen3 Technical Report, arXiv:2505.09388.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import FlatAttention
from model.functions import rms_norm, rotate, swiglu
from model.shard import Lockstep

# attend(layer, q (T, H, D), k (T, G, D), v (T, G, D)) -> (T, H, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# A layer that keeps only its input for the backward pass; keyed dropout needs no random state.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Qwen2Config:
    """The sizes of a checkpoint, named as in its `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    head_dim: int | None = None  # D of a Qwen3; None for a Qwen2, whose D is C / H

    @property
    def head_size(self) -> int:
        """D, the size of a query, key or value head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def is_qwen3(self) -> bool:
        """Whether queries and keys are normalized, and have no biases."""
        return self.head_dim is not None


class Qwen2(nn.Module):
    """The causal language model up to its final hidden states.

    The output embedding is applied by the caller (`loss.py`, `generate.py`), because it is the most
    expensive product: training needs it only at supervised tokens, decoding only at the last one.
    """

    lockstep: Lockstep | None = None  # of a sharded base only

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, C), which is the input embedding if the two are tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(
        self, tokens: Tensor, positions: Tensor, lengths: list[int], cache: Attend | None = None
    ) -> Tensor:
        """The final hidden states (T, C) of a flat micro-batch.

        Args:
            tokens: (T,) token ids of all examples, concatenated.
            positions: (T,) position of each token in its example, from 0.
            lengths: the number of tokens of each example; their sum is T.
            cache: the attention to use when decoding, which also attends to the keys and values of
                earlier calls; None for attention within each example.
        """
        attend = cache if cache is not None else FlatAttention(lengths, tokens.device)
        return self.model(tokens, positions, attend)  # (T, C)


class Decoder(nn.Module):
    """Embedding, layers and final norm: tokens (T,) to hidden states (T, C)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpoint_activations = False  # in training: see `recomputed`

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed_tokens(tokens)  # (T, C)
        # The residual stream is fp32: in bf16, each layer's two additions would round it again.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rotary = rotary_table(positions, self.config.head_size, self.config.rope_theta)
        for layer in self.layers:
            recompute = self.checkpoint_activations and self.training
            x = recomputed(layer, x, rotary, attend) if recompute else layer(x, rotary, attend)
        return self.norm(x)  # (T, C)


class Layer(nn.Module):
    """Attention, then MLP, each as a residual: `x + f(norm(x))`, (T, C) to (T, C)."""

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

    # Everything except attention treats each token independently. compile.py compiles these two.

    def before_attention(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.self_attn.queries_keys_values(self.input_layernorm(x), rotary)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(y.flatten(1))  # (T, C)
        return x + self.mlp(self.post_attention_layernorm(x))  # (T, C)


class Attention(nn.Module):
    """The projections of grouped-query attention: H query heads share G key and value heads."""

    def __init__(self, config: Qwen2Config, index: int):
        super().__init__()
        self.index, self.head_size = index, config.head_size
        C, D, biased = config.hidden_size, config.head_size, not config.is_qwen3
        q, kv = config.num_attention_heads * D, config.num_key_value_heads * D  # q = H D, kv = G D
        self.q_proj = nn.Linear(C, q, bias=biased)
        self.k_proj = nn.Linear(C, kv, bias=biased)
        self.v_proj = nn.Linear(C, kv, bias=biased)
        self.o_proj = nn.Linear(q, C, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(D, config.rms_norm_eps) if config.is_qwen3 else nn.Identity() for _ in range(2)
        )

    def queries_keys_values(
        self, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, D), k (T, G, D) and v (T, G, D); q and k are rotated by their positions."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_size)))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_size)))  # (T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))  # (T, G, D)
        return rotate(q, *rotary), rotate(k, *rotary), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (T, C) to (T, C)."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, F, bias=False)
        self.up_proj = nn.Linear(C, F, bias=False)
        self.down_proj = nn.Linear(F, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (T, C)


class RMSNorm(nn.Module):
    """Scales each token to a root mean square of 1, then multiplies each channel by a weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # (T, C)


def rotary_table(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles at `positions (T,)`: (T, 1, D/2) each.

    They are fp32, since bf16 cannot represent every integer position above 256.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_size)  # (D/2,)
    angles = positions[:, None].float() * frequencies  # (T, D/2)
    return angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, D/2) each


# The formulas in plain PyTorch. The fast versions are rms_norm, rotate, FlatAttention and
# linear_cross_entropy; tests compare them with these.


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over channels: `x (T, C)`, `weight (C,)` -> (T, C)."""
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (T, C)
    return weight * normed.to(weight.dtype)  # (T, C)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair `(x[i], x[i + D/2])` of `x (T, H, D)` by an angle; cos, sin (T, 1, D/2)."""
    a, b = x.float().chunk(2, dim=-1)  # (T, H, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # (T, H, D)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in one example: `q (T, H, D)`, `k, v (T, G, D)` -> (T, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (T, H, D)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5  # (H, T, T)
    later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)  # (H, T, T)
    return torch.einsum("hts,shd->thd", weights.to(v.dtype), v)  # (T, H, D)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of nats over tokens whose target is not -100: (T, C), (V, C), (T,) -> ()."""
    hidden, targets = hidden[targets != -100], targets[targets != -100]  # (N, C), (N,)
    log_probabilities = (hidden @ weight.t()).float().log_softmax(-1)  # (N, V)
    return -log_probabilities.gather(1, targets[:, None]).sum()  # ()
