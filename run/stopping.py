"""Graceful shutdown: a signal or time limit sets a flag, the loops poll it, and no step is
interrupted.

A second Ctrl-C interrupts at once, as it would anywhere. Exit codes are those that shells and job
schedulers expect: 128 plus the signal's number, or 75 ("temporary failure, try again") for the
time limit.
"""

import math
import signal
import time
from typing import Any

STARTED = time.monotonic()  # of the process, apart from its imports before this one
# SIGHUP: the terminal was closed. SIGUSR1: what Slurm can send some time before it ends a job.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows: two
TIME_IS_UP = 75  # EX_TEMPFAIL of <sysexits.h>
GRACE = 10.0  # seconds from a signal within which a step is finished; a longer one is given up
LOOK_SECONDS = 1.0  # between two looks for a stop request of another rank


class StopRequested(Exception):
    """Raised by `Stop.poll` inside work that can be repeated."""


class Notice:
    """A stop request that every rank can see without waiting for another: a key in their store.

    A signal may reach a single rank, while the others are in the middle of long work.
    """

    def __init__(self, store: Any):
        """`store` is the `torch.distributed.Store` of the ranks."""
        self.store, self.looked = store, -math.inf

    def post(self) -> None:
        self.store.set("stop", "requested")

    def is_posted(self) -> bool:
        """Whether a rank has posted it; the store is asked at most every `LOOK_SECONDS`."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return False
        self.looked = now
        return self.store.check(["stop"])


class Stop:
    """Whether the session should stop, and why.

    Args:
        minutes: time limit of the session, from the start of the process; None for no limit.
        notice: where ranks see that another one has raised StopRequested; None for a single rank.
    """

    def __init__(self, minutes: float | None = None, notice: Notice | None = None):
        self.notice = notice
        self.signal: signal.Signals | None = None
        self.signal_time = 0.0
        self.deadline = None if minutes is None else STARTED + 60 * minutes
        self.longest = 0.0  # seconds of the longest piece of work between two polls

    def __enter__(self) -> "Stop":
        """Record signals from now on; one that was ignored, as under nohup, stays ignored."""
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._record_signal)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record_signal(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal_time = time.monotonic()
        self.signal = signal.Signals(number)
        if self.before[signal.SIGINT] != signal.SIG_IGN:  # a second Ctrl-C must not wait
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether a signal came, or too little time is left for another piece of work."""
        late = self.deadline is not None and time.monotonic() + 2 * self.longest > self.deadline
        return late or self.signal is not None

    def poll(self) -> None:
        """Raise StopRequested if a stop is requested of any rank: for loops that need not finish.

        The time limit does not interrupt the first piece of work of a session: sessions shorter
        than that would otherwise repeat it forever.
        """
        if self.signal is not None or self.longest and self.requested():
            if self.notice:
                self.notice.post()
            raise StopRequested
        if self.notice and self.notice.is_posted():
            raise StopRequested

    def poll_in_step(self) -> None:
        """Raise StopRequested if a signal came more than `GRACE` seconds ago.

        Called before each micro-batch, it bounds the time to a stop by `GRACE` and one micro-batch,
        and what is lost by one step.
        """
        if self.signal is not None and time.monotonic() - self.signal_time > GRACE:
            raise StopRequested

    def record(self, seconds: float) -> None:
        """Record how long the work between two polls took."""
        self.longest = max(self.longest, seconds)

    @property
    def exit_code(self) -> int:
        """75 for a time limit, or the shell's code for a signal: 128 plus its number."""
        return TIME_IS_UP if self.signal is None else 128 + self.signal

    @property
    def reason(self) -> str:
        """Why the session stops, for people."""
        if self.signal is not None:
            return self.signal.name
        return "--max-minutes reached" if self.requested() else "stop requested on another rank"
