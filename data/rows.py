"""Rows of JSONL and parquet files become problems: conversations whose last message is the answer.

A row is in one of four formats, recognized by its columns:

    {"question": ..., "answer": ...}
    {"prompt": ..., "completion": ...}    two texts, or two lists of messages as in TRL
    {"instruction": ..., "input": ..., "output": ...}    Alpaca's; "input" may be empty or missing
    {"messages": [{"role": ..., "content": ...}, ...]}

It may also have a "category". Bad rows are never repaired: each is left out and reported, and if
they are more than 1 % of a file, reading it is an error.
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
ROW_FORMATS = {  # name -> columns
    "messages": ("messages",),
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "input", "output"),
}
OPTIONAL_COLUMN = "input"
# Maps a column of a row format to the name it has in the data, as in {"question": "problem"}.
Columns = Mapping[str, str]
NOT_RENAMED: Columns = MappingProxyType({})
BAD_ROWS_ALLOWED = 0.01  # fraction of a file; if more are bad, the file is not what it should be
# A tiny parquet file can encode a billion equal rows. So no more than MAX_EXPANSION bytes of rows
# are read for each byte of a file, or MIN_LIMIT bytes if that is more; text compresses to a tenth.
MAX_EXPANSION, MIN_LIMIT = 100, 2**28
ROW_OVERHEAD = 200  # bytes that a Python row takes in addition to its text


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question as lm-evaluation-harness asks it, in plain text."""

    context: str  # which a space and one of the options continue
    options: tuple[str, ...]
    gold: int  # index of the correct option
    head: str = ""  # precedes the context and any solved questions before it


@dataclass(frozen=True)
class Problem:
    """One row: where it comes from, and a conversation whose last message is the answer."""

    id: str  # such as "train.jsonl:12", where 12 is the line (in parquet the row) from 1
    messages: tuple[Message, ...]
    category: str | None = None  # the kind of problem, if the row names it
    original_question: str | None = None  # if the user's messages contain more than the question
    choices: Choices | None = None  # if it is scored by the most likely option

    @property
    def question(self) -> str:
        """The original question, or else all user and system messages; it identifies a problem."""
        if self.original_question is not None:
            return self.original_question
        return "\n".join(m.content for m in self.messages if m.role != "assistant")

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def row(self) -> dict:
        """The problem as a row in the messages format."""
        row = {"id": self.id, "messages": [m._asdict() for m in self.messages]}
        # Fingerprints hash this: another key than "stem" would make saved runs look different.
        optional = {"category": self.category, "stem": self.original_question}
        return row | {k: v for k, v in optional.items() if v is not None}


# (problems, count) -> for each problem, up to `count` solved problems to show before it
Shots = Callable[[list[Problem], int], list[list[Problem]]]


@dataclass
class Source:
    """The problems of one data source."""

    name: str
    train: list[Problem] = field(default_factory=list)  # for training and validation
    test: list[Problem] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # such as "train.jsonl:12: question is empty"
    commit: str | None = None  # of a dataset on the Hub
    shots: Shots | None = None  # of a multiple-choice task
    note: str = ""  # how custom data were read: row format, renamed columns, files


def fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of the problems, in order."""
    rows = json.dumps([p.row() for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()


def read_problems(
    path: Path, parse: Callable[[object, str], Problem] | None = None
) -> tuple[list[Problem], list[str]]:
    """Read a .jsonl or .parquet file: (problems, what is wrong with each row left out).

    `parse(row, id)` returns the problem in a row or raises ValueError; the default is `parse_row`.
    Raises BadData if the file cannot be read, has no rows, or too many bad ones.
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
    if len(bad) > BAD_ROWS_ALLOWED * (len(problems) + len(bad)):
        raise BadData(
            f"{path}: {len(bad)} of {len(problems) + len(bad)} rows are bad: {listed(bad, 3)}",
            f"each row needs the columns of one format ({', '.join(ROW_FORMATS)}) as non-empty"
            " text; map other names with --columns question=problem,answer=solution",
        )
    return problems, bad


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line or row number from 1, row); a line that is not JSON yields its ValueError."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise BadData(
            f"{path} is neither .jsonl nor .parquet", "convert it to .jsonl, one row per problem"
        )
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise BadData(
            f"{path} cannot be read: {error.strerror or error}", "check the path"
        ) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not JSON in UTF-8 ({str(error)[:60]})")


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow  # not at the top: it takes half a second, and JSONL does not need it
    import pyarrow.parquet

    limit = max(MIN_LIMIT, MAX_EXPANSION * path.stat().st_size)
    size, number = 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                size += batch.nbytes
                for row in batch.to_pylist() if size <= limit else ():
                    size += len(str(row)) + ROW_OVERHEAD
                    number += 1
                    yield number, row
                if size > limit:
                    raise ValueError("its rows are far larger than the file")
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: also text that is not UTF-8
        reason = str(error).partition("\n")[0][:80]
        raise BadData(
            f"{path} is not a readable parquet file: {reason}", "download it or write it again"
        ) from None


