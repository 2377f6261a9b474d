"""Classifies the mistake in a wrong answer, by reading its arithmetic steps (`steps.py`).

Steps that cannot be read with confidence are skipped. A slip in such a step is therefore counted as
a wrong plan, but a correct step is never counted as a slip.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from evaluation.golds import gold_value
from evaluation.numbers import marked_readings, readings
from evaluation.steps import MAX_CHARACTERS, Step, numbers_written, read_steps
from evaluation.units import CONVERSIONS, MEASURES, MONEY, TIME, convertible, words_of

# Each completion gets the first kind that applies. "correct" and "format only" together are the
# numerically correct answers. The order matters: a slip can make an answer wrong by a factor, so
# slips come first; a unit conversion can introduce a number such as 3600, so conversions come
# before "number copied wrong". "wrong plan" is the remainder.
KINDS = {
    "correct": "the correct number after ####",
    "format only": "the correct number, but not after ####",
    "cut off": "stopped by the token limit before an answer",
    "no answer": "empty, or without any number",
    "arithmetic slip": "a step whose own arithmetic is wrong",
    "unit or rounding": "off by rounding, or by a conversion between two units mentioned",
    "number copied wrong": "a step uses a number that is not given, computed or common",
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

COMMON = {Fraction(n) for n in ("0", "1", "2", "0.5", "0.25", "0.75", "0.1", "0.01", "10000")} | {
    Fraction(factor) for factor, _, _ in CONVERSIONS
}
NUMBER_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
    "hundred": 100, "thousand": 1000, "million": 10**6, "half": 2, "third": 3, "fourth": 4,
    "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
    "double": 2, "triple": 3, "thrice": 3, "quadruple": 4, "weekday": 5,
}  # fmt: skip

MAX_STEPS = 100  # of a solution, searched for unknown numbers
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
    steps = read_steps(written)
    for step in steps:
        if step.verdict == "wrong":
            return Mistake("arithmetic slip", f"{step.text}: it is {_shown(step.value)}")
    evidence = ""
    if truth is not None:
        evidence = _conversion(f"{question}\n{gold}\n{written}", truth, answer)
        evidence = evidence or _rounding(truth, answer, steps)
    if evidence:
        return Mistake("unit or rounding", evidence)
    evidence = _unknown_number(question, steps)
    if evidence:
        return Mistake("number copied wrong", evidence)
    return Mistake("wrong plan")


def topics(question: str) -> set[str]:
    """Which TOPICS a question has; two units of the same kind count as a conversion."""
    words = words_of(question)
    found = set(words) | {f"{one} {two}" for one, two in zip(words, words[1:], strict=False)}
    present = {topic for topic, table in TOPICS.items() if found & table}
    if convertible(found):
        present.add("units and conversions")
    return present


# Each of the following returns the evidence for a kind of mistake, or "".


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


def _rounding(truth: Fraction, answer: Fraction, steps: list[Step]) -> str:
    """An unrounded value close to both answer and truth, or a rounded intermediate step."""
    apart = f"{_shown(answer)} for {_shown(truth)}"
    for value in (answer, *(step.value for step in steps)):
        if abs(value - truth) < 1 and abs(value - answer) < 1:
            return f"{apart}: roundings of {_shown(value)}"
    for step in steps:
        if step.verdict == "rounded" and abs(answer - truth) * 100 < abs(truth):
            return f"{apart}: {step.text} is rounded"
    return ""


def _unknown_number(question: str, steps: list[Step]) -> str:
    """The first operand that is not in the question, not computed earlier and not COMMON."""
    known = _given(question[:MAX_CHARACTERS]) | COMMON
    unrounded = []
    for step in steps[:MAX_STEPS]:
        for number in step.numbers:
            plain = number.value * 100 if number.percent else number.value
            if number.value in known or plain in known:
                continue
            place = Fraction(1, 10**number.decimals)
            if not any(abs(value - plain) < place for value in unrounded):
                return f"{_shown(plain)} in {step.text}"
        known |= {step.value, step.written}
        if step.value.denominator != 1:
            unrounded.append(step.value)
    return ""


def _given(question: str) -> set[Fraction]:
    """The numbers in a question, in digits or words, and the forms in which a solution uses them.

    3 may be used as 1/3; 20% as 0.2, 0.8, 1.2, 80 or 120; 2 hours as 120 if minutes are mentioned.
    """
    words = words_of(question)
    digits = numbers_written(question)
    spelled = [NUMBER_WORDS.get(w) or NUMBER_WORDS.get(w.removesuffix("s"), 0) for w in words]
    given = digits | {Fraction(n) for n in spelled}
    for one, two in zip(spelled, spelled[1:], strict=False):
        if one and two:  # twenty five, two hundred
            given |= {Fraction(one + two), Fraction(one * two)}
    forms = {1 / n for n in given if n}
    if "percent" in words:
        for n in digits:
            forms |= {n / 100, 1 - n / 100, 1 + n / 100, 100 - n, 100 + n}
    named = set(words)
    for factor, small, large in CONVERSIONS:
        if small in named and large in named:
            forms |= {n * factor for n in given} | {n / factor for n in given}
    return given | forms


def _before_the_answer(completion: str) -> str:
    marker = _MARKER.search(completion)
    return completion[: marker.start()] if marker else completion


def _shown(value: Fraction) -> str:
    """A number with up to ten significant digits."""
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.10g}"
