"""The report of a run: what the tuning is worth, how it learned, what it cost, how to repeat it.

    python -m report out/qwen2-0.5b-instruct-gsm8k --price-per-hour 2.5

A pure function of the run folder, at any time in a run's life. The idea: `read_run` turns files
that may be missing, torn or hostile into clean values; sections turn those into plain blocks; and
each kind of block has one way into HTML and one into Markdown, which is where text from data and
models is made inert. No torch: a report can be made on any machine.
"""

import math
import os
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import BadRun, is_full, run_script
from evaluation.mistakes import KINDS
from evaluation.statistics import wilson_interval
from report.page import (
    Block,
    Cards,
    Code,
    Heading,
    Pairs,
    Paragraph,
    Pictures,
    Table,
    Transcript,
    to_html,
    to_markdown,
)
from report.records import FATES, Evaluation, Points, Run, clean, mapping, numbers, read_run
from run.options import option, parse

TEACHER_FORCED = (
    "Token accuracy (teacher-forced) is the share of a reference answer's tokens that the model "
    "guesses when it is shown all the reference tokens before them. It is not answer accuracy: a "
    "model can guess nine tokens in ten and still get most answers wrong."
)
VOTED = (
    "The verdict and the answer accuracy by kind of problem are of the majority of all samples; "
    "scorers, kinds of mistakes and transcripts are of each problem's first sample."
)
MORE_EPOCHS_RULE = (
    "The rule: a straight line is put through the last third of the validations (at least four), "
    "and a change counts if it is over twice the scatter around that line and over 0.5 % of the "
    "best loss. Unlikely to help: the last validation lies that far above the best. Likely to "
    "help: it does not, and the line falls by that much. Else little is to be expected."
)


@dataclass(frozen=True)
class ReportConfig:
    run: str = option("", "run folder, such as out/qwen2-0.5b-instruct-gsm8k; may be given bare")
    price_per_hour: float | None = option(None, "of the machine, in dollars", least=0)


def main(argv: list[str] | None = None) -> None:
    """Write the report of the run folder that is the first argument."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--run")
    config = parse(ReportConfig, argv, "Write report.html and report.md into a run folder.")
    if not config.run:
        raise BadRun("no run folder is given", "python -m report out/...")
    print(f"report in {write_report(Path(config.run), config.price_per_hour)}")


def write_report(run: Path, price_per_hour: float | None = None) -> Path:
    """Write `report.md` and `report.html` into the run folder; returns the latter's path.

    BadRun if `run` is no run folder or cannot be written; what else is missing, the report says.
    """
    found = read_run(run)
    try:
        from report import figures  # matplotlib: an extra, and a second to import
    except ImportError:
        figures = None
    blocks = report_blocks(found, figures, price_per_hour)
    _write(run / "report.md", to_markdown(blocks))
    _write(run / "report.html", to_html(f"Report of {found.name}", blocks))
    return run / "report.html"


def _write(path: Path, text: str) -> None:
    """Write beside and rename: whoever reads `path` finds a whole report."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        if is_full(error):
            raise
        raise BadRun(
            f"{path} cannot be written: {error.strerror}", "make the folder writable"
        ) from None


# Sections: from clean values to blocks, in the order of the page.


def report_blocks(
    run: Run, figures: ModuleType | None, price_per_hour: float | None
) -> list[Block]:
    """The whole report; `figures` is the module that draws, None without matplotlib."""
    price = numbers(run.options).get("price_per_hour") if price_per_hour is None else price_per_hour
    blocks = [Heading(run.name, 1), Paragraph(subtitle(run), "lead"), headline_cards(run, price)]
    if figures is None:
        blocks.append(
            Paragraph("No pictures: they need matplotlib (pip install matplotlib).", "note")
        )
    blocks.append(Heading("What the tuning is worth"))
    blocks += forgetting_table(run)
    for number, evaluation in enumerate(run.evaluations):
        blocks += evaluation_section(evaluation, figures, number)
    blocks += missing_evaluations(run)
    blocks += learning_section(run, figures)
    blocks += [Heading("The answers in detail")] if run.evaluations else []
    for evaluation in run.evaluations:
        blocks += answers_section(evaluation)
    blocks += cost_section(run, price)
    blocks += recipe_section(run)
    blocks += audit_section(run)
    blocks += repeat_section(run)
    return blocks


