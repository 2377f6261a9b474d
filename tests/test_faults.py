"""Tests of faults during a run: kills, signals, full disks, damaged files, NaN, lost ranks.

This is a short sample of the campaign in tests/campaign, which repeats it at length.
"""

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import pty
import resource
import shutil
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import errors
import train
from files import MANIFEST, JsonLines, damage
from lora.inject import LoRAConfig, inject, trained_parameters
from lora.peft_format import WEIGHTS, peft_key
from run.base import Base, checked_adapter
from run.best import publish_best
from run.checkpoint import load_checkpoint, save_checkpoint
from run.distributed import World
from run.folder import Progress, Run
from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    await_steps,
    check_invariants,
    check_lost_ranks,
    check_random_kills,
    copy,
    count_detected_flips,
    counting_micro_batches,
    cut_sizes,
    disk_full,
    finish,
    results,
    resume_with_ranks,
    run,
    slowed,
    start,
    start_ranks,
    steps_logged,
    toy_flags,
    unsaved_steps,
)
from tests.toys import new_training, read_log, train_steps

# Killed


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_result(tiny, expected, tmp_path):
    assert check_random_kills([*tiny, *SHORT], tmp_path, range(12), expected) > 5


def killed_in(action, at: int) -> bool:
    """Run `action` in a fork that kills itself at fault point `at`; whether it got that far."""
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        FileCalls(at)()
        action()
    finally:
        os._exit(0)


def test_a_save_killed_in_any_file_call_leaves_the_previous_or_the_new_checkpoint(tmp_path):
    model, state = new_training()
    weights = {}
    for cursor in (1, 2, 3):
        train_steps(model, state, range(cursor, cursor + 1))
        weights[cursor] = [p.clone() for p in model.parameters()]
        if cursor < 3:
            save_checkpoint(Run(tmp_path / "before"), Progress(cursor), **state)
    out, at = copy(tmp_path / "before", tmp_path / "run"), 0
    save = functools.partial(save_checkpoint, Run(out), Progress(3), **state)
    while killed_in(save, at):
        Run(out).repair()
        again, restored = new_training()
        cursor = load_checkpoint(Run(out), **restored).cursor
        assert cursor in (2, 3)
        assert all(map(torch.equal, again.parameters(), weights[cursor]))
        names = [p.name for p in (out / "checkpoints").iterdir()]
        assert all(len(name) == len("step-000000") for name in names) and len(names) <= 3
        copy(tmp_path / "before", out)
        at += 1
    assert at > 20 and damage(out / "checkpoints" / "step-000003") is None
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_save_killed_while_replacing_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path):
    _, state = new_training()
    save_checkpoint(Run(tmp_path / "before"), Progress(3, step=1), **state)
    out, at = copy(tmp_path / "before", tmp_path / "run"), 0
    save = functools.partial(save_checkpoint, Run(out), Progress(3, step=2), **state)
    while killed_in(save, at):
        Run(out).repair()
        assert Run(out).read_progress().step in (1, 2)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]
        copy(tmp_path / "before", out)
        at += 1
    assert at > 20


@pytest.mark.parametrize("first", [True, False])
def test_publishing_the_best_killed_in_any_file_call_leaves_the_old_or_the_new_one(
    tiny, tmp_path, first
):
    base, config = Base.find(tiny[1], precision="fp32", device="cpu"), LoRAConfig(r=2)
    model = base.load()
    inject(model, config)
    parameters = trained_parameters(model)

    def publish(step: int) -> None:
        for p in parameters.values():
            p.data.fill_(step)
        progress = Progress(step=step, best_loss=1.0)
        publish_best(model, config, base, Run(out), progress)

    out = tmp_path / "run"
    out.mkdir()
    if not first:
        publish(1)
    before, at = copy(out, tmp_path / "before"), 0
    while killed_in(lambda: publish(2), at):
        check_invariants(out)
        found = load_file(out / "best" / WEIGHTS) if (out / "best").exists() else {}
        assert found.keys() == {peft_key(n) for n in parameters} or first and not found
        assert len({t.mean().item() for t in found.values()} - {1.0, 2.0}) == 0
        assert not found or checked_adapter(out / "best")  # as its own folder says
        Run(out).repair()
        assert {p.name for p in out.iterdir()} <= {"best"}
        copy(before, out)
        at += 1
    assert at > 20


