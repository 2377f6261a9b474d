"""Laws of an evaluation that is killed, and of models and texts at their worst."""

import json
import os
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import evaluate
from data.chat import ChatFormat
from data.custom import load_path
from evaluation.answers import Completion, GenerationSettings, answers, read_answers
from evaluation.generative import SCORERS, had_format
from evaluation.mistakes import KINDS, classify
from evaluation.numbers import final_number
from evaluation.summary import figures
from model.load import load_model
from tests import toys
from tests.test_evaluation import (  # noqa: F401  # `trained` is a fixture
    COMMON,
    completion,
    completions_of,
    evaluated,
    problem,
    trained,
)

# Killed


def start(arguments: list[str]) -> int:
    """The id of a forked process that evaluates, and says nothing; torch is imported already."""
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


def logged(out: Path) -> int:
    """Bytes of answers."""
    return sum(p.stat().st_size for p in out.glob("evaluation/*/*.jsonl"))


def kill_again_and_again(arguments: list[str], out: Path, kills: int) -> int:
    """Kill an evaluation `kills` times, each soon after its first new answer; how many it met."""
    rng, met = random.Random(0), 0
    for _ in range(kills):
        before, child = logged(out), start(arguments)
        give_up = time.monotonic() + 60
        while logged(out) == before and time.monotonic() < give_up:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        met += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return met


def killed_and_whole_are_equal(trained: Path, tmp_path: Path, rows: int, kills: int) -> None:  # noqa: F811
    sums = toys.write_arithmetic(tmp_path / "sums", rows=10, test_rows=rows)
    flags = ["--adapter", str(trained / "run/best"), "--data", str(sums), *COMMON,
             "--max-new-tokens", "6", "--batch-size", "1"]  # fmt: skip
    whole, part = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "part"))
    evaluate.main(whole)
    assert kill_again_and_again(part, tmp_path / "part", kills) == kills
    evaluate.main(part)
    results, lines = [], []
    for name in ("whole", "part"):
        (path,) = tmp_path.glob(f"{name}/evaluation/*/result.json")
        results.append(json.loads(path.read_text()))
        lines.append(sum(p.read_bytes().count(b"\n") for p in path.parent.glob("*.jsonl")))
    assert completions_of(tmp_path / "part") == completions_of(tmp_path / "whole")
    assert lines[0] == lines[1] == 2 * (rows + 2)  # two contestants, two examples: nothing twice
    assert results[0]["difference"] == results[1]["difference"]
    for name in ("base", "tuned"):
        one, other = (r["contestants"][name] for r in results)
        assert [one[k] for k in ("right", "outcomes")] == [other[k] for k in ("right", "outcomes")]


def test_an_evaluation_killed_20_times_is_the_whole_one(trained, tmp_path):  # noqa: F811
    killed_and_whole_are_equal(trained, tmp_path, rows=40, kills=20)


GOOD = json.dumps(asdict(completion("#### 7"))).encode() + b"\n"
TORN = [b'{"id": "torn', b"\0" * 50, b"\xff\x80\n", b"null\n", b"{}\n", b"[" * 99_999 + b"\n",
        b'{"id": 1}\n' + GOOD, b"\n" + GOOD]  # fmt: skip


@pytest.mark.parametrize("end", TORN)
def test_a_log_of_answers_is_read_up_to_where_it_is_torn(tmp_path, end):
    (tmp_path / "base.jsonl").write_bytes(GOOD * 3 + end)
    assert read_answers(tmp_path / "base.jsonl") == ([completion("#### 7")] * 3, 3 * len(GOOD))
    assert read_answers(tmp_path / "none.jsonl") == ([], 0)


def test_what_is_torn_off_a_log_is_answered_again(trained, tmp_path):  # noqa: F811
    whole = evaluated(trained, tmp_path)
    before = completions_of(tmp_path)
    (log,) = tmp_path.glob("evaluation/*/tuned.jsonl")
    log.write_bytes(log.read_bytes()[:-30] + b"\0\n")
    again = evaluated(trained, tmp_path)
    assert completions_of(tmp_path) == before and log.read_bytes().count(b"\n") == 10
    assert again["contestants"]["tuned"]["right"] == whole["contestants"]["tuned"]["right"]