def subtitle(run: Run) -> str:
    """Which model, on what, and how the run stands."""
    chosen = run.options.get
    epochs = f", {shown(chosen('epochs'))} epochs" if chosen("epochs") else ""
    rank = f", LoRA rank {shown(chosen('r'))}" if chosen("r") else ""
    state = "" if run.progress.get("stopped") else " The run has not ended yet."
    return f"{shown(chosen('model'))} tuned on {shown(chosen('data'))}{rank}{epochs}.{state}"


def headline_cards(run: Run, price: float | None) -> Cards:
    """Four figures: answers, loss, token accuracy, time."""
    best, losses = run.best, run.validation("val_loss")
    accuracy = run.validation("val_token_accuracy") or run.train("train_token_accuracy")
    loss = (
        f"nats per supervised token, {_at(best)}; first {losses[0][1]:.4f}"
        if losses and best
        else ""
    )
    seconds = numbers(run.progress).get("seconds")
    took = duration(seconds) if seconds is not None else "not known yet"
    money = "price per hour not given" if price is None else dollars(price, seconds)
    return Cards([
        accuracy_card(run),
        ("Validation loss at the best step", maybe("{:.4f}".format, best.get("val_loss")), loss),
        (
            "Token accuracy (teacher-forced)",
            arrow([value for _, value in accuracy[:1] + accuracy[-1:]]),
            "first and last measured; this is not answer accuracy",
        ),
        ("Training", took, f"{len(run.steps):,} steps logged; {money}"),
    ])  # fmt: skip


def accuracy_card(run: Run) -> tuple[str, str, str]:
    """Base → tuned of the chief evaluation, and what it is worth."""
    label = "Answer accuracy (generated)"
    if run.evaluations and run.evaluations[0].has_choices:
        label = "Choice accuracy (the likeliest)"
    if not run.evaluations:
        return label, "not measured", "nothing is known yet about the answers that the model writes"
    chief = run.evaluations[0]
    found = [c.headline() for c in chief.contestants.values()]
    rates = [h[1] / chief.problems for h in found if h and chief.problems]
    note = chief.words or f"{', '.join(chief.contestants)} only: nothing to compare with"
    return f"{label}, {chief.title}", arrow(rates), f"{chief.problems:,} problems. {note}"


def forgetting_table(run: Run) -> list[Block]:
    """Every task that base and tuned were measured on: what was learned, and what forgotten."""
    compared = [e for e in run.evaluations if e.difference]
    if len({e.task for e in compared}) < 2:
        return []
    rows = []
    for e in compared:
        right = [h and h[1] for h in (c.headline() for c in e.contestants.values())]
        rows.append((e.title, count(e.problems), *(rate(n, e.problems) for n in right), e.words))
    header = ("task", "problems", *compared[0].contestants, "tuned against base")
    return [Table(header, rows, "Learned and forgotten, with 95 % intervals")]


def evaluation_section(e: Evaluation, figures: ModuleType | None, number: int) -> list[Block]:
    """One evaluation in short: how it was done, the verdict, the pictures, the scorers."""
    setting = e.settings.get
    decoding = "greedy decoding"
    if temperature := setting("temperature"):
        decoding = f"{shown(setting('samples', 1))} samples at temperature {shown(temperature)}"
    done = (
        f"Answered by {' and '.join(e.contestants)}: the same {e.problems:,} problems, with the"
        f" same prompts, {decoding}, at most {shown(setting('max_new_tokens'))} new tokens each."
    )
    if e.has_choices:
        done = (
            f"Asked of {' and '.join(e.contestants)}: the same {e.problems:,} questions, with the"
            " same contexts; choices are scored by how likely they are, and nothing is generated."
        )
    kind = "Choice" if e.has_choices else "Answer"
    blocks: list[Block] = [Heading(f"{kind} accuracy: {e.title}", 3), Paragraph(done)]
    blocks += [Paragraph(f"Tuned against base: {e.words}.", "lead")] if e.words else []
    blocks += [flips(e)] if e.difference else []
    if any(c.votes for c in e.contestants.values()):
        blocks.append(Paragraph(VOTED, "note"))
    return blocks + evaluation_pictures(e, figures, number) + [scorer_table(e)]


