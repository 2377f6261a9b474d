"""Tests of stops and of a machine that changes: long validations, long steps, memory, threads."""

import json
import os
import signal
import time

import pytest
import torch

import evaluation.answers
import evaluation.teacher_forced
import train
from run import stopping
from run.device import conditions
from tests.campaign.harness import (
    SHORT,
    counting_micro_batches,
    finish,
    results,
    resume_with_ranks,
    run,
    start_ranks,
    steps_logged,
)

ONE_EPOCH = [*SHORT, "--epochs", "1", "--evals-per-epoch", "1", "--validation-share", "0.2"]


def signalled_at_the_first_call_of(module, name: str, number: int = signal.SIGTERM):
    """A fault: the first call of a function in a session sends it a signal."""

    def fault():
        function, calls = getattr(module, name), []

        def call(*args, **options):
            if not calls:
                calls.append(os.kill(os.getpid(), number))
            return function(*args, **options)

        setattr(module, name, call)

    return fault


def test_a_run_stopped_in_every_validation_comes_to_an_end_with_the_same_results(tiny, tmp_path):
    """In every batch and every answer of two validations; the last of all ends the run."""
    command = [*tiny, *ONE_EPOCH, "--validation-share", 0.1, "--stop-on", "exact-match"]
    command += ["--exact-match-problems", 2, "--max-new-tokens", 3]

    def fault():
        signalled_at_the_first_call_of(evaluation.teacher_forced, "flat_batch")()
        signalled_at_the_first_call_of(evaluation.answers, "Completion")()

    codes = []
    while not codes or codes[-1] == 143:
        codes.append(run(command, tmp_path / "stopped", fault=fault).code)
        assert len(codes) <= 20
    assert codes == [143] * 9 + [0]  # 3 batches and 2 answers, twice
    finish(command, tmp_path / "whole")
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_two_ranks_stop_in_a_validation_if_one_is_signalled_and_resume_with_equal_results(
    tiny, tmp_path
):
    """In the second batch, then in the first answer; the first rank sees it in the next batch."""
    posted, batches = tmp_path / "posted", tmp_path / "batches"
    batches.touch()

    def wait_until(condition):
        while not condition():
            time.sleep(0.01)

    def signalled(module, name):
        def fault():
            signalled_at_the_first_call_of(module, name)()
            function, post = getattr(module, name), stopping.Notice.post

            def waiting(*args, **options):
                wait_until(lambda: batches.stat().st_size >= 2)
                return function(*args, **options)

            setattr(module, name, waiting)
            stopping.Notice.post = lambda self: (post(self), posted.touch())

        return fault

    def first():
        stopping.LOOK_SECONDS = 0
        flat_batch = evaluation.teacher_forced.flat_batch

        def counted(*args):
            with batches.open("a") as file:
                file.write(".")
            wait_until(lambda: batches.stat().st_size != 2 or posted.exists())
            return flat_batch(*args)

        evaluation.teacher_forced.flat_batch = counted

    command = [*tiny, *ONE_EPOCH, "--batch-size", 1, "--grad-accum", 4]
    command += ["--stop-on", "exact-match", "--max-new-tokens", 3]
    for module, name, measured in (
        (evaluation.teacher_forced, "flat_batch", 2),
        (evaluation.answers, "Completion", 4),  # all: none is measured twice
    ):
        ranks = start_ranks(
            command, tmp_path / "stopped", fault=signalled(module, name), first=first
        )
        ended = [rank.wait() for rank in ranks]
        assert [e.code for e in ended] == [75, 143], ended
        assert "stop requested on another rank: stopped after step 0" in ended[0].out
        assert batches.stat().st_size == measured
    for out in ("stopped", "whole"):
        resume_with_ranks(command, tmp_path / out)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_step_that_would_take_long_is_given_up_between_micro_batches_and_said(
    tiny, tmp_path, number, code
):
    command = [*tiny, *ONE_EPOCH, "--grad-accum", 20]  # steps of 16 micro-batches, 1 s each
    taken = tmp_path / "taken"

    def fault():
        counting_micro_batches()()
        flat_batch, calls = train.flat_batch, []

        def third_is_signalled(*args):
            calls.append(args)
            taken.write_text(str(len(calls)))
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return flat_batch(*args)

        train.flat_batch = third_is_signalled

    ended = run(command, tmp_path / "run", fault=fault)
    assert ended.code == code and steps_logged(tmp_path / "run") == 0
    assert "the step takes long: it is given up, and repeated on resuming" in ended.out
    assert int(taken.read_text()) == 13  # the signal came in the third second; 10 more
    finish(command, tmp_path / "run")
    finish(command, tmp_path / "whole")
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_run_resumed_with_other_threads_is_no_longer_bit_for_bit_and_says_so(short, half):
    known = json.loads((half / "config.json").read_text())["conditions"]
    assert known == conditions(torch.device("cpu")) and known["threads"] == 1
    said = "no longer bit for bit: threads 1 -> 2"
    ended = run([*short, "--max-steps", 4], half, fault=lambda: torch.set_num_threads(2))
    assert ended.code == 0 and f"resuming, {said}\n" in ended.out
    config = json.loads((half / "config.json").read_text())
    assert said in config["changes"] and config["conditions"]["threads"] == 2
    ended = run([*short, "--max-steps", 5], half, fault=lambda: torch.set_num_threads(2))
    assert ended.code == 0 and "bit for bit" not in ended.out


# Memory that runs out elsewhere than in backward


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98765 bytes")


def test_memory_that_runs_out_in_a_validation_halves_its_batches(tiny, expected, tmp_path):
    def fault():
        loss = evaluation.teacher_forced.linear_cross_entropy

        def limited(hidden, *rest):
            return loss(hidden, *rest) if len(hidden) <= 150 else out_of_memory()

        evaluation.teacher_forced.linear_cross_entropy = limited

    flags = [*tiny, *SHORT, "--batch-size", 8, "--grad-accum", 1, "--validation-share", 0.3]
    ended = run(flags, tmp_path / "run", fault=fault)
    assert ended.code == 0 and "micro-batches are half as large" in ended.out
    assert results(tmp_path / "run")["progress"]["halved"] > 0


def test_memory_that_runs_out_in_the_optimizer_step_is_reported_in_two_lines(short, tmp_path):
    def fault():
        torch.optim.AdamW.step = out_of_memory

    ended = run(short, tmp_path / "run", fault=fault)
    assert ended.code == 1 and "memory ran out: CUDA" in ended.two_line_error()
    assert "--grad-accum" in ended.two_line_error()


def test_when_memory_runs_out_on_one_of_two_ranks_both_halve_their_micro_batches(tiny, tmp_path):
    def fault():
        loss = train.linear_cross_entropy

        def limited(hidden, *rest):
            return loss(hidden, *rest) if len(hidden) <= 150 else out_of_memory()

        train.linear_cross_entropy = limited

    flags = [*tiny, *SHORT, "--batch-size", 4, "--grad-accum", 1]
    ended = [rank.wait() for rank in start_ranks(flags, tmp_path / "run", fault=fault)]
    assert [e.code for e in ended] == [0, 0], ended
    assert results(tmp_path / "run")["progress"]["halved"] > 0
