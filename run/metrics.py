"""The metrics log: a JSON object a line, appended as the run goes, cut back on resuming."""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """A log to append to; `keep` bytes of an existing file stay: what a checkpoint knew of.

    Of these the whole lines: a disk that lost its power may have kept less, or zeros.
    """

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        known = path.read_bytes()[:keep] if path.exists() else b""
        self.file = path.open("ab")
        self.file.truncate(_whole(known))

    def write(self, **values: Any) -> None:
        """Append one line; a number that is not finite is null, which JSON has a word for."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.file.write(json.dumps(clean).encode() + b"\n")
        self.file.flush()

    def sync(self) -> int:
        """Force the log to the disk; how many bytes it has, for a checkpoint to know."""
        os.fsync(self.file.fileno())
        return self.bytes

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def _whole(data: bytes) -> int:
    """How many bytes are left of a log without what is torn or no JSON at its end."""
    while data:
        last = data.rfind(b"\n", 0, -1) + 1  # where the last line starts
        if data.endswith(b"\n") and _is_object(data[last:]):
            break
        data = data[:last]
    return len(data)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics log."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn off
    return [json.loads(line) for line in lines]
