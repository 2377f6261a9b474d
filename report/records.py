"""What a run's folder holds, as typed and clean values, whatever state its files are in.

The files may hold anything. `clean` makes text valid UTF-8 without control characters, and numbers
finite; `conform` fits a value to a type, and leaves out what is missing or of another type.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from errors import BadRun, UserError
from evaluation.results import upgrade_result
from evaluation.statistics import Paired, wilson_interval
from files import JsonLines, read_json
from run.earlier import rename_options
from run.folder import Progress, Run, adapter_sha256
from run.identity import program_text

LARGEST = 1e38  # larger numbers cannot be drawn
DEEPEST = 40  # levels of nesting; our own files have six
Series = list[tuple[float, float]]  # (optimizer step, value)
OUTCOMES = {  # of a problem: whether base and tuned are correct
    "fixed": ("wrong", "correct"),
    "broken": ("correct", "wrong"),
    "still wrong": ("wrong", "wrong"),
}


@dataclass(frozen=True)
class Logged:
    """A line of the log: a step, or a validation. None is a value that is missing or not finite."""

    step: float | None = None
    epoch: float | None = None
    train_loss: float | None = None  # nats per supervised token
    train_token_accuracy: float | None = None  # teacher-forced, in [0, 1]
    learning_rate: float | None = None
    grad_norm: float | None = None  # before clipping
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None
    val_loss: float | None = None
    val_token_accuracy: float | None = None
    val_exact_match: float | None = None  # generated answers that are correct, in [0, 1]
    val_loss_by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditRecord:
    """Statistics of the data."""

    rows: dict[str, int]  # split -> rows
    tokens: dict[str, float]  # of the training rows: total, mean, median, p99, longest
    left_out: list[str]  # a reason for each row that is not used
    duplicates: dict[str, dict[str, int]]  # where -> how questions are compared -> how many
    supervised_count: float | None = None  # tokens of the training rows
    supervised: float | None = None  # the same, in files of earlier versions


class Share(NamedTuple):
    """A share in [0, 1], with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: float | None, problems: int) -> "Share | None":
        """The share with its Wilson interval; None if there is no such share."""
        if correct is None or not problems or not 0 <= correct <= problems:
            return None
        return cls(correct / problems, *wilson_interval(int(correct), problems))


@dataclass(frozen=True)
class ModelResult:
    """How one model did on the problems of an evaluation.

    With several samples per problem, `correct` and `mistakes` describe the first.
    """

    correct: dict[str, int]  # scorer -> problems; the first scorer is the headline
    votes: dict[str, int]  # maj@k -> problems on which the majority of k samples is correct
    pass_: dict[str, float]  # pass@k, in [0, 1]
    pass_intervals: dict[str, tuple[float, float]]  # pass@k -> its 95 % interval
    mistakes: dict[str, int]  # kind -> answers; "correct" is one of the kinds
    by: dict[str, dict[str, tuple[int, int]]]  # property -> its value -> (correct, problems)
    had_format: float | None = None  # answers in the required format
    cut_off: float | None = None  # answers that reached the token limit
    empty: float | None = None  # answers
    completions: float | None = None  # all samples of all problems
    tokens: float | None = None  # generated
    seconds: float | None = None
    loss: float | None = None  # nats per supervised token of the references
    token_accuracy: float | None = None  # teacher-forced, in [0, 1]
    loss_problems: float | None = None  # whose references these two were measured on
    right_choice_nats: float | None = None  # mean negative log-likelihood of the correct choice

    def scores(self, problems: int) -> dict[str, Share]:
        """Each vote, scorer and pass@k: first what answers are judged by, the largest vote."""
        counts = dict(reversed(self.votes.items())) | self.correct
        found = {name: Share.of(n, problems) for name, n in counts.items()}
        found |= {k: Share(x, *self.pass_intervals.get(k, (x, x))) for k, x in self.pass_.items()}
        return {name: share for name, share in found.items() if share}


