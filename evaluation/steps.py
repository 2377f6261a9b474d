"""Reads the arithmetic steps of a solution and checks each with exact fractions.

A step is an `expression = result`, such as `3 + 4 = 7`, in plain text, in LaTeX, or in GSM8K's
calculator annotations `<<3+4=7>>`. A table of regular expressions turns a text into tokens, each of
a kind that is one character, so that a side of a step is a regular expression over kinds. Python's
own parser reads the sides. Where a step may have another meaning than the one read here (a
variable, a power, `2 hours 30 minutes`), its verdict is "unclear" rather than "wrong".
"""

import ast
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from evaluation.units import ALIASES, convertible

# Limits that no real solution reaches. They keep the time linear and the fractions small.
MAX_CHARACTERS = 10_000  # of a text; 512 tokens are about 2,000 characters
MAX_TOKENS = 48  # of one side
MAX_DIGITS = 20  # of one number

_OPERAND = r"(?=[\s$£€(\[{]*\.?[0-9])"
# The first pattern that matches gives a token its kind. Each repetition is bounded or over one
# class of characters, so matching takes linear time.
_TOKENS = {
    " ": r"<<[^<>\n]{1,200}>>|[^\S\n]|\*\*(?![0-9(])|(?<![0-9)])\*\*|\.\.\.|[$£€&~…\u200b]"
    r"|\\[$,!;]|\\(?:left|right|boxed)\b",  # left out
    "n": r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+",
    ":": r"(?<=[0-9])(?:[.:,](?=[0-9])|,[ ](?=[0-9]{3}(?![0-9])))",  # 6:00; 14, 400
    "*": rf"[×·⋅]|\*(?!\*)|\\times|\\cdot|(?i:x|times|multiplied by){_OPERAND}|x(?=\s+-[0-9.$])",
    "/": rf"[/÷⁄]|\\div|(?i:divided by){_OPERAND}",
    "+": rf"\+|(?i:plus){_OPERAND}",
    "?": r"[=<>!]+[=<>]+|[-=]+>",
    "-": rf"[-–−](?!\s)|(?i:minus){_OPERAND}",  # may be a sign
    "_": r"[-–−]",  # cannot be a sign
    "%": r"\\?%",
    "=": r"[=≈]|\\approx",
    "b": r"\\[()\[\]\\]|[\n.,;:!?\"“”'’`|<>—•#]",  # a break between expressions
    "g": r"(?<=[0-9)}])[(\[]",  # multiplies: 2(3 + 4)
    "(": r"[(\[{]",
    ")": r"[)\]}]",
    "w": r"\\(?:text|textbf|mathrm|mbox)[ ]?\{[^{}\n]{0,100}\}|[^\W\d_]+(?:['’][^\W\d_]+)*|¢",
    "? ": r"\\[A-Za-z]+|.",
}
_KINDS = [kind[0] for kind in _TOKENS]
# Some words have kinds of their own: s ends an expression, d takes what follows, v is a factor.
_WORDS = dict.fromkeys(
    "so then because since as is are was were has have had he she they it or which that if but to"
    " equals".split(), "s",
) | dict.fromkeys("of times by plus minus from over into than".split(), "d") | dict.fromkeys(
    "hundred thousand million billion dozen dozens remainder".split(), "v"
) | {"and": "a", "¢": "w"}  # fmt: skip
_TOKEN = re.compile("|".join(f"({pattern})" for pattern in _TOKENS.values()))
_FRACTION = re.compile(r"\\[dt]?frac ?" + r"\{((?:[^{}\n]|\{[^{}\n]{0,60}\}){1,100})\}" * 2)
_ANNOTATION = re.compile(r"<<([^<>\n]{1,200})>>")
# Over kinds. A unit is up to five words: cups of flour, miles/hour; o is the "of" of `20% of 60`.
_UNIT = "(?:/?[wvdo]){0,5}"
_FACTOR = rf"(?:-?[(g])*-?(?:nn/n|n)%?{_UNIT}(?:\){_UNIT})*"
_SIDE = re.compile(rf"{_FACTOR}(?:(?:[-_+*/o]|(?=g)){_FACTOR})*")
_PIECE = re.compile(r"nn/n%?|n%?|(/?[wvd]|o(?![n(-]))|.")
_SHARE = re.compile(r"(?:%|/\(?n\)*)$")
# What surrounds a step that has no other meaning: few words, and no operator before them.
_CLEAR_BEFORE = re.compile(
    r"(?:^|[b=]|(?:^|b)_|(?:^|[b=n])[wsavdo(]{0,4}[wsa(]|[wsavdo(]{5}[wsa(])(?<!na)$"
)
_CLEAR_AFTER = re.compile(r"$|[b:)=wsvdo]|a(?!n)")
_COMPUTE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
            ast.Div: operator.truediv}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number and how it is written: `1,200.50` is 1200.5 with 2 decimals, `5%` is 1/20."""

    value: Fraction
    decimals: int
    percent: bool


@dataclass(frozen=True)
class Calculation:
    """One `expression = result` in a text."""

    text: str
    start: int  # offset in characters
    code: str  # the side that computes, as Python: n0*(n1+n2)
    numbers: tuple[Number, ...]  # its operands n0, n1, ...
    value: Fraction  # its exact value
    written: Fraction  # the result as the text states it
    verdict: str  # "correct", "rounded", "wrong" or "unclear"


def read_steps(text: str) -> list[Calculation]:
    """Every `expression = result` in `text`, in order, each checked with exact arithmetic.

    An assignment such as `x = 5`, without an operator, is not a step. The verdict is "unclear" if
    the step is not correct as read but may have another meaning. Only the first MAX_CHARACTERS
    characters are read.
    """
    text = text[:MAX_CHARACTERS]
    flat = _FRACTION.sub(lambda m: "{" + f"({m[1]})/({m[2]})}}".rjust(len(m[0]) - 1), text)
    spans = [(0, len(text)), *(match.span(1) for match in _ANNOTATION.finditer(text))]
    steps = [step for span in spans for step in _steps_of(text, _tokens(flat, *span))]
    return sorted(steps, key=lambda step: step.start)


def recompute(step: Calculation, values: Mapping[Fraction, Fraction]) -> Fraction:
    """The value of a step's expression with some of its operands, as they are written, replaced."""
    units = [Fraction(1, 100 if number.percent else 1) for number in step.numbers]
    plain = [number.value / unit for number, unit in zip(step.numbers, units)]
    replaced = [values.get(x, x) * unit for x, unit in zip(plain, units)]
    try:
        return _value(ast.parse(step.code, mode="eval").body, replaced)
    except ZeroDivisionError:
        return step.value


