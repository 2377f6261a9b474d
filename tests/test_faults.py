"""Laws of a run that something happens to: killed, stopped, full disks, damaged files, bad numbers.

A short sample of the campaign in tests/campaign, which calls the functions here with more of all.
"""

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import pty
import random
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
from run.base import Base
from run.best import publish_best
from run.checkpoint import load_checkpoint, save_checkpoint
from run.distributed import World
from run.folder import Progress, Run
from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    await_steps,
    check_instant,
    copy,
    disk_full,
    finish,
    go_on_with_ranks,
    left_behind,
    run,
    slowed,
    start,
    start_ranks,
    steps_logged,
    steps_to_do_again,
    toy_flags,
)
from tests.test_run import fresh, learn
from tests.toys import read_log

# Killed


def survive_kills(flags: list, folder: Path, seeds: range, expected: dict, seconds: float) -> int:
    """Kill a run at a random moment for each seed; how many were killed before their end."""
    met = 0
    for seed in seeds:
        rng, out = random.Random(seed), folder / f"kill-{seed}"
        save_every = rng.choice([0, 0.1, 1000])
        command = [*flags, "--save-every", save_every]
        child = start(command, out)
        time.sleep(rng.uniform(0, seconds))
        child.send(signal.SIGKILL)
        met += child.wait().code == 137
        check_instant(out)
        assert save_every > 0 or steps_to_do_again(out) <= 1
        finish(command, out)
        assert left_behind(out) == expected, f"seed {seed}"
        shutil.rmtree(out)
    return met


def test_a_run_killed_at_random_moments_comes_to_the_same_end(tiny, expected, tmp_path):
    assert survive_kills([*tiny, *SHORT], tmp_path, range(12), expected, seconds=0.35) > 6


def killed_in(action, at: int) -> bool:
    """Whether `action`, in a fork, comes to the `at`-th moment of its file calls and dies there."""
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        FileCalls(at)()
        action()
    finally:
        os._exit(0)


def test_killed_in_any_file_call_of_a_save_the_checkpoint_before_or_after_is_whole(tmp_path):
    model, kept = fresh()
    weights = {}
    for cursor in (1, 2, 3):
        learn(model, kept, range(cursor, cursor + 1))
        weights[cursor] = [p.clone() for p in model.parameters()]
        if cursor < 3:
            save_checkpoint(Run(tmp_path / "before"), Progress(cursor), **kept)
    out, at = copy(tmp_path / "before", tmp_path / "run"), 0
    save = functools.partial(save_checkpoint, Run(out), Progress(3), **kept)
    while killed_in(save, at):
        Run(out).repair()
        again, restored = fresh()
        cursor = load_checkpoint(Run(out), **restored).cursor
        assert cursor in (2, 3)
        assert all(map(torch.equal, again.parameters(), weights[cursor]))
        names = [p.name for p in (out / "checkpoints").iterdir()]
        assert all(len(name) == len("step-000000") for name in names) and len(names) <= 3
        copy(tmp_path / "before", out)
        at += 1
    assert at > 20 and damage(out / "checkpoints" / "step-000003") is None
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_killed_while_a_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path):
    _, kept = fresh()
    save_checkpoint(Run(tmp_path / "before"), Progress(3, step=1), **kept)
    out, at = copy(tmp_path / "before", tmp_path / "run"), 0
    save = functools.partial(save_checkpoint, Run(out), Progress(3, step=2), **kept)
    while killed_in(save, at):
        Run(out).repair()
        assert Run(out).read_progress().step in (1, 2)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]
        copy(tmp_path / "before", out)
        at += 1
    assert at > 20


