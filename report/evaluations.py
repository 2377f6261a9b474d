"""The sections of a report that compare the models of an evaluation."""

import textwrap
from collections.abc import Iterator

from evaluation.mistakes import KINDS
from evaluation.statistics import corrected, in_words
from report import page, show
from report.figures import shares
from report.page import Block, Table, side_by_side
from report.records import OUTCOMES, EvaluationRecord, ModelResult, RunRecord, Share

VOTED = (
    "The verdict and the answer accuracy by kind of problem use the majority of all samples;"
    " scorers, kinds of mistakes and transcripts use the first sample of each problem."
)


def measure(e: EvaluationRecord) -> str:
    """What the evaluation measures, as distinct from token accuracy."""
    return "Choice accuracy (most likely)" if e.has_choices else "Answer accuracy (generated)"


def card(evaluations: list[EvaluationRecord]) -> tuple[str, str, str]:
    """Base and tuned in the most important evaluation, and how they differ."""
    if not evaluations:
        note = "no evaluation is finished; loss and token accuracy are not a substitute"
        return "Answer accuracy (generated)", "not measured", note
    first = evaluations[0]
    values = [share.value for share in map(first.headline, first.models) if share]
    note = first.in_words or f"only {', '.join(first.models)}: nothing to compare with"
    note = f"{first.problems:,} problems. {note}"
    return f"{measure(first)}, {first.title}", show.from_to(values), note


def tasks_table(evaluations: list[EvaluationRecord]) -> Table:
    """The tasks on which base and tuned were both measured; nothing if there is only one."""
    compared = [e for e in evaluations if e.difference]
    found = corrected([e.difference for e in compared])
    rows = [
        (e.title, show.count(e.problems), show.accuracy(e.headline("base")),
         show.accuracy(e.headline("tuned")), in_words(difference, len(found)))
        for e, difference in zip(compared, found)
    ]  # fmt: skip
    header = ("task", "problems", "base", "tuned", "tuned versus base")
    several = len({e.task for e in compared}) > 1
    return Table(header, rows * several, "Learned and forgotten, with 95 % intervals")


def in_short(e: EvaluationRecord) -> Iterator[Block]:
    """How an evaluation was done, and what came out."""
    yield page.heading(f"{measure(e)}: {e.title}", 3)
    yield page.paragraph(setup(e))
    yield page.paragraph(f"Tuned versus base: {e.in_words}." if e.in_words else "", "lead")
    yield page.pairs(changed_answers(e))
    yield page.paragraph(VOTED if any(m.votes for m in e.models.values()) else "", "note")
    yield page.pictures(pictures(e))
    yield scorer_table(e)


def setup(e: EvaluationRecord) -> str:
    """How the evaluation was made, in sentences."""
    models = " and ".join(e.models)
    if e.has_choices:
        return (
            f"{e.problems:,} questions, given to {models} with the same contexts; choices are"
            " scored by their likelihood, and nothing is generated."
        )
    sampled = f"{e.samples} samples at temperature {e.temperature:g}"
    longest = show.count(e.max_new_tokens) or page.MISSING
    chosen = " The adapter was chosen by these rows, so the figures are optimistic."
    return (
        f"{e.problems:,} problems, answered by {models} with the same prompts:"
        f" {sampled if e.temperature else 'greedy decoding'}, at most {longest} new tokens per"
        f" answer.{chosen if e.split == 'validation' and e.adapter else ''}"
    )


def changed_answers(e: EvaluationRecord) -> dict[str, str | None]:
    """On how many problems base and tuned differ, with p-value and interval."""
    if (d := e.difference) is None:
        return {}
    interval = f"{show.signed(d.low_points)} to {show.signed(d.high_points)} points"
    return {
        "fixed (base wrong, tuned correct)": show.count(d.fixed),
        "broken (base correct, tuned wrong)": show.count(d.broke),
        "both correct": show.count(d.both_right),
        "both wrong": show.count(d.both_wrong),
        "exact p-value (McNemar)": f"{d.p_value:.2g}",
        f"difference, {100 * d.confidence:g} % interval": interval,
    }


def pictures(e: EvaluationRecord) -> Iterator[str]:
    """Accuracy by scorer and by reasoning steps, and kinds of mistakes; "" without values."""
    scores, steps, wrong = {}, {}, {}
    for name, model in e.models.items():
        scores[name] = model.scores(e.problems)
        cells = model.by.get("reasoning steps", {})
        steps[name] = {f"{key} ({cell[1]:,})": Share.of(*cell) for key, cell in cells.items()}
        kinds = {kind: n for kind, n in model.mistakes.items() if kind != "correct" and n}
        wrong[name] = {kind: Share.of(n, e.problems) for kind, n in kinds.items()}
    yield shares(measure(e), "% of problems, 95 % intervals", scores)
    yield shares("Answer accuracy by reasoning steps", "% of problems, by steps (problems)", steps)
    yield shares("Kinds of mistakes", f"% of {e.problems:,} answers", wrong)


