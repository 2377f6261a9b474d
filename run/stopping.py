"""Leaving in good order: a signal or the clock asks, the loops look, and no step is torn apart.

A handler only takes note. A second Ctrl-C leaves at once, as it would anywhere. Exit codes are
those that shells and queues expect: 128 and the signal's number, or 75, "try again", for the clock.
"""

import os
import signal
import stat
import time

STARTED = time.monotonic()  # of the process, but for what it imported before
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_IS_UP = 75  # EX_TEMPFAIL


class StopRequested(Exception):
    """Raised by `Stop.poll` in the middle of work that can be done again."""


class Stop:
    """Whether a run is asked to leave, and why; `minutes` is all the time it has, or None."""

    def __init__(self, minutes: float | None = None):
        self.signal: signal.Signals | None = None
        self.until = None if minutes is None else STARTED + 60 * minutes
        self.longest = 0.0  # seconds of a turn, all that lies between two looks

    def __enter__(self) -> "Stop":
        """Signals are taken note of; one that was ignored, as under nohup, stays ignored."""
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._take_note)
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        if self.before[signal.SIGINT] != signal.SIG_IGN:  # a second Ctrl-C is not to wait
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGHUP:
            _leave_the_terminal()

    def requested(self) -> bool:
        """A signal came, or another turn as long as the longest would end too late."""
        late = self.until is not None and time.monotonic() + 2 * self.longest > self.until
        return late or self.signal is not None

    def poll(self) -> None:
        """StopRequested if it is asked for: for loops that have nothing to finish first.

        The clock does not end what a sitting begins with, or sittings that are too short for it
        would begin it for ever.
        """
        if self.signal is not None or self.longest and self.requested():
            raise StopRequested

    def record(self, seconds: float) -> None:
        """How long a turn was."""
        self.longest = max(self.longest, seconds)

    @property
    def exit_code(self) -> int:
        return TIME_IS_UP if self.signal is None else 128 + self.signal

    @property
    def why(self) -> str:
        if self.signal is not None:
            return self.signal.name
        return "--max-minutes are over" if self.requested() else "another rank was asked to leave"


def _leave_the_terminal() -> None:
    """Write to nowhere what would be written to a terminal: it has gone, and writing would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