@pytest.mark.parametrize("first", [True, False])
def test_killed_in_any_file_call_of_publishing_the_best_the_old_or_the_new_one_loads(
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
        check_instant(out)
        found = load_file(out / "best" / WEIGHTS) if (out / "best").exists() else {}
        assert found.keys() == {peft_key(n) for n in parameters} or first and not found
        assert len({t.mean().item() for t in found.values()} - {1.0, 2.0}) == 0
        Run(out).repair()
        assert {p.name for p in out.iterdir()} <= {"best"}
        copy(before, out)
        at += 1
    assert at > 20


# Asked to leave


def test_a_signal_stops_the_run_after_its_step_and_no_step_is_done_again(short, expected, tmp_path):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        out = tmp_path / number.name
        child = start(short, out, fault=slowed(0.005))
        await_steps(child, out, 3)
        child.send(number)
        asked = time.monotonic()
        ended = child.wait()
        assert time.monotonic() - asked < 5 and ended.code == code
        assert "Traceback" not in ended.err and f"{number.name}: stopped after step" in ended.out
        assert steps_to_do_again(out) == 0
        finish(short, out)
        assert left_behind(out) == expected


def in_the_third_save(signals: list[int]) -> FileCalls:
    """A fault: these signals come while the checkpoint of step 2 is half written."""
    return FileCalls(
        12, lambda: [os.kill(os.getpid(), s) for s in signals], within="save_checkpoint", nth=3
    )


@pytest.mark.parametrize(
    "signals, code, cursor",
    [
        ([signal.SIGTERM] * 3, 143, 3),  # step 2 is saved, then a step is taken and saved too
        ([signal.SIGINT], 130, 3),
        ([signal.SIGINT, signal.SIGINT], 130, 1),  # at once
        ([signal.SIGTERM, signal.SIGINT], 130, 1),
        ([signal.SIGTERM, signal.SIGKILL], 137, 1),
    ],
)
def test_signals_during_a_save_leave_a_whole_checkpoint(
    short, expected, tmp_path, signals, code, cursor
):
    out = tmp_path / "run"
    ended = run(short, out, fault=in_the_third_save(signals))
    assert ended.code == code and "Traceback" not in ended.err
    check_instant(out)
    Run(out).repair()
    assert Run(out).read_progress().cursor == cursor
    finish(short, out)
    assert left_behind(out) == expected


def test_the_clock_stops_a_run_in_time_with_code_75_until_it_is_done(short, expected, tmp_path):
    out, codes = tmp_path / "run", []
    while not codes or codes[-1] == 75:
        ended = run([*short, "--max-minutes", 0.8 / 60], out, fault=slowed(0.012))
        codes.append(ended.code)
        assert ended.seconds < 0.8 or ended.code == 0 or len(codes) == 1, ended
    assert codes[-1] == 0 and 2 <= len(codes) < 11
    assert left_behind(out) == expected


@pytest.mark.parametrize("streams", [[1], [1, 2]])
def test_a_run_whose_reader_has_gone_can_go_on_and_no_traceback_is_shown(
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
    finish(short, tmp_path / "run")
    assert left_behind(tmp_path / "run") == expected


def test_a_run_whose_terminal_is_closed_saves_its_step(short, expected, tmp_path):
    here, there = pty.openpty()

    def on_the_terminal():
        os.close(here)
        os.setsid()
        fcntl.ioctl(there, termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.dup2(there, number)
        slowed(0.005)()

    out = tmp_path / "run"
    child = start(short, out, fault=on_the_terminal)
    os.close(there)
    os.set_blocking(here, False)
    while steps_logged(out) < 3 and not child.is_over():
        try:
            os.read(here, 65536)
        except OSError:
            time.sleep(0.001)
    os.close(here)
    assert child.wait().code == 129 and steps_to_do_again(out) == 0
    finish(short, out)
    assert left_behind(out) == expected


def test_the_newest_checkpoint_is_known_by_its_step_whatever_clocks_say(short, expected, half):
    for i, path in enumerate(sorted(half.rglob("*"), reverse=True)):
        os.utime(path, (i * 1e6, i * 1e6))
    before = Run(half).read_progress().cursor

    def clock_set_back():
        now = time.time
        time.time = lambda: now() - 1e8

    assert before >= 2 and run(short, half, fault=clock_set_back).code == 0
    assert steps_logged(half) == 10 and left_behind(half) == expected


# The disk


def test_a_disk_that_fills_up_is_told_in_two_lines_and_the_command_goes_on(
    short, expected, tmp_path
):
    for at in (0, 6, 60, 170):
        out = tmp_path / str(at)
        ended = run(short, out, fault=FileCalls(at, disk_full))
        assert ended.code == 1 and "the disk is full" in ended.in_two_lines(), at
        check_instant(out)
        finish(short, out)
        assert left_behind(out) == expected


@pytest.mark.parametrize("most", [1_000, 16_000])
def test_files_that_may_not_grow_are_a_full_disk(short, expected, tmp_path, most):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    ended = run(short, tmp_path / "run", fault=limit)
    assert ended.code == 1 and os.strerror(errno.EFBIG) in ended.in_two_lines()
    finish(short, tmp_path / "run")
    assert left_behind(tmp_path / "run") == expected


def test_a_disk_that_is_too_full_at_the_start_is_refused_with_the_bytes_needed(short, tmp_path):
    def nearly_full():
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1234)

    ended = run(short, tmp_path / "run", fault=nearly_full)
    assert ended.code == 2 and ended.seconds < 5 and not (tmp_path / "run").exists()
    said = ended.in_two_lines()
    assert "1,234 bytes free" in said and f"needs {(64 << 20) + 44 * 896:,}" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become somebody else")
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    place = Path("/tmp") / f"of-another-{os.getpid()}"
    place.mkdir(mode=0o755)
    nobody = functools.partial(os.setresuid, 65534, 65534, 65534)
    try:
        for out in (place, place / "new"):
            nothing = ["--model", "nowhere", "--data", "nowhere"]
            ended = run(nothing, out, fault=nobody, log=tmp_path / "log")
            assert ended.code == 2 and f"--out {out} cannot be written" in ended.in_two_lines()
        assert not list(place.iterdir())
    finally:
        shutil.rmtree(place)


def test_nothing_is_written_outside_of_the_run_folder(short, tmp_path):
    """Neither in $TMPDIR, nor anywhere else."""
    out, seen = tmp_path / "run", tmp_path / "seen"
    handle = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple) -> None:
        places = {"os.mkdir": 1, "os.rename": 2, "os.symlink": 2}.get(event, 0)
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2]:
            places = int(bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        for place in arguments[:places]:
            os.write(handle, os.fsencode(place) + b"\n")

    def watched():
        os.environ["TMPDIR"] = str(tmp_path / "missing")
        sys.addaudithook(watch)

    assert run(short, out, fault=watched).code == 0
    places = set(seen.read_text().splitlines()) - {os.devnull}
    assert str(out / "best" / WEIGHTS) in {p.replace(".new", "") for p in places}
    assert all(Path(place).is_relative_to(out) for place in places), places


# Damaged files


def survive_flips(checkpoint: Path, seeds: range) -> int:
    """Flip one random bit of a checkpoint's files for each seed; how many flips were noticed."""
    files = sorted(checkpoint.iterdir())
    noticed = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(files)
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        noticed += damage(checkpoint) is not None
        path.write_bytes(whole)
    assert damage(checkpoint) is None
    return noticed


def test_a_bit_that_flips_in_a_checkpoint_is_noticed(whole, tmp_path):
    folder = copy(max((whole / "checkpoints").iterdir()), tmp_path / "step-000010")
    assert {p.name for p in folder.iterdir()} == {MANIFEST, "progress.json", "state.safetensors"}
    assert survive_flips(folder, range(40)) == 40


def cuts(size: int) -> list[int]:
    return [0, 1, size // 2, size - 1]


def test_a_file_of_a_checkpoint_that_was_cut_short_is_noticed(whole, tmp_path):
    folder = copy(max((whole / "checkpoints").iterdir()), tmp_path / "step-000010")
    for path in folder.iterdir():
        data = path.read_bytes()
        for size in cuts(len(data)):
            path.write_bytes(data[:size])
            assert damage(folder) and path.name in damage(folder), (path.name, size)
        path.unlink()
        assert path.name in damage(folder)
        path.write_bytes(data)


def test_a_damaged_checkpoint_is_set_aside_with_its_reason_and_the_one_before_is_used(
    short, expected, half
):
    newest = max((half / "checkpoints").glob("step-??????"))
    (newest / "state.safetensors").write_bytes(b"")
    ended = finish(short, half)
    assert f"{newest} is damaged (state.safetensors has 0 bytes, not 17,512)" in ended.out
    assert len(list((half / "checkpoints").glob(f"{newest.name}.bad-*"))) == 1
    assert left_behind(half) == expected


def test_where_every_checkpoint_is_damaged_the_run_stops_and_deletes_nothing(short, half):
    for path in (half / "checkpoints").glob("*/progress.json"):
        path.write_bytes(b"{}")
    before = sum(1 for p in half.rglob("*") if p.is_file())
    for _ in range(2):
        ended = run(short, half)
        assert ended.code == 2 and "every checkpoint in" in ended.in_two_lines()
        assert not list((half / "checkpoints").glob("step-??????"))
    assert sum(1 for p in half.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "train', b"\xff\x00\x07", b"\0" * 4096, b"[1]\n", b"\xfe\n\0\n"]
)
def test_the_end_of_a_torn_log_is_cut_off_and_every_other_line_kept(tmp_path, torn):
    whole = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + torn)
    JsonLines(path, keep=len(whole + torn)).write(step=4)
    assert path.read_bytes() == whole + b'{"step": 4}\n'


def test_a_log_torn_behind_what_the_checkpoint_knew_is_repaired(short, expected, half):
    with (half / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"step"')
    finish(short, half)
    assert left_behind(half) == expected


def test_the_log_is_on_the_disk_before_the_checkpoint_that_knows_of_it(tmp_path, monkeypatch):
    log, synced = JsonLines(tmp_path / "m.jsonl"), []
    monkeypatch.setattr(os, "fsync", synced.append)
    log.write(step=1)
    assert log.sync() == len(b'{"step": 1}\n') and synced == [log._file.fileno()]


def test_what_killed_runs_left_is_removed_and_other_peoples_files_are_not(short, whole, tmp_path):
    out = copy(whole, tmp_path / "run")
    ours = ["checkpoints/step-000011.new", "checkpoints/step-000001.gone", "best.new"]
    theirs = ["best.old", "best-of-monday", "notes", "checkpoints/mine", "mine.new",
              "checkpoints/notes.old", "checkpoints/step-by-step.new"]  # fmt: skip
    for name in (*ours, *theirs):
        (out / name).mkdir()
        (out / name / "file").write_text("text")
    finish(short, out)
    assert not any((out / name).exists() for name in ours)
    assert all((out / name / "file").read_text() == "text" for name in theirs)


def test_a_second_trainer_is_refused_and_told_of_the_first_whose_death_frees_the_folder(
    short, expected, tmp_path
):
    out = tmp_path / "run"
    first = start(short, out, fault=slowed(0.005))
    await_steps(first, out, 2)
    first.send(signal.SIGSTOP)
    second = run(short, out)
    assert second.code == 2 and second.seconds < 2
    assert f"{out} is in use by process {first.pid} on " in second.in_two_lines()
    check_instant(out)
    first.send(signal.SIGKILL)
    first.wait()
    finish(short, out)
    assert left_behind(out) == expected


# Going on with other options


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning-rate", 1e-3), ("--batch-size", 4), ("--grad-accum", 2), ("--rank", 4),
        ("--alpha", "3"), ("--targets", "q_proj"), ("--seed", 1), ("--dropout", 0.3),
        ("--data", "other"), ("--model", "other"),
    ],
)  # fmt: skip
def test_another_run_is_refused_in_the_folder_of_one(short, whole, tmp_path, flag, value):
    if value == "other":
        given = Path(short[short.index(flag) + 1])
        value = copy(given, tmp_path / "other")  # the same under another name
    ended = run([*short, flag, value], whole)
    name = flag.removeprefix("--").replace("-", "_")
    said = ended.in_two_lines()
    assert ended.code == 2 and f"{name} was " in said and f"is {value}" in said.replace("['", "")


