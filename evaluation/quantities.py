r"""Reads quantities: numerals, number words, and what multiplies or joins them.

    18  $1,234.50  -3  1 1/2  5%        as `numerals.py` reads them
    1e3  1.5e6  2 × 10^3  2^10          powers
    1.5 million  5k  2 dozen  3万       a scale; 2 dozen is 24, or 2 where dozens are asked for
    four  twenty-five  two hundred and five  two and a half  three quarters  a dozen
    四十二  两百零五                      Chinese numerals; full-width digits are digits
    18 dollars and 50 cents  $18 and 50 cents        18.5, or 1850 where cents are asked for
    2 hours 30 minutes  5 feet 6 inches              2.5, or 150 where minutes are asked for
    1.234 euros                         1.234, or 1234 where the point groups thousands
    5:00  2:30                          5; a time between full hours is no number

A quantity that is right in several units has several readings. `plain` turns LaTeX and other
typesetting into the characters that are read here. Everything takes linear time.
"""

import re
from bisect import bisect_right
from fractions import Fraction
from typing import NamedTuple

from evaluation.numerals import numbers_in
from evaluation.units import CONVERSIONS, words_of

_CHARACTERS = {
    **{0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)},  # full-width forms
    **dict.fromkeys(map(ord, "\u00a0\u2009\u202f\u2007\u3000"), " "),
    **{zero + n: str(n) for zero in (0x660, 0x6F0, 0x966) for n in range(10)},  # Arabic, Hindi
    **dict.fromkeys(map(ord, "–\u2212"), "-"), ord("￥"): "¥",
    **{ord(c): f"^{n}" for c, n in (("²", 2), ("³", 3))},
    **{ord(c): f" {top}/{bottom} " for c, top, bottom in (
        ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5),
        ("⅗", 3, 5), ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8),
        ("⅞", 7, 8),
    )},
    ord("⁄"): "/", ord("≈"): "=", ord("·"): "*", ord("×"): "*", ord("÷"): "/", ord("。"): ". ",
}  # fmt: skip
_LATEX = [(re.compile(pattern), text) for pattern, text in (
    (r"\\!|\\left(?![a-z])|\\right(?![a-z])|\{\}|\\displaystyle", ""),
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|\{,\}", ","),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed|fbox|bm) ?\{", " {"),
    (r"\\[dt]?frac ?\{ ?(-?)([0-9.,]{1,30}) ?\} ?\{ ?([0-9.,]{1,30}) ?\}", r" \1\2/\3 "),
    (r"\\[dt]?frac ?([0-9])([0-9])", r" \1/\2 "),
    (r"\\([$%#&])", r"\1"),
    (r"\\(?:times|cdot)(?![a-z])", "*"),
    (r"\\div(?![a-z])", "/"),
    (r"\\(?:approx|equiv|implies|rightarrow|to)(?![a-z])", "="),
    (r"\\[()\[\],;: ]|\\quad|\\qquad|\^ ?\{?\\circ\}?|(?<![0-9])\*\*|\*\*(?![0-9])|__|`", " "),
    (r"(?<=[0-9])\*\*(?=[0-9])", "^"),
    (r"(?<=-) +(?=[0-9]{1,9}/[0-9])", ""),
)]  # fmt: skip
_TYPESET = frozenset("\\*{_`")
_GROUPS = r"(?<![0-9.,])[1-9][0-9]{0,2}"
_ALWAYS = [(re.compile(pattern), text) for pattern, text in (
    (r"(?<=[0-9])[_'’](?=[0-9]{3}(?![0-9]))", ","),  # 1_000, 1'000
    (r"(?<=[a-zA-Z}])\^\{?[0-9]\}?|(?<=\bcm|\bkm|\bft)[23]\b|:\.[0-9]f\b", ""),  # cm^2
    # 1.234,56 and 1.234.567 and 4,50 €: a comma is the decimal point
    (_GROUPS + r"(?:\.[0-9]{3}){1,6},[0-9]{2}(?![0-9])", "swap"),
    (_GROUPS + r"(?:\.[0-9]{3}){2,6}(?![0-9.,])", "swap"),
    (r"(?<![0-9.,])[0-9]{1,6},[0-9]{2}(?= ?€)", "swap"),
    (r"(?<=€)[0-9]{1,6},[0-9]{2}(?![0-9,])", "swap"),
    # 1 234 567 and 12 000: groups of three digits that are not numbers of their own
    (_GROUPS + r"(?:(?: [0-9]{3}){2,6}| 000)(?!,?[0-9]| ?/)", "join"),
)]  # fmt: skip
_REWRITE = {
    "swap": lambda match: match[0].translate({ord("."): ",", ord(","): "."}),
    "join": lambda match: match[0].replace(" ", ""),
}

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: n for n, word in enumerate(_ONES)} | {w: 10 * n for n, w in enumerate(_TENS, 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES_AFTER_NUMERALS = {
    **SCALES, **{f"{word}s": n for word, n in SCALES.items()}, "dozen": 12, "dozens": 12,
    "k": 1000, "mn": 10**6, "bn": 10**9, "千": 1000, "万": 10**4, "百万": 10**6, "亿": 10**8,
}  # fmt: skip
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4,
    "fourths": 4, "fifth": 5, "fifths": 5, "tenth": 10, "tenths": 10,
}  # fmt: skip
_WORD = "|".join(sorted([*WORDS, *SCALES, "dozen"], key=len, reverse=True))
_NOT_ONE = re.compile(  # "one" as a pronoun, before and after it
    r"(?i:\b(?:the|no|any|each|every|this|that|which|another|other|some|last|next|and|by)\s$)",
)
_ONE_OF = re.compile(r"(?i: (?:of|way|by|can|day|who|another|is|has)\b)")
_IN_WORDS = re.compile(
    rf"(?<![\w-])(?:(?:a|an) (?=(?:{'|'.join(SCALES)}|dozen)\b))?"
    rf"((?:{_WORD})(?:(?:[ -]|(?<=hundred) and |(?<=thousand) and )(?:{_WORD})){{0,30}})(?!\w)"
    rf"( and a half(?!\w)|[ -](?:{'|'.join(_PARTS)})(?!\w))?",
    re.IGNORECASE,
)
_CHINESE = re.compile("[零〇一二两三四五六七八九十百千万亿]{1,30}")
_CHINESE_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}

