"""Tests of what is printed: estimates, validation lines, verdicts, widths."""

import itertools
import re
from statistics import fmean

import pytest
import torch

import evaluate
import train
from data.batches import Schedule
from errors import run_script
from evaluation.summary import (
    comparison_text,
    difference,
    result_text,
    task_summary,
    tasks_table,
)
from run import console
from run.console import Display, duration, print_plan, print_sizes
from run.folder import Progress, Run
from tests import toys

TRAIN = "--model base --data sums --out out --device cpu --precision fp32 --rank 2 --max-steps 9 "
TRAIN += "--batch-size 4 --evals-per-epoch 2 --save-every 0"


@pytest.mark.parametrize("seconds, text", [
    (0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.7, "1 h 0 min"),
    (12_000, "3 h 20 min"), (86_399, "23 h 59 min"), (187_300, "2 d 4 h"),
])  # fmt: skip
def test_durations_have_the_two_largest_units(seconds, text):
    assert duration(seconds) == text


# Before the run


@pytest.mark.parametrize("max_steps", [None, 7])
def test_a_plan_counts_the_tokens_of_every_step_and_scales_the_measured_time(capsys, max_steps):
    examples = toys.some_examples(25)
    schedule = Schedule(examples, 4, grad_accum=1, epochs=2, seed=0, max_steps=max_steps)
    rows = itertools.chain(*(schedule.step(i).row_ids for i in range(max_steps or 14)))
    lengths = {example.row_id: len(example.tokens) for example in examples}
    tokens = sum(lengths[row] for row in rows)
    print_plan(schedule, tokens=10, seconds=2.0, memory=(1.0, 2.0))
    said = capsys.readouterr().out
    assert f" {tokens:,} tokens, about {duration(tokens / 10 * 2.0)} " in said
    assert f"{max_steps or 14} steps" in said


@pytest.mark.parametrize("grad_accum, ranks, factors", [
    (1, 1, "1 micro-batch x 1 rank"), (2, 1024, "2 micro-batches x 1,024 ranks"),
])  # fmt: skip
def test_the_sequences_of_a_step_are_printed_as_a_product(capsys, grad_accum, ranks, factors):
    sizes = {"batch_size": 4, "grad_accum": grad_accum, "ranks": ranks}
    schedule = Schedule(toys.some_examples(25), **sizes, epochs=10**6, seed=0)
    print_sizes(10**9, 10**11, schedule)
    said = capsys.readouterr().out
    assert f"batch       {4 * grad_accum * ranks:,} = 4 sequences x {factors}\n" in said
    assert "(1.00 %)" in said and max(map(len, said.splitlines())) <= 80


def test_a_dry_run_that_runs_out_of_memory_says_so_in_two_lines(at_home, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(train, "forward_backward", full)
    assert run_script(lambda: train.main([*TRAIN.split(), "--dry-run"])) == 1
    first, second, *others = capsys.readouterr().err.splitlines()
    assert first == "error: memory ran out: out of memory: tried to allocate 2 GiB"
    assert second.startswith("  use a --batch-size below 4") and not others
    assert not (at_home / "out").exists()


# During the run


class Clock:
    """`perf_counter` of a test: it advances when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_after_five_steps_the_time_left_is_that_of_the_median_step_and_of_the_validations(
    tmp_path, monkeypatch, capsys
):
    clock, progress, run = Clock(), Progress(cursor=20), Run(tmp_path)
    monkeypatch.setattr(console.time, "perf_counter", clock.perf_counter)
    screen = Display(run, progress, {0, 20, 40, 60}, enabled=True)
    clock.now += 30
    screen.show_validation({"val_loss": 1.0, "val_token_accuracy": 0.5}, is_best=False)
    for seconds in (500, 2, 3, 4, 90):  # the first step includes warm-up, the last one a save
        assert "left" not in capsys.readouterr().out
        clock.now += seconds
        progress.cursor += 1
        screen.show_step(1.0, 100.0)
    expected = 35 * 3.5 + 2 * 30
    assert f"about {duration(expected)} left for 35 steps\n" in capsys.readouterr().out
    screen.close()


def training_lines(said: str) -> list[str]:
    return re.findall(r"^ {12}(train loss .*)  after", said, re.MULTILINE)


def test_a_validation_has_the_mean_train_loss_since_the_last_one_also_after_a_resume(
    at_home, capsys
):
    assert train.main(TRAIN.split()) == 0
    whole = capsys.readouterr().out
    losses, means = [], []
    for line in toys.read_log(Run("out").log_file):
        if "val_loss" in line:
            means += [fmean(losses)] if losses else []
            losses = []
        else:
            losses.append(line["train_loss"])
            rate = line["learning_rate"]
    assert len(means) == 3
    assert [line.split()[2] for line in training_lines(whole)] == [f"{m:.4f}" for m in means]
    assert training_lines(whole)[-1].endswith(f"learning rate {rate:.3g}")
    parts = []
    for limit in (["--max-minutes", "1e-9"], []):
        train.main([*TRAIN.split(), "--out", "again", *limit])
        parts += training_lines(capsys.readouterr().out)
    assert parts == training_lines(whole)


# After the run


def test_every_line_fits_80_columns_has_no_color_and_the_next_command_can_be_typed(
    at_home, monkeypatch, capsys
):
    monkeypatch.setattr(console, "command", lambda script: f".venv/bin/python {script}.py")
    place = "out put"
    assert train.main([*TRAIN.split(), "--out", place, "--stop-on", "exact-match",
                       "--exact-match-problems", "2", "--max-new-tokens", "4"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "  .venv/bin/python evaluate.py --adapter 'out put/best' --chat\n" in said
    evaluate.main(["--adapter", f"{place}/best", "--limit", "2", "--max-new-tokens", "4"])
    said += capsys.readouterr().out
    assert "answers correct" in said and "about " in said and " left for " in said
    said = said.replace(str(at_home), ".")
    wide = [line for line in said.splitlines() if len(line) > 80]
    assert wide == [] and "\x1b" not in said and "\r" not in said


def result(outcomes: dict[str, list[bool]], **others) -> dict:
    models = {name: {"correct": {"x": sum(o)}, "outcomes": o, "seconds": 1.0, "by": {}}
              for name, o in outcomes.items()}  # fmt: skip
    settings = {"problems_sha256": "1", "base": others.pop("base", "b")}
    return {"settings": settings, "problems": 4, "models": models, "examples": []} | others


def test_the_verdict_is_above_the_table():
    before, after = [True, False, False, False], [True, True, True, False]
    about = difference(before, after, 0)
    one = result({"base": before, "tuned": after}) | about
    text = result_text(one)
    assert text.index("tuned against base: ") < text.index("choices correct, x")
    both = comparison_text(result({"base": before}), result({"base": after}, base="c"), 0)
    assert both.index("B against A: ") < both.index("choices correct, x")
    assert "base: b against c\n" in both
    second = result({"base": after})
    second["settings"]["shots"] = 5
    assert "shots: None against 5\n" in comparison_text(result({"base": before}), second, 0)
    summary = task_summary(one | {"task": "sums", "folder": "f"})
    table = tasks_table([summary, summary | {"task": "others"}])
    assert table.index("others, x: ") < table.index("correct, by task")
