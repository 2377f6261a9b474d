"""Tests of adapters that other programs have saved: read as PEFT reads them, or refused by name.

PEFT is the oracle: it makes most of the adapters here, and its logits and merged weights are the
expected ones. A refusal must name the cause, and its remedy must be the one for that fault.
"""

import json
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train
from errors import BadAdapter, HubError, UserError, run_script
from lora.config import LoRAConfig, ends_in
from lora.inject import adapters, merge, unwrapped_state
from lora.options import lora_config, lora_options
from lora.peft_folder import AdapterFolder
from lora.peft_format import (
    CONFIG,
    WEIGHTS,
    check_adapter,
    read_adapter,
    read_adapter_config,
    save_adapter,
)
from lora.peft_settings import plain_name, read_settings
from model.load import load_model
from run import base as run_base
from run import export
from run.base import Base, checkpoint_of_adapter
from tests import toys
from tests.adapter_helpers import (
    as_if_trained,
    bits,
    equal,
    logits,
    peft_logits,
    transformers_model,
)

QV = ["q_proj", "v_proj"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TABLE = "base_model.model.model.embed_tokens.weight"
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "make_cases.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of three layers whose logits are of order one; tests must not change it."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", std=0.1, layers=3)


@pytest.fixture
def plain(folder, tmp_path):
    """An adapter as PEFT saves it, for tests to change."""
    peft_adapter(folder, tmp_path / "plain")
    return tmp_path / "plain"


def peft_adapter(folder: Path, out: Path, save: dict | None = None, **settings):
    """PEFT's model with a trained adapter, which is also saved to `out`."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(transformers_model(folder), LoraConfig(**settings))
    as_if_trained(model, size=0.05)
    model.eval().save_pretrained(out, **save or {})
    return model


def loaded(folder: Path, adapter: Path):
    model = load_model(folder, dtype=torch.float32)
    read_adapter(adapter, model)
    return model


def refusal(folder: Path, adapter: Path) -> BadAdapter:
    model = load_model(folder, dtype=torch.float32)
    before = bits(model)
    with pytest.raises(BadAdapter) as caught:
        read_adapter(adapter, model)
    assert equal(bits(model), before) and not list(adapters(model)), "the model was changed"
    assert caught.value.cause and caught.value.remedy
    return caught.value


def change_tensors(adapter: Path, change) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS, metadata={"format": "pt"})


def rename(adapter: Path, old: str, new: str) -> None:
    change_tensors(adapter, lambda ts: {re.sub(old, new, key): t for key, t in ts.items()})


# Layers and ranks that only the tensors determine


SELECTIONS = {
    "layers by number": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "layers by number, in a list by name": {
        "layers_to_transform": [1], "layers_pattern": ["layers"],
    },
    "excluded names": {"exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]},
    "an excluding expression": {"exclude_modules": r".*layers\.[01]\.self_attn\.v_proj"},
    "an expression for all layers": {"target_modules": r".*\.(q_proj|down_proj)"},
    "an expression for some": {"target_modules": r"^(model)(?=.*self_attn).*\.[02]\..*k_proj$"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]},
    "names that no layer has": {"target_modules": ["q_proj", "query_key_value", "c_attn"]},
    "fan_in_fan_out of another kind of layer": {"fan_in_fan_out": True},
    "MiCA's initial values": {"init_lora_weights": "mica"},
    "DoRA on one layer": {"use_dora": True, "layers_to_transform": [2]},
    "rsLoRA on some": {"use_rslora": True, "target_modules": r".*\.2\..*up_proj"},
    "ranks by expression": {"rank_pattern": {r".*\.layers\.2\..*": 2, r".*[01]\..*q.proj": 3}},
    "ranks and alphas by anchored names": {
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, r".*\.v_proj$": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, r".*\.v_proj$": 9},
    },
    "overlapping keys": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3},
        "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 2},
    },
}  # fmt: skip


@pytest.fixture(params=SELECTIONS.values(), ids=SELECTIONS.keys())
def selected(request, folder, tmp_path):
    """(folder of an adapter on some layers or with ranks by layer, PEFT's model)."""
    # As another process would load it: saving sorts the keys of patterns, and so can change which
    # one matches first.
    from peft import PeftModel

    peft_adapter(folder, tmp_path / "theirs", **request.param)
    theirs = PeftModel.from_pretrained(transformers_model(folder), tmp_path / "theirs").eval()
    return tmp_path / "theirs", theirs


@torch.no_grad()
def test_an_adapter_on_any_selection_of_layers_gives_the_logits_of_peft(folder, selected):
    adapter, theirs = selected
    model = loaded(folder, adapter)
    truth = peft_logits(theirs)
    torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=0)
    assert (truth - peft_logits(transformers_model(folder))).abs().max() > 0.01
    merge(model)
    merged = theirs.merge_and_unload().state_dict()
    ours = unwrapped_state(model)
    if not AdapterFolder.read(adapter).settings.dora:
        assert all(torch.equal(ours[name], merged[name]) for name in ours), "not bit for bit"


@torch.no_grad()
def test_what_is_saved_of_it_and_of_its_options_loads_the_same_layers_in_peft(
    folder, selected, tmp_path
):
    from peft import PeftModel

    adapter, theirs = selected
    model = loaded(folder, adapter)
    config = lora_config({"from_adapter": str(adapter), "dropout": 0.0})
    assert lora_config(json.loads(json.dumps(lora_options(config)))) == config
    save_adapter(model, tmp_path / "ours", config, base=str(folder), revision=None)
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()
    again = PeftModel.from_pretrained(transformers_model(folder), tmp_path / "ours").eval()
    assert torch.equal(peft_logits(again), peft_logits(theirs))
    assert equal(bits(loaded(folder, tmp_path / "ours")), bits(model))
    names = {name for name, _ in again.named_modules() if name.endswith(".lora_A")}
    assert names == {name for name, _ in theirs.named_modules() if name.endswith(".lora_A")}


@given(
    st.sampled_from([QV, ["all-linear"], ["layers.1.self_attn.q_proj"], ["self_attn.q_proj"],
                     ["model.layers.0.mlp.up_proj", "none"]]),
    st.sampled_from([None, [], ["q_proj"], ["layers.1.self_attn.q_proj", "mlp.up_proj"]]),
    st.sampled_from([None, [], 1, [0, 2]]),
    st.sampled_from([None, "layers", ["h", "layers"], ["h"]]),
)  # fmt: skip
def test_names_select_the_layers_that_they_select_in_peft(targets, excluded, layers, pattern):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if layers in (None, []):
        pattern = None
    linear = [f"model.layers.{i}.{n}" for i in range(3)
              for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]  # fmt: skip
    is_all = targets == ["all-linear"]
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "exclude_modules": excluded,
           "target_modules": "all-linear" if is_all else targets,
           "layers_to_transform": layers, "layers_pattern": pattern}  # fmt: skip
    theirs = LoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"] if is_all else targets,
        exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern,
    )  # fmt: skip
    ours = read_settings(Path("adapter"), json.dumps(raw).encode())
    expected = [bool(check_target_module_exists(theirs, name)) for name in linear]
    assert [ours.selects(name) for name in linear] == expected