# Stopped by signals and time limits


def test_a_signal_stops_the_run_after_its_step_and_no_step_is_repeated(short, expected, tmp_path):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        out = tmp_path / number.name
        child = start(short, out, fault=slowed(0.03))
        await_steps(child, out, 3)
        child.send(number)
        sent = time.monotonic()
        ended = child.wait()
        assert time.monotonic() - sent < 5 and ended.code == code
        assert "Traceback" not in ended.err and f"{number.name}: stopped after step" in ended.out
        assert unsaved_steps(out) == 0
        finish(short, out)
        assert results(out) == expected


def in_the_second_save(signals: list[int]) -> FileCalls:
    """A fault: these signals arrive while the checkpoint of step 2 is half written."""
    return FileCalls(
        12, lambda: [os.kill(os.getpid(), s) for s in signals], within="save_checkpoint", nth=2
    )


@pytest.mark.parametrize(
    "signals, code, cursor",
    [
        ([signal.SIGTERM] * 3, 143, 3),  # step 2 is saved, then step 3 is taken and saved
        ([signal.SIGINT], 130, 3),
        ([signal.SIGINT, signal.SIGINT], 130, 1),  # at once
        ([signal.SIGTERM, signal.SIGINT], 130, 1),
        ([signal.SIGTERM, signal.SIGKILL], 137, 1),
    ],
)
def test_signals_during_a_save_leave_a_complete_checkpoint(
    short, expected, tmp_path, signals, code, cursor
):
    out = tmp_path / "run"
    ended = run(short, out, fault=in_the_second_save(signals))
    assert ended.code == code and "Traceback" not in ended.err
    check_invariants(out)
    Run(out).repair()
    assert Run(out).read_progress().cursor == cursor
    finish(short, out)
    assert results(out) == expected


def test_max_minutes_stops_each_session_in_time_with_code_75_until_the_last(
    short, expected, tmp_path
):
    out, codes, steps = tmp_path / "run", [], []
    while not codes or codes[-1] == 75:
        ended = run([*short, "--max-minutes", 16.5 / 60], out, fault=counting_micro_batches())
        codes.append(ended.code)
        steps.append(steps_logged(out))
    # A step takes 4 s, the last of an epoch 2 s; with less than 8 s left, a session stops.
    assert codes == [75, 75, 75, 0] and steps == [3, 6, 9, 10]
    assert results(out) == expected


@pytest.mark.parametrize("streams", [[1], [1, 2]])
def test_a_run_whose_output_is_closed_shows_no_traceback_and_is_completed(
    short, expected, tmp_path, streams
):
    def closed():
        reader, writer = os.pipe()
        os.close(reader)
        for number in streams:
            os.dup2(writer, number)

    ended = run(short, tmp_path / "run", fault=closed)
    assert ended.code == 128 + signal.SIGPIPE
    assert "Traceback" not in ended.err and "Exception" not in ended.err
    assert results(tmp_path / "run") == expected


def test_a_run_whose_terminal_is_closed_saves_its_step(short, expected, tmp_path):
    controller, terminal = pty.openpty()

    def on_the_terminal():
        os.close(controller)
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.dup2(terminal, number)
        slowed(0.03)()

    out = tmp_path / "run"
    child = start(short, out, fault=on_the_terminal)
    os.close(terminal)
    os.set_blocking(controller, False)
    while steps_logged(out) < 3 and not child.has_ended():
        try:
            os.read(controller, 65536)
        except OSError:
            time.sleep(0.001)
    os.close(controller)
    assert child.wait().code == 129 and unsaved_steps(out) == 0
    finish(short, out)
    assert results(out) == expected


def test_the_newest_checkpoint_is_found_by_its_step_and_not_by_clocks(short, expected, half):
    for i, path in enumerate(sorted(half.rglob("*"), reverse=True)):
        os.utime(path, (i * 1e6, i * 1e6))
    before = Run(half).read_progress().cursor

    def clock_set_back():
        now = time.time
        time.time = lambda: now() - 1e8

    assert before >= 2 and run(short, half, fault=clock_set_back).code == 0
    assert steps_logged(half) == 10 and results(half) == expected


# The disk


def test_a_full_disk_is_reported_in_two_lines_and_the_run_can_be_resumed(short, expected, tmp_path):
    for at in (0, 6, 60, 170):
        out = tmp_path / str(at)
        ended = run(short, out, fault=FileCalls(at, disk_full))
        assert ended.code == 1 and "the disk is full" in ended.two_line_error(), at
        check_invariants(out)
        finish(short, out)
        assert results(out) == expected


