"""The README's forty lines are a whole trainer: they train exactly like `train.py`."""

import json
import re
from pathlib import Path

import pytest

import train
from lora.peft_format import WEIGHTS

README = Path(__file__).parents[1] / "README.md"
STEPS = 12


def forty_lines() -> str:
    """The one block of Python in the README that defines a schedule."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "Schedule(" in block]
    return block


def test_the_trainer_in_the_readme_has_at_most_forty_lines():
    assert sum(bool(line.strip()) for line in forty_lines().splitlines()) <= 40


def test_the_trainer_in_the_readme_has_the_losses_and_the_adapter_of_train_py(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = forty_lines().replace("epochs=epochs", f"epochs=epochs, max_steps={STEPS}")
    losses = []
    names = {"print": lambda line: losses.append(names["loss"])}  # one line is printed per step
    exec(compile(text, "README.md", "exec"), names)

    options = ["--max-steps", STEPS, "--precision", "bf16", "--out", "run"]
    assert train.main(["--demo", *options]) == 0
    log = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    expected = [line["train_loss"] for line in log if "train_loss" in line]
    assert len(expected) == STEPS and expected[-1] < expected[0] / 2  # they did learn
    assert losses == pytest.approx(expected, abs=1e-6)

    (saved,) = Path("out").rglob(WEIGHTS)
    assert saved.read_bytes() == Path("run/best", WEIGHTS).read_bytes()
