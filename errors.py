"""Errors that a user can cause: each states the cause and a remedy, without a traceback.

Any other exception is a bug in this project and keeps its traceback.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable

from terminal import lost_output, open_screens, printable

LONGEST = 1500  # characters of a printed cause
CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@|\bhf_[A-Za-z0-9]{16,}")  # in a URL; a Hub token
PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENODEV)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """What went wrong (`cause`), what the user can do (`remedy`), and the script's exit code."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str):
        cause, remedy = plain(cause), plain(remedy)
        super().__init__(f"{cause}\n{remedy}")
        self.cause, self.remedy = cause, remedy


class BadOption(UserError):
    """An invalid flag or value."""


class BadCheckpoint(UserError):
    """A base model that is missing, damaged or not a Qwen2."""


class BadAdapter(UserError):
    """An adapter folder that is damaged or does not fit its base."""


class BadData(UserError):
    """A data source that is missing, empty or malformed."""


class HubError(UserError):
    """Files that could not be fetched from the Hub."""


class BadRun(UserError):
    """A run folder that cannot be resumed or written."""


class TrainingFailed(UserError):
    """A run that failed while training, such as by running out of memory."""

    exit_code = 1


def plain(text: str) -> str:
    """`text` on one line, without credentials, and printable: parts of it are untrusted."""
    text = CREDENTIALS.sub("[hidden]", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "[hidden]")
    text = printable(text[: LONGEST + 1])
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def listed(problems: Iterable[str], most: int = 6) -> str:
    """All problems on one line: the first `most` in full, then a count of the rest."""
    problems = list(problems)
    rest = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + rest


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and return its exit code; a user's error is printed in two lines.

    A full disk or memory is reported in the same way. What is printed goes through a `Screen`; if
    some of it could not be written, a script that finished returns 141 for a closed pipe, as a
    process does that SIGPIPE ends, and otherwise 1.
    """
    open_screens()
    try:
        return main() or _code_of_lost_output()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _say(error.cause, error.remedy)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        reason = plain(str(error).strip().partition("\n")[0][:200])
        _say(f"memory ran out: {reason}", "use a smaller --batch-size or --precision")
        return 1
    except OSError as error:
        if not is_full(error) and not is_passing(error) and error.errno not in DENIED:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        place = plain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        if is_full(error):
            cause, remedy = f"the disk is full: {place}", "free some space"
        else:
            cause, remedy = f"a file cannot be used: {place}", "make it accessible again"
        _say(cause, f"{remedy}, then rerun the command to resume")
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _code_of_lost_output() -> int:
    """The exit code of a script that did its work, by whether all it printed could be written."""
    error = lost_output()
    if error is None:
        return 0
    if isinstance(error, BrokenPipeError):  # as with `| head -1`
        return 128 + 13  # SIGPIPE, which Windows does not define
    _say(f"what was printed is incomplete: {plain(str(error))}", "everything else was done")
    return 1


def _say(cause: str, remedy: str) -> None:
    print(f"error: {cause}\n  {remedy}", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; each kind of device says it in its own words."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    kinds = ("OutOfMemoryError", "MemoryError")  # the former is PyTorch's
    return type(error).__name__ in kinds or any(word in str(error) for word in words)


def is_passing(error: Exception) -> bool:
    """Whether the system, not a file, is at fault, so that the file may be intact: a disk or server
    that does not answer, or too many open files.
    """
    return isinstance(error, OSError) and error.errno in PASSING


def is_full(error: OSError) -> bool:
    """Whether the disk, the user's quota or a file size limit is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
