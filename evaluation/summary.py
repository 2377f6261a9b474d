"""From completions to figures: counts, votes, kinds of mistakes, and base against tuned in a table.

Pure functions of what was generated. Rates are counts of problems; where there are several samples
a problem, the scorers judge the first, and votes and pass@k all of them.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

from data.rows import Problem
from evaluation.answers import Completion
from evaluation.generative import (
    SCORERS,
    choose_scorers,
    gold_number,
    had_format,
    maj_at_k,
    numeric_equal,
    pass_at_k,
)
from evaluation.mistakes import KINDS, classify, topics
from evaluation.numbers import final_number
from evaluation.statistics import in_words, paired, wilson_interval
from evaluation.steps import operations, reasoning_steps

TRANSCRIPTS = 5  # of each kind in a result
Completions = dict[str, list[Completion]]  # the samples of each problem, by its id


def figures(problems: list[Problem], completions: Completions) -> dict[str, Any]:
    """Everything counted about one contestant, as JSON values."""
    scorers = choose_scorers([p.answer for p in problems])
    first = {p.id: completions[p.id][0] for p in problems}
    every = [c for p in problems for c in completions[p.id]]
    result = {
        "right": {
            name: sum(scorer(first[p.id].text, p.answer) for p in problems)
            for name, scorer in scorers.items()
        },
        "had_format": sum(had_format(c.text) for c in first.values()),
        "cut_off": sum(c.cut_off for c in first.values()),
        "empty": sum(not c.text.strip() for c in first.values()),
        "completions": len(every),
        "tokens": sum(c.tokens for c in every),
        "seconds": sum(c.seconds for c in every),
        "votes": {},
        "pass": {},
        "mistakes": {},
        "by": {},
        "outcomes": outcomes(problems, completions),
    }
    if scorers is SCORERS:
        result |= several_samples(problems, completions)
        result["mistakes"] = mistakes(problems, first)
        result["by"] = breakdown(problems, result["outcomes"])
    return result


def outcomes(problems: list[Problem], completions: Completions) -> list[bool]:
    """Right or wrong, a problem each: of the one answer, or of the majority of the samples."""
    scorers = choose_scorers([p.answer for p in problems])
    headline = next(iter(scorers.values()))
    right = []
    for p in problems:
        samples = completions[p.id]
        if len(samples) > 1 and scorers is SCORERS:
            numbers = [final_number(c.text) for c in samples]
            right.append(maj_at_k(numbers, gold_number(p.answer), len(samples)))
        else:
            right.append(headline(samples[0].text, p.answer))
    return right


def several_samples(problems: list[Problem], completions: Completions) -> dict[str, dict]:
    """Majority votes (problems right) and pass@k (a rate) at k = 1, 2, 4, ... and all samples."""
    n = min(len(completions[p.id]) for p in problems)
    if n == 1:
        return {}
    powers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    votes, passed = {}, {}
    for k in powers:
        right = chance = 0
        for p in problems:
            samples = completions[p.id]
            right += maj_at_k([final_number(c.text) for c in samples], gold_number(p.answer), k)
            correct = sum(numeric_equal(c.text, p.answer) for c in samples)
            chance += pass_at_k(len(samples), correct, k)
        votes[f"maj@{k}"] = right
        passed[f"pass@{k}"] = float(chance / len(problems))
    return {"votes": votes, "pass": passed}


def mistakes(problems: list[Problem], first: dict[str, Completion]) -> dict[str, int]:
    """How many first answers are of each kind, in the order of KINDS."""
    found = Counter()
    for p in problems:
        c = first[p.id]
        empty = not c.text.strip()
        kind = classify(p.question, p.answer, c.text, cut_off=c.cut_off, empty=empty).kind
        found[kind] += 1
    return {kind: found[kind] for kind in KINDS}


def breakdown(problems: list[Problem], right: list[bool]) -> dict[str, dict[str, list[int]]]:
    """[right, problems] by what the problem is like; a problem may fall under several of a kind."""
    tables: dict[str, dict[str, list[int]]] = {}
    for p, ok in zip(problems, right, strict=True):
        likeness = {
            "category": [p.category] if p.category else [],
            "reasoning steps": [str(reasoning_steps(p.answer))],
            "operations": sorted(operations(p.answer)) or ["none written"],
            "question holds": sorted(topics(p.question)) or ["none of these"],
        }
        for table, keys in likeness.items():
            for key in keys:
                cell = tables.setdefault(table, {}).setdefault(key, [0, 0])
                cell[0] += ok
                cell[1] += 1
    return {  # "9" before "10"
        name: {k: cells[k] for k in sorted(cells, key=lambda k: (len(k), k))}
        for name, cells in tables.items()
    }


def difference(base: list[bool], tuned: list[bool], seed: int) -> dict[str, Any]:
    """The paired comparison and what it says in words."""
    result = paired(base, tuned, seed=seed)
    return {"difference": asdict(result), "in_words": in_words(result)}


def transcripts(
    problems: list[Problem], base: Completions, tuned: Completions, right: dict[str, list[bool]]
) -> dict[str, list[dict[str, str]]]:
    """A handful of whole answers of each fate, in the order of the problems."""
    kept: dict[str, list[dict[str, str]]] = {"fixed": [], "broken": [], "still wrong": []}
    fates = {(False, True): "fixed", (True, False): "broken", (False, False): "still wrong"}
    for p, was, now in zip(problems, right["base"], right["tuned"], strict=True):
        fate = fates.get((was, now))
        if fate and len(kept[fate]) < TRANSCRIPTS:
            texts = {"base": base[p.id][0].text, "tuned": tuned[p.id][0].text}
            kept[fate].append({"id": p.id, "question": p.question, "gold": p.answer, **texts})
    return kept


def table(result: dict[str, Any]) -> str:
    """Contestants side by side, in 80 columns."""
    found, n = result["contestants"], result["problems"]
    columns = list(found.values())
    rows: list[tuple[str, ...]] = [("", *found)]
    if "right_choice_nats" in columns[0]:
        return in_columns(rows + choice_rows(columns, n))
    for scorer in columns[0]["right"]:
        rows.append((f"answers right, {scorer}", *(rate(c["right"][scorer], n) for c in columns)))
    for vote in columns[0]["votes"]:
        rows.append((f"answers right, {vote}", *(rate(c["votes"][vote], n) for c in columns)))
    for name in columns[0]["pass"]:
        rows.append((name, *(f"{c['pass'][name]:.1%}" for c in columns)))
    for key in ("had_format", "cut_off", "empty"):
        rows.append((key.replace("_", " "), *(f"{c[key]} of {n}" for c in columns)))
    rows.append(("tokens an answer", *(f"{c['tokens'] / c['completions']:.0f}" for c in columns)))
    rows.append(
        ("tokens a second", *(f"{c['tokens'] / max(c['seconds'], 1e-9):.0f}" for c in columns))
    )
    if columns[0].get("loss") is not None:
        rows.append(("loss, nats a token", *(f"{c['loss']:.4f}" for c in columns)))
        rows.append(
            ("token accuracy (teacher-forced)", *(f"{c['token_accuracy']:.1%}" for c in columns))
        )
    for kind in columns[0]["mistakes"]:
        rows.append((f"answers: {kind}", *(str(c["mistakes"][kind]) for c in columns)))
    return in_columns(rows)


def choice_rows(columns: list[dict[str, Any]], n: int) -> list[tuple[str, ...]]:
    """What there is to say about the choices of each contestant."""
    rows = [
        (f"choices right, {name}", *(rate(c["right"][name], n) for c in columns))
        for name in columns[0]["right"]
    ]
    nats = (f"{c['right_choice_nats']:.4f}" for c in columns)
    rows.append(("nats of the right choice", *nats))
    speed = (f"{n / max(c['seconds'], 1e-9):.1f}" for c in columns)
    rows.append(("questions a second", *speed))
    for area in columns[0]["by"].get("area", ()):
        cells = [c["by"]["area"][area] for c in columns]
        rows.append((f"{area} ({cells[0][1]:,})", *(rate(*cell) for cell in cells)))
    return rows


def in_columns(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"{row[0]:<33}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows)


def summary_line(result: dict[str, Any]) -> dict[str, Any]:
    """One task of several, by what its answers are judged by first: as `outcomes` has it."""
    found, n = result["contestants"], result["problems"]
    first = next(iter(found.values()))
    right = {name: sum(c["outcomes"]) for name, c in found.items()}
    return {
        "task": result["task"],
        "judged_by": next(reversed(first.get("votes") or {}), next(iter(first["right"]))),
        "problems": n,
        "right": right,
        "intervals": {name: wilson_interval(count, n) for name, count in right.items()},
        "difference": result.get("difference"),
        "in_words": result.get("in_words"),
        "folder": result["folder"],
    }


def summary_table(lines: list[dict[str, Any]]) -> str:
    """Tasks below each other, in 80 columns, each with what its difference is worth."""
    rows: list[tuple[str, ...]] = [("right, of", *lines[0]["right"])]
    told = []
    for line in lines:
        name = f"{line['task'][-24:]} ({line['problems']:,})"
        rows.append((name, *(rate(count, line["problems"]) for count in line["right"].values())))
        if line["in_words"]:
            told.append(f"{line['task']}, {line['judged_by']}: {line['in_words']}")
    return "\n".join([in_columns(rows), *told])


def rate(right: int, n: int) -> str:
    """`12.5 % (8.0-18.9)`: a share of n with its 95 % Wilson interval."""
    low, high = wilson_interval(right, n)
    return f"{100 * right / n:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
