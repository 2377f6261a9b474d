"""The turns of a row become messages, or are refused, with the name of what cannot be honored.

    {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}                  ShareGPT
    {"role": "assistant", "content": "3", "weight": 0}     context: read, but not trained on
    {"role": "user", "content": [{"type": "text", "text": "1+1?"}]}     parts, which are joined
    {"role": "assistant", "tool_calls": [...]}, {"role": "tool", "content": "2"}    laid out by the
                                                                       checkpoint's chat template

A key with null or an empty value says nothing. Any other key of a turn changes what the model would
be shown, so a row whose turns carry one that is not read is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.problems import Message
from errors import listed
from terminal import printable

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
ROLES = {  # a turn's role in lower case -> role
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
}  # fmt: skip
# Roles of tools in other forms than OpenAI's, which is the one that chat templates take.
TOOL_ROLES = ("function", "function_call", "observation", "tool_call", "tool_response",
              "ipython")  # fmt: skip
# Keys of a turn that the chat template lays out, by role.
LAID_OUT = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
# Whether a turn is trained on: OpenAI's key, axolotl's two, ms-swift's.
SUPERVISION = ("weight", "train", "training", "loss")
NOT_CONVERSATION = ("id", "message_id", "turn_id", "index", "timestamp", "create_time",
                    "created_at", "source", "url", "lang", "language", "model")  # fmt: skip
# Keys by other names that say what is trained on: refused, since 1 means the opposite in some.
MARKS = re.compile(r"mask|train|loss|label|learn", re.IGNORECASE)
# What ends or begins a turn, in a text that another trainer was to read without a chat template.
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id)\|>|</s>\s*\Z")
PYTHON = re.compile(rb"\s*[\[{]+\s*'")  # the start of a list or dict as Python prints it
JSON_NOTATION = "these rows are in Python's notation: write them with json.dumps(row)"
TEXT_PARTS = ("text", "input_text", "output_text")
TEXT_ONLY = "only texts are read: leave these rows out"


class BadRow(ValueError):
    """Why a row cannot be read, and what the user can do about rows like it ("": unknown)."""

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(printable(reason))
        self.remedy = remedy


@dataclass
class Notes:
    """How rows were understood, and what was not read: reported once for all rows of a source."""

    formats: Counter[str] = field(default_factory=Counter)
    columns: dict[str, str] = field(default_factory=dict)  # system_prompt -> system
    roles: dict[str, str] = field(default_factory=dict)  # human -> user
    unused: set[str] = field(default_factory=set)  # columns
    unused_keys: set[str] = field(default_factory=set)  # of turns
    after_the_last: int = 0  # rows with turns after the last one that is trained on
    control: Counter[str] = field(default_factory=Counter)  # control token -> rows with it in texts

    def lines(self) -> list[str]:
        """One for each kind of note."""
        counts = self.formats.items()
        formats = [f"{name} ({n:,} rows)" if len(counts) > 1 else name for name, n in counts]
        renamed = [f"{column} read from {name}" for name, column in self.columns.items()]
        roles = [f"{name} read as {role}" for name, role in self.roles.items()]
        lines = [" and ".join(formats), ", ".join(renamed), ", ".join(roles)]
        if self.after_the_last:
            lines.append(
                f"{self.after_the_last:,} rows end with turns of weight 0, which are not read"
            )
        lines += [
            f"{count:,} rows hold {token} in a text, where it stays text: the chat template writes"
            " the control tokens"
            for token, count in self.control.items()
        ]
        for what, names in (("columns", self.unused), ("keys of turns", self.unused_keys)):
            if names:
                lines.append(f"{what} not used: {name_list(names)}")
        return [line for line in lines if line]


def is_blank(value: object) -> bool:
    """Whether a value says nothing: null, NaN, white space, an empty list or object."""
    if value is None or value != value:  # NaN: a missing value that went through pandas
        return True
    return not value.strip() if isinstance(value, str) else value in ([], {}, ())


def from_json(value: object) -> object:
    """The list or object in a text that holds one, as cells of CSV files do; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            pass
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; BadRow if a key is there twice, of which json.loads drops the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise BadRow(f"the key {key[:30]!r} is there twice in one object", "keep one of them")
    return found


def name_list(names: Iterable[object]) -> str:
    """Names of columns or keys, at most six in full."""
    shown = sorted(str(name)[:30] or "one without a name" for name in names)
    return printable(listed(shown).replace(";", ","))


