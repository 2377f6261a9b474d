"""Tests of the adapters beyond plain LoRA, of the adapter options, and of continued training.

DoRA, LoRA+, ranks and alphas by layer, `--rank` and `--alpha`, `--from-adapter`.
The expected results come from the base model, from the plain formula, or from PEFT.
"""

import itertools
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import train
from errors import BadAdapter, BadOption, BadRun, run_script
from lora.config import LoRAConfig
from lora.dora import DoRALinear
from lora.dropout import token_keys
from lora.inject import (
    adapters,
    count,
    disabled,
    merge,
    seed_dropout,
    trained_parameters,
    unmerge,
    unwrapped_state,
)
from lora.options import RENAMED, lora_config, lora_options
from lora.peft_format import CONFIG, WEIGHTS, peft_key, read_adapter, save_adapter
from lora.plus import rate_groups
from model.compile import compile_layers
from model.load import load_model
from model.loss import linear_cross_entropy
from run import export
from run.earlier import upgrade_options
from run.folder import Run
from tests import toys
from tests.adapter_helpers import (
    EVERYWHERE,
    as_if_trained,
    bits,
    equal,
    logits,
    peft_logits,
    peft_model,
    tokens_of,
    transformers_model,
)
from tests.adapter_helpers import adapted as adapted_model
from tests.toys import read_log

MIXED = {"ranks": {"q_proj": 6, "layers.1.mlp.up_proj": 2}, "alphas": {"q_proj": 9, "k_proj": 3}}
KINDS = {
    "DoRA": {"dora": True},
    "DoRA everywhere, rsLoRA": {"dora": True, "rslora": True, "targets": EVERYWHERE},
    "ranks and alphas": {"targets": EVERYWHERE, **MIXED},
    "ranks and alphas, DoRA, rsLoRA": {
        "targets": EVERYWHERE, "dora": True, "rslora": True, **MIXED,
    },
    "every linear layer": {"targets": ("all-linear",)},
    "one layer": {"targets": ("layers.1.self_attn.q_proj",)},
}  # fmt: skip


def each_kind(function):
    return pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())(function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose logits are of order one; tests must not change it."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", std=0.1)


def adapted(folder, **options):
    """As in the helpers, with smaller weights: these adapters amplify them more."""
    return adapted_model(folder, size=0.05, **options)


# DoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_gives_the_logits_of_the_base_bit_for_bit_also_in_training(folder, dtype):
    base = logits(load_model(folder, dtype=dtype))
    options = {"targets": EVERYWHERE, "dropout": 0.5, "dora": True}
    model = adapted(folder, dtype=dtype, trained=False, **options)
    assert torch.equal(logits(model), base)
    tokens, positions, _ = tokens_of()
    seed_dropout(model.train(), seed=0, epoch=0, row_ids=tokens, positions=positions)
    assert torch.equal(logits(model), base)
    assert merge(model) == 0.0 and torch.equal(logits(model), base)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_rescales_the_rows_of_lora_to_the_trained_magnitudes(dropout, has_bias):
    torch.manual_seed(0)
    base = nn.Linear(24, 10, bias=has_bias)
    layer = DoRALinear(base, r=4, alpha=6, dropout=dropout)
    layer.init_magnitude()
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2)
    x, W, s = torch.randn(5, 24), base.weight, 6 / 4
    layer.dropout.keys = token_keys(0, 0, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    dropped = layer.dropout(x)
    V = W + s * layer.lora_B @ layer.lora_A
    gain = layer.lora_magnitude_vector / V.norm(dim=1)
    truth = base(x) + (gain - 1) * (dropped @ W.t()) + gain * (dropped @ (V - W).t())
    torch.testing.assert_close(layer(x), truth, atol=1e-5, rtol=1e-5)
    assert torch.equal(dropped, x) == (dropout == 0)
    undropped = gain * (x @ V.t()) + (base.bias if has_bias else 0)
    torch.testing.assert_close(layer.eval()(x), undropped, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_norm_equals_that_of_the_full_weight_rows(dtype, tolerance):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(96, 40, dtype=dtype), r=8, alpha=16)
    layer.init_magnitude()
    nn.init.normal_(layer.lora_B, std=0.1)
    rows = layer.base_layer.weight.float() + 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.norm(), rows.norm(dim=1).detach(), atol=0, rtol=tolerance)
    assert (layer.norm() / layer.lora_magnitude_vector - 1).abs().max() > 0.1


