"""Multiple choice as lm-evaluation-harness 0.4.13 has it: which choice is likeliest?

    acc        the choice with the largest sum of log-probabilities is the right one
    acc_norm   the same of that sum over the choice's length in characters

The context of a question is computed once: its choices lie behind it in one flat row of tokens,
each at the positions that follow the context, and see it and themselves. Unlike in the harness a
log-probability is always taken in fp32, no context is cut, and a control token's name in a text
stays text.

Legend: T tokens, N scored rows, C hidden size, H query heads, G key/value heads, D head size, V
vocabulary.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import in_batches
from data.chat import ChatFormat
from data.rows import Choices, Problem
from model.attention import FlatAttention
from model.cache import attend_slots
from model.qwen2 import Qwen2

HEAD_ROWS = 32  # rows of logits at hand at once: 20 MB in fp32

# MMLU's subjects by the harness's groups; all others are "other".
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
    """A problem in token ids; no continuation is empty."""

    id: str
    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Scored:
    """The log-likelihood of each choice of the problem `id`, in nats, and its share of the time."""

    id: str
    scores: list[float]
    seconds: float


def with_shots(problem: Problem, solved: list[Problem]) -> Problem:
    """The same problem with solved ones, and what is said once, before it in its context."""
    told = [f"{s.context} {s.options[s.gold]}\n\n" for s in (p.choices for p in solved)]
    context = problem.choices.head + "".join(told) + problem.choices.context
    return replace(problem, choices=replace(problem.choices, context=context, head=""))


def encode(problem: Problem, chat: ChatFormat) -> Question:
    """Token ids as the harness splits them: white space at the context's end goes to the choices,
    and a continuation is what the whole text has beyond as many tokens as the context alone.
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
    """The scores of each problem that is not `done`, shortest first; on no batch do they depend."""
    questions = [encode(p, chat) for p in problems if p.id not in done]
    questions.sort(key=lambda q: len(q.context))
    for group in in_batches(questions, batch_size):
        started = time.perf_counter()
        found = log_likelihoods(model, group)
        seconds = (time.perf_counter() - started) / len(group)
        for question, scores in zip(group, found):
            yield Scored(question.id, scores, seconds)


@torch.inference_mode()
def log_likelihoods(model: Qwen2, questions: list[Question]) -> list[list[float]]:
    """For each question, the sum of log-probabilities of each continuation's tokens, in nats."""
    device = model.head_weight.device
    attend = SharedContext(questions, device)
    tokens = [t for q in questions for t in q.context]
    positions = [i for q in questions for i in range(len(q.context))]
    rows, targets, owners = [], [], []  # of each token to score: the row before it, whose it is
    end = 0  # of a question's context
    owner = 0
    for q in questions:
        end += len(q.context)
        for continuation in q.continuations:
            start, length = len(tokens), len(continuation) - 1  # its last token predicts nothing
            tokens += continuation[:-1]
            positions += range(len(q.context), len(q.context) + length)
            rows += [end - 1, *range(start, start + length)]
            targets += continuation
            owners += [owner] * len(continuation)
            owner += 1
    flat = torch.tensor([tokens, positions], device=device)  # (2, T)
    hidden = model(flat[0], flat[1], attend.lengths, cache=attend)  # (T, C)
    asked = torch.tensor([rows, targets], device=device)  # (2, N)
    found = log_probabilities(hidden, model.head_weight, asked[0], asked[1])  # (N,)
    sums = [0.0] * owner
    for owner, value in zip(owners, found.tolist()):
        sums[owner] += value
    sums = iter(sums)
    return [[next(sums) for _ in q.continuations] for q in questions]


def log_probabilities(hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """(N,) fp32: of `targets (N,)` after `rows (N,)` of `hidden (T, C)`, by `head (V, C)`."""
    found = []
    for row, target in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
        logits = (hidden[row] @ head.t()).float()  # (n, V)
        found.append(logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1))
    return torch.cat(found)


