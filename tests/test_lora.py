"""Tests of LoRA adapters, their dropout and their files.

The expected results come from the base model, from the plain formula, or from PEFT.
Legend: r rank, T tokens, C channels, V vocabulary.
"""

import contextlib
import io
import itertools
import json
import math
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from errors import BadAdapter, BadOption
from lora.config import LoRAConfig, added_parameters, target_names
from lora.dropout import KeyedDropout, token_keys
from lora.inject import (
    adapters,
    count,
    disabled,
    inject,
    load_trained,
    merge,
    seed_dropout,
    trained_parameters,
    unmerge,
    unwrapped_state,
)
from lora.layer import LoRALinear, initial_A
from lora.peft_format import (
    CONFIG,
    WEIGHTS,
    peft_key,
    read_adapter,
    read_adapter_config,
    save_adapter,
)
from model.load import load_model
from model.loss import linear_cross_entropy
from run import export
from tests import toys
from tests.adapter_helpers import (
    EVERYWHERE,
    LENGTHS,
    adapted,
    as_if_trained,
    bits,
    equal,
    logits,
    peft_logits,
    peft_model,
    tokens_of,
    transformers_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose logits are of order one; tests must not change it."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", std=0.1)


def seed_for(model, batch, *, seed=0, epoch=0, rows=(0, 1, 2)) -> None:
    rows = torch.tensor(rows).repeat_interleave(torch.tensor(batch[2]))
    rows, positions = (x.to(model.head_weight.device) for x in (rows, batch[1]))
    seed_dropout(model, seed=seed, epoch=epoch, row_ids=rows, positions=positions)


