"""The one way to the terminal: whatever a script prints goes through a `Screen`.

Names of files and columns, answers of models and messages of libraries are other people's texts,
which could move the cursor, or hide or reorder what is printed around them. So a `Screen` shows
every invisible character as its escape: `\\x1b`, `\\u202e`. A stream that can no longer be written,
because its reader is gone or its disk is full, loses its output and does not end the program.
"""

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

# What progress bars begin a drawing with: back to the start of the line, or up to another bar's.
DRAWING = re.compile(r"\r|(?:\x1b\[A)+|")


def percent(share: float, digits: int = 1) -> str:
    """`97.5 %` for 0.975."""
    return f"{100 * share:.{digits}f} %"


def printable(text: str, keep: str = "") -> str:
    """`text` with invisible characters as their escapes, except for those in `keep`.

    Invisible are control characters, those that reverse the direction of a text or have no width,
    unassigned ones, and halves of surrogate pairs; all kinds of spaces are kept.
    """
    if text.isprintable():
        return text

    def shown(c: str) -> str:
        is_visible = c.isprintable() or unicodedata.category(c) == "Zs" or c in keep
        return c if is_visible else c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


class Screen:
    """An output stream on which all text is `printable`; `error` says why output was lost, if any.

    Args:
        bars: progress bars draw on it, so that it moves the cursor where a drawing begins.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False):
        self.stream, self.bars = stream, bars
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        start = DRAWING.match(text)[0] if self.bars else ""
        with self._losses_noted():
            self.stream.write(start + printable(text[len(start) :], "\n\t"))
        return len(text)

    def flush(self) -> None:
        with self._losses_noted():
            self.stream.flush()

    @contextlib.contextmanager
    def _losses_noted(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = self.error or error
            with (
                contextlib.suppress(OSError, ValueError),
                open(os.devnull, "w", encoding="utf-8") as nowhere,
            ):
                os.dup2(nowhere.fileno(), self.stream.fileno())  # or the next flush fails again

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_screens() -> None:
    """Put stdout and stderr behind a `Screen` each; one that the shell closed (`>&-`) goes nowhere.

    Otherwise the next file that is opened would get the number of the closed one, and with it what
    libraries print.
    """
    os.environ.setdefault("PYTHON_COLORS", "0")  # of argparse and tracebacks: escapes, too
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, Screen):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")  # for characters that it lacks
            setattr(sys, name, Screen(stream, bars=name == "stderr"))


def lost_output() -> Exception | None:
    """Why something that was printed is lost; None if all of stdout could be written."""
    sys.stdout.flush()
    return getattr(sys.stdout, "error", None)


def _end_quietly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an exception that nothing caught; Ctrl-C during the imports without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_quietly
