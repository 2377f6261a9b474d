"""Values as text for a reader: shares, intervals, durations, prices, changes."""

from collections.abc import Callable, Sequence
from typing import Any

from evaluation.statistics import wilson_interval
from report.page import MISSING

nats = "{:.4f}".format
count = "{:,.0f}".format


def value(x: Any) -> str:
    """A JSON value without its syntax."""
    if isinstance(x, list):
        return ", ".join(map(value, x)) or "none"
    if isinstance(x, dict):
        return ", ".join(f"{k}: {value(v)}" for k, v in x.items()) or "none"
    if isinstance(x, bool) or x is None:
        return {True: "yes", False: "no", None: MISSING}[x]
    return f"{x:g}" if isinstance(x, float) else str(x)


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def between(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def from_to(shares: Sequence[float]) -> str:
    """`1.0 → 97.5 %`, or `97.5 %` for a single share."""
    return " → ".join(f"{100 * value:.1f}" for value in shares) + " %" if shares else "not known"


def accuracy(counts: tuple[float, int]) -> str:
    """`12.5 % (8.0–18.9)`: (correct, problems) as a share with its 95 % Wilson interval."""
    correct, problems = counts
    if not problems or not 0 <= correct <= problems:
        return MISSING
    low, high = wilson_interval(int(correct), problems)
    return f"{share(correct / problems)} ({100 * low:.1f}–{100 * high:.1f})"


def accuracy_of(problems: int) -> Callable[[float], str]:
    """A formatter of how many of `problems` are correct."""
    return lambda correct: accuracy((correct, problems))


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def change(pair: Sequence[float], *, points: bool = False) -> tuple[str, str, str]:
    """First, last, and the change: in per cent of the first, or of shares in `points`."""
    if not pair:
        return MISSING, MISSING, MISSING
    first, last = pair
    if points:
        gained = f"{signed(100 * (last - first), 2)} points"
        return f"{100 * first:.2f} %", f"{100 * last:.2f} %", gained
    return nats(first), nats(last), f"{signed(100 * (last / first - 1), 2)} %" if first else MISSING


def duration(seconds: float) -> str:
    """`41.4 s`, `12.0 min` or `2 h 00 min`."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(minutes) < 60:
        return f"{minutes:.1f} min"
    return f"{hours // 1:,.0f} h {minutes % 60:02.0f} min"


def cost(price_per_hour: float | None, seconds: float | None) -> str:
    if price_per_hour is None or seconds is None:
        return MISSING
    dollars = price_per_hour * seconds / 3600
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.3f}"