NAMES = [f"model.layers.{i}.{n}" for i in (0, 1, 11) for n in ("self_attn.q_proj", "mlp.up_proj")]
KEYS = ["q_proj", "proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "1.mlp.up_proj",
        "model.layers.1.mlp.up_proj", "^model.layers.1.mlp.up_proj", "^layers.1.mlp.up_proj",
        r"^model\.layers\.1\.mlp\.up_proj$", "^q_proj", "q_proj$", r".*\.q_proj", r"^.*\.up_proj$",
        ".*.q_proj", "x.q_proj", "layers.11.mlp.up_proj", "model"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_spells_out_a_name_matches_the_layers_that_it_matches_in_peft(key):
    expected = [bool(re.match(rf"(.*\.)?({key})$", name)) for name in NAMES]  # as get_pattern_key
    end, is_full = plain_name(key)
    assert [name == end if is_full else ends_in(name, end) for name in NAMES] == expected


EXPRESSIONS = [
    "(a+)+b",
    r".*\.layers\.1\..*(q_proj|v_proj)$",
    r".*\.(q|v)_proj",
    "q_.*",
    "[qv]_proj",
    "q_proj|v_proj",
    ".",
    "",
    "*",
    "(",
]


@pytest.mark.parametrize("key", EXPRESSIONS)
def test_an_alpha_by_an_expression_is_refused_by_name(folder, plain, key):
    assert plain_name(key) is None
    toys.change_json(plain / CONFIG, alpha_pattern={"q_proj": 2, key: 3})
    error = refusal(folder, plain)
    assert f"alpha_pattern has {key!r}" in error.cause and "names of the layers" in error.remedy


def test_no_expression_of_an_adapter_is_ever_run(folder, plain, monkeypatch):
    for name in ("match", "fullmatch", "search", "compile"):
        monkeypatch.setattr(re, name, None)
    usual = logits(loaded(folder, plain))
    for field in ("target_modules", "exclude_modules"):
        toys.change_json(plain / CONFIG, **{field: "(a|a|a)*" * 30 + "(("})
    toys.change_json(plain / CONFIG, rank_pattern={"(.*)*" * 20: 4})
    started = time.monotonic()
    assert torch.equal(logits(loaded(folder, plain)), usual)
    assert time.monotonic() - started < 2


SELECTION_FAULTS = {
    "a layer that target_modules does not name": (
        {"target_modules": ["v_proj"]}, "q_proj.lora_B.weight: not expected, by target_modules",
    ),
    "a layer that is excluded": ({"exclude_modules": ["q_proj"]}, "exclude_modules q_proj"),
    "a layer of another number": ({"layers_to_transform": [0, 1]}, "layers_to_transform 0, 1"),
    "no tensors for a name": (
        {"target_modules": [*QV, "k_proj"]}, "k_proj.lora_A.weight is missing",
    ),
    "a rank that no layer has": ({"rank_pattern": {"q_.*": 2}}, "no layer has the rank 2"),
    "a rank that is not given": ({"r": 8, "rank_pattern": {".*": 8}}, "the rank 8 of '.*'"),
    "another rank": ({"r": 8}, "lora_A.weight is (4, 64), not (8, 64)"),
    "a rank for no layer": ({"rank_pattern": {"k_proj": 2}}, "no adapted layer is named k_proj"),
    "an alpha for no layer": ({"alpha_pattern": {"^q_proj": 2}}, "layer is named ^q_proj"),
    "layers by a pattern alone": ({"layers_pattern": "layers"}, "layers_pattern is 'layers'"),
}  # fmt: skip


@pytest.mark.parametrize("change, cause", SELECTION_FAULTS.values(), ids=SELECTION_FAULTS)
def test_a_config_that_contradicts_the_tensors_is_refused(folder, plain, change, cause):
    toys.change_json(plain / CONFIG, **change)
    error = refusal(folder, plain)
    assert cause in error.cause and (CONFIG in error.remedy or "copy it again" in error.remedy)


def test_an_adapter_on_the_head_is_refused_by_name(tmp_path):
    base = toys.write_checkpoint(tmp_path / "base", tied=False, std=0.1)
    for target in ("lm_head", "embed_tokens"):
        peft_adapter(base, tmp_path / target, target_modules=["q_proj", target])
        error = refusal(base, tmp_path / target)
        assert f"{target}.lora_" in error.cause and "not supported: merge it" in error.remedy


def test_selected_layers_are_described_briefly():
    names = [f"model.layers.{i}.self_attn.{n}" for i in (0, 1, 2, 10) for n in QV]
    config = LoRAConfig(4, 8, targets=(*names, "layers.7.mlp.up_proj", "o_proj"))
    text = "on o_proj; q_proj, v_proj of layers 0-2, 10; up_proj of layers 7"
    assert str(config).endswith(text)
    ranks = dict.fromkeys(names, 2)
    assert "(model.layers.0.self_attn.q_proj 2" in str(LoRAConfig(ranks=ranks))
    assert ", and 4 more)" in str(LoRAConfig(ranks=ranks))


# How keys are spelled


SPELLINGS = {
    "the adapter's name": (r"lora_([AB])", r"lora_\1.default"),
    "another name": (r"lora_([AB])", r"lora_\1.my_adapter"),
    "the name lora": (r"lora_([AB])", r"lora_\1.lora"),
    "torch.compile": ("^", "_orig_mod."),
    "torch.compile inside": (r"(layers\.\d+)", r"\1._orig_mod"),
    "DistributedDataParallel": ("^", "module."),
    "DDP and compile, with a name": (r"^(.*)lora_([AB])", r"module._orig_mod.\1lora_\2.default"),
    "FSDP": (r"(layers\.\d+)", r"_fsdp_wrapped_module.\1._fsdp_wrapped_module"),
    "activation checkpointing": (r"(layers\.\d+)", r"\1._checkpoint_wrapped_module"),
    "without a prefix": (r"^base_model\.model\.", ""),
    "LoraModel's own state": (r"^base_model\.", ""),
    "the prefix twice": ("^", "base_model.model."),
    "a model without a head": (r"^base_model\.model\.model\.", "base_model.model."),
}


@pytest.mark.parametrize("old, new", SPELLINGS.values(), ids=SPELLINGS)
def test_keys_with_the_names_of_wrappers_are_read_and_reported(folder, plain, capsys, old, new):
    expected = bits(loaded(folder, plain))
    assert "read as" not in capsys.readouterr().out
    rename(plain, old, new)
    assert equal(bits(loaded(folder, plain)), expected)
    assert f"is read as {KEY}" in capsys.readouterr().out
    for restricted in ({"layers_to_transform": [0, 1, 2]}, {"target_modules": ".*"}):
        toys.change_json(plain / CONFIG, **restricted)
        assert equal(bits(loaded(folder, plain)), expected)


@torch.no_grad()
def test_a_state_dict_saved_by_hand_is_read_as_peft_reads_it(folder, tmp_path, capsys):
    theirs = peft_adapter(folder, tmp_path, use_dora=True)
    truth = peft_logits(theirs)
    state = {key: t.contiguous() for key, t in theirs.state_dict().items()}
    only_adapters = {key: t for key, t in state.items() if "lora_" in key}
    assert any(key.endswith("lora_magnitude_vector.default.weight") for key in only_adapters)
    for tensors in (only_adapters, {k: t.clone() for k, t in state.items()}):
        save_file(tensors, tmp_path / WEIGHTS)
        torch.testing.assert_close(logits(loaded(folder, tmp_path)), truth, atol=1e-4, rtol=0)
    assert "and 37 more: equal to the base's own, so not used" in capsys.readouterr().out


KEY_FAULTS = {
    "a vision-language model": (
        r"model\.layers", "model.language_model.layers", "language_model", "Qwen2.5 text model",
    ),
    "another architecture": (
        r"model\.layers", "transformer.h", "transformer.h.0", "the base it was trained on",
    ),
    "another prefix": (r"^base_model", "peft", "peft.model.model.layers.0", "the base it was"),
    "mlx-lm or torchtune": (
        r"lora_([AB])\.weight", lambda m: f"lora_{m[1].lower()}", "lora_a", "PEFT's format",
    ),
    "a tensor of alpha": (r"q_proj\.lora_A\.weight", "q_proj.alpha", "alpha", "PEFT's format"),
    "a layer besides": (r"layers\.2", "layers.3", "layers.3.self_attn", "the base it was trained"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, cause, remedy", KEY_FAULTS.values(), ids=KEY_FAULTS)
def test_keys_that_name_no_layer_of_the_base_are_refused(folder, plain, old, new, cause, remedy):
    rename(plain, old, new)
    error = refusal(folder, plain)
    assert cause in error.cause and remedy in error.remedy


def both(tensors: dict) -> dict:
    one, two = ({k.replace(".weight", f".{n}.weight"): t.clone() for k, t in tensors.items()}
                for n in ("default", "reference"))  # fmt: skip
    return one | two


TENSOR_FAULTS = {
    "two adapters": (both, "holds 2 adapters: default; reference", "selected_adapters="),
    "one matrix twice": (
        lambda ts: ts | {"module." + KEY: ts[KEY].clone()}, "are the same matrix", "save it again",
    ),
    "sharded parameters": (
        lambda ts: {k: t.new_empty(0) for k, t in ts.items()}, "lora_A.weight is empty", "ZeRO-3",
    ),
    "no tensors": (lambda ts: {}, "holds no tensors", "only the adapter, with PEFT's model.save"),
    "a model's tensors": (
        lambda ts: {TABLE: torch.ones(4, 4)}, f"but {TABLE}", "only the adapter, with PEFT's",
    ),
    "a matrix without its other": (
        lambda ts: {k: t for k, t in ts.items() if k != KEY}, f"{KEY} is missing", "copy it again",
    ),
    "a bias of B": (
        lambda ts: ts | {KEY.replace("A.weight", "B.bias"): torch.ones(64)}, "B.bias is not",
        "merge it with PEFT",
    ),
    "a classifier": (
        lambda ts: ts | {"base_model.model.score.weight": torch.ones(2, 64)}, "score.weight is not",
        "a classifier or a reward model",
    ),
    "NaN": (lambda ts: ts | {KEY: ts[KEY] * torch.nan}, "holds NaN", "train the adapter again"),
}  # fmt: skip


@pytest.mark.parametrize("change, cause, remedy", TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_were_saved_wrongly_are_refused(folder, plain, change, cause, remedy):
    change_tensors(plain, change)
    error = refusal(folder, plain)
    assert cause in error.cause and remedy in error.remedy


def test_an_adapter_whose_every_b_is_zero_is_reported_to_change_nothing(folder, plain, capsys):
    change_tensors(plain, lambda ts: {k: t * ("lora_A" in k) for k, t in ts.items()})
    base = logits(load_model(folder, dtype=torch.float32))
    assert torch.equal(logits(loaded(folder, plain)), base)
    assert "every matrix B is zero" in capsys.readouterr().out


# Tensors of the base next to the adapter's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [
    TABLE, TABLE.replace("weight", "base_layer.weight"), "base_model.model.lm_head.weight",
    "base_model.model.lm_head.modules_to_save.weight", "base_model.model.model.norm.weight",
    "base_model.model.lm_head.original_module.weight", KEY.replace("lora_A", "base_layer"),
    "base_model.model.lm_head.modules_to_save.default.weight",
])  # fmt: skip
def test_a_tensor_of_the_base_is_ignored_and_reported_or_refused(folder, plain, capsys, key, dtype):
    state = load_model(folder, dtype=torch.float32).state_dict()
    name = key.replace("base_layer.", "").removeprefix("base_model.model.")
    own = state["model.embed_tokens.weight" if "lm_head" in key else name].to(dtype)
    usual = logits(loaded(folder, plain))
    change_tensors(plain, lambda ts: ts | {key: own.clone()})
    assert torch.equal(logits(loaded(folder, plain)), usual)
    assert f"{key}: equal to the base's own, so not used" in capsys.readouterr().out

    trained = own.clone().view(-1)
    trained[-1] = trained[-1] * 1.5 + 0.1
    change_tensors(plain, lambda ts: ts | {key: trained.view_as(own)})
    error = refusal(folder, plain)
    assert f"{key} differs from the base's own" in error.cause and "merge it" in error.remedy
    resized = torch.cat((own, own[-1:]))
    change_tensors(plain, lambda ts: ts | {key: resized})
    error = refusal(folder, plain)
    assert f"{key} is {tuple(resized.shape)}, and {tuple(own.shape)} in" in error.cause
    assert "tokens were added: merge it" in error.remedy


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_an_unchanged_embedding_that_peft_saves_is_accepted_and_reported(tmp_path, capsys, tied):
    base = toys.write_checkpoint(tmp_path / "base", tied=tied, std=0.1)
    theirs = peft_adapter(base, tmp_path / "adapter", {"save_embedding_layers": True})
    assert TABLE in load_file(tmp_path / "adapter" / WEIGHTS)
    model = loaded(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), peft_logits(theirs), atol=1e-4, rtol=0)
    assert "embed_tokens.weight" in capsys.readouterr().out


def test_modules_trained_as_a_whole_are_refused_and_untrained_ones_ignored(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = toys.write_checkpoint(tmp_path / "base", tied=False, std=0.1)
    config = LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(transformers_model(base), config)
    model.save_pretrained(tmp_path / "untrained")
    loaded(base, tmp_path / "untrained")
    as_if_trained(model)
    model.save_pretrained(tmp_path / "trained")
    error = refusal(base, tmp_path / "trained")
    assert "lm_head.weight differs from the base's own" in error.cause
    change_tensors(
        tmp_path / "trained", lambda ts: {k: t for k, t in ts.items() if "lm_head" not in k}
    )
    assert "modules_to_save is lm_head, without" in refusal(base, tmp_path / "trained").cause


# Settings of other versions


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
def test_trained_prompts_are_not_said_to_be_mergeable(folder, plain, kind):
    toys.change_json(plain / CONFIG, peft_type=kind)
    assert "no weights to merge" in refusal(folder, plain).remedy


def test_tensors_in_fp8_are_read(folder, plain):
    change_tensors(plain, lambda ts: {k: t.to(torch.float8_e4m3fn) for k, t in ts.items()})
    rounded = logits(loaded(folder, plain))
    change_tensors(plain, lambda ts: {k: t.float() for k, t in ts.items()})
    assert torch.equal(logits(loaded(folder, plain)), rounded)


IN_USE = [True, 1, 0, 0.5, "on", ["x"], {"a": 1}, [0]]


@pytest.mark.parametrize("value", IN_USE)
def test_a_setting_that_is_in_use_and_unknown_is_refused_by_name(folder, plain, value):
    toys.change_json(plain / CONFIG, use_new_lora=value, other_new_config=value)
    error = refusal(folder, plain)
    for field in ("use_new_lora", "other_new_config"):
        assert f"{field} is {value!r}, a setting of another version of PEFT" in error.cause
    assert "the version of PEFT that saved it" in error.remedy


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_setting_that_is_unknown_but_off_is_accepted(folder, plain, value):
    usual = logits(loaded(folder, plain))
    old = {"enable_lora": None, "merge_weights": False, "use_new_lora": value}
    toys.change_json(plain / CONFIG, **old)
    assert torch.equal(logits(loaded(folder, plain)), usual)


def test_a_known_setting_that_is_null_is_not_in_use(folder, plain):
    from lora.peft_settings import HARMLESS, UNUSED

    usual = logits(loaded(folder, plain))
    optional = ("use_dora", "use_rslora", "rank_pattern", "exclude_modules", "modules_to_save")
    toys.change_json(plain / CONFIG, **dict.fromkeys([*UNUSED, *HARMLESS, *optional]))
    assert torch.equal(logits(loaded(folder, plain)), usual)


def test_every_setting_of_peft_is_known(folder, plain):
    from peft import LoraConfig

    from lora.peft_settings import HARMLESS, READ, UNUSED

    fields = LoraConfig.__dataclass_fields__.keys()
    assert fields <= UNUSED.keys() | READ | HARMLESS
    assert not UNUSED.keys() & READ and not UNUSED.keys() & HARMLESS and not READ & HARMLESS


# The base that an adapter names


def names_base(adapter: Path, base: object, revision: object = None) -> Path:
    toys.change_json(adapter / CONFIG, base_model_name_or_path=base, revision=revision)
    return adapter


@pytest.mark.parametrize("base", [
    "/content/drive/MyDrive/models/qwen2", "./models/qwen2", "~/qwen2", r"C:\models\qwen2",
    r"models\qwen2", "qwen2", "a/b/c", "../no-such-base",
])  # fmt: skip
def test_a_base_on_another_machine_is_named_and_asked_for(folder, plain, base):
    with pytest.raises(BadAdapter) as caught:
        checkpoint_of_adapter(names_base(plain, base))
    assert f"names {base} as its base, which is not a folder on this machine" in caught.value.cause
    assert caught.value.remedy == "give yours with --model"
    assert checkpoint_of_adapter(plain, str(folder)).folder == folder


@pytest.mark.parametrize("base", [None, "", 5, ["x"]])
def test_an_adapter_that_names_no_base_asks_for_one(folder, plain, base):
    with pytest.raises(BadAdapter, match="names no base model") as caught:
        checkpoint_of_adapter(names_base(plain, base))
    assert caught.value.remedy == "give it with --model"
    assert checkpoint_of_adapter(plain, str(folder)).folder == folder


@pytest.mark.parametrize("revision", [None, "main", "0123abcd", 7])
def test_the_revision_of_an_adapter_is_ignored_for_a_local_base(folder, plain, revision):
    names_base(plain, str(folder), revision)
    assert checkpoint_of_adapter(plain).folder == folder
    assert checkpoint_of_adapter(names_base(plain, "demo", revision)).name == "demo"
    with pytest.raises(UserError, match="--revision main makes no sense"):
        checkpoint_of_adapter(names_base(plain, str(folder), revision), None, "main")
    assert Base.find(checkpoint_of_adapter(plain), device="cpu").folder == folder


def test_the_revision_of_an_adapter_counts_for_its_own_base_on_the_hub(plain, monkeypatch):
    asked = []
    monkeypatch.setattr(run_base, "find_checkpoint", lambda *args: asked.append(args))
    names_base(plain, "owner/name", "abc")
    for options in ((), (None, "def"), ("other/name",), ("other/name", "def")):
        checkpoint_of_adapter(plain, *options)
    expected = [("owner/name", "abc"), ("owner/name", "def"), ("other/name", None)]
    assert asked == [*expected, ("other/name", "def")]


def test_a_base_that_the_hub_does_not_have_is_named_with_both_ways_out(plain, monkeypatch):
    def fails(*_):
        raise HubError("model owner/name was not found", "check the spelling")

    monkeypatch.setattr(run_base, "find_checkpoint", fails)
    with pytest.raises(HubError) as caught:
        checkpoint_of_adapter(names_base(plain, "owner/name"))
    assert "names owner/name as its base: model owner/name was not found" in caught.value.cause
    assert caught.value.remedy == "check the spelling; or give yours with --model"


@pytest.mark.parametrize("base", [
    "unsloth/qwen2-0.5b-instruct-bnb-4bit", "Qwen/Qwen2-0.5B-Instruct-GPTQ-Int4",
    "Qwen/Qwen2-0.5B-Instruct-AWQ", "mlx-community/Qwen2-0.5B-4bit",
])  # fmt: skip
def test_a_quantized_base_is_refused_before_it_is_fetched(plain, base):
    with pytest.raises(BadAdapter, match=f"names {base} as its base, which is quantized") as caught:
        checkpoint_of_adapter(names_base(plain, base))
    assert caught.value.remedy == "give the base it was quantized from with --model"


# What is not an adapter's folder


def refused_folder(path: Path) -> tuple[str, str]:
    with pytest.raises(BadAdapter) as caught:
        read_adapter_config(path)
    return caught.value.cause, caught.value.remedy


def without(adapter: Path, name: str) -> Path:
    (adapter / name).unlink()
    return adapter


def with_file(adapter: Path, name: str, content: bytes = b"x") -> Path:
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(content)
    return adapter


def around(adapter: Path, *names: str) -> Path:
    """A folder that holds copies of the adapter under these names."""
    for name in names:
        shutil.copytree(adapter, adapter.parent / "around" / name)
    return adapter.parent / "around"


def zipped(adapter: Path, name: str) -> Path:
    with zipfile.ZipFile(adapter.parent / name, "w") as file:
        file.write(adapter / CONFIG, CONFIG)
    return adapter.parent / name


OTHERS = {
    "a trainer's folder": (
        lambda a, _: around(a, "checkpoint-5", "checkpoint-40"),
        "folders inside it have one: checkpoint-5; checkpoint-40", "around/checkpoint-40",
    ),
    "a run's folder": (lambda a, _: around(a, "best"), "inside it have one: best", "around/best"),
    "a cache's folder": (
        lambda a, _: around(a, "snapshots/0123"), "have one: snapshots/0123", "snapshots/0123",
    ),
    "an adapter with a name": (lambda a, _: around(a, "lora"), "have one: lora", "around/lora"),
    "an unfinished last save": (
        lambda a, _: with_file(around(a, "checkpoint-7"), CONFIG),
        "cannot be read: it does not exist", "a complete adapter, such as",
    ),
    "a pickle": (
        lambda a, _: with_file(without(a, WEIGHTS), "adapter_model.bin"),
        "as a pickle, adapter_model.bin", "AutoPeftModelForCausalLM.from_pretrained(",
    ),
    "a pickle alone": (
        lambda a, _: with_file(a, "adapter_model.bin") / "adapter_model.bin", "a pickle", "NEW",
    ),
    "mlx-lm": (
        lambda a, _: with_file(without(a, WEIGHTS), "adapters.safetensors"),
        "an adapter of mlx-lm", "mlx_lm.fuse --model",
    ),
    "mlx-lm of old": (
        lambda a, _: with_file(without(without(a, WEIGHTS), CONFIG), "adapters.npz"),
        "an adapter of mlx-lm", "mlx_lm.fuse --model",
    ),
    "mlx-lm's config": (
        lambda a, _: with_file(a, CONFIG, b'{"lora_parameters": {"rank": 2}}'),
        "an adapter of mlx-lm", "mlx_lm.fuse --model",
    ),
    "a whole model": (lambda _, base: base, "it is a whole model", "--model"),
    "tensors alone": (lambda a, _: without(a, CONFIG), "do not say how to scale", "copy adapter_c"),
    "a config alone": (lambda a, _: without(a, WEIGHTS), "does not exist", "whole folder again"),
    "several files": (
        lambda a, _: with_file(without(a, WEIGHTS), "adapter_model-00001-of-00002.safetensors"),
        "split into 1 files", "join them",
    ),
    "GGUF": (lambda a, _: with_file(without(a, WEIGHTS), "x.gguf"), "GGUF", "the PEFT folder"),
    "a GGUF file": (lambda a, _: with_file(a, "x.gguf") / "x.gguf", "GGUF", "the PEFT folder"),
    "a zip": (lambda a, _: zipped(a, "adapter.zip"), "it is an archive", "unpack it"),
    "a zip without an ending": (lambda a, _: zipped(a, "adapter"), "an archive", "unpack it"),
    "a tar": (lambda a, _: with_file(a, "x.tar.gz") / "x.tar.gz", "an archive", "unpack it"),
    "the config": (lambda a, _: a / CONFIG, "is a file, not", "give the folder that it is in"),
    "the weights": (lambda a, _: a / WEIGHTS, "is a file, not", "give the folder that it is in"),
    "Git LFS's pointer": (
        lambda a, _: with_file(a, WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid x"),
        "only the pointer", "git lfs pull",
    ),
    "a Hub id": (lambda *_: Path("owner/name"), "does not exist", "hf download owner/name "),
    "a URL": (
        lambda *_: Path("https://huggingface.co/owner/name/tree/main"),
        "does not exist", "hf download owner/name --local-dir name",
    ),
    "a path": (lambda a, _: a / "nothing", "does not exist", "check the path; give the folder"),
    "a long name": (lambda *_: Path("x" * 300), "does not exist", "check the path"),
    "an empty folder": (lambda a, _: with_file(a, "e/x") / "e", "has no adapter_config", "such as"),
}  # fmt: skip


@pytest.mark.parametrize("make, cause, remedy", OTHERS.values(), ids=OTHERS)
def test_what_is_not_an_adapters_folder_is_recognized(folder, plain, make, cause, remedy):
    found = refused_folder(make(plain, folder))
    assert cause in found[0] and remedy in found[1]


def test_the_remedy_for_a_pickle_makes_an_adapter_that_is_read(folder, plain, tmp_path):
    from peft import AutoPeftModelForCausalLM

    expected = bits(loaded(folder, plain))
    torch.save(load_file(plain / WEIGHTS), plain / "adapter_model.bin")
    (plain / WEIGHTS).unlink()
    _, remedy = refused_folder(plain)
    code = re.search(r"AutoPeft\S*", remedy)[0].rstrip(",").replace("NEW", str(tmp_path / "new"))
    eval(code, {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM})
    assert equal(bits(loaded(folder, tmp_path / "new")), expected)


def test_the_remedy_for_a_trained_head_makes_a_base_that_is_read(tmp_path):
    base = toys.write_checkpoint(tmp_path / "base", tied=False, std=0.1)
    theirs = peft_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert "merge_and_unload, save_pretrained" in refusal(base, tmp_path / "adapter").remedy
    truth = peft_logits(theirs).detach()
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, truth, atol=1e-4, rtol=0)


# Whole commands


def test_a_refusal_is_two_lines_and_exit_code_2(plain, tmp_path, capsys):
    names_base(plain, "/nowhere/qwen2")
    flags = ["--adapter", str(plain), "--out", str(tmp_path / "out")]
    assert run_script(lambda: export.main(flags)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 2 and "\n  give yours with --model\n" in printed
    assert run_script(lambda: export.main(["--out", str(tmp_path / "out")])) == 2
    assert "--adapter is not given" in capsys.readouterr().err


@torch.no_grad()
def test_training_continues_an_adapter_on_some_layers_and_peft_loads_the_result(
    lively_checkpoint, arithmetic, tmp_path, capsys
):
    from peft import PeftModel

    settings = {"target_modules": r".*layers\.1\..*(q|up)_proj", "rank_pattern": {"u.*": 2}}
    peft_adapter(lively_checkpoint, tmp_path / "given", **settings)
    flags = ["--model", lively_checkpoint, "--data", arithmetic, "--from-adapter",
             tmp_path / "given", "--out", tmp_path / "run", "--max-steps", 2, "--limit", 20,
             "--precision", "fp32", "--device", "cpu", "--dropout", 0]  # fmt: skip
    with torch.enable_grad():
        train.main([str(flag) for flag in flags])
    assert "on up_proj, q_proj of layers 1" in capsys.readouterr().out
    best = tmp_path / "run" / "best"
    tensors = load_file(best / WEIGHTS)
    assert tensors.keys() == load_file(tmp_path / "given" / WEIGHTS).keys()
    theirs = PeftModel.from_pretrained(transformers_model(lively_checkpoint), best).eval()
    ours = logits(loaded(lively_checkpoint, best))
    torch.testing.assert_close(ours, peft_logits(theirs), atol=1e-4, rtol=1e-4)


def test_a_base_with_fewer_layers_is_refused_as_such_before_training(folder, tmp_path):
    peft_adapter(folder, tmp_path / "adapter", target_modules=".*q_proj")
    small = load_model(toys.write_checkpoint(tmp_path / "base", layers=2), dtype=torch.float32)
    with pytest.raises(BadAdapter, match="does not fit its base: .*layers.2.*not expected"):
        check_adapter(AdapterFolder.read(tmp_path / "adapter"), small)


# The cases from the field


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """The adapters that make_cases.py makes for the demo's base."""
    if not CASES.exists():
        pytest.skip("the cases are not here")
    out, demo = tmp_path_factory.mktemp("cases") / "out", Path("model/demo").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_cases.py", str(demo), str(out)])
        exec(compile(CASES.read_text(), str(CASES), "exec"), {"__name__": "__main__"})
    return out


def aligned(model):
    """`model` with copies of its weights: kernels round otherwise where memory is not aligned."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "some-layers", "expression", "default-keys",
                                  "saved-table", "revision"])  # fmt: skip
def test_an_export_of_a_case_has_the_logits_of_pefts_merged_model(field, tmp_path, case):
    from peft import PeftModel

    adapter = field / f"adapter-{case}"
    export.main(["--adapter", str(adapter), "--dtype", "fp32", "--out", str(tmp_path / "out")])
    theirs = PeftModel.from_pretrained(transformers_model("model/demo"), adapter)
    expected = peft_logits(aligned(theirs.merge_and_unload().eval()))
    ours = aligned(transformers_model(tmp_path / "out"))
    assert torch.equal(peft_logits(ours), expected)
    assert (expected - peft_logits(transformers_model("model/demo"))).abs().max() > 0.1


@pytest.mark.parametrize("case, remedy", [
    ("other-machine", "give yours with --model"), ("no-base", "give it with --model"),
    ("bin", "save_pretrained('NEW')"), ("mlx", "mlx_lm.fuse"), ("inside", "inside/checkpoint-40"),
])  # fmt: skip
def test_a_case_that_cannot_be_read_is_refused_with_its_own_remedy(field, case, remedy):
    with pytest.raises(BadAdapter) as caught:
        checkpoint_of_adapter(field / f"adapter-{case}")
    assert remedy in caught.value.remedy
