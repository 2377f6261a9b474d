"""The blocks of a report: the same content as HTML and as Markdown.

Text from data and models may contain anything. Every text given to a function below is plain text,
and passes through `tag` (HTML) and through `inert` or `fenced` (Markdown), so that a page cannot
load or run anything.
"""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MISSING = "–"  # in place of a value that is not known
Field = tuple[str, Callable[[Any], Any], Callable[[Any], str]]  # label, getter, formatter
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Block(NamedTuple):
    html: str
    markdown: str


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """A page that needs no other file."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    body = "\n".join(block.html for block in blocks if block.html)
    return PAGE.format(title=html.escape(title), style=style, body=body)


def to_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(block.markdown for block in blocks if block.markdown) + "\n"


def tag(name: str, text: str, kind: str = "") -> str:
    """An HTML element of class `kind` that contains plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{html.escape(text)}</{name}>"


def inert(text: str) -> str:
    """`text` on one line, in which Markdown and HTML find no markup."""
    text = re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(text.split()))
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # GitHub links bare addresses


def fenced(text: str) -> str:
    """`text` in a Markdown code fence that is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def heading(text: str, level: int = 2) -> Block:
    return Block(tag(f"h{level}", text), f"{'#' * level} {inert(text)}")


def paragraph(text: str, kind: str = "") -> Block:
    """A paragraph, or nothing if there is no text. `kind` is "lead" or, for small print, "note"."""
    return Block(tag("p", text, kind), inert(text)) if text else Block("", "")


def code(text: str) -> Block:
    """Lines to copy, or to read exactly as they are; nothing if there is no text."""
    return Block(tag("pre", text, "code"), fenced(text)) if text else Block("", "")


def cards(items: Sequence[tuple[str, str, str]]) -> Block:
    """The headline values: label, value, note."""
    lists = (tag("dt", label) + tag("dd", value) + tag("dd", note) for label, value, note in items)
    boxes = "".join(f'<dl class="card">{box}</dl>' for box in lists)
    markdown = table("", ("headline", "value", "note"), items).markdown
    return Block(f'<div class="cards">{boxes}</div>', markdown)


def pairs(items: dict[str, str]) -> Block:
    """Names and values."""
    boxes = "".join(f"<div>{tag('dt', k)}{tag('dd', v)}</div>" for k, v in items.items())
    markdown = table("", ("name", "value"), list(items.items())).markdown
    return Block(f'<dl class="pairs">{boxes}</dl>', markdown)


def pictures(svgs: Sequence[str]) -> Block:
    """SVG figures side by side, where there is room; only in HTML."""
    figures = "".join(f"<figure>{svg}</figure>" for svg in svgs)
    return Block(f'<div class="pictures">{figures}</div>' if svgs else "", "")


def transcript(title: str, parts: Sequence[tuple[str, str, str]], *, opened: bool) -> Block:
    """Texts that a title unfolds, as (label, text, kind); `kind` is "correct", "wrong" or ""."""
    boxes = "".join(
        f'<div class="part {kind}">{tag("b", label)}{tag("pre", text)}</div>'
        for label, text, kind in parts
    )
    start = "<details open>" if opened else "<details>"
    page = f'{start}{tag("summary", title)}<div class="parts">{boxes}</div></details>'
    texts = (f"{inert(label)}:\n\n{fenced(text)}" for label, text, _ in parts)
    return Block(page, "\n\n".join([f"**{inert(title)}**", *texts]))


def table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, folded: bool = False
) -> Block:
    """A table, or nothing without rows. `folded`: in HTML, a click on its title shows it."""
    if not rows:
        return Block("", "")
    head = "".join(tag("th", cell) for cell in header)
    cells = ("".join(tag("td", unbroken(cell)) for cell in row) for row in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    caption = tag("caption", title) if title and not folded else ""
    page = f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    page = f'<div class="table">{page}</div>'
    if folded:
        page = f"<details>{tag('summary', title)}{page}</details>"
    top, *lines = (f"| {' | '.join(map(inert, row))} |" for row in (header, *rows))
    above = [f"**{inert(title)}**", ""] if title else []
    return Block(page, "\n".join([*above, top, "|---" * len(header) + "|", *lines]))


def unbroken(cell: str) -> str:
    """`cell` without line breaks before a % or inside an interval."""
    return re.sub("(?<=[0-9])–(?=[0-9])", "–\u2060", re.sub("(?<=[0-9]) %", "\u00a0%", cell))


def known(formatter: Callable[[Any], str], value: Any) -> str:
    return MISSING if value is None else formatter(value)


def listing(
    title: str, fields: Sequence[Field], records: Iterable[Any], *, folded: bool = False
) -> Block:
    """A table with a row for each record and a column for each (label, getter, formatter)."""
    rows = [[known(formatter, getter(r)) for _, getter, formatter in fields] for r in records]
    return table(title, [label for label, _, _ in fields], rows, folded=folded)


def comparison(
    title: str, corner: str, fields: Sequence[Field], models: dict[str, Any],
    last: tuple[str, Callable[[list[Any]], str]] | None = None,
) -> Block:  # fmt: skip
    """A table with a row for each (label, getter, formatter) and a column for each model.

    `last` is one more column: its label, and what it shows of a row's values.
    """
    extra = [last] if last else []
    rows = []
    for label, getter, formatter in fields:
        values = [getter(model) for model in models.values()]
        cells = [known(formatter, value) for value in values]
        rows.append([label, *cells, *(summary(values) for _, summary in extra)])
    return table(title, [corner, *models, *(label for label, _ in extra)], rows)