def test_a_weight_row_of_zeros_stays_zero_and_finite_under_dora():
    base = nn.Linear(6, 3, bias=False)
    base.weight.data[1] = 0
    layer = DoRALinear(base, r=2, alpha=2)
    layer.init_magnitude()
    x = torch.randn(4, 6)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters(recurse=False))


def test_dora_trains_a_b_and_magnitudes_and_counts_them(folder):
    model = adapted(folder, dora=True, targets=("q_proj", "up_proj"))
    model(*tokens_of()).square().sum().backward()
    for name, parameter in model.named_parameters():
        is_adapter = name.endswith(("lora_A", "lora_B", "lora_magnitude_vector"))
        assert (parameter.grad is not None) == is_adapter, name
        assert not is_adapter or parameter.dtype == torch.float32 and parameter.grad.any()
    base = sum(p.numel() for p in load_model(folder, dtype=torch.float32).parameters())
    per_layer = 4 * (64 + 64) + 64 + 4 * (64 + 96) + 96
    assert count(model) == (2 * per_layer, base)


# All kinds of adapters


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_a_disabled_adapter_of_any_kind_computes_the_base_bit_for_bit(folder, kind, dtype, merged):
    base = logits(load_model(folder, dtype=dtype))
    model = adapted(folder, dtype=dtype, **kind)
    if merged:
        merge(model)
    tuned, before = logits(model), bits(model)
    with disabled(model), disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, base)
    assert equal(bits(model), before)


@each_kind
def test_merging_keeps_the_logits_and_unmerging_restores_any_kind(folder, kind):
    model = adapted(folder, **kind)
    tuned, before = logits(model), bits(model)
    assert merge(model) < 1e-5
    torch.testing.assert_close(logits(model), tuned, atol=1e-4, rtol=0)
    base = load_model(folder, dtype=torch.float32).state_dict()
    state = unwrapped_state(model)
    assert state.keys() == base.keys() and not equal(state, base)
    unmerge(model)
    assert equal(bits(model), before) and torch.equal(logits(model), tuned)


@each_kind
def test_a_folder_of_any_kind_from_peft_gives_the_logits_and_gradients_of_peft(
    folder, tmp_path, kind
):
    theirs = peft_model(folder, **kind)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder, dtype=torch.float32)
    assert read_adapter(tmp_path, model).ranks == kind.get("ranks", {})
    truth, goal = peft_logits(theirs), tokens_of(seed=1)[0]
    hidden = model(*tokens_of())
    torch.testing.assert_close(hidden @ model.head_weight.t(), truth, atol=1e-4, rtol=0)
    (linear_cross_entropy(hidden, model.head_weight, goal)[0] / 20).backward()
    F.cross_entropy(truth, goal).backward()
    expected = peft_gradients(theirs)
    ours = {peft_key(name): p.grad for name, p in trained_parameters(model).items()}
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=1e-3)
    assert min(g.abs().max() for g in ours.values()) > 1e-4, "zeros would agree with anything"
    with disabled(model):
        assert torch.equal(logits(model), logits(load_model(folder, dtype=torch.float32)))


def peft_gradients(theirs) -> dict[str, torch.Tensor]:
    def key(name: str) -> str:
        name = name.replace(".default", "")
        return name.removesuffix(".weight") if "magnitude" in name else name

    return {key(n): p.grad for n, p in theirs.named_parameters() if p.grad is not None}


@torch.no_grad()
@each_kind
def test_peft_loads_our_folder_of_any_kind_and_gives_our_logits(folder, tmp_path, kind):
    from peft import PeftModel

    model = adapted(folder, **kind)
    config = LoRAConfig(r=4, alpha=8, **kind)
    save_adapter(model, tmp_path, config, base=str(folder), revision=None)
    theirs = PeftModel.from_pretrained(transformers_model(folder), tmp_path).eval()
    tuned = logits(model)
    torch.testing.assert_close(tuned, peft_logits(theirs), atol=1e-4, rtol=0)
    assert (tuned - peft_logits(transformers_model(folder))).abs().max() > 0.05
    again = load_model(folder, dtype=torch.float32)
    back = read_adapter(tmp_path, again)
    torch.testing.assert_close(logits(again), tuned, atol=1e-4, rtol=0)
    assert (back.r, back.ranks, back.alphas) == (4, config.ranks, config.alphas)


