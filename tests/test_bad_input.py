"""Tests of bad input: cause and remedy in two lines, exit code 2, and no file changed."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from errors import run_script
from lora.peft_format import CONFIG, WEIGHTS
from run import export
from tests import toys
from tests.refusals import TRAIN, refused, training


@pytest.mark.parametrize(
    "flags, cause",
    [
        ("--epoch 3", "there is no option --epoch"),
        ("extra", "unrecognized arguments: extra"),
        ("--epochs", "--epochs: expected one argument"),
        ("--epochs 0", "--epochs 0 is less than 1"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--dropout 1 --epochs 0", "--dropout 1.0 is not below 1; --epochs 0 is less than 1"),
        ("--learning-rate nan", "--learning-rate nan is not a finite number"),
        ("--schedule wavy", "--schedule: invalid choice: 'wavy'"),
        ("--bias all", "there is no option --bias"),
        ("--init pissa", "there is no option --init"),
        ("--r 8", "there is no option --r"),
        ("--r=8", "there is no option --r"),
        ("--alphas q_proj=4", "there is no option --alphas"),
        ("--precision int8", "--precision: invalid choice: 'int8'"),
        ("--targets x_proj,q_proj", "--targets: no linear layer is named x_proj"),
        ("--targets lm_head", "--targets: no linear layer is named lm_head"),
        ("--targets .*", "--targets: no linear layer is named .*"),
        ("--revision main", "--revision main makes no sense for the folder base"),
        ("--data-revision main", "--data-revision makes no sense for the path data"),
        ("--device mps", "--device mps: PyTorch"),
        ("--max-length 5", "0 rows to train on and 0 to validate on"),
    ],
)
def test_a_wrong_flag_or_value_is_refused(workspace, capsys, flags, cause):
    assert cause in refused(train.main, TRAIN + flags, capsys)


@pytest.mark.parametrize(
    "old, new", [("--r 8", "--rank"), ("--r=8", "--rank"), ("--alphas q_proj=4", "--alpha")]
)
def test_a_renamed_option_is_refused_with_its_new_name_as_the_remedy(workspace, capsys, old, new):
    assert run_script(lambda: train.main((TRAIN + old).split())) == 2
    name = re.split(" |=", old)[0]
    assert capsys.readouterr().err == f"error: there is no option {name}\n  use {new}\n"


def change(name: str, **keys):
    return lambda base: toys.change_json(base / name, **keys)


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def change_tensors(name: str, **tensors: torch.Tensor | None):
    """Replace the tensors whose names end in these; None removes the tensor."""

    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        for ending, tensor in tensors.items():
            key = next((k for k in state if k.endswith(ending.replace("__", "."))), ending)
            state.pop(key, None)
            if tensor is not None:
                state[key] = tensor
        save_file(state, folder / name)

    return damage


def cut_in_half(name: str):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


BAD_BASES = {
    "no config": (remove("config.json"), "it has no config.json"),
    "config is not JSON": (write("config.json", b"{"), "config.json cannot be read"),
    "config is a list": (
        write("config.json", b"[]"),
        "config.json cannot be read: it holds a list",
    ),
    "not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), "config.json cannot be read"),
    "a llama": (change("config.json", model_type="llama"), "is a llama, not a qwen2"),
    "a qwen2 of experts": (change("config.json", model_type="qwen2_moe"), "not a qwen2"),
    "no type": (change("config.json", model_type=None), "has no model_type"),
    "absurd sizes": (
        change("config.json", hidden_size=10**12, vocab_size=-1, num_hidden_layers="2"),
        "hidden_size is 1000000000000; num_hidden_layers is '2'; vocab_size is -1",
    ),
    "odd heads": (change("config.json", num_attention_heads=5), "does not divide into 5 heads"),
    "odd groups": (change("config.json", num_key_value_heads=3), "do not divide among 3"),
    "long context": (
        change("config.json", rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling of type 'yarn' is not supported",
    ),
    "rope is a word": (change("config.json", rope_scaling="yarn"), "config.json"),
    "sliding window": (
        change("config.json", use_sliding_window=True, max_window_layers=1),
        "sliding",
    ),
    "no weights": (remove("model.safetensors"), "holds no model.safetensors"),
    "weights cut off": (cut_in_half("model.safetensors"), "model.safetensors is damaged"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors is empty"),
    "a tensor missing": (
        change_tensors("model.safetensors", norm__weight=None),
        "input_layernorm.weight is missing",
    ),
    "a tensor too many": (
        change_tensors("model.safetensors", extra=torch.zeros(1)),
        "extra is not expected",
    ),
    "another shape": (
        change_tensors("model.safetensors", embed_tokens__weight=torch.zeros(9, 64)),
        "model.embed_tokens.weight is (9, 64), not (308, 64)",
    ),
    "whole numbers": (
        change_tensors("model.safetensors", q_proj__bias=torch.zeros(64, dtype=torch.int8)),
        "self_attn.q_proj.bias is I8",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json does not exist"),
    "broken tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json cannot be read"),
    "broken template": (write("tokenizer_config.json", b"{"), "tokenizer_config.json cannot be"),
}


@pytest.mark.parametrize("damage, cause", BAD_BASES.values(), ids=BAD_BASES)
def test_a_folder_that_is_not_a_qwen2_checkpoint_is_refused(workspace, capsys, damage, cause):
    damage(workspace / "base")
    assert cause in refused(train.main, TRAIN, capsys)
    assert cause in refused(evaluate.main, "--model base --data data --device cpu", capsys)


def test_a_tokenizer_that_does_not_fit_its_base_is_refused(workspace, capsys):
    path, text = workspace / "base" / "tokenizer.json", toys.trained_tokenizer()
    path.write_text(text.replace("<|im_end|>", "<|end|>"))
    assert "has no <|im_start|> or <|im_end|>" in refused(train.main, TRAIN, capsys)
    path.write_text(text)
    shrink = change_tensors("model.safetensors", embed_tokens__weight=torch.zeros(299, 64))
    shrink(workspace / "base")
    toys.change_json(workspace / "base" / "config.json", vocab_size=299)  # the tokenizer has 300
    assert "tokenizer" in refused(train.main, TRAIN, capsys)
    assert "tokenizer" in refused(evaluate.main, "--model base --data data --device cpu", capsys)


@pytest.mark.parametrize(
    "weight_map", [[], {"a": 1}, {"a": "../x.safetensors"}, {"a": "gone.safetensors"}]
)
def test_a_shard_index_that_names_no_file_of_its_folder_is_refused(workspace, capsys, weight_map):
    (workspace / "base" / "model.safetensors").rename(workspace / "x.safetensors")
    toys.write_json(workspace / "base" / "model.safetensors.index.json", {"weight_map": weight_map})
    assert "model.safetensors.index.json" in refused(train.main, TRAIN, capsys)


@pytest.mark.parametrize("name", ["missing", "./a/b/c", "a/b/c", "base/config.json", "~nobody/x"])
def test_a_base_that_is_neither_folder_nor_hub_id_is_refused(workspace, capsys, name):
    flags = f"--model={name} --data data --out out --device cpu"
    assert "neither a folder nor a Hub id" in refused(train.main, flags, capsys)


GOOD = b'{"question": "1?", "answer": "1"}\n'
BAD_DATA = {
    "missing": ("none.jsonl", None, "neither a task (gsm8k, "),
    "empty": ("x.jsonl", b"", "x.jsonl has no rows"),
    "not JSON": ("x.jsonl", b"question,answer\n1,2\n", "2 of 2 rows are bad: x.jsonl:1: not JSON"),
    "other keys": ("x.jsonl", b'{"text": "x"}\n' * 9, "9 of 9 rows are bad"),
    "another kind": ("x.txt", b"question,answer\n", "x.txt is not one of .jsonl, .parquet, "),
    "not parquet": ("x.parquet", GOOD, "x.parquet is not a readable parquet file"),
    "one question": ("x.jsonl", GOOD * 5, "5 rows to train on and 0 to validate on"),
    "no train file": ("x/test.jsonl", GOOD, "holds no train.jsonl or train.parquet"),
}


@pytest.mark.parametrize("name, content, cause", BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_is_missing_empty_or_malformed_is_refused(
    workspace, capsys, name, content, cause
):
    (workspace / "x").mkdir()
    if content is not None:
        (workspace / name).write_bytes(content)
    data = "x" if name.startswith("x/") else name
    assert cause in refused(train.main, training(f"--data {data}"), capsys)


@pytest.mark.parametrize(
    "out, cause",
    [
        ("notes", "is not a folder"), ("notes/run", "is not a folder"),
        ("dangling", "is not a folder"), ("mine", "holds best, and no config.json"),
        ("base", "base/config.json is not the configuration of a run"),
        ("old", "holds another run: rank was 4, is 8; seed was 1, is 0"),
    ],
)  # fmt: skip
def test_an_out_path_in_use_is_refused_and_not_overwritten(workspace, capsys, out, cause):
    (workspace / "notes").write_text("mine")
    (workspace / "dangling").symlink_to("nowhere")
    (workspace / "mine" / "best").mkdir(parents=True)
    (workspace / "mine" / "best" / "adapter.txt").write_text("years")
    if out == "old":
        train.main((TRAIN + "--rank 4 --seed 1 --max-steps 1 --limit 20 --out old").split())
    assert cause in refused(train.main, TRAIN + f"--max-steps 1 --limit 20 --out {out}", capsys)


BAD_ADAPTERS = {
    "no config": (remove(CONFIG), f"it has no {CONFIG}"),
    "config is not JSON": (write(CONFIG, b"{"), f"{CONFIG} cannot be read"),
    "config is a list": (write(CONFIG, b"[]"), f"{CONFIG} cannot be read"),
    "another method": (change(CONFIG, peft_type="IA3"), "peft_type is 'IA3', not 'LORA'"),
    "no rank": (change(CONFIG, r=None), "r is None"),
    "weight-decomposed": (change(CONFIG, use_dora=True), "lora_magnitude_vector is missing"),
    "no such targets": (change(CONFIG, target_modules=["c_attn"]), "c_attn"),
    "another rank": (change(CONFIG, r=3), "is (2, 64), not (3, 64)"),
    "more targets": (
        change(CONFIG, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]),
        "up_proj.lora_A.weight is missing",
    ),
    "fewer targets": (
        change(CONFIG, target_modules=["q_proj"]),
        "not expected, by target_modules q_proj",
    ),
    "no weights": (remove(WEIGHTS), f"{WEIGHTS} cannot be read"),
    "weights cut off": (cut_in_half(WEIGHTS), f"{WEIGHTS} cannot be read"),
    "NaN": (
        change_tensors(WEIGHTS, q_proj__lora_A__weight=torch.full((2, 64), math.nan)),
        "q_proj.lora_A.weight holds NaN or infinity",
    ),
    "no base": (change(CONFIG, base_model_name_or_path=None), "names no base model"),
    "a base that is gone": (
        change(CONFIG, base_model_name_or_path="gone"),
        "names gone as its base",
    ),
}


@pytest.mark.parametrize("damage, cause", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(workspace, capsys, damage, cause):
    damage(workspace / "run" / "best")
    flags = "--adapter run/best --data data --device cpu --precision fp32 --limit 2"
    assert cause in refused(evaluate.main, flags, capsys)


def test_an_adapter_of_another_base_is_refused_with_every_difference(workspace, capsys):
    toys.write_checkpoint(workspace / "wide", hidden=128, layers=3)
    flags = "--adapter run/best --model wide --data data --device cpu --precision fp32"
    cause = refused(evaluate.main, flags, capsys)
    assert "is (2, 64), not (2, 128)" in cause and "and 18 more" in cause


@pytest.mark.parametrize(
    "flags, cause",
    [
        ("--data data", "neither --adapter nor --model is given"),
        ("--adapter missing --data data", "missing is not an adapter folder"),
        ("--adapter run/best --data none.jsonl", "neither a task (gsm8k, "),
        ("--adapter run/best --data data/train.jsonl", "has 0 test problems"),
        ("--adapter run/best --data data --split all", "--split: invalid choice: 'all'"),
        ("--adapter run/best --data data --limit 0", "--limit 0 is less than 1"),
        ("--adapter run/best --data data --out data/test.jsonl", "--out"),
    ],
)
def test_evaluate_refuses_flags_that_leave_nothing_to_measure(workspace, capsys, flags, cause):
    assert cause in refused(evaluate.main, flags + " --device cpu --max-new-tokens 2", capsys)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"options": 3}', b"\xff"])
def test_evaluate_refuses_a_run_whose_config_is_damaged(workspace, capsys, content):
    (workspace / "run" / "config.json").write_bytes(content)
    flags = "--adapter run/best --data data --device cpu --precision fp32 --limit 2"
    assert "config.json" in refused(evaluate.main, flags, capsys)


@pytest.mark.parametrize(
    "flags, cause",
    [
        ("--adapter run/best --out data", "--out data exists already"),
        ("--adapter run/best --out data/test.jsonl/x", "--out"),
        ("--adapter missing --out merged", "missing is not an adapter folder"),
        ("--adapter run/best --model data --out merged", "it has no config.json"),
        ("--adapter run/best --dtype int8", "--dtype: invalid choice: 'int8'"),
    ],
)
def test_export_refuses_what_it_cannot_merge_or_write(workspace, capsys, flags, cause):
    assert cause in refused(export.main, flags, capsys)


def test_without_bad_input_the_workspace_trains_evaluates_and_exports(workspace):
    flags = "--adapter run/best --data data --device cpu --precision fp32 --limit 2"
    evaluate.main([*flags.split(), "--max-new-tokens", "2"])
    train.main((TRAIN + "--max-steps 1 --limit 20").split())
    export.main("--adapter run/best --out merged".split())
    saved = json.loads((workspace / "merged" / "config.json").read_text())
    assert (workspace / "out" / "best").is_dir() and saved["torch_dtype"] == "bfloat16"
