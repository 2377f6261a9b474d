"""Mutations of a JSON file, as another hand, another version or a bad disk may leave it."""

import copy
import json
import random
from typing import Any

VALUES = [
    None, -1, 0, 3, 2**63, 10**400, 1e308, float("nan"), -0.5, True, "", "x", "../x", "\0",
    "\ud800", "\x1b[2J\u202e", "x" * 5000, [], {}, [None], [[]], ["x", 1], {"a": 1}, [[[[[1]]]]],
]  # fmt: skip
CONTENTS = {  # of a whole file; None: its first bytes
    "torn": None,
    "empty": b"",
    "deep": b'{"a":' * 10_000,
    "deep lists": b"[" * 10_000,
    "a list": b"[1]",
    "a number": b"7",
    "no keys": b"{}",
    "a huge number": b'{"format": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": "{}".encode("utf-16"),
    "zeros": bytes(64),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [p for key in keys for p in places(value[key])]


def mutated(data: bytes, rng: random.Random, *, lines: bool) -> tuple[bytes, str]:
    """(content with one mutation, which one); `lines` if the file has one value a line."""
    if rng.random() < 0.25:
        name = rng.choice(list(CONTENTS))
        content = CONTENTS[name]
        if content is None:
            content = data[: rng.randrange(len(data) + 1)]
        return (content + b"\n" if lines else content), name
    texts = data.splitlines() if lines else [data]
    number = rng.randrange(len(texts))
    value = json.loads(texts[number])
    top = [place for place in places(value) if place[0] is value]
    found = top if rng.random() < 0.6 else places(value)  # inner ones are the most by far
    container, key = rng.choice(found)
    what = rng.choice(["missing", "added", *[copy.deepcopy(v) for v in rng.sample(VALUES, 6)]])
    if what == "missing":
        del container[key]
    elif what == "added" and isinstance(container, dict):
        container["of_a_newer_version"] = 1
    else:
        container[key] = what
    texts[number] = json.dumps(value).encode()
    return b"\n".join(texts) + b"\n", f"line {number} {key}: {what!r}"[:100]
