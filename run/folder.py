"""A run's folder: its options, progress and log, and everything needed to resume. Without torch.

    out/qwen2-0.5b-instruct-gsm8k/
        config.json         options, and the identity of what they resolved to
        metrics.jsonl       one line per step, one per validation
        validation.jsonl    the rows held out for validation
        audit.json          statistics of the data
        lock, lock.owner    locked by the process that uses the folder, and which one that is
        best/               the adapter with the best validation, in PEFT's format
        evaluation/         results of evaluate.py, one folder per combination of settings
        report.html, .md    a summary of all of it
        checkpoints/step-000421/    adapter, optimizer state and progress: what resuming needs

`Run` is the one reader of these files; `checkpoint.py` writes the checkpoints.
"""

import errno
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import BadRun, UserError, listed
from files import (
    JsonLines,
    clean_up,
    damage,
    hash_files,
    make_folder,
    read_json,
    write_file,
    write_json,
)
from run.identity import (
    changed_conditions,
    check_result,
    differences,
    is_same_program,
    numbered,
    program,
    program_text,
)
from typed import record

FORMAT = 2  # of config.json: 1 had --r, and mixed sources by exact fractions
KEEP = 2  # checkpoints: the newest, and one to fall back on
LOCK, OWNER = "lock", "lock.owner"
NOWHERE = Path("/nonexistent")
SPARE_BYTES = 64 << 20  # for logs, reports and answers
CHECKPOINT_FILES = ("state.safetensors", "progress.json")
# Files without which a folder holds no run; other people's may be in it too.
OWN = ("config.json", "metrics.jsonl", "validation.jsonl", "audit.json", "best", "checkpoints")


@dataclass
class Progress:
    """How far a run has come, apart from its weights."""

    cursor: int = 0  # steps of the schedule taken, including skipped ones
    step: int = 0  # optimizer updates made
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # nats per supervised validation token
    best_exact_match: float | None = None  # share of the sample, where answers are generated
    best_step: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0  # of work, over all sessions
    log_bytes: int = 0
    validated: int = -1  # the cursor at the last validation; -1: none
    validations: int = 0  # after at least one step, with finite figures
    halved: int = 0  # how often micro-batches were halved because memory ran out
    # What an interrupted validation has measured so far, by `part_of_validation`.
    validating: dict[str, list[list[Any]]] = field(default_factory=dict)
    stopped: str | None = None  # why the run is finished

    def record_step(self, finite: bool) -> None:
        """Count a step of the schedule; one without a finite gradient updated nothing."""
        self.cursor += 1
        self.step += finite
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def part_of_validation(
        self, part: str, batch_size: int, rank: int, ranks: int
    ) -> list[list[Any]]:
        """A rank's figures of a part of the validation in progress; new ones are appended.

        The list is empty if batches have another size now, or are dealt to another number of ranks.
        """
        return self.validating.setdefault(f"{part}, {rank} of {ranks} x {batch_size}", [])

    def merge_validating(self, of_ranks: list[dict[str, list[list[Any]]]]) -> None:
        """Keep every rank's figures: each list is the longest on its own rank, which extends it."""
        parts = {key for part in of_ranks for key in part}
        self.validating = {
            key: max((part.get(key, []) for part in of_ranks), key=len) for key in sorted(parts)
        }

    def record_validation(self, val_loss: float, val_exact_match: float | None = None) -> bool:
        """Record a validation at the current cursor; True if it is the best so far.

        The best has the lowest loss or, where answers are generated, the highest exact match and
        among equals the lowest loss. A figure that is not finite is never the best. The adapter
        before the first step may be the best, but the validation after it has nothing to lose: it
        does not count towards the patience.
        """
        new = [-val_loss] if val_exact_match is None else [val_exact_match, -val_loss]
        best = [None if self.best_loss is None else -self.best_loss]
        previous, self.validated, self.validating = self.validated, self.cursor, {}
        finite = all(map(math.isfinite, new))
        self.validations += finite and self.cursor > 0
        if val_exact_match is not None:
            best.insert(0, self.best_exact_match)
        if finite and (None in best or new > best):
            self.best_loss, self.best_exact_match = val_loss, val_exact_match
            self.best_step, self.validations_since_best = self.step, 0
            return True
        self.validations_since_best += previous > 0
        return False

    def reason_finished(self, last: int, patience: int, metric: str) -> str | None:
        """Why a run of `last` steps is finished, directly after a validation; None if it is not."""
        if self.cursor == self.validated >= last:  # above `last` if fewer steps are asked for now
            return f"all {last} steps done"
        if self.validations_since_best >= patience:
            return f"no better {metric} in {patience} validations"
        return None


