"""Statistics of the data, printed before the first step: rows, lengths, supervision, duplicates."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from data.encode import Example
from data.mixture import EncodedSource
from data.rows import Problem
from data.split import count_repeated, count_shared, mask_numbers, normalize
from terminal import percent


@dataclass(frozen=True)
class Audit:
    """Statistics of the data after the split, as plain values that JSON can hold."""

    rows: dict[str, int]  # split -> rows
    left_out: list[str]  # "train.jsonl:12: question is empty", "train.jsonl:40: 2310 tokens"
    tokens: dict[str, int]  # of the training rows: total, mean, median, p99, longest
    supervised_count: int  # supervised tokens of the training rows
    duplicates: dict[str, dict[str, int]]  # where -> kind -> how many questions
    # Of several sources, or of one with a weight: name -> its audit, weight and rows per epoch.
    sources: dict[str, dict] = field(default_factory=dict)


DUPLICATES: dict[str, Callable[[str], str]] = {  # kind -> what two questions are compared by
    "exact": str,
    "ignoring case": normalize,  # and white space
    "ignoring numbers": mask_numbers,  # and case and white space
}


def audit_mixture(sources: Sequence[EncodedSource]) -> Audit:
    """Audit all sources together; also each by itself, if there are several or one has a weight."""
    whole = _audit_sources(sources)
    if [source.weight for source in sources] != [1]:
        for source in sources:
            own = asdict(_audit_sources([source]))
            own |= {"weight": source.weight, "rows_per_epoch": source.rows.per_epoch}
            whole.sources[source.name] = own
    return whole


def _audit_sources(sources: Sequence[EncodedSource]) -> Audit:
    return audit(
        train=[p for source in sources for p in source.train_problems],
        validation=[p for source in sources for p in source.held_out],
        test=[p for source in sources for p in source.test_problems],
        examples=[e for source in sources for e in source.train],
        left_out=[reason for source in sources for reason in source.left_out],
    )


def audit(
    *,
    train: list[Problem],
    validation: list[Problem],
    test: list[Problem],
    examples: list[Example],
    left_out: list[str],
) -> Audit:
    """Statistics of three splits; `examples` are the training rows encoded."""
    splits = {"train": train, "validation": validation, "test": test}
    lengths = np.array([len(e.tokens) for e in examples] or [0])
    texts = {
        kind: {split: [key(p.question) for p in problems] for split, problems in splits.items()}
        for kind, key in DUPLICATES.items()
    }
    duplicates = {"within train": {k: count_repeated(t["train"]) for k, t in texts.items()}}
    for a, b in itertools.combinations(splits, 2):
        duplicates[f"{a} and {b}"] = {k: count_shared(t[a], t[b]) for k, t in texts.items()}
    return Audit(
        rows={split: len(problems) for split, problems in splits.items()},
        left_out=left_out,
        tokens={
            "total": int(lengths.sum()),
            "mean": round(float(lengths.mean())),
            "median": int(np.median(lengths)),
            "p99": int(np.quantile(lengths, 0.99)),
            "longest": int(lengths.max()),
        },
        supervised_count=sum(e.supervised_count for e in examples),
        duplicates=duplicates,
    )


def audit_lines(a: Audit) -> list[str]:
    """The audit as lines of at most 80 columns."""
    share = percent(a.supervised_count / max(1, a.tokens["total"]), 0)
    per = "in all rows" if a.sources else "per epoch"
    lines = [
        f"rows        {_splits(a.rows)}",
        "lengths     " + ", ".join(f"{k} {v:,}" for k, v in a.tokens.items() if k != "total"),
        f"tokens      {a.tokens['total']:,} {per}, {a.supervised_count:,} supervised ({share})",
        f"left out    {len(a.left_out)} rows",
        *(f"            {reason}" for reason in a.left_out[:3]),  # audit.json has them all
    ]
    for name, own in a.sources.items():
        taken = f"{own['rows_per_epoch']:,} rows per epoch (x {own['weight']:g})"
        lines.append(f"source      {name[-30:]}: {taken}")
        lines.append(f"            {_splits(own['rows'])}; {own['tokens']['total']:,} tokens")
    for where, counts in a.duplicates.items():
        if any(counts.values()):
            found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            lines.append(f"duplicates  {where}: {found}")
    if not any(any(counts.values()) for counts in a.duplicates.values()):
        lines.append("duplicates  none within train, or across train, validation and test")
    return lines


def _splits(rows: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in rows.items())
