"""What a run's folder holds, as typed and clean values, whatever state its files are in.

The files may hold anything. `clean` makes text valid UTF-8 without control characters, and numbers
finite; `conform` fits a value to a type, and leaves out what is missing or of another type.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from errors import BadRun, UserError
from evaluation.statistics import Paired
from files import JsonLines, read_json
from run.folder import Run, adapter_sha256

LARGEST = 1e38  # larger numbers cannot be drawn
DEEPEST = 40  # levels of nesting; our own files have six
Series = list[tuple[float, float]]  # (optimizer step, value)
OUTCOMES = {  # of a problem: whether base and tuned are correct
    "fixed": ("wrong", "correct"),
    "broken": ("correct", "wrong"),
    "still wrong": ("wrong", "wrong"),
}


@dataclass(frozen=True)
class Progress:
    """How far the newest checkpoint has come."""

    cursor: float | None = None  # steps of the schedule taken
    seconds: float | None = None  # of work, over all sessions
    skipped: float | None = None  # steps whose gradient was not finite
    stopped: str = ""  # why the run is finished; "" if it is not


@dataclass(frozen=True)
class Audit:
    """Statistics of the data."""

    rows: dict[str, int]  # split -> rows
    tokens: dict[str, float]  # of the training rows: total, mean, median, p99, longest
    left_out: list[str]  # a reason for each row that is not used
    duplicates: dict[str, dict[str, int]]  # where -> how questions are compared -> how many
    supervised_count: float | None = None  # tokens of the training rows


@dataclass(frozen=True)
class ModelResult:
    """How one model did on the problems of an evaluation.

    With several samples per problem, `correct` and `mistakes` describe the first.
    """

    correct: dict[str, int]  # scorer -> problems; the first scorer is the headline
    votes: dict[str, int]  # maj@k -> problems on which the majority of k samples is correct
    passed: dict[str, float]  # pass@k, in [0, 1]
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

    @property
    def headline(self) -> tuple[str, int] | None:
        """What answers are judged by, and how many are correct: the vote, if there is one."""
        return next(iter([*reversed(self.votes.items()), *self.correct.items()]), None)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: one or two models on the same problems."""

    name: str  # of its folder
    settings: dict[str, Any]
    models: dict[str, ModelResult]
    transcripts: dict[str, list[dict[str, str]]]  # outcome -> texts by name
    examples: list[dict[str, str]]
    problems: int = 0
    difference: Paired | None = None  # tuned versus base
    in_words: str = ""  # the conclusion about the difference

    @property
    def task(self) -> str:
        """`gsm8k`, where the settings say `gsm8k at abc123, test`."""
        return str(self.settings.get("data") or "").partition(" at ")[0].partition(", ")[0]

    @property
    def title(self) -> str:
        parts = [self.task, *(str(self.settings.get(k) or "") for k in ("split", "prompt"))]
        return ", ".join(filter(None, parts)) or self.name

    @property
    def has_choices(self) -> bool:
        """Whether models choose the most likely of given choices, and generate nothing."""
        return self.settings.get("prompt") == "choices"

    @property
    def consistent(self) -> bool:
        """Whether there are models, and no count exceeds the problems it is a part of."""
        models = self.models.values()
        counts = [n for m in models for d in (m.correct, m.votes, m.mistakes) for n in d.values()]
        cells = [c for m in models for table in m.by.values() for c in table.values()]
        cells += [(n, self.problems) for n in counts]
        return bool(models) and all(correct <= problems for correct, problems in cells)

    def headline(self, model: str) -> tuple[int, int] | None:
        """(problems correct, problems) by what the model's answers are judged by."""
        found = self.models[model].headline if model in self.models else None
        return (found[1], self.problems) if found and self.problems else None

    def rank(self) -> tuple:
        """Sort key: first the test split, the trained prompt, two models, many problems."""
        return (
            self.settings.get("split") != "test", self.settings.get("prompt") != "chat",
            len(self.models) < 2, -self.problems, self.name,
        )  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """Everything a report is made of."""

    folder: Path
    name: str
    config: dict[str, Any]
    options: dict[str, Any]  # by their current names
    identity: dict[str, Any]
    audit: Audit | None
    progress: Progress  # empty before the first checkpoint
    steps: list[dict[str, float]]  # log lines of steps
    validations: list[dict[str, float]]  # log lines of validations
    damaged_lines: int  # of the log
    evaluations: list[Evaluation]  # the most important first
    outdated: list[str]  # names of evaluations of adapters other than the one in best/
    unfinished: list[str]  # evaluations without a readable result, with their number of answers

    def train(self, key: str) -> Series:
        """(step, value) of each logged step that has `key`."""
        return [(v["step"], v[key]) for v in self.steps if v.keys() >= {"step", key}]

    def validation(self, key: str) -> Series:
        """(step, value) of each logged validation that has `key`."""
        return [(v["step"], v[key]) for v in self.validations if v.keys() >= {"step", key}]

    @property
    def best(self) -> dict[str, float]:
        """The validation that training keeps: the lowest loss, or the most exact matches."""
        signs = {"val_loss": 1}
        if self.options.get("stop_on") == "exact-match":  # among equals, the lowest loss
            signs = {"val_exact_match": -1} | signs
        complete = [v for v in self.validations if signs.keys() <= v.keys()]
        return min(complete, key=lambda v: [sign * v[k] for k, sign in signs.items()], default={})