def read_turns(value: object, name: str, notes: Notes) -> tuple[Message, ...]:
    """The messages in a list of turns, in any order of roles; BadRow if one cannot be read."""
    value = from_json(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        if isinstance(value, str) and PYTHON.match(value[:99].encode("utf-8", "replace")):
            raise BadRow(f"{name} is not JSON", JSON_NOTATION)
        raise BadRow(
            f"{name} is not a list of objects",
            'write each turn as {"role": "user", "content": "..."}',
        )
    messages = tuple(_read_turn(turn, notes) for turn in value)
    _refuse_extra(messages)
    return messages


def check_order(messages: Sequence[Message]) -> None:
    """Raise BadRow unless user and assistant alternate, after an optional system turn.

    The assistant may begin, and must end the conversation.
    """
    # A call of tools and their results are a part of the answer that follows.
    pairs = zip(messages, [*messages[1:], None])
    roles = [m.role for m, after in pairs if m.role != "tool" and not _calls_tools(m, after)]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if dialogue[:1] == ["assistant"] and len(dialogue) > 1:
        dialogue = dialogue[1:]
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        found = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") if roles else "no turns"
        remedy = "merge consecutive turns of one role, and end with the assistant's answer"
        if roles and roles[-1] == "user":
            remedy = "end each conversation with the assistant's answer: drop the last user turn"
        if messages and messages[-1].role == "tool":
            remedy = "end each conversation with the assistant's turn: drop the last tool turn"
        if "system" in roles[1:]:
            remedy = "a system turn can only be the first: move it, or make it a part of another"
        raise BadRow(
            "the roles do not alternate between user and assistant, ending with assistant"
            f" ({found})",
            remedy,
        )


def _calls_tools(message: Message, after: Message | None) -> bool:
    """Whether this is an assistant's turn whose tool calls are answered by the turn `after` it."""
    if after is None or after.role != "tool" or message.role == "tool":
        return False
    if message.role != "assistant" or "tool_calls" not in (message.extra or {}):
        raise BadRow(
            f"a turn of a tool follows a turn of the {message.role} without tool_calls",
            "write the call as tool_calls of the assistant's turn, in OpenAI's form",
        )
    return True


def up_to_the_last_supervised(messages: tuple[Message, ...], notes: Notes) -> tuple[Message, ...]:
    """`messages` without what follows the last supervised turn: no supervised token sees it.

    The last answer, by which a model is judged, is then one that is trained on. Raises BadRow if no
    answer to the user is supervised.
    """
    asked = next(i for i, message in enumerate(messages) if message.role == "user")
    answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.supervised]
    if not answers or answers[-1] < asked:
        raise BadRow(
            "no answer of the assistant is supervised: all have weight 0 or train false",
            "leave these rows out, or set the weight of an answer to 1",
        )
    if answers[-1] < len(messages) - 1:
        notes.after_the_last += 1
    return messages[: answers[-1] + 1]


def text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    """`value` if it is a text that a tokenizer can take; BadRow otherwise."""
    if value is None or value != value:
        raise BadRow(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type(value).__name__}", f"write {name} as text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{name} is empty", f"leave out the rows in which {name} is empty")
    if "\0" in value:
        raise BadRow(f"{name} contains a NUL character", "remove NUL characters from the texts")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(
            f"{name} is not valid Unicode (a lone surrogate)",
            "leave these rows out, or repair the texts where they were cut",
        ) from None
    return value


