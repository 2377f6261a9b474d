"""Laws of the other adapters: DoRA, LoRA+, first values, rank and alpha by target, training on.

The truth is the base, the plain formula, or PEFT.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import train
from errors import BadAdapter, BadOption, run_script
from lora.dora import DoRALinear
from lora.dropout import token_keys
from lora.inject import (
    LoRAConfig,
    adapters,
    by_target,
    count,
    disabled,
    inject,
    merge,
    seed_dropout,
    trained_parameters,
    unmerge,
    unwrapped_state,
)
from lora.layer import LoRALinear
from lora.peft_format import CONFIG, WEIGHTS, peft_key, read_adapter, save_adapter
from lora.plus import rate_groups
from model.compile import compile_layers
from model.load import load_model
from model.loss import linear_cross_entropy
from run import export
from run.folder import Run
from tests import toys
from tests.test_lora import (
    EVERYWHERE,
    as_if_trained,
    bits,
    equal,
    logits,
    peft_logits,
    tokens_of,
    transformers_model,
)
from tests.toys import read_log

MIXED = {"ranks": {"q_proj": 6, "layers.1.mlp.up_proj": 2}, "alphas": {"q_proj": 9, "k_proj": 3}}
KINDS = {
    "DoRA": {"dora": True},
    "DoRA everywhere, rsLoRA, biases": {
        "dora": True, "rslora": True, "bias": "all", "targets": EVERYWHERE,
    },
    "ranks and alphas": {"targets": EVERYWHERE, **MIXED},
    "ranks and alphas, DoRA, rsLoRA": {
        "targets": EVERYWHERE, "dora": True, "rslora": True, **MIXED,
    },
    "every linear layer": {"targets": ("all-linear",)},
    "one layer": {"targets": ("layers.1.self_attn.q_proj",)},
    "PiSSA": {"init": "pissa"},
    "PiSSA, everywhere, rsLoRA, biases": {
        "init": "pissa", "targets": EVERYWHERE, "rslora": True, "bias": "lora_only",
    },
    "PiSSA, DoRA, ranks and alphas": {
        "init": "pissa", "dora": True, "targets": EVERYWHERE, **MIXED,
    },
}  # fmt: skip


def each_kind(function):
    return pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())(function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose logits are of order one; not to be changed."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", std=0.1)


def adapted(folder, *, dtype=torch.float32, trained=True, size=0.05, **config):
    """The checkpoint with adapters of rank 4 and alpha 8, in eval mode."""
    model = load_model(folder, dtype=dtype)
    inject(model, LoRAConfig(r=4, alpha=8, **{"dropout": 0.0} | config))
    if trained:
        as_if_trained(model, size=size)
    return model


def first(model) -> LoRALinear:
    return next(adapters(model))


# DoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_is_the_base_bit_for_bit_in_training_too(folder, dtype):
    base = logits(load_model(folder, dtype=dtype))
    options = {"targets": EVERYWHERE, "bias": "all", "dropout": 0.5, "dora": True}
    model = adapted(folder, dtype=dtype, trained=False, **options)
    assert torch.equal(logits(model), base)
    tokens, positions, _ = tokens_of()
    seed_dropout(model.train(), seed=0, epoch=0, row_ids=tokens, positions=positions)
    assert torch.equal(logits(model), base)
    assert merge(model) == 0.0 and torch.equal(logits(model), base)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_doras_output_is_the_rows_at_their_trained_lengths(dropout, has_bias):
    torch.manual_seed(0)
    base = nn.Linear(24, 10, bias=has_bias)
    layer = DoRALinear(base, r=4, alpha=6, dropout=dropout)
    layer.start_magnitude()
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
def test_the_norm_is_that_of_the_rows_without_building_them(dtype, tolerance):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(96, 40, dtype=dtype), r=8, alpha=16)
    layer.start_magnitude()
    nn.init.normal_(layer.lora_B, std=0.1)
    rows = layer.base_layer.weight.float() + 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.norm(), rows.norm(dim=1).detach(), atol=0, rtol=tolerance)
    assert (layer.norm() / layer.lora_magnitude_vector - 1).abs().max() > 0.1


def test_a_row_of_zeros_stays_one_under_dora():
    base = nn.Linear(6, 3, bias=False)
    base.weight.data[1] = 0
    layer = DoRALinear(base, r=2, alpha=2)
    layer.start_magnitude()
    x = torch.randn(4, 6)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters(recurse=False))


def test_dora_trains_a_b_and_lengths_and_counts_them(folder):
    model = adapted(folder, dora=True, targets=("q_proj", "up_proj"))
    model(*tokens_of()).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = name.endswith(("lora_A", "lora_B", "lora_magnitude_vector"))
        assert (parameter.grad is not None) == wanted, name
        assert not wanted or parameter.dtype == torch.float32 and parameter.grad.any()
    base = sum(p.numel() for p in load_model(folder, dtype=torch.float32).parameters())
    sides = 4 * (64 + 64) + 64 + 4 * (64 + 96) + 96
    assert count(model) == (2 * sides, base)


# What holds of all kinds


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_a_disabled_adapter_of_any_kind_is_the_base_bit_for_bit(folder, kind, dtype, merged):
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
def test_merged_is_adapted_and_unmerging_restores_of_any_kind(folder, kind):
    model = adapted(folder, **kind)
    tuned, before = logits(model), bits(model)
    assert merge(model) < 1e-5
    torch.testing.assert_close(logits(model), tuned, atol=1e-4, rtol=0)
    base = load_model(folder, dtype=torch.float32).state_dict()
    state = unwrapped_state(model)
    assert state.keys() == base.keys() and not equal(state, base)
    unmerge(model)
    assert equal(bits(model), before) and torch.equal(logits(model), tuned)


def peft_config(config: LoRAConfig):
    from peft import LoraConfig

    targets = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    if config.targets == ("attention",):
        targets = list(EVERYWHERE[:4])
    start = {"kaiming": True, "gaussian": "gaussian", "pissa": "pissa"}[config.init]
    return LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets,
        bias=config.bias, use_rslora=config.rslora, use_dora=config.dora, init_lora_weights=start,
        rank_pattern=config.ranks, alpha_pattern=config.alphas, task_type="CAUSAL_LM",
    )  # fmt: skip


def peft_model(folder, *, trained=True, **kind):
    """PEFT's model of the same settings, in eval mode."""
    from peft import get_peft_model

    config = LoRAConfig(r=4, alpha=8, **{"dropout": 0.0} | kind)
    model = get_peft_model(transformers_model(folder), peft_config(config))
    if trained:
        as_if_trained(model, size=0.05)
    return model.eval()


