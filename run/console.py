"""What a training run prints: lines of 80 columns, readable in a log file and without color."""

import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from data.audit import Audit, audit_lines
from data.batches import Schedule
from data.chat import ChatFormat
from data.mixture import WeightedSource
from data.problems import Source
from lora.config import LoRAConfig
from lora.peft_format import read_adapter_config
from progress_bar import progress_bar
from run.base import Base
from run.card import readers
from run.folder import Progress, Run
from run.identity import NOT_BIT_FOR_BIT
from run.options import changed_options, command, in_two_columns
from terminal import percent

MEASURED = 5  # steps after which the time left is stated


def print_start(
    options: Any, base: Base, mixture: Sequence[WeightedSource], lora: LoRAConfig
) -> None:
    """The options that differ from the defaults, and what all of them resolved to."""
    if changed := changed_options(options):
        print(in_two_columns(changed))
    *base_lines, device_line = base.lines()
    print("\n".join(base_lines))
    for part in mixture:
        print(part.source.line())
    if folder := options.from_adapter:
        _, its_base, _ = read_adapter_config(Path(folder))
        print(f"continuing the adapter in {folder}, trained on {its_base}: {lora}")
    print(f"adapters: {lora}\nlearning rate {options.learning_rate:g}, {options.schedule}")
    print(device_line)


def print_sizes(trainable: int, total: int, schedule: Schedule) -> None:
    """How many parameters are trained, and how many sequences and steps there are."""
    print(f"trainable   {trainable:,} of {total:,} parameters ({percent(trainable / total, 2)})")
    factors = (
        _counted(schedule.batch_size, "sequence", "sequences"),
        _counted(schedule.grad_accum, "micro-batch", "micro-batches"),
        _counted(schedule.ranks, "rank", "ranks"),
    )
    print(f"batch       {schedule.examples_per_step:,} = {' x '.join(factors)}")
    print(f"steps       {schedule.total_steps:,}, {schedule.steps_per_epoch:,} per epoch")


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def print_plan(
    schedule: Schedule, tokens: int, seconds: float, memory: tuple[float, float]
) -> None:
    """What a run would take, from one measured step of `tokens` tokens in `seconds`.

    `memory` holds the peak of that step and the total, in GB.
    """
    steps = schedule.total_steps
    all_tokens = sum(schedule.step(index).token_count for index in range(steps))
    print(
        f"dry run: {steps:,} steps, {all_tokens:,} tokens, about"
        f" {duration(seconds * all_tokens / tokens)} without validation\n"
        f"  one step: {tokens:,} tokens in {seconds:.2f} s; peak memory {memory[0]:.1f} of"
        f" {memory[1]:.1f} GB\nnothing was written; the same command without --dry-run trains"
    )


def duration(seconds: float) -> str:
    """Whole numbers of the two largest units: `40 s`, `3 min 20 s`, `3 h 20 min`, `2 d 4 h`."""
    seconds = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                      (60, "min", 1, "s")):  # fmt: skip
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"


def print_audit(audit: Audit) -> None:
    """Print the statistics of the training data."""
    print("\n".join(audit_lines(audit)))


def show_example(source: Source, chat: ChatFormat) -> None:
    """Print how a source was read, and its first example: supervised text in [[ ]]."""
    print("\n".join(source.lines()))
    encoded = chat.encode(source.train[0].messages, source.train[0].tools)
    pairs = zip(encoded.supervised_mask, encoded.tokens)
    for supervised, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        text = chat.tokenizer.decode([token for _, token in group], skip_special_tokens=False)
        print(f"[[{text}]]" if supervised else text, end="")
    print(f"{len(encoded.tokens)} tokens, {sum(encoded.supervised_mask)} supervised (marked)")


