r"""Reads the numerals in generated text, exactly (as `Fraction`) and in linear time.

A numeral consists of ASCII digits, `, . /`, marks ($ € £ ¥ ¢ %) and a minus (`-` or U+2212):

    18  18.0  18.  $18  $ 18  18$     18; a period at the end of a sentence is not part of it
    1,234  1,234,567.89  .5           groups of three digits, without a leading 0
    -3  -$3  $-3                      a sign touches its number
    10-3  x-3  (2)-3                  after a number, letter or bracket, a minus is not a sign
    1/2  -10/4  1 1/2                 a fraction, or a whole number, one space, a proper fraction
    5%  5 %                           5, as GSM8K answers "how many percent"

A text that is not one number is read as several: `1,23` is 1 and 23, `1/0` is 1 and 0, `2 4/2` is 2
and 4/2, `1.2.3` is 1, 2 and 3; dates and times likewise. Letters never belong to a number: `5kg` is
5, `x2` is 2, `1e5` is 1 and 5. Digits of other scripts, `½`, an en dash as a sign, and runs of more
than `MAX_DIGITS` digits are not read. This limit keeps `int()` fast.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100  # in a run; every run up to this length is part of exactly one number

# Matching takes linear time, because each repetition is bounded or over one character class, and
# because the lookbehinds allow no attempt to start within a run of digits that has failed before.
_DIGITS = rf"(?<![0-9])[0-9]{{1,{MAX_DIGITS}}}(?![0-9])"
_GROUPS = r"(?<![0-9])(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3}){1,32}(?!,?[0-9])"
_INTEGER = rf"(?:{_GROUPS}|{_DIGITS})"
_MINUS = r"[-\u2212]"
_SIGN = rf"(?<![\w.)\]}}%$€£¥¢\u2212-]){_MINUS}"

_NUMBER = re.compile(
    rf"""
    (?=[$€£¥\u2212\ -]{{0,4}}\.?[0-9])  # most positions fail here, quickly
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


class FoundNumber(NamedTuple):
    """A number, and its position `text[start:end]` including sign and marks."""

    value: Fraction
    start: int
    end: int
    has_unit: bool  # it carries $, €, £, ¥, ¢ or %


def numbers_in(text: str) -> list[FoundNumber]:
    """All numbers in `text`, from left to right."""
    return list(_scan(text))


def _scan(text: str) -> Iterator[FoundNumber]:
    for match in _NUMBER.finditer(text):
        before, whole, top, bottom, units, decimals, integer, after = match.groups(default="")
        sign = -1 if "-" in before or "\u2212" in before else 1
        has_unit = before not in ("", "-", "\u2212")
        if bottom:
            value = Fraction(_integer(top), _integer(bottom))
            if whole and value < 1:
                value += _integer(whole)
            elif whole:  # `2 4/2` is not a mixed number
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