# The base model is never changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_gives_the_logits_of_the_base_bit_for_bit(folder, device, dtype):
    base = logits(load_model(folder, dtype=dtype, device=device))
    model = adapted(
        folder, dtype=dtype, device=device, trained=False, targets=EVERYWHERE, dropout=0.5
    )
    assert torch.equal(logits(model), base)
    model.train()
    seed_for(model, tokens_of())
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_disabled_adapter_gives_the_logits_of_the_base_bit_for_bit(folder, device, dtype, merged):
    base = logits(load_model(folder, dtype=dtype, device=device))
    model = adapted(folder, dtype=dtype, device=device)
    if merged:
        merge(model)
    tuned, before = logits(model), bits(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert not torch.equal(tuned, base) and torch.equal(logits(model), tuned)
    assert equal(bits(model), before)


def test_disabled_restores_the_adapters_after_an_error_and_when_nested(folder):
    model = adapted(folder)
    tuned = logits(model)
    with contextlib.suppress(ZeroDivisionError), disabled(model):
        with disabled(model):
            pass
        base = logits(model)
        raise ZeroDivisionError
    assert torch.equal(base, logits(load_model(folder, dtype=torch.float32)))
    assert torch.equal(logits(model), tuned)


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_unmerge_restores_bit_for_bit(folder, device, dtype):
    model = adapted(folder, dtype=dtype, device=device, targets=EVERYWHERE)
    before, tuned, counts = bits(model), logits(model), count(model)
    merge(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight,
                           before["model.layers.0.mlp.up_proj.base_layer.weight"])  # fmt: skip
    assert count(model) == counts and bits(model).keys() == before.keys()
    unmerge(model)
    assert equal(bits(model), before) and torch.equal(logits(model), tuned)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_give_the_logits_of_the_adapters(folder, device, rslora):
    model = adapted(folder, device=device, targets=EVERYWHERE, rslora=rslora)
    tuned = logits(model)
    assert merge(model) < 1e-5
    torch.testing.assert_close(logits(model), tuned, atol=2e-5, rtol=0)
    base = load_model(folder, dtype=torch.float32, device=device)
    assert not torch.equal(logits(model), logits(base))


def test_merge_returns_the_fraction_of_the_change_that_rounding_lost(folder):
    fresh = adapted(folder, dtype=torch.bfloat16, trained=False)
    assert merge(fresh) == 0.0
    model = load_model(folder, dtype=torch.bfloat16)
    inject(model, LoRAConfig(r=4, alpha=8))
    as_if_trained(model, size=0.01)
    lost = change = 0.0
    for layer in adapters(model):
        base = layer.base_layer.weight.float()
        delta = 2.0 * layer.lora_B.detach() @ layer.lora_A.detach()
        lost += ((base + delta).bfloat16().float() - base - delta).square().sum().item()
        change += delta.square().sum().item()
    fraction = merge(model)
    assert fraction == pytest.approx((lost / change) ** 0.5, rel=1e-4) and 0.01 < fraction < 1


def test_merging_twice_or_unmerging_without_a_merge_is_refused(folder):
    model = adapted(folder)
    with pytest.raises(AssertionError):
        unmerge(model)
    merge(model)
    with pytest.raises(AssertionError):
        merge(model)


@pytest.mark.parametrize("merged", [False, True])
def test_the_unwrapped_state_has_the_names_of_the_base(folder, merged):
    base = load_model(folder, dtype=torch.float32).state_dict()
    model = adapted(folder)
    if merged:
        merge(model)
    state = unwrapped_state(model)
    assert state.keys() == base.keys()
    changed = {name for name in state if not torch.equal(state[name], base[name])}
    attention = {f"{name}.weight" for name in target_names_of_base(folder)}
    assert changed == (attention if merged else set())


def target_names_of_base(folder, targets=("attention",)):
    return target_names(load_model(folder, dtype=torch.float32), targets)


# Which layers are adapted


def test_a_target_is_the_last_part_of_a_name_or_a_group(folder):
    assert target_names_of_base(folder, ("v_proj",)) == [
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"
    ]  # fmt: skip
    attention = target_names_of_base(folder, ("attention",))
    assert attention == target_names_of_base(folder, ("o_proj", "q_proj", "v_proj", "k_proj"))
    assert len(attention) == 2 * 4
    assert target_names_of_base(folder, ("all-linear",)) == target_names_of_base(folder, EVERYWHERE)
    assert set(target_names_of_base(folder, ("attention", "up_proj"))) == {
        *attention, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip


def test_all_linear_excludes_the_output_head_as_in_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = toys.write_checkpoint(tmp_path / "untied", tied=False)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(transformers_model(folder), config).named_modules()
    theirs = {n.removeprefix("base_model.model.") for n, m in wrapped if hasattr(m, "base_layer")}
    assert set(target_names_of_base(folder, ("all-linear",))) == theirs


def test_targets_that_match_no_layer_are_refused_and_all_listed(folder):
    model = load_model(folder, dtype=torch.float32)
    before = bits(model)
    with pytest.raises(BadOption) as caught:
        inject(model, LoRAConfig(targets=("q_proj", "query", "lm_head", "q")))
    assert "lm_head, q, query" in caught.value.cause
    assert all(name in caught.value.remedy for name in (*EVERYWHERE, "attention", "all-linear"))
    assert equal(bits(model), before)


def test_each_adapter_adds_r_times_in_plus_out_parameters(folder):
    base = sum(p.numel() for p in load_model(folder, dtype=torch.float32).parameters())
    attention = 2 * 4 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64))  # layers, r, sides of qkvo
    assert count(adapted(folder)) == (attention, base)
    assert count(adapted(folder, targets=("q_proj",))) == (2 * 4 * 128, base)


def test_rank_8_on_the_attention_of_qwen2_half_billion_adds_1081344_parameters():
    from model.qwen2 import Qwen2, Qwen2Config

    with torch.device("meta"):
        model = Qwen2(Qwen2Config(896, 4864, 24, 14, 2, 151936))
        model.model.layers = nn.ModuleList(model.model.layers[:1])  # all 24 layers are the same
    added = added_parameters(model, LoRAConfig(r=8))
    inject(model, LoRAConfig(r=8))
    assert count(model)[0] == added and 24 * added == 1_081_344


def test_gradients_reach_a_and_b_and_nothing_else(folder):
    model = adapted(folder, targets=("q_proj", "up_proj"))
    nats, _ = linear_cross_entropy(model(*tokens_of()), model.head_weight, tokens_of(seed=1)[0])
    nats.backward()
    for name, parameter in model.named_parameters():
        is_adapter = name.endswith(("lora_A", "lora_B"))
        assert (parameter.grad is not None) == parameter.requires_grad == is_adapter, name
        assert not is_adapter or parameter.grad.abs().max() > 0, name


