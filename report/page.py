"""Plain blocks into one HTML page and into Markdown, text from data and models made inert."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Blocks: what a report consists of. A string in a block is plain text, whoever wrote it.


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str
    tone: str = ""  # "lead": what to read first; "note": what to know of a figure


@dataclass(frozen=True)
class Cards:
    """The headline figures: label, value, note."""

    cards: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: list[Sequence[str]]
    title: str = ""
    folded: bool = False  # in HTML only, behind its title


@dataclass(frozen=True)
class Pairs:
    """Names and values."""

    pairs: dict[str, str]


@dataclass(frozen=True)
class Code:
    """Lines to copy or to read as they are."""

    text: str


@dataclass(frozen=True)
class Pictures:
    """SVGs of ours, side by side where there is room; HTML only."""

    svgs: list[str]


@dataclass(frozen=True)
class Transcript:
    """A question, the reference and the answers: label, text, tone (right, wrong or nothing)."""

    title: str
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    open: bool = False


Block = Heading | Paragraph | Cards | Table | Pairs | Code | Pictures | Transcript


# Into HTML: `html.escape` on every string of a block. The page may load nothing and run nothing.


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --card: #ffffff; --ink: #1b2127;
  --muted: #5b6670;
  --line: #dde1e5; --base: #7b8794; --tuned: #0f62c4; --mark: #c2410c; --right: #15803d;
  --wrong: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --page: #121619; --card: #1b2025; --ink: #e7eaed;
  --muted: #9ba6b1; --line: #333b43; --base: #8f9ba7; --tuned: #62a8ff; --mark: #ff9d5c;
  --right: #4ac26b;
  --wrong: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page);
  color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 0.75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.75rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 0.5rem; color: var(--muted); }
p { margin: 0.5rem 0; max-width: 48rem; }
.lead { font-size: 1.1rem; }
.note { font-size: 0.875rem; color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 0.75rem;
  margin: 1.25rem 0; }
.card, figure, details, .pairs, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 0.6rem; }
.card { margin: 0; padding: 0.9rem 1rem; }
.card dt { font-size: 0.8rem; color: var(--muted); }
.card dd { margin: 0; font-size: 0.85rem; color: var(--muted); }
.card dd:nth-of-type(1) { font-size: 1.55rem; font-weight: 650; color: var(--ink);
  line-height: 1.3; }
.card:first-child { border-left: 4px solid var(--tuned); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 0.75rem; margin: 1rem 0; }
figure { margin: 0; padding: 0.75rem; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: auto; }
.table { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
caption, summary { text-align: left; padding: 0.6rem 0.8rem; font-weight: 600; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.8rem; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line);
  overflow-wrap: break-word; min-width: 4.5rem; max-width: 26rem; }
th { color: var(--muted); font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr));
  gap: 0 1.5rem;
  margin: 0.75rem 0; padding: 0.5rem 0.8rem; font-size: 0.875rem; }
.pairs div { padding: 0.25rem 0; }
dt { color: var(--muted); }
.pairs dd { margin: 0; font-variant-numeric: tabular-nums; }
details { margin: 0.5rem 0; }
details .table { border: 0; margin: 0; }
summary { cursor: pointer; }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: 0.75rem; padding: 0 0.8rem 0.8rem; }
.part { border-left: 3px solid var(--line); padding-left: 0.7rem; min-width: 0; }
.part:first-child { grid-column: 1 / -1; }
.part.right { border-color: var(--right); } .part.right b { color: var(--right); }
.part.wrong { border-color: var(--wrong); } .part.wrong b { color: var(--wrong); }
.part b { font-size: 0.8rem; color: var(--muted); }
@media (max-width: 40rem) { table { font-size: 0.78rem; }
  th, td { padding: 0.35rem; min-width: 3rem; } caption { padding: 0.6rem 0.35rem; } }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem;
  overflow-y: auto;
  font: 0.85rem/1.5 ui-monospace, monospace; }
pre.code { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 0.8rem; margin: 0.75rem 0; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """One page that needs nothing else."""
    body = "\n".join(HTML[type(block)](block) for block in blocks)
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def tag(name: str, text: str, kind: str = "") -> str:
    """An element that holds plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{html.escape(text)}</{name}>"


