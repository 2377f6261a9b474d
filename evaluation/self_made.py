"""A model's own right solutions, as rows to learn from.

Right is equal in value to the gold answer. An answer that was cut off is not kept: it would teach
the model not to end. Of a problem's answers that differ in white space only, the first is kept.

A solution that is right by its last number, without a `#### N` that all scorers read, gets the gold
one's as its last line. The text before stays the model's own; without that line the row could not
be scored, and most models that were not tuned on GSM8K would have no row to keep at all.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data.rows import Message, Problem
from evaluation.generative import had_format, numeric_equal
from evaluation.summary import Completions


def right_solutions(problems: list[Problem], given: Completions) -> Iterator[dict[str, Any]]:
    """Rows of `messages`, with the `id` of the problem and the number of its `sample`."""
    for p in problems:
        seen = set()
        for c in given[p.id]:
            text = c.text.strip()
            form = " ".join(text.split())
            if c.cut_off or form in seen or not numeric_equal(text, p.answer):
                continue
            seen.add(form)
            if not had_format(text):
                text += "\n" + p.answer[p.answer.index("####") :].partition("\n")[0]
            solved = replace(p, messages=(*p.messages[:-1], Message("assistant", text)))
            yield solved.row() | {"sample": c.sample}
