"""Files that are whole or not there: written beside their place, forced to the disk, renamed.

A rename within one folder is atomic, and lasts once the folder itself is forced to the disk. So
what can be seen under its name was complete before it got the name, whatever happened since; that
it still is what was written, `damage` tells from the sizes and hashes in the folder's manifest.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_file(path: Path, data: bytes) -> None:
    """Whoever reads `path` finds all of the old bytes or all of the new."""
    beside = path.with_name(path.name + ".new")
    _write(beside, data)
    os.replace(beside, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Make `final` a folder of these files and their manifest, all at once.

    A folder that is there already is replaced: it stands aside as `.old` for that moment.
    """
    beside, old = final.with_name(final.name + ".new"), final.with_name(final.name + ".old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    manifest = {name: {"bytes": len(data), "sha256": _hash(data)} for name, data in files.items()}
    for name, data in (files | {MANIFEST: json_bytes(manifest)}).items():
        _write(beside / name, data)
    sync_folder(beside)
    if final.exists():
        os.rename(final, old)
    os.rename(beside, final)
    sync_folder(final.parent)
    remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Take the name away first, so that no half of it is ever seen under it."""
    gone = folder.with_name(folder.name + ".gone")
    if folder.exists():
        os.rename(folder, gone)
        shutil.rmtree(gone)


def clean_up(parent: Path, pattern: str) -> None:
    """Remove what `write_folder` and `remove_folder`, killed, have left of folders named so."""
    for old in parent.glob(pattern + ".old"):
        if not old.with_suffix("").exists():  # killed between the two renames
            os.rename(old, old.with_suffix(""))
    for ending in (".new", ".old", ".gone"):
        for folder in parent.glob(pattern + ending):
            shutil.rmtree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_folder` made; None if it is as it was written."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        if raw != json_bytes(manifest):
            return f"{MANIFEST} is not as it was written"
        for name, known in manifest.items():
            data = (folder / name).read_bytes()
            if len(data) != known["bytes"]:
                return f"{name} has {len(data):,} bytes, not {known['bytes']:,}"
            if _hash(data) != known["sha256"]:
                return f"{name} is not what was written: its hash differs"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Force a folder's files and their names to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_files(paths: list[Path]) -> str:
    """SHA-256 of the files' names and contents, in the order of their names.

    Each file is one call that needs no interpreter: another thread goes on all the while.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    digest.update(data)
    return digest.hexdigest()
