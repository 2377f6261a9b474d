"""Tests of tasks with choices; the reference is lm-evaluation-harness itself, or a plain loop."""

import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch

from data import multiple_choice
from data.chat import ChatFormat
from data.multiple_choice import CHOICE_TASKS, load, parse_arc, parse_hellaswag, parse_mmlu
from data.rows import Problem
from errors import BadData, BadRun
from evaluation import choices as scoring
from evaluation.choices import (
    Scored,
    acc,
    acc_norm,
    by_subject,
    choice_metrics,
    encode,
    log_likelihoods,
    score,
    with_shots,
)
from evaluation.generative import TEXT
from evaluation.log import resume_log
from evaluation.tasks import judge_of, run_sources
from model.load import load_model
from tests import toys
from tests.choice_rows import arc_row, hellaswag_row, mmlu_row, rows_of, splits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One whose choices differ in likelihood."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("lively") / "t", std=0.2, tied=False)


@pytest.fixture(scope="module")
def chat(checkpoint):
    return ChatFormat.from_folder(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, dtype=torch.float32)


# Against lm-evaluation-harness

TASKS = {"arc-easy": "arc/arc_easy", "arc-challenge": "arc/arc_challenge",
         "hellaswag": "hellaswag/hellaswag", "mmlu": "mmlu/default/mmlu_virology"}  # fmt: skip


@pytest.fixture(scope="module")
def harness(checkpoint):
    """The harness's model over the same checkpoint."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return huggingface.HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, device="cpu")


def harness_task(name: str, shots: int):
    """The harness's own task over the toy rows, as its evaluator sets it up."""
    datasets = pytest.importorskip("datasets")
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.tasks.__file__).parent / f"{TASKS[name]}.yaml"
    config = {k: v for k, v in load_yaml(path).items() if k not in ("include", "tag", "task_alias")}
    rows = splits(name)
    if name == "mmlu":  # the harness reads a subject's own files
        rows = {k: [r for r in v if r["subject"] in ("virology", "")] for k, v in rows.items()}
    sets = {split: datasets.Dataset.from_list(of) for split, of in rows.items()}
    task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: sets})
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)  # the default of simple_evaluate
    task.build_all_requests()
    return task


def prompted(name: str, shots: int) -> list:
    """Our test problems with their contexts complete; of MMLU one subject's."""
    source = load(name)
    problems = [p for p in source.test if p.category in (None, "virology")]
    return [with_shots(p, s) for p, s in zip(problems, source.shots(problems, shots))]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", TASKS)
def test_contexts_and_continuations_equal_the_harness(choice_tasks, name, shots):
    theirs = [request.args for request in harness_task(name, shots).instances]
    ours = [
        (p.choices.context, " " + option)
        for p in prompted(name, shots)
        for option in p.choices.options
    ]
    assert ours == theirs


@pytest.mark.parametrize("name, shots", [(name, shots) for name in TASKS for shots in (0, 2)])
def test_scores_acc_and_acc_norm_equal_the_harness(choice_tasks, harness, model, chat, name, shots):
    task, problems = harness_task(name, shots), prompted(name, shots)
    theirs = iter(harness.loglikelihood(task.instances, disable_tqdm=True))
    scored = {s.id: s for s in score(model, chat, problems, batch_size=5)}
    results = []
    for p, doc in zip(problems, task.eval_docs):
        answers = [next(theirs) for _ in p.choices.options]
        ours = scored[p.id].scores
        assert ours == pytest.approx([nats for nats, _ in answers], abs=1e-4)
        results.append(task.process_results(doc, answers))
    found = choice_metrics(judge_of(problems), problems, scored)["correct"]
    assert found == {key: sum(r[key] for r in results) for key in found}
    assert set(found) == set(results[0])
    assert 0 < found["acc"] < len(problems)


def test_accuracy_over_all_problems_equals_the_harness_mean_weighted_by_subject_size():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = random.Random(0)
    problems = [parse_mmlu(mmlu_row(rng, i * i), f"t:{i}") for i in range(50)]
    right = [rng.random() < 0.4 for _ in problems]
    cells = list(by_subject(problems, right)["subject"].values())
    rates, sizes = [a / b for a, b in cells], [b for _, b in cells]
    theirs = metrics.aggregate_subtask_metrics(rates, sizes, weight_by_size=True)
    assert sum(right) / len(right) == pytest.approx(theirs) and len(cells) > 1


def test_areas_equal_the_groups_of_the_harness():
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(tasks.__file__).parent / "mmlu/default"
    for path in folder.glob("mmlu_*.yaml"):
        text = path.read_text()
        subject = path.stem.removeprefix("mmlu_")
        (tag,) = (line.split('"')[3] for line in text.splitlines() if line.startswith('"tag"'))
        area = tag.removeprefix("mmlu_").removesuffix("_tasks").replace("_", " ")
        assert scoring.AREA.get(subject, "other") == area