@dataclass(frozen=True)
class EvaluationRecord:
    """A finished evaluation: one or two models on the same problems."""

    name: str  # of its folder
    settings: dict[str, Any]  # all of them
    models: dict[str, ModelResult]
    transcripts: dict[str, list[dict[str, str]]]  # outcome -> texts by name
    examples: list[dict[str, str]]
    problems: int = 0
    difference: Paired | None = None  # tuned versus base
    in_words: str = ""  # the conclusion about the difference
    # Settings that the report depends on:
    data: str = ""
    split: str = ""
    prompt: str = ""
    adapter: str = ""
    adapter_sha256: str = ""
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None

    @property
    def task(self) -> str:
        """`gsm8k`, where the settings say `gsm8k at abc123, test`."""
        return self.data.partition(" at ")[0].partition(", ")[0]

    @property
    def title(self) -> str:
        """The task, its split and the prompt, for people."""
        return ", ".join(filter(None, (self.task, self.split, self.prompt))) or self.name

    @property
    def has_choices(self) -> bool:
        """Whether models choose the most likely of given choices, and generate nothing."""
        return self.prompt == "choices"

    @property
    def consistent(self) -> bool:
        """Whether there are models, and no count exceeds the problems it is a part of."""
        models = self.models.values()
        counts = [n for m in models for d in (m.correct, m.votes, m.mistakes) for n in d.values()]
        cells = [cell for m in models for table in m.by.values() for cell in table.values()]
        cells += [(n, self.problems) for n in counts]
        return bool(models) and all(correct <= problems for correct, problems in cells)

    def headline(self, model: str) -> Share | None:
        """What the model's answers are judged by."""
        found = self.models.get(model)
        return next(iter(found.scores(self.problems).values()), None) if found else None

    def rank(self) -> tuple:
        """Sort key: first the test split, the trained prompt, two models, many problems."""
        two = len(self.models) == 2
        return self.split != "test", self.prompt != "chat", not two, -self.problems, self.name


@dataclass(frozen=True)
class RunRecord:
    """Everything a report is made of."""

    folder: Path
    name: str
    code: str  # version of the program
    options: dict[str, Any]  # all of them, by their current names
    identity: dict[str, Any]
    versions: dict[str, str]  # library -> version
    progress: Progress  # empty before the first checkpoint
    steps: list[Logged]
    validations: list[Logged]
    evaluations: list[EvaluationRecord]  # the most important first
    outdated: list[str]  # names of evaluations of adapters other than the one in best/
    unfinished: list[str]  # evaluations without a readable result, with their number of answers
    audit: AuditRecord | None = None
    damaged_lines: int = 0  # of the log
    started: str = ""  # date and time; earlier versions did not record it
    machine: str = ""
    ranks: int = 1  # processes
    changed_options: list[str] | None = None  # names of those that differ from their defaults
    # Options that the report depends on:
    schedule: str = ""
    stop_on: str = ""
    clip: float | None = None
    epochs: int | None = None
    price_per_hour: float | None = None

    def series(self, key: str) -> Series:
        """(step, value) of each logged step or validation that has `key`."""
        found = ((line.step, getattr(line, key)) for line in [*self.steps, *self.validations])
        return [(step, value) for step, value in found if None not in (step, value)]

    def values(self, key: str) -> list[float]:
        """The values of a log's series, without their steps."""
        return [value for _, value in self.series(key)]

    @property
    def best(self) -> Logged:
        """The validation that training keeps: the lowest loss, or the most exact matches."""
        keys = [(v.val_loss, v) for v in self.validations]
        if self.stop_on == "exact-match":  # among equals, the lowest loss
            keys = [(v.val_exact_match, v.val_loss, v) for v in self.validations]
            keys = [(-match, loss, v) for match, loss, v in keys if match is not None]
        complete = [key for key in keys if None not in key]
        return min(complete, key=lambda key: key[:-1], default=(Logged(),))[-1]

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults; all where that is not known."""
        names = self.options if self.changed_options is None else self.changed_options
        return {name: value for name, value in self.options.items() if name in names}

    @property
    def repeated(self) -> dict[str, Any]:
        """The options of a command that repeats the run, in another folder."""
        options = dict(self.changed)
        for name, commit in (("revision", "base_commit"), ("data_revision", "data_commit")):
            if isinstance(resolved := self.identity.get(commit), str):  # a dict if several sources
                options[name] = resolved
        return options | {"out": clean(f"{self.options.get('out') or self.folder.name}-again")}


# Reading a folder.


def read_run(folder: Path, price_per_hour: float | None = None) -> RunRecord:
    """All of a run's folder that can be read; BadRun if it has no `config.json` of a run."""
    run, config = Run(folder), _read(folder / "config.json")
    if not isinstance(config.get("options"), dict):
        raise BadRun(
            f"{folder} is not a run folder: it has no config.json written by train.py",
            "give the folder that train.py wrote, such as out/qwen2-0.5b-instruct-gsm8k",
        )
    options = rename_options(config["options"])
    values, damaged_lines = run.log()
    lines = {True: [], False: []}  # whether it is a validation
    for value in clean(values):
        lines["val_loss" in value].append(value)
    found = {path.parent: _evaluation(path) for path in folder.glob("evaluation/*/result.json")}
    read = {place: e for place, e in found.items() if e.consistent}
    best = adapter_sha256(run.best)  # None without a best/: then there is no other adapter
    shown = [e for e in read.values() if best is None or e.adapter_sha256 in ("", best)]
    values = {
        "folder": folder, "name": clean(run.name), "machine": config.get("device"),
        "code": program_text(conform(dict[str, str], config)), "options": options,
        "audit": clean(run.audit()) or None, "progress": clean(run.progress()),
        "steps": lines[False], "validations": lines[True], "damaged_lines": damaged_lines,
        "evaluations": sorted(shown, key=EvaluationRecord.rank),
        "outdated": sorted(e.name for e in read.values() if e not in shown),
        "unfinished": _unfinished(folder, read.keys()),
    }  # fmt: skip
    price = {} if price_per_hour is None else {"price_per_hour": price_per_hour}
    return conform(RunRecord, options | mapping(config.get("identity")) | config | values | price)


