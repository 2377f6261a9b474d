"""Tests of custom data: the formats of rows, the files of a dataset that are read, and refusals."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import train
from data.custom import choose_files, is_hub_id, load_path, parse_columns
from data.rows import Message, parse_row
from data.tasks import load_source
from errors import BadData, BadOption
from tests.hub_stub import COMMITS, python
from tests.refusals import refused, training
from tests.toys import parquet

TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
ASKED = (Message("user", "1+1?"), Message("assistant", "2"))
CHAT = [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]
# name -> a row, and its messages
GOOD = {
    "question/answer": ({"question": "1+1?", "answer": "2", "id": 7}, ASKED),
    "prompt/completion": ({"prompt": "1+1?", "completion": "2"}, ASKED),
    "conversational": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ASKED),
    "several turns": (
        {"prompt": CHAT[:2], "completion": CHAT[2:]}, (Message("system", "Be brief."), *ASKED * 2)
    ),
    "instruction": ({"instruction": "1+1?", "output": "2"}, ASKED),
    "empty input": ({"instruction": "1+1?", "input": " ", "output": "2"}, ASKED),
    "input": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        (Message("user", "Add.\n\n1+1"), Message("assistant", "2")),
    ),
    "messages": ({"messages": CHAT}, (Message("system", "Be brief."), *ASKED * 2)),
    "a column of another format": ({"prompt": "x", "question": "1+1?", "answer": "2"}, ASKED),
    "null columns": ({"messages": None, "question": "1+1?", "answer": "2"}, ASKED),
}  # fmt: skip
BAD = {
    "two formats": (
        {"question": "q", "answer": "a", "messages": TURNS},
        "messages and question/a",
    ),
    "no format": (
        {"query": "q", "response\x1b": "a"},
        r"\(query, response\\x1b\) match no row format",
    ),
    "half a format": ({"prompt": "q", "response": "a"}, "completion is missing"),
    "half a conversation": (
        {"prompt": TURNS[:1], "completion": "2"},
        "is a list of messages",
    ),
    "ends with the user": ({"messages": CHAT[:-1]}, "ending with assistant"),
    "ShareGPT that ends with the user": (
        {"messages": [{"from": "human", "value": "x"}]},
        "ending with assistant",
    ),
    "input is a number": ({"instruction": "i", "input": 5, "output": "o"}, "input is int"),
}


@pytest.mark.parametrize("row, turns", GOOD.values(), ids=GOOD)
def test_a_row_of_each_format_gives_its_messages(row, turns):
    assert parse_row(row, "x:1").messages == turns


@pytest.mark.parametrize("row, reason", BAD.values(), ids=BAD)
def test_a_row_in_no_format_or_in_two_is_refused_with_the_reason(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(row, "x:1")


def test_renamed_columns_decide_the_format_and_are_read_under_their_new_names():
    row = {"problem": "1+1?", "solution": "2", "messages": TURNS, "prompt": "x", "completion": "y"}
    columns = parse_columns(("question=problem", "answer=solution"))
    assert parse_row(row, "x:1", columns).messages == ASKED
    assert parse_row(row, "x:1", parse_columns(("messages=messages",))).messages == ASKED
    with pytest.raises(ValueError, match="solution is missing"):
        parse_row({"problem": "1+1?", "answer": "2"}, "x:1", columns)


@pytest.mark.parametrize(
    "given", ["question", "question=", "=problem", "text=body", "answer=a,answer=b"]
)
def test_columns_that_are_no_mapping_or_mix_formats_are_refused(given):
    with pytest.raises(BadOption, match="does not say which column to use"):
        parse_columns(tuple(given.split(",")))
    with pytest.raises(BadOption, match="mixes the columns of two row formats"):
        parse_columns(("question=q", "output=o"))


def test_the_note_reports_formats_renamed_and_unused_columns(tmp_path):
    write(tmp_path / "a.jsonl", [row for row, _ in GOOD.values()][:3])
    note = load_path(tmp_path / "a.jsonl").note
    assert "question/answer (1 rows) and prompt/completion (2 rows); columns not used: id" in note
    write(tmp_path / "b.jsonl", [{"problem": "q", "answer": "a", "level": 1}])
    note = load_path(tmp_path / "b.jsonl", {"question": "problem"}).note
    assert (
        note
        == "question/answer; question read from problem; columns not used: level; files: b.jsonl"
    )


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Which files

LAYOUTS = {  # files -> training files and test files
    "train.jsonl test.jsonl README.md": ("train.jsonl", "test.jsonl"),
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet": (
        "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet", None,
    ),
    "data/train.parquet data/validation.parquet": ("data/train.parquet", "data/validation.parquet"),
    "main/train-0.jsonl main/dev.jsonl main/test.jsonl": ("main/train-0.jsonl", "main/test.jsonl"),
    "default/train/0000.parquet default/test/0000.parquet": (
        "default/train/0000.parquet", "default/test/0000.parquet",
    ),
    "alpaca_data.jsonl": ("alpaca_data.jsonl", None),
    "toy_train.jsonl toy_test.jsonl other.jsonl": ("toy_train.jsonl", "toy_test.jsonl"),
    "Train.jsonl Eval.jsonl": ("Train.jsonl", "Eval.jsonl"),
    "training.jsonl testing.jsonl": ("training.jsonl", "testing.jsonl"),
    "data-00000-of-00002.jsonl data-00001-of-00002.jsonl": (
        "data-00000-of-00002.jsonl data-00001-of-00002.jsonl", None,
    ),
    "a/train.jsonl b/test.jsonl": ("a/train.jsonl", None),
    "train-0.parquet .cache/train.parquet": ("train-0.parquet", None),
}  # fmt: skip
UNCLEAR = {
    "main/train-00000-of-00001.parquet socratic/train-00000-of-00001.parquet": (
        "several configurations: main, socratic", "--data x/y/main",
    ),
    "data/train_sft-00000-of-00001.parquet data/train_gen-00000-of-00001.parquet": (
        "train_gen.parquet; train_sft.parquet", "give the file itself",
    ),
    "train.jsonl train.parquet": ("train.jsonl; train.parquet", "give the file itself"),
    "test.jsonl": ("holds no train.jsonl or train.parquet among test.jsonl", "the remedy"),
    "train.txt": ("holds no train.jsonl or train.parquet", "the remedy"),
    "one.jsonl two.jsonl": ("holds no train.jsonl", "the remedy"),
}  # fmt: skip


@pytest.mark.parametrize("names", LAYOUTS)
def test_training_and_test_files_of_common_layouts_are_found(names):
    train_files, test_files = LAYOUTS[names]
    expected = {"train": train_files.split()}
    expected |= {"test": test_files.split()} if test_files else {}
    assert choose_files(names.split(), "x/y", "the remedy") == expected


@pytest.mark.parametrize("names", UNCLEAR)
def test_ambiguous_names_of_files_are_refused(names):
    cause, remedy = UNCLEAR[names]
    with pytest.raises(BadData) as refusal:
        choose_files(names.split(), "x/y", "the remedy")
    assert cause in refusal.value.cause and remedy in refusal.value.remedy


def test_a_name_is_a_hub_id_only_if_it_cannot_be_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "rows").mkdir(parents=True)
    assert is_hub_id("openai/gsm8k") and is_hub_id("openai/gsm8k/main")
    for name in (
        "mine/rows",
        "mine/rows.jsonl",
        "gsm8k",
        "/a/b",
        "./a",
        "~/a",
        "C:\\a/b",
        "../a/b",
    ):
        assert not is_hub_id(name), name


def test_all_shards_in_a_folder_are_read(tmp_path):
    for number in range(2):
        rows = [{"question": f"{number} + {n}?", "answer": "1"} for n in range(3)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / f"train-0000{number}-of-00002.parquet"
        )
    source = load_path(tmp_path)
    assert [p.question for p in source.train] == [f"{i} + {n}?" for i in (0, 1) for n in range(3)]
    assert len({p.id for p in source.train}) == 6


def test_in_a_folder_of_the_hubs_cache_the_main_snapshot_is_read(tmp_path):
    for commit, rows in (("old", 1), ("new", 2)):
        (tmp_path / "snapshots" / commit / "data").mkdir(parents=True)
        file = tmp_path / "snapshots" / commit / "data" / "train-00000-of-00001.jsonl"
        write(file, [{"question": "1+1?", "answer": "2"}] * rows)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("new")
    assert len(load_path(tmp_path).train) == 2


def test_a_link_to_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": "1+1?", "answer": "2"}])
    (tmp_path / "test.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(BadData, match="links to files that are not there: test.jsonl"):
        load_path(tmp_path)


@pytest.mark.parametrize("start", ["https://huggingface.co/datasets/", "hf://datasets/"])
def test_a_url_is_refused_with_the_id_on_the_hub(start):
    with pytest.raises(BadData) as refusal:
        load_source(f"{start}owner/name/resolve/main/train.jsonl")
    assert refusal.value.remedy == "give its id: --data owner/name"


# From the Hub

LOAD = """
import sys; from errors import run_script; from data.tasks import load_source
def main():
    source = load_source(sys.argv[1])
    print(source.commit, len(source.train), len(source.test), source.note, sep=" | ")
