"""Tests of whole training runs: train.py on a toy checkpoint and small sums."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import evaluate
import train
from data.batches import Schedule, flat_batch
from data.chat import ChatFormat
from data.encode import Example, encode_problems
from data.rows import read_problems
from data.split import split_problems
from data.tasks import load_source
from errors import run_script
from lora.inject import LoRAConfig, inject
from lora.peft_format import WEIGHTS, read_adapter
from model.load import load_model
from run.folder import Run
from tests import toys
from tests.toys import read_log

ROOT = Path(__file__).resolve().parents[1]
STEP_KEYS = ("step epoch train_loss train_token_accuracy learning_rate grad_norm"
             " tokens_per_second peak_memory_gb").split()  # fmt: skip
VALIDATION_KEYS = "step epoch val_loss val_token_accuracy".split()
SHORT = "--limit 40 --epochs 2 --batch-size 4 --grad-accum 2 --evals-per-epoch 2".split()


@pytest.fixture(scope="module")
def toy(lively_checkpoint, arithmetic, device):
    """Flags of a run on the toy checkpoint and sums."""
    return ["--model", lively_checkpoint, "--data", arithmetic, "--precision", "fp32",
            "--device", device.type, "--save-every", "0"]  # fmt: skip


def run(out: Path, flags: list, *more: object) -> list[dict]:
    """Train in this process; returns the lines of the metrics log."""
    train.main([str(flag) for flag in [*flags, "--out", out, *more]])
    return read_log(out / "metrics.jsonl")


def series(lines: list[dict], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def results(out: Path) -> dict:
    """Every file that a run writes, except what depends on clocks."""
    files = [*(out / "best").iterdir(), *out.glob("checkpoints/*/state.safetensors")]
    found = {str(f.relative_to(out)): f.read_bytes() for f in [*files, out / "validation.jsonl"]}
    lines = read_log(out / "metrics.jsonl")
    clocks = {"tokens_per_second", "peak_memory_gb"}
    found["metrics"] = [{k: v for k, v in line.items() if k not in clocks} for line in lines]
    progress = vars(Run(out).read_progress())
    found["progress"] = {k: v for k, v in progress.items() if k not in ("seconds", "log_bytes")}
    return found


class Interrupted(Exception):
    """Raised to interrupt a run."""


def interrupt(monkeypatch, name: str, call: int) -> None:
    """Make call number `call` of `train.<name>` raise Interrupted."""
    original, calls = getattr(train, name), itertools.count(1)

    def raise_once(*args, **options):
        if next(calls) == call:
            raise Interrupted
        return original(*args, **options)

    monkeypatch.setattr(train, name, raise_once)


# The same result, however a run is interrupted or divided


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """The results of a run with dropout that nothing interrupts."""
    out = tmp_path_factory.mktemp("uninterrupted")
    run(out, toy, *SHORT)
    return results(out)


@pytest.mark.parametrize(
    "name, call",
    [
        ("flat_batch", 4),  # between two micro-batches of a step
        ("validate", 2),  # after the step, before its validation
        ("publish_best", 2),
        ("save_checkpoint", 1),  # before there is anything to resume from
        ("save_checkpoint", 5),  # at the end of an epoch
        ("save_checkpoint", 10),  # of the last step
    ],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path, monkeypatch, toy, uninterrupted, name, call
):
    with monkeypatch.context() as during, pytest.raises(Interrupted):
        interrupt(during, name, call)
        run(tmp_path / "run", toy, *SHORT)
    run(tmp_path / "run", toy, *SHORT)
    assert results(tmp_path / "run") == uninterrupted


def test_a_run_interrupted_after_every_step_ends_with_the_same_result(
    tmp_path, monkeypatch, toy, uninterrupted
):
    for _ in range(9):
        with monkeypatch.context() as during, pytest.raises(Interrupted):
            interrupt(during, "save_checkpoint", 2)
            run(tmp_path / "run", toy, *SHORT)
    run(tmp_path / "run", toy, *SHORT)
    assert results(tmp_path / "run") == uninterrupted


def test_sessions_of_a_single_step_end_with_the_same_result(tmp_path, toy, uninterrupted):
    flags = [*toy, *SHORT, "--out", tmp_path / "run", "--max-minutes", 1e-4]
    codes = [train.main([str(flag) for flag in flags]) for _ in range(16)]
    assert codes[0] == 75 and codes[-1] == 0 and set(codes) == {0, 75}
    assert results(tmp_path / "run") == uninterrupted


def test_memory_of_a_micro_batch_that_did_not_fit_is_freed_before_its_halves_are_tried(
    tmp_path, toy, monkeypatch
):
    held, alive = [], []
    loss, seed = train.linear_cross_entropy, train.seed_dropout

    def too_large(hidden, *more):
        held.append(weakref.ref(hidden.grad_fn))
        if len(held) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GB")
        return loss(hidden, *more)

    def before_each_forward_pass(*args, **options):
        alive.append(bool(held) and held[0]() is not None)
        return seed(*args, **options)

    monkeypatch.setattr(train, "linear_cross_entropy", too_large)
    monkeypatch.setattr(train, "seed_dropout", before_each_forward_pass)
    run(tmp_path / "run", toy, "--limit", 20, "--max-steps", 1, "--batch-size", 4)
    assert alive == [False] * 3  # the micro-batch, then its two halves


def test_the_command_of_a_finished_run_changes_nothing(tmp_path, toy, capsys):
    flags = [*toy, "--max-steps", 2, "--limit", 20]
    run(tmp_path / "run", flags)
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    capsys.readouterr()
    argv = [str(flag) for flag in [*flags, "--out", tmp_path / "run"]]
    assert run_script(lambda: train.main(argv)) == 0
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in before} == before
    assert "all 2 steps done" in capsys.readouterr().out


def test_micro_batches_of_any_size_give_the_same_losses(tmp_path, toy):
    flags = [*toy, "--limit", 40, "--epochs", 2, "--evals-per-epoch", 1, "--dropout", 0.2]
    lines = [
        run(tmp_path / f"{batch}x{accum}", flags, "--batch-size", batch, "--grad-accum", accum)
        for batch, accum in ((8, 1), (2, 4), (1, 8))
    ]
    for key in ("train_loss", "val_loss", "grad_norm"):
        one, *others = (series(each, key) for each in lines)
        for other in others:
            assert other == pytest.approx(one, rel=1e-6 if "loss" in key else 1e-5)


def encode(base: Path, problems: list, rows: list[int]) -> list[Example]:
    """The examples of some rows of `problems`."""
    chosen = [problems[row] for row in rows]
    return encode_problems(chosen, rows, ChatFormat.from_folder(base), 2048)[0]


def slow_nats(base: Path, examples: list[Example], adapter: Path | None = None) -> list[float]:
    """Nats of each example's supervised tokens, computed from the full logits."""
    model = load_model(base, dtype=torch.float32)
    if adapter:
        read_adapter(adapter, model)
    model.eval()
    nats = []
    for batch in (flat_batch([example]) for example in examples):
        hidden = model(batch.tokens, batch.positions, batch.lengths)
        logits = (hidden @ model.head_weight.T).double()
        nats.append(F.cross_entropy(logits, batch.targets, reduction="sum").item())
    return nats