def unbroken(cell: str) -> str:
    """A number keeps its unit and an interval its ends on one line."""
    return re.sub("(?<=[0-9])–(?=[0-9])", "–\u2060", re.sub("(?<=[0-9]) %", "\u00a0%", cell))


def html_cards(b: Cards) -> str:
    cards = [
        f'<dl class="card">{tag("dt", label)}{tag("dd", value)}{tag("dd", note)}</dl>'
        for label, value, note in b.cards
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def html_table(b: Table) -> str:
    head = "".join(tag("th", cell) for cell in b.header)
    rows = "\n".join(
        f"<tr>{''.join(tag('td', unbroken(cell)) for cell in row)}</tr>" for row in b.rows
    )
    caption = tag("caption", b.title) if b.title and not b.folded else ""
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>"
    table = f'<div class="table"><table>{caption}{body}</table></div>'
    return f"<details>{tag('summary', b.title)}{table}</details>" if b.folded else table


def html_pairs(b: Pairs) -> str:
    pairs = [f"<div>{tag('dt', name)}{tag('dd', value)}</div>" for name, value in b.pairs.items()]
    return f'<dl class="pairs">{"".join(pairs)}</dl>'


def html_pictures(b: Pictures) -> str:
    return f'<div class="pictures">{"".join(f"<figure>{svg}</figure>" for svg in b.svgs)}</div>'


def html_transcript(b: Transcript) -> str:
    parts = [
        f'<div class="part {tone}">{tag("b", label)}{tag("pre", text)}</div>'
        for label, text, tone in b.parts
    ]
    opened = " open" if b.open else ""
    body = f'<div class="parts">{"".join(parts)}</div>'
    return f"<details{opened}>{tag('summary', b.title)}{body}</details>"


HTML: dict[type, Callable[[Any], str]] = {
    Heading: lambda b: tag(f"h{b.level}", b.text),
    Paragraph: lambda b: tag("p", b.text, b.tone),
    Cards: html_cards,
    Table: html_table,
    Pairs: html_pairs,
    Code: lambda b: tag("pre", b.text, "code"),
    Pictures: html_pictures,
    Transcript: html_transcript,
}


# Into Markdown: inline text is escaped, and text of many lines is fenced. Pictures are in the page.


def to_markdown(blocks: Iterable[Block]) -> str:
    """The same without the pictures."""
    return "\n\n".join(filter(None, (MARKDOWN[type(block)](block) for block in blocks))) + "\n"


def inert(text: str) -> str:
    """Text on one line in which Markdown and HTML find nothing to act on."""
    text = re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(text.split()))
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # GitHub makes links of bare ones


def fenced(text: str) -> str:
    """Text in a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def markdown_table(b: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(map(inert, cells))} |"

    title = [f"**{inert(b.title)}**", ""] if b.title else []
    return "\n".join([*title, line(b.header), "|---" * len(b.header) + "|", *map(line, b.rows)])


def markdown_transcript(b: Transcript) -> str:
    parts = [f"{inert(label)}:\n\n{fenced(text)}" for label, text, _ in b.parts]
    return "\n\n".join([f"**{inert(b.title)}**", *parts])


MARKDOWN: dict[type, Callable[[Any], str]] = {
    Heading: lambda b: f"{'#' * b.level} {inert(b.text)}",
    Paragraph: lambda b: inert(b.text),
    Cards: lambda b: markdown_table(Table(("headline", "figure", "note"), b.cards)),
    Table: markdown_table,
    Pairs: lambda b: markdown_table(Table(("name", "value"), list(b.pairs.items()))),
    Code: lambda b: fenced(b.text),
    Pictures: lambda b: "",
    Transcript: markdown_transcript,
}
