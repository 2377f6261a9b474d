"""The demo: its problems are disjoint and correct, its base has not seen them, training works."""

import itertools
import json
import re
from pathlib import Path

import pytest

import evaluate
import train
from benchmarks.build_demo_base import ENDOFTEXT, Texts, document
from data import demo
from data.chat import ChatFormat
from data.rows import fingerprint
from model.checkpoint import SHIPPED
from run.options import parse

STEP = re.compile(r"(\d+)([-+*/])(\d+) = <<\1\2\3=(\d+)>>\4 ")


@pytest.fixture(scope="module")
def source():
    return demo.load()


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Documents of every kind that the base is trained on, from the end of its curriculum."""
    chat, texts = ChatFormat.from_folder(SHIPPED["demo"]), Texts(5)
    eos = chat.tokenizer.token_to_id(ENDOFTEXT)
    return [document(texts, chat, 0.9, eos) for _ in range(4000)]


def test_the_problems_never_change(source):
    again = demo.load()
    assert fingerprint(source.train + source.test) == fingerprint(again.train + again.test)
    # The base was trained without these problems' numbers: other problems would need a new base.
    assert fingerprint(source.train + source.test).startswith("3f780eed06c6")


def test_every_solution_is_in_gsm8ks_format_and_its_calculations_are_correct(source):
    for problem in source.train + source.test:
        *lines, last = problem.answer.split("\n")
        steps = [STEP.search(line).groups() for line in lines]
        assert 2 <= len(steps) <= 4
        assert all(demo.OPERATORS[op](int(a), int(b)) == int(c) for a, op, b, c in steps)
        assert last == f"#### {steps[-1][3]}"


def test_no_two_problems_have_the_same_text_or_the_same_numbers(source):
    stories = list(itertools.islice(demo.stories(demo.SEED), demo.TRAIN + demo.TEST))
    problems = source.train + source.test
    assert [s.question for s in stories] == [p.question for p in problems]
    assert len({p.question for p in problems}) == len({s.key for s in stories}) == len(problems)
    assert all(
        set(map(int, re.findall(r"\d+", s.question))) <= {*s.numbers} for s in stories
    )  # so the key contains every number in the text


def test_each_category_has_equally_many_test_problems(source):
    counts = {kind: sum(p.category == kind for p in source.test) for kind in demo.KINDS}
    assert set(counts.values()) == {demo.TEST // len(demo.KINDS)}


def test_the_base_sees_no_problems_numbers_and_no_solution_in_a_conversation(documents):
    chat, texts = ChatFormat.from_folder(SHIPPED["demo"]), Texts(6)
    stories = itertools.islice(demo.stories(demo.SEED), demo.TRAIN + demo.TEST)
    assert not {s.key for s in stories} & {texts.story().key for _ in range(5000)}
    for tokens in documents:
        text = chat.tokenizer.decode(tokens, skip_special_tokens=False)
        assert not re.search(r"<<[^>]*[-+*/=]", text) and not ("####" in text and "=" in text)
        turns = re.findall(r"(?s)<\|im_start\|>(?:user|assistant)\n(.*?)<\|im_end\|>", text)
        assert len(turns) in (0, 2) and len(set(turns)) <= 1  # the assistant only repeats


def test_the_base_has_seen_every_token_of_the_problems(source, documents):
    chat = ChatFormat.from_folder(SHIPPED["demo"])
    needed = {t for p in source.train + source.test for t in chat.encode(p.messages).tokens}
    assert needed <= set(itertools.chain(*documents))


def test_the_base_with_its_measurements_takes_two_megabytes():
    sizes = {path.name: path.stat().st_size for path in SHIPPED["demo"].iterdir()}
    assert sum(sizes.values()) <= 2_000_000 and sizes["tokenizer.json"] < 20_000
    correct = json.loads((SHIPPED["demo"] / "build.json").read_text())["correct"]
    assert min(correct.values()) > 0.9, correct


def test_the_flag_sets_defaults_that_help_names_and_that_other_options_override(capsys):
    presets = {"demo": train.DEMO}
    assert parse(train.TrainConfig, ["--demo"], "", presets=presets) == train.TrainConfig(
        **train.DEMO
    )
    with pytest.raises(SystemExit):
        parse(train.TrainConfig, ["--help"], "", presets=presets)
    printed = " ".join(capsys.readouterr().out.split())
    values = {k: v[0] if k == "data" else v for k, v in train.DEMO.items()}
    assert all(f"--{k.replace('_', '-')} {v}" in printed for k, v in values.items())
    changed = parse(train.TrainConfig, ["--epochs", "7", "--demo"], "", presets=presets)
    assert changed == train.TrainConfig(**train.DEMO | {"epochs": 7})


def outcome(out: Path, *flags: str) -> dict:
    """Train a shortened demo and evaluate it on 40 of its test problems."""
    train.main(["--demo", "--out", str(out), "--precision", "fp32", "--device", "cpu", *flags])
    evaluate.main(["--demo", "--adapter", str(out / "best"), "--limit", "40",
                   "--precision", "fp32", "--device", "cpu"])  # fmt: skip
    (result,) = (out / "evaluation").glob("test-*/result.json")
    return json.loads(result.read_text())


def test_a_shortened_demo_solves_what_its_base_cannot(tmp_path):
    result = outcome(tmp_path / "run", "--max-steps", "100", "--evals-per-epoch", "2")
    base, tuned = (result["models"][name] for name in ("base", "tuned"))
    assert base["correct"]["numeric-equal"] <= 4 and base["had_format"] == 0  # of 40: 0
    assert tuned["correct"]["numeric-equal"] >= 16
    assert result["in_words"].endswith(": better")
    assert set(tuned["by"]["category"]) == set(demo.KINDS)


def test_at_a_learning_rate_of_zero_the_demo_learns_nothing(tmp_path):
    result = outcome(tmp_path / "run", "--learning-rate", "0", "--max-steps", "2")
    assert "none of 40 answers changed" in result["in_words"]


def test_the_readme_shows_what_the_demo_printed_and_the_results_of_its_three_seeds():
    docs = Path(train.__file__).parent / "docs"
    readme = (docs.parent / "README.md").read_text("utf-8")
    seeds = json.loads((docs / "demo.json").read_text("utf-8"))["seeds"]
    tuned = [f"{100 * seed['tuned'] / seed['problems']:.1f}" for seed in seeds]
    assert (docs / "demo.txt").read_text("utf-8") in readme
    assert f"Seeds 0, 1 and 2 reach {tuned[0]}, {tuned[1]} and {tuned[2]} %" in readme