def test_the_first_gradient_reaches_only_b(folder):
    model = adapted(folder, trained=False)
    model(*tokens_of()).square().sum().backward()
    for layer in adapters(model):
        assert (layer.lora_A.grad == 0).all() and (layer.lora_B.grad != 0).any()


def test_injecting_twice_is_refused(folder):
    with pytest.raises(AssertionError, match="already has adapters"):
        inject(adapted(folder), LoRAConfig())


def test_the_public_functions_can_be_imported_from_the_package(folder):
    model = load_model(folder, dtype=torch.float32)
    lora.inject(model, lora.LoRAConfig(r=2))
    assert lora.count(model)[0] == sum(p.numel() for p in lora.trained_parameters(model).values())
    assert all(callable(getattr(lora, name)) for name in lora.__all__)


def test_loading_tensors_of_other_names_is_refused(folder):
    model = adapted(folder)
    tensors = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    as_if_trained(model, seed=9)
    load_trained(model, tensors)
    assert all(torch.equal(p, tensors[n]) for n, p in trained_parameters(model).items())
    with pytest.raises(AssertionError):
        load_trained(model, tensors | {"x": torch.zeros(1)})


# The formula


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_is_the_base_plus_scaled_b_a_of_the_input_after_dropout(rslora):
    torch.manual_seed(0)
    base = nn.Linear(24, 10)
    layer = LoRALinear(base, r=4, alpha=6, dropout=0.3, rslora=rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 24)
    layer.dropout.keys = token_keys(0, 0, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    kept = layer.dropout.mask(24)
    p = round(0.3 * 65536) / 65536
    scaling = 6 / math.sqrt(4) if rslora else 6 / 4
    truth = base(x) + scaling * (x * kept / (1 - p)) @ layer.lora_A.t() @ layer.lora_B.t()
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(layer(x), truth, atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 400), st.integers(30, 300))
def test_the_initial_a_is_uniform_within_one_over_the_root_of_in(seed, index, size):
    A, bound = initial_A(40, size, seed, index), 1 / math.sqrt(size)
    n, std = A.numel(), bound / math.sqrt(3)
    assert A.dtype == torch.float32 and A.abs().max() <= bound
    assert A.max() > 0.98 * bound and A.min() < -0.98 * bound
    assert abs(A.mean()) < 6 * std / math.sqrt(n)
    assert abs(A.std() / std - 1) < 6 / math.sqrt(n)


def test_the_initial_a_depends_only_on_seed_and_index(folder):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = load_model(folder, dtype=torch.float32)
    inject(model, LoRAConfig(r=4, alpha=8), seed=3)
    assert torch.equal(torch.get_rng_state(), state), "PyTorch's generator must not advance"
    for index, layer in enumerate(adapters(model)):
        assert torch.equal(layer.lora_A, initial_A(4, 64, 3, index))
        assert torch.equal(layer.lora_B, torch.zeros(layer.base_layer.out_features, 4))
    draws = [initial_A(4, 64, seed, index).flatten() for seed in range(4) for index in range(4)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(16)
    assert correlations.abs().max() < 5 / math.sqrt(4 * 64)


def test_fp32_adapters_on_a_bf16_base_train_with_fp32_gradients(folder):
    model = adapted(folder, dtype=torch.bfloat16).train()
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-4)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    hidden = model(*tokens_of())
    nats, _ = linear_cross_entropy(hidden, model.head_weight, tokens_of(seed=1)[0])
    (nats / len(hidden)).backward()
    optimizer.step()
    assert hidden.dtype == torch.bfloat16
    for name, p in parameters.items():
        assert p.dtype == p.grad.dtype == torch.float32, name
        moved = (p - before[name]).abs().max()
        assert 1e-4 < moved < 4e-4, f"{name} moved by {moved}: bf16 would lose most of it"


# Dropout


def masks(*, p=0.25, rows=4000, channels=64, layer=0, seed=0, epoch=0, first_row=0, position=0,
          device="cpu"):  # fmt: skip
    """(rows, channels) bool, True where kept, for one token of each of `rows` rows."""
    dropout = KeyedDropout(p, channels, layer).to(device)
    tokens = torch.arange(rows, device=device) + first_row
    dropout.keys = token_keys(seed, epoch, tokens, torch.full_like(tokens, position))
    return dropout.mask(channels)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten().float(), b.flatten().float())))[0, 1].item()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("channels", [64, 63])
