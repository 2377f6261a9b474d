"""How often the host waits for the device, counted in the real loops on PyTorch's `meta` device.

Tensors there have shapes but no values, so every read of a value must pass through `Waits`.
"""

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data.batches import Schedule, flat_batch
from data.encode import Example
from evaluation.teacher_forced import teacher_forced
from lora.inject import LoRAConfig, inject
from model import attention
from model.attention import FlatAttention, attend_padded
from model.cache import send
from model.generate import Decoding, decode
from model.load import holds_nan_or_infinity
from model.qwen2 import Qwen2, Qwen2Config
from run.base import Base
from run.distributed import World
from run.folder import Run
from run.stopping import Stop

META = torch.device("meta")
SIZES = Qwen2Config(32, 48, 2, 4, 2, 64)
aten = torch.ops.aten
# The later ones are those of inference mode, which does not break them up.
COPIES = (aten._to_copy.default, aten.to.dtype_layout)
SCALARS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)


class Waits(TorchDispatchMode):
    """Counts the reads of values from the device, and answers them with ones."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func in COPIES and str(kwargs.get("device")) == "cpu"
        if (to_host or func in SCALARS) and args[0].is_meta:
            self.count += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype")) if to_host else 1.0
        assert func is not aten.nonzero.default, "a shape that depends on values on the device"
        return func(*args, **kwargs)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(attention, "working_kernel", lambda *_: attend_padded)
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
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)  # GradScaler does not support meta
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    first = {"val_loss": math.nan, "val_token_accuracy": 0.0}  # never the best: nothing is written
    # The last validation stops the run, as if that were requested.
    monkeypatch.setattr(
        train, "validate", lambda _, progress, *__: None if progress.step else first
    )
    monkeypatch.setattr(train, "save_checkpoint", lambda *_, **__: None)
    schedule = Schedule(examples(12), batch_size=2, grad_accum=2, epochs=1, seed=0)
    config = train.TrainConfig(epochs=1, evals_per_epoch=1)
    data = train.Data(schedule, validation={}, held_out=[], answerable=[], judge=None)
    base = Base("", None, tmp_path, SIZES, None, (), META, "fp16" if scaled else "fp32", "")
    with Stop(None) as stop, Waits() as waits:
        train.train(config, data, base, model, Run(tmp_path), World(), stop)
    assert waits.count == schedule.total_steps == 3


def test_a_validation_waits_for_the_device_once(model):
    with Waits() as waits:
        teacher_forced(model, examples(6), 2)
    assert waits.count == 1


def test_a_decoding_step_waits_for_the_device_once(model):
    prompts = [[5, 6, 7 + i] for i in range(6)]
    with Waits() as waits:
        steps = list(decode(model.eval(), prompts, Decoding(4, (), vocab_size=64, batch_size=4)))
    assert waits.count == len(steps) > 4, "one read of the tokens a step"


def test_loading_reads_once_whether_all_tensors_are_finite():
    with Waits() as waits:
        flags = [holds_nan_or_infinity(torch.empty(3, device=META)) for _ in range(4)]
        assert waits.count == 0
        torch.stack(flags).tolist()
    assert waits.count == 1


def test_tensors_are_copied_to_a_gpu_asynchronously(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.data_ptr()) or x)

    def fake_to(x, device, non_blocking=False):
        assert torch.device(device).type != "cuda" or non_blocking and x.data_ptr() in pinned
        return x

    monkeypatch.setattr(torch.Tensor, "to", fake_to)
    flat_batch(examples(3), "cuda")
    FlatAttention([3, 4], torch.device("cuda"))
    send([3, 4], torch.device("cuda"))
    assert len(pinned) == 3
