"""Values as text for a reader: shares, intervals, durations, prices, changes.

Formatters made with `known` take None, a value that is not known, and return it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from report.records import Share
from terminal import percent


def known(formatter: Callable[..., str]) -> Callable[..., str | None]:
    """`formatter`, but None for None."""
    return lambda value, *more: None if value is None else formatter(value, *more)


nats = known(lambda value: f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}")
count = known("{:,.0f}".format)
two_digits = known("{:.2f}".format)
share = known(percent)


def value(x: Any) -> str:
    """A JSON value without its syntax."""
    if isinstance(x, list):
        return ", ".join(map(value, x)) or "none"
    if isinstance(x, dict):
        return ", ".join(f"{k}: {value(v)}" for k, v in x.items()) or "none"
    if isinstance(x, bool) or x is None:
        return {True: "yes", False: "no", None: "not set"}[x]
    return f"{x:g}" if isinstance(x, float) else str(x)


@known
def accuracy(found: Share) -> str:
    """`12.5 % (8.0–18.9)`: a share with its 95 % interval."""
    return f"{share(found.value)} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def from_to(shares: Sequence[float]) -> str:
    """`1.0 → 97.5 %`, or `97.5 %` for a single share."""
    return " → ".join(f"{100 * value:.1f}" for value in shares) + " %" if shares else "not known"


def signed(value: float, digits: int = 1) -> str:
    """`+1.0` or `−1.0`, with a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


@known
def duration(seconds: float) -> str:
    """`41.4 s`, `12.0 min` or `2 h 00 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds / 60) < 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds // 3600:,.0f} h {seconds / 60 % 60:02.0f} min"


def cost(seconds: float | None, price_per_hour: float | None) -> str | None:
    """The price of this time in dollars; None if either is not known."""
    if price_per_hour is None or seconds is None:
        return None
    dollars = price_per_hour * seconds / 3600
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.3f}"