sys.exit(run_script(main))
"""


@pytest.fixture
def dataset_hub(hub, monkeypatch):
    """The stub Hub with toy/two, which has two configurations, and toy/one, which has one."""
    rows = [{"prompt": f"{n} + 1?", "completion": str(n + 1), "n": n} for n in range(5)]
    two = {f"{c}/{s}-00000-of-00001.parquet": parquet(rows) for c in "ab" for s in ("train", "dev")}
    one = {"data/train.jsonl": b"".join(json.dumps(r).encode() + b"\n" for r in rows), "x.bin": b""}
    for number, (name, files) in enumerate({"toy/two": two, "toy/one": one}.items(), 3):
        monkeypatch.setitem(COMMITS, f"datasets/{name}", str(number) * 40)
        hub.files[f"datasets/{name}"] = files
    return hub


def test_a_hub_dataset_is_fetched_and_read_and_later_found_offline(dataset_hub, tmp_path):
    place = {"home": tmp_path, "hub": dataset_hub.url}
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = python("-c", LOAD, "toy/one", **place, **environment)
        said = f"{'4' * 40} | 5 | 0 | prompt/completion; columns not used: n; files: train.jsonl"
        assert found.stdout.splitlines()[-1:] == [said], found.stderr
        found = python("-c", LOAD, "toy/two/b", **place, **environment)
        assert f"{'3' * 40} | 5 | 5 | " in found.stdout, found.stderr
    assert not any(".bin" in path or "/a/" in path for path in dataset_hub.requests)


def test_a_hub_dataset_that_is_ambiguous_or_missing_is_refused_in_two_lines(dataset_hub, tmp_path):
    place = {"home": tmp_path, "hub": dataset_hub.url}
    for name, cause in {
        "toy/two": "toy/two has several configurations: a, b",
        "toy/two/c": "toy/two/c holds no train.jsonl or train.parquet",
        "toy/none": "dataset toy/none was not found on the Hub",
    }.items():
        found = python("-c", LOAD, name, **place)
        assert found.returncode == 2 and found.stderr.startswith(f"error: {cause}"), found.stderr
        assert len(found.stderr.splitlines()) == 2
    assert not any("/resolve/" in path for path in dataset_hub.requests)


# Through train.py


def test_a_run_trains_on_renamed_columns_and_reports_them(tmp_path, checkpoint, capsys):
    rows = [{"problem": f"What is {n} + {n}?", "text": f"#### {2 * n}"} for n in range(40)]
    flags = f"--model {checkpoint} --data {write(tmp_path / 'a.jsonl', rows)} --max-steps 1"
    flags += f" --columns question=problem,answer=text --device cpu --out {tmp_path / 'run'}"
    train.main(flags.split())
    printed = capsys.readouterr().out
    assert "a.jsonl: question/answer; question read from problem, answer read from text" in printed
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert saved["columns"] == ["question=problem", "answer=text"]


ENDS_WITH_USER = {"messages": [*TURNS, TURNS[0]]}
REFUSED = {
    "--data x.jsonl": r"x.jsonl: 40 of 40 rows are bad: x.jsonl:1: its columns \(problem, text\)",
    "--data x.jsonl --columns question=q,answer=text": "x.jsonl:1: q is missing",
    "--data u.jsonl": "3 of 3 rows are bad: u.jsonl:1: the roles do not alternate",
    "--data empty.jsonl": "empty.jsonl has no rows",
    "--data data --columns text=x": "--columns text=x does not say",
    "--data demo --columns question=x": "--columns makes no sense for the task demo",
    "--data none/such.jsonl": "none/such.jsonl is neither a task",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_custom_data_that_cannot_be_read_is_refused_before_anything_starts(
    workspace, capsys, flags
):  # fmt: skip
    write(workspace / "x.jsonl", [{"problem": f"{n}?", "text": "1"} for n in range(40)])
    write(workspace / "u.jsonl", [ENDS_WITH_USER] * 3)
    write(workspace / "empty.jsonl", [])
    assert re.search(REFUSED[flags], refused(train.main, training(flags), capsys))
