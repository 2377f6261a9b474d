"""What a run folder holds, as clean values, whatever state its files are in.

Text is valid UTF-8 without control characters, numbers are finite, and what is missing, torn or of
another shape than it should be is not there. No torch: a report can be made on any machine.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import BadRun

Points = list[tuple[float, float]]  # (optimizer step, value)
DIFFERENCE = (
    "fixed", "broke", "both_right", "both_wrong",
    "p_value", "low_points", "high_points", "confidence",
)  # fmt: skip
FATES = {  # of a problem -> whether base and tuned are right
    "fixed": ("wrong", "right"),
    "broken": ("right", "wrong"),
    "still wrong": ("wrong", "wrong"),
}


@dataclass(frozen=True)
class Contestant:
    """What was counted of one model's answers to the same problems."""

    right: dict[str, int]  # by scorer; the first is the headline
    votes: dict[str, int]  # maj@k -> problems right
    passed: dict[str, float]  # pass@k -> rate
    mistakes: dict[str, int]  # by kind, "correct" included
    by: dict[str, dict[str, tuple[int, int]]]  # table -> row -> right, of how many
    figures: dict[str, float]  # had_format, cut_off, empty, completions, tokens, seconds, loss, ...

    def headline(self) -> tuple[str, int] | None:
        """What answers are judged by, and how many it calls right: the vote, if there is one."""
        return next(iter([*reversed(self.votes.items()), *self.right.items()]), None)


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: one or two contestants on the same problems."""

    name: str  # of its folder
    settings: dict[str, Any]
    problems: int
    contestants: dict[str, Contestant]
    difference: dict[str, float]  # figures of base against tuned; empty without two of them
    words: str  # what the difference is worth
    transcripts: dict[str, list[dict[str, str]]]
    examples: list[dict[str, str]]
    task: str = ""  # where there are evaluations of several

    @property
    def title(self) -> str:
        kind = [self.task, *(str(self.settings.get(k) or "") for k in ("split", "prompt"))]
        return ", ".join(filter(None, kind)) or self.name

    @property
    def has_choices(self) -> bool:
        """Whether nothing was generated: the likeliest of given choices was taken."""
        return self.settings.get("prompt") == "choices"


@dataclass(frozen=True)
class Run:
    """Everything a report is made of."""

    folder: Path
    name: str
    config: dict[str, Any]
    options: dict[str, Any]
    identity: dict[str, Any]
    audit: dict[str, Any]
    progress: dict[str, Any]  # of the newest checkpoint
    steps: list[dict[str, float]]
    validations: list[dict[str, float]]
    torn: int  # lines of the log that are no JSON objects
    evaluations: list[Evaluation]
    unfinished: list[str]  # evaluations under way, in words

    def train(self, key: str) -> Points:
        """A column of the steps' lines."""
        return _points(self.steps, key)

    def validation(self, key: str) -> Points:
        """A column of the validations' lines."""
        return _points(self.validations, key)

    @property
    def best(self) -> dict[str, float]:
        """The validation that training keeps as best: lowest loss, or most exact matches."""
        keys = ["val_loss"]
        if self.options.get("stop_on") == "exact-match":  # of equal ones the lower loss
            keys.insert(0, "val_exact_match")
        complete = [v for v in self.validations if all(key in v for key in keys)]
        signs = {"val_loss": 1, "val_exact_match": -1}
        return min(complete, key=lambda v: [signs[k] * v[k] for k in keys], default={})


def read_run(folder: Path) -> Run:
    """All of a run folder that can be read; BadRun if it has no `config.json` of a run."""
    config = mapping(_load(folder / "config.json"))
    if not isinstance(config.get("options"), dict):
        raise BadRun(
            f"{folder} is no run folder: it has no config.json with options",
            "give the folder that train.py wrote, such as out/qwen2-0.5b-instruct-gsm8k",
        )
    rows, torn = _read_log(folder / "metrics.jsonl")
    results = [_evaluation(path.parent) for path in (folder / "evaluation").glob("*/result.json")]
    tasks = [str(e.settings.get("data")).partition(" at ")[0].partition(", ")[0] for e in results]
    if len(set(tasks)) > 1:
        results = [replace(e, task=task) for e, task in zip(results, tasks)]
    return Run(
        folder=folder,
        name=clean(folder.resolve().name),
        config=config,
        options=config["options"],
        identity=mapping(config.get("identity")),
        audit=mapping(_load(folder / "audit.json")),
        progress=_newest_progress(folder),
        steps=[numbers(row) for row in rows if "val_loss" not in row],
        validations=[numbers(row) for row in rows if "val_loss" in row],
        torn=torn,
        evaluations=sorted((e for e in results if e.contestants), key=_chief_first),
        unfinished=_unfinished(folder),
    )


