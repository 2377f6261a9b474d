"""The report of a run: what the tuning achieved, how training went, what it cost, how to repeat it.

The report is a pure function of the run's folder. `read_run` turns files that may be missing,
damaged or hostile into clean values, the sections turn these values into blocks, and `page.py`
turns the blocks into HTML and Markdown.
"""

import shlex
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import BadRun, is_full
from evaluation.statistics import trend
from files import write_file
from report import page, show
from report.evaluations import details_section, evaluation_section, measure, tasks_table
from report.page import Block, Field
from report.records import RunRecord, clean, conform, mapping, read_run

TOKEN_ACCURACY = "token accuracy (teacher-forced)"
TEACHER_FORCED = (
    "Token accuracy (teacher-forced) is the share of a reference answer's tokens that the model"
    " predicts correctly when it is given all the reference tokens before them. It is not answer"
    " accuracy: a model can predict nine tokens in ten and still get most answers wrong."
)
LOSSES = (
    "Losses are in nats per supervised token. For training, first and last are means over 1 % of"
    " the steps; over the last tenth, they are the means of its two halves. A validation at"
    " step 0 measures the base model. They chose the best adapter, which flatters its figure."
)
MORE_EPOCHS = {  # direction of the validation loss: answer
    "rising": "Unlikely: the validation loss has passed its minimum",
    "falling": "Likely: the validation loss was still falling",
    "flat": "Not much: the validation loss was flat",
}
MORE_EPOCHS_RULE = (
    "The rule: a straight line is fitted to the last third of the validations (at least four), and"
    " a change counts if it exceeds both twice the scatter around the line and 0.5 % of the lowest"
    " loss. More epochs are unlikely to help if the last validation is above the best by more than"
    " that; otherwise they are likely to help if the line falls by more than that."
)
DECAY = (
    "The learning rate decays to zero over the run, which by itself flattens the end of the curve."
    " Over more epochs it would decay more slowly."
)
MOST_REASONS = 20  # lines for rows left out


def write_report(folder: Path, price_per_hour: float | None = None) -> Path:
    """Write `report.md` and `report.html` into a run's folder; returns the path of the page.

    Raises BadRun if `folder` is not a run's or cannot be written. The report says what else is
    missing.
    """
    run = read_run(folder)
    try:
        from report import figures  # needs matplotlib, which is optional and slow to import
    except ImportError:
        figures = None
    blocks = report_blocks(run, figures, price_per_hour)
    _write(folder / "report.md", page.to_markdown(blocks))
    _write(folder / "report.html", page.to_html(f"Report of {run.name}", blocks))
    return folder / "report.html"


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text.encode())
    except OSError as error:
        if is_full(error):
            raise
        raise BadRun(
            f"{path} cannot be written: {error.strerror}", "make the folder writable"
        ) from None


def report_blocks(
    run: RunRecord, figures: ModuleType | None, price_per_hour: float | None
) -> list[Block]:
    """The whole report; `figures` is the module that draws, or None without matplotlib."""
    saved_price = conform(float, run.options.get("price_per_hour"))
    price = saved_price if price_per_hour is None else price_per_hour
    no_figures = "" if figures else "No figures: they need matplotlib (pip install matplotlib)."
    return [
        page.heading(run.name, 1),
        page.paragraph(subtitle(run), "lead"),
        page.cards([accuracy_card(run), *training_cards(run, price)]),
        page.paragraph(no_figures, "note"),
        *results_section(run, figures),
        *training_section(run, figures),
        *([page.heading("Answers in detail")] if run.evaluations else []),
        *(block for evaluation in run.evaluations for block in details_section(evaluation)),
        *cost_section(run, price),
        page.heading("Options"),
        page.pairs({name: show.value(x) for name, x in run.options.items()}),
        *data_section(run),
        *repeat_section(run),
    ]


# Headline and results.


def subtitle(run: RunRecord) -> str:
    """The model, the data, and whether the run is finished."""
    model, data, rank, epochs = map(run.options.get, ("model", "data", "rank", "epochs"))
    details = f", LoRA rank {show.value(rank)}" if rank else ""
    details += f", {show.value(epochs)} epochs" if epochs else ""
    state = "" if run.progress.stopped else " The run is not finished."
    return f"{show.value(model)} tuned on {show.value(data)}{details}.{state}"