def answers_section(e: Evaluation) -> list[Block]:
    """One evaluation in full: kinds of answers, kinds of problems, transcripts, settings."""
    blocks: list[Block] = [Heading(f"In detail: {e.title}", 3), answer_table(e), *mistake_table(e)]
    for name in dict.fromkeys(name for c in e.contestants.values() for name in c.by):
        blocks.append(breakdown_table(e, name))
    blocks += example_transcripts(e)
    blocks += fate_transcripts(e)
    rows = [(key, shown(value)) for key, value in e.settings.items()]
    return [*blocks, Table(("setting", "value"), rows, f"All settings of {e.name}", folded=True)]


def flips(e: Evaluation) -> Block:
    """The problems on which base and tuned differ, which is all that speaks of the tuning."""
    d = e.difference
    return Pairs({
        "fixed (base wrong, tuned right)": count(d["fixed"]),
        "broken (base right, tuned wrong)": count(d["broke"]),
        "both right": count(d["both_right"]),
        "both wrong": count(d["both_wrong"]),
        "exact p (McNemar)": f"{d['p_value']:.2g}",
        f"difference, {100 * d['confidence']:g} % interval":
            f"{signed(d['low_points'], '.1f')} to {signed(d['high_points'], '.1f')} points",
    })  # fmt: skip


def evaluation_pictures(e: Evaluation, figures: ModuleType | None, number: int) -> list[Block]:
    """Rates with intervals, rates by steps, kinds of mistakes: those that there are figures for."""
    if figures is None:
        return []
    svgs, of = [], e.contestants.items()
    judged = {k: dict(filter(None, [c.headline()])) | c.right for k, c in of}
    rates = {
        k: {s: (n, e.problems) for s, n in right.items()} for k, right in judged.items() if right
    }
    by_steps = {k: c.by["reasoning steps"] for k, c in of if c.by.get("reasoning steps")}
    wrong = {k: {m: n for m, n in c.mistakes.items() if m != "correct"} for k, c in of}
    if rates:
        what = "Choice accuracy" if e.has_choices else "Answer accuracy (generated)"
        svgs.append(figures.answer_accuracy(rates, what, f"accuracy-{number}"))
    if by_steps:
        svgs.append(figures.answer_accuracy_by_steps(by_steps, f"steps-{number}"))
    if any(wrong.values()):
        svgs.append(figures.mistakes(wrong, e.problems, f"mistakes-{number}"))
    return [Pictures(svgs)] if svgs else []


def scorer_table(e: Evaluation) -> Block:
    """All scorers and votes side by side, on the same completions."""
    columns = list(e.contestants.values())
    rows = []
    for attribute in ("right", "votes"):
        for name in dict.fromkeys(n for c in columns for n in getattr(c, attribute)):
            counts = [getattr(c, attribute).get(name) for c in columns]
            rows.append((name, *(rate(n, e.problems) for n in counts), points(counts, e.problems)))
    for name in dict.fromkeys(n for c in columns for n in c.passed):
        rows.append((name, *(maybe(share, c.passed.get(name)) for c in columns), ""))
    header = ("scorer", *e.contestants, "points")
    what = "Choice accuracy" if e.has_choices else "Answer accuracy (generated)"
    return Table(header, rows, f"{what}, with 95 % intervals")


def answer_table(e: Evaluation) -> Block:
    """What the answers were like, right or wrong; and the two teacher-forced figures."""
    of = [c.figures for c in e.contestants.values()]
    if e.has_choices:
        nats = [maybe("{:.4f}".format, f.get("right_choice_nats")) for f in of]
        header = ("the choices", *e.contestants)
        return Table(
            header, [("nats of the right choice", *nats)], "How likely the right choice is"
        )
    rows = [
        (label, *(rate(f.get(key), e.problems) for f in of))
        for label, key in (
            ("had the format", "had_format"),
            ("cut off", "cut_off"),
            ("empty", "empty"),
        )
    ]
    answers = [f.get("completions", e.problems) for f in of]
    tokens = [ratio(f.get("tokens"), n) for f, n in zip(of, answers)]
    rows.append(("tokens an answer", *(maybe("{:,.0f}".format, t) for t in tokens)))
    speed = [ratio(f.get("tokens"), f.get("seconds")) for f in of]
    rows.append(("tokens per second", *(maybe("{:,.0f}".format, s) for s in speed)))
    loss = [maybe("{:.4f}".format, f.get("loss")) for f in of]
    rows.append(("loss, nats per supervised token", *loss))
    forced = [maybe(share, f.get("token_accuracy")) for f in of]
    rows.append(("token accuracy (teacher-forced)", *forced))
    return Table(("the answers", *e.contestants), rows, "What the answers are like")