_CHINESE_SHARE = re.compile(rf"({_CHINESE.pattern})分之({_CHINESE.pattern})")
_NEGATIVE = re.compile(r"(?i:\bnegative |(?<![\w)]\s)\bminus )$")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,2})(?![\w.])")
_TIMES_POWER = re.compile(r" ?[*x] ?10 ?\^ ?\{?(-?[0-9]{1,2})\}?(?![0-9])")
_POWER = re.compile(r"\^\{?([0-9]{1,2})\}?(?![0-9])")
_MILLIONS = re.compile(r"M(?![a-zA-Z])")
_SCALE = re.compile(
    rf" ?-?({'|'.join(sorted(_SCALES_AFTER_NUMERALS, key=len, reverse=True))})(?![a-zA-Z])",
    re.IGNORECASE,
)
_CLOCK = re.compile(r":([0-5][0-9])(?::[0-5][0-9])?(?![0-9:])")
_EUROS = re.compile(r" ?(?:€|euros?\b)", re.IGNORECASE)
# 118 000: groups of three digits after a currency sign, or anywhere if a text states one number
_SPACES = r"(?<![0-9.,])({}[1-9][0-9]{{0,2}}(?: [0-9]{{3}}){{1,6}})(?!,?[0-9]| ?/)"
_SPACES_OF_MONEY = re.compile(_SPACES.format("[$€£¥] ?"))
_SPACES_OF_ALL = re.compile(_SPACES.format(""))
_POINT_GROUPS = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")


class Quantity(NamedTuple):
    """A quantity at `text[start:end]`; `readings` has its values, the likeliest first."""

    readings: tuple[Fraction, ...]  # empty: a time of day, which is not a number
    start: int
    end: int
    in_digits: bool


def plain(text: str, one_number: bool = False) -> str:
    """`text` with LaTeX, full-width forms and other typesetting replaced by what is read here.

    If it is to state `one_number`, 1 234 is 1234; otherwise only $1 234 is.
    """
    text = text.translate(_CHARACTERS)
    if not _TYPESET.isdisjoint(text):
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    for pattern, replacement in _ALWAYS:
        text = pattern.sub(_REWRITE.get(replacement, replacement), text)
    spaces = _SPACES_OF_ALL if one_number else _SPACES_OF_MONEY
    return spaces.sub(lambda match: match[0].replace(" ", ""), text)


def quantities_in(text: str) -> list[Quantity]:
    """All quantities in a plain text, from left to right."""
    found, at = [], 0
    for number in numbers_in(text):
        if number.start >= at:
            found.append(_scaled(text, number.value, number.start, number.end))
            at = found[-1].end
    taken = [(q.start, q.end) for q in found]
    for match in _IN_WORDS.finditer(text):
        readings = _in_words(match)
        if readings:
            found.append(Quantity(readings, match.start(), match.end(), False))
    shares = list(_CHINESE_SHARE.finditer(text))
    for match in shares:  # 三分之一 is 1/3, 百分之五十 is 50 percent
        whole, part = _chinese(match[1]), _chinese(match[2])
        if whole:
            value = part if whole == 100 else part / whole
            found.append(Quantity((value,), match.start(), match.end(), False))
    for match in () if shares else _CHINESE.finditer(text):
        value = _chinese(match[0])
        if value is not None:
            found.append(Quantity((value,), match.start(), match.end(), False))
    if len(found) > len(taken):
        found.sort(key=lambda q: q.start)
        found = [q for q in found if q.in_digits or not _overlaps(q, taken)]
    return _joined(text, found)


