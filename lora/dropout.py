"""Dropout whose mask is a pure function of (seed, epoch, row, position, layer, channel).

A mask drawn from a running generator depends on everything drawn before it. This one is a hash, so
it does not: a row is dropped alike in any micro-batch, on any rank, and after any interruption. It
is also four times as fast as `F.dropout` on a CPU, where drawing is serial (`docs/log.md`).

`lora.inject.seed_dropout` gives every adapter the keys of its tokens before a training forward.
Legend: T tokens, C channels.
"""

import torch
from torch import Tensor, nn

BITS = 16  # of each hashed word, two channels' worth: rates are exact to 1/65536


class KeyedDropout(nn.Module):
    """Inverted dropout of `x (T, C)` with rate `p`; `layer` sets one adapter's masks apart from
    another's.

    In training mode it needs `self.keys (T,)`, from `token_keys`; in eval mode it is the identity.
    """

    def __init__(self, p: float, channels: int, layer: int):
        super().__init__()
        assert 0 <= p < 1, f"dropout {p} is not in [0, 1)"
        self.dropped = min(round(p * 2**BITS), 2**BITS - 1)  # of 65,536 hash values
        self.scale = 2**BITS / (2**BITS - self.dropped)
        self.keys: Tensor | None = None
        pairs = torch.arange((channels + 1) // 2) + (layer << 32)
        self.register_buffer("channel_keys", _mix64(pairs).to(torch.int32), persistent=False)

    def mask(self, channels: int) -> Tensor:
        """(T, C) bool, True where a channel is kept."""
        h = self.keys[:, None] ^ self.channel_keys  # (T, C/2) int32
        h = _mix32_(h)
        return h.view(torch.int16)[:, :channels] >= self.dropped - 2 ** (BITS - 1)  # (T, C)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropped == 0:
            return x
        assert self.keys is not None, "call lora.seed_dropout(model, ...) before a training forward"
        assert len(self.keys) == len(x), f"{len(self.keys)} dropout keys for {len(x)} tokens"
        return (x * self.mask(x.shape[-1])).mul_(self.scale)


def token_keys(seed: int, epoch: int, row_ids: Tensor, positions: Tensor) -> Tensor:
    """(T,) int32 keys of tokens, from their row ids `(T,)` and positions `(T,)`."""
    return _mix64(_mix64(_mix64(row_ids + (epoch << 40)) + seed) + positions).to(torch.int32)


def _mix64(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads every input bit over all output bits (splitmix64's)."""
    x = x.to(torch.int64) + -0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mix32_(x: Tensor) -> Tensor:
    """The same for int32, in place (lowbias32's constants; the shifts are made unsigned)."""
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_((1 << 17) - 1))
    x.mul_(-0x7B935975)
    return x.bitwise_xor_((x >> 16).bitwise_and_((1 << 16) - 1))