def test_dropout_drops_a_fraction_p_and_keeps_the_mean(p, channels):
    kept = masks(p=p, channels=channels)
    n, sigma = kept.numel(), math.sqrt(p * (1 - p))
    assert abs(kept.float().mean() - (1 - p)) < 5 * sigma / math.sqrt(n)
    dropout = KeyedDropout(p, channels, 0)
    dropout.keys = token_keys(0, 0, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    y = dropout(torch.ones(4000, channels))
    assert torch.equal(y != 0, kept)
    assert abs(y.mean() - 1) < 5 * sigma / (1 - p) / math.sqrt(n) + 1e-4


def test_each_channel_and_each_token_is_dropped_with_probability_p():
    kept = masks(p=0.25, rows=4000, channels=1000).float()
    sigma = math.sqrt(0.25 * 0.75)
    assert (kept.mean(dim=0) - 0.75).abs().max() < 6 * sigma / math.sqrt(4000)
    assert (kept.mean(dim=1) - 0.75).abs().max() < 6 * sigma / math.sqrt(1000)


def test_a_mask_has_the_same_bits_on_every_device(device):
    assert torch.equal(masks(channels=63, device=device).cpu(), masks(channels=63))


CHANGES = {
    "row": {"first_row": 1},
    "a far row": {"first_row": 7473},
    "epoch": {"epoch": 1},
    "seed": {"seed": 1},
    "layer": {"layer": 1},
    "a far layer": {"layer": 95},
    "position": {"position": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_masks_of_another_row_epoch_seed_layer_or_position_are_uncorrelated(change):
    a, b = masks(), masks(**change)
    assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())
    assert abs(correlation(a[:, :-2], b[:, 2:])) < 5 / math.sqrt(a.numel())


def test_channels_of_a_token_and_tokens_of_a_channel_are_uncorrelated():
    kept = masks(rows=6000, channels=64).float()
    between_channels = torch.corrcoef(kept.t()) - torch.eye(64)
    assert between_channels.abs().max() < 6 / math.sqrt(6000)
    kept = masks(rows=64, channels=6000).float()
    between_tokens = torch.corrcoef(kept) - torch.eye(64)
    assert between_tokens.abs().max() < 6 / math.sqrt(6000)


def test_every_seed_epoch_row_and_position_has_its_own_key():
    cells = itertools.product(range(4), repeat=4)
    keys = [token_keys(s, e, torch.tensor([r]), torch.tensor([p])).item() for s, e, r, p in cells]
    assert len(set(keys)) == 4**4


def test_a_row_has_the_same_masks_in_any_micro_batch_and_order(folder):
    model = adapted(folder, dropout=0.5).train()
    tokens, _, _ = tokens_of()
    parts = dict(enumerate(tokens.split(LENGTHS)))

    def hidden_of(*rows):
        lengths = [LENGTHS[row] for row in rows]
        batch = (torch.cat([parts[row] for row in rows]), *tokens_of(lengths)[1:])
        seed_for(model, batch, rows=rows)
        return dict(zip(rows, model(*batch).detach().split(lengths), strict=True))

    together, elsewhere = hidden_of(0, 1, 2), hidden_of(2, 0) | hidden_of(1)
    for row in range(3):
        torch.testing.assert_close(together[row], elsewhere[row], atol=1e-5, rtol=0)
    again = model.eval()(*tokens_of()).detach()
    assert (torch.cat(list(together.values())) - again).abs().max() > 0.01, "dropout must act"


def test_dropout_in_eval_mode_or_with_p_zero_is_the_identity():
    x = torch.randn(6, 9)
    assert KeyedDropout(0.5, 9, 0).eval()(x) is x
    assert KeyedDropout(0.0, 9, 0).train()(x) is x


def test_a_dropout_close_to_one_drops_nearly_everything_and_stays_finite():
    dropout = KeyedDropout(0.999999, 8, layer=0)
    dropout.keys = token_keys(0, 0, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert dropout(torch.ones(4, 8)).isfinite().all()


def test_a_training_forward_without_keys_or_with_keys_of_another_batch_is_refused(folder):
    model = adapted(folder, dropout=0.1).train()
    with pytest.raises(AssertionError, match=r"call lora\.seed_dropout"):
        model(*tokens_of())
    seed_for(model, tokens_of())
    with pytest.raises(AssertionError, match="20 dropout keys for 5 tokens"):
        model(*tokens_of((5,)))


# PEFT computes the same


KINDS = [
    (("q_proj", "k_proj", "v_proj", "o_proj"), False),
    (("q_proj", "down_proj"), True),
    (EVERYWHERE, True),
    (("o_proj", "gate_proj"), False),
    (("v_proj",), True),
]


@pytest.mark.parametrize("targets, rslora", KINDS)
def test_a_folder_written_by_peft_gives_the_logits_and_gradients_of_peft(
    folder, tmp_path, targets, rslora
):
    theirs = peft_model(folder, targets=targets, rslora=rslora, size=0.1)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder, dtype=torch.float32)
    config = read_adapter(tmp_path, model)
    assert config == LoRAConfig(4, 8, 0.0, config.targets, rslora)
    assert set(config.targets) == set(targets)

    truth, goal = peft_logits(theirs), tokens_of(seed=1)[0]
    hidden = model(*tokens_of())
    torch.testing.assert_close(hidden @ model.head_weight.t(), truth, atol=1e-5, rtol=0)
    (linear_cross_entropy(hidden, model.head_weight, goal)[0] / 20).backward()
    F.cross_entropy(truth, goal).backward()
    named = theirs.named_parameters()
    expected = {n.replace(".default", ""): p.grad for n, p in named if p.grad is not None}
    ours = {peft_key(name): p.grad for name, p in trained_parameters(model).items()}
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=0)
    assert max(g.abs().max() for g in ours.values()) > 1e-3, "zeros would agree with anything"


@torch.no_grad()
@pytest.mark.parametrize("targets, rslora", KINDS)
def test_peft_loads_our_folder_and_gives_our_logits(folder, tmp_path, targets, rslora):
    from peft import PeftModel

    model = adapted(folder, targets=targets, rslora=rslora)
    config = LoRAConfig(4, 8, 0.1, targets, rslora)
    save_adapter(model, tmp_path, config, base=str(folder), revision=None)
    theirs = PeftModel.from_pretrained(transformers_model(folder), tmp_path).eval()
    torch.testing.assert_close(logits(model), peft_logits(theirs), atol=1e-5, rtol=0)
    base = peft_logits(transformers_model(folder))
    assert (logits(model) - base).abs().max() > 0.05


def test_an_adapter_is_read_back_bit_for_bit(folder, tmp_path):
    config = LoRAConfig(4, 8, 0.1, ("o_proj", "up_proj"), True)
    model = load_model(folder, dtype=torch.bfloat16)
    inject(model, config)
    as_if_trained(model)
    save_adapter(model, tmp_path, config, base="Qwen/Qwen2-0.5B-Instruct", revision="abc")
    again = load_model(folder, dtype=torch.bfloat16)
    assert read_adapter(tmp_path, again) == config
    assert equal(trained_parameters(model), trained_parameters(again))
    assert read_adapter_config(tmp_path)[1:] == ("Qwen/Qwen2-0.5B-Instruct", "abc")


def test_the_folder_is_fp32_readable_by_all_users_and_has_only_long_stable_fields(saved):
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}
        assert file.get_tensor(A_KEY).shape == (4, 64) and file.get_tensor(B_KEY).shape == (64, 4)
    assert stat.S_IMODE((saved / WEIGHTS).stat().st_mode) & 0o444 == 0o444
    settings = json.loads((saved / CONFIG).read_text())
    assert set(settings) == {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
        "lora_dropout", "bias", "target_modules", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "modules_to_save", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    }  # fmt: skip
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert settings["bias"] == "none"


