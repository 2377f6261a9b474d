"""Compiled layers give the results of plain ones, and one graph serves all micro-batches."""

import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import train
from errors import BadOption
from lora.inject import (
    LoRAConfig,
    adapters,
    disabled,
    inject,
    merge,
    seed_dropout,
    trained_parameters,
    unmerge,
)
from model import functions
from model.compile import compile_layers
from model.generate import Decoding, generate
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config
from run import compiling
from run.compiling import (
    check_compiler,
    check_execution,
    compiler_problem,
    gradient_error,
)
from tests.toys import read_log

LENGTHS = ([5, 4], [7, 2, 9], [4], [11, 12, 1, 1], [2, 2], [30], [6, 5, 4, 3, 2, 1], [2, 1],
           [170, 3], [400])  # fmt: skip
CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def reset_compiler():
    torch._dynamo.reset()
    counters.clear()


def lively_model(layers, targets=("attention",)):
    """A model with adapters that change its output; its parameters are the same each time."""
    torch.manual_seed(0)
    model = Qwen2(Qwen2Config(32, 48, layers, 4, 2, 64))
    inject(model, LoRAConfig(r=4, dropout=0.1, targets=targets))
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model.train()


def batch(lengths):
    """(tokens, positions, row_ids), (T,) each."""
    row_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return (7 * row_ids + 5 * positions * positions) % 64, positions, row_ids


def step(model, lengths):
    """Nats, and the gradient of each adapter weight."""
    tokens, positions, row_ids = batch(lengths)
    seed_dropout(model, seed=0, epoch=0, row_ids=row_ids, positions=positions)
    hidden = model(tokens, positions, lengths)
    nats, _ = linear_cross_entropy(hidden, model.head_weight, tokens.roll(-1))
    return [nats, *torch.autograd.grad(nats, list(trained_parameters(model).values()))]


def assert_same(ours, theirs):
    """Equal up to rounding: fused kernels sum in another order."""
    for x, y in zip(ours, theirs, strict=True):
        assert torch.is_tensor(x) or x == y
        assert not torch.is_tensor(x) or (x - y).norm() <= 1e-5 * y.norm() + 1e-7


def hidden(model, lengths):
    """Hidden states (T, C) without gradients and dropout."""
    model.eval()
    with torch.no_grad():
        out = model(*batch(lengths)[:2], lengths)
    model.train()
    return out


@needs_compiler
def test_compiled_loss_and_gradients_equal_the_plain_ones():
    plain, fast = (lively_model(1, ("q_proj", "down_proj")) for _ in range(2))
    compile_layers(fast)
    check_compiler(CPU, torch.float32, dora=False)
    for lengths in LENGTHS:
        assert_same(step(fast, lengths), step(plain, lengths))


def test_micro_batches_of_ten_different_lengths_share_one_graph_per_part():
    model = lively_model(3)
    compile_layers(model, backend="eager")
    for lengths in LENGTHS:
        step(model, lengths)
    # Two graphs for the first layer, whose input needs no gradient, and two for the other layers.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    for lengths in LENGTHS:
        hidden(model, lengths)
    assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]


def test_a_compiled_model_can_be_disabled_merged_generated_from_and_trained():
    plain, fast = lively_model(2), lively_model(2)
    compile_layers(fast, backend="eager")
    prompts, decoding = [[1, 2, 3], [4] * 9], Decoding(6, eos_ids=(63,), vocab_size=64)
    found = []
    for model in (plain, fast):
        found.append([*step(model, [3, 9]), hidden(model, [3, 9])])
        with disabled(model):
            found[-1].append(hidden(model, [3, 9]))
        merge(model)
        found[-1].append(hidden(model, [3, 9]))
        unmerge(model)
        model.eval()
        found[-1] += [d.tokens for d in generate(model, prompts, decoding)]
        found[-1] += [d.tokens for d in generate(model, prompts[:1], decoding)]
        found[-1] += step(model.train(), [8, 2])
    assert_same(*reversed(found))
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # none fell back


