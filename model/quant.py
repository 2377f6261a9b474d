"""A base held in 4 or 8 bits: linear layers whose weights are dequantized for each product.

    W = scale of its block * value of its code        NF4: 16 values; int8: code / 127

A block is 64 consecutive weights, and its scale is the largest magnitude in it, in fp32: 4.5 or 8.5
bits per weight. The product dequantizes, and its gradient dequantizes again, so that no more than
one of these weights is in full precision at any time. Only x gets a gradient: the base is
frozen. Embedding, norms, biases and output embedding keep the base's precision.

Legend: T tokens; in, out features; b blocks of a weight.
Sources: QLoRA (NF4), arXiv:2305.14314; LLM.int8(), arXiv:2208.07339. The layout is that of
bitsandbytes: two codes in a byte, the first in its high bits, and blocks row by row.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
# The quantiles of a normal distribution with a maximum of 1, from the source of bitsandbytes.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with its weight as `codes` (out, in / 2) uint8 or (out, in) int8, and `absmax`
    (b,) fp32; the bias (out,) stays in `dtype`. All three are frozen.

    `weight` is dequantized whenever it is read, so that DoRA computes with it; it cannot be set.
    """

    def __init__(self, layer: nn.Linear, kind: str, block: int, dtype: torch.dtype):
        """In the place of `layer`, a layer on the meta device; `kind` and `block` of `quantize`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.block, self.dtype = kind, block, dtype
        codes, absmax = quantize(layer.weight.detach(), kind, block)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.register_parameter("bias", layer.bias)

    @property  # nn.Linear declares an attribute that can be set
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out, in), computed anew at each access."""
        return dequantize(self.codes, self.absmax, self.dtype)  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.codes, self.absmax, self.bias)  # (T, out)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        return F.linear(x, dequantize(codes, absmax, x.dtype), bias)  # (T, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, absmax = ctx.saved_tensors
        return grad @ dequantize(codes, absmax, grad.dtype), None, None, None  # (T, in)


def quantize(weight: Tensor, kind: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """`weight (out, in)` -> its codes and absmax, as in `QuantizedLinear`; `kind` is nf4 or int8.

    A weight that does not divide into blocks of that many gets the largest smaller ones that fit.
    """
    blocks = weight.float().view(-1, math.gcd(weight.numel(), block))  # (b, block)
    absmax = blocks.abs().amax(dim=1)  # (b,)
    scaled = blocks * (1 / absmax.clamp_min(1e-38))[:, None]
    if kind == "int8":
        return (scaled * 127).round().to(torch.int8).view(weight.shape), absmax
    codes = torch.bucketize(scaled, ((NF4[1:] + NF4[:-1]) / 2).to(weight.device), out_int32=True)
    codes = codes.to(torch.uint8).view(len(weight), -1, 2)  # (out, in / 2, 2)
    return codes[..., 0] << 4 | codes[..., 1], absmax


def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in), multiplied in fp32 or wider and rounded once to `dtype`."""
    if codes.dtype == torch.int8:
        values = codes.to(torch.promote_types(dtype, torch.float32)) / 127
    else:
        values = F.embedding(codes.int(), nf4_pairs(codes.device))  # (out, in / 2, 2)
    return (values.view(len(absmax), -1) * absmax[:, None]).view(len(codes), -1).to(dtype)


@functools.cache
def nf4_pairs(device: torch.device) -> Tensor:
    """The two values of each byte of NF4 codes, (256, 2) fp32 on `device`."""
    return torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), dim=1).to(device)


def quantize_layers(model: nn.Module, kind: str, dtype: torch.dtype, stored: set[str]) -> None:
    """Replace the linear layers of `model`, on the meta device, except the output embedding.

    `stored`, unless it is empty, names the weights that bitsandbytes has quantized: only these are
    replaced. Its int8 has one scale for each row.
    """
    for name, layer in list(model.named_modules()):
        chosen = f"{name}.weight" in stored if stored else name != "lm_head"
        if isinstance(layer, nn.Linear) and chosen:
            block = layer.in_features if stored and kind == "int8" else BLOCK
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantizedLinear(layer, kind, block, dtype))


def held(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of a checkpoint as `model` holds it: by name, quantized if its layer is."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not (isinstance(owner, QuantizedLinear) and name.endswith(".weight")):
        return {name: tensor}
    codes, absmax = quantize(tensor, owner.kind, owner.block)
    place = name.removesuffix("weight")
    return {f"{place}codes": codes, f"{place}absmax": absmax}
