"""Generates answers to problems, many sequences in parallel, and yields each as it finishes.

A problem is presented in one of three ways:

    chat               the checkpoint's chat template; the answer ends with the turn
    few-shot           k solved problems, then `Question: ...\\nAnswer:`, as plain text (gsm8k)
    chain-of-thought   `Q: ...\\nA: Let's think step by step.`, as plain text (gsm8k_cot_zeroshot)

The two plain-text prompts are lm-evaluation-harness's, of the tasks in brackets. Plain text has no
end token, so an answer ends where the model begins the next question.

In chat, a problem with several assistant turns is a conversation. It is answered turn by turn, and
the model sees its own earlier answers, never the gold ones: its mistakes carry over.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.batches import in_batches
from data.chat import ChatFormat
from data.gsm8k import EXAMPLES
from data.rows import Message, Problem
from evaluation.generative import Completion, Completions, Judge
from evaluation.log import resume_log
from evaluation.tasks import Task
from model.generate import Decoding, decode
from model.qwen2 import Qwen2
from progress_bar import progress_bar

STOPS = {  # by prompt: texts that end an answer
    "chat": (),
    "few-shot": ("Question:", "</s>", "<|im_end|>"),
    "chain-of-thought": ("Q:", "</s>", "<|im_end|>"),
}
STOP_WINDOW = 12  # the most tokens that one of these stops can consist of
SEED_STRIDE = 2**40  # between the seeds of two turns, so that their uniform draws differ
NOTHING = Problem("", ())  # fills the places of conversations that are not asked in a round


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated."""

    decoding: Decoding
    prompt: str = "chat"  # a key of STOPS
    # By problem id: solved problems shown before it, if the prompt is few-shot.
    shots: Mapping[str, list[Problem]] = field(default_factory=dict)
    samples: int = 1  # answers to each problem


# Prompts and turns.


def prompt_tokens(
    problem: Problem, chat: ChatFormat, prompt: str, shots: list[Problem]
) -> list[int]:
    """Token ids after which the model's next tokens are its answer to `problem`."""
    if prompt == "chat":
        return chat.prompt(problem.messages[:-1], problem.tools)
    if prompt == "chain-of-thought":
        return chat.plain(f"Q: {problem.question}\nA: Let's think step by step.")
    solved = [f"Question: {shot.question}\nAnswer: {shot.answer}" for shot in shots]
    return chat.plain("\n\n".join([*solved, f"Question: {problem.question}\nAnswer:"]))


def before_stop(text: str, prompt: str) -> str:
    """`text` up to the first of the prompt's stops."""
    places = [at for at in (text.find(stop) for stop in STOPS[prompt]) if at >= 0]
    return text[: min(places)] if places else text


def count_turns(problem: Problem, prompt: str) -> int:
    """The number of answers to generate; 1 for plain-text prompts, which have no turns."""
    return len(problem.answer_turns) if prompt == "chat" else 1


def next_turn(problem: Problem, said: list[str]) -> Problem:
    """`problem` up to the turn after `said`, the model's answers that replace the gold ones."""
    places = problem.answer_turns
    messages = list(problem.messages[: places[len(said)] + 1])
    for place, text in zip(places, said):
        messages[place] = Message("assistant", text)
    return Problem(problem.id, tuple(messages))


# Generation.