def test_without_a_compiler_a_run_is_refused_before_it_creates_its_folder(tmp_path):
    flags = ["--compile", "--device", "cpu", "--demo", "--out", str(tmp_path / "run")]
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(BadOption, match="compiled for cpu here: .*No working C") as error:
            train.main(flags)
    assert "g++" in error.value.remedy and not (tmp_path / "run").exists()


def test_compiling_and_recomputation_exclude_each_other(tmp_path):
    flags = ["--compile", "--checkpoint-activations", "--device", "cpu", "--demo"]
    with pytest.raises(BadOption, match="--compile does not work with --checkpoint-activations"):
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_compiled_and_plain_runs_have_equal_losses(monkeypatch, tmp_path, checkpoint, arithmetic):
    monkeypatch.setattr(train, "check_execution", lambda *_, **__: None)
    monkeypatch.setattr(train, "compile_layers", partial(compile_layers, backend="eager"))
    flags = ["--model", checkpoint, "--data", arithmetic, "--device", "cpu", "--precision", "fp32",
             "--max-steps", 2, "--batch-size", 4, "--limit", 20]  # fmt: skip
    losses = []
    for name in ("plain", "compile"):
        more = ["--out", tmp_path / name, *(["--compile"] if name == "compile" else [])]
        train.main([str(flag) for flag in [*flags, *more]])
        lines = read_log(tmp_path / name / "metrics.jsonl")
        losses.append([line.get("train_loss") or line["val_loss"] for line in lines])
        assert (counters["stats"]["unique_graphs"] > 0) == (name == "compile")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def try_compiler(dtype, dora=False):
    torch._dynamo.reset()
    return compiler_problem(CPU, dtype, dora=dora, backend="aot_eager")


@pytest.mark.parametrize("dora", [False, True])
def test_the_trial_compares_the_gradients_of_adapters_in_fp32_and_in_the_bases_dtype(dora):
    trial = partial(gradient_error, CPU, dora=dora, backend="aot_eager")
    assert trial(torch.float32) < 1e-5 and trial(BF16) < 0.01
    assert try_compiler(BF16, dora) is None


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_the_trial_holds_its_layers_as_those_of_the_base_are_held(monkeypatch, held):
    tried = []
    monkeypatch.setattr(compiling, "compile_layers", lambda model, _: tried.append(model))
    options = train.TrainConfig(compile=True, base_precision=held, precision="bf16", device="cpu")
    check_execution(options, CPU, dora=False)
    layers = [next(adapters(model)).base_layer for model in tried]
    assert [layer.kind for layer in layers] == [held, held]  # in fp32 and in bf16


def test_a_compiler_that_drops_a_gradient_is_refused(monkeypatch):
    swiglu = functions._SwiGLU.backward  # as PyTorch 2.11 did: the MLP's gradient is dropped
    monkeypatch.setattr(
        functions._SwiGLU, "backward",
        staticmethod(lambda ctx, grad: tuple(
            g * (not torch.compiler.is_compiling()) for g in swiglu(ctx, grad)
        )),
    )  # fmt: skip
    monkeypatch.setattr(compiling, "compiler_problem", lambda _, dtype, **__: try_compiler(dtype))
    with pytest.raises(BadOption, match="^--compile: .*gradients that differ from the plain"):
        check_compiler(CPU, BF16, dora=False)


def test_a_compiler_that_computes_other_gradients_in_bf16_alone_is_found(monkeypatch):
    swiglu = functions._SwiGLU.backward
    monkeypatch.setattr(
        functions._SwiGLU, "backward",
        staticmethod(lambda ctx, grad: tuple(
            g * (not torch.compiler.is_compiling() or grad.dtype != BF16) for g in swiglu(ctx, grad)
        )),
    )  # fmt: skip
    assert try_compiler(torch.float32) is None
    assert "in bfloat16" in try_compiler(BF16)[0]
