"""Which problems are held out, and what is the same problem twice.

The side a problem falls on is a hash of its question, so equal questions fall on one side, and a
problem's side does not change when rows are added, removed or reordered.
"""

import hashlib
import re

from data.rows import Problem

NUMBER = re.compile(r"\d[\d,.]*")


def normal(text: str) -> str:
    """Case and white space aside: what two problems are compared by."""
    return " ".join(text.casefold().split())


def masked(text: str) -> str:
    """Numbers aside as well: problems made from one template look alike."""
    return NUMBER.sub("0", normal(text))


def split_problems(problems: list[Problem], validation_share: float) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to validate on); at least one of each, if there are two questions."""
    place = [_place(p.question) for p in problems]
    validation = {row for row, x in enumerate(place) if x < validation_share}
    if not validation and validation_share > 0 and len(set(place)) > 1:
        validation = {row for row, x in enumerate(place) if x == min(place)}
    if len(validation) == len(problems) and len(set(place)) > 1:
        validation -= {row for row, x in enumerate(place) if x == max(place)}
    return [r for r in range(len(problems)) if r not in validation], sorted(validation)


def split_sources(
    sources: list[list[Problem]], validation_share: float
) -> list[tuple[list[int], list[int]]]:
    """`split_problems` of each source, but what is held out in one is held out in all."""
    sides = [split_problems(problems, validation_share) for problems in sources]
    held_out = {
        normal(problems[row].question)
        for problems, (_, validation) in zip(sources, sides)
        for row in validation
    }
    return [
        tuple([r for r, p in enumerate(problems) if (normal(p.question) in held_out) == side]
              for side in (False, True))
        for problems in sources
    ]  # fmt: skip


def _place(question: str) -> float:
    """A number in [0, 1) that is even over questions and the same for equal ones."""
    digest = hashlib.sha256(normal(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def shared(a: list[str], b: list[str]) -> int:
    """How many of `b` are in `a` too."""
    seen = set(a)
    return sum(text in seen for text in b)


def repeated(texts: list[str]) -> int:
    """How many repeat an earlier one."""
    return len(texts) - len(set(texts))
