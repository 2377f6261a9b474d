"""What an adapter starts from, other than `layer.py`'s uniform A and zero B.

gaussian    A is normal, its standard deviation 1/r, and B is zero
pissa       A and B hold the base's r largest singular directions, and leave the base the residual:
            those are trained first which matter most (arXiv:2404.02948)

A PiSSA adapter means nothing on the base itself: W + scaling * (B A - B0 A0) is what it has made of
W, so it is stored as that, a plain adapter of twice the rank, which every program can load, merge
and switch off. In bf16 this differs from what was trained by the residual's rounding.

Legend: r rank, in and out the base's sizes. The numbers are peft 0.21's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.layer import LoRALinear, generator_of

INITS = ("kaiming", "gaussian", "pissa")


@dataclass(frozen=True)
class TakenOut:
    """What `pissa` took out of a layer's own `weight`: `A (r, in)` and `B (out, r)`."""

    weight: Tensor
    A: Tensor
    B: Tensor


@torch.no_grad()
def start(layer: LoRALinear, init: str, *, seed: int, index: int) -> None:
    """Give a fresh adapter the first values called `init`; it has kaiming's already."""
    assert init in INITS, f"init {init!r} is not one of {INITS}"
    if init == "gaussian":
        A = torch.empty(layer.lora_A.shape)
        layer.lora_A.copy_(A.normal_(0, 1 / len(A), generator=generator_of(seed, index)))
    elif init == "pissa":
        pissa(layer)


@torch.no_grad()
def pissa(layer: LoRALinear) -> None:
    """Move the r largest singular directions of the base's weight into the adapter.

    A function of the weight alone: of each direction's two signs, that is taken which makes the
    largest number in A positive, so that all ranks, and PEFT but for signs, start alike.
    """
    weight, r = layer.base_layer.weight.data, len(layer.lora_A)
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]  # (out, r), (r,), (r, in)
    signs = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()  # (r, 1)
    roots = (S / layer.scaling).sqrt()
    layer.lora_A.copy_(roots[:, None] * signs * Vh)
    layer.lora_B.copy_(U * signs.t() * roots)
    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    layer.taken_out = TakenOut(weight, A, B)
    layer.base_layer.weight.data = (weight.float() - layer.scaling * (B @ A)).to(weight.dtype)


def plain_form(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """(A, B) of what the adapter has made of its base's own weight: of rank 2r after `pissa`."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    if layer.taken_out:
        A = torch.cat((A, layer.taken_out.A))  # (2r, in)
        B = torch.cat((B, -layer.taken_out.B), dim=1)  # (out, 2r)
    return A, B


def plain_growth(init: str, rslora: bool) -> tuple[int, float]:
    """By what the rank and alpha of the plain form are larger: the scaling is to stay the same."""
    if init != "pissa":
        return 1, 1
    return 2, math.sqrt(2) if rslora else 2