@pytest.mark.parametrize("most", [1_000, 16_000])
def test_a_limit_on_file_sizes_is_reported_as_a_full_disk(short, expected, tmp_path, most):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    ended = run(short, tmp_path / "run", fault=limit)
    assert ended.code == 1 and os.strerror(errno.EFBIG) in ended.two_line_error()
    finish(short, tmp_path / "run")
    assert results(tmp_path / "run") == expected


def test_a_disk_without_space_for_a_run_is_refused_with_the_bytes_needed(short, tmp_path):
    def nearly_full():
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1234)

    ended = run(short, tmp_path / "run", fault=nearly_full)
    assert ended.code == 2 and ended.seconds < 5 and not (tmp_path / "run").exists()
    error = ended.two_line_error()
    assert "1,234 bytes free" in error and f"needs {(64 << 20) + 44 * 896:,}" in error


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can change its user")
def test_an_out_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    folder = Path("/tmp") / f"owned-by-root-{os.getpid()}"
    folder.mkdir(mode=0o755)
    nobody = functools.partial(os.setresuid, 65534, 65534, 65534)
    try:
        for out in (folder, folder / "new"):
            nothing = ["--model", "nowhere", "--data", "nowhere"]
            ended = run(nothing, out, fault=nobody, log=tmp_path / "log")
            assert ended.code == 2 and f"--out {out} cannot be written" in ended.two_line_error()
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(folder)


