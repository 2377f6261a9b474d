"""Logs of answers and scores, written as they are computed, so that an evaluation can resume."""

from pathlib import Path
from typing import TypeVar

from files import JsonLines
from typed import record

T = TypeVar("T")


def resume_log(path: Path, kind: type[T]) -> tuple[list[T], JsonLines]:
    """(records of dataclass `kind` in a log, the log opened to append more after them).

    The log ends before the first line that is torn or invalid; a missing one is empty.
    """
    records, size = [], 0
    for line in JsonLines.read(path):
        try:
            records.append(record(kind, line.value))
        except ValueError:  # not an object, or not with the fields of `kind`
            break
        size = line.end
    return records, JsonLines(path, keep=size)
