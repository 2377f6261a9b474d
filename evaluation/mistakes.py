"""Classifies the mistake in a wrong answer by what would have made it right.

The arithmetic steps of the answer are read (`steps.py`) and recomputed. A slip, or a number that
was copied wrong, is corrected, and the later steps are recomputed with the right value. If that
makes the answer right, this was the mistake. Steps that cannot be read with confidence are skipped.
A slip in such a step is therefore counted as a wrong plan, but a correct step is never counted as a
slip.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from evaluation.golds import gold_value
from evaluation.numbers import Readings, marked_readings, readings
from evaluation.quantities import plain as plain_text
from evaluation.quantities import quantities_in
from evaluation.steps import MAX_CHARACTERS, Calculation, numbers_written, read_steps, recompute
from evaluation.units import CONVERSIONS, MEASURES, MONEY, TIME, convertible, words_of

# Each completion gets the first kind that applies. "correct" and "format only" together are the
# numerically correct answers. "wrong plan" is the remainder.
KINDS = {
    "correct": "the correct number after ####",
    "format only": "the correct number, but not after ####",
    "cut off": "stopped by the token limit before an answer",
    "no answer": "empty, or without any number",
    "slip alone": "a step whose own arithmetic is wrong; with its right value the answer is right",
    "answer line differs": "the last computed value is correct, but not the number after ####",
    "number copied wrong": "a number resembles a given one; with that the answer is right",
    "unit or rounding": "off by rounding, or by a conversion between two units mentioned",
    "slip in a wrong plan": "a step whose own arithmetic is wrong, in an answer wrong without it",
    "wrong plan": "no step was found wrong, but the answer is",
}

# Topics of a question, by the words or pairs of adjacent words in it; # stands for a number.
TOPICS = {
    "units and conversions": {unit for _, *pair in MEASURES for unit in pair if unit},
    "percent": {"percent"},
    "fractions": {
        "half", "halves", "thirds", "fourths", "quarters", "fifths", "sixths", "eighths", "tenths",
        "a third", "one third", "another third", "a fourth", "one fourth", "a quarter",
        "one quarter", "three quarters", "a fifth", "one fifth", "a sixth", "one sixth",
        "an eighth", "one eighth", "a tenth", "one tenth", "fraction", "#/#",
    },
    "money": {unit for _, *pair in MONEY for unit in pair}
    | {"bucks", "€", "£", "price", "prices", "cost", "costs", "pay", "pays", "paid", "salary",
       "wage", "wages", "money"},
    "time": {unit for _, *pair in TIME for unit in pair}
    | {"per 2nd", "o'clock", "# am", "# pm", "# a.m", "# p.m", "noon", "midnight", "weekend"},
}  # fmt: skip
TOPICS["money"] -= {"quarter"}  # usually a fourth of something, not a coin

MAX_STEPS = 100  # of a solution, recomputed with other numbers
MAX_COPIES = 20  # pairs of a number and a given one that are tried
_MARKER = re.compile(r"####[^\w\n#]*[0-9]")


@dataclass(frozen=True)
class Mistake:
    """Why a completion is wrong, or that it is correct."""

    kind: str  # one of KINDS
    evidence: str = ""  # the text or numbers that show it, "" if the kind needs none


def classify(
    question: str, gold: str, completion: str, *, cut_off: bool = False, empty: bool = False
) -> Mistake:
    """Classifies a completion as one of KINDS. Never raises, and takes linear time.

    Args:
        gold: a solution that states its number, as `#### N` or in another form of golds.py.
        cut_off: generation stopped at the token limit.
        empty: nothing was generated.
    """
    truth = gold_value(gold)
    found, marked = readings(completion, cut_off=cut_off), marked_readings(completion)
    answer = next(iter(found), None)
    if truth in marked:
        return Mistake("correct")
    if truth in found:
        return Mistake("format only", f"{_shown(truth)} without ####")
    if cut_off and not found:
        return Mistake("cut off")
    if empty or answer is None:
        return Mistake("no answer")

    written = _before_the_answer(completion)[:MAX_CHARACTERS]
    steps = read_steps(written)[:MAX_STEPS]
    slip = next((step for step in steps if step.verdict == "wrong"), None)
    detail = f"{slip.text}: it is {_shown(slip.value)}" if slip else ""
    if truth is not None:
        if slip and truth in corrected_answers(question, steps, answer):
            return Mistake("slip alone", detail)
        if evidence := _answer_line(written, marked, truth, answer):
            return Mistake("answer line differs", evidence)
        if evidence := _copied_wrong(question, written, steps, truth, answer):
            return Mistake("number copied wrong", evidence)
        evidence = _conversion(f"{question}\n{gold}\n{written}", truth, answer)
        if evidence := evidence or _rounding(truth, answer, steps):
            return Mistake("unit or rounding", evidence)
    return Mistake("slip in a wrong plan", detail) if slip else Mistake("wrong plan")


def has_wrong_step(solution: str) -> bool:
    """Whether the arithmetic of a step is wrong; a correct answer may have such a step as well."""
    return any(step.verdict == "wrong" for step in read_steps(_before_the_answer(solution)))


def topics(question: str) -> set[str]:
    """Which TOPICS a question has; two units of the same kind count as a conversion."""
    words = words_of(question)
    found = set(words) | {f"{one} {two}" for one, two in zip(words, words[1:], strict=False)}
    present = {topic for topic, table in TOPICS.items() if found & table}
    if convertible(found):
        present.add("units and conversions")
    return present


def corrected_answers(
    question: str,
    steps: list[Calculation],
    answer: Fraction,
    copied: Mapping[Fraction, Fraction] = {},
) -> set[Fraction]:
    """What `answer` becomes if wrong steps get their right values, which later steps then use.

    `copied` replaces operands from the beginning. A wrong value may equal a number of the question,
    and later steps may then mean that number, so there are two answers: with and without replacing
    such values.
    """
    given = numbers_written(question)
    return {_corrected(steps, answer, copied, keep) for keep in (set(), given)}


def _corrected(
    steps: list[Calculation],
    answer: Fraction,
    copied: Mapping[Fraction, Fraction],
    keep: set[Fraction],
) -> Fraction:
    right = dict(copied)  # a value as written -> what it should be
    for step in steps:
        value = recompute(step, right) if right else step.value
        if step.verdict == "wrong" or value != step.value:
            if step.written not in keep or step is steps[-1]:
                right[step.written] = value
        elif step.written not in copied:
            right.pop(step.written, None)
    close = [value for written, value in right.items() if abs(written - answer) < 1]
    return right.get(answer, close[-1] if close else answer)


# Each of the following returns the evidence for a kind of mistake, or "".


def _answer_line(written: str, marked: Readings, truth: Fraction, answer: Fraction) -> str:
    """The value before the marked line, if it is the correct one."""
    if marked and truth in readings(written):
        return f"{_shown(answer)} after {_shown(truth)}"
    return ""


def _copied_wrong(
    question: str, written: str, steps: list[Calculation], truth: Fraction, answer: Fraction
) -> str:
    """An operand that is neither given nor stated earlier, and resembles a given number."""
    given = numbers_written(question)
    known, tried = set(given), 0
    for step in steps:
        stated = None
        for number in step.numbers:
            plain = number.value * 100 if number.percent else number.value
            resembled = [g for g in given if plain not in known and _alike(plain, g)]
            if not resembled:
                continue
            if stated is None:
                before = plain_text(written[: step.start])
                stated = {value for q in quantities_in(before) for value in q.readings}
            for other in resembled:
                tried += 1
                if plain in stated or tried > MAX_COPIES:
                    continue
                if truth in corrected_answers(question, steps, answer, {plain: other}):
                    return f"{_shown(plain)} for {_shown(other)} in {step.text}"
        known |= {step.value, step.written}
    return ""


def _alike(one: Fraction, other: Fraction) -> bool:
    """Whether one number may be the other, copied wrong: 84 for 48, 15 for 12, 500 for 5000."""
    if not one or not other or one == other:
        return False
    if one / other in _POWERS:
        return True
    a, b = (_shown(n).replace(".", "") for n in (one, other))
    if len(a) != len(b) or len(a) < 2:
        return False
    differing = [(x, y) for x, y in zip(a, b) if x != y]
    swapped = len(differing) == 2 and differing[0] == differing[1][::-1]
    return len(differing) == 1 or swapped


_POWERS = {Fraction(10) ** n for n in (-3, -2, -1, 1, 2, 3)}


def _conversion(texts: str, truth: Fraction, answer: Fraction) -> str:
    """A conversion between two units in `texts` that explains the ratio of answer and truth."""
    named = set(words_of(texts)) | {""}
    for factor, small, large in CONVERSIONS:
        if small in named and large in named:
            for other in (truth * factor, truth / factor):
                if abs(answer - other) * 100 < abs(other):  # equal, or rounded by less than 1 %
                    units = f"{small} and {large}".removeprefix(" and ")
                    return f"{_shown(answer)} for {_shown(truth)}: {factor} apart, {units}"
    return ""


def _rounding(truth: Fraction, answer: Fraction, steps: list[Calculation]) -> str:
    """An unrounded value close to both answer and truth, or a rounded intermediate step."""
    apart = f"{_shown(answer)} for {_shown(truth)}"
    for value in (answer, *(step.value for step in steps)):
        if abs(value - truth) < 1 and abs(value - answer) < 1:
            return f"{apart}: roundings of {_shown(value)}"
    for step in steps:
        if step.verdict == "rounded" and abs(answer - truth) * 100 < abs(truth):
            return f"{apart}: {step.text} is rounded"
    return ""


def _before_the_answer(completion: str) -> str:
    marker = _MARKER.search(completion)
    return completion[: marker.start()] if marker else completion


def _shown(value: Fraction) -> str:
    """A number with up to ten significant digits."""
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.10g}"
