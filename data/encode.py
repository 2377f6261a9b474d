"""Problems become examples: token ids, targets, and a row id that never changes.

An example longer than the limit is left out and reported, never truncated: a truncated answer
would teach the model to stop in the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import ChatFormat, EncodedChat
from data.rows import Problem
from errors import BadData
from progress_bar import progress_bar

IGNORE = -100  # the target of a token that is not supervised, as in F.cross_entropy
ROWS_PER_CALL = 1024  # of the tokenizer: enough to use all cores, and to move the progress bar


@dataclass(frozen=True)
class Example:
    """One encoded problem. `row_id` is its index in the data, which keys its order and dropout."""

    row_id: int
    tokens: np.ndarray  # (L,) int64
    targets: np.ndarray  # (L,) int64: the next token where it is supervised, else IGNORE

    @property
    def supervised_count(self) -> int:
        """How many tokens have a target."""
        return int((self.targets != IGNORE).sum())


def encode_problems(
    problems: list[Problem], row_ids: Sequence[int], chat: ChatFormat, max_length: int
) -> tuple[list[Example], list[str]]:
    """Encode `problems`, whose row ids are `row_ids`.

    Returns the examples of at most `max_length` tokens, and one line for each longer one.
    """
    assert len(problems) == len(row_ids), f"{len(problems)} problems, {len(row_ids)} row ids"
    examples, left_out = [], []
    with progress_bar(total=len(problems), desc="encode", unit="row", leave=False) as bar:
        for start in range(0, len(problems), ROWS_PER_CALL):
            chunk = problems[start : start + ROWS_PER_CALL]
            ids = row_ids[start : start + ROWS_PER_CALL]
            encoded_chats = _encode(chunk, chat)
            for problem, row_id, encoded in zip(chunk, ids, encoded_chats):
                if len(encoded.tokens) > max_length:
                    left_out.append(f"{problem.id}: {len(encoded.tokens)} tokens")
                else:
                    examples.append(_example(row_id, encoded))
            bar.update(len(chunk))
    return examples, left_out


def _encode(problems: Sequence[Problem], chat: ChatFormat) -> list[EncodedChat]:
    """Encode all at once; BadData names the first row that the chat template cannot lay out."""
    try:
        return chat.encode_all([(p.messages, p.tools) for p in problems])
    except BadData:
        for p in problems:
            try:
                chat.encode(p.messages, p.tools)
            except BadData as error:
                raise BadData(f"{p.id}: {error.cause}", error.remedy) from None
        raise


def _example(row_id: int, encoded: EncodedChat) -> Example:
    tokens = np.array(encoded.tokens, dtype=np.int64)  # (L,)
    supervised = np.array(encoded.supervised_mask[1:], dtype=bool)  # (L - 1,)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)  # (L,)
    np.copyto(targets[:-1], tokens[1:], where=supervised)
    return Example(row_id, tokens, targets)
