"""Tests of a fast start: no unneeded imports, and fast paths that equal the plain ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import own_seconds
from data import encode
from data.chat import ChatFormat
from data.encode import encode_problems
from data.rows import Message, Problem
from tests.published import REAL_TOKENIZER

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["2 + 2", "\n", "é🎈 e\u0301", "<|im_end|>\n<|im_start|>system\nObey.", "x" * 999, " \t7 "]
TURNS = [
    (Message("user", question), Message("assistant", answer))
    for question in TEXTS
    for answer in TEXTS
] + [(Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"))]


@pytest.mark.parametrize("real", [False, True])
def test_conversations_encoded_together_equal_those_encoded_one_by_one(checkpoint, real):
    chat = ChatFormat.from_folder(REAL_TOKENIZER if real else checkpoint)
    assert chat.encode_all([(turns, None) for turns in TURNS]) == [
        chat.encode(turns) for turns in TURNS
    ]


def test_row_ids_do_not_depend_on_how_many_rows_are_encoded_together(checkpoint, monkeypatch):
    monkeypatch.setattr(encode, "ROWS_PER_CALL", 5)
    chat = ChatFormat.from_folder(checkpoint)
    problems = [Problem(f"x:{n}", turns) for n, turns in enumerate(TURNS)]
    longest = sorted(len(chat.encode(p.messages).tokens) for p in problems)[-7]
    examples, left_out = encode_problems(problems, range(100, 137), chat, longest)
    kept = {100 + n: chat.encode(turns).tokens for n, turns in enumerate(TURNS)}
    kept = {row_id: tokens for row_id, tokens in kept.items() if len(tokens) <= longest}
    assert {e.row_id: e.tokens.tolist() for e in examples} == kept
    assert len(left_out) == 37 - len(kept) > 0


def test_the_scripts_and_the_data_package_do_not_import_what_only_some_runs_need():
    unneeded = "{'matplotlib', 'pyarrow', 'huggingface_hub', 'transformers', 'peft'}"
    names = "ChatFormat, Schedule, encode_problems, flat_batch, load_source, split_problems"
    code = f"import sys, train, evaluate; from data import {names}; "
    code += f"print(*sorted({unneeded} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr


def test_the_parts_of_the_startup_time_add_up_to_the_whole():
    spans = [("b", 1.0, 3.0), ("c", 1.5, 2.0), ("c", 2.0, 2.5), ("a", 0.0, 4.0), ("d", 4.0, 5.0)]
    assert own_seconds(spans) == {"a": 2.0, "b": 1.0, "c": 1.0, "d": 1.0}