def test_other_rows_or_weights_under_the_same_name_are_another_run(tmp_path):
    tiny = toy_flags(tmp_path / "tiny")
    command, out = [*tiny, *SHORT, "--max-steps", "1"], tmp_path / "run"
    finish(command, out)
    base = Path(tiny[1]) / "model.safetensors"
    tensors = load_file(base)
    tensors["model.norm.weight"] += 1
    save_file(tensors, base)
    toys.write_arithmetic(Path(tiny[3]), rows=100, seed=1)
    said = run(command, out).in_two_lines()
    assert "base_sha256 was" in said and "data_sha256 was" in said


def test_more_epochs_and_other_cadences_are_accepted_and_recorded(short, whole, tmp_path):
    out = copy(whole, tmp_path / "run")
    ended = finish([*short, "--epochs", 3, "--evals-per-epoch", 5, "--patience", 50], out)
    changes = json.loads((out / "config.json").read_text())["changes"]
    expected = {"epochs was 2, is 3", "evals_per_epoch was 2, is 5", "patience was 5, is 50"}
    assert set(changes) == expected | {f"out was {whole}, is {out}"}
    assert all(f"resuming, although {change}\n" in ended.out for change in changes)
    assert steps_logged(out) == 15 and Run(out).read_progress().cursor == 15


