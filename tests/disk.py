"""A disk that loses its power: which files and folder entries have been forced to it.

What was not synced since it last changed may be lost. So `Disk` records, at each fsync, what a file
held and which entries a folder had.
"""

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path

WRITING = set("wax+")
PASSING = {"lock", "lock.owner"}  # say who uses a folder, and mean nothing after a power cut


class Disk:
    """Replaces the file calls of `os` and `open` in this process while its context is active.

    The order of calls is checked where it matters: nothing gets its final name by a rename, and
    nothing that it replaces is removed, before it would survive a power cut.
    """

    def __init__(self, root: Path, monkeypatch):
        """`root` is a folder that exists and survives; files elsewhere are not watched."""
        self.root, self.monkeypatch = root, monkeypatch
        self.synced: dict[int, object] = {}  # inode -> `content` of a file or folder
        self.faults: list[str] = []
        self.calls: list[tuple[str, ...]] = []  # (call, path relative to root, ...)

    def __enter__(self) -> "Disk":
        for path in (self.root, *self.root.rglob("*")):
            self.synced[path.stat().st_ino] = content(path)
        patch = self.monkeypatch.setattr
        self.fsync, self.opened = os.fsync, io.open
        patch(os, "fsync", self._fsync)
        patch(builtins, "open", self._open)
        patch(io, "open", self._open)
        for name in ("rename", "replace"):
            patch(os, name, self._renaming(getattr(os, name)))
        return self

    def __exit__(self, *raised: object) -> None:
        self.monkeypatch.undo()

    def _open(self, file, mode="r", *args, **options):
        opened = self.opened(file, mode, *args, **options)
        if set(mode) & WRITING and self._watches(file):
            if not set(mode) & set("a+"):
                self.synced.pop(os.fstat(opened.fileno()).st_ino, None)  # of an earlier file
            self.calls.append(("open", self._name(file)))
        return opened

    def _fsync(self, handle: int) -> None:
        self.fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if self._watches(path):
            self.synced[os.fstat(handle).st_ino] = content(path)
            self.calls.append(("fsync", self._name(path)))

    def _renaming(self, rename: Callable) -> Callable:
        def checked(source, target, **options):
            if self._watches(target):
                self.faults += [f"renamed before {lost}" for lost in self.lost(Path(source))]
                self.calls.append(("rename", self._name(source), self._name(target)))
            rename(source, target, **options)

        return checked

    def _watches(self, path: object) -> bool:
        if not isinstance(path, str | os.PathLike):  # a file descriptor
            return False
        return Path(os.path.abspath(path)).is_relative_to(self.root)

    def _name(self, path: str | os.PathLike) -> str:
        return str(Path(os.path.abspath(path)).relative_to(self.root))

    def lost(self, path: Path) -> list[str]:
        """What of `path`, a file or a folder with all it holds, a power cut could lose."""
        path = Path(os.path.abspath(path))
        found = [p for p in (path, *path.rglob("*")) if p.name not in PASSING]
        return [f"{self._name(p)} was synced" for p in found if not self._is_safe(p)]

    def _is_safe(self, path: Path) -> bool:
        synced, now = self.synced.get(path.stat().st_ino), content(path)
        # What was removed from a folder may come back: old checkpoints do no harm.
        return synced is not None and (now <= synced if path.is_dir() else now == synced)

    def unreachable(self, path: Path) -> list[str]:
        """The folders between the root and `path` in which a power cut could lose the way to it."""
        path = Path(os.path.abspath(path))
        way = [path, *(p for p in path.parents if p.is_relative_to(self.root))]
        return [
            f"{self._name(child)} in its folder" for child, folder in zip(way, way[1:])
            if (child.name, child.stat().st_ino) not in self.synced.get(folder.stat().st_ino, ())
        ]  # fmt: skip


def content(path: Path) -> object:
    """The bytes of a file, or the (name, inode) pairs in a folder."""
    if path.is_dir():
        return {(p.name, p.stat().st_ino) for p in path.iterdir() if p.name not in PASSING}
    return path.read_bytes()