# Which adapter folders are refused


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = A_KEY.replace("lora_A", "lora_B")


@pytest.fixture
def saved(folder, tmp_path):
    """An adapter folder for a test to damage."""
    model = adapted(folder)
    save_adapter(model, tmp_path / "adapter", LoRAConfig(4, 8), base=str(folder), revision=None)
    return tmp_path / "adapter"


def problem_of(saved: Path, folder: Path) -> str:
    with pytest.raises(BadAdapter) as caught:
        read_adapter(saved, load_model(folder, dtype=torch.float32))
    assert caught.value.remedy
    return caught.value.cause


def change_tensors(saved: Path, change) -> None:
    tensors = load_file(saved / WEIGHTS)
    save_file(change(tensors) or tensors, saved / WEIGHTS, metadata={"format": "pt"})


def test_a_wrong_prefix_is_refused(saved, folder):
    change_tensors(saved, lambda ts: {k.replace("model.layers", "h"): t for k, t in ts.items()})
    cause = problem_of(saved, folder)
    assert "is not expected" in cause and "26 more" in cause  # 16 not expected, 16 missing, 6 shown


def test_all_problems_of_the_tensors_are_listed_at_once(saved, folder):
    def damage(tensors):
        del tensors[A_KEY]
        tensors[B_KEY] = torch.zeros(64, 5)
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
        tensors[A_KEY.replace("q_proj", "k_proj")][0, 0] = math.nan
        tensors[A_KEY.replace("q_proj", "v_proj")][0, 0] = math.inf

    change_tensors(saved, damage)
    cause = problem_of(saved, folder)
    for part in (
        f"{A_KEY} is missing",
        f"{B_KEY} is (64, 5), not (64, 4)",
        "base_model.model.lm_head.lora_A.weight is not expected",
        "k_proj.lora_A.weight holds NaN",
        "v_proj.lora_A.weight holds NaN or inf",
    ):
        assert part in cause


