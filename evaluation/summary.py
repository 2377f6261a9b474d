"""From completions to metrics, and from metrics to tables: counts, votes, kinds of mistakes.

Pure functions of what was generated. Counts are numbers of problems. If there are several samples
per problem, scorers judge the first one; votes and pass@k use all of them.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from data.rows import Problem
from errors import BadData
from evaluation.generative import (
    Completion,
    Completions,
    Judge,
    answer_value,
    had_format,
    maj_at_k,
    pass_at_k,
)
from evaluation.golds import gold_number
from evaluation.mistakes import KINDS, classify, has_wrong_step, topics
from evaluation.statistics import (
    Paired,
    bootstrap_interval,
    corrected,
    in_words,
    paired,
    wilson_interval,
)
from evaluation.steps import operations, reasoning_steps
from terminal import percent

TRANSCRIPTS = 5  # of each kind in a result

# Metrics of generated answers.


def answer_metrics(
    judge: Judge, problems: list[Problem], completions: Completions
) -> dict[str, Any]:
    """All metrics of one model's answers, as JSON values."""
    first = {p.id: completions[p.id][0] for p in problems}
    every = [c for p in problems for c in completions[p.id]]
    metrics = {
        "correct": {
            name: sum(
                judge.score(name, first[p.id].text, p.answer, cut_off=first[p.id].cut_off)
                for p in problems
            )
            for name in judge.scorers
        },
        "had_format": sum(had_format(c.text) for c in first.values()),
        "cut_off": sum(c.cut_off for c in first.values()),
        "empty": sum(not c.text.strip() for c in first.values()),
        "completions": len(every),
        "tokens": sum(c.tokens for c in every),
        "seconds": sum(c.seconds for c in every),
        "votes": {},
        "pass": {},
        "pass_intervals": {},
        "mistakes": {},
        "wrong_step": 0,  # correct, with a step whose arithmetic is wrong
        "by": {},
        "outcomes": outcomes(judge, problems, completions),
    }
    if judge.numeric:
        metrics |= sample_metrics(problems, completions)
        metrics["mistakes"] = mistakes(problems, first)
        metrics["wrong_step"] = sum(
            ok and has_wrong_step(first[p.id].text) for p, ok in zip(problems, metrics["outcomes"])
        )
        metrics["by"] = breakdown(problems, metrics["outcomes"])
    return metrics


def outcomes(judge: Judge, problems: list[Problem], completions: Completions) -> list[bool]:
    """For each problem, whether the answer or the majority of several samples is correct.

    Only numbers are voted on: of other answers, the first sample counts.
    """
    found = []
    for p in problems:
        samples = completions[p.id]
        if len(samples) > 1 and judge.numeric:
            gold = gold_number(p.answer)
            found.append(maj_at_k(votes(samples, gold), gold, len(samples)))
        else:
            first = samples[0]
            found.append(judge.is_correct(first.text, p.answer, cut_off=first.cut_off))
    return found


def votes(samples: list[Completion], gold: Fraction) -> list[Fraction | None]:
    """The number that each sample votes for; None for a sample without a number."""
    return [answer_value(c.text, gold, cut_off=c.cut_off) for c in samples]


def sample_metrics(problems: list[Problem], completions: Completions) -> dict[str, dict]:
    """Majority votes (problems correct) and pass@k (a share) for k = 1, 2, 4, ... and all samples.

    A vote is correct or not, so its share of the problems has Wilson's interval. pass@k is a mean
    of estimates, whose interval is a bootstrap over the problems. Empty if there is one sample per
    problem.
    """
    n = min(len(completions[p.id]) for p in problems)
    if n == 1:
        return {}
    powers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    voted, passed, intervals = {}, {}, {}
    for k in powers:
        correct_votes, estimates = 0, Counter()  # of pass@k: estimate -> problems
        for p in problems:
            samples, gold = completions[p.id], gold_number(p.answer)
            numbers = votes(samples, gold)
            correct_votes += maj_at_k(numbers, gold, k)
            correct = numbers.count(gold)
            estimates[pass_at_k(len(samples), correct, k)] += 1
        voted[f"maj@{k}"] = correct_votes
        total = sum(estimate * count for estimate, count in estimates.items())
        passed[f"pass@{k}"] = float(total / len(problems))
        intervals[f"pass@{k}"] = bootstrap_interval([*estimates.values()], [*estimates])
    return {"votes": voted, "pass": passed, "pass_intervals": intervals}


def mistakes(problems: list[Problem], first: dict[str, Completion]) -> dict[str, int]:
    """The number of first answers of each kind, in the order of KINDS."""
    found = Counter()
    for p in problems:
        c = first[p.id]
        empty = not c.text.strip()
        kind = classify(p.question, p.answer, c.text, cut_off=c.cut_off, empty=empty).kind
        found[kind] += 1
    return {kind: found[kind] for kind in KINDS}


