"""The demo: problems that are disjoint and right, a base that was not taught them, and learning."""

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
from model.load import SHIPPED
from run.options import parse

STEP = re.compile(r"(\d+)([-+*/])(\d+) = <<\1\2\3=(\d+)>>\4 ")


@pytest.fixture(scope="module")
def source():
    return demo.load()


@pytest.fixture(scope="module")
def read() -> list[str]:
    """Documents of every kind that the base reads, from the last part of its curriculum."""
    chat, texts = ChatFormat.from_folder(SHIPPED["demo"]), Texts(5)
    eos = chat.tokenizer.token_to_id(ENDOFTEXT)
    return [document(texts, chat, 0.9, eos) for _ in range(4000)]


def test_the_problems_are_always_the_same(source):
    again = demo.load()
    assert fingerprint(source.train + source.test) == fingerprint(again.train + again.test)
    # The base was built without these problems' numbers: changing them takes a new base.
    assert fingerprint(source.train + source.test).startswith("3f780eed06c6")


def test_every_solution_is_in_gsm8ks_form_and_its_sums_are_right(source):
    for problem in source.train + source.test:
        *lines, last = problem.answer.split("\n")
        steps = [STEP.search(line).groups() for line in lines]
        assert 2 <= len(steps) <= 4
        assert all(demo.OPERATORS[op](int(a), int(b)) == int(c) for a, op, b, c in steps)
        assert last == f"#### {steps[-1][3]}"


def test_no_two_problems_share_their_text_or_their_numbers(source):
    told = list(itertools.islice(demo.stories(demo.SEED), demo.TRAIN + demo.TEST))
    problems = source.train + source.test
    assert [s.question for s in told] == [p.question for p in problems]
    assert len({p.question for p in problems}) == len({s.key for s in told}) == len(problems)
    assert all(
        set(map(int, re.findall(r"\d+", s.question))) <= {*s.numbers} for s in told
    )  # so the key holds every number that is read


def test_the_categories_are_the_problems_own_and_even(source):
    counts = {kind: sum(p.category == kind for p in source.test) for kind in demo.KINDS}
    assert set(counts.values()) == {demo.TEST // len(demo.KINDS)}


def test_the_base_never_reads_a_problems_numbers_nor_an_answer_in_a_chat(read):
    chat, texts = ChatFormat.from_folder(SHIPPED["demo"]), Texts(6)
    told = itertools.islice(demo.stories(demo.SEED), demo.TRAIN + demo.TEST)
    assert not {s.key for s in told} & {texts.story().key for _ in range(5000)}
    for tokens in read:
        text = chat.tokenizer.decode(tokens, skip_special_tokens=False)
        assert not re.search(r"<<[^>]*[-+*/=]", text) and not ("####" in text and "=" in text)
        turns = re.findall(r"(?s)<\|im_start\|>(?:user|assistant)\n(.*?)<\|im_end\|>", text)
        assert len(turns) in (0, 2) and len(set(turns)) <= 1  # the assistant only repeats


def test_the_base_has_read_every_token_that_a_solution_takes(source, read):
    chat = ChatFormat.from_folder(SHIPPED["demo"])
    needed = {t for p in source.train + source.test for t in chat.encode(p.messages).tokens}
    assert needed <= set(itertools.chain(*read))


def test_the_base_ships_with_its_figures_in_two_megabytes():
    sizes = {path.name: path.stat().st_size for path in SHIPPED["demo"].iterdir()}
    assert sum(sizes.values()) <= 2_000_000 and sizes["tokenizer.json"] < 20_000
    right = json.loads((SHIPPED["demo"] / "build.json").read_text())["right"]
    assert min(right.values()) > 0.9, right


def test_the_flag_is_a_set_of_defaults_that_is_printed_and_that_others_override(capsys):
    presets = {"demo": train.DEMO}
    assert parse(train.TrainConfig, ["--demo"], "", presets) == train.TrainConfig(**train.DEMO)
    printed = capsys.readouterr().out
    values = {k: v[0] if k == "data" else v for k, v in train.DEMO.items()}
    assert all(f"--{k.replace('_', '-')} {v}" in printed for k, v in values.items())
    changed = parse(train.TrainConfig, ["--epochs", "7", "--demo"], "", presets)
    assert changed == train.TrainConfig(**train.DEMO | {"epochs": 7})


def outcome(out: Path, *flags: str) -> dict:
    """A shortened demo: trained, and evaluated on 40 of its test problems."""
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