BROKEN = {
    "an integer tensor": lambda ts: {k: t.to(torch.int32) for k, t in ts.items()},
    "no tensors at all": lambda ts: {"x": torch.zeros(1)},
    "DoRA's magnitudes": lambda ts: (
        ts | {A_KEY.replace("A.weight", "magnitude_vector"): torch.ones(64)}
    ),
    "a trained bias": lambda ts: (
        ts | {A_KEY.replace("lora_A.weight", "base_layer.bias"): torch.ones(64)}
    ),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_tensors_that_do_not_fit_are_refused(saved, folder, change):
    change_tensors(saved, change)
    problem_of(saved, folder)


def test_a_missing_or_damaged_file_is_refused(saved, folder):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:500])
    assert "cannot be read" in problem_of(saved, folder)
    (saved / WEIGHTS).unlink()
    assert "cannot be read" in problem_of(saved, folder)
    (saved / CONFIG).write_text("{")
    assert "cannot be read" in problem_of(saved, folder)
    (saved / CONFIG).unlink()
    assert f"has no {CONFIG}" in problem_of(saved, folder)


def test_an_adapter_for_another_base_is_refused(saved, tmp_path):
    other = toys.write_checkpoint(tmp_path / "other", layers=3)
    assert "layers.2.self_attn.k_proj.lora_A.weight is missing" in problem_of(saved, other)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_missing_setting_is_refused(saved, folder, field):
    settings = json.loads((saved / CONFIG).read_text())
    del settings[field]
    toys.write_json(saved / CONFIG, settings)
    assert f"{field} is None" in problem_of(saved, folder)


UNSUPPORTED = {
    "r": ["8", 0, -1, True, 4.0, None],
    "lora_alpha": ["16", None, True, math.nan, math.inf],
    "lora_dropout": ["0", 1.0, -0.1, math.nan, None],
    "target_modules": [["q_proj", ".*_proj"], [], [3], None, "", {"q_proj": 1}, ["qproj"]],
    "bias": ["all", "lora_only", "some", ["all"]],
    "use_rslora": ["no"],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"],
    "peft_type": ["IA3", None],
    "use_dora": ["yes"],
    "modules_to_save": [["lm_head"]],
    "layers_to_transform": [[0], 0],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": True}, {"q_.*": 2}, {"up_proj": 2}, ["q_proj"], 3],
    "alpha_pattern": [{"q_proj": math.nan}, {"(a+)+b": 2}, {"mlp": 2}, [], {"": 2}],
    "exclude_modules": [["k_proj"], [".*"], 3],
    "target_parameters": [["x"]],
    "layer_replication": [[[0, 2]]],
    "trainable_token_indices": [[1, 2]],
    "lora_bias": [True],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2}],
    "kasa_config": [{"beta": 1.0}],
    "monteclora_config": [{"num_samples": 2}],
    "arrow_config": [{"top_k": 1}],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in UNSUPPORTED.items() for v in vs])