@pytest.mark.parametrize("kind", [{"dora": True}, {"ranks": {"q_proj": 6}}])
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_training_steps_give_the_result_of_peft_with_and_without_lora_plus(
    folder, tmp_path, kind, ratio
):
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft_model(folder, trained=False, **kind)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder, dtype=torch.float32)
    read_adapter(tmp_path, model)
    groups = rate_groups(trained_parameters(model), ratio, 0.1)
    for group in groups:
        group["lr"] = 2e-3 * group["ratio"]
    ours = torch.optim.AdamW(groups, eps=1e-4)
    adam = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.1}
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **adam)
    if ratio:
        plus = {"optimizer_cls": torch.optim.AdamW, "loraplus_lr_ratio": ratio}
        other = create_loraplus_optimizer(theirs, **plus, lr=2e-3, eps=1e-4,
                                          loraplus_weight_decay=0.1)  # fmt: skip
    start, goal = logits(model), tokens_of(seed=1)[0]
    for _ in range(4):
        hidden = model(*tokens_of())
        (linear_cross_entropy(hidden, model.head_weight, goal)[0] / 20).backward()
        F.cross_entropy(peft_logits(theirs), goal).backward()
        for optimizer in (ours, other):
            optimizer.step()
            optimizer.zero_grad()
    assert (logits(model) - start).abs().max() > 0.05
    torch.testing.assert_close(logits(model), peft_logits(theirs), atol=2e-3, rtol=0)


def test_the_groups_of_lora_plus_equal_those_of_peft(folder):
    from peft.optimizers import create_loraplus_optimizer

    theirs, model = peft_model(folder, dora=True), adapted(folder, dora=True)
    plus = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    names = {id(p): n.replace(".default", "") for n, p in theirs.named_parameters()}
    expected = {
        names[id(p)].replace("vector.weight", "vector"): (group["lr"], group["weight_decay"])
        for group in plus.param_groups for p in group["params"]
    }  # fmt: skip
    ours = {
        peft_key(name): (group["ratio"], group["weight_decay"])
        for group in rate_groups(trained_parameters(model), 16, 0.1) for name, _ in group["params"]
    }  # fmt: skip
    assert ours == expected and set(ours.values()) == {(1.0, 0.1), (16, 0.1)}
    (one,) = rate_groups(trained_parameters(model), None, 0.1)
    assert dict(one["params"]) == trained_parameters(model) and one["ratio"] == 1.0


@torch.no_grad()
def test_dora_applies_dropout_where_peft_does(folder, tmp_path):
    theirs = peft_model(folder, dora=True, dropout=0.5)
    theirs.save_pretrained(tmp_path)
    model = load_model(folder, dtype=torch.float32)
    read_adapter(tmp_path, model)
    tokens, positions, lengths = tokens_of((9,))
    seed_dropout(model.train(), seed=0, epoch=0, row_ids=tokens, positions=positions)
    for name, module in theirs.train().named_modules():
        if name.endswith("lora_dropout.default"):
            layer = model.get_submodule(name.split("base_model.model.")[1].split(".lora_")[0])
            module.forward = lambda x, dropout=layer.dropout: dropout(x[0])[None]
    batch = (tokens, positions, lengths)
    truth = peft_logits(theirs, batch)
    torch.testing.assert_close(logits(model, batch), truth, atol=1e-4, rtol=0)
    assert (logits(model.eval(), batch) - truth).abs().max() > 0.05, "dropout must act"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_in_compiled_layers_computes_the_same(folder, dropout):
    found = []
    for compiled in (False, True):
        model = adapted(folder, dora=True, dropout=dropout, targets=EVERYWHERE).train()
        if compiled:
            compile_layers(model, backend="eager")
        tokens, positions, lengths = tokens_of()
        seed_dropout(model, seed=0, epoch=0, row_ids=tokens, positions=positions)
        hidden = model(tokens, positions, lengths)
        hidden.square().mean().backward()
        found.append([hidden, *(p.grad for p in trained_parameters(model).values())])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


# Ranks and alphas by layer