def answers(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    settings: GenerationSettings,
    *,
    done: set[tuple[str, int]] = frozenset(),
    poll: Callable[[], object] = bool,
) -> Iterator[Completion]:
    """Yields a completion per problem and sample, in the order in which they finish.

    Conversations come last. A sampled answer depends on the index of its problem in `problems` and
    on its sample number, not on the batch.

    Args:
        done: (problem id, sample) pairs to leave out.
        poll: is called after each token, and may raise to stop.
    """
    ask = partial(_single_turn_answers, model, chat, poll=poll)
    conversations = sorted(  # by length, so that those in a batch end together
        (count_turns(problem, settings.prompt), index * settings.samples + sample)
        for index, problem in enumerate(problems)
        for sample in range(settings.samples)
        if count_turns(problem, settings.prompt) > 1
    )
    keys = {
        i: (problems[i // settings.samples].id, i % settings.samples) for _, i in conversations
    }  # by sequence id
    yield from ask(problems, settings, done={*done, *keys.values()})
    remaining = [i for i, key in keys.items() if key not in done]
    for batch in in_batches(remaining, settings.decoding.batch_size):
        yield from _conversation_answers(ask, problems, settings, batch)


def _conversation_answers(
    ask: Callable[..., Iterator[Completion]],
    problems: list[Problem],
    settings: GenerationSettings,
    sequence_ids: list[int],
) -> Iterator[Completion]:
    """Answers to conversations; each round of `ask` answers one more turn of all of them.

    A sequence id is index * samples + sample. Uniform draws depend on it, in every round.
    """
    said: dict[int, list[Completion]] = {i: [] for i in sequence_ids}
    for turn in itertools.count():
        seed = settings.decoding.seed + turn * SEED_STRIDE
        one_sample = replace(settings, samples=1, decoding=replace(settings.decoding, seed=seed))
        asked = [NOTHING] * len(problems) * settings.samples
        for i, earlier in said.items():
            problem = next_turn(problems[i // settings.samples], [c.text for c in earlier])
            asked[i] = replace(problem, id=str(i))
        for c in ask(asked, one_sample, done={(NOTHING.id, 0)}):
            i = int(c.id)
            said[i].append(c)
            problem = problems[i // settings.samples]
            if len(said[i]) == count_turns(problem, settings.prompt):
                yield _joined(problem.id, i % settings.samples, said.pop(i))
        if not said:
            return


def _joined(id: str, sample: int, turns: list[Completion]) -> Completion:
    """The answers of a conversation as one completion."""
    return Completion(
        id, sample, turns[-1].text,
        tokens=sum(c.tokens for c in turns),
        cut_off=any(c.cut_off for c in turns),
        seconds=sum(c.seconds for c in turns),
        turns=[c.text for c in turns],
    )  # fmt: skip


def _single_turn_answers(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    settings: GenerationSettings,
    *,
    done: set[tuple[str, int]],
    poll: Callable[[], object],
) -> Iterator[Completion]:
    """`answers` to problems with a single turn."""
    shots = settings.shots
    asked = [
        (prompt_tokens(problem, chat, settings.prompt, shots.get(problem.id, [])), index, sample)
        for index, problem in enumerate(problems)
        for sample in range(settings.samples)
        if (problem.id, sample) not in done
    ]
    # Prompts of similar length share a cache. Long prompts tend to have long answers, so they come
    # first: otherwise everything else would be finished while these are still being decoded.
    asked.sort(key=lambda item: -len(item[0]))
    stops = STOPS[settings.prompt]

    def stopped(tokens: list[int]) -> bool:
        poll()
        if not stops:
            return False
        tail = chat.decode(tokens[-STOP_WINDOW:])
        return any(stop in tail for stop in stops)

    steps = decode(
        model,
        [tokens for tokens, _, _ in asked],
        settings.decoding,
        sequence_ids=[index * settings.samples + sample for _, index, sample in asked],
        stopped=stopped,
    )
    answered: list[list[int]] = [[] for _ in asked]  # tokens
    started = time.perf_counter()
    for emitted in steps:
        finished = []
        for sequence, token, ended in emitted:
            tokens = answered[sequence]
            if token not in settings.decoding.eos_ids:
                tokens.append(token)
            if ended or len(tokens) == settings.decoding.max_new_tokens:
                finished.append((sequence, not ended))
        now = time.perf_counter()
        for sequence, cut_off in finished:
            tokens, (_, index, sample) = answered[sequence], asked[sequence]
            text = before_stop(chat.decode(tokens), settings.prompt)
            seconds = (now - started) / len(finished)
            yield Completion(problems[index].id, sample, text, len(tokens), cut_off, seconds)
        started = now if finished else started


# What evaluate.py and train.py measure.


def answer_all(
    model: Qwen2, chat: ChatFormat, task: Task, settings: GenerationSettings, log: Path
) -> Completions:
    """All samples of each problem of `task`, and of each example in EXAMPLES, by id.

    Answers in `log` are reused, and new ones are added to it.
    """
    gold = {p.id: p.answer for p in task.problems}
    problems = [*task.problems, *EXAMPLES]
    kept, out = resume_log(log, Completion)
    done = {(c.id, c.sample): c for c in kept}

    def is_correct(c: Completion) -> bool:
        return task.judge.is_correct(c.text, gold[c.id], cut_off=c.cut_off)

    correct = [is_correct(c) for c in kept if c.id in gold]
    total = len(problems) * settings.samples
    new = answers(model, chat, problems, settings, done=set(done))
    with progress_bar(total=total, initial=len(done), desc=log.stem, unit="answer") as bar:
        for c in new:
            out.write(**asdict(c))
            done[c.id, c.sample] = c
            if c.id in gold:
                correct.append(is_correct(c))
            bar.update()
            bar.set_postfix_str(f"{sum(correct)} of {len(correct)} correct", refresh=False)
    return {p.id: [done[p.id, sample] for sample in range(settings.samples)] for p in problems}


def exact_matches(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    settings: GenerationSettings,
    judge: Judge,
    poll: Callable[[], object] = bool,
    done: list[list[Any]] | None = None,
) -> int:
    """How many of `problems` the model answers correctly, without dropout.

    `judge` is that of generated answers; `poll` is called after each token, and may raise to stop.
    `done` holds [id, whether it is correct] of problems answered before; the others are added.
    """
    gold, done = {p.id: p.answer for p in problems}, [] if done is None else done
    model.eval()
    known = {(id, 0) for id, _ in done}
    given = answers(model, chat, problems, settings, done=known, poll=poll)
    try:
        for c in progress_bar(given, desc="answer", leave=False):
            done.append([c.id, judge.is_correct(c.text, gold[c.id], cut_off=c.cut_off)])
    finally:
        model.train()
    return sum(correct for _, correct in done)
