"""The sections of a report that compare the models of an evaluation."""

import textwrap
from collections.abc import Callable
from types import ModuleType

from evaluation.mistakes import KINDS
from evaluation.statistics import corrected, in_words
from report import page, show
from report.page import Block, Field
from report.records import OUTCOMES, Evaluation

VOTED = (
    "The verdict and the answer accuracy by kind of problem use the majority of all samples;"
    " scorers, kinds of mistakes and transcripts use the first sample of each problem."
)


def measure(e: Evaluation) -> str:
    """What the evaluation measures, as distinct from token accuracy."""
    return "Choice accuracy (most likely)" if e.has_choices else "Answer accuracy (generated)"


def tasks_table(evaluations: list[Evaluation]) -> Block:
    """The tasks on which base and tuned were both measured; nothing if there is only one."""
    compared = [e for e in evaluations if e.difference]
    found = corrected([e.difference for e in compared])
    words = {e.name: in_words(d, len(found)) for e, d in zip(compared, found)}
    fields: list[Field] = [
        ("task", lambda e: e.title, str),
        ("problems", lambda e: e.problems, show.count),
        ("base", lambda e: e.headline("base"), show.accuracy),
        ("tuned", lambda e: e.headline("tuned"), show.accuracy),
        ("tuned versus base", lambda e: words[e.name], str),
    ]
    several = compared if len({e.task for e in compared}) > 1 else []
    return page.listing("Learned and forgotten, with 95 % intervals", fields, several)


def evaluation_section(e: Evaluation, figures: ModuleType | None, number: int) -> list[Block]:
    """One evaluation in short; `number` makes the ids in its figures unique on the page."""
    voted = any(model.votes for model in e.models.values())
    return [
        page.heading(f"{measure(e)}: {e.title}", 3),
        page.paragraph(setup(e)),
        page.paragraph(f"Tuned versus base: {e.in_words}." if e.in_words else "", "lead"),
        *changed_answers(e),
        page.paragraph(VOTED if voted else "", "note"),
        page.pictures(evaluation_svgs(e, figures, number) if figures else []),
        scorer_table(e),
    ]


def setup(e: Evaluation) -> str:
    """How the evaluation was done."""
    models, given = " and ".join(e.models), e.settings.get
    if e.has_choices:
        return (
            f"{e.problems:,} questions, given to {models} with the same contexts; choices are"
            " scored by their likelihood, and nothing is generated."
        )
    decoding = "greedy decoding"
    if temperature := given("temperature"):
        samples = show.value(given("samples", 1))
        decoding = f"{samples} samples at temperature {show.value(temperature)}"
    chosen = " These rows chose the adapter among all validations, which flatters it."
    return (
        f"{e.problems:,} problems, answered by {models} with the same prompts: {decoding}, at most"
        f" {show.value(given('max_new_tokens'))} new tokens per answer."
        f"{chosen if given('split') == 'validation' and given('adapter') else ''}"
    )


def changed_answers(e: Evaluation) -> list[Block]:
    """On how many problems base and tuned differ, with p-value and interval."""
    if (d := e.difference) is None:
        return []
    values = {
        "fixed (base wrong, tuned correct)": show.count(d.fixed),
        "broken (base correct, tuned wrong)": show.count(d.broke),
        "both correct": show.count(d.both_right),
        "both wrong": show.count(d.both_wrong),
        "exact p-value (McNemar)": f"{d.p_value:.2g}",
    }
    interval = f"{show.signed(d.low_points)} to {show.signed(d.high_points)} points"
    return [page.pairs(values | {f"difference, {100 * d.confidence:g} % interval": interval})]


def evaluation_svgs(e: Evaluation, figures: ModuleType, number: int) -> list[str]:
    """Accuracy by scorer and by reasoning steps, and kinds of mistakes, where there are values."""
    svgs, by_scorer, by_steps, wrong = [], {}, {}, {}
    for name, model in e.models.items():
        correct = dict(filter(None, [model.headline])) | model.correct
        by_scorer[name] = {scorer: (n, e.problems) for scorer, n in correct.items()}
        steps = model.by.get("reasoning steps", {})
        by_steps[name] = {f"{key} ({cell[1]:,})": cell for key, cell in steps.items()}
        wrong[name] = {kind: n for kind, n in model.mistakes.items() if kind != "correct"}
    if any(by_scorer.values()):
        title = f"{measure(e)}, 95 % intervals"
        svgs.append(figures.accuracy(title, "scorer", by_scorer, f"accuracy-{number}"))
    if any(by_steps.values()):
        title, label = "Answer accuracy by reasoning steps", "steps (problems)"
        svgs.append(figures.accuracy(title, label, by_steps, f"steps-{number}"))
    if any(wrong.values()):
        svgs.append(figures.mistakes(wrong, e.problems, f"mistakes-{number}"))
    return svgs


