"""Tests of one evaluation over several tasks, and of a model's own solutions as data."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
import train
from data.custom import load_path
from data.multiple_choice import CHOICE_TASKS
from data.rows import read_problems
from errors import BadData, BadOption
from evaluation import answers as generation
from evaluation import choices as scoring
from evaluation.generative import had_format
from evaluation.golds import gold_value
from evaluation.rejection import correct_solutions, keep
from evaluation.statistics import Paired, corrected, in_words, wilson_interval
from report.records import read_run
from tests import hub_stub, toys
from tests.choice_rows import splits
from tests.evaluations import COMMON, completion, problem

CHOICES = ["arc-easy", "hellaswag", "mmlu"]


def measured(tuned: Path, out: Path, *flags: str) -> dict[str, dict]:
    """`evaluate.py` of the adapter; its results by task."""
    evaluate.main(["--adapter", str(tuned / "run/best"), "--out", str(out), *COMMON, *flags])
    results = [json.loads(p.read_text()) for p in out.glob("evaluation/*/result.json")]
    return {
        Path(r["settings"]["data"].partition(" at ")[0].partition(",")[0]).name: r for r in results
    }


def test_several_tasks_share_a_table_and_each_has_its_conclusion(
    choice_tasks, tuned, tmp_path, capsys
):
    sums, out = str(tuned / "sums"), tmp_path / "out"
    found = measured(tuned, out, "--data", sums, *CHOICES, "--limit", "6")
    assert set(found) == {"sums", *CHOICES} and all(r["problems"] == 6 for r in found.values())
    told = capsys.readouterr().out
    lines = json.loads((out / "evaluation/summary.json").read_text())["tasks"]
    assert [line["task"] for line in lines] == [sums, *CHOICES]
    differences = [Paired(**found[Path(line["task"]).name]["difference"]) for line in lines]
    for line, difference in zip(lines, corrected(differences)):
        result = found[Path(line["task"]).name]
        correct = {name: sum(m["outcomes"]) for name, m in result["models"].items()}
        assert line["correct"] == correct
        assert line["intervals"]["tuned"] == list(wilson_interval(correct["tuned"], 6))
        conclusion = f"{line['task']}, {line['judged_by']}: {in_words(difference, 4)}"
        assert conclusion in " ".join(told.split())
    assert [line["judged_by"] for line in lines] == ["numeric-equal", "acc_norm", "acc_norm", "acc"]
    assert all(len(row) <= 80 for row in told[told.rindex("correct, by task") :].splitlines()[:5])
    assert set(found["mmlu"]["models"]["tuned"]["by"]) == {"area", "subject"}


def test_a_task_has_the_same_result_alone_and_with_others(choice_tasks, tuned, tmp_path, capsys):
    several = measured(tuned, tmp_path / "a", "--data", str(tuned / "sums"), "arc-easy")
    alone = measured(tuned, tmp_path / "b", "--data", "arc-easy")
    assert alone["arc-easy"]["settings"] == several["arc-easy"]["settings"]
    for name in ("base", "tuned"):
        one, other = (r["arc-easy"]["models"][name] for r in (alone, several))
        assert one["outcomes"] == other["outcomes"]
        assert one["right_choice_nats"] == other["right_choice_nats"]
    paths = [str(next(tmp_path.glob(f"{x}/evaluation/arc-easy-*/result.json"))) for x in "ab"]
    evaluate.main(["--compare", *paths])
    told = capsys.readouterr().out
    assert "choices correct, acc_norm" in told and "B against A: +0.0 points" in told
    both = alone["arc-easy"]["models"]
    assert both["base"]["right_choice_nats"] != both["tuned"]["right_choice_nats"]


def test_an_evaluation_stopped_within_a_task_resumes_there(
    choice_tasks, tuned, tmp_path, monkeypatch
):
    flags = ["--data", "arc-easy", "hellaswag", "--batch-size", "2"]
    whole = measured(tuned, tmp_path / "whole", *flags)
    real, calls = scoring.score, []

    def counted(model, chat, problems, batch_size, done):
        calls.append(len(done))
        for n, scored in enumerate(real(model, chat, problems, batch_size, done)):
            if len(calls) == 3 and n == 5:  # in hellaswag, of the base
                raise KeyboardInterrupt
            yield scored

    monkeypatch.setattr(scoring, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(tuned, tmp_path / "part", *flags)
    (log,) = (tmp_path / "part").glob("evaluation/hellaswag-*/base.jsonl")
    log.write_bytes(log.read_bytes() + b'{"id": "torn')
    again = measured(tuned, tmp_path / "part", *flags)
    assert calls[3:] == [12, 12, 5, 0]
    for name in whole:
        assert again[name]["difference"] == whole[name]["difference"]
        assert log.read_bytes().count(b"\n") == 12


def test_sampling_options_do_not_change_the_folder_of_choices(
    choice_tasks, tuned, tmp_path, capsys
):
    flags = ["--samples", "2", "--temperature", "0.5", "--seed", "3"]
    measured(tuned, tmp_path, "--data", "arc-easy")
    measured(tuned, tmp_path, "--data", "arc-easy", *flags)
    assert len(list(tmp_path.glob("evaluation/*"))) == 1
    assert "do not apply to arc-easy: choices are scored" in capsys.readouterr().out


def test_by_default_a_run_is_measured_on_everything_it_was_trained_on(
    choice_tasks, tuned, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(tuned / "run/best", run / "best")
    own = tmp_path / "own.jsonl"  # a file by itself has no test problems
    own.write_bytes((tuned / "sums/test.jsonl").read_bytes())
    options = {"data": [str(tuned / "sums"), "arc-easy:0.5", f"{own}:2"]}
    (run / "config.json").write_text(json.dumps({"options": options, "identity": {}}))
    evaluate.main(["--adapter", str(run / "best"), "--limit", "4", *COMMON])
    told = capsys.readouterr().out
    assert f"{own} has no test problems: not measured" in told
    evaluations = read_run(run).evaluations
    assert len(evaluations) == 2 and (run / "report.html").exists()
    report = (run / "report.md").read_text()
    assert "Learned and forgotten" in report and "choices are scored" in report
    with pytest.raises(BadData, match="has 0 test problems"):
        evaluate.main(["--adapter", str(run / "best"), "--data", str(own), "arc-easy", *COMMON])


# A model's own correct solutions


def test_correct_distinct_whole_answers_are_kept_and_end_like_gold_ones():
    p = problem("3 + 4?", "3+4=7\n#### 7", "t:1")
    texts = ["It is 7.", "It  is\n7. ", "It is 8.", "3+4=7\n#### 7", "7 <cut>", "", "so\n#### $7"]
    texts.append("3+4=8, so 7\n#### 7")  # correct, by a wrong step
    given = [completion(text, "t:1", i) for i, text in enumerate(texts)]
    given[4] = given[4].__class__(**{**given[4].__dict__, "text": "is 7", "cut_off": True})
    rows = list(correct_solutions([p], {"t:1": given}))
    assert [row["sample"] for row in rows] == [0, 3, 6]
    answers = [row["messages"][-1]["content"] for row in rows]
    assert answers == ["It is 7.\n#### 7", "3+4=7\n#### 7", "so\n#### $7\n#### 7"]
    assert all(had_format(answer) for answer in answers) and {row["id"] for row in rows} == {"t:1"}


def test_only_whole_answers_count_as_left_out_for_a_wrong_step(tmp_path, capsys):
    p, wrong_step = problem("3 + 4?", "3+4=7\n#### 7", "t:1"), "3+4=8, so 7\n#### 7"
    texts = (wrong_step, f"Well, {wrong_step}", f"So {wrong_step}", f"So  {wrong_step}")
    given = [completion(text, "t:1", n) for n, text in enumerate(texts)]  # the last two are equal
    given[1] = replace(given[1], cut_off=True)
    keep(tmp_path / "own.jsonl", [p], {"t:1": given})
    assert "2 correct answers are left out: the arithmetic of a step is wrong" in (
        capsys.readouterr().out
    )


def test_kept_answers_are_in_a_form_that_can_be_scored_whatever_the_form_of_the_golds():
    texts = ["It is 7.", "so\n#### 7", "3+4=7\nThe answer is: 7", r"So \boxed{7}."]
    given = {"t:1": [completion(text, "t:1", i) for i, text in enumerate(texts)]}
    for gold, kept in (
        ("####7", ["It is 7.\n#### 7", *texts[1:2], *(text + "\n#### 7" for text in texts[2:])]),
        ("The answer is: 7", ["It is 7.\n#### 7", *texts[1:]]),
    ):
        rows = list(correct_solutions([problem("3 + 4?", gold, "t:1")], given))
        assert [row["messages"][-1]["content"] for row in rows] == kept
        assert all(gold_value(answer) == 7 for answer in kept)


def test_correct_answers_are_kept_and_trained_on(tuned, tmp_path, monkeypatch, capsys):
    def solver(model, chat, problems, settings, *, done):  # correct on every second problem
        for n, p in enumerate(problems):
            for sample, before in enumerate(("", " ", "so ")):
                text = before + (p.answer.partition("\n")[0] if n % 2 else "I do not know.")
                yield completion(text, p.id, sample)

    monkeypatch.setattr(generation, "answers", solver)
    own, data = tmp_path / "own.jsonl", ["--data", str(tuned / "sums")]
    flags = [
        "--split",
        "train",
        "--samples",
        "3",
        "--temperature",
        "0.7",
        "--keep-correct",
        str(own),
    ]
    found = measured(tuned, tmp_path, *data, *flags)
    assert "kept 40 correct, distinct answers to 20 of 40 problems" in capsys.readouterr().out
    assert list(found["sums"]["models"]) == ["tuned"]  # the base's would not be kept
    kept, bad = read_problems(own)
    gold = {p.question: p.answer for p in load_path(tuned / "sums").train}
    assert not bad and all(p.answer.endswith(gold[p.question]) for p in kept)
    run = [
        "--model",
        tuned / "base",
        "--data",
        own,
        "--out",
        tmp_path / "again",
        "--max-steps",
        2,
    ]
    train.main([*map(str, run), "--device", "cpu"])
    assert (tmp_path / "again/best/adapter_model.safetensors").exists()
    with pytest.raises(BadOption, match="exists already and is not overwritten"):
        measured(tuned, tmp_path, *data, *flags)


@pytest.mark.parametrize(
    "flags, cause",
    [
        (("--split", "test"), "with --split test"),
        (("--split", "validation"), "with --split validation"),
        (("--keep-correct", "own.txt"), "is not a .jsonl file"),
        (("--keep-correct", "nowhere/own.jsonl"), "in an existing folder"),
        (
            ("--data", "arc-easy"),
            "single task whose gold answers hold a number, not .*arc-easy",
        ),
    ],
)
def test_solutions_that_cannot_be_kept_are_refused_before_any_is_generated(
    choice_tasks, tuned, tmp_path, monkeypatch, flags, cause
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = ["--split", "train", "--keep-correct", "own.jsonl", *flags]
    with pytest.raises(BadOption, match=cause):
        measured(tuned, tmp_path, "--data", str(tuned / "sums"), *flags)
    assert not (tmp_path / "evaluation").exists()


# From the Hub


def test_every_task_is_fetched_trained_on_and_evaluated(tmp_path, lively_checkpoint, monkeypatch):
    files = {"models/toy/qwen2": {f.name: f.read_bytes() for f in lively_checkpoint.iterdir()}}
    for name, form in CHOICE_TASKS.items():
        of = files.setdefault(f"datasets/{form.repo}", {"README.md": b"not asked for"})
        for split, rows in splits(name).items():
            of[f"{form.folder}/{split}-00000-of-00001.parquet"] = toys.parquet(rows)
    commits = {repo: f"{i}" * 40 for i, repo in enumerate(files, 1)}
    monkeypatch.setattr(hub_stub, "COMMITS", commits)
    stub = hub_stub.StubHub(files)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    place, out = {"home": tmp_path, "hub": stub.url}, tmp_path / "run"
    command = [word if word != "gsm8k" else "arc-challenge" for word in hub_stub.TRAIN_ON_HUB]
    learned = hub_stub.python(*command, "--out", out, **place)
    assert learned.returncode == 0, learned.stderr
    flags = ["--adapter", out / "best", "--data", *CHOICE_TASKS, "--shots", 2]
    found = hub_stub.python("evaluate.py", *flags, *hub_stub.FEW_ANSWERS, **place)
    stub.shutdown()
    stub.server_close()
    assert found.returncode == 0, found.stderr
    assert all(commit in found.stdout for commit in commits.values())
    assert len(list(out.glob("evaluation/*/result.json"))) == 4
    assert not any("README" in path or "hellaswag/resolve/4/test" in path for path in stub.requests)