def test_a_longer_run_killed_before_its_first_step_is_still_the_longer_one(short, whole, tmp_path):
    out, longer = copy(whole, tmp_path / "run"), [*short, "--epochs", 3]
    killed = run(longer, out, fault=FileCalls(0, within="save_checkpoint"))
    assert killed.code == 137 and not (out / "report.html").exists()
    finish(longer, out)
    assert steps_logged(out) == 15 and (out / "report.html").exists()


def test_fewer_epochs_than_were_done_end_the_run_where_it_is(short, half):
    done = Run(half).read_progress().cursor
    finish([*short, "--max-steps", 1], half)
    assert steps_logged(half) == Run(half).read_progress().cursor == done > 1
    assert read_log(half / "metrics.jsonl")[-1]["val_loss"] > 0


def test_micro_batches_of_4_twice_are_8_at_once(tiny, tmp_path):
    losses = []
    for batch, accum in ((8, 1), (4, 2)):
        out = tmp_path / str(batch)
        finish([*tiny, *SHORT, "--batch-size", batch, "--grad-accum", accum], out)
        losses.append([m.get("train_loss", m.get("val_loss")) for m in
                       read_log(out / "metrics.jsonl")])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Numbers that are not finite


def inf_in_one_gradient(calls: set[int]):
    """A fault: in these steps, from 1, one gradient holds an infinity and the loss does not."""

    def fault():
        whole, done = World.sum_gradients, [0]

        def spoilt(self, parameters):
            parameters = list(parameters)
            whole(self, parameters)
            done[0] += 1
            if done[0] in calls:
                parameters[1].grad[0, 0] = math.inf

        World.sum_gradients = spoilt

    return fault


