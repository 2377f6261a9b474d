"""The Triton kernel of dropout computes what the plain form does, bit for bit.

Triton has no builds for CPUs in the tests, so a stand-in for its language runs the kernel's own
source, one program after the other, on tensors.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lora import fused_dropout
from lora.dropout import KeyedDropout, fused_works, token_keys


class Pointer:
    """The address of an element of a flat tensor, or of several."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset):
        return Pointer(self.tensor, self.offset + offset)


class Index(int):
    def to(self, _):
        return self


def load(pointer, mask=None, other=0):
    flat = pointer.tensor.view(-1)
    if mask is None:
        return flat[pointer.offset]
    return torch.where(mask, flat[torch.where(mask, pointer.offset, 0)], other)


def store(pointer, value, mask):
    flat = pointer.tensor.view(-1)
    flat[pointer.offset[mask]] = value[mask].to(flat.dtype)


class Kernel:
    """`kernel[grid](...)` calls the kernel's function once for each program of the grid."""

    def __init__(self, function, language):
        self.function, self.language = function, language

    def __getitem__(self, grid):
        def launch(*arguments):
            pointers = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in itertools.product(*map(range, grid)):
                self.language.program_id = lambda axis, program=program: Index(program[axis])
                self.function(*pointers)

        return launch


@pytest.fixture
def triton(monkeypatch):
    if fused_dropout.triton is not None:
        pytest.skip("Triton is installed: fused_works compares the forms on the device")
    language = SimpleNamespace(
        arange=torch.arange, where=torch.where, load=load, store=store, int64=None,
        float32=torch.float32,
    )  # fmt: skip
    monkeypatch.setattr(fused_dropout, "tl", language, raising=False)
    monkeypatch.setattr(fused_dropout, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    monkeypatch.setattr(fused_dropout, "drop", Kernel(fused_dropout.drop, language))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 7, 1024, 1030])
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_the_kernel_gives_the_values_and_gradients_of_the_plain_form_bit_for_bit(
    triton, dtype, channels, p
):
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(3, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = KeyedDropout(p, channels, layer=5)
    layer.keys = token_keys(7, 2, torch.tensor([4, 4, 9]), torch.tensor([0, 1, 0]))
    found = []
    for layer.fused in (False, True):
        y = layer(x.requires_grad_())
        found += [y, *torch.autograd.grad(y, x, grad)]
    as_bits = [t.detach().contiguous().view(torch.uint8) for t in found]
    assert torch.equal(as_bits[0], as_bits[2]) and torch.equal(as_bits[1], as_bits[3])
    assert channels < 1000 or 0 < (found[2] != 0).sum() < found[2].numel()


def test_nothing_but_a_gpu_takes_the_kernel(triton):
    assert not fused_works(torch.device("cpu")) and not fused_works(torch.device("meta"))
