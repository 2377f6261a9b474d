"""The pictures of a report, by matplotlib: each function takes plain values and returns one SVG.

The idea: a colour here is a name in disguise. Every line is drawn in a placeholder that becomes a
CSS variable of the page, so that one picture fits the light theme and the dark one; and its text
stays text, which a reader can select and a screen reader can read.
"""

import io
import re
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.statistics import wilson_interval

Points = Sequence[tuple[float, float]]  # (optimizer step, value)
Rates = dict[str, tuple[int, int]]  # what was counted -> right, of how many

INK, MUTED, LINE, BASE, TUNED, MARK = (f"#0a0b0{i}" for i in range(1, 7))  # no other colour is used
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BASE: "base", TUNED: "tuned", MARK: "mark"}
CONTESTANTS = {"base": BASE, "tuned": TUNED}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a label is a dollar
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
WIDTH, HEIGHT = 4.6, 3.3  # inches: two abreast on a desk, and still legible at a phone's width
DRAWN = 800  # points of a line at most: more are not seen, and make the page heavy


@matplotlib.rc_context(STYLE)
def loss(train: Points, validation: Points, best_step: float | None) -> str:
    """Learning curves; the best validation is marked."""
    figure, axes = _canvas("Loss", "optimizer step", "nats per supervised token")
    _curves(axes, train, validation)
    best = [(step, value) for step, value in validation if step == best_step]
    if best:
        label = f"best, step {best_step:,.0f}"
        axes.plot(*best[0], "*", color=INK, markersize=13, label=label, zorder=4)
    return _svg(figure, "loss")


@matplotlib.rc_context(STYLE)
def token_accuracy(train: Points, validation: Points) -> str:
    """The share of reference tokens guessed right, which is not answer accuracy."""
    title = "Token accuracy (teacher-forced)"
    figure, axes = _canvas(title, "optimizer step", "% of supervised tokens")
    _curves(axes, _percent(train), _percent(validation))
    return _svg(figure, "token-accuracy")


@matplotlib.rc_context(STYLE)
def rate_and_norm(rates: Points, norms: Points, clip: float | None) -> str:
    """The learning rate over the gradient's norm, one above the other."""
    figure = _figure("Learning rate and gradient norm")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set(ylabel="learning rate\n(per step)")
    above.plot(*_columns(rates), color=TUNED)
    above.ticklabel_format(axis="y", style="plain", useOffset=False)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    below.set(xlabel="optimizer step", ylabel="gradient norm\n(before clipping)")
    below.plot(*_columns(norms), color=TUNED, linewidth=0.8, label="gradient norm")
    if clip is not None and norms:
        below.axhline(clip, color=MARK, linestyle="--", linewidth=1.2, label=f"clipped at {clip:g}")
    return _svg(figure, "rate-and-norm")


@matplotlib.rc_context(STYLE)
def speed(points: Points) -> str:
    """Tokens a second, step by step."""
    figure, axes = _canvas("Training speed", "optimizer step", "tokens per second")
    _raw_and_mean(axes, points, "")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _svg(figure, "speed")


@matplotlib.rc_context(STYLE)
def answer_accuracy(rates: dict[str, Rates], what: str, name: str) -> str:
    """Each scorer's rate for each contestant, with 95 % Wilson intervals; the headline on top."""
    figure, axes = _canvas(f"{what}, 95 % intervals", "% of problems answered right", "scorer")
    _intervals(axes, rates, flat=True)
    axes.invert_yaxis()
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)
def answer_accuracy_by_steps(rates: dict[str, Rates], name: str) -> str:
    """Rates by how many steps the reference solution takes, with 95 % Wilson intervals."""
    title = "Answer accuracy by reasoning steps"
    figure, axes = _canvas(title, "reasoning steps; below, how many problems", "% answered right")
    _intervals(axes, rates, flat=False)
    axes.set_ylim(bottom=0)
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)
def mistakes(counts: dict[str, dict[str, int]], problems: int, name: str) -> str:
    """How many answers went wrong in which way; kinds as they are listed, from the top."""
    kinds = list(dict.fromkeys(kind for of in counts.values() for kind in of))
    figure, axes = _canvas("Kinds of mistakes", f"answers, of {problems:,}", "kind")
    for (contestant, of), offset in zip(counts.items(), _offsets(len(counts), 0.38)):
        places = [i + offset for i in range(len(kinds))]
        values = [of.get(kind, 0) for kind in kinds]
        axes.barh(places, values, 0.36, color=_colour(contestant), label=contestant)
    axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _svg(figure, name)


