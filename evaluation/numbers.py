r"""Finds the number that a completion answers with, as a careful reader would.

The first of these that holds a number counts:

    #### N               what follows the first `####` that a number follows
    \boxed{N}            the last box
    The answer is N      what follows the last "answer is" or "answer:"
    ... = N              in the last line with a number: the first number after its last `=`
    ... N                in the same line: the last number

N is a quantity (`quantities.py`) or an expression of quantities (`40 + 2`, `6*7 = 42`). An answer
that names several numbers (`2 or 3`, `Ann 12, Bob 42`) has none. Labels (`Step 2:`), years (`in
2024`), times (`2:30`), and remarks in brackets (`4 (since 3.3 is not enough)`) are not counted. The
text ends where the model asks itself another question (`\nQuestion: ...`). If an answer was
cut off, only a number after `####` or in a box counts: any other may be part of the reasoning.

All functions take linear time, and read only the ends of long texts.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice, pairwise
from string import ascii_letters

from evaluation.quantities import Quantity, plain, quantities_in

# Characters that are read: after a mark, of a line, at the end of a text, before another question.
STATEMENT, LINE, TAIL, HEAD = 300, 1000, 10_000, 100_000
Readings = tuple[Fraction, ...]  # the values that an answer may mean, the likeliest first

_RUN_ON = re.compile(
    r"\n[ \t*]{0,9}(?:###? )?(?:(?:Next )?(?:Question|Q) ?[0-9]{0,3}|Human|User) ?:"
    r"|\n\n[ \t*]{0,9}(?:###? )?(?:Problem|Exercise|Instruction) ?[0-9]{0,3} ?:"
    r"|<\|im_(?:end|start)\|>|<\|endoftext\|>|</s>"
)
_DIGIT, _MARK = re.compile(r"\d"), re.compile("####+")
_ANSWER = re.compile(
    r"(?i:(?<![a-z/])answer(?: is\b| would be\b| = |[\"'*]*\s?[:：]|>))|答案(?:是|为|[:：])|答[:：]"
)
_REFUSED = re.compile(
    r"(?i:\bn/?a\b|\bnone\b|\bunknown\b|\bundefined\b|\bcannot\b|\b(?:ca|do)n['’]t\b|\bnot\b)"
)
_UNDECIDED = re.compile(r"(?i:cannot be determined|not enough information|do(?:n['’]t| not) know)")
_LABEL = re.compile(r"(?i:\b(?:step|part|case|question|problem|figure|option)\s?#?)$")
_HEADING = re.compile(
    r"(?i:[\s*]*(?:(?:step|part|case|example)\s?[0-9]|[0-9]{1,2}[.)] +[*]*[a-z]))"
)
_REMARK = re.compile(r"\([^()]{0,200}(?:[A-Za-z=][A-Za-z ]|=)[^()]{0,200}\)")
_ITEM = re.compile(r"(?m)^[\s*-]*(?:[0-9]{1,2}[.)](?=\s)|\([0-9]{1,2}\)(?=\s))")
_NAMING = re.compile(
    r"(?i:(?:\b(?:is|are|was|were|of|about|around|approximately|exactly|makes?|has|have|costs?|pays?"
    r"|earns?|needs?|takes?|total)\b|[:=~])\s*[^\w\s]*\s*)$"
)
_OPERATOR = re.compile(r"\s*([-+*/x])\s*")
_NESTED = re.compile(r"\s*(?:\)\s*[-+*/x]\s*[0-9(]|[-+*/x]\s*\()")  # expressions with brackets
_YEAR = re.compile(r"(?i:\b(?:in|since|by|of|year|until|from)\s)$")
_WHOLE = re.compile(r"(?i: (?:\w{1,20} )?(?:out of|of the|of all) )")  # 42 out of 50, 42 of the 50
_OR = re.compile(r"(?i:[^.\n]{0,30}?(?:\bor\b|\bto\b|/)\s*$)")
_PART = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
_IS_PART = re.compile(r"(?i:\W*(?:an? )?(half|third|quarter)\W*)")


def readings(text: str, *, cut_off: bool = False) -> Readings:
    """The values that a completion's answer may mean, the likeliest first; empty if it has none."""
    text = _before_run_on(text.rpartition("</think>")[2])
    marked = _marked(text)
    found = marked or _boxed(text) or ()
    if found or cut_off or marked is not None:
        return found
    text = text[-TAIL:]
    return _after_answer_is(text) or _in_last_line(text)