# Computing contexts once


def alone(model, question) -> list[float]:
    """Each choice by itself, in a whole forward pass, by PyTorch's own log-softmax."""
    found = []
    for continuation in question.continuations:
        tokens = torch.tensor(question.context + continuation)
        hidden = model(tokens, torch.arange(len(tokens)), [len(tokens)])
        p = (hidden @ model.head_weight.t()).log_softmax(-1)
        at = range(len(question.context) - 1, len(tokens) - 1)
        found.append(sum(p[i, tokens[i + 1]].item() for i in at))
    return found


@torch.no_grad()
def test_choices_that_share_their_context_score_as_each_one_alone(choice_tasks, model, chat):
    questions = [encode(p, chat) for name in CHOICE_TASKS for p in load(name).test[:6]]
    together = log_likelihoods(model, questions)
    for question, scores in zip(questions, together):
        assert scores == pytest.approx(alone(model, question), rel=1e-5, abs=1e-5)
        assert log_likelihoods(model, [question])[0] == pytest.approx(scores, rel=1e-6)


def test_a_context_is_computed_once_and_last_tokens_are_not_computed(model, chat, monkeypatch):
    p = parse_arc(arc_row(random.Random(1), 0), "t:1")
    question, seen = encode(p, chat), []
    real = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda t, *a: seen.append(len(t)) or real(t, *a))
    log_likelihoods(model, [question])
    assert seen == [len(question.context) + sum(len(c) - 1 for c in question.continuations)]


def test_white_space_at_the_end_of_a_context_belongs_to_the_choices(chat):
    p = parse_hellaswag(
        hellaswag_row(random.Random(2), 0) | {"ctx_a": "Tea [x]", "ctx_b": ""}, "t:1"
    )
    assert p.choices.context == "Making Tea: Tea "
    question = encode(p, chat)
    assert chat.decode(question.context) == "Making Tea: Tea"
    assert chat.decode(question.continuations[0]) == "  " + p.choices.options[0]


# Rows


ARC = {"id": "a", "question": "Why?", "choices": {"text": ["x", "y y"], "label": ["1", "2"]},
       "answerKey": "2"}  # fmt: skip
MMLU = {"question": "Why?", "subject": "virology", "choices": ["x", "y", "z"], "answer": 2}
SWAG = {
    "activity_label": "Tea",
    "ctx_a": "He.",
    "ctx_b": "then",
    "endings": ["x", "y"],
    "label": "1",
}


def test_rows_become_conversations_with_letters_in_the_order_of_the_options():
    assert [m.content for m in parse_arc(ARC, "t:1").messages] == ["Why?\nA. x\nB. y y", "B. y y"]
    assert [m.content for m in parse_mmlu(MMLU, "t:1").messages] == [
        "Why?\nA. x\nB. y\nC. z",
        "C. z",
    ]
    asked = "Which ending fits best?\nTea: He. Then\nA. x\nB. y"
    assert [m.content for m in parse_hellaswag(SWAG, "t:1").messages] == [asked, "B. y"]


@pytest.mark.parametrize(
    "parse, row, cause",
    [
        (parse_arc, ARC | {"answerKey": "3"}, "answerKey '3' is not a label of"),
        (parse_arc, ARC | {"answerKey": ""}, "answerKey '' is not a label of"),
        (
            parse_arc,
            ARC | {"choices": {"text": ["x"], "label": ["A"]}},
            "not a list of 2 to 26 texts",
        ),
        (parse_arc, ARC | {"choices": None}, "text is not a list"),
        (parse_arc, ARC | {"question": " "}, "question is"),
        (parse_mmlu, MMLU | {"answer": 3}, "answer 3 is not one of its 3 choices, from 0"),
        (parse_mmlu, MMLU | {"answer": -1}, "answer -1 is not one"),
        (parse_mmlu, MMLU | {"answer": True}, "answer True is not one"),
        (parse_mmlu, MMLU | {"choices": ["x", ""]}, "choices is empty"),
        (parse_mmlu, MMLU | {"choices": ["x"] * 27}, "not a list of 2 to 26"),
        (parse_hellaswag, SWAG | {"label": ""}, "label is empty, as in the test split"),
        (parse_hellaswag, SWAG | {"label": "2"}, "label 2 is not one of its 2 choices"),
        (parse_hellaswag, SWAG | {"label": "x"}, "label 'x' is not one"),
        (parse_hellaswag, SWAG | {"endings": ["x", "[y]"]}, "nothing but markup"),
        (parse_hellaswag, SWAG | {"ctx_b": None}, "is not text"),
    ],
)
def test_a_malformed_row_is_refused_with_the_reason(parse, row, cause):
    with pytest.raises(ValueError, match=cause.replace("[", r"\[")):
        parse(row, "t:1")