def test_a_step_with_one_infinite_gradient_is_skipped_counted_and_named(short, tmp_path):
    ended = run(short, tmp_path / "run", fault=inf_in_one_gradient({2, 6}))
    steps = [m for m in read_log(tmp_path / "run" / "metrics.jsonl") if "train_loss" in m]
    assert ended.code == 0 and "2 steps were skipped" in ended.out
    assert [m["step"] for m in steps] == [1, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [len(m.get("skipped_rows", [])) for m in steps] == [0, 8, 0, 0, 0, 8, 0, 0, 0, 0]
    assert steps[1]["learning_rate"] == steps[2]["learning_rate"]
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000010" / "state.safetensors")
    assert all(t.isfinite().all() for t in state.values())
    assert {t.item() for name, t in state.items() if name.startswith("step/")} == {8}


def test_five_such_steps_in_a_row_end_the_run_and_best_is_the_last_good_one(short, tmp_path):
    out = tmp_path / "run"
    ended = run(short, out, fault=inf_in_one_gradient({6, 7, 8, 9, 10}))
    assert ended.code == 1
    assert "5 steps in a row had no finite gradient, up to step 10" in ended.in_two_lines()
    check_instant(out)
    best = [m for m in read_log(out / "metrics.jsonl") if "val_loss" in m]
    assert (
        f"best at step {min(best, key=lambda m: m['val_loss'])['step']},"
        in (out / "best" / "README.md").read_text()
    )


def overflowing():
    """A fault: fp16's scale starts so high that the first steps overflow, and grows soon."""
    whole = torch.amp.GradScaler
    torch.amp.GradScaler = functools.partial(whole, init_scale=2.0**18, growth_interval=3)


def test_where_fp16_overflows_the_scale_halves_and_a_killed_run_comes_to_the_same_end(
    short, tmp_path
):
    flags, ends = [*short, "--precision", "fp16"], []
    for name, kills in (("whole", 0), ("killed", 2)):
        out = tmp_path / name
        for i in range(kills):
            child = start(flags, out, fault=overflowing)
            await_steps(child, out, 2 + 3 * i)
            child.send(signal.SIGKILL)
            child.wait()
        assert run(flags, out, fault=overflowing).code == 0
        ends.append(left_behind(out))
    steps = [m for m in ends[0]["log"] if "train_loss" in m]
    skipped = ["skipped_rows" in m for m in steps]
    assert 2 < sum(skipped) < 9 and ends[0]["progress"]["skipped"] == sum(skipped)
    scale = json.loads((tmp_path / "whole/checkpoints/step-000010/progress.json").read_text())
    assert scale["scaler"]["scale"] < 2.0**18
    assert len({m["learning_rate"] for m, bad in zip(steps, skipped) if bad}) <= sum(skipped)
    assert ends[0] == ends[1]


# Out of memory


def memory_for(tokens: int, spared: int = 0):
    """A fault: memory for so many tokens of a micro-batch, but for the first `spared` of a run."""

    def fault():
        whole, calls = train.linear_cross_entropy, itertools.count()

        def limited(hidden, *rest):
            if len(hidden) > tokens and next(calls) >= spared:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 98765 bytes")
            return whole(hidden, *rest)

        train.linear_cross_entropy = limited

    return fault


@pytest.mark.parametrize("batch, accum, spared, halved", [(8, 1, 0, 2), (4, 2, 1, 1)])
def test_out_of_memory_halves_the_micro_batches_as_if_the_run_had_started_so(
    tiny, expected, tmp_path, batch, accum, spared, halved
):
    flags = [*tiny, *SHORT, "--batch-size", batch, "--grad-accum", accum, "--save-every", 0]
    ended = run(flags, tmp_path / "run", fault=memory_for(150, spared))
    assert ended.code == 0 and ended.out.count("out of memory: half as many") == halved
    progress = expected["progress"] | {"halved": halved}
    assert left_behind(tmp_path / "run") == expected | {"progress": progress}


def test_one_example_that_does_not_fit_ends_the_run_with_bytes_length_and_remedies(short, tmp_path):
    ended = run(short, tmp_path / "run", fault=memory_for(60))
    said = ended.in_two_lines()
    assert ended.code == 1 and "98765 bytes" in said
    assert any(f"1 sequences of {n} tokens" in said for n in range(61, 65))
    for remedy in ("--max-length 6", "--precision", "--targets"):
        assert remedy in said


# Ranks


def survive_lost_ranks(two_ranks: tuple, folder: Path, seeds: range) -> int:
    """Kill the second of two ranks at a random step for each seed; how many runs that ended."""
    (flags, expected), met = two_ranks, 0
    for seed in seeds:
        rng, out = random.Random(seed), folder / f"lost-{seed}"
        first, second = start_ranks(flags, out)
        await_steps(first, out, rng.randrange(1, 10))
        time.sleep(rng.uniform(0, 0.05))
        second.send(signal.SIGKILL)
        ended = first.wait(limit=30)
        if ended.code != 0:  # 0: it was done already
            met += 1
            assert ended.code == 1 and "has lost another rank" in ended.in_two_lines(), ended
        second.wait()
        check_instant(out)
        go_on_with_ranks(flags, out)
        assert left_behind(out) == expected, f"seed {seed}"
    return met


def test_where_a_rank_is_killed_the_other_leaves_and_both_can_go_on(two_ranks, tmp_path):
    assert survive_lost_ranks(two_ranks, tmp_path, range(1)) == 1


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks, tmp_path):
    flags, expected = two_ranks
    first, second = start_ranks(flags, tmp_path / "run", fault=slowed(0.01))
    await_steps(first, tmp_path / "run", 3)
    second.send(signal.SIGTERM)
    ended = [first.wait(limit=30), second.wait(limit=30)]
    assert [e.code for e in ended] == [75, 143], ended
    assert "another rank was asked to leave: stopped after step" in ended[0].out
    assert steps_to_do_again(tmp_path / "run") == 0
    go_on_with_ranks(flags, tmp_path / "run")
    assert left_behind(tmp_path / "run") == expected


