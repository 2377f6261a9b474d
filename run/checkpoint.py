"""The run folder: what was asked for, how far the run has come, and how it goes on.

    out/qwen2-0.5b-instruct-gsm8k/
        config.json         options and what was resolved from them
        metrics.jsonl       a line a step, a line a validation
        validation.jsonl    the rows that were held out
        audit.json          what is in the data
        best/               the adapter that validated best (loss, or exact match), in PEFT's format
        evaluation/         what evaluate.py measured, a folder for each of its settings
        report.html, .md    all of it in a page
        checkpoints/step-000421/    adapter, optimizer state, progress: all that is needed to go on

A checkpoint is written beside its place and renamed, so a name that can be seen is complete.
Order and dropout are functions of (seed, epoch, row): there is no generator's state to keep.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from errors import BadRun, listed

KEEP = 2  # checkpoints: the newest, and one to fall back on
FREE = {"out", "evals_per_epoch", "save_every", "price_per_hour"}  # may change when a run goes on


@dataclass
class Progress:
    """How far a run has come, but for its weights."""

    cursor: int = 0  # steps of the schedule that were taken, skipped ones included
    step: int = 0  # optimizer updates made
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # nats a supervised validation token
    best_exact_match: float | None = None  # of the sample, where answers are counted
    best_step: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0  # at work, over all sittings
    log_bytes: int = 0
    stopped: str | None = None  # why the run is over

    def record_validation(self, loss: float, exact_match: float | None = None) -> bool:
        """Take note of a validation; True if it is the best so far.

        The best has the lowest loss, or where answers are counted the highest exact match, and of
        equal ones the lower loss. A figure that is not finite is never the best.
        """
        figures = [-loss] if exact_match is None else [exact_match, -loss]
        best = [None if self.best_loss is None else -self.best_loss]
        if exact_match is not None:
            best.insert(0, self.best_exact_match)
        if all(map(math.isfinite, figures)) and (None in best or figures > best):
            self.best_loss, self.best_exact_match = loss, exact_match
            self.best_step, self.validations_since_best = self.step, 0
            return True
        self.validations_since_best += 1
        return False


def check_place(folder: Path) -> None:
    """BadRun if `folder` is no folder or cannot be made or written."""
    existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise BadRun(f"--out {folder}: {existing} is not a folder", "give another --out")
    if not os.access(existing, os.W_OK):
        raise BadRun(f"--out {folder} cannot be written", "give another --out")


def check_run(folder: Path, config: dict[str, Any]) -> bool:
    """Whether `folder` holds a run of `config` to go on with; BadRun if it cannot be used."""
    check_place(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        old = json.loads((folder / "config.json").read_text())
        old_values, values = ({**c["options"], **c["identity"]} for c in (old, config))
    except (OSError, ValueError, KeyError, TypeError):
        raise BadRun(
            f"--out {folder} holds other files, and no run that can go on", "give another --out"
        ) from None
    changed = [
        f"{key} was {old_values.get(key)}, is {values.get(key)}"
        for key in sorted(old_values.keys() | values.keys())
        if old_values.get(key) != values.get(key) and key not in FREE
    ]
    if changed:
        raise BadRun(
            f"--out {folder} holds another run: {listed(changed)}",
            "give another --out, or the old values to go on with that run",
        )
    return True


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename: whoever reads `path` finds all of the old text or of the new."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(
    run: Path,
    progress: Progress,
    *,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write `checkpoints/step-...` whole, then let the oldest go."""
    final = run / "checkpoints" / f"step-{progress.cursor:06d}"
    beside = final.with_name(final.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {name: p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value
    save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, beside / "state.safetensors")
    write_json(
        beside / "progress.json", {"progress": asdict(progress), "scaler": scaler.state_dict()}
    )
    shutil.rmtree(final, ignore_errors=True)
    os.rename(beside, final)
    for old in _checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)


def load_checkpoint(
    run: Path,
    *,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Restore the newest checkpoint of `run`; a fresh Progress if it has none."""
    found = _checkpoints(run)
    if not found:
        return Progress()
    saved = json.loads((found[-1] / "progress.json").read_text())
    with safe_open(found[-1] / "state.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])
    state = {
        i: {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, name in enumerate(parameters)
        if f"step/{name}" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return Progress(**saved["progress"])


def read_progress(run: Path) -> Progress | None:
    """How far the run in a folder has come, without its weights."""
    found = _checkpoints(run)
    if not found:
        return None
    return Progress(**json.loads((found[-1] / "progress.json").read_text())["progress"])


def _checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first; the name holds the step, so clocks do not matter."""
    found = (p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".new")
    return sorted(found, key=lambda p: (len(p.name), p.name))  # as numbers, of any length
