"""Multiple choice by likelihood, as in lm-evaluation-harness 0.4.13.

    acc        the option with the largest sum of log-probabilities is the correct one
    acc_norm   the same, with each sum divided by the option's length in characters

The context of a question is computed once. Its options follow in the same flat sequence of tokens:
each one takes the positions directly after the context, and attends to the context and to itself.
Unlike in the harness, log-probabilities are always computed in fp32, contexts are never truncated,
and the name of a control token within a text is encoded as plain text.

Legend: T tokens, N scored tokens, C hidden size, H query heads, G key/value heads, D head size,
V vocabulary size; in one question: L tokens of the context, t tokens of all options.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import in_batches
from data.chat import ChatFormat
from data.rows import Choices, Problem
from evaluation.generative import Judge
from evaluation.log import resume_log
from model.attention import FlatAttention
from model.cache import attend_slots
from model.generate import not_finite_logits
from model.qwen2 import Qwen2
from progress_bar import progress_bar

HEAD_ROWS = 32  # rows of logits computed at a time: 20 MB in fp32

# MMLU's subjects in the harness's groups; a subject in none of them is in "other".
AREAS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
}
AREA = {subject: area for area, subjects in AREAS.items() for subject in subjects.split()}


@dataclass(frozen=True)
class Question:
    """A problem as token ids. No continuation is empty."""

    id: str
    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Scored:
    """The log-likelihoods of a problem's options."""

    id: str
    scores: list[float]  # nats, one per option
    seconds: float  # its share of the batch's time


def with_shots(problem: Problem, solved: list[Problem]) -> Problem:
    """The same problem, with its head and the solved problems in front of its context."""
    shots = [f"{s.context} {s.options[s.gold]}\n\n" for s in (p.choices for p in solved)]
    context = problem.choices.head + "".join(shots) + problem.choices.context
    return replace(problem, choices=replace(problem.choices, context=context, head=""))


def encode(problem: Problem, chat: ChatFormat) -> Question:
    """Token ids, split as in the harness: white space at the context's end belongs to the options.

    The whole text is encoded at once, and its continuation is every token after the first L, where
    L is the number of tokens of the context alone.
    """
    context = problem.choices.context.rstrip()
    between = problem.choices.context[len(context) :] + " "
    tokens = chat.plain(context)
    wholes = [chat.plain(context + between + option) for option in problem.choices.options]
    continuations = [whole[len(tokens) :] for whole in wholes]
    assert tokens and all(continuations), problem.id
    return Question(problem.id, tokens, continuations)


def score(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    batch_size: int,
    done: set[str] = frozenset(),
) -> Iterator[Scored]:
    """The scores of each problem whose id is not in `done`, the shortest contexts first.

    `batch_size` does not change them.
    """
    questions = [encode(p, chat) for p in problems if p.id not in done]
    questions.sort(key=lambda q: len(q.context))
    for group in in_batches(questions, batch_size):
        started = time.perf_counter()
        found = log_likelihoods(model, group)
        seconds = (time.perf_counter() - started) / len(group)
        for question, scores in zip(group, found):
            yield Scored(question.id, scores, seconds)


def score_all(
    model: Qwen2, chat: ChatFormat, problems: list[Problem], batch_size: int, log: Path
) -> dict[str, Scored]:
    """The scores of all problems, by id.

    Scores in `log` are reused, and new ones are added to it.
    """
    kept, out = resume_log(log, Scored)
    scored = {s.id: s for s in kept}
    rest = score(model, chat, problems, batch_size, set(scored))
    options = {"total": len(problems), "initial": len(kept), "desc": log.stem, "unit": "question"}
    for s in progress_bar(rest, **options):
        out.write(**asdict(s))
        scored[s.id] = s
    return scored


@torch.inference_mode()
def log_likelihoods(model: Qwen2, questions: list[Question]) -> list[list[float]]:
    """For each question, the sum of log-probabilities of each continuation's tokens, in nats.

    Raises UserError if one is not finite.
    """
    device = model.head_weight.device
    attend = SharedContext(questions, device)
    tokens = [t for q in questions for t in q.context]
    positions = [i for q in questions for i in range(len(q.context))]
    rows, targets = [], []  # of each scored token: the row that predicts it, and its id
    end = 0  # row after a question's context
    for q in questions:
        end += len(q.context)
        for continuation in q.continuations:
            start, length = len(tokens), len(continuation) - 1  # its last token predicts nothing
            tokens += continuation[:-1]
            positions += range(len(q.context), len(q.context) + length)
            rows += [end - 1, *range(start, start + length)]
            targets += continuation
    flat = torch.tensor([tokens, positions], device=device)  # (2, T)
    hidden = model(flat[0], flat[1], attend.lengths, cache=attend)  # (T, C)
    scored = torch.tensor([rows, targets], device=device)  # (2, N)
    found = log_probabilities(hidden, model.head_weight, scored[0], scored[1])  # (N,)
    if not found.isfinite().all():
        raise not_finite_logits(hidden.dtype)
    values = iter(found.tolist())
    return [[sum(islice(values, len(c))) for c in q.continuations] for q in questions]