def accuracy_card(run: RunRecord) -> tuple[str, str, str]:
    """Base and tuned in the most important evaluation, and how they differ."""
    if not run.evaluations:
        note = "no evaluation is finished; loss and token accuracy are not a substitute"
        return "Answer accuracy (generated)", "not measured", note
    first = run.evaluations[0]
    counts = filter(None, (first.headline(name) for name in first.models))
    shares = show.from_to([correct / problems for correct, problems in counts])
    note = first.in_words or f"only {', '.join(first.models)}: nothing to compare with"
    return f"{measure(first)}, {first.title}", shares, f"{first.problems:,} problems. {note}"


def training_cards(run: RunRecord, price: float | None) -> list[tuple[str, str, str]]:
    """Validation loss, token accuracy and training time."""
    best, losses, seconds = run.best, run.validation("val_loss"), run.progress.seconds
    at = [page.known(show.count, best.get("step")), page.known("{:.2f}".format, best.get("epoch"))]
    note = "nats per supervised token, at step {} (epoch {})".format(*at) if best else ""
    note += f"; best of {len(losses)}, the first {show.nats(losses[0][1])}" if losses else ""
    shares = run.validation("val_token_accuracy") or run.train("train_token_accuracy")
    shares = [value for _, value in shares[:1] + shares[-1:]]
    time = "not known yet" if seconds is None else show.duration(seconds)
    paid = "price per hour not given" if price is None else show.cost(price, seconds)
    return [
        ("Best validation loss", page.known(show.nats, best.get("val_loss")), note),
        (
            "Token accuracy (teacher-forced)", show.from_to(shares),
            "first and last measurement; this is not answer accuracy",
        ),
        ("Training time", time, f"{len(run.steps):,} steps logged; {paid}"),
    ]  # fmt: skip


def results_section(run: RunRecord, figures: ModuleType | None) -> list[Block]:
    """Every evaluation in short, and how to run one if there is none."""
    blocks = [page.heading("Results"), tasks_table(run.evaluations)]
    for number, evaluation in enumerate(run.evaluations):
        blocks += evaluation_section(evaluation, figures, number)
    if run.unfinished:
        unfinished = "; ".join(run.unfinished)
        blocks.append(page.paragraph(f"Unfinished evaluations, with answers so far: {unfinished}."))
    if run.outdated:
        names = ", ".join(run.outdated)
        blocks.append(page.paragraph(f"Not shown, as best/ has another adapter since: {names}."))
    if not run.evaluations:
        adapter = shlex.quote(clean(str(run.folder / "best")))
        blocks.append(page.paragraph("This folder has no finished evaluation. To run one:"))
        blocks.append(page.code(f"python evaluate.py --adapter {adapter}"))
    return blocks


# Training.


def training_section(run: RunRecord, figures: ModuleType | None) -> list[Block]:
    """Learning curves, why training stopped, and whether more epochs would help."""
    decays = run.options.get("schedule") in ("linear", "cosine")
    damaged = f"{run.damaged_lines} lines of metrics.jsonl could not be read."
    learned = [page.paragraph("metrics.jsonl has no steps yet.")]
    if run.steps:
        notes = [page.paragraph(TEACHER_FORCED), page.paragraph(LOSSES, "note")]
        learned = [learning_table(run), *notes]
    return [
        page.heading("Training"),
        page.pictures(training_svgs(run, figures) if figures else []),
        *learned,
        page.paragraph(damaged if run.damaged_lines else "", "note"),
        page.heading("Why it stopped", 3),
        page.paragraph(why_it_stopped(run)),
        page.heading("Would more epochs help?", 3),
        page.paragraph(more_epochs([loss for step, loss in run.validation("val_loss") if step])),
        page.paragraph(MORE_EPOCHS_RULE, "note"),
        page.paragraph(DECAY if decays else "", "note"),
        validation_table(run),
    ]


def training_svgs(run: RunRecord, figures: ModuleType) -> list[str]:
    """The curves for which there are values."""
    losses = run.train("train_loss"), run.validation("val_loss")
    accuracies = run.train("train_token_accuracy"), run.validation("val_token_accuracy")
    rate_and_norm = run.train("learning_rate"), run.train("grad_norm")
    svgs = []
    if any(losses):
        svgs.append(figures.loss(*losses, run.best.get("step")))
    if any(accuracies):
        svgs.append(figures.token_accuracy(*accuracies))
    if any(rate_and_norm):
        svgs.append(figures.rate_and_norm(*rate_and_norm, conform(float, run.options.get("clip"))))
    if speed := run.train("tokens_per_second"):
        svgs.append(figures.speed(speed))
    return svgs


