"""Tests of learning: after a run the model answers test problems that its base cannot answer.

The task is small enough for a tiny network with random weights: the number of legs of ten animals,
which belong to twenty people. The test questions are pairs of person and animal that are not in the
training data.
"""

import json
import random
from pathlib import Path

import pytest

import evaluate
import train
from tests import toys
from tests.toys import read_log

LEGS = {"dog": 4, "hen": 2, "ant": 6, "crab": 10, "fish": 0, "spider": 8, "goat": 4, "duck": 2,
        "bee": 6, "snake": 0}  # fmt: skip
NAMES = "Ann Ben Cleo Dan Eva Finn Gus Hal Ida Jon Kim Leo Mia Ned Ola Pat Quin Ron Sue Tom".split()
STRONG = "--targets all-linear --rank 16 --alpha 32 --learning-rate 1e-2 --batch-size 8 --epochs 6"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """Flags that name a base with random weights, and 160 training and 40 test rows."""
    folder = tmp_path_factory.mktemp("legs")
    rows = [
        {"question": f"{name} has a {animal}. How many legs has it?",
         "answer": f"A {animal} has {legs} legs.\n#### {legs}"}
        for name in NAMES for animal, legs in LEGS.items()
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    for split, part in (("train", rows[:160]), ("test", rows[160:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    base = toys.write_checkpoint(folder / "base", std=0.15)
    return ["--model", str(base), "--data", str(folder)]


def outcome(task: list[str], out: Path, *flags: str) -> tuple[list[float], dict]:
    """The validation losses of a run, and the evaluation of its best adapter and of the base."""
    common = ["--precision", "fp32", "--device", "cpu"]
    train.main([*task, "--out", str(out), *STRONG.split(), "--dropout", "0", *common, *flags])
    losses = [m["val_loss"] for m in read_log(out / "metrics.jsonl") if "val_loss" in m]
    evaluate.main(["--adapter", str(out / "best"), "--max-new-tokens", "40", *common])
    (result,) = (out / "evaluation").glob("test-*/result.json")
    return losses, json.loads(result.read_text())


def test_a_run_teaches_a_task_that_the_base_cannot_do(task, tmp_path):
    losses, result = outcome(task, tmp_path / "run", "--evals-per-epoch", "1")
    base, tuned = (result["models"][name] for name in ("base", "tuned"))
    assert base["loss"] > 5 and losses[-1] < 0.4  # nats per token: from 6.3 to 0.15
    assert base["correct"]["numeric-equal"] <= 2  # of 40 problems: 0
    assert tuned["correct"]["numeric-equal"] >= 32  # 39
    assert result["in_words"].endswith(": better")


def test_a_learning_rate_of_zero_teaches_nothing(task, tmp_path):
    losses, result = outcome(task, tmp_path / "run", "--learning-rate", "0", "--max-steps", "4")
    base, tuned = (result["models"][name] for name in ("base", "tuned"))
    assert len(set(losses)) == 1 and tuned["loss"] == base["loss"]
    assert tuned["outcomes"] == base["outcomes"]
    assert "none of 40 answers changed" in result["in_words"]


def test_stopping_on_exact_match_keeps_the_adapter_that_answers_best(task, tmp_path):
    flags = ["--stop-on", "exact-match", "--evals-per-epoch", "1", "--max-new-tokens", "40"]
    outcome(task, tmp_path / "run", *flags)
    lines = [m for m in read_log(tmp_path / "run" / "metrics.jsonl") if "val_loss" in m]
    ranking = [(line["val_exact_match"], -line["val_loss"]) for line in lines]
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert max(ranking)[0] > 0.8
    assert f"Best at step {lines[ranking.index(max(ranking))]['step']}," in card