def _overlaps(quantity: Quantity, taken: list[tuple[int, int]]) -> bool:
    at = bisect_right(taken, (quantity.start, quantity.end)) - 1
    return at >= 0 and taken[at][1] > quantity.start


def _scaled(text: str, value: Fraction, start: int, end: int) -> Quantity:
    """The quantity of the numeral at `text[start:end]` with the powers and scales after it."""
    readings = (value,)
    if match := _EXPONENT.match(text, end) or _TIMES_POWER.match(text, end):
        readings = (value * Fraction(10) ** int(match[1]),)
    elif (match := _POWER.match(text, end)) and abs(value) < 10**6:
        readings = (value ** int(match[1]),)
    elif (match := _CLOCK.match(text, end)) and text[start:end].isdigit() and value <= 24:
        readings = (value,) if match[1] == "00" else ()
    elif match := _MILLIONS.match(text, end):
        readings = (value * 10**6, value)
    elif match := _SCALE.match(text, end):
        scale = _SCALES_AFTER_NUMERALS[match[1].lower()]
        readings = (value * scale, value) if scale != 100 else (value * scale,)
    elif _POINT_GROUPS.fullmatch(text, start + (text[start] == "€"), end - (text[end - 1] == "€")):
        if "€" in text[start:end] or _EUROS.match(text, end):
            readings = (value, value * 1000)
    if _NEGATIVE.search(text, max(0, start - 12), start):
        readings = tuple(-value for value in readings)
    return Quantity(readings, start, match.end() if match else end, True)


def _in_words(match: re.Match) -> tuple[Fraction, ...]:
    """The readings of a number in words; empty if the words are not one number."""
    words = re.split("[ -]", match[1].lower())
    if words == ["one"] and not match[2]:
        text, start = match.string, match.start()
        if _NOT_ONE.search(text, max(0, start - 10), start) or _ONE_OF.match(text, match.end()):
            return ()
    total, group, last, dozens = 0, 0, 1000, 1
    for word in words:
        if word == "and":
            continue
        if word in WORDS:
            if not (last >= 100 or (20 <= last < 100 and WORDS[word] < 10)):
                return ()
            group += WORDS[word]
            last = WORDS[word]
        elif word == "hundred":
            group, last = max(group, 1) * 100, 100
        elif word == "dozen":
            dozens = 12
        else:
            total, group, last = total + max(group, 1) * SCALES[word], 0, SCALES[word]
    value = Fraction(total + group or (1 if dozens > 1 else 0))
    if _NEGATIVE.search(match.string, max(0, match.start() - 12), match.start()):
        value = -value
    part = (match[2] or "").lower()
    if part == " and a half":
        value += Fraction(1, 2)
    elif part:
        value /= _PARTS[part[1:]]
    return (value * dozens, value) if dozens > 1 else (value,)


def _chinese(numeral: str) -> Fraction | None:
    """四十二 is 42, 一百零五 is 105, 二〇二四 is 2024; None if it is no number."""
    if all(c in _CHINESE_DIGITS for c in numeral):
        return Fraction("".join(str(_CHINESE_DIGITS[c]) for c in numeral))
    total = section = digit = 0
    for c in numeral:
        if c in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[c]
        elif c in _CHINESE_SCALES:
            section, digit = section + (digit or 1) * _CHINESE_SCALES[c], 0
        elif c == "万" and section + digit:  # 一亿二千万: of the last section only
            total, section, digit = total + (section + digit) * 10**4, 0, 0
        else:
            total = (total + section + digit or 1) * (10**4 if c == "万" else 10**8)
            section = digit = 0
    return Fraction(total + section + digit)


def _joined(text: str, found: list[Quantity]) -> list[Quantity]:
    """`found` with quantities such as 2 hours and 30 minutes joined into one."""
    joined: list[Quantity] = []
    unit, factors = "", ()  # of the last of `joined`
    for q in found:
        following = words_of(text[q.end : q.end + 20])[:1]
        here = following[0] if following else ""
        if joined and q.readings:
            last = joined[-1]
            gap = text[last.end : q.start]
            words = words_of(gap) if len(gap) < 30 else ["?"]
            if words[-1:] == ["and"]:
                words.pop()
            large = words[0] if words else "dollar" if "$" in text[last.start : last.end] else ""
            factor = _FACTORS.get((here, large)) if len(words) < 2 and "." not in gap else None
            if factor and last.readings and 0 <= q.readings[0] < factor:
                small = q.readings[0]
                factors = (*(f * factor for f in factors), factor) if unit == large else (factor,)
                values = last.readings[: len(factors)]
                values = [value + small / f for value, f in zip(values, factors)]
                values.append(last.readings[len(factors) - 1] * factor + small)
                joined[-1] = Quantity(tuple(values), last.start, q.end, last.in_digits)
                unit = here
                continue
        joined.append(q)
        unit, factors = "", ()
    return joined


_FACTORS = {(small, large): factor for factor, small, large in CONVERSIONS if small}
