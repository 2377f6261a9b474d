"""Recomputation changes no bit; the memory of a run is known before its weights are read."""

import pytest
import torch

from data.batches import Schedule, Step, flat_batch
from lora.inject import LoRAConfig, adapters, inject, seed_dropout, trained_parameters
from model.compile import compile_layers
from model.qwen2 import Layer, Qwen2, Qwen2Config
from run.memory import MemoryModel
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


# The estimate


META = torch.device("meta")
KEPT = {
    "attention": LoRAConfig(r=4),
    "without dropout": LoRAConfig(r=4, dropout=0.0),
    "all layers": LoRAConfig(r=4, targets=("all-linear",)),
    "all layers, without dropout": LoRAConfig(r=4, targets=("all-linear",), dropout=0.0),
    "one layer": LoRAConfig(r=4, targets=("layers.1.self_attn.q_proj",)),
    "DoRA": LoRAConfig(r=4, dora=True),
}


def memory_model(config: Qwen2Config, lora: LoRAConfig, device: str = "cpu") -> MemoryModel:
    with META:
        return MemoryModel(Qwen2(config), lora, torch.bfloat16, torch.device(device))


def kept_bytes(model: Qwen2, step: Step) -> int:
    """Bytes of the tensors that autograd keeps for a micro-batch, without the model's own."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        if x.data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    batch = flat_batch(step.micro_batches[0])
    seed_dropout(model, seed=0, epoch=0, row_ids=batch.row_ids, positions=batch.positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(batch.tokens, batch.positions, batch.lengths)
    del hidden
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("qwen3", [False, True], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("lora", KEPT.values(), ids=KEPT.keys())
def test_the_estimate_knows_what_autograd_keeps_of_a_layer(lora, qwen3):
    step = Schedule([toys.example(0, 200, 5)], 1, grad_accum=1, epochs=1, seed=0).step(0)
    found = []
    for layers in (2, 3):
        config = Qwen2Config(64, 160, layers, 4, 2, 64, head_dim=32 if qwen3 else None)
        model = Qwen2(config).to(torch.bfloat16).requires_grad_(False)
        inject(model, lora)
        model.model.embed_tokens.requires_grad_()  # so that layers below the first adapter count
        estimate = memory_model(config, lora).of_a_step(200, 5, recompute=False).activations
        found.append((kept_bytes(model.train(), step), estimate))
    (kept_2, estimate_2), (kept_3, estimate_3) = found
    assert estimate_3 - estimate_2 == pytest.approx(kept_3 - kept_2, rel=0.02)