def test_nothing_is_written_outside_the_run_folder_not_even_in_tmpdir(short, tmp_path):
    out, log = tmp_path / "run", tmp_path / "paths"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple) -> None:
        count = {"os.mkdir": 1, "os.rename": 2, "os.symlink": 2}.get(event, 0)
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2]:
            count = int(bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        for path in arguments[:count]:
            os.write(handle, os.fsencode(path) + b"\n")

    def watched():
        os.environ["TMPDIR"] = str(tmp_path / "missing")
        sys.addaudithook(watch)

    assert run(short, out, fault=watched).code == 0
    paths = set(log.read_text().splitlines()) - {os.devnull}
    assert str(out / "best" / WEIGHTS) in {p.replace(".new", "") for p in paths}
    assert all(Path(path).is_relative_to(out) for path in paths), paths


# Damaged files


def test_a_flipped_bit_in_a_checkpoint_is_detected(finished, tmp_path):
    folder = copy(max((finished / "checkpoints").iterdir()), tmp_path / "step-000010")
    assert {p.name for p in folder.iterdir()} == {MANIFEST, "progress.json", "state.safetensors"}
    assert count_detected_flips(folder, range(40)) == 40


def test_a_truncated_or_missing_file_of_a_checkpoint_is_detected(finished, tmp_path):
    folder = copy(max((finished / "checkpoints").iterdir()), tmp_path / "step-000010")
    for path in folder.iterdir():
        data = path.read_bytes()
        for size in cut_sizes(len(data)):
            path.write_bytes(data[:size])
            assert damage(folder) and path.name in damage(folder), (path.name, size)
        path.unlink()
        assert path.name in damage(folder)
        path.write_bytes(data)


def test_a_damaged_checkpoint_is_set_aside_with_a_reason_and_the_previous_one_is_used(
    short, expected, half
):
    newest = max((half / "checkpoints").glob("step-??????"))
    (newest / "state.safetensors").write_bytes(b"")
    ended = finish(short, half)
    assert f"{newest} is damaged (state.safetensors has 0 bytes, not 17,512)" in ended.out
    assert len(list((half / "checkpoints").glob(f"{newest.name}.bad-*"))) == 1
    assert results(half) == expected


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_deleted(short, half):
    for path in (half / "checkpoints").glob("*/progress.json"):
        path.write_bytes(b"{}")
    before = sum(1 for p in half.rglob("*") if p.is_file())
    for _ in range(2):
        ended = run(short, half)
        assert ended.code == 2 and "every checkpoint in" in ended.two_line_error()
        assert not list((half / "checkpoints").glob("step-??????"))
    assert sum(1 for p in half.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "train', b"\xff\x00\x07", b"\0" * 4096, b"[1]\n", b"\xfe\n\0\n"]
)
def test_the_torn_end_of_a_log_is_cut_off_and_every_other_line_is_kept(tmp_path, torn):
    complete = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(complete + torn)
    JsonLines(path, keep=len(complete + torn)).write(step=4)
    assert path.read_bytes() == complete + b'{"step": 4}\n'


def test_a_log_torn_after_the_last_checkpoint_is_repaired(short, expected, half):
    with (half / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"step"')
    finish(short, half)
    assert results(half) == expected


def test_the_log_is_synced_to_the_disk_before_its_size_is_recorded(tmp_path, monkeypatch):
    log, synced = JsonLines(tmp_path / "m.jsonl"), []
    monkeypatch.setattr(os, "fsync", synced.append)
    log.write(step=1)
    assert log.sync() == len(b'{"step": 1}\n') and synced == [log._file.fileno()]


def test_leftovers_of_killed_runs_are_removed_and_other_files_are_kept(short, finished, tmp_path):
    out = copy(finished, tmp_path / "run")
    ours = ["checkpoints/step-000011.new", "checkpoints/step-000001.gone", "best.new"]
    theirs = ["best.old", "best-of-monday", "notes", "checkpoints/mine", "mine.new",
              "checkpoints/notes.old", "checkpoints/step-by-step.new"]  # fmt: skip
    for name in (*ours, *theirs):
        (out / name).mkdir()
        (out / name / "file").write_text("text")
    finish(short, out)
    assert not any((out / name).exists() for name in ours)
    assert all((out / name / "file").read_text() == "text" for name in theirs)


def test_a_second_trainer_is_refused_with_the_firsts_process_id_until_the_first_is_dead(
    short, expected, tmp_path
):
    out = tmp_path / "run"
    first = start(short, out, fault=slowed(0.03))
    await_steps(first, out, 2)
    first.send(signal.SIGSTOP)
    second = run(short, out)
    assert second.code == 2 and second.seconds < 2
    assert f"{out} is in use by process {first.pid} on " in second.two_line_error()
    check_invariants(out)
    first.send(signal.SIGKILL)
    first.wait()
    finish(short, out)
    assert results(out) == expected


# Resumed with other options


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning-rate", 1e-3), ("--batch-size", 4), ("--grad-accum", 2), ("--rank", 4),
        ("--alpha", "3"), ("--targets", "q_proj"), ("--seed", 1), ("--dropout", 0.3),
    ],
)  # fmt: skip
def test_an_option_that_changes_the_training_is_refused_on_resuming(short, finished, flag, value):
    ended = run([*short, flag, value], finished)
    name = flag.removeprefix("--").replace("-", "_")
    error = ended.two_line_error()
    assert ended.code == 2 and f"{name} was " in error and f"is {value}" in error.replace("['", "")


def test_other_rows_or_weights_with_the_same_name_are_another_run(tmp_path):
    tiny = toy_flags(tmp_path / "tiny")
    command, out = [*tiny, *SHORT, "--max-steps", "1"], tmp_path / "run"
    finish(command, out)
    base = Path(tiny[1]) / "model.safetensors"
    tensors = load_file(base)
    tensors["model.norm.weight"] += 1
    save_file(tensors, base)
    toys.write_arithmetic(Path(tiny[3]), rows=100, seed=1)
    error = run(command, out).two_line_error()
    assert "base_sha256 was" in error and "data_sha256 was" in error


def test_more_epochs_and_other_intervals_are_accepted_and_recorded(short, finished, tmp_path):
    out = copy(finished, tmp_path / "run")
    ended = finish([*short, "--epochs", 3, "--evals-per-epoch", 5, "--patience", 50], out)
    changes = json.loads((out / "config.json").read_text())["changes"]
    expected = {"epochs was 2, is 3", "evals_per_epoch was 2, is 5", "patience was 5, is 50"}
    assert set(changes) == expected | {f"out was {finished}, is {out}"}
    assert all(f"resuming, although {change}\n" in ended.out for change in changes)
    assert steps_logged(out) == 15 and Run(out).read_progress().cursor == 15


def test_an_extended_run_killed_before_its_first_step_remains_extended(short, finished, tmp_path):
    out, longer = copy(finished, tmp_path / "run"), [*short, "--epochs", 3]
    killed = run(longer, out, fault=FileCalls(0, within="save_checkpoint"))
    assert killed.code == 137 and not (out / "report.html").exists()
    finish(longer, out)
    assert steps_logged(out) == 15 and (out / "report.html").exists()