def reasoning_steps(gold: str) -> int:
    """The number of computed steps in a gold solution; GSM8K marks each with `<<...>>`."""
    return sum(1 for _ in _ANNOTATION.finditer(gold))


def operations(gold: str) -> set[str]:
    """Which of + - * / the computed steps of a gold solution use; a sign is not an operation."""
    found = (_longest(_tokens(match[1]), 0) for match in _ANNOTATION.finditer(gold))
    return {symbol for side in found if side for symbol in side.operators}


def numbers_written(text: str) -> set[Fraction]:
    """The numbers that `text` writes in digits, without signs."""
    kinds, matches = _tokens(text)
    return {_number(match[0]) for kind, match in zip(kinds, matches) if kind == "n"}


# From text to tokens, and from tokens to steps.

_Tokens = tuple[str, list[re.Match]]  # their kinds, one character each, and where they are


class _Side(NamedTuple):
    """One side of a step."""

    start: int  # indices of tokens
    end: int
    code: str
    numbers: tuple[Number, ...]
    value: Fraction
    units: set[str]
    unclear: bool

    @property
    def operators(self) -> list[str]:
        return re.findall(r"(?<=[0-9)])[-+*/]", self.code)  # without signs


def _tokens(text: str, start: int = 0, end: int | None = None) -> _Tokens:
    kinds, matches = "", []
    for match in _TOKEN.finditer(text, start, len(text) if end is None else end):
        kind, word = _KINDS[match.lastindex - 1], match[0].lower()
        if kind == "w":
            kind = _WORDS.get(word, "w" if len(word) > 1 else "v")
            if word == "of" and _SHARE.search(kinds, max(0, len(kinds) - 9)):
                kind = "o"
        elif kind == "n" and len(word) > MAX_DIGITS:
            kind = "?"
        if kind != " ":
            kinds += kind
            matches.append(match)
    return kinds, matches


