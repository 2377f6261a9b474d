"""The built-in tasks, by name. Any other `--data` is custom data."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import demo, gsm8k, multiple_choice, socratic
from data.custom import is_hub_id, load_hub, load_path
from data.row_files import SUFFIXES
from data.rows import NOT_RENAMED, Columns, Source
from errors import BadData, BadOption
from files import user_path

Scorer = Callable[[str, str], bool]  # (completion, gold answer) -> whether it is correct


@dataclass(frozen=True)
class BuiltIn:
    """How a built-in task is loaded, and how its answers are scored."""

    load: Callable[[str | None], Source]  # takes the revision of its dataset
    from_hub: bool = True
    # The task's own scorers by name, the headline first; None: its answers decide how it is judged.
    scorers: Mapping[str, Scorer] | None = None


HUB_URL = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/|hf://)datasets/"
    r"([\w.-]+/[\w.-]+).*"
)

TASKS = {
    "gsm8k": BuiltIn(gsm8k.load),
    "gsm8k-socratic": BuiltIn(socratic.load),
    **{name: BuiltIn(partial(multiple_choice.load, name)) for name in multiple_choice.CHOICE_TASKS},
    "demo": BuiltIn(demo.load, from_hub=False),
}


def is_on_hub(name: str) -> bool:
    """Whether a source named in `--data` comes from the Hub, and so has revisions."""
    return TASKS[name].from_hub if name in TASKS else is_hub_id(name)


def load_source(name: str, revision: str | None = None, columns: Columns = NOT_RENAMED) -> Source:
    """Load a built-in task, a file, a folder or a dataset on the Hub.

    `columns` maps a row format's columns to the names they have in custom data. Raises BadData for
    a source that does not exist or cannot be read, BadOption for `columns` of a built-in task.
    The `revision` "" means that the source of the run was not a repository on the Hub.
    """
    if name in TASKS:
        if columns:
            raise BadOption(f"--columns makes no sense for the task {name}", "leave it out")
        return TASKS[name].load(revision or None)
    if is_hub_id(name) and revision == "":
        raise BadData(f"the run's data, {name}, which was a folder, is gone", "give it with --data")
    if is_hub_id(name):
        return load_hub(name, revision, columns)
    path = Path(user_path("--data", name))
    if not os.path.exists(path):  # False, unlike pathlib's, for names that no file can have
        if "://" in name:
            found = HUB_URL.fullmatch(name)
            raise BadData(
                f"--data {name} is a URL, neither a file or folder nor a dataset on the Hub",
                f"give its id: --data {found[1]}" if found else "download it, and give the file",
            )
        if os.path.islink(path):
            raise BadData(
                f"--data {name} is a link to a file that is not there", "copy the file itself"
            )
        raise BadData(
            f"--data {name} is neither a task ({', '.join(TASKS)}) nor a file or folder, nor a"
            " dataset on the Hub (owner/name)",
            f"give a {', '.join(SUFFIXES)} file, or a folder with train.jsonl and test.jsonl",
        )
    if revision:
        raise BadData(f"--data-revision makes no sense for the path {name}", "leave it out")
    return load_path(path, columns)