def progress_of(values: Any, checkpoint: Path) -> Progress:
    """The progress that a checkpoint holds; BadRun if it is not one of this version."""
    try:
        return record(Progress, values)
    except ValueError as error:
        raise BadRun(
            f"{checkpoint / 'progress.json'}: {error}",
            "resume with the version that wrote it, or give another --out",
        ) from None


def adapter_sha256(adapter: Path) -> str | None:
    """SHA-256 of an adapter's files, which evaluations record; None if they cannot be read."""
    files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    try:
        return hash_files(files)
    except OSError:
        return None


class Run:
    """What a run's folder holds. Reading never changes it."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.best = self.folder / "best"
        self.log_file = self.folder / "metrics.jsonl"
        self.report_page = self.folder / "report.html"
        self.held_out_file = self.folder / "validation.jsonl"

    @classmethod
    def of_adapter(cls, adapter: str | Path | None) -> "Run":
        """The run whose folder an adapter is in; without options if it is in none.

        Another program's folder is none, such as a checkpoint, whose config.json has other keys.
        """
        folder = Path(adapter).parent if adapter else NOWHERE
        config = _read_or_empty(folder / "config.json")  # {}: perhaps that of a run, damaged
        is_other = config and not config.keys() & {"options", "identity"}
        return cls(NOWHERE if is_other else folder)

    @classmethod
    def choose(cls, folder: Path, *, fresh: bool) -> "Run":
        """The run in `folder`; if `fresh`, in the first of folder, folder-2, folder-3, ... without
        a finished run or one of other code.
        """

        def is_taken(candidate: Path) -> bool:
            run = cls(candidate)
            return bool(run.config) and (
                run.progress().get("stopped") is not None or not is_same_program(run.config)
            )

        return cls(numbered(folder, is_taken) if fresh else folder)

    @property
    def name(self) -> str:
        """The folder's own name, also for a path such as `.`."""
        return self.folder.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`; {} without one. BadRun if it is not a run's."""
        path = self.folder / "config.json"
        if not path.exists():
            return {}
        remedy = "repair the file, or use another folder"
        config = read_json(path, BadRun, remedy)
        if not all(isinstance(config.get(key), dict) for key in ("options", "identity")):
            raise BadRun(f"{path} is not the configuration of a run", remedy)
        return config

    @property
    def format(self) -> int | None:
        """The version of the folder's format, `FORMAT` for new ones; None without a run."""
        return self.config.get("format", 1) if self.config else None

    @property
    def options(self) -> dict[str, Any]:
        """The command line's options, as JSON values by name."""
        return self.config.get("options", {})

    @property
    def identity(self) -> dict[str, Any]:
        """Commits and hashes of what the options resolved to."""
        return self.config.get("identity", {})

    @property
    def id(self) -> str | None:
        """What its checkpoints name it by; None for a run of an earlier version."""
        return self.config.get("id")

    def commit_of_base(self, model: str, revision: str | None) -> str | None:
        """The revision of the base to take: the commit that the run recorded, if it resumes.

        So a new commit on the Hub does not lock the run out. Another --revision is taken as given.
        Raises BadRun if the base was a folder that is gone: the Hub's repository of that name, if
        there is one, is something else.
        """
        asked = self.options.get("model"), self.options.get("revision")
        if asked != (model, revision):
            return revision
        commit = self.identity.get("base_commit")
        was_folder = commit is None and self.identity.get("base_sha256") and "/" in model
        if was_folder and not os.path.exists(os.path.expanduser(model)):
            raise BadRun(
                f"the base of this run, the folder {model}, is not there", "give it with --model"
            )
        return commit or revision

    def commits_of_data(
        self, data: Sequence[str], revision: str | None
    ) -> dict[str, str | None] | str | None:
        """The commits that the run recorded: by source, or of its single one; None if it is new.

        That of a source which was no repository is "".
        """
        if "data_commit" not in self.identity or self.options.get("data_revision") != revision:
            return None
        commits = self.identity["data_commit"] or ""
        if isinstance(commits, dict):
            commits = {name: commit or "" for name, commit in commits.items()}
        same = self.options.get("data") in (list(data), data[0])  # once, it was a text
        return commits if same or isinstance(commits, dict) else None

    def record_checkpoint(self) -> None:
        """Note, once, that this run has saved: then a folder without checkpoints is not new."""
        config = self.config
        if config and not config.get("has_checkpoint"):
            write_json(self.folder / "config.json", config | {"has_checkpoint": True})

    def check_finished_by_this_program(self) -> None:
        """Raise BadRun if other code wrote the newest checkpoint, of a run that is finished."""
        check_result(f"{self.folder} was finished", self._newest_state())

    def _newest_state(self) -> dict[str, Any]:
        """What the newest readable checkpoint says; {} if there is none."""
        for checkpoint in reversed(self.checkpoints()):
            state = _read_or_empty(checkpoint / "progress.json")
            if isinstance(state.get("progress"), dict):
                return state
        return {}

    def audit(self) -> dict[str, Any]:
        """`audit.json`; {} if it is missing or damaged."""
        return _read_or_empty(self.folder / "audit.json")

    def log(self) -> tuple[list[dict[str, Any]], int]:
        """(values of the log's lines, how many lines are damaged)."""
        try:
            lines = JsonLines.read(self.log_file)
        except OSError:
            return [], 0
        values = [line.value for line in lines if line.value is not None]
        return values, len(lines) - len(values)

    def validation_count(self) -> int:
        """How many validations have been logged: what the best adapter is the best of."""
        return sum("val_loss" in line for line in self.log()[0])

    def steps_before_validation(self) -> list[dict[str, Any]]:
        """The log's lines of steps between its last validation and the one before that."""
        lines = self.log()[0]
        at = [index for index, line in enumerate(lines) if "val_loss" in line]
        return lines[at[-2] + 1 : at[-1]] if len(at) > 1 else []

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first, by the step in their names: clocks do not matter."""
        found = (p for p in (self.folder / "checkpoints").glob("step-*") if p.name[5:].isdecimal())
        return sorted(found, key=lambda p: (len(p.name), p.name))  # as numbers of any length

    def progress(self) -> dict[str, Any]:
        """Progress in the newest readable checkpoint; {} if there is none."""
        return self._newest_state().get("progress", {})

    def read_progress(self) -> Progress | None:
        """The progress to resume from, after `repair`; None if there is no checkpoint."""
        found = self.progress()
        return progress_of(found, self.checkpoints()[-1]) if found else None

    def check(
        self,
        new: dict[str, Any],
        defaults: Mapping[str, Any],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> list[str] | None:
        """None if there is no run here yet; else the changed options of the run to resume.

        `new` holds "options", "identity", and the "conditions" of this session. An option that the
        saved run did not know counts as its default; `upgrade` translates options that have been
        renamed. Raises BadRun if the folder holds parts of a run, or one that differs in more than
        what may change.
        """
        check_place(self.folder)
        if not self.config:
            if found := [name for name in OWN if (self.folder / name).exists()]:
                raise BadRun(
                    f"--out {self.folder} holds {', '.join(found)}, and no config.json",
                    "give another --out, or restore the config.json to resume that run",
                )
            return None
        old = {**defaults, **upgrade(self.options), **self.identity}
        refused, changes = differences(old, {**defaults, **new["options"], **new["identity"]})
        if refused:
            raise BadRun(
                f"--out {self.folder} holds another run: {listed(refused)}",
                "give another --out, or the old values to resume that run",
            )
        if not is_same_program(self.config):
            was, now = program_text(self.config), program_text(program())
            changes.append(f"the code was {was}, is {now}")
        return changes + changed_conditions(self.config.get("conditions"), new.get("conditions"))

    def repair(self) -> None:
        """Remove what killed sessions left half done, and set damaged checkpoints aside.

        Raises BadRun if no checkpoint is left, or if the newest is of another run: a run never
        restarts from nothing by itself. Raises OSError, and changes no checkpoint, if one cannot be
        read at the moment.
        """
        folder = self.folder / "checkpoints"
        clean_up(folder, "step-[0-9]*")
        shutil.rmtree(self.folder / "best.new", ignore_errors=True)
        for checkpoint in reversed(self.checkpoints()):
            reason = damage(checkpoint, CHECKPOINT_FILES)
            if reason is None:
                return self._check_own(checkpoint)
            aside = checkpoint.with_name(f"{checkpoint.name}.bad-{time.time_ns()}")
            os.rename(checkpoint, aside)
            print(f"{checkpoint} is damaged ({reason}): set aside as {aside.name}; to put it back:")
            print(f"  mv {shlex.quote(str(aside))} {shlex.quote(str(checkpoint))}")
        if bad := sorted(folder.glob("step-*.bad-*")):
            raise BadRun(
                f"every checkpoint in {folder} is damaged: {listed(path.name for path in bad)}",
                "give another --out to start again, or remove these to start again here",
            )
        if self.config.get("has_checkpoint"):
            raise BadRun(
                f"{folder} holds no checkpoint, although this run has saved some",
                "put them back to resume, or give another --out to start again",
            )

    def _check_own(self, checkpoint: Path) -> None:
        """Raise BadRun if a checkpoint is of another run; say so if the log lacks lines."""
        state = _read_or_empty(checkpoint / "progress.json")
        if state.get("run") != self.id:
            raise BadRun(
                f"{checkpoint} is of another run: of {state.get('run')}, not {self.id}",
                "move it to another folder, or give another --out",
            )
        known = self.progress().get("log_bytes", 0)
        size = self.log_file.stat().st_size if self.log_file.exists() else 0
        if size < known:
            print(f"{self.log_file} has {size:,} bytes of the {known:,} that were saved: the"
                  " report will lack lines")  # fmt: skip

    def write_start(
        self,
        config: dict[str, Any],
        changes: list[str],
        audit: dict[str, Any],
        held_out: list[dict[str, Any]],
    ) -> None:
        """Write what the folder holds from the start: `config.json` first, which makes it a run."""
        path = self.folder / "config.json"
        earlier = self.config
        kept = {k: earlier[k] for k in ("id", "started", "has_checkpoint") if k in earlier}
        if not earlier:
            now = datetime.now(timezone.utc)
            kept = {"id": secrets.token_hex(8), "started": f"{now:%Y-%m-%d %H:%M} UTC"}
        all_changes = earlier.get("changes", []) + changes
        self.report_page.unlink(missing_ok=True)  # describes an earlier end
        write_json(path, {"format": FORMAT, **kept, **config, **program(), "changes": all_changes})
        write_json(self.folder / "audit.json", audit)
        rows = "".join(json.dumps(row) + "\n" for row in held_out)
        write_file(self.held_out_file, rows.encode())


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, UserError, "")
    except UserError:
        return {}


def check_place(folder: Path) -> None:
    """Raise BadRun if `folder` is not a folder, or cannot be made or written."""
    existing = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise BadRun(f"--out {folder}: {existing} is not a folder", "give another --out")
    if not os.access(existing, os.W_OK):
        raise BadRun(f"--out {folder} cannot be written", "give another --out")


def check_space(folder: Path, trainable: int) -> None:
    """Raise BadRun if the disk has no room for a run with `trainable` parameters."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    # fp32 weights and two moments, in KEEP checkpoints and the one being written; best/ twice
    needed = (KEEP + 1) * 12 * trainable + 8 * trainable + SPARE_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BadRun(
            f"--out {folder}: the disk has {free:,} bytes free, and the run needs {needed:,}",
            "make room, or give another --out",
        )


def default_folder(model: str, data: list[str]) -> Path:
    """out/<model>-<data>, in lower case, from what the user called the base and the sources."""
    stems = [
        Path(name).name.removesuffix(".jsonl").removesuffix(".parquet") for name in (model, *data)
    ]
    return Path("out") / "-".join(stems).lower()


_locked: dict[Path, FileLock] = {}  # folders locked by this process, until it ends


def lock(folder: Path) -> None:
    """Reserve `folder` for this process until it ends; BadRun if another process has it.

    The operating system releases the lock of a process that died.
    """
    make_folder(folder)
    if folder.resolve() in _locked:
        return
    file_lock = FileLock(folder / LOCK, thread_local=False)
    owner = folder / OWNER
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        known = owner.read_text("utf-8", "replace")[:200].strip() if owner.exists() else ""
        raise BadRun(
            f"{folder} is in use by {known or 'another process'}",
            "wait for it, stop it, or give another --out",
        ) from None
    except (OSError, NotImplementedError) as error:
        unsupported = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        if getattr(error, "errno", errno.ENOSYS) not in unsupported:
            raise
        print(f"{folder} is on a file system without locks: a second run is not kept out")
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    owner.write_text(f"process {os.getpid()} on {platform.node()} since {since}\n", "utf-8")
    _locked[folder.resolve()] = file_lock
