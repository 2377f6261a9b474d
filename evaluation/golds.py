r"""Reads the number that a gold answer states, or finds that it states none.

A gold answer states its number in one of these forms; the last one that holds a number counts:

    #### N              the rest of the line after the last `####`                    GSM8K
    \boxed{N}           the last box                                                  MATH
    The answer is: N    the sentence in the last line after "answer is" or "answer:"      MetaMath
    <answer>N</answer>  between the last tags                                         R1
    N                   the whole text

N may have a currency, a percent sign, Markdown or LaTeX around it, a unit (`18 apples`), a name
(`x = 18`, `Total: 18`), or be the result of an equation (`6*7 = 42`). A statement that holds
anything else (`3 or 4`, `2x + 1`, `\sqrt{2}`, `(3, 4)`, `7:30`) states no number, because a number
taken out of it would not be the answer. All functions take linear time.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from errors import BadData
from evaluation.numerals import numbers_in

LONGEST = 200  # characters of a statement; a longer one is not a number and its unit
_ANSWER_IS = re.compile(r"(?i:\banswer(?: is\b|\** ?:))[\s:]*|答案(?:是|为|[:：])[\s:：]*")
_BOXES = (r"\boxed{", r"\boxed {", r"\fbox{")
# The end of a sentence that holds a number: what follows a stated answer is not a part of it.
_SENTENCE = re.compile(r"[0-9][^.!?\n]{0,60}[.!?](?=\s+[A-Z])")
_REWRITTEN = [  # what `numbers_in` does not read -> what it reads
    (r"\\!|\\left|\\right|\{\}", ""),
    (r"\{,\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))", ","),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed) ?\{([^{}\n]{0,200})\}", r" \1 "),
    (r"\\[dt]?frac ?\{([0-9]{1,20})\} ?\{([0-9]{1,20})\}", r" \1/\2"),
    (r"\\[dt]?frac ?([0-9])([0-9])", r" \1/\2"),
    (r"\\([$%])", r"\1"),
    (r"\\[()\[\], ;]|\^ ?\{?\\circ\}?", " "),
    (r"\\approx|≈", "="),
    (r"(?<![^\s(=$])[-–\u2212] ?(?=[$€£¥]?\.?[0-9])", "-"),
    (r"\b([cmk]?m|in|ft|yd|mi|inches|feet|yards|meters|miles|units) ?\^\{?[23]\}?", r"\1"),
]
_REWRITTEN = [(re.compile(pattern), text) for pattern, text in _REWRITTEN]
_ANOTHER = re.compile(r"[0-9].*(?:[,;&]|\b(?:and|or)\b)[\s\\]*[^\W\d_]")  # `5, y`, then `= 7`
_COMPUTED = re.compile(r"[0-9.,\s+*/x×·÷()\u2212-]+")
_BARE = re.compile(r"[^\w\s]{0,4}[0-9][0-9.,/ ]*[^\w\s]{0,4}(?:\s?\([^\W\d_]+\))?")
_NUMBER = "\0"  # stands for the number in a statement that is searched for anything unclear
_CHANGE_THE_VALUE = (  # words that change the value of a number or are part of it
    "not|none|twice|double|triple|minus|negative|plus|times|over|squared|cubed|factorial"
    "|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|dozens?|score|hundreds?|thousands?"
    "|[mb]illions?|trillions?|[mb]i?ln|bn|mn|lakhs?|crores?|pi|sqrt|log|ln|sin"
    "|cos|tan|mod|or|steps?|part|case|method|option"
)
_UNCLEAR = re.compile(
    rf"""[^\w\s{_NUMBER}()\[\].,;:。，*_`"'’“”~+$€£¥¢%/-] | \d
    | [½¼¾⅐-⅞²³¹] | [零〇一二两三四五六七八九十百千万亿半]
    | (?<![^\W\d_])(?:{_CHANGE_THE_VALUE})(?![^\W\d_])
    | (?<![^\W\d_])(?![amglsh](?![^\W\d_]))[a-zα-ω](?![^\W\d_])  # 3x, but 3 m
    | (?<={_NUMBER})\ ?(?-i:M)(?![^\W\d_])  # 5 m is a length, but 5M five millions
    | (?<![^\W\d_])- | -(?![^\W\d_])  # a hyphen joins words
    | /(?![^\W\d_]) | (?<=[^\s(])\+ | \+(?!{_NUMBER})""",
    re.VERBOSE | re.IGNORECASE,
)


def gold_value(gold_answer: str) -> Fraction | None:
    """The number that a gold answer states; None if it states none or more than one."""
    values = (_stated(statement) for statement in _statements(gold_answer))
    return next((value for value in values if value is not None), None)


def gold_number(gold_answer: str) -> Fraction:
    """`gold_value`; raises BadData if there is none."""
    number = gold_value(gold_answer)
    if number is None:
        cause = f"a gold answer states no number: it ends in {gold_answer[-60:]!r}"
        raise BadData(cause, "end each gold answer with a line '#### N'")
    return number


def gold_text(gold_answer: str) -> str:
    """The N of the gold answer as text, for scorers that compare texts.

    This is everything after the last `#### ` if it consists of digits, points and commas, as
    lm-evaluation-harness defines it. For all other golds it is the number in digits: `####18`,
    `#### **18**` and `The answer is: 18` are all `18`.
    """
    text = gold_answer.rpartition("#### ")[2]
    return text if ends_in_number(gold_answer) else in_digits(gold_number(gold_answer))


def ends_in_number(gold_answer: str) -> bool:
    """Whether the text ends in `#### N` exactly as lm-evaluation-harness needs it."""
    _, marker, text = gold_answer.rpartition("#### ")
    return bool(marker) and re.fullmatch(r"-?[0-9.,]*[0-9][0-9.,]*", text) is not None


def in_digits(number: Fraction) -> str:
    """`18`, `18.5`, or `1/3` where no decimal is exact."""
    places = next((n for n in range(20) if 10**n % number.denominator == 0), 0)
    if not places:
        return str(number)
    digits = str(abs(number.numerator) * 10**places // number.denominator).zfill(places + 1)
    return "-" * (number < 0) + f"{digits[:-places]}.{digits[-places:]}"


def _statements(gold_answer: str) -> Iterator[str]:
    """Texts that may state the answer, last first; the first that is a number is the answer."""
    found = []  # (position, statement)
    gold_answer = gold_answer.rpartition("</think>")[2]
    at = gold_answer.rfind("####")
    if at >= 0:
        found.append((at, gold_answer[at + 4 :].strip().partition("\n")[0]))
    at = max(map(gold_answer.rfind, _BOXES))
    if at >= 0:
        found.append((at, _braced(gold_answer[gold_answer.find("{", at) :][: LONGEST + 2])))
    at = gold_answer.rfind("<answer>")
    if at >= 0:
        found.append((at, gold_answer[at + 8 :].partition("</answer>")[0].strip()))
    start = gold_answer.rstrip().rfind("\n") + 1
    last = gold_answer[start:].rstrip()
    for answer_is in list(_ANSWER_IS.finditer(last))[-1:]:
        statement = last[answer_is.end() :]
        end = _SENTENCE.search(statement[: LONGEST + 2])
        found.append((start + answer_is.start(), statement[: end.end()] if end else statement))
    if _BARE.fullmatch(gold_answer.strip()[: LONGEST + 1]):
        found.append((0, gold_answer.strip()))
    return (statement for _, statement in sorted(found, reverse=True))


def _braced(text: str) -> str:
    """The inside of the braces that `text` begins with; "" if they are not closed."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:at]
    return ""


def _stated(statement: str) -> Fraction | None:
    """The value of a statement that is one number, or an equation with one as its result."""
    if len(statement) > LONGEST:
        return None
    for pattern, text in _REWRITTEN:
        statement = pattern.sub(text, statement)
    *before, result = [part for part in statement.split("=") if part.strip()] or [""]
    if any(_ANOTHER.search(part) for part in before[1:]):
        return None  # x = 5, y = 7
    if before and _COMPUTED.fullmatch(result) and _single(result) is None:
        result = before[-1]  # 42 = 6*7
    return None if re.search("[<>!≤≥≠]", statement) else _single(result)


def _single(text: str) -> Fraction | None:
    """The number in `text` if there is one only, with nothing unclear around it."""
    numbers = numbers_in(text)
    if len(numbers) != 1:
        return None
    (number,) = numbers
    around = text[: number.start] + _NUMBER + text[number.end :]
    return None if _UNCLEAR.search(around) else number.value
