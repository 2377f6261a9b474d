"""What `evaluate.py` measures and writes: prompts, resuming, votes, breakdowns, comparisons."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from data.chat import ChatFormat
from data.custom import load_path
from data.rows import Message, Problem
from errors import BadData, BadOption
from evaluation.answers import Completion, GenerationSettings, answers
from evaluation.prompts import before_stop, prompt_tokens
from evaluation.summary import breakdown, figures, outcomes, several_samples, transcripts
from lora.inject import LoRAConfig, adapters, inject, merge
from lora.peft_format import save_adapter
from model.load import load_model
from tests import toys

COMMON = ["--precision", "fp32", "--device", "cpu", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a base, data, and an adapter that changes what the base says."""
    folder = tmp_path_factory.mktemp("trained")
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


def evaluated(trained: Path, out: Path, *flags: str) -> dict:
    """`evaluate.py` on the adapter; its one result."""
    evaluate.main(["--adapter", str(trained / "run/best"), "--data", str(trained / "sums"),
                   "--out", str(out), *COMMON, *flags])  # fmt: skip
    (path,) = out.glob("evaluation/*/result.json")
    return json.loads(path.read_text())


def completions_of(out: Path) -> dict[str, dict]:
    """Every line of every contestant, without the time it took."""
    found = {}
    for path in out.glob("evaluation/*/*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[path.stem, row["id"], row["sample"]] = (row["text"], row["cut_off"])
    return found


def problem(question: str, answer: str, id: str = "p") -> Problem:
    return Problem(id, (Message("user", question), Message("assistant", answer)))


def completion(text: str, id: str = "p", sample: int = 0) -> Completion:
    return Completion(id, sample, text, tokens=1, cut_off=False, seconds=1.0)


# Prompts


def test_a_few_shot_prompt_is_lm_evaluation_harness_form(trained):
    chat = ChatFormat.from_folder(trained / "base")
    shots = [problem("What is 1 + 1?", "2\n#### 2"), problem("What is 2 + 2?", "4\n#### 4")]
    tokens = prompt_tokens(problem("What is 3 + 3?", "6"), chat, "few-shot", shots)
    assert chat.decode(tokens) == (
        "Question: What is 1 + 1?\nAnswer: 2\n#### 2\n\n"
        "Question: What is 2 + 2?\nAnswer: 4\n#### 4\n\n"
        "Question: What is 3 + 3?\nAnswer:"
    )


def test_a_chain_of_thought_prompt_is_lm_evaluation_harness_form(trained):
    chat = ChatFormat.from_folder(trained / "base")
    tokens = prompt_tokens(problem("What is 3 + 3?", "6"), chat, "chain-of-thought", [])
    assert chat.decode(tokens) == "Q: What is 3 + 3?\nA: Let's think step by step."


def test_an_answer_ends_where_the_model_begins_the_next_question():
    assert before_stop("It is 7.\n\nQuestion: What", "few-shot") == "It is 7.\n\n"
    assert before_stop("7</s>Question: 8", "few-shot") == "7"
    assert before_stop("Question: is kept", "chat") == "Question: is kept"


def test_shots_are_never_among_the_problems_asked(trained, tmp_path):
    config = evaluate.EvalConfig(data=(str(trained / "sums"),), split="train", shots=3)
    (task,) = evaluate.find_tasks(config)
    assert len(task.shots) == 3
    assert not {p.question for p in task.shots} & {p.question for p in task.problems}


# Answers


@pytest.mark.parametrize("flags", [(), ("--temperature", "1", "--samples", "3", "--limit", "4")])
def test_batch_size_does_not_change_an_answer(trained, tmp_path, flags):
    results = []
    for size in ("1", "2", "7", "16"):
        out = tmp_path / size
        results.append(evaluated(trained, out, "--batch-size", size, *flags))
        shutil.copytree(out, tmp_path / "all" / size)
    texts = [completions_of(tmp_path / "all" / size) for size in ("1", "2", "7", "16")]
    assert all(others == texts[0] for others in texts[1:])
    assert len({text for text, _ in texts[0].values()}) > 5
    assert all(r["difference"] == results[0]["difference"] for r in results[1:])


def test_order_and_merging_do_not_change_an_answer(trained):
    chat = ChatFormat.from_folder(trained / "base")
    problems = load_path(trained / "sums").test
    asking = GenerationSettings(max_new_tokens=12, batch_size=3)

    def texts(model, asked):
        return {c.id: c.text for c in answers(model, chat, asked, asking, eos_ids=(toys.IM_END,))}

    model = load_model(trained / "base", dtype=torch.float32)
    untouched = texts(model, problems)
    evaluate.read_adapter(trained / "run/best", model)
    model.eval()
    adapted = texts(model, problems)
    assert texts(model, problems[::-1]) == adapted != untouched
    shuffled = random.Random(0).sample(problems, len(problems))
    assert texts(model, shuffled) == adapted
    merge(model)
    assert texts(model, shuffled) == adapted


def test_base_beside_tuned_is_the_base_by_itself(trained, tmp_path):
    both = evaluated(trained, tmp_path / "both")
    evaluate.main(["--model", str(trained / "base"), "--data", str(trained / "sums"),
                   "--out", str(tmp_path / "one"), *COMMON])  # fmt: skip
    one = completions_of(tmp_path / "one")
    assert one == {k: v for k, v in completions_of(tmp_path / "both").items() if k[0] == "base"}
    assert both["contestants"]["base"]["loss"] != both["contestants"]["tuned"]["loss"]


def test_a_stopped_evaluation_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    whole = evaluated(trained, tmp_path / "whole", "--batch-size", "2")
    real, calls = evaluate.answers, []

    def dies(*args, **kwargs):
        for n, c in enumerate(real(*args, **kwargs)):
            if n == 5:
                raise KeyboardInterrupt
            yield c

    monkeypatch.setattr(evaluate, "answers", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluated(trained, tmp_path / "part", "--batch-size", "2")
    (log,) = (tmp_path / "part").glob("evaluation/*/base.jsonl")
    log.write_bytes(log.read_bytes() + b'{"id": "torn')
    monkeypatch.setattr(
        evaluate, "answers", lambda *a, **k: calls.append(k["done"]) or real(*a, **k)
    )
    again = evaluated(trained, tmp_path / "part", "--batch-size", "2")
    assert len(calls[0]) == 5 and not calls[1]
    assert completions_of(tmp_path / "part") == completions_of(tmp_path / "whole")
    assert again["difference"] == whole["difference"]


def test_other_settings_lie_in_another_folder(trained, tmp_path):
    evaluated(trained, tmp_path, "--limit", "2")
    with pytest.raises(ValueError, match="too many values"):
        evaluated(trained, tmp_path, "--limit", "3")


def test_sampling_is_reproducible_from_the_seed(trained, tmp_path):
    flags = ["--temperature", "1", "--limit", "3", "--seed"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        evaluated(trained, tmp_path / name, *flags, seed)
    a, b, c = (completions_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_the_validation_split_is_the_rows_that_training_held_out(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run/best", run / "best")
    held_out = load_path(trained / "sums").train[5:8]
    lines = [json.dumps(p.row()) for p in held_out]
    (run / "validation.jsonl").write_text("\n".join(lines) + "\n")
    config = evaluate.EvalConfig(adapter=str(run / "best"), split="validation")
    (task,) = evaluate.find_tasks(config)
    assert [p.messages for p in task.problems] == [p.messages for p in held_out]


def test_both_answer_a_question_as_one_watches(trained, capsys):
    evaluate.main(["--adapter", str(trained / "run/best"), "--ask", "What is 3 + 4?", *COMMON])
    printed = capsys.readouterr().out
    _, base, tuned = (
        part.strip() for part in printed.replace("\ntuned: ", "\nbase: ").split("\nbase: ")
    )
    assert base and tuned and base != tuned


# Figures


def test_every_result_has_the_two_examples(trained, tmp_path):
    result = evaluated(trained, tmp_path, "--limit", "1")
    assert [e["gold"] for e in result["examples"]] == ["#### 90", "#### 1200"]
    assert all({"base", "tuned"} <= e.keys() for e in result["examples"])


def test_the_majority_of_the_samples_is_the_outcome():
    p = problem("q", "#### 7")
    samples = [completion(f"#### {n}", sample=i) for i, n in enumerate((1, 7, 7, 2))]
    assert outcomes([p], {"p": samples}) == [True]
    assert figures([p], {"p": samples})["right"]["numeric-equal"] == 0  # of the first sample
    found = several_samples([p], {"p": samples})
    assert found["votes"] == {"maj@1": 0, "maj@2": 0, "maj@4": 1}
    assert found["pass"] == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6), "pass@4": 1.0}


def test_breakdowns_count_each_problem_once_in_each_class():
    sums = problem("Tom pays $3 and $4. What in all?", "<<3+4=7>>7\n#### 7", "a")
    plain = problem("How many?", "#### 7", "b")
    tables = breakdown([sums, plain], [True, False])
    assert tables["reasoning steps"] == {"0": [0, 1], "1": [1, 1]}
    assert tables["operations"] == {"+": [1, 1], "none written": [0, 1]}
    assert tables["question holds"] == {"money": [1, 1], "none of these": [0, 1]}


def test_transcripts_are_sorted_by_what_the_tuning_did():
    problems = [problem("q", "#### 1", id) for id in "abcd"]
    given = {id: [completion(f"text {id}", id)] for id in "abcd"}
    right = {"base": [True, False, False, True], "tuned": [False, True, False, True]}
    kept = transcripts(problems, given, given, right)
    assert {k: [t["id"] for t in v] for k, v in kept.items()} == {
        "broken": ["a"], "fixed": ["b"], "still wrong": ["c"]
    }  # fmt: skip


def test_answers_that_are_no_numbers_are_compared_as_text():
    p = problem("Capital of France?", "Paris")
    found = figures([p], {"p": [completion(" Paris\n")]})
    assert found["right"] == {"exact-text": 1} and found["mistakes"] == {}


def test_two_results_are_set_side_by_side(trained, tmp_path, capsys):
    evaluated(trained, tmp_path / "a")
    evaluated(trained, tmp_path / "b", "--cot")
    paths = [str(next((tmp_path / name).glob("evaluation/*/result.json"))) for name in "ab"]
    evaluate.main(["--compare", ",".join(paths)])
    printed = capsys.readouterr().out
    assert "prompt: chat against chain-of-thought" in printed and "B against A: " in printed


def test_results_of_different_problems_are_not_compared(trained, tmp_path):
    evaluated(trained, tmp_path / "a", "--limit", "2")
    evaluated(trained, tmp_path / "b", "--limit", "3")
    paths = [str(next((tmp_path / name).glob("evaluation/*/result.json"))) for name in "ab"]
    with pytest.raises(BadData, match="different problems"):
        evaluate.main(["--compare", ",".join(paths)])


@pytest.mark.parametrize(
    "flags, cause",
    [
        ((), "neither --adapter nor --model"),
        (("--model", "x", "--samples", "2"), "at temperature 0"),
        (("--model", "x", "--shots", "2", "--cot"), "two different prompts"),
        (("--compare", "one.json"), "takes two files"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags, cause):
    with pytest.raises(BadOption, match=cause):
        evaluate.main(list(flags))


def test_an_open_answer_is_sampled_by_its_place_and_not_its_batch(trained):
    chat = ChatFormat.from_folder(trained / "base")
    problems = load_path(trained / "sums").test[:3]
    model = load_model(trained / "base", dtype=torch.float32)
    asking = GenerationSettings(temperature=1.0, seed=3, samples=2, max_new_tokens=8)
    ids = {"eos_ids": (toys.IM_END,)}
    whole = {(c.id, c.sample): c.text for c in answers(model, chat, problems, asking, **ids)}
    done = {(problems[0].id, 0), (problems[2].id, 1)}
    rest = {
        (c.id, c.sample): c.text for c in answers(model, chat, problems, asking, done=done, **ids)
    }
    assert len(set(whole.values())) > 3
    assert rest == {key: text for key, text in whole.items() if key not in done}
