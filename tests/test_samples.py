"""Tests of the samples in tests/samples/: they give what the complete published files give."""

import hashlib
import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.chat import ChatFormat
from data.encode import IGNORE, encode_problems
from data.rows import read_problems
from tests.make_samples import EVERY, TEXTS
from tests.published import REAL_TOKENIZER, SAMPLES, SHARED

# SHA-256 of the ids that the published tokenizer gives for all texts of the samples.
IDS = "98b8aa08a58faec3269dc83186d46c4428cf44616038814aab5240f53bac1e14"


def sample_texts() -> list[str]:
    lines = [
        line
        for name in EVERY
        for line in (SAMPLES / "gsm8k" / name).read_text("utf-8").splitlines()
    ]
    return TEXTS + [text for line in lines for text in json.loads(line).values()]


@pytest.mark.parametrize("folder", [SAMPLES / "qwen2-tokenizer", SHARED / "qwen2-tokenizer"])
def test_the_reduced_tokenizer_gives_the_ids_of_the_published_one(folder):
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in sample_texts()]
    assert max(map(max, ids)) > 150_000  # ids are as published, and not counted anew
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS
    assert (folder / "tokenizer.json").stat().st_size < 100_000 or folder.parent == SHARED


def test_of_gsm8k_rows_in_the_real_tokens_exactly_the_answer_and_its_end_are_supervised():
    chat = ChatFormat.from_folder(REAL_TOKENIZER)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(REAL_TOKENIZER / "tokenizer.json"))
    theirs.chat_template = chat.template.source.texts["default"]
    problems, bad = read_problems(SAMPLES / "gsm8k" / "train.jsonl")
    examples, left_out = encode_problems(problems, range(len(problems)), chat, 2048)
    assert (len(examples), bad, left_out) == (40, [], [])
    for problem, example in zip(problems, examples, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in problem.messages]
        ids = theirs.apply_chat_template(turns, return_dict=False)
        assert example.tokens.tolist() == ids
        supervised = [token for token in example.targets if token != IGNORE]
        assert theirs.decode(supervised) == problem.answer + "<|im_end|>"
