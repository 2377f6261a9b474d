r"""ARC, MMLU and HellaSwag: multiple-choice questions, for training and for testing.

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

For training, a row is a conversation: the user gives the question and its 2 to 26 options with
letters, and the assistant answers `B. text`. Letters follow the order of the options, whatever
labels the row has. For testing, a row is plain text as in lm-evaluation-harness 0.4.13: a context,
and each option as its continuation. The test splits and few-shot examples are that harness's too.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.rows import BAD_ROWS_ALLOWED, Choices, Message, Problem, Source, read_rows
from data.shots import drawn_shots
from errors import BadData, listed
from hub import fetch

LETTERS = string.ascii_uppercase
# In linear time, since an opening bracket without a closing one matches too; `_clean` keeps those.
BRACKETS = re.compile(r"\[[^\]\n]*(\]?)")


def parse_arc(row: dict, id: str) -> Problem:
    """A row of ARC; ValueError with the reason if it is malformed."""
    question, choices = _text(row, "question"), row.get("choices")
    choices = choices if isinstance(choices, dict) else {}
    options, labels = _texts(choices, "text"), _texts(choices, "label")
    key = row.get("answerKey")
    if len(labels) != len(options) or key not in labels:
        raise ValueError(f"answerKey {key!r} is not a label of its {len(options)} choices")
    test = Choices(f"Question: {question}\nAnswer:", options, labels.index(key))
    return _problem(id, question, options, test)


def parse_mmlu(row: dict, id: str) -> Problem:
    """A row of MMLU, whose continuations are letters. Training rows have no subject."""
    question, options = _text(row, "question").strip(), _texts(row, "choices")
    gold, subject = _index(row.get("answer"), "answer", options), row.get("subject") or None
    head = "The following are multiple choice questions (with answers) about {}.\n\n"
    head = head.format(subject.replace("_", " ")) if subject else ""
    context, letters = f"{question}\n{_lettered(options)}\nAnswer:", tuple(LETTERS[: len(options)])
    test = Choices(context, letters, gold, head)
    return _problem(id, question, options, test, subject)


def parse_hellaswag(row: dict, id: str) -> Problem:
    """A row of HellaSwag, without the markup of WikiHow, where many of the texts are from."""
    label, before, after = row.get("label"), row.get("ctx_a"), row.get("ctx_b")
    if label == "":
        raise ValueError("label is empty, as in the test split, whose answers are not public")
    if not isinstance(before, str) or not isinstance(after, str):
        raise ValueError("ctx_a or ctx_b is not text")
    endings = tuple(map(_clean, _texts(row, "endings")))
    if not all(ending.strip() for ending in endings):
        raise ValueError("an ending contains nothing but markup in brackets")
    number = int(label) if isinstance(label, str) and re.fullmatch("[0-9]{1,3}", label) else label
    context = _clean(f"{_text(row, 'activity_label')}: {before} {after.capitalize()}")
    test = Choices(context, endings, _index(number, "label", endings))
    return _problem(id, f"Which ending fits best?\n{context.strip()}", endings, test)


@dataclass(frozen=True)
class ChoiceTask:
    """Where a task's rows are on the Hub, and how to parse them."""

    repo: str
    folder: str
    parse: Callable[[dict, str], Problem]
    train: str = "train"  # the split to train on
    test: str = "test"  # the split to test on
    shots: str | None = None  # the split of few-shot examples; None: drawn from the training rows


CHOICE_TASKS = {
    "arc-easy": ChoiceTask("allenai/ai2_arc", "ARC-Easy", parse_arc),
    "arc-challenge": ChoiceTask("allenai/ai2_arc", "ARC-Challenge", parse_arc),
    "mmlu": ChoiceTask("cais/mmlu", "all", parse_mmlu, train="auxiliary_train", shots="dev"),
    "hellaswag": ChoiceTask("Rowan/hellaswag", "data", parse_hellaswag, test="validation"),
}


def load(name: str, revision: str | None = None) -> Source:
    """The training and test rows of a task in `CHOICE_TASKS`; MMLU's with its subjects mixed."""
    task = CHOICE_TASKS[name]
    splits = [split for split in (task.train, task.test, task.shots) if split]
    patterns = [f"{task.folder}/{split}-*.parquet" for split in splits]
    folder = fetch(task.repo, patterns=patterns, revision=revision, repo_type="dataset")
    source = Source(name, commit=folder.name)
    if task.test != "test":
        print(f"{name}: its test split has no labels, so its {task.test} split is used for testing")
    rows = {split: _read(task, folder / task.folder, split, source.bad) for split in splits}
    source.train, source.test = rows[task.train], _interleave_subjects(rows[task.test])
    if task.shots:
        source.shots = partial(_first_of_subject, rows[task.shots])
    else:
        source.shots = partial(drawn_shots, source.train, spare=task.test != "test")
    return source


def _read(task: ChoiceTask, folder: Path, split: str, bad: list[str]) -> list[Problem]:
    """The good rows of a split; appends to `bad` why each other row is left out."""
    problems, malformed = [], []
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        for number, row in read_rows(path):
            try:
                problems.append(task.parse(row, f"{path.name}:{number}"))
            except ValueError as error:
                malformed.append(f"{path.name}:{number}: {error}")
    count = len(problems) + len(malformed)
    if not problems or len(malformed) > BAD_ROWS_ALLOWED * count:
        found = f"{len(malformed)} of {count} rows are bad: {listed(malformed, 3)}"
        raise BadData(
            f"{task.repo}: {task.folder}/{split}-*.parquet: {found if malformed else 'no rows'}",
            "try another --data-revision, or convert the rows to the messages format to train on",
        )
    bad += malformed
    return problems


def _interleave_subjects(problems: list[Problem]) -> list[Problem]:
    """The first of each subject, then the second of each, ...: so --limit keeps all subjects."""
    counts: Counter[str | None] = Counter()

    def index_in_subject(problem: Problem) -> int:
        counts[problem.category] += 1
        return counts[problem.category]

    return sorted(problems, key=index_in_subject)


def _first_of_subject(
    solved: list[Problem], problems: list[Problem], count: int
) -> list[list[Problem]]:
    """The harness's `first_n` sampler: the first `count` solved problems of the same subject."""
    return [[s for s in solved if s.category == p.category][:count] for p in problems]


def _problem(
    id: str, question: str, options: tuple[str, ...], test: Choices, category: str | None = None
) -> Problem:
    """A problem with its conversation for training, and `test` for testing."""
    answer = f"{LETTERS[test.gold]}. {options[test.gold].strip()}"
    messages = (
        Message("user", f"{question}\n{_lettered(options)}"),
        Message("assistant", answer),
    )
    return Problem(id, messages, category, choices=test)


def _lettered(options: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def _clean(text: str) -> str:
    """Remove WikiHow's markup in brackets, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return BRACKETS.sub(lambda m: "" if m[1] else m[0], text).replace("  ", " ")


def _index(value: object, name: str, options: tuple[str, ...]) -> int:
    if type(value) is not int or not 0 <= value < len(options):
        raise ValueError(f"{name} {value!r} is not one of its {len(options)} choices, from 0")
    return value


def _texts(row: dict, name: str) -> tuple[str, ...]:
    values = row.get(name)
    if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
        raise ValueError(f"{name} is not a list of 2 to {len(LETTERS)} texts")
    return tuple(_text({name: value}, name) for value in values)


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {'empty' if value == '' else 'not text'}")
    return value