def marked_readings(text: str) -> Readings:
    """`readings` of what follows `####` alone."""
    return _marked(_before_run_on(text)) or ()


# Where the answer is.


def _before_run_on(text: str) -> str:
    match = _RUN_ON.search(text, 1, HEAD)
    return text[: match.start()] if match and _DIGIT.search(text, 0, match.start()) else text


def _marked(text: str) -> Readings | None:
    """None without a statement after `####`; empty if what is stated there is no number."""
    refused = None
    for mark in islice(_MARK.finditer(text), 50):
        after = text[mark.end() : mark.end() + STATEMENT].strip()
        statement = _first_line(after)
        if statement and not (_HEADING.match(statement) and "\n" in after):
            found = _stated(statement)
            if found:
                return found
            if found is not None:
                refused = ()
    return refused


def _boxed(text: str) -> Readings | None:
    at = text.rfind(r"\boxed")
    if at < 0:
        return None
    inside, depth = [], 0
    for character in text[at + 6 : at + 6 + STATEMENT]:
        depth += (character == "{") - (character == "}")
        inside.append(character)
        if depth <= 0 and character in "{}":
            return _stated("".join(inside[1:-1]).replace("\n", " ")) or None
    return _stated("".join(inside[1:]).replace("\n", " ")) or None


def _after_answer_is(text: str) -> Readings:
    for match in reversed(list(_ANSWER.finditer(text))[-5:]):
        statement = _first_line(text[match.end() : match.end() + STATEMENT])
        found = _stated(re.split(r"(?<=[^\s.][.!?])\s", statement)[0])
        if found:
            return found
    return ()


def _in_last_line(text: str) -> Readings:
    """The readings of the last line with a number; number words count in the last line only."""
    first = True
    for line in _lines_backwards(text):
        if first and _UNDECIDED.search(line):
            return ()
        line = plain(line[-LINE:])
        quantities = _counted(line)
        digits = [q for q in quantities if q.in_digits]
        if digits or (first and quantities):
            return _of_line(line, digits or quantities)
        first = False
    return ()


def _lines_backwards(text: str) -> Iterator[str]:
    yield from (line for line in reversed(text.split("\n")) if line.strip(" *$\\()[]`#"))


def _first_line(text: str) -> str:
    """The first line of `text` with anything in it but brackets and marks."""
    for line in text.split("\n"):
        if line.strip(" *$\\()[]`\t\r"):
            return line
    return ""


# What it says.


def _stated(statement: str) -> Readings | None:
    """The readings of a statement; empty if it is no number, None if it says nothing of numbers."""
    text = plain(statement, one_number=True)
    text = re.sub(r"^(\W{0,9})- (?=[$€£¥]?[0-9])", r"\1-", text)
    quantities = _counted(text, labels=False)
    if not quantities:
        if part := _IS_PART.fullmatch(text):
            return (_PART[part[1].lower()],)
        return () if _REFUSED.search(text) else None
    if _REFUSED.search(text[: quantities[0].start]):
        return ()
    if "=" in text:
        return _result(text.split("="))
    found, end = _leading(text, quantities)
    others = [q for q in quantities if q.start >= end and not set(q.readings) & set(found)]
    if others:
        lead = text[: quantities[0].start]
        if _OR.match(text[end : others[0].start]):
            return ()
        if re.search(r"[^\W\d_]{2}", lead):
            named = [q for q in quantities if _NAMING.search(text[: q.start])]
            return named[0].readings if len(named) == 1 else ()
    return found


