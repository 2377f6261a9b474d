"""Runs of train.py in forked processes, with faults injected from outside.

torch is imported once and every run is a fork, so a run takes about a second. A `fault` is called
in the child before its run: it sets limits, or replaces functions between the run and the system.
"""

import builtins
import contextlib
import ctypes
import errno
import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

import train
from errors import run_script
from files import damage
from lora.peft_format import WEIGHTS, read_adapter_config
from run import stopping
from run.folder import KEEP, Run
from tests import toys
from tests.toys import read_log

# 3 epochs of 12 steps of 4 micro-batches, with dropout, and a validation every 6 steps.
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
    """A process that has ended; `code` is its exit code as shells report it."""

    code: int
    seconds: float
    out: str
    err: str

    def two_line_error(self) -> str:
        """The error message; fails unless it has two lines and no traceback."""
        message = self.err.rpartition("error: ")[2]
        assert "Traceback" not in self.err and len(message.splitlines()) == 2, self.err
        return message


@dataclass
class Child:
    """A run in a process of its own; its output goes to `log.out` and `log.err`."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    status: int | None = None

    def send(self, number: int) -> None:
        if not self.has_ended():
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, limit: float = 120) -> Ended:
        """Wait until it has ended; after `limit` seconds it is killed, and the test fails."""
        deadline = time.monotonic() + limit
        while not self.has_ended():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {limit} s: {_text(self.log, '.err')}")
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
    """Run `train.py --out OUT` in a fork; its output goes to `log`, by default next to `out`."""
    log = log or out.with_name(f"{out.name}-log")
    if pid := os.fork():
        return Child(pid, log)
    code = 99
    try:
        with contextlib.suppress(AttributeError):  # on Linux it dies with a test that fails
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for ending, number in ((".out", 1), (".err", 2)):
            os.dup2(os.open(f"{log}{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = _run_as_script([*map(str, flags), "--out", str(out)], fault, env)
    finally:
        os._exit(code)


def _run_as_script(argv: list[str], fault: Fault | None, env: dict | None) -> int:
    """What a new process would do after its imports."""
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["train.py", *argv]
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"} | (env or {})
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
    """Run to the end, without a fault."""
    ended = run(flags, out)
    assert ended.code == 0, ended
    return ended


def _text(log: Path, ending: str) -> str:
    path = Path(f"{log}{ending}")  # not there yet if the process was killed in its first moments
    return path.read_text(errors="replace") if path.exists() else ""


def await_steps(child: Child, out: Path, steps: int) -> None:
    """Wait until the log has the lines of `steps` steps, or the run has ended."""
    deadline = time.monotonic() + 120
    while not child.has_ended() and steps_logged(out) < steps:
        assert time.monotonic() < deadline, f"no step {steps} in 120 s"
        time.sleep(0.0005)


def steps_logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"train_loss"') if path.exists() else 0


def slowed(seconds: float) -> Fault:
    """Not a fault: each micro-batch takes longer, so that a test can act between two steps."""

    def fault():
        flat_batch = train.flat_batch
        train.flat_batch = lambda *a: time.sleep(seconds) or flat_batch(*a)

    return fault


def counting_micro_batches() -> Fault:
    """Not a fault: the process's clocks show a second more for each micro-batch, and nothing else,
    so that what a time limit does depends on no machine's speed.
    """

    def fault():
        begun, flat_batch = [], train.flat_batch
        train.flat_batch = lambda *a: begun.append(a) or flat_batch(*a)
        time.monotonic = time.perf_counter = lambda: float(len(begun))
        stopping.STARTED = 0.0

    return fault


# What must hold


def results(out: Path) -> dict:
    """All results of a run, as bytes and hexadecimal floats, except what depends on clocks."""
    newest = max((out / "checkpoints").glob("step-??????"))
    files = [*(out / "best").iterdir(), newest / "state.safetensors", out / "validation.jsonl"]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    found["log"] = [
        {k: v.hex() if isinstance(v, float) else v for k, v in line.items() if k not in CLOCKS}
        for line in read_log(out / "metrics.jsonl")
    ]
    progress = vars(Run(out).read_progress())
    found["progress"] = {k: v for k, v in progress.items() if k not in ("seconds", "log_bytes")}
    return found


def check_invariants(out: Path) -> None:
    """Assert what holds at every instant: best/ can be loaded and is finite, and checkpoints do not
    pile up.
    """
    if (out / "best").exists():
        read_adapter_config(out / "best")
        tensors = load_file(out / "best" / WEIGHTS)
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
    if (out / "checkpoints").exists():
        assert len(list((out / "checkpoints").iterdir())) <= KEEP + 2


def unsaved_steps(out: Path) -> int:
    """Steps that are logged and in no complete checkpoint, so that they must be repeated."""
    progress = Run(out).read_progress()
    return steps_logged(out) - (progress.cursor if progress else 0)


def check_random_kills(flags: list, folder: Path, seeds: range, expected: dict) -> int:
    """Kill a run at a random moment of the time that it takes, once per seed, and finish it: its
    results must be the expected ones. Returns how many runs were killed before their end.
    """
    killed, seconds = 0, finish([*flags, "--save-every", 0], folder / "whole").seconds
    for seed in seeds:
        rng, out = random.Random(seed), folder / f"kill-{seed}"
        save_every = rng.choice([0, 0.1, 1000])
        command = [*flags, "--save-every", save_every]
        child = start(command, out)
        time.sleep(rng.uniform(0, seconds))
        child.send(signal.SIGKILL)
        killed += child.wait().code == 137
        check_invariants(out)
        assert save_every > 0 or unsaved_steps(out) <= 1
        finish(command, out)
        assert results(out) == expected, f"seed {seed}"
        shutil.rmtree(out)
    return killed


def count_detected_flips(checkpoint: Path, seeds: range) -> int:
    """Flip one random bit of a checkpoint's files, once per seed; how many flips `damage`
    detects.
    """
    files = sorted(checkpoint.iterdir())
    detected = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(files)
        intact = path.read_bytes()
        path.write_bytes(flip_bit(intact, rng.randrange(8 * len(intact))))
        detected += damage(checkpoint) is not None
        path.write_bytes(intact)
    assert damage(checkpoint) is None
    return detected


def flip_bit(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def cut_sizes(size: int) -> list[int]:
    """Sizes to which a file of `size` bytes is cut."""
    return [0, 1, size // 2, size - 1]


# Faults in file calls


@dataclass
class FileCalls:
    """Counts the calls that change files, and injects a fault into one of them.

    There is a fault point before each such call, and one in the middle of each write. `action` is
    called at fault point number `at`, from 0. With `within`, only those of the `nth` call of this
    function of train.py, or method of Run, count.
    """

    at: int = -1
    action: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    within: str | None = None
    nth: int = 1
    report: Path | None = None  # file for the number of fault points
    points: int = 0
    active: bool = False

    NAMES = ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink", "remove", "open", "truncate",
             "ftruncate", "chmod", "link", "symlink", "sendfile")  # fmt: skip

    def __call__(self) -> None:
        """The fault itself: replace the functions that change files."""
        for name in self.NAMES:
            setattr(os, name, self.watched(getattr(os, name)))
        io.open = builtins.open = self.opener(io.open)
        if self.within is None:
            self.active = True
        else:
            owner = Run if hasattr(Run, self.within) else train
            setattr(owner, self.within, self.region(getattr(owner, self.within)))

    def fault_point(self) -> None:
        if not self.active:
            return
        self.points += 1
        if self.points - 1 == self.at:
            self.action()
        if self.report is not None:
            self.active = False
            self.report.write_text(str(self.points))
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
            if "torchinductor" not in str(args[:1]):  # PyTorch's own cache, which it can do without
                self.fault_point()
            return function(*args, **options)

        return call

    def opener(self, function: Callable) -> Callable:
        def opened(file, mode="r", *args, **options):
            if not set(mode) & set("wax+"):
                return function(file, mode, *args, **options)
            self.fault_point()
            return _Written(function(file, mode, *args, **options), self)

        return opened


class _Written:
    """A file open for writing, which writes each piece of data in two halves."""

    def __init__(self, file, calls: FileCalls):
        self.file, self.calls = file, calls

    def write(self, data) -> int:
        half = len(data) // 2
        self.calls.fault_point()
        self.file.write(data[:half])
        self.file.flush()
        self.calls.fault_point()
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


def count_fault_points(flags: list, out: Path, within: str | None, nth: int = 1) -> int:
    """The number of fault points of a run, or of a part of it."""
    report = out.parent / f"{out.name}-points"
    assert run(flags, out, fault=FileCalls(within=within, nth=nth, report=report)).code == 0
    return int(report.read_text())


def copy(source: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(source, to))


# Ranks


def start_ranks(
    flags: list, out: Path, fault: Fault | None = None, first: Fault | None = None
) -> list[Child]:
    """Start two ranks; the second has the `fault`, the first that of its own."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(toys.free_port())}
    return [
        start(
            flags, out, fault=fault if rank else first, log=out.with_name(f"{out.name}-log-{rank}"),
            env=world | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def resume_with_ranks(flags: list, out: Path) -> None:
    """Run two ranks to the end, without a fault."""
    ended = [rank.wait() for rank in start_ranks(flags, out)]
    assert [e.code for e in ended] == [0, 0], ended


def check_lost_ranks(two_ranks: tuple, folder: Path, seeds: range) -> int:
    """Kill the second of two ranks at a random step, once per seed: the first must stop, and the
    resumed run must have the expected results. Returns how many runs this interrupted.
    """
    (flags, expected), interrupted = two_ranks, 0
    for seed in seeds:
        rng, out = random.Random(seed), folder / f"lost-{seed}"
        first, second = start_ranks(flags, out)
        await_steps(first, out, rng.randrange(1, 10))
        time.sleep(rng.uniform(0, 0.05))
        second.send(signal.SIGKILL)
        ended = first.wait(limit=30)
        if ended.code != 0:  # 0: it had finished before
            interrupted += 1
            assert ended.code == 1 and "lost another rank" in ended.two_line_error(), ended
        second.wait()
        check_invariants(out)
        resume_with_ranks(flags, out)
        assert results(out) == expected, f"seed {seed}"
    return interrupted