def test_what_fails_on_one_rank_is_said_once_and_all_leave(two_ranks, tmp_path):
    def failing():
        whole, calls = train.flat_batch, iter(range(11))

        def fails(*args):
            if next(calls) == 10:
                raise errors.TrainingFailed("the root cause", "the remedy")
            return whole(*args)

        train.flat_batch = fails

    ranks = start_ranks(two_ranks[0], tmp_path / "run", fault=failing)
    ended = [rank.wait(limit=30) for rank in ranks]
    assert [e.code for e in ended] == [1, 1], ended
    assert "the root cause" in ended[1].in_two_lines()
    assert "the other says why" in ended[0].in_two_lines()
    check_instant(tmp_path / "run")


# What is said, and the exit codes


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1,
         "error: the disk is full: a/b: No space left on device\n"
         "  free some space, then rerun the command to resume\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1,
         "error: the disk is full: Disk quota exceeded\n"
         "  free some space, then rerun the command to resume\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)  # fmt: skip
def test_what_is_no_defect_has_its_exit_code_and_no_traceback(capsys, raised, code, said):
    def fail():
        raise raised

    assert errors.run_script(fail) == code and capsys.readouterr().err == said


@pytest.mark.parametrize("defect", [PermissionError(errno.EACCES, "Denied", "x"), KeyError("x")])
def test_a_defect_keeps_its_traceback(defect):
    def fail():
        raise defect

    with pytest.raises(type(defect)):
        errors.run_script(fail)


def test_debug_shows_where_an_error_came_from(tiny, tmp_path):
    ended = run([*tiny, "--epochs", 0, "--debug"], tmp_path / "run")
    assert ended.code == 2 and "Traceback" in ended.err and "in parse" in ended.err
    assert ended.err.endswith("--help lists the options\n")
