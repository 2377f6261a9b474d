"""Tests of an evaluation that is killed, and of models and texts at their worst."""

import io
import json
import re
import time
from dataclasses import asdict

import pytest
import torch

from data.chat import ChatFormat
from data.custom import load_path
from evaluation.answers import answers
from evaluation.generative import NUMBERS, SCORERS, Completion
from evaluation.log import resume_log
from evaluation.summary import answer_metrics, result_text
from model.load import load_model
from terminal import Screen
from tests import toys
from tests.evaluations import (
    assert_killed_equals_whole,
    assert_random_completions_are_judged,
    completion,
    completions_of,
    evaluated,
    final_number,
    problem,
    settings,
)

# Killed


def test_an_evaluation_killed_20_times_equals_a_whole_one(tuned, tmp_path):
    assert_killed_equals_whole(tuned, tmp_path, rows=40, kills=20)


GOOD = json.dumps(asdict(completion("#### 7"))).encode() + b"\n"
TORN = [b'{"id": "torn', b"\0" * 50, b"\xff\x80\n", b"null\n", b"{}\n", b"[" * 99_999 + b"\n",
        b'{"id": 1}\n' + GOOD, b"\n" + GOOD]  # fmt: skip


@pytest.mark.parametrize("end", TORN)
def test_a_log_of_answers_is_read_up_to_where_it_is_torn(tmp_path, end):
    (tmp_path / "base.jsonl").write_bytes(GOOD * 3 + end)
    for name, whole in (("base", 3), ("none", 0)):
        records, _ = resume_log(path := tmp_path / f"{name}.jsonl", Completion)
        assert records == [completion("#### 7")] * whole
        assert path.read_bytes() == GOOD * whole


def test_answers_torn_off_a_log_are_generated_again(tuned, tmp_path):
    whole = evaluated(tuned, tmp_path)
    before = completions_of(tmp_path)
    (log,) = tmp_path.glob("evaluation/*/tuned.jsonl")
    log.write_bytes(log.read_bytes()[:-30] + b"\0\n")
    again = evaluated(tuned, tmp_path)
    assert completions_of(tmp_path) == before and log.read_bytes().count(b"\n") == 10
    assert again["models"]["tuned"]["correct"] == whole["models"]["tuned"]["correct"]


def test_control_characters_in_answers_are_not_printed(tuned, tmp_path):
    result = evaluated(tuned, tmp_path, "--limit", "1")
    for example in result["examples"]:
        example["base"] = "18\x1b]0;title\x07\x9b2J\u202e\r\n done"
    stream = io.StringIO()
    Screen(stream).write(result_text(result))
    said = stream.getvalue()
    assert "]0;title" in said and said.replace("\n", "").isprintable()


def test_a_kind_of_mistake_has_a_row_if_a_model_made_it(tuned, tmp_path):
    result = evaluated(tuned, tmp_path, "--limit", "1")
    models, said = result["models"].values(), result_text(result)
    made = {kind for m in models for kind, count in m["mistakes"].items() if count}
    assert made and made == set(re.findall(r"^classified as (.*?)  ", said, re.M))


# Models that never end, or end at once


@pytest.mark.parametrize(
    "ends, cut_off, empty", [((), 1, 0), (tuple(range(toys.TABLE)), 0, 1), ((-1,), 1, 0)]
)
def test_an_endless_answer_is_cut_off_and_one_that_ends_at_once_is_empty(
    tuned, ends, cut_off, empty
):
    chat = ChatFormat.from_folder(tuned / "base")
    problems = load_path(tuned / "sums").test
    model = load_model(tuned / "base", dtype=torch.float32)
    given = {c.id: [c] for c in answers(model, chat, problems, settings(7, eos_ids=ends))}
    assert {c.tokens for (c,) in given.values()} == ({7} if cut_off else {0})
    found = answer_metrics(NUMBERS, problems, given)
    assert (found["cut_off"], found["empty"]) == (len(problems) * cut_off, len(problems) * empty)
    assert found["correct"]["numeric-equal"] == 0


def test_an_answer_is_scored_even_if_the_text_runs_on_until_it_is_cut_off():
    p = problem("What is 3 + 4?", "#### 7")
    for after in (" 8", "\nQuestion: What is 9 + 9?\n#### 18", "\n#### 7" * 100, " 5 5 5" * 100):
        c = Completion("p", 0, "3+4=7\n#### 7" + after, tokens=512, cut_off=True, seconds=1.0)
        found = answer_metrics(NUMBERS, [p], {"p": [c]})
        assert found["cut_off"] == 1 and found["correct"]["numeric-equal"] == 1, after


# Texts as models write them, and worse


def test_10_000_random_completions_are_scored_without_an_exception():
    assert_random_completions_are_judged(range(10_000))


WORST = ["9", "#", "#### ", "1,111", "1/", "-", "$", ".", "1.", "0", " ", "\n", "####x", "#### -",
         ",", "$-", "1 1/", "9" * 100 + " ", "9" * 101, "½"]  # fmt: skip


@pytest.mark.parametrize("piece", WORST)
def test_the_worst_megabyte_is_read_in_linear_time(piece):
    text = (piece * 2**20)[: 2**20]
    for reader in (final_number, *(lambda t, s=s: s(t, "#### 7") for s in SCORERS.values())):
        seconds = []
        for _ in range(3):
            started = time.process_time()
            reader(text)
            seconds.append(time.process_time() - started)
        assert min(seconds) < 0.5, reader  # 0.01 on an idle machine; minutes if it were quadratic
