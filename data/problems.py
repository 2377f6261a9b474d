"""What rows become: problems, which are conversations whose last message is the answer."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from errors import listed


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    supervised: bool = True  # whether an assistant's turn is trained on; others never are
    # What else the turn says, such as "tool_calls", as in the row. For the chat template.
    extra: Mapping[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        """The turn of a row in the messages format."""
        row = {"role": self.role, "content": self.content}
        return row | ({} if self.supervised else {"weight": 0}) | dict(self.extra or {})


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question as lm-evaluation-harness asks it, in plain text."""

    context: str  # followed by a space and one of the options
    options: tuple[str, ...]
    gold: int  # index of the correct option
    head: str = ""  # precedes the context and any solved questions before it


@dataclass(frozen=True)
class Problem:
    """One row: where it comes from, and a conversation whose last message is the answer."""

    id: str  # such as "train.jsonl:12", where 12 is the line (elsewhere the row) from 1
    messages: tuple[Message, ...]
    category: str | None = None  # the kind of problem, if the row names it
    original_question: str | None = None  # if the user's messages contain more than the question
    choices: Choices | None = None  # if it is scored by the most likely option
    tools: tuple[Mapping[str, Any], ...] | None = None  # for the chat template

    @property
    def question(self) -> str:
        """The original question, or else all user and system messages; it identifies a problem."""
        if self.original_question is not None:
            return self.original_question
        return "\n".join(m.content for m in self.messages if m.role != "assistant")

    @property
    def answer(self) -> str:
        """The gold answer: the text of the last message."""
        return self.messages[-1].content

    @property
    def answer_turns(self) -> list[int]:
        """Indices of the assistant's turns that a model answers when it is evaluated.

        The others are context, and are given: those that are not supervised, calls of tools, and
        a greeting before the user's first turn.
        """
        asked = next((i for i, m in enumerate(self.messages) if m.role == "user"), 0)
        return [
            i
            for i, m in enumerate(self.messages)
            if m.role == "assistant" and m.supervised and not m.extra and i > asked
        ]

    def row(self) -> dict[str, Any]:
        """The problem as a row in the messages format."""
        row = {"id": self.id, "messages": [m.row() for m in self.messages]}
        # Fingerprints hash this: another key than "stem" would make saved runs look different.
        optional = {"category": self.category, "stem": self.original_question, "tools": self.tools}
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
    note: str = ""  # how custom data were read: row format, columns, files, and what was not read

    def line(self) -> str:
        """For people: which data these are, and how they were read."""
        at = f" at {self.commit}" if self.commit else ""
        return f"data {self.name}{at}" + (f": {self.note}" if self.note else "")

    def lines(self) -> list[str]:
        """`line`, and one on the rows left out, if there are any."""
        left_out = f"{len(self.bad)} rows left out: {listed(self.bad, 3)}"
        return [self.line()] + ([left_out] if self.bad else [])


def fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of the problems, in order."""
    rows = json.dumps([p.row() for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()


def content_fingerprint(problems: list[Problem]) -> str:
    """SHA-256 of the problems without their ids, which contain the names of files."""
    rows = json.dumps([{**p.row(), "id": None} for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()
