"""Progress bars: on a terminal they move; in a log file they leave one line per half minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm, but off a terminal it is quieter: work of under 5 seconds prints nothing."""
    if not sys.stderr.isatty():
        options = {"mininterval": 30, "delay": 5, "ascii": True, "ncols": 78, **options}
    return tqdm(items, **options)
