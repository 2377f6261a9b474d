r"""ARC, MMLU and HellaSwag: questions with choices, to learn as chats and to be tested on.

    arc-easy, arc-challenge
        {"id": "Mercury_SC_415702", "question": "George wants to warm his hands quickly by rubbing
         them. Which skin surface will produce the most heat?", "choices": {"text": ["dry palms",
         "wet palms", ...], "label": ["A", "B", "C", "D"]}, "answerKey": "A"}
    mmlu
        {"question": "Find the degree for the given field extension Q(sqrt(2)) over Q.",
         "subject": "abstract_algebra", "choices": ["0", "4", "2", "6"], "answer": 2}
    hellaswag
        {"activity_label": "Removing ice from car", "ctx_a": "Then, the man writes over the snow
         covering the window of a car.", "ctx_b": "then", "endings": [", the man adds wax.", ...],
         "label": "3"}

A row to learn is a chat: the question and its choices by letter from the user, `B. text` from the
assistant. Letters go by place, whatever labels the row has, and there may be 2 to 26 of them. A row
to be tested on is lm-evaluation-harness 0.4.13's plain text, a context and its continuations; that
harness also chooses which splits are tested, and which solved rows are shown before a question.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.rows import BAD_SHARE, Choices, Message, Problem, Source, read_rows
from errors import BadData, listed
from hub import fetch

LETTERS = string.ascii_uppercase
SHOTS_SEED = 1234  # the harness's own; its draws are the same in every evaluation
BRACKETS = re.compile(r"\[[^\]\n]*(\]?)")  # linear: an open one is taken whole, and put back


def parse_arc(row: dict, id: str) -> Problem:
    """A row of ARC; ValueError says what is odd about it."""
    question, choices = _text(row, "question"), row.get("choices")
    choices = choices if isinstance(choices, dict) else {}
    options, labels = _texts(choices, "text"), _texts(choices, "label")
    key = row.get("answerKey")
    if len(labels) != len(options) or key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the labels of its {len(options)} choices")
    plain = Choices(f"Question: {question}\nAnswer:", options, labels.index(key))
    return _problem(id, question, options, plain)


def parse_mmlu(row: dict, id: str) -> Problem:
    """A row of MMLU, whose continuations are letters; those to learn from name no subject."""
    question, options = _text(row, "question").strip(), _texts(row, "choices")
    right, subject = _index(row.get("answer"), "answer", options), row.get("subject") or None
    head = "The following are multiple choice questions (with answers) about {}.\n\n"
    head = head.format(subject.replace("_", " ")) if subject else ""
    context, letters = f"{question}\n{_lettered(options)}\nAnswer:", tuple(LETTERS[: len(options)])
    plain = Choices(context, letters, right, head)
    return _problem(id, question, options, plain, subject)


def parse_hellaswag(row: dict, id: str) -> Problem:
    """A row of HellaSwag, without the marks of the pages that it was taken from."""
    label, before, after = row.get("label"), row.get("ctx_a"), row.get("ctx_b")
    if label == "":
        raise ValueError("label is empty, as in the test split: nobody knows its answers")
    if not isinstance(before, str) or not isinstance(after, str):
        raise ValueError("ctx_a or ctx_b is no text")
    endings = tuple(map(_cleaned, _texts(row, "endings")))
    if not all(ending.strip() for ending in endings):
        raise ValueError("an ending holds nothing but marks in brackets")
    number = int(label) if isinstance(label, str) and re.fullmatch("[0-9]{1,3}", label) else label
    context = _cleaned(f"{_text(row, 'activity_label')}: {before} {after.capitalize()}")
    plain = Choices(context, endings, _index(number, "label", endings))
    return _problem(id, f"Which ending fits best?\n{context.strip()}", endings, plain)


@dataclass(frozen=True)
class Form:
    """Where a task's rows lie on the Hub, and how one is read."""

    repo: str
    folder: str
    parse: Callable[[dict, str], Problem]
    train: str = "train"
    test: str = "test"
    solved: str | None = None  # split of the rows to show before a question; None: drawn from train


CHOICE_TASKS = {
    "arc-easy": Form("allenai/ai2_arc", "ARC-Easy", parse_arc),
    "arc-challenge": Form("allenai/ai2_arc", "ARC-Challenge", parse_arc),
    "mmlu": Form("cais/mmlu", "all", parse_mmlu, train="auxiliary_train", solved="dev"),
    "hellaswag": Form("Rowan/hellaswag", "data", parse_hellaswag, test="validation"),
}


