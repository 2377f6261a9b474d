"""A base held in 4 or 8 bits: linear layers whose weights are dequantised for each product.

    W = scale of its block * value of its code        NF4: 16 values; int8: code / 127

A block is 64 consecutive weights, and its scale is the largest magnitude in it, in fp32: 4.5 or 8.5
bits per weight. The product dequantises, and its gradient dequantises again, so that no more than
one weight of the network is in full precision at any time. Only x gets a gradient: the base is
frozen. Embedding, norms, biases and output embedding keep the base's precision.

Legend: T tokens; in, out features; b blocks of a weight.
Sources: QLoRA (NF4), arXiv:2305.14314; LLM.int8(), arXiv:2208.07339. The layout is that of
bitsandbytes: two codes in a byte, the first in its high bits, and blocks row by row.
"""

import functools
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import BadCheckpoint

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

    `weight` is dequantised whenever it is read, so that DoRA computes with it; it cannot be set.
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

    @property
    def weight(self) -> Tensor:
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

    `stored`, unless it is empty, names the weights that bitsandbytes has quantised: only these are
    replaced. Its int8 has one scale for each row.
    """
    for name, layer in list(model.named_modules()):
        chosen = f"{name}.weight" in stored if stored else name != "lm_head"
        if isinstance(layer, nn.Linear) and chosen:
            block = layer.in_features if stored and kind == "int8" else BLOCK
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantizedLinear(layer, kind, block, dtype))


def held(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of a checkpoint as `model` holds it: by name, quantised if its layer is."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not (isinstance(owner, QuantizedLinear) and name.endswith(".weight")):
        return {name: tensor}
    codes, absmax = quantize(tensor, owner.kind, owner.block)
    place = name.removesuffix("weight")
    return {f"{place}codes": codes, f"{place}absmax": absmax}


# Checkpoints that bitsandbytes has quantised

# The tensors that it adds for X.weight: X.weight.absmax and others in 4 bits, X.SCB in 8 bits.
PARTS = re.compile(
    r"^(.+\.)(weight\.(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\.bitsandbytes__nf4"
    r"|SCB|weight_format)$"
)


def stored_kind(config: dict[str, Any]) -> str | None:
    """nf4 or int8 if this `config.json` says that bitsandbytes stored the weights so, else None."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes":
        return None
    is_nf4 = found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4"
    return "nf4" if is_nf4 else "int8" if found.get("load_in_8bit") else None


def stored_parts(names: Iterable[str]) -> dict[str, str]:
    """The tensors that bitsandbytes added -> the weight that each belongs to."""
    return {m[0]: f"{m[1]}weight" for m in map(PARTS.match, names) if m}


def from_bitsandbytes(model: nn.Module, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes and absmax of the weight `name`, by name, from what bitsandbytes stored.

    With double quantisation the scales are codes themselves, which are resolved here. Raises
    BadCheckpoint if a part is missing or does not have the shape of the others.
    """
    place = name.removesuffix("weight")
    layer = model.get_submodule(place[:-1])
    try:
        if layer.kind == "int8":
            scales = parts[f"{place}SCB"].float()
        else:
            scales = parts[f"{name}.absmax"]
            if (outer := parts.get(f"{name}.nested_absmax")) is not None:
                state = bytes(parts[f"{name}.quant_state.bitsandbytes__nf4"].tolist())
                state = json.loads(state)
                values = parts[f"{name}.nested_quant_map"][scales.int()]  # (b,)
                outer = outer.repeat_interleave(state["nested_blocksize"])[: len(values)]  # (b,)
                scales = values * outer + state["nested_offset"]
        codes = parts[name].view(layer.codes.shape)
        kinds = (codes.dtype, scales.dtype, *scales.shape)
        if kinds != (layer.codes.dtype, torch.float32, len(layer.absmax)):
            raise ValueError(f"its codes are {kinds[0]}, its scales {kinds[1:]}")
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{name} is not {layer.kind} of bitsandbytes in blocks of {layer.block}: {error}",
            "give the checkpoint that it was quantized from, with --base-precision",
        ) from error
    return {f"{place}codes": codes, f"{place}absmax": scales}
