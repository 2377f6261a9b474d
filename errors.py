"""Errors that a user can cause: each states the cause and a remedy, without a traceback.

Any other exception is a bug in this project and keeps its traceback.
"""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable

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
    """`text` on one line, without control characters or credentials: parts of it are untrusted."""
    text = CREDENTIALS.sub("[hidden]", text)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "[hidden]")
    text = printable(text[: LONGEST + 1])
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters replaced, except for those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def listed(problems: Iterable[str], most: int = 6) -> str:
    """All problems on one line: the first `most` in full, then a count of the rest."""
    problems = list(problems)
    rest = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + rest


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and return its exit code; a user's error is printed in two lines.

    A full disk or memory is reported in the same way, and a closed pipe (`| head -1`) ends quietly.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal need not know every character
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")
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
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 128 + 13  # SIGPIPE, which Windows does not define
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        reason = plain(str(error).strip().partition("\n")[0][:200])
        _say(f"error: memory ran out: {reason}\n  use a smaller --batch-size or --precision")
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
        _say(f"error: {cause}\n  {remedy}, then rerun the command to resume")
        return 1
    finally:
        _flush()


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


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed stderr: the exit code still reports it
        print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    """Flush both streams; what cannot be written is dropped, or Python would print an error."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
