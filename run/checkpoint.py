"""The run folder: what was asked for, how far the run has come, and how it goes on.

    out/qwen2-0.5b-instruct-gsm8k/
        config.json         options and what was resolved from them
        metrics.jsonl       a line a step, a line a validation
        validation.jsonl    the rows that were held out
        audit.json          what is in the data
        lock                which process is at work here
        best/               the adapter that validated best (loss, or exact match), in PEFT's format
        evaluation/         what evaluate.py measured, a folder for each of its settings
        report.html, .md    all of it in a page
        checkpoints/step-000421/    adapter, optimizer state, progress: all that is needed to go on

A checkpoint is a folder published whole, with the hashes of its files: `files.py`.
Order and dropout are functions of (seed, epoch, row): there is no generator's state to keep.
"""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from errors import BadRun, TrainingFailed, listed
from files import clean_up, damage, json_bytes, remove_folder, write_folder
from lora.options import upgrade_options

KEEP = 2  # checkpoints: the newest, and one to fall back on
LOCK = "lock"
SPARE_BYTES = 64 << 20  # for logs, reports and answers
# What may change when a run goes on: how long it does, how often it looks around, and who rounds.
FREE = {"out", "epochs", "max_steps", "patience", "evals_per_epoch", "save_every", "max_minutes",
        "price_per_hour", "compile"}  # fmt: skip


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
    validated: int = 0  # the cursor of the last validation
    halved: int = 0  # how often micro-batches were halved for want of memory
    stopped: str | None = None  # why the run is over

    def record_validation(self, loss: float, exact_match: float | None = None) -> bool:
        """Take note of a validation; True if it is the best so far.

        The best has the lowest loss, or where answers are counted the highest exact match, and of
        equal ones the lower loss. A figure that is not finite is never the best.
        """
        figures = [-loss] if exact_match is None else [exact_match, -loss]
        best = [None if self.best_loss is None else -self.best_loss]
        self.validated = self.cursor
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


def check_run(
    folder: Path, config: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> list[str] | None:
    """None if `folder` holds no run yet; else what may change and has, of the run to go on with.

    An option that the run did not know yet counts as its default; one that has become a list since,
    as a list of one. BadRun if the folder holds something else, or a run that differs in more.
    """
    check_place(folder)
    if not folder.exists() or {p.name for p in folder.iterdir()} <= {LOCK, "config.json.new"}:
        return None
    try:
        old = json.loads((folder / "config.json").read_text())
        old = {"options": upgrade_options(old["options"]), "identity": old["identity"]}
        old_values, values = ({**defaults, **c["options"], **c["identity"]} for c in (old, config))
    except (OSError, ValueError, KeyError, TypeError):
        raise BadRun(
            f"--out {folder} holds other files, and no run that can go on", "give another --out"
        ) from None
    changed = {
        key: f"{key} was {old_values.get(key)}, is {values.get(key)}"
        for key in sorted(old_values.keys() | values.keys())
        if values.get(key) not in (old_values.get(key), [old_values.get(key)])
    }
    if refused := [text for key, text in changed.items() if key not in FREE]:
        raise BadRun(
            f"--out {folder} holds another run: {listed(refused)}",
            "give another --out, or the old values to go on with that run",
        )
    return list(changed.values())


_locked: dict[Path, IO] = {}  # the folders that are this process's own; open until it ends


def lock(folder: Path) -> None:
    """Take `folder` for this process, until it ends however it ends; BadRun if another has it.

    The system forgets a dead owner's lock by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in _locked:
        return
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).strip() or "another process"
        raise BadRun(
            f"{folder} is in use by {owner}", "wait for it, stop it, or give another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder} is on a disk without locks: nothing keeps a second trainer out")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%F %T}\n")
    file.flush()
    _locked[folder.resolve()] = file


def check_space(folder: Path, trainable: int) -> None:
    """BadRun if the disk has no room for what a run with so many trained numbers writes."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    # fp32 weights and two moments, in KEEP checkpoints and the one being written; best/ twice
    needed = (KEEP + 1) * 12 * trainable + 8 * trainable + SPARE_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BadRun(
            f"--out {folder}: the disk has {free:,} bytes free, and the run needs {needed:,}",
            "make room, or give another --out",
        )


def repair(run: Path) -> None:
    """Remove what killed runs left half done, and set damaged checkpoints aside under another name.

    BadRun if every checkpoint is damaged: a run never starts again from nothing by itself.
    """
    folder = run / "checkpoints"
    clean_up(folder, "step-[0-9]*")
    shutil.rmtree(run / "best.new", ignore_errors=True)
    for checkpoint in reversed(_checkpoints(run)):
        reason = damage(checkpoint)
        if reason is None:
            return
        aside = checkpoint.with_name(f"{checkpoint.name}.bad-{time.time_ns()}")
        os.rename(checkpoint, aside)
        print(f"{checkpoint} is damaged ({reason}): set aside as {aside.name}")
    if bad := sorted(folder.glob("step-*.bad-*")):
        raise BadRun(
            f"every checkpoint in {folder} is damaged: {listed(path.name for path in bad)}",
            "give another --out to start again, or remove these to start again here",
        )


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
    tensors = {name: p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = value
    state = {"progress": asdict(progress), "scaler": scaler.state_dict()}
    files = {
        "state.safetensors": save({k: t.cpu().contiguous() for k, t in tensors.items()}),
        "progress.json": json_bytes(state),
    }
    write_folder(final, files)
    if reason := damage(final):  # then the older ones must stay
        raise TrainingFailed(f"{final} was not written well: {reason}", "check the disk")
    for old in _checkpoints(run)[:-KEEP]:
        remove_folder(old)


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
    found = (p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit())
    return sorted(found, key=lambda p: (len(p.name), p.name))  # as numbers, of any length
