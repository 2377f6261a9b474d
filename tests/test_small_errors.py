"""Tests of errors too small to be seen in a result: a rounding, a constant, a count that is off."""

import math
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import autograd

import train
from data.batches import Schedule
from data.split import normalize
from data.tasks import load_source
from errors import run_script
from evaluation.statistics import trend
from lora.config import LoRAConfig, added_parameters
from lora.dropout import KeyedDropout, token_keys
from lora.inject import adapters, count, inject, merge
from lora.peft_format import read_adapter, save_adapter
from model.checkpoint import read_eos_ids
from model.generate import Decoding, least_allowed
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from run import export
from run.base import Base
from run.folder import Run
from run.fp16 import overflows
from run.identity import program
from run.stopping import Stop, StopRequested
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


def test_the_length_advised_where_memory_ran_out_leaves_that_row_out(
    tiny, tmp_path, monkeypatch, capsys
):
    seen = []

    def too_large(hidden, *_):
        seen.append(len(hidden))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GB")

    monkeypatch.setattr(train, "linear_cross_entropy", too_large)
    flags = [*tiny, "--batch-size", "1", "--limit", "40", "--out", str(tmp_path / "run")]
    assert run_script(lambda: train.main(flags)) == 1
    (advised,) = re.findall(r"--max-length (\d+)", capsys.readouterr().err)
    assert int(advised) == seen[-1] - 1


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


def test_fresh_leaves_an_unfinished_run_of_other_code_alone(tmp_path):
    for name, code in (("run", "other"), ("run-2", program()["program_sha256"])):
        (tmp_path / name).mkdir()
        config = {"options": {}, "identity": {}, "program_sha256": code}
        toys.write_json(tmp_path / name / "config.json", config)
    assert Run.choose(tmp_path / "run", fresh=True).folder == tmp_path / "run-2"  # to be resumed
    assert Run.choose(tmp_path / "run", fresh=False).folder == tmp_path / "run"


def test_an_exported_model_ends_its_answers_where_training_did(base, tmp_path):
    toys.change_json(base / "generation_config.json", eos_token_id=toys.ENDOFTEXT)
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter", LoRAConfig(4, 8), base=str(base), revision=None)
    export.main(["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert read_eos_ids(base) == (toys.ENDOFTEXT,)
    assert set(read_eos_ids(tmp_path / "merged")) == {toys.ENDOFTEXT, toys.IM_END}


def test_a_time_limit_never_interrupts_the_first_piece_of_work_but_a_signal_does():
    stop = Stop(minutes=-1e6)  # long over
    stop.poll()
    assert stop.requested()
    stop.record(0.1)
    with pytest.raises(StopRequested):
        stop.poll()
    stop = Stop()
    stop.record(0.1)
    stop.poll()
    stop.signal = signal.SIGTERM
    with pytest.raises(StopRequested):
        stop.poll()


def test_a_session_stops_when_twice_its_longest_work_no_longer_fits(monkeypatch):
    monkeypatch.setattr("run.stopping.STARTED", 0.0)
    stop = Stop(minutes=1)
    stop.record(10)
    stop.record(2)
    for now, late in ((39.9, False), (40.1, True)):
        monkeypatch.setattr("run.stopping.time.monotonic", lambda now=now: now)
        assert stop.requested() == late


def test_the_scatter_of_a_trend_is_the_standard_error_of_its_residuals():
    losses = [9, 8, 7, 6, 5.0, 4.1, 4.0, 3.5, 3.6, 3.0, 3.1, 2.2, 2.9, 2.0, 2.4]
    last = np.array(losses[-5:])
    slope, start = np.polyfit(range(5), last, 1)
    residuals = last - start - slope * np.arange(5)
    found = trend(losses)
    assert found.threshold == pytest.approx(2 * math.sqrt((residuals**2).sum() / (5 - 2)))
    assert found.decrease == pytest.approx(-4 * slope)