def _evaluation(path: Path) -> EvaluationRecord:
    result = upgrade_result(_read(path))
    named = {"name": clean(path.parent.name)}
    return conform(EvaluationRecord, mapping(result.get("settings")) | result | named)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it cannot be read."""
    try:
        return clean(read_json(path, UserError, ""))
    except UserError:
        return {}


def _unfinished(folder: Path, finished: Iterable[Path]) -> list[str]:
    """`test-1 (base 200, tuned 12)`: evaluations without a result, with their number of answers."""
    found = []
    begun = {path.parent for path in folder.glob("evaluation/*/settings.json")}
    for place in sorted(begun - set(finished)):
        logs = (path for path in sorted(place.glob("*.jsonl")) if path.is_file())
        answers = [f"{clean(log.stem)} {len(JsonLines.read(log)):,}" for log in logs]
        found.append(f"{clean(place.name)} ({', '.join(answers) or 'none'})")
    return found


# Values of any origin.


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def clean(value: Any, depth: int = DEEPEST) -> Any:
    """A JSON value that can be written, drawn and computed with; None in place of what cannot."""
    if isinstance(value, dict | list) and depth == 0:
        return None
    if isinstance(value, dict):
        return {clean(k): clean(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v, depth - 1) for v in value]
    if isinstance(value, str):
        whole = value.encode("utf-8", "replace").decode()  # JSON may hold "\ud800", text may not
        return CONTROL.sub("\ufffd", whole.replace("\r\n", "\n"))
    if isinstance(value, int | float) and not -LARGEST < value < LARGEST:
        return None  # NaN included
    return value


def conform(kind: Any, value: Any) -> Any:
    """`value` as type `kind`, without the parts that do not fit; None if `value` itself does not.

    Lists and dicts are empty where `value` is not one; a dataclass takes the values of its fields'
    names, `pass_` that of "pass". An int is a count: it is not negative.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        return None if value is None else conform(args[0], value)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(value, kind):
        return value
    if is_dataclass(kind):
        types, values = field_types(kind).items(), mapping(value)
        found = {name: conform(t, values.get(name.rstrip("_"))) for name, t in types}
        try:
            return kind(**{name: v for name, v in found.items() if v is not None})
        except TypeError:  # a value without a default is missing
            return None
    if origin is dict:
        fitted = ((k, conform(args[1], v)) for k, v in mapping(value).items())
        return {k: v for k, v in fitted if v is not None}
    if origin is list:
        fitted = (conform(args[0], v) for v in (value if isinstance(value, list) else []))
        return [v for v in fitted if v is not None]
    if origin is tuple:
        fitted = conform(list[args[0]], value)
        return tuple(fitted) if len(fitted) == len(args) == len(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
        return None
    return None if kind is int and value < 0 else kind(value)


field_types = cache(get_type_hints)


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
