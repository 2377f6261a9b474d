"""Rows become problems: the columns of a row say in which of these formats it is.

    {"messages": [{"role": ..., "content": ...}, ...]}
    {"conversations": [{"from": ..., "value": ...}, ...]}    ShareGPT's; or role and content
    {"question": ..., "answer": ...}
    {"prompt": ..., "completion": ...}    two texts, or two lists of messages as in TRL
    {"instruction": ..., "input": ..., "output": ...}    Alpaca's; "input" may be empty or missing
    {"input": ..., "output": ...}

A row may also have a "system" prompt, a "history" of earlier [question, answer] pairs if it is a
question and an answer, and a "category". A column that would change the conversation, such as
"tools" or "context", is honored, or the row is refused; any other column is reported as not used.
Null, NaN and empty values count as missing.

Bad rows are never repaired: each is left out and reported, and if they are more than 1 % of a file,
reading it is an error.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.problems import (
    Choices,
    Message,
    Problem,
    Shots,
    Source,
    content_fingerprint,
    fingerprint,
)
from data.row_faults import (
    PREFERENCE,
    preference_remedy,
    refuse_other_data,
    remedy_for_non_object,
    suggestion,
    way_in,
)
from data.row_files import is_table, read_rows
from data.turns import (
    CONTROL,
    ROLE_KEYS,
    SUPERVISION,
    BadRow,
    Notes,
    check_order,
    from_json,
    is_blank,
    name_list,
    read_turns,
    text,
    up_to_the_last_supervised,
)
from errors import BadData, listed

__all__ = [
    "BAD_ROWS_ALLOWED",
    "NOT_RENAMED",
    "ROW_FORMATS",
    "Choices",
    "Columns",
    "Message",
    "Problem",
    "RowParser",
    "Shots",
    "Source",
    "content_fingerprint",
    "find_format",
    "fingerprint",
    "parse_row",
    "read_problems",
    "read_rows",
]

ROW_FORMATS = {  # name -> columns
    "messages": ("messages",),
    "conversations": ("conversations",),
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "input", "output"),
    "input/output": ("input", "output"),
}
TURNS = ("messages", "conversations")  # formats of one column, a list of turns
ADDED_COLUMNS = ("system", "history")  # which rows of several formats may have
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
# Maps a column of a row format to the name it has in the data, as in {"question": "problem"}; a
# column of the data that is mapped to nothing, as in {"tools": ""}, is not read.
Columns = Mapping[str, str]
NOT_RENAMED: Columns = MappingProxyType({})
# Columns that other trainers put into the conversation: rows in which they hold something are
# refused, unless they are renamed or mapped to nothing. PAIR_COLUMNS only count in rows that are a
# question and an answer.
CONVERSATION_COLUMNS = (
    *SYSTEM_COLUMNS, "history", "tools", "functions", "tool_calls", "documents",
    "reasoning_content", "chat_template_kwargs",
)  # fmt: skip
PAIR_COLUMNS = ("instruction", "input", "context", "passage", "choices", "options", "reasoning",
                "thinking")  # fmt: skip
MEDIA = re.compile(r"(?:image|video|audio)s?(?:_(?:path|url|file|bytes)s?)?")
# Columns of a row that say whether it is trained on, or which of its turns are.
ROW_MARKS = dict.fromkeys(SUPERVISION, ("false", "0", "0.0")) | dict.fromkeys(
    ("label", "kto_tag"), ("false",)
)
TURN_MARKS = re.compile(r"(?:loss_?|train_?)?masks?|mask_history|train_on_\w+")
BAD_ROWS_ALLOWED = 0.01  # fraction of a file; if more are bad, the file is not what it should be


def read_problems(
    path: Path, parse: Callable[[object, str], Problem] | None = None
) -> tuple[list[Problem], list[str]]:
    """Read a file of rows: (problems, what is wrong with each row left out).

    `parse(row, id)` returns the problem in a row or raises ValueError; the default is `parse_row`.
    Raises BadData if the file cannot be read, has no rows, or too many bad ones; the remedy is that
    of the most frequent fault.
    """
    parse = parse or parse_row
    problems, bad, remedies = [], [], Counter[str]()
    for number, row in read_rows(path):
        try:
            problems.append(parse(row, f"{path.name}:{number}"))
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
            remedies[getattr(error, "remedy", "")] += 1
    if not problems and not bad:
        raise BadData(f"{path} has no rows", "give a file with at least one row")
    if len(bad) > BAD_ROWS_ALLOWED * (len(problems) + len(bad)):
        (remedy, _), *_ = remedies.most_common(1)
        needed = "its first line must name the columns; " if is_table(path) else ""
        needed += f"each row needs the columns of one format ({', '.join(ROW_FORMATS)})"
        raise BadData(
            f"{path}: {len(bad)} of {len(problems) + len(bad)} rows are bad: {listed(bad, 3)}",
            remedy
            or f"{needed} as non-empty text; map other names with --columns"
            " question=problem,answer=solution",
        )
    return problems, bad


def parse_row(
    row: object, id: str, columns: Columns = NOT_RENAMED, notes: Notes | None = None
) -> Problem:
    """The problem in a row; BadRow, a ValueError, if it is not in a row format.

    With `columns` the row must be in the format that has these columns. `notes` records how the
    row was understood.
    """
    notes = notes or Notes()
    if isinstance(row, ValueError):  # from `read_rows`
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__}, not an object", remedy_for_non_object(row))
    row_format = find_format(row, columns)
    names = {name: columns.get(name, name) for name in ROW_FORMATS[row_format]}  # in the row
    used = set(names.values())
    messages, is_pair = _conversation(row, row_format, names, notes)
    if is_pair:
        messages = (*_history(row, columns, used), *messages)
    messages = (*_system(row, columns, messages, used, notes), *messages)
    tools = None if is_pair else _tools(row, columns, used)
    _refuse_columns(row, columns, used, is_pair=is_pair)
    check_order(messages)
    messages = up_to_the_last_supervised(messages, notes)
    notes.control.update({t.strip() for m in messages for t in CONTROL.findall(m.content)})

    category = row.get("category")  # only used for counts: a bad one does not make the row bad
    category = category if isinstance(category, str) and category.strip() else None
    original = row.get("stem") if row_format == "messages" else None  # as `Problem.row` writes it
    used |= {"category", "stem"} if row_format == "messages" else {"category"}
    notes.formats[row_format] += 1
    notes.unused |= {
        name for name, value in row.items() if name not in used and not is_blank(value)
    }
    original = original if isinstance(original, str) else None
    return Problem(id, messages, category, original, tools=tools)


def find_format(row: dict, columns: Columns = NOT_RENAMED) -> str:
    """The key in `ROW_FORMATS` of a row's format; BadRow if it is in several or in none.

    If columns are missing, it is the format that the row has the most columns of.
    """
    renamed = {name for name, other in columns.items() if other} - set(ADDED_COLUMNS)
    candidates = {
        row_format: [
            columns.get(name, name) for name in names if not _is_optional(row_format, name)
        ]
        for row_format, names in ROW_FORMATS.items()
        if renamed <= set(names)
    }
    complete = [
        f for f, names in candidates.items() if not any(is_blank(row.get(n)) for n in names)
    ]
    if "instruction/input/output" in complete and "input/output" in complete:
        complete.remove("input/output")
    if len(complete) > 1:
        raise BadRow(
            f"it fits {' and '.join(complete)}: choose one with --columns",
            f"choose one of them, as in --columns {_as_renamed(candidates[complete[0]])}",
        )
    present = {f: sum(name in row for name in names) for f, names in candidates.items()}
    best = complete[0] if complete else max(present, key=present.__getitem__)
    if not complete and not renamed:
        refuse_other_data(row)
    if not present[best]:
        raise BadRow(f"its columns ({name_list(row)}) match no row format", suggestion(row))
    return best


class RowParser:
    """`parse_row` with `columns`; it records how rows were understood, to be reported."""

    def __init__(self, columns: Columns = NOT_RENAMED):
        self.columns = columns
        self.notes = Notes(columns={other: name for name, other in columns.items() if other})

    def __call__(self, row: object, id: str) -> Problem:
        return parse_row(row, id, self.columns, self.notes)

    def note(self) -> str:
        """The rows' formats, the renamed columns and roles, and what is not used."""
        return "; ".join(self.notes.lines())


