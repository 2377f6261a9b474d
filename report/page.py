"""The blocks of a report: the same content as HTML and as Markdown.

Text from data and models may contain anything. Every text given to a block is plain text, and
passes through `tag` (HTML) and through `inert` or `fenced` (Markdown), so that a page cannot load
or run anything.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MISSING = "–"  # in place of a value that is not known
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Text:
    """A block in both forms."""

    html: str = ""
    markdown: str = ""


@dataclass(frozen=True)
class Table:
    """A block of rows: a label, then values as text, None where one is not known.

    Rows and columns without any value are left out, and so is a table without rows.
    """

    header: Sequence[str]
    rows: Iterable[Sequence[str | None]]
    title: str = ""
    folded: bool = False  # in HTML, a click on the title shows it
    boxes: str = ""  # in HTML, "cards" or "pairs" instead of a grid

    @cached_property
    def filled(self) -> list[list[str]]:
        """The header and the rows that are shown; [] for none."""
        rows = [row for row in self.rows if any(cell is not None for cell in row[1:])]
        filled = [i for i in range(len(self.header)) if any(row[i] is not None for row in rows)]
        texts = [[MISSING if row[i] is None else row[i] for i in filled] for row in rows]
        return [[self.header[i] for i in filled], *texts] if rows else []

    @property
    def html(self) -> str:
        """The table as HTML; "" if no row is filled."""
        if not self.filled:
            return ""
        header, *rows = self.filled
        title = tag("summary" if self.folded else "caption", self.title) if self.title else ""
        if self.boxes:
            boxes = "".join(f"<div>{tag('dt', k)}{tags('dd', texts)}</div>" for k, *texts in rows)
            grid = f'<dl class="{self.boxes}">{boxes}</dl>'
        else:
            lines = "\n".join(f"<tr>{tags('td', row)}</tr>" for row in rows)
            lines = f"<thead><tr>{tags('th', header)}</tr></thead>\n<tbody>{lines}</tbody>"
            grid = f'<div class="table"><table>{title * (not self.folded)}{lines}</table></div>'
        return f"<details>{title}{grid}</details>" if self.folded else grid

    @property
    def markdown(self) -> str:
        """The table as Markdown; "" if no row is filled."""
        lines = [f"| {' | '.join(map(inert, row))} |" for row in self.filled]
        if not lines:
            return ""
        lines.insert(1, "|---" * len(self.filled[0]) + "|")
        return "\n".join([f"**{inert(self.title)}**\n"] * bool(self.title) + lines)


Block = Text | Table


def pairs(values: dict[str, str | None], title: str = "", *, folded: bool = False) -> Table:
    """Names and values."""
    return Table(("name", "value"), values.items(), title, folded, boxes="pairs")


def side_by_side(title: str, corner: str, columns: dict[str, dict[str, str | None]]) -> Table:
    """A row for each key that any of the columns has."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [(key, *(column.get(key) for column in columns.values())) for key in keys]
    return Table((corner, *columns), rows, title)


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """A page that needs no other file."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    body = "\n".join(filter(None, (block.html for block in blocks)))
    return PAGE.format(title=html.escape(title), style=style, body=body)


def to_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as one Markdown file."""
    return "\n\n".join(filter(None, (block.markdown for block in blocks))) + "\n"


def tag(name: str, text: str, kind: str = "") -> str:
    """An HTML element of class `kind` that contains plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{html.escape(text)}</{name}>"


def tags(name: str, texts: Iterable[str]) -> str:
    """Elements without line breaks before a % or inside an interval."""
    texts = (re.sub("(?<=[0-9]) %", "\u00a0%", text) for text in texts)
    return "".join(tag(name, re.sub("(?<=[0-9])–(?=[0-9])", "–\u2060", text)) for text in texts)


def inert(text: str) -> str:
    """`text` on one line, in which Markdown and HTML find no markup."""
    text = re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(text.split()))
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # GitHub links bare addresses


def fenced(text: str) -> str:
    """`text` in a Markdown code fence that is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def heading(text: str, level: int = 2, anchor: str = "") -> Text:
    """A heading; `anchor` is what links on the page call it."""
    opening = f'<h{level} id="{anchor}">' if anchor else f"<h{level}>"
    return Text(f"{opening}{html.escape(text)}</h{level}>", f"{'#' * level} {inert(text)}")


def contents(anchors: dict[str, str]) -> Text:
    """Links to headings by their anchors; only in HTML."""
    links = (f'<a href="#{anchor}">{html.escape(text)}</a>' for anchor, text in anchors.items())
    return Text(f"<nav>{' '.join(links)}</nav>")


def paragraph(text: str, kind: str = "") -> Text:
    """A paragraph, or nothing if there is no text. `kind` is "lead" or, for small print, "note"."""
    return Text(tag("p", text, kind), inert(text)) if text else Text()


def code(text: str) -> Text:
    """Lines to copy, or to read exactly as they are; nothing if there is no text."""
    return Text(tag("pre", text, "code"), fenced(text)) if text else Text()


def pictures(figures: Iterable[str]) -> Text:
    """Figures side by side, where there is room; only in HTML."""
    drawn = "".join(figures)
    return Text(f'<div class="pictures">{drawn}</div>' if drawn else "")


def transcript(title: str, parts: Sequence[tuple[str, str, str]], *, opened: bool) -> Text:
    """Texts that a title unfolds, as (label, text, kind); `kind` is "correct", "wrong" or ""."""
    boxes = "".join(
        f'<div class="part {kind}">{tag("b", label)}{tag("pre", text)}</div>'
        for label, text, kind in parts
    )
    start = "<details open>" if opened else "<details>"
    page = f'{start}{tag("summary", title)}<div class="parts">{boxes}</div></details>'
    texts = (f"{inert(label)}:\n\n{fenced(text)}" for label, text, _ in parts)
    return Text(page, "\n\n".join([f"**{inert(title)}**", *texts]))
