"""What an evaluation measures: tasks, each with its problems and the judge of their answers.

By default these are the sources that the adapter's run was trained on, at the same commits and with
the same columns. A split of training data is divided as the run divided it, so that no problem the
adapter was trained on is among its validation problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.custom import parse_columns
from data.gsm8k import EXAMPLES
from data.mixture import source_names
from data.multiple_choice import CHOICE_TASKS
from data.rows import Problem, Source, read_problems
from data.shots import drawn_shots, same_shots
from data.split import split_sources
from data.tasks import TASKS, load_source
from errors import BadData, BadOption, BadRun, listed
from evaluation.choices import choice_scorers, with_shots
from evaluation.generative import EACH, NUMBERS, TEXT, Judge
from evaluation.golds import ends_in_number, gold_value


@dataclass(frozen=True)
class Task:
    """The problems of one data source, and how answers to them are judged."""

    name: str
    description: str  # which problems these are, in words; part of an evaluation's identity
    problems: list[Problem]
    # By problem id, solved problems for its prompt; those of choices are in their contexts.
    shots: Mapping[str, list[Problem]]
    judge: Judge
    golds: str = ""  # how many gold answers hold a number, and what follows from that, in words

    def lines(self, prompt: str) -> list[str]:
        """For people: what is measured, and how it is judged."""
        found = f"  {len(self.problems):,} problems; prompt {prompt}"
        judged = f"judged as {self.judge.name}, by {self.judge.headline}"
        golds = [f"  {self.golds}"] if self.golds else []
        return [f"data {self.description}", f"{found}; {judged}", *golds]


@dataclass(frozen=True)
class Selection:
    """Which problems to measure on."""

    data: tuple[str, ...] = ()  # as for training; empty: what the adapter's run was trained on
    data_revision: str | None = None
    columns: tuple[str, ...] = ()
    split: str = "test"  # or "validation" or "train"
    limit: int | None = None  # problems of each task
    shots: int = 0  # solved problems shown before each question
    same_shots: bool = False  # the same ones before all questions
    include_held_out: bool = False  # the train split then has the validation problems as well


def judge_of(
    problems: list[Problem], sources: Sequence[str] = (), *, generated: bool = False
) -> Judge:
    """How answers to `problems` of these sources are judged; the one place where this is decided.

    A single source that is a built-in task with its own scorers is judged by them.
    Problems with choices are judged by the likelihood of each choice, unless `generated` asks for
    the judge of generated answers. Those are judged as numbers if at least half of the gold answers
    hold one, and otherwise as text. If several sources are asked together and only some of the
    golds hold a number, each answer is judged by its own gold. `judged_problems` says which
    problems this leaves out.
    """
    if len(sources) == 1 and sources[0] in TASKS and TASKS[sources[0]].scorers:
        return Judge(sources[0], TASKS[sources[0]].scorers)
    if not generated and any(p.choices for p in problems):
        return Judge("choices", choice_scorers(problems), generated=False)
    numbers = sum(gold_value(p.answer) is not None for p in problems)
    if len(sources) > 1 and 0 < numbers < len(problems):
        return EACH
    return NUMBERS if 2 * numbers >= len(problems) else TEXT


def judged_problems(judge: Judge, problems: list[Problem]) -> tuple[list[Problem], str]:
    """The problems whose gold answers `judge` can read, and their number in words for printing."""
    if judge not in (NUMBERS, EACH, TEXT) or not problems:
        return problems, ""
    numbers = [p for p in problems if gold_value(p.answer) is not None]
    others = [p for p in problems if gold_value(p.answer) is None]
    found = f"{len(numbers):,} of {len(problems):,} golds hold a number"
    as_text = "compared as text: only an answer with exactly the gold's characters is correct"
    if judge is TEXT:
        few = ", fewer than half" if numbers else ""
        forms = "'#### N', 'The answer is: N', '\\boxed{N}' or N alone"
        return problems, f"{found} ({forms}){few}; answers are {as_text}"
    rewritten = sum(not ends_in_number(p.answer) for p in numbers)
    if rewritten:
        found += f"; {rewritten:,} rewritten as '#### N' for the scorers that compare texts"
    if judge is EACH:
        return problems, f"{found}; answers to the other {len(others):,} are {as_text}"
    if others:
        rows = "row" if len(others) == 1 else "rows"
        found += f"; {len(others):,} {rows} left out: {listed([p.id for p in others], 10)}"
    return numbers, found


def find_tasks(selection: Selection, run: Mapping[str, Any], held_out_file: Path) -> list[Task]:
    """The tasks to measure on, each with at least one problem.

    `run` holds the options and the identity of the adapter's run, and is empty if there is none;
    `held_out_file` has the rows that the run held out, if it exists. Raises BadOption for
    contradictory options, BadData if a source that was asked for has no problems in this split,
    and BadRun for options of a run that cannot be read.
    """
    names = list(dict.fromkeys(source_names(selection.data))) or run_sources(run)
    if selection.data_revision and len(names) > 1:
        raise BadOption("--data-revision needs a single --data", "evaluate them one at a time")
    if selection.columns and all(name in TASKS for name in names):
        raise BadOption(f"--columns does not apply to the task {', '.join(names)}", "leave it out")

    # The rows that the run held out, from its own folder; the file has no choices and no shots.
    if selection.split == "validation" and not selection.data and not selection.shots:
        if len(names) == 1 and names[0] not in CHOICE_TASKS and held_out_file.exists():
            problems = read_problems(held_out_file)[0]
            description = f"{names[0]}, the rows held out by the adapter's run"
            judge = judge_of(problems, names)
            problems, golds = judged_problems(judge, problems)
            return [Task(names[0], description, problems[: selection.limit], {}, judge, golds)]

    given = {"data_commit": selection.data_revision, "columns": selection.columns}
    options = ({} if selection.data else dict(run)) | {k: v for k, v in given.items() if v}
    sources = {name: load_run_source(options, name) for name in names}
    problems = select_problems(sources, selection.split, run)
    tasks = [make_task(selection, name, sources[name], problems[name]) for name in names]
    found = [task for task in tasks if task.problems]
    for task in tasks:
        if not task.problems and (selection.data or not found):
            raise BadData(
                f"{task.name} has 0 {selection.split} problems", "use another --split or --data"
            )
        if not task.problems:
            print(f"{task.name} has no {selection.split} problems: not measured")
    return found


def make_task(selection: Selection, name: str, source: Source, problems: list[Problem]) -> Task:
    """The task of one source; `problems` are all of its problems in the selected split."""
    at = f" at {source.commit}" if source.commit else ""
    description = f"{name}{at}, {selection.split}"
    if source.note:
        print(source.line())
    if source.bad:
        print(f"{name}: {len(source.bad)} rows are left out: {listed(source.bad, 3)}")
    # Decided from all problems, so that --limit does not change how answers are judged.
    judge = judge_of(problems, [name])
    judged, golds = judged_problems(judge, problems)
    if selection.include_held_out:  # train.py holds out the same questions again
        judged, golds = judged_problems(judge, source.train)
        description += ", held-out rows too"
    problems = judged[: selection.limit]
    draw = source.shots or partial(drawn_shots, source.train)
    if selection.same_shots:
        draw = partial(same_shots, source.train)
    asked = problems if source.shots else [*problems, *EXAMPLES]
    shots = {p.id: rows for p, rows in zip(asked, draw(asked, selection.shots))}
    enough = all(len(rows) == selection.shots for rows in shots.values())
    if source.shots:
        problems, shots = [with_shots(p, shots[p.id]) for p in problems], {}
    if not enough:
        raise BadData(
            f"{description} has fewer than {selection.shots} other problems to show before each",
            "use another --split, fewer --shots, or other --data",
        )
    return Task(name, description, problems, shots, judge, golds)


def select_problems(
    sources: Mapping[str, Source], split: str, run: Mapping[str, Any]
) -> dict[str, list[Problem]]:
    """The problems of a split, by source.

    Train and validation problems are divided as by the run. A question that the run held out in
    one of its sources is held out in all of them, so all of its sources are loaded.
    """
    if split == "test":
        return {name: source.test for name, source in sources.items()}
    trained_on = {name: source for name, source in sources.items() if name in run_sources(run)}
    others = [{name: source} for name, source in sources.items() if name not in trained_on]
    if trained_on:
        missing = [name for name in run_sources(run) if name not in sources]
        trained_on |= {name: load_run_source(run, name) for name in missing}
    selected = {}
    for group in (trained_on, *others):
        rows = [source.train[: run.get("limit")] for source in group.values()]
        sides = split_sources(rows, run.get("validation_share", 0.1))
        for name, problems, (train, validation) in zip(group, rows, sides):
            side = validation if split == "validation" else train
            selected[name] = [problems[row] for row in side]
    return selected


def load_run_source(run: Mapping[str, Any], name: str) -> Source:
    """One source of a run, at the commit and with the columns that its options name."""
    commits = run.get("data_commit")
    commit = commits.get(name) if isinstance(commits, dict) else commits
    if commit is None and "data_commit" in run:
        commit = ""
    columns = parse_columns(tuple(run_texts(run, "columns"))) if run.get("columns") else {}
    return load_source(name, commit, {} if name in TASKS else columns)


def run_sources(run: Mapping[str, Any]) -> list[str]:
    """The names of the sources that a run was trained on; GSM8K if there is no run."""
    return source_names(run_texts({"data": "gsm8k"} | dict(run), "data"))


def run_texts(run: Mapping[str, Any], key: str) -> list[str]:
    """An option of a run that holds one or more texts; raises BadRun if it holds anything else."""
    texts = [run[key]] if isinstance(run[key], str) else run[key]
    if not isinstance(texts, (list, tuple)) or not texts or {type(t) for t in texts} != {str}:
        raise BadRun(f"the adapter's run names its {key} as {texts!r}", f"give it with --{key}")
    return list(texts)