class Display:
    """What the loop shows: a bar, and above it validations and how long the run will take."""

    def __init__(self, run: Run, progress: Progress, validate_at: set[int], *, enabled: bool):
        """`validate_at` holds the step counts at which to validate, the last one included."""
        self.run, self.progress, self.validate_at = run, progress, validate_at
        self.bar = progress_bar(
            total=max(validate_at), initial=progress.cursor, unit="step", disable=not enabled
        )
        self.write, self.close = self.bar.write, self.bar.close
        self.seconds = {"step": [], "validation": []}  # of each one in this session
        self.before, self.started = progress.seconds, time.perf_counter()
        self.lap = self.started

    def show_step(self, loss: float, tokens_per_second: float) -> None:
        """Advance the bar; after the first MEASURED steps, say how long the others will take."""
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False
        )
        self._record("step")
        if len(self.seconds["step"]) == MEASURED and not self.bar.disable and self.steps_left:
            self.write(self.time_left())

    def show_validation(self, found: Mapping[str, Any], is_best: bool) -> None:
        """Print a validation that has just been logged, unless this rank prints nothing."""
        self._record("validation")
        if self.bar.disable:
            return
        self.write(validation_line(self.progress.step, found, is_best))
        if since := self.run.steps_before_validation():
            losses = [line["train_loss"] for line in since if line["train_loss"] is not None]
            loss = f"train loss {fmean(losses):.4f}  " if losses else ""
            elapsed = duration(self.before + self.lap - self.started)
            rate = f"learning rate {since[-1]['learning_rate']:.3g}"
            self.write(f"{'':12}{loss}{rate}  after {elapsed}")

    @property
    def steps_left(self) -> int:
        """Steps until the last validation."""
        return max(self.validate_at) - self.progress.cursor

    def time_left(self) -> str:
        """From the median step, without the first one, which includes warm-up."""
        seconds = median(self.seconds["step"][1:]) * self.steps_left
        validations = sum(at >= self.progress.cursor for at in self.validate_at)
        measured = self.seconds["validation"]
        seconds += validations * fmean(measured or [0])
        note = "" if measured else ", without validation"
        return f"about {duration(seconds)} left for {self.steps_left:,} steps{note}"

    def _record(self, kind: str) -> None:
        """Record the time since the last step or validation."""
        before, self.lap = self.lap, time.perf_counter()
        self.seconds[kind].append(self.lap - before)


def validation_line(step: int, found: Mapping[str, Any], is_best: bool) -> str:
    """One validation; further figures, such as the loss of each source, on lines below."""
    line = f"step {step:>5}  val loss {found['val_loss']:.4f}"
    line += f"  token accuracy (teacher-forced) {percent(found['val_token_accuracy'])}"
    line += "  best" if is_best else ""
    if "val_exact_match" in found:
        line += f"\n{'':12}answers correct {percent(found['val_exact_match'])}"
    for source, loss in found.get("val_loss_by_source", {}).items():
        line += f"\n{'':12}val loss {loss:.4f}  {source[-45:]}"
    return line


def print_changes(changes: Sequence[str]) -> None:
    """What is different from the session that is resumed."""
    for change in changes:
        although = "" if change.startswith(NOT_BIT_FOR_BIT) else "although "
        print(f"resuming, {although}{change}")


def print_end(progress: Progress, run: Run) -> None:
    """What the run reached, where the adapter is, and what to type next."""
    print(f"finished in {duration(progress.seconds)}: {progress.stopped}")
    if progress.skipped:
        print(f"{progress.skipped} steps were skipped: see skipped_rows in {run.log_file}")
    if progress.best_loss is None:
        print("no validation loss was finite, so there is no best adapter")
        return
    print(f"best of {run.validation_count()} validations: at step {progress.best_step}, validation"
          f" loss {progress.best_loss:.4f} nats per token")  # fmt: skip
    if progress.best_exact_match is not None:
        share = percent(progress.best_exact_match)
        print(f"  {share} of the held-out sample answered correctly")
    if progress.best_step == 0:
        print("no validation was better than the one before the first step:\n"
              "  training did not help")  # fmt: skip
    lora, _, _ = read_adapter_config(run.best)
    print(f"the adapter is in {run.best}")
    print(f"  read as it is by {readers(lora)}".replace("; ", ";\n  "))
    print("to measure what it is worth, or to talk with it:")
    evaluate = f"  {command('evaluate')} --adapter {shlex.quote(str(run.best))}"
    print(f"{evaluate}\n{evaluate} --chat")
