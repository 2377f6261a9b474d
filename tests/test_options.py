"""Tests of flags that other programs have: each is answered with the one here."""

import dataclasses

import pytest

import evaluate
import train
from errors import BadOption
from run.elsewhere import NAMES
from run.options import changed_options, parse, to_json, value_problems
from tests import toys


@pytest.mark.parametrize(
    "flag, ours",
    [
        ("--num_train_epochs", "--epochs"), ("--lora_alpha", "--alpha"), ("--lora_r", "--rank"),
        ("--r", "--rank"), ("--lr", "--learning-rate"), ("--model_name_or_path", "--model"),
        ("--per_device_train_batch_size", "--batch-size"), ("--output_dir", "--out"),
        ("--gradient_accumulation_steps", "--grad-accum"), ("--max_seq_length", "--max-length"),
        ("--lora-dropout", "--dropout"), ("--warmup_ratio", "--warmup"), ("--use_dora", "--dora"),
        ("--dataloader_num_workers", "leave it out"), ("--training_file", "--data"),
        ("--modules_to_save", "only LoRA adapters"), ("--adam_beta2", "AdamW"),
        ("--learning_rte", "--learning-rate"), ("--epoch", "--epochs"),
    ],
)  # fmt: skip
def test_a_flag_of_another_program_or_with_a_typing_error_is_answered_with_ours(flag, ours):
    with pytest.raises(BadOption) as refused:
        parse(train.TrainConfig, [flag, "1"], "")
    assert flag in refused.value.cause and ours in refused.value.remedy


def test_underscores_and_hyphens_are_the_same():
    assert parse(train.TrainConfig, ["--learning_rate", "1e-3"], "").learning_rate == 1e-3
    assert parse(train.TrainConfig, ["--max_steps=7"], "").max_steps == 7


def test_a_list_option_adds_up_and_another_one_that_is_repeated_takes_its_last_value():
    assert parse(train.TrainConfig, ["--data", "a", "--data", "b"], "").data == ("a", "b")
    assert parse(train.TrainConfig, ["--epochs", "1", "--epochs", "2"], "").epochs == 2


def test_every_answer_names_an_option_that_exists():
    options = {*vars(train.TrainConfig()), *vars(evaluate.EvalConfig()), "dtype", "adapter"}
    assert NAMES.keys() <= options


# --config


def parsed_with(tmp_path, values, *flags):
    toys.write_json(tmp_path / "c.json", values)
    return parse(train.TrainConfig, ["--config", str(tmp_path / "c.json"), *flags], "")


def test_a_config_file_sets_options_and_flags_override_it(tmp_path):
    config = train.TrainConfig(epochs=7, data=("demo", "x.jsonl"), dora=True, learning_rate=1e-3)
    saved = {"options": to_json(config), "identity": {}}
    assert parsed_with(tmp_path, saved) == config
    assert parsed_with(tmp_path, to_json(config)) == config
    again = parsed_with(tmp_path, {"batch-size": 4}, "--epochs", "2", "--no-dora")
    assert (again.batch_size, again.epochs, again.dora) == (4, 2, False)


def test_every_unknown_key_and_wrong_value_of_a_config_file_is_named(tmp_path):
    values = {"epoch": 3, "batch_size": "4", "dora": 1, "data": "gsm8k", "schedule": "stairs"}
    with pytest.raises(BadOption) as caught:
        parsed_with(tmp_path, values)
    cause = caught.value.cause
    assert "no option epoch (use --epochs)" in cause
    assert all(name in cause for name in ("batch_size is '4'", "dora is 1", "data is", "schedule"))


def test_changed_options_are_those_that_differ_from_the_defaults():
    config = train.TrainConfig(epochs=7, data=("demo",))
    assert changed_options(config) == {"epochs": 7, "data": ["demo"]}


def test_a_dry_run_prints_steps_tokens_time_and_memory_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--demo", "--limit", "40", "--dry-run", "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "6 steps, " in said and " tokens, about " in said and "peak memory" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_run_that_exists_measures_it_and_changes_no_file(tmp_path, capsys):
    flags = f"--demo --limit 40 --max-steps 1 --precision fp32 --device cpu --out {tmp_path}"
    train.main(flags.split())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train.main([*flags.split(), "--dry-run"]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("config", [train.TrainConfig(), evaluate.EvalConfig()])
def test_the_limit_of_an_option_is_excluded_above_and_included_otherwise(config):
    for field in dataclasses.fields(config):
        for name, allowed in (("least", True), ("above", False), ("below", False)):
            if (limit := field.metadata[name]) is not None:
                problems = value_problems(dataclasses.replace(config, **{field.name: limit}))
                assert bool(problems) != allowed, field.name
