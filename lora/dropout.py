"""Dropout whose mask is a pure function of (seed, epoch, row, position, layer, channel).

`F.dropout` draws from a running generator, so its mask depends on everything drawn before. Here the
mask is a hash, so a row of data is masked identically in any micro-batch, on any rank, and after
any interruption. On a CPU it is also four times as fast, because PyTorch draws serially there.

Before each training forward, `lora.seed_dropout` gives every adapter one key per token. On CUDA the
whole of it is one Triton kernel (`fused_dropout.py`), if that gives the same bits there.

Legend:
    T     tokens of a micro-batch
    C     channels: input features of one adapted layer
    key   32 bits that identify a token within the run, or a pair of channels within the model
"""

import functools
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora import fused_dropout

BITS = 16  # hash bits per channel (two channels share a hash), so p is exact to 1/65536


class KeyedDropout(nn.Module):
    """Inverted dropout of `x (T, C)`: zeroes values with probability `p`, scales the rest by
    1/(1-p).

    In training mode it needs `self.keys (T,)` from `token_keys`. In eval mode it returns x itself.

    Args:
        p: probability of zeroing a value, in [0, 1).
        channels: C.
        layer: number of the layer; layers with different numbers have independent masks.
    """

    channel_keys: Tensor  # ((C + 1) // 2,) int32

    def __init__(self, p: float, channels: int, layer: int):
        super().__init__()
        assert 0 <= p < 1, f"dropout {p} is not in [0, 1)"
        self.threshold = min(round(p * 2**BITS), 2**BITS - 1)  # hashes below it drop their value
        self.scale = 2**BITS / (2**BITS - self.threshold)
        self.keys = torch.empty(0, dtype=torch.int32)  # (T,): those of `seed_dropout`
        self.fused = False  # whether to use the Triton kernel
        pairs = torch.arange((channels + 1) // 2) + (layer << 32)
        self.register_buffer("channel_keys", _mix64(pairs).to(torch.int32), persistent=False)

    def mask(self, channels: int) -> Tensor:
        """(T, C) bool, True where a value is kept."""
        hashes = _mix32_(self.keys[:, None] ^ self.channel_keys)  # (T, C/2) int32
        signed = hashes.view(torch.int16)[:, :channels]  # (T, C), from -32768 to 32767
        return signed >= self.threshold - 2 ** (BITS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x (T, C) in training, and scale the others by 1 / (1 - p)."""
        if not self.drops(x):
            return x
        if self.fused:
            return fused_dropout.apply(x, self.keys, self.channel_keys, self.threshold, self.scale)
        return (x * self.mask(x.shape[-1])).mul_(self.scale)  # (T, C)

    def drops(self, x: Tensor) -> bool:
        """Whether values of `x (T, C)` are dropped, for which each token must have a key."""
        if not self.training or self.threshold == 0:
            return False
        assert len(self.keys) == len(x), (
            f"{len(self.keys)} dropout keys for {len(x)} tokens: call lora.seed_dropout(model, ...)"
            " before a training forward"
        )
        return True

    def kernel(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The Triton kernel with this forward pass's mask, for an autograd function that repeats
        it; None where the plain form is used, nothing is dropped, or a compiler traces.
        """
        if torch.compiler.is_compiling() or not self.fused or not self.drops(x):
            return None
        return partial(
            fused_dropout.launch, keys=self.keys, channel_keys=self.channel_keys,
            threshold=self.threshold, scale=self.scale,
        )  # fmt: skip


@functools.cache
def fused_works(device: torch.device) -> bool:
    """Whether the Triton kernel runs on `device` and equals the plain form; prints why if not."""
    if device.type != "cuda" or fused_dropout.triton is None:
        return False
    try:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        equal = all(fused_equals(device, dtype) for dtype in dtypes)
        reason = None if equal else "its results differ from the plain form's"
    except Exception as error:  # of Triton's compiler or the driver: anything may be missing
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"adapter dropout without its Triton kernel: {reason}")
    return reason is None


def fused_equals(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values and gradients of the two forms are the same bits, signs of zeros included."""
    x = torch.linspace(-2, 2, 5 * 1027, device=device).view(5, 1027).to(dtype).requires_grad_()
    layer = KeyedDropout(0.3, 1027, layer=3).to(device)
    layer.keys = token_keys(0, 0, torch.arange(5, device=device), torch.arange(5, device=device))
    found = []
    for layer.fused in (False, True):
        y = layer(x)
        both = torch.stack((y, *torch.autograd.grad(y, x, x.detach())))
        found.append(both.view(torch.uint8))
    return torch.equal(*found)


def token_keys(seed: int, epoch: int, row_ids: Tensor, positions: Tensor) -> Tensor:
    """Keys of tokens, (T,) int32, from their row ids `(T,)` and positions in the row `(T,)`."""
    return _mix64(_mix64(_mix64(row_ids + (epoch << 40)) + seed) + positions).to(torch.int32)


def _mix64(x: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit affects every output bit.

    The finalizer of splitmix64. The masks after `>>` make the shifts unsigned, as in the original.
    """
    x = x.to(torch.int64) + -0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mix32_(x: Tensor) -> Tensor:
    """The same for int32, in place, with the constants of lowbias32."""
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_((1 << 17) - 1))
    x.mul_(-0x7B935975)
    return x.bitwise_xor_((x >> 16).bitwise_and_((1 << 16) - 1))
