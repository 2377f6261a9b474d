"""The long form of tests/test_faults.py: kills, signals and time limits."""

import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from lora.peft_format import WEIGHTS
from run.folder import Run
from tests.campaign.harness import (
    LONG,
    FileCalls,
    await_steps,
    check_invariants,
    check_random_kills,
    finish,
    results,
    run,
    slowed,
    start,
    unsaved_steps,
)

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def long(tiny):
    return [*tiny, *LONG]


@pytest.fixture(scope="module")
def reference(long, tmp_path_factory):
    """The results of an uninterrupted `long` run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    finish([*long, "--save-every", 0], out)
    return results(out)


@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_200_random_moments_resumes_to_the_same_result(
    long, reference, tmp_path, part
):
    seeds = range(50 * part, 50 * part + 50)
    killed = check_random_kills(long, tmp_path, seeds, reference)
    print(f"{killed} of 50 runs were killed before their end")
    assert killed >= 30  # not all 50: the speed of runs varies


def test_a_run_killed_25_times_never_loses_a_saved_step_and_ends_with_the_same_result(
    long, reference, tmp_path
):
    out, rng, reached, killed = tmp_path / "run", random.Random(0), 0, 0
    command = [*long, "--save-every", 0]
    while killed < 25:
        child = start(command, out, fault=slowed(0.03))
        if killed % 2:  # otherwise at any moment after its start
            await_steps(child, out, reached + 2)  # the log may already have had one more step
        time.sleep(rng.uniform(0, 0.03 if killed % 2 else 0.2))
        child.send(signal.SIGKILL)
        assert child.wait().code == 137
        killed += 1
        check_invariants(out)
        progress = Run(out).read_progress()
        assert unsaved_steps(out) <= 1
        assert (progress.cursor if progress else 0) >= reached
        reached = progress.cursor if progress else 0
    print(f"{killed} kills, step {reached} of 36 reached")
    assert reached >= 12
    finish(command, out)
    assert results(out) == reference


@pytest.mark.parametrize(
    "within, nth, least",
    [("write_start", 1, 20), ("save_checkpoint", 3, 24), ("publish_best", 1, 20),
     ("publish_best", 2, 30), ("write_report", 1, 8)],
)  # fmt: skip
def test_a_run_killed_at_any_file_call_resumes_to_the_same_result(
    short, expected, tmp_path, within, nth, least
):
    out, at = tmp_path / "run", 0
    while run(short, out, fault=FileCalls(at, within=within, nth=nth)).code == 137:
        check_invariants(out)
        finish(short, out)
        assert results(out) == expected, f"fault point {at}"
        shutil.rmtree(out)
        at += 1
    assert results(out) == expected and at >= least
    print(f"{within} {nth}: {at} fault points")


def test_the_best_adapter_can_be_loaded_and_is_finite_at_every_instant(long, tmp_path):
    out, reads, seen = tmp_path / "run", 0, set()
    child = start([*long, "--save-every", 0, "--evals-per-epoch", 12], out)
    while not child.has_ended():
        if (out / "best").exists():
            tensors = load_file(out / "best" / WEIGHTS)
            assert all(t.isfinite().all() for t in tensors.values())
            seen.add(torch.cat([t.flatten() for t in tensors.values()]).sum().item())
            reads += 1
    print(f"{reads} reads of {len(seen)} adapters")
    assert child.wait().code == 0 and reads > 500 and len(seen) > 10


def test_sigterm_at_50_random_moments_loses_no_step(long, reference, tmp_path):
    command, slowly, codes = [*long, "--save-every", 1000], slowed(0.005), []
    seconds = run(command, tmp_path / "slow", fault=slowly).seconds
    for seed in range(50):
        out = tmp_path / f"term-{seed}"
        child = start(command, out, fault=slowly)
        time.sleep(random.Random(seed).uniform(0, 0.95) * seconds)
        child.send(signal.SIGTERM)
        sent = time.monotonic()
        ended = child.wait()
        assert time.monotonic() - sent < 5 and "Traceback" not in ended.err
        codes.append(ended.code)
        check_invariants(out)
        assert unsaved_steps(out) == 0
        finish(command, out)
        assert results(out) == reference, f"seed {seed}"
    print(f"{codes.count(143)} of 50 runs were stopped")
    assert set(codes) <= {143, 0} and codes.count(143) >= 45  # 0: only its report was missing


def test_sigterm_followed_by_sigkill_leaves_a_complete_checkpoint(long, reference, tmp_path):
    def slow_disk():
        save = train.save_checkpoint
        train.save_checkpoint = lambda *a, **k: time.sleep(0.2) or save(*a, **k)

    command = [*long, "--save-every", 0.5]
    for seed in range(10):
        out = tmp_path / str(seed)
        child = start(command, out, fault=slow_disk)
        await_steps(child, out, 2 + 3 * seed)
        child.send(signal.SIGTERM)
        time.sleep(0.3 * random.Random(seed).random())
        child.send(signal.SIGKILL)
        assert child.wait().code in (137, 143)
        Run(out).repair()
        check_invariants(out)
        finish(command, out)
        assert results(out) == reference


def test_a_run_that_is_paused_and_continued_has_the_same_result(long, reference, tmp_path):
    out = tmp_path / "run"
    child = start([*long, "--save-every", 0.2], out)
    for step in (3, 14, 25):
        await_steps(child, out, step)
        child.send(signal.SIGSTOP)
        time.sleep(1)
        assert not child.has_ended()
        child.send(signal.SIGCONT)
    assert child.wait().code == 0 and results(out) == reference


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_max_minutes_stops_the_run_in_time_and_the_same_command_resumes_it(
    long, reference, tmp_path, share
):
    slowly = slowed(0.03)
    command = [*long, "--save-every", 1]
    seconds = run(command, tmp_path / "slow", fault=slowly).seconds
    limited = [*command, "--max-minutes", share * seconds / 60]
    ended = run(limited, tmp_path / "run", fault=slowly)
    print(f"the run takes {seconds:.1f} s; stopped after {ended.seconds / seconds:.0%} of it")
    assert ended.code == 75 and ended.seconds < share * seconds
    assert "--max-minutes reached: stopped after step" in ended.out
    assert unsaved_steps(tmp_path / "run") == 0
    finish(command, tmp_path / "run")
    assert results(tmp_path / "run") == reference
