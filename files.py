"""Files that are either complete or absent: written under another name, synced, then renamed.

A rename within a folder is atomic, and durable once the folder itself is synced. So a file that is
visible under its final name was complete before it got that name; whether it still is what was
written, `damage` checks against the sizes and hashes in the folder's manifest.
"""

import contextlib
import errno
import functools
import hashlib
import json
import mmap
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import BadOption, UserError, is_passing

MANIFEST = "manifest.json"
# Errors of fsync where a folder cannot be synced: on CIFS, some FUSE mounts, Windows.
FOLDERS_NOT_SYNCED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
                      errno.EACCES, errno.EPERM)  # fmt: skip
ODD_KINDS = ((stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"),
             (lambda mode: True, "device"))  # fmt: skip
LARGEST_JSON = 2**26  # bytes; the largest published files, tokenizers, have a sixth of that


def user_path(flag: str, text: str, kind: str = "any") -> str:
    """A path that a user gave, with `~` expanded; one that does not exist is left to its reader.

    `kind` is what it must be if it exists: "file", or "any" for a file or folder; "new" is one that
    will be written.
    Raises BadOption if no file can have this name, if it is of another kind, such as a pipe or a
    device, or if it cannot be read.
    """
    path = os.path.expanduser(text)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:  # too long, a NUL, a file for a parent, a loop of links
        if is_passing(error):
            raise
        if kind == "new" and isinstance(error, NotADirectoryError):
            return path
        raise BadOption(f"{flag} {text}: {reason(error)}", "check the path") from None
    is_file, is_folder = stat.S_ISREG(mode), stat.S_ISDIR(mode)
    if kind != "new" and not (is_file or is_folder):
        what = next(name for is_it, name in ODD_KINDS if is_it(mode))
        raise BadOption(f"{flag} {text} is a {what}", "give a regular file or a folder")
    if kind != "new" and not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        raise BadOption(f"{flag} {text} is not readable", "change its permissions")
    if kind == "file" and is_folder:
        raise BadOption(f"{flag} {text} is a folder, not a file", "give the file itself")
    return path


def reason(error: Exception) -> str:
    """What the system says about a path or file, without the path."""
    return getattr(error, "strerror", None) or str(error)


def read_json(
    path: Path,
    error: type[UserError],
    remedy: str,
    *,
    kind: type = dict,
    missing: str | None = None,
) -> Any:
    """The JSON value in an untrusted file; it must be of the type `kind`.

    Raises `error` with `remedy` if it is missing (`missing` is then the cause, if given), too
    large, nested too deeply, not JSON, or of another type.
    """
    data = read_file(path, error, remedy, missing=missing)
    return parse_json(path, data, error, remedy, kind=kind)


def read_file(
    path: Path,
    error: type[UserError],
    remedy: str,
    *,
    most: int = LARGEST_JSON,
    missing: str | None = None,
) -> bytes:
    """The content of an untrusted file, which must be a regular one of at most `most` bytes."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise ValueError(f"it is not a regular file of at most {most:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise error(missing or f"{path} does not exist", remedy) from None
    except (OSError, ValueError) as failure:
        if is_passing(failure):
            raise
        raise error(f"{path} cannot be read: {failure}", remedy) from None


def parse_json(
    path: Path, data: bytes, error: type[UserError], remedy: str, *, kind: type = dict
) -> Any:
    """`read_json` of the content of `path`."""
    try:
        value = json.loads(data)
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
        return value
    except RecursionError:
        raise error(f"{path} cannot be read: it is nested too deeply", remedy) from None
    except ValueError as failure:
        raise error(f"{path} cannot be read: {failure}", remedy) from None


class Line(NamedTuple):
    """One complete line of a JSON Lines file."""

    value: dict[str, Any] | None  # None: damaged, it is not a JSON object
    end: int  # offset in bytes of the first byte after it


class JsonLines:
    """An append-only log of JSON objects, one a line: metrics, answers, scores.

    Opening it keeps the first `keep` bytes of an existing file, as far as they are whole lines: a
    disk that lost its power may have kept less than it reported, or zeros.
    """

    def __init__(self, path: Path | None, keep: int = 0):
        """`path` None is a log that is switched off: it writes nothing."""
        self.path = path
        if path is None:
            return
        lines = self.read(path, keep)
        while lines and lines[-1].value is None:
            lines.pop()
        self._file = path.open("ab")
        self._file.truncate(lines[-1].end if lines else 0)

    @staticmethod
    def read(path: Path, limit: int | None = None) -> list[Line]:
        """Every complete line in the first `limit` bytes; none where there is no file.

        What follows the last newline was torn off, and is not returned.
        """
        try:
            data = path.read_bytes()[:limit]
        except FileNotFoundError:
            return []
        lines, end = [], 0
        for text in data.split(b"\n")[:-1]:
            end += len(text) + 1
            lines.append(Line(_object_or_none(text), end))
        return lines

    def write(self, **values: Any) -> None:
        """Append one line; a number that is not finite becomes null, since JSON has no NaN."""
        if self.path is None:
            return
        finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
        self._file.write(json.dumps(finite).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Force the log to the disk; returns its size in bytes, which a checkpoint records."""
        if self.path is None:
            return 0
        os.fsync(self._file.fileno())
        return self.path.stat().st_size


def _object_or_none(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` atomically: a reader finds all of the old bytes or all of the new."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, as `write_file` does."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A JSON value as the bytes of a file: indented, in UTF-8."""
    return json.dumps(value, indent=2).encode() + b"\n"


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Publish a folder of these files and their manifest in one rename.

    An existing folder is replaced; until the rename is durable it is kept as `.old`.
    """
    new, old = final.with_name(final.name + ".new"), final.with_name(final.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    make_folder(new)
    manifest = {name: {"bytes": len(data), "sha256": _hash(data)} for name, data in files.items()}
    for name, data in (files | {MANIFEST: json_bytes(manifest)}).items():
        (new / name).write_bytes(data)
    sync_files(new)
    if final.exists():
        os.rename(final, old)
    _rename(new, final)
    remove_folder(old)


def publish(new: Path, final: Path) -> None:
    """Give a finished file or folder its final name, once all of it is on the disk."""
    sync_files(new)
    _rename(new, final)


def make_folder(folder: Path) -> None:
    """Make a folder and the parents that it lacks; a power cut does not undo it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(made):
        sync_folder(path.parent)


def _rename(new: Path, final: Path) -> None:
    os.rename(new, final)
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Rename the folder before deleting it, so that its name never shows a part of it."""
    gone = folder.with_name(folder.name + ".gone")
    if folder.exists():
        os.rename(folder, gone)
        shutil.rmtree(gone)


def clean_up(parent: Path, pattern: str) -> None:
    """Remove what a killed `write_folder` or `remove_folder` left of folders matching `pattern`."""
    for old in parent.glob(pattern + ".old"):
        if not old.with_suffix("").exists():  # killed between the two renames
            os.rename(old, old.with_suffix(""))
    for ending in (".new", ".old", ".gone"):
        for folder in parent.glob(pattern + ending):
            shutil.rmtree(folder)


def damage(folder: Path, required: Iterable[str] = ()) -> str | None:
    """What is wrong with a folder that `write_folder` made with the files `required`, or None.

    A folder that differs from its manifest is damaged. One that cannot be read now, for lack of a
    permission or because a disk does not answer, may be intact: that raises OSError.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if raw != json_bytes(manifest):
            return f"{MANIFEST} is not as it was written"
        if missing := sorted(set(required) - manifest.keys()):
            return f"{MANIFEST} does not list {', '.join(missing)}"
        for name, known in manifest.items():
            data = (folder / name).read_bytes()
            if len(data) != known["bytes"]:
                return f"{name} has {len(data):,} bytes, not {known['bytes']:,}"
            if _hash(data) != known["sha256"]:
                return f"{name} is not what was written: its hash differs"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is not readable"
    return None


def sync_folder(folder: Path) -> None:
    """Force a folder's directory entries to the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in FOLDERS_NOT_SYNCED:
            raise
        _say_folders_are_not_synced(error.strerror)


@functools.cache
def _say_folders_are_not_synced(reason: str) -> None:
    print(f"this file system cannot sync folders ({reason}): a power cut may undo the last renames")


def sync_files(folder: Path) -> None:
    """Force a file, or a folder's files and its directory entries, to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_files(paths: list[Path]) -> str:
    """`hash_contents` of the files, in the order of their names."""

    def contents() -> Iterator[tuple[str, mmap.mmap | bytes]]:
        for path in sorted(paths):
            with mapped(path) as data:
                yield path.name, data

    return hash_contents(contents())


def hash_contents(contents: Iterable[tuple[str, mmap.mmap | bytes]]) -> str:
    """SHA-256 of files, given as (name, content).

    Each content is hashed in one call that releases the GIL, so other threads keep running.
    """
    digest = hashlib.sha256()
    for name, data in contents:
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, which is read from the disk where it is used."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


class HashedFiles:
    """Files, and the SHA-256 of what they held when this was made."""

    def __init__(self, paths: Iterable[Path]):
        self._paths = sorted(paths)
        self._looks = self._look()
        self.sha256 = hash_files(self._paths)

    def _look(self) -> list[tuple[int, ...]]:
        found = [path.stat() for path in self._paths]
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in found]

    def changed(self) -> bool:
        """Whether the files hold something else now; they are read only if they look different.

        It also finds what changed while they were being hashed.
        """
        try:
            return self._look() != self._looks and hash_files(self._paths) != self.sha256
        except FileNotFoundError:
            return True
