"""Rows of JSONL and parquet files become problems: a conversation whose last turn is the answer.

A row has one of four forms, told by its columns, of which it must fill those of exactly one:

    {"question": ..., "answer": ...}
    {"prompt": ..., "completion": ...}    texts, or both lists of turns (TRL's conversational form)
    {"instruction": ..., "input": ..., "output": ...}    "input" may be empty or missing (Alpaca)
    {"messages": [{"role": ..., "content": ...}, ...]}

It may also name its "category". Bad rows are never guessed at: each is left out with its reason,
and more than 1 % of them is an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from errors import BadData, listed, printable

ROLES = ("system", "user", "assistant")
ROW_FORMATS = {  # the columns of each
    "messages": ("messages",),
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "input", "output"),
}
OPTIONAL = "input"
SAME: Mapping[str, str] = MappingProxyType({})  # a form's columns go by their own names
# A parquet file of a few bytes can say "a billion times the same row". Text packs ten to one.
ALWAYS_READ, MOST_PACKED = 2**28, 100  # bytes of rows; bytes of rows for each of the file
ROW_BYTES = 200  # of a row's own, its text aside
BAD_SHARE = 0.01  # of a file's rows: beyond this the file is not what it was taken for


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Choices:
    """A question as lm-evaluation-harness asks it: which text goes on best after the context?"""

    context: str  # plain text, up to where a space and then one of the options follow
    options: tuple[str, ...]
    gold: int  # index of the correct option
    head: str = ""  # said once, before the solved questions and this one


@dataclass(frozen=True)
class Problem:
    """One row: where it is from, and its turns, the last of which is the answer to learn."""

    id: str  # "train.jsonl:12": the line, or in parquet the row, from 1
    messages: tuple[Message, ...]
    category: str | None = None  # what kind of problem it is, where the row says so
    stem: str | None = None  # the problem itself, where the user's turns hold more than that
    choices: Choices | None = None  # of a task that is scored by what is likeliest

    @property
    def question(self) -> str:
        """The stem, or what users and system say as one text: what makes two problems the same."""
        said = "\n".join(m.content for m in self.messages if m.role != "assistant")
        return said if self.stem is None else self.stem

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def row(self) -> dict:
        """The row as a file would hold it."""
        more = {"category": self.category, "stem": self.stem}
        row = {"id": self.id, "messages": [m._asdict() for m in self.messages]}
        return row | {k: v for k, v in more.items() if v is not None}


# (problems, how many) -> the solved ones to show before each of them
Shots = Callable[[list[Problem], int], list[list[Problem]]]


@dataclass
class Source:
    """Where problems come from: those to learn and hold out, and those to be tested on."""

    name: str
    train: list[Problem] = field(default_factory=list)
    test: list[Problem] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # "train.jsonl:12: question is empty"
    commit: str | None = None  # of a Hub dataset
    shots: Shots | None = None  # of a task with choices
    note: str = ""  # how its rows were understood, where that was not known beforehand


def fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of the problems in their order: the same text, the same data."""
    rows = json.dumps([p.row() for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()


def read_problems(
    path: Path, parse: Callable[[object, str], Problem] | None = None
) -> tuple[list[Problem], list[str]]:
    """(problems, what is wrong with the rows left out) of a .jsonl or .parquet file.

    `parse` makes a row and its id a problem, or raises ValueError; by default `parse_row`.
    """
    parse = parse or parse_row
    problems, bad = [], []
    for number, row in read_rows(path):
        try:
            problems.append(parse(row, f"{path.name}:{number}"))
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
    if not problems and not bad:
        raise BadData(f"{path} has no rows", "give a file with at least one row")
    if len(bad) > BAD_SHARE * (len(problems) + len(bad)):
        raise BadData(
            f"{path}: {len(bad)} of {len(problems) + len(bad)} rows are bad: {listed(bad, 3)}",
            f"each row needs the columns of one form ({', '.join(ROW_FORMATS)}), as non-empty text;"
            " others are named as in --columns question=problem,answer=solution",
        )
    return problems, bad


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line or row number from 1, row) of the file; a line that is no JSON comes as its error."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise BadData(f"{path} is neither .jsonl nor .parquet", "convert it, one row a problem")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise BadData(
            f"{path} cannot be read: {error.strerror or error}", "check the path"
        ) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # some editors sign UTF-8 files so
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not JSON in UTF-8 ({str(error)[:60]})")


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow  # here, because it takes half a second and JSONL does without
    import pyarrow.parquet

    most = max(ALWAYS_READ, MOST_PACKED * path.stat().st_size)
    size, number = 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                size += batch.nbytes
                for row in batch.to_pylist() if size <= most else ():
                    size += len(str(row)) + ROW_BYTES
                    number += 1
                    yield number, row
                if size > most:
                    raise ValueError("its rows are far larger than it is")
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: a text that is not UTF-8
        reason = str(error).partition("\n")[0][:80]
        raise BadData(
            f"{path} is no readable parquet file: {reason}",
            "download or write it again",
        ) from None


