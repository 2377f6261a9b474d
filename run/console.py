"""What a training run prints: lines of 80 columns, readable in a log file and without color."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.audit import Audit, audit_lines
from data.batches import Schedule
from data.chat import ChatFormat
from data.mixture import WeightedSource
from data.problems import Source
from lora.config import LoRAConfig
from lora.peft_format import read_adapter_config
from run.base import Base
from run.card import readers
from run.device import NOT_BIT_FOR_BIT
from run.folder import Progress, Run
from run.options import changed_options, in_two_columns


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
    print(f"adapters: {lora}; learning rate {options.learning_rate:g}, {options.schedule}")
    print(device_line)


def print_sizes(trainable: int, total: int, schedule: Schedule) -> None:
    """How many parameters are trained, and how many sequences and steps there are."""
    print(f"trainable {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    print(
        f"{schedule.batch_size} sequences x {schedule.grad_accum} micro-batches x"
        f" {schedule.ranks} ranks = {schedule.examples_per_step} a step;"
        f" {schedule.steps_per_epoch} steps an epoch, {schedule.total_steps} in all"
    )


def print_plan(
    schedule: Schedule, tokens: int, seconds: float, memory: tuple[float, float]
) -> None:
    """What a run would take, from one measured step of `tokens` tokens in `seconds`.

    `memory` holds the peak of that step and the total, in GB.
    """
    all_tokens = schedule.epochs * sum(len(example.tokens) for example in schedule.examples)
    all_tokens = min(all_tokens, schedule.total_steps * tokens)
    minutes = seconds * all_tokens / tokens / 60
    print(
        f"dry run: {schedule.total_steps:,} steps, about {all_tokens:,} tokens and"
        f" {minutes:.1f} minutes, without validation\n"
        f"  one step: {tokens:,} tokens in {seconds:.2f} s; peak memory {memory[0]:.1f} of"
        f" {memory[1]:.1f} GB\nnothing was written"
    )


def print_audit(audit: Audit) -> None:
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


def validation_line(step: int, found: Mapping[str, Any], is_best: bool) -> str:
    """One validation; with several sources, the loss of each on a line below."""
    line = f"step {step:>5}  val loss {found['val_loss']:.4f}"
    line += f"  token accuracy (teacher-forced) {found['val_token_accuracy']:.1%}"
    if "val_exact_match" in found:
        line += f"  answers correct {found['val_exact_match']:.1%}"
    line += "  best" if is_best else ""
    for source, loss in found.get("val_loss_by_source", {}).items():
        line += f"\n{'':12}val loss {loss:.4f}  {source[-45:]}"
    return line


def print_changes(changes: Sequence[str]) -> None:
    """What is different from the session that is resumed."""
    for change in changes:
        although = "" if change.startswith(NOT_BIT_FOR_BIT) else "although "
        print(f"resuming, {although}{change}")


def show_validation(bar: tqdm, step: int, found: Mapping[str, Any], is_best: bool) -> None:
    """Print a validation above the progress bar, unless the bar is disabled, as on other ranks."""
    if not bar.disable:
        bar.write(validation_line(step, found, is_best))


def print_end(progress: Progress, run: Run) -> None:
    """What the run reached, where the adapter is, and what to type next."""
    print(f"done: {progress.stopped}, in {progress.seconds / 60:.1f} minutes")
    if progress.skipped:
        print(f"{progress.skipped} steps were skipped: see skipped_rows in {run.log_file}")
    if progress.best_loss is None:
        print("no validation loss was finite, so there is no best adapter")
        return
    reached = f"validation loss {progress.best_loss:.4f} nats per token"
    if progress.best_exact_match is not None:
        reached += f", {progress.best_exact_match:.1%} of the held-out sample answered correctly"
    print(f"best of {run.validation_count()} validations: {reached}, at step {progress.best_step}")
    if progress.best_step == 0:
        print("no validation was better than the one before the first step: training did not help")
    lora, _, _ = read_adapter_config(run.best)
    print(f"the adapter is in {run.best}, read as it is by {readers(lora)}")
    print("to measure what it is worth:")
    print(f"  python evaluate.py --adapter {shell_word(run.best)}")


def shell_word(path: Path) -> str:
    """A path as it is typed in a shell."""
    return str(path) if " " not in str(path) else f"'{path}'"