def parse_row(row: object, id: str, columns: Columns = NOT_RENAMED) -> Problem:
    """The problem in a row; ValueError with the reason if it is in none of the row formats.

    With `columns` the row must be in the format that has these columns.
    """
    if isinstance(row, ValueError):  # from `read_rows`
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    row_format = find_format(row, columns)
    values = {name: row.get(columns.get(name, name)) for name in ROW_FORMATS[row_format]}
    category = row.get("category")  # only used for counts: a bad one does not make the row bad
    category = category if isinstance(category, str) and category.strip() else None
    if row_format == "messages":
        question = row.get("stem")  # as `Problem.row` writes it
        question = question if isinstance(question, str) else None
        return Problem(id, _parse_messages(values["messages"]), category, question)
    if row_format == "prompt/completion" and any(isinstance(v, list) for v in values.values()):
        return Problem(id, _parse_prompt_completion(**values), category)
    if _is_blank(values.get(OPTIONAL_COLUMN)):
        values.pop(OPTIONAL_COLUMN, None)
    *question, answer = (_text(v, columns.get(name, name)) for name, v in values.items())
    messages = (Message("user", "\n\n".join(question)), Message("assistant", answer))
    return Problem(id, messages, category)


def find_format(row: dict, columns: Columns = NOT_RENAMED) -> str:
    """The key in `ROW_FORMATS` of a row's format; ValueError if it is in several or in none.

    If columns are missing, it is the format of which the row has most columns.
    """
    candidates = {
        row_format: [columns.get(name, name) for name in names if name != OPTIONAL_COLUMN]
        for row_format, names in ROW_FORMATS.items()
        if columns.keys() <= set(names)
    }
    complete = [f for f, names in candidates.items() if all(row.get(n) is not None for n in names)]
    if len(complete) > 1:
        raise ValueError(f"it fits {' and '.join(complete)}: choose one with --columns")
    present = {f: sum(name in row for name in names) for f, names in candidates.items()}
    best = complete[0] if complete else max(present, key=present.__getitem__)
    if not present[best]:
        raise ValueError(f"its columns ({_column_list(row)}) match no row format")
    return best


class RowParser:
    """`parse_row` with `columns`; it records formats and unused columns, to be reported."""

    def __init__(self, columns: Columns = NOT_RENAMED):
        self.columns = columns
        self.formats: Counter[str] = Counter()
        self.unused: set[str] = set()

    def __call__(self, row: object, id: str) -> Problem:
        problem = parse_row(row, id, self.columns)
        row_format = find_format(row, self.columns)
        self.formats[row_format] += 1
        used = {self.columns.get(name, name) for name in ROW_FORMATS[row_format]} | {"category"}
        used |= {"stem"} if row_format == "messages" else set()
        self.unused |= row.keys() - used
        return problem

    def note(self) -> str:
        """The rows' formats, the renamed columns and the unused ones."""
        counts = self.formats.items()
        formats = [f"{name} ({n:,} rows)" if len(counts) > 1 else name for name, n in counts]
        renamed = [f"{column} read from {name}" for column, name in self.columns.items()]
        unused = [f"columns not used: {_column_list(self.unused)}"] if self.unused else []
        return "; ".join(filter(None, [" and ".join(formats), ", ".join(renamed), *unused]))


def _column_list(columns: Iterable[str]) -> str:
    return printable(listed(sorted(str(name)[:30] for name in columns)).replace(";", ","))


def _is_blank(value: object) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def _parse_prompt_completion(prompt: object, completion: object) -> tuple[Message, ...]:
    """TRL's conversational format, in which only the completion is trained on, as it is here."""
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("one of prompt and completion is a list of messages, the other is not")
    messages = _parse_messages([*prompt, *completion])
    if any(m.role == "assistant" for m in messages[: len(prompt)]):
        raise ValueError(
            "its prompt contains assistant messages, which would be trained on too; if that is"
            " intended, use the messages format"
        )
    return messages


def _parse_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("messages is not a list of objects")
    messages = tuple(Message(m.get("role"), _text(m.get("content"), "content")) for m in value)
    roles = [m.role for m in messages]
    if unknown := [r for r in roles if r not in ROLES]:
        raise ValueError(f"role {unknown[0]!r} is not one of {', '.join(ROLES)}")
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise ValueError(
            "the roles do not alternate between user and assistant, ending with assistant"
        )
    return messages


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if value is None else type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in value:
        raise ValueError(f"{name} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode (a lone surrogate)") from None
    return value
