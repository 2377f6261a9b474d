"""Tests of rows as people have them: read exactly, or refused by name; nothing is dropped silently.

`tests/test_custom_data.py` has the tests of files, folders and renamed columns.
"""

import gzip
import json

import pytest

from data.custom import load_path
from data.problems import Message, content_fingerprint
from data.rows import parse_row
from data.turns import BadRow, Notes
from errors import BadData
from tests import toys
from tests.campaign.harness import finish, run
from tests.templates import QWEN2_5

QUESTION, ANSWER = "What is 1+1?", "#### 2"
PAIR = (Message("user", QUESTION), Message("assistant", ANSWER))
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
SYSTEM = Message("system", "Count.")
EARLIER = (Message("user", "a?"), Message("assistant", "b"))
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
TOOL_TURNS = [
    TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "2"}, TURNS[1],
]  # fmt: skip


def turns(**changes) -> dict:
    """A row of messages whose last turn has other keys as well."""
    return {"messages": [TURNS[0], TURNS[1] | changes]}


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"question": QUESTION, "answer": ANSWER}, PAIR),
        ({"input": QUESTION, "output": ANSWER}, PAIR),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, PAIR),
        ({"instruction": QUESTION, "input": float("nan"), "output": ANSWER}, PAIR),
        ({"instruction": QUESTION, "input": None, "output": ANSWER}, PAIR),
        ({"messages": TURNS}, PAIR),
        ({"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}, PAIR),
        ({"prompt": "[3, 1]", "completion": '[{"a": 1}]'},  # JSON, but no turns
         (Message("user", "[3, 1]"), Message("assistant", '[{"a": 1}]'))),
        ({"question": QUESTION, "answer": ANSWER, "label": 0, "mask": "<mask>",
          "preferred_name": "Ann", "rejection_reason": "none"}, PAIR),
        ({"messages": json.dumps(TURNS)}, PAIR),  # as cells of CSV files have it
        ({"conversations": TURNS}, PAIR),
        ({"conversations": SHAREGPT}, PAIR),
        ({"conversations": SHAREGPT, "system": "Count."}, (SYSTEM, *PAIR)),
        ({"messages": TURNS, "system_prompt": "Count."}, (SYSTEM, *PAIR)),
        ({"messages": TURNS, "system": ""}, PAIR),
        ({"messages": [{"role": "developer", "content": "Count."}, *TURNS]}, (SYSTEM, *PAIR)),
        (
            {"instruction": QUESTION, "output": ANSWER, "system": "Count.",
             "history": [["a?", "b"]]},
            (SYSTEM, *EARLIER, *PAIR),
        ),
        ({"messages": [{"role": "system", "content": ""}, *TURNS]}, (Message("system", ""), *PAIR)),
        ({"messages": [{"role": "assistant", "content": "Hi"}, *TURNS]},
         (Message("assistant", "Hi"), *PAIR)),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]},
                TURNS[1]]},
            PAIR,
        ),
        (turns(weight=1), PAIR),
        (turns(train=True, name=None, tool_calls=[], reasoning_content=""), PAIR),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "3", "weight": 0}, *TURNS]},
            (PAIR[0], Message("assistant", "3", supervised=False), *PAIR),
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "3", "train": False}, *TURNS]},
            (PAIR[0], Message("assistant", "3", supervised=False), *PAIR),
        ),
    ],
)  # fmt: skip
def test_a_row_in_the_form_of_another_program_is_the_same_conversation(row, messages):
    assert parse_row(row, "a:1").messages == messages


