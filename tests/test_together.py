"""Tests of features combined: mixtures, choices, conversations, adapters."""

import json

import evaluate
import train
from data.rows import Message, Problem, parse_row
from data.split import normalize, split_problems
from evaluation.generative import Completion
from evaluation.rejection import correct_solutions
from tests import toys
from tests.toys import write_lines


def sums(count: int, **names: str) -> list[dict[str, str]]:
    """Rows of sums; `names` renames columns."""
    rows = [toys.sum_problem(n, 3) for n in range(count)]
    return [{names.get(k, k): v for k, v in row.items()} for row in rows]


def test_choices_and_renamed_columns_are_trained_together_and_evaluated_separately(
    choice_tasks, checkpoint, tmp_path
):
    mine, run = tmp_path / "mine.jsonl", tmp_path / "run"
    write_lines(mine, sums(40, question="problem", answer="solution"))
    flags = f"--model {checkpoint} --data arc-easy {mine}:0.5 --validation-share 0.3 --max-steps 2"
    columns = "--columns question=problem,answer=solution --dora --rank q_proj=4"
    here = "--device cpu --precision bf16"
    assert train.main(f"{flags} {columns} --batch-size 4 {here} --out {run}".split()) == 0
    evaluate.main(f"--adapter {run}/best --split validation --max-new-tokens 4 {here}".split())
    lines = json.loads((run / "evaluation/summary.json").read_text())["tasks"]
    assert [line["task"] for line in lines] == ["arc-easy", str(mine)]
    assert [line["judged_by"] for line in lines] == ["acc_norm", "numeric-equal"]
    held_out = (run / "validation.jsonl").read_text().splitlines()
    assert sum(line["problems"] for line in lines) == len(held_out)


def test_a_row_held_out_from_one_source_is_in_no_train_split(tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    problems = [parse_row(row, "x") for row in sums(60)]
    train_rows, held_out = split_problems(problems, 0.1)
    write_lines(few, [sums(60)[n] for n in train_rows[:3]])  # at least one of them is held out
    write_lines(many, sums(60))
    options = {"data": [f"{few}:2", str(many)], "validation_share": 0.1}
    toys.write_json(tmp_path / "config.json", {"options": options, "identity": {}})
    found = {}
    for split in ("train", "validation"):
        for data in ((), (str(many),)):
            config = evaluate.EvalConfig(adapter=str(tmp_path / "best"), data=data, split=split)
            tasks = evaluate.select_tasks(config)
            found[split, len(tasks)] = {normalize(p.question) for t in tasks for p in t.problems}
            assert tasks[-1].name == str(many)
    assert found["train", 2] and found["train", 1] == found["train", 2]
    assert found["validation", 1] == found["validation", 2]
    assert not found["train", 2] & found["validation", 2]
    alone = {normalize(problems[row].question) for row in held_out}
    assert alone < found["validation", 2]


def test_a_kept_conversation_has_the_models_own_turns_and_the_original_question():
    messages = ("user", "a?"), ("assistant", "gold"), ("user", "b?"), ("assistant", "so\n#### 7")
    problem = Problem(
        "t:1", tuple(Message(*turn) for turn in messages), original_question="a and b"
    )
    turns = [["own", "7\n#### 7"], ["own ", "7 #### 7"], ["other", "7\n#### 7"], ["", "#### 7"]]
    answers = [Completion("t:1", n, t[-1], 9, False, 0.1, t) for n, t in enumerate(turns)]
    rows = list(correct_solutions([problem], {"t:1": answers}))
    assert [row["sample"] for row in rows] == [0, 2]
    for row, first in zip(rows, ("own", "other")):
        read = parse_row(json.loads(json.dumps(row)), "own.jsonl:1")
        assert read.question == problem.question
        assert [m.content for m in read.messages] == ["a?", first, "b?", "7\n#### 7"]
