"""The figures of a report: each function takes plain values and returns one SVG.

Every line is drawn in a placeholder color, which becomes a CSS variable of the page, so that one
figure fits the light theme and the dark one. Text remains text, which can be selected and read
aloud. Needs matplotlib.
"""

import io
import re
import warnings

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation.statistics import wilson_interval
from report.records import Series

INK, MUTED, LINE, BASE, TUNED, MARK = (f"#0a0b0{i}" for i in range(1, 7))  # placeholder colors
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BASE: "base", TUNED: "tuned", MARK: "mark"}
MODELS = {"base": BASE, "tuned": TUNED}
STYLE = {
    "svg.fonttype": "none", "font.size": 10, "lines.linewidth": 1.8, "text.color": INK,
    "text.parse_math": False,  # a $ in a label is a dollar sign
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": LINE, "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False, "figure.facecolor": "none",
}  # fmt: skip
WIDTH, HEIGHT = 4.6, 3.3  # inches: two fit side by side, and one is legible on a phone
MOST_POINTS = 800  # of a line: more cannot be seen, and make the page large
LONGEST_LABEL = 22  # characters


@matplotlib.rc_context(STYLE)
def loss(train: Series, validation: Series, best_step: float | None) -> str:
    """Learning curves, with a star at the best validation."""
    figure, axes = _canvas("Loss", "optimizer step", "nats per supervised token")
    _curves(axes, train, validation)
    best = [point for point in validation if point[0] == best_step]
    if best:
        label = f"best, step {best_step:,.0f}"
        axes.plot(*best[0], "*", color=INK, markersize=13, label=label, zorder=4)
    return _svg(figure, "loss")


@matplotlib.rc_context(STYLE)
def token_accuracy(train: Series, validation: Series) -> str:
    """The share of reference tokens predicted correctly, which is not answer accuracy."""
    title = "Token accuracy (teacher-forced)"
    figure, axes = _canvas(title, "optimizer step", "% of supervised tokens")
    _curves(axes, *([(step, 100 * v) for step, v in points] for points in (train, validation)))
    return _svg(figure, "token-accuracy")


@matplotlib.rc_context(STYLE)
def rate_and_norm(learning_rates: Series, norms: Series, clip: float | None) -> str:
    """The learning rate above the gradient norm."""
    figure, (above, below) = _canvas("Learning rate and gradient norm", "", "", rows=2)
    above.set(ylabel="learning rate\n(per step)")
    above.plot(*_columns(learning_rates), color=TUNED)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    below.set(xlabel="optimizer step", ylabel="gradient norm\n(before clipping)")
    below.plot(*_columns(norms), color=TUNED, linewidth=0.8, label="gradient norm")
    if clip is not None and norms:
        below.axhline(clip, color=MARK, linestyle="--", linewidth=1.2, label=f"clipped at {clip:g}")
    return _svg(figure, "rate-and-norm")


@matplotlib.rc_context(STYLE)
def speed(points: Series) -> str:
    """Tokens per second, step by step."""
    figure, axes = _canvas("Training speed", "optimizer step", "tokens per second")
    _line_and_mean(axes, points, "")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _svg(figure, "speed")


@matplotlib.rc_context(STYLE)
def accuracy(
    title: str, ylabel: str, models: dict[str, dict[str, tuple[int, int]]], name: str
) -> str:
    """Each model's (correct, problems) by label, as a share with its 95 % Wilson interval."""
    figure, axes = _canvas(title, "% of problems answered correctly", ylabel)
    labels = list(dict.fromkeys(label for cells in models.values() for label in cells))
    for i, (model, cells) in enumerate(models.items()):
        heights = [labels.index(label) + 0.22 * (i - (len(models) - 1) / 2) for label in cells]
        shares = [100 * correct / max(n, 1) for correct, n in cells.values()]
        lows, highs = 100 * np.array([wilson_interval(*c) for c in cells.values()]).reshape(-1, 2).T
        errors = np.maximum(0, [shares - lows, highs - shares])
        axes.errorbar(
            shares, heights, xerr=errors, fmt="o", color=MODELS.get(model, MARK), label=model,
            markersize=6, capsize=3,
        )  # fmt: skip
    _label_rows(axes, labels)
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)
def mistakes(counts: dict[str, dict[str, int]], problems: int, name: str) -> str:
    """How many wrong answers of each kind each model gave."""
    figure, axes = _canvas("Kinds of mistakes", f"answers, of {problems:,}", "kind")
    kinds = list(dict.fromkeys(kind for of_model in counts.values() for kind in of_model))
    for i, (model, of_model) in enumerate(counts.items()):
        heights = [row + 0.38 * (i - (len(counts) - 1) / 2) for row in range(len(kinds))]
        widths = [of_model.get(kind, 0) for kind in kinds]
        axes.barh(heights, widths, 0.36, color=MODELS.get(model, MARK), label=model)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _label_rows(axes, kinds)
    return _svg(figure, name)


def _canvas(title: str, xlabel: str, ylabel: str, rows: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(rows, 1, sharex=True)
    if rows == 1:
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _label_rows(axes: Axes, labels: list[str]) -> None:
    """Name the rows, the first at the top."""
    short = [" ".join(label.split()) for label in labels]
    short = [s if len(s) <= LONGEST_LABEL else s[: LONGEST_LABEL - 1] + "…" for s in short]
    axes.set_yticks(range(len(labels)), short)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def _curves(axes: Axes, train: Series, validation: Series) -> None:
    _line_and_mean(axes, train, "train, ")
    if validation:
        style = {"color": MARK, "markersize": 4, "label": "validation", "zorder": 3}
        axes.plot(*_columns(validation), "o-", **style)


def _line_and_mean(axes: Axes, points: Series, prefix: str) -> None:
    """A thin line through every step, and one through the means of neighboring steps."""
    if not points:
        return
    steps, values = _columns(points)
    shown = slice(None, None, -(-len(steps) // MOST_POINTS))
    each = {"color": TUNED, "linewidth": 0.7, "alpha": 0.6, "label": f"{prefix}each step"}
    axes.plot(steps[shown], values[shown], **each)
    window = len(values) // 40
    if window > 1:
        sums, sizes = (np.convolve(x, np.ones(window), "same") for x in (values, values**0))
        label = f"{prefix}mean of {window} steps"
        axes.plot(steps[shown], (sums / sizes)[shown], color=TUNED, label=label)


def _columns(points: Series) -> np.ndarray:
    return np.array(points, dtype=float).reshape(-1, 2).T  # (2, points): steps and values


def _svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG in the page's colors; `name` makes its ids unique on the page."""
    handles = [h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    text = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.simplefilter("ignore")  # a glyph that matplotlib lacks is drawn by the browser
        figure.savefig(text, format="svg", metadata={"Date": None})
    head, body = text.getvalue().partition("<svg")[2].split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg{head} role="img">{body}'.strip()