def log_probabilities(hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """(N,) fp32: log-probabilities of `targets (N,)`, predicted by the given `rows (N,)`.

    hidden: (T, C). head: (V, C).
    """
    found = []
    for row, target in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
        logits = (hidden[row] @ head.t()).float()  # (n, V)
        found.append(logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))
    return torch.cat(found)


class SharedContext:
    """Attention over a flat sequence: all contexts, then all continuations without last tokens.

    A context attends causally to itself. A token of a continuation attends to its question's
    context, and to its own continuation up to itself.
    """

    def __init__(self, questions: list[Question], device: torch.device):
        self.lengths = [len(q.context) for q in questions]
        self.contexts = FlatAttention(self.lengths, device)
        self.masks = []  # for each question (t, L + t), True where a token attends
        for q in questions:
            owners = [i for i, c in enumerate(q.continuations) for _ in c[1:]]
            owners = torch.tensor(owners, dtype=torch.long, device=device)  # (t,)
            own = (owners[:, None] == owners).tril()  # (t, t)
            self.masks.append(F.pad(own, (len(q.context), 0), value=True))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, G, D), (T, G, D) -> (T, H, D)."""
        n = sum(self.lengths)
        y = [self.contexts(layer, q[:n], k[:n], v[:n])]
        start, place = 0, n
        for length, mask in zip(self.lengths, self.masks):
            context, own = slice(start, start + length), slice(place, place + len(mask))
            start, place = context.stop, own.stop
            if len(mask):
                keys, values = (torch.cat((x[context], x[own])) for x in (k, v))  # (L + t, G, D)
                y.append(attend_masked(q[own], keys, values, mask))  # (t, H, D)
        return torch.cat(y)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of each query to the keys where its row of `mask (t, S)` is True.

    (t, H, D), (S, G, D), (S, G, D) -> (t, H, D).
    """
    (t, H, D), (S, G, _) = q.shape, k.shape
    q = q.transpose(0, 1).reshape(G, H // G, t, D)
    k, v = (x.transpose(0, 1)[:, None].expand(G, H // G, S, D) for x in (k, v))
    return attend_slots(q, k, v, mask).flatten(0, 1).transpose(0, 1)


def likeliest(scores: list[float]) -> int | None:
    """Index of the largest score, the first of equal ones; None if any score is NaN."""
    if any(math.isnan(s) for s in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def acc(scores: list[float], choices: Choices) -> bool:
    """Whether the option with the highest log-likelihood is the gold one."""
    return likeliest(scores) == choices.gold


def acc_norm(scores: list[float], choices: Choices) -> bool:
    """The same, with each sum divided by the number of characters of its option."""
    return acc([s / len(option) for s, option in zip(scores, choices.options)], choices)


def choice_scorers(problems: list[Problem]) -> dict[str, Callable[[list[float], Choices], bool]]:
    """Scorers by name, the headline first. If all options have one length, acc_norm equals acc."""
    lengths = {len(option) for p in problems for option in p.choices.options}
    return {"acc": acc} if len(lengths) == 1 else {"acc_norm": acc_norm, "acc": acc}


def choice_metrics(
    judge: Judge, problems: list[Problem], scored: dict[str, Scored]
) -> dict[str, Any]:
    """All metrics of one model's choices, as JSON values."""
    outcomes = [judge.is_correct(scored[p.id].scores, p.choices) for p in problems]
    losses = [-scored[p.id].scores[p.choices.gold] for p in problems]
    return {
        "correct": {
            name: sum(scorer(scored[p.id].scores, p.choices) for p in problems)
            for name, scorer in judge.scorers.items()
        },
        "right_choice_nats": sum(losses) / len(losses),
        "seconds": sum(scored[p.id].seconds for p in problems),
        "by": by_subject(problems, outcomes),
        "outcomes": outcomes,
    }


def by_subject(problems: list[Problem], correct: list[bool]) -> dict[str, dict[str, list[int]]]:
    """[correct, problems] of each area and each subject.

    The harness weights subjects by their size, so the accuracy of an area is that of all its
    problems together.
    """
    tables: dict[str, dict[str, list[int]]] = {}
    for problem, ok in zip(problems, correct, strict=True):
        if problem.category is None:
            continue
        area = AREA.get(problem.category, "other")
        for table, key in (("area", area), ("subject", problem.category)):
            cell = tables.setdefault(table, {}).setdefault(key, [0, 0])
            cell[0] += ok
            cell[1] += 1
    return {name: dict(sorted(cells.items())) for name, cells in tables.items()}