def _join_parts(value: object, name: str) -> object:
    """The joined texts of a content that is a list of parts; any other content as it is."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return value
    return "".join(_part(part, name) for part in value)


def _part(part: dict[str, Any], name: str) -> str:
    """The text of one part of a content, such as {"type": "text", "text": "..."}."""
    part = {key: value for key, value in part.items() if key == "text" or not is_blank(value)}
    kind = part.pop("type", "text" if "text" in part else None)
    if kind not in TEXT_PARTS:
        kind = kind if kind is not None else next(iter(part), None)
        raise BadRow(f"{name} has a part of type {kind}, which is not text", TEXT_ONLY)
    found = part.pop("text", None)
    if part:
        raise BadRow(
            f"{name} has a part with {name_list(part)}, which is not read",
            "remove these keys from the parts if the text says everything",
        )
    if not isinstance(found, str):
        raise BadRow(f"{name} has a part without text", TEXT_ONLY)
    return found


def _read_turn(turn: dict[str, Any], notes: Notes) -> Message:
    named, role = _role(turn)
    said = [key for key in CONTENT_KEYS if not is_blank(turn.get(key))]
    if len(said) > 1:
        raise BadRow("a turn has both content and value", "keep one of them in each turn")
    rest = {k: v for k, v in turn.items() if not is_blank(v) and k not in ROLE_KEYS + CONTENT_KEYS}
    supervised = _pop_supervised(rest, role)
    if "tool_calls" in rest:
        rest["tool_calls"] = from_json(rest["tool_calls"])
    for key in [key for key in rest if key in NOT_CONVERSATION]:
        notes.unused_keys.add(key)
        del rest[key]
    if rest.keys() - LAID_OUT.get(role, set()):
        return Message(role, "", supervised, rest)  # refused with what it carries
    key = said[0] if said else next((key for key in CONTENT_KEYS if key in turn), "content")
    value = "" if rest and not said else _join_parts(turn.get(key), key)  # a call may say nothing
    content = text(value, key, may_be_empty=role in ("system", "tool") or bool(rest))
    message = Message(role, content, supervised, rest or None)
    if named != role:
        notes.roles[named] = role
    return message


def _role(turn: dict[str, Any]) -> tuple[str, str]:
    """(a turn's role as written, the role that it means)."""
    found = [turn[key] for key in ROLE_KEYS if not is_blank(turn.get(key))]
    if len(found) > 1:
        raise BadRow("a turn has both role and from", "keep one of them in each turn")
    if not found and not any(key in turn for key in ROLE_KEYS):
        raise BadRow(
            f"a turn has neither role and content nor from and value: it has {name_list(turn)}",
            'write each turn as {"role": "user", "content": "..."}',
        )
    named: Any = found[0] if found else None
    known = named.strip().casefold() if isinstance(named, str) else ""
    if known in TOOL_ROLES:
        raise BadRow(
            f"role {named!r} belongs to a form of tool calls that chat templates do not take",
            "write tool_calls into the assistant's turn and results as turns of the role tool, in"
            " OpenAI's form, or leave rows with tool calls out",
        )
    if known not in ROLES:
        raise BadRow(
            f"role {named!r} is not one of {', '.join(dict.fromkeys(ROLES.values()))}",
            "rename the roles in the file, or leave these rows out",
        )
    return named, ROLES[known]


def _pop_supervised(rest: dict[str, Any], role: str) -> bool:
    """Take the keys that say whether a turn is trained on out of `rest`; the default is True."""
    given = {key: rest.pop(key) for key in SUPERVISION if key in rest}
    for key, value in given.items():
        if isinstance(value, str) or value not in (0, 1):
            raise BadRow(
                f"{key} of a turn is {value!r}, and only 0 and 1, or false and true, can be"
                " honored",
                f"set {key} to 0 for turns that are context, and to 1 for those to learn",
            )
        if value and role != "assistant":
            raise BadRow(
                f"{key} of a {role} turn is {value!r}, but only the assistant's turns are trained"
                " on",
                f"remove {key} from turns of other roles",
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"{' and '.join(given)} of a turn contradict each other", "keep one of them")
    return role != "assistant" or all(given.values())


def _refuse_extra(messages: tuple[Message, ...]) -> None:
    """Raise BadRow if turns carry what is neither read nor laid out by a chat template."""
    extra = {k for m in messages for k in m.extra or () if k not in LAID_OUT.get(m.role, ())}
    if "function_call" in extra or "tool_calls" in extra:
        raise BadRow(
            f"its turns carry {name_list(extra)} in a form that chat templates do not take",
            "write calls as tool_calls of the assistant's turn, in OpenAI's form, or leave rows"
            " with tool calls out",
        )
    if marks := {key for key in extra if MARKS.search(key)}:
        raise BadRow(
            f"its turns carry {name_list(marks)}, which is not read",
            'if it says what is trained on, write "weight": 0 on turns of the assistant that are'
            f" context, and 1 on those to learn; else remove {name_list(marks)} from the turns",
        )
    if extra:
        raise BadRow(
            f"its turns carry {name_list(extra)}, which is not read",
            f"put it into the content, or remove {name_list(extra)} from the turns if the model"
            " need not see it",
        )