def _steps_of(text: str, tokens: _Tokens) -> Iterator[Calculation]:
    """The steps at each `=`, also in chains such as `a = b = c`."""
    kinds, matches = tokens
    right, named = None, {}  # variable -> the side that computes it, and its text
    for equals in (at for at, kind in enumerate(kinds) if kind == "="):
        if right and right.end == equals:
            left, clear = right, True
        else:
            first = max(kinds.rfind("=", 0, equals) + 1, equals - MAX_TOKENS)
            sides = (_side(tokens, at, equals) for at in range(first, equals))
            left = next(filter(None, sides), None)  # the longest
            at = left.start if left else 0
            clear = _CLEAR_BEFORE.search(kinds, max(0, at - 7), at) is not None
        right = _longest(tokens, equals + 1)
        if left and right and (left.operators or right.operators):
            clear = clear and _CLEAR_AFTER.match(kinds, right.end) is not None
            begin = matches[left.start].start()
            shown = _ANNOTATION.sub("", text[begin : matches[right.end - 1].end()])
            yield _step(left, right, not clear, " ".join(shown.split())[:120], begin)
        elif right and kinds[max(0, equals - 2) : equals] in ("v", "bv"):  # H = 88000/11, H = 8000
            name, begin = matches[equals - 1][0], matches[equals - 1].start()
            shown = " ".join(text[begin : matches[right.end - 1].end()].split())[:120]
            if right.operators:
                named[name] = right, shown
            elif name in named and _CLEAR_AFTER.match(kinds, right.end):
                left, before = named.pop(name)
                yield _step(left, right, False, f"{before}, {shown}", begin)


def _longest(tokens: _Tokens, start: int) -> _Side | None:
    """The longest side that starts at a token."""
    match = _SIDE.match(tokens[0], start, start + MAX_TOKENS)
    ends = range(match.end(), start, -1) if match else ()
    return next(filter(None, (_side(tokens, start, end) for end in ends)), None)


def _side(tokens: _Tokens, start: int, end: int) -> _Side | None:
    """What exactly these tokens compute; None if they are not an expression."""
    kinds, matches = tokens
    if not _SIDE.fullmatch(kinds, start, end):
        return None
    code, numbers, units = "", [], set()
    try:
        for piece in _PIECE.finditer(kinds, start, end):
            kind, words = piece[0], [m[0] for m in matches[piece.start() : piece.end()]]
            if kind[0] == "n":
                value, percent = _number(words[0]), kind[-1] == "%"
                decimals = len(words[0].partition(".")[2])
                if kind.startswith("nn"):  # 1 1/2
                    part = _number(words[1]) / _number(words[3])
                    if decimals or not 0 < part < 1:
                        return None
                    value += part
                code += f"n{len(numbers)}"
                numbers.append(Number(value / (100 if percent else 1), decimals, percent))
                units |= {"percent"} if percent else set()
            elif piece[1]:
                units.add(ALIASES.get(words[-1].lower(), words[-1].lower()))
            else:
                code += {"_": "-", "g": "*(", "o": "*"}.get(kind, kind)
        value = _value(ast.parse(code, mode="eval").body, [number.value for number in numbers])
    except (SyntaxError, ZeroDivisionError):  # unbalanced brackets, for example
        return None
    unclear = re.search("v|o(?![n(-])", kinds[start:end]) is not None  # 3x, 1/3 of the money
    return _Side(start, end, code, tuple(numbers), value, units, unclear)


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _value(node: ast.expr, numbers: Sequence[Fraction]) -> Fraction:
    if isinstance(node, ast.Name):
        return numbers[int(node.id[1:])]
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, numbers)
    return _COMPUTE[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))


def _step(left: _Side, right: _Side, unclear: bool, text: str, start: int) -> Calculation:
    computed, result = (left, right) if left.operators else (right, left)
    verdict = _verdict(computed.value, computed.operators, result)
    if verdict == "wrong" and (
        unclear
        or left.unclear
        or right.unclear
        or computed is right  # 2 quarts = 16 * 2: usually a label, not a sum
        or re.search(r"/n\d+/", computed.code)  # 6 / 1/30
        or _other_units(computed, result)
    ):
        verdict = "unclear"
    written = result.numbers[0].value if result.operators else result.value
    return Calculation(
        text, start, computed.code, computed.numbers, computed.value, written, verdict
    )


def _verdict(value: Fraction, operators: Collection[str], result: _Side) -> str:
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


def _other_units(computed: _Side, result: _Side) -> bool:
    """Whether a step may be correct in other units: 100 - 20 = 80%, 2 * $0.25 = 50 cents."""
    units = computed.units | result.units
    if not units & {"percent", "cent"}:
        return convertible(units)
    others = (computed.value * 100, computed.value / 100)
    return any(_verdict(value, computed.operators, result) != "wrong" for value in others)
