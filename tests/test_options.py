"""Tests of flags that other programs have: each is answered with the one here."""

import pytest

import evaluate
import train
from errors import BadOption
from run.elsewhere import NAMES
from run.options import parse


@pytest.mark.parametrize(
    "flag, ours",
    [
        ("--num_train_epochs", "--epochs"), ("--lora_alpha", "--alpha"), ("--lora_r", "--rank"),
        ("--r", "--rank"), ("--lr", "--learning-rate"), ("--model_name_or_path", "--model"),
        ("--per_device_train_batch_size", "--batch-size"), ("--output_dir", "--out"),
        ("--gradient_accumulation_steps", "--grad-accum"), ("--max_seq_length", "--max-length"),
        ("--lora-dropout", "--dropout"), ("--warmup_ratio", "--warmup"), ("--use_dora", "--dora"),
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
