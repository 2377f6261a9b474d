"""The errors a user can cause: each says what is wrong and what helps, without a traceback.

Anything else that goes wrong is a defect of ours and keeps its traceback.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

LONGEST = 1500  # characters of a cause
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@|\bhf_[A-Za-z0-9]{16,}")  # in an address; of the Hub


class UserError(Exception):
    """What went wrong (`cause`), what helps (`remedy`), and how the scripts exit (`exit_code`)."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str):
        cause, remedy = plain(cause), plain(remedy)
        super().__init__(f"{cause}\n{remedy}")
        self.cause, self.remedy = cause, remedy


class BadOption(UserError):
    """A flag or a value that cannot be used."""


class BadCheckpoint(UserError):
    """A base model that is missing, broken, or not a Qwen2."""


class BadAdapter(UserError):
    """An adapter folder that is broken or does not fit its base."""


class BadData(UserError):
    """A data source that is missing, empty or malformed."""


class HubError(UserError):
    """Files the Hub did not give."""


class BadRun(UserError):
    """A run folder that cannot be continued or written."""


class TrainingFailed(UserError):
    """A run whose numbers went wrong."""

    exit_code = 1


def plain(text: str) -> str:
    """`text` on one line, without control characters or secrets: others wrote parts of it."""
    text = CREDENTIALS.sub("[hidden]", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "[hidden]")
    text = printable(text[: LONGEST + 1])
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def printable(text: str, besides: str = "") -> str:
    """`text` without what a terminal would obey, but for the characters in `besides`."""
    return "".join(c if c.isprintable() or c in besides else "\ufffd" for c in text)


def listed(problems: Iterable[str], most: int = 6) -> str:
    """Everything that is wrong, on one line: the first `most` in full, then a count of the rest."""
    problems = list(problems)
    rest = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + rest


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and give its exit code; a user's error is printed in two lines.

    So is a disk that is full, and a reader of the output that has gone is no defect either.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _say(f"error: {error.cause}\n  {error.remedy}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("stopped by the keyboard")
        return 130
    except BrokenPipeError:  # as of `| head -1`
        return 128 + signal.SIGPIPE
    except OSError as error:
        if not is_full(error):
            raise
        place = plain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        _say(f"error: the disk is full: {place}\n  make room; the same command then goes on")
        return 1
    finally:
        _flush()


def is_full(error: OSError) -> bool:
    """Whether a file could not grow: the disk, the user's share of it, or a limit is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # where nobody can be told, the exit code still tells
        print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    """Write out what was printed; what cannot be written is dropped, or Python would complain."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
