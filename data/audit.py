"""What is in the data, said before the first step: rows, lengths, supervision, duplicates."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from data.encode import Example
from data.mixture import EncodedSource
from data.rows import Problem
from data.split import masked, normal, repeated, shared
from errors import printable


@dataclass(frozen=True)
class Audit:
    """Figures of the data after their split; plain values, so that they can be saved as JSON."""

    rows: dict[str, int]  # train, validation, test
    left_out: list[str]  # "train.jsonl:12: question is empty", "train.jsonl:40: 2310 tokens"
    tokens: dict[str, int]  # of the training rows: total, mean, median, p99, longest
    supervised: int  # tokens of the training rows
    duplicates: dict[str, dict[str, int]]  # where -> exact, case and space, numbers masked
    # Of several sources, or of one with a weight: name -> its own audit, weight, rows an epoch.
    sources: dict[str, dict] = field(default_factory=dict)


def audit_mixture(parts: Sequence[EncodedSource]) -> Audit:
    """Of all sources together, and of each, if there are several or one has a weight."""

    def of(some: Sequence[EncodedSource]) -> Audit:
        return audit(
            train=[p for part in some for p in part.learned],
            validation=[p for part in some for p in part.held_out],
            test=[p for part in some for p in part.test],
            examples=[e for part in some for e in part.train],
            left_out=[reason for part in some for reason in part.left_out],
        )

    whole = of(parts)
    plain = [part.share.weight for part in parts] == [1]
    for part in () if plain else parts:
        weight = {"weight": float(part.share.weight), "rows an epoch": part.share.taken(1)}
        whole.sources[part.name] = asdict(of([part])) | weight
    return whole


def audit(
    *,
    train: list[Problem],
    validation: list[Problem],
    test: list[Problem],
    examples: list[Example],
    left_out: list[str],
) -> Audit:
    """`examples` are the encoded training rows; `left_out` says why a row is in none of them."""
    lengths = np.array([len(e.tokens) for e in examples] or [0])
    sides = {"train": train, "validation": validation, "test": test}
    forms = {"exact": str, "case and space": normal, "numbers masked": masked}
    questions = {
        kind: {side: [form(p.question) for p in problems] for side, problems in sides.items()}
        for kind, form in forms.items()
    }
    duplicates = {"within train": {k: repeated(q["train"]) for k, q in questions.items()}}
    for a, b in itertools.combinations(sides, 2):
        duplicates[f"{a} and {b}"] = {k: shared(q[a], q[b]) for k, q in questions.items()}
    return Audit(
        rows={"train": len(train), "validation": len(validation), "test": len(test)},
        left_out=left_out,
        tokens={
            "total": int(lengths.sum()),
            "mean": round(float(lengths.mean())),
            "median": int(np.median(lengths)),
            "p99": int(np.quantile(lengths, 0.99)),
            "longest": int(lengths.max()),
        },
        supervised=sum(e.supervised_count for e in examples),
        duplicates=duplicates,
    )


def audit_lines(a: Audit) -> list[str]:
    """The audit for people, in 80 columns."""
    rows = ", ".join(f"{count:,} {split}" for split, count in a.rows.items())
    share = a.supervised / max(1, a.tokens["total"])
    once = "of all rows" if a.sources else "an epoch"
    lines = [
        f"rows        {rows}",
        "lengths     " + ", ".join(f"{k} {v:,}" for k, v in a.tokens.items() if k != "total"),
        f"tokens      {a.tokens['total']:,} {once}, {a.supervised:,} supervised ({share:.0%})",
        f"left out    {len(a.left_out)} rows",
        *(f"            {reason}" for reason in a.left_out[:3]),  # audit.json has them all
    ]
    for name, part in a.sources.items():
        taken = f"{part['rows an epoch']:,} rows an epoch (x {part['weight']:g})"
        rows = ", ".join(f"{count:,} {split}" for split, count in part["rows"].items())
        lines.append(f"source      {printable(name)[-30:]}: {taken}")
        lines.append(f"            {rows}; {part['tokens']['total']:,} tokens")
    for place, counts in a.duplicates.items():
        if any(counts.values()):
            found = ", ".join(f"{count} {form}" for form, count in counts.items())
            lines.append(f"duplicates  {place}: {found}")
    if not any(any(c.values()) for c in a.duplicates.values()):
        lines.append("duplicates  none within train, nor across train, validation and test")
    return lines
