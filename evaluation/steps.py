"""Reads the arithmetic steps of a solution and checks each with exact fractions.

A step is an `expression = result`, such as `3 + 4 = 7`, in plain text, in LaTeX, or in GSM8K's
calculator annotations `<<3+4=7>>`. Where a step may have another meaning than the one read here
(a variable, a power, `2 hours 30 minutes`), its verdict is "unclear" rather than "wrong".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from evaluation.units import ALIASES, convertible

# Limits that no real solution reaches. They keep the time linear and the fractions small.
MAX_CHARACTERS = 10_000  # of a text; 512 tokens are about 2,000 characters
MAX_TOKENS = 48  # of one expression
MAX_DIGITS = 20  # of one number


@dataclass(frozen=True)
class Number:
    """A number and how it is written: `1,200.50` is 1200.5 with 2 decimals, `5%` is 1/20."""

    value: Fraction
    decimals: int
    percent: bool


@dataclass(frozen=True)
class Step:
    """One `expression = result` in a text."""

    text: str
    start: int  # offset in characters
    expression: str  # the side that computes
    numbers: tuple[Number, ...]  # its operands
    value: Fraction  # its exact value
    written: Fraction  # the result as the text states it
    verdict: str  # "correct", "rounded", "wrong" or "unclear"


def read_steps(text: str) -> list[Step]:
    """Every `expression = result` in `text`, in order, each checked with exact arithmetic.

    An assignment such as `x = 5`, without an operator, is not a step. The verdict is "unclear" if
    the step is not correct as read but may have another meaning. Only the first MAX_CHARACTERS
    characters are read.
    """
    text = text[:MAX_CHARACTERS]
    steps = list(_steps_of(_tokens(text), text))
    for match in _ANNOTATION.finditer(text):
        steps += _steps_of(_tokens(text, match.start(1), match.end(1)), text)
    return sorted(steps, key=lambda step: step.start)


def recompute(step: Step, values: Mapping[Fraction, Fraction]) -> Fraction:
    """The value of a step's expression with some of its operands replaced."""
    tokens = [token._replace(value=values.get(token.value, token.value))
              for token in _tokens(step.expression)]  # fmt: skip
    read = _Reader(tokens).expression(0)
    return step.value if read is None else read.value


def reasoning_steps(gold: str) -> int:
    """The number of computed steps in a gold solution; GSM8K marks each with `<<...>>`."""
    return sum(1 for _ in _ANNOTATION.finditer(gold))


def operations(gold: str) -> set[str]:
    """Which of + - * / the computed steps of a gold solution use; a sign is not an operation."""
    used = set()
    for match in _ANNOTATION.finditer(gold):
        expression = _Reader(_tokens(match[1])).expression(0)
        used |= set(expression.operators if expression else "")
    return used


def numbers_written(text: str) -> set[Fraction]:
    """The numbers that `text` writes in digits, without signs."""
    return {token.value for token in _tokens(text) if token.kind == "number"}


# From text to tokens, and from tokens to steps.


class _Token(NamedTuple):
    kind: str  # "number", "word", "frac", "break", "?", or one of + - * / % ( ) =
    text: str
    start: int
    end: int
    glued: bool  # no space follows
    value: Fraction = Fraction(0)


@dataclass(frozen=True)
class _Expression:
    """One side of a step."""

    value: Fraction
    numbers: tuple[Number, ...]
    operators: str
    units: frozenset[str]
    unclear: bool
    end: int  # index of the first token after the expression


def _tokens(text: str, start: int = 0, end: int | None = None) -> list[_Token]:
    """The tokens of `text`, without spaces, currency signs, bold marks and annotations."""
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
    """The steps in chains such as `a = b = c`."""
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
                side = (start, left.end) if left.operators else (at + 1, right.end)
                expression = text[tokens[side[0]].start : tokens[side[1] - 1].end]
                step = _step(left, right, unclear, shown, tokens[start].start)
                yield replace(step, expression=expression)
            start, left, unclear = at + 1, right, False
            at = right.end if right else at + 1


def _step(left: _Expression, right: _Expression, unclear: bool, text: str, start: int) -> Step:
    computed, result = (left, right) if left.operators else (right, left)
    verdict = _verdict(computed.value, computed.operators, result)
    if verdict == "wrong" and (
        unclear
        or left.unclear
        or right.unclear
        or computed is right  # 2 quarts = 16 * 2: usually a label, not a sum
        or "//" in computed.operators  # 6 / 1/30
        or _other_units(computed, result)
    ):
        verdict = "unclear"
    return Step(
        text=text,
        start=start,
        expression="",
        numbers=computed.numbers,
        value=computed.value,
        written=result.numbers[0].value if result.operators else result.value,
        verdict=verdict,
    )


