"""Answers to problems, generated many at once and handed over as they come."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.chat import ChatFormat
from data.rows import Problem
from evaluation.prompts import STOPS, before_stop, prompt_tokens
from model.generate import Sampling, decode
from model.qwen2 import Qwen2

STOP_WINDOW = 12  # tokens: what the longest stop may be spread over


@dataclass(frozen=True)
class Asking:
    """How problems are asked and their answers picked."""

    prompt: str = "chat"  # one of evaluation.prompts.STOPS
    shots: tuple[Problem, ...] = ()  # solved before the question, if the prompt is few-shot
    sampling: Sampling = Sampling()
    samples: int = 1  # answers to each problem
    max_new_tokens: int = 512
    batch_size: int = 128  # answers in the making at any time


@dataclass(frozen=True)
class Completion:
    """One generated answer to the problem `id`, its length in tokens, and its share of the time."""

    id: str
    sample: int
    text: str
    tokens: int
    cut_off: bool  # stopped by the token limit
    seconds: float


def read_answers(log: Path) -> tuple[list[Completion], int]:
    """(answers, how many bytes hold them) of a log, up to the first line that is torn or none."""
    kept, size = [], 0
    for line in log.read_bytes().split(b"\n")[:-1] if log.exists() else []:
        try:
            kept.append(Completion(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            break
        size += len(line) + 1
    return kept, size


def answers(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    asking: Asking,
    *,
    eos_ids: tuple[int, ...],
    done: set[tuple[str, int]] = frozenset(),
    look: Callable[[], object] = bool,
) -> Iterator[Completion]:
    """A completion for each problem and sample that is not `done`, in the order in which they end.

    A sampled answer depends on the problem's place in `problems` and the sample, not on its batch.
    `look` is called after each token, and may raise to leave.
    """
    asked = [
        (prompt_tokens(problem, chat, asking.prompt, list(asking.shots)), row, sample)
        for row, problem in enumerate(problems)
        for sample in range(asking.samples)
        if (problem.id, sample) not in done
    ]
    # Prompts of like lengths share a cache; long ones tend to have long answers, for which the
    # others would have to be waited at the end.
    asked.sort(key=lambda item: -len(item[0]))

    def stopped(tokens: list[int]) -> bool:
        look()
        if not STOPS[asking.prompt]:
            return False
        tail = chat.decode(tokens[-STOP_WINDOW:])
        return any(stop in tail for stop in STOPS[asking.prompt])

    steps = decode(
        model,
        [tokens for tokens, _, _ in asked],
        max_new_tokens=asking.max_new_tokens,
        eos_ids=eos_ids,
        vocabulary=chat.vocabulary,
        sampling=asking.sampling,
        rows=[row * asking.samples + sample for _, row, sample in asked],
        stopped=stopped,
        at_once=asking.batch_size,
    )
    texts: list[list[int]] = [[] for _ in asked]
    started = time.perf_counter()
    for emitted in steps:
        whole = []
        for place, token, ended in emitted:
            if token not in eos_ids:
                texts[place].append(token)
            if ended or len(texts[place]) == asking.max_new_tokens:
                whole.append((place, not ended))
        now = time.perf_counter()
        for place, cut_off in whole:
            _, row, sample = asked[place]
            text = before_stop(chat.decode(texts[place]), asking.prompt)
            seconds = (now - started) / len(whole)
            yield Completion(problems[row].id, sample, text, len(texts[place]), cut_off, seconds)
        started = now if whole else started