def load(name: str, revision: str | None = None) -> Source:
    """The rows of a task to learn from, and to be tested on: of MMLU each subject's in turn."""
    form = CHOICE_TASKS[name]
    splits = [split for split in (form.train, form.test, form.solved) if split]
    patterns = [f"{form.folder}/{split}-*.parquet" for split in splits]
    folder = fetch(form.repo, patterns=patterns, revision=revision, repo_type="dataset")
    source = Source(name, commit=folder.name)
    if form.test != "test":
        print(f"{name}: its test split has no labels, so its {form.test} split is the test")
    read = [_read(form, folder / form.folder, split, source.bad) for split in splits]
    source.train, source.test = read[0], _in_turns(read[1])
    drawn = partial(_drawn, source.train, form.test != "test")
    source.shots = partial(_first, read[2]) if form.solved else drawn
    return source


def _read(form: Form, folder: Path, split: str, bad: list[str]) -> list[Problem]:
    """The good rows of a split; why others are left out is added to `bad`."""
    problems, odd = [], []
    files = sorted(folder.glob(f"{split}-*.parquet"))
    for number, row, name in ((*row, f.name) for f in files for row in read_rows(f)):
        try:
            problems.append(form.parse(row, f"{name}:{number}"))
        except ValueError as error:
            odd.append(f"{name}:{number}: {error}")
    if not problems or len(odd) > BAD_SHARE * (len(problems) + len(odd)):
        found = f"{len(odd)} of {len(problems) + len(odd)} rows are bad: {listed(odd, 3)}"
        raise BadData(
            f"{form.repo}: {form.folder}/{split}-*.parquet: {found if odd else 'no rows'}",
            "try another --data-revision; such rows can be learned as own data, as messages",
        )
    bad += odd
    return problems


def _in_turns(problems: list[Problem]) -> list[Problem]:
    """The first of each subject, then the second of each: so any first rows are of all subjects."""
    seen: Counter[str | None] = Counter()

    def turn(problem: Problem) -> int:
        seen[problem.category] += 1
        return seen[problem.category]

    return sorted(problems, key=turn)


def _first(solved: list[Problem], problems: list[Problem], count: int) -> list[list[Problem]]:
    """The harness's `first_n`: of the same subject."""
    return [[s for s in solved if s.category == p.category][:count] for p in problems]


def _drawn(
    train: list[Problem], spare: bool, problems: list[Problem], count: int
) -> list[list[Problem]]:
    """The harness's default: drawn anew for each question, in the questions' order.

    Where a task has no test split it draws a spare one, in case the question itself is among them.
    """
    rng, known = random.Random(SHOTS_SEED), {p.id for p in train}
    n = min(len(train), count + (spare or any(p.id in known for p in problems)))
    drawn = ([train[row] for row in rng.sample(range(len(train)), n)] for _ in problems)
    return [[s for s in rows if s.id != p.id][:count] for p, rows in zip(problems, drawn)]


def _problem(
    id: str, asked: str, options: tuple[str, ...], plain: Choices, category: str | None = None
) -> Problem:
    """The chat to learn from, beside the plain text to be tested on."""
    answer = f"{LETTERS[plain.gold]}. {options[plain.gold].strip()}"
    turns = (Message("user", f"{asked}\n{_lettered(options)}"), Message("assistant", answer))
    return Problem(id, turns, category, choices=plain)


def _lettered(options: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def _cleaned(text: str) -> str:
    """As the harness does: WikiHow's marks in brackets are no part of the text."""
    text = text.strip().replace(" [title]", ". ")
    return BRACKETS.sub(lambda m: "" if m[1] else m[0], text).replace("  ", " ")


def _index(value: object, name: str, options: tuple[str, ...]) -> int:
    if type(value) is not int or not 0 <= value < len(options):
        raise ValueError(f"{name} {value!r} is none of its {len(options)} choices, from 0")
    return value


def _texts(row: dict, name: str) -> tuple[str, ...]:
    values = row.get(name)
    if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
        raise ValueError(f"{name} is no list of 2 to {len(LETTERS)} texts")
    return tuple(_text({name: value}, name) for value in values)


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {'empty' if value == '' else 'no text'}")
    return value
