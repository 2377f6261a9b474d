"""Rows of JSONL and parquet files become problems: a conversation whose last turn is the answer.

A row is either {"question": ..., "answer": ...} or {"messages": [{"role": ..., "content": ...},
...]}, and may name its "category". Bad rows are never guessed at: each is left out with its reason,
and more than 1 % of them is an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from errors import BadData, listed

ROLES = ("system", "user", "assistant")
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
    right: int  # which of them, from 0
    head: str = ""  # said once, before the solved questions and this one


@dataclass(frozen=True)
class Problem:
    """One row: where it is from, and its turns, the last of which is the answer to learn."""

    id: str  # "train.jsonl:12": the line, or in parquet the row, from 1
    messages: tuple[Message, ...]
    category: str | None = None  # what kind of problem it is, where the row says so
    choices: Choices | None = None  # of a task that is scored by what is likeliest

    @property
    def question(self) -> str:
        """What users and system say, as one text: what makes two problems the same."""
        return "\n".join(m.content for m in self.messages if m.role != "assistant")

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def row(self) -> dict:
        """The row as a file would hold it."""
        kind = {} if self.category is None else {"category": self.category}
        return {"id": self.id, "messages": [m._asdict() for m in self.messages]} | kind


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


def load_path(path: Path) -> Source:
    """A folder with train.jsonl (or .parquet), perhaps test.jsonl; or one file of rows to learn."""
    source = Source(str(path))
    if path.is_dir():
        train, test = (_split_file(path, split) for split in ("train", "test"))
        if train is None:
            raise BadData(
                f"{path} holds no train.jsonl or train.parquet", "add it, or give the file itself"
            )
    else:
        train, test = path, None
    source.train, source.bad = read_problems(train)
    if test is not None:
        source.test, bad = read_problems(test)
        source.bad += bad
    return source


def fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of the problems in their order: the same text, the same data."""
    rows = json.dumps([p.row() for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()


def _split_file(folder: Path, split: str) -> Path | None:
    found = (folder / (split + suffix) for suffix in (".jsonl", ".parquet"))
    return next((file for file in found if file.is_file()), None)


def read_problems(path: Path) -> tuple[list[Problem], list[str]]:
    """(problems, what is wrong with the rows left out) of a .jsonl or .parquet file."""
    problems, bad = [], []
    for number, row in read_rows(path):
        try:
            problems.append(parse_row(row, f"{path.name}:{number}"))
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
    if not problems and not bad:
        raise BadData(f"{path} has no rows", "give a file with at least one row")
    if len(bad) > BAD_SHARE * (len(problems) + len(bad)):
        raise BadData(
            f"{path}: {len(bad)} of {len(problems) + len(bad)} rows are bad: {listed(bad, 3)}",
            'each row needs "question" and "answer", or "messages", as non-empty text',
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


def parse_row(row: object, id: str) -> Problem:
    """ValueError with the reason, if the row is not one of the two forms."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    category = row.get("category")  # only counted by, so a row is not refused for it
    category = category if isinstance(category, str) and category.strip() else None
    if "messages" in row:
        return Problem(id, _parse_messages(row["messages"]), category)
    turns = (("user", row.get("question"), "question"), ("assistant", row.get("answer"), "answer"))
    messages = tuple(Message(role, _text(value, name)) for role, value, name in turns)
    return Problem(id, messages, category)


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
