"""Runs of train.py in forked processes, with faults that come from outside.

torch is imported once and each run is a fork, so that a run takes a second. A `fault` is called in
the child before its run: it sets limits, or puts something between the run and the system.
"""

import builtins
import contextlib
import ctypes
import errno
import io
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

import train
from errors import run_script
from lora.peft_format import WEIGHTS, read_adapter_config
from run import stopping
from run.folder import KEEP, Run
from tests import toys
from tests.toys import read_log

# 3 epochs of 12 steps of 4 micro-batches, dropout, a validation every 6 steps.
LONG = "--batch-size 2 --grad-accum 4 --epochs 3 --rank 2 --evals-per-epoch 2".split()
SHORT = [*LONG, "--limit", "40", "--epochs", "2"]  # 2 epochs of 5 steps
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
CLOCKS = {"tokens_per_second", "peak_memory_gb"}
Fault = Callable[[], object]


def toy_flags(folder: Path) -> list[str]:
    """Options that name a tiny base and small sums, written into `folder`."""
    base = toys.write_checkpoint(folder / "base", hidden=32, intermediate=48, std=0.3)
    data = toys.write_arithmetic(folder / "data", rows=100)
    return ["--model", str(base), "--data", str(data), "--precision", "fp32", "--device", "cpu"]


# One run


@dataclass(frozen=True)
class Ended:
    """A process that has ended, its exit code as shells give it."""

    code: int
    seconds: float
    out: str
    err: str

    def in_two_lines(self) -> str:
        """What the run says that it failed of; no traceback, and a remedy."""
        said = self.err.rpartition("error: ")[2]
        assert "Traceback" not in self.err and len(said.splitlines()) == 2, self.err
        return said


