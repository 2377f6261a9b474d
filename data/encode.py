"""Problems become examples: token ids, what is supervised, and a row number that never changes.

An example that is too long is left out and counted: an answer that was cut would teach the model to
stop in the middle, and an answer that was cut away altogether has nothing to supervise.
"""

from dataclasses import dataclass

import numpy as np

from data.chat import ChatFormat, EncodedChat
from data.rows import Problem
from progress_bar import progress_bar

IGNORE = -100  # a target that is not supervised
AT_ONCE = 1024  # rows that the tokenizer is given: work for all cores, and steps for the bar


@dataclass(frozen=True)
class Example:
    """One encoded problem; `row_id`, its number in the source, keys its order and its dropout."""

    row_id: int
    tokens: np.ndarray  # (L,) int64
    targets: np.ndarray  # (L,) int64: the next token where that is supervised, else IGNORE

    @property
    def supervised_count(self) -> int:
        return int((self.targets != IGNORE).sum())


def encode_problems(
    problems: list[Problem], rows: list[int], chat: ChatFormat, max_length: int
) -> tuple[list[Example], list[str]]:
    """(examples, why the others were left out) for `problems` with their row numbers."""
    assert len(problems) == len(rows), f"{len(problems)} problems, {len(rows)} row numbers"
    examples, left_out = [], []
    with progress_bar(total=len(problems), desc="encode", unit="row", leave=False) as bar:
        for start in range(0, len(problems), AT_ONCE):
            some = problems[start : start + AT_ONCE]
            found = chat.encode_all([problem.messages for problem in some])
            for problem, row, encoded in zip(some, rows[start : start + AT_ONCE], found):
                if len(encoded.tokens) > max_length:
                    left_out.append(f"{problem.id}: {len(encoded.tokens)} tokens")
                else:
                    examples.append(_example(row, encoded))
            bar.update(len(some))
    return examples, left_out


def _example(row: int, encoded: EncodedChat) -> Example:
    tokens = np.array(encoded.tokens, dtype=np.int64)  # (L,)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)  # (L,)
    np.copyto(targets[:-1], tokens[1:], where=np.array(encoded.supervised_mask[1:], dtype=bool))
    return Example(row, tokens, targets)
