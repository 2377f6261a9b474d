"""How many kernels a training step and a decoding step launch, counted on PyTorch's `meta` device.

An operator that is neither a view nor an allocation launches one kernel on a GPU, or a few.
`benchmarks/launches.py` counts the kernels themselves, which needs PyTorch for CUDA.
"""

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import Schedule
from lora import fused_dropout
from lora.inject import LoRAConfig, inject
from model import cache, functions, fused, loss
from model.attention import FlatAttention, attend_each
from model.qwen2 import Qwen2, Qwen2Config
from tests import toys
from tests.triton_stand_in import TRITON
from train import forward_backward

META = torch.device("meta")
WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
                  "_unsafe_view", "_reshape_alias", "detach", "lift_fresh")  # fmt: skip

# Lower these when a change saves some; 24 layers were 5,223 kernels with all else on an H100.
OF_A_DECODED_LAYER = 42  # without adapters
OF_THE_REST_OF_A_DECODED_TOKEN = 26
OF_A_LAYER = 221
OF_THE_REST = 78  # embedding, rotary table, dropout keys, casts, last norm, loss, offsets
OF_A_LAYER_WITH_TRITON = 109
OF_THE_REST_WITH_TRITON = 60


class Kernels(TorchDispatchMode):
    """Counts the operators on `meta` that are neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        first = out[0] if isinstance(out, tuple | list) and out else out
        on_device = isinstance(first, torch.Tensor) and first.is_meta
        name = func._schema.name.removeprefix("aten::")
        self.count += on_device and not func.is_view and name not in WITHOUT_KERNEL
        return out


def kernels_of_a_step(layers: int, dropout: float = 0.1) -> int:
    """Those of a forward and backward pass over one example."""
    with META:
        model = Qwen2(Qwen2Config(32, 48, layers, 4, 2, 64)).bfloat16()
    inject(model, LoRAConfig(dropout=dropout))
    step = Schedule([toys.example(0, 9, 5)], 1, grad_accum=1, epochs=1, seed=0).step(0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Kernels() as kernels:
        forward_backward(model.train(), step.micro_batches[0], step, seed=0, scaler=scaler)
    return kernels.count


def test_a_layer_of_a_training_step_launches_no_more_kernels_than_it_should(monkeypatch):
    each = lambda self, _, *qkv: attend_each(*qkv, self.lengths)  # noqa: E731
    monkeypatch.setattr(FlatAttention, "__call__", each)  # `meta` cannot try other kernels
    one, two, three = map(kernels_of_a_step, (1, 2, 3))
    assert three - two == two - one <= OF_A_LAYER
    assert 2 * one - two <= OF_THE_REST


class Launches:
    """Replaces all Triton kernels: counts their launches, and executes nothing."""

    def __init__(self, monkeypatch):
        self.count = 0
        names = [(fused, name) for name in vars(fused) if name.endswith("_kernel")]
        for module, name in (*names, (fused_dropout, "drop")):
            monkeypatch.setattr(module, name, self)
            monkeypatch.setattr(module, "triton", TRITON)
        for module in (functions, loss):
            monkeypatch.setattr(module, "takes_kernels", lambda *_: True)
        verbs = importlib.import_module("lora.inject")
        monkeypatch.setattr(verbs, "fused_works", lambda device: True)

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        self.count += 1


def test_with_triton_a_layer_of_a_training_step_launches_half_as_many_kernels(monkeypatch):
    each = lambda self, _, *qkv: attend_each(*qkv, self.lengths)  # noqa: E731
    monkeypatch.setattr(FlatAttention, "__call__", each)
    launches, counts = Launches(monkeypatch), []
    for layers in (1, 2, 3):
        launches.count = 0
        counts.append(kernels_of_a_step(layers) + launches.count)
    one, two, three = counts
    assert three - two == two - one <= OF_A_LAYER_WITH_TRITON
    assert 2 * one - two <= OF_THE_REST_WITH_TRITON


def kernels_of_a_decoding_step(monkeypatch, layers: int, prompts: int) -> int:
    """Those of one token of all `prompts`, with attention as one kernel."""
    each = lambda self, _, *qkv: attend_each(*qkv, self.lengths)  # noqa: E731
    monkeypatch.setattr(FlatAttention, "__call__", each)
    monkeypatch.setattr(cache, "attend_slots", lambda q, k, v, mask: q + q)
    with META:
        model = Qwen2(Qwen2Config(32, 48, layers, 4, 2, 64))
    with torch.inference_mode():
        decoded = cache.KVCache(model, prompts, room=4)
        decoded.prefill(list(range(prompts)), [[5, 6, 7]] * prompts)
        with Kernels() as kernels:
            decoded.advance([5] * prompts)
    return kernels.count


def test_a_decoding_step_launches_no_more_kernels_for_more_sequences(monkeypatch):
    one, two, three = (kernels_of_a_decoding_step(monkeypatch, n, 1) for n in (1, 2, 3))
    assert three - two == two - one <= OF_A_DECODED_LAYER
    assert 2 * one - two <= OF_THE_REST_OF_A_DECODED_TOKEN
    assert kernels_of_a_decoding_step(monkeypatch, 3, 100) == three