def _is_optional(row_format: str, name: str) -> bool:
    return row_format == "instruction/input/output" and name == "input"


def _conversation(
    row: dict, row_format: str, names: Mapping[str, str], notes: Notes
) -> tuple[tuple[Message, ...], bool]:
    """(the messages in the format's own columns, whether they are one question and answer)."""
    values = {name: row.get(other) for name, other in names.items()}
    if row_format in TURNS:
        return read_turns(values[row_format], names[row_format], notes), False
    if row_format == "prompt/completion":
        both = {name: _turns_in(value) for name, value in values.items()}
        if any(isinstance(value, list) for value in both.values()):
            return _prompt_completion(notes=notes, **both), False
    values = {k: v for k, v in values.items() if not (_is_optional(row_format, k) and is_blank(v))}
    try:
        *question, answer = (text(value, names[name]) for name, value in values.items())
    except BadRow as fault:
        if any(is_blank(value) for value in values.values()):
            fault.remedy = suggestion(row) or fault.remedy
        elif all(isinstance(value, list | dict) for value in values.values()):
            fault.remedy = (
                "write one row per problem, as pandas does with to_json(orient='records',"
                " lines=True)"
            )
        raise
    return (Message("user", "\n\n".join(question)), Message("assistant", answer)), True


def _turns_in(value: object) -> object:
    """The list of turns in a text that holds one; any other value, JSON too, as it is."""
    turns = from_json(value)
    is_turns = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.keys() & set(ROLE_KEYS) for turn in turns
    )
    return turns if is_turns and turns else value


