"""Recomputation changes no bit, and the memory that a run needs is known before its weights are read."""

import pytest
import torch

from data.batches import Schedule
from lora.inject import LoRAConfig, adapters, inject, trained_parameters
from model.compile import compile_layers
from model.qwen2 import Layer, Qwen2, Qwen2Config
from tests import toys
from train import forward_backward

CONFIG = Qwen2Config(32, 48, 3, 4, 2, 64)
LORAS = {
    "attention": LoRAConfig(r=4),
    "all layers": LoRAConfig(r=4, targets=("all-linear",)),
    "DoRA": LoRAConfig(r=4, dora=True),
}


def lively_model(lora: LoRAConfig) -> Qwen2:
    """A model with adapters that change its output; its parameters are the same each time."""
    torch.manual_seed(0)
    model = Qwen2(CONFIG).requires_grad_(False)
    inject(model, lora)
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model.train()


def results(model: Qwen2) -> dict[str, torch.Tensor]:
    """Sums, and the gradient of each trained parameter, over a step of three micro-batches."""
    schedule = Schedule(toys.some_examples(6), 2, grad_accum=3, epochs=1, seed=0)
    step, scaler = schedule.step(0), torch.amp.GradScaler("cpu", enabled=False)
    parts = [forward_backward(model, m, step, seed=0, scaler=scaler) for m in step.micro_batches]
    return {"sums": sum(parts)} | {n: p.grad for n, p in trained_parameters(model).items()}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_recomputing_layers_changes_no_bit_of_loss_and_gradients(lora, compiled, monkeypatch):
    torch._dynamo.reset()
    calls, forward = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    found = []
    for recompute in (False, True):
        model = lively_model(lora)
        model.model.checkpoint_activations = recompute
        if compiled:
            compile_layers(model, backend="aot_eager")
        calls.clear()
        found.append(results(model))
        assert len(calls) == 3 * CONFIG.num_hidden_layers * (1 + recompute)
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and all(p.abs().sum() > 0 for p in plain.values())
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
