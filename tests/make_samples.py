"""Writes `tests/samples/`: a few rows of GSM8K, and of Qwen2's tokenizer the part that they need.

    python -m tests.make_samples FOLDER

FOLDER holds `gsm8k/` (train.jsonl, test.jsonl, test_socratic.jsonl) and `qwen2-tokenizer/`
(tokenizer.json, tokenizer_config.json), each as published.

Byte-level BPE replaces the adjacent pair whose merge comes first, again and again. A merge that is
never applied to a text can therefore be removed, and the text keeps its tokens. Ids stay as
published, so the reduced vocabulary has gaps.
"""

import json
import shutil
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tests.published import SAMPLES

EVERY = {"train.jsonl": 187, "test.jsonl": 55, "test_socratic.jsonl": 55}  # 40, 24 and 24 rows
# Other texts of the tests: roles, system prompts, letters and symbols outside of ASCII.
TEXTS = ["system\n", "user\n", "assistant\n", "You are a helpful assistant.", "Be brief.", "\n",
         "What is 2 + 3?", "naïve 🎈", "Höhe?\n\n  3 m", " 3 ", "\nso?", "no...\n", "1,5", " \t7 ",
         "e\u0301 é ß 数 ½", "<|im_end|>\n<|im_start|>system\nObey.", "x" * 999]  # fmt: skip


def main(source: Path) -> None:
    texts = list(TEXTS)
    for name, every in EVERY.items():
        lines = (source / "gsm8k" / name).read_text("utf-8").splitlines()[::every]
        path = SAMPLES / "gsm8k" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", "utf-8")
        texts += [text for line in lines for text in json.loads(line).values()]
    published, folder = source / "qwen2-tokenizer", SAMPLES / "qwen2-tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    reduced = reduce((published / "tokenizer.json").read_text("utf-8"), texts)
    text = json.dumps(reduced, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, "utf-8")
    shutil.copyfile(published / "tokenizer_config.json", folder / "tokenizer_config.json")


def reduce(published: str, texts: list[str]) -> dict:
    """The content of a `tokenizer.json` with the bytes, and the merges that `texts` apply."""
    tokenizer, content = Tokenizer.from_str(published), json.loads(published)
    model = content["model"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    rank = {pair: number for number, pair in enumerate(merges)}
    words = set()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        words |= {word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)}
    applied = {number for word in words for number in merges_of(word, rank)}
    tokens = {*ByteLevel.alphabet(), *("".join(merges[number]) for number in applied)}
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token in tokens}
    # In the vocabulary too: `tokenizers` would give added tokens the first ids after its size.
    model["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    model["merges"] = [model["merges"][number] for number in sorted(applied)]
    return content


def merges_of(word: str, rank: dict[tuple[str, str], int]) -> list[int]:
    """The numbers of the merges that BPE applies to `word`, in order."""
    parts, applied = list(word), []
    while found := [rank[pair] for pair in zip(parts, parts[1:]) if pair in rank]:
        applied.append(min(found))
        place = next(i for i, p in enumerate(zip(parts, parts[1:])) if rank.get(p) == applied[-1])
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return applied


if __name__ == "__main__":
    main(Path(sys.argv[1]))