def test_markup_in_brackets_is_removed_as_by_the_harness_and_in_linear_time():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(["[", "]", "a", " ", "  ", "\n", " [title]", "B"], k=12))
        assert multiple_choice._clean(text) == utils.preprocess(text)
    assert multiple_choice._clean("[" * 10**6) == "[" * 10**6


def test_a_few_malformed_rows_are_left_out_and_reported_and_many_are_an_error(choice_tasks):
    place = choice_tasks / "cais/mmlu/all/test-00000-of-00001.parquet"
    rows = rows_of("mmlu", "test", 200)
    place.write_bytes(toys.parquet([*rows[:150], rows[150] | {"answer": 4}, *rows[151:]]))
    source = load("mmlu")
    assert len(source.test) == 199
    assert source.bad == [f"{place.name}:151: answer 4 is not one of its 4 choices, from 0"]
    place.write_bytes(toys.parquet([row | {"answer": 4} for row in rows]))
    with pytest.raises(BadData, match="200 of 200 rows are bad: test-00000-of-00001.parquet:1: "):
        load("mmlu")


def test_subjects_are_interleaved_and_no_row_is_lost(choice_tasks):
    problems = load("mmlu").test
    assert [p.category for p in problems[:3]] == [p.category for p in problems[3:6]]
    assert len({p.category for p in problems[:3]}) == 3 and len({p.id for p in problems}) == 12


def test_hellaswag_is_tested_on_its_validation_split_which_is_reported(choice_tasks, capsys):
    assert all(p.id.startswith("validation-") for p in load("hellaswag").test)
    assert "test split has no labels, so its validation split is used" in capsys.readouterr().out


def test_a_training_question_is_never_shown_before_itself(choice_tasks):
    source = load("arc-easy")
    for p, solved in zip(source.train, source.shots(source.train, 5)):
        assert len({s.id for s in solved} - {p.id}) == 5
    assert [len(s) for s in source.shots(source.test[:2], 99)] == [12, 12]  # all that there are


# Metrics


def test_the_first_of_the_largest_scores_counts_and_nan_never_does():
    choices = parse_arc(ARC, "t:1").choices  # "x" and "y y", the second is right
    assert not acc([-2.0, -2.0], choices) and acc([-2.0, -1.0], choices)
    assert acc_norm([-2.0, -3.0], choices) and not acc([-2.0, -3.0], choices)
    first = parse_arc(ARC | {"answerKey": "1"}, "t:1").choices
    assert acc([0.0, -1.0], first) and not acc([float("nan"), -1.0], first)


def test_a_log_of_scores_is_read_up_to_where_it_is_torn(tmp_path):
    line = json.dumps({"id": "t:1", "scores": [-1.0, -2.0], "seconds": 0.1}).encode() + b"\n"
    for torn in (line[:-9], line[:-1], b"\0\n", b"[" * 99_999 + b"\n", b"{}\n" + line):
        (tmp_path / "base.jsonl").write_bytes(line * 2 + torn)
        kept, log = resume_log(tmp_path / "base.jsonl", Scored)
        assert kept == [Scored("t:1", [-1.0, -2.0], 0.1)] * 2 and log.sync() == 2 * len(line)


def test_weights_of_a_mixture_are_not_part_of_its_sources_names():
    specs = ["gsm8k", "arc-challenge:0.5", "a:b.jsonl:2"]
    assert run_sources({"data": specs}) == ["gsm8k", "arc-challenge", "a:b.jsonl"]
    assert run_sources({"data": "gsm8k"}) == run_sources({}) == ["gsm8k"]
    for odd in (None, [], 5, ["gsm8k", 5]):
        with pytest.raises(BadRun, match="names its data as"):
            run_sources({"data": odd})


def test_choices_are_judged_by_likelihood_and_by_text_where_answers_are_generated(choice_tasks):
    problems = load("arc-easy").test
    judge = judge_of(problems)
    assert (judge.name, judge.headline, judge.generated) == ("choices", "acc_norm", False)
    assert judge_of(load("mmlu").test).headline == "acc"
    assert judge_of(problems, generated=True) is TEXT


def test_the_seconds_of_the_questions_of_a_batch_add_up_to_its_own(monkeypatch):
    monkeypatch.setattr(scoring, "encode", lambda p, chat: scoring.Question(p.id, [1], [[1]]))
    monkeypatch.setattr(scoring, "log_likelihoods", lambda model, group: [[0.0]] * len(group))
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    found = score(None, None, [Problem(str(i), ()) for i in range(5)], batch_size=2)
    assert [s.seconds for s in found] == [0.5, 0.5, 0.5, 0.5, 1.0]