def _prompt_completion(prompt: object, completion: object, notes: Notes) -> tuple[Message, ...]:
    """TRL's conversational format, in which only the completion is trained on, as it is here."""
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow(
            "one of prompt and completion is a list of messages, the other is not",
            "write both as text, or both as lists of messages",
        )
    context = [m._replace(supervised=False) if m.role == "assistant" else m
               for m in read_turns(prompt, "prompt", notes)]  # fmt: skip
    return (*context, *read_turns(completion, "completion", notes))


def _history(row: dict, columns: Columns, used: set[str]) -> tuple[Message, ...]:
    """The turns in the column "history", a list of [question, answer] pairs; none without it."""
    name = columns.get("history", "history")
    value = from_json(row.get(name))
    if not name or is_blank(value):
        return ()
    used.add(name)
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise BadRow(
            f"{name} is not a list of [question, answer] pairs",
            f"write {name} as such a list, or train without it: --columns {name}=",
        )
    roles = ("user", "assistant")
    return tuple(
        Message(role, text(said, f"a text in {name}"))
        for pair in value
        for role, said in zip(roles, pair)
    )


def _tools(row: dict, columns: Columns, used: set[str]) -> tuple[dict[str, Any], ...] | None:
    """The descriptions of tools in the column "tools", which may be JSON in a text."""
    name = columns.get("tools", "tools")
    value = from_json(row.get(name)) if name else None
    given = [from_json(tool) for tool in value] if isinstance(value, list) else []
    tools = tuple(tool for tool in given if isinstance(tool, dict))
    if not tools or len(tools) < len(given):
        return None  # what it holds otherwise is refused with the other columns
    used.add(name)
    return tools


def _system(
    row: dict, columns: Columns, messages: tuple[Message, ...], used: set[str], notes: Notes
) -> tuple[Message, ...]:
    """The system turn of a separate column; () if there is none, or if `messages` has it."""
    given = [columns["system"]] if "system" in columns else SYSTEM_COLUMNS
    found = {n: row[n] for n in given if n and columns.get(n) != "" and not is_blank(row.get(n))}
    used.update(found)
    prompts = {text(value, name) for name, value in found.items()}
    inside = [message.content for message in messages[:1] if message.role == "system"]
    if len(prompts | set(inside)) > 1:
        places = [*found, *(["a system turn"] if inside else [])]
        raise BadRow(
            f"it has several system prompts: {', '.join(places)}",
            f"keep one of them, or train without the column: --columns {next(iter(found))}=",
        )
    for name in found:
        if name != "system":
            notes.columns.setdefault(name, "system")
    return () if inside else tuple(Message("system", prompt) for prompt in prompts)


def _refuse_columns(row: dict, columns: Columns, used: set[str], *, is_pair: bool) -> None:
    """Raise BadRow if a column that is not used would change the conversation."""
    dropped = {name for name, other in columns.items() if not other}

    def says(name: str) -> bool:
        return name not in used | dropped and not is_blank(from_json(row.get(name)))

    names = CONVERSATION_COLUMNS + (PAIR_COLUMNS if is_pair else ())
    names = [*names, *(name for name in row if MEDIA.fullmatch(name))]
    if found := [name for name in names if says(name)]:
        raise BadRow(
            f"its {' and '.join(found)} would change the conversation, and cannot be read",
            way_in(row, found) + f"to train without it: --columns {_as_dropped(found)}",
        )
    preferred = {name for name in used if PREFERENCE.fullmatch(name)}
    found = [name for name in row if PREFERENCE.fullmatch(name) and says(name)]
    if found and not preferred:
        raise BadRow(
            f"its column {found[0]} makes it preference data",
            preference_remedy(row, f"give --columns {_as_dropped(found)}"),
        )
    marks = [n for n, no in ROW_MARKS.items() if says(n) and str(row[n]).casefold() in no]
    masks = [n for n in row if TURN_MARKS.fullmatch(n) and says(n)]
    if found := marks + [n for n in masks if not isinstance(from_json(row[n]), str)]:
        raise BadRow(
            f"its {found[0]} is {str(row[found[0]])[:30]}, which marks what is not to be learned",
            'leave rows out that are not to be learned, and write "weight": 0 on turns that are'
            f" context; if it means something else: --columns {_as_dropped(found)}",
        )


def _as_dropped(names: list[str]) -> str:
    return ",".join(f"{name}=" for name in names)


def _as_renamed(names: list[str]) -> str:
    return ",".join(f"{name}={name}" for name in names)
