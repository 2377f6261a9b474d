"""The report of a run: what the tuning achieved, how training went, what it cost, how to repeat it.

The report is a pure function of the run's folder. `read_run` turns files that may be missing,
damaged or hostile into clean values, the SECTIONS turn these values into blocks, and `page.py`
turns the blocks into HTML and Markdown.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from errors import BadRun, is_full
from evaluation.statistics import trend
from files import write_file
from report import evaluations, page, show
from report.figures import Curve, each_and_mean, over_steps
from report.page import MISSING, Block, Table
from report.records import RunRecord, clean, read_run

TOKEN_ACCURACY = "token accuracy (teacher-forced)"
TEACHER_FORCED = (
    "Token accuracy (teacher-forced) is the share of a reference answer's tokens that the model"
    " predicts correctly when it is given all the reference tokens before them. It is not answer"
    " accuracy: a model can predict nine tokens in ten and still get most answers wrong."
)
LOSSES = (
    "Losses are in nats per supervised token. For training, first and last are means over 1 % of"
    " the steps; over the last tenth, they are the means of its two halves. A validation at"
    " step 0 measures the base model. The best adapter was chosen by its validation, so that figure"
    " is optimistic."
)
MORE_EPOCHS = {  # direction of what is minimized: answer
    "rising": "Unlikely: the {} has passed its minimum",
    "falling": "Likely: the {} was still falling",
    "flat": "Not much: the {} was flat",
}
LEAST_NATS, LEAST_SHARE = 0.002, 0.03  # smaller changes do not count; 0.03 is 2 problems of 64
MORE_EPOCHS_RULE = (
    "The rule: a straight line is fitted to the last third of the validations (at least four)."
    " A change counts if it exceeds twice the scatter around the line, 0.5 % of the lowest value,"
    f" and {LEAST_NATS} nats. Where answers were generated, the share of wrong ones replaces the"
    f" loss, and {LEAST_SHARE} replaces {LEAST_NATS}. More epochs are unlikely to help if the last"
    " validation is above the best by more than that; otherwise they are likely to help if the"
    " line falls by more than that."
)
DECAY = (
    "The learning rate decays to zero over the run, which by itself flattens the end of the curve."
    " Over more epochs it would decay more slowly."
)
MOST_REASONS = 20  # lines for rows left out
PLOTS = (  # title, unit, scale, key of steps, key of validations
    ("Loss", "nats per supervised token", "log", "train_loss", "val_loss"),
    ("Token accuracy (teacher-forced)", "share of supervised tokens", "linear",
     "train_token_accuracy", "val_token_accuracy"),
    ("Learning rate", "per step", "linear", "learning_rate", ""),
    ("Gradient norm", "before clipping", "log", "grad_norm", ""),
    ("Training speed", "tokens per second", "from 0", "tokens_per_second", ""),
)  # fmt: skip


def write_report(folder: Path, price_per_hour: float | None = None) -> Path:
    """Write `report.md` and `report.html` into a run's folder; returns the path of the page.

    Raises BadRun if `folder` is not a run's or cannot be written. The report says what else is
    missing.
    """
    run = read_run(folder, price_per_hour)
    blocks = report_blocks(run)
    html = page.to_html(f"Report of {run.name}", blocks)
    for name, text in (("report.md", page.to_markdown(blocks)), ("report.html", html)):
        try:
            write_file(folder / name, text.encode())
        except OSError as error:
            if is_full(error):
                raise
            cause = f"{folder / name} cannot be written: {error.strerror}"
            raise BadRun(cause, "make the folder writable") from None
    return folder / "report.html"


def report_blocks(run: RunRecord) -> list[Block]:
    """The whole report: the headline, links to the sections, and those that are not empty."""
    found = {title: [b for b in section(run) if b.html] for title, section in SECTIONS.items()}
    anchors = {title.lower().replace(" ", "-"): title for title, blocks in found.items() if blocks}
    blocks: list[Block] = [
        page.heading(run.name, 1),
        page.paragraph(subtitle(run), "lead"),
        page.paragraph(origin(run), "note"),
        page.contents(anchors),
        Table(("headline", "value", "note"), [*cards(run)], boxes="cards"),
    ]
    for anchor, title in anchors.items():
        blocks += [page.heading(title, anchor=anchor), *found[title]]
    return blocks


# Headline.


def subtitle(run: RunRecord) -> str:
    """The model, the data, and whether the run is finished."""
    model, data, rank, epochs = map(run.options.get, ("model", "data", "rank", "epochs"))
    details = f", LoRA rank {show.value(rank)}" if rank else ""
    details += f", {show.value(epochs)} epochs" if epochs else ""
    state = "" if run.progress.stopped else " The run is not finished."
    return f"{show.value(model)} tuned on {show.value(data)}{details}.{state}"


def origin(run: RunRecord) -> str:
    """When, where and by which code the run was made."""
    started = f"Started {run.started}. " if run.started else ""
    machine = f"Machine: {run.machine}. " if run.machine else ""
    return f"{started}{machine}Program: {run.code}."


def cards(run: RunRecord) -> Iterator[tuple[str | None, ...]]:
    """The headline values, each with a label and a note."""
    yield evaluations.card(run.evaluations)
    best, losses = run.best, run.values("val_loss")
    step, epoch = show.count(best.step) or MISSING, show.two_digits(best.epoch) or MISSING
    note = f"nats per supervised token, at step {step} (epoch {epoch})"
    note += f"; best of {len(losses)}, the first {show.nats(losses[0])}" if losses else ""
    loss = show.nats(best.val_loss)
    yield "Best validation loss", loss or "not measured", note if loss else ""
    shares = run.values("val_token_accuracy") or run.values("train_token_accuracy")
    note = "first and last measurement; this is not answer accuracy"
    yield "Token accuracy (teacher-forced)", show.from_to(shares[:1] + shares[1:][-1:]), note
    seconds = run.progress.seconds
    paid = show.cost(seconds, run.price_per_hour) or "price per hour not given"
    time = show.duration(seconds) if seconds else "not known yet"
    yield "Training time", time, f"{len(run.steps):,} steps; {paid}"
    if memory := run.values("peak_memory_gb"):
        yield "Peak memory", f"{max(memory):.1f} GB", "during training"


# Results and training.


def results(run: RunRecord) -> Iterator[Block]:
    """Every evaluation in short."""
    yield evaluations.tasks_table(run.evaluations)
    for evaluation in run.evaluations:
        yield from evaluations.in_short(evaluation)
    if run.unfinished:
        names = "; ".join(run.unfinished)
        yield page.paragraph(f"Unfinished evaluations, with answers so far: {names}.")
    if run.outdated:
        names = ", ".join(run.outdated)
        yield page.paragraph(f"Not shown, because best/ holds another adapter now: {names}.")
    if not run.evaluations:
        yield page.paragraph("This folder has no finished evaluation.")


def training(run: RunRecord) -> Iterator[Block]:
    """Learning curves, why training stopped, and whether more epochs would help."""
    yield page.pictures(
        over_steps(title, unit, curves(run, *keys), scale) for title, unit, scale, *keys in PLOTS
    )
    yield learning_table(run)
    yield page.paragraph(TEACHER_FORCED if run.steps else "metrics.jsonl has no steps yet.")
    yield page.paragraph(LOSSES if run.steps else "", "note")
    damaged = f"{run.damaged_lines} lines of metrics.jsonl could not be read."
    yield page.paragraph(damaged if run.damaged_lines else "", "note")
    yield page.heading("Why it stopped", 3)
    yield page.paragraph(why_it_stopped(run))
    yield page.heading("Would more epochs help?", 3)
    yield page.paragraph(more_epochs(run))
    yield page.paragraph(MORE_EPOCHS_RULE, "note")
    yield page.paragraph(DECAY if run.schedule in ("linear", "cosine") else "", "note")
    yield validation_table(run)
    yield page.paragraph("" if run.validations else "No validation has run yet.")


def curves(run: RunRecord, key: str, validation_key: str) -> Iterator[Curve]:
    """The curves of one plot."""
    points, best = run.series(key), run.best
    if key == "learning_rate":  # without noise
        yield Curve("learning rate", "mean", points)
        return
    yield from each_and_mean(points, "train, " if validation_key else "")
    if validation_key:
        yield Curve("validation", "validation", run.series(validation_key))
    if validation_key == "val_loss" and best.step is not None:
        yield Curve(f"best, step {best.step:,.0f}", "best", [(best.step, best.val_loss)])
    if key == "grad_norm" and run.clip is not None:
        limit = [(step, run.clip) for step, _ in points[:1] + points[-1:]]
        yield Curve(f"clipped at {run.clip:g}", "limit", limit)


def learning_table(run: RunRecord) -> Table:
    """First and last loss and token accuracy."""
    train, val = run.values("train_loss"), run.values("val_loss")
    train_share, val_share = run.values("train_token_accuracy"), run.values("val_token_accuracy")
    width = max(1, round(len(run.steps) / 100))
    tenth = train[-max(2, len(train) // 10) :]
    middle = len(tenth) // 2
    pairs = {  # label: the values that first and last are the means of
        "train loss": (train[:width], train[-width:]),
        "train loss over the last tenth of the steps": (tenth[:middle], tenth[middle:]),
        "validation loss, first and last": (val[:1], val[-1:]),
        f"validation loss, first and best of {len(val)}": (val[:1], sorted(val)[:1]),
        f"{TOKEN_ACCURACY}, train": (train_share[:width], train_share[-width:]),
        f"{TOKEN_ACCURACY}, validation": (val_share[:1], val_share[-1:]),
    }
    rows = []
    for label, (firsts, lasts) in pairs.items():
        if firsts and lasts:
            first, last = fmean(firsts), fmean(lasts)
            if TOKEN_ACCURACY in label:
                gained = f"{show.signed(100 * (last - first), 2)} points"
                rows.append((label, show.share(first, 2), show.share(last, 2), gained))
            else:
                gained = f"{show.signed(100 * (last / first - 1), 2)} %" if first else None
                rows.append((label, show.nats(first), show.nats(last), gained))
    return Table(("", "first", "last", "change"), rows, "First and last values")


def why_it_stopped(run: RunRecord) -> str:
    """The reason that the run recorded, or how far it is."""
    found = run.progress
    why = "It has not stopped: there is no checkpoint yet."
    if found.stopped:
        why = f"{found.stopped[:1].upper()}{found.stopped[1:]}."
    elif found.cursor:
        why = (
            f"It is not finished: the newest checkpoint is from step {found.cursor:,}."
            " Training is still in progress, or was interrupted; rerun the command to resume."
        )
    if found.skipped:
        why += f" Steps skipped because the gradient was not finite: {found.skipped:,}."
    if found.halved:
        why += f" Micro-batches were halved because memory ran out, this often: {found.halved:,}."
    return why


def more_epochs(run: RunRecord) -> str:
    """Whether more epochs are likely to help, by MORE_EPOCHS_RULE."""
    trained = [v for v in run.validations if v.step]  # step 0 measures the base
    name, least = "share of wrong answers", LEAST_SHARE
    found = [1 - v.val_exact_match for v in trained if v.val_exact_match is not None]
    if not found:
        name, least = "validation loss", LEAST_NATS
        found = [v.val_loss for v in trained if v.val_loss is not None]
    t = trend(found, least)
    if t is None:
        return f"Unknown: the rule needs 4 validations with a finite {name}, and has {len(found)}."
    return (
        f"{MORE_EPOCHS[t.direction].format(name)}. Over the last {t.points} validations the line"
        f" falls by {t.decrease:.4f}, and the last validation is {t.above_best:.4f} above the best;"
        f" changes under {t.threshold:.4f} do not count."
    )


def validation_table(run: RunRecord) -> Table:
    """Every validation."""
    best, found = run.best, run.validations
    sources = list(dict.fromkeys(name for v in found for name in v.val_loss_by_source))
    header = ["step", "epoch", "validation loss", *(f"loss, {name}" for name in sources)]
    header += [TOKEN_ACCURACY, "answer accuracy (generated)", ""]
    rows = [
        [show.count(v.step), show.two_digits(v.epoch), show.nats(v.val_loss)]
        + [show.nats(v.val_loss_by_source.get(name)) for name in sources]
        + [show.share(v.val_token_accuracy), show.share(v.val_exact_match)]
        + ["best" if v is best else ""]
        for v in found
    ]
    return Table(header, rows, f"All {len(found)} validations", folded=True)


def what_next(run: RunRecord) -> Iterator[Block]:
    """Commands that make sense in the state that the run is in."""
    adapter = shlex.quote(clean(str(run.folder / "best")))
    commands = {}
    if not run.progress.stopped:
        commands["finish the training"] = command(run, run.changed)
    elif run.epochs and more_epochs(run).startswith("Likely"):
        longer = command(run, run.changed | {"epochs": 2 * run.epochs})
        commands["train for twice the epochs, in the same folder"] = longer
    if run.best.step is not None:
        if run.unfinished or not run.evaluations:
            commands["measure base and tuned"] = f"python evaluate.py --adapter {adapter}"
        commands["ask the tuned model"] = f'python evaluate.py --adapter {adapter} --ask "..."'
        merge = f"python -m run.export --adapter {adapter} --out merged"
        commands["merge the adapter into a checkpoint; docs/next.md has other formats"] = merge
    yield page.code("\n\n".join(f"# {what}\n{typed}" for what, typed in commands.items()))


# Cost, options, data, and how to repeat the run.


def time_and_cost(run: RunRecord) -> Iterator[Block]:
    """Wall time and cost by phase, and per point of accuracy gained."""
    phases = {"training, including validation": run.progress.seconds or None}
    for e in run.evaluations:
        phases |= {f"evaluation {e.name}: {name}": m.seconds for name, m in e.models.items()}
    phases["total"] = sum(seconds for seconds in phases.values() if seconds) or None
    price = run.price_per_hour
    hourly = "not given" if price is None else f"${price:g}"
    yield page.paragraph(f"Price per hour: {hourly}. {cost_per_point(run)}")
    rows = [(name, show.duration(x), show.cost(x, price)) for name, x in phases.items()]
    yield Table(("phase", "wall time", "cost"), rows)


def cost_per_point(run: RunRecord) -> str:
    """Training time and cost divided by the points of accuracy gained."""
    compared = next((e for e in run.evaluations if e.difference and e.problems), None)
    if compared is None or not run.progress.seconds:
        return "What a point gained cost is known after training and evaluating both models."
    d = compared.difference
    gained = 100 * (d.fixed - d.broke) / compared.problems
    if gained <= 0:
        return f"No points were gained ({show.signed(gained)}), so a point gained has no cost."
    seconds = run.progress.seconds / gained
    texts = filter(None, (show.duration(seconds), show.cost(seconds, run.price_per_hour)))
    doubtful = d.low_points <= 0 or d.p_value >= 1 - d.confidence  # the rule of `in_words`
    doubt = "; but the gain itself is not distinguishable from zero" if doubtful else ""
    total = f"{show.signed(gained)} in total"
    return f"Training per point gained ({total}): {', '.join(texts)}{doubt}."


def options(run: RunRecord) -> Iterator[Block]:
    """The options that differ from their defaults, and the others folded."""
    texts = {name: show.value(value) for name, value in run.options.items()}
    rest = {name: text for name, text in texts.items() if name not in run.changed}
    yield page.pairs({name: texts[name] for name in run.changed})
    yield page.pairs(rest, f"{len(rest)} options at their defaults", folded=True)


def data(run: RunRecord) -> Iterator[Block]:
    """Rows, tokens, rows left out, and questions that occur more than once."""
    audit = run.audit
    if audit is None:
        yield page.paragraph("This folder has no audit of the data (audit.json).")
        return
    supervised, total = audit.supervised_count or audit.supervised, audit.tokens.get("total")
    values = {f"{split} rows": n for split, n in audit.rows.items()}
    values["rows left out"] = len(audit.left_out)
    tokens = audit.tokens | {"supervised": supervised}
    values |= {f"tokens of training rows, {name}": n for name, n in tokens.items()}
    share = show.share(supervised / total if supervised and total else None)
    texts = {name: show.count(n) for name, n in values.items()}
    yield page.pairs(texts | {"share of tokens supervised": share})
    more = len(audit.left_out) - MOST_REASONS
    reasons = audit.left_out[:MOST_REASONS] + [f"and {more:,} more in audit.json"] * (more > 0)
    yield page.code("\n".join(reasons))
    counts = {
        where: {kind: show.count(n) for kind, n in found.items()}
        for where, found in audit.duplicates.items()
    }
    yield page.side_by_side("Questions that occur more than once", "compared", counts)


def repeat(run: RunRecord) -> Iterator[Block]:
    """What the run depended on, and the command that repeats it."""
    values = {"seed": run.options.get("seed")} | run.identity | {"base_sizes": None}
    values |= {f"{name} version": version for name, version in run.versions.items()}
    shown = {k.replace("_", " "): show.value(v) for k, v in values.items() if v is not None}
    yield page.pairs(shown)
    yield page.code(command(run, run.repeated))


def command(run: RunRecord, options: dict[str, Any]) -> str:
    """The call of train.py with those of `options` that have a value."""
    words = [
        f"torchrun --nproc-per-node {run.ranks} train.py" if run.ranks > 1 else "python train.py"
    ]
    words += [flag(name, value) for name, value in options.items() if value not in (None, [])]
    return " \\\n    ".join(words)


def flag(name: str, value: Any) -> str:
    """An option as words for a shell."""
    name = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return shlex.quote(name if value else f"--no-{name[2:]}")
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shlex.quote(name) + ("=" if text.startswith("-") else " ") + shlex.quote(text)


SECTIONS = {
    "Results": results,
    "Training": training,
    "What next": what_next,
    "Answers in detail": evaluations.in_full,
    "Time and cost": time_and_cost,
    "Options": options,
    "Data": data,
    "How to repeat this run": repeat,
}
