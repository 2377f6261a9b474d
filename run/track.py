"""`--track`: each line of a run's log also goes to TensorBoard, Weights & Biases or Trackio.

`metrics.jsonl` stays the record of the run. A tracker that fails is reported once and not used
again, and the training continues. A run that resumes keeps its id, so that its curves continue; the
steps since its last checkpoint appear once, except in Trackio, which shows them twice.
None of the three packages is installed by default.
"""

import atexit
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from errors import BadOption, plain
from files import JsonLines
from progress_bar import print_above_bars
from run.folder import Progress, Run

TRACKERS = ("tensorboard", "wandb", "trackio")  # the names of their packages


def check_tracker(name: str | None) -> None:
    """Raise BadOption if the package of the tracker `name` is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise BadOption(f"--track {name}: its package is not installed", f"pip install {name}")


class RunLog(JsonLines):
    """`metrics.jsonl`, continued from `progress`; `tracker` is one of TRACKERS or None."""

    def __init__(self, run: Run, progress: Progress, *, tracker: str | None, enabled: bool):
        """`enabled` is False on ranks that do not log."""
        super().__init__(run.log_file if enabled else None, keep=progress.log_bytes)
        self.tracker = tracker if enabled else None
        self.send, self.finish = self._try(start, self.tracker, run, progress) or (None, None)
        atexit.register(self.close)  # a run that fails is shown up to its last step

    def write(self, **values: Any) -> None:
        """Write one line to the log, and its numbers to the tracker."""
        super().write(**values)
        self._try(self.send, scalars(values), values["step"])

    def close(self) -> None:
        """Send the tracker what it has not got yet."""
        self._try(self.finish)
        self.tracker = None

    def _try(self, call: Callable | None, *args: Any) -> Any:
        """Call the tracker, if there is one that has not failed; a failure is printed."""
        try:
            return call(*args) if self.tracker else None
        except Exception as error:  # of any type that the package raises
            reason = plain(f"{type(error).__name__}: {error}")[:200]
            print_above_bars(f"--track {self.tracker} failed and is not used any more; the run's"
                             f" log is complete\n  {reason}")  # fmt: skip
            self.tracker = None


def start(name: str, run: Run, progress: Progress) -> tuple[Callable, Callable]:
    """(function to send scalars and their step, function to end) of the tracker `name`."""
    if name != "tensorboard":
        package = importlib.import_module(name)
        settings = {"project": "plain-lora", "name": f"{run.name}-{run.id}", "config": run.options}
        settings |= {"id": run.id} if name == "wandb" else {}  # Trackio knows a run by its name
        package.init(resume="allow", **settings)
        return package.log, package.finish
    from torch.utils.tensorboard import SummaryWriter

    # Hides what an interrupted session sent after the checkpoint from which the run resumes.
    repeated = progress.step + 1 if progress.log_bytes else 0
    writer = SummaryWriter(str(run.folder / name), purge_step=repeated)

    def send(found: dict[str, float], step: int) -> None:
        for key, value in found.items():
            writer.add_scalar(key, value, step)

    return send, writer.close


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a log line, except its step; those of a dict as `key/key`."""
    inner = {f"{k}/{i}": x for k, v in values.items() if isinstance(v, dict) for i, x in v.items()}
    return {
        key: value for key, value in (values | inner).items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }  # fmt: skip
