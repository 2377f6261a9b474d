"""Helpers of the tests of evaluation: a small tuned model, evaluations of it, and answers."""

import json
import os
import random
import signal
import time
from fractions import Fraction
from pathlib import Path

import torch

import evaluate
from data.rows import Message, Problem
from evaluation.answers import GenerationSettings
from evaluation.generative import SCORERS, Completion, had_format
from evaluation.mistakes import KINDS, classify
from evaluation.numbers import readings
from lora.inject import LoRAConfig, adapters, inject
from lora.peft_format import save_adapter
from model.generate import Decoding
from model.load import load_model
from tests import toys

COMMON = ["--precision", "fp32", "--device", "cpu", "--max-new-tokens", "12"]


def write_tuned(folder: Path) -> Path:
    """A folder with a base, data, and an adapter that changes the base's answers."""
    toys.write_checkpoint(folder / "base", std=0.15)
    toys.write_arithmetic(folder / "sums", rows=40, test_rows=8)
    model = load_model(folder / "base", dtype=torch.float32)
    config = LoRAConfig(targets=("all-linear",))
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(model):
        layer.lora_B.data.normal_(0, 0.05, generator=generator)
    save_adapter(model, folder / "run/best", config, base=str(folder / "base"), revision=None)
    return folder


def evaluated(tuned: Path, out: Path, *flags: str) -> dict:
    """`evaluate.py` on the adapter of `write_tuned`; its only result."""
    evaluate.main(["--adapter", str(tuned / "run/best"), "--data", str(tuned / "sums"),
                   "--out", str(out), *COMMON, *flags])  # fmt: skip
    (path,) = out.glob("evaluation/*/result.json")
    return json.loads(path.read_text())


def completions_of(out: Path) -> dict[tuple, tuple]:
    """Every logged answer of every model, without times."""
    found = {}
    for path in out.glob("evaluation/*/*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[path.stem, row["id"], row["sample"]] = (row["text"], row["cut_off"])
    return found


def settings(
    max_new_tokens: int, *, samples: int = 1, eos_ids: tuple = (toys.IM_END,), **decoding
) -> GenerationSettings:
    """Settings for toy models; `decoding` has other fields of `Decoding`."""
    options = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "vocab_size": toys.TOKENS}
    return GenerationSettings(Decoding(**options | decoding), samples=samples)


def problem(question: str, answer: str, id: str = "p") -> Problem:
    return Problem(id, (Message("user", question), Message("assistant", answer)))


def completion(text: str, id: str = "p", sample: int = 0) -> Completion:
    return Completion(id, sample, text, tokens=1, cut_off=False, seconds=1.0)


# Evaluations that are killed


def start(arguments: list[str]) -> int:
    """The id of a forked process that evaluates silently; torch is imported already."""
    if child := os.fork():
        return child
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        evaluate.main(arguments)
        os._exit(0)
    finally:
        os._exit(1)


def logged_bytes(out: Path) -> int:
    return sum(p.stat().st_size for p in out.glob("evaluation/*/*.jsonl"))


def kill_repeatedly(arguments: list[str], out: Path, kills: int) -> int:
    """Kill an evaluation `kills` times, each soon after a new answer; how many it died of."""
    rng, died = random.Random(0), 0
    for _ in range(kills):
        before, child = logged_bytes(out), start(arguments)
        deadline = time.monotonic() + 60
        while logged_bytes(out) == before and time.monotonic() < deadline:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself: give it more rows"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.006))  # one answer takes a few milliseconds
        os.kill(child, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return died


def assert_killed_equals_whole(tuned: Path, folder: Path, rows: int, kills: int) -> None:
    """An evaluation that is killed `kills` times has the results of one that is not."""
    sums = toys.write_arithmetic(folder / "sums", rows=10, test_rows=rows)
    flags = ["--adapter", str(tuned / "run/best"), "--data", str(sums), *COMMON,
             "--max-new-tokens", "6", "--batch-size", "1"]  # fmt: skip
    whole, part = ([*flags, "--out", str(folder / name)] for name in ("whole", "part"))
    evaluate.main(whole)
    assert kill_repeatedly(part, folder / "part", kills) == kills
    evaluate.main(part)
    results, lines = [], []
    for name in ("whole", "part"):
        (path,) = folder.glob(f"{name}/evaluation/*/result.json")
        results.append(json.loads(path.read_text()))
        lines.append(sum(p.read_bytes().count(b"\n") for p in path.parent.glob("*.jsonl")))
    assert completions_of(folder / "part") == completions_of(folder / "whole")
    assert lines[0] == lines[1] == 2 * (rows + 2)  # two models, two examples: nothing twice
    assert results[0]["difference"] == results[1]["difference"]
    for name in ("base", "tuned"):
        one, other = (r["models"][name] for r in results)
        assert (one["correct"], one["outcomes"]) == (other["correct"], other["outcomes"])


# Texts as models write them, and worse

PIECES = ["#### ", "####", "$", "%", ",", ".", "-", "−", "/", " ", "\n", "<<", ">>", "=", "+", "*",
          "(", ")", "½", "٣", "é", "🎈", "\ud7ff", "\0", "<|im_end|>", "Question:", "1/0", "1e9",
          "9" * 120, "1,000", "18", "0", "7", "\\boxed{", "}", "**", "of", "percent"]  # fmt: skip


def random_completion(rng: random.Random) -> str:
    """A few dozen pieces of solutions, or characters from anywhere in Unicode."""
    if rng.random() < 0.2:
        return "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(30)))
    return "".join(rng.choices(PIECES, k=rng.randrange(30)))


def assert_random_completions_are_judged(seeds: range) -> None:
    """Score and classify a random completion for each seed."""
    for seed in seeds:
        text = random_completion(random.Random(seed))
        correct = {name: scorer(text, "3+4=7\n#### 7") for name, scorer in SCORERS.items()}
        kind = classify("What is 3 + 4?", "3+4=7\n#### 7", text).kind
        assert kind in KINDS
        assert (kind in ("correct", "format only")) == correct["numeric-equal"]
        assert had_format(text) or not (correct["strict-match"] or correct["openai"]), seed


def final_number(text: str, cut_off: bool = False) -> Fraction | None:
    """The likeliest value of an answer, or None."""
    return next(iter(readings(text, cut_off=cut_off)), None)