def breakdown(problems: list[Problem], correct: list[bool]) -> dict[str, dict[str, list[int]]]:
    """[correct, problems] by properties of the problem; a problem may have several topics."""
    tables: dict[str, dict[str, list[int]]] = {}
    for p, ok in zip(problems, correct, strict=True):
        properties = {
            "category": [p.category] if p.category else [],
            "reasoning steps": [str(reasoning_steps(p.answer))],
            "operations": sorted(operations(p.answer)) or ["none written"],
            "question holds": sorted(topics(p.question)) or ["none of these"],
        }
        for table, keys in properties.items():
            for key in keys:
                cell = tables.setdefault(table, {}).setdefault(key, [0, 0])
                cell[0] += ok
                cell[1] += 1
    return {  # "9" before "10"
        name: {k: cells[k] for k in sorted(cells, key=lambda k: (len(k), k))}
        for name, cells in tables.items()
    }


# Base and tuned compared.


def difference(base: list[bool], tuned: list[bool], seed: int) -> dict[str, Any]:
    """The paired comparison, and its conclusion in words."""
    result = paired(base, tuned, seed=seed)
    return {"difference": asdict(result), "in_words": in_words(result)}


def transcripts(
    problems: list[Problem], completions: dict[str, Completions], correct: dict[str, list[bool]]
) -> dict[str, list[dict[str, str]]]:
    """The first few problems that tuning fixed, broke, or left wrong, with both whole answers.

    `completions` and `correct` have the keys "base" and "tuned".
    """
    kept: dict[str, list[dict[str, str]]] = {"fixed": [], "broken": [], "still wrong": []}
    fates = {(False, True): "fixed", (True, False): "broken", (False, False): "still wrong"}
    for p, before, after in zip(problems, correct["base"], correct["tuned"], strict=True):
        fate = fates.get((before, after))
        if fate and len(kept[fate]) < TRANSCRIPTS:
            texts = {name: completions[name][p.id][0].text for name in ("base", "tuned")}
            kept[fate].append({"id": p.id, "question": p.question, "gold": p.answer, **texts})
    return kept


# Tables for the console, in 80 columns.


def models_table(result: dict[str, Any]) -> str:
    """One column per model, and one row per metric that the result has."""
    models, n = result["models"], result["problems"]
    columns = list(models.values())
    first = columns[0]
    rows: list[tuple[str, ...]] = [("", *models)]

    def row(label: str, cells: Iterable[str]) -> None:
        rows.append((label, *cells))

    judged = "answers" if "completions" in first else "choices"
    for name in first["correct"]:
        row(f"{judged} correct, {name}", (accuracy(m["correct"][name], n) for m in columns))
    for name in first.get("votes", ()):
        row(f"answers correct, {name}", (accuracy(m["votes"][name], n) for m in columns))
    for name in first.get("pass", ()):
        row(name, (pass_cell(m, name) for m in columns))
    if "completions" in first:
        row("answers with '#### N'", (f"{m['had_format']} of {n}" for m in columns))
        row("cut off by the token limit", (f"{m['cut_off']} of {n}" for m in columns))
        row("empty answers", (f"{m['empty']} of {n}" for m in columns))
        row("tokens per answer", (f"{m['tokens'] / m['completions']:.0f}" for m in columns))
        row("tokens per second", (per_second(m["tokens"], m["seconds"], 0) for m in columns))
    if first.get("loss") is not None:
        row("loss, nats per token", (f"{m['loss']:.4f}" for m in columns))
        row("token accuracy (teacher-forced)", (percent(m["token_accuracy"]) for m in columns))
        row("both on gold answers", (str(m.get("loss_problems", n)) for m in columns))
    for kind in first.get("mistakes", ()):
        if any(m["mistakes"].get(kind) for m in columns):  # most kinds are rare
            row(f"classified as {kind}", (str(m["mistakes"].get(kind, "-")) for m in columns))
    if first.get("mistakes") and "wrong_step" in first:
        row("correct, with a wrong step in it", (str(m.get("wrong_step", "-")) for m in columns))
    if "right_choice_nats" in first:
        row("nats of the correct choice", (f"{m['right_choice_nats']:.4f}" for m in columns))
        row("questions per second", (per_second(n, m["seconds"], 1) for m in columns))
    for area, (_, size) in first.get("by", {}).get("area", {}).items():
        row(f"{area} ({size:,})", (accuracy(*m["by"]["area"][area]) for m in columns))
    return in_columns(rows)