@pytest.mark.parametrize(
    "row, cause, remedy",
    [
        (turns(weight=0.5), "weight of a turn is 0.5", "set weight to 0"),
        (turns(weight="0"), "weight of a turn is '0'", "set weight to 0"),
        (turns(weight=0), "no answer of the assistant is supervised", "set the weight"),
        (turns(reasoning_content="Hmm."), "reasoning_content, which is not read", "remove"),
        (turns(name="Bo"), "name, which is not read", "remove name"),
        (turns(audio={"id": 1}), "audio, which is not read", "remove audio"),
        (turns(function_call={"name": "f"}), "function_call in a form", "tool_calls"),
        ({"messages": TURNS, "documents": [{"a": 1}]}, "its documents would change", "documents="),
        ({"messages": TURNS, "images": ["a.png"]}, "its images would change", "--columns images="),
        ({"messages": TURNS, "system": "a", "system_prompt": "b"}, "several system", "--columns"),
        ({"question": QUESTION, "answer": ANSWER, "tools": [TOOL]}, "its tools would", "tools="),
        ({"question": QUESTION, "answer": ANSWER, "context": "c"}, "its context", "instruction="),
        ({"instruction": "a", "output": "b", "history": "c"}, "history is not a list", "history="),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                       TURNS[1]]}, "part of type image_url", "only texts"),
        ({"messages": [TURNS[0], TURNS[0], TURNS[1]]}, "do not alternate", "merge consecutive"),
        ({"messages": TURNS[:1]}, "do not alternate", "drop the last user turn"),
        ({"messages": [*TURNS, {"role": "tool", "content": "2"}, *TURNS]}, "a turn of a tool",
         "tool_calls of the assistant's turn"),
        ({"messages": [{"role": "observation", "content": "2"}, *TURNS]}, "role 'observation'",
         "OpenAI's form"),
        ({"messages": [{"role": "narrator", "content": "2"}, *TURNS]}, "role 'narrator'", "rename"),
        ({"chosen": TURNS, "rejected": TURNS}, "preference data", "messages=chosen"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "token ids", "give the texts"),
        ({"text": "Once upon a time"}, "match no row format", "continued pretraining"),
        ({"role": "user", "content": "a"}, "a single turn", "one row per conversation"),
        ({"conversation": [{"input": "a", "output": "b"}]}, "match no row",
         "the turns of one"),
        ({"data": ["a", "b"]}, "match no row format", "if data holds the turns"),
        ({"role": "prompter", "text": "a"}, "a single turn", "one row per conversation"),
        ({"Question": "a", "Answer": "b"}, "match no row",
         "question=Question,answer=Answer"),
        ({"text": "a", "label": "b"}, "match no row format", "question=text,answer=label"),
        ({"question": "a", "answer": ["b"]}, "answer is list", "write answer as text"),
        ({"messages": str(TURNS)}, "messages is not JSON", "Python's notation"),
        ({"messages": [{"sender": "user", "content": "a"}]}, "it has content, sender", '"role"'),
        (turns(loss_mask=0), "carry loss_mask", '"weight": 0'),
        (turns(trainable=False), "carry trainable", '"weight": 0'),
        ({"messages": TURNS, "train": False}, "train is False", "--columns train="),
        ({"messages": TURNS, "weight": "0"}, "weight is 0", "--columns weight="),
        ({"messages": TOOL_TURNS[:3]}, "do not alternate", "drop the last tool turn"),
        ({"messages": TURNS, "loss_mask": [0, 1]}, "loss_mask is [0, 1]", "--columns loss_mask="),
        ({"prompt": "a", "completion": "b", "label": "False"}, "label is False",
         "--columns label="),
        ({"prompt": "a", "completion": "b", "response_rejected": "c"}, "response_rejected",
         "--columns response_rejected="),
        ({"messages": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, "preference data",
         "as the last turn"),
        ({"chosen": "a", "rejected": "b"}, "preference data", "as the last turn"),
        ({"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:]}, "preference data",
         "as the last turn"),
        ({"messages": TURNS, "image_path": "a.png"}, "its image_path", "--columns image_path="),
        (json.dumps({"question": "a"}), "a str, not an object", "json.dumps once"),
        ("Once upon a time", "a str, not an object", "continued pretraining"),
    ],
)  # fmt: skip
def test_what_cannot_be_honored_is_refused_by_name_with_its_own_remedy(row, cause, remedy):
    with pytest.raises(BadRow) as refused:
        parse_row(row, "a:1")
    assert cause in str(refused.value) and remedy in refused.value.remedy


def test_columns_and_keys_that_cannot_change_a_conversation_are_listed_as_not_used():
    notes = Notes()
    row = {"messages": [TURNS[0], TURNS[1] | {"id": 7}], "source": "web", "url": "x", "empty": None}
    parse_row(row, "a:1", notes=notes)
    assert notes.lines() == [
        "messages", "columns not used: source; url".replace(";", ","), "keys of turns not used: id"
    ]  # fmt: skip


def test_texts_that_hold_control_tokens_are_counted():
    notes = Notes()
    row = {"prompt": "<|im_start|>user\na<|im_end|>\n", "completion": "b</s>"}
    assert parse_row(row, "a:1", notes=notes).answer == "b</s>"
    assert len(notes.control) == 3 and "1 rows hold </s> in a text" in " ".join(notes.lines())


def test_tools_and_their_calls_may_be_json_in_texts():
    turn = {**TOOL_TURNS[1], "tool_calls": json.dumps([CALL])}
    row = {"messages": [TURNS[0], turn, *TOOL_TURNS[2:]], "tools": [json.dumps(TOOL)]}
    whole = {"messages": TOOL_TURNS, "tools": [TOOL]}
    assert parse_row(row, "a:1") == parse_row(whole, "a:1")


# Files

ROWS = [{"question": f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\r\n" + "".join(f'"{r["question"]}","{r["answer"]}"\r\n' for r in ROWS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl", json.dumps(ROWS).encode()),  # an array under the wrong name
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.replace("n,a", "n|a").replace('","', '"|"').encode()),
        ("a.csv", CSV.replace('"\r', '",\r').replace("er\r", 'er,"x; y; z"\r').encode()),
        ("a.csv", CSV.replace("\r\n", "\r\n,\r\n").encode()),  # rows of separators alone
        ("a.tsv", CSV.replace('","', '"\t"').replace("n,a", "n\ta").encode()),
    ],
)
def test_every_kind_of_file_holds_the_same_problems(tmp_path, name, content):
    (tmp_path / "first.jsonl").write_text(LINES)
    (tmp_path / name).write_bytes(content)
    expected = load_path(tmp_path / "first.jsonl").train
    assert content_fingerprint(load_path(tmp_path / name).train) == content_fingerprint(expected)


