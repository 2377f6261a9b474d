"""A model's own right solutions, as rows to learn from.

Right is equal in value to the gold answer. An answer that was cut off is not kept: it would teach
the model not to end. Of a problem's answers that differ in white space only, the first is kept. Of
a conversation all turns of the assistant become the model's own: its last was given to those.

A solution that is right by its last number, without a `#### N` that all scorers read, gets the gold
one's as its last line. The text before stays the model's own; without that line the row could not
be scored, and most models that were not tuned on GSM8K would have no row to keep at all.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data.rows import Message, Problem
from evaluation.conversation import next_turn
from evaluation.generative import had_format, numeric_equal
from evaluation.summary import Completions


def right_solutions(problems: list[Problem], given: Completions) -> Iterator[dict[str, Any]]:
    """Rows of `messages`, with the `id` of the problem and the number of its `sample`."""
    for p in problems:
        seen = set()
        for c in given[p.id]:
            *before, text = (said.strip() for said in c.turns or [c.text])
            form = tuple(" ".join(said.split()) for said in (*before, text))
            if c.cut_off or not all(form) or form in seen or not numeric_equal(text, p.answer):
                continue
            seen.add(form)
            if not had_format(text):
                text += "\n" + p.answer[p.answer.index("####") :].partition("\n")[0]
            asked = next_turn(p, before).messages[:-1]
            solved = replace(p, messages=(*asked, Message("assistant", text)))
            yield solved.row() | {"sample": c.sample}