def test_layers_have_their_own_ranks_and_alphas_and_the_first_match_counts(folder):
    ranks = {"layers.0.self_attn.q_proj": 2, "q_proj": 6}
    model = adapted(folder, ranks=ranks, alphas={"v_proj": 3})
    shapes = [len(layer.lora_A) for layer in adapters(model)]
    scalings = [layer.scaling for layer in adapters(model)]
    assert shapes == [2, 4, 4, 4, 6, 4, 4, 4]  # q, k, v, o of two layers
    assert scalings == [8 / 2, 2, 3 / 4, 2, 8 / 6, 2, 3 / 4, 2]


@pytest.mark.parametrize("name", ["up_proj", "proj", "self_attn", "q", "layers.2.self_attn.q_proj"])
def test_ranks_and_alphas_of_layers_that_are_not_adapted_are_refused_and_all_listed(folder, name):
    with pytest.raises(BadOption) as caught:
        adapted(folder, ranks={"q_proj": 2, name: 4}, alphas={"k_proj": 2, name: 4})
    for option in ("--rank", "--alpha"):
        assert f"{option}: no adapted layer is named {name}" in caught.value.cause
    assert "k_proj, o_proj, q_proj, v_proj" in caught.value.remedy


def test_huge_ranks_in_an_adapter_config_are_refused_before_memory_is_allocated(folder, tmp_path):
    save_adapter(adapted(folder), tmp_path, LoRAConfig(4, 8), base="b", revision=None)
    toys.change_json(tmp_path / CONFIG, rank_pattern={"q_proj": 10**12})
    with pytest.raises(BadAdapter, match="lora_A.weight is .4, 64., not .1000000000000, 64."):
        read_adapter(tmp_path, load_model(folder, dtype=torch.float32))


@pytest.mark.parametrize("change, cause", [
    ({"rank_pattern": {"up_proj": 2}}, "rank_pattern: no adapted layer is named up_proj"),
    ({"alpha_pattern": {"x": 2}}, "alpha_pattern: no adapted layer is named x"),
    ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight is (4, 64), not (2, 64)"),
    ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_tensors_or_the_base_are_refused(
    folder, tmp_path, change, cause
):
    save_adapter(adapted(folder), tmp_path, LoRAConfig(4, 8), base="b", revision=None)
    toys.change_json(tmp_path / CONFIG, **change)
    with pytest.raises(BadAdapter) as caught:
        read_adapter(tmp_path, load_model(folder, dtype=torch.float32))
    assert cause in caught.value.cause


def test_a_pissa_adapter_is_refused_until_peft_has_converted_it(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = list(EVERYWHERE)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights="pissa")
    theirs = get_peft_model(transformers_model(folder), config)
    theirs.save_pretrained(tmp_path / "initial")
    toys.change_json(tmp_path / "initial" / CONFIG, init_lora_weights=True)  # as PEFT's docs say
    as_if_trained(theirs, size=0.05)
    theirs.save_pretrained(tmp_path / "unconverted")
    model = load_model(folder, dtype=torch.float32)
    with pytest.raises(BadAdapter, match="init_lora_weights is 'pissa'") as caught:
        read_adapter(tmp_path / "unconverted", model)
    assert "path_initial_model_for_weight_conversion" in caught.value.remedy

    truth = peft_logits(theirs)
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert read_adapter(tmp_path / "converted", model).r == 8
    torch.testing.assert_close(logits(model), truth, atol=1e-3, rtol=0)


# Options


LAYERS = ("q_proj", "k_proj", "self_attn.v_proj", "layers.0.mlp.up_proj")
CONFIGS = st.builds(
    LoRAConfig,
    r=st.integers(1, 512),
    alpha=st.floats(1e-3, 1e9) | st.integers(1, 999),
    dropout=st.floats(0, 0.99),
    targets=st.lists(st.sampled_from(LAYERS), min_size=1, unique=True).map(tuple),
    rslora=st.booleans(),
    dora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 512)),
    alphas=st.dictionaries(st.sampled_from(LAYERS), st.floats(1e-3, 1e9)),
)


@given(CONFIGS)
def test_every_config_survives_its_options_and_their_json(config):
    options = lora_options(config)
    again = lora_config(json.loads(json.dumps(options)))
    assert again == config and list(again.ranks) == list(config.ranks)
    assert lora_options(again) == options


