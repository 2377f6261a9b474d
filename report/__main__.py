"""Write the report of a run, at any time in the run's life.

python -m report out/qwen2-0.5b-instruct-gsm8k --price-per-hour 2.5
"""

from errors import run_script  # first: from here on, Ctrl-C ends without a traceback

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import BadRun
from report.sections import write_report
from run.options import option, parse


@dataclass(frozen=True)
class ReportConfig:
    """The options."""

    run: str = option(
        "", "run folder, such as out/qwen2-0.5b-instruct-gsm8k; --run may be omitted", path="any"
    )
    price_per_hour: float | None = option(None, "price of the machine in dollars", least=0)


def main(argv: list[str] | None = None) -> None:
    """Write `report.html` and `report.md` into the run folder, which may be the first argument."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--run")
    config = parse(ReportConfig, argv, "Write report.html and report.md into a run folder.")
    if not config.run:
        raise BadRun("no run folder is given", "python -m report out/...")
    print(f"report in {write_report(Path(config.run), config.price_per_hour)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
