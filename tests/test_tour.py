"""The changes that docs/tour.md shows as diffs: each is applied to a copy of the code and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import copy_product

HOUSE = Path(__file__).parents[1]
CHANGES = {  # words of the heading -> files touched
    "learning-rate schedule": {"train.py"},
    "Label smoothing": {"model/loss.py", "train.py"},
    "own scorer": {"data/sorting.py", "data/tasks.py"},
}
SHORT = ["--demo", "--limit", "80", "--max-steps", "10", "--precision", "fp32", "--out", "out/tiny"]


def diff(heading: str) -> str:
    """The diff in the section of the tour whose heading contains these words."""
    sections = (HOUSE / "docs" / "tour.md").read_text().split("\n### ")
    (section,) = [s for s in sections if heading in s.partition("\n")[0]]
    return re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]


def apply(text: str, folder: Path) -> set[str]:
    """Apply a diff whose hunks have no line numbers; returns the files touched."""
    touched = set()
    for part in re.split(r"^--- .*\n\+\+\+ b/", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        path = folder / name
        content = path.read_text() if path.exists() else ""
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert not old or content.count(old) == 1, f"{name} has not exactly one: {old}"
            content = content.replace(old, new) if old else content + new
        path.write_text(content)
        touched.add(name)
    return touched


@pytest.fixture
def changed(tmp_path):
    """A function that applies a change to a copy of the code and returns how to run a script."""

    def change(heading):
        code = tmp_path / "code"
        copy_product(code)
        assert apply(diff(heading), code) == CHANGES[heading]

        def run(*argv):
            environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
            ended = subprocess.run(
                [sys.executable, *map(str, argv)],
                cwd=code, env=environment, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert ended.returncode == 0, ended.stderr
            return ended.stdout

        return code, run

    return change


def logged(code, key):
    lines = (code / "out" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def test_a_schedule_is_added_in_one_file(changed):
    code, run = changed("learning-rate schedule")
    run("train.py", *SHORT, "--schedule", "wsd", "--warmup", 0)
    rates = logged(code, "learning_rate")
    assert rates == pytest.approx([2e-2] * 9 + [1e-2])  # 1 - done is 0.1 in the last step


def test_label_smoothing_is_added_in_two_files(changed):
    code, run = changed("Label smoothing")
    run("train.py", *SHORT, "--label-smoothing", 0.1)
    losses = logged(code, "train_loss")
    assert losses[-1] < losses[0]
    run("-c", EQUALS_PYTORCH)


EQUALS_PYTORCH = """
import torch
import torch.nn.functional as F
from model import linear_cross_entropy

torch.manual_seed(0)
hidden, weight = torch.randn(7, 5, dtype=torch.double), torch.randn(11, 5, dtype=torch.double)
targets = torch.tensor([3, -100, 0, 10, -100, 7, 3])
ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
nats, _ = linear_cross_entropy(ours, weight, targets, smoothing=0.1)
expected = F.cross_entropy(plain @ weight.t(), targets, reduction="sum", label_smoothing=0.1)
(nats / 5).backward()
(expected / 5).backward()
torch.testing.assert_close(nats, expected)
torch.testing.assert_close(ours.grad, plain.grad)
"""


def test_a_task_with_its_own_scorer_is_added_in_two_files(changed):
    code, run = changed("own scorer")
    short = ["--max-new-tokens", 8]
    validated = run("train.py", *SHORT, *short, "--data", "sorting", "--stop-on", "exact-match",
                    "--exact-match-problems", 4)  # fmt: skip
    assert "answers correct" in validated
    measure = [*short, "--adapter", "out/tiny/best", "--limit", 4]
    both = "import sys, evaluate; evaluate.main(sys.argv[1:]);"
    both += "evaluate.main([*sys.argv[1:], '--split', 'validation'])"
    first, second = run("-c", both, *measure).split("judged as sorting, by same-words")[1:]
    assert "answers correct, same-words" in first
    assert "answers correct, same-words" in second