def learning_table(run: RunRecord) -> Block:
    """First and last loss and token accuracy."""
    keys = ("loss", "token_accuracy")
    train, train_accuracy = ([x for _, x in run.train(f"train_{key}")] for key in keys)
    val, val_accuracy = ([x for _, x in run.validation(f"val_{key}")] for key in keys)
    width = max(1, round(len(run.steps) / 100))
    tenth = train[-max(2, len(train) // 10) :]
    middle = len(tenth) // 2
    losses = {
        "train loss": means(train[:width], train[-width:]),
        "train loss over the last tenth of the steps": means(tenth[:middle], tenth[middle:]),
        "validation loss, first and last": means(val[:1], val[-1:]),
        f"validation loss, first and best of {len(val)}": means(val[:1], sorted(val)[:1]),
    }
    accuracies = {
        f"{TOKEN_ACCURACY}, train": means(train_accuracy[:width], train_accuracy[-width:]),
        f"{TOKEN_ACCURACY}, validation": means(val_accuracy[:1], val_accuracy[-1:]),
    }
    rows = [(label, *show.change(pair)) for label, pair in losses.items()]
    rows += [(label, *show.change(pair, points=True)) for label, pair in accuracies.items()]
    return page.table("First and last values", ("", "first", "last", "change"), rows)


def means(first: list[float], last: list[float]) -> list[float]:
    return [statistics.fmean(first), statistics.fmean(last)] if first and last else []


def why_it_stopped(run: RunRecord) -> str:
    """The reason that the run recorded, or how far it is."""
    found = run.progress
    why = "It has not stopped: there is no checkpoint yet."
    if found.stopped:
        why = f"{found.stopped[:1].upper()}{found.stopped[1:]}."
    elif found.cursor is not None:
        why = (
            f"It is not finished: the newest checkpoint is from step {show.count(found.cursor)}."
            " Training is still in progress, or was interrupted; rerun the command to resume."
        )
    if found.skipped:
        why += f" Steps skipped because the gradient was not finite: {show.count(found.skipped)}."
    return why


def more_epochs(losses: list[float]) -> str:
    """Whether more epochs are likely to help, by MORE_EPOCHS_RULE."""
    t = trend(losses)
    if t is None:
        return f"Unknown: the rule needs 4 validations with a finite loss, and has {len(losses)}."
    return (
        f"{MORE_EPOCHS[t.direction]}. Over the last {t.points} validations the line falls by"
        f" {show.nats(t.decrease)}, and the last validation is {show.nats(t.above_best)} above the"
        f" best; changes under {show.nats(t.threshold)} do not count."
    )


def validation_table(run: RunRecord) -> Block:
    """Every validation."""
    if not run.validations:
        return page.paragraph("No validation has run yet.")
    best = run.best
    fields: list[Field] = [
        ("step", lambda v: v.get("step"), show.count),
        ("epoch", lambda v: v.get("epoch"), "{:.2f}".format),
        ("validation loss", lambda v: v.get("val_loss"), show.nats),
        (TOKEN_ACCURACY, lambda v: v.get("val_token_accuracy"), show.share),
        ("answer accuracy (generated)", lambda v: v.get("val_exact_match"), show.share),
        ("", lambda v: "best" if v is best else "", str),
    ]
    if not any("val_exact_match" in v for v in run.validations):
        del fields[4]
    title = f"All {len(run.validations)} validations"
    return page.listing(title, fields, run.validations, folded=True)


# Cost, data, and how to repeat the run.


def cost_section(run: RunRecord, price: float | None) -> list[Block]:
    """Wall time and cost by phase, and per point of accuracy gained."""
    phases = {"training, including validation": run.progress.seconds}
    for e in run.evaluations:
        phases |= {f"evaluation {e.name}: {name}": m.seconds for name, m in e.models.items()}
    phases["total"] = sum(seconds for seconds in phases.values() if seconds is not None)
    fields: list[Field] = [
        ("phase", lambda phase: phase[0], str),
        ("wall time", lambda phase: phase[1], show.duration),
        ("cost", lambda phase: phase[1], lambda seconds: show.cost(price, seconds)),
    ]
    hourly = "not given" if price is None else f"${price:g}"
    return [
        page.heading("Cost"),
        page.paragraph(f"Price per hour: {hourly}. {cost_per_point(run, price)}"),
        page.listing("", fields, phases.items()),
    ]


def cost_per_point(run: RunRecord, price: float | None) -> str:
    """Training time and cost divided by the points of accuracy gained."""
    compared = next((e for e in run.evaluations if e.difference and e.problems), None)
    if compared is None or run.progress.seconds is None:
        return "What a point gained cost is known after training and evaluating both models."
    d = compared.difference
    gained = 100 * (d.fixed - d.broke) / compared.problems
    if gained <= 0:
        return f"No points were gained ({show.signed(gained)}), so a point gained has no cost."
    seconds = run.progress.seconds / gained
    paid = "" if price is None else f", {show.cost(price, seconds)}"
    doubtful = d.low_points <= 0 or d.p_value >= 1 - d.confidence  # the rule of `in_words`
    doubt = "; but the gain itself is not distinguishable from zero" if doubtful else ""
    per_point = f"{show.duration(seconds)}{paid}{doubt}"
    return f"Training per point gained ({show.signed(gained)} in total): {per_point}."


def data_section(run: RunRecord) -> list[Block]:
    """Rows, tokens, rows left out, and questions that occur more than once."""
    if (audit := run.audit) is None:
        missing = "This folder has no audit of the data (audit.json)."
        return [page.heading("Data"), page.paragraph(missing)]
    values = {f"{split} rows": show.count(n) for split, n in audit.rows.items()}
    values["rows left out"] = show.count(len(audit.left_out))
    tokens = audit.tokens | {"supervised": audit.supervised_count}
    for name, n in tokens.items():
        values[f"tokens of training rows, {name}"] = page.known(show.count, n)
    supervised = show.ratio(audit.supervised_count, audit.tokens.get("total"))
    values["share of tokens supervised"] = page.known(show.share, supervised)
    more = len(audit.left_out) - MOST_REASONS
    reasons = audit.left_out[:MOST_REASONS]
    reasons += [f"and {more:,} more in audit.json"] if more > 0 else []
    table = duplicates_table(audit.duplicates)
    return [page.heading("Data"), page.pairs(values), page.code("\n".join(reasons)), table]


def duplicates_table(duplicates: dict[str, dict[str, int]]) -> Block:
    """How many questions occur more than once, within and across the splits."""
    kinds = dict.fromkeys(kind for counts in duplicates.values() for kind in counts)
    fields: list[Field] = [("where", lambda item: item[0], str)]
    fields += [(kind, lambda item, kind=kind: item[1].get(kind), show.count) for kind in kinds]
    return page.listing("Questions that occur more than once", fields, duplicates.items())


def repeat_section(run: RunRecord) -> list[Block]:
    """What the run depended on, and the command that repeats it."""
    values = {"device": run.config.get("device", "not recorded"), "seed": run.options.get("seed")}
    values |= {name: value for name, value in run.identity.items() if name != "base_sizes"}
    program = ("program_version", "program_git", "program_sha256")
    values |= {name: run.config[name] for name in program if run.config.get(name)}
    values |= {f"{name} version": v for name, v in mapping(run.config.get("versions")).items()}
    return [
        page.heading("How to repeat this run"),
        page.pairs({name.replace("_", " "): show.value(value) for name, value in values.items()}),
        page.code(command(run)),
    ]


def command(run: RunRecord) -> str:
    """The call of train.py with every option that has a value, and with the resolved commits."""
    options = dict(run.options)
    for name, commit in (("revision", "base_commit"), ("data_revision", "data_commit")):
        resolved = run.identity.get(commit)  # a dict where there are several sources
        options[name] = resolved if isinstance(resolved, str) else options.get(name)
    options["out"] = clean(f"{options.get('out') or run.folder.name}-again")
    ranks = conform(int, run.identity.get("ranks")) or 1
    words = [f"torchrun --nproc-per-node {ranks} train.py" if ranks > 1 else "python train.py"]
    words += [flag(name, v) for name, v in options.items() if v not in (None, [])]
    return " \\\n    ".join(words)


def flag(name: str, value: Any) -> str:
    """An option as words for a shell."""
    name = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return shlex.quote(name if value else f"--no-{name[2:]}")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shlex.quote(name) + ("=" if text.startswith("-") else " ") + shlex.quote(text)
