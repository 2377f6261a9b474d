"""Measures models on a task: their answers are generated, or choices are scored; then compared.

The base is the tuned model with its adapters disabled, so both run through the same code.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat import ChatFormat
from data.gsm8k import EXAMPLES
from evaluation.answers import GenerationSettings, answer_all
from evaluation.choices import choice_metrics, score_all
from evaluation.rejection import keep
from evaluation.summary import answer_metrics, difference, transcripts
from evaluation.tasks import Task
from evaluation.teacher_forced import teacher_forced_metrics
from lora.inject import disabled
from model.qwen2 import Qwen2

FORWARD_BATCH = 16  # texts per forward pass without generation; more are not faster


@dataclass(frozen=True)
class Models:
    """The models compared. They share one network, which is each of them within its context."""

    network: Qwen2
    contexts: dict[str, Callable[[], AbstractContextManager]]  # by name: base, tuned

    @classmethod
    def of(cls, network: Qwen2, *, adapted: bool, tuned_alone: bool = False) -> "Models":
        """Base and tuned model if the network is `adapted`, or one of them alone."""
        network.eval()
        contexts: dict[str, Callable] = {"base": contextlib.nullcontext}
        if adapted:
            contexts = {"base": lambda: disabled(network), "tuned": contextlib.nullcontext}
        if tuned_alone:
            del contexts["base"]
        return cls(network, contexts)

    def finish(self) -> None:
        """End the ranks that hold parts of a sharded base, and have followed this one."""
        if self.network.lockstep:
            self.network.lockstep.finish()


def measure(
    models: Models,
    chat: ChatFormat,
    task: Task,
    generation: GenerationSettings,
    folder: Path,
    *,
    teacher_forced: int = 0,
    keep_correct: str | Path | None = None,
) -> dict[str, Any]:
    """Metrics of each model, their difference if there are two, and what they answered.

    Args:
        folder: has a log for each model, with which an interrupted measurement resumes.
        teacher_forced: number of problems whose gold answers' loss is measured too.
        keep_correct: a new file for the correct answers; nothing else is then measured.
    """
    metrics, completions = {}, {}
    batch_size = min(FORWARD_BATCH, generation.decoding.batch_size)
    for name, context in models.contexts.items():
        log = folder / f"{name}.jsonl"
        with context():
            if not task.judge.generated:
                scored = score_all(models.network, chat, task.problems, batch_size, log)
                metrics[name] = choice_metrics(task.judge, task.problems, scored)
                continue
            completions[name] = answer_all(models.network, chat, task, generation, log)
            metrics[name] = answer_metrics(task.judge, task.problems, completions[name])
            if not keep_correct:  # the loss of training rows would say little
                metrics[name] |= teacher_forced_metrics(
                    models.network, chat, task.problems[:teacher_forced], batch_size
                )
    result: dict[str, Any] = {"models": metrics}
    outcomes = {name: of_model["outcomes"] for name, of_model in metrics.items()}
    if len(outcomes) == 2:
        result |= difference(outcomes["base"], outcomes["tuned"], generation.decoding.seed)
        if completions:
            result["transcripts"] = transcripts(task.problems, completions, outcomes)
    if keep_correct:
        (answers,) = completions.values()
        keep(Path(keep_correct), task.problems, answers)
    examples = EXAMPLES if completions else []
    result["examples"] = [
        {"question": p.question, "gold": p.answer}
        | {name: answers[p.id][0].text for name, answers in completions.items()}
        for p in examples
    ]
    return result