@pytest.mark.parametrize("options, config", [
    ({}, LoRAConfig()),
    ({"rank": "4", "alpha": "8"}, LoRAConfig(4, 8)),
    ({"rank": "4,q_proj=16"}, LoRAConfig(4, ranks={"q_proj": 16})),
    ({"rank": "q_proj=16,k_proj=2"}, LoRAConfig(8, ranks={"q_proj": 16, "k_proj": 2})),
    ({"rank": "q_proj=16,4", "alpha": "1e1"}, LoRAConfig(4, 10, ranks={"q_proj": 16})),
    ({"alpha": "16,q_proj=0.5"}, LoRAConfig(alphas={"q_proj": 0.5})),
])  # fmt: skip
def test_rank_and_alpha_are_a_number_for_all_layers_and_numbers_by_name(options, config):
    assert lora_config(options) == config


BAD_ENTRIES = ["", "x", "0", "-1", "1.5", "inf", "=8", "q_proj=", "q_proj=x", "q_proj=0"]


@pytest.mark.parametrize("entry", BAD_ENTRIES)
def test_malformed_entries_are_refused_and_all_listed(entry):
    with pytest.raises(BadOption) as caught:
        lora_config({"rank": f"k_proj=4,{entry}", "alpha": "16,16,q_proj=1,q_proj=2"})
    assert f"--rank {entry!r}: not a whole number above 0" in caught.value.cause
    for repeated in ("16", "q_proj=2"):
        assert f"--alpha {repeated!r}: not a number above 0, or given twice" in caught.value.cause


@pytest.mark.parametrize("old, new", [
    ({"r": 8, "rank": None, "alpha": 16.0, "alphas": None, "bias": "none", "init": "kaiming"},
     {"rank": "8", "alpha": "16"}),
    ({"r": 4, "rank": "q_proj=6,up_proj=2", "alpha": 0.5, "alphas": "k_proj=3.0", "epochs": 3},
     {"rank": "4,q_proj=6,up_proj=2", "alpha": "0.5,k_proj=3", "epochs": 3}),
    ({"r": 2, "alpha": 4.0, "targets": ["v_proj"]},  # from before --rank and --init
     {"rank": "2", "alpha": "4", "targets": ["v_proj"]}),
    ({"rank": "8,q_proj=16", "alpha": "16"}, {"rank": "8,q_proj=16", "alpha": "16"}),
    ({"data": ["demo"]}, {"data": ["demo"]}),
])  # fmt: skip
def test_the_options_of_older_runs_are_converted_and_those_of_today_kept(old, new):
    assert upgrade_options(old) == new
    config = lora_config(new)
    assert {k: v for k, v in lora_options(config).items() if k in ("rank", "alpha")} == {
        k: new.get(k, lora_options(LoRAConfig())[k]) for k in ("rank", "alpha")
    }


@pytest.mark.parametrize("removed", [{"init": "pissa"}, {"init": "gaussian"}, {"bias": "all"},
                                     {"init": "pissa", "bias": "lora_only"}])  # fmt: skip
def test_an_older_run_that_used_a_removed_feature_is_refused_by_its_name(removed):
    with pytest.raises(BadRun) as caught:
        upgrade_options({"r": 8, "alpha": 16.0} | removed)
    assert all(f"--{name} {value}" in caught.value.cause for name, value in removed.items())


def test_each_renamed_option_names_an_option_of_today():
    options = {field.name for field in fields(train.TrainConfig)}
    assert not RENAMED.keys() & options and set(RENAMED.values()) <= options


# Whole runs


@pytest.fixture(scope="module")
def toy(lively_checkpoint, arithmetic):
    """Options of a short run on the tiny model and task."""
    return ["--model", lively_checkpoint, "--data", arithmetic, "--precision", "fp32", "--device",
            "cpu", "--save-every", "0", "--limit", "40", "--epochs", "1", "--batch-size", "8",
            "--evals-per-epoch", "2", "--rank", "2", "--alpha", "4"]  # fmt: skip


def run(out: Path, flags: list, *more: object) -> list[dict]:
    train.main([str(flag) for flag in [*flags, "--out", out, *more]])
    return read_log(out / "metrics.jsonl")