def task_summary(result: dict[str, Any]) -> dict[str, Any]:
    """One line of a comparison of several tasks: the metric that `outcomes` are judged by."""
    models, n = result["models"], result["problems"]
    first = next(iter(models.values()))
    correct = {name: sum(m["outcomes"]) for name, m in models.items()}
    return {
        "task": result["task"],
        "judged_by": next(reversed(first.get("votes") or {}), next(iter(first["correct"]))),
        "problems": n,
        "correct": correct,
        "intervals": {name: wilson_interval(count, n) for name, count in correct.items()},
        "difference": result.get("difference"),
        "in_words": result.get("in_words"),
        "folder": result["folder"],
    }


def tasks_table(summaries: list[dict[str, Any]]) -> str:
    """The conclusion about each task's difference, and a table with one row per task.

    Several comparisons make it likelier that one of them differs by chance, so their p-values are
    corrected (Holm).
    """
    rows: list[tuple[str, ...]] = [("correct, by task (problems)", *summaries[0]["correct"])]
    for line in summaries:
        name, n = f"{line['task'][-24:]} ({line['problems']:,})", line["problems"]
        rows.append((name, *(accuracy(count, n) for count in line["correct"].values())))
    compared = [line for line in summaries if line["difference"]]
    found = corrected([Paired(**line["difference"]) for line in compared])
    conclusions = [
        wrapped(f"{line['task']}, {line['judged_by']}: {in_words(result, len(found))}")
        for line, result in zip(compared, found)
    ]
    return "\n".join([*conclusions, in_columns(rows)])


def result_text(result: dict[str, Any]) -> str:
    """The conclusion, the table of models, and the examples with each model's answer."""
    lines = []
    if "in_words" in result:
        d = result["difference"]
        lines.append(wrapped(f"tuned against base: {result['in_words']}"))
        lines.append(f"  {d['fixed']} fixed, {d['broke']} broken, exact p {d['p_value']:.2g}")
    lines.append(models_table(result))
    for example in result["examples"]:
        question = f"{example['question']} ({example['gold'].removeprefix('#### ')})"
        lines.append("\n" + wrapped(question))
        for name in result["models"]:
            answer = " ".join(example[name].split())[:300]
            lines.append(wrapped(f"  {name}: {answer}", indent="    "))
    return "\n".join(lines)


def wrapped(text: str, indent: str = "  ") -> str:
    """`text` in lines of at most 80 columns, all but the first with `indent`."""
    return textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def in_columns(rows: list[tuple[str, ...]]) -> str:
    """Rows as lines: a label of 33 characters, and cells of 22."""
    return "\n".join(f"{row[0]:<33}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows)


def per_second(count: int, seconds: float, decimals: int) -> str:
    """`count / seconds` with this many decimals."""
    return f"{count / max(seconds, 1e-9):.{decimals}f}"


def accuracy(correct: int, n: int) -> str:
    """`12.5 % (8.0-18.9)`: the share of n problems, with its 95 % Wilson interval."""
    low, high = wilson_interval(correct, n)
    return f"{100 * correct / n:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def pass_cell(model: dict[str, Any], name: str) -> str:
    """A pass@k, with its interval unless the result is of an earlier version."""
    share, interval = model["pass"][name], model.get("pass_intervals", {}).get(name)
    between = "" if interval is None else " ({:.1f}-{:.1f})".format(*(100 * x for x in interval))
    return f"{100 * share:.1f} %{between}"


def _rows(metrics: dict[str, Any]) -> dict[str, Any]:
    """What `models_table` has rows for."""
    tables = {name: set(metrics.get(name, ())) for name in ("correct", "votes", "pass")}
    return {"names": metrics.keys() - tables.keys() - {"mistakes"}} | tables


def comparison_text(a: dict[str, Any], b: dict[str, Any], seed: int) -> str:
    """Two results compared, each by its tuned model or, if it has one model only, by that.

    Raises BadData if they are for different problems.
    """
    settings = a["settings"], b["settings"]
    if settings[0]["problems_sha256"] != settings[1]["problems_sha256"]:
        raise BadData(
            "the two results are for different problems",
            "compare evaluations with the same --data, --split and --limit",
        )
    lines = [
        f"{key}: {settings[0].get(key)} against {settings[1].get(key)}"
        for key in settings[0] | settings[1]
        if settings[0].get(key) != settings[1].get(key)
    ]
    models = {name: list(r["models"].values())[-1] for name, r in (("A", a), ("B", b))}
    if _rows(models["A"]) != _rows(models["B"]):
        raise BadData(
            "the two results were measured differently: one has figures that the other lacks",
            "compare evaluations with the same --samples and --teacher-forced",
        )
    table = models_table({"problems": a["problems"], "models": models})
    found = difference(models["A"]["outcomes"], models["B"]["outcomes"], seed)
    return "\n".join([*lines, wrapped(f"B against A: {found['in_words']}"), table])
