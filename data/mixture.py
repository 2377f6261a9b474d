"""Several sources in one run: `--data gsm8k arc-challenge:0.5 mine.jsonl:2`.

The number after the colon is the source's weight: how many times an epoch takes each of its rows,
1 by default. Weight times rows is rounded to whole rows once; `batches.py` says which rows they
are. Row ids, which key order and dropout, continue from one source to the next. A question held out
in one source is held out in all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from data.batches import SourceRows
from data.chat import ChatFormat
from data.custom import parse_columns
from data.encode import Example, encode_problems
from data.problems import Problem, Source, content_fingerprint, fingerprint
from data.split import split_sources
from data.tasks import TASKS, is_on_hub, load_source
from errors import BadData, BadOption, BadRun

MAX_WEIGHT = 1000  # a larger one is a typing error
MAX_DIGITS = 20  # of a weight, as written


@dataclass(frozen=True)
class WeightedSource:
    """A source, and how many times an epoch takes each of its rows."""

    source: Source
    weight: float


@dataclass
class EncodedSource:
    """A source, split and encoded."""

    name: str
    weight: float
    rows: SourceRows  # how many examples `train` has, and an epoch takes
    train: list[Example]
    validation: list[Example]
    train_problems: list[Problem]  # the rows of `train`
    held_out: list[Problem]  # the rows of `validation`
    test_problems: list[Problem]
    left_out: list[str] = field(default_factory=list)  # "train.jsonl:40: 2310 tokens"


def parse_spec(text: str) -> tuple[str, float]:
    """(name, weight) from `name:weight`; BadOption for a weight out of range.

    What follows the last colon is a weight only if it is a number: `C:\\rows.jsonl` and `a:b.jsonl`
    are names. A name that ends with a colon and a number needs an explicit weight after it.
    """
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not colon:  # a name that is a number
        return text, 1.0
    if not 0 < weight <= MAX_WEIGHT or len(number) > MAX_DIGITS:
        raise BadOption(
            f"--data {text}: a weight is a number above 0, at most {MAX_WEIGHT}, not {number}",
            f"write {name}:0.5 to take half of its rows in each epoch, or leave the weight out",
        )
    return name, weight


def source_names(data: str | Sequence[str]) -> list[str]:
    """The names in `--data`, or in a saved run's option, which used to be a single string."""
    return [parse_spec(text)[0] for text in ([data] if isinstance(data, str) else data)]


def check_rounding(audit: Mapping[str, Any]) -> None:
    """Raise BadRun if a run of an earlier version would now take other rows.

    Earlier versions did not round the number of rows that an epoch takes from a source. `audit` is
    the run's audit.json.
    """
    for name, source in audit.get("sources", {}).items():
        weight, count = source["weight"], source["rows"]["train"]
        if Decimal(str(weight)) * count % 1 != 0:
            raise BadRun(
                f"an epoch of this run takes {weight:g} x {count} rows of {name}, which is not a"
                " whole number and is now rounded",
                "start a new run in another --out, or resume with the version that started it",
            )


def load_mixture(
    specs: Sequence[str],
    revision: str | None = None,
    columns: tuple[str, ...] = (),
    commits: Mapping[str, str | None] | str | None = None,
) -> list[WeightedSource]:
    """Load the sources of `--data`; BadOption or BadData for what cannot be loaded.

    `revision` belongs to the one source that comes from the Hub; `columns` apply to all custom
    data. `commits`, by source or of a single one, are those that a run recorded, and are taken
    instead. If there are several sources, each problem's id begins with its source's name.
    """
    parsed = [parse_spec(text) for text in specs]
    names = [name for name, _ in parsed]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise BadOption(
            f"--data names {', '.join(sorted(repeated))} more than once",
            "name each source once; a weight such as :2 takes its rows twice in each epoch",
        )
    renamed = parse_columns(columns)
    if renamed and all(name in TASKS for name in names):
        raise BadOption(f"--columns makes no sense for the task {', '.join(names)}", "leave it out")
    remote = [name for name in names if is_on_hub(name)]
    if revision and len(names) > 1 and len(remote) != 1:
        raise BadOption(
            f"--data-revision {revision} belongs to one source on the Hub, but --data names"
            f" {len(remote)}",
            "leave it out: config.json records the commit of each",
        )
    mixture = []
    for name, weight in parsed:
        its_revision = revision if len(names) == 1 or name in remote else None
        recorded = commits.get(name) if isinstance(commits, Mapping) else commits
        source = load_source(
            name, its_revision if recorded is None else recorded, {} if name in TASKS else renamed
        )
        mixture.append(WeightedSource(_prefixed(source) if len(names) > 1 else source, weight))
    return mixture