def scorer_table(e: EvaluationRecord) -> Table:
    """All scorers, votes and pass@k on the same answers, and what tuned gained."""
    scores = {name: model.scores(e.problems) for name, model in e.models.items()}
    columns = {
        name: {scorer: show.accuracy(share) for scorer, share in found.items()}
        for name, found in scores.items()
    }
    if len(scores) == 2:
        first, second = scores.values()
        gained = {k: second[k].value - first[k].value for k in first if k in second}
        columns["points"] = {scorer: show.signed(100 * x) for scorer, x in gained.items()}
    return side_by_side(f"{measure(e)}, with 95 % intervals", "scorer", columns)


def in_full(run: RunRecord) -> Iterator[Block]:
    """Properties of the answers, breakdowns, transcripts, and settings of each evaluation."""
    for e in run.evaluations:
        yield page.heading(e.title, 3)
        corner = "choices" if e.has_choices else "answers"
        answers = {name: answer_values(model, e.problems) for name, model in e.models.items()}
        yield side_by_side(f"Properties of the {corner}", corner, answers)
        yield mistakes_table(e)
        for name in dict.fromkeys(name for model in e.models.values() for name in model.by):
            yield breakdown_table(e, name)
        yield from transcripts("Two problems that are part of every evaluation", e.examples, {})
        for outcome, kinds in OUTCOMES.items():
            verdicts = dict(zip(("base", "tuned"), kinds))
            problems = e.transcripts.get(outcome, [])
            yield from transcripts(f"Transcripts: {outcome}", problems, verdicts)
        settings = {name: show.value(x) for name, x in e.settings.items()}
        yield page.pairs(settings, f"All settings of {e.name}", folded=True)


def answer_values(m: ModelResult, problems: int) -> dict[str, str | None]:
    """Form, length and speed of the answers, and teacher-forced measures."""
    per_answer = m.tokens / m.completions if m.tokens and m.completions else None
    per_second = m.tokens / m.seconds if m.tokens and m.seconds else None
    return {
        "in the required format": show.accuracy(Share.of(m.had_format, problems)),
        "cut off": show.accuracy(Share.of(m.cut_off, problems)),
        "empty": show.accuracy(Share.of(m.empty, problems)),
        "tokens per answer": show.count(per_answer),
        "tokens per second": show.count(per_second),
        "loss, nats per supervised token": show.nats(m.loss),
        "token accuracy (teacher-forced)": show.share(m.token_accuracy),
        "reference answers measured for both": show.count(m.loss_problems),
        "nats of the correct choice": show.nats(m.right_choice_nats),
    }


def mistakes_table(e: EvaluationRecord) -> Table:
    """How many answers are of each kind that occurs, and what the kinds mean."""
    occurring = {kind for model in e.models.values() for kind, n in model.mistakes.items() if n}
    columns = {
        name: {
            f"{kind}: {KINDS[kind]}" if kind in KINDS else kind:
                f"{n:,}: {show.accuracy(Share.of(n, e.problems))}"
            for kind, n in model.mistakes.items()
            if kind in occurring
        }
        for name, model in e.models.items()
    }  # fmt: skip
    return side_by_side("Answers by kind, with 95 % intervals", "kind", columns)


def breakdown_table(e: EvaluationRecord, name: str) -> Table:
    """Accuracy by a property of the problems, such as their number of reasoning steps."""
    cells = {model: result.by.get(name, {}) for model, result in e.models.items()}
    columns = {
        model: {key: show.accuracy(Share.of(*cell)) for key, cell in found.items()}
        for model, found in cells.items()
    }
    columns["problems"] = {k: show.count(n) for t in cells.values() for k, (_, n) in t.items()}
    name = name.replace("question holds", "question content")
    return side_by_side(f"{measure(e)} by {name}, with 95 % intervals", name, columns)


def transcripts(
    title: str, problems: list[dict[str, str]], kinds: dict[str, str]
) -> Iterator[Block]:
    """A heading and problems with their answers; `kinds`: whether a model's answer is correct."""
    if problems:
        yield page.heading(title, 4)
    labels = {name: f"{name} ({kind})" for name, kind in kinds.items()} | {"gold": "reference"}
    for i, texts in enumerate(problems):
        parts = [
            (labels.get(name, name), text, kinds.get(name, ""))
            for name, text in texts.items()
            if name != "id"
        ]
        question = textwrap.shorten(texts.get("question", ""), 100, placeholder="…")
        yield page.transcript(question or "problem", parts, opened=i == 0 or not kinds)