@each_kind
def test_pefts_folder_of_any_kind_gives_pefts_logits_and_gradients(folder, tmp_path, kind):
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
def test_peft_puts_our_folder_of_any_kind_onto_the_base_and_gives_our_logits(
    folder, tmp_path, kind
):
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
    assert back.r == (8 if config.init == "pissa" else 4) and back.init == "kaiming"


@pytest.mark.parametrize("kind", [{"dora": True}, {"init": "pissa"}, {"ranks": {"q_proj": 6}}])
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_steps_of_training_come_to_what_peft_and_its_lora_plus_come_to(
    folder, tmp_path, kind, ratio
):
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft_model(folder, trained=False, bias="lora_only", **kind)
    model = load_model(folder, dtype=torch.float32)
    if "init" in kind:
        inject(model, LoRAConfig(r=4, alpha=8, dropout=0, bias="lora_only", **kind))
    else:
        theirs.save_pretrained(tmp_path)
        read_adapter(tmp_path, model)
    groups = rate_groups(trained_parameters(model), ratio, 0.1)
    for group in groups:
        group["lr"] = 2e-3 * group["ratio"]
    ours = torch.optim.AdamW(groups, eps=1e-4)
    kinds = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.1}
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **kinds)
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


def test_lora_plus_groups_are_pefts(folder):
    from peft.optimizers import create_loraplus_optimizer

    kind = {"dora": True, "bias": "all"}
    theirs, model = peft_model(folder, **kind), adapted(folder, **kind)
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
    assert ours == expected and set(ours.values()) == {(1.0, 0.1), (16, 0.1), (16, 0.0)}
    (one,) = rate_groups(trained_parameters(model), None, 0.1)
    assert dict(one["params"]) == trained_parameters(model) and one["ratio"] == 1.0


@torch.no_grad()
def test_dora_drops_what_peft_drops(folder, tmp_path):
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
def test_dora_in_compiled_layers_is_the_plain_one(folder, dropout):
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


