"""The figures of a report as SVG, in the colors of the page's theme.

A point's `<title>` shows its values under the mouse pointer, without a script. Titles and legends
are HTML above the drawing, so that they wrap on a narrow page.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from report import show
from report.page import tag
from report.records import Series, Share

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 58, 20, 8, 38  # the margins of the axes last
ROW_HEIGHT, LABEL_WIDTH, LONGEST_LABEL = 30, 145, 24  # of `shares`; the last in characters
MOST_POINTS = 400  # of a curve: more cannot be seen, and make the page large
LOG_RANGE = 20  # an axis may be logarithmic if the largest value is this multiple of the smallest


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps."""

    label: str
    kind: str  # a class of report.css
    points: Series


@dataclass(frozen=True)
class Axis:
    """Draws the values `low` at `start` and `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, log: bool = False) -> "Axis":
        """The axis that `values` fit on; with `log`, logarithmic if their range is wide."""
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(1e-9, abs(low), abs(high)):  # a single value: in the middle
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        return cls(low, high, start, end, log and low > 1e-30 and high / low >= LOG_RANGE)

    def __call__(self, value: float) -> float:
        low, high, value = map(math.log10 if self.log else float, (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis, about five."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = range(first, last + 1, max(1, (last - first) // 5))
            parts = (1, 2, 5) if self.high / self.low < 200 else (1,)
            found = [10.0**power * part for power in powers for part in parts]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = unit * min((1, 2, 5, 10), key=lambda part: abs(unit * part - rough))
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            found = [step * i for i in range(first, last + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def each_and_mean(points: Series, prefix: str = "") -> list[Curve]:
    """Every step, and the means of neighboring steps if there are many."""
    curves, half = [Curve(f"{prefix}each step", "each", points)], len(points) // 80
    if half:
        values = [value for _, value in points]
        means = [
            (step, fmean(values[max(0, i - half) : i + half + 1]))
            for i, (step, _) in sample([*enumerate(points)])
        ]
        curves.append(Curve(f"{prefix}mean of {2 * half + 1} steps", "mean", means))
    return curves


def over_steps(title: str, unit: str, curves: Iterable[Curve], scale: str) -> str:
    """Curves over optimizer steps, on a "linear" scale, "from 0", or "log", as in `Axis.of`.

    Returns "" if there is no point.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    steps, values = zip(*(point for curve in curves for point in curve.points))
    values += (0,) if scale == "from 0" else ()
    x = Axis.of(steps, LEFT, WIDTH - RIGHT)
    y = Axis.of(values, HEIGHT - BOTTOM, TOP, log=scale == "log")
    drawn = [line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") for tick in y.ticks()]
    drawn += [text(LEFT - 6, y(tick) + 4, f"{tick:,.6g}", "end") for tick in y.ticks()]
    drawn += [text(x(tick), HEIGHT - 20, f"{tick:,.6g}", "middle") for tick in x.ticks()]
    drawn.append(text(WIDTH - RIGHT, HEIGHT - 3, "optimizer step", "end"))
    for curve in curves:
        points = [(x(step), y(value), step, value) for step, value in sample(curve.points)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down, *_ in points)
        drawn.append(f'<polyline class="{curve.kind}" points="{path}"/>')
        kind = curve.kind if len(points) < 40 else f"{curve.kind} unseen"  # has a title only
        for across, down, step, value in points:
            drawn.append(dot(across, down, kind, f"step {step:,.6g}: {value:,.4g}"))
    legend = {curve.label: curve.kind for curve in curves if len(curves) > 1}
    return figure(title, unit + ", logarithmic" * y.log, legend, HEIGHT, drawn)


def shares(title: str, unit: str, models: dict[str, dict[str, Share | None]]) -> str:
    """The shares of each model by label, with their intervals."""
    found = [
        (model, label, share)
        for model, by_label in models.items()
        for label, share in by_label.items()
        if share
    ]
    if not found:
        return ""
    labels = list(dict.fromkeys(label for _, label, _ in found))
    kinds = {model: model if model in ("base", "tuned") else "other" for model in models}
    bottom = TOP + ROW_HEIGHT * len(labels)
    highest = max(math.ceil(10 * share.high) for *_, share in found)  # in tenths
    x = Axis(0, 10 * highest, LABEL_WIDTH, WIDTH - RIGHT)
    drawn = [line(x(tick), TOP, x(tick), bottom, "grid") for tick in x.ticks()]
    drawn += [text(x(tick), bottom + 16, f"{tick:g}", "middle") for tick in x.ticks()]
    for i, label in enumerate(labels):
        short = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
        drawn.append(text(LABEL_WIDTH - 8, TOP + ROW_HEIGHT * (i + 0.5) + 4, short, "end"))
    for model, label, share in found:
        offset = 9 * ([*models].index(model) - (len(models) - 1) / 2)
        y, kind = TOP + ROW_HEIGHT * (labels.index(label) + 0.5) + offset, kinds[model]
        drawn.append(line(x(100 * share.low), y, x(100 * share.high), y, kind))
        about = f"{label}, {model}: {show.accuracy(share)}"
        drawn.append(dot(x(100 * share.value), y, kind, about))
    return figure(title, unit, kinds, bottom + 22, drawn)


def sample(points: Sequence) -> Sequence:
    """At most MOST_POINTS of the points, evenly spaced."""
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of SVG, of the CSS class `kind`."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(x: float, y: float, kind: str, about: str) -> str:
    """A circle of SVG that shows `about` when pointed at."""
    title = tag("title", about)
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{title}</circle>'


def text(x: float, y: float, content: str, anchor: str) -> str:
    """A text of SVG; `anchor` is the part of it at (x, y): start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def figure(title: str, unit: str, legend: dict[str, str], height: float, drawn: list[str]) -> str:
    """An HTML figure: the drawn SVG elements, with a title, unit and legend."""
    keys = "".join(tag("span", label, f"key {kind}") for label, kind in legend.items())
    caption = f"<figcaption>{tag('b', title)} {tag('span', unit)}{keys}</figcaption>"
    drawing = tag("title", title) + "".join(drawn)
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{drawing}</svg>'
    return f"<figure>{caption}{svg}</figure>"
