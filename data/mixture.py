"""Several sources in one run: `--data gsm8k arc-challenge:0.5 mine.jsonl:2`.

The number after a colon is how many epochs of the source an epoch takes, 1 by default and read as
the exact fraction that is written; `batches.py` says which rows those are. Row numbers, by which
order and dropout go, run on from one source to the next. A problem that is held out in one source
is held out in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction

from data.batches import Share
from data.chat import ChatFormat
from data.encode import Example, encode_problems
from data.own import is_hub_id, parse_columns
from data.rows import Problem, Source, fingerprint
from data.split import split_sources
from data.tasks import TASKS, load_source
from errors import BadData, BadOption

MOST = 1000  # epochs of a source in an epoch: more is a slip
DIGITS = 20  # of a weight: an exponent of a million digits is no weight


@dataclass(frozen=True)
class Part:
    """A source, and how often an epoch takes each of its rows."""

    source: Source
    weight: Fraction


@dataclass
class EncodedSource:
    """A part's rows that are learned and held out, as problems and as examples, side by side."""

    name: str
    share: Share
    learned: list[Problem]
    held_out: list[Problem]
    test: list[Problem]
    train: list[Example]
    validation: list[Example]
    left_out: list[str] = field(default_factory=list)


def parse_spec(text: str) -> tuple[str, Fraction]:
    """(name, weight) of `name:weight`; BadOption for a weight that is none.

    What follows the last colon counts as a weight only if it is a number: `C:\\rows.jsonl` and
    `a:b.jsonl` are names. One that does end in a colon and a number takes a weight behind that.
    """
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, Fraction(1)
    if not colon:  # a name that is a number
        return text, Fraction(1)
    if not 0 < weight <= MOST or len(number) > DIGITS:
        raise BadOption(
            f"--data {text}: a weight is a number above 0, at most {MOST}, not {number}",
            f"write {name}:0.5 for half an epoch of it in each epoch, or leave it out",
        )
    return name, Fraction(Decimal(number))


def source_names(data: str | Sequence[str]) -> list[str]:
    """The names in `--data` or in a run's `config.json`, which was one text in older runs."""
    return [parse_spec(text)[0] for text in ([data] if isinstance(data, str) else data)]


def load_mixture(
    specs: Sequence[str], revision: str | None = None, columns: tuple[str, ...] = ()
) -> list[Part]:
    """The sources of `--data`; BadOption or BadData for what cannot be.

    `revision` is that of the one source that comes from the Hub. `columns` hold for every source
    that is no task. Of several sources, each problem's id begins with its source's name.
    """
    parsed = [parse_spec(text) for text in specs]
    names = [name for name, _ in parsed]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadOption(
            f"--data names {', '.join(sorted(twice))} more than once",
            "name each source once; :2 behind it takes it twice an epoch",
        )
    own = parse_columns(columns)
    if own and all(name in TASKS for name in names):
        raise BadOption(f"--columns makes no sense for the task {', '.join(names)}", "leave it out")
    remote = [name for name in names if name != "demo" and (name in TASKS or is_hub_id(name))]
    if revision and len(names) > 1 and len(remote) != 1:
        raise BadOption(
            f"--data-revision {revision} belongs to one source of the Hub, and --data names"
            f" {len(remote)}",
            "leave it out: config.json keeps the commit of each",
        )
    parts = []
    for name, weight in parsed:
        at = revision if len(names) == 1 or name in remote else None
        source = load_source(name, at, {} if name in TASKS else own)
        parts.append(Part(_marked(source) if len(names) > 1 else source, weight))
    return parts


def _marked(source: Source) -> Source:
    """The source with its name before each id: several may have a train.jsonl."""
    return replace(
        source,
        train=[replace(p, id=f"{source.name}/{p.id}") for p in source.train],
        test=[replace(p, id=f"{source.name}/{p.id}") for p in source.test],
        bad=[f"{source.name}/{reason}" for reason in source.bad],
    )


def mixture_identity(parts: list[Part], limit: int | None) -> dict[str, object]:
    """Commits and fingerprints, by which it is known whether the data are the same.

    Of a single source its own, of several a dictionary by their names.
    """
    commits = {part.source.name: part.source.commit for part in parts}
    prints = {part.source.name: fingerprint(part.source.train[:limit]) for part in parts}
    if len(parts) > 1:
        return {"data_commit": commits, "data_sha256": prints}
    return {"data_commit": parts[0].source.commit, "data_sha256": prints[parts[0].source.name]}


def encode_mixture(
    parts: list[Part],
    chat: ChatFormat,
    *,
    limit: int | None,
    validation_share: float,
    max_length: int,
    epochs: int,
) -> list[EncodedSource]:
    """Each source split and encoded, of its first `limit` rows; BadData if one has too few rows."""
    sources = [part.source.train[:limit] for part in parts]
    first, found = 0, []
    for part, problems, sides in zip(parts, sources, split_sources(sources, validation_share)):
        left_out, examples = list(part.source.bad), []
        for rows in sides:
            chosen = [problems[row] for row in rows]
            numbers = [first + row for row in rows]
            encoded, too_long = encode_problems(chosen, numbers, chat, max_length)
            examples.append(encoded)
            left_out += too_long
        train, validation = examples
        if not train or not validation:
            raise BadData(
                f"{part.source.name}: {len(train)} rows to train on and {len(validation)} to"
                f" validate on ({len(left_out)} left out)",
                "both need at least one: give more rows, or a larger --max-length",
            )
        share = Share(len(train), part.weight)
        if not share.taken(epochs):
            raise BadData(
                f"{part.source.name}: {epochs} epochs at weight {float(part.weight):g} take none of"
                f" its {len(train)} rows",
                "give it a larger weight, or more --epochs",
            )
        learned, held_out = ([problems[e.row_id - first] for e in side] for side in examples)
        found.append(
            EncodedSource(part.source.name, share, learned, held_out, part.source.test, train,
                    validation, left_out)
        )  # fmt: skip
        first += len(problems)
    return found