# Reading a folder.


def read_run(folder: Path) -> RunRecord:
    """All of a run's folder that can be read; BadRun if it has no `config.json` of a run."""
    run, config = Run(folder), _read(folder / "config.json")
    if not isinstance(config.get("options"), dict):
        raise BadRun(
            f"{folder} is not a run folder: it has no config.json written by train.py",
            "give the folder that train.py wrote, such as out/qwen2-0.5b-instruct-gsm8k",
        )
    values, damaged_lines = run.log()
    lines = conform(list[dict[str, float]], clean(values))
    audit = clean(run.audit())
    supervised = {"supervised_count": audit.get("supervised")}  # its name in earlier files
    found = {path.parent: _evaluation(path) for path in folder.glob("evaluation/*/result.json")}
    evaluations = {place: e for place, e in found.items() if e.consistent}
    best = adapter_sha256(run.best)
    shown = [e for e in evaluations.values() if e.settings.get("adapter_sha256") in (None, best)]
    shown = shown if best else [*evaluations.values()]  # without a best/ there is no other adapter
    return RunRecord(
        folder=folder,
        name=clean(run.name),
        config=config,
        options=current_options(config["options"]),
        identity=mapping(config.get("identity")),
        audit=conform(Audit, supervised | audit) if audit else None,
        progress=conform(Progress, clean(run.progress())),
        steps=[line for line, value in zip(lines, values) if "val_loss" not in value],
        validations=[line for line, value in zip(lines, values) if "val_loss" in value],
        damaged_lines=damaged_lines,
        evaluations=sorted(shown, key=Evaluation.rank),
        outdated=sorted(e.name for e in evaluations.values() if e not in shown),
        unfinished=_unfinished(folder, evaluations.keys()),
    )


def _evaluation(path: Path) -> Evaluation:
    return conform(Evaluation, current_result(_read(path)) | {"name": clean(path.parent.name)})


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
        logs = sorted(place.glob("*.jsonl"))
        answers = [f"{clean(log.stem)} {_line_count(log):,}" for log in logs]
        found.append(f"{clean(place.name)} ({', '.join(answers) or 'none'})")
    return found


def _line_count(path: Path) -> int:
    try:
        return len(JsonLines.read(path))
    except OSError:
        return 0


# Files of earlier versions, by their current names.


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """`--r 8 --rank q_proj=16` is `--rank 8,q_proj=16` now, and likewise `--alpha`."""
    if "r" not in options:
        return options
    gone = [("bias", "none"), ("init", "kaiming")]  # with the values that are always used now
    removed = {"r", "alphas", *(name for name, usual in gone if options.get(name) == usual)}
    current = {name: value for name, value in options.items() if name not in removed}
    for name, usual, by_target in (("rank", "r", "rank"), ("alpha", "alpha", "alphas")):
        number = conform(float, options.get(usual))
        parts = ["" if number is None else f"{number:g}", conform(str, options.get(by_target))]
        current[name] = ",".join(filter(None, parts)) or None
    return current


def current_result(result: dict[str, Any]) -> dict[str, Any]:
    models = mapping(result.get("models", result.get("contestants")))
    return result | {
        "models": {
            name: {"correct": model.get("right"), "passed": model.get("pass"), **model}
            for name, model in models.items()
            if isinstance(model, dict)
        }
    }


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
    names. An int is a count: it is not negative.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        return conform(args[0], value)
    if kind is Any:
        return value
    if is_dataclass(kind):
        types = get_type_hints(kind).items()
        found = {name: conform(t, mapping(value).get(name)) for name, t in types}
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


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
