"""Rejection sampling: a model's own correct solutions become training data.

A solution is kept if it is numerically equal to the gold answer, none of its steps is found wrong,
and it was not cut off, because an answer that was cut off would teach the model not to stop. If
solutions to a problem differ only in white space, the first is kept. In a conversation, all
assistant turns become the model's own, because its last answer depends on them.

A solution without a `#### N` that all scorers can read gets the gold answer's as its last line. The
rest of its text is unchanged. Without that line the row could not be scored, and most models that
were not tuned on GSM8K would produce no usable rows. Where the gold answers have another form, such
as `The answer is: N`, a solution that states its number in any of these forms is left as it is.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.rows import Message, Problem
from errors import BadOption
from evaluation.answers import count_turns, next_turn
from evaluation.generative import Completion, Completions, had_format, numeric_equal
from evaluation.golds import gold_text, gold_value
from evaluation.mistakes import has_wrong_step
from evaluation.tasks import Task
from files import write_file


def distinct_correct(
    problems: list[Problem], completions: Completions
) -> Iterator[tuple[Problem, Completion, list[str]]]:
    """The correct solutions that were not cut off, each with the texts of its turns."""
    for p in problems:
        seen = set()
        for c in completions[p.id]:
            texts = [text.strip() for text in c.turns or [c.text]]
            key = tuple(" ".join(text.split()) for text in texts)
            if c.cut_off or not all(key) or key in seen or not numeric_equal(texts[-1], p.answer):
                continue
            seen.add(key)
            yield p, c, texts


def correct_solutions(
    problems: list[Problem], completions: Completions
) -> Iterator[dict[str, Any]]:
    """Rows in the format `messages`, with the problem's `id` and the number of the `sample`."""
    for p, c, texts in distinct_correct(problems, completions):
        if any(map(has_wrong_step, texts)):
            continue
        *earlier, text = texts
        if not had_format(text) and ("####" in p.answer or gold_value(text) is None):
            text += f"\n#### {gold_text(p.answer)}"
        prompt = next_turn(p, earlier).messages[:-1]
        solved = replace(p, messages=(*prompt, Message("assistant", text)))
        yield solved.row() | {"sample": c.sample}


def keep(path: Path, problems: list[Problem], completions: Completions) -> None:
    """Write the correct solutions to `path`, all or nothing, and print how many there are."""
    rows = list(correct_solutions(problems, completions))
    left_out = sum(1 for _ in distinct_correct(problems, completions)) - len(rows)
    if left_out:
        print(f"{left_out:,} correct answers are left out: the arithmetic of a step is wrong")
    solved = len({row["id"] for row in rows})
    print(
        f"kept {len(rows):,} correct, distinct answers to {solved:,} of {len(problems):,} problems"
    )
    if not rows:
        return print(f"{path} is not written: there are no rows to train on")
    check_new_file(path)  # again, because generating takes long
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"train on them with: python train.py --data {path}")


def check_new_file(path: Path) -> None:
    """Raise BadOption if `path` exists, is not a .jsonl file, or is in no existing folder."""
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        raise BadOption(
            f"--keep-correct {path} is not a .jsonl file in an existing folder",
            "give a name such as own.jsonl",
        )
    if path.exists():
        raise BadOption(
            f"--keep-correct {path} exists already and is not overwritten",
            "give another name, or move the file",
        )


def check_tasks(tasks: list[Task], prompt: str) -> None:
    """Raise BadOption unless `tasks` is one task whose correct solutions can become rows."""
    if len(tasks) > 1 or not tasks[0].judge.numeric:
        names = ", ".join(task.name for task in tasks)
        raise BadOption(
            f"--keep-correct needs a single task whose gold answers hold a number, not {names}",
            "name that task with --data; its golds end in '#### N', for example",
        )
    if prompt != "chat" and any(count_turns(p, "chat") > 1 for p in tasks[0].problems):
        raise BadOption(
            f"--keep-correct: problems of {tasks[0].name} have several turns, but a plain-text"
            " prompt gets a single answer",
            "leave out --shots and --cot",
        )
