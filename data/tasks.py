"""The table of data sources that have a name; any other `--data` is a folder or a file."""

import os
from functools import partial
from pathlib import Path

from data import demo, gsm8k, multiple_choice
from data.rows import Source, load_path
from errors import BadData

TASKS = {
    "gsm8k": gsm8k.load,
    "arc-easy": partial(multiple_choice.load, "arc-easy"),
    "arc-challenge": partial(multiple_choice.load, "arc-challenge"),
    "mmlu": partial(multiple_choice.load, "mmlu"),
    "hellaswag": partial(multiple_choice.load, "hellaswag"),
    "demo": demo.load,
}


def load_source(name: str, revision: str | None = None) -> Source:
    """The problems of a task in `TASKS`, or of a folder or file in the forms of `rows.py`."""
    if name in TASKS:
        return TASKS[name](revision)
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):  # unlike pathlib's, False for names that no file can have
        raise BadData(
            f"--data {name} is neither a task ({', '.join(TASKS)}) nor a file or folder",
            "give a .jsonl or .parquet file, or a folder with train.jsonl and test.jsonl",
        )
    if revision is not None:
        raise BadData(f"--data-revision makes no sense for the path {name}", "leave it out")
    return load_path(path)