@pytest.mark.parametrize("late_rate", [3e-3, -3e-2])  # descends to the end; ascends from halfway
def test_the_adapter_in_best_has_the_lowest_validation_loss_of_the_run(
    tmp_path, toy, late_rate, monkeypatch
):
    rate = lambda config, step, last: 3e-3 if step < last / 2 else late_rate  # noqa: E731
    monkeypatch.setattr(train, "learning_rate", rate)
    flags = ["--limit", 60, "--epochs", 2]
    losses = series(run(tmp_path / "run", toy, *flags), "val_loss")
    held_out, _ = read_problems(tmp_path / "run" / "validation.jsonl")
    examples = encode(toy[1], held_out, list(range(len(held_out))))
    nats = slow_nats(toy[1], examples, tmp_path / "run" / "best")
    assert sum(nats) / sum(e.supervised_count for e in examples) == pytest.approx(
        min(losses), rel=1e-6
    )
    assert (losses[-1] == min(losses)) == (late_rate > 0)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_and_not_a_mean_of_means(tmp_path, toy):
    flags = ["--batch-size", 1, "--grad-accum", 6, "--dropout", 0, "--max-steps", 1]
    (logged,) = series(run(tmp_path / "run", toy, *flags), "train_loss")
    problems = load_source(str(toy[3])).train
    train_rows, _ = split_problems(problems, 0.1)
    examples = encode(toy[1], problems, train_rows)
    step = Schedule(examples, batch_size=1, grad_accum=6, epochs=3, seed=0).step(0)
    examples = sum(step.micro_batches, [])
    nats, tokens = slow_nats(toy[1], examples), [e.supervised_count for e in examples]
    assert logged == pytest.approx(sum(nats) / sum(tokens), rel=1e-6)
    mean_of_means = sum(n / t for n, t in zip(nats, tokens, strict=True)) / len(nats)
    assert abs(mean_of_means / logged - 1) > 1e-4


