"""Tests of conversations with several turns: what is supervised, and how they are evaluated."""

import json
from dataclasses import replace

import pytest

import evaluate
from data.chat import ChatFormat
from data.encode import IGNORE, encode_problems
from data.rows import Message, Problem, read_problems
from data.socratic import parse_turns
from data.split import split_problems
from evaluation.answers import GenerationSettings, answers, next_turn
from model.generate import generate
from tests import toys
from tests.evaluations import settings
from tests.hub_stub import python
from tests.published import GSM8K
from tests.toys import parquet

ROBE = {
    "question": "A robe takes 2 bolts. How many?",
    "answer": "How many white? ** 2/2=<<2/2=1>>1\nHow many in all? ** 2+1=3\n#### 3",
}


def turns_of(answer: str, question: str = "Q?") -> list[str]:
    problem = parse_turns({"question": question, "answer": answer}, "x:1")
    assert [m.role for m in problem.messages] == ["user", "assistant"] * (
        len(problem.messages) // 2
    )
    return [m.content for m in problem.messages]


# Turns


def test_each_sub_question_becomes_a_turn_and_the_last_ends_with_the_answer():
    problem = parse_turns(ROBE, "x:1")
    assert [m.content for m in problem.messages] == [
        "A robe takes 2 bolts. How many?\nHow many white?", "2/2=<<2/2=1>>1",
        "How many in all?", "2+1=3\n#### 3",
    ]  # fmt: skip
    assert problem.question == ROBE["question"] and problem.answer == "2+1=3\n#### 3"


