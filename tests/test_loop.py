"""Tests of what the loop hands on: rates, dropout and its epochs, counts of tokens, patience."""

import signal
import time

import pytest

import train
from data.batches import Schedule
from run.folder import Run
from tests.campaign.harness import await_steps, results, slowed, start
from tests.toys import read_log

FORWARD = "--epochs 3 --batch-size 64 --evals-per-epoch 1 --learning-rate 0".split()


def run(out, flags: list, *more: object) -> list[dict]:
    """Train in this process; returns the lines of the log."""
    train.main([str(flag) for flag in [*flags, *more, "--out", out]])
    return read_log(out / "metrics.jsonl")


def series(lines: list[dict], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def adapted(tuned) -> list:
    """Options that continue an adapter whose B is not zero, so that dropout changes the loss."""
    return ["--model", tuned / "base", "--data", tuned / "sums", "--from-adapter",
            tuned / "run/best", "--precision", "fp32", "--device", "cpu"]  # fmt: skip


def test_the_rates_of_a_run_with_max_steps_reach_their_end_with_it(tiny, tmp_path):
    flags = "--max-steps 7 --warmup 0.3 --learning-rate 0.6 --batch-size 8".split()
    lines = run(tmp_path / "run", tiny, *flags)
    rates = [0.2, 0.4, 0.6, 0.48, 0.36, 0.24, 0.12]  # two steps of warm-up, then a line to 0
    assert series(lines, "learning_rate") == pytest.approx(rates)


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_every_epoch_has_its_own_dropout_masks(adapted, tmp_path, dropout):
    one, two, three = series(
        run(tmp_path / "run", adapted, *FORWARD, "--dropout", dropout), "train_loss"
    )  # nothing is learned, and an epoch is a single batch, of the same rows
    if dropout:
        assert min(abs(one - two), abs(two - three), abs(one - three)) > 1e-3 * one
    else:
        assert (two, three) == pytest.approx((one, one), rel=1e-6)


@pytest.mark.parametrize("more", [("--evals-per-epoch", 3), ("--stop-on", "exact-match")])
def test_validations_do_not_change_the_training_between_them(adapted, tmp_path, more):
    flags = "--epochs 2 --batch-size 8 --dropout 0.3 --max-new-tokens 4 --evals-per-epoch 1".split()
    plain = run(tmp_path / "plain", adapted, *flags)
    validated = run(tmp_path / "validated", adapted, *flags, *more)
    assert len(series(plain, "val_loss")) < len(validated) - len(series(plain, "train_loss")) or (
        "val_exact_match" in validated[0]
    )
    for key in ("train_loss", "grad_norm"):
        assert series(validated, key) == series(plain, key)


def test_the_logged_speed_counts_every_token_of_a_step_and_the_steps_all_tokens(
    tiny, tmp_path, monkeypatch
):
    steps, rows = [], []  # tokens of each step; the clock shows how many steps have begun
    step, flat_batch = Schedule.step, train.flat_batch

    def counted(examples, device):
        rows.extend((e.row_id, len(e.tokens)) for e in examples)
        steps[-1] += sum(len(e.tokens) for e in examples)
        return flat_batch(examples, device)

    monkeypatch.setattr(Schedule, "step", lambda *a, **o: steps.append(0) or step(*a, **o))
    monkeypatch.setattr(train, "flat_batch", counted)
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(steps)))
    flags = "--epochs 2 --batch-size 8 --grad-accum 3 --limit 60 --evals-per-epoch 1".split()
    lines = run(tmp_path / "run", tiny, *flags)
    assert series(lines, "tokens_per_second") == steps and len(set(steps)) > 2
    assert sum(steps) == 2 * sum(dict(rows).values())  # every row once an epoch


def test_the_patience_that_was_used_up_stays_used_up_on_resuming(tiny, tmp_path):
    flags = "--learning-rate 0 --patience 3 --epochs 9 --batch-size 100 --evals-per-epoch 1".split()
    flags += ["--out", str(tmp_path / "run"), "--max-minutes", "1e-4"]  # sessions of one step
    codes = list(iter(lambda: train.main([*tiny, *flags]), 0))
    assert codes == [75] * 4
    assert Run(tmp_path / "run").read_progress().stopped == "no better loss in 3 validations"
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert len(series(lines, "val_loss")) == 1 + 1 + 3  # the base's, a free one, none better


def test_a_hangup_under_nohup_stops_nothing(short, expected, tmp_path):
    def under_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slowed(0.02)()

    child = start(short, tmp_path / "run", fault=under_nohup)
    await_steps(child, tmp_path / "run", 2)
    child.send(signal.SIGHUP)
    ended = child.wait()
    assert ended.code == 0, ended
    assert results(tmp_path / "run") == expected
