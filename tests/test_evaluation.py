"""Tests of what `evaluate.py` measures: prompts, resuming, votes, breakdowns, comparisons."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import train
from data.chat import ChatFormat
from data.custom import load_path
from data.tasks import load_source
from errors import BadData, BadOption
from evaluation import answers as generation
from evaluation.answers import answers, before_stop, exact_matches, prompt_tokens
from evaluation.generative import NUMBERS, TEXT
from evaluation.summary import answer_metrics, breakdown, outcomes, sample_metrics, transcripts
from evaluation.tasks import judge_of, judged_problems
from files import write_json
from lora.inject import merge
from lora.peft_format import read_adapter
from model.load import load_model
from run.base import Base
from run.evaluation_folder import folder_of_settings
from tests.evaluations import (
    COMMON,
    completion,
    completions_of,
    evaluated,
    problem,
    settings,
)

# Prompts


def test_a_few_shot_prompt_equals_lm_evaluation_harness(tuned):
    chat = ChatFormat.from_folder(tuned / "base")
    shots = [problem("What is 1 + 1?", "2\n#### 2"), problem("What is 2 + 2?", "4\n#### 4")]
    tokens = prompt_tokens(problem("What is 3 + 3?", "6"), chat, "few-shot", shots)
    assert chat.decode(tokens) == (
        "Question: What is 1 + 1?\nAnswer: 2\n#### 2\n\n"
        "Question: What is 2 + 2?\nAnswer: 4\n#### 4\n\n"
        "Question: What is 3 + 3?\nAnswer:"
    )


def test_a_chain_of_thought_prompt_equals_lm_evaluation_harness(tuned):
    chat = ChatFormat.from_folder(tuned / "base")
    tokens = prompt_tokens(problem("What is 3 + 3?", "6"), chat, "chain-of-thought", [])
    assert chat.decode(tokens) == "Q: What is 3 + 3?\nA: Let's think step by step."


def test_an_answer_ends_where_the_model_begins_the_next_question():
    assert before_stop("It is 7.\n\nQuestion: What", "few-shot") == "It is 7.\n\n"
    assert before_stop("7</s>Question: 8", "few-shot") == "7"
    assert before_stop("Question: is kept", "chat") == "Question: is kept"


@pytest.mark.parametrize("same", [False, True])
def test_no_problem_is_shown_its_own_solution(tuned, same):
    config = evaluate.EvalConfig(
        data=(str(tuned / "sums"),), split="train", shots=3, same_shots=same
    )
    (task,) = evaluate.select_tasks(config)
    shown = [[s.id for s in task.shots[p.id]] for p in task.problems]
    assert all(len({*ids} - {p.id}) == 3 for p, ids in zip(task.problems, shown))
    assert (len(set(map(tuple, shown))) <= 4) == same  # the first three, or four without one


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_rows_shown_to_each_problem_are_those_of_the_harness(tuned, split):
    sampler_of = pytest.importorskip("lm_eval.api.samplers").ContextSampler
    config = evaluate.EvalConfig(data=(str(tuned / "sums"),), split=split, shots=2)
    (task,) = evaluate.select_tasks(config)
    pool = load_source(str(tuned / "sums")).train
    sampler = sampler_of(pool, rnd=1234)  # the default of simple_evaluate
    for p in task.problems:
        theirs = sampler.sample(2, eval_doc=p if split == "train" else None)
        assert [s.id for s in task.shots[p.id]] == [s.id for s in theirs]


def test_few_shot_prompts_of_gsm8k_equal_the_harness_problem_by_problem(tuned):
    datasets = pytest.importorskip("datasets")
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    chat, sums = ChatFormat.from_folder(tuned / "base"), load_source(str(tuned / "sums"))
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k.yaml")
    sets = {
        split: datasets.Dataset.from_list(
            [{"question": p.question, "answer": p.answer} for p in of]
        )
        for split, of in (("train", sums.train), ("test", sums.test))
    }
    config = {k: v for k, v in config.items() if k != "tag"}
    task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: sets, "num_fewshot": 5})
    task.set_fewshot_seed(1234)  # the default of simple_evaluate
    task.build_all_requests()
    theirs = [request.args[0] for request in task.instances]
    (ours,) = evaluate.select_tasks(evaluate.EvalConfig(data=(str(tuned / "sums"),), shots=5))
    prompts = [prompt_tokens(p, chat, "few-shot", ours.shots[p.id]) for p in ours.problems]
    assert [chat.decode(tokens) for tokens in prompts] == theirs and len(theirs) > 3


# Answers


@pytest.mark.parametrize("flags", [(), ("--temperature", "1", "--samples", "3", "--limit", "4")])
def test_batch_size_does_not_change_an_answer(tuned, tmp_path, flags):
    results = []
    for size in ("1", "2", "7", "16"):
        out = tmp_path / size
        results.append(evaluated(tuned, out, "--batch-size", size, *flags))
        shutil.copytree(out, tmp_path / "all" / size)
    texts = [completions_of(tmp_path / "all" / size) for size in ("1", "2", "7", "16")]
    assert all(others == texts[0] for others in texts[1:])
    assert len({text for text, _ in texts[0].values()}) > 5
    assert all(r["difference"] == results[0]["difference"] for r in results[1:])


def test_order_and_merging_do_not_change_an_answer(tuned):
    chat = ChatFormat.from_folder(tuned / "base")
    problems = load_path(tuned / "sums").test
    asking = settings(12, batch_size=3)

    def texts(model, asked):
        return {c.id: c.text for c in answers(model, chat, asked, asking)}

    model = load_model(tuned / "base", dtype=torch.float32)
    untouched = texts(model, problems)
    read_adapter(tuned / "run/best", model)
    model.eval()
    adapted = texts(model, problems)
    assert texts(model, problems[::-1]) == adapted != untouched
    shuffled = random.Random(0).sample(problems, len(problems))
    assert texts(model, shuffled) == adapted
    merge(model)
    assert texts(model, shuffled) == adapted


def test_the_base_of_an_adapter_answers_as_the_base_alone(tuned, tmp_path):
    both = evaluated(tuned, tmp_path / "both")
    evaluate.main(["--model", str(tuned / "base"), "--data", str(tuned / "sums"),
                   "--out", str(tmp_path / "one"), *COMMON])  # fmt: skip
    one = completions_of(tmp_path / "one")
    assert one == {k: v for k, v in completions_of(tmp_path / "both").items() if k[0] == "base"}
    assert both["models"]["base"]["loss"] != both["models"]["tuned"]["loss"]


def test_an_interrupted_evaluation_resumes_where_it_stopped(tuned, tmp_path, monkeypatch):
    whole = evaluated(tuned, tmp_path / "whole", "--batch-size", "2")
    real, calls = generation.answers, []

    def dies(*args, **kwargs):
        for n, c in enumerate(real(*args, **kwargs)):
            if n == 5:
                raise KeyboardInterrupt
            yield c

    monkeypatch.setattr(generation, "answers", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tuned, tmp_path / "part", "--batch-size", "2")
    (log,) = (tmp_path / "part").glob("evaluation/*/base.jsonl")
    log.write_bytes(log.read_bytes() + b'{"id": "torn')
    monkeypatch.setattr(
        generation, "answers", lambda *a, **k: calls.append(k["done"]) or real(*a, **k)
    )
    again = evaluated(tuned, tmp_path / "part", "--batch-size", "2")
    assert len(calls[0]) == 5 and not calls[1]
    assert completions_of(tmp_path / "part") == completions_of(tmp_path / "whole")
    assert again["difference"] == whole["difference"]


def test_other_settings_have_another_folder(tuned, tmp_path):
    evaluated(tuned, tmp_path, "--limit", "2")
    with pytest.raises(ValueError, match="too many values"):
        evaluated(tuned, tmp_path, "--limit", "3")


def test_sampling_is_reproducible_from_the_seed(tuned, tmp_path):
    flags = ["--temperature", "1", "--limit", "3", "--seed"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        evaluated(tuned, tmp_path / name, *flags, seed)
    a, b, c = (completions_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_the_validation_split_is_the_rows_that_training_held_out(tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned / "run/best", run / "best")
    held_out = load_path(tuned / "sums").train[5:8]
    lines = [json.dumps(p.row()) for p in held_out]
    (run / "validation.jsonl").write_text("\n".join(lines) + "\n")
    config = evaluate.EvalConfig(adapter=str(run / "best"), split="validation")
    (task,) = evaluate.select_tasks(config)
    assert [p.messages for p in task.problems] == [p.messages for p in held_out]


def test_both_models_answer_a_question(tuned, capsys):
    evaluate.main(["--adapter", str(tuned / "run/best"), "--ask", "What is 3 + 4?", *COMMON])
    printed = capsys.readouterr().out
    _, base, tuned = (
        part.strip() for part in printed.replace("\ntuned: ", "\nbase: ").split("\nbase: ")
    )
    assert base and tuned and base != tuned


# Metrics


def test_every_result_has_the_two_examples(tuned, tmp_path):
    result = evaluated(tuned, tmp_path, "--limit", "1")
    assert [e["gold"] for e in result["examples"]] == ["#### 90", "#### 1200"]
    assert all({"base", "tuned"} <= e.keys() for e in result["examples"])


def test_the_loss_is_that_of_the_first_gold_answers_and_their_number_is_recorded(tuned, tmp_path):
    some = evaluated(tuned, tmp_path / "a", "--teacher-forced", "3")
    alone = evaluated(tuned, tmp_path / "b", "--limit", "3")
    none = evaluated(tuned, tmp_path / "a", "--teacher-forced", "0")  # the same folder
    for model in ("base", "tuned"):
        found, expected = some["models"][model], alone["models"][model]
        assert found["loss_problems"] == expected["loss_problems"] == 3
        assert found["loss"] == expected["loss"] and "loss" not in none["models"][model]
        assert none["models"][model]["outcomes"] == found["outcomes"]


def test_rows_that_chose_the_adapter_are_named_as_such(tuned, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tuned / "run/best", run / "best")
    write_json(run / "config.json", {"options": {"data": [str(tuned / "sums")]}, "identity": {}})
    log = [{"step": s, "val_loss": 1.0} for s in (0, 2, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    said, flags = [], ["--adapter", str(run / "best"), "--limit", "1", *COMMON]
    for split in ("validation", "test"):
        evaluate.main([*flags, "--split", split])
        said.append(capsys.readouterr().out)
    assert "by these problems, as the best of 3 validations" in said[0]
    assert "by these problems" not in said[1]
    assert "The adapter was chosen by these rows" in (run / "report.md").read_text()


def test_the_majority_of_the_samples_is_the_outcome():
    p = problem("q", "#### 7")
    samples = [completion(f"#### {n}", sample=i) for i, n in enumerate((1, 7, 7, 2))]
    assert outcomes(NUMBERS, [p], {"p": samples}) == [True]
    metrics = answer_metrics(NUMBERS, [p], {"p": samples})
    assert metrics["correct"]["numeric-equal"] == 0  # of the first sample
    found = sample_metrics([p], {"p": samples})
    assert found["votes"] == {"maj@1": 0, "maj@2": 0, "maj@4": 1}
    assert found["pass"] == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6), "pass@4": 1.0}


def test_breakdowns_count_each_problem_once_in_each_class():
    sums = problem("Tom pays $3 and $4. What in all?", "<<3+4=7>>7\n#### 7", "a")
    plain = problem("How many?", "#### 7", "b")
    tables = breakdown([sums, plain], [True, False])
    assert tables["reasoning steps"] == {"0": [0, 1], "1": [1, 1]}
    assert tables["operations"] == {"+": [1, 1], "none written": [0, 1]}
    assert tables["question holds"] == {"money": [1, 1], "none of these": [0, 1]}


def test_transcripts_are_sorted_into_fixed_broken_and_still_wrong():
    problems = [problem("q", "#### 1", id) for id in "abcd"]
    given = {id: [completion(f"text {id}", id)] for id in "abcd"}
    correct = {"base": [True, False, False, True], "tuned": [False, True, False, True]}
    kept = transcripts(problems, {"base": given, "tuned": given}, correct)
    assert {k: [t["id"] for t in v] for k, v in kept.items()} == {
        "broken": ["a"], "fixed": ["b"], "still wrong": ["c"]
    }  # fmt: skip


def test_a_result_holds_five_transcripts_of_each_kind():
    ids = [str(n) for n in range(7)]
    given = {id: [completion("text", id)] for id in ids}
    correct = {"base": [False] * 7, "tuned": [True] * 7}
    kept = transcripts([problem("q", "#### 1", id) for id in ids], dict.fromkeys(correct, given),
                       correct)  # fmt: skip
    assert [t["id"] for t in kept["fixed"]] == ids[:5]


def test_answers_that_are_not_numbers_are_compared_as_text():
    p = problem("Capital of France?", "Paris")
    assert judge_of([p]) is TEXT
    found = answer_metrics(TEXT, [p], {"p": [completion(" Paris\n")]})
    assert found["correct"] == {"exact-text": 1} and found["mistakes"] == {}


def test_two_results_are_compared(tuned, tmp_path, capsys):
    evaluated(tuned, tmp_path / "a")
    evaluated(tuned, tmp_path / "b", "--cot")
    paths = [str(next((tmp_path / name).glob("evaluation/*/result.json"))) for name in "ab"]
    evaluate.main(["--compare", ",".join(paths)])
    printed = capsys.readouterr().out
    assert "prompt: chat against chain-of-thought" in printed and "B against A: " in printed


def test_a_result_of_an_earlier_version_is_compared_as_well(tuned, tmp_path, capsys):
    result = evaluated(tuned, tmp_path)
    (path,) = map(str, tmp_path.glob("evaluation/*/result.json"))
    capsys.readouterr()
    evaluate.main(["--compare", path, path])
    today = capsys.readouterr().out
    models = result.pop("models")
    result["contestants"] = {name: {"right": m.pop("correct"), **m} for name, m in models.items()}
    Path(path).write_text(json.dumps(result))
    evaluate.main(["--compare", path, path])
    assert capsys.readouterr().out == today and "B against A: +0.0 points" in today


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {"problems_sha256": "a"}}'])
def test_a_file_that_is_not_a_result_is_not_compared(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(BadData, match="result.json"):
        evaluate.main(["--compare", str(path), str(path)])


def test_results_of_different_problems_are_not_compared(tuned, tmp_path):
    evaluated(tuned, tmp_path / "a", "--limit", "2")
    evaluated(tuned, tmp_path / "b", "--limit", "3")
    paths = [str(next((tmp_path / name).glob("evaluation/*/result.json"))) for name in "ab"]
    with pytest.raises(BadData, match="different problems"):
        evaluate.main(["--compare", ",".join(paths)])


@pytest.mark.parametrize(
    "flags, cause",
    [
        ((), "neither --adapter nor --model"),
        (("--model", "x", "--samples", "2"), "equal at temperature 0"),
        (("--model", "x", "--shots", "2", "--cot"), "two different prompts"),
        (("--model", "x", "--same-shots"), "no problems are shown"),
        (("--compare", "one.json"), "takes two files"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags, cause):
    with pytest.raises(BadOption, match=cause):
        evaluate.main(list(flags))


def test_a_sampled_answer_depends_on_its_index_and_not_on_its_batch(tuned):
    chat = ChatFormat.from_folder(tuned / "base")
    problems = load_path(tuned / "sums").test[:3]
    model = load_model(tuned / "base", dtype=torch.float32)
    asking = settings(8, samples=2, temperature=1.0, seed=3)
    whole = {(c.id, c.sample): c.text for c in answers(model, chat, problems, asking)}
    done = {(problems[0].id, 0), (problems[2].id, 1)}
    rest = {(c.id, c.sample): c.text for c in answers(model, chat, problems, asking, done=done)}
    assert len(set(whole.values())) > 3
    assert rest == {key: text for key, text in whole.items() if key not in done}


# Judging


def golds(*answers: str) -> list:
    return [problem("q", answer, f"rows:{n}") for n, answer in enumerate(answers, start=1)]


def test_a_task_is_judged_as_numbers_if_at_least_half_of_its_golds_hold_one():
    assert judge_of(golds("2\n#### 2", "####3", "The answer is: 4")) is NUMBERS
    assert judge_of(golds("#### 2", "#### 3", "Paris")) is NUMBERS
    assert judge_of(golds("#### 2", "Paris")) is NUMBERS
    assert judge_of(golds("#### 2", "#### x", "Paris")) is judge_of(golds("Paris")) is TEXT
    assert NUMBERS.is_correct("It is 2.", "#### 2") and not TEXT.is_correct("It is 2.", "#### 2")


def test_a_problem_whose_gold_holds_no_number_is_left_out_and_reported():
    problems = golds("#### 2", "#### 3 or 4", "So 5.\n5", "The answer is: 6", "#### 7")
    judged, words = judged_problems(NUMBERS, problems)
    assert [p.id for p in judged] == ["rows:1", "rows:4", "rows:5"]
    assert words == (
        "3 of 5 golds hold a number; 1 rewritten as '#### N' for the scorers that compare"
        " texts; 2 rows left out: rows:2; rows:3"
    )
    assert judged_problems(NUMBERS, golds("#### 2")) == (
        golds("#### 2"),
        "1 of 1 golds hold a number",
    )


def test_no_problem_is_left_out_when_judged_as_text_and_the_output_explains_it():
    problems = golds("Paris", "Rome", "#### 7")
    judged, words = judged_problems(judge_of(problems), problems)
    assert judged == problems
    assert words.startswith("1 of 3 golds hold a number") and "fewer than half" in words
    assert "compared as text: only an answer with exactly the gold's characters" in words


def test_several_sources_asked_together_are_judged_gold_by_gold():
    problems = golds("#### 7", "Paris", "Rome")
    judge = judge_of(problems, ["sums", "capitals"], generated=True)
    judged, words = judged_problems(judge, problems)
    assert judged == problems and "answers to the other 2 are compared as text" in words
    assert judge.is_correct("It is 7.", "#### 7") and judge.is_correct("Paris ", "Paris")
    assert not judge.is_correct("It is Paris.", "Paris") and not judge.is_correct("8", "#### 7")
    assert judge_of(golds("#### 7", "8"), ["sums", "more"], generated=True) is NUMBERS


def odd_sums(folder: Path, tuned: Path, *answers: str) -> Path:
    """The toy sums, with other answers to the first test rows."""
    shutil.copytree(tuned / "sums", folder)
    lines = (folder / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row, answer in zip(rows, answers):
        row["answer"] = answer
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_odd_gold_does_not_change_how_the_other_answers_are_judged(tuned, tmp_path, capsys):
    data = odd_sums(tmp_path / "data", tuned, "two or three")
    flags = ["--adapter", str(tuned / "run/best"), "--data", str(data), *COMMON]
    evaluate.main([*flags, "--out", str(tmp_path / "out"), "--limit", "3"])
    assert "7 of 8 golds hold a number; 1 row left out: test.jsonl:1" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("evaluation/*/result.json")
    result = json.loads(path.read_text())
    assert result["problems"] == 3 and "numeric-equal" in result["models"]["tuned"]["correct"]
    rows = {key[1] for key in completions_of(tmp_path / "out")}
    assert {"test.jsonl:2", "test.jsonl:3", "test.jsonl:4"} <= rows and "test.jsonl:1" not in rows


def test_without_numbers_the_output_says_that_answers_are_compared_as_text(tuned, tmp_path, capsys):
    data = odd_sums(tmp_path / "data", tuned, *["two or three"] * 8)
    flags = ["--adapter", str(tuned / "run/best"), "--data", str(data), *COMMON]
    evaluate.main([*flags, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "judged as text, by exact-text\n  0 of 8 golds hold a number" in printed
    assert "exactly the gold's characters" in printed


def test_early_stopping_on_exact_match_leaves_the_same_problems_out(tuned, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(tuned / "sums", data)
    for line, answer in ((0, "two or three"), (1, "The answer is: 5")):
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        rows[line]["answer"] = answer
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(
        ["--model", str(tuned / "base"), "--data", str(data), "--out", str(tmp_path / "run"),
         "--validation-share", "0.9", "--max-steps", "1", "--stop-on", "exact-match",
         "--max-new-tokens", "4", "--precision", "fp32", "--device", "cpu"]
    )  # fmt: skip
    held_out = (tmp_path / "run/validation.jsonl").read_text()
    assert "two or three" in held_out
    count = len(held_out.splitlines())
    printed = capsys.readouterr().out
    assert f"exact match: judged as numbers; {count - 1} of {count} golds hold a number" in printed
    assert "1 row left out: train.jsonl:1" in printed


def test_how_a_task_is_judged_is_printed(tuned, tmp_path, capsys):
    evaluated(tuned, tmp_path, "--limit", "2")
    printed = capsys.readouterr().out
    assert "2 problems; prompt chat; judged as numbers, by numeric-equal" in printed


def test_exact_matches_are_the_answers_that_the_judge_calls_correct(tuned):
    chat = ChatFormat.from_folder(tuned / "base")
    model = load_model(tuned / "base", dtype=torch.float32)
    asked, asking = load_path(tuned / "sums").test, settings(8)
    said = {c.id: c.text for c in answers(model, chat, asked, asking)}
    problems = [problem(p.question, said[p.id] if n % 2 else "no", p.id)
                for n, p in enumerate(asked)]  # fmt: skip
    assert exact_matches(model, chat, problems, asking, TEXT) == len(problems) // 2
    assert model.training


# Folders


def test_an_evaluations_folder_is_named_by_what_its_models_are_and_not_by_their_places(tmp_path):
    config = evaluate.EvalConfig(model="demo", data=("demo",), max_new_tokens=160)
    (task,) = evaluate.select_tasks(config)
    base = Base.find("demo", precision="bf16", device="cpu")
    settings = evaluate.evaluation_settings(config, base, None, task)
    folder = folder_of_settings(tmp_path, "test", settings)
    places = {"base": "copy/of/demo", "base_commit": "abc", "adapter": "elsewhere/best"}
    assert folder_of_settings(tmp_path, "test", settings | places) == folder
    for changed in ({"base_sha256": "b"}, {"adapter_sha256": "b"}, {"problems_sha256": "b"}):
        assert folder_of_settings(tmp_path, "test", settings | changed) != folder
    shown = [
        evaluate.evaluation_settings(replace(config, shots=2, same_shots=same), base, None, task)
        for same in (False, True)
    ]
    assert shown[0] != shown[1], "answers after other shots would be taken for these"