def test_the_validation_loss_is_the_mean_over_all_held_out_tokens_for_any_batch_size(tmp_path, toy):
    for batch_size in (1, 3, 64):
        flags = ["--learning-rate", 0, "--batch-size", batch_size, "--max-steps", 1]
        (logged,) = set(series(run(tmp_path / str(batch_size), toy, *flags), "val_loss"))
        held_out, _ = read_problems(tmp_path / str(batch_size) / "validation.jsonl")
        examples = encode(toy[1], held_out, list(range(len(held_out))))
        tokens = sum(e.supervised_count for e in examples)
        assert logged == pytest.approx(sum(slow_nats(toy[1], examples)) / tokens, rel=1e-6)


def test_two_ranks_train_as_one_does(tmp_path, toy):
    flags = [*toy, "--limit", 30, "--epochs", 1, "--batch-size", 2, "--evals-per-epoch", 2]
    flags += ["--device", "cpu"]  # two ranks need two GPUs
    one = run(tmp_path / "one", flags, "--grad-accum", 4)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(toys.free_port())}
    command = [sys.executable, "train.py", *flags, "--grad-accum", 2, "--out", tmp_path / "two"]
    ranks = [
        subprocess.Popen(
            list(map(str, command)), cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    two = read_log(tmp_path / "two" / "metrics.jsonl")
    for key in ("step", "train_loss", "val_loss", "learning_rate", "train_token_accuracy"):
        assert series(two, key) == pytest.approx(series(one, key), rel=1e-6)
    assert "batch       8 = 2 sequences x 2 micro-batches x 2 ranks\n" in outputs[0]
    assert "batch  " not in outputs[1]


# What a run writes and prints


def test_the_log_has_one_line_per_step_and_per_validation_with_the_documented_keys(tmp_path, toy):
    flags = ["--limit", 60, "--epochs", 2, "--evals-per-epoch", 3, "--schedule", "cosine"]
    lines = run(tmp_path / "run", toy, *flags)
    steps = [line for line in lines if "train_loss" in line]
    validations = [line for line in lines if "val_loss" in line]
    assert all(list(line) == STEP_KEYS for line in steps)
    assert all(list(line) == VALIDATION_KEYS for line in validations)
    assert len(lines) == len(steps) + len(validations)
    assert series(steps, "step") == list(range(1, len(steps) + 1))
    assert steps[-1]["epoch"] == validations[-1]["epoch"] == 2
    config = train.TrainConfig(schedule="cosine")
    rates = [train.learning_rate(config, step, len(steps)) for step in range(len(steps))]
    assert series(steps, "learning_rate") == rates
    assert all(0 <= line["train_token_accuracy"] <= 1 for line in steps)
    assert all(line["tokens_per_second"] > 0 < line["peak_memory_gb"] for line in steps)


def test_the_run_folder_holds_the_documented_files_and_best_is_the_best(tmp_path, toy, arithmetic):
    out = tmp_path / "run"
    lines = run(out, toy, "--limit", 60, "--epochs", 2, "--learning-rate", 0.5)
    names = "config.json metrics.jsonl validation.jsonl audit.json best checkpoints"
    assert {p.name for p in out.iterdir()} >= set(names.split())
    names = (
        f"adapter_config.json {WEIGHTS} README.md origin.json chat_template.jinja tokenizer.json"
    )
    in_best = {p.name for p in (out / "best").iterdir()}
    assert in_best == {*names.split(), "tokenizer_config.json"}
    best = min(series(lines, "val_loss"))
    progress = Run(out).read_progress()
    assert progress.best_loss == best and progress.stopped
    assert f"{best:.4f} nats" in (out / "best" / "README.md").read_text()
    held_out, _ = read_problems(out / "validation.jsonl")
    rows, _ = read_problems(arithmetic / "train.jsonl")
    assert held_out and {p.messages for p in held_out} < {p.messages for p in rows[:60]}
    saved = json.loads((out / "config.json").read_text())
    assert saved["options"]["limit"] == 60 and saved["versions"]["torch"] == torch.__version__


def test_a_run_prints_derived_numbers_at_its_start_and_the_next_command_at_its_end(
    tmp_path, toy, capsys
):
    run(tmp_path / "run", toy, "--limit", 40, "--max-steps", 1)
    text = capsys.readouterr().out
    trained = 2 * 8 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64))  # layers, r, q k v o
    base = sum(t.numel() for t in load_file(Path(toy[1]) / "model.safetensors").values())
    assert f"trainable   {trained:,} of {base:,} parameters" in text
    assert "batch       16 = 16 sequences x 1 micro-batch x 1 rank\n" in text
    assert "learning rate 0.0002" in text and "duplicates  train and test: 0 exact" in text
    assert f"evaluate.py --adapter {tmp_path / 'run' / 'best'}" in text


