"""Tests of what is counted of answers: time, tokens, cut-offs, lengths of options, conversions."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.chat import ChatFormat
from data.problems import Choices
from data.rows import Message, Problem
from evaluation import answers as module
from evaluation.answers import answers
from evaluation.choices import acc_norm, score
from evaluation.mistakes import classify
from evaluation.units import CONVERSIONS
from model.load import load_model
from tests.evaluations import settings


@pytest.fixture(scope="module")
def model(lively_checkpoint):
    return load_model(lively_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def chat(lively_checkpoint):
    return ChatFormat.from_folder(lively_checkpoint)


def problems(count: int) -> list[Problem]:
    asked = [f"What is {i}?" * (i + 1) for i in range(count)]
    gold = Message("assistant", "#### 1")
    return [Problem(f"p{i}", (Message("user", text), gold)) for i, text in enumerate(asked)]


def choices(count: int) -> list[Problem]:
    options = ("one", "two of them", "3")
    return [
        Problem(p.id, p.messages, choices=Choices(f"Q {i}:", options, 0))
        for i, p in enumerate(problems(count))
    ]


def test_the_seconds_of_all_answers_add_up_to_the_time_they_took(model, chat, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    decoding = settings(9, batch_size=4, eos_ids=tuple(range(0, 300, 7)))
    found = list(answers(model, chat, problems(7), decoding))
    assert len({c.tokens for c in found}) > 2  # they end at different steps
    assert sum(c.seconds for c in found) == pytest.approx(next(ticks) - 1)


def test_the_seconds_of_all_scored_choices_add_up_to_the_time_they_took(model, chat, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    found = list(score(model, chat, choices(5), batch_size=2))
    assert [s.seconds for s in found] == [0.5] * 4 + [1.0]  # each batch takes one tick


def test_an_end_token_or_a_stop_on_the_last_allowed_token_is_no_cut_off(model, chat, monkeypatch):
    (whole,) = answers(model, chat, problems(1), settings(8, eos_ids=()))
    assert (whole.tokens, whole.cut_off) == (8, True)
    ids = decoded_ids(model, chat, 8)
    place = next(i for i in range(2, 8) if ids[i] not in ids[:i])
    at_the_limit = settings(place + 1, eos_ids=(ids[place],))
    (ended,) = answers(model, chat, problems(1), at_the_limit)
    assert (ended.tokens, ended.cut_off) == (place, False)  # the end token is no part of it
    (before,) = answers(model, chat, problems(1), settings(place, eos_ids=(ids[place],)))
    assert (before.tokens, before.cut_off) == (place, True)
    stop = chat.decode(ids[: place + 1])
    monkeypatch.setitem(module.STOPS, "chat", (stop,))
    (stopped,) = answers(model, chat, problems(1), settings(place + 1, eos_ids=()))
    assert (stopped.text, stopped.cut_off) == ("", False)


def decoded_ids(model, chat, count: int) -> list[int]:
    """The first tokens of the answer to the first of `problems`."""
    prompt = chat.prompt(problems(1)[0].messages[:-1])
    steps = module.decode(model, [prompt], settings(count, eos_ids=()).decoding)
    return [token for ((_, token, _),) in steps]


@pytest.mark.parametrize("options", [("é" * 6, "abcdefg"), ("数学数学", "abcde"), ("é", "e\u0301")])
def test_acc_norm_divides_by_characters_as_lm_evaluation_harness_does(options):
    task = pytest.importorskip("lm_eval.api.task")

    class Stub(task.ConfigurableTask):
        """The harness's own judgement of given likelihoods, without its data."""

        OUTPUT_TYPE = "multiple_choice"
        multiple_input = multiple_target = False

        def __init__(self):
            self._config = SimpleNamespace(process_results=None)
            self._metric_fn_list = dict.fromkeys(("acc", "acc_norm"))

        def doc_to_choice(self, doc):
            return list(options)

        def doc_to_target(self, doc):
            return 0

    rng, verdicts = np.random.default_rng(0), []
    for scores in -rng.uniform(1, 20, (200, 2)):
        theirs = Stub().process_results({}, [(s, False) for s in scores])["acc_norm"]
        verdicts.append(acc_norm(list(scores), Choices("Q", options, 0)))
        assert verdicts[-1] == theirs
    assert 20 < sum(verdicts) < 180


@pytest.mark.parametrize("factor, small, large", CONVERSIONS)
def test_a_conversion_explains_a_factor_to_within_a_hundredth_and_not_one_off_by_two(
    factor, small, large
):
    units = f"{small} and {large}".replace("second ", "seconds ")  # "second" is an ordinal
    question, truth = f"How many {units}?", 700_000
    for exact in (truth * factor, truth / factor):
        for off, kind in ((0, "unit or rounding"), (0.005, "unit or rounding"),
                          (0.02, "wrong plan"), (-0.02, "wrong plan")):  # fmt: skip
            answer = f"{exact * (1 + off):.3f}"
            assert classify(question, f"#### {truth}", f"#### {answer}").kind == kind, answer
