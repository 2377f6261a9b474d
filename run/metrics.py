"""The metrics log: a JSON object a line, appended as the run goes, cut back on resuming."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsLog:
    """A log to append to; `keep` bytes of an existing file stay: what a checkpoint knew of."""

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        self.file = path.open("ab")
        self.file.truncate(min(keep, self.bytes))  # a file that was lost is not filled with zeros

    def write(self, **values: Any) -> None:
        """Append one line; a number that is not finite is null, which JSON has a word for."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.file.write(json.dumps(clean).encode() + b"\n")
        self.file.flush()

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics log."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn off
    return [json.loads(line) for line in lines]