def test_irregular_rows_keep_every_step_and_drop_sub_questions_without_one():
    assert turns_of("a? ** 1\nmore\nb? ** 2 ** 3\n#### 5") == [
        "Q?\na?",
        "1\nmore",
        "b?",
        "2 ** 3\n#### 5",
    ]
    assert turns_of("a? ** \na? ** 1\nb? ** \n#### 1") == ["Q?\na?", "1\n#### 1"]
    for answer, reason in {
        "a? ** 1": "does not end with", "1\na? ** 1\n#### 1": "does not begin",
        "#### 1": "no sub-question", "a? ** \n#### 1": "no sub-question",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            turns_of(answer)


def test_every_published_test_row_has_the_plain_rows_question_and_loses_no_step():
    socratic, bad = read_problems(GSM8K / "test_socratic.jsonl", parse_turns)
    plain, _ = read_problems(GSM8K / "test.jsonl")
    rows = [json.loads(line) for line in (GSM8K / "test_socratic.jsonl").open()]
    assert not bad and [p.question for p in socratic] == [p.question for p in plain]
    assert split_problems(socratic, 0.1) == split_problems(plain, 0.1)
    for p, row in zip(socratic, rows, strict=True):
        lines = [line.split(" ** ") for line in row["answer"].split("\n")[:-1]]
        steps = [step for _, step in lines if step]
        said = [m.content for m in p.messages if m.role == "assistant"]
        assert said == [*steps[:-1], steps[-1] + "\n" + row["answer"].split("\n")[-1]]


def test_a_problem_written_as_a_row_is_read_as_the_same_problem(tmp_path):
    problem = parse_turns(ROBE, "x:1")
    (tmp_path / "v.jsonl").write_text(json.dumps(problem.row()) + "\n")
    ((again,), _) = read_problems(tmp_path / "v.jsonl")
    assert (again.messages, again.question) == (problem.messages, problem.question)


def test_only_the_steps_and_their_end_tokens_are_supervised(checkpoint):
    chat = ChatFormat.from_folder(checkpoint)
    problem = parse_turns(ROBE, "x:1")
    (example,), _ = encode_problems([problem], [0], chat, 2048)
    tokens, targets = (
        [],
        [],
    )  # one text after another; targets are shifted at the end
    newline, start, end = chat.plain("\n"), [chat.start], [chat.end]
    for role, text in [("system", toys.SYSTEM), *(m[:2] for m in problem.messages)]:
        if role == "assistant":
            head, learned = start + chat.plain("assistant\n"), chat.plain(text) + end
        else:
            head, learned = start + chat.plain(f"{role}\n{text}") + end, []
        tokens += head + learned + newline
        targets += [IGNORE] * len(head) + learned + [IGNORE] * len(newline)
    assert example.tokens.tolist() == tokens
    assert example.targets.tolist() == [*targets[1:], IGNORE]
    assert targets.count(chat.end) == 2


def test_only_its_own_configuration_is_fetched_from_the_hub(hub, tmp_path):
    files = {f"socratic/{s}-00000-of-00001.parquet": parquet([ROBE] * 3) for s in ("train", "test")}
    hub.files["datasets/openai/gsm8k"] |= files
    load = "from data.tasks import load_source; s = load_source('gsm8k-socratic');"
    load += "print(s.commit, len(s.train), len(s.test), len(s.train[0].messages))"
    found = python("-c", load, home=tmp_path, hub=hub.url)
    assert found.stdout.split()[-4:] == ["2" * 40, "3", "3", "4"], found.stderr
    assert not any("/main/" in path for path in hub.requests)


# Asked turn by turn


def conversation(turns: int, id: str) -> Problem:
    pairs = [(f"{id} asks {n}", f"gold {n}") for n in range(turns)]
    roles = ("user", "assistant")
    return Problem(id, tuple(Message(r, t) for pair in pairs for r, t in zip(roles, pair)))


PROBLEMS = [conversation(turns, f"p{i}") for i, turns in enumerate((3, 1, 2, 3, 1))]


def slowly(model, chat, problem: Problem, asking: GenerationSettings, place: int) -> list[str]:
    """Each turn by itself, after the user's turns and the answers given before."""
    messages, said = [], []
    for user in problem.messages[::2]:
        messages.append(user)
        decoding = replace(asking.decoding, seed=asking.decoding.seed + len(said) * 2**40)
        prompt = chat.prompt(tuple(messages))
        (answer,) = generate(model, [prompt], decoding, sequence_ids=[place])
        said.append(chat.decode(answer.tokens))
        messages.append(Message("assistant", said[-1]))
    return said


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("samples, temperature", [(1, 0.0), (2, 1.0)])
def test_each_turn_sees_the_models_own_answers(model, chat, batch_size, samples, temperature):
    asking = settings(6, samples=samples, temperature=temperature, seed=3, batch_size=batch_size)
    given = {(c.id, c.sample): c for c in answers(model, chat, PROBLEMS, asking)}
    assert len(given) == len(PROBLEMS) * samples
    for row, problem in enumerate(PROBLEMS):
        for sample in range(samples):
            c = given[problem.id, sample]
            said = slowly(model, chat, problem, asking, row * samples + sample)
            assert c.text == said[-1] and c.turns == (said if len(said) > 1 else [])
    assert len({c.text for c in given.values()}) > 3


def test_the_gold_answers_of_earlier_turns_change_nothing(model, chat):
    asking = settings(6)
    other = [Problem(p.id, tuple(m if m.role == "user" else Message("assistant", "no")
                                 for m in p.messages)) for p in PROBLEMS]  # fmt: skip
    texts = [
        {c.id: (c.text, c.turns) for c in answers(model, chat, some, asking)}
        for some in (PROBLEMS, other)
    ]
    assert texts[0] == texts[1]


def test_what_is_shown_before_a_turn_holds_no_gold():
    *shown, asked_for = next_turn(PROBLEMS[0], ["own 0"]).messages
    expected = [("user", "p0 asks 0"), ("assistant", "own 0"), ("user", "p0 asks 1")]
    assert shown == [Message(*turn) for turn in expected]
    assert asked_for == Message("assistant", "gold 1")


def test_finished_conversations_are_not_repeated_and_the_others_are_unchanged(model, chat):
    asking = settings(5, samples=2, temperature=1.0, batch_size=1)
    whole = {(c.id, c.sample): (c.text, c.turns)
             for c in answers(model, chat, PROBLEMS, asking)}  # fmt: skip
    done = {("p0", 1), ("p1", 0), ("p2", 0)}
    rest = answers(model, chat, PROBLEMS, asking, done=done)
    rest = {(c.id, c.sample): (c.text, c.turns) for c in rest}
    assert rest == {key: value for key, value in whole.items() if key not in done}


def test_poll_can_stop_generation_in_the_middle_of_a_conversation(model, chat):
    looks = []

    def poll():
        looks.append(1)
        if len(looks) == 20:
            raise KeyboardInterrupt

    asking = settings(6, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        list(answers(model, chat, PROBLEMS, asking, poll=poll))
    assert len(looks) == 20


def test_an_evaluation_scores_the_last_turn_and_keeps_them_all(lively_checkpoint, tmp_path):
    rows = [json.dumps({"messages": [m.row() for m in p.messages]}) for p in PROBLEMS[:3]]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    flags = f"--model {lively_checkpoint} --data {tmp_path} --out {tmp_path / 'out'} --device cpu"
    evaluate.main([*flags.split(), "--max-new-tokens", "4", "--precision", "fp32"])
    (log,) = (tmp_path / "out").glob("evaluation/*/base.jsonl")
    kept = {line["id"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert [len(kept[f"test.jsonl:{n}"]["turns"]) for n in (1, 2, 3)] == [3, 0, 2]
    assert kept["test.jsonl:1"]["text"] == kept["test.jsonl:1"]["turns"][-1]
