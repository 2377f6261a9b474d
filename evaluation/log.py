"""Logs of answers and scores, written as they are computed, so that an evaluation can resume."""

from pathlib import Path
from typing import TypeVar

from files import JsonLines
from typed import record

T = TypeVar("T")


def read_log(path: Path, kind: type[T]) -> tuple[list[T], int]:
    """(records, size in bytes) of a log of dataclass `kind`, up to the first torn or invalid line.

    Both are empty or 0 if there is no log.
    """
    records, size = [], 0
    for line in JsonLines.read(path):
        try:
            records.append(record(kind, line.value))
        except ValueError:  # not an object, or not with the fields of `kind`
            break
        size = line.end
    return records, size


def resume_log(path: Path, kind: type[T]) -> tuple[list[T], JsonLines]:
    """(records already in a log, the log opened to append more after them)."""
    records, size = read_log(path, kind)
    return records, JsonLines(path, keep=size)
