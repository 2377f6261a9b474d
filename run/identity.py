"""What a run or an evaluation is of: base, data, adapter and program, each known by its content.

Paths, names, commits and devices only say where things are. They are recorded, and may change when
a run resumes: a copy on another disk is the same base, and a renamed file the same data. Without
torch.
"""

import functools
import hashlib
import importlib.metadata
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errors import BadRun

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "evaluation", "lora", "model", "report", "run")
SCRIPTS = ("train", "evaluate", "errors", "files", "hub", "progress_bar", "terminal", "typed")

# Options that may differ when a run resumes: where it is, its length, how often it validates and
# saves, what changes no bit and only where it is held (--checkpoint-activations, --shard), and what
# only rounds differently (--compile, --cuda-graphs).
FREE = {"out", "fresh", "dry_run", "device", "epochs", "max_steps", "patience", "evals_per_epoch",
        "save_every", "max_minutes", "price_per_hour", "compile", "cuda_graphs",
        "checkpoint_activations", "shard", "track"}  # fmt: skip
# What something is -> where it was found, which may differ if the content does not.
PLACES = {
    "base_sha256": {"model", "revision", "base_commit"},
    "data_content": {"data", "data_revision", "data_commit", "data_sha256", "columns"},
    "from_adapter_sha256": {"from_adapter"},
    "chat_template_sha256": {"chat_template"},
}
STEP = ("batch_size", "grad_accum", "ranks")  # their product is the number of sequences of a step
NOT_BIT_FOR_BIT = "no longer bit for bit"
UNSPOKEN = {"base_commit", "data_commit", "data_sha256"}  # follow from others, or are not readable


@functools.cache
def program() -> dict[str, str | None]:
    """The code that runs: SHA-256 of the product's own Python files, version, `git describe`.

    The version and git's description are None where nothing tells them. Only the hash says whether
    two programs are the same: a commit may change nothing but a text.
    """
    paths = [ROOT / f"{name}.py" for name in SCRIPTS]
    paths += [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(text)}\n".encode() + text)
    return {
        "program_sha256": digest.hexdigest(),
        "program_version": _version(),
        "program_git": _git_describe(),
    }


def _version() -> str | None:
    try:
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        return re.search(r'^version = "(.+)"', text, re.MULTILINE)[1]
    except (OSError, TypeError):  # installed, without its pyproject.toml
        pass
    try:
        return importlib.metadata.version("plain-lora")
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_describe() -> str | None:
    if not (ROOT / ".git").exists():  # git would describe the repository around this folder
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags"]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def is_same_program(record: Mapping[str, Any]) -> bool:
    """Whether `record`, which holds what `program` returned, was written by the code that runs now.

    Versions that did not record their code count as other code.
    """
    return record.get("program_sha256") == program()["program_sha256"]


def program_text(record: Mapping[str, Any]) -> str:
    """For people: `version 0.1.0, v0.1.0-3-gde08962, code 3f2a77b0c1d2`."""
    version, git, code = (record.get(f"program_{k}") for k in ("version", "git", "sha256"))
    parts = [version and f"version {version}", git, code and f"code {code[:12]}"]
    return ", ".join(filter(None, parts)) or "an earlier version"


def check_result(what: str, record: Mapping[str, Any]) -> None:
    """Raise BadRun if `what`, a finished run or evaluation, was made by other code."""
    if is_same_program(record):
        return
    raise BadRun(
        f"{what} by other code: {program_text(record)}; the code is now {program_text(program())}",
        "add --fresh to repeat it with this code in a new folder, or go back to the other"
        " code to keep this result",
    )


def numbered(folder: Path, is_taken: Callable[[Path], bool]) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that is not taken."""
    number, candidate = 1, folder
    while is_taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what makes them two runs, what may change), each such as "epochs was 3, is 5".

    Both map the names of options and of their identity to values. An option that has become a list
    counts as equal to a list of one.
    """
    different = {
        key for key in old.keys() | new.keys() if new.get(key) not in (old.get(key), [old.get(key)])
    }
    free = set(FREE)
    for content, places in PLACES.items():
        if old.get(content) is None:
            free.add(content)  # an earlier version did not record it: the places must be the same
        elif content not in different:
            free |= places
        elif different & places:
            free.add(content)  # the names of the places say more to people than the hash
    if _sequences(old) == _sequences(new):
        free.update(STEP)
    text = {key: f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(different)}
    refused = [text[key] for key in text if key not in free]
    return refused, [text[key] for key in text if key in free and key not in UNSPOKEN]


def changed_conditions(old: Any, new: Any) -> list[str]:
    """A line if a run continues in other `conditions`; none where the old ones are not known."""
    known = old if isinstance(old, dict) else {}
    changed = [f"{k} {known[k]} -> {v}" for k, v in (new or {}).items() if known.get(k, v) != v]
    return [f"{NOT_BIT_FOR_BIT}: {', '.join(changed)}"] if changed else []


def _sequences(values: Mapping[str, Any]) -> float:
    """Sequences in a step; NaN, which equals nothing, for values that no run has."""
    factors = [values.get(name, 1) for name in STEP]
    return math.prod(factors) if all(type(factor) is int for factor in factors) else math.nan
