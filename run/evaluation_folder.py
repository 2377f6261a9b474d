"""The folder of an evaluation. Equal settings have one folder, in which a repeated command resumes.

out/qwen2-0.5b-instruct-gsm8k/evaluation/test-4c91584f/
    settings.json   everything that an answer depends on, and the program
    base.jsonl, tuned.jsonl     one line per answer
    result.json     metrics, comparison, transcripts
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from errors import BadRun
from files import read_json, write_json
from run.device import conditions
from run.folder import check_place
from run.identity import (
    changed_conditions,
    check_result,
    is_same_program,
    numbered,
    program,
    program_text,
)


def folder_of_settings(home: Path, kind: str, settings: dict[str, Any]) -> Path:
    """The folder under `home` for these settings alone: its name is `kind` and their hash."""
    places = ("base", "base_commit", "adapter")  # where something is, which no answer depends on
    named = {k: v for k, v in settings.items() if k not in places}
    code = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return home / "evaluation" / f"{kind}-{code}"


def begin(folder: Path, settings: dict[str, Any], *, fresh: bool) -> tuple[Path, dict[str, Any]]:
    """(folder, settings with the program) of an evaluation by the code that runs now.

    The folder is `folder`, or if `fresh` the first of folder, folder-2, folder-3, ... without a
    result and without answers by other code. Answers that other code began are kept, and a line
    says so. Raises BadRun if the folder holds a whole result of other code, or cannot be written.
    """

    def is_taken(candidate: Path) -> bool:
        found = read_settings(candidate)
        return bool(found) and ((candidate / "result.json").exists() or not is_same_program(found))

    folder = numbered(folder, is_taken) if fresh else folder
    found = read_settings(folder)
    earlier = found.get("earlier_programs", [])
    if found and not is_same_program(found):
        if (folder / "result.json").exists():
            check_result(f"the result in {folder} was made", found)
        was, now = program_text(found), program_text(program())
        print(f"resuming in {folder}, although the code was {was}, is {now}")
        earlier = [*earlier, was]
    check_place(folder)
    return folder, settings | program() | ({"earlier_programs": earlier} if earlier else {})


def record_session(folder: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Write the settings with the session's conditions, and print what has changed since an earlier
    session; returns what was written.
    """
    earlier, now = read_settings(folder), conditions(device)
    changes = changed_conditions(earlier.get("conditions"), now)
    for change in changes:
        print(f"resuming, {change}")
    known = earlier.get("changes", [])
    known = known if isinstance(known, list) else []
    settings = settings | {"conditions": now, "changes": [*known, *changes]}
    write_json(folder / "settings.json", settings)
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """`settings.json`; {} without one. BadRun if it cannot be read."""
    path = folder / "settings.json"
    return read_json(path, BadRun, f"delete {folder}") if path.exists() else {}