def _verdict(value: Fraction, operators: str, result: _Expression) -> str:
    """Compares the computed value of a step with the result written for it.

    correct: equal, or the start of a chain such as `3 * 4 = 12 + 5 = 17`.
    rounded: within half a unit of the last decimal written. After a division, within one unit,
    because full boxes are rounded down and buses up. Where both sides compute, within 1 %, because
    one of them may be an approximation.
    """
    first = result.numbers[0]
    if value == result.value or (result.operators and value == first.value):
        return "correct"
    place = Fraction(1, 10 ** (first.decimals + 2 * first.percent))
    written = first.value if result.operators else result.value  # result.value includes the sign
    gap = abs(value - written)
    if written and (gap < place if "/" in operators else gap <= place / 2):
        return "rounded"
    if result.operators and abs(value - result.value) * 100 < abs(result.value):
        return "rounded"
    return "wrong"


def _other_units(computed: _Expression, result: _Expression) -> bool:
    """Whether a step may be correct in other units: 100 - 20 = 80%, 2 * $0.25 = 50 cents."""
    units = computed.units | result.units
    if not units & {"percent", "cent"}:
        return convertible(units)
    others = (computed.value * 100, computed.value / 100)
    return any(_verdict(value, computed.operators, result) != "wrong" for value in others)


def _unclear_before(tokens: list[_Token], at: int) -> bool:
    """Whether the text before an expression may belong to it, as in `x + 3 * 4`, `half of 3`."""
    before, earlier = _token(tokens, at - 1), _token(tokens, at - 2)
    word = before.text.lower()
    if before.kind == "break" and earlier.kind == "number":
        thousands = word == "," and len(tokens[at].text) == 3  # 14, 400
        return thousands or (word in (".", ":", ",") and before.glued)  # 6:00
    if before.kind == "-" and not before.glued and earlier.kind == "break":
        return False  # a bullet point
    if before.kind == "word" and (word in _BINDING or len(word) == 1):
        return True
    if before.kind == "word" and word == "and" and earlier.kind == "number":
        return True  # 12 x 1 and 1/4
    back = at - 1  # skip the words and brackets of `Ann (7) + Bob (1) + 2`
    while back > at - 6 and _token(tokens, back).kind in ("word", "("):
        back -= 1
    ends = ("break", "=", "word", "(") if back == at - 1 else ("break", "=", "word", "(", "number")
    return _token(tokens, back).kind not in ends


def _unclear_after(tokens: list[_Token], end: int) -> bool:
    """Whether the text after a result may belong to it: `= 5 + x`, `= 2 hours and 30 minutes`."""
    after, later = _token(tokens, end), _token(tokens, end + 1)
    if after.kind == "word":
        return later.kind == "number" and after.text.lower() == "and"
    return after.kind not in ("break", ")", "=")


def _token(tokens: list[_Token], at: int) -> _Token:
    return tokens[at] if 0 <= at < len(tokens) else _Token("break", "\n", 0, 0, False)


class _Reader:
    """Recursive-descent parser for one expression: `2 * (14 books - 4)`, `20% of 60`, `1 1/2 x $3`.

        sum     = product { ("+" | "-") product }
        product = factor { ("*" | "/") factor }
        factor  = "-" factor | ( "(" sum ")" | number | frac group group ) [ unit ]
        group   = "(" sum ")"

    Methods return None where the rule does not match.
    """

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = self.stop = 0
        self.numbers: list[Number] = []
        self.operators: list[str] = []
        self.units: set[str] = set()
        self.unclear = False

    def expression(self, start: int) -> _Expression | None:
        """The longest expression that starts at token `start`."""
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
        """Reads an operator and its operand; None, with the position restored, if that fails."""
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
        """(operator, its length in tokens) at this position; ("", 0) unless an operand follows."""
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
        """Whether "of" means multiplication here: after a percentage or a fraction."""
        return self.numbers[-1].percent or self.operators[-1:] == ["/"]

    def skip_unit(self) -> None:
        """Skips the words after a number: `4 cups of flour`, `60 miles/hour`, `3 a day`."""
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
# Each repetition is bounded or over one character class, so matching takes linear time.
_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")
_TOKEN = re.compile(
    r"""(?P<skip><<[^<>\n]{1,200}>>|[^\S\n]|\*\*(?![0-9(])|(?<![0-9)])\*\*|\.\.\.|[$£€&~…\u200b])
    |(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
    |(?P<word>\\(?:text|textbf|mathrm|mbox)[ ]?\{[^{}\n]{0,100}\}|[^\W\d_]+(?:['’][^\W\d_]+)*|¢)
    |(?P<symbol>\\[A-Za-z]+|\\.|\*\*|[=<>!]+[=<>]+|[-=]+>|\n|.)""",
    re.VERBOSE,
)