class SharedContext:
    """Attention over all contexts, end to end, then all continuations without their last tokens.

    A context is a plain example. A continuation's token sees its question's context, and the tokens
    of its own continuation up to itself.
    """

    def __init__(self, questions: list[Question], device: torch.device):
        self.lengths = [len(q.context) for q in questions]
        self.contexts = FlatAttention(self.lengths, device)
        self.masks = []  # (t, L + t) for a question of L and t tokens: True is seen
        for q in questions:
            whose = [i for i, c in enumerate(q.continuations) for _ in c[1:]]
            whose = torch.tensor(whose, dtype=torch.long, device=device)  # (t,)
            own = (whose[:, None] == whose).tril()  # (t, t)
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
                seen = [torch.cat((x[context], x[own])) for x in (k, v)]  # (L + t, G, D)
                y.append(attend_masked(q[own], *seen, mask))  # (t, H, D)
        return torch.cat(y)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Each query over the keys that its row of `mask (t, S)` has.

    (t, H, D), (S, G, D), (S, G, D) -> (t, H, D).
    """
    (t, H, D), (S, G, _) = q.shape, k.shape
    q = q.transpose(0, 1).reshape(G, H // G, t, D)
    k, v = (x.transpose(0, 1)[:, None].expand(G, H // G, S, D) for x in (k, v))
    return attend_slots(q, k, v, mask).flatten(0, 1).transpose(0, 1)


def read_scores(log: Path) -> tuple[list[Scored], int]:
    """(scores, how many bytes hold them) of a log, up to the first line that is torn or none."""
    kept, size = [], 0
    for line in log.read_bytes().split(b"\n")[:-1] if log.exists() else []:
        try:
            kept.append(Scored(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            break
        size += len(line) + 1
    return kept, size


def likeliest(scores: list[float]) -> int | None:
    """The first of the largest; None if one is no number, for then nothing was measured."""
    if any(math.isnan(s) for s in scores):
        return None
    return max(range(len(scores)), key=scores.__getitem__)


def acc(scores: list[float], choices: Choices) -> bool:
    return likeliest(scores) == choices.gold


def acc_norm(scores: list[float], choices: Choices) -> bool:
    return acc([s / len(option) for s, option in zip(scores, choices.options)], choices)


def judges(problems: list[Problem]) -> dict[str, Any]:
    """By name, the one that counts first; where choices are letters the two are one."""
    lengths = {len(option) for p in problems for option in p.choices.options}
    return {"acc": acc} if len(lengths) == 1 else {"acc_norm": acc_norm, "acc": acc}


def choice_figures(problems: list[Problem], scored: dict[str, Scored]) -> dict[str, Any]:
    """Everything counted about one contestant, as JSON values."""
    right = {
        name: [judge(scored[p.id].scores, p.choices) for p in problems]
        for name, judge in judges(problems).items()
    }
    outcomes = next(iter(right.values()))
    of_right = [-scored[p.id].scores[p.choices.gold] for p in problems]
    return {
        "right": {name: sum(of) for name, of in right.items()},
        "right_choice_nats": sum(of_right) / len(of_right),
        "seconds": sum(scored[p.id].seconds for p in problems),
        "by": by_subject(problems, outcomes),
        "outcomes": outcomes,
    }


def by_subject(problems: list[Problem], right: list[bool]) -> dict[str, dict[str, list[int]]]:
    """[right, problems] of each area and subject. The harness weights a subject by its size, so an
    area's rate is that of all its problems, and the whole's that of all.
    """
    tables: dict[str, dict[str, list[int]]] = {}
    for problem, ok in zip(problems, right, strict=True):
        if problem.category is None:
            continue
        for table, key in (
            ("area", AREA.get(problem.category, "other")),
            ("subject", problem.category),
        ):
            cell = tables.setdefault(table, {}).setdefault(key, [0, 0])
            cell[0] += ok
            cell[1] += 1
    return {name: dict(sorted(cells.items())) for name, cells in tables.items()}
