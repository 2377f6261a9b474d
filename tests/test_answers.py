"""Tests of what is counted of answers: time, tokens, cut-offs, lengths of options, conversions."""

import itertools
import time
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from data.encode import encode_problems
from data.problems import Choices, Source
from data.rows import Message, Problem
from data.split import split_problems
from evaluation import answers as module
from evaluation import measure
from evaluation.answers import answers
from evaluation.choices import Scored, acc_norm, choice_metrics, score
from evaluation.generative import NUMBERS, Completion
from evaluation.mistakes import classify
from evaluation.summary import answer_metrics, breakdown
from evaluation.tasks import judge_of, select_problems
from evaluation.teacher_forced import teacher_forced, teacher_forced_metrics
from evaluation.units import CONVERSIONS
from tests.evaluations import settings


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


def test_tokens_and_seconds_are_those_of_all_samples_and_outcomes_of_the_first():
    asked = problems(2)
    given = {
        p.id: [Completion(p.id, s, "#### 1", tokens=10 * i + s, cut_off=s > 0, seconds=1.0)
               for s in range(3)]
        for i, p in enumerate(asked)
    }  # fmt: skip
    found = answer_metrics(NUMBERS, asked, given)
    assert (found["completions"], found["tokens"], found["seconds"]) == (6, 36, 6.0)
    assert (found["cut_off"], found["correct"]["numeric-equal"]) == (0, 2)


def test_the_nats_of_the_correct_choice_are_the_mean_of_its_own_and_not_of_the_likeliest():
    asked = choices(2)
    scored = {p.id: Scored(p.id, [-5.0, -1.0, -2.0], seconds=0.5) for p in asked}
    found = choice_metrics(judge_of(asked), asked, scored)
    assert (found["right_choice_nats"], found["seconds"]) == (5.0, 1.0)
    assert found["correct"] == {"acc_norm": 0, "acc": 0}


def test_a_gold_answer_of_any_length_counts_in_the_loss(model, chat):
    gold = Message("assistant", "x" * 2500)
    long = Problem("long", (Message("user", "?"), gold))
    metrics = teacher_forced_metrics(model, chat, [long, *problems(1)], batch_size=1)
    (example, other), _ = encode_problems([long, *problems(1)], [0, 1], chat, 10**6)
    nats = [teacher_forced(model, [e], 1)[0] for e in (example, other)]
    supervised = example.supervised_count + other.supervised_count
    assert example.supervised_count > 2048
    assert metrics["loss"] == pytest.approx(sum(nats) / supervised)


def test_validation_problems_are_those_that_the_run_held_out_with_its_own_share():
    rows = problems(30)
    source = Source("rows", train=rows)
    for share in (0.1, 0.6):
        run = {"data": ["rows"], "validation_share": share}
        found = select_problems({"rows": source}, "validation", run)["rows"]
        assert found == [rows[i] for i in split_problems(rows, share)[1]]


def test_classes_of_a_breakdown_are_in_the_order_of_their_numbers():
    steps = [Problem(f"p{n}", (Message("user", "?"), Message("assistant", "<<1+1=2>>" * n + "2")))
             for n in (10, 9, 2)]  # fmt: skip
    assert list(breakdown(steps, [True] * 3)["reasoning steps"]) == ["2", "9", "10"]


def test_answers_are_decoded_with_each_option_of_the_command_line():
    given = {"max_new_tokens": 3, "batch_size": 5, "temperature": 0.5, "top_k": 7, "top_p": 0.9,
             "seed": 11}  # fmt: skip
    config = evaluate.EvalConfig(adapter="x", **given)
    base = SimpleNamespace(eos_ids=(1,), chat=SimpleNamespace(vocab_size=99))
    assert asdict(evaluate.decoding(config, base)) == given | {"eos_ids": (1,), "vocab_size": 99}


def test_a_conversation_is_cut_off_if_any_of_its_answers_is(monkeypatch):
    def one_turn(model, chat, problems, settings, *, done, poll):
        for p in problems:
            if p.id not in {id for id, _ in done}:
                first = len(p.messages) == 2
                yield Completion(p.id, 0, "#### 1", tokens=3, cut_off=first, seconds=1.0)

    monkeypatch.setattr(module, "_single_turn_answers", one_turn)
    messages = [Message(role, "text") for role in ("user", "assistant") * 2]
    (found,) = answers(None, None, [Problem("p", tuple(messages))], settings(3))
    assert (found.cut_off, found.tokens, found.seconds) == (True, 6, 2.0)
    assert found.turns == ["#### 1", "#### 1"]


def test_a_choice_that_tuning_made_right_is_fixed_and_not_broken(monkeypatch, tmp_path):
    found = iter([[False, False, True], [True, True, False]])  # of the base, of the tuned model
    monkeypatch.setattr(measure, "score_all", lambda *_: None)
    monkeypatch.setattr(measure, "choice_metrics", lambda *_: {"outcomes": next(found)})
    models = measure.Models(None, {"base": nullcontext, "tuned": nullcontext})
    task = SimpleNamespace(problems=[], judge=SimpleNamespace(generated=False))
    difference = measure.measure(models, None, task, settings(3), tmp_path)["difference"]
    assert (difference["fixed"], difference["broke"]) == (2, 1)
