"""The table of data sources that have a name; any other `--data` is one's own."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from data import demo, gsm8k, multiple_choice, socratic
from data.own import is_hub_id, load_hub, load_path
from data.rows import SAME, Source
from errors import BadData, BadOption

TASKS = {
    "gsm8k": gsm8k.load,
    "gsm8k-socratic": socratic.load,
    "arc-easy": partial(multiple_choice.load, "arc-easy"),
    "arc-challenge": partial(multiple_choice.load, "arc-challenge"),
    "mmlu": partial(multiple_choice.load, "mmlu"),
    "hellaswag": partial(multiple_choice.load, "hellaswag"),
    "demo": demo.load,
}


def load_source(
    name: str, revision: str | None = None, columns: Mapping[str, str] = SAME
) -> Source:
    """The problems of a task in `TASKS`; or of a folder, a file or a Hub dataset (`own.py`), whose
    rows may name their columns otherwise (`columns`).
    """
    if name in TASKS:
        if columns:
            raise BadOption(f"--columns makes no sense for the task {name}", "leave it out")
        return TASKS[name](revision)
    if is_hub_id(name):
        return load_hub(name, revision, columns)
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):  # unlike pathlib's, False for names that no file can have
        raise BadData(
            f"--data {name} is neither a task ({', '.join(TASKS)}) nor a file or folder, nor a"
            " dataset of the Hub (owner/name)",
            "give a .jsonl or .parquet file, or a folder with train.jsonl and test.jsonl",
        )
    if revision is not None:
        raise BadData(f"--data-revision makes no sense for the path {name}", "leave it out")
    return load_path(path, columns)
