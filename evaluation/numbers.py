r"""Numbers out of generated text, exactly (every value is a `Fraction`) and in linear time.

A number is made of ASCII digits, `, . /`, marks ($ € £ ¥ ¢ %) and a minus (`-` or U+2212):

    18  18.0  18.  $18  $ 18  18$     18; a point that ends a sentence is not part of it
    1,234  1,234,567.89  .5           groups of three, the first of one to three, with no 0 ahead
    -3  -$3  $-3                      a minus touches its number, and nothing before it that
    10-3  x-3  (2)-3                  could be subtracted from: here it is no sign
    1/2  -10/4  1 1/2                 a fraction; a whole, one space, a fraction less than 1
    5%  5 %                           5, the way GSM8K answers "how many percent"

What cannot be one number is the numbers it consists of: `1,23` is 1 and 23, `1/0` is 1 and 0,
`2 4/2` is 2 and 4/2, `1.2.3` is 1, 2 and 3, and so are dates and times. Letters never belong to a
number: `5kg` is 5, `x2` is 2, `1e5` is 1 and 5. Other scripts' digits, `½`, an en dash as a sign,
and runs of more than `MAX_DIGITS` digits are not read; so `int()` is never slow.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100  # in a run; each run of no more digits is in exactly one number
LONGEST = 1000  # characters of a number, and more: a mixed one has three integers of at most 131

# Linear, because each repetition is bounded or over one class of characters, and because the
# lookbehinds let no attempt begin inside a run of digits that an earlier one has given up.
_DIGITS = rf"(?<![0-9])[0-9]{{1,{MAX_DIGITS}}}(?![0-9])"
_GROUPS = r"(?<![0-9])(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3}){1,32}(?!,?[0-9])"
_INTEGER = rf"(?:{_GROUPS}|{_DIGITS})"
_MINUS = r"[-\u2212]"
_SIGN = rf"(?<![\w.)\]}}%$€£¥¢\u2212-]){_MINUS}"

_NUMBER = re.compile(
    rf"""
    (?=[$€£¥\u2212\ -]{{0,4}}\.?[0-9])  # most places in a text fail here, at little cost
    (?P<before> (?:{_SIGN})?[$€£¥]\ ?{_MINUS}? | {_SIGN} )?
    (?: (?<![0-9]/) (?:(?P<whole>{_INTEGER})\ )?
        (?P<top>{_INTEGER}) / (?!0+(?![0-9])) (?P<bottom>{_INTEGER}) (?![./]?[0-9])
      | (?: (?<![0-9]\.)(?P<units>{_INTEGER}) | (?<![\w.]) )
        \. (?P<decimals>[0-9]{{1,{MAX_DIGITS}}}) (?!\.?[0-9])
      | (?P<integer>{_INTEGER})
    )
    (?P<after> \ ?% | [$€£¥¢](?![0-9]) )?
    """,
    re.VERBOSE,
)
# (?!#) only saves time, on long rows of #.
_MARKED = re.compile(rf"####(?!#)[^\w#\n]*(?={_DIGITS})")
_THROUGH_LAST_DIGITS = re.compile(rf"(?s:.*)[0-9](?![0-9])(?<![0-9]{{{MAX_DIGITS + 1}}})")


class FoundNumber(NamedTuple):
    """A number and its place, `text[start:end]`, with sign and marks."""

    value: Fraction
    start: int
    end: int
    has_unit: bool  # it carries $, €, £, ¥, ¢ or %


def numbers_in(text: str) -> list[FoundNumber]:
    """Every number of the text, from left to right."""
    return list(_scan(text, start=0))


def final_number(text: str) -> Fraction | None:
    """The number a completion answers with: `marked_number`, or else `last_number`."""
    marked = marked_number(text)
    return marked if marked is not None else last_number(text)


def marked_number(text: str) -> Fraction | None:
    """The number after the first `####` that has one, so that of an answer and not of a run-on.

    On the same line, and without a letter between: `#### **18**` has one, `#### Step 1` has none.
    """
    marker = _MARKED.search(text)
    return next(_scan(text, marker.start())).value if marker else None


def last_number(text: str) -> Fraction | None:
    """`numbers_in(text)[-1].value`, but only the neighbourhood of the last digits is read."""
    last = _THROUGH_LAST_DIGITS.match(text)
    if last is None:
        return None
    nearby = _scan(text, start=max(0, last.end() - LONGEST))
    return next(number.value for number in nearby if number.end >= last.end())


def _scan(text: str, start: int) -> Iterator[FoundNumber]:
    for match in _NUMBER.finditer(text, start):
        before, whole, top, bottom, units, decimals, integer, after = match.groups(default="")
        sign = -1 if "-" in before or "\u2212" in before else 1
        has_unit = before not in ("", "-", "\u2212")
        if bottom:
            value = Fraction(_integer(top), _integer(bottom))
            if whole and value < 1:
                value += _integer(whole)
            elif whole:  # `2 4/2` is no mixed number
                apart = Fraction(sign * _integer(whole))
                yield FoundNumber(apart, match.start(), match.end("whole"), has_unit)
                yield FoundNumber(value, match.start("top"), match.end(), bool(after))
                continue
        elif decimals:
            value = Fraction(_integer(units + decimals), 10 ** len(decimals))
        else:
            value = Fraction(_integer(integer))
        yield FoundNumber(sign * value, match.start(), match.end(), has_unit or bool(after))


def _integer(digits: str) -> int:
    return int(digits.replace(",", ""))