def mistake_table(e: Evaluation) -> list[Block]:
    """How many answers are of each kind, and what the kinds mean."""
    columns = [c.mistakes for c in e.contestants.values()]
    kinds = dict.fromkeys(kind for of in columns for kind in of)
    rows = []
    for kind in kinds:
        cells = [
            f"{of[kind]:,}: {rate(of[kind], e.problems)}" if kind in of else "–" for of in columns
        ]
        meaning = f": {KINDS[kind]}" if kind in KINDS else ""
        rows.append((kind + meaning, *cells))
    header = ("kind", *e.contestants)
    return [Table(header, rows, "Answers by kind, with 95 % intervals")] if rows else []


def breakdown_table(e: Evaluation, name: str) -> Block:
    """Rates by what the problems are like."""
    columns = [c.by.get(name, {}) for c in e.contestants.values()]
    keys = dict.fromkeys(key for of in columns for key in of)
    rows = []
    for key in keys:
        cells = [of.get(key, (None, 0)) for of in columns]
        rows.append((key, count(max(n for _, n in cells)), *(rate(*cell) for cell in cells)))
    what = name.replace("question holds", "what the question holds")
    title = f"Answer accuracy by {what}, with 95 % intervals"
    return Table((name, "problems", *e.contestants), rows, title)


def example_transcripts(e: Evaluation) -> list[Block]:
    """The problems that every evaluation answers."""
    if not e.examples:
        return []
    blocks: list[Block] = [Heading("Two problems that every evaluation answers", 4)]
    return blocks + [transcript(t, {}, open=True) for t in e.examples]


def fate_transcripts(e: Evaluation) -> list[Block]:
    """Whole answers that the tuning fixed, that it broke, and that are wrong as before."""
    blocks: list[Block] = []
    for fate, verdicts in FATES.items():
        if e.transcripts[fate]:
            blocks.append(Heading(f"Transcripts: {fate}", 4))
            tones = dict(zip(("base", "tuned"), verdicts))
            blocks += [transcript(t, tones, open=i == 0) for i, t in enumerate(e.transcripts[fate])]
    return blocks


def transcript(texts: dict[str, str], tones: dict[str, str], *, open: bool) -> Transcript:
    """One problem with its answers; `tones` says of each contestant whether it is right."""
    labels = {"question": "question", "gold": "reference"}
    parts = []
    for key, text in texts.items():
        if key != "id":
            verdict = f" ({tones[key]})" if key in tones else ""
            parts.append((labels.get(key, key) + verdict, text, tones.get(key, "")))
    title = textwrap.shorten(texts.get("question", ""), 100, placeholder="…")
    return Transcript(title or "problem", parts, open)


def missing_evaluations(run: Run) -> list[Block]:
    """What is not there, and how to get it."""
    blocks: list[Block] = []
    if run.unfinished:
        under_way = "; ".join(run.unfinished)
        blocks.append(Paragraph(f"Not finished, with the answers so far: {under_way}."))
    if not run.evaluations:
        blocks.append(Paragraph("No evaluation is finished in this folder. This makes one:"))
        adapter = shlex.quote(clean(str(run.folder / "best")))
        blocks.append(Code(f"python evaluate.py --adapter {adapter}"))
    return blocks


def learning_section(run: Run, figures: ModuleType | None) -> list[Block]:
    """Curves and figures of the training, rightly named; why it stopped; whether to go on."""
    blocks: list[Block] = [Heading("How it learned")]
    if figures is not None and (svgs := learning_pictures(run, figures)):
        blocks.append(Pictures(svgs))
    blocks += learning_figures(run)
    blocks += [Heading("Why it stopped", 3), Paragraph(why_it_stopped(run))]
    blocks += [
        Heading("Would more epochs help?", 3),
        Paragraph(more_epochs(run.validation("val_loss"))),
    ]
    blocks += [Paragraph(MORE_EPOCHS_RULE, "note")]
    if (kind := run.options.get("schedule")) in ("linear", "cosine"):
        blocks.append(Paragraph(
            f"The learning rate falls ({kind}) to zero over the steps of the run, which by itself"
            " flattens the end of a curve; with more epochs it would fall more slowly.", "note",
        ))  # fmt: skip
    return blocks + validation_table(run)