def _prefixed(source: Source) -> Source:
    """The source with its name before each id: several sources may have a train.jsonl."""
    return replace(
        source,
        train=[replace(p, id=f"{source.name}/{p.id}") for p in source.train],
        test=[replace(p, id=f"{source.name}/{p.id}") for p in source.test],
        bad=[f"{source.name}/{reason}" for reason in source.bad],
    )


def mixture_identity(mixture: list[WeightedSource], limit: int | None) -> dict[str, object]:
    """Commits and fingerprints, which must be the same when a run resumes.

    A single source has one of each; several have dictionaries by name. If "data_content", the rows
    and weights without any names, is the same, then the others may differ: files may be renamed.
    """
    sources = [weighted.source for weighted in mixture]
    content = [
        f"{content_fingerprint(part.source.train[:limit])}:{part.weight:g}" for part in mixture
    ]
    commits = {source.name: source.commit for source in sources}
    hashes = {source.name: fingerprint(source.train[:limit]) for source in sources}
    if len(sources) > 1:
        return {"data_commit": commits, "data_sha256": hashes, "data_content": content}
    (name,) = commits
    return {
        "data_commit": commits[name],
        "data_sha256": hashes[name],
        "data_content": content,
    }


def encode_mixture(
    mixture: list[WeightedSource],
    chat: ChatFormat,
    *,
    limit: int | None,
    validation_share: float,
    max_length: int,
) -> list[EncodedSource]:
    """Split and encode each source's first `limit` rows (None: all).

    Raises BadData if a source has no row to train on or to validate on, or if its weight is so
    small that an epoch takes none of its rows.
    """
    limited = [weighted.source.train[:limit] for weighted in mixture]
    splits = split_sources(limited, validation_share)
    first, encoded = 0, []  # `first`: the row id of a source's first row
    for weighted, problems, (train_rows, validation_rows) in zip(mixture, limited, splits):
        source = weighted.source
        train, too_long = _encode_rows(problems, train_rows, first, chat, max_length)
        validation, also_too_long = _encode_rows(problems, validation_rows, first, chat, max_length)
        left_out = [*source.bad, *too_long, *also_too_long]
        if not train or not validation:
            raise BadData(
                f"{source.name}: {len(train)} rows to train on and {len(validation)} to validate"
                f" on ({len(left_out)} left out)",
                "both need at least one: give more rows, or a larger --max-length",
            )
        rows = SourceRows(len(train), per_epoch=round(weighted.weight * len(train)))
        if rows.per_epoch == 0:
            raise BadData(
                f"{source.name}: an epoch at weight {weighted.weight:g} takes none of its"
                f" {len(train)} rows",
                "give it a larger weight",
            )
        encoded.append(
            EncodedSource(
                source.name, weighted.weight, rows, train, validation,
                train_problems=[problems[e.row_id - first] for e in train],
                held_out=[problems[e.row_id - first] for e in validation],
                test_problems=source.test, left_out=left_out,
            )
        )  # fmt: skip
        first += len(problems)
    return encoded


def _encode_rows(
    problems: list[Problem], rows: list[int], first: int, chat: ChatFormat, max_length: int
) -> tuple[list[Example], list[str]]:
    chosen = [problems[row] for row in rows]
    return encode_problems(chosen, [first + row for row in rows], chat, max_length)