# What adapters start from


def test_a_gaussian_a_has_pefts_spread_and_depends_on_seed_and_index_alone(folder):
    theirs = peft_model(folder, trained=False, init="gaussian")
    torch.manual_seed(5)
    models = []
    for seed in (3, 3, 4):
        models.append(load_model(folder, dtype=torch.float32))
        inject(models[-1], LoRAConfig(r=4, init="gaussian"), seed=seed)
    A, same, other = (torch.cat([layer.lora_A for layer in adapters(m)]) for m in models)
    expected = torch.cat([p for n, p in theirs.named_parameters() if "lora_A" in n])
    assert torch.equal(A, same)
    assert abs(torch.corrcoef(torch.stack((A, other)).flatten(1))[0, 1]) < 0.1
    for drawn in (A, expected):
        assert abs(drawn.std() * 4 - 1) < 0.1 and abs(drawn.mean()) < 0.03
    assert not any(layer.lora_B.any() for layer in adapters(models[0]))
    assert torch.equal(logits(models[0]), logits(load_model(folder, dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_starts_from_pefts_numbers_but_for_signs(folder, dtype):
    from peft import get_peft_model

    theirs = transformers_model(folder).to(dtype)
    config = LoRAConfig(r=4, alpha=8, dropout=0, init="pissa", targets=EVERYWHERE)
    theirs = get_peft_model(theirs, peft_config(config))
    model = load_model(folder, dtype=dtype)
    inject(model, config)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            other = theirs.base_model.model.get_submodule(name)
            A, B = (part["default"].weight.float() for part in (other.lora_A, other.lora_B))
            rounding = 0 if dtype == torch.float32 else 2**-8  # theirs are rounded in between
            torch.testing.assert_close(layer.lora_A.abs(), A.abs(), atol=1e-5, rtol=rounding)
            torch.testing.assert_close(layer.lora_B.abs(), B.abs(), atol=1e-5, rtol=rounding)
            residual, expected = layer.base_layer.weight, other.base_layer.weight
            torch.testing.assert_close(residual, expected, atol=1e-5, rtol=rounding)
            S = torch.linalg.svdvals(layer.taken_out.weight.float())
            assert torch.linalg.matrix_norm(residual.float(), 2) < S[4] + 0.02 < S[0]
            assert (layer.lora_A.amax(dim=1) == layer.lora_A.abs().amax(dim=1)).all()


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_pissa_is_the_base_to_rounding(folder, dora):
    base = logits(load_model(folder, dtype=torch.float32))
    model = adapted(folder, trained=False, init="pissa", dora=dora, targets=EVERYWHERE)
    torch.testing.assert_close(logits(model), base, atol=5e-5, rtol=0)
    assert first(model).base_layer.weight.data_ptr() != first(model).taken_out.weight.data_ptr()


def test_what_a_bf16_pissa_loses_when_it_is_stored_is_the_residuals_rounding(folder, tmp_path):
    model = adapted(folder, dtype=torch.bfloat16, init="pissa", size=0.02)
    config = LoRAConfig(r=4, alpha=8, init="pissa")
    save_adapter(model, tmp_path, config, base="b", revision=None)
    stored = load_model(folder, dtype=torch.bfloat16)
    read_adapter(tmp_path, stored)
    for layer, plain in zip(adapters(model), adapters(stored), strict=True):
        trained = layer.base_layer.weight.float() + layer.delta()
        loaded = plain.base_layer.weight.float() + plain.delta()
        rounding = layer.base_layer.weight.abs().float() * 2**-8
        assert ((trained - loaded).abs() <= rounding + 1e-6).all()
        assert (trained - loaded).any()


def test_ranks_that_pissa_cannot_fill_are_refused(folder):
    with pytest.raises(BadOption, match="k_proj has 32 singular directions, and its rank is 33"):
        adapted(folder, init="pissa", ranks={"k_proj": 33})
    assert len(first(adapted(folder, init="pissa", ranks={"q_proj": 64})).lora_A) == 64


# Rank and alpha by target


def test_a_target_has_its_own_rank_and_alpha_and_the_first_match_counts(folder):
    ranks = {"layers.0.self_attn.q_proj": 2, "q_proj": 6}
    model = adapted(folder, ranks=ranks, alphas={"v_proj": 3})
    shapes = [len(layer.lora_A) for layer in adapters(model)]
    scalings = [layer.scaling for layer in adapters(model)]
    assert shapes == [2, 4, 4, 4, 6, 4, 4, 4]  # q, k, v, o of two layers
    assert scalings == [8 / 2, 2, 3 / 4, 2, 8 / 6, 2, 3 / 4, 2]


@pytest.mark.parametrize("name", ["up_proj", "proj", "self_attn", "q", "layers.2.self_attn.q_proj"])
def test_a_rank_or_alpha_of_what_is_not_adapted_is_refused(folder, name):
    with pytest.raises(BadOption, match=f"--rank: no adapted layer is named {name}") as caught:
        adapted(folder, ranks={"q_proj": 2, name: 4})
    assert "k_proj, o_proj, q_proj, v_proj" in caught.value.remedy
    with pytest.raises(BadOption, match="--alphas: no adapted layer"):
        adapted(folder, alphas={name: 4})


@pytest.mark.parametrize("entry", ["8", "q_proj=", "q_proj=x", "=8", "q_proj=0", "q_proj=-1",
                                   "q_proj=1.5", "q_proj=inf", "a=1,a=2"])  # fmt: skip
def test_entries_that_are_no_name_and_number_are_refused(entry):
    assert by_target("--rank", "q_proj=16,default=8", int) == {"q_proj": 16, "default": 8}
    assert by_target("--rank", None, int) == {}
    with pytest.raises(BadOption, match="--rank .*not a name and a number above 0"):
        by_target("--rank", entry, int)


def test_an_adapter_file_that_claims_huge_ranks_is_refused_before_there_are_as_many(
    folder, tmp_path
):
    save_adapter(adapted(folder), tmp_path, LoRAConfig(4, 8), base="b", revision=None)
    toys.change_json(tmp_path / CONFIG, rank_pattern={"q_proj": 10**12})
    with pytest.raises(BadAdapter, match="numbers, and adapter_model.safetensors has"):
        read_adapter(tmp_path, load_model(folder, dtype=torch.float32))


@pytest.mark.parametrize("change, cause", [
    ({"rank_pattern": {"up_proj": 2}}, "rank_pattern: no adapted layer is named up_proj"),
    ({"alpha_pattern": {"x": 2}}, "alpha_pattern: no adapted layer is named x"),
    ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight is (4, 64), not (2, 64)"),
    ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
    ({"init_lora_weights": "pissa", "lora_alpha": 0}, "lora_alpha is 0, with PiSSA"),
    ({"init_lora_weights": "pissa", "r": 33}, "init_lora_weights: model.layers.0.self_attn.k_proj"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_tensors_or_the_base_are_refused(
    folder, tmp_path, change, cause
):
    save_adapter(adapted(folder), tmp_path, LoRAConfig(4, 8), base="b", revision=None)
    toys.change_json(tmp_path / CONFIG, **change)
    with pytest.raises(BadAdapter) as caught:
        read_adapter(tmp_path, load_model(folder, dtype=torch.float32))
    assert cause in caught.value.cause


# Whole runs


@pytest.fixture(scope="module")
def toy(lively_checkpoint, arithmetic):
    """Flags of a short run on the toys."""
    return ["--model", lively_checkpoint, "--data", arithmetic, "--precision", "fp32", "--device",
            "cpu", "--save-every", "0", "--limit", "40", "--epochs", "1", "--batch-size", "8",
            "--evals-per-epoch", "2", "--r", "2", "--alpha", "4"]  # fmt: skip


def run(out: Path, flags: list, *more: object) -> list[dict]:
    train.main([str(flag) for flag in [*flags, "--out", out, *more]])
    return read_log(out / "metrics.jsonl")


def left_behind(out: Path) -> dict[str, bytes]:
    files = [*(out / "best").iterdir(), *out.glob("checkpoints/*/state.safetensors")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


RUNS = {
    "DoRA": "--dora",
    "LoRA+": "--lora-plus-ratio 4 --bias all",
    "PiSSA": "--init pissa",
    "all": "--dora --init pissa --lora-plus-ratio 4 --bias lora_only --targets all-linear"
    " --rank q_proj=3 --alphas up_proj=2",
}


class Interrupted(Exception):
    """What stops a run in these tests."""


def run_in_two_sittings(monkeypatch, out: Path, flags: list) -> None:
    """A run that is stopped after its first step was saved, and then goes on."""
    calls, save = itertools.count(1), train.save_checkpoint

    def interrupted(*args, **options):
        if next(calls) == 3:
            raise Interrupted
        return save(*args, **options)

    with monkeypatch.context() as during, pytest.raises(Interrupted):
        during.setattr(train, "save_checkpoint", interrupted)
        run(out, flags)
    assert Run(out).read_progress().step == 1
    run(out, flags)


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS.keys())
def test_a_run_of_any_kind_that_was_interrupted_comes_to_the_same_end_bit_for_bit(
    tmp_path, monkeypatch, toy, more
):
    flags = [*toy, *more.split()]
    run(tmp_path / "whole", flags)
    run_in_two_sittings(monkeypatch, tmp_path / "run", flags)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")


def test_the_best_of_a_pissa_run_answers_as_it_was_validated_on_the_base_as_published(
    tmp_path, toy
):
    from peft import PeftModel

    lines = run(tmp_path / "run", toy, "--init", "pissa", "--learning-rate", "1e-2", "--dropout", 0)
    best, base = tmp_path / "run" / "best", toy[1]
    assert json.loads((best / CONFIG).read_text())["r"] == 4
    assert "from pissa" in (best / "README.md").read_text()
    assert lines[-1]["val_loss"] < lines[0]["train_loss"]
    model = load_model(Path(base), dtype=torch.float32)
    read_adapter(best, model)
    theirs = PeftModel.from_pretrained(transformers_model(base), best).eval()
    torch.testing.assert_close(logits(model), peft_logits(theirs), atol=1e-3, rtol=0)
    again = run(tmp_path / "again", toy, "--from-adapter", best, "--learning-rate", 0, "--r", 4,
                "--alpha", 8)  # fmt: skip
    reached = min(line["val_loss"] for line in lines if "val_loss" in line)
    assert again[-1]["val_loss"] == pytest.approx(reached, abs=1e-4)


def test_b_moves_by_the_ratio_of_the_rate_in_its_first_step(tmp_path, toy):
    still = ["--warmup", 0, "--schedule", "constant", "--max-steps", 1, "--learning-rate", 1e-3]
    for ratio, more in ((1, []), (16, ["--lora-plus-ratio", 16])):
        (line, *_) = run(tmp_path / str(ratio), toy, *still, *more)
        tensors = load_file(tmp_path / str(ratio) / "best" / WEIGHTS)
        largest = max(t.abs().max().item() for key, t in tensors.items() if "lora_B" in key)
        assert line["learning_rate"] == 1e-3
        assert largest == pytest.approx(ratio * 1e-3, rel=1e-3)  # Adam's first step is its rate


def test_dora_can_be_exported_as_a_checkpoint_without_adapters(folder, tmp_path, capsys):
    model = adapted(folder, dora=True)
    config = LoRAConfig(4, 8, dora=True)
    save_adapter(model, tmp_path / "best", config, base=str(folder), revision=None)
    paths = ["--adapter", str(tmp_path / "best"), "--out", str(tmp_path / "merged")]
    export.main([*paths, "--dtype", "fp32"])
    theirs = transformers_model(tmp_path / "merged")
    torch.testing.assert_close(peft_logits(theirs), logits(model), atol=1e-4, rtol=0)


# Training an adapter on


@pytest.fixture
def given_adapter(toy, tmp_path):
    """A DoRA adapter that PEFT has saved, for the toys' base."""
    theirs = peft_model(Path(toy[1]), dora=True, targets=("v_proj", "up_proj"), ranks={"v_proj": 3})
    theirs.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def plain(toy: list) -> list:
    return toy[: toy.index("--r")]


def test_a_run_goes_on_from_pefts_adapter_with_its_settings(tmp_path, toy, given_adapter, capsys):
    out, more = tmp_path / "run", ["--from-adapter", given_adapter, "--dropout", 0.25]
    run(out, plain(toy), *more, "--learning-rate", 0)
    said = capsys.readouterr().out
    assert f"from the adapter in {given_adapter}, of {toy[1]}: rank 4 (v_proj 3), alpha 8" in said
    before, after = load_file(given_adapter / WEIGHTS), load_file(out / "best" / WEIGHTS)
    assert equal(before, after)
    options = json.loads((out / "config.json").read_text())["options"]
    taken = {"r": 4, "alpha": 8, "dora": True, "rank": "v_proj=3", "alphas": None}
    assert {key: options[key] for key in taken} == taken
    assert set(options["targets"]) == {"up_proj", "v_proj"}
    assert json.loads((out / "best" / CONFIG).read_text())["lora_dropout"] == 0.25
    run(tmp_path / "moved", plain(toy), *more)
    assert not equal(before, load_file(tmp_path / "moved" / "best" / WEIGHTS))


def test_a_run_from_an_adapter_starts_from_it_once_and_knows_it_by_its_hash(
    tmp_path, monkeypatch, toy, given_adapter, capsys
):
    flags = [*plain(toy), "--from-adapter", given_adapter]
    run(tmp_path / "whole", flags)
    (given_adapter / "README.md").write_text("another card is the same adapter")
    run_in_two_sittings(monkeypatch, tmp_path / "run", flags)
    assert left_behind(tmp_path / "run") == left_behind(tmp_path / "whole")
    content = (given_adapter / WEIGHTS).read_bytes()
    (given_adapter / WEIGHTS).write_bytes(content[:-1] + b"?")
    said = refused([*flags, "--out", tmp_path / "run", "--epochs", 2], capsys)
    assert "from_adapter_sha256 was" in said


def refused(flags: list, capsys) -> str:
    """The cause that train.py gives, in two lines and exit code 2, and no run folder is left."""
    capsys.readouterr()
    code = run_script(lambda: train.main([str(flag) for flag in flags]))
    said = capsys.readouterr().err.partition("error: ")[2]
    assert code == 2 and said.count("\n") == 2 and "  " in said and "Traceback" not in said
    return said


@pytest.mark.parametrize("flags, cause", [
    ("--rank x_proj=4", "--rank: no adapted layer is named x_proj"),
    ("--rank 8", "--rank 8: not a name and a number above 0"),
    ("--rank q_proj=1.5,default=x", "--rank q_proj=1.5, default=x: not a name and a number"),
    ("--alphas q_proj=0", "--alphas q_proj=0: not a name and a number above 0"),
    ("--alphas q_proj=inf,k_proj=nan", "--alphas q_proj=inf, k_proj=nan: not a name and a number"),
    ("--targets q_proj --alphas v_proj=4", "--alphas: no adapted layer is named v_proj"),
    ("--r 4 --rank default=6", "--r 4, --alpha 16 and default=6 of --rank"),
    ("--init svd", "--init: invalid choice: 'svd'"),
    ("--init pissa --r 40", "has 32 singular directions, and its rank is 40"),
    ("--lora-plus-ratio 0", "--lora-plus-ratio 0.0 is not above 0"),
    ("--from-adapter nowhere", "nowhere is no adapter: it has no adapter_config.json"),
])  # fmt: skip
def test_adapter_options_that_cannot_be_are_refused(tmp_path, toy, capsys, flags, cause):
    assert cause in refused([*plain(toy), "--out", tmp_path / "run", *flags.split()], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, cause", [
    ("--r 5", "r is 4 there, 5 here"),
    ("--alpha 32 --init pissa", "alpha is 8 there, 32.0 here; init is kaiming there, pissa here"),
    ("--targets q_proj", "targets is ("),
    ("--rank v_proj=4", "ranks is {'v_proj': 3} there, {'v_proj': 4} here"),
])  # fmt: skip
def test_options_that_contradict_the_adapter_are_refused(
    tmp_path, toy, capsys, given_adapter, flags, cause
):
    flags = [
        *plain(toy),
        "--out",
        tmp_path / "run",
        "--from-adapter",
        given_adapter,
        *flags.split(),
    ]
    assert cause in refused(flags, capsys)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_or_without_weights_is_not_trained_on(
    tmp_path, toy, capsys, given_adapter
):
    flags = [*plain(toy), "--out", tmp_path / "run", "--from-adapter", given_adapter]
    other = toys.write_checkpoint(tmp_path / "other", layers=3)
    assert "does not fit its base" in refused([*flags, "--model", other], capsys)
    (given_adapter / WEIGHTS).unlink()
    assert "cannot be read" in refused(flags, capsys)
    assert not (tmp_path / "run").exists()