def _load(path: Path) -> Any:
    """The JSON of a file, cleaned; None if there is none to read."""
    try:
        return clean(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def clean(value: Any) -> Any:
    """A JSON value that can be written, drawn and reckoned with."""
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, str):
        whole = value.encode("utf-8", "replace").decode()  # "\ud800" alone is JSON, and no text
        return _CONTROL.sub("\ufffd", whole.replace("\r\n", "\n"))
    if isinstance(value, int | float) and not -1e38 < value < 1e38:
        return None  # NaN, infinity, or too large to draw
    return value


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The numbers of an object; true and false are none."""
    return {
        k: v
        for k, v in mapping(value).items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }


def _texts(value: Any) -> dict[str, str]:
    return {k: v for k, v in mapping(value).items() if isinstance(v, str)}


def _counts(value: Any, most: int) -> dict[str, int]:
    """The numbers of an object that can be counts out of `most`."""
    return {k: int(v) for k, v in numbers(value).items() if 0 <= v <= most and v == int(v)}


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(every line's object, how many whole lines are none); a torn last line is not whole.

    Unlike `run.metrics.read_log`, on which a run goes on, it reads around damage.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return [], 0
    rows = []
    for line in lines:
        try:
            rows.append(clean(json.loads(line)))
        except (ValueError, RecursionError):
            rows.append(None)
    kept = [row for row in rows if isinstance(row, dict)]
    return kept, len(rows) - len(kept)


def _points(rows: list[dict[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if "step" in row and key in row]


def _newest_progress(folder: Path) -> dict[str, Any]:
    """The progress that the newest readable checkpoint holds."""
    named = {
        p.name.removeprefix("step-"): p
        for p in (folder / "checkpoints").glob("step-*")
        if p.is_dir()
    }
    for number in sorted((n for n in named if n.isdecimal()), key=int, reverse=True):
        if progress := mapping(mapping(_load(named[number] / "progress.json")).get("progress")):
            return progress
    return {}


def _evaluation(folder: Path) -> Evaluation:
    """What an evaluation folder's `result.json` holds; no contestants if it cannot be read."""
    result = mapping(_load(folder / "result.json"))
    problems = _counts(result, 10**12).get("problems", 0)
    difference = numbers(result.get("difference"))
    words = result.get("in_words")
    shown = mapping(result.get("transcripts"))
    return Evaluation(
        name=clean(folder.name),
        settings=mapping(result.get("settings")),
        problems=problems,
        contestants={
            k: _contestant(v, problems)
            for k, v in mapping(result.get("contestants")).items()
            if isinstance(v, dict)
        },
        difference=difference if difference.keys() >= set(DIFFERENCE) else {},
        words=words if isinstance(words, str) else "",
        transcripts={fate: _transcripts(shown.get(fate)) for fate in FATES},
        examples=_transcripts(result.get("examples")),
    )


def _contestant(value: dict[str, Any], problems: int) -> Contestant:
    tables = {k: mapping(v) for k, v in mapping(value.get("by")).items()}
    return Contestant(
        right=_counts(value.get("right"), problems),
        votes=_counts(value.get("votes"), problems),
        passed={k: v for k, v in numbers(value.get("pass")).items() if 0 <= v <= 1},
        mistakes=_counts(value.get("mistakes"), problems),
        by={
            k: {row: cell for row, v in t.items() if (cell := _cell(v))} for k, t in tables.items()
        },
        figures=numbers(value),
    )


def _cell(value: Any) -> tuple[int, int] | None:
    """(right, of how many), if it is that."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    cell = _counts(dict(zip(("right", "of"), value)), 10**12)
    return (cell["right"], cell["of"]) if len(cell) == 2 and cell["right"] <= cell["of"] else None


def _transcripts(value: Any) -> list[dict[str, str]]:
    return [t for t in map(_texts, value) if t] if isinstance(value, list) else []


def _chief_first(e: Evaluation) -> tuple:
    """Test before other splits, the prompt that was trained before others, then the largest."""
    return (
        e.settings.get("split") != "test", e.settings.get("prompt") != "chat",
        len(e.contestants) < 2, -e.problems, e.name,
    )  # fmt: skip


def _unfinished(folder: Path) -> list[str]:
    """Evaluations that have begun and have no result, and how many answers they have."""
    found = []
    for path in sorted((folder / "evaluation").glob("*/settings.json")):
        if (path.parent / "result.json").exists():
            continue
        counts = [
            f"{clean(log.stem)} {_lines(log):,}" for log in sorted(path.parent.glob("*.jsonl"))
        ]
        found.append(f"{clean(path.parent.name)} ({', '.join(counts) or 'none'})")
    return found


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