def test_fewer_steps_than_were_already_taken_end_the_run_at_once(short, half):
    done = Run(half).read_progress().cursor
    finish([*short, "--max-steps", 1], half)
    assert steps_logged(half) == Run(half).read_progress().cursor == done > 1
    assert read_log(half / "metrics.jsonl")[-1]["val_loss"] > 0


def test_two_micro_batches_of_4_have_the_losses_of_one_of_8(tiny, tmp_path):
    losses = []
    for batch, accum in ((8, 1), (4, 2)):
        out = tmp_path / str(batch)
        finish([*tiny, *SHORT, "--batch-size", batch, "--grad-accum", accum], out)
        losses.append([m.get("train_loss", m.get("val_loss")) for m in
                       read_log(out / "metrics.jsonl")])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Gradients that are not finite


def inf_in_one_gradient(calls: set[int]):
    """A fault: in these steps, counted from 1, one gradient is infinite though the loss is
    finite.
    """

    def fault():
        sum_gradients, count = World.sum_gradients, itertools.count(1)

        def sum_and_overflow(self, parameters, *flags):
            parameters = list(parameters)
            given_up = sum_gradients(self, parameters, *flags)
            if next(count) in calls:
                parameters[1].grad[0, 0] = math.inf
            return given_up

        World.sum_gradients = sum_and_overflow

    return fault


