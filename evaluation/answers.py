"""Answers to problems, generated many at once and handed over as they come."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data.batches import in_batches
from data.chat import ChatFormat
from data.rows import Problem
from evaluation.conversation import STRIDE, next_turn, turns
from evaluation.prompts import STOPS, before_stop, prompt_tokens
from model.generate import Decoding, decode
from model.qwen2 import Qwen2

STOP_WINDOW = 12  # tokens: what the longest stop may be spread over
SILENT = Problem("", ())  # a place where nothing is asked


@dataclass(frozen=True)
class GenerationSettings:
    """How problems are asked and their answers picked."""

    prompt: str = "chat"  # one of evaluation.prompts.STOPS
    shots: tuple[Problem, ...] = ()  # solved before the question, if the prompt is few-shot
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1  # answers to each problem
    max_new_tokens: int = 512
    batch_size: int = 128  # answers in the making at any time


@dataclass(frozen=True)
class Completion:
    """One generated answer to the problem `id`, its length in tokens, and its share of the time.

    Of several turns `text` is the last, which is scored; the rest counts all of them.
    """

    id: str
    sample: int
    text: str
    tokens: int
    cut_off: bool  # stopped by the token limit
    seconds: float
    turns: list[str] = field(default_factory=list)  # all the model said, if that was several


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
    settings: GenerationSettings,
    *,
    eos_ids: tuple[int, ...],
    done: set[tuple[str, int]] = frozenset(),
    poll: Callable[[], object] = bool,
) -> Iterator[Completion]:
    """A completion for each problem and sample that is not `done`, in the order in which they end.

    Those of several turns come last, and are asked turn by turn (`conversation.py`). A sampled
    answer depends on the problem's place in `problems` and the sample, not on its batch. `poll` is
    called after each token, and may raise to leave.
    """
    ask = partial(_answers, model, chat, eos_ids=eos_ids, poll=poll)
    several = sorted(  # like lengths end at like times
        (turns(problem, settings.prompt), row * settings.samples + sample)
        for row, problem in enumerate(problems)
        for sample in range(settings.samples)
        if turns(problem, settings.prompt) > 1
    )
    keys = {at: (problems[at // settings.samples].id, at % settings.samples) for _, at in several}
    yield from ask(problems, settings, done={*done, *keys.values()})
    places = [at for at, key in keys.items() if key not in done]
    for block in in_batches(places, settings.batch_size):
        yield from _converse(ask, problems, settings, block)


def _converse(
    ask: Callable[..., Iterator[Completion]],
    problems: list[Problem],
    settings: GenerationSettings,
    places: list[int],
) -> Iterator[Completion]:
    """The completions of conversations, each round of `ask` all of them a turn further.

    A conversation's place is row * samples + sample, by which sampling knows it in every round.
    """
    said: dict[int, list[Completion]] = {at: [] for at in places}
    for turn in itertools.count():
        one = replace(settings, samples=1, seed=settings.seed + turn * STRIDE)
        asked = [SILENT] * len(problems) * settings.samples
        for at, answered in said.items():
            texts = [c.text for c in answered]
            asked[at] = replace(next_turn(problems[at // settings.samples], texts), id=str(at))
        for c in ask(asked, one, done={(SILENT.id, 0)}):
            at = int(c.id)
            said[at].append(c)
            problem = problems[at // settings.samples]
            if len(said[at]) == turns(problem, settings.prompt):
                yield _joined(problem.id, at % settings.samples, said.pop(at))
        if not said:
            return


def _joined(id: str, sample: int, said: list[Completion]) -> Completion:
    """The turns of a conversation as one completion."""
    return Completion(
        id, sample, said[-1].text, sum(c.tokens for c in said), any(c.cut_off for c in said),
        sum(c.seconds for c in said), [c.text for c in said],
    )  # fmt: skip


def _answers(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    settings: GenerationSettings,
    *,
    eos_ids: tuple[int, ...],
    done: set[tuple[str, int]],
    poll: Callable[[], object],
) -> Iterator[Completion]:
    """`answers` to problems of one turn."""
    asked = [
        (prompt_tokens(problem, chat, settings.prompt, list(settings.shots)), row, sample)
        for row, problem in enumerate(problems)
        for sample in range(settings.samples)
        if (problem.id, sample) not in done
    ]
    # Prompts of like lengths share a cache; long ones tend to have long answers, for which the
    # others would have to be waited at the end.
    asked.sort(key=lambda item: -len(item[0]))

    def stopped(tokens: list[int]) -> bool:
        poll()
        if not STOPS[settings.prompt]:
            return False
        tail = chat.decode(tokens[-STOP_WINDOW:])
        return any(stop in tail for stop in STOPS[settings.prompt])

    steps = decode(
        model,
        [tokens for tokens, _, _ in asked],
        Decoding(
            max_new_tokens=settings.max_new_tokens, eos_ids=eos_ids, vocab_size=chat.vocab_size,
            batch_size=settings.batch_size, temperature=settings.temperature,
            top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed,
        ),
        sequence_ids=[row * settings.samples + sample for _, row, sample in asked],
        stopped=stopped,
    )  # fmt: skip
    texts: list[list[int]] = [[] for _ in asked]
    started = time.perf_counter()
    for emitted in steps:
        whole = []
        for place, token, ended in emitted:
            if token not in eos_ids:
                texts[place].append(token)
            if ended or len(texts[place]) == settings.max_new_tokens:
                whole.append((place, not ended))
        now = time.perf_counter()
        for place, cut_off in whole:
            _, row, sample = asked[place]
            text = before_stop(chat.decode(texts[place]), settings.prompt)
            seconds = (now - started) / len(whole)
            yield Completion(problems[row].id, sample, text, len(texts[place]), cut_off, seconds)
        started = now if whole else started
