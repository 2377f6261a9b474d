"""Mutations of a JSON file, as another hand, another version or a bad disk may leave it."""

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import evaluate
import train
from errors import run_script
from files import MANIFEST, json_bytes
from report import __main__ as report
from run import export
from tests.campaign.harness import SHORT

SMALL = ["--limit", 3, "--max-new-tokens", 2, "--teacher-forced", 2]
CPU = ["--device", "cpu", "--precision", "fp32"]
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


def commands(place: Path) -> list[tuple]:
    """(main, flags) of each script, on a copy of `evaluated_run`."""
    base, run = ["--model", place / "base"], place / "run"
    adapter = ["--adapter", run / "best", *base]
    result = next(run.glob("evaluation/*")) / "result.json"
    short = [*SHORT, "--save-every", 0, "--max-steps", 10]
    return [
        (report.main, ["--run", run]),
        (train.main, [*base, "--data", place / "data", *short, *CPU, "--out", run]),
        (evaluate.main, [*adapter, *SMALL, *CPU]),
        (evaluate.main, ["--compare", result, result]),
        (export.main, [*adapter, "--portable", "--out", place / "out"]),
    ]


def mutate(place: Path, rng: random.Random) -> str:
    """Mutate one JSON file of a copy of `evaluated_run`; returns what was done."""
    found = [*(place / "run").rglob("*.json*"), *(place / "base").glob("*.json")]
    name = rng.choice(sorted({path.name for path in found}))
    path = rng.choice(sorted(path for path in found if path.name == name))
    data, what = mutated(path.read_bytes(), rng, lines=path.suffix == ".jsonl")
    path.write_bytes(data)
    manifest = path.parent / MANIFEST
    if manifest.exists() and path != manifest and rng.random() < 0.7:  # as a newer version would
        known = json.loads(manifest.read_bytes())
        known[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_bytes(json_bytes(known))
    return f"{path.relative_to(place)}: {what}"


def check_mutations(evaluated_run: Path, folder: Path, seeds: range, capsys) -> None:
    """Each script ends with 0, or in two lines with 1 or 2, whatever one JSON file holds."""
    for seed in seeds:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        place = Path(shutil.copytree(evaluated_run, folder / "copy"))
        what = f"seed {seed}, {mutate(place, random.Random(seed))}"
        for main, flags in commands(place):
            code = run_script(lambda main=main, flags=flags: main([str(flag) for flag in flags]))
            error = capsys.readouterr().err.rpartition("error: ")[2]
            assert code in (0, 1, 2), what
            assert code == 0 or len(error.splitlines()) == 2, (what, error)