def test_a_step_with_an_infinite_gradient_is_skipped_and_its_rows_are_logged(short, tmp_path):
    ended = run(short, tmp_path / "run", fault=inf_in_one_gradient({2, 6}))
    steps = [m for m in read_log(tmp_path / "run" / "metrics.jsonl") if "train_loss" in m]
    assert ended.code == 0 and "2 steps were skipped" in ended.out
    assert [m["step"] for m in steps] == [1, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [len(m.get("skipped_rows", [])) for m in steps] == [0, 8, 0, 0, 0, 8, 0, 0, 0, 0]
    assert steps[1]["learning_rate"] == steps[2]["learning_rate"]
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000010" / "state.safetensors")
    assert all(t.isfinite().all() for t in state.values())
    assert {t.item() for name, t in state.items() if name.startswith("step/")} == {8}


def test_five_such_steps_in_a_row_end_the_run_and_best_is_the_best_before_them(short, tmp_path):
    out = tmp_path / "run"
    ended = run(short, out, fault=inf_in_one_gradient({6, 7, 8, 9, 10}))
    assert ended.code == 1
    assert "5 steps in a row had no finite gradient, up to step 10" in ended.two_line_error()
    check_invariants(out)
    validations = [m for m in read_log(out / "metrics.jsonl") if "val_loss" in m]
    best = min(validations, key=lambda m: m["val_loss"])
    assert f"Best at step {best['step']}," in (out / "best" / "README.md").read_text()


def overflowing():
    """A fault: fp16's loss scale starts so high that the first steps overflow, and grows fast."""
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = functools.partial(scaler, init_scale=2.0**18, growth_interval=3)


def test_after_an_fp16_overflow_the_scale_halves_and_a_killed_run_has_the_same_result(
    short, tmp_path
):
    flags, ends = [*short, "--precision", "fp16"], []
    for name, kills in (("uninterrupted", 0), ("killed", 2)):
        out = tmp_path / name
        for i in range(kills):
            child = start(flags, out, fault=overflowing)
            await_steps(child, out, 2 + 3 * i)
            child.send(signal.SIGKILL)
            child.wait()
        assert run(flags, out, fault=overflowing).code == 0
        ends.append(results(out))
    steps = [m for m in ends[0]["log"] if "train_loss" in m]
    skipped = ["skipped_rows" in m for m in steps]
    assert 2 < sum(skipped) < 9 and ends[0]["progress"]["skipped"] == sum(skipped)
    path = tmp_path / "uninterrupted/checkpoints/step-000010/progress.json"
    saved = json.loads(path.read_text())
    assert saved["scaler"]["scale"] < 2.0**18
    assert ends[0] == ends[1]


# Out of memory


def memory_for(tokens: int, spared: int = 0):
    """A fault: micro-batches of more than `tokens` run out of memory, except the first `spared`."""

    def fault():
        loss, calls = train.linear_cross_entropy, itertools.count()

        def limited(hidden, *rest):
            if len(hidden) > tokens and next(calls) >= spared:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98765 bytes")
            return loss(hidden, *rest)

        train.linear_cross_entropy = limited

    return fault


@pytest.mark.parametrize("batch, accum, spared, halved", [(8, 1, 0, 2), (4, 2, 1, 1)])
def test_out_of_memory_halves_the_micro_batches_and_the_results_are_the_same(
    tiny, expected, tmp_path, batch, accum, spared, halved
):
    flags = [*tiny, *SHORT, "--batch-size", batch, "--grad-accum", accum, "--save-every", 0]
    ended = run(flags, tmp_path / "run", fault=memory_for(150, spared))
    assert (
        ended.code == 0 and ended.out.count("micro-batches are half as large from now on") == halved
    )
    once = expected | {"log": [*expected["log"]]}  # other tests use it as well
    found, progress = results(tmp_path / "run"), expected["progress"] | {"halved": halved}
    # The validation before the first step is done in whole micro-batches: it rounds differently.
    losses = [float.fromhex(result["log"].pop(0)["val_loss"]) for result in (found, once)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert found == once | {"progress": progress}


def test_an_example_too_long_for_memory_ends_the_run_with_its_length_and_remedies(short, tmp_path):
    ended = run(short, tmp_path / "run", fault=memory_for(60))
    error = ended.two_line_error()
    assert ended.code == 1 and "98765 bytes" in error
    assert any(f"1 sequence of {n} tokens" in error for n in range(61, 65))
    for remedy in ("--max-length 6", "--precision", "--targets"):
        assert remedy in error


# Ranks


def test_when_a_rank_is_killed_the_other_stops_and_both_can_be_resumed(two_ranks, tmp_path):
    assert check_lost_ranks(two_ranks, tmp_path, range(1)) == 1


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks, tmp_path):
    flags, expected = two_ranks
    first, second = start_ranks(flags, tmp_path / "run", fault=slowed(0.03))
    await_steps(first, tmp_path / "run", 3)
    second.send(signal.SIGTERM)
    ended = [first.wait(limit=30), second.wait(limit=30)]
    assert [e.code for e in ended] == [75, 143], ended
    assert "stop requested on another rank: stopped after step" in ended[0].out
    assert unsaved_steps(tmp_path / "run") == 0
    resume_with_ranks(flags, tmp_path / "run")
    assert results(tmp_path / "run") == expected


def test_a_failure_on_one_rank_is_reported_once_and_all_ranks_stop(two_ranks, tmp_path):
    def failing():
        flat_batch, calls = train.flat_batch, iter(range(11))

        def fails(*args):
            if next(calls) == 10:
                raise errors.TrainingFailed("the root cause", "the remedy")
            return flat_batch(*args)

        train.flat_batch = fails

    ranks = start_ranks(two_ranks[0], tmp_path / "run", fault=failing)
    ended = [rank.wait(limit=30) for rank in ranks]
    assert [e.code for e in ended] == [1, 1], ended
    assert "the root cause" in ended[1].two_line_error()
    assert "see the other rank's error" in ended[0].two_line_error()
    check_invariants(tmp_path / "run")


# Messages and exit codes


@pytest.mark.parametrize(
    "raised, code, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1,
         "error: the disk is full: a/b: No space left on device\n"
         "  free some space, then rerun the command to resume\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1,
         "error: the disk is full: Disk quota exceeded\n"
         "  free some space, then rerun the command to resume\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)  # fmt: skip
def test_an_error_that_is_not_a_defect_has_an_exit_code_and_no_traceback(
    capsys, raised, code, message
):
    def fail():
        raise raised

    assert errors.run_script(fail) == code and capsys.readouterr().err == message


@pytest.mark.parametrize("defect", [FileNotFoundError(errno.ENOENT, "Absent", "x"), KeyError("x")])
def test_a_defect_keeps_its_traceback(defect):
    def fail():
        raise defect

    with pytest.raises(type(defect)):
        errors.run_script(fail)


def test_debug_shows_where_an_error_came_from(tiny, tmp_path):
    ended = run([*tiny, "--epochs", 0, "--debug"], tmp_path / "run")
    assert ended.code == 2 and "Traceback" in ended.err and "in parse" in ended.err
    assert ended.err.endswith("--help lists the options\n")
