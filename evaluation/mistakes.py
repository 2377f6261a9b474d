"""What went wrong, by kind: a wrong answer is read step by step, with exact arithmetic.

The idea: every `3 + 4 = 7` in a completion, plain, in LaTeX or inside GSM8K's `<<3+4=7>>`, is
evaluated again with fractions. What the reader is not sure of (a variable, a power, 2 hours 30
minutes) it leaves alone, so a slip it could not read counts as a wrong plan, never the reverse.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from evaluation.numbers import final_number, marked_number

# Every completion is of exactly one kind, the first that fits. "correct" and "format only" together
# are the answers that are numerically right. A slip comes before what it may cause, such as an
# answer off by a factor; a factor between two units that are named comes before a foreign number,
# such as the 3600 of that conversion; "wrong plan" is what none of the others explains.
KINDS = {
    "correct": "the right number after ####",
    "format only": "the right number, but not after ####",
    "cut off": "stopped by the token limit before it answered",
    "no answer": "empty, or no number anywhere",
    "arithmetic slip": "a written step whose own arithmetic is wrong",
    "unit or rounding": "off by a conversion between two units that are named, or by rounding",
    "number copied wrong": "a step uses a number that is neither given, computed nor common",
    "wrong plan": "no step is wrong by itself, and still it is not the answer",
}

# (how many, of this, make one of that); "" is anything, so 100 needs nothing but a percent.
TIME = (
    (60, "second", "minute"),
    (3600, "second", "hour"),
    (60, "minute", "hour"),
    (1440, "minute", "day"),
    (24, "hour", "day"),
    (7, "day", "week"),
    (30, "day", "month"),
    (365, "day", "year"),
    (4, "week", "month"),
    (52, "week", "year"),
    (12, "month", "year"),
    (10, "year", "decade"),
    (100, "year", "century"),
)
MONEY = (
    (5, "cent", "nickel"),
    (10, "cent", "dime"),
    (25, "cent", "quarter"),
    (100, "cent", "dollar"),
)
MEASURES = (
    (12, "inch", "foot"),
    (36, "inch", "yard"),
    (3, "foot", "yard"),
    (5280, "foot", "mile"),
    (1760, "yard", "mile"),
    (10, "millimeter", "centimeter"),
    (100, "centimeter", "meter"),
    (1000, "meter", "kilometer"),
    (16, "ounce", "pound"),
    (2000, "pound", "ton"),
    (1000, "milligram", "gram"),
    (1000, "gram", "kilogram"),
    (1000, "milliliter", "liter"),
    (8, "ounce", "cup"),
    (128, "ounce", "gallon"),
    (2, "cup", "pint"),
    (16, "cup", "gallon"),
    (2, "pint", "quart"),
    (8, "pint", "gallon"),
    (4, "quart", "gallon"),
    (12, "", "dozen"),
)
CONVERSIONS = TIME + MONEY + MEASURES + ((100, "", "percent"),)
ALIASES = {  # besides the plural in -s
    "feet": "foot", "ft": "foot", "inches": "inch", "km": "kilometer", "cm": "centimeter",
    "mm": "millimeter", "m": "meter", "metre": "meter", "metres": "meter", "kilo": "kilogram",
    "kg": "kilogram", "g": "gram", "mg": "milligram", "ml": "milliliter", "l": "liter",
    "litre": "liter", "litres": "liter", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "hr": "hour", "hrs": "hour", "hourly": "hour", "min": "minute", "mins": "minute",
    "sec": "second", "secs": "second", "daily": "day", "weekly": "week",
    "monthly": "month", "yearly": "year", "annual": "year", "annually": "year",
    "centuries": "century", "$": "dollar", "¢": "cent", "penny": "cent", "pennies": "cent",
    "%": "percent", "percentage": "percent",
}  # fmt: skip
ALIASES |= {f"{unit}s": unit for _, *pair in CONVERSIONS for unit in pair if unit}
ALIASES |= {"second": "2nd", "quarters": "quarters"}  # rarely 1/60 of a minute, or a coin

# What a problem holds, by the words in it; # is a number, two words are neighbours.
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
TOPICS["money"] -= {"quarter"}  # far more often a fourth of something

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

# Bounds that no honest text meets; they keep the time linear and the fractions small.
MAX_CHARACTERS = 10_000  # read of a completion; 512 tokens are about 2,000
MAX_STEPS = 100  # searched for a foreign number
MAX_TOKENS = 48  # of one expression
MAX_DIGITS = 20  # of one number


@dataclass(frozen=True)
class Mistake:
    """kind: one of KINDS. evidence: what it was read from, "" where the kind says it all."""

    kind: str
    evidence: str = ""


@dataclass(frozen=True)
class Number:
    """A number as it was written: `1,200.50` is 1200.5 with 2 decimals, `5%` is 1/20."""

    value: Fraction
    decimals: int
    percent: bool


@dataclass(frozen=True)
class Step:
    """One `expression = result` of a text."""

    text: str
    start: int  # in characters
    numbers: tuple[Number, ...]  # of the side that computes
    value: Fraction  # what that side comes to, exactly
    written: Fraction  # what the text says it comes to
    verdict: str  # "right", "rounded", "wrong", "unclear"


def classify(
    question: str, gold: str, completion: str, *, cut_off: bool = False, empty: bool = False
) -> Mistake:
    """The one kind of KINDS that a completion is of; gold is a solution that ends in `#### N`.

    cut_off: generation stopped at its token limit. empty: nothing was generated. Any text gets a
    kind, without an exception and in time linear in it.
    """
    truth, answer = final_number(gold), final_number(completion)
    marked = marked_number(completion)
    if marked is not None and marked == truth:
        return Mistake("correct")
    if answer is not None and answer == truth:
        return Mistake("format only", f"{_shown(answer)} without ####")
    if cut_off and marked is None:
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
    evidence = _foreign_number(question, steps)
    if evidence:
        return Mistake("number copied wrong", evidence)
    return Mistake("wrong plan")


def read_steps(text: str) -> list[Step]:
    """Every `expression = result` of the text, in its order, each judged by exact arithmetic.

    Plain text, LaTeX and `<<...>>` alike; a bare `x = 5` is no step. A verdict is "unclear" where
    the step is not right as read and may have been meant otherwise. Only the first MAX_CHARACTERS
    are read.
    """
    text = text[:MAX_CHARACTERS]
    steps = list(_steps_of(_tokens(text), text))
    for match in _ANNOTATION.finditer(text):
        steps += _steps_of(_tokens(text, match.start(1), match.end(1)), text)
    return sorted(steps, key=lambda step: step.start)


def reasoning_steps(gold: str) -> int:
    """How many computed steps a gold solution has: GSM8K marks each with `<<...>>`."""
    return sum(1 for _ in _ANNOTATION.finditer(gold))


def operations(gold: str) -> set[str]:
    """Which of + - * / the computed steps of a gold solution use; a sign is no operation."""
    used = set()
    for match in _ANNOTATION.finditer(gold):
        expression = _Reader(_tokens(match[1])).expression(0)
        used |= set(expression.operators if expression else "")
    return used


def topics(question: str) -> set[str]:
    """Which TOPICS a question holds; two units of one kind, hours and minutes, are a conversion."""
    words = _words(question)
    found = set(words) | {f"{one} {two}" for one, two in zip(words, words[1:], strict=False)}
    held = {topic for topic, table in TOPICS.items() if found & table}
    if _convertible(found):
        held.add("units and conversions")
    return held


# Why an answer is wrong, beyond a slip: each gives its evidence, or "".


def _conversion(texts: str, truth: Fraction, answer: Fraction) -> str:
    """The conversion between two units named in the texts by which answer and truth are apart."""
    named = set(_words(texts)) | {""}
    for factor, small, large in CONVERSIONS:
        if small in named and large in named:
            for other in (truth * factor, truth / factor):
                if abs(answer - other) * 100 < abs(other):  # the same, or rounded by under 1 %
                    units = f"{small} and {large}".removeprefix(" and ")
                    return f"{_shown(answer)} for {_shown(truth)}: {factor} apart, {units}"
    return ""


def _rounding(truth: Fraction, answer: Fraction, steps: list[Step]) -> str:
    """The unrounded value that answer and truth are both next to, or a step rounded on the way."""
    apart = f"{_shown(answer)} for {_shown(truth)}"
    for value in (answer, *(step.value for step in steps)):
        if abs(value - truth) < 1 and abs(value - answer) < 1:
            return f"{apart}: roundings of {_shown(value)}"
    for step in steps:
        if step.verdict == "rounded" and abs(answer - truth) * 100 < abs(truth):
            return f"{apart}: {step.text} is rounded"
    return ""


def _foreign_number(question: str, steps: list[Step]) -> str:
    """The first operand that is not in the question, not computed before and not COMMON."""
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
    """The numbers of a question in digits and words, and the forms a solution puts them in.

    3 also as 1/3; 20% also as 0.2, 0.8, 1.2, 80 and 120; 2 hours as 120 where minutes are named.
    """
    words = _words(question)
    digits = {token.value for token in _tokens(question) if token.kind == "number"}
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


def _convertible(words: set[str]) -> bool:
    return any(small in words and large in words for _, small, large in CONVERSIONS)


def _words(text: str) -> list[str]:
    """Lower-case words, one name for each unit, "#" for a number, "#/#" for a fraction."""
    words = []
    for match in _WORD.finditer(text.lower()):
        word = match[0].replace("’", "'")
        if word[0] in "0123456789":
            word = "#/#" if "/" in word else "#"
        words.append(ALIASES.get(word, word))
    return words


def _before_the_answer(completion: str) -> str:
    marker = _MARKER.search(completion)
    return completion[: marker.start()] if marker else completion


def _shown(value: Fraction) -> str:
    """A number for a person, to ten significant digits."""
    return f"{Decimal(value.numerator) / Decimal(value.denominator):.10g}"


# From text to steps.


class _Token(NamedTuple):
    kind: str  # "number", "word", "frac", "break", "?", or one of + - * / % ( ) =
    text: str
    start: int
    end: int
    glued: bool  # something other than space follows at once
    value: Fraction = Fraction(0)


@dataclass(frozen=True)
class _Expression:
    """One side of a step."""

    value: Fraction
    numbers: tuple[Number, ...]
    operators: str
    units: frozenset[str]
    unclear: bool
    end: int  # the index of the first token after it


def _tokens(text: str, start: int = 0, end: int | None = None) -> list[_Token]:
    """The text in tokens; spaces, currency signs, bold marks and annotations are left out."""
    tokens = []
    for match in _TOKEN.finditer(text, start, len(text) if end is None else end):
        kind, word, value = match.lastgroup, match[0], Fraction(0)
        if kind == "symbol":
            kind = _SYMBOLS.get(word, "?")
        elif kind == "number" and len(word) > MAX_DIGITS:
            kind = "?"
        elif kind == "number":
            value = Fraction(word.replace(",", ""))
        if kind != "skip":
            glued = not text[match.end() : match.end() + 1].isspace()
            tokens.append(_Token(kind, word, match.start(), match.end(), glued, value))
    return tokens


def _steps_of(tokens: list[_Token], text: str) -> Iterator[Step]:
    """The steps of the chains `a = b = c` among the tokens."""
    at = 0
    while at < len(tokens):
        start, left = at, _Reader(tokens).expression(at)
        at = left.end if left else at + 1
        unclear = left is not None and _unclear_before(tokens, start)
        while left and at < len(tokens) and tokens[at].kind == "=":
            right = _Reader(tokens).expression(at + 1)
            if right and (left.operators or right.operators):
                shown = text[tokens[start].start : tokens[right.end - 1].end]
                shown = " ".join(_ANNOTATION.sub("", shown).split())[:120]
                unclear = unclear or _unclear_after(tokens, right.end)
                yield _step(left, right, unclear, shown, tokens[start].start)
            start, left, unclear = at + 1, right, False
            at = right.end if right else at + 1


def _step(left: _Expression, right: _Expression, unclear: bool, text: str, start: int) -> Step:
    computed, result = (left, right) if left.operators else (right, left)
    verdict = _verdict(computed.value, computed.operators, result)
    if verdict == "wrong" and (
        unclear
        or left.unclear
        or right.unclear
        or computed is right  # 2 quarts = 16 * 2: more often a label than a sum
        or "//" in computed.operators  # 6 / 1/30
        or _other_units(computed, result)
    ):
        verdict = "unclear"
    return Step(
        text=text,
        start=start,
        numbers=computed.numbers,
        value=computed.value,
        written=result.numbers[0].value if result.operators else result.value,
        verdict=verdict,
    )


def _verdict(value: Fraction, operators: str, result: _Expression) -> str:
    """What a computed value says of the result that was written for it.

    right: equal, or run on as in `3 * 4 = 12 + 5 = 17`. rounded: within half a unit of the last
    place written; after a division within a whole one, for full boxes are counted down and buses
    up; where both sides compute, within 1 %, one of them being an approximation.
    """
    first = result.numbers[0]
    if value == result.value or (result.operators and value == first.value):
        return "right"
    place = Fraction(1, 10 ** (first.decimals + 2 * first.percent))
    written = first.value if result.operators else result.value  # the latter has its sign
    gap = abs(value - written)
    if written and (gap < place if "/" in operators else gap <= place / 2):
        return "rounded"
    if result.operators and abs(value - result.value) * 100 < abs(result.value):
        return "rounded"
    return "wrong"


def _other_units(computed: _Expression, result: _Expression) -> bool:
    """Whether a step may hold once units are minded: 100 - 20 = 80%, 2 * $0.25 = 50 cents."""
    units = computed.units | result.units
    if not units & {"percent", "cent"}:
        return _convertible(units)
    others = (computed.value * 100, computed.value / 100)
    return any(_verdict(value, computed.operators, result) != "wrong" for value in others)


def _unclear_before(tokens: list[_Token], at: int) -> bool:
    """Whether what stands before an expression may belong to it, as in `x + 3 * 4`, `half of 3`."""
    before, earlier = _token(tokens, at - 1), _token(tokens, at - 2)
    word = before.text.lower()
    if before.kind == "break" and earlier.kind == "number":
        thousands = word == "," and len(tokens[at].text) == 3  # 14, 400
        return thousands or (word in (".", ":", ",") and before.glued)  # 6:00
    if before.kind == "-" and not before.glued and earlier.kind == "break":
        return False  # a bullet
    if before.kind == "word" and (word in _BINDING or len(word) == 1):
        return True
    if before.kind == "word" and word == "and" and earlier.kind == "number":
        return True  # 12 x 1 and 1/4
    back = at - 1  # before the words and brackets of `Ann (7) + Bob (1) + 2`
    while back > at - 6 and _token(tokens, back).kind in ("word", "("):
        back -= 1
    ends = ("break", "=", "word", "(") if back == at - 1 else ("break", "=", "word", "(", "number")
    return _token(tokens, back).kind not in ends


def _unclear_after(tokens: list[_Token], end: int) -> bool:
    """Whether what follows a result may belong to it: `= 5 + x`, `= 2 hours and 30 minutes`."""
    after, later = _token(tokens, end), _token(tokens, end + 1)
    if after.kind == "word":
        return later.kind == "number" and after.text.lower() == "and"
    return after.kind not in ("break", ")", "=")


def _token(tokens: list[_Token], at: int) -> _Token:
    return tokens[at] if 0 <= at < len(tokens) else _Token("break", "\n", 0, 0, False)


class _Reader:
    """Recursive descent over one expression: `2 * (14 books - 4)`, `20% of 60`, `1 1/2 x $3`.

    sum = product {+ product}; product = factor {* factor}; factor = -factor, (sum), a number or
    LaTeX's frac, then the words of its unit. None means that nothing could be read.
    """

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = self.stop = 0
        self.numbers: list[Number] = []
        self.operators: list[str] = []
        self.units: set[str] = set()
        self.unclear = False

    def expression(self, start: int) -> _Expression | None:
        """The longest expression that starts at a token."""
        self.at, self.stop = start, min(len(self.tokens), start + MAX_TOKENS)
        value = self.sum() if self.kind() in ("number", "(", "frac", "-") else None
        if value is None:
            return None
        return _Expression(
            value=value,
            numbers=tuple(self.numbers),
            operators="".join(self.operators),
            units=frozenset(self.units),
            unclear=self.unclear,
            end=self.at,
        )

    def sum(self) -> Fraction | None:
        value = self.product()
        while value is not None and (ahead := self.operator())[0] in ("+", "-"):
            term = self.operand(*ahead, self.product)
            if term is None:
                break
            value = value + term if ahead[0] == "+" else value - term
        return value

    def product(self) -> Fraction | None:
        value = self.factor()
        while value is not None and (ahead := self.operator())[0] in ("*", "/"):
            factor = self.operand(*ahead, self.factor)
            if factor is None or (ahead[0] == "/" and factor == 0):
                return value if factor is None else None
            value = value * factor if ahead[0] == "*" else value / factor
        return value

    def operand(self, operator: str, width: int, read: Callable) -> Fraction | None:
        """What follows an operator; None, and nothing has happened, where it cannot be read."""
        at, numbers, operators = self.at, len(self.numbers), len(self.operators)
        self.at += width
        self.operators.append(operator)
        value = read()
        if value is None:
            self.at = at
            del self.numbers[numbers:], self.operators[operators:]
        return value

    def factor(self) -> Fraction | None:
        value = None
        if self.kind() == "-" and self.kind(1) != "-" and self.here().glued:
            self.at += 1
            value = self.factor()
            return None if value is None else -value
        if self.kind() == "number":
            value = self.number()
        elif self.kind() == "(":
            value = self.group()
        elif self.kind() == "frac":
            self.at += 1
            top = self.group()
            bottom = None if top is None else self.group()
            value = top / bottom if bottom else None
            self.operators.append("/")
        if value is not None:
            self.skip_unit()
        return value

    def group(self) -> Fraction | None:
        if self.kind() != "(":
            return None
        self.at += 1
        value = self.sum()
        self.at += 1
        return value if value is not None and self.kind(-1) == ")" else None

    def number(self) -> Fraction:
        token = self.here()
        value, decimals = token.value, len(token.text.partition(".")[2])
        self.at += 1
        if not decimals and [self.kind(i) for i in range(3)] == ["number", "/", "number"]:
            top, bottom = self.here().value, self.here(2).value
            if 0 < top < bottom:  # 1 1/2
                value += top / bottom
                self.at += 3
        percent = self.kind() == "%"
        if percent:
            value /= 100
            self.at += 1
            self.units.add("percent")
        self.numbers.append(Number(value, decimals, percent))
        return value

    def operator(self) -> tuple[str, int]:
        """The operator here and how many tokens it takes; ("", 0) unless an operand follows it."""
        kind, width, variable = self.kind(), 1, False
        if kind == "word":
            word = self.here().text.lower()
            kind = _WORD_OPERATORS.get(word, "")
            variable = self.here().glued  # the x of 3x-4
            if word in ("multiplied", "divided"):
                width = 2
                kind = kind if self.here(1).text.lower() == "by" else ""
            if word == "of" and not self.share():
                kind = ""
        elif kind == "(" and self.here(-1).glued and self.kind(-1) in ("number", ")"):
            kind, width = "*", 0  # 2(3 + 4)
        if kind not in ("+", "-", "*", "/"):
            return "", 0
        signed = self.kind(width) == "-" and self.here(width).glued and not variable
        operand = self.kind(width + signed)
        return (kind, width) if operand in ("number", "(", "frac") else ("", 0)

    def share(self) -> bool:
        """Whether "of" means times here: after 20% and 1/2."""
        return self.numbers[-1].percent or self.operators[-1:] == ["/"]

    def skip_unit(self) -> None:
        """Step over the words after a number: `4 cups of flour`, `60 miles/hour`, `3 a day`."""
        for _ in range(5):
            slash = self.kind() == "/" and self.kind(1) == "word"
            word = self.here(slash).text.lower()
            if self.kind(slash) != "word" or word in _STOPS or self.operator()[0]:
                return
            self.unclear |= len(word) == 1 or word in _SCALES  # 3x, 2 million
            self.unclear |= word == "of" and self.share()  # 1/3 of the money
            self.units.add(ALIASES.get(word, word))
            self.at += 1 + slash

    def here(self, ahead: int = 0) -> _Token:
        return _token(self.tokens, self.at + ahead)

    def kind(self, ahead: int = 0) -> str:
        return self.here(ahead).kind if self.at + ahead < self.stop else "break"


_WORD_OPERATORS = {
    "x": "*", "times": "*", "multiplied": "*", "of": "*", "divided": "/", "plus": "+", "minus": "-",
}  # fmt: skip
_STOPS = {
    "and", "so", "then", "because", "since", "as", "is", "are", "was", "were", "has", "have", "had",
    "he", "she", "they", "it", "or", "which", "that", "if", "but", "to", "equals",
}  # fmt: skip
_BINDING = {"of", "times", "by", "plus", "minus", "from", "over", "into", "than"}
_SCALES = {"hundred", "thousand", "million", "billion", "dozen", "dozens", "remainder"}
_SYMBOLS = {
    "+": "+", "-": "-", "–": "-", "−": "-", "*": "*", "×": "*", "·": "*", "⋅": "*", "/": "/",
    "÷": "/", "⁄": "/", "%": "%", "=": "=", "≈": "=", "(": "(", "[": "(", "{": "(", ")": ")",
    "]": ")", "}": ")", r"\times": "*", r"\cdot": "*", r"\div": "/", r"\frac": "frac",
    r"\dfrac": "frac", r"\tfrac": "frac", r"\approx": "=", r"\%": "%", r"\$": "skip",
    r"\,": "skip", r"\!": "skip", r"\;": "skip", r"\left": "skip", r"\right": "skip",
    r"\boxed": "skip", r"\(": "break", r"\)": "break", r"\[": "break", r"\]": "break",
    r"\\": "break",
} | dict.fromkeys("\n.,;:!?\"“”'’`|<>—•#", "break")  # fmt: skip
# Every repetition is bounded or over one class of characters, so each pattern is linear.
_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")
_MARKER = re.compile(r"####[^\w\n#]*[0-9]")
_WORD = re.compile(r"[0-9]+/[0-9]+|[0-9][0-9,.]*|[ap]\.m\b|[^\W\d_]+(?:['’][^\W\d_]+)*|[$%¢€£]")
_TOKEN = re.compile(
    r"""(?P<skip><<[^<>\n]{1,200}>>|[^\S\n]|\*\*(?![0-9(])|(?<![0-9)])\*\*|\.\.\.|[$£€&~…\u200b])
    |(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
    |(?P<word>\\(?:text|textbf|mathrm|mbox)[ ]?\{[^{}\n]{0,100}\}|[^\W\d_]+(?:['’][^\W\d_]+)*|¢)
    |(?P<symbol>\\[A-Za-z]+|\\.|\*\*|[=<>!]+[=<>]+|[-=]+>|\n|.)""",
    re.VERBOSE,
)
