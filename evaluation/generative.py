"""Generated answers, and whether they are correct: scorers, judges and votes.

A scorer compares a completion with a gold answer that states a number N, as `#### N` or in another
form that `golds.py` reads. The scorers differ in where they look for the number in the completion,
and in how they compare it:

    numeric-equal     ours: where `numbers.py` finds the answer; equal values
    strict-match      lm-evaluation-harness, gsm8k version 3: after the first `#### `; equal text
    flexible-extract  the same harness: the last thing that looks like a number; equal text
    openai            openai/grade-school-math: after the first `#### `; equal text without commas

The last three compare texts. They take a gold that ends in `#### N` as their sources define it. A
gold in another form, such as `####18` or `The answer is: 18`, is given to them as `#### 18`. Even
then, strict-match and openai accept only completions with `#### 18`.

Only ours accepts `#### 18.00` for 18, and U+2212 as a minus sign. Only flexible-extract takes `...`
for an answer, and `10-3` for -3. Only openai rejects `#### 18.`. All scorers take time linear in
the length of the completion.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from evaluation.golds import ends_in_number, gold_number, gold_text, gold_value
from evaluation.numbers import readings

_HASHED = re.compile(r"#### (-?[0-9.,]+)")
# Finds the last match of the harness's (-?[$0-9.,]{2,})|(-?[0-9]+) without visiting earlier ones.
_LAST_NUMBERLIKE = re.compile(r"(?s:.*)(?=[$0-9.,-])((?:-|(?<![$0-9.,-]))(?:[$0-9.,]{2,}|[0-9]))")


@dataclass(frozen=True)
class Completion:
    """One generated answer to the problem `id`.

    In a conversation of several turns, `text` is the last answer, which is the one scored. The
    other fields cover all of the turns.
    """

    id: str
    sample: int  # which of the answers to this problem, from 0
    text: str
    tokens: int  # length
    cut_off: bool  # stopped by the token limit
    seconds: float  # its share of the batch's time
    turns: list[str] = field(default_factory=list)  # all answers, if there are several turns


Completions = dict[str, list[Completion]]  # problem id -> its samples


@dataclass(frozen=True)
class Judge:
    """How the answers to a task are judged.

    The first scorer is the headline: it decides whether an answer counts as correct. The others
    are reported as well. A scorer takes an answer and its gold: a completion and the gold answer
    or, where `generated` is False, the log-likelihood of each option and the `Choices`.
    """

    name: str
    scorers: Mapping[str, Callable[[Any, Any], bool]]
    generated: bool = True  # False: nothing is generated, the likeliest option is the answer
    numeric: bool = False  # answers are numbers: there are votes, kinds of mistakes, breakdowns

    @property
    def headline(self) -> str:
        """The name of the scorer that decides whether an answer is correct."""
        return next(iter(self.scorers))

    def is_correct(self, answer: Any, gold: Any, *, cut_off: bool = False) -> bool:
        """Whether the first scorer accepts `answer`."""
        return self.score(self.headline, answer, gold, cut_off=cut_off)

    def score(self, name: str, answer: Any, gold: Any, *, cut_off: bool = False) -> bool:
        """The verdict of one scorer.

        If an answer was cut off, our scorers accept a number only after `####` or in a box: any
        other may be part of the reasoning. The scorers of other projects make no such difference.
        """
        scorer = self.scorers[name]
        if cut_off and scorer in (numeric_equal, numeric_or_exact):
            return scorer(answer, gold, cut_off=True)
        return scorer(answer, gold)


def had_format(text: str) -> bool:
    """Whether there is a `#### N` that strict-match and openai can read, correct or not."""
    return _HASHED.search(text) is not None


def numeric_equal(completion: str, gold_answer: str, *, cut_off: bool = False) -> bool:
    """Equality of values: 18, 18.00 and $18 are equal. Without a number, an answer is wrong."""
    return gold_number(gold_answer) in readings(completion, cut_off=cut_off)


def answer_value(completion: str, gold: Fraction, *, cut_off: bool = False) -> Fraction | None:
    """The number that a completion votes for: `gold` if it may mean that, None without a number."""
    found = readings(completion, cut_off=cut_off)
    return gold if gold in found else next(iter(found), None)


def strict_match(completion: str, gold_answer: str) -> bool:
    """lm-evaluation-harness's filter of the same name, followed by its exact_match."""
    found = _HASHED.search(completion)
    return found is not None and _harness_form(found[1]) == _harness_form(gold_text(gold_answer))


def flexible_extract(completion: str, gold_answer: str) -> bool:
    """lm-evaluation-harness's filter of the same name, followed by its exact_match."""
    found = _LAST_NUMBERLIKE.match(completion)
    return found is not None and _harness_form(found[1]) == _harness_form(gold_text(gold_answer))


def openai_match(completion: str, gold_answer: str) -> bool:
    """is_correct of the grade-school-math repository: equal strings, ignoring commas."""
    found = _HASHED.search(completion)
    first = _HASHED.search(gold_answer) if ends_in_number(gold_answer) else None
    gold = first[1] if first else gold_text(gold_answer)
    return found is not None and found[1].replace(",", "") == gold.replace(",", "")


def _harness_form(text: str) -> str:
    # The harness also ignores case, which makes no difference: extracted answers have no letters.
    text = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", text)


def exact_text(completion: str, gold_answer: str) -> bool:
    """Equality of texts, ignoring white space at both ends: for answers that are not numbers."""
    completion, gold_answer = (t.rpartition("</think>")[2] for t in (completion, gold_answer))
    return completion.strip() == gold_answer.strip()


def numeric_or_exact(completion: str, gold_answer: str, *, cut_off: bool = False) -> bool:
    """`numeric_equal` if the gold answer states a number, otherwise `exact_text`."""
    if gold_value(gold_answer) is None:
        return exact_text(completion, gold_answer)
    return numeric_equal(completion, gold_answer, cut_off=cut_off)


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "numeric-equal": numeric_equal,  # the headline
    "strict-match": strict_match,
    "flexible-extract": flexible_extract,
    "openai": openai_match,
}
NUMBERS = Judge("numbers", SCORERS, numeric=True)
TEXT = Judge("text", {"exact-text": exact_text})
EACH = Judge("numbers or text", {"numeric-or-exact": numeric_or_exact})  # of several sources


def majority_vote(answers: Sequence[Fraction | None]) -> Fraction | None:
    """The most frequent answer: self-consistency (arXiv:2203.11171). Ties go to the earliest.

    None stands for a sample without a number and does not vote. The result is None if no sample
    votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # both keep the order of first votes


def maj_at_k(answers: Sequence[Fraction | None], gold: Fraction, k: int) -> bool:
    """Whether the majority of the first k answers is correct; False if none of them votes."""
    assert 1 <= k <= len(answers), (k, len(answers))
    return majority_vote(answers[:k]) == gold


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """Unbiased estimate of the probability that at least one of k new samples is correct.

    c of n samples are correct: 1 - C(n-c, k) / C(n, k), exactly (Chen et al., arXiv:2107.03374).
    """
    assert 1 <= k <= n and 0 <= c <= n, (n, c, k)
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