def test_show_example_marks_the_supervised_text_and_writes_nothing(tmp_path, toy, capsys):
    out = tmp_path / "run"
    train.main([str(flag) for flag in [*toy, "--out", out, "--show-example"]])
    text = capsys.readouterr().out
    answer = load_source(str(toy[3])).train[0].answer
    assert f"<|im_start|>assistant\n[[{answer}<|im_end|>]]\n" in text
    assert text.count("[[") == 1 and "<|im_start|>system\nYou are" in text
    assert not out.exists()


# What a run learns


def test_a_learning_rate_of_zero_changes_neither_the_adapters_nor_the_loss(tmp_path, toy):
    lines = run(tmp_path / "run", toy, "--learning-rate", 0, "--limit", 60, "--patience", 2)
    losses = series(lines, "val_loss")
    assert len(losses) == 4 and len(set(losses)) == 1  # the best, a free one, and two more
    assert "no better" in Run(tmp_path / "run").read_progress().stopped
    model = load_model(Path(toy[1]), dtype=torch.float32)
    inject(model, LoRAConfig(), seed=0)
    for name, tensor in load_file(tmp_path / "run" / "best" / WEIGHTS).items():
        fresh = model.get_parameter(name.removeprefix("base_model.model.").removesuffix(".weight"))
        assert torch.equal(tensor, fresh)
        assert name.endswith("lora_A.weight") == bool(tensor.any())