def test_what_models_write_is_printed_without_what_a_terminal_would_obey(
    trained, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    result = evaluated(trained, tmp_path, "--limit", "1")
    for example in result["examples"]:
        example["base"] = "18\x1b]0;title\x07\x9b2J\u202e\r\n done"
    capsys.readouterr()
    evaluate.print_result(result, tmp_path)
    said = capsys.readouterr().out
    assert "]0;title" in said and said.replace("\n", "").isprintable()


# Models that never end, or end at once


@pytest.mark.parametrize(
    "ends, cut_off, empty", [((), 1, 0), (tuple(range(toys.TABLE)), 0, 1), ((-1,), 1, 0)]
)
def test_an_answer_without_end_is_cut_off_and_one_that_ends_at_once_is_empty(
    trained, ends, cut_off, empty  # noqa: F811
):  # fmt: skip
    chat = ChatFormat.from_folder(trained / "base")
    problems = load_path(trained / "sums").test
    model, asking = (
        load_model(trained / "base", dtype=torch.float32),
        GenerationSettings(max_new_tokens=7),
    )
    given = {c.id: [c] for c in answers(model, chat, problems, asking, eos_ids=ends)}
    assert {c.tokens for (c,) in given.values()} == ({7} if cut_off else {0})
    found = figures(problems, given)
    assert (found["cut_off"], found["empty"]) == (len(problems) * cut_off, len(problems) * empty)
    assert found["right"]["numeric-equal"] == 0


def test_an_answer_is_scored_though_the_text_runs_on_or_loops_until_it_is_cut_off():
    p = problem("What is 3 + 4?", "#### 7")
    for after in (" 8", "\nQuestion: What is 9 + 9?\n#### 18", "\n#### 7" * 100, " 5 5 5" * 100):
        c = Completion("p", 0, "3+4=7\n#### 7" + after, tokens=512, cut_off=True, seconds=1.0)
        found = figures([p], {"p": [c]})
        assert found["cut_off"] == 1 and found["right"]["numeric-equal"] == 1, after


# Texts as models write them, and worse


PIECES = ["#### ", "####", "$", "%", ",", ".", "-", "−", "/", " ", "\n", "<<", ">>", "=", "+", "*",
          "(", ")", "½", "٣", "é", "🎈", "\ud7ff", "\0", "<|im_end|>", "Question:", "1/0", "1e9",
          "9" * 120, "1,000", "18", "0", "7", "\\boxed{", "}", "**", "of", "percent"]  # fmt: skip


def random_completion(rng: random.Random) -> str:
    """A few dozen pieces of solutions, or characters from anywhere in Unicode."""
    if rng.random() < 0.2:
        return "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(30)))
    return "".join(rng.choices(PIECES, k=rng.randrange(30)))


def survive_completions(seeds: range) -> None:
    """Score and classify a random completion of each seed."""
    for seed in seeds:
        text = random_completion(random.Random(seed))
        right = {name: scorer(text, "3+4=7\n#### 7") for name, scorer in SCORERS.items()}
        kind = classify("What is 3 + 4?", "3+4=7\n#### 7", text).kind
        assert kind in KINDS and (kind in ("correct", "format only")) == right["numeric-equal"]
        assert had_format(text) or not (right["strict-match"] or right["openai"]), seed


def test_10_000_random_completions_are_scored_without_an_exception():
    survive_completions(range(10_000))


WORST = ["9", "#", "#### ", "1,111", "1/", "-", "$", ".", "1.", "0", " ", "\n", "####x", "#### -",
         ",", "$-", "1 1/", "9" * 100 + " ", "9" * 101, "½"]  # fmt: skip


@pytest.mark.parametrize("piece", WORST)
def test_the_worst_megabyte_is_read_within_50_milliseconds(piece):
    text = (piece * 2**20)[: 2**20]
    for reader in (final_number, *(lambda t, s=s: s(t, "#### 7") for s in SCORERS.values())):
        seconds = []
        for _ in range(3):
            started = time.process_time()
            reader(text)
            seconds.append(time.process_time() - started)
        assert min(seconds) < 0.05, reader
