"""How often the host waits for the device, held by running the real loops on PyTorch's `meta`
device: it has shapes and no numbers, so whoever wants a number must ask for it here.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data.batches import Schedule, flat_batch
from data.encode import Example
from evaluation.teacher_forced import teacher_forced
from lora.inject import LoRAConfig, inject
from model.attention import FlatAttention
from model.qwen2 import Qwen2, Qwen2Config
from run.distributed import World
from run.stopping import Stop

META = torch.device("meta")
SIZES = Qwen2Config(32, 48, 2, 4, 2, 64)
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts reads of the device's numbers, and answers them with ones."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func is aten._to_copy.default and str(kwargs.get("device")) == "cpu"
        if (to_host or func is aten._local_scalar_dense.default) and args[0].is_meta:
            self.count += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype")) if to_host else 1.0
        assert func is not aten.nonzero.default, "a size that depends on the device's numbers"
        return func(*args, **kwargs)


@pytest.fixture
def model():
    with META:
        model = Qwen2(SIZES)
    inject(model, LoRAConfig())
    return model


def examples(count):
    tokens = [torch.arange(9 + i).numpy() for i in range(count)]
    return [Example(row, t, t) for row, t in enumerate(tokens)]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_waits_for_the_device_once(monkeypatch, tmp_path, model, scaled):
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)  # there is none for meta
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    monkeypatch.setattr(train, "validate", lambda *_: None)  # as if asked to leave, at the end
    monkeypatch.setattr(train, "save_checkpoint", lambda *_, **__: None)
    schedule = Schedule(examples(12), batch_size=2, grad_accum=2, epochs=1, seed=0)
    with Stop(None) as stop, Waits() as waits:
        train.train(
            train.TrainConfig(epochs=1, evals_per_epoch=1), schedule, None,
            model=model, lora=LoRAConfig(), checkpoint=None, scaled=scaled,
            device=META, world=World(), out=tmp_path, stop=stop,
        )  # fmt: skip
    assert waits.count == schedule.total_steps == 3


def test_a_validation_waits_for_the_device_once(model):
    with Waits() as waits:
        teacher_forced(model, examples(6), 2, quiet=True)
    assert waits.count == 1


def test_what_a_gpu_is_given_it_may_fetch_by_itself(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.data_ptr()) or x)

    def given(x, *to_what, non_blocking=False):
        assert torch.device(to_what[0]).type != "cuda" or non_blocking and x.data_ptr() in pinned
        return x

    monkeypatch.setattr(torch.Tensor, "to", given)
    flat_batch(examples(3), "cuda")
    FlatAttention([3, 4], torch.device("cuda"))
    assert len(pinned) == 2
