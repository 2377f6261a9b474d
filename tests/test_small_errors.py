"""Tests of errors too small to be seen in a result: a rounding, a constant, a count that is off."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import autograd

import train
from data.batches import Schedule
from data.split import normalize
from data.tasks import load_source
from errors import TrainingFailed, run_script
from lora.config import LoRAConfig, added_parameters
from lora.dropout import KeyedDropout, token_keys
from lora.inject import adapters, count, inject, merge
from lora.peft_format import read_adapter, save_adapter
from model.generate import Decoding, least_allowed
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from run.base import Base
from run.device import check_halving
from run.fp16 import overflows
from tests import toys
from tests.adapter_helpers import adapted, logits, peft_logits, transformers_model


def test_dropout_is_exact_to_one_in_65536():
    p = 2**-16
    dropout = KeyedDropout(p, 4096, layer=0)
    dropout.keys = token_keys(0, 0, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    dropped = (~dropout.mask(4096)).sum().item()
    assert abs(dropped - 250) < 5 * 250**0.5  # of 16 million values


def test_a_merge_into_a_wider_weight_is_rounded_to_the_dtype_asked_for_and_says_what_that_lost(
    checkpoint,
):
    wide = adapted(checkpoint, size=0.01)
    before = [layer.base_layer.weight.float() for layer in adapters(wide)]
    deltas = [layer.delta() for layer in adapters(wide)]
    lost = [(w + d).bfloat16().float() - w - d for w, d in zip(before, deltas, strict=True)]
    fraction = (
        torch.cat([x.flatten() for x in lost]).norm()
        / torch.cat([d.flatten() for d in deltas]).norm()
    )
    assert merge(wide, torch.bfloat16) == pytest.approx(fraction.item(), rel=1e-4) and fraction > 0
    for layer in adapters(wide):
        weight = layer.base_layer.weight
        assert weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("dora", [False, True])
def test_the_parameters_announced_are_those_that_are_trained(checkpoint, dora):
    model = load_model(checkpoint, dtype=torch.float32)
    config = LoRAConfig(targets=("all-linear",), dora=dora, ranks={"k_proj": 3})
    with torch.device("meta"):
        announced = added_parameters(Qwen2(model.config), config)
    inject(model, config)
    assert announced == count(model)[0]


@pytest.mark.parametrize("asked", [None, 0.4])
def test_an_adapter_is_continued_with_the_dropout_asked_for_or_else_with_its_own(
    checkpoint, tmp_path, asked
):
    save_adapter(adapted(checkpoint), tmp_path, LoRAConfig(4, 8, dropout=0.25), base=None,
                 revision=None)  # fmt: skip
    model = load_model(checkpoint, dtype=torch.float32)
    config = read_adapter(tmp_path, model, dropout=asked)
    assert config.dropout == (asked or 0.25)
    thresholds = {layer.dropout.threshold for layer in adapters(model)}
    assert thresholds == {round(config.dropout * 2**16)}


def test_the_loss_of_rounded_logits_is_computed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (40, 300))
    targets = torch.randint(300, (40,), generator=generator)
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    logits = (hidden @ weight.t()).float()  # (40, 300), rounded to bf16
    truth = F.cross_entropy(logits, targets, reduction="sum")
    assert nats.item() == pytest.approx(truth.item(), rel=1e-6)


def test_every_norm_has_the_epsilon_of_the_checkpoint(base):
    toys.change_json(base / "config.json", rms_norm_eps=0.1)
    ours, theirs = logits(load_model(base, dtype=torch.float32)), transformers_model(base)
    assert torch.allclose(ours, peft_logits(theirs), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_residual_stream_is_fp32_in_every_precision(checkpoint, dtype):
    model, seen = load_model(checkpoint, dtype=dtype), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    logits(model)
    assert seen == [torch.float32] * len(model.model.layers)


def test_top_p_allows_the_fewest_tokens_that_sum_to_it_exactly():
    p = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
    for top_p, least in ((0.5, 0.5), (0.501, 0.25), (0.75, 0.25), (0.76, 0.125)):
        decoding = Decoding(1, (), vocab_size=4, temperature=1.0, top_p=top_p)
        assert least_allowed(p, decoding).item() == least


def test_questions_that_differ_in_case_are_equal_in_every_alphabet():
    assert normalize("STRASSE  Σ") == normalize(" straße\nς")


def test_micro_batches_are_halved_again_and_again_down_to_one_row():
    schedule = Schedule(toys.some_examples(12), batch_size=12, grad_accum=1, epochs=1, seed=0)
    for halved, size in enumerate((12, 6, 3, 1, 1)):
        batches = schedule.step(0, halved=halved).micro_batches
        assert [len(batch) for batch in batches] == [size] * (12 // size)


def test_the_length_advised_where_memory_ran_out_leaves_the_longest_row_out():
    with pytest.raises(TrainingFailed, match="1 sequences of 60 tokens") as failed:
        check_halving(MemoryError(), [60], alone=True)
    assert "--max-length 59," in failed.value.remedy


def test_fp16_is_tried_with_the_mean_loss_of_the_rows_as_in_training(
    checkpoint, arithmetic, monkeypatch
):
    base, grad, losses = (
        Base.find(str(checkpoint), precision="fp16", device="cpu"),
        autograd.grad,
        [],
    )
    monkeypatch.setattr(autograd, "grad", lambda y, x: losses.append(y.item()) or grad(y, x))
    assert not overflows(base, load_source(str(arithmetic)).train[:4], 2048)
    assert 0 < losses[0] < 2 * math.log(toys.TABLE)  # a sum over all tokens would be larger


def test_a_chat_template_that_was_edited_under_its_name_is_another_run(tiny, tmp_path, capsys):
    file, flags = tmp_path / "t.jinja", [*tiny, "--max-steps", "1", "--limit", "40"]
    flags += ["--chat-template", str(tmp_path / "t.jinja"), "--out", str(tmp_path / "run")]
    for text, code in ((toys.CHAT_TEMPLATE, 0), (toys.CHAT_TEMPLATE.replace("helpful", "odd"), 2)):
        file.write_text(text)
        assert run_script(lambda: train.main(flags)) == code
    assert "chat_template_sha256 was" in capsys.readouterr().err
