"""The validation split, and what counts as the same problem.

A hash of its question decides on which side of the split a problem falls. So equal questions fall
on the same side, and adding, removing or reordering rows moves no other row.
"""

import hashlib
import re

from data.rows import Problem

NUMBER = re.compile(r"\d[\d,.]*")


def normalize(text: str) -> str:
    """`text` in the form in which questions are compared: case and white space do not count."""
    return " ".join(text.casefold().split())


def mask_numbers(text: str) -> str:
    """`normalize`, with every number replaced: problems made from one template become equal."""
    return NUMBER.sub("0", normalize(text))


def split_problems(problems: list[Problem], validation_share: float) -> tuple[list[int], list[int]]:
    """(indices to train on, indices to validate on).

    Neither is empty if there are two different questions and `validation_share` is above 0.
    """
    points = [_point(p.question) for p in problems]
    validation = {i for i, x in enumerate(points) if x < validation_share}
    if not validation and validation_share > 0 and len(set(points)) > 1:
        lowest = min(points)
        validation = {i for i, x in enumerate(points) if x == lowest}
    if len(validation) == len(problems) and len(set(points)) > 1:
        highest = max(points)
        validation -= {i for i, x in enumerate(points) if x == highest}
    return [i for i in range(len(problems)) if i not in validation], sorted(validation)


def split_sources(
    sources: list[list[Problem]], validation_share: float
) -> list[tuple[list[int], list[int]]]:
    """`split_problems` for each source; a question held out in one is held out in all."""
    held_out = set()
    for problems in sources:
        _, validation = split_problems(problems, validation_share)
        held_out |= {normalize(problems[i].question) for i in validation}
    splits = []
    for problems in sources:
        sides: tuple[list[int], list[int]] = ([], [])
        for i, problem in enumerate(problems):
            sides[normalize(problem.question) in held_out].append(i)
        splits.append(sides)
    return splits


def _point(question: str) -> float:
    """A number in [0, 1): equal for equal questions, uniformly distributed over different ones."""
    digest = hashlib.sha256(normalize(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def count_shared(a: list[str], b: list[str]) -> int:
    """How many texts of `b` also occur in `a`."""
    known = set(a)
    return sum(text in known for text in b)


def count_repeated(texts: list[str]) -> int:
    """How many texts repeat an earlier one."""
    return len(texts) - len(set(texts))
