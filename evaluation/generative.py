"""Scorers of one generated answer, side by side, and votes over many.

A scorer says whether a completion agrees with the gold answer as GSM8K writes it: reasoning, then
`#### N`. They differ in where they look for the number and in what they call equal:

    numeric-equal     ours: after the first `####`, or else the last of all; equal in value
    strict-match      lm-evaluation-harness, gsm8k version 3: after the first `#### `; equal as text
    flexible-extract  the same harness: the last that looks like a number, anywhere; equal as text
    openai            openai/grade-school-math: after the first `#### `; equal as text, commas apart

Only ours takes `#### 18.00` for 18 and U+2212 for a minus; only flexible-extract takes `...` for an
answer and `10-3` for -3; `#### 18.` is wrong for openai alone. All are linear in the completion.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from errors import BadData
from evaluation.numbers import final_number, marked_number

_HASHED = re.compile(r"#### (-?[0-9.,]+)")
# Finds the last match of the harness's (-?[$0-9.,]{2,})|(-?[0-9]+), and none of those before it.
_LAST_NUMBERLIKE = re.compile(r"(?s:.*)(?=[$0-9.,-])((?:-|(?<![$0-9.,-]))(?:[$0-9.,]{2,}|[0-9]))")


def gold_number(gold_answer: str) -> Fraction:
    """The N of a gold answer's `#### N`; `BadData` where there is none."""
    number = marked_number(gold_answer)
    if number is None:
        cause = f"a gold answer has no number after '####': {gold_answer[-60:]!r}"
        raise BadData(cause, "end each gold answer with a line '#### N'")
    return number


def had_format(text: str) -> bool:
    """Whether there is a `#### N` that strict-match and openai can read, right or wrong."""
    return _HASHED.search(text) is not None


def numeric_equal(completion: str, gold_answer: str) -> bool:
    """Equal in value: 18, 18.00 and $18 are; a completion without a number never is."""
    return final_number(completion) == gold_number(gold_answer)


def strict_match(completion: str, gold_answer: str) -> bool:
    """lm-evaluation-harness's filter of this name, and its exact_match on the outcome."""
    found = _HASHED.search(completion)
    return found is not None and _harness_form(found[1]) == _harness_form(gold_answer)


def flexible_extract(completion: str, gold_answer: str) -> bool:
    """lm-evaluation-harness's filter of this name, and its exact_match on the outcome."""
    found = _LAST_NUMBERLIKE.match(completion)
    return found is not None and _harness_form(found[1]) == _harness_form(gold_answer)


def openai_match(completion: str, gold_answer: str) -> bool:
    """The grade-school-math repository's is_correct: strings without commas."""
    found, gold = _HASHED.search(completion), _HASHED.search(gold_answer)
    assert gold is not None, gold_answer
    return found is not None and found[1].replace(",", "") == gold[1].replace(",", "")


def _harness_form(text: str) -> str:
    # Its ignore_case cannot matter: an extracted answer has no letters.
    _, _, text = text.replace(",", "").replace("$", "").rpartition("#### ")
    return re.sub(r"\.$", "", text)


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "numeric-equal": numeric_equal,  # the headline
    "strict-match": strict_match,
    "flexible-extract": flexible_extract,
    "openai": openai_match,
}


def majority_vote(answers: Sequence[Fraction | None]) -> Fraction | None:
    """Self-consistency (arXiv 2203.11171): the answer given most often.

    Of equally frequent ones, the one given first. None, a sample without a number, does not vote,
    and the outcome is None only if nobody voted.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # both keep the order of first votes


def maj_at_k(answers: Sequence[Fraction | None], gold: Fraction, k: int) -> bool:
    """Whether the majority of the first k answers is right; nobody having voted is wrong."""
    assert 1 <= k <= len(answers), (k, len(answers))
    return majority_vote(answers[:k]) == gold


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimate of it for k fresh samples (Chen et al., arXiv 2107.03374), exact.
    """
    assert 1 <= k <= n and 0 <= c <= n, (n, c, k)
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def exact_text(completion: str, gold_answer: str) -> bool:
    """The same text, white space at the ends apart: for answers that are no numbers."""
    return completion.strip() == gold_answer.strip()


def choose_scorers(gold_answers: Sequence[str]) -> dict[str, Callable[[str, str], bool]]:
    """`SCORERS` where every gold answer has a `#### N` that all can read; else equal text."""
    if all(had_format(gold) and marked_number(gold) is not None for gold in gold_answers):
        return SCORERS
    return {"exact-text": exact_text}
