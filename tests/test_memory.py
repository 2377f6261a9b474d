"""Recomputation changes no bit; the memory of a run is known before its weights are read."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import train
from data.batches import Schedule, Step, flat_batch
from errors import BadOption
from lora.inject import LoRAConfig, adapters, inject, seed_dropout, trained_parameters
from model import attention, qwen2
from model.compile import compile_layers
from model.load import load_model
from model.qwen2 import Layer, Qwen2, Qwen2Config
from run import memory as run_memory
from run.base import Base
from run.memory import MemoryModel, check_memory, largest_micro_batch
from run.options import parse
from tests import toys
from tests.campaign.harness import finish
from tests.campaign.harness import results as results_of_run
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


@pytest.mark.parametrize("lora, compiled", [*zip(LORAS, [False] * 3), ("attention", True)])
def test_recomputing_layers_changes_no_bit_of_loss_and_gradients(lora, compiled, monkeypatch):
    torch._dynamo.reset()
    calls, forward = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    found = []
    for recompute in (False, True):
        model = lively_model(LORAS[lora])
        model.model.checkpoint_activations = recompute
        if compiled:
            compile_layers(model, backend="aot_eager")
        calls.clear()
        found.append(results(model))
        assert len(calls) == 3 * CONFIG.num_hidden_layers * (1 + recompute)
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and all(p.abs().sum() > 0 for p in plain.values())
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_kernel_may_be_tried_inside_a_layer_that_is_recomputed():
    attention.working_kernel.cache_clear()
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32)
    q, k, v = (torch.randn(8, 2, 16).requires_grad_() for _ in range(3))

    def attend(q, k, v):
        chosen = attention.working_kernel(q.device, q.dtype, q.shape[1:], k.shape[1:])
        return chosen(q, k, v, offsets, 5)

    y = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
    y.sum().backward()  # CheckpointError if the first call kept more than the second
    assert attention.working_kernel.cache_info().misses == 1


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
        config = Qwen2Config(64, 160, layers, 4, 2, 256, head_dim=32 if qwen3 else None)
        model = Qwen2(config).to(torch.bfloat16).requires_grad_(False)
        inject(model, lora)
        model.model.embed_tokens.requires_grad_()  # so that layers below the first adapter count
        estimate = memory_model(config, lora).of_a_step(200, 5, recompute=False).activations
        found.append((kept_bytes(model.train(), step), estimate))
    (kept_2, estimate_2), (kept_3, estimate_3) = found
    assert estimate_3 - estimate_2 == pytest.approx(kept_3 - kept_2, rel=0.02)


def schedule_of(lengths: list[int], batch_size: int, grad_accum: int = 1) -> Schedule:
    examples = [toys.example(i, n, n // 2) for i, n in enumerate(lengths)]
    return Schedule(examples, batch_size, grad_accum, epochs=1, seed=0)


def test_the_largest_micro_batch_is_that_of_the_whole_schedule():
    assert largest_micro_batch(schedule_of([3, 3, 9, 3], 1)) == (9, 4)
    assert largest_micro_batch(schedule_of([4] * 8, 4)) == (16, 8)
    assert largest_micro_batch(schedule_of([4] * 8, 4), halved=1) == (8, 4)


BIG = Qwen2Config(1024, 4096, 8, 8, 2, 1000)
LENGTHS = [512] * 32


@pytest.fixture
def card(monkeypatch):
    """Returns the memory model of a GPU that has the given free memory, in GB."""

    def has_free(gb: float) -> MemoryModel:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(run_memory, "free_memory_gb", lambda device: gb)
        monkeypatch.setattr(run_memory, "describe", lambda device: "a card")
        return memory_model(BIG, LoRAConfig(), "cuda")

    return has_free


def test_a_run_that_cannot_fit_is_refused_with_flags_that_make_it_fit(card):
    schedule, memory = schedule_of(LENGTHS, 16), card(1.0)
    with pytest.raises(BadOption, match="a card has 1.0 GB free") as refused:
        check_memory(memory, schedule, recompute=False)
    flags = refused.value.remedy.removeprefix("use ").split(" or ")
    assert [f.partition(" ")[0] for f in flags] == ["--batch-size", "--checkpoint-activations"]
    for text in flags:
        options = parse(train.TrainConfig, text.split(), "")
        assert options.batch_size * options.grad_accum == 16
        split = schedule_of(LENGTHS, options.batch_size, options.grad_accum)
        said = check_memory(memory, split, recompute=options.checkpoint_activations)
        assert "of 1.0 GB free" in said and "may not" not in said
        twice = largest_micro_batch(schedule_of(LENGTHS, 2 * options.batch_size))
        assert memory.of_a_step(*twice, recompute=options.checkpoint_activations).gb > 1.0


def test_a_run_is_refused_only_if_it_cannot_fit_in_spite_of_the_estimates_error(card):
    schedule = schedule_of(LENGTHS, 16)
    need = card(1.0).of_a_step(*largest_micro_batch(schedule), recompute=False).gb
    assert "GB free, for" in check_memory(card(need), schedule, recompute=False)
    said = check_memory(card(need * 0.95), schedule, recompute=False)
    assert "memory may not suffice" in said and "use --batch-size 8 --grad-accum 2" in said
    with pytest.raises(BadOption):
        check_memory(card(need * 0.89), schedule, recompute=False)


def test_compiled_layers_keep_each_dropped_input_and_are_never_advised_to_be_recomputed(card):
    memory, tokens = card(1.0), sum(LENGTHS)
    kept = [
        replace(memory, compiled=c).of_a_step(tokens, 9, recompute=False) for c in (False, True)
    ]
    inputs = BIG.num_hidden_layers * 3 * BIG.hidden_size * 2  # of k_proj, v_proj and o_proj, bf16
    assert kept[1].activations - kept[0].activations == tokens * inputs
    for lora in (LoRAConfig(dropout=0.0), LoRAConfig(dora=True)):  # kept by plain layers as well
        plain = replace(memory, lora=lora)
        assert plain.layer_bytes() == replace(plain, compiled=True).layer_bytes()
    with pytest.raises(BadOption) as refused:
        check_memory(replace(memory, compiled=True), schedule_of(LENGTHS, 16), recompute=False)
    assert "--batch-size" in refused.value.remedy
    assert "--checkpoint-activations" not in refused.value.remedy


def test_on_a_cpu_the_estimate_is_only_printed(monkeypatch):
    monkeypatch.setattr(run_memory, "free_memory_gb", lambda device: 0.1)
    memory = memory_model(BIG, LoRAConfig())
    said = check_memory(memory, schedule_of(LENGTHS, 16), recompute=False)
    assert "memory may not suffice" in said and "smaller base" in said
    monkeypatch.setattr(run_memory, "free_memory_gb", lambda device: float("nan"))
    assert "may not" not in check_memory(memory, schedule_of(LENGTHS, 16), recompute=False)


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    checkpoint, arithmetic, tmp_path, monkeypatch, card
):
    card(0.001)
    gpu = torch.device("cuda")
    monkeypatch.setattr(train, "MemoryModel", lambda *found: MemoryModel(*found[:3], gpu))
    monkeypatch.setattr(Base, "load", lambda self: pytest.fail("weights were read"))
    flags = ["--model", checkpoint, "--data", arithmetic, "--out", tmp_path / "run", "--dry-run"]
    with pytest.raises(BadOption, match="needs about"):
        train.main([*map(str, flags), "--device", "cpu", "--precision", "fp32"])
    assert not (tmp_path / "run").exists()


def test_the_estimate_is_printed_before_training_and_by_a_dry_run(
    checkpoint, arithmetic, tmp_path, capsys
):
    flags = ["--model", checkpoint, "--data", arithmetic, "--out", tmp_path / "run",
             "--device", "cpu", "--precision", "fp32"]  # fmt: skip
    for more in (["--dry-run"], ["--max-steps", "1"]):
        assert train.main([*map(str, flags), *more]) == 0
        assert "\n            weights 0.00, adapters" in capsys.readouterr().out
    assert "peak_memory" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_layers_are_recomputed_in_training_and_only_there(
    checkpoint, arithmetic, tmp_path, monkeypatch
):
    calls = []
    each = lambda layer, *inputs: calls.append(torch.is_grad_enabled()) or layer(*inputs)  # noqa: E731
    monkeypatch.setattr(qwen2, "recomputed", each)
    flags = ["--model", checkpoint, "--data", arithmetic, "--out", tmp_path / "run",
             "--device", "cpu", "--precision", "fp32", "--max-steps", "1"]  # fmt: skip
    assert train.main([*map(str, flags), "--checkpoint-activations"]) == 0
    assert calls == [True, True]  # the two layers of one step, and of no validation


def test_a_run_resumes_with_recomputation_and_ends_with_the_same_bits(short, half, expected):
    finish([*short, "--checkpoint-activations"], half)
    assert results_of_run(half) == expected


@pytest.mark.parametrize("lora", KEPT.values(), ids=KEPT.keys())
def test_weights_adapters_gradients_and_moments_are_estimated_to_the_byte(lora):
    config = Qwen2Config(64, 160, 3, 4, 2, 256, tie_word_embeddings=False)
    model = Qwen2(config).to(torch.bfloat16).requires_grad_(False)
    weights = sum(p.nbytes for p in model.parameters())
    inject(model.train(), lora)
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters)
    results(model)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    adapters = sum(x.nbytes for x in (*parameters, *(p.grad for p in parameters), *moments))
    estimate = memory_model(config, lora).of_a_step(9, 4, recompute=False)
    assert (estimate.weights, estimate.adapters) == (weights, adapters)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_within_ten_percent_of_the_peak_of_a_gpu(device, recompute):
    if device.type != "cuda":
        pytest.skip("the peak is that of CUDA's allocator")
    config = Qwen2Config(896, 4864, 6, 14, 2, 151936)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with device:
        model = Qwen2(config).to(torch.bfloat16).requires_grad_(False)
    inject(model.train(), LoRAConfig())
    model.model.checkpoint_activations = recompute
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), fused=True)
    schedule, scaler = schedule_of([300] * 12, 12), torch.amp.GradScaler("cuda", enabled=False)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step = schedule.step(0)
        forward_backward(model, step.micro_batches[0], step, seed=0, scaler=scaler)
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    with META:
        memory = MemoryModel(Qwen2(config), LoRAConfig(), torch.bfloat16, device)
    tokens, supervised = largest_micro_batch(schedule)
    estimate = memory.of_a_step(tokens, supervised, recompute=recompute)
    assert estimate.gb * 1e9 == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_the_base_is_estimated_to_the_byte_as_it_is_held(checkpoint, kind):
    model = load_model(checkpoint, dtype=torch.bfloat16, base_precision=kind)
    network, device = Qwen2(model.config), torch.device("cpu")
    estimate = MemoryModel(network, LoRAConfig(), torch.bfloat16, device, kind).weight_bytes()
    assert estimate == sum(p.nbytes for p in model.parameters())
    spread = MemoryModel(network, LoRAConfig(), torch.bfloat16, device, kind, parts=4)
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    gathered = 2 * layers / len(model.model.layers)
    assert spread.weight_bytes() == estimate - layers * 3 / 4 + gathered


def test_where_nothing_else_is_enough_a_base_in_nf4_is_offered(card):
    schedule, single = schedule_of(LENGTHS, 16), largest_micro_batch(schedule_of(LENGTHS, 1))
    whole, nf4 = (
        replace(card(1.0), base_precision=kind).of_a_step(*single, recompute=True).gb
        for kind in (None, "nf4")
    )
    with pytest.raises(BadOption) as refused:
        check_memory(card((whole + nf4) / 2), schedule, recompute=False)
    assert refused.value.remedy.startswith("use --base-precision nf4")
