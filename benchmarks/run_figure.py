"""The picture of a run for a README: its losses, and the answers before and after.

python benchmarks/run_figure.py --run out/human --name "GSM8K" --out docs/real-run/run.svg
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_figures import draw, read_figures
from errors import run_script
from run.folder import Run
from run.options import option, parse


@dataclass(frozen=True)
class FigureConfig:
    run: str = option("out/demo", "folder of a run with one evaluation")
    name: str = option("this run", "what the picture calls it")
    out: str = option("run.svg", "file to write")


def main(argv: list[str] | None = None) -> None:
    """Draw what the folder holds."""
    config = parse(FigureConfig, argv, "The picture of a run.")
    folder = Path(config.run)
    draw(Run(folder).log()[0], [read_figures(folder)], [config.name], Path(config.out))


if __name__ == "__main__":
    sys.exit(run_script(main))