@dataclass
class Child:
    """A run of its own process; its output is in `log.out` and `log.err`."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    status: int | None = None

    def send(self, number: int) -> None:
        if not self.is_over():
            os.kill(self.pid, number)

    def is_over(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, limit: float = 120) -> Ended:
        """Until it is over; a run that hangs is killed and a failure."""
        until = time.monotonic() + limit
        while not self.is_over():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still there after {limit} s: {_text(self.log, '.err')}")
            time.sleep(0.001)
        code = self.status if self.status >= 0 else 128 - self.status
        seconds = time.monotonic() - self.started
        return Ended(code, seconds, _text(self.log, ".out"), _text(self.log, ".err"))


def start(
    flags: list,
    out: Path,
    *,
    fault: Fault | None = None,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> Child:
    """`train.py --out OUT` in a fork; what it prints goes beside its folder, or to `log`."""
    log = log or out.with_name(f"{out.name}-log")
    if pid := os.fork():
        return Child(pid, log)
    code = 99
    try:
        with contextlib.suppress(AttributeError):  # on Linux it does not outlive a test that fails
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for ending, number in ((".out", 1), (".err", 2)):
            os.dup2(os.open(f"{log}{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = be_a_script([*map(str, flags), "--out", str(out)], fault, env)
    finally:
        os._exit(code)


def be_a_script(argv: list[str], fault: Fault | None, env: dict | None) -> int:
    """What a fresh process would do from here on, torch being imported."""
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["train.py", *argv]
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"} | (env or {})
    sys.modules["report.figures"] = None  # a report without pictures: they are a second
    stopping.STARTED = time.monotonic()
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if fault:
            fault()
        return run_script(train.main)
    except SystemExit as leaving:
        return leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(flags: list, out: Path, *, fault: Fault | None = None, log: Path | None = None) -> Ended:
    return start(flags, out, fault=fault, log=log).wait()


def finish(flags: list, out: Path) -> Ended:
    """The same command, to the end."""
    ended = run(flags, out)
    assert ended.code == 0, ended
    return ended


def _text(log: Path, ending: str) -> str:
    return Path(f"{log}{ending}").read_text(errors="replace")


def await_steps(child: Child, out: Path, steps: int) -> None:
    """Return when the log has a line of so many steps, or the run is over."""
    until = time.monotonic() + 120
    while not child.is_over() and steps_logged(out) < steps:
        assert time.monotonic() < until, f"no step {steps} in 120 s"
        time.sleep(0.0005)


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"train_loss"') if path.exists() else 0


def slowed(seconds: float) -> Fault:
    """A fault that is none: each micro-batch takes so long, so that steps can be met."""

    def fault():
        whole = train.flat_batch
        train.flat_batch = lambda *a: time.sleep(seconds) or whole(*a)

    return fault


# What must hold


def left_behind(out: Path) -> dict:
    """All that a run comes to, bytes and hex floats, but for what depends on clocks."""
    newest = max((out / "checkpoints").glob("step-??????"))
    files = [*(out / "best").iterdir(), newest / "state.safetensors", out / "validation.jsonl"]
    kept = {str(path.relative_to(out)): path.read_bytes() for path in files}
    kept["log"] = [
        {k: v.hex() if isinstance(v, float) else v for k, v in line.items() if k not in CLOCKS}
        for line in read_log(out / "metrics.jsonl")
    ]
    progress = vars(Run(out).read_progress())
    kept["progress"] = {k: v for k, v in progress.items() if k not in ("seconds", "log_bytes")}
    return kept


def check_instant(out: Path) -> None:
    """What holds at every instant: best/ loads and is finite, and the disk does not fill up."""
    if (out / "best").exists():
        read_adapter_config(out / "best")
        tensors = load_file(out / "best" / WEIGHTS)
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    if (out / "checkpoints").exists():
        assert len(list((out / "checkpoints").iterdir())) <= KEEP + 2


def steps_to_do_again(out: Path) -> int:
    """Steps that are logged and in no whole checkpoint."""
    progress = Run(out).read_progress()
    return steps_logged(out) - (progress.cursor if progress else 0)


# What comes between a run and its files


@dataclass
class FileCalls:
    """Counts the calls that change files, and lets one of them end in a fault.

    `happen` is called before the call, or in the middle of it if it writes: at the `at`-th of these
    moments, from 0. Only in the `nth` call of `train.<within>`, if that is given.
    """

    at: int = -1
    happen: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    within: str | None = None
    nth: int = 1
    report: Path | None = None  # where the number of moments is left
    moments: int = 0
    active: bool = False

    NAMES = ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink", "remove", "open", "truncate",
             "ftruncate", "chmod", "link", "symlink", "sendfile")  # fmt: skip

    def __call__(self) -> None:
        """The fault itself: from now on the calls go through here."""
        for name in self.NAMES:
            setattr(os, name, self.watched(getattr(os, name)))
        whole = io.open
        io.open = builtins.open = self.opener(whole)
        if self.within is None:
            self.active = True
        else:
            setattr(train, self.within, self.region(getattr(train, self.within)))

    def moment(self) -> None:
        if not self.active:
            return
        self.moments += 1
        if self.moments - 1 == self.at:
            self.happen()
        if self.report is not None:
            self.active = False
            self.report.write_text(str(self.moments))
            self.active = True

    def region(self, function: Callable) -> Callable:
        def within(*args, **options):
            self.nth -= 1
            self.active = self.nth == 0
            try:
                return function(*args, **options)
            finally:
                self.active = False

        return within

    def watched(self, function: Callable) -> Callable:
        def call(*args, **options):
            self.moment()
            return function(*args, **options)

        return call

    def opener(self, function: Callable) -> Callable:
        def opened(file, mode="r", *args, **options):
            if not set(mode) & set("wax+"):
                return function(file, mode, *args, **options)
            self.moment()
            return _Written(function(file, mode, *args, **options), self)

        return opened


class _Written:
    """A file open for writing: half of what is written goes out before the rest."""

    def __init__(self, file, calls: FileCalls):
        self.file, self.calls = file, calls

    def write(self, data) -> int:
        half = len(data) // 2
        self.calls.moment()
        self.file.write(data[:half])
        self.file.flush()
        self.calls.moment()
        self.file.write(data[half:])
        self.file.flush()
        return len(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *raised):
        return self.file.__exit__(*raised)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def count_moments(flags: list, out: Path, within: str | None, nth: int = 1) -> int:
    """How many moments a run has in which a file call can fail."""
    report = out.parent / f"{out.name}-moments"
    assert run(flags, out, fault=FileCalls(within=within, nth=nth, report=report)).code == 0
    return int(report.read_text())


def copy(source: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(source, to))


# Ranks


def start_ranks(flags: list, out: Path, fault: Fault | None = None) -> list[Child]:
    """Two ranks; `fault` is in the second only."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(
            flags, out, fault=fault if rank else None, log=out.with_name(f"{out.name}-log-{rank}"),
            env=world | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def go_on_with_ranks(flags: list, out: Path) -> None:
    ended = [rank.wait() for rank in start_ranks(flags, out)]
    assert [e.code for e in ended] == [0, 0], ended


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