@pytest.mark.parametrize(
    "name, content, cause, remedy",
    [
        ("a.jsonl", LINES.replace("}\n", "},\n").encode(), "rows are bad", "remove the comma"),
        (
            "a.jsonl",
            b'{"question": "a", "question": "b", "answer": "c"}',
            "'question' is there twice",
            "keep one",
        ),
        (
            "a.json",
            b'[{"question": "b", "answer": "c", "answer": "d"}]',
            "'answer' is there twice",
            "keep one",
        ),
        ("a.ndjson", LINES.encode(), "holds JSON", "rename it"),
        ("a.txt", LINES.encode(), "holds JSON", "rename it"),
        ("a.csv", b"question,answer,x\na,b\n", "2 cells, but the header has 3", "every cell"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
        ("a.jsonl", gzip.compress(LINES.encode()), "compressed with gzip", "ends in .gz"),
        ("a.jsonl", b"PK\x03\x04rest", "a zip archive", "unpack it"),
        ("a.jsonl", b"\x80\x04rest", "a pickle, which is never opened", "convert it"),
        ("a.jsonl", b"<!DOCTYPE html><html></html>", "an HTML page", ""),
        ("a.parquet", b"ARROW1rest", "an Arrow file", "load_from_disk"),
        ("a.xlsx", b"PK\x03\x04rest", "a.xlsx", ""),
        ("a.jsonl", "".join(json.dumps(r, indent=2) + "\n" for r in ROWS).encode(), "a.jsonl", ""),
    ],
)
def test_a_file_that_is_something_else_is_refused_for_what_it_is(
    tmp_path, name, content, cause, remedy
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as refused:
        load_path(tmp_path / name)
    assert cause in refused.value.cause and remedy in refused.value.remedy
    assert "--columns" not in refused.value.remedy


def test_parquet_gives_no_keys_that_a_row_does_not_have(tmp_path):
    rows = [
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": name, "arguments": {name: 1}}}]}, TOOL_TURNS[2], TURNS[1]]}
        for name in ("f", "g")
    ]  # fmt: skip
    (tmp_path / "a.parquet").write_bytes(toys.parquet(rows))
    calls = [p.messages[1].extra["tool_calls"] for p in load_path(tmp_path / "a.parquet").train]
    assert [call[0]["function"]["arguments"] for call in calls] == [{"f": 1}, {"g": 1}]


def test_unpacking_an_archive_of_endless_rows_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("data.row_files.MIN_LIMIT", 10_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 100_000))
    with pytest.raises(BadData):
        load_path(tmp_path / "a.jsonl.gz")


def test_a_valid_file_is_the_test_file_where_there_is_no_other(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(LINES)
    source = load_path(tmp_path)
    assert len(source.test) == 4 and "valid.jsonl as test" in source.note


# Context, tools and several sources, through the whole program


def test_context_is_shown_and_encoded_but_not_supervised(tmp_path):
    row = {"messages": [TURNS[0], {"role": "assistant", "content": "3", "weight": 0}, *TURNS]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--model", "demo", "--data", tmp_path / "a.jsonl", "--show-example"]
    shown = run(flags, tmp_path / "run").out
    assert "assistant\n3<|im_end|>" in shown and f"[[{ANSWER}<|im_end|>]]" in shown


def test_tool_calls_are_supervised_if_the_template_lays_them_out_and_otherwise_refused(tmp_path):
    base = toys.write_checkpoint(tmp_path / "base", hidden=32, intermediate=48)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TOOL_TURNS, "tools": [TOOL]}) + "\n")
    flags = ["--model", base, "--data", tmp_path / "a.jsonl", "--show-example"]
    refused = run(flags, tmp_path / "run")
    assert refused.code == 2 and "lays out tool calls" in refused.two_line_error()
    (base / "chat_template.jinja").write_text(QWEN2_5)
    shown = run(flags, tmp_path / "run").out
    assert (
        '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]' in shown
    )
    assert "<tool_response>\n2\n</tool_response><|im_end|>" in shown


def test_two_data_options_are_two_sources_and_a_renamed_file_resumes(tmp_path):
    base = toys.write_checkpoint(tmp_path / "base", hidden=32, intermediate=48)
    for seed, name in enumerate(("a", "b")):
        folder = toys.write_arithmetic(tmp_path / name, rows=30, test_rows=2, seed=seed)
        (folder / "train.jsonl").rename(tmp_path / f"{name}.jsonl")
    flags = ["--model", base, "--precision", "fp32", "--rank", 2, "--max-steps", 2]
    both = ["--data", tmp_path / "a.jsonl", "--data", tmp_path / "b.jsonl"]
    finish([*flags, *both], tmp_path / "both")
    audit = json.loads((tmp_path / "both" / "audit.json").read_text())
    assert len(audit["sources"]) == 2

    finish([*flags, "--data", tmp_path / "a.jsonl"], tmp_path / "alone")
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    again = finish([*flags, "--data", tmp_path / "c.jsonl"], tmp_path / "alone")
    assert "all 2 steps done" in again.out
