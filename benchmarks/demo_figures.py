"""The demo's figures in the README: three seeds trained and evaluated, a picture, and a text block.

    python benchmarks/demo_figures.py --out out/demo-figures       # about four minutes

writes docs/demo.svg, docs/demo.json (the figures of all seeds) and docs/demo.txt (what the two
commands print for the first seed, shortened). A test compares the README with the last two.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, processor, script
from errors import run_script
from evaluation.statistics import wilson_interval
from run.folder import Run
from run.options import option, parse

DOCS = ROOT / "docs"
SEEDS = (0, 1, 2)
# The lines that the README shows, of those printed.
SHOWN = re.compile(
    r"rows  |trainable|step +\d+  val loss .*best$|^ +base +tuned"
    r"|answers correct, numeric|answers with|loss, nats|classified as wrong plan"
    r"|tuned against base|fixed, \d+ broken"
)


@dataclass(frozen=True)
class DemoConfig:
    out: str = option("out/demo-figures", "folder for the runs")


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate each seed as a user would, then write the three files."""
    out = Path(parse(DemoConfig, argv, "The demo's figures in the README.").out).resolve()
    figures, printed = [], ""
    for seed in SEEDS:
        run = out / f"seed-{seed}"
        text = script("train.py", "--demo", "--seed", seed, "--out", run)
        text += script("evaluate.py", "--demo", "--adapter", run / "best")
        printed = printed or text
        figures.append({"seed": seed} | read_figures(run))
        print(f"seed {seed}: {figures[-1]['base']} -> {figures[-1]['tuned']} correct"
              f" of {figures[-1]['problems']}")  # fmt: skip
    lines = [line.rstrip() for line in printed.splitlines() if SHOWN.search(line)]
    validations = [line for line in lines if "val loss" in line]
    left_out = set(validations[1:-1])  # the README shows the one before the first step and the last
    block = "\n".join(line for line in lines if line not in left_out) + "\n"
    (DOCS / "demo.txt").write_text(block, "utf-8")
    (DOCS / "demo.json").write_text(
        json.dumps({"processor": processor(), "seeds": figures}, indent=2) + "\n", "utf-8"
    )
    log, names = Run(out / f"seed-{SEEDS[0]}").log()[0], [f"seed {seed}" for seed in SEEDS]
    draw(log, figures, names, DOCS / "demo.svg")


def read_figures(run: Path) -> dict[str, int]:
    """Problems, and how many of them each model answers correctly."""
    (path,) = run.glob("evaluation/*/result.json")
    result = json.loads(path.read_text("utf-8"))
    correct = {name: sum(result["models"][name]["outcomes"]) for name in ("base", "tuned")}
    return {"problems": result["problems"]} | correct


def draw(
    log: list[dict[str, Any]], figures: list[dict[str, int]], names: list[str], path: Path
) -> None:
    """Losses of the first run; correct answers of all runs, by name, with 95 % intervals."""
    style = {"svg.fonttype": "path", "svg.hashsalt": "demo", "font.size": 10,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        for key, name, color, form in (
            ("train_loss", "training", "#86b6ef", "-"),
            ("val_loss", "validation", "#eb6834", "o-"),
        ):
            points = [(line["step"], line[key]) for line in log if key in line]
            left.plot(*zip(*points), form, color=color, label=name, markersize=4)
        left.set(yscale="log", xlabel="optimizer step", ylabel="nats per supervised token")
        left.legend(frameon=False)
        for i, (name, color) in enumerate((("base", "#8a8985"), ("tuned", "#2a78d6"))):
            counts = [(f[name], f["problems"]) for f in figures]
            shares = [100 * correct / n for correct, n in counts]
            bounds = [wilson_interval(*count) for count in counts]
            errors = [
                [max(0.0, s - 100 * low) for s, (low, _) in zip(shares, bounds)],
                [max(0.0, 100 * high - s) for s, (_, high) in zip(shares, bounds)],
            ]
            highest = 100 * max(high for _, high in bounds)
            places = [place + 0.36 * (i - 0.5) for place in range(len(figures))]
            right.bar(places, shares, 0.34, yerr=errors, capsize=3, color=color, label=name)
            for x, share, high in zip(places, shares, errors[1]):
                right.annotate(
                    f"{share:.1f}", (x, share + high + highest / 100), ha="center", fontsize=9
                )
        right.set_xticks(range(len(figures)), names)
        right.set(
            ylim=(0, 1.18 * highest), ylabel=f"% of {figures[0]['problems']} test problems correct"
        )
        right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.14))
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    sys.exit(run_script(main))
