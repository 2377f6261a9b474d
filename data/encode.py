"""Problems become examples: token ids, what is supervised, and a row number that never changes.

An example that is too long is left out and counted: an answer that was cut would teach the model to
stop in the middle, and an answer that was cut away altogether has nothing to supervise.
"""

from dataclasses import dataclass

import numpy as np

from data.chat import ChatFormat
from data.rows import Problem
from progress_bar import progress_bar

IGNORE = -100  # a target that is not supervised


@dataclass(frozen=True)
class Example:
    """One encoded problem; `row`, its number in the source, keys its order and its dropout."""

    row: int
    tokens: np.ndarray  # (L,) int64
    targets: np.ndarray  # (L,) int64: the next token where that is supervised, else IGNORE

    @property
    def supervised(self) -> int:
        return int((self.targets != IGNORE).sum())


def encode_problems(
    problems: list[Problem], rows: list[int], chat: ChatFormat, max_length: int
) -> tuple[list[Example], list[str]]:
    """(examples, why the others were left out) for `problems` with their row numbers."""
    examples, left_out = [], []
    counted = progress_bar(problems, desc="encode", unit="row", leave=False)
    for problem, row in zip(counted, rows, strict=True):
        encoded = chat.encode(problem.messages)
        if len(encoded.tokens) > max_length:
            left_out.append(f"{problem.id}: {len(encoded.tokens)} tokens")
            continue
        tokens = np.array(encoded.tokens, dtype=np.int64)
        targets = np.full(len(tokens), IGNORE, dtype=np.int64)
        supervised = np.array(encoded.supervised[1:])
        targets[:-1][supervised] = tokens[1:][supervised]
        examples.append(Example(row, tokens, targets))
    return examples, left_out
