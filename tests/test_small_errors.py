"""Tests of errors too small to be seen in a result: a rounding, a constant, a count that is off."""

import pytest
import torch
import torch.nn.functional as F

from lora.config import LoRAConfig, added_parameters
from lora.dropout import KeyedDropout, token_keys
from lora.inject import adapters, count, inject, merge
from lora.peft_format import read_adapter, save_adapter
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
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
