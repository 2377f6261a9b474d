"""Progress bars: on a terminal they move; in a log file they leave one line per half minute.

A bar inside another one, such as a validation's in that of the steps, takes its line until it ends:
a notebook shows a cell's output as a terminal does, but cannot move the cursor up a line.
"""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm, but off a terminal it is quieter: work of under 5 seconds prints nothing."""
    if sys.stderr.isatty():
        return tqdm(items, **{"position": 0, **options})
    quiet = {"mininterval": 30, "delay": 5, "ascii": True, "ncols": 78}
    return _LogBar(items, **{**quiet, "file": _WholeLines(sys.stderr), **options})


def print_above_bars(text: str) -> None:
    """Print a line while a bar may be on the screen."""
    (tqdm if sys.stderr.isatty() else _LogBar).write(text)


class _LogBar(tqdm):
    """A bar in a log file, where nothing can be overwritten."""

    @classmethod
    def write(cls, s: str, file: TextIO | None = None, end: str = "\n", nolock: bool = False):
        print(s, end=end, file=file, flush=True)  # tqdm's own draws all bars again after it

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> None:
        """Draw the bar if that is due; tqdm's own also draws it whenever a caller wants it."""
        if self.disable:
            return
        begun = getattr(self, "start_t", None)  # None: the first drawing, of a bar without delay
        due = begun and max(begun + self.delay, self.last_print_t + self.mininterval)
        if begun is None or self._time() >= due:
            super().refresh(nolock, lock_args)


class _WholeLines:
    """A stream on which each drawing of a bar is a line of its own."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