def write_copying(folder: Path) -> Path:
    """Write a task that needs little but attention: the answer is the number in the question."""
    rows = [
        {"question": f"{who} has {n} {what}. How many?", "answer": f"#### {n}"}
        for who in ("Ann", "Bo", "Cy", "Di", "Ed") for what in ("cats", "dogs", "hats", "pens")
        for n in range(10)
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    folder.mkdir()
    for name, part in (("train", rows[:180]), ("test", rows[180:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return folder


def test_a_simple_task_is_learned_and_its_test_questions_are_answered(tmp_path, lively_checkpoint):
    place = ["--precision", "fp32", "--device", "cpu", "--max-new-tokens", 8]
    flags = ["--model", lively_checkpoint, "--data", write_copying(tmp_path / "data"), *place]
    strong = "--rank 32 --alpha 64 --learning-rate 5e-3 --batch-size 8 --epochs 8 --dropout 0"
    counting = "--targets all-linear --stop-on exact-match --evals-per-epoch 1"
    still = ["--learning-rate", 0, "--max-steps", 1, *counting.split()]
    base = run(tmp_path / "still", flags, *still)[-1]
    lines = run(tmp_path / "run", flags, *strong.split(), *counting.split())
    assert base["val_loss"] > 6 and base["val_exact_match"] == 0
    assert min(series(lines, "val_loss")) < 0.3  # 0.01
    assert max(series(lines, "val_exact_match")) > 0.7  # 1.0
    evaluate.main([str(flag) for flag in ["--adapter", tmp_path / "run" / "best", *place]])
    (result,) = (tmp_path / "run").rglob("result.json")
    models = json.loads(result.read_text())["models"]
    correct = {name: sum(found["outcomes"]) for name, found in models.items()}
    assert correct["base"] == 0 and correct["tuned"] >= 14  # of 20


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_as_well_as_fp32(tmp_path, toy, precision):
    flags = [*toy, "--limit", 60, "--epochs", 2, "--batch-size", 8, "--learning-rate", 3e-3]
    full = run(tmp_path / "fp32", flags)
    lines = run(tmp_path / precision, flags, "--precision", precision)
    for key, error in (("val_loss", 0.03), ("grad_norm", 0.3)):
        assert series(lines, key) == pytest.approx(series(full, key), rel=error)
    assert lines[-1]["val_loss"] < 0.95 * lines[0]["val_loss"]  # 0.89
    last = max((tmp_path / precision / "checkpoints").iterdir())
    scaler = json.loads((last / "progress.json").read_text())["scaler"]
    assert bool(scaler) == (precision == "fp16")


# Losses that are not finite


def make_losses_nan(monkeypatch, calls: set[int]) -> None:
    """Make these calls of the loss, counted from 1, return NaN."""
    loss, count = train.linear_cross_entropy, itertools.count(1)

    def sometimes_nan(hidden, *args):
        nats, correct = loss(hidden, *args)
        return (nats * math.nan if next(count) in calls else nats), correct

    monkeypatch.setattr(train, "linear_cross_entropy", sometimes_nan)


def test_a_step_without_a_finite_loss_is_skipped_and_its_rows_are_logged(
    tmp_path, monkeypatch, toy
):
    make_losses_nan(monkeypatch, {2, 4})
    flags = ["--limit", 60, "--epochs", 2, "--evals-per-epoch", 1, "--schedule", "constant"]
    lines = run(tmp_path / "run", toy, *flags, "--warmup", 0.9, "--max-steps", 8)
    steps = [line for line in lines if "train_loss" in line]
    assert series(steps[:5], "step") == [1, 1, 2, 2, 3]
    assert steps[1]["train_loss"] is steps[3]["train_loss"] is None
    assert steps[1]["learning_rate"] == steps[2]["learning_rate"] < steps[4]["learning_rate"]
    rows = [len(line.get("skipped_rows", [])) for line in steps]
    assert rows == [0, 16, 0, 5, 0, 0, 0, 0]  # 53 rows: the last step of an epoch has 5
    assert Run(tmp_path / "run").read_progress().skipped == 2
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_the_curve_starts_at_the_base_and_the_start_alone_is_no_success(
    tmp_path, monkeypatch, toy, capsys
):
    validate = train.validate

    def finite_at_first(config, progress, *rest):
        found = validate(config, progress, *rest)
        return found if progress.cursor == 0 else found | {"val_loss": math.nan}

    monkeypatch.setattr(train, "validate", finite_at_first)
    flags = [*toy, "--out", tmp_path / "run", "--limit", 60, "--epochs", 1]
    assert run_script(lambda: train.main([str(flag) for flag in flags])) == 1
    assert "no validation loss was finite after the first step" in capsys.readouterr().err
    first = read_log(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["step"] == first["epoch"] == 0
    held_out, _ = read_problems(tmp_path / "run" / "validation.jsonl")
    examples = encode(toy[1], held_out, list(range(len(held_out))))
    tokens = sum(e.supervised_count for e in examples)
    assert first["val_loss"] == pytest.approx(sum(slow_nats(toy[1], examples)) / tokens, rel=1e-6)


def test_a_base_that_computes_nan_ends_the_run_and_no_best_is_written(
    tmp_path, toy, lively_checkpoint, capsys
):
    folder = shutil.copytree(lively_checkpoint, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = 3e38  # finite, but it overflows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    flags = [*toy, "--model", folder, "--out", tmp_path / "run", "--batch-size", 4]
    assert run_script(lambda: train.main([str(flag) for flag in flags])) == 1
    assert not (tmp_path / "run" / "best").exists()
    assert "error: " in capsys.readouterr().err