def learning_pictures(run: Run, figures: ModuleType) -> list[str]:
    """The curves that there are points for."""
    losses, val_losses = run.train("train_loss"), run.validation("val_loss")
    accuracy = run.train("train_token_accuracy"), run.validation("val_token_accuracy")
    rates, norms = run.train("learning_rate"), run.train("grad_norm")
    speed, svgs = run.train("tokens_per_second"), []
    if losses or val_losses:
        svgs.append(figures.loss(losses, val_losses, run.best.get("step")))
    if any(accuracy):
        svgs.append(figures.token_accuracy(*accuracy))
    if rates or norms:
        svgs.append(figures.rate_and_norm(rates, norms, numbers(run.options).get("clip")))
    if speed:
        svgs.append(figures.speed(speed))
    return svgs


def learning_figures(run: Run) -> list[Block]:
    """First and last of loss and token accuracy, and by how much they changed."""
    if not run.steps:
        return [Paragraph("No step is in metrics.jsonl yet.")]
    train, val = values(run.train("train_loss")), values(run.validation("val_loss"))
    tenth = train[-max(2, len(train) // 10) :]
    best = [val[0], min(val)] if val else []
    accuracy = values(run.train("train_token_accuracy"))
    val_accuracy = values(run.validation("val_token_accuracy"))
    rows = [
        ("train loss", *fall(ends(train))),
        ("train loss over the last tenth of the steps", *fall(halves(tenth))),
        ("validation loss, first and last", *fall(ends(val, alone=True))),
        ("validation loss, first and best", *fall(best)),
        ("token accuracy (teacher-forced), train", *rise(ends(accuracy))),
        ("token accuracy (teacher-forced), validation", *rise(ends(val_accuracy, alone=True))),
    ]
    width = max(1, round(len(train) / 100))
    note = (
        f"Losses are nats per supervised token. First and last of training are means over {width}"
        " steps, 1 % of all; over the last tenth, its first half and its second. The first"
        " validation comes after some training: it is not the base's."
    )
    table = Table(("", "first", "last", "change"), rows, "What changed from first to last")
    torn = f"{run.torn} lines of metrics.jsonl could not be read."
    return [table, Paragraph(TEACHER_FORCED), Paragraph(note, "note")] + (
        [Paragraph(torn, "note")] if run.torn else []
    )


def why_it_stopped(run: Run) -> str:
    """The run's own words, or where it stands."""
    known = numbers(run.progress)
    if not run.progress:
        why = "It has not: there is no checkpoint yet."
    elif run.progress.get("stopped"):
        why = sentence(shown(run.progress["stopped"]))
    else:
        why = (
            f"It has not: the newest checkpoint is after step {known.get('cursor', 0):,.0f}. The"
            " run is going on or was interrupted; the same command goes on from there."
        )
    if skipped := known.get("skipped"):
        why += f" Steps skipped for a gradient that was not finite: {skipped:,.0f}."
    return why


def more_epochs(losses: Points) -> str:
    """Whether more epochs are likely to help, by MORE_EPOCHS_RULE."""
    if len(losses) < 4:
        return f"It cannot be said: {len(losses)} validations had a finite loss, the rule needs 4."
    last = values(losses)[-max(4, len(losses) // 3) :]
    slope, start = statistics.linear_regression(range(len(last)), last)
    misses = [loss - start - slope * i for i, loss in enumerate(last)]
    scatter = math.sqrt(sum(m * m for m in misses) / (len(last) - 2))
    best = min(values(losses))
    above_best, line_falls = last[-1] - best, -slope * (len(last) - 1)
    counts = max(2 * scatter, 0.005 * best)
    if above_best > counts:
        verdict = "Unlikely: the validation loss is past its best"
    elif line_falls > counts:
        verdict = "Likely: the validation loss was still falling"
    else:
        verdict = "Little is to be expected: the validation loss was flat"
    return (
        f"{verdict}. Over the last {len(last)} validations the line falls by {line_falls:.4f}; the"
        f" last is {above_best:.4f} above the best; a change counts from {counts:.4f}."
    )


def validation_table(run: Run) -> list[Block]:
    """A row a validation."""
    if not run.validations:
        return [Paragraph("There was no validation yet.")]
    extra = any("val_exact_match" in v for v in run.validations)
    header = ["step", "epoch", "validation loss", "token accuracy (teacher-forced)"]
    rows = []
    for v in run.validations:
        mark = " (best)" if v is run.best else ""
        row = [maybe("{:,.0f}".format, v.get("step")), maybe("{:.2f}".format, v.get("epoch"))]
        row += [
            maybe("{:.4f}".format, v.get("val_loss")) + mark,
            maybe(share, v.get("val_token_accuracy")),
        ]
        rows.append(row + ([maybe(share, v.get("val_exact_match"))] if extra else []))
    header += ["answer accuracy (generated, a sample)"] if extra else []
    return [Table(header, rows, f"All {len(rows)} validations", folded=True)]


def cost_section(run: Run, price: float | None) -> list[Block]:
    """Wall time and money by phase, and what a point gained cost."""
    phases = {"training, with its validations": numbers(run.progress).get("seconds")}
    for e in run.evaluations:
        for name, c in e.contestants.items():
            phases[f"evaluation {e.name}: {name} answers"] = c.figures.get("seconds")
    rows = [(phase, maybe(duration, s), dollars(price, s)) for phase, s in phases.items()]
    total = sum(s for s in phases.values() if s is not None)
    rows.append(("all of these", duration(total), dollars(price, total)))
    rate = "not given" if price is None else f"${price:g}"
    return [
        Heading("Cost"),
        Paragraph(f"Price per hour: {rate}. {cost_of_a_point(run, price)}"),
        Table(("phase", "wall time", "cost"), rows),
    ]


def cost_of_a_point(run: Run, price: float | None) -> str:
    """Training time and money over the points of answer accuracy that it brought."""
    compared = next((e for e in run.evaluations if e.difference and e.problems), None)
    seconds = numbers(run.progress).get("seconds")
    if compared is None or seconds is None:
        return "What a point gained cost is known after a checkpoint, and base against tuned."
    d = compared.difference
    gained = 100 * (d["fixed"] - d["broke"]) / compared.problems
    if gained <= 0:
        return f"No point was gained ({signed(gained, '.1f')}), so a point gained has no cost."
    money = "" if price is None else f", {dollars(price, seconds / gained)}"
    doubtful = d["low_points"] <= 0 or d["p_value"] >= 1 - d["confidence"]  # as `in_words` has it
    doubt = "; but the gain itself is not distinguishable from none" if doubtful else ""
    return (
        f"Training for each point of answer accuracy gained ({signed(gained, '.1f')} in all):"
        f" {duration(seconds / gained)}{money}{doubt}."
    )


def recipe_section(run: Run) -> list[Block]:
    """Every option, as it was."""
    return [Heading("The recipe"), Pairs({k: shown(v) for k, v in run.options.items()})]


def audit_section(run: Run) -> list[Block]:
    """What was in the data."""
    blocks: list[Block] = [Heading("The data")]
    if not run.audit:
        return [*blocks, Paragraph("There is no audit of the data (audit.json) in this folder.")]
    rows, tokens = numbers(run.audit.get("rows")), numbers(run.audit.get("tokens"))
    supervised = numbers(run.audit).get("supervised")
    of_all = maybe(share, ratio(supervised, tokens.get("total")))
    left_out = run.audit.get("left_out")
    left_out = (
        [line for line in left_out if isinstance(line, str)] if isinstance(left_out, list) else []
    )
    blocks.append(Pairs({
        **{f"{split} rows": count(n) for split, n in rows.items()},
        **{f"tokens of training rows, {k}": count(n) for k, n in tokens.items()},
        "tokens of training rows, supervised": f"{maybe(count, supervised)} ({of_all})",
        "rows left out": count(len(left_out)),
    }))  # fmt: skip
    if left_out:
        more = [f"and {len(left_out) - 20:,} more in audit.json"] if len(left_out) > 20 else []
        blocks.append(Code("\n".join(left_out[:20] + more)))
    return blocks + duplicates_table(run)


def duplicates_table(run: Run) -> list[Block]:
    """How many questions occur twice, within and across the splits."""
    places = {k: numbers(v) for k, v in mapping(run.audit.get("duplicates")).items()}
    forms = dict.fromkeys(form for counts in places.values() for form in counts)
    rows = [
        (k, *(maybe(count, counts.get(form)) for form in forms)) for k, counts in places.items()
    ]
    return [Table(("where", *forms), rows, "Questions that occur more than once")] if rows else []


def repeat_section(run: Run) -> list[Block]:
    """What it ran on and with, and the command that does it again."""
    known = {"device": run.config.get("device", "not recorded"), "seed": run.options.get("seed")}
    known |= {k: v for k, v in run.identity.items() if k != "base_sizes"}
    known |= {f"{k} version": v for k, v in mapping(run.config.get("versions")).items()}
    return [
        Heading("To repeat it"),
        Pairs({k.replace("_", " "): shown(v) for k, v in known.items()}),
        Code(command(run)),
    ]


def command(run: Run) -> str:
    """The call of train.py with every option that has a value, and the commits resolved."""
    options = dict(run.options)
    for name, commit in (("revision", "base_commit"), ("data_revision", "data_commit")):
        resolved = run.identity.get(commit)  # of several sources each has its own
        options[name] = resolved if isinstance(resolved, str) else options.get(name)
    options["out"] = clean(f"{options.get('out') or run.folder.name}-again")  # beside this run
    ranks = numbers(run.identity).get("ranks", 1)
    words = [f"torchrun --nproc-per-node {ranks:.0f} train.py" if ranks > 1 else "python train.py"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(shlex.quote(flag if value else f"--no-{flag[2:]}"))
        elif value not in (None, []):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            joint = "=" if text.startswith("-") else " "
            words.append(shlex.quote(flag) + joint + shlex.quote(text))
    return " \\\n    ".join(words)


# Figures in words. "–" stands for what is not known.


def shown(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def maybe(form: Callable[[Any], str], value: Any) -> str:
    return "–" if value is None else form(value)


def count(n: float) -> str:
    return f"{n:,.0f}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def arrow(shares: list[float]) -> str:
    """From one share to the other."""
    return " → ".join(f"{100 * value:.1f}" for value in shares) + " %" if shares else "not known"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def rate(right: float | None, n: int) -> str:
    """A share of n with its 95 % Wilson interval."""
    if right is None or not 0 <= right <= n or not n:
        return "–"
    low, high = wilson_interval(int(right), n)
    return f"{share(right / n)} ({100 * low:.1f}–{100 * high:.1f})"


def points(counts: list[int | None], n: int) -> str:
    """Tuned minus base in points."""
    if len(counts) != 2 or None in counts or not n:
        return "–"
    return signed(100 * (counts[1] - counts[0]) / n, ".1f")


def signed(value: float, form: str) -> str:
    return f"{value:+{form}}".replace("-", "−")


def duration(seconds: float) -> str:
    """The two largest units that it has."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(minutes) < 60:
        return f"{minutes:.1f} min"
    return f"{hours // 1:,.0f} h {minutes % 60:02.0f} min"


def dollars(price_per_hour: float | None, seconds: float | None) -> str:
    if price_per_hour is None or seconds is None:
        return "–"
    cost = price_per_hour * seconds / 3600
    return f"${cost:,.2f}" if cost >= 1 else f"${cost:.3f}"


def values(points: Points) -> list[float]:
    return [value for _, value in points]


def ends(series: list[float], alone: bool = False) -> list[float]:
    """[first, last]: means over 1 % of the series at each end, or the very ends."""
    if not series:
        return []
    width = 1 if alone else max(1, round(len(series) / 100))
    return [statistics.fmean(series[:width]), statistics.fmean(series[-width:])]


def halves(series: list[float]) -> list[float]:
    """[mean of the first half, mean of the second half]."""
    middle = len(series) // 2
    return [statistics.fmean(series[:middle]), statistics.fmean(series[middle:])] if middle else []


def fall(pair: list[float]) -> tuple[str, str, str]:
    """First, last, and the change in per cent of the first."""
    if not pair:
        return "–", "–", "–"
    change = f"{signed(100 * (pair[1] / pair[0] - 1), '.2f')} %" if pair[0] else "–"
    return f"{pair[0]:.4f}", f"{pair[1]:.4f}", change


def rise(pair: list[float]) -> tuple[str, str, str]:
    """First, last, and the change in points."""
    if not pair:
        return "–", "–", "–"
    first, last = (f"{100 * value:.2f} %" for value in pair)
    return first, last, f"{signed(100 * (pair[1] - pair[0]), '.2f')} points"


def _at(row: dict[str, float]) -> str:
    return f"at step {row.get('step', 0):,.0f} (epoch {row.get('epoch', 0):.2f})"


if __name__ == "__main__":
    sys.exit(run_script(main))
