"""Tests of what the loop hands on: rates, dropout and its epochs, counts of tokens, patience."""

import contextlib
import itertools
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from data.batches import Schedule, flat_batch
from data.chat import ChatFormat
from data.encode import IGNORE, encode_problems
from data.split import split_problems
from data.tasks import load_source
from lora.config import LoRAConfig
from lora.inject import inject, trained_parameters
from lora.peft_format import WEIGHTS, peft_key, read_adapter
from model.load import load_model
from run import console
from run.folder import Progress, Run
from run.stopping import Stop
from tests.campaign.harness import await_steps, results, slowed, start
from tests.toys import example, read_log

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
    counts = [len(series(lines, "val_loss")) for lines in (plain, validated)]
    assert counts[0] < counts[1] or "val_exact_match" in validated[0]
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
    monkeypatch.setattr(train, "check_memory", lambda *_, **__: "")  # it looks at all steps too
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


def test_the_time_that_saving_takes_counts_towards_the_time_limit(tiny, tmp_path, monkeypatch):
    found, late, plain = [], 0.0, time.perf_counter

    def save_slowly(*_):
        nonlocal late
        late += 1000

    monkeypatch.setattr(train, "save_checkpoint", save_slowly)
    monkeypatch.setattr(train.time, "perf_counter", lambda: plain() + late)
    monkeypatch.setattr(Stop, "record", lambda _, seconds: found.append(seconds))
    run(tmp_path / "run", tiny, "--max-steps", 1)
    assert sum(seconds > 999 for seconds in found) == 1


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


def test_the_logged_token_accuracy_is_the_share_of_supervised_tokens(adapted, tmp_path):
    lines = run(tmp_path / "run", adapted, *FORWARD, "--dropout", 0, "--max-steps", 1)
    model = load_model(adapted[1], dtype=torch.float32)
    read_adapter(adapted[5], model)
    problems = load_source(str(adapted[3])).train
    rows, _ = split_problems(problems, 0.1)
    chat = ChatFormat.from_folder(adapted[1])
    examples, _ = encode_problems([problems[i] for i in rows], rows, chat, 2048)
    correct = supervised = 0
    for batch in (flat_batch([e]) for e in examples):
        best = (model(batch.tokens, batch.positions, batch.lengths) @ model.head_weight.T).argmax(1)
        correct += (best == batch.targets).sum().item()
        supervised += (batch.targets != IGNORE).sum().item()
    assert series(lines, "train_token_accuracy") == [correct / supervised] and correct


def test_all_answers_correct_is_an_exact_match_of_one_on_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(train, "exact_matches", lambda model, chat, mine, *_: len(mine))
    monkeypatch.setattr(train, "teacher_forced", lambda *_, **__: (1.0, 1.0))
    config = train.TrainConfig(stop_on="exact-match", exact_match_problems=7)
    chat = SimpleNamespace(vocab_size=9)
    base = SimpleNamespace(eos_ids=(), chat=chat)
    alone = {"stopping_together": contextlib.nullcontext, "sum": lambda *v: list(v)}
    for problems in (5, 7, 9):  # fewer and more than are asked for
        data = train.Data(None, {"rows": [example(0, 5, 3)]}, [], [None] * problems, None)
        for size in (1, 2, 3):
            worlds = [SimpleNamespace(rank=r, size=size, is_main=not r, **alone)
                      for r in range(size)]  # fmt: skip
            found = [
                train.validate(config, Progress(), data, base, None, world, Stop())
                for world in worlds
            ]
            assert sum(f["val_exact_match"] for f in found) == pytest.approx(1)


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(tiny, tmp_path, monkeypatch):
    flags = "--epochs 4 --batch-size 100 --evals-per-epoch 1 --max-minutes 1e-4".split()
    reached, ticks = [], itertools.count()
    for tick in (1000.0, 1.0):  # what each look at the clock adds, in the first session and later
        monkeypatch.setattr(time, "perf_counter", lambda tick=tick: tick * next(ticks))
        train.main([*tiny, *flags, "--out", str(tmp_path / "run")])
        reached.append(Run(tmp_path / "run").read_progress().seconds)
    assert reached[0] > 1000 and reached[0] < reached[1] < reached[0] + 1000


def test_a_dry_run_multiplies_the_time_of_a_token_by_all_tokens(capsys):
    schedule = Schedule([example(i, 50, 5) for i in range(20)], batch_size=4, grad_accum=1,
                        epochs=3, seed=0)  # fmt: skip
    console.print_plan(schedule, tokens=200, seconds=24.0, memory=(1.0, 2.0))
    assert "15 steps, 3,000 tokens, about 6 min 0 s" in capsys.readouterr().out


def test_a_dry_run_measures_steps_in_training_mode(tiny, monkeypatch):
    modes = []

    def forward(model, *_, **__):
        modes.append(model.training)
        return torch.zeros(2)

    monkeypatch.setattr(train, "forward_backward", forward)
    train.main([*map(str, tiny), "--dry-run"])
    assert modes and all(modes)


def test_the_seconds_of_a_save_count_as_work_between_two_polls(tiny, tmp_path, monkeypatch):
    clock, save, recorded = [0.0], train.save_checkpoint, []

    def tick(seconds=1.0):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: save(*a) or tick(1000.0))
    monkeypatch.setattr(Stop, "record", lambda self, seconds: recorded.append(seconds))
    run(tmp_path / "run", tiny, "--max-steps", 1)
    assert max(recorded) > 1000


def test_the_initial_adapters_are_those_of_the_seed(tiny, tmp_path):
    run(tmp_path / "run", tiny, "--seed", 5, "--learning-rate", 0, "--max-steps", 1)
    model = load_model(Path(tiny[1]), dtype=torch.float32)
    inject(model, LoRAConfig(), seed=5)
    tensors = load_file(tmp_path / "run" / "best" / WEIGHTS)
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(tensors[peft_key(name)], parameter)