def parse_row(row: object, id: str, columns: Mapping[str, str] = SAME) -> Problem:
    """ValueError with the reason, if the row has not one of the forms.

    `columns` says which column stands for one of a form's, as in {"question": "problem"}; the row
    then has to have that form.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    form = form_of(row, columns)
    values = {name: row.get(columns.get(name, name)) for name in ROW_FORMATS[form]}
    category = row.get("category")  # only counted by, so a row is not refused for it
    category = category if isinstance(category, str) and category.strip() else None
    if form == "messages":
        stem = row.get("stem")
        stem = stem if isinstance(stem, str) else None
        return Problem(id, _parse_messages(values["messages"]), category, stem=stem)
    if form == "prompt/completion" and any(isinstance(v, list) for v in values.values()):
        return Problem(id, _parse_halves(values["prompt"], values["completion"]), category)
    question, *given, answer = (
        _text(value, columns.get(name, name))
        for name, value in values.items()
        if name != OPTIONAL or (value.strip() if isinstance(value, str) else value)
    )
    question = "\n\n".join([question, *given])
    return Problem(id, (Message("user", question), Message("assistant", answer)), category)


def form_of(row: dict, columns: Mapping[str, str] = SAME) -> str:
    """Which of `ROW_FORMATS` a row has; ValueError if it has several of them or nothing of any.

    A row that lacks something of all has the one that it has most of: what it lacks is said then.
    """
    forms = {form: names for form, names in ROW_FORMATS.items() if columns.keys() <= set(names)}
    found = {
        form: [columns.get(name, name) for name in names if name != OPTIONAL]
        for form, names in forms.items()
    }
    whole = [form for form, names in found.items() if all(row.get(n) is not None for n in names)]
    if len(whole) > 1:
        raise ValueError(f"it fits {' and '.join(whole)}: say which with --columns")
    parts = {form: sum(name in row for name in names) for form, names in found.items()}
    best = whole[0] if whole else max(parts, key=parts.__getitem__)
    if not parts[best]:
        raise ValueError(f"its columns ({_named(row)}) are those of no form")
    return best


class Reader:
    """`parse_row` with `columns`, and a count of what it met, to be said."""

    def __init__(self, columns: Mapping[str, str] = SAME):
        self.columns = columns
        self.forms: Counter[str] = Counter()
        self.unread: set[str] = set()

    def __call__(self, row: object, id: str) -> Problem:
        problem = parse_row(row, id, self.columns)
        form = form_of(row, self.columns)
        self.forms[form] += 1
        used = {self.columns.get(name, name) for name in ROW_FORMATS[form]} | {"category"}
        used |= {"stem"} if form == "messages" else set()
        self.unread |= row.keys() - used
        return problem

    def note(self) -> str:
        """Which form the rows have, by which columns, and which others they have."""
        counts = self.forms.items()
        forms = [f"{form} ({n:,} rows)" if len(counts) > 1 else form for form, n in counts]
        named = [f"{ours} is {theirs}" for ours, theirs in self.columns.items()]
        unread = [f"not read: {_named(self.unread)}"] if self.unread else []
        return "; ".join(filter(None, [" and ".join(forms), ", ".join(named), *unread]))


def _named(columns: Iterable[str]) -> str:
    return printable(listed(sorted(str(name)[:30] for name in columns)).replace(";", ","))


def _parse_halves(prompt: object, completion: object) -> tuple[Message, ...]:
    """TRL's conversational prompt and completion; it learns from the completion alone, as we do."""
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("of prompt and completion one is a list of turns, the other is not")
    messages = _parse_messages([*prompt, *completion])
    if any(m.role == "assistant" for m in messages[: len(prompt)]):
        raise ValueError(
            "its prompt holds turns of the assistant, which would be learned too: if they are"
            " meant to be, write it as messages"
        )
    return messages


def _parse_messages(turns: object) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages is not a list of turns")
    messages = tuple(Message(t.get("role"), _text(t.get("content"), "content")) for t in turns)
    roles = [m.role for m in messages]
    if unknown := [r for r in roles if r not in ROLES]:
        raise ValueError(f"role {unknown[0]!r} is not one of {', '.join(ROLES)}")
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise ValueError(
            "the turns are not user and assistant in alternation, ending with assistant"
        )
    return messages


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if value is None else type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is no valid Unicode (a lone surrogate)") from None
    return value