def test_a_setting_that_is_malformed_or_not_supported_is_refused(saved, folder, field, value):
    toys.change_json(saved / CONFIG, **{field: value})
    assert field in problem_of(saved, folder)


def test_all_linear_is_read_as_such(folder, tmp_path):
    config = LoRAConfig(4, 8, targets=("all-linear",))
    model = adapted(folder, targets=config.targets)
    save_adapter(model, tmp_path, config, base=str(folder), revision=None)
    toys.change_json(tmp_path / CONFIG, target_modules="all-linear")
    again = load_model(folder, dtype=torch.float32)
    assert read_adapter(tmp_path, again).targets == ("all-linear",)
    assert torch.equal(logits(again), logits(model))


def test_all_problems_of_the_settings_are_listed_at_once(saved, folder):
    toys.change_json(saved / CONFIG, r="8", lora_alpha=None, use_dora="yes", target_modules=[".*"])
    cause = problem_of(saved, folder)
    assert all(f in cause for f in ("r is", "lora_alpha is", "use_dora is", "target_modules is"))


def test_every_setting_that_peft_writes_by_default_is_accepted(folder, tmp_path):
    peft_model(folder, targets=("q_proj",)).save_pretrained(tmp_path)
    with_all_defaults = json.loads((tmp_path / CONFIG).read_text())
    assert len(with_all_defaults) > 25
    assert read_adapter_config(tmp_path)[0].targets == ("q_proj",)


# The merged folder


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_merged_folder_and_gives_the_logits_of_the_adapters(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    base = toys.write_checkpoint(
        tmp_path / "base", tied=tied, std=0.1, shards=2, lm_head_beside_tied=tied
    )
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter", LoRAConfig(4, 8), base=str(base), revision=None)
    run_export(tmp_path, "fp32")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(peft_logits(theirs.eval()), logits(model), atol=2e-5, rtol=0)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(load_model(base, dtype=torch.float32).state_dict())


def run_export(where: Path, dtype: str, *more: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        paths = ["--adapter", str(where / "adapter"), "--out", str(where / "out")]
        export.main([*paths, "--dtype", dtype, *more])
    return out.getvalue()


@pytest.mark.parametrize("new_config", [False, True])
def test_the_merged_folder_in_bf16_is_complete_and_readable_and_loads_again(tmp_path, new_config):
    base = toys.write_checkpoint(
        tmp_path / "base", dtype=torch.float16, new_config=new_config, shards=2
    )
    model = adapted(base, dtype=torch.float32)  # fp32 holds fp16 exactly
    save_adapter(model, tmp_path / "adapter", LoRAConfig(4, 8), base=str(base), revision=None)
    assert "rounding to bf16 lost" in run_export(tmp_path, "bf16")
    merge(model)
    once = {name: t.to(torch.bfloat16) for name, t in unwrapped_state(model).items()}
    again = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert equal(again.state_dict(), once)
    others = {p.name for p in base.iterdir() if "safetensors" not in p.name}
    others |= {"chat_template.jinja", "README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*others, "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype" if new_config else "torch_dtype"] == "bfloat16"
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044, path.name


def test_a_merge_that_fp16_cannot_hold_is_refused_and_named(tmp_path):
    base = toys.write_checkpoint(tmp_path / "base", dtype=torch.float32)
    model = adapted(base)
    model.model.layers[1].self_attn.v_proj.lora_A.data.fill_(3e3)
    model.model.layers[1].self_attn.v_proj.lora_B.data.fill_(3e3)
    save_adapter(model, tmp_path / "adapter", LoRAConfig(4, 8), base=str(base), revision=None)
    with pytest.raises(BadOption, match=r"v_proj\.weight do not fit into fp16"):
        run_export(tmp_path, "fp16")
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing_and_leaves_nothing_if_refused(tmp_path, folder):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadOption, match="exists already"):
        run_export(tmp_path, "bf16")
    (tmp_path / "out").rmdir()
    with pytest.raises(BadAdapter):
        run_export(tmp_path, "bf16", "--model", str(folder))
    assert list(tmp_path.iterdir()) == []