def left_behind(out: Path) -> dict[str, bytes]:
    files = [*(out / "best").iterdir(), *out.glob("checkpoints/*/state.safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


RUNS = {
    "DoRA": "--dora",
    "LoRA+": "--lora-plus-ratio 4",
    "all": "--dora --rslora --lora-plus-ratio 4 --targets all-linear --rank 2,q_proj=3"
    " --alpha 4,up_proj=2",
}


class Interrupted(Exception):
    """Raised by a test to stop a run."""


def run_in_two_sessions(monkeypatch, out: Path, flags: list) -> None:
    """Stop a run after its first step was saved, then resume it."""
    calls, save = itertools.count(1), train.save_checkpoint

    def interrupted(*args, **options):
        if next(calls) == 2:
            raise Interrupted
        return save(*args, **options)

    with monkeypatch.context() as during, pytest.raises(Interrupted):
        during.setattr(train, "save_checkpoint", interrupted)
        run(out, flags)
    assert Run(out).read_progress().step == 1
    run(out, flags)


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS.keys())
def test_an_interrupted_run_of_any_kind_gives_the_same_result_bit_for_bit(
    tmp_path, monkeypatch, toy, more
):
    flags = [*toy, *more.split()]
    run(tmp_path / "whole", flags)
    run_in_two_sessions(monkeypatch, tmp_path / "run", flags)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


def test_a_run_folder_of_an_older_version_resumes_and_is_refused_if_it_used_pissa(
    tmp_path, toy, capsys
):
    run(tmp_path / "run", toy, "--rank", "2,q_proj=3", "--max-steps", 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    old = {"r": 2, "rank": "q_proj=3", "alpha": 4.0, "alphas": None, "bias": "none"}
    for init in ("kaiming", "pissa"):
        options = config["options"] | old | {"init": init}
        toys.write_json(tmp_path / "run" / "config.json", config | {"options": options})
        flags = [*toy, "--rank", "2,q_proj=3", "--out", tmp_path / "run"]
        if init == "kaiming":
            run(tmp_path / "run", flags, "--max-steps", 2)
            assert Run(tmp_path / "run").read_progress().step == 2
        else:
            assert "--init pissa, which no longer exists" in refused(flags, capsys)


def test_the_first_step_of_b_is_the_learning_rate_times_the_lora_plus_ratio(tmp_path, toy):
    one_step = ["--warmup", 0, "--schedule", "constant", "--max-steps", 1, "--learning-rate", 1e-3]
    for ratio, more in ((1, []), (16, ["--lora-plus-ratio", 16])):
        lines = run(tmp_path / str(ratio), toy, *one_step, *more)
        (line,) = (line for line in lines if "train_loss" in line)
        tensors = load_file(tmp_path / str(ratio) / "best" / WEIGHTS)
        largest = max(t.abs().max().item() for key, t in tensors.items() if "lora_B" in key)
        assert line["learning_rate"] == 1e-3
        assert largest == pytest.approx(ratio * 1e-3, rel=1e-3)  # Adam's first step is its lr


def test_dora_is_exported_as_a_checkpoint_without_adapters(folder, tmp_path, capsys):
    model = adapted(folder, dora=True)
    config = LoRAConfig(4, 8, dora=True)
    save_adapter(model, tmp_path / "best", config, base=str(folder), revision=None)
    paths = ["--adapter", str(tmp_path / "best"), "--out", str(tmp_path / "merged")]
    export.main([*paths, "--dtype", "fp32"])
    theirs = transformers_model(tmp_path / "merged")
    torch.testing.assert_close(peft_logits(theirs), logits(model), atol=1e-4, rtol=0)


# Continued training


@pytest.fixture
def given_adapter(toy, tmp_path):
    """A DoRA adapter saved by PEFT, for the tiny model."""
    theirs = peft_model(Path(toy[1]), dora=True, targets=("v_proj", "up_proj"), ranks={"v_proj": 3})
    theirs.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def without_rank(toy: list) -> list:
    return toy[: toy.index("--rank")]


def test_a_run_continues_an_adapter_of_peft_with_its_settings(tmp_path, toy, given_adapter, capsys):
    out, more = tmp_path / "run", ["--from-adapter", given_adapter, "--dropout", 0.25]
    run(out, without_rank(toy), *more, "--learning-rate", 0)
    printed = capsys.readouterr().out
    source = f"continuing the adapter in {given_adapter}, trained on {toy[1]}"
    assert f"{source}: rank 4 (v_proj 3), alpha 8" in printed
    before, after = load_file(given_adapter / WEIGHTS), load_file(out / "best" / WEIGHTS)
    assert equal(before, after)
    options = json.loads((out / "config.json").read_text())["options"]
    expected = {"rank": "4,v_proj=3", "alpha": "8", "dora": True}
    assert {key: options[key] for key in expected} == expected
    assert set(options["targets"]) == {"up_proj", "v_proj"}
    assert json.loads((out / "best" / CONFIG).read_text())["lora_dropout"] == 0.25
    run(tmp_path / "moved", without_rank(toy), *more)
    assert not equal(before, load_file(tmp_path / "moved" / "best" / WEIGHTS))


def test_a_continued_run_resumes_and_identifies_the_adapter_by_its_hash(
    tmp_path, monkeypatch, toy, given_adapter, capsys
):
    flags = [*without_rank(toy), "--from-adapter", given_adapter]
    run(tmp_path / "whole", flags)
    (given_adapter / "README.md").write_text("the README is not part of the identity")
    run_in_two_sessions(monkeypatch, tmp_path / "run", flags)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")
    content = (given_adapter / WEIGHTS).read_bytes()
    (given_adapter / WEIGHTS).write_bytes(content[:-1] + b"?")
    printed = refused([*flags, "--out", tmp_path / "run", "--epochs", 2], capsys)
    assert "from_adapter_sha256 was" in printed


def refused(flags: list, capsys) -> str:
    """Run train.py, which must exit with code 2 and two lines on stderr; returns these."""
    capsys.readouterr()
    code = run_script(lambda: train.main([str(flag) for flag in flags]))
    printed = capsys.readouterr().err.partition("error: ")[2]
    assert code == 2 and printed.count("\n") == 2 and "  " in printed and "Traceback" not in printed
    return printed


@pytest.mark.parametrize("flags, cause", [
    ("--rank x_proj=4", "--rank: no adapted layer is named x_proj"),
    ("--rank 0", "--rank '0': not a whole number above 0"),
    ("--rank q_proj=1.5,x", "--rank 'q_proj=1.5': not a whole number above 0"),
    ("--alpha q_proj=0", "--alpha 'q_proj=0': not a number above 0"),
    ("--alpha q_proj=inf,k_proj=nan", "--alpha 'k_proj=nan': not a number above 0"),
    ("--rank 1.5 --alpha x", "given twice; --alpha 'x': not a number above 0"),
    ("--targets q_proj --alpha v_proj=4", "--alpha: no adapted layer is named v_proj"),
    ("--r 8", "--r"),
    ("--bias all", "--bias"),
    ("--init pissa", "--init"),
    ("--lora-plus-ratio 0", "--lora-plus-ratio 0.0 is not above 0"),
    ("--from-adapter nowhere", "nowhere is not an adapter folder"),
])  # fmt: skip
def test_adapter_options_that_cannot_be_used_are_refused(tmp_path, toy, capsys, flags, cause):
    assert cause in refused([*without_rank(toy), "--out", tmp_path / "run", *flags.split()], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, cause", [
    ("--rank 5", "--rank is 4,v_proj=3 in the adapter, 5 here"),
    ("--rank 4,v_proj=4", "--rank is 4,v_proj=3 in the adapter, 4,v_proj=4 here"),
    ("--alpha 32 --rslora", "--alpha is 8 in the adapter, 32 here; --rslora is False in the"),
    ("--targets q_proj", "--targets is"),
])  # fmt: skip
def test_options_that_contradict_the_adapter_are_refused(
    tmp_path, toy, capsys, given_adapter, flags, cause
):
    fixed = [*without_rank(toy), "--out", tmp_path / "run", "--from-adapter", given_adapter]
    assert cause in refused([*fixed, *flags.split()], capsys)
    assert not (tmp_path / "run").exists()


def test_an_adapter_for_another_base_or_without_weights_is_not_continued(
    tmp_path, toy, capsys, given_adapter
):
    flags = [*without_rank(toy), "--out", tmp_path / "run", "--from-adapter", given_adapter]
    other = toys.write_checkpoint(tmp_path / "other", layers=3)
    assert "does not fit its base" in refused([*flags, "--model", other], capsys)
    (given_adapter / WEIGHTS).unlink()
    assert "cannot be read" in refused(flags, capsys)
    assert not (tmp_path / "run").exists()
