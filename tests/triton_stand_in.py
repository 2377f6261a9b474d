"""A stand-in for Triton, which has no builds for CPUs: it runs a kernel's own source on tensors.

One program runs after the other, on tensors for blocks of values and addresses.
"""

import itertools
from types import SimpleNamespace

import torch


class Pointer:
    """The address of an element of a flat tensor, or of several."""

    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

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


def store(pointer, value, mask=...):
    flat, offset = pointer.tensor.view(-1), torch.as_tensor(pointer.offset)
    flat[offset[mask]] = value[mask].to(flat.dtype)


class Kernel:
    """`kernel[grid](...)` calls the kernel's function once for each program of the grid."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=4, **constants):
            pointers = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in itertools.product(*map(range, grid)):
                LANGUAGE.program_id = lambda axis, program=program: Index(program[axis])
                self.function(*pointers, **constants)

        return launch


LANGUAGE = SimpleNamespace(
    arange=torch.arange, where=torch.where, exp=torch.exp, log=torch.log, sqrt=torch.sqrt,
    maximum=torch.maximum, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    load=load, store=store, int64=None, float32=torch.float32, constexpr=int,
)  # fmt: skip
TRITON = SimpleNamespace(
    cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
)


def replace_triton(monkeypatch, module, *kernels: str) -> None:
    """Let the functions of `module` launch its `kernels` through the stand-in."""
    monkeypatch.setattr(module, "tl", LANGUAGE, raising=False)
    monkeypatch.setattr(module, "triton", TRITON)
    for name in kernels:
        monkeypatch.setattr(module, name, Kernel(getattr(module, name)))