def _result(parts: list[str]) -> Readings:
    """What the parts of a statement that is split at `=` state: the first result."""
    name = quantities_in(parts[0])
    results = [part for part in parts[1:] if quantities_in(part)]
    if len(name) == 1 and (not results or _is_expression(results[0])):
        return name[0].readings  # 42 = 6*7
    at = 0
    while at + 1 < len(results) and _is_expression(results[at]):
        at += 1  # in 2*3 = 6 = 6/1 the last, but in x = 5, y = 7 the 5
    quantities = _counted(results[at], labels=False) if results else []
    return _leading(results[at], quantities)[0] if quantities else ()


def _is_expression(text: str) -> bool:
    return re.fullmatch(r"[0-9.,\s+*/x()$-]+", text) is not None


def _of_line(line: str, quantities: list[Quantity]) -> Readings:
    equals = line.rfind("=")
    after = [q for q in quantities if q.start > equals]
    if equals >= 0 and after:
        return _leading(line, after)[0]
    last = len(quantities) - 1
    while last and _OPERATOR.fullmatch(line, quantities[last - 1].end, quantities[last].start):
        last -= 1  # the last expression
    return _leading(line, quantities[last:])[0]


def _leading(text: str, quantities: list[Quantity]) -> tuple[Readings, int]:
    """The readings of the first quantity, or of the expression that begins with it, and where that
    ends.
    """
    first, *rest = quantities
    terms, operators, end = [first.readings[0]], [], first.end
    for q in rest:
        operator = _OPERATOR.fullmatch(text, end, q.start)
        signed = text[q.start] == "-" and not text[end : q.start].strip()
        if not operator and not signed:
            break
        if not q.readings or len(terms) > 20:
            break
        operators.append(operator[1] if operator else "+")
        terms.append(q.readings[0])
        end = q.end
    if _NESTED.match(text, end):
        return (), end
    if not operators:
        return first.readings, end
    value = _computed(terms, operators)
    return ((value,) if value is not None else ()), end


def _computed(terms: list[Fraction], operators: list[str]) -> Fraction | None:
    """The value of an expression without brackets; None for a division by zero."""
    total, product = Fraction(0), terms[0]
    for operator, term in zip(operators, terms[1:]):
        if operator in "*x":
            product *= term
        elif operator == "/":
            if not term:
                return None
            product /= term
        else:
            total, product = total + product, term if operator == "+" else -term
    return total + product


def _counted(text: str, labels: bool = True) -> list[Quantity]:
    """The quantities in `text`, except for those that cannot be the answer, such as labels."""
    items = [m.span() for m in _ITEM.finditer(text)] if labels else []
    found = []
    for q in quantities_in(text):
        before = text[max(0, q.start - 12) : q.start]
        if not q.readings or any(start <= q.start < end for start, end in items):
            continue
        if _LABEL.search(before):
            continue
        found.append(q)
    return _without(text, found)


def _without(text: str, found: list[Quantity]) -> list[Quantity]:
    """`found` without the kinds that are rarely the answer, unless nothing would be left."""
    remarks = [m.span() for m in _REMARK.finditer(text)]
    in_remarks = {q for q in found if any(start < q.start < end for start, end in remarks)}
    found = [q for q in found if q not in in_remarks] or found
    years = {
        q
        for q in found
        if 1900 <= q.readings[0] <= 2100 and _YEAR.search(text[max(0, q.start - 7) : q.start])
    }
    found = [q for q in found if q not in years] or found
    wholes = {q for before, q in pairwise(found) if _WHOLE.fullmatch(text, before.end, q.start)}
    found = [q for q in found if q not in wholes]
    symbols = {q for q in found if q.start and text[q.start - 1] in ascii_letters}  # H2O, x2
    return [q for q in found if q not in symbols] or found