def _figure(title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _canvas(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = _figure(title)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _curves(axes: Axes, train: Points, validation: Points) -> None:
    _raw_and_mean(axes, train, "train, ")
    if validation:
        axes.plot(
            *_columns(validation), "o-", color=MARK, markersize=4, label="validation", zorder=3
        )


def _raw_and_mean(axes: Axes, points: Points, of: str) -> None:
    """A thin line through every step, and one through the means of its neighbourhood."""
    if not points:
        return
    steps, values = _columns(points)
    axes.plot(
        *_thinned(steps, values), color=TUNED, linewidth=0.7, alpha=0.6, label=f"{of}each step"
    )
    window = len(values) // 40
    if window > 1:
        mean = _running_mean(values, window)
        axes.plot(*_thinned(steps, mean), color=TUNED, label=f"{of}mean of {window} steps")


def _intervals(axes: Axes, rates: dict[str, Rates], flat: bool) -> None:
    """A dot and its interval a rate, contestants beside each other; `flat`: rates along x."""
    groups = list(dict.fromkeys(group for of in rates.values() for group in of))
    sizes = {group: n for of in rates.values() for group, (_, n) in of.items()}
    for (contestant, of), offset in zip(rates.items(), _offsets(len(rates), 0.22)):
        counted = [(groups.index(group) + offset, *_interval(*of[group])) for group in of]
        places, values, below, above = np.array(counted).T
        x, y, error = (values, places, "xerr") if flat else (places, values, "yerr")
        axes.errorbar(
            x, y, fmt="o", color=_colour(contestant), label=contestant, markersize=6,
            capsize=3, **{error: (below, above)},
        )  # fmt: skip
    names = [_short(g) if flat else f"{_short(g, 8)}\n{sizes[g]:,}" for g in groups]
    axis = axes.yaxis if flat else axes.xaxis
    axis.set_ticks(range(len(groups)), names)
    axes.grid(axis="y" if flat else "x", visible=False)
    axes.margins(**{"y" if flat else "x": 0.12})


def _interval(right: int, n: int) -> tuple[float, float, float]:
    """(rate, how far down and up its interval reaches), in per cent."""
    low, high = wilson_interval(right, n)
    rate = right / n if n else 0.0
    return 100 * rate, 100 * max(0.0, rate - low), 100 * max(0.0, high - rate)


def _offsets(count: int, width: float) -> list[float]:
    """Places beside each other around 0."""
    return [width * (i - (count - 1) / 2) for i in range(count)]


def _colour(contestant: str) -> str:
    return CONTESTANTS.get(contestant, MARK)


def _percent(points: Points) -> Points:
    return [(step, 100 * value) for step, value in points]


def _columns(points: Points) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` neighbours, over fewer at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stride = -(-len(steps) // DRAWN)
    return steps[::stride], values[::stride]


def _short(label: str, most: int = 22) -> str:
    label = " ".join(label.split())
    return label if len(label) <= most else label[: most - 1] + "…"


def _svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: as wide as its place, in the page's colours, its ids its own."""
    handles = [h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]]
    if len(handles) > 1:
        columns = min(2, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    text = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.simplefilter("ignore")  # a character without a glyph is drawn by the browser
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    head, body = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head) + ' role="img"'
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for place in ('id="', "url(#", 'href="#'):
        body = body.replace(place, f"{place}{name}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return f"{head}>{body}".strip()