def scorer_table(e: Evaluation) -> Block:
    """All scorers, votes and pass@k on the same answers, and what tuned gained."""

    def points(values: list[float | None]) -> str:
        if len(values) != 2 or None in values or not e.problems or isinstance(values[0], tuple):
            return page.MISSING
        gained = values[1] - values[0]
        return show.signed(100 * (gained if isinstance(gained, float) else gained / e.problems))

    fields = fields_by_key(e, "correct", show.accuracy_of(e.problems))
    fields += fields_by_key(e, "votes", show.accuracy_of(e.problems))
    fields += fields_by_key(e, "passed", show.share)  # shares are floats, counts are ints

    intervals = fields_by_key(e, "pass_intervals", show.between)
    fields += [(f"{name}, 95 % interval", *how) for name, *how in intervals]
    title = f"{measure(e)}, with 95 % intervals"
    return page.comparison(title, "scorer", fields, e.models, ("points", points))


def fields_by_key(e: Evaluation, name: str, formatter: Callable[..., str]) -> list[Field]:
    """A field for each key that any of the models has in its dict of this `name`."""
    keys = dict.fromkeys(key for model in e.models.values() for key in getattr(model, name))
    return [(key, lambda model, key=key: getattr(model, name).get(key), formatter) for key in keys]


def details_section(e: Evaluation) -> list[Block]:
    """One evaluation in full: properties of the answers, breakdowns, transcripts, settings."""
    blocks = [page.heading(e.title, 3), answer_table(e), mistake_table(e)]
    for name in dict.fromkeys(name for model in e.models.values() for name in model.by):
        blocks.append(breakdown_table(e, name))
    blocks += transcripts("Two problems that are part of every evaluation", e.examples, {})
    for outcome, kinds in OUTCOMES.items():
        verdicts = dict(zip(("base", "tuned"), kinds))
        blocks += transcripts(f"Transcripts: {outcome}", e.transcripts.get(outcome, []), verdicts)
    fields: list[Field] = [("setting", lambda x: x[0], str), ("value", lambda x: x[1], show.value)]
    title = f"All settings of {e.name}"
    return [*blocks, page.listing(title, fields, e.settings.items(), folded=True)]


def answer_table(e: Evaluation) -> Block:
    """Form, length and speed of the answers, and teacher-forced measures."""
    as_share = show.accuracy_of(e.problems)
    fields: list[Field] = [
        ("in the required format", lambda m: m.had_format, as_share),
        ("cut off", lambda m: m.cut_off, as_share),
        ("empty", lambda m: m.empty, as_share),
        ("tokens per answer", lambda m: show.ratio(m.tokens, m.completions), show.count),
        ("tokens per second", lambda m: show.ratio(m.tokens, m.seconds), show.count),
        ("loss, nats per supervised token", lambda m: m.loss, show.nats),
        ("token accuracy (teacher-forced)", lambda m: m.token_accuracy, show.share),
        ("references of these two", lambda m: m.loss_problems, show.count),
    ]
    if e.has_choices:
        fields = [("nats of the correct choice", lambda m: m.right_choice_nats, show.nats)]
    corner = "choices" if e.has_choices else "answers"
    return page.comparison(f"Properties of the {corner}", corner, fields, e.models)


def mistake_table(e: Evaluation) -> Block:
    """How many answers are of each kind, and what the kinds mean."""
    as_share = show.accuracy_of(e.problems)
    fields = fields_by_key(e, "mistakes", lambda n: f"{n:,}: {as_share(n)}")
    fields = [(f"{kind}: {KINDS[kind]}" if kind in KINDS else kind, *how) for kind, *how in fields]
    return page.comparison("Answers by kind, with 95 % intervals", "kind", fields, e.models)


def breakdown_table(e: Evaluation, name: str) -> Block:
    """Accuracy by a property of the problems, such as their number of reasoning steps."""
    columns = {model: result.by.get(name, {}) for model, result in e.models.items()}
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    fields = [(key, lambda cells, key=key: cells.get(key), show.accuracy) for key in keys]
    name = name.replace("question holds", "question content")
    title = f"{measure(e)} by {name}, with 95 % intervals"
    size = ("problems", lambda cells: show.count(max(n for _, n in filter(None, cells))))
    return page.comparison(title, name, fields, columns, size)


def transcripts(title: str, problems: list[dict[str, str]], kinds: dict[str, str]) -> list[Block]:
    """A heading and problems with their answers; `kinds`: whether a model's answer is correct."""
    blocks = [page.heading(title, 4)] if problems else []
    for i, texts in enumerate(problems):
        parts = []
        for name, text in texts.items():
            label = "reference" if name == "gold" else name
            label += f" ({kinds[name]})" if name in kinds else ""
            parts += [(label, text, kinds.get(name, ""))] if name != "id" else []
        question = textwrap.shorten(texts.get("question", ""), 100, placeholder="…")
        blocks.append(page.transcript(question or "problem", parts, opened=i == 0 or not kinds))
    return blocks
